//! Throughput and memory by the number of connections.

use anyhow::{Context as _, Result};
use lab::measure::Mebibytes;
use lab::report::{Goal, Section};

use super::VISITAS;
use crate::ground::Ground;
use crate::round::{self, Case, Effort, throughputs};
use crate::subject::Subject;

const COUNTS: [usize; 4] = [1, 64, 256, 1024];

pub(crate) fn connections(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let cases = COUNTS.map(|connections| {
        [Subject::Ceiling, VISITAS, Subject::Textbook].map(|subject| Case {
            subject,
            connections,
            rows: 0,
        })
    });
    let all = round::interleaved(ground, cases.as_flattened(), effort)?;
    let text = throughputs(
        &all,
        |case| format!("{}, {}", case.connections, case.subject),
        "share of the ceiling",
        |case| {
            let connections = case.connections;
            round::find(&all, |case| {
                case.subject == Subject::Ceiling && case.connections == connections
            })
        },
    );
    let crowded = round::find(&all, |case| {
        case.subject == VISITAS && case.connections == COUNTS[3]
    });
    let memory = crowded.context("not measured")?.memory();
    Ok(Section {
        title: "Connections",
        text,
        goals: vec![Goal::at_most(
            "1 024 connections under load: memory",
            64.0,
            memory.0,
            |mebibytes| Mebibytes(mebibytes).to_string(),
        )],
    })
}
