//! A steady breach of either objective is reported in time, at every rate. Generates cases for
//! `promtool`, asks it when each alert fired first and last, and compares. It knows the objectives and
//! the names of their alerts, and not how the rules compute them.
//!
//! `SWEEP=whole` tries all 20 rates instead of a few; `make sweep` prints the results.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Stdio;

use crate::support::prometheus::{installed, rules};

/// Times are in minutes.
const HOUR: u32 = 60;
const DAY: u32 = 24 * HOUR;
const MONTH: u32 = 30 * DAY;

/// The share of the month's budget that can be spent before an alert.
const REPORTED_BY: f64 = 0.2;

/// The share of visits that can be answered 5xx, and of 200s that can be slow.
const FAILED_ALLOWED: f64 = 0.001;
const SLOW_ALLOWED: f64 = 0.01;

/// What the names of an objective's alerts begin with.
const OBJECTIVES: [&str; 2] = ["VisitasAvailability", "VisitasLatency"];

/// Enough visits that no alert needs to wait for more.
const BUSY: Traffic = Traffic {
    name: "600 visits a minute",
    visits: 600,
    scrapes: 2,
    evaluations: 10,
};

/// So few visits that a month's budget is 43 failures. Rules are evaluated every five minutes, the
/// length of the shortest window: otherwise a failure could fall between two windows.
const QUIET: Traffic = Traffic {
    name: "1 visit a minute",
    visits: 1,
    scrapes: 1,
    evaluations: 5,
};

#[test]
#[ignore = "takes long: make faults"]
fn steady_breach_is_reported_before_a_fifth_of_the_budget_is_spent() {
    judge_steady(&BUSY, 3 * DAY, &rates(&[1.1, 5.9, 100.0]));
}

#[test]
#[ignore = "takes long: make faults"]
fn steady_breach_of_few_visits_is_reported_before_a_fifth_of_the_budget_is_spent() {
    judge_steady(&QUIET, 3 * DAY, &rates(&[2.0, 100.0]));
}

/// There is no history before the breach, as after an installation.
#[test]
#[ignore = "takes long: make faults"]
fn breach_from_the_beginning_is_reported_before_a_fifth_of_the_budget_is_spent() {
    judge_steady(&BUSY, 0, &rates(&[1.1, 100.0]));
    judge_steady(&QUIET, 0, &rates(&[20.0]));
}

#[test]
#[ignore = "takes long: make faults"]
fn half_of_what_is_allowed_never_alerts() {
    let days = if whole() { 30 } else { 4 };
    for traffic in [BUSY, QUIET] {
        let case = Case::steady(0.5, 0, days * DAY);
        for firing in firings(&traffic, &[case]) {
            assert!(firing.is_empty(), "{}: {firing:?}", traffic.name);
        }
    }
}

/// An alert ends with its short window, and the evaluation after that.
#[test]
#[ignore = "takes long: make faults"]
fn alerts_end_with_their_burst() {
    let bursts = [
        (100.0, HOUR / 2),
        (20.0, 2 * HOUR),
        (8.0, 7 * HOUR),
        (3.0, 30 * HOUR),
    ];
    let cases = bursts.map(|(rate, breach)| Case {
        rate,
        clean: DAY,
        breach,
        after: 8 * HOUR,
    });
    for (case, firing) in cases.iter().zip(firings(&BUSY, &cases)) {
        for objective in OBJECTIVES {
            assert!(first(&firing, objective).is_some(), "{case:?}: {firing:?}");
        }
        for (alert, times) in &firing {
            let short_window = match alert.split_once("Burn") {
                Some((_, "Fast")) => 5,
                Some((_, "Slow")) => HOUR / 2,
                Some((_, "Steady")) => 6 * HOUR,
                _ => panic!("another alert: {alert}"),
            };
            let end = case.clean + case.breach + short_window + BUSY.evaluations;
            assert!(times.last <= f64::from(end), "{case:?}: {firing:?}");
        }
    }
}

#[test]
#[ignore = "takes long: make faults"]
fn burst_that_spends_one_percent_of_the_budget_never_alerts() {
    let case = Case {
        rate: 100.0,
        clean: DAY,
        breach: MONTH / 100 / 100,
        after: 8 * HOUR,
    };
    let firing = firings(&BUSY, &[case]);
    assert!(firing[0].is_empty(), "{firing:?}");
}

/// Expects an alert for each objective at each rate, and prints the times.
fn judge_steady(traffic: &Traffic, clean: u32, rates: &[f64]) {
    let end = |rate: f64| (f64::from(MONTH) * REPORTED_BY / rate).floor();
    let cases: Vec<_> = rates
        .iter()
        .map(|&rate| Case::steady(rate, clean, whole_minutes(end(rate))))
        .collect();
    let mut late = Vec::new();
    for (case, firing) in cases.iter().zip(firings(traffic, &cases)) {
        for objective in OBJECTIVES {
            let rate = case.rate;
            let Some((alert, minutes)) = first(&firing, objective) else {
                late.push(format!("{objective} at {rate:.2}"));
                continue;
            };
            let minutes = minutes - f64::from(clean);
            let spent = rate * minutes / f64::from(MONTH);
            println!(
                "{}, {clean} min without a breach | {rate:.2} | {alert} | {minutes} min | {:.1} %",
                traffic.name,
                100.0 * spent
            );
            if minutes < 0.0 || spent >= REPORTED_BY {
                late.push(format!("{alert} at {rate:.2}: {minutes} min, {spent}"));
            }
        }
    }
    assert!(late.is_empty(), "{}, {clean}: {late:#?}", traffic.name);
}

/// The alert about this objective that fired first, and when.
fn first<'a>(firing: &'a Firing, objective: &str) -> Option<(&'a str, f64)> {
    firing
        .iter()
        .filter(|(alert, _)| alert.starts_with(objective))
        .map(|(alert, times)| (alert.as_str(), times.first))
        .min_by(|one, other| one.1.total_cmp(&other.1))
}

// --- what is tried ---

#[expect(
    clippy::disallowed_methods,
    reason = "the person who runs the tests chooses how many rates are tried, as with PROPTEST_CASES"
)]
fn whole() -> bool {
    std::env::var("SWEEP").is_ok_and(|sweep| sweep == "whole")
}

/// These rates, or all 20 from 1.1 to 100, each as many times the one before.
fn rates(few: &[f64]) -> Vec<f64> {
    let (lowest, highest, count) = (1.1_f64, 100.0_f64, 20);
    if !whole() {
        return few.to_vec();
    }
    let step = (highest / lowest).powf(1.0 / f64::from(count - 1));
    (0..count).map(|index| lowest * step.powi(index)).collect()
}

/// The number of visits a minute, and the minutes between two scrapes and between two evaluations:
/// longer than in production, so that `promtool` takes seconds for days.
struct Traffic {
    name: &'static str,
    visits: u32,
    scrapes: u32,
    evaluations: u32,
}

/// Minutes without failures, then minutes at a burn rate, then minutes without failures again.
#[derive(Clone, Copy, Debug)]
struct Case {
    rate: f64,
    clean: u32,
    breach: u32,
    after: u32,
}

impl Case {
    fn steady(rate: f64, clean: u32, breach: u32) -> Self {
        let after = 0;
        Self {
            rate,
            clean,
            breach,
            after,
        }
    }

    fn minutes(&self) -> u32 {
        self.clean + self.breach + self.after
    }

    /// The counters at this minute. Failures are whole and evenly spaced.
    fn counters(&self, traffic: &Traffic, minute: u32) -> Counters {
        let visits = |minutes: u32| f64::from(minutes * traffic.visits);
        let breach = visits(minute.saturating_sub(self.clean).min(self.breach));
        let failed = (breach * self.rate * FAILED_ALLOWED).floor();
        let slow = ((breach - failed) * self.rate * SLOW_ALLOWED).floor();
        let ok = visits(minute) - failed;
        Counters {
            ok,
            failed,
            fast: ok - slow,
        }
    }
}

/// 200s, 503s, and the 200s within the objective's time.
struct Counters {
    ok: f64,
    failed: f64,
    fast: f64,
}

// --- promtool ---

/// When each alert fired, by name.
type Firing = BTreeMap<String, Times>;

/// In minutes since the beginning of a case.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    first: f64,
    last: f64,
}

/// When each alert fired, for each case.
///
/// Each expression expects no sample, so `promtool` prints the samples that it got; their labels say
/// which case and question they belong to.
fn firings(traffic: &Traffic, cases: &[Case]) -> Vec<Firing> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("sweep.yml");
    std::fs::write(&file, tests(traffic, cases)).expect("the cases");
    let mut command = installed("promtool");
    let command = command.args(["test", "rules"]).arg(&file);
    let output = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output();
    let output = output.expect("promtool runs");
    let text = String::from_utf8([output.stdout, output.stderr].concat()).expect("UTF-8");
    let mut firings = vec![Firing::new(); cases.len()];
    let mut evaluated = 0;
    for (labels, value) in samples(&text) {
        let label = |name: &str| {
            labels
                .split(&format!("{name}=\""))
                .nth(1)?
                .split('"')
                .next()
        };
        let (Some(case), Some(question)) = (label("case"), label("question")) else {
            continue;
        };
        let case: usize = case.parse().expect("a case");
        if question == "evaluated" {
            evaluated += 1;
            continue;
        }
        let alert = label("alertname").expect("an alert").to_owned();
        let times = firings[case].entry(alert).or_default();
        match question {
            "first" => times.first = value,
            "last" => times.last = value,
            other => panic!("{other} in {text}"),
        }
    }
    assert_eq!(evaluated, cases.len(), "{text}");
    firings
}

/// The samples that `promtool` prints: `{labels} value`.
fn samples(text: &str) -> impl Iterator<Item = (&str, f64)> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("got: "))
        .flat_map(|got| got.split('{').skip(1))
        .map(|sample| {
            let (labels, value) = sample.split_once("} ").expect("labels");
            let value = value.trim_end_matches([',', ' ']).parse().expect("a value");
            (labels, value)
        })
}

/// The file for `promtool`.
fn tests(traffic: &Traffic, cases: &[Case]) -> String {
    let rules = rules().join("objectives.yml");
    let Traffic {
        scrapes,
        evaluations,
        ..
    } = traffic;
    let mut file = format!(
        "rule_files: [{}]\n\
         evaluation_interval: {evaluations}m\n\
         group_eval_order: [visitas_availability, visitas_latency, visitas_objectives_days, visitas_objectives]\n\
         tests:\n",
        rules.display()
    );
    for (index, case) in cases.iter().enumerate() {
        let minutes = case.minutes();
        let values = |counter: fn(Counters) -> f64| {
            let minutes = (0..=minutes / scrapes).map(|scrape| scrape * scrapes);
            let mut values = String::new();
            for minute in minutes {
                write!(values, "{} ", counter(case.counters(traffic, minute))).expect("memory");
            }
            values
        };
        let fired = format!(
            "(timestamp(ALERTS{{alertstate=\"firing\"}})[{minutes}m:{evaluations}m])) / 60"
        );
        let series = [
            (
                "count",
                r#"http_response_status_code="200""#,
                values(|counters| counters.ok),
            ),
            (
                "count",
                r#"http_response_status_code="503""#,
                values(|counters| counters.failed),
            ),
            (
                "bucket",
                r#"http_response_status_code="200", le="0.25""#,
                values(|counters| counters.fast),
            ),
        ];
        let questions = [
            ("evaluated", "vector(1)".to_owned()),
            ("first", format!("min by (alertname) (min_over_time{fired}")),
            ("last", format!("max by (alertname) (max_over_time{fired}")),
        ];
        writeln!(file, "- interval: {scrapes}m\n  input_series:").expect("memory");
        for (kind, labels, values) in series {
            writeln!(
                file,
                "  - series: 'http_server_request_duration_seconds_{kind}{{job=\"visitas\", \
                 instance=\"a\", http_route=\"/\", http_request_method=\"GET\", {labels}}}'\n    \
                 values: '{values}'"
            )
            .expect("memory");
        }
        writeln!(file, "  promql_expr_test:").expect("memory");
        for (question, expression) in questions {
            writeln!(
                file,
                "  - expr: label_replace(label_replace({expression}, \"case\", \"{index}\", \"\", \"\"), \
                 \"question\", \"{question}\", \"\", \"\")\n    eval_time: {minutes}m\n    exp_samples: []"
            )
            .expect("memory");
        }
    }
    file
}

fn whole_minutes(minutes: f64) -> u32 {
    format!("{minutes:.0}").parse().expect("whole minutes")
}
