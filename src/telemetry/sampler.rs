//! Decides which requests are traced, before their spans are made, so that a request that is not
//! sampled costs one random id and no allocation.
//!
//! The rules are those of the SDK's samplers. A trace gets the id that was drawn for the decision,
//! so that services with the same ratio agree. Must not know: which routes there are.

use std::cell::Cell;
use std::sync::Arc;

use http::HeaderMap;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceId};
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler as SdkSampler, SamplingDecision, ShouldSample as _,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::collector::Collector;
use super::propagation;
use crate::config;

/// Decides for each request whether it is traced.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// `None` without an exporter.
    rule: Option<Rule>,
    trace_context: bool,
}

#[derive(Debug, Clone)]
struct Rule {
    parent_based: bool,
    root: SdkSampler,
    collector: Arc<Collector>,
}

/// The decision about a request, and its parent span.
#[derive(Debug)]
pub(super) struct Decision {
    /// Whether the request gets a span.
    pub(super) sampled: bool,
    /// The caller's span, if there was a valid `traceparent`. It has a `tracestate` only if the
    /// request is sampled.
    pub(super) parent: Option<SpanContext>,
    /// The id of the request's trace; invalid if no span of the request is ever exported.
    trace: TraceId,
}

impl Sampler {
    /// Samples by one of OpenTelemetry's rules while the collector accepts spans. Reads no header
    /// without `trace_context`.
    pub(super) fn new(
        rule: config::Sampler,
        collector: Arc<Collector>,
        trace_context: bool,
    ) -> Self {
        let root = match rule.root {
            config::Root::AlwaysOn => SdkSampler::AlwaysOn,
            config::Root::AlwaysOff => SdkSampler::AlwaysOff,
            config::Root::Ratio(ratio) => SdkSampler::TraceIdRatioBased(ratio),
        };
        Self {
            rule: Some(Rule {
                parent_based: rule.parent_based,
                root,
                collector,
            }),
            trace_context,
        }
    }

    /// Samples nothing, for a program without an exporter.
    #[must_use]
    pub fn off(trace_context: bool) -> Self {
        Self {
            rule: None,
            trace_context,
        }
    }

    /// Decides not to trace a request. The decision still has the request's parent.
    pub(super) fn decline(&self, headers: &HeaderMap) -> Decision {
        let parent = self.trace_context.then(|| propagation::parent(headers));
        Decision {
            sampled: false,
            parent: parent.flatten(),
            trace: TraceId::INVALID,
        }
    }

    /// Decides whether to trace a request.
    pub(super) fn decide(&self, headers: &HeaderMap) -> Decision {
        let mut decision = self.decline(headers);
        let Some(rule) = &self.rule else {
            return decision;
        };
        let parent = decision.parent.as_ref();
        decision.trace = parent.map_or_else(
            || RandomIdGenerator::default().new_trace_id(),
            SpanContext::trace_id,
        );
        let wanted = match parent {
            Some(parent) if rule.parent_based => parent.is_sampled(),
            _ => rule.samples(decision.trace),
        };
        decision.sampled = wanted && rule.collector.admits();
        if decision.sampled {
            let parent = parent.map(|parent| propagation::with_tracestate(parent, headers));
            decision.parent = parent;
        } else if matches!(rule.root, SdkSampler::AlwaysOff) {
            decision.trace = TraceId::INVALID;
        }
        decision
    }

    /// Whether a late trace can be exported now.
    pub(super) fn admits(&self) -> bool {
        let rule = self.rule.as_ref();
        rule.is_some_and(|rule| rule.collector.admits())
    }

    /// Whether a late trace can have more than its server span.
    pub(super) fn has_room(&self) -> bool {
        let rule = self.rule.as_ref();
        rule.is_some_and(|rule| rule.collector.has_room())
    }
}

impl Rule {
    fn samples(&self, trace: TraceId) -> bool {
        let kind = SpanKind::Server;
        let result = self.root.should_sample(None, trace, "", &kind, &[], &[]);
        result.decision == SamplingDecision::RecordAndSample
    }
}

impl Decision {
    /// Starts the span of a sampled request.
    pub(super) fn start(&self, span: &Span) -> SpanContext {
        self.with_trace(|| span.context().span().span_context().clone())
    }

    /// Whether the request can get a late trace: it is not sampled, and the rule is not to trace
    /// nothing at all. A caller that is not sampled does not prevent it: the caller has decided
    /// before it could know.
    pub(super) fn can_be_late(&self) -> bool {
        !self.sampled && self.trace != TraceId::INVALID
    }

    /// Runs `start`, in which a span without a parent starts the request's trace.
    pub(super) fn with_trace<R>(&self, start: impl FnOnce() -> R) -> R {
        STARTING.set(Some(self.trace));
        let started = start();
        STARTING.set(None);
        started
    }
}

thread_local! {
    /// The id of the trace that this thread is starting.
    static STARTING: Cell<Option<TraceId>> = const { Cell::new(None) };
}

/// Generates ids: a trace of [`Decision::with_trace`] gets the id drawn for its decision, any other a
/// random one.
#[derive(Debug, Default)]
pub(super) struct TraceIdGenerator(RandomIdGenerator);

impl IdGenerator for TraceIdGenerator {
    fn new_trace_id(&self) -> TraceId {
        STARTING.get().unwrap_or_else(|| self.0.new_trace_id())
    }

    fn new_span_id(&self) -> SpanId {
        self.0.new_span_id()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Root;

    #[test]
    fn parent_decides_only_where_the_rule_says_so() {
        let (on, off) = (Root::AlwaysOn, Root::AlwaysOff);
        for (parent_based, root, without, sampled, unsampled) in [
            (true, on, true, true, false),
            (true, off, false, true, false),
            (false, on, true, true, true),
            (false, off, false, false, false),
            (true, Root::Ratio(0.0), false, true, false),
            (false, Root::Ratio(1.0), true, true, true),
        ] {
            let rule = config::Sampler { parent_based, root };
            let sampler = Sampler::new(rule, Arc::new(Collector::new(0)), true);
            let decide = |flags: &str| {
                let parent =
                    format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
                let name = http::HeaderName::from_static("traceparent");
                sampler.decide(&HeaderMap::from_iter([(name, parent.parse().unwrap())]))
            };
            assert_eq!(sampler.decide(&HeaderMap::new()).sampled, without);
            assert_eq!(decide("01").sampled, sampled, "{parent_based} {root:?}");
            assert_eq!(decide("00").sampled, unsampled, "{parent_based} {root:?}");
            assert!(decide("00").parent.is_some());
        }
    }
}
