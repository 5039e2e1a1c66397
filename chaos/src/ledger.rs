//! Clients that visit until they are stopped, and every visit of theirs.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lab::history::Visit;
use lab::visitor::Visitor;
use lab::wait::locked as lock;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::chance;

/// Clients under way. Each makes its next visit shortly after the one before.
pub struct Ledger {
    visits: Arc<Mutex<Vec<Visit>>>,
    going: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
    runtime: Handle,
}

/// Enough that a batch is on its way at almost any moment.
const CLIENTS: usize = 16;

/// The least pause after a refusal, which is quick: retrying at once would only heat the machine.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_millis(5);

impl Ledger {
    /// Starts clients, each of which asks a random replica for each of its visits, keeps a connection
    /// to each, and pauses this long between two visits.
    #[must_use]
    pub fn start(runtime: &Handle, addresses: &[SocketAddr], pause: Duration) -> Self {
        let visits = Arc::new(Mutex::new(Vec::new()));
        let going = Arc::new(AtomicBool::new(true));
        let clients = (0..CLIENTS).map(|client| {
            let visits = Arc::clone(&visits);
            let going = Arc::clone(&going);
            let replicas = addresses.iter().enumerate();
            let visitor = |(replica, &address)| Visitor::new(client, replica, address);
            let mut visitors: Vec<_> = replicas.map(visitor).collect();
            runtime.spawn(async move {
                while going.load(Ordering::Relaxed) {
                    let replica = chance::below(visitors.len());
                    let visit = visitors[replica].visit().await;
                    lock(&visits).push(visit);
                    let least = if visit.is_recorded() {
                        Duration::ZERO
                    } else {
                        PAUSE_AFTER_REFUSAL
                    };
                    tokio::time::sleep(pause.max(least)).await;
                }
            })
        });
        Self {
            clients: clients.collect(),
            visits,
            going,
            runtime: runtime.clone(),
        }
    }

    /// How many visits have been made.
    pub fn made(&self) -> usize {
        lock(&self.visits).len()
    }

    /// The visits made after the first `from`.
    pub fn since(&self, from: usize) -> Vec<Visit> {
        lock(&self.visits)[from..].to_vec()
    }

    /// Waits for a visit, of those made after the first `from`, that is as wanted; nothing if none
    /// is soon enough.
    pub fn find(
        &self,
        from: usize,
        timeout: Duration,
        wanted: impl Fn(&Visit) -> bool,
    ) -> Option<Visit> {
        let deadline = Instant::now() + timeout;
        let mut seen = from;
        loop {
            {
                let visits = lock(&self.visits);
                if let Some(visit) = visits[seen..].iter().find(|visit| wanted(visit)) {
                    return Some(*visit);
                }
                seen = visits.len();
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lets every client finish its last visit and returns all of them, in the order of their ends.
    pub fn stop(&mut self) -> Vec<Visit> {
        self.going.store(false, Ordering::Relaxed);
        for client in std::mem::take(&mut self.clients) {
            // A client does not panic; what it had written down before is there in any case.
            self.runtime.block_on(client).ok();
        }
        std::mem::take(&mut lock(&self.visits))
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.going.store(false, Ordering::Relaxed);
    }
}
