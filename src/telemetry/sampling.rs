//! Which requests are traced.
//!
//! It is decided before a request's span is made, so that a request that is not sampled costs
//! one draw. The rules are those of OpenTelemetry's samplers of the same names.

use std::sync::Arc;

use http::HeaderMap;
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{SpanContext, TraceContextExt as _, TraceId};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{IdGenerator as _, RandomIdGenerator};

use super::trace::Breaker;
use crate::config::{Root, Sampler as Rule};

/// Decides for each request whether it is traced.
#[derive(Debug)]
pub struct Sampler {
    rule: Rule,
    breaker: Option<Arc<Breaker>>,
}

/// What was decided about a request, and whose child it is.
#[derive(Debug)]
pub struct Decision {
    /// Whether the request gets a span.
    pub sampled: bool,
    /// The caller's span, where a valid `traceparent` came in.
    pub parent: Option<SpanContext>,
}

impl Sampler {
    /// A sampler by one of OpenTelemetry's rules, for as long as the breaker lets it.
    pub(super) fn new(rule: Rule, breaker: Arc<Breaker>) -> Self {
        Self {
            rule,
            breaker: Some(breaker),
        }
    }

    /// A sampler that takes nothing, for a program without an exporter.
    #[must_use]
    pub fn off() -> Self {
        Self {
            rule: Rule {
                parent_based: false,
                root: Root::AlwaysOff,
            },
            breaker: None,
        }
    }

    /// Decides about a request with these headers.
    #[must_use]
    pub fn decide(&self, headers: &HeaderMap) -> Decision {
        let parent = headers
            .contains_key("traceparent")
            .then(|| remote_parent(headers))
            .flatten();
        let wanted = match &parent {
            Some(parent) if self.rule.parent_based => parent.is_sampled(),
            _ => match self.rule.root {
                Root::AlwaysOn => true,
                Root::AlwaysOff => false,
                Root::Ratio(ratio) => {
                    let trace = parent.as_ref().map_or_else(
                        || RandomIdGenerator::default().new_trace_id(),
                        SpanContext::trace_id,
                    );
                    is_in_ratio(trace, ratio)
                }
            },
        };
        let sampled = wanted
            && self
                .breaker
                .as_ref()
                .is_some_and(|breaker| breaker.admits());
        Decision { sampled, parent }
    }
}

/// The same share of trace ids, and the same ones, as OpenTelemetry's `TraceIdRatioBased`.
fn is_in_ratio(trace: TraceId, ratio: f64) -> bool {
    let low = (u128::from_be_bytes(trace.to_bytes()) & u128::from(u64::MAX)) >> 1;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the ratio is between 0 and 1"
    )]
    let bound = (ratio * (1u64 << 63) as f64) as u128;
    low < bound
}

fn remote_parent(headers: &HeaderMap) -> Option<SpanContext> {
    let context =
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
