//! Clients that keep their connections while the replicas of a service restart in turn, and the
//! failures that they count.
//!
//! A client is as strict as any real one: it repeats a request only if no byte of it was sent,
//! because the connection had been closed before or a connect was refused. Must not know: how
//! replicas are started and stopped.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::client::Connection;
use crate::wait::locked;

/// The replicas that clients choose from, as a registry or a balancer knows them.
#[derive(Clone, Debug, Default)]
pub struct Replicas(Arc<Mutex<Vec<SocketAddr>>>);

impl Replicas {
    /// Adds a ready replica.
    pub fn add(&self, address: SocketAddr) {
        locked(&self.0).push(address);
    }

    /// Removes a replica that has ended. A draining replica stays listed, as in a registry that has
    /// not noticed yet.
    pub fn remove(&self, address: SocketAddr) {
        locked(&self.0).retain(|&known| known != address);
    }

    /// Chooses a replica by the number of the turn.
    fn choose(&self, turn: usize) -> Option<SocketAddr> {
        let known = locked(&self.0);
        (!known.is_empty()).then(|| known[turn % known.len()])
    }
}

/// The counts of all clients.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Visits with status 200.
    pub visits: usize,
    /// Connections that were opened.
    pub connections: usize,
    /// Connects that were refused.
    pub refused: usize,
    /// Responses other than 200, and connections that broke after a byte of a request was sent.
    pub failures: Vec<String>,
}

/// The running clients. [`Crowd::leave`] ends them and returns their counts; after a drop they keep
/// running until the process ends.
#[derive(Debug)]
pub struct Crowd {
    leaving: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
    visits: Arc<AtomicUsize>,
}

/// The pauses between two visits, by client: from always busy to mostly idle. All are shorter than
/// the second for which a draining service leaves an idle connection open.
const PAUSES: [u64; 8] = [1, 1, 2, 5, 20, 100, 300, 700];

/// Maximum time for a response, and for finding a replica.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Crowd {
    /// Starts `keeping` clients that keep their connections and `opening` clients that open one for
    /// each visit. At each connect they choose a replica.
    pub fn start(keeping: usize, opening: usize, replicas: &Replicas) -> Self {
        let leaving = Arc::<AtomicBool>::default();
        let visits = Arc::<AtomicUsize>::default();
        let clients = (0..keeping + opening)
            .map(|number| {
                let mut client = Client {
                    replicas: replicas.clone(),
                    turn: number,
                    pause: Duration::from_millis(PAUSES[number % PAUSES.len()]),
                    keeps: number < keeping,
                    visits: Arc::clone(&visits),
                    tally: Tally::default(),
                };
                let leaving = Arc::clone(&leaving);
                thread::spawn(move || {
                    client.visit_until(&leaving);
                    client.tally
                })
            })
            .collect();
        Self {
            leaving,
            clients,
            visits,
        }
    }

    /// The number of visits with status 200 so far.
    pub fn visits(&self) -> usize {
        self.visits.load(Ordering::Relaxed)
    }

    /// Ends the clients, each after its current visit, and returns their counts.
    pub fn leave(self) -> Tally {
        self.leaving.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients {
            match client.join() {
                Ok(tally) => {
                    all.visits += tally.visits;
                    all.connections += tally.connections;
                    all.refused += tally.refused;
                    all.failures.extend(tally.failures);
                }
                Err(_panic) => all.failures.push("a client panicked".to_owned()),
            }
        }
        all
    }
}

struct Client {
    replicas: Replicas,
    turn: usize,
    pause: Duration,
    /// Whether the client keeps its connection open between visits.
    keeps: bool,
    visits: Arc<AtomicUsize>,
    tally: Tally,
}

impl Client {
    fn visit_until(&mut self, leaving: &AtomicBool) {
        let mut kept = None;
        while !leaving.load(Ordering::Relaxed) {
            match self.visit(kept.take()) {
                Ok(connection) => kept = connection,
                Err(error) => self.tally.failures.push(format!("{error:#}")),
            }
            thread::sleep(self.pause);
        }
    }

    /// Makes a visit over a connection, and returns the connection if it stays open.
    fn visit(&mut self, kept: Option<Connection>) -> Result<Option<Connection>> {
        let began = Instant::now();
        let mut connection = match kept.filter(Connection::is_open) {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let whose = format!("{connection}, idle for {:?}", self.pause);
        let headers = connection
            .visit()
            .with_context(|| format!("after {:?} with {whose}", began.elapsed()))?;
        ensure!(headers.status == 200, "{} from {whose}", headers.status);
        self.tally.visits += 1;
        self.visits.fetch_add(1, Ordering::Relaxed);
        Ok((self.keeps && !headers.closes).then_some(connection))
    }

    fn connect(&mut self) -> Result<Connection> {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            // Adjacent replicas must not get the same clients in the same order.
            self.turn = self.turn.wrapping_mul(31).wrapping_add(7);
            let Some(address) = self.replicas.choose(self.turn >> 8) else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            match Connection::open(address) {
                Ok(connection) => {
                    connection.set_timeout(TIMEOUT)?;
                    self.tally.connections += 1;
                    return Ok(connection);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    self.tally.refused += 1;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("connecting to {address}"));
                }
            }
        }
        bail!("no replica accepts a connection")
    }
}

/// A balancer that assigns each connection to one replica. It makes no health checks: it skips
/// replicas that refuse connections.
#[derive(Debug)]
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Starts a balancer for these replicas.
    pub fn start(replicas: &Replicas) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let ended = Arc::<AtomicBool>::default();
        let (replicas, stop) = (replicas.clone(), Arc::clone(&ended));
        thread::spawn(move || {
            for (turn, client) in listener.incoming().enumerate() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let replicas = replicas.clone();
                if let Ok(client) = client {
                    thread::spawn(move || relay(&client, &replicas, turn).ok());
                }
            }
        });
        Ok(Self { address, ended })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // The connection wakes the thread from `accept`.
        TcpStream::connect(self.address).ok();
    }
}

/// Forwards both directions until both are closed.
fn relay(client: &TcpStream, replicas: &Replicas, turn: usize) -> std::io::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let mut chosen = None;
    for next in turn.. {
        chosen = replicas
            .choose(next)
            .and_then(|address| TcpStream::connect(address).ok());
        if chosen.is_some() || Instant::now() > deadline {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    let Some(replica) = chosen else {
        return Ok(());
    };
    client.set_nodelay(true)?;
    replica.set_nodelay(true)?;
    thread::scope(|scope| {
        scope.spawn(|| pass(client, &replica));
        pass(&replica, client);
    });
    Ok(())
}

fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    // After a reset or an end, the other side gets a FIN.
    std::io::copy(&mut from, &mut to).ok();
    to.shutdown(Shutdown::Write).ok();
}
