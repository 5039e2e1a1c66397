//! What the service takes, as figures: file descriptors, connections, memory.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::ground::{Ground, Needs};
use crate::hostile::half_head;
use crate::ledger::Ledger;
use crate::service::Service;

/// The figures.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// File descriptors of a service that nobody visits.
    pub idle_files: usize,
    /// The same with [`CONNECTIONS`] over each of which a request was made.
    pub busy_files: usize,
    /// The same once those are gone.
    pub left_files: usize,
    /// Resident memory that a connection takes over which nothing was said, in kibibytes.
    pub memory_silent: f64,
    /// The same where a request was made.
    pub memory_used: f64,
    /// The same with half a head, as long as it may be.
    pub memory_half: f64,
    /// The same where requests are made as fast as they are taken, and no answer is read.
    pub memory_unread: f64,
    /// Sessions with Postgres under load.
    pub sessions: usize,
    /// File descriptors where more than [`MAX_CONNECTIONS`] clients come and only so many may.
    pub capped_files: usize,
}

/// Connections that are opened.
pub const CONNECTIONS: usize = 1000;
/// Connections of either store that a service may have or have not, whatever its visitors do.
pub const POOLED: usize = 8;
/// Connections that may be open where their number is looked at.
pub const MAX_CONNECTIONS: usize = 100;

/// Clients that come where only [`MAX_CONNECTIONS`] may.
const CROWD: usize = 150;
const SETTLE: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(300);
/// Between two visits of a client.
const PAUSE: Duration = Duration::from_millis(1);

/// Looks.
pub fn run() -> Result<Bounds> {
    rlimit::increase_nofile_limit(CONNECTIONS as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.start()?;
    service.until_ready()?;
    let mut ledger = Ledger::start(ground.runtime.handle(), &[service.address], PAUSE);
    std::thread::sleep(Duration::from_secs(1));
    let sessions =
        ground.sql("select count(*) from pg_stat_activity where application_name = 'visitas'")?;
    let _visits = ledger.stop();

    let files = |service: &Service| service.open_files().context("no /proc");
    let idle_files = settled(&service)?;
    let open = open(&service, CONNECTIONS, Speech::Request)?;
    let busy_files = files(&service)?;
    drop(open);
    let left_files = settled(&service)?;
    drop(service);

    let mut capped = Service::new(&ground)?;
    capped.set("HTTP_MAX_CONNECTIONS", &MAX_CONNECTIONS.to_string());
    capped.start()?;
    capped.until_ready()?;
    let crowd: Vec<_> = (0..CROWD)
        .map(|_| TcpStream::connect(capped.address))
        .collect::<Result<_, _>>()?;
    let capped_files = settled(&capped)?;
    drop(crowd);
    Ok(Bounds {
        idle_files,
        busy_files,
        left_files,
        memory_silent: memory_of_one(&ground, Speech::Nothing)?,
        memory_used: memory_of_one(&ground, Speech::Request)?,
        memory_half: memory_of_one(&ground, Speech::HalfHead)?,
        memory_unread: memory_of_one(&ground, Speech::Requests)?,
        sessions: sessions.parse()?,
        capped_files,
    })
}

/// What is said over a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speech {
    Nothing,
    Request,
    HalfHead,
    Requests,
}

/// The resident memory that a connection takes, in kibibytes. The service is one of their own: what
/// others have freed would be taken first.
fn memory_of_one(ground: &Ground, said: Speech) -> Result<f64> {
    let mut service = Service::new(ground)?;
    service.set("HEADER_TIMEOUT", "1m");
    service.start()?;
    service.until_ready()?;
    let connections = match said {
        // Each makes some thousands.
        Speech::Requests => CROWD,
        _ => CONNECTIONS,
    };
    let memory = || service.memory().context("no /proc");
    // What the first ones take, others use as well.
    let _first = open(&service, connections / 10, said)?;
    let before = memory()?;
    let _open = open(&service, connections, said)?;
    Ok((memory()?.0 - before.0) * 1024.0 / connections as f64)
}

/// Opens so many and says that.
fn open(service: &Service, connections: usize, said: Speech) -> Result<Vec<TcpStream>> {
    let request = b"GET /health HTTP/1.1\r\nhost: chaos\r\n\r\n";
    let half = half_head();
    let open: Vec<_> = (0..connections)
        .map(|_| {
            let mut stream = TcpStream::connect(service.address)?;
            stream.set_read_timeout(Some(SETTLE))?;
            match said {
                Speech::Nothing => {}
                Speech::Request => {
                    stream.write_all(request)?;
                    ensure!(stream.read(&mut [0; 4096])? > 0, "no answer");
                }
                Speech::HalfHead => stream.write_all(&half)?,
                Speech::Requests => stream.set_nonblocking(true)?,
            }
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    // What was said last is still to be read.
    std::thread::sleep(MOMENT);
    if said == Speech::Requests {
        write_until_stuck(&open, &request.repeat(1000));
    }
    Ok(open)
}

/// Until nothing more is taken over any of them for a moment, or for a while.
fn write_until_stuck(open: &[TcpStream], requests: &[u8]) {
    let deadline = Instant::now() + SETTLE;
    let mut said = vec![0; open.len()];
    let mut moved = Instant::now();
    while moved.elapsed() < MOMENT && Instant::now() < deadline {
        for (mut stream, said) in open.iter().zip(&mut said) {
            // Where it is stuck, it would block; nobody closes here.
            if let Ok(more) = stream.write(&requests[*said % requests.len()..]) {
                *said += more;
                moved = Instant::now();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The number of files once it has been the same for a moment, or after a while.
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
