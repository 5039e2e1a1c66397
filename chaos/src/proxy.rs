//! A way to a server that can be broken: slow, narrow, silent, closed, or cut at a chosen word.
//!
//! Of its own, since those that exist (Toxiproxy and its ports) treat all connections alike and know
//! no protocol: they can neither silence the established ones while new ones work, nor tell a
//! statement from its reply. It knows nothing of the service.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A port that leads to another one here.
pub struct Proxy {
    address: SocketAddr,
    lane: Lane,
    /// `None` while connections are refused.
    accepting: Mutex<Option<JoinHandle<()>>>,
    runtime: Handle,
}

/// What is done to what passes. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Connections whose number is lower say and hear nothing, until it no longer is.
    pub silent_below: u64,
    /// Connections whose number is lower are reset.
    pub reset_below: u64,
    /// Added to everything that passes, in each direction.
    pub delay: Duration,
    /// What passes in a second, in each direction of each connection.
    pub bytes_per_second: Option<u32>,
    /// At which word a connection that records a visit is reset.
    pub cut: Option<Cut>,
}

/// Where a connection breaks that records visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// When the server has half of the statement.
    Statement,
    /// When the server has answered, before the client hears it.
    Reply,
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// As sqlx speaks it.
    Postgres,
    /// RESP.
    Redis,
    /// Whatever it is; there is nothing in it to be cut.
    Other,
}

/// What every connection of a proxy needs.
#[derive(Clone)]
struct Lane {
    server: u16,
    protocol: Protocol,
    rules: watch::Sender<Rules>,
    next: Arc<AtomicU64>,
    effects: Arc<AtomicU64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// How a connection comes to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    Reset,
}

const CHUNK: usize = 16 * 1024;

/// A statement of Postgres that binds more than this records visits: the others bind nothing.
const LONGEST_OTHER_BIND: usize = 80;

impl Proxy {
    /// Opens a way to `server`, a port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// If there is no free port.
    pub fn open(runtime: &Handle, server: u16, protocol: Protocol) -> Result<Self> {
        let proxy = Self {
            address: bench::place::free_address()?,
            lane: Lane {
                server,
                protocol,
                rules: watch::Sender::new(Rules::default()),
                next: Arc::new(AtomicU64::new(0)),
                effects: Arc::new(AtomicU64::new(0)),
            },
            accepting: Mutex::new(None),
            runtime: runtime.clone(),
        };
        proxy.accept()?;
        Ok(proxy)
    }

    /// The port that leads to the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How often a rule has changed what passes: bytes that were held back or late, and connections
    /// that were reset.
    #[must_use]
    pub fn effects(&self) -> u64 {
        self.lane.effects.load(Ordering::Relaxed)
    }

    /// Changes what is done to what passes, at once and for open connections too.
    pub fn change(&self, change: impl FnOnce(&mut Rules)) {
        self.lane.rules.send_modify(change);
    }

    /// Lets the connections that are open say and hear nothing; new ones work.
    pub fn silence_established(&self) {
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.silent_below = next);
    }

    /// Resets the connections that are open and refuses new ones.
    pub fn refuse(&self) {
        if let Some(accepting) = self.accepting().take() {
            accepting.abort();
            // It ends by having been aborted: the port is closed once that is so.
            self.runtime.block_on(accepting).ok();
        }
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.reset_below = next);
    }

    /// Lets everything pass as it comes, new connections too.
    ///
    /// # Errors
    ///
    /// If the port has been taken meanwhile.
    pub fn clear(&self) -> Result<()> {
        self.change(|rules| {
            *rules = Rules {
                reset_below: rules.reset_below,
                ..Rules::default()
            };
        });
        if self.accepting().is_none() {
            self.accept()?;
        }
        Ok(())
    }

    fn accept(&self) -> Result<()> {
        let listener = self
            .runtime
            .block_on(TcpListener::bind(self.address))
            .with_context(|| format!("cannot listen on {}", self.address))?;
        let lane = self.lane.clone();
        *self.accepting() = Some(self.runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = lane.next.fetch_add(1, Ordering::AcqRel);
                tokio::spawn(lane.clone().carry(client, number));
            }
        }));
        Ok(())
    }

    fn accepting(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.accepting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting().take() {
            accepting.abort();
        }
    }
}

impl Lane {
    /// Carries one connection to its end.
    async fn carry(self, mut client: TcpStream, number: u64) {
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", self.server)).await else {
            return;
        };
        for stream in [&client, &server] {
            // Delays are to be ours alone.
            stream.set_nodelay(true).ok();
        }
        let mut rules = self.rules.subscribe();
        let reset = async {
            let due = rules.wait_for(|rules| number < rules.reset_below).await;
            due.map(drop).ok();
        };
        let reply_is_cut = AtomicBool::new(false);
        let end = {
            let (from_client, to_client) = client.split();
            let (from_server, to_server) = server.split();
            let pump = |from, to, direction| self.pump(from, to, direction, number, &reply_is_cut);
            tokio::select! {
                end = pump(from_client, to_server, Direction::ToServer) => end,
                end = pump(from_server, to_client, Direction::ToClient) => end,
                () = reset => End::Reset,
            }
        };
        if end == End::Reset {
            self.count_effect();
            for stream in [&client, &server] {
                stream.set_zero_linger().ok();
            }
        }
    }

    async fn pump(
        &self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        direction: Direction,
        number: u64,
        reply_is_cut: &AtomicBool,
    ) -> End {
        let mut rules = self.rules.subscribe();
        let mut buffer = vec![0; CHUNK];
        loop {
            let Ok(length @ 1..) = from.read(&mut buffer).await else {
                return End::Closed;
            };
            let bytes = &buffer[..length];
            if number < rules.borrow().silent_below {
                self.count_effect();
            }
            let heard = rules.wait_for(|rules| number >= rules.silent_below).await;
            let Ok(now) = heard.map(|rules| *rules) else {
                return End::Closed;
            };
            match direction {
                Direction::ToClient if reply_is_cut.load(Ordering::Relaxed) => return End::Reset,
                Direction::ToServer if self.protocol.records(bytes) => match now.cut {
                    Some(Cut::Statement) => {
                        to.write_all(&bytes[..length / 2]).await.ok();
                        return End::Reset;
                    }
                    Some(Cut::Reply) => reply_is_cut.store(true, Ordering::Relaxed),
                    None => {}
                },
                _ => {}
            }
            let (takes, held) = (now.takes(length), Instant::now());
            tokio::time::sleep(takes).await;
            if !takes.is_zero() && held.elapsed() >= takes {
                self.count_effect();
            }
            if to.write_all(bytes).await.is_err() {
                return End::Closed;
            }
        }
    }
}

impl Lane {
    fn count_effect(&self) {
        self.effects.fetch_add(1, Ordering::Relaxed);
    }
}

impl Rules {
    /// How long so many bytes are under way.
    fn takes(&self, bytes: usize) -> Duration {
        let narrow = self.bytes_per_second.map_or(Duration::ZERO, |limit| {
            Duration::from_secs_f64(bytes as f64 / f64::from(limit))
        });
        self.delay + narrow
    }
}

impl Protocol {
    /// Whether this is a statement that records visits.
    fn records(self, bytes: &[u8]) -> bool {
        match self {
            Self::Postgres => bytes.first() == Some(&b'B') && bytes.len() > LONGEST_OTHER_BIND,
            Self::Redis => {
                bytes.windows(6).any(|word| word == b"INCRBY") && !bytes.ends_with(b"$1\r\n0\r\n")
            }
            Self::Other => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn increment_by_nothing_records_no_visit() {
        let increment = |by: &str| {
            let length = by.len();
            format!("*3\r\n$6\r\nINCRBY\r\n$12\r\nvisitas_home\r\n${length}\r\n{by}\r\n")
        };
        assert!(Protocol::Redis.records(increment("7").as_bytes()));
        assert!(Protocol::Redis.records(increment("10").as_bytes()));
        assert!(!Protocol::Redis.records(increment("0").as_bytes()));
        assert!(!Protocol::Redis.records(b"*1\r\n$4\r\nPING\r\n"));
    }

    #[test]
    fn rule_without_effect_is_told_from_one_with_an_effect() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let proxy = Proxy::open(runtime.handle(), port, Protocol::Other).unwrap();
        let client = || std::net::TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        let mut stream = client();
        let (mut accepted, _) = server.accept().unwrap();
        let mut say = |byte: u8| {
            stream.write_all(&[byte]).unwrap();
            let mut heard = [0];
            accepted.read_exact(&mut heard).unwrap();
            assert_eq!(heard, [byte]);
        };
        say(1);
        assert_eq!(proxy.effects(), 0);
        proxy.change(|rules| rules.bytes_per_second = Some(1000));
        assert_eq!(proxy.effects(), 0, "nothing has passed since");
        say(2);
        assert_eq!(proxy.effects(), 1);
        proxy.clear().unwrap();
        say(3);
        assert_eq!(proxy.effects(), 1);

        proxy.silence_established();
        let mut new = client();
        let (mut accepted, _) = server.accept().unwrap();
        new.write_all(&[4]).unwrap();
        accepted.read_exact(&mut [0]).unwrap();
        assert_eq!(proxy.effects(), 1, "a new connection is not silent");
        stream.write_all(&[5]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while proxy.effects() < 2 {
            assert!(Instant::now() < deadline, "the silence has no effect");
            std::thread::yield_now();
        }
        drop(runtime);
    }

    #[test]
    fn bytes_take_their_time_where_it_is_narrow() {
        let rules = Rules {
            delay: Duration::from_millis(10),
            bytes_per_second: Some(1000),
            ..Rules::default()
        };
        assert_eq!(rules.takes(500), Duration::from_millis(510));
        assert_eq!(Rules::default().takes(500), Duration::ZERO);
    }
}
