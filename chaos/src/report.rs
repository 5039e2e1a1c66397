//! The report: the results of every fault, of overload and of hostile clients, with the goals.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use lab::measure::{Spread, grouped, milliseconds, ratio};
use lab::report::{Goal, Section, table};

use crate::bounds::{Bounds, CONNECTIONS, MAX_CONNECTIONS, POOLED};
use crate::hostile::Hostile;
use crate::overload::{CAPACITY, DISTANCE, Overload};
use crate::trial::{LONGEST_STOP, Trial};

/// The result of one fault.
#[derive(Clone, Debug)]
pub enum FaultResult {
    /// The fault was tested.
    Completed(Box<Trial>),
    /// The fault's name, and why this machine cannot test it.
    Skipped(&'static str, String),
    /// The fault's name, and the error that prevented the test.
    Failed(&'static str, String),
}

/// Maximum p99 of a refusal under overload.
const REFUSAL: Duration = Duration::from_millis(5);
/// Maximum p99 of a recorded visit under overload.
const ACCEPTED: Duration = Duration::from_millis(250);
/// Maximum response in the second after overload.
const AFTERMATH: Duration = Duration::from_millis(250);
/// Maximum response to a health probe during an attack.
const PROBE: Duration = Duration::from_millis(100);
/// Maximum time from a service's start to its first complete visit, with both stores working.
const BACK: Duration = Duration::from_secs(1);
/// Maximum p99 of regular clients during an attack.
const REGULAR_P99: Duration = Duration::from_millis(100);
/// Maximum memory growth under overload, in mebibytes.
const MEMORY: f64 = 64.0;
/// The service's memory limit in Compose, in mebibytes.
const MEMORY_LIMIT: f64 = 512.0;
/// Maximum memory of queued spans while the collector does not respond, in mebibytes.
const MEMORY_OF_SPANS: f64 = 32.0;
/// Maximum memory of a used connection, in kibibytes.
const MEMORY_USED: f64 = 24.0;
/// Maximum memory of a hostile connection, in kibibytes. Compose allows 4 096 connections; they
/// must leave a tenth of the memory limit to the service itself.
const MEMORY_AT_WORST: f64 = 0.9 * MEMORY_LIMIT * 1024.0 / 4096.0;
/// Maximum sessions of the pool.
const SESSIONS: f64 = 4.0;

/// The section on faults.
pub fn faults(results: &[FaultResult]) -> Section {
    let trials: Vec<_> = results
        .iter()
        .filter_map(|result| match result {
            FaultResult::Completed(trial) => Some(&**trial),
            FaultResult::Skipped(..) | FaultResult::Failed(..) => None,
        })
        .collect();
    let mut text = table(
        &[
            "fault",
            "times",
            "acknowledged",
            "lost",
            "duplicated",
            "out of order",
            "in doubt",
            "first error",
            "recovery",
            "longest acknowledged",
            "longest response",
            "stop",
            "start",
            "slowest sync",
            "latest wake",
        ],
        trials.iter().map(|trial| {
            [
                trial.fault.name.to_owned(),
                trial.repetitions.to_string(),
                count(trial.verdict.recorded),
                count(trial.verdict.lost),
                count(trial.verdict.duplicated()),
                count(trial.verdict.out_of_order()),
                count(trial.verdict.in_doubt),
                spread(&trial.first_errors),
                spread(&trial.recoveries),
                milliseconds(trial.longest_recorded.as_secs_f64()),
                milliseconds(trial.longest.as_secs_f64()),
                optional(trial.time_to_stop),
                optional(trial.time_to_start),
                optional(trial.stalls.map(|stalls| stalls.sync)),
                optional(trial.stalls.map(|stalls| stalls.wake)),
            ]
        }),
    );
    for result in results {
        match result {
            FaultResult::Skipped(name, why) => write!(text, "\nSKIPPED: {name}: {why}.\n"),
            FaultResult::Failed(name, why) => {
                write!(text, "\n**{name}** could not be tested: {why}.\n")
            }
            FaultResult::Completed(trial) => trial.violations.iter().try_for_each(|violation| {
                write!(text, "\n**{}**: {violation}.\n", trial.fault.name)
            }),
        }
        .expect("writing to a string succeeds");
    }
    Section {
        title: "Faults",
        text,
        goals: goals_of_faults(results, &trials),
    }
}

fn goals_of_faults(results: &[FaultResult], trials: &[&Trial]) -> Vec<Goal> {
    let failed = results
        .iter()
        .filter(|result| matches!(result, FaultResult::Failed(..)))
        .count();
    let skipped = results
        .iter()
        .filter(|result| matches!(result, FaultResult::Skipped(..)))
        .count();
    let sum = |figure: fn(&Trial) -> usize| {
        let sum: usize = trials.iter().map(|trial| figure(trial)).sum();
        sum as f64
    };
    let longest = |figure: fn(&Trial) -> Duration| {
        let longest = trials.iter().map(|trial| figure(trial)).max();
        longest.unwrap_or_default().as_secs_f64()
    };
    let mut goals = vec![
        Goal::at_most(
            "acknowledged visits lost",
            0.0,
            sum(|trial| trial.verdict.lost),
            number,
        ),
        Goal::at_most(
            "duplicated numbers",
            0.0,
            sum(|trial| trial.verdict.duplicated()),
            number,
        ),
        Goal::at_most(
            "visits out of order",
            0.0,
            sum(|trial| trial.verdict.out_of_order()),
            number,
        ),
        Goal::at_most(
            "longest stop",
            LONGEST_STOP.as_secs_f64(),
            longest(|trial| trial.time_to_stop.unwrap_or_default()),
            milliseconds,
        ),
        Goal::at_most(
            "longest start after a stop",
            BACK.as_secs_f64(),
            longest(|trial| trial.time_to_start.unwrap_or_default()),
            milliseconds,
        ),
        Goal::at_most(
            "invariant violations",
            0.0,
            sum(|trial| trial.violations.len()) + failed as f64,
            number,
        ),
        Goal::at_most(
            "faults skipped on this machine",
            0.0,
            skipped as f64,
            number,
        ),
    ];
    goals.extend(worst_by_limit("response", trials, |trial| {
        (
            trial.fault.longest_response(),
            vec![trial.longest.as_secs_f64()],
        )
    }));
    goals.extend(worst_by_limit("recovery", trials, |trial| {
        (trial.fault.recovery(), trial.recoveries.clone())
    }));
    goals
}

/// The longest figure, in seconds, of all trials with the same limit.
fn worst_by_limit(
    what: &str,
    trials: &[&Trial],
    figures: fn(&Trial) -> (Duration, Vec<f64>),
) -> Vec<Goal> {
    let mut worst = BTreeMap::<Duration, (f64, &str)>::new();
    for trial in trials {
        let (limit, figures) = figures(trial);
        for figure in figures {
            let worst = worst.entry(limit).or_insert((figure, trial.fault.name));
            if figure > worst.0 {
                *worst = (figure, trial.fault.name);
            }
        }
    }
    let goal = |(limit, (worst, name)): (Duration, (f64, &str))| {
        let what = format!("longest {what} ({name})");
        Goal::at_most(&what, limit.as_secs_f64(), worst, milliseconds)
    };
    worst.into_iter().map(goal).collect()
}

/// The section on overload.
pub fn overload(overload: &Overload) -> Section {
    let text = format!(
        "Peak rate: {} recorded visits per second, with a queue of {CAPACITY} and {} ms to Postgres and back. \
         Refusals are timed from when they were sent, visits from when they were due.\n\n{}\n\
         Longest visit of a lone client before the overload: {}. In the second after: {}.\n",
        grouped(overload.peak),
        2 * DISTANCE.as_millis(),
        table(
            &[
                "offered load",
                "offered per second",
                "recorded per second",
                "share of the peak",
                "p99 of a refusal",
                "p99 of a visit",
                "deepest queue",
                "broken",
            ],
            overload.steps.iter().map(|step| {
                [
                    format!("{} times the peak", step.factor),
                    grouped(step.offered),
                    grouped(step.goodput),
                    ratio(step.goodput / overload.peak),
                    milliseconds(step.refusal_p99.as_secs_f64()),
                    milliseconds(step.accepted_p99.as_secs_f64()),
                    grouped(step.max_queue_depth),
                    count(step.broken),
                ]
            }),
        ),
        milliseconds(overload.normal.as_secs_f64()),
        milliseconds(overload.aftermath.as_secs_f64()),
    );
    let steps = || overload.steps.iter();
    let lowest = Spread::new(steps().map(|step| step.goodput / overload.peak)).min;
    let longest = |figure: fn(&crate::overload::Step) -> Duration| {
        steps().map(figure).max().unwrap_or_default().as_secs_f64()
    };
    let (before, most) = overload.memory;
    let memory = before
        .zip(most)
        .map_or(f64::NAN, |(before, most)| most.0 - before.0);
    let broken: usize = steps().map(|step| step.broken).sum();
    Section {
        title: "Overload",
        text,
        goals: vec![
            Goal::at_least(
                "overload: recorded share of the peak",
                0.9,
                Spread::new([lowest]),
            ),
            Goal::at_most(
                "overload: p99 of a refusal",
                REFUSAL.as_secs_f64(),
                longest(|step| step.refusal_p99),
                milliseconds,
            ),
            Goal::at_most(
                "overload: p99 of a visit",
                ACCEPTED.as_secs_f64(),
                longest(|step| step.accepted_p99),
                milliseconds,
            ),
            Goal::at_most(
                "overload: queue depth",
                CAPACITY as f64,
                Spread::new(steps().map(|step| step.max_queue_depth)).max,
                number,
            ),
            Goal::at_most("overload: memory growth", MEMORY, memory, mebibytes),
            Goal::at_most("overload: broken visits", 0.0, broken as f64, number),
            Goal::at_least(
                "overload: visits refused in each step",
                1.0,
                Spread::new([Spread::new(steps().map(|step| step.refused as f64)).min]),
            ),
            Goal::at_most(
                "overload: longest visit in the second after",
                AFTERMATH.as_secs_f64(),
                overload.aftermath.as_secs_f64(),
                milliseconds,
            ),
            Goal::at_most(
                "overload: recovery",
                0.25,
                overload
                    .recovery
                    .map_or(f64::NAN, |took| took.as_secs_f64()),
                milliseconds,
            ),
        ],
    }
}

/// The section on hostile clients.
pub fn hostile(hostile: &Hostile) -> Section {
    let mut text = table(
        &[
            "attack",
            "clients",
            "p99 before",
            "p99 during the attack",
            "ratio",
            "responses / due",
            "longest probe",
            "failed probes",
            "connections",
            "closed early",
            "responses",
            "slowest sync before",
            "slowest sync",
        ],
        hostile.attacks.iter().map(|result| {
            let responses = result.counts.responses.iter();
            let responses: Vec<_> = responses
                .map(|(status, times)| format!("{status} × {}", count(*times)))
                .collect();
            [
                format!("{:?}", result.attack),
                count(result.clients),
                spread(&result.normal_p99),
                spread(&result.p99),
                ratio(Spread::ratio(&result.p99, &result.normal_p99).median),
                ratio(result.responded),
                milliseconds(result.probe.as_secs_f64()),
                count(result.failed_probes),
                count(result.counts.connected),
                count(result.counts.closed_early),
                responses.join(", "),
                milliseconds(result.normal_stalls.sync.as_secs_f64()),
                milliseconds(result.stalls.sync.as_secs_f64()),
            ]
        }),
    );
    for violation in &hostile.violations {
        write!(text, "\n**{violation}**\n").expect("writing to a string succeeds");
    }
    let worst = hostile
        .attacks
        .iter()
        .map(|result| {
            let ratio = Spread::ratio(&result.p99, &result.normal_p99);
            (ratio.median, result.attack)
        })
        .max_by(|one, other| one.0.total_cmp(&other.0));
    let attacks = || hostile.attacks.iter();
    let failed: usize = attacks().map(|result| result.failed_probes).sum();
    let mut goals = vec![
        Goal::at_least(
            "hostile clients: share of regular visits with a response",
            0.99,
            Spread::new([Spread::new(attacks().map(|result| result.responded)).min]),
        ),
        Goal::at_most("hostile clients: failed probes", 0.0, failed as f64, number),
        Goal::at_most(
            "hostile clients: longest probe",
            PROBE.as_secs_f64(),
            Spread::new(attacks().map(|result| result.probe.as_secs_f64())).max,
            milliseconds,
        ),
        Goal::at_most(
            "hostile clients: p99 of regular clients in the worst round",
            REGULAR_P99.as_secs_f64(),
            Spread::new(attacks().flat_map(|result| result.p99.iter().copied())).max,
            milliseconds,
        ),
        Goal::at_most(
            "hostile clients: memory",
            MEMORY_LIMIT,
            hostile.memory.map_or(f64::NAN, |memory| memory.0),
            mebibytes,
        ),
        Goal::at_most(
            "hostile clients: memory of queued spans",
            MEMORY_OF_SPANS,
            hostile.spans.0,
            mebibytes,
        ),
        Goal::at_most(
            "hostile clients: invariant violations",
            0.0,
            hostile.violations.len() as f64,
            number,
        ),
    ];
    if let Some((worst, attack)) = worst {
        let what = format!("hostile clients: p99 of regular clients, against before ({attack:?})");
        goals.push(Goal::at_most(&what, 2.0, worst, ratio));
    }
    Section {
        title: "Hostile clients",
        text,
        goals,
    }
}

/// The section on resource use.
pub fn bounds(bounds: &Bounds) -> Section {
    let with = |connections| (bounds.idle_files + POOLED + connections) as f64;
    let rows = [
        ("file descriptors, idle", count(bounds.idle_files)),
        (
            "file descriptors with 1 000 open connections",
            count(bounds.busy_files),
        ),
        (
            "file descriptors after they have closed",
            count(bounds.left_files),
        ),
        (
            "file descriptors with 150 clients and a limit of 100",
            count(bounds.capped_files),
        ),
        (
            "memory of a connection without a request",
            kibibytes(bounds.memory_silent),
        ),
        (
            "memory of a connection after a request",
            kibibytes(bounds.memory_used),
        ),
        (
            "memory of a connection with 31 KiB of unfinished headers",
            kibibytes(bounds.memory_half),
        ),
        (
            "memory of a connection with unread responses",
            kibibytes(bounds.memory_unread),
        ),
        ("Postgres sessions under load", count(bounds.sessions)),
    ];
    Section {
        title: "Bounds",
        text: table(
            &["", "measured"],
            rows.map(|(what, figure)| [what.to_owned(), figure]),
        ),
        goals: vec![
            Goal::at_most(
                "file descriptors with 1 000 connections",
                with(CONNECTIONS),
                bounds.busy_files as f64,
                number,
            ),
            Goal::at_most(
                "file descriptors with a limit of 100 connections",
                with(MAX_CONNECTIONS),
                bounds.capped_files as f64,
                number,
            ),
            Goal::at_most(
                "file descriptors after all have closed",
                with(0),
                bounds.left_files as f64,
                number,
            ),
            Goal::at_most(
                "memory of a connection after a request",
                MEMORY_USED,
                bounds.memory_used,
                kibibytes,
            ),
            Goal::at_most(
                "memory of a connection with unfinished headers",
                MEMORY_AT_WORST,
                bounds.memory_half,
                kibibytes,
            ),
            Goal::at_most(
                "memory of a connection with unread responses",
                MEMORY_AT_WORST,
                bounds.memory_unread,
                kibibytes,
            ),
            Goal::at_most(
                "Postgres sessions",
                SESSIONS,
                bounds.sessions as f64,
                number,
            ),
        ],
    }
}

fn count(number: usize) -> String {
    grouped(number as f64)
}

/// Formats a whole number.
fn number(number: f64) -> String {
    grouped(number.round())
}

fn mebibytes(number: f64) -> String {
    format!("{number:.1} MiB")
}

fn kibibytes(number: f64) -> String {
    format!("{number:.1} KiB")
}

fn optional(took: Option<Duration>) -> String {
    took.map_or_else(|| "–".to_owned(), |took| milliseconds(took.as_secs_f64()))
}

/// Formats one or several durations in seconds.
fn spread(seconds: &[f64]) -> String {
    match seconds {
        [] => "–".to_owned(),
        [one] => milliseconds(*one),
        several => Spread::new(several.iter().copied()).format_with(milliseconds),
    }
}
