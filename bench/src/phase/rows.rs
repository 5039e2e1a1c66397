//! Throughput by the number of existing rows.

use anyhow::{Context as _, Result};
use lab::report::{Goal, Section};

use super::{CONNECTIONS, VISITAS};
use crate::chart::{self, Line};
use crate::ground::Ground;
use crate::peer::Peer;
use crate::round::{self, Case, Effort, Series, rows_in_words, throughputs};
use crate::subject::Subject;

/// Returns the section and its chart as SVG. `sizes` are an empty, a large and a huge table.
pub(crate) fn rows(
    ground: &mut Ground,
    sizes: [u64; 3],
    effort: Effort,
) -> Result<(Section, String)> {
    let [empty, large, huge] = sizes;
    let case = |subject, rows| Case {
        rows,
        ..Case::new(subject, CONNECTIONS)
    };
    let mut cases = vec![case(Subject::Ceiling, empty)];
    cases.extend(sizes.map(|rows| case(VISITAS, rows)));
    cases.extend(sizes.map(|rows| case(Subject::Textbook, rows)));
    if ground.has(Peer::Flask) {
        // A larger table shows nothing beyond the textbook's results.
        cases.extend([empty, large].map(|rows| case(Subject::Peer(Peer::Flask), rows)));
    }
    let all = round::interleaved(ground, &cases, effort)?;
    let find =
        |wanted: Case| round::find(&all, move |case| *case == wanted).context("not measured");

    let text = format!(
        "{CONNECTIONS} connections. The row counts are those before the first round: visits of earlier \
         rounds are added, except in the empty table.\n\n{}\n![Throughput by rows in the \
         table](throughput.svg)\n",
        throughputs(
            &all,
            |case| match case.subject {
                Subject::Ceiling => case.subject.to_string(),
                _ => format!("{}, {}", case.subject, rows_in_words(case.rows)),
            },
            "against an empty table",
            |case| {
                let subject = case.subject;
                round::find(&all, move |case| {
                    case.subject == subject && case.rows == empty
                })
            },
        ),
    );
    let goals = vec![
        Goal::at_least(
            &format!("{}: times the textbook", rows_in_words(large)),
            500.0,
            find(case(VISITAS, large))?.ratio_to(find(case(Subject::Textbook, large))?),
        ),
        Goal::at_least(
            &format!("{}: against an empty table", rows_in_words(huge)),
            0.95,
            find(case(VISITAS, huge))?.ratio_to(find(case(VISITAS, empty))?),
        ),
    ];
    let lines = [VISITAS, Subject::Textbook, Subject::Peer(Peer::Flask)]
        .map(|subject| Line {
            name: match subject {
                VISITAS => "visitas".to_owned(),
                _ => subject.to_string(),
            },
            points: sizes
                .iter()
                .filter_map(|&rows| find(case(subject, rows)).ok())
                .map(Series::throughput)
                .collect(),
        })
        .into_iter()
        .filter(|line| !line.points.is_empty())
        .collect::<Vec<_>>();
    let picture = chart::draw(
        "Visits per second, by rows in the table",
        &sizes.map(rows_in_words),
        ("ceiling", find(case(Subject::Ceiling, empty))?.throughput()),
        &lines,
    );
    let section = Section {
        title: "Rows in the table",
        text,
        goals,
    };
    Ok((section, picture))
}
