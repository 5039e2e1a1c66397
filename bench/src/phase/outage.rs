//! Throughput while Redis is down.

use anyhow::{Result, ensure};
use lab::client;
use lab::measure::{Spread, grouped, ratio};
use lab::report::{Section, table};

use super::{CONNECTIONS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::load;
use crate::progress;
use crate::round::{Effort, warm_up};

pub(crate) fn outage(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let mut up = Vec::new();
    let mut down = Vec::new();
    for round in 1..=effort.rounds {
        let database = ground.database(Owner::Visitas, 0)?;
        let mut instance = VISITAS.start(ground, &database)?;
        warm_up(&instance, CONNECTIONS, effort)?;
        up.push(load::run(instance.address, CONNECTIONS, effort.duration)?.throughput);

        ground.redis.kill()?;
        let load = load::run(instance.address, CONNECTIONS, effort.duration)?;
        ensure!(
            load.failed == 0,
            "{} visits failed without Redis",
            load.failed
        );
        let (_, redis) = client::visit(instance.address)?;
        ensure!(redis.is_none(), "Redis counted while it was down");
        down.push(load.throughput);
        instance.check_number(ground, &database)?;

        instance.process.stop()?;
        ground.settle(&database)?;
        ground.redis.start_again()?;
        progress!(
            "round {round} of {}: {}/s, without Redis {}/s",
            effort.rounds,
            grouped(up[up.len() - 1]),
            grouped(down[down.len() - 1])
        );
    }
    let text = table(
        &["", "visits/s", "against both up"],
        [
            [
                "both up".to_owned(),
                Spread::new(up.iter().copied()).format_with(grouped),
                String::new(),
            ],
            [
                "Redis down".to_owned(),
                Spread::new(down.iter().copied()).format_with(grouped),
                Spread::ratio(&down, &up).format_with(ratio),
            ],
        ],
    );
    Ok(Section {
        title: "Redis down",
        text: format!(
            "{CONNECTIONS} connections. Redis is killed under load; no visit fails.\n\n{text}"
        ),
        goals: Vec::new(),
    })
}
