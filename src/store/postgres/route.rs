//! Finds a way to a server whose name has several addresses, of which some may be silent.
//!
//! The driver tries a name's addresses in order, so a silent one uses up the time for all; and it
//! takes no open connection. So the addresses are raced here (RFC 8305), and the driver is led to
//! the first that answers by a socket of this process: it keeps the server's name, which TLS needs.
//! Must not know: how a session is opened.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

/// How long to wait for an answer before the next address is tried as well (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Opens a session with the server at the address that answers first.
pub(super) async fn connect_to_any(
    options: &PgConnectOptions,
    addresses: &[SocketAddr],
    reached_by: Instant,
) -> sqlx::Result<PgConnection> {
    let stream = race(addresses, reached_by).await?;
    let address = stream.peer_addr()?.ip();
    // On this host the way through a socket would cost more than the network does, and a server
    // here needs its name only where its certificate is checked for it.
    if address.is_loopback() && !matches!(options.get_ssl_mode(), PgSslMode::VerifyFull) {
        let options = options.clone().host(&address.to_string());
        return options.connect().await;
    }
    connect_through(stream, options).await
}

/// Connects to each address a moment after the one before it, or at once when that fails. The first
/// that answers wins. The error names every address and what it did.
async fn race(addresses: &[SocketAddr], deadline: Instant) -> io::Result<TcpStream> {
    let mut waiting = by_turns(addresses).into_iter();
    // So that all of them have been tried by half of the time.
    let time = deadline.saturating_duration_since(Instant::now());
    let delay = (time / 2 / u32::try_from(addresses.len()).unwrap_or(u32::MAX)).min(ATTEMPT_DELAY);
    let mut attempts = JoinSet::new();
    let mut failures = Vec::new();
    loop {
        if let Some(address) = waiting.next() {
            attempts.spawn(async move {
                let connected =
                    tokio::time::timeout_at(deadline, TcpStream::connect(address)).await;
                let silent = || Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
                (address, connected.unwrap_or_else(|_| silent()))
            });
        }
        match tokio::time::timeout(delay, attempts.join_next()).await {
            Ok(Some(Ok((_, Ok(stream))))) => return Ok(stream),
            Ok(Some(Ok((address, Err(error))))) => failures.push((address, error)),
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(None) => return Err(all(failures)),
            // It is time for the next address.
            Err(_) => {}
        }
    }
}

/// Puts addresses of both families in turns, beginning with the first (RFC 8305, section 4).
fn by_turns(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_of_first = |address: &&SocketAddr| address.is_ipv4() == addresses[0].is_ipv4();
    let (first, second): (Vec<_>, Vec<_>) = addresses.iter().partition(is_of_first);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let next = || Some(first.next().into_iter().chain(second.next()).collect());
    std::iter::from_fn(next)
        .take_while(|turn: &Vec<&SocketAddr>| !turn.is_empty())
        .flatten()
        .copied()
        .collect()
}

/// One error for the failures of all addresses.
fn all(mut failures: Vec<(SocketAddr, io::Error)>) -> io::Error {
    // In the same order each time, so that an outage has one line in the log.
    failures.sort_by_key(|(address, _)| *address);
    let kind = failures
        .first()
        .map_or(io::ErrorKind::NotFound, |(_, error)| error.kind());
    let texts: Vec<String> = failures
        .iter()
        .map(|(address, error)| format!("{address}: {error}"))
        .collect();
    io::Error::new(kind, texts.join(", "))
}

/// Opens a session over an open connection to the server.
async fn connect_through(
    server: TcpStream,
    options: &PgConnectOptions,
) -> sqlx::Result<PgConnection> {
    server.set_nodelay(true)?;
    // An abstract name (`man 7 unix`) leaves no file. The driver adds the name of the socket in its
    // directory.
    let directory = format!("\0visitas-{}", Uuid::new_v4());
    let listener = UnixListener::bind(format!("{directory}/.s.PGSQL.{}", options.get_port()))?;
    let options = options.clone().socket(directory);
    let lead = async {
        let (driver, _) = listener.accept().await?;
        // Any process of this host can connect to the socket.
        let process = driver.peer_cred()?.pid();
        if process.and_then(|process| u32::try_from(process).ok()) != Some(std::process::id()) {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
        }
        tokio::spawn(relay(driver, server));
        Ok(())
    };
    let (connection, ()) = tokio::try_join!(options.connect(), lead)?;
    Ok(connection)
}

/// Passes on what the driver and the server send, until either closes its side or fails.
async fn relay(mut driver: UnixStream, mut server: TcpStream) {
    let (mut from_driver, mut to_driver) = driver.split();
    let (mut from_server, mut to_server) = server.split();
    // Either result ends both ways, as one connection would end.
    tokio::select! {
        _ = tokio::io::copy(&mut from_driver, &mut to_server) => {}
        _ = tokio::io::copy(&mut from_server, &mut to_driver) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::net::TcpSocket;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(4)
    }

    /// An address that takes no connection and refuses none: its queue is full.
    async fn silent() -> (SocketAddr, impl Sized) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) =
            tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await
        {
            queued.push(stream);
        }
        (address, (listener, queued))
    }

    async fn listening() -> (SocketAddr, impl Sized) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        (listener.local_addr().unwrap(), listener)
    }

    async fn refusing() -> SocketAddr {
        listening().await.0
    }

    #[tokio::test]
    async fn silent_and_refusing_addresses_do_not_hide_one_that_answers() {
        let (silent, _queue) = silent().await;
        let (answering, _listener) = listening().await;
        let refusing = refusing().await;
        for addresses in [[silent, refusing, answering], [refusing, silent, answering]] {
            let stream = race(&addresses, soon()).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), answering);
        }
    }

    #[tokio::test]
    async fn error_names_each_address_and_what_it_did() {
        let (silent, _queue) = silent().await;
        let refusing = refusing().await;
        let deadline = Instant::now() + Duration::from_millis(100);
        let error = race(&[silent, refusing], deadline)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("{silent}: no answer")), "{error}");
        assert!(
            error.contains(&format!("{refusing}: Connection refused")),
            "{error}"
        );
    }

    #[test]
    fn families_take_turns() {
        let address = |ip: &str| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 5432);
        let given = ["::1", "::2", "::3", "10.0.0.1"].map(address);
        let expected = ["::1", "10.0.0.1", "::2", "::3"].map(address);
        assert_eq!(by_turns(&given), expected);
        assert_eq!(by_turns(&given[..1]), given[..1]);
    }
}
