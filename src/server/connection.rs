//! One connection: HTTP/1 over a socket, with a deadline for every wait.
//!
//! Must not know: how connections are accepted or counted, and what the router does.
//!
//! hyper does not report when headers start or when a response is complete, and its one timer for
//! headers also runs while a connection is idle. So the socket, the service and the response's body
//! move an [`Activity`] from state to state, and the connection's task derives a deadline from it
//! after each turn of hyper. The clock is read only when the state has changed, and a timer is set
//! only when a deadline is earlier than the one it is set to: a request that arrives whole and gets
//! its response at once costs one look at the clock and no timer.
//!
//! No route reads a body. A request that has one gets a response, and the connection ends.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http::header::CONNECTION;
use http::{HeaderValue, Request};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tower::Service;

use super::activity::{Activity, State};
use super::host;
use super::rejections::{self, Rejection};
use super::shared::{Endless, Shared};

/// The maximum size of hyper's buffer for headers, and of its buffer for responses. Incomplete
/// headers of this size get a 431, and so do headers of more than twice this size and more than 100
/// headers. Buffers start at 8 KiB each way and grow as needed; a client that sends requests and
/// does not read fills both.
const BUFFER_MAX: usize = 32 * 1024;

/// How long the server still reads from a connection after it has closed its own side: the client
/// can be sending a body, a further request, or the rest of a request that hyper rejected.
const LINGER: Duration = Duration::from_secs(1);

/// Serves one connection until the client ends it, a response says `Connection: close`, a limit is
/// reached, it is evicted, or the server drains.
pub(super) async fn run(stream: TcpStream, shared: Arc<Shared>, activity: Arc<Activity>) {
    // A response is one write and must not wait for the client's ACK of the previous one. A socket
    // that refuses the option is broken, and its first read fails.
    let _ = stream.set_nodelay(true);

    let socket = Socket {
        stream,
        activity: Arc::clone(&activity),
    };
    let service = service_fn(|request: Request<Incoming>| {
        let has_body = !request.body().is_end_stream();
        let named = host::names_one_host(request.version(), request.uri(), request.headers());
        activity.start_request();
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
                host::bad_request()
            };
            // This is the only place that decides about `Connection: close`.
            if has_body || !named || shared.is_leaving() {
                activity.announce_close();
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
            }
            if response.extensions().get::<Endless>().is_some() {
                activity.start_endless();
            }
            Ok::<_, Infallible>(response.map(|body| ResponseBody { body, activity }))
        }
    });
    let mut connection = http1::Builder::new()
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(TokioIo::new(socket), service);

    let mut alarm = pin!(sleep(shared.limits.idle_timeout));
    let mut since = alarm.deadline() - shared.limits.idle_timeout;
    let end = poll_fn(|cx| {
        activity.set_waker(cx.waker());
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(End::Closed(ended.err()));
            }
            let Some(deadline) = activity.deadline(&mut since, &shared) else {
                return Poll::Pending;
            };
            ready!(poll_alarm(alarm.as_mut(), deadline, cx));
            let state = activity.state();
            if state != State::Idle || activity.is_ending() {
                return Poll::Ready(End::Expired(state));
            }
            // In hyper's next turn the socket checks whether a request has arrived.
            activity.expire();
        }
    })
    .await;

    activity.mark_busy();
    match end {
        End::Closed(error) => {
            let parts = connection.into_parts();
            let refused = error.filter(hyper::Error::is_parse);
            if let Some(error) = &refused {
                (shared.events.rejected)(rejections::reason(error, &parts.read_buf));
            }
            if refused.is_some() || activity.is_closing() {
                activity.enter(State::Lingering);
                let _ = timeout(LINGER, discard(parts.io.into_inner().stream)).await;
            }
        }
        End::Expired(State::Writing) => {
            tracing::debug!("connection closed: the client does not read");
            // Otherwise the kernel would retry to send the unread response for minutes.
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

/// How a connection ended.
enum End {
    /// By hyper, which has sent everything.
    Closed(Option<hyper::Error>),
    /// By a limit.
    Expired(State),
}

/// Reads and drops all bytes after the last response, until the client has closed too. If a socket
/// with unread bytes is closed, the kernel sends a reset, which can destroy the response before the
/// client reads it (RFC 9112, section 9.6).
async fn discard(mut stream: TcpStream) {
    // hyper shuts down its side only after a response, and an HTTP/2 preface gets none.
    let _ = poll_fn(|cx| Pin::new(&mut stream).poll_shutdown(cx)).await;
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut [0; 4096]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
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

/// The client's socket. Notes each byte that is read or written.
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
            self.activity.note_read(bytes);
        } else if read.is_pending() && self.activity.is_ending() {
            // The kernel can have bytes that tokio's poller has not seen yet. They belong to a
            // request, which is served. If there are none, hyper gets an end of file, and closes.
            if rustix::io::ioctl_fionread(&self.stream).is_ok_and(|unread| unread > 0) {
                self.activity.start_headers();
            } else {
                return Poll::Ready(Ok(()));
            }
        }
        read
    }
}

/// Without vectored writes: hyper then copies a response's body behind its headers, which costs
/// less than a list of both for short responses.
impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        match written {
            Poll::Pending => self.activity.note_blocked_write(),
            Poll::Ready(Ok(_)) => self.activity.note_write(),
            Poll::Ready(Err(_)) => {}
        }
        written
    }

    /// hyper calls this in each turn in which it has nothing to write. It does not read while a
    /// handler works, since a client that has shut down its sending side still waits for a
    /// response. So this checks for a reset, which ends the handler.
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

/// A response's body. Notes when hyper has taken all of it.
struct ResponseBody {
    body: Body,
    activity: Arc<Activity>,
}

impl HttpBody for ResponseBody {
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

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.activity.complete_response();
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::lifecycle::{Lifecycle, Phase};
    use crate::server::{Events, Limits, Stop};

    /// The size in an earlier design, in which a connection had nine flags and its own subscription
    /// to the stop.
    const TASK_AND_ACTIVITY: usize = 1640;

    #[tokio::test]
    async fn connection_takes_no_more_memory_than_it_did() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let second = Duration::from_secs(1);
        let limits = Limits {
            max_connections: 1,
            header_timeout: second,
            idle_timeout: second,
            stall_timeout: second,
        };
        let events = Events {
            connections: Box::new(|_open| {}),
            rejected: Box::new(|_reason| {}),
        };
        let stop = Stop {
            lifecycle: Lifecycle::default(),
            leave_at: Phase::Leaving,
            drain_at: Phase::Draining,
            drain: second,
        };
        let shared = Arc::new(Shared::new(axum::Router::new(), limits, events, stop));
        let task = run(stream.unwrap(), shared, Arc::new(Activity::new(1)));
        let size = size_of_val(&task) + size_of::<Activity>();
        assert!(size <= TASK_AND_ACTIVITY, "{size}");
    }
}
