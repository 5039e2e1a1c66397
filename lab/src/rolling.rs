//! Clients that keep their connections while the replicas of a service restart in turn, and what
//! they saw.
//!
//! A client is as strict as the least patient one out there: it makes a request again only where no
//! byte of it was sent, because the connection had been closed before, or a connect was refused.
//! Must not know: how replicas are started and stopped.

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
    /// Adds one, which is ready.
    pub fn add(&self, address: SocketAddr) {
        locked(&self.0).push(address);
    }

    /// Takes one away, which has ended. One that is about to stop stays, as it does in a registry
    /// that has not noticed yet.
    pub fn remove(&self, address: SocketAddr) {
        locked(&self.0).retain(|&known| known != address);
    }

    /// One of them, another one at each turn.
    fn choose(&self, turn: usize) -> Option<SocketAddr> {
        let known = locked(&self.0);
        (!known.is_empty()).then(|| known[turn % known.len()])
    }
}

/// What clients saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Visits answered 200.
    pub visits: usize,
    /// Connections that were opened.
    pub connections: usize,
    /// Connects that were refused.
    pub refused: usize,
    /// Responses other than 200, and connections that broke after a byte of a request was sent.
    pub failures: Vec<String>,
}

/// The clients. Dropping it leaves them to end by themselves; [`Crowd::leave`] says what they saw.
#[derive(Debug)]
pub struct Crowd {
    leaving: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
    visits: Arc<AtomicUsize>,
}

/// How long clients wait between two visits, in turn: from those that are always busy to those whose
/// connection is idle most of the time. All of them are shorter than the second for which a service
/// that drains leaves an idle connection open.
const PAUSES: [u64; 8] = [1, 1, 2, 5, 20, 100, 300, 700];

/// A response takes no longer, and neither does it to find a replica.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Crowd {
    /// Starts so many clients that keep their connections, and so many that open one for each visit.
    /// At each connect they choose among the replicas.
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
                    seen: Tally::default(),
                };
                let leaving = Arc::clone(&leaving);
                thread::spawn(move || {
                    client.visit_until(&leaving);
                    client.seen
                })
            })
            .collect();
        Self {
            leaving,
            clients,
            visits,
        }
    }

    /// How many visits have been answered 200 so far.
    pub fn visits(&self) -> usize {
        self.visits.load(Ordering::Relaxed)
    }

    /// Ends them, each after its visit, and says what they saw.
    pub fn leave(self) -> Tally {
        self.leaving.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients {
            match client.join() {
                Ok(seen) => {
                    all.visits += seen.visits;
                    all.connections += seen.connections;
                    all.refused += seen.refused;
                    all.failures.extend(seen.failures);
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
    /// Its connections, for as long as they stay open.
    keeps: bool,
    visits: Arc<AtomicUsize>,
    seen: Tally,
}

impl Client {
    fn visit_until(&mut self, leaving: &AtomicBool) {
        let mut kept = None;
        while !leaving.load(Ordering::Relaxed) {
            match self.visit(kept.take()) {
                Ok(connection) => kept = connection,
                Err(error) => self.seen.failures.push(format!("{error:#}")),
            }
            thread::sleep(self.pause);
        }
    }

    /// Visits over a connection, and returns it if it stays open.
    fn visit(&mut self, kept: Option<Connection>) -> Result<Option<Connection>> {
        let began = Instant::now();
        let mut connection = match kept.filter(Connection::is_open) {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let whose = format!("{connection}, idle for {:?}", self.pause);
        let head = connection
            .visit()
            .with_context(|| format!("after {:?} with {whose}", began.elapsed()))?;
        ensure!(head.status == 200, "{} from {whose}", head.status);
        self.seen.visits += 1;
        self.visits.fetch_add(1, Ordering::Relaxed);
        Ok((self.keeps && !head.closes).then_some(connection))
    }

    fn connect(&mut self) -> Result<Connection> {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            // Neighbours in the list must not see the same clients, and in the same order.
            self.turn = self.turn.wrapping_mul(31).wrapping_add(7);
            let Some(address) = self.replicas.choose(self.turn >> 8) else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            match Connection::open(address) {
                Ok(connection) => {
                    connection.set_timeout(TIMEOUT)?;
                    self.seen.connections += 1;
                    return Ok(connection);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    self.seen.refused += 1;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("connecting to {address}"));
                }
            }
        }
        bail!("no replica takes a connection")
    }
}

/// A balancer that chooses a replica for each connection once, and keeps it. It asks none for its
/// health: a replica is out once it refuses connections.
#[derive(Debug)]
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Opens one before these replicas.
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
        // It waits in accept.
        TcpStream::connect(self.address).ok();
    }
}

/// Passes on what either side says until both have said all.
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
    // A reset ends it as an end does: the other side learns that nothing more comes.
    std::io::copy(&mut from, &mut to).ok();
    to.shutdown(Shutdown::Write).ok();
}
