//! Late traces: those of requests that were not sampled, and turned out slow or failed. While such a
//! request is in flight only a few fields are kept. Its spans are made when it has ended, with the
//! times that are known by then.
//!
//! Must not know: which requests get a late trace, and which routes there are.

use std::time::{Duration, Instant, SystemTime};

use axum::extract::Request;
use http::header::USER_AGENT;
use http::{HeaderValue, StatusCode, Uri};
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue};

use super::request_metrics::Kind;
use super::sampler::Decision;
use super::span;

/// Where a request's time went: its parts, one after another. A handler adds this to the extensions
/// of a slow response, and each part becomes a span of a late trace.
#[derive(Debug, Clone)]
pub struct Timeline {
    /// When the first part began.
    pub began: SystemTime,
    /// The name and the duration of each part.
    pub parts: Vec<(&'static str, Duration)>,
}

/// What is kept of a request that is not sampled.
#[derive(Debug)]
pub(super) struct LateTrace {
    decision: Decision,
    uri: Uri,
    user_agent: Option<HeaderValue>,
}

impl LateTrace {
    /// Keeps what a late trace needs, unless the request is sampled or must not be traced.
    pub(super) fn keep(decision: Decision, request: &Request) -> Option<Self> {
        decision.can_be_late().then(|| Self {
            decision,
            uri: request.uri().clone(),
            user_agent: request.headers().get(USER_AGENT).cloned(),
        })
    }

    /// Exports the spans of a request that has ended now. Returns the ids of its server span, which
    /// has the attributes of a sampled request's.
    pub(super) fn export(
        self,
        name: String,
        kind: Kind<'_>,
        id: &HeaderValue,
        started: Instant,
        timeline: Option<Timeline>,
    ) -> Option<SpanContext> {
        let tracer = span::tracer()?;
        let ended = SystemTime::now();
        // Read last, so that no part begins before the request does.
        let took = started.elapsed();
        let text = |key, value: &str| {
            let value = span::cut(value, span::value_length_limit());
            KeyValue::new(key, value.to_owned())
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", kind.method),
            text("url.path", self.uri.path()),
            KeyValue::new("url.scheme", "http"),
            KeyValue::new("network.protocol.version", kind.version),
        ];
        let agent = self.user_agent.as_ref().and_then(|it| it.to_str().ok());
        let id = id.to_str().ok();
        let failed = kind.status.filter(StatusCode::is_server_error);
        attributes.extend(kind.route.map(|route| text("http.route", route)));
        attributes.extend(agent.map(|agent| text("user_agent.original", agent)));
        attributes.extend(id.map(|id| text("visitas.request.id", id)));
        attributes.extend(kind.status.map(|status| {
            let code = i64::from(status.as_u16());
            KeyValue::new("http.response.status_code", code)
        }));
        attributes.extend(failed.map(|status| text("error.type", status.as_str())));
        let builder = SpanBuilder::from_name(name)
            .with_kind(SpanKind::Server)
            .with_start_time(ended - took)
            .with_attributes(attributes);
        let parent = self.decision.parent.clone();
        let parent = parent.map_or_else(Context::new, child_of);
        let start = || tracer.build_with_context(builder, &parent);
        let mut server = self.decision.with_trace(start);
        let context = server.span_context().clone();
        if failed.is_some() {
            server.set_status(Status::error(""));
        }
        server.end_with_timestamp(ended);
        if let Some(timeline) = timeline {
            let parent = child_of(context.clone());
            let mut began = timeline.began;
            for (name, took) in timeline.parts {
                let part = SpanBuilder::from_name(name).with_start_time(began);
                began += took;
                let mut part = tracer.build_with_context(part, &parent);
                part.end_with_timestamp(began);
            }
        }
        context.is_valid().then_some(context)
    }
}

fn child_of(span: SpanContext) -> Context {
    Context::new().with_remote_span_context(span)
}
