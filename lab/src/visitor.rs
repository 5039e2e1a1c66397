//! An asynchronous client that makes visits over one connection and classifies their outcomes.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::client::{ResponseHeaders, VISIT};
use crate::history::{Outcome, Visit};

/// A client with one connection, which it reopens after it has closed.
pub struct Visitor {
    client: usize,
    replica: usize,
    address: SocketAddr,
    timeout: Duration,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
    response: Option<(ResponseHeaders, Value)>,
}

/// More than twice as long as a response can take by the default settings.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long after a client's disconnect the service can still record its visit.
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
    /// Client number `client` of replica number `replica`. It is not connected yet.
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

    /// Sets the response timeout; the default is 5 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes a visit.
    pub async fn visit(&mut self) -> Visit {
        let start = self.start();
        let (outcome, numbers) = self.send_visit().await;
        if matches!(outcome, Outcome::NoResponse | Outcome::Wrong(_)) {
            self.stream = None;
        }
        start.end(outcome, numbers)
    }

    /// The headers and body of the last visit's response, if one came.
    pub fn response(&self) -> Option<&(ResponseHeaders, Value)> {
        self.response.as_ref()
    }

    /// Sends a visit over a new connection and disconnects after `stay`, by a reset or an orderly
    /// close.
    pub async fn visit_and_leave(&self, stay: Duration, reset: bool) -> Visit {
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

    async fn send_visit(&mut self) -> (Outcome, (Option<i64>, Option<i64>)) {
        self.response = None;
        let stream = match self.stream.take() {
            Some(stream) if !is_closed(&stream) => stream,
            _ => match timeout(self.timeout, TcpStream::connect(self.address)).await {
                Ok(Ok(stream)) => stream,
                _ => return (Outcome::NotSent, (None, None)),
            },
        };
        let Ok(Ok(headers)) = timeout(self.timeout, self.exchange(stream)).await else {
            return (Outcome::NoResponse, (None, None));
        };
        let body = serde_json::from_slice(&self.buffer[headers.length..]).unwrap_or_default();
        let (_, body) = self.response.insert((headers, body));
        let number = |field: &str| body[field].as_i64();
        let numbers = (number("total_registros_db"), number("visitas_redis"));
        let outcome = match (headers.status, numbers.0) {
            (200, Some(_)) => Outcome::Recorded,
            (503, None) if body.is_object() && headers.retry_after => Outcome::Refused,
            (503, None) if body.is_object() => Outcome::InDoubt,
            (status, _) => Outcome::Wrong(status),
        };
        (outcome, numbers)
    }

    /// Reads the response into the buffer, and keeps the connection if it is reusable.
    async fn exchange(&mut self, mut stream: TcpStream) -> Result<ResponseHeaders> {
        stream.set_nodelay(true)?;
        stream.write_all(VISIT).await?;
        self.buffer.clear();
        loop {
            let read = stream.read_buf(&mut self.buffer).await?;
            ensure!(read > 0, "closed before the response");
            if let Some(headers) = ResponseHeaders::parse(&self.buffer)?
                && self.buffer.len() >= headers.length + headers.body
            {
                if !headers.closes {
                    self.stream = Some(stream);
                }
                return Ok(headers);
            }
        }
    }
}

/// Whether the service has closed an idle connection, as HTTP allows: a client then opens another
/// one, like every connection pool.
fn is_closed(idle: &TcpStream) -> bool {
    let read = idle.try_read(&mut [0]);
    !read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}
