//! One client that makes visits over a connection that it keeps, and what it was told.
//!
//! As plain as can be, since it shares the processors with what it visits.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use bench::client::Head;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::history::{Outcome, Visit};

/// A client with one connection.
pub struct Visitor {
    client: usize,
    replica: usize,
    address: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// The fields of an answer.
#[derive(Clone, Copy, Deserialize)]
struct Answer {
    total_registros_db: Option<i64>,
    visitas_redis: Option<i64>,
}

/// More than twice as long as an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A visit may be taken so long after its client has left.
const TAKEN_AFTER: Duration = Duration::from_millis(250);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: chaos\r\n\r\n";

/// Whether the service has closed a connection over which nothing is under way, as it may: a client
/// then opens another one, like every pool of connections.
fn is_closed(idle: &TcpStream) -> bool {
    let read = idle.try_read(&mut [0]);
    !read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// The beginning of a visit.
struct Start {
    client: usize,
    replica: usize,
    sent: Instant,
    sent_at: i64,
}

impl Start {
    fn now(client: usize, replica: usize) -> Self {
        let sent = Instant::now();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let microseconds = since.unwrap_or_default().as_micros();
        Self {
            client,
            replica,
            sent,
            sent_at: i64::try_from(microseconds).unwrap_or(i64::MAX),
        }
    }

    fn end(self, outcome: Outcome, total: Option<i64>, redis: Option<i64>) -> Visit {
        Visit {
            client: self.client,
            replica: self.replica,
            sent: self.sent,
            sent_at: self.sent_at,
            ended: Instant::now(),
            outcome,
            total,
            redis,
        }
    }

    fn end_without_numbers(self, outcome: Outcome) -> Visit {
        self.end(outcome, None, None)
    }
}

impl Visitor {
    /// A client, by its number, of a replica, by its number and address. It has not connected yet.
    #[must_use]
    pub fn new(client: usize, replica: usize, address: SocketAddr) -> Self {
        Self {
            client,
            replica,
            address,
            stream: None,
            buffer: Vec::new(),
        }
    }

    /// Makes a visit.
    pub async fn visit(&mut self) -> Visit {
        let start = Start::now(self.client, self.replica);
        let (outcome, total, redis) = self.ask().await;
        if matches!(outcome, Outcome::Unanswered | Outcome::Wrong(_)) {
            self.stream = None;
        }
        start.end(outcome, total, redis)
    }

    /// Asks for a visit over a connection of its own and leaves after `stay`: by a reset or with a
    /// goodbye.
    pub async fn pass_by(&self, stay: Duration, reset: bool) -> Visit {
        let start = Start::now(self.client, self.replica);
        let Ok(mut stream) = TcpStream::connect(self.address).await else {
            return start.end_without_numbers(Outcome::NotSent);
        };
        stream.write_all(REQUEST).await.ok();
        sleep(stay).await;
        if reset {
            stream.set_zero_linger().ok();
        }
        drop(stream);
        let mut visit = start.end_without_numbers(Outcome::Left);
        visit.ended += TAKEN_AFTER;
        visit
    }

    async fn ask(&mut self) -> (Outcome, Option<i64>, Option<i64>) {
        let stream = match self.stream.take() {
            Some(stream) if !is_closed(&stream) => stream,
            _ => match timeout(PATIENCE, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => stream,
                _ => return (Outcome::NotSent, None, None),
            },
        };
        let exchange = timeout(PATIENCE, self.exchange(stream)).await;
        let Ok(Ok(head)) = exchange else {
            return (Outcome::Unanswered, None, None);
        };
        let answer = self.answer(head);
        let (total, redis) = answer.map_or((None, None), |answer| {
            (answer.total_registros_db, answer.visitas_redis)
        });
        let outcome = match (head.status, total) {
            (200, Some(_)) => Outcome::Recorded,
            (503, None) if answer.is_some() && head.retry_after => Outcome::Refused,
            (503, None) if answer.is_some() => Outcome::InDoubt,
            (status, _) => Outcome::Wrong(status),
        };
        (outcome, total, redis)
    }

    /// Leaves the answer in the buffer, and keeps the connection if it may be used again.
    async fn exchange(&mut self, mut stream: TcpStream) -> Result<Head> {
        stream.set_nodelay(true)?;
        stream.write_all(REQUEST).await?;
        self.buffer.clear();
        loop {
            let read = stream.read_buf(&mut self.buffer).await?;
            ensure!(read > 0, "closed before the answer");
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

    fn answer(&self, head: Head) -> Option<Answer> {
        serde_json::from_slice(&self.buffer[head.length..]).ok()
    }
}
