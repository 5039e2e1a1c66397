//! One connection: HTTP/1 over a socket, as a state machine whose every wait has a deadline.
//!
//! Must not know: how connections are accepted or counted, and what the router does.
//!
//! hyper tells neither when headers begin nor when a response is complete, and its one timer for
//! headers also runs while a connection is idle. So the socket, the service and the response's body
//! move an [`Activity`] from state to state, and the connection's task derives a deadline from it
//! after each turn of hyper. The clock is read only when the state has changed, and a timer is set
//! only when a deadline is nearer than the one it is set to: a request that arrives whole and is
//! answered at once costs one look at the clock and no timer.
//!
//! No route reads a body. A request that has one is answered, and the connection ends.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicU8, AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
            fence,
        },
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use http::{
    HeaderValue, Request, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE},
};
use hyper::{
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep, timeout},
};
use tower::Service;

use super::rejections::Rejection;
use super::{Shared, host};

/// hyper's cap on what it has read of headers before it reads on, and on what it buffers of
/// responses before it makes the next. Half a request of this is answered 431, headers of more than
/// twice this and more than 100 of them, too. Buffers start at 8 KiB each way and grow as needed; a
/// client that asks without reading has both full.
const BUFFER_MAX: usize = 32 * 1024;

/// How long a connection that the server has ended still takes what its client sends: a body, a
/// request that was on its way, or the rest of what hyper refused.
const LINGER: Duration = Duration::from_secs(1);

/// The response to a request that does not name its host. It is made here because nothing behind
/// this point counts, traces or logs such a request.
const BAD_HOST: &str = r#"{"type":"about:blank","title":"Bad Request","status":400}"#;

/// What a PROXY preface begins with; hyper drops the line ends that version 2 begins with.
const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\0\r\nQUIT\n";
/// A record of TLS that begins a handshake, and its major version.
const TLS_HELLO: &[u8] = &[0x16, 3];

/// Serves one connection until it ends: by the client, by `Connection: close`, by a limit, because
/// its place is needed, or because the server drains.
pub(super) async fn run(stream: TcpStream, shared: Arc<Shared>, activity: Arc<Activity>) {
    // A response is one write and must not wait for the client's ACK of the one before. A socket
    // that refuses the option is broken and says so at its first read.
    let _ = stream.set_nodelay(true);

    let socket = Socket {
        stream,
        activity: Arc::clone(&activity),
    };
    let service = service_fn(|request: Request<Incoming>| {
        let has_body = !request.body().is_end_stream();
        let named = host::is_named(request.version(), request.uri(), request.headers());
        activity.request_begun();
        // A router is always ready.
        let response = named.then(|| {
            shared
                .router
                .clone()
                .call(request.map(|_body| Body::empty()))
        });
        let (shared, activity) = (&shared, Arc::clone(&activity));
        async move {
            let mut response = if let Some(response) = response {
                response.await?
            } else {
                (shared.events.rejected)(Rejection::Host);
                bad_host()
            };
            // The one place that decides it.
            if has_body || !named || shared.stop.is_leaving() {
                activity.closing.store(true, Relaxed);
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            Ok::<_, Infallible>(response.map(|body| Answer { body, activity }))
        }
    });
    let mut connection = http1::Builder::new()
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(TokioIo::new(socket), service);

    let mut alarm = pin!(sleep(shared.limits.idle_timeout));
    let mut clock = Clock {
        since: alarm.deadline() - shared.limits.idle_timeout,
    };
    let end = poll_fn(|cx| {
        if activity.waker.get().is_none() {
            activity.waker.get_or_init(|| cx.waker().clone());
            // Either what the server has asked for is seen below, or the server sees the waker.
            fence(SeqCst);
        }
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(End::Closed(ended.err()));
            }
            let Some(deadline) = clock.deadline(&activity, &shared) else {
                return Poll::Pending;
            };
            ready!(poll_alarm(alarm.as_mut(), deadline, cx));
            let state = activity.state();
            if state != State::Idle || activity.is_ending() {
                return Poll::Ready(End::Expired(state));
            }
            // Left to hyper's next turn, in which the socket sees whether a request has arrived.
            activity.idle_since.store(ENDING, Relaxed);
        }
    })
    .await;

    activity.idle_since.store(BUSY, Relaxed);
    match end {
        End::Closed(error) => {
            let parts = connection.into_parts();
            let refused = error.filter(hyper::Error::is_parse);
            if let Some(error) = &refused {
                (shared.events.rejected)(reason(error, &parts.read_buf));
            }
            if refused.is_some() || activity.closing.load(Relaxed) {
                activity.enter(State::Lingering);
                let _ = timeout(LINGER, discard(parts.io.into_inner().stream)).await;
            }
        }
        End::Expired(State::Writing) => {
            tracing::debug!("connection closed: the client does not read");
            // The kernel would go on offering an unread response for minutes.
            let _ = connection.into_parts().io.inner().stream.set_zero_linger();
        }
        End::Expired(state) => {
            if state == State::Headers {
                (shared.events.rejected)(Rejection::HeaderTimeout);
            }
            tracing::debug!(?state, "connection closed: no request in time");
        }
    }
}

/// How a connection came to its end.
enum End {
    /// By hyper, which has sent what there was to send.
    Closed(Option<hyper::Error>),
    /// By a limit.
    Expired(State),
}

fn bad_host() -> Response {
    let mut response = Response::new(Body::from(BAD_HOST));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let headers = response.headers_mut();
    let problem = HeaderValue::from_static("application/problem+json");
    headers.insert(CONTENT_TYPE, problem);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Why hyper refused what it had read.
fn reason(error: &hyper::Error, read: &[u8]) -> Rejection {
    if error.is_parse_too_large() {
        Rejection::HeadersTooLarge
    } else if read.starts_with(TLS_HELLO) || read == &TLS_HELLO[..1] {
        Rejection::Tls
    } else if read.starts_with(PROXY_V1)
        || (!read.is_empty() && (read.starts_with(PROXY_V2) || PROXY_V2.starts_with(read)))
    {
        Rejection::ProxyProtocol
    } else {
        Rejection::Malformed
    }
}

/// Takes what still comes in after the last response, until the client has closed too. To close a
/// socket that has unread bytes makes the kernel send a reset, which can destroy the response before
/// the client reads it (RFC 9112, section 9.6).
async fn discard(mut stream: TcpStream) {
    // hyper has done so after a response, and not where it had none, as for HTTP/2.
    let _ = poll_fn(|cx| Pin::new(&mut stream).poll_shutdown(cx)).await;
    let take = || stream.try_read(&mut [0; 4096]);
    while stream.readable().await.is_ok() {
        match take() {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Since when a connection is in its state.
struct Clock {
    since: Instant,
}

impl Clock {
    /// When the present state ends by itself; `None` while the handler works, whose time is its own
    /// to bound.
    fn deadline(&mut self, activity: &Activity, shared: &Shared) -> Option<Instant> {
        let state = activity.state();
        if activity.moved.swap(false, Relaxed) && state != State::Handling {
            self.since = Instant::now();
            if state == State::Idle {
                activity.park(shared.moment(self.since));
            }
        }
        let limits = &shared.limits;
        let limit = match state {
            State::Handling => return None,
            State::Idle => limits.idle_timeout,
            State::Headers => limits.header_timeout,
            State::Writing => limits.stall_timeout,
            State::Lingering => LINGER,
        };
        let deadline = self.since.checked_add(limit);
        match shared.last_call.get() {
            Some(&last_call) if state == State::Idle => {
                Some(deadline.map_or(last_call, |deadline| deadline.min(last_call)))
            }
            _ => deadline,
        }
    }
}

/// Ready once `deadline` has passed.
fn poll_alarm(mut alarm: Pin<&mut Sleep>, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
    loop {
        if alarm.is_elapsed() || deadline < alarm.deadline() {
            alarm.as_mut().reset(deadline);
        }
        ready!(alarm.as_mut().poll(cx));
        if alarm.deadline() >= deadline {
            return Poll::Ready(());
        }
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// The client, to begin a request. Entered by accept, and with a response that is in the
    /// kernel's hands.
    Idle,
    /// The client, to end the headers it has begun. Entered with a byte.
    Headers,
    /// The handler. Entered when hyper calls the service.
    Handling,
    /// The client, to take a response. Entered when a write would block, and again with each byte.
    Writing,
    /// The client, to close: the server has.
    Lingering,
}

/// [`Activity::idle_since`] of a connection that is not idle, and of one that closes for that.
const BUSY: u64 = 0;
const ENDING: u64 = u64::MAX;

/// What is seen of a connection. What writes here runs in the connection's task, except the server
/// that evicts or wakes it and has a fence for that, so nothing needs more than relaxed order.
pub(super) struct Activity {
    /// A [`State`].
    state: AtomicU8,
    /// The state was entered since the clock last looked.
    moved: AtomicBool,
    /// hyper holds the whole response, or none is due.
    responded: AtomicBool,
    /// A response has told the client that it is the last, for a reason that the client did not know.
    closing: AtomicBool,
    /// The last four bytes that were read.
    tail: AtomicU32,
    /// Since when it is idle, by [`Shared::moment`]; or [`BUSY`], or [`ENDING`].
    idle_since: AtomicU64,
    /// Wakes the connection's task, whose waker is always the same.
    waker: OnceLock<Waker>,
}

impl Activity {
    /// Of a connection that was accepted at this moment.
    pub(super) fn new(accepted: u64) -> Self {
        Self {
            state: AtomicU8::new(State::Idle as u8),
            moved: AtomicBool::new(false),
            responded: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            tail: AtomicU32::new(0),
            idle_since: AtomicU64::new(accepted),
            waker: OnceLock::new(),
        }
    }

    pub(super) fn state(&self) -> State {
        match self.state.load(Relaxed) {
            0 => State::Idle,
            1 => State::Headers,
            2 => State::Handling,
            3 => State::Writing,
            _ => State::Lingering,
        }
    }

    /// Since when it is idle, if it is and stays open.
    pub(super) fn idle_since(&self) -> Option<u64> {
        let since = self.idle_since.load(Relaxed);
        (since != BUSY && since != ENDING).then_some(since)
    }

    /// Closes it if it has been idle since this moment. A request that arrives meanwhile is served.
    pub(super) fn evict(&self, since: u64) -> bool {
        let evicted = self
            .idle_since
            .compare_exchange(since, ENDING, Relaxed, Relaxed)
            .is_ok();
        if evicted {
            self.wake();
        }
        evicted
    }

    /// Makes it look at what has changed around it.
    pub(super) fn wake(&self) {
        fence(SeqCst);
        // One that has not run yet looks anyway.
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    fn enter(&self, state: State) {
        self.state.store(state as u8, Relaxed);
        self.moved.store(true, Relaxed);
    }

    /// From here on its place can be needed for another connection.
    fn park(&self, now: u64) {
        self.idle_since.store(now, Relaxed);
    }

    fn is_ending(&self) -> bool {
        self.state() == State::Idle && self.idle_since.load(Relaxed) == ENDING
    }

    fn bytes_read(&self, bytes: &[u8]) {
        let last = &bytes[bytes.len().saturating_sub(4)..];
        let tail = last.iter().fold(self.tail.load(Relaxed), |tail, &byte| {
            tail << 8 | u32::from(byte)
        });
        self.tail.store(tail, Relaxed);
        if self.state() == State::Idle {
            self.headers_begun();
        }
    }

    fn headers_begun(&self) {
        self.idle_since.store(BUSY, Relaxed);
        self.enter(State::Headers);
    }

    fn request_begun(&self) {
        self.idle_since.store(BUSY, Relaxed);
        self.responded.store(false, Relaxed);
        self.enter(State::Handling);
    }

    /// hyper has all of the response, though the kernel need not.
    fn response_complete(&self) {
        self.responded.store(true, Relaxed);
        if self.state() != State::Writing {
            self.enter(self.after_response());
        }
    }

    fn write_blocked(&self) {
        // Only a byte that is written gives the client more time.
        if self.state() != State::Writing {
            self.enter(State::Writing);
        }
    }

    fn bytes_written(&self) {
        if self.state() == State::Writing {
            self.enter(if self.responded.load(Relaxed) {
                self.after_response()
            } else {
                State::Handling
            });
        }
    }

    /// What was read behind the last request is the beginning of the next, unless it ends as headers
    /// do: hyper then has all of it.
    fn after_response(&self) -> State {
        let [_, bytes @ ..] = self.tail.load(Relaxed).to_be_bytes();
        if bytes == *b"\n\r\n" || bytes[1..] == *b"\n\n" {
            State::Idle
        } else {
            State::Headers
        }
    }
}

/// The client's socket, noting what moves.
struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let bytes = &buffer.filled()[before..];
        if !bytes.is_empty() {
            self.activity.bytes_read(bytes);
        } else if read.is_pending() && self.activity.is_ending() {
            // The kernel can have bytes of which tokio's poller does not know yet. They are part of
            // a request, which is served; without any, hyper is told that the client has ended, and
            // closes.
            if rustix::io::ioctl_fionread(&self.stream).is_ok_and(|unread| unread > 0) {
                self.activity.headers_begun();
            } else {
                return Poll::Ready(Ok(()));
            }
        }
        read
    }
}

/// Without vectored writes: responses are short, and hyper then copies one behind its headers, which
/// costs less than a list of both.
impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        match written {
            Poll::Pending => self.activity.write_blocked(),
            Poll::Ready(Ok(_)) => self.activity.bytes_written(),
            Poll::Ready(Err(_)) => {}
        }
        written
    }

    /// hyper calls this in each turn in which it has nothing to write. While a handler works it does
    /// not read, since a client that has shut down its sending side still waits; so a reset is
    /// looked for here, and ends the handler.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.activity.state() == State::Handling
            && self.stream.poll_read_ready(cx).is_ready()
            && let Some(error) = self.stream.take_error()?
        {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A response's body, noting when hyper has taken all of it.
struct Answer {
    body: Body,
    activity: Arc<Activity>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.activity.response_complete();
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::lifecycle::{Lifecycle, Phase};
    use crate::server::{Events, Limits, Stop};

    /// What they took while a connection had nine flags and subscribed to the stop by itself.
    const TASK_AND_ACTIVITY: usize = 1640;

    #[tokio::test]
    async fn connection_takes_no_more_memory_than_it_did() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let second = Duration::from_secs(1);
        let shared = Shared {
            router: axum::Router::new(),
            limits: Limits {
                max_connections: 1,
                header_timeout: second,
                idle_timeout: second,
                stall_timeout: second,
            },
            events: Events {
                connections: Box::new(|_open| {}),
                rejected: Box::new(|_reason| {}),
            },
            stop: Stop {
                lifecycle: Lifecycle::default(),
                leave_at: Phase::Leaving,
                drain_at: Phase::Draining,
                drain: second,
            },
            began: Instant::now(),
            last_call: OnceLock::new(),
        };
        let task = run(
            stream.unwrap(),
            Arc::new(shared),
            Arc::new(Activity::new(1)),
        );
        let size = size_of_val(&task) + size_of::<Activity>();
        assert!(size <= TASK_AND_ACTIVITY, "{size}");
    }
}
