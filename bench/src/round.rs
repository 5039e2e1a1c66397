//! Rounds: each case is measured once per round, so that changes of the machine's speed affect all
//! cases alike. For each measurement, the subject is started, warmed up, measured, checked and
//! stopped.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::measure::{Mebibytes, Spread, grouped, milliseconds, ratio};
use lab::report::table;

use crate::ground::{Ground, Stores};
use crate::load;
use crate::progress;
use crate::subject::{Instance, Subject, Traces};

/// Durations and repetitions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) warmup: Duration,
    pub(crate) duration: Duration,
}

/// One case to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) subject: Subject,
    /// Of all replicas together.
    pub(crate) connections: usize,
    pub(crate) replicas: usize,
    /// Rows in the table at the start.
    pub(crate) rows: u64,
    pub(crate) stores: Stores,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) load: load::Load,
    pub(crate) memory: Option<Mebibytes>,
    /// The share of visits whose span did not arrive, if every visit is traced.
    pub(crate) lost: Option<f64>,
}

/// A case with one sample per round.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) case: Case,
    pub(crate) samples: Vec<Sample>,
}

/// Measures all cases round by round, every second round in reverse order.
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
        let mut order: Vec<_> = all.iter_mut().collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for series in order {
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
        let instance = case.subject.start(ground, "")?;
        warm_up(&instance, case.connections, effort)?;
        return Ok(Sample {
            load: load::run(instance.address, case.connections, effort.duration)?,
            memory: instance.process.peak_memory(),
            lost: None,
        });
    };
    let database = ground.database(owner, case.rows)?;
    if case.stores.are_far() {
        ground.relay()?;
    }
    if case.stores != Stores::Near {
        ground.set_commit_delay(&database, case.stores)?;
    }
    let traced = case.subject == Subject::Visitas(Traces::All);
    let before = if traced { ground.rows(&database)? } else { 0 };
    ground.collector.take_server_spans();

    let mut instances: Vec<_> = (0..case.replicas)
        .map(|_| case.subject.start_with(ground, &database, case.stores))
        .collect::<Result<_>>()?;
    for instance in &instances {
        warm_up(instance, case.connections, effort)?;
    }
    let addresses: Vec<_> = instances.iter().map(|instance| instance.address).collect();
    let load = load::run_on_all(&addresses, case.connections, case.duration(effort))?;
    let memory = match case.subject {
        // Only the memory of the process that starts the workers is known.
        Subject::Peer(peer) if !peer.is_one_process() => None,
        _ => instances[0].process.peak_memory(),
    };
    if case.rows == 0 || !case.subject.counts_all_rows() {
        instances[0]
            .check_number(ground, &database)
            .with_context(|| case.to_string())?;
    }
    for instance in &mut instances {
        instance.process.stop()?;
    }
    ground.settle(&database)?;
    if case.stores != Stores::Near {
        ground.set_commit_delay(&database, Stores::Near)?;
    }

    let lost = if traced {
        let visits = (ground.rows(&database)? - before) as f64;
        // A visit whose client disconnected early can have a span and no row.
        Some((1.0 - ground.collector.take_server_spans() as f64 / visits).max(0.0))
    } else {
        None
    };
    Ok(Sample { load, memory, lost })
}

/// Uses few connections: a slow subject still processes the warm-up's unfinished requests during
/// the measurement.
pub(crate) fn warm_up(instance: &Instance, connections: usize, effort: Effort) -> Result<()> {
    load::run(instance.address, connections.min(16), effort.warmup).map(drop)
}

impl Case {
    /// One replica on near stores, with an empty table.
    pub(crate) fn new(subject: Subject, connections: usize) -> Self {
        Self {
            subject,
            connections,
            replicas: 1,
            rows: 0,
            stores: Stores::Near,
        }
    }

    /// A subject that counts a large table responds so rarely that its measurement must be longer.
    fn duration(self, effort: Effort) -> Duration {
        match self.rows {
            5_000_000.. if self.subject.counts_all_rows() => effort.duration * 3,
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

    pub(crate) fn medians(&self) -> Vec<f64> {
        self.samples
            .iter()
            .map(|sample| sample.load.median)
            .collect()
    }

    /// The ratio of its throughput to another's, round by round.
    pub(crate) fn ratio_to(&self, other: &Self) -> Spread {
        Spread::ratio(&self.throughputs(), &other.throughputs())
    }

    /// The maximum memory of all rounds.
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

/// A table of throughputs, each compared with the series that `reference` returns.
pub(crate) fn throughputs<'a>(
    all: &'a [Series],
    label: impl Fn(&Case) -> String,
    ratio_header: &str,
    reference: impl Fn(&Case) -> Option<&'a Series>,
) -> String {
    table(
        &[
            "",
            "visits/s",
            ratio_header,
            "median",
            "p99",
            "memory",
            "failed",
        ],
        all.iter().map(|series| {
            let ratio_to_reference = reference(&series.case)
                .map_or_else(|| "–".to_owned(), |other| ratio_of(&series.ratio_to(other)));
            [
                label(&series.case),
                series.throughput().format_with(grouped),
                ratio_to_reference,
                milliseconds(series.spread(|sample| sample.load.median).median),
                milliseconds(series.spread(|sample| sample.load.p99).median),
                series.memory().to_string(),
                grouped(series.failed() as f64),
            ]
        }),
    )
}

/// Shows more decimals for small ratios.
pub(crate) fn ratio_of(spread: &Spread) -> String {
    if spread.median < 0.095 {
        spread.format_with(|number| format!("{number:.4}"))
    } else {
        spread.format_with(ratio)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}, {} connections, {}",
            self.subject,
            self.connections,
            rows_in_words(self.rows)
        )?;
        if self.replicas > 1 {
            write!(formatter, ", {} replicas", self.replicas)?;
        }
        match self.stores {
            Stores::Near => Ok(()),
            Stores::SlowCommit(delay) => {
                write!(formatter, ", commit {} ms longer", delay.as_millis())
            }
            Stores::Far => formatter.write_str(", far"),
            Stores::FarWithSlowCommit => formatter.write_str(", far, slower commit"),
        }
    }
}

/// The number of rows in words.
pub(crate) fn rows_in_words(rows: u64) -> String {
    match rows {
        0 => "empty".to_owned(),
        _ if rows.is_multiple_of(1_000_000) => format!("{} million", rows / 1_000_000),
        _ => grouped(rows as f64),
    }
}
