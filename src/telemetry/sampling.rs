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

    /// Decides against a request with these headers, which may have a parent all the same.
    #[must_use]
    pub fn decline(headers: &HeaderMap) -> Decision {
        Decision {
            sampled: false,
            parent: remote_parent(headers),
        }
    }

    /// Decides about a request with these headers.
    #[must_use]
    pub fn decide(&self, headers: &HeaderMap) -> Decision {
        let parent = remote_parent(headers);
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
    if !is_well_formed(headers.get("traceparent")?.as_bytes()) {
        return None;
    }
    let context =
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

/// Whether a `traceparent` has the fields that W3C's Trace Context wants, each of its length. The
/// propagator takes fields of any length.
fn is_well_formed(traceparent: &[u8]) -> bool {
    const LENGTH: usize = 55;
    let Some((fields, rest)) = traceparent.split_at_checked(LENGTH) else {
        return false;
    };
    let is_in_place = |(at, byte): (usize, &u8)| match at {
        2 | 35 | 52 => *byte == b'-',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    };
    // Only a version to come may have more fields.
    let may_end = rest.is_empty() || (!fields.starts_with(b"00") && rest[0] == b'-');
    may_end && fields.iter().enumerate().all(is_in_place)
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use opentelemetry::propagation::Injector;
    use opentelemetry::trace::{SpanId, SpanKind, TraceFlags, TraceState};
    use opentelemetry_sdk::trace::{Sampler as Reference, SamplingDecision, ShouldSample as _};
    use proptest::prelude::*;

    use super::*;
    use crate::property::bounded;

    #[test]
    fn ratio_takes_the_traces_that_the_sdk_takes() {
        for ratio in [0.0, 0.001, 0.1, 0.5, 0.999, 1.0] {
            let reference = Reference::TraceIdRatioBased(ratio);
            for _ in 0..1000 {
                let trace = RandomIdGenerator::default().new_trace_id();
                let taken = reference
                    .should_sample(None, trace, "", &SpanKind::Server, &[], &[])
                    .decision;
                let expected = taken == SamplingDecision::RecordAndSample;
                assert_eq!(is_in_ratio(trace, ratio), expected, "{ratio} of {trace}");
            }
        }
    }

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
            let rule = Rule { parent_based, root };
            let sampler = Sampler::new(rule, Arc::new(Breaker::default()));
            let decide = |flags: &str| {
                let parent =
                    format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
                let value = parent.parse().unwrap();
                sampler.decide(&HeaderMap::from_iter([(
                    http::header::HeaderName::from_static("traceparent"),
                    value,
                )]))
            };
            assert_eq!(sampler.decide(&HeaderMap::new()).sampled, without);
            assert_eq!(decide("01").sampled, sampled, "{parent_based} {root:?}");
            assert_eq!(decide("00").sampled, unsampled, "{parent_based} {root:?}");
            assert!(decide("00").parent.is_some());
        }
    }

    /// What a header may hold: a `traceparent`, one with a byte that does not belong there, or
    /// anything else.
    fn traceparents() -> impl Strategy<Value = Vec<u8>> {
        let version = prop_oneof![Just("00"), Just("01"), Just("fe"), Just("ff"), Just("0")];
        let id = |digits: &'static str, zeros: &'static str| prop_oneof![9 => digits, 1 => Just(zeros.to_owned())];
        let valid = (
            version,
            id("[0-9a-f]{32}", "00000000000000000000000000000000"),
            id("[0-9a-f]{16}", "0000000000000000"),
            prop_oneof!["0[01]", "[0-9a-f]{2}"],
            prop_oneof![3 => Just(String::new()), 1 => "-[ -~]{0,8}", 1 => "[ -~]{0,3}"],
        )
            .prop_map(|(version, trace, span, flags, rest)| {
                format!("{version}-{trace}-{span}-{flags}{rest}").into_bytes()
            });
        let byte = prop_oneof![prop::sample::select(&b"/:@`gAFG -\0"[..]), any::<u8>(),];
        let changed = (valid.clone(), any::<prop::sample::Index>(), byte).prop_map(
            |(mut bytes, at, byte)| {
                let at = at.index(bytes.len());
                bytes[at] = byte;
                bytes
            },
        );
        let shifted = (valid.clone(), any::<prop::sample::Index>()).prop_map(|(mut bytes, at)| {
            bytes.remove(at.index(bytes.len()));
            bytes
        });
        prop_oneof![
            valid,
            changed,
            shifted,
            prop::collection::vec(any::<u8>(), 0..70)
        ]
    }

    /// The grammar of W3C's Trace Context, field by field. Version 00 has four fields, a later one
    /// may have more behind them.
    fn is_by_the_grammar(traceparent: &[u8]) -> bool {
        let fields: Vec<&[u8]> = traceparent.splitn(5, |byte| *byte == b'-').collect();
        let is_of = |(field, length): (&&[u8], usize)| {
            field.len() == length && field.iter().all(|byte| b"0123456789abcdef".contains(byte))
        };
        let begins = fields.len() >= 4 && fields.iter().zip([2, 32, 16, 2]).all(is_of);
        begins && (fields.len() == 4 || fields[0] != b"00")
    }

    fn carrying(traceparent: HeaderValue) -> HeaderMap {
        let name = http::HeaderName::from_static("traceparent");
        HeaderMap::from_iter([(name, traceparent)])
    }

    /// What OpenTelemetry makes of the headers, which takes more than the grammar does.
    fn propagated(headers: &HeaderMap) -> Option<SpanContext> {
        let propagator = TraceContextPropagator::new();
        let context = propagator.extract_with_context(&Context::new(), &Headers(headers));
        let parent = context.span().span_context().clone();
        parent.is_valid().then_some(parent)
    }

    struct Injected(HeaderMap);

    impl Injector for Injected {
        fn set(&mut self, name: &str, value: String) {
            let name = name.parse::<http::HeaderName>().unwrap();
            self.0.insert(name, value.parse().unwrap());
        }
    }

    proptest! {
        #![proptest_config(bounded())]

        #[test]
        fn parent_is_what_both_the_grammar_and_the_propagator_take(bytes in traceparents()) {
            prop_assert_eq!(is_well_formed(&bytes), is_by_the_grammar(&bytes));
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                let headers = carrying(value);
                let expected = propagated(&headers).filter(|_| is_by_the_grammar(&bytes));
                prop_assert_eq!(remote_parent(&headers), expected);
            }
        }

        #[test]
        fn parent_that_was_sent_on_is_the_one_that_arrives(
            trace in 1..=u128::MAX, span in 1..=u64::MAX, sampled in any::<bool>(),
        ) {
            let flags = if sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
            let (trace, span) = (TraceId::from(trace), SpanId::from(span));
            let sent = SpanContext::new(trace, span, flags, true, TraceState::default());
            let mut headers = Injected(HeaderMap::new());
            let context = Context::new().with_remote_span_context(sent.clone());
            TraceContextPropagator::new().inject_context(&context, &mut headers);
            prop_assert_eq!(remote_parent(&headers.0), Some(sent));
        }
    }
}
