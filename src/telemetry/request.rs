//! What is seen of a request: its span, its metrics, its ids and its line in the access log.
//!
//! It sees method, matched route, status and time. It never looks at a body, a query string or
//! the client's address.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{self, Poll, ready};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use http::{HeaderName, HeaderValue, Method, StatusCode, Version};
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, TraceContextExt as _, TraceId};
use opentelemetry_sdk::trace::{IdGenerator as _, RandomIdGenerator};
use pin_project_lite::pin_project;
use tower::{Layer, Service, layer::layer_fn};
use tracing::instrument::{Instrument as _, Instrumented};
use tracing::{Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use uuid::Uuid;

use super::panic::{InRequest, RequestIds};
use super::request_metrics::{self, Kind};
use super::sampler::Sampler;
use super::trace;
use crate::metrics::limit::OTHER;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_RESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// What every request is observed with.
#[derive(Debug)]
pub struct Observer {
    sampler: Sampler,
    slow: Duration,
    access: AccessCap,
}

impl Observer {
    /// Requests slower than `slow` are logged at level info.
    #[must_use]
    pub fn new(sampler: Sampler, slow: Duration) -> Arc<Self> {
        request_metrics::declare();
        Arc::new(Self {
            sampler,
            slow,
            access: AccessCap::default(),
        })
    }

    /// The layer that observes with it.
    pub fn layer<S>(self: Arc<Self>) -> impl Layer<S, Service = Observe<S>> + Clone {
        layer_fn(move |inner| Observe {
            observer: Arc::clone(&self),
            inner,
        })
    }

    /// Tells of lines that were left out and have had none after them to say so.
    pub fn tell_left_out(&self) {
        let left_out = self.access.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            tracing::event!(
                target: "access",
                tracing::Level::INFO,
                lines.left_out = left_out,
                "requests without a line"
            );
        }
    }
}

/// Observes every request: the outermost layer. It adds no allocation to a request's way, which is
/// why it is not a function of axum's `from_fn`.
#[derive(Debug, Clone)]
pub struct Observe<S> {
    observer: Arc<Observer>,
    inner: S,
}

impl<S> Service<Request> for Observe<S>
where
    S: Service<Request, Response = Response>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Observed<S::Future>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let seen = Seen::begin(&self.observer, &request);
        let _in_request = InRequest::enter(seen.ids());
        let span = seen.span.clone();
        Observed {
            answer: self.inner.call(request).instrument(span),
            seen,
        }
    }
}

pin_project! {
    /// The answer to a request that is observed.
    #[derive(Debug)]
    pub struct Observed<F> {
        #[pin]
        answer: Instrumented<F>,
        seen: Seen,
    }
}

impl<F, E> Future for Observed<F>
where
    F: Future<Output = Result<Response, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let in_request = InRequest::enter(this.seen.ids());
        let mut response = ready!(this.answer.poll(cx))?;
        drop(in_request);
        this.seen.answer(&mut response);
        Poll::Ready(Ok(response))
    }
}

/// A request under way. Dropped before its answer, its client has left.
#[derive(Debug)]
struct Seen {
    observer: Arc<Observer>,
    method: &'static str,
    route: Option<MatchedPath>,
    version: &'static str,
    id: HeaderValue,
    trace: Option<TraceId>,
    context: Option<SpanContext>,
    span: Span,
    started: Instant,
    over: bool,
}

impl Seen {
    fn begin(observer: &Arc<Observer>, request: &Request) -> Self {
        let started = Instant::now();
        let method = known_method(request.method());
        let route = request.extensions().get::<MatchedPath>().cloned();
        let id = request_id(request);
        let decision = if is_probe_or_scrape(route.as_ref()) {
            observer.sampler.decline(request.headers())
        } else {
            observer.sampler.decide(request.headers())
        };
        let parent = decision.parent.as_ref();
        let span = if decision.sampled {
            request_span(request, method, route.as_ref(), &id, parent)
        } else {
            Span::none()
        };
        let context = if span.is_none() {
            None
        } else {
            Some(decision.start(&span))
        };
        request_metrics::active(method, 1.0);
        Self {
            observer: Arc::clone(observer),
            method,
            route,
            version: version(request.version()),
            id,
            trace: context.as_ref().or(parent).map(SpanContext::trace_id),
            context,
            span,
            started,
            over: false,
        }
    }

    fn ids(&self) -> RequestIds {
        RequestIds {
            request: self.id.clone(),
            trace: self.trace,
            span: self.context.as_ref().map(SpanContext::span_id),
        }
    }

    fn answer(&mut self, response: &mut Response) {
        self.over = true;
        let status = response.status();
        if let Some(context) = &self.context {
            let value = format!("00-{}-{}-01", context.trace_id(), context.span_id());
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().insert(TRACE_RESPONSE, value);
            }
            self.span
                .record("http.response.status_code", i64::from(status.as_u16()));
            if status.is_server_error() {
                self.span.record("otel.status_code", "ERROR");
                self.span.record("error.type", status.as_str());
            }
        }
        self.end(Some(status));
        response.headers_mut().insert(REQUEST_ID, self.id.clone());
    }

    fn end(&self, status: Option<StatusCode>) {
        let took = self.started.elapsed();
        let code = status.map(|status| status.as_u16());
        let kind = Kind {
            method: self.method,
            route: self.route.as_ref().map(MatchedPath::as_str),
            status,
            version: self.version,
        };
        request_metrics::record(kind, took, self.context.as_ref());
        request_metrics::active(self.method, -1.0);
        let failed = status.is_some_and(|status| status.is_server_error());
        if failed || took >= self.observer.slow {
            if let Some(left_out) = self.observer.access.admit() {
                self.line(tracing::Level::INFO, code, took, left_out);
            }
        } else {
            self.line(tracing::Level::DEBUG, code, took, 0);
        }
    }

    fn line(&self, level: tracing::Level, status: Option<u16>, took: Duration, left_out: u64) {
        macro_rules! line {
            ($level:expr) => {
                tracing::event!(
                    target: "access",
                    $level,
                    request_id = self.id.to_str().ok(),
                    trace_id = self.trace.map(field::display),
                    span_id = self.context.as_ref().map(|context| field::display(context.span_id())),
                    http.request.method = self.method,
                    http.route = self.route.as_ref().map(MatchedPath::as_str),
                    http.response.status_code = status,
                    duration.seconds = took.as_secs_f64(),
                    lines.left_out = (left_out > 0).then_some(left_out),
                    "request"
                )
            };
        }
        if level == tracing::Level::INFO {
            line!(tracing::Level::INFO);
        } else {
            line!(tracing::Level::DEBUG);
        }
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        if !self.over {
            self.end(None);
        }
    }
}

fn request_span(
    request: &Request,
    method: &'static str,
    route: Option<&MatchedPath>,
    id: &HeaderValue,
    parent: Option<&SpanContext>,
) -> Span {
    let named = if method == OTHER { "HTTP" } else { method };
    let name = route.map_or_else(
        || named.to_owned(),
        |route| format!("{named} {}", route.as_str()),
    );
    // Cut here as well as at the span's end, since it is held while the request is under way.
    let cut = |value| trace::cut(value, super::value_length_limit());
    let agent = request.headers().get(http::header::USER_AGENT);
    let span = tracing::info_span!(
        target: super::SPANS,
        parent: None,
        "request",
        otel.name = name,
        otel.kind = "server",
        otel.status_code = field::Empty,
        http.request.method = method,
        http.route = route.map(MatchedPath::as_str),
        url.path = cut(request.uri().path()),
        url.scheme = "http",
        http.response.status_code = field::Empty,
        network.protocol.version = version(request.version()),
        user_agent.original = agent.and_then(|value| value.to_str().ok()).map(cut),
        visitas.request.id = id.to_str().ok(),
        error.type = field::Empty,
    );
    if let Some(parent) = parent {
        // This fails only once the span has started, which nothing has made it do yet.
        span.set_parent(Context::new().with_remote_span_context(parent.clone()))
            .ok();
    }
    span
}

/// The method's name where it is one of HTTP's own: a caller must not be able to make series.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        Method::TRACE => "TRACE",
        Method::CONNECT => "CONNECT",
        _ => OTHER,
    }
}

fn version(version: Version) -> &'static str {
    if version == Version::HTTP_10 {
        "1.0"
    } else {
        "1.1"
    }
}

fn is_probe_or_scrape(route: Option<&MatchedPath>) -> bool {
    route.is_some_and(|route| {
        let route = route.as_str();
        route == "/metrics" || route.starts_with("/health")
    })
}

/// The caller's id if it is 1 to 128 visible ASCII characters, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| {
            (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
        })
        .cloned()
        .unwrap_or_else(|| {
            let id = RandomIdGenerator::default().new_trace_id();
            let mut digits = Uuid::encode_buffer();
            let digits = Uuid::from_bytes(id.to_bytes())
                .simple()
                .encode_lower(&mut digits);
            // Hexadecimal digits are a valid header value.
            HeaderValue::from_str(digits).unwrap_or(HeaderValue::from_static("-"))
        })
}

/// At most so many access lines a second at level info, the rest counted.
#[derive(Debug)]
struct AccessCap {
    began: Instant,
    /// The second since `began` in the high half, the lines written in it in the low half.
    window: AtomicU64,
    left_out: AtomicU64,
}

impl AccessCap {
    const LINES_PER_SECOND: u64 = 10;

    /// `Some` with the number of lines left out since the last one that was written, if one may
    /// be written now.
    fn admit(&self) -> Option<u64> {
        let second = self.began.elapsed().as_secs() & u64::from(u32::MAX);
        let admitted = self
            .window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |window| {
                if window >> 32 != second {
                    return Some(second << 32 | 1);
                }
                let written = window & u64::from(u32::MAX);
                (written < Self::LINES_PER_SECOND).then_some(window + 1)
            });
        if admitted.is_ok() {
            Some(self.left_out.swap(0, Ordering::Relaxed))
        } else {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

impl Default for AccessCap {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            window: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use proptest::prelude::*;

    use super::*;
    use crate::property::bounded;

    fn asked(id: &HeaderValue) -> HeaderValue {
        let mut request = Request::new(Body::empty());
        request.headers_mut().insert(REQUEST_ID, id.clone());
        request_id(&request)
    }

    fn is_made(id: &HeaderValue) -> bool {
        let digits = id.as_bytes();
        digits.len() == 32
            && digits
                .iter()
                .all(|digit| b"0123456789abcdef".contains(digit))
    }

    proptest! {
        #![proptest_config(bounded())]

        #[test]
        fn id_is_kept_if_it_is_visible_and_short_and_made_anew_otherwise(
            bytes in prop_oneof![
                prop::collection::vec(b'!'..=b'~', 0..4),
                prop::collection::vec(b'!'..=b'~', 126..=130),
                prop::collection::vec(prop_oneof![Just(b'\t'), b' '..=b'~', 0x80..=0xff_u8], 0..20),
            ],
        ) {
            let sent = HeaderValue::from_bytes(&bytes).unwrap();
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            let visible = text.chars().all(|character| ('!'..='~').contains(&character));
            if (1..=128).contains(&text.len()) && visible {
                prop_assert_eq!(asked(&sent), sent);
            } else {
                let (first, second) = (asked(&sent), asked(&sent));
                prop_assert!(is_made(&first) && is_made(&second), "{first:?} {second:?}");
                prop_assert_ne!(first, second);
            }
        }
    }
}
