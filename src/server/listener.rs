//! The listening socket: how it opens, why it can fail to accept, and how it closes without
//! resetting a client.
//!
//! Must not know: what happens to accepted connections.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::Instant;

/// Opens a listener on `addr` with a backlog of `backlog` connections (the kernel caps it, on Linux
/// at `net.core.somaxconn`). The address `[::]` means every address, those of IPv4 too; where the
/// kernel has no IPv6, it means `0.0.0.0`. Must be called within a tokio runtime.
///
/// # Errors
///
/// The system's error, with the address.
pub fn bind(addr: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let every_ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, addr.port()));
    let is_every_ipv6 = addr.is_ipv6() && addr.ip().is_unspecified();
    let bound = match listen(addr, backlog) {
        Err(error) if is_every_ipv6 && has_no_ipv6(&error) => listen(every_ipv4, backlog),
        bound => bound,
    };
    bound.map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {addr}: {error}")))
}

fn listen(addr: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if addr.is_ipv6() && addr.ip().is_unspecified() {
        // The kernel's default can be changed (net.ipv6.bindv6only).
        SockRef::from(&socket).set_only_v6(false)?;
    }
    // Without this a restart fails while connections of the last run are in TIME_WAIT. On
    // Windows the option would let another program share the port.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(backlog)
}

/// Whether the kernel was built or started without IPv6.
fn has_no_ipv6(error: &io::Error) -> bool {
    let errno = error
        .raw_os_error()
        .map(rustix::io::Errno::from_raw_os_error);
    matches!(
        errno,
        Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL)
    )
}

/// Whether an accept failed because of the connection it was about to return, so that the next
/// accept can succeed at once (accept(2), "Error handling"). Any other error concerns this process
/// or host.
pub(super) fn concerns_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::Interrupted
            | io::ErrorKind::NetworkUnreachable
    )
}

/// Logs at most one line a second about a listener that cannot accept.
#[derive(Default)]
pub(super) struct Warnings {
    last: Option<Instant>,
    suppressed: u64,
}

impl Warnings {
    pub(super) fn accept_failed(&mut self, error: &io::Error) {
        let interval = Duration::from_secs(1);
        if self.last.is_some_and(|last| last.elapsed() < interval) {
            self.suppressed += 1;
            return;
        }
        tracing::warn!(error = %error, suppressed = self.suppressed, "cannot accept connections");
        self.last = Some(Instant::now());
        self.suppressed = 0;
    }
}

/// Makes the kernel drop every SYN segment, so that no connection can arrive between the last
/// accept and the close of the listener: the kernel would reset it, and lose the request that its
/// client has sent. A client whose segment is dropped repeats it after a second, and is then
/// refused. Returns whether the kernel accepted the filter.
#[cfg(target_os = "linux")]
pub(super) fn block_handshakes(listener: &std::net::TcpListener) -> bool {
    use socket2::SockFilter;
    // Classic BPF (linux/filter.h) over the TCP header, whose byte 13 has the flags: is SYN set?
    let program = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x45, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&program).is_ok()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn block_handshakes(_listener: &std::net::TcpListener) -> bool {
    false
}
