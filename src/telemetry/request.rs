//! The outermost layer: a request's ids, its span, its metrics and its line in the access log. A
//! request that was not sampled gets a late trace if it was slow or failed.
//!
//! Must not know: which routes there are, bodies, query strings and client addresses.

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
use tracing::{Level, Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use uuid::Uuid;

use super::late::{LateTrace, Timeline};
use super::panic::{RequestIds, RequestScope};
use super::request_metrics::{self, Kind};
use super::sampler::Sampler;
use super::span;
use crate::metrics::limit::OTHER;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_RESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// Observes requests.
#[derive(Debug)]
pub struct Observer {
    sampler: Sampler,
    slow: Duration,
    access_limit: RateLimit,
    late_limit: RateLimit,
}

/// Maximum number of access lines at level info in a second.
const ACCESS_LINES: u64 = 10;
/// Maximum number of late traces in a second. An overloaded service must not spend its time on
/// them.
const LATE_TRACES: u64 = 1000;

impl Observer {
    /// Logs requests slower than `slow` at level info, and traces them late unless they are
    /// sampled.
    #[must_use]
    pub fn new(sampler: Sampler, slow: Duration) -> Arc<Self> {
        request_metrics::declare();
        Arc::new(Self {
            sampler,
            slow,
            access_limit: RateLimit::new(ACCESS_LINES),
            late_limit: RateLimit::new(LATE_TRACES),
        })
    }

    /// Makes the layer. `of_route` says what is observed of a route's requests.
    pub fn layer<S>(
        self: Arc<Self>,
        of_route: fn(route: &str) -> Observed,
    ) -> impl Layer<S, Service = ObservingService<S>> + Clone {
        layer_fn(move |inner| ObservingService {
            observer: Arc::clone(&self),
            of_route,
            inner,
        })
    }

    /// Logs how many access lines and late traces were suppressed since the last report, if any.
    pub fn report_suppressed(&self) {
        let suppressed = self.late_limit.take_suppressed();
        if suppressed > 0 {
            tracing::warn!(
                traces.suppressed = suppressed,
                "slow or failed requests without a trace"
            );
        }
        let suppressed = self.access_limit.take_suppressed();
        if suppressed > 0 {
            tracing::event!(
                target: "access",
                Level::INFO,
                lines.suppressed = suppressed,
                "requests without a line"
            );
        }
    }
}

/// What is observed of a route's requests, next to the access line and the number in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// A span, if the request is sampled, slow or failed, and its duration.
    Traced,
    /// The duration alone.
    Timed,
    /// Neither: how long a response takes is the client's choice. Client errors still count.
    Untimed,
}

/// The service of the outermost layer. It allocates nothing, unlike axum's `from_fn`.
#[derive(Debug, Clone)]
pub struct ObservingService<S> {
    observer: Arc<Observer>,
    of_route: fn(&str) -> Observed,
    inner: S,
}

impl<S> Service<Request> for ObservingService<S>
where
    S: Service<Request, Response = Response>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let in_flight = InFlight::begin(&self.observer, self.of_route, &request);
        let _scope = RequestScope::enter(in_flight.ids());
        let span = in_flight.span.clone();
        ResponseFuture {
            response: self.inner.call(request).instrument(span),
            in_flight,
        }
    }
}

pin_project! {
    /// The response to an observed request.
    #[derive(Debug)]
    pub struct ResponseFuture<F> {
        #[pin]
        response: Instrumented<F>,
        in_flight: InFlight,
    }
}

impl<F, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let scope = RequestScope::enter(this.in_flight.ids());
        let mut response = ready!(this.response.poll(cx))?;
        drop(scope);
        this.in_flight.respond(&mut response);
        Poll::Ready(Ok(response))
    }
}

/// A request in flight. Dropped without a response when the client disconnects.
#[derive(Debug)]
struct InFlight {
    observer: Arc<Observer>,
    method: &'static str,
    route: Option<MatchedPath>,
    version: &'static str,
    id: HeaderValue,
    trace: Option<TraceId>,
    /// The ids of the span, if the request has one.
    context: Option<SpanContext>,
    span: Span,
    late: Option<LateTrace>,
    started: Instant,
    timed: bool,
    ended: bool,
}

impl InFlight {
    fn begin(observer: &Arc<Observer>, of_route: fn(&str) -> Observed, request: &Request) -> Self {
        let started = Instant::now();
        let method = known_method(request.method());
        let route = request.extensions().get::<MatchedPath>().cloned();
        let id = request_id(request);
        let extent = route
            .as_ref()
            .map_or(Observed::Traced, |route| of_route(route.as_str()));
        let decision = if extent == Observed::Traced {
            observer.sampler.decide(request.headers())
        } else {
            observer.sampler.decline(request.headers())
        };
        let parent = decision.parent.as_ref();
        let span = if decision.sampled {
            request_span(request, method, route.as_ref(), &id, parent)
        } else {
            Span::none()
        };
        let context = (!span.is_none()).then(|| decision.start(&span));
        let trace = context.as_ref().or(parent).map(SpanContext::trace_id);
        request_metrics::add_active(method, 1.0);
        Self {
            observer: Arc::clone(observer),
            method,
            route,
            version: version(request.version()),
            id,
            trace,
            context,
            span,
            late: LateTrace::keep(decision, request),
            started,
            timed: extent != Observed::Untimed,
            ended: false,
        }
    }

    fn ids(&self) -> RequestIds {
        RequestIds {
            request: self.id.clone(),
            trace: self.trace,
            span: self.context.as_ref().map(SpanContext::span_id),
        }
    }

    fn respond(&mut self, response: &mut Response) {
        let status = response.status();
        if self.context.is_some() {
            self.span
                .record("http.response.status_code", i64::from(status.as_u16()));
            if status.is_server_error() {
                self.span.record("otel.status_code", "ERROR");
                self.span.record("error.type", status.as_str());
            }
        }
        self.end(Some(status), response.extensions_mut().remove());
        if let Some(context) = &self.context {
            let value = format!("00-{}-{}-01", context.trace_id(), context.span_id());
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().insert(TRACE_RESPONSE, value);
            }
        }
        response.headers_mut().insert(REQUEST_ID, self.id.clone());
    }

    fn end(&mut self, status: Option<StatusCode>, timeline: Option<Timeline>) {
        self.ended = true;
        let took = self.started.elapsed();
        let code = status.map(|status| status.as_u16());
        let route = self.route.as_ref().map(MatchedPath::as_str);
        let kind = Kind {
            method: self.method,
            route,
            status,
            version: self.version,
        };
        let failed = status.is_some_and(|status| status.is_server_error());
        let is_notable = failed || took >= self.observer.slow;
        if is_notable
            && let Some(late) = self.late.take()
            && self.observer.sampler.admits()
            && self.observer.late_limit.admits()
        {
            let name = span_name(self.method, route);
            let timeline = timeline.filter(|_| self.observer.sampler.has_room());
            if let Some(context) = late.export(name, kind, &self.id, self.started, timeline) {
                self.trace = Some(context.trace_id());
                self.context = Some(context);
            }
        }
        let span = self.context.as_ref();
        if self.timed || status.is_some_and(|status| status.is_client_error()) {
            request_metrics::record(kind, took, span);
        }
        request_metrics::add_active(self.method, -1.0);
        macro_rules! line {
            ($level:expr, $suppressed:expr) => {
                tracing::event!(
                    target: "access",
                    $level,
                    request_id = self.id.to_str().ok(),
                    trace_id = self.trace.map(field::display),
                    span_id = span.map(|span| field::display(span.span_id())),
                    http.request.method = self.method,
                    http.route = route,
                    http.response.status_code = code,
                    duration.seconds = took.as_secs_f64(),
                    lines.suppressed = $suppressed,
                    "request"
                )
            };
        }
        if !is_notable {
            line!(Level::DEBUG, None::<u64>);
        } else if self.observer.access_limit.admits() {
            let suppressed = self.observer.access_limit.take_suppressed();
            line!(Level::INFO, (suppressed > 0).then_some(suppressed));
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.ended {
            self.end(None, None);
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
    let route = route.map(MatchedPath::as_str);
    // Cut here as well as in the queue, since the span is held while the request is in flight.
    let cut = |value| span::cut(value, span::value_length_limit());
    let agent = request.headers().get(http::header::USER_AGENT);
    let span = tracing::info_span!(
        target: span::TARGET,
        parent: None,
        "request",
        otel.name = span_name(method, route),
        otel.kind = "server",
        otel.status_code = field::Empty,
        http.request.method = method,
        http.route = route,
        url.path = cut(request.uri().path()),
        url.scheme = "http",
        http.response.status_code = field::Empty,
        network.protocol.version = version(request.version()),
        user_agent.original = agent.and_then(|value| value.to_str().ok()).map(cut),
        visitas.request.id = id.to_str().ok(),
        error.type = field::Empty,
    );
    if let Some(parent) = parent {
        // This fails only after the span has started, and it has not started yet.
        span.set_parent(Context::new().with_remote_span_context(parent.clone()))
            .ok();
    }
    span
}

fn span_name(method: &str, route: Option<&str>) -> String {
    let verb = if method == OTHER { "HTTP" } else { method };
    route.map_or_else(|| verb.to_owned(), |route| format!("{verb} {route}"))
}

/// The method's name if HTTP defines it, so that a client cannot create series.
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

/// The client's id if it is 1 to 128 visible ASCII characters, otherwise a new one.
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

/// Admits a number of events a second, and counts the others.
#[derive(Debug)]
struct RateLimit {
    per_second: u64,
    started: Instant,
    /// The second since `started` in the high half, the events admitted in it in the low half.
    window: AtomicU64,
    suppressed: AtomicU64,
}

impl RateLimit {
    fn new(per_second: u64) -> Self {
        Self {
            per_second,
            started: Instant::now(),
            window: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
        }
    }

    fn admits(&self) -> bool {
        let second = self.started.elapsed().as_secs() & u64::from(u32::MAX);
        let one_more = |window| {
            if window >> 32 != second {
                return Some(second << 32 | 1);
            }
            let admitted = window & u64::from(u32::MAX);
            (admitted < self.per_second).then_some(window + 1)
        };
        let admitted = self
            .window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .is_ok();
        if !admitted {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }

    /// Returns how many events were suppressed since the last call.
    fn take_suppressed(&self) -> u64 {
        self.suppressed.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn id_for(sent: &[u8]) -> HeaderValue {
        let mut request = Request::new(Body::empty());
        let sent = HeaderValue::from_bytes(sent).unwrap();
        request.headers_mut().insert(REQUEST_ID, sent);
        request_id(&request)
    }

    #[test]
    fn id_is_kept_if_visible_and_short_and_replaced_otherwise() {
        let visible: Vec<_> = (b'!'..=b'~').collect();
        for kept in [&visible[..], b"a", &[b'a'; 128]] {
            assert_eq!(id_for(kept), kept);
        }
        for refused in [
            &b""[..],
            b"a b",
            b"\t",
            b"caf\xc3\xa9",
            b"\xff",
            &[b'a'; 129],
        ] {
            let (first, second) = (id_for(refused), id_for(refused));
            let is_hex = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
            assert!(first.len() == 32 && first.as_bytes().iter().copied().all(is_hex));
            assert_ne!(first, second);
        }
    }
}
