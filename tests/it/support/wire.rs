//! A connection to the service, byte by byte.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{SOON, Service};

/// An open connection.
pub(crate) struct Wire {
    stream: TcpStream,
    opened: Instant,
}

impl Wire {
    /// Connects and sends nothing.
    pub(crate) async fn open(service: &Service) -> Self {
        Self::open_at(service.address).await
    }

    /// Connects to another of its addresses.
    pub(crate) async fn open_at(address: SocketAddr) -> Self {
        let opened = Instant::now();
        let stream = TcpStream::connect(address).await;
        Self {
            stream: stream.expect("a connection"),
            opened,
        }
    }

    /// Sends bytes, of which the service need not read all.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.ok();
    }

    /// Ends the connection by a reset, as a client does that has crashed.
    pub(crate) fn reset(self) {
        self.stream.set_zero_linger().expect("a socket's option");
    }

    /// Asks for a path and returns the response, which has a `Content-Length`.
    pub(crate) async fn get(&mut self, path: &str) -> String {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))
            .await;
        self.response().await.expect("a response")
    }

    /// The next response, or nothing if none comes soon.
    pub(crate) async fn response_within(&mut self, limit: Duration) -> Option<String> {
        timeout(limit, self.response()).await.ok().flatten()
    }

    /// The next response, or nothing if the connection closes first.
    async fn response(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&bytes);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head
                    .lines()
                    .filter_map(|line| line.split_once(": "))
                    .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                    .map_or(0, |(_, length)| length.parse().expect("a length"));
                if body.len() >= length {
                    return Some(text.into_owned());
                }
            }
            let read = timeout(SOON, self.stream.read_buf(&mut bytes)).await;
            if !matches!(read.expect("a response or an end"), Ok(1..)) {
                return None;
            }
        }
    }

    /// The beginning of the next response, which can be less than its headers. None if the connection
    /// closes first.
    pub(crate) async fn beginning(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        let read = timeout(SOON, self.stream.read_buf(&mut bytes)).await;
        let read = read.expect("a response or an end");
        matches!(read, Ok(1..)).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads until the service closes the connection. A reset counts as closed, too.
    pub(crate) async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        timeout(SOON, self.stream.read_to_end(&mut bytes))
            .await
            .expect("the connection is closed")
            .ok();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the service leaves it open for a while, without a word.
    pub(crate) async fn is_open_after(&mut self, pause: Duration) -> bool {
        let mut byte = [0];
        timeout(pause, self.stream.read(&mut byte)).await.is_err()
    }

    /// Says that it sends no more, as `nc -N` does.
    pub(crate) async fn end_sending(&mut self) {
        self.stream.shutdown().await.ok();
    }

    /// For how long it has been open.
    pub(crate) fn age(&self) -> Duration {
        self.opened.elapsed()
    }
}
