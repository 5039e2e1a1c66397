//! One client that makes visits over a connection that it keeps, and what it was told.
//!
//! As plain as can be, since it shares the processors with what it visits.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use bench::client::Head;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// One visit as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// When it began.
    pub sent: Instant,
    /// The same by the clock on the wall, in microseconds since 1970.
    pub sent_at: i64,
    /// Until its answer was read, or until there was none.
    pub took: Duration,
    /// What came of it.
    pub outcome: Outcome,
}

/// What a client knows of its visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is recorded.
    Acknowledged {
        /// The number of rows with it.
        total: i64,
        /// The counter in Redis, where it was counted there.
        redis: Option<i64>,
    },
    /// A `503`, which claims nothing.
    Refused,
    /// It was sent, and no answer came.
    Unanswered,
    /// There was no connection to send it over.
    NotSent,
    /// It was sent, and its client left before any answer.
    Left,
    /// An answer that no visit may have, by its status.
    Wrong(u16),
}

/// A client with one connection.
pub struct Visitor {
    address: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// The fields of an answer.
#[derive(Deserialize)]
struct Answer {
    total_registros_db: Option<i64>,
    visitas_redis: Option<i64>,
}

/// More than twice as long as an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A visit may be taken so long after its client has left.
const TAKEN_AFTER: Duration = Duration::from_millis(250);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: chaos\r\n\r\n";

impl Visit {
    /// When its answer was read.
    #[must_use]
    pub fn answered(&self) -> Instant {
        self.sent + self.took
    }

    /// Whether it is recorded and counted.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self.outcome, Outcome::Acknowledged { redis: Some(_), .. })
    }

    /// The number of rows with it, where it is recorded.
    #[must_use]
    pub fn total(&self) -> Option<i64> {
        match self.outcome {
            Outcome::Acknowledged { total, .. } => Some(total),
            _ => None,
        }
    }

    /// The counter with it, where it is counted.
    #[must_use]
    pub fn redis(&self) -> Option<i64> {
        match self.outcome {
            Outcome::Acknowledged { redis, .. } => redis,
            _ => None,
        }
    }
}

/// When a visit began.
struct Begun {
    sent: Instant,
    sent_at: i64,
}

impl Begun {
    fn now() -> Self {
        let sent = Instant::now();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let microseconds = since.unwrap_or_default().as_micros();
        Self {
            sent,
            sent_at: i64::try_from(microseconds).unwrap_or(i64::MAX),
        }
    }

    fn ended(self, outcome: Outcome) -> Visit {
        Visit {
            sent: self.sent,
            sent_at: self.sent_at,
            took: self.sent.elapsed(),
            outcome,
        }
    }
}

impl Visitor {
    /// A client that has not connected yet.
    #[must_use]
    pub fn of(address: SocketAddr) -> Self {
        Self {
            address,
            stream: None,
            buffer: Vec::new(),
        }
    }

    /// Makes a visit.
    pub async fn visit(&mut self) -> Visit {
        let begun = Begun::now();
        let outcome = self.outcome().await;
        if matches!(outcome, Outcome::Unanswered | Outcome::Wrong(_)) {
            self.stream = None;
        }
        begun.ended(outcome)
    }

    /// Asks for a visit over a connection of its own and leaves after `stay`: by a reset or with a
    /// goodbye.
    pub async fn pass_by(address: SocketAddr, stay: Duration, reset: bool) -> Visit {
        let begun = Begun::now();
        let Ok(mut stream) = TcpStream::connect(address).await else {
            return begun.ended(Outcome::NotSent);
        };
        stream.write_all(REQUEST).await.ok();
        sleep(stay).await;
        if reset {
            stream.set_zero_linger().ok();
        }
        drop(stream);
        let mut visit = begun.ended(Outcome::Left);
        visit.took += TAKEN_AFTER;
        visit
    }

    async fn outcome(&mut self) -> Outcome {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => match timeout(PATIENCE, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => stream,
                _ => return Outcome::NotSent,
            },
        };
        let exchange = timeout(PATIENCE, self.exchange(stream)).await;
        let Ok(Ok(head)) = exchange else {
            return Outcome::Unanswered;
        };
        match (head.status, self.answer(head)) {
            (
                200,
                Some(Answer {
                    total_registros_db: Some(total),
                    visitas_redis: redis,
                }),
            ) => Outcome::Acknowledged { total, redis },
            (
                503,
                Some(Answer {
                    total_registros_db: None,
                    ..
                }),
            ) => Outcome::Refused,
            (status, _) => Outcome::Wrong(status),
        }
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
