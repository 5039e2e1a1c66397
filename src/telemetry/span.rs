//! Exported spans: their target, tracer and layer, and the maximum length of their attributes.
//!
//! Must not know: what a span is about.

use std::sync::OnceLock;

use opentelemetry::trace::{TraceContextExt as _, TraceId};
use opentelemetry_sdk::trace::SdkTracer;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

/// The target of exported spans. No library's span has this target, so no library's span is
/// exported, and the exporter's own requests are not traced.
pub(crate) const TARGET: &str = "visitas::span";

/// The tracer, and the maximum length of an attribute's value in characters.
static EXPORTED: OnceLock<(SdkTracer, usize)> = OnceLock::new();

/// Must be called before the first span is made. Only the first call counts.
pub(super) fn set_tracer(tracer: SdkTracer, value_length_limit: usize) {
    EXPORTED.get_or_init(|| (tracer, value_length_limit));
}

/// The tracer, if spans are exported.
pub(crate) fn tracer() -> Option<&'static SdkTracer> {
    EXPORTED.get().map(|(tracer, _limit)| tracer)
}

/// The trace of the current span, if the request is sampled.
pub(crate) fn current_trace() -> Option<TraceId> {
    let span = Span::current();
    if span.is_none() {
        return None;
    }
    let trace = span.context().span().span_context().trace_id();
    (trace != TraceId::INVALID).then_some(trace)
}

/// Makes the layer that exports spans, if spans are exported.
pub(super) fn layer<S>() -> Option<impl Layer<S>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let exported = tracing_opentelemetry::layer()
        .with_tracer(tracer()?.clone())
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_target(false)
        .with_level(false)
        // Parents are set explicitly, never taken from the thread.
        .with_context_activation(false)
        .with_filter(filter_fn(|metadata| {
            metadata.is_span() && metadata.target() == TARGET
        }));
    Some(exported)
}

/// The maximum length of an attribute's value in characters; 0 without an exporter, since then no
/// span is made.
pub(super) fn value_length_limit() -> usize {
    EXPORTED.get().map_or(0, |&(_, limit)| limit)
}

/// The first `limit` characters of a text.
pub(super) fn cut(text: &str, limit: usize) -> &str {
    // No character is shorter than a byte.
    if text.len() <= limit {
        return text;
    }
    let end = text.char_indices().nth(limit).map(|(end, _)| end);
    &text[..end.unwrap_or(text.len())]
}
