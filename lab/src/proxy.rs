//! A way to a server that can be broken: slow, narrow, silent, closed, or cut at a chosen word; and
//! on which one can listen.
//!
//! Of its own, since those that exist (Toxiproxy and its ports) treat all connections alike and know
//! no protocol: they can neither silence the established ones while new ones work, nor tell a
//! statement from its reply. It knows nothing of the service.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::ports::free_address;
use crate::wait::locked;

/// A port that leads to another one here, for as long as the runtime runs that it was opened on.
pub struct Proxy {
    address: SocketAddr,
    lane: Lane,
    /// `None` while connections are refused.
    accepting: Mutex<Option<JoinHandle<()>>>,
}

/// What is done to what passes. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Connections whose number is lower say and hear nothing, until it no longer is.
    pub silent_below: u64,
    /// What the clients of connections say whose number is lower is lost; they still hear.
    pub lost_below: u64,
    /// Connections whose number is lower are reset.
    pub reset_below: u64,
    /// Added to everything that passes to the server.
    pub delay_to_server: Duration,
    /// Added to everything that passes to the client.
    pub delay_to_client: Duration,
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
    /// Any other; there is nothing in it to be cut.
    Other,
}

/// What every connection of a proxy needs.
#[derive(Clone)]
struct Lane {
    server: SocketAddr,
    protocol: Protocol,
    rules: watch::Sender<Rules>,
    next: Arc<AtomicU64>,
    effects: Arc<AtomicU64>,
    /// Where somebody listens: what each client has said, in the order of their connections.
    record: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
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
    /// Opens a way to a server.
    pub async fn open(server: SocketAddr, protocol: Protocol) -> Result<Self> {
        Self::start(server, protocol, None).await
    }

    /// Opens a way that keeps what clients say.
    pub async fn recording(server: SocketAddr, protocol: Protocol) -> Result<Self> {
        Self::start(server, protocol, Some(Arc::default())).await
    }

    async fn start(
        server: SocketAddr,
        protocol: Protocol,
        record: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
    ) -> Result<Self> {
        let proxy = Self {
            address: free_address()?,
            lane: Lane {
                server,
                protocol,
                rules: watch::Sender::new(Rules::default()),
                next: Arc::new(AtomicU64::new(0)),
                effects: Arc::new(AtomicU64::new(0)),
                record,
            },
            accepting: Mutex::new(None),
        };
        proxy.accept().await?;
        Ok(proxy)
    }

    /// The port that leads to the server.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How often a rule has changed what passes: bytes that were held back or late, and connections
    /// that were reset.
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

    /// Loses what clients say over the connections that are open; new ones work.
    pub fn lose_established(&self) {
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.lost_below = next);
    }

    /// What each client has said so far, in the order of their connections; nothing unless the proxy
    /// was opened by [`Self::recording`].
    pub fn record(&self) -> Vec<Vec<u8>> {
        let record = self.lane.record.as_ref();
        record.map_or_else(Vec::new, |record| locked(record).clone())
    }

    /// Resets the connections that are open and refuses new ones.
    pub async fn refuse(&self) {
        let accepting = locked(&self.accepting).take();
        if let Some(accepting) = accepting {
            accepting.abort();
            // It ends by having been aborted: the port is closed once that is so.
            accepting.await.ok();
        }
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.reset_below = next);
    }

    /// Lets everything pass as it comes, new connections too.
    pub async fn clear(&self) -> Result<()> {
        self.change(|rules| {
            *rules = Rules {
                reset_below: rules.reset_below,
                ..Rules::default()
            };
        });
        let is_refusing = locked(&self.accepting).is_none();
        if is_refusing {
            self.accept().await?;
        }
        Ok(())
    }

    async fn accept(&self) -> Result<()> {
        let listener = TcpListener::bind(self.address)
            .await
            .with_context(|| format!("cannot listen on {}", self.address))?;
        let lane = self.lane.clone();
        *locked(&self.accepting) = Some(tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = lane.next.fetch_add(1, Ordering::AcqRel);
                if let Some(record) = &lane.record {
                    locked(record).push(Vec::new());
                }
                tokio::spawn(lane.clone().carry(client, number));
            }
        }));
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(accepting) = locked(&self.accepting).take() {
            accepting.abort();
        }
    }
}

impl Lane {
    /// Carries one connection to its end.
    async fn carry(self, mut client: TcpStream, number: u64) {
        let Ok(mut server) = TcpStream::connect(self.server).await else {
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
            if direction == Direction::ToServer {
                self.record(number, bytes);
                if number < rules.borrow().lost_below {
                    continue;
                }
            }
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
            let (delay, began) = (now.delay(direction, length), Instant::now());
            tokio::time::sleep(delay).await;
            if !delay.is_zero() && began.elapsed() >= delay {
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

    fn record(&self, number: u64, bytes: &[u8]) {
        if let Some(record) = &self.record
            && let Ok(number) = usize::try_from(number)
        {
            locked(record)[number].extend_from_slice(bytes);
        }
    }
}

impl Rules {
    /// The same delay in each direction.
    pub fn delay_each_way(&mut self, delay: Duration) {
        (self.delay_to_server, self.delay_to_client) = (delay, delay);
    }

    /// How long so many bytes are under way.
    fn delay(&self, direction: Direction, bytes: usize) -> Duration {
        let delay = match direction {
            Direction::ToServer => self.delay_to_server,
            Direction::ToClient => self.delay_to_client,
        };
        let narrow = self.bytes_per_second.map_or(Duration::ZERO, |limit| {
            Duration::from_secs_f64(bytes as f64 / f64::from(limit))
        });
        delay + narrow
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
        let open = Proxy::open(server.local_addr().unwrap(), Protocol::Other);
        let proxy = runtime.block_on(open).unwrap();
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
        runtime.block_on(proxy.clear()).unwrap();
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
            delay_to_server: Duration::from_millis(10),
            bytes_per_second: Some(1000),
            ..Rules::default()
        };
        let delay = |rules: Rules, direction| rules.delay(direction, 500);
        let half = Duration::from_millis(500);
        assert_eq!(delay(rules, Direction::ToClient), half);
        assert_eq!(
            delay(rules, Direction::ToServer),
            half + rules.delay_to_server
        );
        assert_eq!(delay(Rules::default(), Direction::ToServer), Duration::ZERO);
    }
}
