//! One connection: HTTP/1 over a socket, whose every wait has a deadline.
//!
//! Must not know: how connections are accepted or counted, and what the router does.
//!
//! hyper tells neither when a head begins nor when an answer is complete, and its one timer for
//! heads also runs while a connection is idle. So the socket, the service and both bodies note what
//! they see in an [`Activity`], and the connection's task derives from it, after each turn of hyper,
//! what is being waited for and since when. The clock is read only when that changes, and a timer is
//! set only when a deadline is nearer than the one it is set to: a request that arrives whole and is
//! answered at once costs one look at the clock and no timer.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
};
use http::{HeaderValue, Request, header::CONNECTION};
use hyper::{
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
    time::{Instant, Sleep, sleep, timeout},
};
use tower::Service;

use super::Limits;

/// hyper's cap on what it has read of a head before it reads on, and on what it buffers of answers
/// before it makes the next. Half a head of this is answered 431, a head of more than twice this and
/// one of more than 100 fields, too. Buffers start at 8 KiB each way and grow as needed; a client
/// that asks without reading has both full.
const BUFFER_MAX: usize = 32 * 1024;

/// How long a client may go on sending what nobody reads after its answer: a body that the handler
/// ignored, or a head that hyper refused.
const LINGER: Duration = Duration::from_secs(1);

/// Serves one connection until it ends: by the client, by `Connection: close`, by a limit, or, once
/// `stopping` holds `true`, `last_call` later if no request has begun by then.
pub(super) async fn run(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    mut stopping: watch::Receiver<bool>,
    last_call: Duration,
) {
    // An answer is one write and must not wait for the client's ACK of the one before. A socket
    // that refuses the option is broken and says so at its first read.
    let _ = stream.set_nodelay(true);

    let activity = Arc::new(Activity::default());
    let socket = Socket {
        stream,
        activity: Arc::clone(&activity),
    };
    let service = service_fn(|request: Request<Incoming>| {
        let request = request.map(|body| {
            if activity.request_begun(&body) {
                Body::new(Upload {
                    body,
                    activity: Arc::clone(&activity),
                })
            } else {
                Body::empty()
            }
        });
        // A router is always ready.
        let answer = router.clone().call(request);
        let activity = Arc::clone(&activity);
        async move {
            let mut answer = answer.await?;
            if activity.stopping.load(Relaxed) {
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(CONNECTION, close);
            }
            Ok::<_, Infallible>(answer.map(|body| Answer { body, activity }))
        }
    });
    let mut connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(TokioIo::new(socket), service);

    let mut alarm = pin!(sleep(limits.header_timeout));
    let mut clock = Clock::new(limits);
    let mut stop = pin!(stopping.wait_for(|stopping| *stopping));
    let end = poll_fn(|cx| {
        // Before hyper's turn, so that an answer made in this turn says `Connection: close`.
        if clock.last_call.is_none() && stop.as_mut().poll(cx).is_ready() {
            activity.stopping.store(true, Relaxed);
            clock.last_call = Some(Instant::now() + last_call);
        }
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            let refused = ended.is_err_and(|error| error.is_parse());
            let unread = refused || activity.unread.load(Relaxed);
            return Poll::Ready(End::Closed { unread });
        }
        let Some(deadline) = clock.deadline(&activity) else {
            return Poll::Pending;
        };
        ready!(poll_alarm(alarm.as_mut(), deadline, cx));
        Poll::Ready(End::Expired(clock.wait))
    })
    .await;

    match end {
        End::Closed { unread: false } => {}
        End::Closed { unread: true } => {
            let Socket { stream, .. } = connection.into_parts().io.into_inner();
            let _ = timeout(LINGER, discard(stream)).await;
        }
        End::Expired(Wait::Transfer) => {
            tracing::debug!("connection closed: the client neither reads nor sends");
            // The kernel would go on offering an unread answer for minutes.
            let _ = connection.into_parts().io.inner().stream.set_zero_linger();
        }
        End::Expired(wait) => tracing::debug!(?wait, "connection closed: no request in time"),
    }
}

/// How a connection came to its end.
enum End {
    /// By hyper, which has sent what there was to send; `unread` when more may come in.
    Closed { unread: bool },
    /// By a limit.
    Expired(Wait),
}

/// Takes what still comes in after the last answer, until the client has closed too. To close a
/// socket that has unread bytes makes the kernel send a reset, which may destroy the answer before
/// the client reads it (RFC 9112, section 9.6).
async fn discard(mut stream: TcpStream) {
    // hyper has done so after an answer, and not where it had none, as for HTTP/2.
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

/// What a connection waits for, and since when.
struct Clock {
    limits: Limits,
    wait: Wait,
    since: Instant,
    /// When to close a connection that has no request, once the server is stopping.
    last_call: Option<Instant>,
}

impl Clock {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            wait: Wait::Request(0),
            since: Instant::now(),
            last_call: None,
        }
    }

    /// When the present wait ends; `None` while the handler works, whose time is its own to bound.
    fn deadline(&mut self, activity: &Activity) -> Option<Instant> {
        let moved = activity.moved.swap(false, Relaxed);
        let wait = activity.wait();
        let goes_on = wait == self.wait && !(moved && wait == Wait::Transfer);
        // The first head counts from accept, however late its first byte.
        let first_head = wait == Wait::Head(0);
        self.wait = wait;
        if !goes_on && !first_head && wait != Wait::Handler {
            self.since = Instant::now();
        }
        let limit = match wait {
            Wait::Handler => return None,
            Wait::Transfer => self.limits.stall_timeout,
            Wait::Head(_) | Wait::Request(0) => self.limits.header_timeout,
            Wait::Request(_) => self.limits.idle_timeout,
        };
        let deadline = self.since.checked_add(limit);
        match (wait, self.last_call) {
            (Wait::Request(_), Some(last_call)) => {
                Some(deadline.map_or(last_call, |deadline| deadline.min(last_call)))
            }
            _ => deadline,
        }
    }
}

/// What happens next must come from here. The number is that of the requests before, which tells
/// one wait from the next of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// The client, to begin a request.
    Request(u32),
    /// The client, to end the head it has begun.
    Head(u32),
    /// The client, to take the answer or to send the body.
    Transfer,
    Handler,
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

/// What has been seen on a connection. Everything that writes here runs in the connection's task,
/// save a body that a handler has given away, so nothing needs more than relaxed order.
#[derive(Default)]
struct Activity {
    /// Requests handed to the router so far.
    requests: AtomicU32,
    /// Bytes of a head have been read that is not complete.
    heard: AtomicBool,
    /// The request came with a body.
    with_body: AtomicBool,
    /// That body is in the handler's hands.
    uploading: AtomicBool,
    /// It has not been read to its end.
    unread: AtomicBool,
    /// It was asked for and has not arrived.
    starved: AtomicBool,
    /// The answer is not all in hyper's hands.
    answering: AtomicBool,
    /// The client's window is full.
    blocked: AtomicBool,
    /// What is waited for in a transfer has moved on since the clock last looked.
    moved: AtomicBool,
    stopping: AtomicBool,
}

impl Activity {
    /// Says whether the request has a body to come.
    fn request_begun(&self, body: &Incoming) -> bool {
        let with_body = !body.is_end_stream();
        self.requests
            .store(self.requests.load(Relaxed).wrapping_add(1), Relaxed);
        self.heard.store(false, Relaxed);
        self.with_body.store(with_body, Relaxed);
        self.uploading.store(with_body, Relaxed);
        self.unread.store(with_body, Relaxed);
        self.answering.store(true, Relaxed);
        with_body
    }

    fn bytes_read(&self) {
        let of_a_body = self.with_body.load(Relaxed)
            && (self.answering.load(Relaxed) || self.uploading.load(Relaxed));
        if !of_a_body {
            self.heard.store(true, Relaxed);
        } else if !self.blocked.load(Relaxed) {
            // A client that does not read cannot buy time by sending.
            self.moved.store(true, Relaxed);
        }
    }

    fn bytes_written(&self) {
        self.moved.store(true, Relaxed);
        self.blocked.store(false, Relaxed);
    }

    fn wait(&self) -> Wait {
        let answering = self.answering.load(Relaxed);
        if self.blocked.load(Relaxed)
            || self.starved.load(Relaxed)
            || (self.uploading.load(Relaxed) && !answering)
        {
            Wait::Transfer
        } else if answering {
            Wait::Handler
        } else if self.heard.load(Relaxed) {
            Wait::Head(self.requests.load(Relaxed))
        } else {
            Wait::Request(self.requests.load(Relaxed))
        }
    }
}

/// The client's socket, noting what moves.
struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl Socket {
    fn note_write(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Pending => self.activity.blocked.store(true, Relaxed),
            Poll::Ready(Ok(_)) => self.activity.bytes_written(),
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.activity.bytes_read();
        }
        read
    }
}

/// Without vectored writes: answers are short, and hyper then copies one behind its head, which
/// costs less than a list of both.
impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_write(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A request's body, noting whether the handler waits for it.
struct Upload {
    body: Incoming,
    activity: Arc<Activity>,
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.activity.starved.store(frame.is_pending(), Relaxed);
        if matches!(frame, Poll::Ready(None)) {
            self.activity.unread.store(false, Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.activity.unread.store(false, Relaxed);
        }
        self.activity.starved.store(false, Relaxed);
        self.activity.uploading.store(false, Relaxed);
    }
}

/// An answer's body, noting when hyper has taken all of it.
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
        self.activity.answering.store(false, Relaxed);
    }
}
