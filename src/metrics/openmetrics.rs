//! Converts the exporter's text to OpenMetrics 1.0, and adds exemplars, which the exporter lacks.
//!
//! Must not know: any metric by its name.
//!
//! Sources: <https://prometheus.io/docs/instrumenting/exposition_formats/> and
//! <https://prometheus.io/docs/specs/om/open_metrics_spec/>.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::Key;
use opentelemetry::trace::{SpanContext, SpanId, TraceId};

/// The units that metric names end in.
const UNITS: [&str; 2] = ["seconds", "bytes"];

/// Converts the text format. Families and series keep their order.
pub(super) fn from_text(text: &str, exemplars: &Suffixes) -> String {
    let families = text.split("\n\n");
    families
        .filter_map(|family| convert_family(family, exemplars))
        .chain(["# EOF\n".to_owned()])
        .collect()
}

/// Converts a family: a line with its help text, one with its type, and one for each sample.
fn convert_family(family: &str, exemplars: &Suffixes) -> Option<String> {
    let mut lines = family.lines();
    let (_, help) = lines.next()?.strip_prefix("# HELP ")?.split_once(' ')?;
    let (full_name, kind) = lines.next()?.strip_prefix("# TYPE ")?.split_once(' ')?;
    // A counter's family has the name of its samples without their suffix.
    let name = match full_name.strip_suffix("_total") {
        Some(name) if kind == "counter" => name,
        _ => full_name,
    };
    let mut output = format!("# TYPE {name} {kind}\n");
    // Writing to a string cannot fail, here and below.
    let last_word = name.rsplit('_').next();
    if let Some(unit) = UNITS.iter().find(|unit| last_word == Some(**unit)) {
        let _ = writeln!(output, "# UNIT {name} {unit}");
    }
    let _ = writeln!(output, "# HELP {name} {help}");
    let bucket = format!("{name}_bucket{{");
    for sample in lines {
        let is_bucket = kind == "histogram" && sample.starts_with(&bucket);
        let converted = is_bucket
            .then(|| convert_bucket(sample, exemplars))
            .flatten();
        let _ = writeln!(output, "{}", converted.as_deref().unwrap_or(sample));
    }
    Some(output)
}

/// Writes a bucket's bound, its last label, as a float, and adds the exemplar.
fn convert_bucket(sample: &str, exemplars: &Suffixes) -> Option<String> {
    let (series, value) = sample.rsplit_once(' ')?;
    let (labels, bound) = series.strip_suffix("\"}")?.rsplit_once('"')?;
    let is_whole = bound.bytes().all(|byte| byte.is_ascii_digit());
    let fraction = if is_whole { ".0" } else { "" };
    let series = format!("{labels}\"{bound}{fraction}\"}}");
    let exemplar = exemplars.get(&series).map_or("", String::as_str);
    Some(format!("{series} {value}{exemplar}"))
}

/// The exemplars as text, to append after the value of a bucket, by the bucket's series.
type Suffixes = HashMap<String, String>;

/// The exemplars of every histogram.
pub static EXEMPLARS: LazyLock<Exemplars> = LazyLock::new(Exemplars::default);

/// The last sampled observation in each bucket of each series.
#[derive(Debug, Default)]
pub struct Exemplars(Mutex<HashMap<Key, Vec<Bucket>>>);

#[derive(Debug)]
struct Bucket {
    bound: f64,
    last: Option<Exemplar>,
}

#[derive(Debug)]
struct Exemplar {
    trace: TraceId,
    span: SpanId,
    value: f64,
    at: SystemTime,
}

impl Exemplars {
    /// Older exemplars are not exposed: the tracing system can have dropped their traces.
    const RECENT: Duration = Duration::from_mins(10);

    /// Keeps an observation of a series with these upper bounds, in place of the last exemplar in
    /// its bucket. The histogram must have recorded the observation already.
    pub fn keep(&self, series: &Key, bounds: &[f64], value: f64, span: &SpanContext) {
        let exemplar = Exemplar {
            trace: span.trace_id(),
            span: span.span_id(),
            value,
            at: SystemTime::now(),
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.contains_key(series) {
            let bounds = bounds.iter().copied().chain([f64::INFINITY]);
            let buckets = bounds.map(|bound| Bucket { bound, last: None });
            kept.insert(series.clone(), buckets.collect());
        }
        let mut buckets = kept.get_mut(series).into_iter().flatten();
        if let Some(bucket) = buckets.find(|bucket| value <= bucket.bound) {
            bucket.last = Some(exemplar);
        }
    }

    /// The text to append after each bucket's value.
    pub(super) fn suffixes(&self) -> Suffixes {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut suffixes = Suffixes::new();
        for (series, buckets) in kept.iter() {
            let mut start = format!("{}_bucket{{", series.name());
            for label in series.labels() {
                let _ = write!(start, "{}=\"{}\",", label.key(), label.value());
            }
            for bucket in buckets {
                let Some(exemplar) = bucket.last.as_ref().filter(|last| last.is_recent()) else {
                    continue;
                };
                let bound = if bucket.bound.is_finite() {
                    format!("{:?}", bucket.bound)
                } else {
                    "+Inf".to_owned()
                };
                suffixes.insert(format!("{start}le=\"{bound}\"}}"), exemplar.suffix());
            }
        }
        suffixes
    }
}

impl Exemplar {
    fn is_recent(&self) -> bool {
        self.at.elapsed().is_ok_and(|age| age <= Exemplars::RECENT)
    }

    fn suffix(&self) -> String {
        let at = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (trace, span, value) = (self.trace, self.span, self.value);
        let at = at.as_secs_f64();
        format!(" # {{trace_id=\"{trace}\",span_id=\"{span}\"}} {value} {at:.3}")
    }
}

#[cfg(test)]
mod tests {
    use metrics::Label;
    use opentelemetry::trace::{TraceFlags, TraceState};

    use super::*;

    #[test]
    fn each_bucket_keeps_its_last_exemplar() {
        let exemplars = Exemplars::default();
        let series = Key::from_parts("took_seconds", vec![Label::new("route", "/")]);
        for (value, span) in [(0.5, 1), (0.25, 2), (0.75, 3), (7.0, 4)] {
            exemplars.keep(&series, &[0.5, 1.0], value, &span_context(span));
        }
        let suffixes = exemplars.suffixes();
        let trace = "00000000000000000000000000000009";
        for (bound, span, value) in [("0.5", 2, "0.25"), ("1.0", 3, "0.75"), ("+Inf", 4, "7")] {
            let series = format!("took_seconds_bucket{{route=\"/\",le=\"{bound}\"}}");
            let ids = format!(" # {{trace_id=\"{trace}\",span_id=\"{span:016}\"}} {value} ");
            assert!(suffixes[&series].starts_with(&ids), "{suffixes:?}");
        }
        assert_eq!(suffixes.len(), 3);
    }

    #[test]
    fn old_exemplar_is_not_exposed() {
        let exemplars = Exemplars::default();
        let series = Key::from_name("took_seconds");
        exemplars.keep(&series, &[0.5], 0.25, &span_context(1));
        exemplars.keep(&series, &[0.5], 0.75, &span_context(2));
        let mut kept = exemplars.0.lock().unwrap();
        let old = kept.get_mut(&series).unwrap()[1].last.as_mut().unwrap();
        old.at -= Exemplars::RECENT + Duration::from_secs(1);
        drop(kept);
        let exposed: Vec<_> = exemplars.suffixes().into_keys().collect();
        assert_eq!(exposed, ["took_seconds_bucket{le=\"0.5\"}"]);
    }

    #[test]
    fn bounds_become_floats_and_labels_that_look_like_bounds_stay() {
        for (kind, text, openmetrics) in [
            ("histogram", "a_bucket{le=\"1\"}", "a_bucket{le=\"1.0\"}"),
            (
                "histogram",
                "a_bucket{b=\",le=\",le=\"4096\"}",
                "a_bucket{b=\",le=\",le=\"4096.0\"}",
            ),
            ("histogram", "a_bucket{le=\"0.5\"}", "a_bucket{le=\"0.5\"}"),
            (
                "histogram",
                "a_bucket{le=\"+Inf\"}",
                "a_bucket{le=\"+Inf\"}",
            ),
            ("histogram", "a_sum{style=\"1\"}", "a_sum{style=\"1\"}"),
            ("gauge", "a{b=\",le=\",c=\"1\"}", "a{b=\",le=\",c=\"1\"}"),
            ("gauge", "a{b=\"\\\",le=\\\"1\"}", "a{b=\"\\\",le=\\\"1\"}"),
            ("gauge", "a", "a"),
        ] {
            let text = format!("# HELP a A\n# TYPE a {kind}\n{text} 7\n\n");
            let expected = format!("# TYPE a {kind}\n# HELP a A\n{openmetrics} 7\n# EOF\n");
            assert_eq!(from_text(&text, &Suffixes::new()), expected);
        }
    }

    #[test]
    fn family_is_named_without_the_suffix_of_a_counter_and_has_the_unit_of_its_name() {
        for (kind, text, name, unit) in [
            ("counter", "calls_total", "calls", None),
            (
                "counter",
                "busy_seconds_total",
                "busy_seconds",
                Some("seconds"),
            ),
            ("gauge", "memory_bytes", "memory_bytes", Some("bytes")),
            ("gauge", "wait_milliseconds", "wait_milliseconds", None),
            ("gauge", "grand_total", "grand_total", None),
        ] {
            let unit = unit.map_or(String::new(), |unit| format!("# UNIT {name} {unit}\n"));
            let exported = format!("# HELP {text} A\n# TYPE {text} {kind}\n{text} 7\n\n");
            assert_eq!(
                from_text(&exported, &Suffixes::new()),
                format!("# TYPE {name} {kind}\n{unit}# HELP {name} A\n{text} 7\n# EOF\n"),
            );
        }
    }

    fn span_context(span: u64) -> SpanContext {
        let (trace, span) = (TraceId::from(9), SpanId::from(span));
        let state = TraceState::default();
        SpanContext::new(trace, span, TraceFlags::SAMPLED, false, state)
    }
}
