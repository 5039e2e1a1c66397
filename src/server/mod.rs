//! Serves a router over HTTP/1 with every wait bounded: how many connections are open, how long each
//! can stay silent, and how long a stop can take.
//!
//! Must not know: routes, stores or settings. It is given a router, limits and the phases of a stop;
//! it reports how many connections are open and which requests never reached the router.

mod capacity;
mod connection;
mod host;
mod rejections;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::Router;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};

pub use self::capacity::Capacity;
use self::connection::{Activity, State};
pub use self::rejections::{Rejection, Rejections};
use crate::lifecycle::{Lifecycle, Phase};

/// What a client can cost. Every duration is the longest wait of its kind; after it the connection
/// is closed without a response, as hyper and nginx do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections open at once. When all are taken, the one that has been idle longest is closed
    /// for one that waits; while none is idle, those beyond wait in the kernel's backlog, where they
    /// cost no file descriptor of this process. Measured in resident memory by `make chaos`: 3 KiB a
    /// silent connection, 12 KiB one that has been used, 47 KiB one with half of its headers, 106 KiB
    /// at worst, whose client asks and does not read. The kernel's buffers come on top.
    pub max_connections: usize,
    /// From the first byte of a request's headers to their last. Time spent on responses does not
    /// count: of headers that begin behind a request, it counts from that request's response.
    pub header_timeout: Duration,
    /// From accept, or from the end of a response, to the first byte of the next request.
    pub idle_timeout: Duration,
    /// Without a single byte taken, while the client does not read a response that is ready. What
    /// fits the kernel's send buffer (up to 4 MiB) counts as taken, and that buffer asks for more
    /// only when a good part of it is empty.
    pub stall_timeout: Duration,
}

/// What the server reports.
pub struct Events {
    /// The number of open connections, whenever it changes.
    pub connections: Box<dyn Fn(usize) + Send + Sync>,
    /// A request that was refused before the router, and why.
    pub rejected: Box<dyn Fn(Rejection) + Send + Sync>,
}

/// When a server acts on a stop.
pub struct Stop {
    /// The phases.
    pub lifecycle: Lifecycle,
    /// From this phase on every response says `Connection: close`.
    pub leave_at: Phase,
    /// In this phase the server stops to accept and drains.
    pub drain_at: Phase,
    /// How long it drains at most.
    pub drain: Duration,
}

impl Stop {
    fn is_leaving(&self) -> bool {
        self.lifecycle.has_reached(self.leave_at)
    }
}

/// How a stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Drained {
    /// Connections that were cut at the deadline with a request or a response incomplete.
    pub aborted: usize,
}

/// How long a draining server waits for one more request on an idle connection. To close at once
/// would drop a request that is on its way (RFC 9112, section 9.5, leaves that risk to the client).
const LAST_CALL: Duration = Duration::from_secs(1);

/// How long handshakes that had begun have to end, once no new one can begin.
const HANDSHAKE: Duration = Duration::from_millis(1);

/// How long a full server waits until it looks again for an idle connection.
const EVICT_PAUSE: Duration = Duration::from_millis(50);

/// How many of the connections that are idle longest are found in one look at all of them.
const EVICT_BATCH: usize = 64;

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

/// Serves `router` on `listener` until `stop` says to drain, and then for at most `stop.drain`.
/// HTTP/1.0 and 1.1 only: `auto` of hyper-util has no timer while it reads the version.
///
/// When it drains, connections in the kernel's backlog are still accepted; then the listener closes.
/// Every request whose headers are read is answered, with `Connection: close`. A connection without
/// a request closes after a second (half of `stop.drain` if that is less), one with half of its
/// headers at its `header_timeout`, and whatever is open after `stop.drain` is cut, when its task
/// next runs.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    events: Events,
    stop: Stop,
) -> Drained {
    let shared = Arc::new(Shared {
        // Routes take their state here, once, instead of at every request.
        router: router.with_state(()),
        limits,
        events,
        stop,
        began: Instant::now(),
        last_call: OnceLock::new(),
    });
    let mut connections = Connections {
        shared: Arc::clone(&shared),
        tasks: JoinSet::new(),
        open: HashMap::new(),
        idle_longest: Vec::new(),
    };
    let waiting = accept_until_draining(&listener, &mut connections).await;

    let drain = shared.stop.drain;
    let mut deadline = pin!(sleep(drain));
    // First the word to those that are open, so that those which leave make room for the backlog.
    connections.last_call(LAST_CALL.min(drain / 2));
    tokio::select! {
        () = connections.accept_backlog(listener, waiting) => {}
        () = &mut deadline => {}
    }
    tokio::select! {
        () = connections.all_closed() => {}
        () = &mut deadline => {}
    }
    connections.abort()
}

/// What all connections of a server share.
struct Shared {
    router: Router,
    limits: Limits,
    events: Events,
    stop: Stop,
    began: Instant,
    /// When to close connections that are idle, once the server drains.
    last_call: OnceLock<Instant>,
}

impl Shared {
    /// A moment as nanoseconds since the server began, from 1.
    fn moment(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.began);
        since.as_secs() * 1_000_000_000 + u64::from(since.subsec_nanos()) + 1
    }
}

/// Accepts until the server drains, and returns a connection that was accepted and waits for room.
/// No error ends this: a listener that works again after an error is worth more than a service that
/// has exited.
async fn accept_until_draining(
    listener: &TcpListener,
    connections: &mut Connections,
) -> Option<TcpStream> {
    let shared = Arc::clone(&connections.shared);
    let mut draining = pin!(shared.stop.lifecycle.reached(shared.stop.drain_at));
    let mut pause = Duration::ZERO;
    let mut warnings = Warnings::default();
    let mut waiting = None;
    loop {
        let accept = async {
            if !pause.is_zero() {
                sleep(pause).await;
            }
            listener.accept().await
        };
        let look_again = async { sleep(EVICT_PAUSE).await };
        tokio::select! {
            biased;
            () = &mut draining => return waiting,
            // A connection that ends also ends a pause: it has given its descriptor back.
            () = connections.one_closed(), if !connections.is_empty() => pause = Duration::ZERO,
            accepted = accept, if waiting.is_none() => match accepted {
                Ok((stream, _)) => {
                    pause = Duration::ZERO;
                    waiting = Some(stream);
                    if !connections.have_room() {
                        connections.evict_idle_longest();
                    }
                }
                Err(error) if concerns_one_client(&error) => pause = Duration::ZERO,
                Err(error) => {
                    pause = ACCEPT_PAUSE;
                    warnings.accept_failed(&error);
                }
            },
            () = look_again, if waiting.is_some() => connections.evict_idle_longest(),
        }
        if connections.have_room()
            && let Some(stream) = waiting.take()
        {
            connections.open(stream);
        }
    }
}

/// The open connections, one task each.
struct Connections {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
    open: HashMap<Id, Arc<Activity>>,
    /// Connections that were idle when all were last looked at, and since when; the longest last.
    idle_longest: Vec<(u64, Arc<Activity>)>,
}

impl Connections {
    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn have_room(&self) -> bool {
        self.tasks.len() < self.shared.limits.max_connections
    }

    fn open(&mut self, stream: TcpStream) {
        let shared = Arc::clone(&self.shared);
        let activity = Arc::new(Activity::new(shared.moment(Instant::now())));
        let run = connection::run(stream, shared, Arc::clone(&activity));
        let task = self.tasks.spawn(run);
        self.open.insert(task.id(), activity);
        self.report();
    }

    /// Closes the connection that has been idle longest, if one is idle. It goes once its task runs,
    /// unless a request has arrived on it meanwhile.
    fn evict_idle_longest(&mut self) {
        for _ in 0..2 {
            // Since then some can have been used. Every other one has been idle for less.
            while let Some((since, activity)) = self.idle_longest.pop() {
                if activity.evict(since) {
                    return;
                }
            }
            let idle = |activity: &Arc<Activity>| Some((activity.idle_since()?, activity.clone()));
            self.idle_longest
                .extend(self.open.values().filter_map(idle));
            self.idle_longest.sort_unstable_by_key(|&(since, _)| since);
            self.idle_longest.truncate(EVICT_BATCH);
            self.idle_longest.shrink_to_fit();
            self.idle_longest.reverse();
        }
    }

    /// Has every connection that is idle after a while closed.
    fn last_call(&self, pause: Duration) {
        self.shared.last_call.get_or_init(|| Instant::now() + pause);
        for activity in self.open.values() {
            activity.wake();
        }
    }

    /// Waits until a connection has closed. Safe to cancel.
    async fn one_closed(&mut self) {
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => self.closed(id),
            Some(Err(error)) => self.failed(&error),
            None => {}
        }
    }

    async fn all_closed(&mut self) {
        while !self.is_empty() {
            self.one_closed().await;
        }
    }

    fn closed(&mut self, id: Id) {
        self.open.remove(&id);
        self.report();
    }

    fn failed(&mut self, error: &JoinError) {
        // A panic has been logged where it happened.
        if !error.is_panic() {
            tracing::error!(error = %error, "a connection's task failed");
        }
        self.closed(error.id());
    }

    fn report(&self) {
        (self.shared.events.connections)(self.tasks.len());
    }

    /// Accepts what the kernel holds ready, then closes the listener.
    async fn accept_backlog(&mut self, listener: TcpListener, waiting: Option<TcpStream>) {
        if let Some(stream) = waiting {
            self.open_when_there_is_room(stream).await;
        }
        // Not through tokio, which says "nothing ready" until its poller has seen the connection.
        let Ok(listener) = listener.into_std() else {
            return;
        };
        // Before the filter: while this waits for room, clients that connect are not left waiting.
        self.accept_ready(&listener).await;
        let filtered = begin_no_handshake(&listener);
        self.accept_ready(&listener).await;
        if filtered {
            sleep(HANDSHAKE).await;
            self.accept_ready(&listener).await;
        }
    }

    async fn accept_ready(&mut self, listener: &std::net::TcpListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let stream = stream
                        .set_nonblocking(true)
                        .and_then(|()| TcpStream::from_std(stream));
                    if let Ok(stream) = stream {
                        self.open_when_there_is_room(stream).await;
                    }
                }
                Err(error) if concerns_one_client(&error) => {}
                // Nothing left, or no means to take it.
                Err(_) => return,
            }
        }
    }

    async fn open_when_there_is_room(&mut self, stream: TcpStream) {
        while !self.have_room() {
            self.evict_idle_longest();
            let _ = timeout(EVICT_PAUSE, self.one_closed()).await;
        }
        self.open(stream);
    }

    fn abort(mut self) -> Drained {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            match ended {
                Ok((id, ())) => self.closed(id),
                Err(error) => self.failed(&error),
            }
        }
        let incomplete =
            |activity: &&Arc<Activity>| !matches!(activity.state(), State::Idle | State::Lingering);
        let aborted = self.open.values().filter(incomplete).count();
        self.tasks.abort_all();
        (self.shared.events.connections)(0);
        Drained { aborted }
    }
}

/// Has the kernel drop every segment that begins a connection, so that none can arrive between the
/// last accept and the listener's end: the kernel would reset it, with the request that its client
/// has sent. A client whose segment is dropped repeats it after a second, and is then refused. Says
/// whether the kernel does so.
#[cfg(target_os = "linux")]
fn begin_no_handshake(listener: &std::net::TcpListener) -> bool {
    use socket2::SockFilter;
    // Classic BPF (linux/filter.h) over the TCP header, whose byte 13 has the flags: is SYN set?
    let program = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x45, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&program).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn begin_no_handshake(_listener: &std::net::TcpListener) -> bool {
    false
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
