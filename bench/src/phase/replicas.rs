//! Whether three services on the same stores do as much as one, and still number exactly.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use lab::client::{Connection, numbers_in};
use lab::measure::{Spread, grouped, ratio};
use lab::report::{Goal, Section, table};

use super::{CONNECTIONS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::load;
use crate::progress;
use crate::round::Effort;
use crate::subject::Running;

const REPLICAS: usize = 3;
/// Clients of each replica while numbers are checked, and the visits of each.
const CLIENTS: usize = 16;
const VISITS: usize = 100;

pub(crate) fn replicas(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut one = Vec::new();
    let mut three = Vec::new();
    for round in 1..=effort.rounds {
        one.push(together(ground, 1, effort)?);
        three.push(together(ground, REPLICAS, effort)?);
        progress!(
            "round {round} of {}: one replica {}/s, three {}/s",
            effort.rounds,
            grouped(one[one.len() - 1]),
            grouped(three[three.len() - 1])
        );
    }
    let numbers = check_numbers(ground)?;
    let ratios = Spread::ratio(&three, &one);
    let text = table(
        &["", "visits/s", "of one"],
        [
            [
                "one replica".to_owned(),
                Spread::new(one).written(grouped),
                String::new(),
            ],
            [
                "three replicas together".to_owned(),
                Spread::new(three).written(grouped),
                ratios.written(ratio),
            ],
        ],
    );
    Ok(Section {
        title: "Replicas",
        text: format!(
            "{CONNECTIONS} connections in all. {} visits to three replicas at once had numbers \
             without gaps or repetitions, in the table and in Redis.\n\n{text}",
            grouped(numbers as f64)
        ),
        goals: vec![Goal::at_least("three replicas: of one", 1.0, ratios)],
    })
}

/// The throughput of so many replicas.
fn together(ground: &mut Ground, replicas: usize, effort: Effort) -> Result<f64> {
    let database = ground.database(Owner::Visitas, 0)?;
    let mut running = start(ground, replicas, &database)?;
    let load = |duration| -> Result<f64> {
        let loads: Vec<_> = running
            .iter()
            .map(|replica| load::start(replica.address, CONNECTIONS / replicas, duration))
            .collect::<Result<_>>()?;
        let mut throughput = 0.0;
        for load in loads {
            throughput += load.finish()?.throughput;
        }
        Ok(throughput)
    };
    load(effort.warmup)?;
    let throughput = load(effort.duration)?;
    running[0].check_number(ground, &database)?;
    for replica in &mut running {
        replica.process.stop()?;
    }
    ground.settle(&database)?;
    ground.collector.take_server_spans();
    Ok(throughput)
}

fn start(ground: &Ground, replicas: usize, database: &str) -> Result<Vec<Running>> {
    (0..replicas)
        .map(|_| VISITAS.start(ground, database))
        .collect()
}

/// Makes visits to all replicas at once and checks every number of each.
fn check_numbers(ground: &mut Ground) -> Result<usize> {
    let database = ground.database(Owner::Visitas, 0)?;
    let mut running = start(ground, REPLICAS, &database)?;
    let answers = std::thread::scope(|scope| {
        let clients: Vec<_> = running
            .iter()
            .flat_map(|replica| [replica.address; CLIENTS])
            .map(|address| scope.spawn(move || visits(address)))
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("no client panics"))
            .collect::<Result<Vec<_>>>()
    })?
    .concat();
    let totals = answers.iter().map(|&(total, _)| total).collect();
    let redis = answers.iter().map(|&(_, redis)| redis).collect();
    let last = check_gapless(totals).context("in the table")?;
    check_gapless(redis).context("in Redis")?;
    let rows = ground.rows(&database)?;
    ensure!(
        last == rows,
        "the last number is {last} where {rows} rows are"
    );
    for replica in &mut running {
        replica.process.stop()?;
    }
    ground.settle(&database)?;
    Ok(answers.len())
}

fn visits(address: SocketAddr) -> Result<Vec<(i64, i64)>> {
    let mut connection = Connection::open(address)?;
    (0..VISITS)
        .map(|_| {
            let answer = connection.get("/")?;
            let (total, redis) = numbers_in(&answer.body)?;
            Ok((total, redis.context("Redis did not count")?))
        })
        .collect()
}

/// The last of the numbers, each of which must be there once.
fn check_gapless(mut numbers: Vec<i64>) -> Result<i64> {
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        ensure!(
            pair[0] + 1 == pair[1],
            "after {} comes {}",
            pair[0],
            pair[1]
        );
    }
    numbers.last().copied().context("no numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_repetitions_are_found() {
        assert_eq!(check_gapless(vec![7, 5, 6]).unwrap(), 7);
        assert!(check_gapless(vec![5, 7]).is_err());
        assert!(check_gapless(vec![5, 6, 6, 7]).is_err());
        assert!(check_gapless(Vec::new()).is_err());
    }
}
