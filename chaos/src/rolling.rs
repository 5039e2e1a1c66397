//! Restarts replicas in turn, many times, under clients that keep their connections.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::measure::grouped;
use lab::report::{Goal, Section, table};
use lab::rolling::{Crowd, Relay, Replicas, Tally};

use crate::ground::{Ground, Needs};
use crate::service::Service;

/// The results.
#[derive(Clone, Debug)]
pub struct Rolling {
    /// How clients choose a replica.
    pub way: &'static str,
    /// The counts of the clients.
    pub tally: Tally,
    /// The difference between the number of rows and of acknowledged visits.
    pub rows_off: usize,
}

const REPLICAS: usize = 3;
/// The numbers of clients that keep their connections, and of clients that open one for each visit.
const KEEPING: usize = 16;
const OPENING: usize = 4;
/// How long a stopping replica keeps serving, so that balancers notice.
const DELAY: &str = "500ms";
/// Long timeouts, so that a disk that stalls for a second fails no visit.
const SETTINGS: [(&str, &str); 4] = [
    ("SHUTDOWN_DELAY", DELAY),
    ("SHUTDOWN_TIMEOUT", "20s"),
    ("DB_TIMEOUT", "8s"),
    ("VISIT_TIMEOUT", "9s"),
];
/// The pause between two restarts, so that clients return to the started replica.
const PAUSE: Duration = Duration::from_millis(300);
/// `SHUTDOWN_DELAY`, `SHUTDOWN_TIMEOUT` and a margin.
const STOP_TIMEOUT: Duration = Duration::from_secs(21);

/// Restarts replicas `restarts` times, half of them under clients that choose an address and half
/// under clients behind a balancer.
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
        service.wait_until_ready()?;
        replicas.add(service.address);
        services.push(service);
    }
    let crowd = Crowd::start(KEEPING, OPENING, known);
    for restart in 0..restarts {
        std::thread::sleep(PAUSE);
        let service = &mut services[restart % REPLICAS];
        service.terminate()?;
        let ended = service.wait_for_exit(STOP_TIMEOUT)?;
        ensure!(
            ended == Some(true),
            "a replica did not stop successfully: {ended:?}"
        );
        replicas.remove(service.address);
        service.start()?;
        service.wait_until_ready()?;
        replicas.add(service.address);
    }
    std::thread::sleep(PAUSE);
    let tally = crowd.leave();
    let rows: usize = ground.sql("select count(*) from visitas")?.parse()?;
    Ok(Rolling {
        way,
        rows_off: rows.abs_diff(tally.visits),
        tally,
    })
}

/// The report's section.
pub fn section(restarts: usize, results: &[Rolling]) -> Section {
    let count = |number: usize| grouped(number as f64);
    let rows = results.iter().map(
        |Rolling {
             way,
             tally,
             rows_off,
         }| {
            [
                (*way).to_owned(),
                count(tally.visits),
                count(tally.connections),
                count(tally.refused),
                count(tally.failures.len()),
                count(*rows_off),
            ]
        },
    );
    let failures: usize = results
        .iter()
        .map(|results| results.tally.failures.len())
        .sum();
    let rows_off: usize = results.iter().map(|results| results.rows_off).sum();
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
    for failure in results.iter().flat_map(|results| &results.tally.failures) {
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
