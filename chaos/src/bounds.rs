//! What the service takes, as figures: file descriptors, connections, memory.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bench::client::Connection;

use crate::ground::{Ground, Needs};
use crate::ledger::Ledger;
use crate::service::Service;

/// The figures.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// File descriptors of a service that nobody visits.
    pub idle_files: usize,
    /// The same with [`CONNECTIONS`] that have each made a request.
    pub busy_files: usize,
    /// The same once those are gone.
    pub left_files: usize,
    /// Resident memory that one of those takes, in kibibytes.
    pub memory_per_connection: f64,
    /// Sessions with Postgres under load.
    pub sessions: usize,
    /// Connections that are open of one more than [`MAX_CONNECTIONS`] where only so many may be.
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

/// Looks.
///
/// # Errors
///
/// If there is no ground, or the system says nothing of the process.
pub fn run() -> Result<Bounds> {
    rlimit::increase_nofile_limit(CONNECTIONS as u64 + 2000).ok();
    let ground = Ground::start(Needs::default())?;
    let mut service = Service::new(&ground)?;
    service.start()?;
    service.until_ready()?;
    let ledger = Ledger::start(ground.runtime.handle(), &[service.address]);
    std::thread::sleep(Duration::from_secs(1));
    let sessions =
        ground.sql("select count(*) from pg_stat_activity where application_name = 'visitas'")?;
    let _visits = ledger.stop();

    let files = |service: &Service| service.open_files().context("no /proc");
    let memory = |service: &Service| service.memory().context("no /proc");
    let idle_files = settled(&service)?;
    let before = memory(&service)?;
    let open = connections(&service, CONNECTIONS)?;
    let busy_files = files(&service)?;
    let after = memory(&service)?;
    drop(open);
    let left_files = settled(&service)?;

    let mut capped = Service::new(&ground)?;
    capped.set("HTTP_MAX_CONNECTIONS", &MAX_CONNECTIONS.to_string());
    capped.start()?;
    capped.until_ready()?;
    let crowd: Vec<_> = (0..CROWD)
        .map(|_| Connection::open(capped.address))
        .collect::<Result<_>>()?;
    let capped_files = settled(&capped)?;
    drop(crowd);
    Ok(Bounds {
        idle_files,
        busy_files,
        left_files,
        memory_per_connection: (after.0 - before.0) * 1024.0 / CONNECTIONS as f64,
        sessions: sessions.parse()?,
        capped_files,
    })
}

/// Connections that have each made a request.
fn connections(service: &Service, number: usize) -> Result<Vec<Connection>> {
    (0..number)
        .map(|_| {
            let mut connection = Connection::open(service.address)?;
            connection.get("/health/live")?;
            Ok(connection)
        })
        .collect()
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
