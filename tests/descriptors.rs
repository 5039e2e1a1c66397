//! The only test in its process, because it lowers the process's limit on open files.

use std::{
    fs::File,
    io::{Read, Seek},
    time::Duration,
};

use axum::{Router, routing::get};
use rlimit::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    time::{sleep, timeout},
};
use visitas::lifecycle::{Lifecycle, Phase};
use visitas::server::{self, Events, Limits, Stop};

/// CPU time of this process so far, in hundredths of a second.
fn ticks(stat: &mut File) -> u64 {
    let mut text = String::new();
    stat.rewind().expect("rewind");
    stat.read_to_string(&mut text).expect("stat");
    let after_name = text.rsplit(')').next().expect("fields");
    let fields = after_name.split_whitespace().skip(11).take(2);
    fields
        .map(|field| field.parse::<u64>().expect("ticks"))
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn accept_loop_without_descriptors_neither_spins_nor_ends() {
    let limits = Limits {
        max_connections: 1000,
        header_timeout: Duration::from_mins(1),
        idle_timeout: Duration::from_mins(1),
        stall_timeout: Duration::from_mins(1),
    };
    let listener = server::bind(([127, 0, 0, 1], 0).into(), 1024).expect("bind");
    let addr = listener.local_addr().expect("address");
    let router = Router::new().route("/", get(|| async { "ok" }));
    let events = Events {
        connections: Box::new(|_| {}),
        rejected: Box::new(|_| {}),
    };
    let never = Stop {
        lifecycle: Lifecycle::default(),
        leave_at: Phase::Leaving,
        drain_at: Phase::Draining,
        drain: Duration::ZERO,
    };
    tokio::spawn(server::serve(listener, router, limits, events, never));

    // The test opens every file that it needs before it lowers the limit.
    let mut stat = File::open("/proc/self/stat").expect("stat");
    let socket = TcpSocket::new_v4().expect("socket");
    let (soft, hard) = getrlimit(Resource::NOFILE).expect("limit");
    setrlimit(Resource::NOFILE, 3, hard).expect("limit");
    let mut client = socket.connect(addr).await.expect("connect");
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    client.write_all(request).await.expect("send");

    let before = ticks(&mut stat);
    let mut response = String::new();
    let unserved = timeout(Duration::from_secs(1), client.read_to_string(&mut response)).await;
    let spent = ticks(&mut stat) - before;
    setrlimit(Resource::NOFILE, soft, hard).expect("limit");
    assert!(unserved.is_err(), "{response}");
    assert!(
        spent < 20,
        "{spent} hundredths of a second of CPU in a second"
    );

    let served = client.read_to_string(&mut response);
    tokio::select! {
        served = served => { served.expect("response"); }
        () = sleep(Duration::from_secs(5)) => panic!("not served after the limit rose"),
    }
    assert!(response.ends_with("ok"), "{response}");
}
