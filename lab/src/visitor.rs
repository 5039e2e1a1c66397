//! One client that makes visits over a connection that it keeps, and what it was told.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::client::{Head, VISIT};
use crate::history::{Outcome, Visit};

/// A client with one connection, which it opens again when it has ended.
pub struct Visitor {
    client: usize,
    replica: usize,
    address: SocketAddr,
    timeout: Duration,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
    response: Option<(Head, Value)>,
}

/// More than twice as long as a response can take by the default settings.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A visit can be taken for so long after its client has left.
const TAKEN_AFTER: Duration = Duration::from_millis(250);

/// The beginning of a visit.
struct Start {
    client: usize,
    replica: usize,
    sent: Instant,
    sent_at: i64,
}

impl Start {
    fn end(self, outcome: Outcome, numbers: (Option<i64>, Option<i64>)) -> Visit {
        Visit {
            client: self.client,
            replica: self.replica,
            sent: self.sent,
            sent_at: self.sent_at,
            ended: Instant::now(),
            outcome,
            total: numbers.0,
            redis: numbers.1,
        }
    }
}

impl Visitor {
    /// A client, by its number, of a replica, by its number and address. It has not connected yet.
    pub fn new(client: usize, replica: usize, address: SocketAddr) -> Self {
        Self {
            client,
            replica,
            address,
            timeout: TIMEOUT,
            stream: None,
            buffer: Vec::new(),
            response: None,
        }
    }

    /// Gives up on a response after this, instead of 5 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes a visit.
    pub async fn visit(&mut self) -> Visit {
        let start = self.start();
        let (outcome, numbers) = self.ask().await;
        if matches!(outcome, Outcome::Unanswered | Outcome::Wrong(_)) {
            self.stream = None;
        }
        start.end(outcome, numbers)
    }

    /// The response to the last visit, if one came, and its body.
    pub fn response(&self) -> Option<&(Head, Value)> {
        self.response.as_ref()
    }

    /// Asks for a visit over a connection of its own and leaves after `stay`: by a reset or with a
    /// goodbye.
    pub async fn pass_by(&self, stay: Duration, reset: bool) -> Visit {
        let start = self.start();
        let Ok(mut stream) = TcpStream::connect(self.address).await else {
            return start.end(Outcome::NotSent, (None, None));
        };
        stream.write_all(VISIT).await.ok();
        sleep(stay).await;
        if reset {
            stream.set_zero_linger().ok();
        }
        drop(stream);
        let mut visit = start.end(Outcome::Left, (None, None));
        visit.ended += TAKEN_AFTER;
        visit
    }

    fn start(&self) -> Start {
        let sent = Instant::now();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let microseconds = since.unwrap_or_default().as_micros();
        Start {
            client: self.client,
            replica: self.replica,
            sent,
            sent_at: i64::try_from(microseconds).unwrap_or(i64::MAX),
        }
    }

    async fn ask(&mut self) -> (Outcome, (Option<i64>, Option<i64>)) {
        self.response = None;
        let stream = match self.stream.take() {
            Some(stream) if !is_closed(&stream) => stream,
            _ => match timeout(self.timeout, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => stream,
                _ => return (Outcome::NotSent, (None, None)),
            },
        };
        let Ok(Ok(head)) = timeout(self.timeout, self.exchange(stream)).await else {
            return (Outcome::Unanswered, (None, None));
        };
        let body = serde_json::from_slice(&self.buffer[head.length..]).unwrap_or_default();
        let (_, body) = self.response.insert((head, body));
        let number = |field: &str| body[field].as_i64();
        let numbers = (number("total_registros_db"), number("visitas_redis"));
        let outcome = match (head.status, numbers.0) {
            (200, Some(_)) => Outcome::Recorded,
            (503, None) if body.is_object() && head.retry_after => Outcome::Refused,
            (503, None) if body.is_object() => Outcome::InDoubt,
            (status, _) => Outcome::Wrong(status),
        };
        (outcome, numbers)
    }

    /// Leaves the response in the buffer, and keeps the connection if it can be used again.
    async fn exchange(&mut self, mut stream: TcpStream) -> Result<Head> {
        stream.set_nodelay(true)?;
        stream.write_all(VISIT).await?;
        self.buffer.clear();
        loop {
            let read = stream.read_buf(&mut self.buffer).await?;
            ensure!(read > 0, "closed before the response");
            if let Some(head) = Head::parse(&self.buffer)?
                && self.buffer.len() >= head.length + head.body
            {
                if !head.closes {
                    self.stream = Some(stream);
                }
                return Ok(head);
            }
        }
    }
}

/// Whether the service has closed a connection over which nothing is under way, as it is free to: a
/// client then opens another one, like every pool of connections.
fn is_closed(idle: &TcpStream) -> bool {
    let read = idle.try_read(&mut [0]);
    !read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}
