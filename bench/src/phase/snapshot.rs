//! Throughput during an old snapshot: an open transaction that prevents the removal of dead row
//! versions.

use std::io::Write as _;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use lab::measure::{grouped, ratio};
use lab::process;
use lab::report::{Section, table};

use super::{CONNECTIONS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::load;
use crate::progress;
use crate::round::{Effort, warm_up};

/// The number of consecutive measurements during the snapshot.
const STRETCHES: usize = 6;

pub(crate) fn snapshot(ground: &mut Ground, effort: Effort) -> Result<Section> {
    let database = ground.database(Owner::Visitas, 0)?;
    let mut instance = VISITAS.start(ground, &database)?;
    warm_up(&instance, CONNECTIONS, effort)?;
    let throughput = |what: &str| -> Result<f64> {
        let load = load::run(instance.address, CONNECTIONS, effort.duration)?;
        progress!("{what}: {}/s", grouped(load.throughput));
        Ok(load.throughput)
    };
    let before = throughput("before the snapshot")?;
    let snapshot = Snapshot::open(ground, &database)?;
    let mut during = Vec::new();
    for stretch in 1..=STRETCHES {
        during.push(throughput(&format!(
            "during a snapshot, {stretch} of {STRETCHES}"
        ))?);
    }
    drop(snapshot);
    let after = throughput("after the snapshot")?;
    instance.check_number(ground, &database)?;
    instance.process.stop()?;
    ground.settle(&database)?;
    ground.collector.take_server_spans();

    let without = f64::midpoint(before, after);
    let seconds = effort.duration.as_secs();
    let row =
        |what: String, throughput: f64| [what, grouped(throughput), ratio(throughput / without)];
    let mut rows = vec![row("before the snapshot".to_owned(), before)];
    rows.extend(during.iter().zip(1..).map(|(&throughput, stretch)| {
        row(
            format!("during a snapshot of up to {} s", stretch * seconds),
            throughput,
        )
    }));
    rows.push(row("after the snapshot".to_owned(), after));
    Ok(Section {
        title: "Old snapshot",
        text: format!(
            "{CONNECTIONS} connections without a pause, while another session holds an idle transaction at \
             `repeatable read`.\n\n{}",
            table(&["", "visits/s", "against without"], rows)
        ),
        goals: Vec::new(),
    })
}

/// An idle transaction that has read. Dropping this value ends it.
struct Snapshot(Child);

impl Snapshot {
    fn open(ground: &Ground, database: &str) -> Result<Self> {
        let mut child = process::command(ground.postgres.programs().join("psql"))
            .args(["-XqAt", "-d", &ground.postgres.url(database)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run psql")?;
        let input = child.stdin.as_mut().context("no pipe")?;
        input.write_all(
            b"begin isolation level repeatable read;\nselect count(*) from visitas;\n",
        )?;
        let snapshot = Self(child);
        let held = "select count(*) from pg_stat_activity
                     where datname = current_database()
                       and state = 'idle in transaction' and backend_xmin is not null";
        while ground.postgres.sql(database, held)? == "0" {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(snapshot)
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // Best effort: the process can have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
