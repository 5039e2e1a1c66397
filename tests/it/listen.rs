//! The address that the service listens on without a setting, and with the platforms' `PORT`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::ports::free_address;

use crate::support::{Ended, Service, program, settings, without_stores};

#[tokio::test]
async fn port_is_served_on_every_address_of_both_families() {
    let port = free_port();
    let service = without_stores(&[("BIND_ADDR", ""), ("PORT", &port.to_string())]).await;
    assert_eq!(service.address, every_address(Ipv6Addr::UNSPECIFIED, port));
    assert_responds(
        &service,
        &[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    )
    .await;
    // The healthcheck reads the same variable, and reports that the stores are down.
    let ended = Ended::of(&["healthcheck"], &settings(&[("PORT", &port.to_string())])).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.errors.contains("responded with 503"), "{ended:?}");
}

#[tokio::test]
async fn address_wins_over_port() {
    let port = free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port)).to_string();
    let service = without_stores(&[("BIND_ADDR", &address), ("PORT", "1")]).await;
    assert_eq!(service.address.to_string(), address);
}

#[tokio::test]
async fn kernel_without_ipv6_is_served_by_ipv4() {
    let port = free_port();
    let given = settings(&[
        ("DB_HOST", "127.0.0.1"),
        ("DB_PORT", "1"),
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", "1"),
        ("BIND_ADDR", ""),
        ("PORT", &port.to_string()),
    ]);
    let service = program(&["serve"], &given);
    let mut command = std::process::Command::new("python3");
    command
        .args(["-c", NO_IPV6])
        .arg(service.get_program())
        .arg("serve")
        .envs(given.iter().map(|(name, value)| (name, value)));
    let service = Service::spawn(command).await;
    assert_eq!(service.address, every_address(Ipv4Addr::UNSPECIFIED, port));
    assert_responds(&service, &[Ipv4Addr::LOCALHOST.into()]).await;
}

/// Becomes a program for which the kernel has no IPv6: a seccomp filter lets `socket(AF_INET6, …)`
/// fail with EAFNOSUPPORT.
const NO_IPV6: &str = r#"
import ctypes, os, platform, struct, sys
socket, arch = {"x86_64": (41, 0xC000003E), "aarch64": (198, 0xC00000B7)}[platform.machine()]
def step(code, jt, jf, k):
    return struct.pack("HBBI", code, jt, jf, k)
program = b"".join([
    step(0x20, 0, 0, 4), step(0x15, 0, 4, arch),
    step(0x20, 0, 0, 0), step(0x15, 0, 2, socket),
    step(0x20, 0, 0, 16), step(0x15, 1, 0, 10),
    step(0x06, 0, 0, 0x7FFF0000),
    step(0x06, 0, 0, 0x00050000 | 97),
])
memory = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"#;

fn free_port() -> u16 {
    free_address().expect("a free port").port()
}

fn every_address(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

async fn assert_responds(service: &Service, addresses: &[IpAddr]) {
    for address in addresses {
        let address = SocketAddr::new(*address, service.address.port());
        let response = service.client.get(format!("http://{address}/health/live"));
        let response = response.send().await.expect("a response");
        assert_eq!(response.status(), 200, "{address}");
    }
}
