//! Throughput and memory by the number of connections, of the service, its limit and its peers, and
//! the service's throughput over each peer's.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::measure::{Mebibytes, Spread, grouped};
use lab::report::{Goal, Section, table};

use super::{CONNECTIONS, COUNTS, VISITAS};
use crate::ground::Ground;
use crate::peer::FAST;
use crate::round::{self, Case, Effort, Series, ratio_of, throughputs};
use crate::subject::Subject;

/// Explains the peers.
const PEERS: &str = "Each peer is a visit as a good engineer of its stack writes it, with pools that do not ping, and \
     records each visit in a transaction of its own. *No count* \
     returns the row's id in place of a count. *Counter row* counts exactly: one statement inserts \
     the row and updates the counter. *Textbook* counts all rows. After each measurement, the peer's \
     number is compared with `select count(*)`, and a difference ends the run.";

pub(crate) fn connections(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let peers: Vec<_> = FAST
        .into_iter()
        .filter(|peer| ground.has(*peer))
        .map(Subject::Peer)
        .chain([Subject::Textbook])
        .collect();
    let tuning = tune(ground, effort)?;
    let cases: Vec<_> = COUNTS
        .into_iter()
        .flat_map(|connections| {
            [Subject::Ceiling, VISITAS]
                .iter()
                .chain(&peers)
                .map(move |&subject| Case::new(subject, connections))
                .collect::<Vec<_>>()
        })
        .collect();
    let all = round::interleaved(ground, &cases, effort)?;
    let find = |subject, connections| {
        round::find(&all, |case| {
            case.subject == subject && case.connections == connections
        })
        .context("not measured")
    };

    let mut rows = Vec::new();
    let mut wins = Vec::new();
    for &peer in &peers {
        let mut row = vec![peer.to_string()];
        for connections in COUNTS {
            let ratio = find(VISITAS, connections)?.ratio_to(find(peer, connections)?);
            row.push(ratio_of(&ratio));
            if ratio.median < 1.0 {
                wins.push(format!("{peer} at {connections}"));
            }
        }
        rows.push(<[String; COUNTS.len() + 1]>::try_from(row).expect("a cell per count"));
    }
    let mut text = format!("{PEERS}\n\n");
    for peer in FAST.into_iter().filter(|peer| ground.has(*peer)) {
        writeln!(text, "- {peer}: {}", peer.runtime()?)?;
    }
    writeln!(text, "{}", ground.skipped_lines(&FAST))?;
    text += "Sessions with Postgres that were tried with 256 connections, and visits/s; the fastest are \
             kept:\n\n";
    text += &tuning;
    text += "\n";
    text +=
        "The service's visits/s over each peer's, by connections; below 1.00 the peer wins:\n\n";
    let [a, b, c, d] = COUNTS.map(|count| count.to_string());
    text += &table(&["service / peer", &a, &b, &c, &d], rows);
    let wins = if wins.is_empty() {
        "Faster than the service: none.".to_owned()
    } else {
        format!(
            "Faster than the service, by connections: {}.",
            wins.join("; ")
        )
    };
    write!(text, "\n{wins}\n\n")?;
    text += &throughputs(
        &all,
        |case| format!("{}, {}", case.connections, case.subject),
        "share of the ceiling",
        |case| find(Subject::Ceiling, case.connections).ok(),
    );

    let against_best = |connections| -> Result<Spread> {
        let peers: Vec<_> = peers
            .iter()
            .map(|&peer| find(peer, connections).map(Series::throughputs))
            .collect::<Result<_>>()?;
        let service = find(VISITAS, connections)?.throughputs();
        Ok(Spread::ratio(&service, &best(&peers)))
    };
    let goals = vec![
        Goal::at_least(
            "one connection: times the fastest peer",
            0.95,
            against_best(1)?,
        ),
        Goal::at_least(
            "256 connections: times the fastest peer, counting or not",
            10.0,
            against_best(CONNECTIONS)?,
        ),
        Goal::at_most(
            "1 024 connections under load: memory",
            64.0,
            find(VISITAS, 1024)?.memory().0,
            |mebibytes| Mebibytes(mebibytes).to_string(),
        ),
    ];
    Ok(Section {
        title: "Peers, by connections",
        text,
        goals,
    })
}

/// Tries each number of a peer's sessions briefly, keeps the fastest, and returns a table.
fn tune(ground: &mut Ground, effort: Effort) -> Result<String> {
    let effort = Effort {
        rounds: 1,
        duration: effort.duration.min(Duration::from_secs(2)),
        ..effort
    };
    let mut rows = Vec::new();
    for peer in FAST {
        if !ground.has(peer) {
            continue;
        }
        let mut tried = Vec::new();
        for sessions in peer.sessions() {
            ground.set_sessions(peer, sessions);
            let case = Case::new(Subject::Peer(peer), CONNECTIONS);
            let series = round::interleaved(ground, &[case], effort)?;
            tried.push((sessions, series[0].throughput().median));
        }
        tried.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        ground.set_sessions(peer, tried[0].0);
        let cell = |index: usize| {
            let (sessions, throughput) = tried[index];
            format!("{sessions}: {}", grouped(throughput))
        };
        rows.push([peer.to_string(), cell(0), cell(1), cell(2), cell(3)]);
    }
    Ok(table(&["", "fastest", "second", "third", "fourth"], rows))
}

/// The highest throughput of each round.
fn best(peers: &[Vec<f64>]) -> Vec<f64> {
    let rounds = peers.iter().map(Vec::len).min().unwrap_or(0);
    (0..rounds)
        .map(|round| peers.iter().map(|peer| peer[round]).fold(0.0, f64::max))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_peer_is_that_of_each_round() {
        let peers = [vec![1.0, 5.0, 3.0], vec![2.0, 4.0, 3.5]];
        assert_eq!(best(&peers), [2.0, 5.0, 3.5]);
    }
}
