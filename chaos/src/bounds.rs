//! Measures the service's resource use: file descriptors, connections, memory.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::ground::{Ground, Needs};
use crate::hostile::half_headers;
use crate::ledger::Ledger;
use crate::service::Service;

/// The measured figures.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// File descriptors of an idle service.
    pub idle_files: usize,
    /// File descriptors with [`CONNECTIONS`] open connections, each after one request.
    pub busy_files: usize,
    /// File descriptors after those connections have closed.
    pub left_files: usize,
    /// Resident memory of a connection without a request, in kibibytes.
    pub memory_silent: f64,
    /// Resident memory of a connection after one request, in kibibytes.
    pub memory_used: f64,
    /// Resident memory of a connection with unfinished headers of nearly the maximum length, in
    /// kibibytes.
    pub memory_half: f64,
    /// Resident memory of a connection whose client sends requests without reading responses, in
    /// kibibytes.
    pub memory_unread: f64,
    /// Sessions with Postgres under load.
    pub sessions: usize,
    /// File descriptors with a limit of [`MAX_CONNECTIONS`] and more clients than that.
    pub capped_files: usize,
}

/// The number of opened connections.
pub const CONNECTIONS: usize = 1000;
/// The number of connections to the stores that the pools can open or close independently of
/// clients.
pub const POOLED: usize = 8;
/// The value of `HTTP_MAX_CONNECTIONS` in the test of the limit.
pub const MAX_CONNECTIONS: usize = 100;

/// The number of clients in the test of the limit.
const CROWD: usize = 150;
const SETTLE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(300);
/// The pause between two visits of a client.
const PAUSE: Duration = Duration::from_millis(1);

/// Measures all figures.
pub fn run() -> Result<Bounds> {
    rlimit::increase_nofile_limit(CONNECTIONS as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.start()?;
    service.wait_until_ready()?;
    let mut ledger = Ledger::start(ground.runtime.handle(), &[service.address], PAUSE);
    std::thread::sleep(Duration::from_secs(1));
    let sessions =
        ground.sql("select count(*) from pg_stat_activity where application_name = 'visitas'")?;
    let _visits = ledger.stop();

    let files = |service: &Service| service.open_files().context("no /proc");
    let idle_files = settled(&service)?;
    let open = open(&service, CONNECTIONS, Traffic::Request)?;
    let busy_files = files(&service)?;
    drop(open);
    let left_files = settled(&service)?;
    drop(service);

    let mut capped = Service::new(&ground)?;
    capped.set("HTTP_MAX_CONNECTIONS", &MAX_CONNECTIONS.to_string());
    capped.start()?;
    capped.wait_until_ready()?;
    let crowd: Vec<_> = (0..CROWD)
        .map(|_| TcpStream::connect(capped.address))
        .collect::<Result<_, _>>()?;
    let capped_files = settled(&capped)?;
    drop(crowd);
    Ok(Bounds {
        idle_files,
        busy_files,
        left_files,
        memory_silent: memory_of_one(&ground, Traffic::Silence)?,
        memory_used: memory_of_one(&ground, Traffic::Request)?,
        memory_half: memory_of_one(&ground, Traffic::HalfHeaders)?,
        memory_unread: memory_of_one(&ground, Traffic::Requests)?,
        sessions: sessions.parse()?,
        capped_files,
    })
}

/// What a client sends over a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Silence,
    Request,
    HalfHeaders,
    Requests,
}

/// The resident memory of one connection, in kibibytes. Each measurement starts its own service:
/// otherwise new connections would reuse freed memory.
fn memory_of_one(ground: &Ground, traffic: Traffic) -> Result<f64> {
    let mut service = Service::new(ground)?;
    service.set("HEADER_TIMEOUT", "1m");
    service.start()?;
    service.wait_until_ready()?;
    let connections = match traffic {
        // Each connection sends thousands of requests.
        Traffic::Requests => CROWD,
        _ => CONNECTIONS,
    };
    let memory = || service.memory().context("no /proc");
    // The first connections also allocate memory that later ones share.
    let _first = open(&service, connections / 10, traffic)?;
    let before = memory()?;
    let _open = open(&service, connections, traffic)?;
    Ok((memory()?.0 - before.0) * 1024.0 / connections as f64)
}

/// Opens connections and sends the traffic over each.
fn open(service: &Service, connections: usize, traffic: Traffic) -> Result<Vec<TcpStream>> {
    let request = b"GET /health HTTP/1.1\r\nhost: chaos\r\n\r\n";
    let half = half_headers();
    let open: Vec<_> = (0..connections)
        .map(|_| {
            let mut stream = TcpStream::connect(service.address)?;
            stream.set_read_timeout(Some(SETTLE))?;
            match traffic {
                Traffic::Silence => {}
                Traffic::Request => {
                    stream.write_all(request)?;
                    ensure!(stream.read(&mut [0; 4096])? > 0, "no response");
                }
                Traffic::HalfHeaders => stream.write_all(&half)?,
                Traffic::Requests => stream.set_nonblocking(true)?,
            }
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    // The service needs a moment to read the last requests.
    std::thread::sleep(MOMENT);
    if traffic == Traffic::Requests {
        write_until_stuck(&open, &request.repeat(1000));
    }
    Ok(open)
}

/// Writes until no connection accepts more bytes for a moment, or until a deadline.
fn write_until_stuck(open: &[TcpStream], requests: &[u8]) {
    let deadline = Instant::now() + SETTLE;
    let mut traffic = vec![0; open.len()];
    let mut moved = Instant::now();
    while moved.elapsed() < MOMENT && Instant::now() < deadline {
        for (mut stream, traffic) in open.iter().zip(&mut traffic) {
            // A full connection returns `WouldBlock`; neither side closes it.
            if let Ok(more) = stream.write(&requests[*traffic % requests.len()..]) {
                *traffic += more;
                moved = Instant::now();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The number of open files once it is stable, or at a deadline.
fn settled(service: &Service) -> Result<usize> {
    let deadline = Instant::now() + SETTLE;
    let mut before = None;
    loop {
        let files = service.open_files().context("no /proc")?;
        if before == Some(files) || Instant::now() > deadline {
            return Ok(files);
        }
        before = Some(files);
        std::thread::sleep(MOMENT);
    }
}
