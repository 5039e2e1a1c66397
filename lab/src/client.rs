//! Clients of the service, as plain as can be: they share the processors with what they visit.
//!
//! [`Connection`] blocks. `visitor` has the client that does not, and that knows what its visit came
//! to.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// A visit.
pub(crate) const VISIT: &[u8] = b"GET / HTTP/1.1\r\nhost: visitas.test\r\n\r\n";

/// Longer than any response takes that is still of interest.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A connection that is kept alive. Everything blocks.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A response, read to its end.
#[derive(Debug, PartialEq)]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// As it was sent.
    pub body: String,
}

impl Connection {
    /// Opens one.
    pub fn open(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Gives up on a response after this.
    pub fn set_timeout(&self, timeout: Duration) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))
    }

    /// Whether the other side has not closed a connection on which nothing is due.
    pub fn is_open(&self) -> bool {
        let peeked = self
            .stream
            .set_nonblocking(true)
            .and_then(|()| self.stream.peek(&mut [0]));
        self.stream.set_nonblocking(false).is_ok()
            && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Makes a visit.
    pub fn visit(&mut self) -> Result<Head> {
        self.exchange(VISIT)
    }

    /// Asks for a path.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: visitas.test\r\n\r\n");
        let head = self.exchange(request.as_bytes())?;
        Ok(Response {
            status: head.status,
            body: String::from_utf8(self.buffer[head.length..].to_vec())?,
        })
    }

    /// Sends a request and reads its response into the buffer.
    fn exchange(&mut self, request: &[u8]) -> Result<Head> {
        self.stream.write_all(request).context("sending")?;
        self.buffer.clear();
        let mut chunk = [0; 4096];
        loop {
            let read = self.stream.read(&mut chunk).context("reading")?;
            ensure!(
                read > 0,
                "closed after {} bytes of a response",
                self.buffer.len()
            );
            self.buffer.extend_from_slice(&chunk[..read]);
            if let Some(head) = Head::parse(&self.buffer)?
                && self.buffer.len() >= head.length + head.body
            {
                return Ok(head);
            }
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [from, to] = [self.stream.local_addr(), self.stream.peer_addr()];
        write!(formatter, "{:?} from {:?}", to.ok(), from.ok())
    }
}

/// Asks for a path over a connection of its own.
pub fn get(address: SocketAddr, path: &str) -> Result<Response> {
    Connection::open(address)?.get(path)
}

/// Makes one visit and returns its two numbers; it is an error if it is not acknowledged.
pub fn visit(address: SocketAddr) -> Result<(i64, Option<i64>)> {
    let response = get(address, "/")?;
    ensure!(
        response.status == 200,
        "a visit was answered with {response:?}"
    );
    numbers_in(&response.body)
}

/// The two numbers of a visit's response. Without Redis there is one.
pub fn numbers_in(body: &str) -> Result<(i64, Option<i64>)> {
    let json: Value = serde_json::from_str(body).with_context(|| format!("in {body:?}"))?;
    let total = json["total_registros_db"].as_i64();
    let redis = json["visitas_redis"].as_i64();
    Ok((total.with_context(|| format!("no total in {body}"))?, redis))
}

/// What a client needs to know of a response's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Such as 200.
    pub status: u16,
    /// Bytes of the status line and the headers.
    pub length: usize,
    /// Bytes of the body, which follow.
    pub body: usize,
    /// Whether no other response will come over this connection.
    pub closes: bool,
    /// Whether the client is asked to try again (`Retry-After`).
    pub retry_after: bool,
    /// Whether it names a trace (`traceresponse`).
    pub sampled: bool,
}

impl Head {
    /// Reads a head at the beginning of `bytes`; `None` while it is not complete. It is an error if
    /// it is no head, or has no length of a body.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = response.parse(bytes)? else {
            return Ok(None);
        };
        let status = response.code.context("a response without a status")?;
        let header = |name: &str| {
            let mut headers = response.headers.iter();
            headers.find(|header| header.name.eq_ignore_ascii_case(name))
        };
        let body = header("content-length").context("a response without a length")?;
        Ok(Some(Self {
            status,
            length,
            body: std::str::from_utf8(body.value)?.parse()?,
            closes: header("connection")
                .is_some_and(|header| header.value.eq_ignore_ascii_case(b"close")),
            retry_after: header("retry-after").is_some(),
            sampled: header("traceresponse").is_some(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_visit_are_read() {
        let body = r#"{"db_status":"ok","redis_status":"erro","total_registros_db":42,"visitas_redis":null}"#;
        assert_eq!(numbers_in(body).unwrap(), (42, None));
        assert_eq!(
            numbers_in(&body.replace("null", "41")).unwrap(),
            (42, Some(41))
        );
        assert!(numbers_in(&body.replace("42", "null")).is_err());
    }

    #[test]
    fn response_ends_where_its_length_says() {
        let response = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\n\r\n";
        let head = Head::parse(response).unwrap().unwrap();
        assert_eq!(
            (head.status, head.length, head.body),
            (503, response.len(), 12)
        );
        assert!(Head::parse(&response[..30]).unwrap().is_none());
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
