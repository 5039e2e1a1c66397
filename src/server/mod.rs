//! Serves a router over HTTP/1. Limits how many connections are open, how long each can stay
//! silent, and how long a stop can take.
//!
//! It gets a router, limits and the phases of a stop; it reports how many connections are open and
//! which requests never reached the router. Must not know: routes, stores or settings.

mod activity;
mod capacity;
mod connection;
mod host;
mod listener;
mod rejections;
mod shared;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use self::activity::{Activity, State};
pub use self::capacity::Capacity;
pub use self::listener::bind;
use self::listener::{Warnings, block_handshakes, concerns_one_client};
pub use self::rejections::{Rejection, Rejections};
use self::shared::Shared;
pub use self::shared::{Endless, Events, Limits, Stop};

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct DrainReport {
    /// Connections that were cut at the deadline with a request or a response incomplete.
    pub aborted: usize,
}

/// How long a draining server waits for one more request on an idle connection. Closing at once
/// would drop a request in flight on the network (RFC 9112, section 9.5, leaves that risk to the
/// client).
const LAST_CALL: Duration = Duration::from_secs(1);

/// How long a draining server waits for handshakes in progress, once no new one can start.
const HANDSHAKE: Duration = Duration::from_millis(1);

/// How often a full server looks for an idle connection.
const EVICT_PAUSE: Duration = Duration::from_millis(50);

/// How many of the longest idle connections one scan of all connections collects.
const EVICT_BATCH: usize = 64;

/// How long accepting pauses after an error that would repeat at once, such as no free file
/// descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on `listener` until the phase `stop.drain_at`, and then drains for at most
/// `stop.drain`. HTTP/1.0 and 1.1 only: `auto` of hyper-util has no timer while it reads the
/// version.
///
/// A draining server still accepts connections from the kernel's backlog, and then closes the
/// listener. Every request whose headers are read gets a response, with `Connection: close`. A
/// connection without a request closes after a second (half of `stop.drain` if that is less), and
/// one with incomplete headers at its `header_timeout`. A connection that is still open after
/// `stop.drain` is cut when its task next runs.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    events: Events,
    stop: Stop,
) -> DrainReport {
    // Gives routes their state once, instead of at every request.
    let router = router.with_state(());
    let shared = Arc::new(Shared::new(router, limits, events, stop));
    let mut connections = Connections {
        shared: Arc::clone(&shared),
        tasks: JoinSet::new(),
        open: HashMap::new(),
        idle_longest: Vec::new(),
    };
    let waiting = accept_until_draining(&listener, &mut connections).await;

    let drain = shared.stop.drain;
    let mut deadline = pin!(sleep(drain));
    // Open connections first: each one that closes makes room for one from the backlog.
    connections.last_call(LAST_CALL.min(drain / 2));
    tokio::select! {
        () = connections.accept_backlog(listener, waiting) => {}
        () = &mut deadline => {}
    }
    tokio::select! {
        () = connections.wait_for_all() => {}
        () = &mut deadline => {}
    }
    connections.abort()
}

/// Accepts until the server drains, and returns a connection that was accepted and waits for room.
/// Errors do not end this: the listener can recover, and a service that has exited cannot.
async fn accept_until_draining(
    listener: &TcpListener,
    connections: &mut Connections,
) -> Option<TcpStream> {
    let shared = Arc::clone(&connections.shared);
    let mut draining = pin!(shared.stop.lifecycle.wait_for(shared.stop.drain_at));
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
        tokio::select! {
            biased;
            () = &mut draining => return waiting,
            // A connection that closes ends a pause, since it frees its descriptor.
            true = connections.wait_for_close() => pause = Duration::ZERO,
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
            () = async { sleep(EVICT_PAUSE).await }, if waiting.is_some() => {
                connections.evict_idle_longest();
            }
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
    /// The connections that were idle at the last scan, and since when; the longest idle one last.
    idle_longest: Vec<(u64, Arc<Activity>)>,
}

impl Connections {
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

    /// Closes the connection that has been idle longest, if one is idle. It closes when its task next
    /// runs, unless a request has arrived on it by then.
    fn evict_idle_longest(&mut self) {
        for _ in 0..2 {
            // Some can have been used since the last scan. All others have been idle for less.
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

    /// Closes every connection that is idle after `pause`.
    fn last_call(&self, pause: Duration) {
        self.shared.last_call.get_or_init(|| Instant::now() + pause);
        for activity in self.open.values() {
            activity.wake();
        }
    }

    /// Waits until a connection closes. Returns false if none is open. Safe to cancel.
    async fn wait_for_close(&mut self) -> bool {
        let Some(ended) = self.tasks.join_next_with_id().await else {
            return false;
        };
        self.remove(ended);
        true
    }

    async fn wait_for_all(&mut self) {
        while self.wait_for_close().await {}
    }

    fn remove(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(error) => {
                // A panic has been logged where it happened.
                if !error.is_panic() {
                    tracing::error!(error = %error, "a connection's task failed");
                }
                error.id()
            }
        };
        self.open.remove(&id);
        self.report();
    }

    fn report(&self) {
        (self.shared.events.connections)(self.tasks.len());
    }

    /// Accepts the connections in the kernel's backlog, then closes the listener.
    async fn accept_backlog(&mut self, listener: TcpListener, waiting: Option<TcpStream>) {
        if let Some(stream) = waiting {
            self.open_when_there_is_room(stream).await;
        }
        // Not through tokio, which reports a connection only once its poller has seen it.
        let Ok(listener) = listener.into_std() else {
            return;
        };
        // Before the filter, so that clients can still connect while this waits for room.
        self.accept_ready(&listener).await;
        let filtered = block_handshakes(&listener);
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
                // The backlog is empty, or no file descriptor is left.
                Err(_) => return,
            }
        }
    }

    async fn open_when_there_is_room(&mut self, stream: TcpStream) {
        while !self.have_room() {
            self.evict_idle_longest();
            let _ = timeout(EVICT_PAUSE, self.wait_for_close()).await;
        }
        self.open(stream);
    }

    fn abort(mut self) -> DrainReport {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            self.remove(ended);
        }
        let incomplete =
            |activity: &&Arc<Activity>| !matches!(activity.state(), State::Idle | State::Lingering);
        let aborted = self.open.values().filter(incomplete).count();
        self.tasks.abort_all();
        (self.shared.events.connections)(0);
        DrainReport { aborted }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::body::{Body, Bytes};
    use axum::response::Response;
    use futures_util::stream;
    use tokio::io::AsyncWriteExt as _;
    use tokio::sync::Notify;

    use super::*;
    use crate::lifecycle::{Lifecycle, Phase};

    /// Serves endless responses that are always ready, and drains at once. Returns how long the drain
    /// took while a client read nothing.
    async fn drain_with_a_stalled_reader(endless: bool) -> Duration {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let started = Arc::new(Notify::new());
        let asked = Arc::clone(&started);
        let respond = async move || {
            asked.notify_one();
            let chunks = stream::repeat(Ok::<_, Infallible>(Bytes::from(vec![b'x'; 65_536])));
            let mut response = Response::new(Body::from_stream(chunks));
            if endless {
                response.extensions_mut().insert(Endless);
            }
            response
        };
        let minute = Duration::from_mins(1);
        let limits = Limits {
            max_connections: 1,
            header_timeout: minute,
            idle_timeout: minute,
            stall_timeout: minute,
        };
        let events = Events {
            connections: Box::new(|_open| {}),
            rejected: Box::new(|_reason| {}),
        };
        let lifecycle = Lifecycle::default();
        let stop = Stop {
            lifecycle: lifecycle.clone(),
            leave_at: Phase::Leaving,
            drain_at: Phase::Draining,
            drain: Duration::from_secs(4),
        };
        let router = Router::new().route("/", axum::routing::get(respond));
        let serving = tokio::spawn(serve(listener, router, limits, events, stop));
        let mut client = TcpStream::connect(address).await.unwrap();
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        started.notified().await;
        let began = Instant::now();
        lifecycle.enter(Phase::Draining);
        let _report = serving.await.unwrap();
        drop(client);
        began.elapsed()
    }

    #[tokio::test]
    async fn reader_of_an_endless_response_that_stalls_does_not_hold_the_drain() {
        assert!(drain_with_a_stalled_reader(true).await < Duration::from_secs(4));
        assert!(drain_with_a_stalled_reader(false).await >= Duration::from_secs(4));
    }
}
