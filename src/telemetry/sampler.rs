//! Which requests are traced, and whose children they are.
//!
//! It is decided before a request's span is made, so that a request that is not sampled costs
//! one draw and no allocation. The rules are those of OpenTelemetry's samplers of the same names.
//! The trace then gets the id that was drawn, so that services with the same ratio agree.

use std::cell::Cell;
use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::trace::Breaker;
use crate::config::{Root, Sampler as Rule};

/// Decides for each request whether it is traced.
#[derive(Debug)]
pub struct Sampler {
    rule: Rule,
    breaker: Option<Arc<Breaker>>,
    trace_context: bool,
}

/// What was decided about a request, and whose child it is.
#[derive(Debug)]
pub struct Decision {
    /// Whether the request gets a span.
    pub sampled: bool,
    /// The caller's span, where a valid `traceparent` came in. It has its `tracestate` only if the
    /// request is sampled.
    pub parent: Option<SpanContext>,
    /// The id that was drawn to decide, which the trace gets.
    drawn: Option<TraceId>,
}

impl Sampler {
    /// A sampler by one of OpenTelemetry's rules, for as long as the breaker lets it. Without trace
    /// context it reads no header.
    pub(super) fn new(rule: Rule, breaker: Arc<Breaker>, trace_context: bool) -> Self {
        Self {
            rule,
            breaker: Some(breaker),
            trace_context,
        }
    }

    /// A sampler that takes nothing, for a program without an exporter.
    #[must_use]
    pub fn off(trace_context: bool) -> Self {
        Self {
            rule: Rule {
                parent_based: false,
                root: Root::AlwaysOff,
            },
            breaker: None,
            trace_context,
        }
    }

    /// Decides against a request with these headers, which may have a parent all the same.
    #[must_use]
    pub fn decline(&self, headers: &HeaderMap) -> Decision {
        Decision {
            sampled: false,
            parent: self.parent(headers),
            drawn: None,
        }
    }

    /// Decides about a request with these headers.
    #[must_use]
    pub fn decide(&self, headers: &HeaderMap) -> Decision {
        let parent = self.parent(headers);
        let mut drawn = None;
        let wanted = match &parent {
            Some(parent) if self.rule.parent_based => parent.is_sampled(),
            _ => match self.rule.root {
                Root::AlwaysOn => true,
                Root::AlwaysOff => false,
                Root::Ratio(ratio) => {
                    let trace = match &parent {
                        Some(parent) => parent.trace_id(),
                        None => *drawn.insert(RandomIdGenerator::default().new_trace_id()),
                    };
                    is_in_ratio(trace, ratio)
                }
            },
        };
        let sampled = wanted
            && self
                .breaker
                .as_ref()
                .is_some_and(|breaker| breaker.admits());
        Decision {
            sampled,
            parent: if sampled {
                parent.map(|parent| with_state(&parent, tracestate(headers)))
            } else {
                parent
            },
            drawn,
        }
    }

    fn parent(&self, headers: &HeaderMap) -> Option<SpanContext> {
        if self.trace_context {
            traceparent(headers)
        } else {
            None
        }
    }
}

impl Decision {
    /// Starts the span of a sampled request. A trace that starts with it has the drawn id.
    pub(super) fn start(&self, span: &Span) -> SpanContext {
        DRAWN.set(self.drawn);
        let context = span.context().span().span_context().clone();
        DRAWN.set(None);
        context
    }
}

thread_local! {
    /// The id for the trace that this thread is starting.
    static DRAWN: Cell<Option<TraceId>> = const { Cell::new(None) };
}

/// Gives a trace the id that was drawn to decide about it, and any other a random one.
#[derive(Debug, Default)]
pub(super) struct DrawnIds(RandomIdGenerator);

impl IdGenerator for DrawnIds {
    fn new_trace_id(&self) -> TraceId {
        DRAWN.take().unwrap_or_else(|| self.0.new_trace_id())
    }

    fn new_span_id(&self) -> SpanId {
        self.0.new_span_id()
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

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The caller's span, without its `tracestate`. Two `traceparent` headers are no valid one, even
/// if they are equal: a proxy may join them (RFC 9110, 5.3), and then they are malformed.
fn traceparent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let value = value.to_str().ok()?;
    if !is_well_formed(value.as_bytes()) {
        return None;
    }
    let flags = u8::from_str_radix(&value[53..55], 16).ok()?;
    let parent = SpanContext::new(
        TraceId::from_hex(&value[3..35]).ok()?,
        SpanId::from_hex(&value[36..52]).ok()?,
        TraceFlags::new(flags) & TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    parent.is_valid().then_some(parent)
}

fn with_state(parent: &SpanContext, state: TraceState) -> SpanContext {
    SpanContext::new(
        parent.trace_id(),
        parent.span_id(),
        parent.trace_flags(),
        parent.is_remote(),
        state,
    )
}

/// Members of a `tracestate` that are kept: all that it may have.
const STATE_MEMBERS: usize = 32;
/// Characters of a `tracestate` that are kept: as many as have to be passed on.
const STATE_LENGTH: usize = 512;
/// Members longer than this go first where there are too many characters.
const LONG_MEMBER: usize = 128;

/// The members of all `tracestate` headers in their order, bounded as W3C's Trace Context says
/// (3.3.1): whole members go, the long ones first, and from the end. With a malformed member
/// there is none.
fn tracestate(headers: &HeaderMap) -> TraceState {
    let mut members = Vec::new();
    for value in headers.get_all(TRACESTATE) {
        let Ok(value) = value.to_str() else {
            return TraceState::NONE;
        };
        let listed = value
            .split(',')
            .map(|member| member.trim_matches([' ', '\t']))
            .filter(|member| !member.is_empty());
        members.extend(listed.take(STATE_MEMBERS - members.len()));
    }
    let length = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>();
    // The last member has no comma behind it.
    while length(&members) > STATE_LENGTH + 1 {
        let long = members
            .iter()
            .rposition(|member| member.len() > LONG_MEMBER);
        members.remove(long.unwrap_or(members.len() - 1));
    }
    let pairs: Option<Vec<_>> = members
        .into_iter()
        .map(|member| member.split_once('='))
        .collect();
    pairs
        .and_then(|pairs| TraceState::from_key_value(pairs).ok())
        .unwrap_or(TraceState::NONE)
}

/// Whether a `traceparent` has the fields that W3C's Trace Context wants, each of its length.
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
    may_end && !fields.starts_with(b"ff") && fields.iter().enumerate().all(is_in_place)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use opentelemetry::Context;
    use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
    use opentelemetry::trace::SpanKind;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
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
            let sampler = Sampler::new(rule, Arc::new(Breaker::default()), true);
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

    fn states(values: &[&str]) -> HeaderMap {
        let values = values
            .iter()
            .map(|value| (TRACESTATE, value.parse().unwrap()));
        values.collect()
    }

    #[test]
    fn tracestate_has_the_members_of_all_headers_in_order() {
        for (values, expected) in [
            (&[][..], ""),
            (&["a=1"], "a=1"),
            (&["a=1", "b=2,c=3", "d=4"], "a=1,b=2,c=3,d=4"),
            (&["", " a=1 ,, \tb=2", ","], "a=1,b=2"),
            (&["a=1", "b"], ""),
            (&["a=1", "B=2"], ""),
            (&["a=1==2"], ""),
            (&["a=1", "b=\u{e9}"], ""),
        ] {
            assert_eq!(tracestate(&states(values)).header(), expected, "{values:?}");
        }
    }

    #[test]
    fn tracestate_is_cut_to_whole_members_the_long_ones_first() {
        let member = |key: &str, length: usize| format!("{key}={}", "x".repeat(length - 2));
        let kept = |members: &[String]| {
            let (one, other) = members.split_at(members.len() / 2);
            tracestate(&states(&[&one.join(","), &other.join(",")])).header()
        };
        let many: Vec<_> = (0..40).map(|number| format!("k{number}=v")).collect();
        assert_eq!(kept(&many), many[..32].join(","));
        // 4 × 128 and three commas are too many by three.
        let even = ["a", "b", "c", "d"].map(|key| member(key, 128));
        assert_eq!(kept(&even), even[..3].join(","));
        let exact = [
            member("a", 128),
            member("b", 128),
            member("c", 128),
            member("d", 125),
        ];
        assert_eq!(kept(&exact), exact.join(","));
        assert_eq!(exact.join(",").len(), 512);
        let long = [
            member("a", 200),
            member("b", 120),
            member("c", 250),
            member("d", 10),
        ];
        assert_eq!(kept(&long), [&*long[0], &long[1], &long[3]].join(","));
        let huge = [member("a", 7_000), member("b", 10)];
        assert_eq!(kept(&huge), huge[1]);
    }

    #[test]
    fn two_traceparents_are_none() {
        let one = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let other = "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for second in [one, other, "", "00"] {
            let values = [one, second].map(|value| (TRACEPARENT, value.parse().unwrap()));
            assert_eq!(traceparent(&HeaderMap::from_iter(values)), None, "{second}");
        }
    }

    #[test]
    fn trace_has_the_id_that_was_drawn_and_the_next_one_another() {
        let drawn = RandomIdGenerator::default().new_trace_id();
        DRAWN.set(Some(drawn));
        assert_eq!(DrawnIds::default().new_trace_id(), drawn);
        assert_ne!(DrawnIds::default().new_trace_id(), drawn);
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
        begins && fields[0] != b"ff" && (fields.len() == 4 || fields[0] != b"00")
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

    struct Headers<'a>(&'a HeaderMap);

    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key).and_then(|value| value.to_str().ok())
        }

        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(HeaderName::as_str).collect()
        }
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
                prop_assert_eq!(traceparent(&headers), expected);
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
            prop_assert_eq!(traceparent(&headers.0), Some(sent));
        }
    }
}
