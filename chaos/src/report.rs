//! The report: what came of every fault, of overload and of hostile clients, beside the goals.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use lab::measure::{Spread, grouped, milliseconds, ratio};
use lab::report::{Goal, Section, table};

use crate::bounds::{Bounds, CONNECTIONS, MAX_CONNECTIONS, POOLED};
use crate::hostile::Hostile;
use crate::overload::{CAPACITY, Overload};
use crate::trial::{LONGEST_STOP, Trial};

/// A fault, whether it could be tried here or not.
#[derive(Clone, Debug)]
pub enum Tried {
    /// What came of it.
    Ran(Box<Trial>),
    /// Its name, and why this machine does not allow it.
    Skipped(&'static str, String),
    /// Its name, and why it could not be tried although the machine allows it.
    Failed(&'static str, String),
}

/// Whoever is refused is refused within this.
const REFUSAL: Duration = Duration::from_millis(5);
/// What an overloaded service answers well, it answers within this.
const ACCEPTED: Duration = Duration::from_millis(250);
/// As soon as that it is as it was before.
const AFTERMATH: Duration = Duration::from_millis(250);
/// Whoever asks for health waits no longer.
const PROBE: Duration = Duration::from_millis(100);
/// A service that starts where all works makes good visits within this.
const BACK: Duration = Duration::from_secs(1);
/// Of a hundred visits of those who mean well, one may take longer, whoever else is there.
const OTHERS: Duration = Duration::from_millis(100);
/// A crowd may cost so much memory, in mebibytes.
const MEMORY: f64 = 64.0;
/// What Compose lets the service have, in mebibytes, whatever anybody does.
const MEMORY_LIMIT: f64 = 512.0;
/// What spans may take of that while no collector takes them, in mebibytes.
const MEMORY_OF_SPANS: f64 = 32.0;
/// Of a connection, in kibibytes.
const MEMORY_USED: f64 = 24.0;
/// As many of these as Compose allows, 4 096, leave a tenth of that limit to the service itself.
const MEMORY_AT_WORST: f64 = 0.9 * MEMORY_LIMIT * 1024.0 / 4096.0;
/// Sessions of the pool.
const SESSIONS: f64 = 4.0;

/// Of every fault.
pub fn faults(tried: &[Tried]) -> Section {
    let trials: Vec<_> = tried
        .iter()
        .filter_map(|tried| match tried {
            Tried::Ran(trial) => Some(&**trial),
            Tried::Skipped(..) | Tried::Failed(..) => None,
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
            "worst good answer",
            "longest answer",
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
                milliseconds(trial.worst_good.as_secs_f64()),
                milliseconds(trial.longest.as_secs_f64()),
                optional(trial.stopped_in),
                optional(trial.back_in),
                optional(trial.stalls.map(|stalls| stalls.sync)),
                optional(trial.stalls.map(|stalls| stalls.wake)),
            ]
        }),
    );
    for tried in tried {
        match tried {
            Tried::Skipped(name, why) => write!(text, "\nSKIPPED: {name}: {why}.\n"),
            Tried::Failed(name, why) => write!(text, "\n**{name}** could not be tried: {why}.\n"),
            Tried::Ran(trial) => trial.complaints.iter().try_for_each(|complaint| {
                write!(text, "\n**{}**: {complaint}.\n", trial.fault.name)
            }),
        }
        .expect("a string takes all");
    }
    Section {
        title: "Faults",
        text,
        goals: goals_of_faults(tried, &trials),
    }
}

fn goals_of_faults(tried: &[Tried], trials: &[&Trial]) -> Vec<Goal> {
    let failed = tried
        .iter()
        .filter(|tried| matches!(tried, Tried::Failed(..)))
        .count();
    let skipped = tried
        .iter()
        .filter(|tried| matches!(tried, Tried::Skipped(..)))
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
            "acknowledged and lost",
            0.0,
            sum(|trial| trial.verdict.lost),
            number,
        ),
        Goal::at_most(
            "duplicated",
            0.0,
            sum(|trial| trial.verdict.duplicated()),
            number,
        ),
        Goal::at_most(
            "out of order",
            0.0,
            sum(|trial| trial.verdict.out_of_order()),
            number,
        ),
        Goal::at_most(
            "longest stop",
            LONGEST_STOP.as_secs_f64(),
            longest(|trial| trial.stopped_in.unwrap_or_default()),
            milliseconds,
        ),
        Goal::at_most(
            "longest start after a stop",
            BACK.as_secs_f64(),
            longest(|trial| trial.back_in.unwrap_or_default()),
            milliseconds,
        ),
        Goal::at_most(
            "what must not be",
            0.0,
            sum(|trial| trial.complaints.len()) + failed as f64,
            number,
        ),
        Goal::at_most("could not be tried here", 0.0, skipped as f64, number),
    ];
    goals.extend(worst_by_limit("wait for an answer", trials, |trial| {
        (
            trial.fault.longest_answer(),
            vec![trial.longest.as_secs_f64()],
        )
    }));
    goals.extend(worst_by_limit("recovery", trials, |trial| {
        (trial.fault.recovery(), trial.recoveries.clone())
    }));
    goals
}

/// The longest of a kind, in seconds, of all trials that have the same limit.
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
/// Of overload.
pub fn overload(overload: &Overload) -> Section {
    let text = format!(
        "As many as can be recorded: {} a second, with {CAPACITY} that may wait and Postgres 20 ms \
         away. Refusals are timed from when they were asked for, visits from when they were due.\n\n{}\n\
         Before: a visit at a time takes {} at worst. In the second after: {}.\n",
        grouped(overload.peak),
        table(
            &[
                "visits that come",
                "a second",
                "recorded a second",
                "of the peak",
                "p99 of a refusal",
                "p99 of a visit",
                "waiting at most",
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
                    grouped(step.deepest),
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
                "overload: recorded, of the peak",
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
                "overload: visits that wait",
                CAPACITY as f64,
                Spread::new(steps().map(|step| step.deepest)).max,
                number,
            ),
            Goal::at_most("overload: memory", MEMORY, memory, mebibytes),
            Goal::at_most("overload: broken visits", 0.0, broken as f64, number),
            Goal::at_least(
                "overload: visits refused in each",
                1.0,
                Spread::new([Spread::new(steps().map(|step| step.refused as f64)).min]),
            ),
            Goal::at_most(
                "overload: the longest visit in the second after it",
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

/// Of hostile clients.
pub fn hostile(hostile: &Hostile) -> Section {
    let mut text = table(
        &[
            "clients",
            "how many",
            "p99 before",
            "p99 beside them",
            "ratio",
            "answered",
            "worst probe",
            "failed probes",
            "connected",
            "cut",
            "their answers",
            "slowest sync before",
            "slowest sync",
        ],
        hostile.damages.iter().map(|damage| {
            let answers = damage.seen.answers.iter();
            let answers: Vec<_> = answers
                .map(|(status, times)| format!("{status} × {}", count(*times)))
                .collect();
            [
                format!("{:?}", damage.attack),
                count(damage.clients),
                spread(&damage.normal_p99),
                spread(&damage.p99),
                ratio(Spread::ratio(&damage.p99, &damage.normal_p99).median),
                ratio(damage.answered),
                milliseconds(damage.probe.as_secs_f64()),
                count(damage.failed_probes),
                count(damage.seen.connected),
                count(damage.seen.cut),
                answers.join(", "),
                milliseconds(damage.normal_stalls.sync.as_secs_f64()),
                milliseconds(damage.stalls.sync.as_secs_f64()),
            ]
        }),
    );
    for complaint in &hostile.complaints {
        write!(text, "\n**{complaint}**\n").expect("a string takes all");
    }
    let worst = hostile
        .damages
        .iter()
        .map(|damage| {
            let ratio = Spread::ratio(&damage.p99, &damage.normal_p99);
            (ratio.median, damage.attack)
        })
        .max_by(|one, other| one.0.total_cmp(&other.0));
    let damages = || hostile.damages.iter();
    let failed: usize = damages().map(|damage| damage.failed_probes).sum();
    let mut goals = vec![
        Goal::at_least(
            "hostile clients: visits of others that were answered",
            0.99,
            Spread::new([Spread::new(damages().map(|damage| damage.answered)).min]),
        ),
        Goal::at_most("hostile clients: failed probes", 0.0, failed as f64, number),
        Goal::at_most(
            "hostile clients: the longest probe",
            PROBE.as_secs_f64(),
            Spread::new(damages().map(|damage| damage.probe.as_secs_f64())).max,
            milliseconds,
        ),
        Goal::at_most(
            "hostile clients: p99 of others in the worst round",
            OTHERS.as_secs_f64(),
            Spread::new(damages().flat_map(|damage| damage.p99.iter().copied())).max,
            milliseconds,
        ),
        Goal::at_most(
            "hostile clients: memory",
            MEMORY_LIMIT,
            hostile.memory.map_or(f64::NAN, |memory| memory.0),
            mebibytes,
        ),
        Goal::at_most(
            "hostile clients: memory of spans that no collector takes",
            MEMORY_OF_SPANS,
            hostile.spans.0,
            mebibytes,
        ),
        Goal::at_most(
            "hostile clients: what must not be",
            0.0,
            hostile.complaints.len() as f64,
            number,
        ),
    ];
    if let Some((worst, attack)) = worst {
        let what = format!("hostile clients: p99 of others, of what it was before ({attack:?})");
        goals.push(Goal::at_most(&what, 2.0, worst, ratio));
    }
    Section {
        title: "Hostile clients",
        text,
        goals,
    }
}

/// Of what the service takes.
pub fn bounds(bounds: &Bounds) -> Section {
    let with = |connections| (bounds.idle_files + POOLED + connections) as f64;
    let rows = [
        ("file descriptors, idle", count(bounds.idle_files)),
        ("with 1 000 connections", count(bounds.busy_files)),
        ("once they are gone", count(bounds.left_files)),
        (
            "where 100 connections may be and 150 come",
            count(bounds.capped_files),
        ),
        (
            "memory of a connection over which nothing was said",
            kibibytes(bounds.memory_silent),
        ),
        ("that has been used", kibibytes(bounds.memory_used)),
        ("that has 31 KiB of a head", kibibytes(bounds.memory_half)),
        (
            "whose answers nobody reads",
            kibibytes(bounds.memory_unread),
        ),
        ("sessions with Postgres under load", count(bounds.sessions)),
    ];
    Section {
        title: "Bounds",
        text: table(
            &["", "measured"],
            rows.map(|(what, figure)| [what.to_owned(), figure]),
        ),
        goals: vec![
            Goal::at_most(
                "descriptors with 1 000 connections",
                with(CONNECTIONS),
                bounds.busy_files as f64,
                number,
            ),
            Goal::at_most(
                "descriptors where 100 connections may be",
                with(MAX_CONNECTIONS),
                bounds.capped_files as f64,
                number,
            ),
            Goal::at_most(
                "descriptors once all are gone",
                with(0),
                bounds.left_files as f64,
                number,
            ),
            Goal::at_most(
                "memory of a connection that has been used",
                MEMORY_USED,
                bounds.memory_used,
                kibibytes,
            ),
            Goal::at_most(
                "memory of a connection that has half a head",
                MEMORY_AT_WORST,
                bounds.memory_half,
                kibibytes,
            ),
            Goal::at_most(
                "memory of a connection whose answers nobody reads",
                MEMORY_AT_WORST,
                bounds.memory_unread,
                kibibytes,
            ),
            Goal::at_most(
                "sessions with Postgres",
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

/// In whole numbers.
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

/// Of seconds.
fn spread(seconds: &[f64]) -> String {
    match seconds {
        [] => "–".to_owned(),
        [one] => milliseconds(*one),
        several => Spread::new(several.iter().copied()).written(milliseconds),
    }
}
