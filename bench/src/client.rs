//! One connection to a subject, as plain as can be: what it costs is not the subject's.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// Longer than any answer takes that is still of interest.
const PATIENCE: Duration = Duration::from_mins(1);

/// A connection that is kept alive. Everything blocks.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer, read to its end.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// Such as 200.
    pub status: u16,
    /// As it was sent.
    pub body: String,
}

impl Connection {
    /// Opens one.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Makes a visit and says with which status it was answered.
    ///
    /// # Errors
    ///
    /// If there is no answer, or none that can be read.
    pub fn visit(&mut self) -> Result<u16> {
        Ok(self.exchange(b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n")?.0)
    }

    /// Asks for a path.
    ///
    /// # Errors
    ///
    /// If there is no answer, or none that can be read.
    pub fn get(&mut self, path: &str) -> Result<Answer> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n");
        let (status, body) = self.exchange(request.as_bytes())?;
        Ok(Answer {
            status,
            body: String::from_utf8(self.buffer[body..].to_vec())?,
        })
    }

    /// Sends a request and reads its answer: the status, and where in the buffer the body begins.
    fn exchange(&mut self, request: &[u8]) -> Result<(u16, usize)> {
        self.stream.write_all(request)?;
        self.buffer.clear();
        let mut chunk = [0; 4096];
        loop {
            let read = self.stream.read(&mut chunk)?;
            ensure!(read > 0, "the connection was closed before the answer");
            self.buffer.extend_from_slice(&chunk[..read]);
            if let Some(head) = Head::parse(&self.buffer)?
                && self.buffer.len() >= head.length + head.body
            {
                return Ok((head.status, head.length));
            }
        }
    }
}

/// Makes one visit and returns its two numbers.
///
/// # Errors
///
/// If it is not acknowledged.
pub fn numbers(address: SocketAddr) -> Result<(i64, Option<i64>)> {
    let answer = Connection::open(address)?.get("/")?;
    ensure!(answer.status == 200, "a visit was answered {answer:?}");
    numbers_in(&answer.body)
}

/// The two numbers of a visit's answer. Without Redis there is one.
///
/// # Errors
///
/// If there is no total.
pub fn numbers_in(body: &str) -> Result<(i64, Option<i64>)> {
    let json: Value = serde_json::from_str(body).with_context(|| format!("in {body:?}"))?;
    let total = json["total_registros_db"].as_i64();
    let redis = json["visitas_redis"].as_i64();
    Ok((total.with_context(|| format!("no total in {body}"))?, redis))
}

/// What of a head says where the answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Such as 200.
    pub status: u16,
    /// Bytes of the head.
    pub length: usize,
    /// Bytes of the body, which follow.
    pub body: usize,
    /// Whether no other answer will come over this connection.
    pub closes: bool,
    /// Whether the client is asked to try again (`Retry-After`).
    pub retry_after: bool,
}

impl Head {
    /// Reads a head at the beginning of `bytes`; `None` while it is not complete.
    ///
    /// # Errors
    ///
    /// If it is no head, or has no length of a body.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = response.parse(bytes)? else {
            return Ok(None);
        };
        let status = response.code.context("an answer without a status")?;
        let header = |name: &str| {
            let mut headers = response.headers.iter();
            headers.find(|header| header.name.eq_ignore_ascii_case(name))
        };
        let body = header("content-length");
        let Some(body) = body else {
            bail!("an answer without a length");
        };
        Ok(Some(Self {
            status,
            length,
            body: std::str::from_utf8(body.value)?.parse()?,
            closes: header("connection")
                .is_some_and(|header| header.value.eq_ignore_ascii_case(b"close")),
            retry_after: header("retry-after").is_some(),
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
    fn answer_ends_where_its_length_says() {
        let answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\n\r\n";
        let head = Head::parse(answer).unwrap().unwrap();
        assert_eq!(
            (head.status, head.length, head.body),
            (503, answer.len(), 12)
        );
        assert!(Head::parse(&answer[..30]).unwrap().is_none());
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
