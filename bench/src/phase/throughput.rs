//! Throughput on an empty table.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use lab::measure::{Spread, ratio};
use lab::report::{Goal, Section};

use super::{CONNECTIONS, VISITAS};
use crate::ground::Ground;
use crate::peer::Peer;
use crate::round::{self, Case, Effort, Series, throughputs};
use crate::subject::{Subject, Traces};

pub(crate) fn throughput(
    ground: &mut Ground,
    subjects: &[Subject],
    effort: Effort,
) -> Result<Section> {
    let cases: Vec<_> = subjects
        .iter()
        .filter(|subject| !matches!(subject, Subject::Peer(peer) if !ground.has(*peer)))
        .map(|&subject| Case::new(subject, CONNECTIONS))
        .collect();
    let all = round::interleaved(ground, &cases, effort)?;
    let find = |subject| round::find(&all, move |case| case.subject == subject);
    let ceiling = find(Subject::Ceiling).context("no ceiling")?;
    let service = find(VISITAS).context("no service")?;

    let mut text = format!(
        "{CONNECTIONS} connections, each making its next visit after a response; an empty table at the \
         start of each round. Median and p99 omit the visits that slow responses delay.\n\n"
    );
    text += &throughputs(
        &all,
        |case| case.subject.to_string(),
        "share of the ceiling",
        |_| Some(ceiling),
    );
    text += &ground.skipped_lines(&[Peer::Flask]);

    let mut goals = vec![Goal::at_least(
        "traces at 1 %: share of the ceiling",
        0.60,
        service.ratio_to(ceiling),
    )];
    if let Some(traced) = find(Subject::Visitas(Traces::All)) {
        let lost = lost(traced);
        goals.push(Goal::at_least(
            "traces at 100 %: share of the ceiling",
            0.40,
            traced.ratio_to(ceiling),
        ));
        goals.push(Goal::at_most(
            "traces at 100 %: visits without a span",
            0.01,
            lost.median,
            percent,
        ));
        writeln!(
            text,
            "\nAt 100 %, {} of the visits have no span at the collector.",
            lost.format_with(percent)
        )?;
    }
    if let Some(nowhere) = find(Subject::Visitas(Traces::Nowhere)) {
        // The service's own spread is the noise.
        let noise = Spread::new(service.throughputs());
        goals.push(Goal::at_least(
            "no collector listens: against traces at 1 %, within its spread",
            noise.min / noise.median,
            nowhere.ratio_to(service),
        ));
    }
    if let Some(textbook) = find(Subject::Textbook) {
        goals.push(Goal::at_least(
            "empty table: times the textbook",
            8.0,
            service.ratio_to(textbook),
        ));
    }
    Ok(Section {
        title: "Throughput",
        text,
        goals,
    })
}

fn lost(series: &Series) -> Spread {
    series.spread(|sample| sample.lost.unwrap_or(f64::NAN))
}

fn percent(share: f64) -> String {
    format!("{} %", ratio(share * 100.0))
}
