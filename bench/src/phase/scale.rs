//! How throughput follows from the time of a commit, measured and by a model of two numbers. The
//! figures of `docs/scale.md`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::measure::{Spread, grouped, milliseconds, ratio};
use lab::report::{Section, table};

use super::{CONNECTIONS, COUNTS, VISITAS};
use crate::ground::{Ground, Stores};
use crate::round::{self, Case, Effort, Series, find};

/// How much longer each commit takes.
const COMMITS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(2),
    Duration::from_millis(5),
    Duration::from_millis(10),
];

/// The largest batch of the recorder.
const LARGEST_BATCH: f64 = 4096.0;

/// The time of a batch: that of a lone visit, that of each further visit in it, and the commit's.
#[derive(Clone, Copy)]
struct Model {
    /// Seconds.
    lone: f64,
    /// Seconds.
    each: f64,
}

pub(crate) fn scale(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let cases: Vec<_> = COMMITS
        .iter()
        .flat_map(|&commit| {
            COUNTS.map(|connections| Case {
                stores: Stores::SlowCommit(commit),
                ..Case::new(VISITAS, connections)
            })
        })
        .collect();
    let all = round::interleaved(ground, &cases, effort)?;
    let model = Model::fit(&all)?;

    let measured = COMMITS.iter().flat_map(|&commit| {
        let all = &all;
        COUNTS.iter().filter_map(move |&connections| {
            let case = |case: &Case| {
                case.stores == Stores::SlowCommit(commit) && case.connections == connections
            };
            let throughputs = find(all, case)?.throughputs();
            let modelled = model.throughput(batch_size(connections), commit);
            Some([
                commit_in_words(commit),
                connections.to_string(),
                Spread::new(throughputs.iter().copied()).format_with(grouped),
                grouped(modelled),
                Spread::new(throughputs.iter().map(|measured| measured / modelled))
                    .format_with(ratio),
            ])
        })
    });
    let header = [
        "commit",
        "connections",
        "visits/s",
        "model",
        "measured / model",
    ];
    let measured = table(&header, measured);

    let batches = [1.0, 128.0, 1024.0, LARGEST_BATCH];
    let allowed = COMMITS.iter().map(|&commit| {
        let [one, few, many, full] = batches.map(|batch| grouped(model.throughput(batch, commit)));
        [commit_in_words(commit), one, few, many, full]
    });
    let header = ["visits/s in batches of", "1", "128", "1 024", "4 096"];
    let allowed = table(&header, allowed);
    Ok(Section {
        title: "What a commit allows",
        text: format!(
            "Each commit takes longer by `commit_delay`, with `commit_siblings = 0`. *Model*: while a \
             batch is recorded, the clients of the one before make their next visits, so a batch has half \
             of the connections. It takes {} for its first visit, {} for each further one, and the \
             commit's delay. The first number is measured by one connection, the second by \
             {CONNECTIONS}, both without a delay; all other rows are predictions.\n\n{measured}\n\
             By the model, in batches of a fixed size:\n\n{allowed}",
            milliseconds(model.lone),
            milliseconds(model.each),
        ),
        goals: Vec::new(),
    })
}

impl Model {
    /// By the series without a delay, with one connection and with [`CONNECTIONS`].
    fn fit(all: &[Series]) -> Result<Self> {
        let seconds = |connections| {
            let case = |case: &Case| {
                case.stores == Stores::SlowCommit(Duration::ZERO) && case.connections == connections
            };
            let series = find(all, case).context("not measured")?;
            Ok::<_, anyhow::Error>(batch_size(connections) / series.throughput().median)
        };
        let lone = seconds(1)?;
        let each = (seconds(CONNECTIONS)? - lone) / (batch_size(CONNECTIONS) - 1.0);
        Ok(Self { lone, each })
    }

    /// Visits a second in batches of this size.
    fn throughput(self, batch: f64, commit: Duration) -> f64 {
        batch / (self.lone + (batch - 1.0) * self.each + commit.as_secs_f64())
    }
}

/// How many visits are in a batch of this many clients that visit without a pause.
fn batch_size(connections: usize) -> f64 {
    (connections as f64 / 2.0).clamp(1.0, LARGEST_BATCH)
}

fn commit_in_words(commit: Duration) -> String {
    if commit.is_zero() {
        "of this machine".to_owned()
    } else {
        format!("{} ms longer", commit.as_millis())
    }
}
