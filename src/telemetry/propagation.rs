//! Reads a request's parent span from W3C's Trace Context: the headers `traceparent` and
//! `tracestate`.
//!
//! Must not know: which requests are sampled.

use http::{HeaderMap, HeaderName};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Maximum number of members of a `tracestate` (3.3.1.1).
const STATE_MEMBERS: usize = 32;
/// Maximum length of a `tracestate` that is kept: a service must pass on this many characters.
const STATE_LENGTH: usize = 512;
/// Members longer than this are dropped first if there are too many characters.
const LONG_MEMBER: usize = 128;

/// The caller's span, without its `tracestate`. Two `traceparent` headers are invalid, even if they
/// are equal: a proxy can join them (RFC 9110, 5.3), which makes them malformed.
pub(super) fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let mut fields = value.to_str().ok()?.splitn(5, '-');
    let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let mut field = |length| {
        let field = fields.next()?;
        (field.len() == length && field.bytes().all(is_hex)).then_some(field)
    };
    let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    // Only a later version can have more fields.
    if version == "ff" || (version == "00" && fields.next().is_some()) {
        return None;
    }
    let parent = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    parent.is_valid().then_some(parent)
}

/// The caller's span with its `tracestate`.
pub(super) fn with_tracestate(parent: &SpanContext, headers: &HeaderMap) -> SpanContext {
    SpanContext::new(
        parent.trace_id(),
        parent.span_id(),
        parent.trace_flags(),
        parent.is_remote(),
        tracestate(headers).unwrap_or(TraceState::NONE),
    )
}

/// The members of all `tracestate` headers in their order, cut as W3C's Trace Context requires
/// (3.3.1): whole members are dropped, the long ones first, from the end. `None` if a member is
/// malformed.
fn tracestate(headers: &HeaderMap) -> Option<TraceState> {
    let values = headers.get_all(TRACESTATE).iter();
    let values: Vec<_> = values
        .map(|value| value.to_str().ok())
        .collect::<Option<_>>()?;
    let mut members: Vec<_> = values
        .into_iter()
        .flat_map(|value| value.split(','))
        .map(|member| member.trim_matches([' ', '\t']))
        .filter(|member| !member.is_empty())
        .take(STATE_MEMBERS)
        .collect();
    let length = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>();
    // The last member has no comma after it.
    while length(&members) > STATE_LENGTH + 1 {
        let is_long = |member: &&str| member.len() > LONG_MEMBER;
        let long = members.iter().rposition(is_long);
        members.remove(long.unwrap_or(members.len() - 1));
    }
    let pairs = members.into_iter().map(|member| member.split_once('='));
    TraceState::from_key_value(pairs.collect::<Option<Vec<_>>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn parsed(traceparent: &str) -> Option<SpanContext> {
        parent(&HeaderMap::from_iter([(
            TRACEPARENT,
            traceparent.parse().unwrap(),
        )]))
    }

    #[test]
    fn traceparent_names_trace_span_and_whether_it_is_sampled() {
        let parent = parsed(VALID).unwrap();
        assert_eq!(parent.trace_id().to_string(), VALID[3..35]);
        assert_eq!(parent.span_id().to_string(), VALID[36..52]);
        assert!(parent.is_sampled() && parent.is_remote());
        for (flags, sampled) in [("00", false), ("02", false), ("03", true), ("ff", true)] {
            let parent = parsed(&format!("{}{flags}", &VALID[..53])).unwrap();
            assert_eq!(parent.trace_flags().to_u8(), u8::from(sampled), "{flags}");
        }
        for later in ["01", "fe"] {
            for rest in ["", "-", "-more", "-more-and-more"] {
                assert!(parsed(&format!("{later}{}{rest}", &VALID[2..])).is_some());
            }
        }
    }

    #[test]
    fn malformed_traceparent_names_none() {
        for rest in ["-", "-01", "1"] {
            assert_eq!(parsed(&format!("{VALID}{rest}")), None, "{rest}");
        }
        for later in [
            VALID.replacen("00", "ff", 1),
            VALID.replacen("00", "01", 1) + "1",
        ] {
            assert_eq!(parsed(&later), None, "{later}");
        }
        for id in [3..35, 36..52] {
            let mut zero = VALID.to_owned();
            zero.replace_range(id.clone(), &"0".repeat(id.len()));
            assert_eq!(parsed(&zero), None, "{zero}");
        }
        for at in 0..VALID.len() {
            let mut shorter = VALID.to_owned();
            shorter.remove(at);
            assert_eq!(parsed(&shorter), None, "{shorter}");
            for wrong in ["/", ":", "@", "A", "F", "G", "`", "g", "+", " ", "1-"] {
                let mut changed = VALID.to_owned();
                changed.replace_range(at..=at, wrong);
                assert_eq!(parsed(&changed), None, "{changed}");
            }
        }
    }

    fn kept(values: &[&str]) -> String {
        let values = values.iter();
        let headers = values.map(|value| (TRACESTATE, value.parse().unwrap()));
        tracestate(&headers.collect()).map_or(String::new(), |state| state.header())
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
            (&["a==1"], ""),
            (&["a=1", "b=\u{e9}"], ""),
        ] {
            assert_eq!(kept(values), expected, "{values:?}");
        }
    }

    #[test]
    fn tracestate_is_cut_to_whole_members_the_long_ones_first() {
        let members = |lengths: &[usize]| -> Vec<String> {
            let keys = "abcd".chars().zip(lengths);
            keys.map(|(key, length)| format!("{key}={}", "x".repeat(length - 2)))
                .collect()
        };
        let in_two_headers = |members: &[String]| {
            let (one, other) = members.split_at(members.len() / 2);
            kept(&[&one.join(","), &other.join(",")])
        };
        let many: Vec<_> = (0..40).map(|number| format!("k{number}=v")).collect();
        assert_eq!(in_two_headers(&many), many[..32].join(","));
        for (lengths, expected) in [
            // 512 characters with three commas, and three more.
            (&[128, 128, 128, 125][..], &[0, 1, 2, 3][..]),
            (&[128, 128, 128, 128], &[0, 1, 2]),
            (&[200, 120, 250, 10], &[0, 1, 3]),
            (&[7_000, 10], &[1]),
        ] {
            let members = members(lengths);
            let expected: Vec<_> = expected.iter().map(|&at| &*members[at]).collect();
            assert_eq!(in_two_headers(&members), expected.join(","), "{lengths:?}");
        }
    }
}
