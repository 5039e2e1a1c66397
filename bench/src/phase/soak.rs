//! Checks that memory stays constant at the peak, with and without scrapes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::client;
use lab::measure::{Mebibytes, Spread, grouped};
use lab::report::{Goal, Section, table};

use super::{CONNECTIONS, VISITAS};
use crate::ground::{Ground, Owner};
use crate::load;
use crate::progress;

/// The interval in Prometheus' examples.
const SCRAPE_EVERY: Duration = Duration::from_secs(15);
/// Readings of memory in one run. The first fifth, in which buffers fill up, is ignored.
const READINGS: u32 = 60;
/// Allowed growth of memory from the second fifth to the last, in addition to a hundredth of
/// itself.
const SLACK: f64 = 1.0;

/// Runs for `duration` with scrapes, and for twice as long without.
pub(crate) fn soak(ground: &mut Ground, duration: Duration) -> Result<Section> {
    let mut rows = Vec::new();
    let mut goals = Vec::new();
    for (scraped, duration) in [(false, 2 * duration), (true, duration)] {
        let what = if scraped { "scraped" } else { "not scraped" };
        let (memory, throughput) = run(ground, duration, scraped, what)?;
        let fifth = memory.len() / 5;
        let early = Spread::new(memory[fifth..2 * fifth].iter().copied());
        let late = Spread::new(memory[memory.len() - fifth..].iter().copied());
        let all = Spread::new(memory.iter().copied());
        let in_mebibytes = |number| Mebibytes(number).to_string();
        rows.push([
            what.to_owned(),
            (duration.as_secs() / 60).to_string(),
            grouped(throughput),
            in_mebibytes(early.median),
            in_mebibytes(late.median),
            in_mebibytes(all.max),
        ]);
        goals.push(Goal::at_most(
            &format!("at the peak, {what}: growth from the second fifth to the last"),
            SLACK + early.median / 100.0,
            late.median - early.median,
            in_mebibytes,
        ));
    }
    Ok(Section {
        title: "Memory at the peak",
        text: format!(
            "{CONNECTIONS} connections.\n\n{}",
            table(
                &[
                    "",
                    "minutes",
                    "visits/s",
                    "second fifth",
                    "last fifth",
                    "maximum"
                ],
                rows
            )
        ),
        goals,
    })
}

/// Returns the readings of memory and the throughput.
fn run(
    ground: &mut Ground,
    duration: Duration,
    scraped: bool,
    what: &str,
) -> Result<(Vec<f64>, f64)> {
    let database = ground.database(Owner::Visitas, 0)?;
    let mut instance = VISITAS.start(ground, &database)?;
    let address = instance.address;
    let ended = AtomicBool::new(false);
    let started = Instant::now();
    let load = load::start(address, CONNECTIONS, duration)?;
    let (memory, throughput) = std::thread::scope(|scope| {
        if scraped {
            scope.spawn(|| scrape(address, &ended));
        }
        let mut memory = Vec::new();
        for reading in 1..=READINGS {
            let due = started + duration * reading / (READINGS + 1);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let resident = instance.process.resident_memory();
            memory.extend(resident.map(|resident| resident.0));
            // The spans are not used, so they are discarded.
            ground.collector.take_server_spans();
            if reading % 6 == 0 {
                let resident = resident.map(|resident| resident.to_string());
                progress!(
                    "{what}: {} after {:.0} s",
                    resident.unwrap_or_default(),
                    started.elapsed().as_secs_f64()
                );
            }
        }
        let load = load.finish();
        ended.store(true, Ordering::Release);
        anyhow::Ok((memory, load?.throughput))
    })?;
    instance.check_number(ground, &database)?;
    instance.process.stop()?;
    ground.settle(&database)?;
    Ok((memory, throughput))
}

/// Scrapes regularly. A failed scrape is ignored: only memory is judged.
fn scrape(address: SocketAddr, ended: &AtomicBool) {
    let mut next = Instant::now() + SCRAPE_EVERY;
    while !ended.load(Ordering::Acquire) {
        if Instant::now() >= next {
            next += SCRAPE_EVERY;
            client::get(address, "/metrics").ok();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
