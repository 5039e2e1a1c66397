//! Checks whether three replicas on the same stores have the throughput of one and still number
//! exactly.

use anyhow::{Result, ensure};
use lab::history::{History, Visit, judge};
use lab::measure::{Spread, grouped, ratio};
use lab::report::{Goal, Section, table};
use lab::stack;
use lab::visitor::Visitor;

use super::{CONNECTIONS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::load;
use crate::progress;
use crate::round::Effort;
use crate::subject::Instance;

const REPLICAS: usize = 3;
/// Clients per replica in the check of numbers, and visits per client.
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
        &["", "visits/s", "against one"],
        [
            [
                "one replica".to_owned(),
                Spread::new(one).format_with(grouped),
                String::new(),
            ],
            [
                "three replicas together".to_owned(),
                Spread::new(three).format_with(grouped),
                ratios.format_with(ratio),
            ],
        ],
    );
    Ok(Section {
        title: "Replicas",
        text: format!(
            "{CONNECTIONS} connections in total. {} concurrent visits to three replicas had numbers \
             without gaps or repetitions, in the table and in Redis.\n\n{text}",
            grouped(numbers as f64)
        ),
        goals: vec![Goal::at_least(
            "three replicas: throughput against one",
            1.0,
            ratios,
        )],
    })
}

/// The total throughput of this many replicas.
fn together(ground: &mut Ground, replicas: usize, effort: Effort) -> Result<f64> {
    let database = ground.database(Owner::Visitas, 0)?;
    let mut instances = start(ground, replicas, &database)?;
    let load = |duration| -> Result<f64> {
        let loads: Vec<_> = instances
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
    instances[0].check_number(ground, &database)?;
    for replica in &mut instances {
        replica.process.stop()?;
    }
    ground.settle(&database)?;
    ground.collector.take_server_spans();
    Ok(throughput)
}

fn start(ground: &Ground, replicas: usize, database: &str) -> Result<Vec<Instance>> {
    (0..replicas)
        .map(|_| VISITAS.start(ground, database))
        .collect()
}

/// Makes visits to all replicas concurrently and judges the history.
fn check_numbers(ground: &mut Ground) -> Result<usize> {
    let database = ground.database(Owner::Visitas, 0)?;
    // Restarts the counter along with the table.
    ground.redis.restart()?;
    let mut instances = start(ground, REPLICAS, &database)?;
    let clients: Vec<_> = (0..REPLICAS * CLIENTS)
        .map(|client| {
            let replica = client % REPLICAS;
            let mut visitor = Visitor::new(client, replica, instances[replica].address);
            ground.runtime.spawn(async move {
                let mut visits = Vec::new();
                for _ in 0..VISITS {
                    visits.push(visitor.visit().await);
                }
                visits
            })
        })
        .collect();
    let mut visits = Vec::new();
    for client in clients {
        visits.extend(ground.runtime.block_on(client)?);
    }
    let verdict = judge(History {
        visits: &visits,
        rows: &stack::rows(&ground.postgres, &database)?,
        redis_outages: &[],
    });
    let all_are_complete = visits.iter().all(Visit::is_complete);
    ensure!(
        all_are_complete && verdict.violations() == 0 && verdict.rows == visits.len(),
        "of {} visits: {verdict:?}",
        visits.len()
    );
    for replica in &mut instances {
        replica.process.stop()?;
    }
    ground.settle(&database)?;
    Ok(visits.len())
}
