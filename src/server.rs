//! Serves a router over HTTP/1 with every wait bounded: how many connections are open, how long each
//! may stay silent, and how long a stop may take.
//!
//! Must not know: routes, stores, settings or metrics. What it is told is a router, limits and a
//! moment to stop; what it tells is how many connections are open.

mod connection;

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    time::{Duration, Instant},
};

use axum::Router;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::{JoinError, JoinSet},
    time::sleep,
};

/// What a client may cost. Every duration is the longest wait of its kind; after it the connection
/// is closed without an answer, as hyper and nginx do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections open at once. Those beyond wait in the kernel's backlog, where they cost no file
    /// descriptor of this process. Measured in resident memory by `make chaos`: 3 KiB a silent
    /// connection, 8 KiB one that has been used, 47 KiB one with half a head, 106 KiB at worst, whose
    /// client asks and does not read. The kernel's buffers come on top.
    pub max_connections: usize,
    /// From a request head's first byte to its last; for a connection's first request, from accept.
    /// Time spent on bodies and answers does not count. Half a head that came in one packet with a
    /// whole request is not seen to begin before its next byte: `idle_timeout` bounds it.
    pub header_timeout: Duration,
    /// From the end of an answer to the first byte of the next request.
    pub idle_timeout: Duration,
    /// Without a single byte moved, while the client does not read an answer that is ready or does
    /// not send a body that the handler waits for. What fits the kernel's send buffer (up to 4 MiB)
    /// counts as read, and that buffer asks for more only when a good part of it is empty.
    pub stall_timeout: Duration,
}

/// How a stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Drained {
    /// Connections that were still open at the deadline and were cut.
    pub aborted: usize,
}

/// How long a stop waits for one more request on a connection that has none. A client that sends
/// while the stop begins gets its answer, with `Connection: close`, where closing at once would
/// drop a request that is on its way (RFC 9112, section 9.5, leaves that risk to the client).
const LAST_CALL: Duration = Duration::from_millis(100);

/// How long accepting pauses after an error that accepting again at once would only repeat, such as
/// running out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Opens a listener on `addr` that lets `backlog` connections wait to be accepted (the kernel caps
/// it, on Linux at `net.core.somaxconn`). Must be called within a tokio runtime.
///
/// # Errors
///
/// What the system says, with the address in front.
pub fn bind(addr: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let listen = || {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        // Without this a restart fails while connections of the last run are in TIME_WAIT. On
        // Windows the option means something else: sharing the port with a stranger.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        socket.listen(backlog)
    };
    listen()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {addr}: {error}")))
}

/// Serves `router` on `listener` until `stop` resolves, then drains for at most `drain`. HTTP/1.0
/// and 1.1 only: `auto` of hyper-util has no timer while it reads the version.
///
/// `on_connections` is told the number of open connections whenever it changes.
///
/// At the stop, connections in the kernel's backlog are still accepted; then the listener closes.
/// Every request whose head is read is answered, with `Connection: close`. A connection without a
/// request closes after 100 ms (half of `drain` if that is less), one with half a head at its
/// `header_timeout`, and whatever is open after `drain` is cut. Returns at the latest `drain` after
/// `stop`; what was cut goes when its task next runs.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    on_connections: impl Fn(usize),
    stop: impl Future<Output = ()>,
    drain: Duration,
) -> Drained {
    let (stopping, _) = watch::channel(false);
    let mut connections = Connections {
        // Routes take their state here, once, instead of at every request.
        router: router.with_state(()),
        limits,
        last_call: LAST_CALL.min(drain / 2),
        stopping,
        tasks: JoinSet::new(),
        on_change: on_connections,
    };
    accept_until(stop, &listener, &mut connections).await;

    let mut deadline = pin!(sleep(drain));
    // First the word to those that are open, so that those which leave make room for the backlog.
    connections.stopping.send_replace(true);
    tokio::select! {
        () = connections.accept_backlog(listener) => {}
        () = &mut deadline => {}
    }
    tokio::select! {
        () = connections.all_closed() => {}
        () = &mut deadline => {}
    }
    connections.abort()
}

/// Accepts as long as there is room. No error ends this: a listener that works again after an error
/// is worth more than a service that has exited.
async fn accept_until<F: Fn(usize)>(
    stop: impl Future<Output = ()>,
    listener: &TcpListener,
    connections: &mut Connections<F>,
) {
    let mut stop = pin!(stop);
    let mut pause = Duration::ZERO;
    let mut warnings = Warnings::default();
    loop {
        let accept = async {
            if !pause.is_zero() {
                sleep(pause).await;
            }
            listener.accept().await
        };
        tokio::select! {
            biased;
            () = &mut stop => return,
            // A connection that ends also ends a pause: it has given its descriptor back.
            () = connections.one_closed(), if !connections.is_empty() => pause = Duration::ZERO,
            accepted = accept, if connections.have_room() => match accepted {
                Ok((stream, _)) => {
                    pause = Duration::ZERO;
                    connections.open(stream);
                }
                Err(error) if concerns_one_client(&error) => pause = Duration::ZERO,
                Err(error) => {
                    pause = ACCEPT_PAUSE;
                    warnings.accept_failed(&error);
                }
            },
        }
    }
}

/// The open connections, one task each.
struct Connections<F> {
    router: Router,
    limits: Limits,
    last_call: Duration,
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
    on_change: F,
}

impl<F: Fn(usize)> Connections<F> {
    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn have_room(&self) -> bool {
        self.tasks.len() < self.limits.max_connections
    }

    fn open(&mut self, stream: TcpStream) {
        self.tasks.spawn(connection::run(
            stream,
            self.router.clone(),
            self.limits,
            self.stopping.subscribe(),
            self.last_call,
        ));
        (self.on_change)(self.tasks.len());
    }

    /// Waits until a connection has closed. Safe to cancel.
    async fn one_closed(&mut self) {
        let ended = self.tasks.join_next().await;
        self.closed(ended);
    }

    async fn all_closed(&mut self) {
        while !self.is_empty() {
            self.one_closed().await;
        }
    }

    fn closed(&self, ended: Option<Result<(), JoinError>>) {
        // A panic has been logged where it happened.
        if let Some(Err(error)) = ended
            && !error.is_panic()
        {
            tracing::error!(error = %error, "a connection's task failed");
        }
        (self.on_change)(self.tasks.len());
    }

    /// Accepts what the kernel holds ready, then closes the listener.
    async fn accept_backlog(&mut self, listener: TcpListener) {
        // Not through tokio, which says "nothing ready" until its poller has seen the connection.
        let Ok(listener) = listener.into_std() else {
            return;
        };
        loop {
            while !self.have_room() {
                self.one_closed().await;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    let stream = stream
                        .set_nonblocking(true)
                        .and_then(|()| TcpStream::from_std(stream));
                    if let Ok(stream) = stream {
                        self.open(stream);
                    }
                }
                Err(error) if concerns_one_client(&error) => {}
                // Nothing left, or no means to take it.
                Err(_) => return,
            }
        }
    }

    fn abort(mut self) -> Drained {
        while let Some(ended) = self.tasks.try_join_next() {
            self.closed(Some(ended));
        }
        let aborted = self.tasks.len();
        if aborted > 0 {
            self.tasks.abort_all();
            (self.on_change)(0);
        }
        Drained { aborted }
    }
}

/// Whether an accept failed because of the connection it was about to return, so that the next may
/// succeed at once (accept(2), "Error handling"); anything else is about this process or host.
fn concerns_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::Interrupted
            | io::ErrorKind::NetworkUnreachable
    )
}

/// At most one line a second about a listener that cannot accept.
#[derive(Default)]
struct Warnings {
    last: Option<Instant>,
    left_out: u64,
}

impl Warnings {
    fn accept_failed(&mut self, error: &io::Error) {
        if self
            .last
            .is_some_and(|last| last.elapsed() < Duration::from_secs(1))
        {
            self.left_out += 1;
            return;
        }
        tracing::warn!(error = %error, left_out = self.left_out, "cannot accept connections");
        self.last = Some(Instant::now());
        self.left_out = 0;
    }
}
