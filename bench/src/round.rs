//! Rounds: each case is measured once a round, so that what the machine does meanwhile meets all
//! of them alike. Each time the subject is started, warmed up, measured, checked and stopped.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use lab::measure::{Mebibytes, Spread, grouped, milliseconds, ratio};
use lab::report::table;

use crate::ground::Ground;
use crate::load;
use crate::progress;
use crate::subject::{Running, Subject, Traces};

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) warmup: Duration,
    pub(crate) duration: Duration,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) subject: Subject,
    pub(crate) connections: usize,
    /// In the table at the start.
    pub(crate) rows: u64,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) load: load::Load,
    pub(crate) memory: Option<Mebibytes>,
    /// The share of visits whose span did not arrive, where each has one.
    pub(crate) lost: Option<f64>,
}

/// A case, a sample a round.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) case: Case,
    pub(crate) samples: Vec<Sample>,
}

/// Measures all cases, round by round, there and back.
pub(crate) fn interleaved(
    ground: &mut Ground,
    cases: &[Case],
    effort: Effort,
) -> Result<Vec<Series>> {
    let mut all: Vec<_> = cases
        .iter()
        .map(|&case| Series {
            case,
            samples: Vec::new(),
        })
        .collect();
    for round in 1..=effort.rounds {
        let mut turn: Vec<_> = all.iter_mut().collect();
        if round % 2 == 0 {
            turn.reverse();
        }
        for series in turn {
            let sample = measure(ground, series.case, effort)?;
            progress!(
                "round {round} of {}: {}: {}/s",
                effort.rounds,
                series.case,
                grouped(sample.load.throughput)
            );
            series.samples.push(sample);
        }
    }
    Ok(all)
}

fn measure(ground: &mut Ground, case: Case, effort: Effort) -> Result<Sample> {
    let Some(owner) = case.subject.owner() else {
        let running = case.subject.start(ground, "")?;
        warm_up(&running, case.connections, effort)?;
        return Ok(Sample {
            load: load::run(running.address, case.connections, effort.duration)?,
            memory: running.process.peak_memory(),
            lost: None,
        });
    };
    let database = ground.database(owner, case.rows)?;
    let traced = case.subject == Subject::Visitas(Traces::All);
    let before = if traced { ground.rows(&database)? } else { 0 };
    ground.collector.take_server_spans();

    let mut running = case.subject.start(ground, &database)?;
    warm_up(&running, case.connections, effort)?;
    let load = load::run(running.address, case.connections, case.duration(effort))?;
    let memory = match case.subject {
        // What is seen is its first process, which serves nothing.
        Subject::Flask => None,
        _ => running.process.peak_memory(),
    };
    if let Subject::Visitas(_) = case.subject {
        running.check_number(ground, &database)?;
    }
    running.process.stop()?;
    ground.settle(&database)?;

    let lost = if traced {
        let visits = (ground.rows(&database)? - before) as f64;
        // Whoever left before being recorded may have a span and no row.
        Some((1.0 - ground.collector.take_server_spans() as f64 / visits).max(0.0))
    } else {
        None
    };
    Ok(Sample { load, memory, lost })
}

/// Over few connections: what is left unanswered at its end is the first that a slow subject does
/// in the measurement, for nobody.
pub(crate) fn warm_up(running: &Running, connections: usize, effort: Effort) -> Result<()> {
    load::run(running.address, connections.min(16), effort.warmup).map(drop)
}

impl Case {
    /// A subject that counts a large table answers so rarely that it takes longer to see how often.
    fn duration(self, effort: Effort) -> Duration {
        let counts = matches!(self.subject, Subject::Textbook | Subject::Flask);
        match self.rows {
            5_000_000.. if counts => effort.duration * 3,
            _ => effort.duration,
        }
    }
}

impl Series {
    pub(crate) fn throughputs(&self) -> Vec<f64> {
        self.samples
            .iter()
            .map(|sample| sample.load.throughput)
            .collect()
    }

    pub(crate) fn spread(&self, figure: impl Fn(&Sample) -> f64) -> Spread {
        Spread::new(self.samples.iter().map(figure))
    }

    pub(crate) fn throughput(&self) -> Spread {
        self.spread(|sample| sample.load.throughput)
    }

    /// Its throughput against another's, round by round.
    pub(crate) fn ratio_to(&self, other: &Self) -> Spread {
        Spread::ratio(&self.throughputs(), &other.throughputs())
    }

    /// The most memory in any round.
    pub(crate) fn memory(&self) -> Mebibytes {
        let memory = self.spread(|sample| sample.memory.map_or(f64::NAN, |memory| memory.0));
        Mebibytes(memory.max)
    }

    pub(crate) fn failed(&self) -> u64 {
        self.samples.iter().map(|sample| sample.load.failed).sum()
    }
}

/// The series of a case.
pub(crate) fn find(all: &[Series], wanted: impl Fn(&Case) -> bool) -> Option<&Series> {
    all.iter().find(|series| wanted(&series.case))
}

/// A table of throughputs, each against the series that `reference` finds for it.
pub(crate) fn throughputs<'a>(
    all: &'a [Series],
    label: impl Fn(&Case) -> String,
    against: &str,
    reference: impl Fn(&Case) -> Option<&'a Series>,
) -> String {
    table(
        &["", "visits/s", against, "median", "p99", "memory", "failed"],
        all.iter().map(|series| {
            let of_reference = reference(&series.case)
                .map_or_else(|| "–".to_owned(), |other| ratio_of(&series.ratio_to(other)));
            [
                label(&series.case),
                series.throughput().written(grouped),
                of_reference,
                milliseconds(series.spread(|sample| sample.load.median).median),
                milliseconds(series.spread(|sample| sample.load.p99).median),
                series.memory().to_string(),
                grouped(series.failed() as f64),
            ]
        }),
    )
}

/// Small ratios would vanish behind two digits.
fn ratio_of(spread: &Spread) -> String {
    if spread.median < 0.095 {
        spread.written(|number| format!("{number:.4}"))
    } else {
        spread.written(ratio)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subject,
            connections,
            rows,
        } = self;
        write!(formatter, "{subject}, {connections} connections, ")?;
        formatter.write_str(&rows_in_words(*rows))
    }
}

/// A number of rows as people say it.
pub(crate) fn rows_in_words(rows: u64) -> String {
    match rows {
        0 => "empty".to_owned(),
        _ if rows.is_multiple_of(1_000_000) => format!("{} million", rows / 1_000_000),
        _ => grouped(rows as f64),
    }
}
