//! A TCP proxy that can fail: slow, narrow, silent, closed, or reset at a chosen message. It can
//! also record what clients send.
//!
//! Existing proxies (Toxiproxy and its ports) treat all connections alike and know no protocol:
//! they can neither silence established connections while new ones work, nor distinguish a
//! statement from its reply. It knows nothing of the service.

use std::io;
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

/// A proxy to a local server. It lives as long as the runtime that opened it.
pub struct Proxy {
    address: SocketAddr,
    lane: Lane,
    /// `None` while connections are refused.
    accepting: Mutex<Option<JoinHandle<()>>>,
}

/// The faults that the proxy applies. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Connections with a lower number carry nothing in either direction until the rule changes.
    pub silent_below: u64,
    /// The proxy discards what clients send over connections with a lower number; replies still
    /// pass.
    pub lost_below: u64,
    /// Connections with a lower number are reset.
    pub reset_below: u64,
    /// Delay of everything sent to the server.
    pub delay_to_server: Duration,
    /// Delay of everything sent to the client.
    pub delay_to_client: Duration,
    /// Bandwidth in each direction of each connection.
    pub bytes_per_second: Option<u32>,
    /// Where to reset a connection that records a visit.
    pub cut: Option<Cut>,
}

/// The point at which a connection that records visits is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// After half of the statement has reached the server.
    Statement,
    /// After the server has replied, before the reply reaches the client.
    Reply,
}

/// The protocol of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// As sqlx uses it.
    Postgres,
    /// RESP.
    Redis,
    /// Any other; `Cut` has no effect.
    Other,
}

/// Shared by all connections of a proxy.
#[derive(Clone)]
struct Lane {
    server: SocketAddr,
    protocol: Protocol,
    rules: watch::Sender<Rules>,
    next: Arc<AtomicU64>,
    effects: Arc<AtomicU64>,
    /// If the proxy records: the bytes that each client has sent, in the order of their
    /// connections.
    record: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// How a connection ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    Reset,
}

const CHUNK: usize = 16 * 1024;

/// A Postgres statement with longer bound values records visits: the other statements bind none.
const LONGEST_OTHER_BIND: usize = 80;

impl Proxy {
    /// Opens a proxy to a server.
    pub async fn open(server: SocketAddr, protocol: Protocol) -> Result<Self> {
        Self::start(server, protocol, None).await
    }

    /// Opens a proxy that records what clients send.
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

    /// The proxy's port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How often a rule has taken effect: messages that were withheld or delayed, and connections
    /// that were reset.
    pub fn effects(&self) -> u64 {
        self.lane.effects.load(Ordering::Relaxed)
    }

    /// Changes the rules at once, for open connections as well.
    pub fn change(&self, change: impl FnOnce(&mut Rules)) {
        self.lane.rules.send_modify(change);
    }

    /// Silences the open connections; new ones work.
    pub fn silence_established(&self) {
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.silent_below = next);
    }

    /// Discards what clients send over the open connections; new ones work.
    pub fn lose_established(&self) {
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.lost_below = next);
    }

    /// Resets the open connections; new ones work.
    pub fn reset_established(&self) {
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.reset_below = next);
    }

    /// The bytes that each client has sent, in the order of their connections. Empty unless the
    /// proxy was opened by [`Self::recording`].
    pub fn record(&self) -> Vec<Vec<u8>> {
        let record = self.lane.record.as_ref();
        record.map_or_else(Vec::new, |record| locked(record).clone())
    }

    /// Resets the open connections and refuses new ones.
    pub async fn refuse(&self) {
        let accepting = locked(&self.accepting).take();
        if let Some(accepting) = accepting {
            accepting.abort();
            // The port is closed once the aborted task has ended.
            accepting.await.ok();
        }
        let next = self.lane.next.load(Ordering::Acquire);
        self.change(|rules| rules.reset_below = next);
    }

    /// Removes all rules and accepts new connections.
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
        let listener = listen(self.address)
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

/// Listens at an address that was free a moment ago. A child that another thread has forked holds
/// the sockets of this process until its program starts.
async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    for _ in 0..100 {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            listener => return listener,
        }
    }
    TcpListener::bind(address).await
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(accepting) = locked(&self.accepting).take() {
            accepting.abort();
        }
    }
}

impl Lane {
    /// Carries one connection until it ends.
    async fn carry(self, mut client: TcpStream, number: u64) {
        let Ok(mut server) = TcpStream::connect(self.server).await else {
            return;
        };
        for stream in [&client, &server] {
            // The rules must be the only source of delay.
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
            let received = rules.wait_for(|rules| number >= rules.silent_below).await;
            let Ok(now) = received.map(|rules| *rules) else {
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

    /// The delay of this many bytes.
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
    /// Whether these bytes are a statement that records visits.
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
    fn only_rules_that_take_effect_are_counted() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let open = Proxy::open(server.local_addr().unwrap(), Protocol::Other);
        let proxy = runtime.block_on(open).unwrap();
        let client = || std::net::TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        let mut stream = client();
        let (mut accepted, _) = server.accept().unwrap();
        let mut send = |byte: u8| {
            stream.write_all(&[byte]).unwrap();
            let mut received = [0];
            accepted.read_exact(&mut received).unwrap();
            assert_eq!(received, [byte]);
        };
        send(1);
        assert_eq!(proxy.effects(), 0);
        proxy.change(|rules| rules.bytes_per_second = Some(1000));
        assert_eq!(proxy.effects(), 0, "nothing has passed since");
        send(2);
        assert_eq!(proxy.effects(), 1);
        runtime.block_on(proxy.clear()).unwrap();
        send(3);
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
    fn limited_bandwidth_delays_bytes() {
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
