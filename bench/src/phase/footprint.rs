//! The service's cost before the first visit: time to start, memory, disk.

use std::time::Duration;

use anyhow::Result;
use lab::measure::{Mebibytes, Spread, milliseconds};
use lab::program::visitas;
use lab::report::{Goal, Section, table};

use super::VISITAS;
use crate::ground::{Ground, Owner};
use crate::progress;

const STARTS: usize = 10;
/// Long enough for the monitors' first checks.
const IDLE: Duration = Duration::from_secs(3);

pub(crate) fn footprint(ground: &mut Ground) -> Result<Section> {
    let mut fresh = Vec::new();
    let mut migrated = Vec::new();
    let mut idle = None;
    for start in 1..=STARTS {
        let database = "starts";
        ground.fresh_database(database)?;
        for starts in [&mut fresh, &mut migrated] {
            let mut instance = VISITAS.start(ground, database)?;
            starts.push(instance.started_in.as_secs_f64());
            if start == STARTS {
                std::thread::sleep(IDLE);
                idle = instance.process.resident_memory();
            }
            instance.process.stop()?;
            ground.settle(database)?;
        }
    }
    let database = ground.database(Owner::Visitas, 0)?;
    drop(database);
    progress!("{STARTS} starts on a fresh database and as many on a migrated one");

    let migrated = Spread::new(migrated);
    let fresh = Spread::new(fresh);
    let idle = idle.map_or(f64::NAN, |idle| idle.0);
    let program = std::fs::metadata(visitas()?)?.len() as f64 / 1e6;
    let in_mebibytes = |number| Mebibytes(number).to_string();
    let in_megabytes = |number| format!("{number:.1} MB");
    let text = table(
        &["", "measured"],
        [
            ["from start to ready", &*migrated.format_with(milliseconds)],
            [
                "from start to ready, with migrations",
                &fresh.format_with(milliseconds),
            ],
            ["memory, idle", &in_mebibytes(idle)],
            ["size of the executable", &in_megabytes(program)],
        ]
        .map(|row| row.map(str::to_owned)),
    );
    Ok(Section {
        title: "Start, memory, size",
        text,
        goals: vec![
            Goal::at_most("idle: memory", 24.0, idle, in_mebibytes),
            Goal::at_most("from start to ready", 0.3, migrated.median, milliseconds),
            Goal::at_most("size of the executable", 20.0, program, in_megabytes),
        ],
    })
}
