//! Minimal HTTP clients: they share the processors with the service that they visit.
//!
//! [`Connection`] blocks. `visitor` has the asynchronous client, which also classifies the outcome
//! of a visit.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// A visit.
pub(crate) const VISIT: &[u8] = b"GET / HTTP/1.1\r\nhost: visitas.test\r\n\r\n";

/// Longer than any response that a measurement waits for.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A keep-alive connection. Every call blocks.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A complete response.
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

    /// Sets how long to wait for a response.
    pub fn set_timeout(&self, timeout: Duration) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))
    }

    /// Whether the server has kept this idle connection open.
    pub fn is_open(&self) -> bool {
        let peeked = self
            .stream
            .set_nonblocking(true)
            .and_then(|()| self.stream.peek(&mut [0]));
        self.stream.set_nonblocking(false).is_ok()
            && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Makes a visit.
    pub fn visit(&mut self) -> Result<ResponseHeaders> {
        self.exchange(VISIT)
    }

    /// Requests a path.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: visitas.test\r\n\r\n");
        let headers = self.exchange(request.as_bytes())?;
        Ok(Response {
            status: headers.status,
            body: String::from_utf8(self.buffer[headers.length..].to_vec())?,
        })
    }

    /// Sends a request and reads its response into the buffer.
    fn exchange(&mut self, request: &[u8]) -> Result<ResponseHeaders> {
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
            if let Some(headers) = ResponseHeaders::parse(&self.buffer)?
                && self.buffer.len() >= headers.length + headers.body
            {
                return Ok(headers);
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

/// Requests a path over a new connection.
pub fn get(address: SocketAddr, path: &str) -> Result<Response> {
    Connection::open(address)?.get(path)
}

/// Makes one visit and returns its two numbers. An unacknowledged visit is an error.
pub fn visit(address: SocketAddr) -> Result<(i64, Option<i64>)> {
    let response = get(address, "/")?;
    ensure!(
        response.status == 200,
        "the response to a visit was {response:?}"
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

/// The parts of a response's headers that a client uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHeaders {
    /// Such as 200.
    pub status: u16,
    /// Bytes of the status line and the headers.
    pub length: usize,
    /// Bytes of the body after the headers.
    pub body: usize,
    /// Whether the server closes the connection after this response.
    pub closes: bool,
    /// Whether the response has `Retry-After`.
    pub retry_after: bool,
    /// Whether the response names a trace (`traceresponse`).
    pub sampled: bool,
}

impl ResponseHeaders {
    /// Parses the headers at the beginning of `bytes`; `None` while they are incomplete. Headers
    /// without `Content-Length` are an error.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut fields = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut fields);
        let httparse::Status::Complete(length) = response.parse(bytes)? else {
            return Ok(None);
        };
        let status = response.code.context("a response without a status")?;
        let header = |name: &str| {
            response
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case(name))
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
        let headers = ResponseHeaders::parse(response).unwrap().unwrap();
        assert_eq!(
            (headers.status, headers.length, headers.body),
            (503, response.len(), 12)
        );
        assert!(ResponseHeaders::parse(&response[..30]).unwrap().is_none());
        assert!(ResponseHeaders::parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
