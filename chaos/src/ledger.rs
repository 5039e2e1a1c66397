//! Clients that visit until they are stopped, and a record of all their visits.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lab::history::Visit;
use lab::visitor::Visitor;
use lab::wait::locked as lock;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::chance;

/// Running clients. Each makes its next visit shortly after the previous one.
pub struct Ledger {
    visits: Arc<Mutex<Vec<Visit>>>,
    recorded: Arc<AtomicUsize>,
    running: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
    runtime: Handle,
}

/// How the clients visit.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The number of clients.
    pub clients: usize,
    /// The pause between two visits of a client.
    pub pause: Duration,
    /// The minimum pause after a visit that was not recorded.
    pub pause_after_refusal: Duration,
}

/// Enough that a batch is in flight almost always.
const CLIENTS: usize = 16;

/// The minimum pause after a refusal. Refusals are quick: retrying at once would only load the
/// processors.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_millis(5);

impl Ledger {
    /// Starts the clients. Each client sends each visit to a random replica, keeps a connection to
    /// each replica, and pauses for `pause` between visits.
    #[must_use]
    pub fn start(runtime: &Handle, addresses: &[SocketAddr], pause: Duration) -> Self {
        let pace = Pace {
            clients: CLIENTS,
            pause,
            pause_after_refusal: PAUSE_AFTER_REFUSAL,
        };
        Self::start_at(runtime, addresses, pace)
    }

    /// The same with another number of clients, and other pauses.
    #[must_use]
    pub fn start_at(runtime: &Handle, addresses: &[SocketAddr], pace: Pace) -> Self {
        let visits = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::new(AtomicUsize::new(0));
        let running = Arc::new(AtomicBool::new(true));
        let clients = (0..pace.clients).map(|client| {
            let visits = Arc::clone(&visits);
            let recorded = Arc::clone(&recorded);
            let running = Arc::clone(&running);
            let replicas = addresses.iter().enumerate();
            let visitor = |(replica, &address)| Visitor::new(client, replica, address);
            let mut visitors: Vec<_> = replicas.map(visitor).collect();
            runtime.spawn(async move {
                while running.load(Ordering::Relaxed) {
                    let replica = chance::below(visitors.len());
                    let visit = visitors[replica].visit().await;
                    lock(&visits).push(visit);
                    let min_pause = if visit.is_recorded() {
                        recorded.fetch_add(1, Ordering::Relaxed);
                        Duration::ZERO
                    } else {
                        pace.pause_after_refusal
                    };
                    tokio::time::sleep(pace.pause.max(min_pause)).await;
                }
            })
        });
        Self {
            clients: clients.collect(),
            visits,
            recorded,
            running,
            runtime: runtime.clone(),
        }
    }

    /// The number of visits so far.
    pub fn count(&self) -> usize {
        lock(&self.visits).len()
    }

    /// The number of recorded visits so far.
    pub fn recorded(&self) -> usize {
        self.recorded.load(Ordering::Relaxed)
    }

    /// The visits made after the first `from`.
    pub fn since(&self, from: usize) -> Vec<Visit> {
        lock(&self.visits)[from..].to_vec()
    }

    /// Waits up to `timeout` for a visit, after the first `from`, that satisfies `wanted`.
    pub fn find(
        &self,
        from: usize,
        timeout: Duration,
        mut wanted: impl FnMut(&Visit) -> bool,
    ) -> Option<Visit> {
        let deadline = Instant::now() + timeout;
        let mut checked = from;
        loop {
            {
                let visits = lock(&self.visits);
                if let Some(visit) = visits[checked..].iter().find(|visit| wanted(visit)) {
                    return Some(*visit);
                }
                checked = visits.len();
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits up to `timeout` until every visit that was sent before `moment` has ended, and returns
    /// whether they have. A client has at most one visit in flight, so each must end a later one.
    pub fn wait_for_visits_before(&self, from: usize, moment: Instant, timeout: Duration) -> bool {
        let mut clients = HashSet::new();
        let is_last = |visit: &Visit| {
            if visit.sent >= moment {
                clients.insert(visit.client);
            }
            clients.len() == self.clients.len()
        };
        self.find(from, timeout, is_last).is_some()
    }

    /// Lets every client finish its current visit and returns all visits, in the order of their
    /// ends.
    pub fn stop(&mut self) -> Vec<Visit> {
        self.running.store(false, Ordering::Relaxed);
        for client in std::mem::take(&mut self.clients) {
            // A client does not panic; its earlier visits are kept in any case.
            self.runtime.block_on(client).ok();
        }
        std::mem::take(&mut lock(&self.visits))
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
    }
}
