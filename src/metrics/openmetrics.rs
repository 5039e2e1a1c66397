//! What a scrape is answered with: the exporter's text put in order, or the same in OpenMetrics
//! 1.0 with exemplars, of which the exporter knows nothing.
//!
//! It knows the two formats, and no metric by its name.
//!
//! Sources: <https://prometheus.io/docs/instrumenting/exposition_formats/> and
//! <https://prometheus.io/docs/specs/om/open_metrics_spec/>.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::Key;
use opentelemetry::trace::{SpanContext, SpanId, TraceId};

/// A format that a scraper may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The Prometheus text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The value of `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Writes what the exporter wrote, which comes in any order, in the order of names.
pub(super) fn write(exported: &str, format: Format, exemplars: &Suffixes) -> String {
    let mut families: Vec<Family<'_>> = exported.split("\n\n").filter_map(Family::read).collect();
    families.sort_unstable_by_key(|family| family.name);
    let mut output = String::with_capacity(exported.len() * 5 / 4);
    for family in &families {
        match format {
            Format::Text => family.write_text(&mut output),
            Format::OpenMetrics => family.write_openmetrics(&mut output, exemplars),
        }
    }
    if format == Format::OpenMetrics {
        output.push_str("# EOF\n");
    }
    output
}

/// A metric with its samples, each a line.
struct Family<'a> {
    name: &'a str,
    help: &'a str,
    kind: &'a str,
    samples: Vec<&'a str>,
}

impl<'a> Family<'a> {
    /// Units of which a name may speak, as OpenMetrics has them.
    const UNITS: [&'static str; 2] = ["seconds", "bytes"];

    fn read(block: &'a str) -> Option<Self> {
        let mut lines = block.lines();
        let (_, help) = lines.next()?.strip_prefix("# HELP ")?.split_once(' ')?;
        let (name, kind) = lines.next()?.strip_prefix("# TYPE ")?.split_once(' ')?;
        let mut samples: Vec<_> = lines.collect();
        // The buckets of a series stay in their order.
        samples.sort_by_key(|sample| labels(sample));
        Some(Self {
            name,
            help,
            kind,
            samples,
        })
    }

    fn write_text(&self, output: &mut String) {
        let Self {
            name, help, kind, ..
        } = self;
        // Writing to a string cannot fail, here and below.
        let _ = write!(output, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for sample in &self.samples {
            let _ = writeln!(output, "{sample}");
        }
        output.push('\n');
    }

    fn write_openmetrics(&self, output: &mut String, exemplars: &Suffixes) {
        let Self { help, kind, .. } = self;
        // A counter's family is called as its samples are, without their suffix.
        let name = match self.name.strip_suffix("_total") {
            Some(name) if *kind == "counter" => name,
            _ => self.name,
        };
        let _ = writeln!(output, "# TYPE {name} {kind}");
        let last = name.rsplit('_').next();
        let unit = Self::UNITS.iter().find(|unit| last == Some(**unit));
        if let Some(unit) = unit {
            let _ = writeln!(output, "# UNIT {name} {unit}");
        }
        let _ = writeln!(output, "# HELP {name} {help}");
        for sample in &self.samples {
            let Some((series, value)) = sample.rsplit_once(' ') else {
                continue;
            };
            let series = with_float_bound(series);
            let exemplar = exemplars.get(series.as_ref()).map_or("", String::as_str);
            let _ = writeln!(output, "{series} {value}{exemplar}");
        }
    }
}

/// The labels of a sample, without the bound of a bucket.
fn labels(sample: &str) -> &str {
    let series = sample
        .rsplit_once(' ')
        .map_or(sample, |(series, _value)| series);
    let Some((_, labels)) = series.split_once('{') else {
        return "";
    };
    match split_bound(labels) {
        Some((labels, _bound)) => labels.trim_end_matches(','),
        None => labels.trim_end_matches('}'),
    }
}

/// What precedes the bound of a bucket, which comes last, and the bound. The end of another label's
/// value may look like the beginning of one.
fn split_bound(series: &str) -> Option<(&str, &str)> {
    let (before, bound) = series.strip_suffix("\"}")?.rsplit_once("le=\"")?;
    let is_label = before.is_empty() || before.ends_with(['{', ',']);
    (is_label && !bound.contains('"')).then_some((before, bound))
}

/// A bucket's series with its bound written as a float.
fn with_float_bound(series: &str) -> Cow<'_, str> {
    match split_bound(series) {
        Some((_, bound)) if bound.bytes().all(|byte| byte.is_ascii_digit()) => {
            let start = &series[..series.len() - 2];
            Cow::Owned(format!("{start}.0\"}}"))
        }
        _ => Cow::Borrowed(series),
    }
}

/// What follows the value of a bucket, by the bucket's series.
pub(super) type Suffixes = HashMap<String, String>;

/// The last sampled observation in each bucket of a histogram.
#[derive(Debug)]
pub(super) struct Exemplars {
    bounds: &'static [f64],
    series: Mutex<HashMap<Key, Vec<Option<Exemplar>>>>,
}

#[derive(Debug, Clone)]
struct Exemplar {
    trace: TraceId,
    span: SpanId,
    value: f64,
    at: SystemTime,
}

impl Exemplars {
    /// An exemplar that is older is not told of: its trace may be forgotten by now.
    const RECENT: Duration = Duration::from_mins(10);

    /// None yet, for a histogram with these upper bounds.
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            series: Mutex::default(),
        }
    }

    /// Keeps an observation that a series has recorded, in place of the last one in its bucket.
    pub(super) fn keep(&self, series: &Key, value: f64, span: &SpanContext) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        let exemplar = Exemplar {
            trace: span.trace_id(),
            span: span.span_id(),
            value,
            at: SystemTime::now(),
        };
        let mut kept = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buckets) = kept.get_mut(series) {
            buckets[bucket] = Some(exemplar);
        } else {
            let mut buckets = vec![None; self.bounds.len() + 1];
            buckets[bucket] = Some(exemplar);
            kept.insert(series.clone(), buckets);
        }
    }

    /// What follows each bucket's value. Taken before the exporter renders, so that no bucket has
    /// an exemplar that it has not counted.
    pub(super) fn suffixes(&self) -> Suffixes {
        let kept = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let mut suffixes = Suffixes::new();
        for (series, buckets) in kept.iter() {
            let mut start = format!("{}_bucket{{", series.name());
            for label in series.labels() {
                let _ = write!(start, "{}=\"{}\",", label.key(), label.value());
            }
            for (bucket, exemplar) in buckets.iter().enumerate() {
                let Some(exemplar) = exemplar.as_ref().filter(|kept| kept.is_recent()) else {
                    continue;
                };
                let bound = match self.bounds.get(bucket) {
                    Some(bound) => Cow::Owned(format!("{bound:?}")),
                    None => Cow::Borrowed("+Inf"),
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
    use metrics::{Label, Unit};
    use metrics_exporter_prometheus::PrometheusBuilder;
    use opentelemetry::trace::{TraceFlags, TraceState};
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::property::bounded;

    #[test]
    fn each_bucket_keeps_its_last_exemplar() {
        let exemplars = Exemplars::new(&[0.5, 1.0]);
        let series = Key::from_parts("took_seconds", vec![Label::new("route", "/")]);
        for (value, span) in [(0.5, 1), (0.25, 2), (0.75, 3), (7.0, 4)] {
            exemplars.keep(&series, value, &span_context(span));
        }
        let suffixes = exemplars.suffixes();
        let of = |bound: &str| {
            let series = format!("took_seconds_bucket{{route=\"/\",le=\"{bound}\"}}");
            suffixes[&series].clone()
        };
        let trace = "00000000000000000000000000000009";
        for (bound, span, value) in [("0.5", 2, "0.25"), ("1.0", 3, "0.75"), ("+Inf", 4, "7")] {
            let ids = format!(" # {{trace_id=\"{trace}\",span_id=\"{span:016}\"}} {value} ");
            assert!(of(bound).starts_with(&ids), "{}", of(bound));
        }
        assert_eq!(suffixes.len(), 3);
    }

    #[test]
    fn old_exemplar_is_not_told_of() {
        let exemplars = Exemplars::new(&[0.5]);
        let series = Key::from_name("took_seconds");
        exemplars.keep(&series, 0.25, &span_context(1));
        exemplars.keep(&series, 0.75, &span_context(2));
        let mut kept = exemplars.series.lock().unwrap();
        let old = kept.get_mut(&series).unwrap()[1].as_mut().unwrap();
        old.at -= Exemplars::RECENT + Duration::from_secs(1);
        drop(kept);
        let told: Vec<_> = exemplars.suffixes().into_keys().collect();
        assert_eq!(told, ["took_seconds_bucket{le=\"0.5\"}"]);
    }

    #[test]
    fn only_bounds_that_are_whole_numbers_change() {
        for (text, openmetrics) in [
            ("a_bucket{le=\"1\"}", "a_bucket{le=\"1.0\"}"),
            (
                "a_bucket{b=\"c\",le=\"4096\"}",
                "a_bucket{b=\"c\",le=\"4096.0\"}",
            ),
            ("a_bucket{le=\"0.5\"}", "a_bucket{le=\"0.5\"}"),
            ("a_bucket{le=\"+Inf\"}", "a_bucket{le=\"+Inf\"}"),
            ("a{style=\"1\"}", "a{style=\"1\"}"),
            ("a{b=\",le=\",c=\"1\"}", "a{b=\",le=\",c=\"1\"}"),
            ("a", "a"),
        ] {
            assert_eq!(with_float_bound(text), openmetrics);
        }
    }

    #[test]
    fn families_and_series_are_in_order_and_buckets_stay_in_theirs() {
        let exported = "# HELP b B\n# TYPE b histogram\nb_bucket{x=\"2\",le=\"1\"} 0\n\
            b_bucket{x=\"2\",le=\"+Inf\"} 0\nb_sum{x=\"2\"} 0\nb_bucket{x=\"1\",le=\"1\"} 0\n\
            b_bucket{x=\"1\",le=\"+Inf\"} 0\nb_sum{x=\"1\"} 0\n\n\
            # HELP a A\n# TYPE a gauge\na 1\n\n";
        let text = write(exported, Format::Text, &Suffixes::new());
        let series: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let b = "b_bucket{x=\"1\",le=\"1\"} 0|b_bucket{x=\"1\",le=\"+Inf\"} 0|b_sum{x=\"1\"} 0|\
            b_bucket{x=\"2\",le=\"1\"} 0|b_bucket{x=\"2\",le=\"+Inf\"} 0|b_sum{x=\"2\"} 0";
        assert_eq!(series.join("|"), format!("a 1||{b}|"));
    }

    /// Values of labels, with a liking for what the formats are made of.
    fn value() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            select(PIECES.split('|').collect::<Vec<_>>()).prop_map(str::to_owned),
            any::<char>().prop_map(String::from),
        ];
        prop_oneof![
            // With the quote behind it this looks like the beginning of a bound.
            Just(",le=".to_owned()),
            select(PIECES.split('|').collect::<Vec<_>>()).prop_map(str::to_owned),
            prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat()),
        ]
    }

    const PIECES: &str = ",le=|le=\"|le|1|\"|\\|\n|\r|{|}|,|=| |#|a";

    /// A metric's name, its kind and its unit.
    const METRICS: &[(&str, &str, Unit)] = &[
        ("calls_total", "counter", Unit::Count),
        ("busy_seconds_total", "counter", Unit::Seconds),
        ("took_seconds", "histogram", Unit::Seconds),
        ("batch_size", "histogram", Unit::Count),
        ("memory_bytes", "gauge", Unit::Bytes),
        ("wait_milliseconds", "gauge", Unit::Milliseconds),
        ("grand_total", "gauge", Unit::Count),
    ];

    /// What the exporter makes of metrics with any help texts and labels.
    fn exported() -> impl Strategy<Value = String> {
        let labels = prop::collection::btree_map(select(&["a", "file"][..]), value(), 0..3);
        let series = (select(METRICS), labels, 0..9_000_u32);
        (prop::collection::vec(series, 0..12), value()).prop_map(|(all, help)| {
            let builder = PrometheusBuilder::new().with_recommended_naming(true);
            let builder = builder.set_buckets(&[0.5, 1.0, 4096.0]).expect("bounds");
            let recorder = builder.build_recorder();
            metrics::with_local_recorder(&recorder, || {
                for ((name, kind, unit), labels, value) in all {
                    let value = f64::from(value) / 2.0;
                    let labels: Vec<_> = labels
                        .into_iter()
                        .map(|(key, value)| Label::new(key, value))
                        .collect();
                    match kind {
                        "counter" => {
                            metrics::describe_counter!(name, unit, help.clone());
                            metrics::counter!(name, labels).increment(2);
                        }
                        "gauge" => {
                            metrics::describe_gauge!(name, unit, help.clone());
                            metrics::gauge!(name, labels).set(value);
                        }
                        _ => {
                            metrics::describe_histogram!(name, unit, help.clone());
                            metrics::histogram!(name, labels).record(value);
                        }
                    }
                }
            });
            recorder.handle().render()
        })
    }

    type Labels = Vec<(String, String)>;

    /// A sample by the grammar of the formats: its name, its labels as they are meant, its value.
    fn sample(line: &str) -> Option<(&str, Labels, f64)> {
        let (name, mut rest) = line.split_at(line.find(['{', ' '])?);
        let mut labels = Labels::new();
        if let Some(first) = rest.strip_prefix('{') {
            rest = first;
            while !rest.starts_with('}') {
                let (key, quoted) = rest.split_once("=\"")?;
                let is_key = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                key.bytes().all(is_key).then_some(())?;
                let mut value = String::new();
                let mut characters = quoted.chars();
                loop {
                    match characters.next()? {
                        '"' => break,
                        '\\' => match characters.next()? {
                            'n' => value.push('\n'),
                            escaped @ ('\\' | '"') => value.push(escaped),
                            _ => return None,
                        },
                        plain => value.push(plain),
                    }
                }
                if key == "le" {
                    value = format!("{:?}", value.parse::<f64>().ok()?);
                }
                labels.push((key.to_owned(), value));
                rest = characters.as_str();
                rest = rest.strip_prefix(',').unwrap_or(rest);
            }
            rest = &rest[1..];
        }
        Some((name, labels, rest.strip_prefix(' ')?.parse().ok()?))
    }

    /// Every sample, in an order of its own. Fails where a line is none that a format has.
    fn samples(exposition: &str) -> Result<Vec<String>, TestCaseError> {
        let lines = exposition
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| {
            let sample = sample(line).map(|sample| format!("{sample:?}"));
            sample.ok_or_else(|| TestCaseError::fail(format!("no sample: {line:?}")))
        });
        let mut samples: Vec<_> = samples.collect::<Result<_, _>>()?;
        samples.sort_unstable();
        Ok(samples)
    }

    /// Each family's name, kind, unit and samples' lines.
    fn families(exposition: &str) -> Vec<(&str, &str, Option<&str>, Vec<&str>)> {
        let mut families: Vec<(&str, &str, Option<&str>, Vec<&str>)> = Vec::new();
        for line in exposition.lines() {
            let (word, rest) = line.split_at(line.len().min(7));
            match (word, families.last_mut()) {
                ("# TYPE ", _) => {
                    let (name, kind) = rest.split_once(' ').expect("a name and a kind");
                    families.push((name, kind, None, Vec::new()));
                }
                ("# UNIT ", Some(family)) => family.2 = rest.split(' ').next_back(),
                (_, Some(family)) if !line.starts_with('#') && !line.is_empty() => {
                    family.3.push(line);
                }
                _ => {}
            }
        }
        families
    }

    /// The labels that a series has beside the bound of a bucket.
    fn series(line: &str) -> Labels {
        let (_, mut labels, _) = sample(line).expect("a sample");
        labels.retain(|(key, _)| key != "le");
        labels
    }

    proptest! {
        #![proptest_config(bounded())]

        #[test]
        fn every_sample_is_kept_as_it_was_meant(exported in exported()) {
            let before = samples(&exported)?;
            for format in [Format::Text, Format::OpenMetrics] {
                let written = write(&exported, format, &Suffixes::new());
                prop_assert_eq!(&samples(&written)?, &before, "{}", written);
            }
        }

        #[test]
        fn series_of_a_family_stand_together(exported in exported()) {
            for format in [Format::Text, Format::OpenMetrics] {
                let written = write(&exported, format, &Suffixes::new());
                for (_, _, _, lines) in families(&written) {
                    let mut all: Vec<_> = lines.iter().map(|line| series(line)).collect();
                    all.dedup();
                    let apart = all.len();
                    all.sort_unstable();
                    all.dedup();
                    prop_assert_eq!(all.len(), apart, "{}", written);
                }
            }
        }

        #[test]
        fn openmetrics_names_samples_and_units_after_their_family(exported in exported()) {
            let written = write(&exported, Format::OpenMetrics, &Suffixes::new());
            prop_assert!(written.ends_with("# EOF\n"));
            for (name, kind, unit, lines) in families(&written) {
                let suffixes: &[&str] = match kind {
                    "counter" => &["_total"],
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                for line in lines {
                    let (full, _, _) = sample(line).expect("a sample");
                    let suffix = full.strip_prefix(name);
                    prop_assert!(suffix.is_some_and(|suffix| suffixes.contains(&suffix)), "{line}");
                }
                let is_last = |unit: &str| name.ends_with(&format!("_{unit}"));
                prop_assert!(unit.is_none_or(is_last), "{written}");
            }
        }

        #[test]
        fn exemplar_stands_behind_the_first_bucket_that_holds_it(
            route in "[ !#-\\[\\]-~]{0,12}", took in prop_oneof![select(&[1, 2, 8192][..]), 0..9_000_u32],
        ) {
            let bounds = &[0.5, 1.0, 4096.0];
            let (took, labels) = (f64::from(took) / 2.0, vec![Label::new("http_route", route)]);
            let builder = PrometheusBuilder::new().set_buckets(bounds).expect("bounds");
            let recorder = builder.build_recorder();
            let exemplars = Exemplars::new(bounds);
            metrics::with_local_recorder(&recorder, || {
                metrics::describe_histogram!("took_seconds", "Time.");
                metrics::histogram!("took_seconds", labels.clone()).record(took);
            });
            let key = Key::from_parts("took_seconds", labels);
            exemplars.keep(&key, took, &span_context(7));
            let exported = recorder.handle().render();
            let written = write(&exported, Format::OpenMetrics, &exemplars.suffixes());
            let told: Vec<_> = written.lines().filter(|line| line.contains(" # {trace_id=")).collect();
            let counted = |line: &&str| line.contains("_bucket{") && !line.ends_with("} 0");
            prop_assert_eq!(&told, &Vec::from_iter(written.lines().find(counted)), "{}", written);
            prop_assert!(told[0].contains(&format!("\"}} {took} ")), "{written}");
        }
    }

    fn span_context(span: u64) -> SpanContext {
        let trace = TraceId::from(9);
        let span = SpanId::from(span);
        SpanContext::new(
            trace,
            span,
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        )
    }
}
