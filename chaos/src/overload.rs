//! More visits than can be recorded: what still is, how soon the others are refused, and what it
//! costs.
//!
//! Visits come at a constant rate, whether or not earlier ones have been answered. So that client
//! and service both keep up with ten times what can be recorded, Postgres is made slow: it is some
//! way off, and few visits may wait.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::history::{Outcome, Visit};
use lab::measure::Mebibytes;
use lab::visitor::Visitor;
use tokio::task::JoinHandle;

use crate::ground::{Ground, Needs};
use crate::service::Service;

/// What came of it.
#[derive(Clone, Debug)]
pub struct Overload {
    /// Visits recorded in a second, when as many come as can be.
    pub peak: f64,
    /// Each with more than that.
    pub steps: Vec<Step>,
    /// From the end of the last step to the first good visit.
    pub recovery: Option<Duration>,
    /// The worst latency of the visits in the second after it.
    pub aftermath: Duration,
    /// The worst latency of as many visits before anything.
    pub normal: Duration,
    /// Resident memory before, and the most of it.
    pub memory: (Option<Mebibytes>, Option<Mebibytes>),
}

/// One rate of visits.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What was to come, as a multiple of the peak.
    pub factor: f64,
    /// Visits that came in a second.
    pub offered: f64,
    /// Visits that were recorded in a second.
    pub goodput: f64,
    /// Of a hundred refusals one took longer.
    pub refusal_p99: Duration,
    /// Of a hundred visits that were recorded one took longer, from when it was due.
    pub accepted_p99: Duration,
    /// The most visits that were seen to wait.
    pub deepest: f64,
    /// Visits that were refused.
    pub refused: usize,
    /// Neither recorded nor refused.
    pub broken: usize,
}

/// Each way.
const DISTANCE: Duration = Duration::from_millis(10);
/// How many visits may wait.
pub const CAPACITY: usize = 16;
/// A batch on its way and one that waits: nobody is refused.
const CLOSED_CLIENTS: usize = 2 * CAPACITY;
/// Enough that one is free for each visit that is due.
const CONNECTIONS: usize = 512;
const SECOND: Duration = Duration::from_secs(1);

/// Offers each of these multiples of the peak for so long.
pub fn run(factors: &[f64], duration: Duration) -> Result<Overload> {
    let ground = Ground::start(Needs {
        proxies: true,
        ..Needs::default()
    })?;
    ground
        .way_to_postgres
        .change(|rules| rules.delay_each_way(DISTANCE));
    let mut service = Service::new(&ground)?;
    service.set("QUEUE_CAPACITY", &CAPACITY.to_string());
    service.start()?;
    service.until_ready()?;

    let visit_in_turn = |clients, duration| {
        let visits = closed(service.address, clients, duration);
        ground.runtime.block_on(visits)
    };
    visit_in_turn(CLOSED_CLIENTS, SECOND);
    let normal = longest(&visit_in_turn(1, SECOND));
    let good = |visits: &[Visit]| visits.iter().filter(|visit| visit.is_good()).count() as f64;
    let at_peak = visit_in_turn(CLOSED_CLIENTS, duration);
    let peak = good(&at_peak) / duration.as_secs_f64();
    let before = service.memory();

    let mut steps = Vec::new();
    for &factor in factors {
        let offered = factor * peak;
        let flood = ground
            .runtime
            .spawn(open(service.address, offered, duration));
        let mut deepest = 0_f64;
        while !flood.is_finished() {
            let depth = service
                .metric("visitas_queue_depth")
                .unwrap_or(f64::INFINITY);
            deepest = deepest.max(depth);
            std::thread::sleep(Duration::from_millis(50));
        }
        let visits = ground.runtime.block_on(flood)?;
        steps.push(Step::new(factor, &visits, duration, deepest));
    }

    let ended = Instant::now();
    let after = visit_in_turn(1, SECOND);
    let first = after.iter().find(|visit| visit.is_good());
    Ok(Overload {
        peak,
        steps,
        recovery: first.map(|visit| visit.ended - ended),
        aftermath: longest(&after),
        normal,
        memory: (before, service.peak_memory()),
    })
}

impl Step {
    fn new(factor: f64, visits: &[(Instant, Visit)], duration: Duration, deepest: f64) -> Self {
        let took = |wanted: fn(&Visit) -> bool, since_due: bool| {
            let wanted = visits.iter().filter(|(_, visit)| wanted(visit));
            let mut took: Vec<_> = wanted
                .map(|(due, visit)| {
                    if since_due {
                        visit.ended - *due
                    } else {
                        visit.took()
                    }
                })
                .collect();
            took.sort_unstable();
            took
        };
        let end = visits
            .iter()
            .map(|(due, _)| *due)
            .min()
            .map(|start| start + duration);
        let in_time = |visit: &Visit| end.is_some_and(|end| visit.ended <= end);
        let good = visits
            .iter()
            .filter(|(_, visit)| visit.is_good() && in_time(visit));
        let goodput = good.count();
        let refused = took(|visit| visit.outcome == Outcome::Refused, false);
        let accepted = took(Visit::is_recorded, true);
        let a_second = |number: usize| number as f64 / duration.as_secs_f64();
        Self {
            factor,
            offered: a_second(visits.len()),
            goodput: a_second(goodput),
            refusal_p99: p99(&refused),
            accepted_p99: p99(&accepted),
            deepest,
            refused: refused.len(),
            broken: visits.len() - refused.len() - accepted.len(),
        }
    }
}

/// Of sorted durations.
fn p99(sorted: &[Duration]) -> Duration {
    let index = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

fn longest(visits: &[Visit]) -> Duration {
    visits.iter().map(Visit::took).max().unwrap_or_default()
}

/// Each client visits again once it is answered.
async fn closed(address: SocketAddr, clients: usize, duration: Duration) -> Vec<Visit> {
    let end = Instant::now() + duration;
    let clients: Vec<_> = (0..clients)
        .map(|client| {
            tokio::spawn(async move {
                let mut visitor = Visitor::new(client, 0, address);
                let mut visits = Vec::new();
                while Instant::now() < end {
                    visits.push(visitor.visit().await);
                }
                visits
            })
        })
        .collect();
    all(clients).await
}

/// So many visits a second, each with the moment when it was due. The connections take turns.
async fn open(address: SocketAddr, rate: f64, duration: Duration) -> Vec<(Instant, Visit)> {
    let start = Instant::now();
    let end = start + duration;
    let interval = Duration::from_secs_f64(CONNECTIONS as f64 / rate);
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|index| {
            let mut due = start + interval.mul_f64(index as f64 / CONNECTIONS as f64);
            tokio::spawn(async move {
                let mut visitor = Visitor::new(index, 0, address);
                let mut visits = Vec::new();
                while due < end {
                    tokio::time::sleep_until(due.into()).await;
                    visits.push((due, visitor.visit().await));
                    due += interval;
                }
                visits
            })
        })
        .collect();
    all(clients).await
}

/// What all clients made, once the last has ended.
async fn all<T>(clients: Vec<JoinHandle<Vec<T>>>) -> Vec<T> {
    let mut all = Vec::new();
    for client in clients {
        // A client does not panic.
        all.extend(client.await.unwrap_or_default());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_hundred_takes_longer_than_the_99th_percentile() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(p99(&sorted), Duration::from_millis(198));
        assert_eq!(p99(&[]), Duration::ZERO);
    }
}
