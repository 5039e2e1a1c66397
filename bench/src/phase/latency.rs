//! The latency of visits: of a lone visit compared with a lone insert, its lower bound, and of many
//! visits at a constant rate.

use anyhow::Result;
use lab::measure::{Spread, grouped, milliseconds, ratio};
use lab::paced::{self, Latency, Pace};
use lab::report::{Goal, Section, table};

use super::limits::{Inserts, insert};
use super::{CONNECTIONS, VISITAS, while_serving};
use crate::ground::Ground;
use crate::progress;
use crate::round::{Effort, warm_up};
use crate::subject::Subject;

/// The loads at which latency is measured, as shares of the maximum throughput.
const SHARES: [f64; 2] = [0.5, 0.8];

/// Latency over one connection.
pub(crate) fn lone(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut visits = Vec::new();
    let mut inserts = Vec::new();
    for round in 1..=effort.rounds {
        let inserted = insert(ground, Inserts { clients: 1 }, effort.duration)?;
        let visited = latency(ground, VISITAS, 1, Pace::Closed, effort)?;
        progress!(
            "round {round} of {}: one visit {}, one insert {}",
            effort.rounds,
            milliseconds(visited.median),
            milliseconds(inserted.median)
        );
        inserts.push(inserted.median);
        visits.push(visited);
    }
    let medians: Vec<_> = visits.iter().map(|visit| visit.median).collect();
    let visit = Spread::new(medians.iter().copied());
    let insert = Spread::new(inserts.iter().copied());
    // A visit's time minus 0.1 ms, as a multiple of an insert's time.
    let less: Vec<_> = medians.iter().map(|median| median - 0.1e-3).collect();
    let in_inserts = Spread::ratio(&less, &inserts);
    let p99 = Spread::new(visits.iter().map(|visit| visit.p99));
    let text = table(
        &["one connection", "median"],
        [
            [
                "an insert, by pgbench".to_owned(),
                insert.format_with(milliseconds),
            ],
            ["a visit".to_owned(), visit.format_with(milliseconds)],
            ["a visit, p99".to_owned(), p99.format_with(milliseconds)],
        ],
    );
    Ok(Section {
        title: "A lone visit",
        text,
        goals: vec![Goal::at_most(
            "one connection: (visit - 0.1 ms) / insert",
            1.25,
            in_inserts.median,
            ratio,
        )],
    })
}

/// Latency over many connections, at a constant rate of visits.
pub(crate) fn paced(ground: &mut Ground, effort: Effort) -> Result<Section> {
    // The maximum throughput with this client. It is lower than with wrk: the client needs more
    // processor time.
    let peak = latency(ground, VISITAS, CONNECTIONS, Pace::Closed, effort)?.throughput;
    progress!("maximum {} visits/s", grouped(peak));
    let cases = SHARES.map(|share| [Subject::Ceiling, VISITAS].map(|subject| (subject, share)));
    let mut all = cases
        .as_flattened()
        .iter()
        .map(|&case| (case, Vec::new()))
        .collect::<Vec<_>>();
    for round in 1..=effort.rounds {
        for ((subject, share), latencies) in &mut all {
            let pace = Pace::Constant(peak * *share);
            let latency = latency(ground, *subject, CONNECTIONS, pace, effort)?;
            progress!(
                "round {round} of {}: {subject}, {}/s: median {}, p99 {}",
                effort.rounds,
                grouped(peak * *share),
                milliseconds(latency.median),
                milliseconds(latency.p99)
            );
            latencies.push(latency);
        }
    }
    let spread = |latencies: &[Latency], figure: fn(&Latency) -> f64| {
        Spread::new(latencies.iter().map(figure))
    };
    let mut text = format!(
        "{CONNECTIONS} connections, visits at a constant rate, each timed from when it was due. The \
         client uses one thread per connection and needs more processor time than wrk. With this \
         client, the service reaches {} visits/s. The ceiling at the same rate shows the share of the \
         client and the machine.\n\n",
        grouped(peak)
    );
    text += &table(
        &[
            "",
            "visits/s",
            "median",
            "p99",
            "p99 / median",
            "p99.9",
            "longest",
            "responses / due",
        ],
        all.iter().map(|((subject, share), latencies)| {
            [
                subject.to_string(),
                format!(
                    "{}, {:.0} % of the maximum",
                    grouped(peak * share),
                    share * 100.0
                ),
                spread(latencies, |latency| latency.median).format_with(milliseconds),
                spread(latencies, |latency| latency.p99).format_with(milliseconds),
                spread(latencies, |latency| latency.p99 / latency.median).format_with(ratio),
                milliseconds(spread(latencies, |latency| latency.p999).median),
                milliseconds(spread(latencies, |latency| latency.max).max),
                format!(
                    "{:.2} %",
                    spread(latencies, |latency| latency.responded).min * 100.0
                ),
            ]
        }),
    );
    let goals = all
        .iter()
        .filter(|((subject, _), _)| *subject == VISITAS)
        .map(|((_, share), latencies)| {
            Goal::at_most(
                &format!(
                    "{CONNECTIONS} connections at {:.0} % of the maximum: p99 / median",
                    share * 100.0
                ),
                3.0,
                spread(latencies, |latency| latency.p99 / latency.median).median,
                ratio,
            )
        })
        .collect();
    Ok(Section {
        title: "Latency under load",
        text,
        goals,
    })
}

fn latency(
    ground: &mut Ground,
    subject: Subject,
    connections: usize,
    pace: Pace,
    effort: Effort,
) -> Result<Latency> {
    while_serving(ground, subject, |instance| {
        warm_up(instance, connections, effort)?;
        paced::run(instance.address, connections, pace, effort.duration)
    })
}
