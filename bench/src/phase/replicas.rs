//! Checks whether three replicas on the same stores have the throughput of one and still number
//! exactly.

use anyhow::{Result, bail, ensure};
use lab::history::{History, Visit, judge};
use lab::measure::{grouped, ratio};
use lab::report::{Goal, Section, table};
use lab::stack;
use lab::visitor::Visitor;

use super::{CONNECTIONS, REPLICAS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::round::{self, Case, Effort};
use crate::subject::Instance;

/// Clients per replica in the check of numbers, and visits per client.
const CLIENTS: usize = 16;
const VISITS: usize = 100;

pub(crate) fn replicas(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let cases = [1, REPLICAS].map(|replicas| Case {
        replicas,
        ..Case::new(VISITAS, CONNECTIONS)
    });
    let all = round::interleaved(ground, &cases, effort)?;
    let [one, three] = &all[..] else {
        bail!("not measured");
    };
    let numbers = check_numbers(ground)?;
    let ratios = three.ratio_to(one);
    let text = table(
        &["", "visits/s", "against one"],
        [
            [
                "one replica".to_owned(),
                one.throughput().format_with(grouped),
                String::new(),
            ],
            [
                "three replicas together".to_owned(),
                three.throughput().format_with(grouped),
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
