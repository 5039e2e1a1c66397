//! Replicas that restart in turn, many times, under clients that keep their connections.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::measure::grouped;
use lab::report::{Goal, Section, table};
use lab::rolling::{Crowd, Relay, Replicas, Tally};

use crate::ground::{Ground, Needs};
use crate::service::Service;

/// What came of it.
#[derive(Clone, Debug)]
pub struct Rolling {
    /// How clients find a replica.
    pub way: &'static str,
    /// What they saw.
    pub seen: Tally,
    /// Rows at the end that no client was told of, or that are missing.
    pub rows_off: usize,
}

const REPLICAS: usize = 3;
/// Clients that keep their connections, and clients that open one for each visit.
const KEEPING: usize = 16;
const OPENING: usize = 4;
/// How long a replica that was asked to stop serves on, for balancers to notice.
const DELAY: &str = "500ms";
/// A disk that stalls for a second is no restart: visits wait for it.
const SETTINGS: [(&str, &str); 4] = [
    ("SHUTDOWN_DELAY", DELAY),
    ("SHUTDOWN_TIMEOUT", "20s"),
    ("DB_TIMEOUT", "8s"),
    ("VISIT_TIMEOUT", "9s"),
];
/// Between two restarts, so that clients have come back to the replica that has started.
const PAUSE: Duration = Duration::from_millis(300);
/// The delay, the service's own limit, and a moment.
const STOP_TIMEOUT: Duration = Duration::from_secs(21);

/// Restarts replicas so many times, half of them under clients that choose among the addresses and
/// half under clients behind a balancer.
pub fn run(restarts: usize) -> Result<Vec<Rolling>> {
    let direct = Replicas::default();
    let chosen = roll(
        "clients choose an address",
        restarts.div_ceil(2),
        &direct,
        &direct,
    )?;
    let behind = Replicas::default();
    let relay = Relay::start(&behind)?;
    let before = Replicas::default();
    before.add(relay.address);
    let balanced = roll(
        "a balancer chooses once for each connection",
        restarts / 2,
        &behind,
        &before,
    )?;
    Ok(vec![chosen, balanced])
}

fn roll(
    way: &'static str,
    restarts: usize,
    replicas: &Replicas,
    known: &Replicas,
) -> Result<Rolling> {
    let ground = Ground::start(Needs::default())?;
    let mut services = Vec::new();
    for _ in 0..REPLICAS {
        let mut service = Service::new(&ground)?;
        for (name, value) in SETTINGS {
            service.set(name, value);
        }
        service.start()?;
        service.until_ready()?;
        replicas.add(service.address);
        services.push(service);
    }
    let crowd = Crowd::start(KEEPING, OPENING, known);
    for restart in 0..restarts {
        std::thread::sleep(PAUSE);
        let service = &mut services[restart % REPLICAS];
        service.terminate()?;
        let ended = service.ended_within(STOP_TIMEOUT)?;
        ensure!(ended == Some(true), "a stop ended like this: {ended:?}");
        replicas.remove(service.address);
        service.start()?;
        service.until_ready()?;
        replicas.add(service.address);
    }
    std::thread::sleep(PAUSE);
    let seen = crowd.leave();
    let rows: usize = ground.sql("select count(*) from visitas")?.parse()?;
    Ok(Rolling {
        way,
        rows_off: rows.abs_diff(seen.visits),
        seen,
    })
}

/// What to write of it.
pub fn section(restarts: usize, rolled: &[Rolling]) -> Section {
    let count = |number: usize| grouped(number as f64);
    let rows = rolled.iter().map(
        |Rolling {
             way,
             seen,
             rows_off,
         }| {
            [
                (*way).to_owned(),
                count(seen.visits),
                count(seen.connections),
                count(seen.refused),
                count(seen.failures.len()),
                count(*rows_off),
            ]
        },
    );
    let failures: usize = rolled.iter().map(|rolled| rolled.seen.failures.len()).sum();
    let rows_off: usize = rolled.iter().map(|rolled| rolled.rows_off).sum();
    let mut text = format!(
        "Three replicas restart in turn, {restarts} times in all, with `SHUTDOWN_DELAY={DELAY}`, \
         under {KEEPING} clients that keep their connections and {OPENING} that open one for each \
         visit. A client makes a request again only if no byte of it was sent. A failure is a \
         response other than 200, or a connection that broke after that.\n\n"
    );
    text += &table(
        &[
            "",
            "visits",
            "connections",
            "refused connects",
            "failures",
            "rows off",
        ],
        rows,
    );
    for failure in rolled.iter().flat_map(|rolled| &rolled.seen.failures) {
        text.push_str("\n- ");
        text.push_str(failure);
    }
    Section {
        title: "Rolling restarts",
        text,
        goals: vec![
            Goal::at_most(
                "visits that fail while replicas restart",
                0.0,
                failures as f64,
                grouped,
            ),
            Goal::at_most(
                "rows off while replicas restart",
                0.0,
                rows_off as f64,
                grouped,
            ),
        ],
    }
}
