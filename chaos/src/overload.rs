//! Sends more visits than the service can record: measures the recorded ones, the time to refuse
//! the others, and the memory.
//!
//! Visits are sent at a constant rate, whether or not earlier ones have a response. Postgres is
//! slowed by a delay and the queue is small, so that client and service can both handle ten times
//! the peak rate.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::history::{Outcome, Visit};
use lab::measure::Mebibytes;
use lab::visitor::Visitor;
use tokio::task::JoinHandle;

use crate::ground::{Ground, Needs};
use crate::service::Service;

/// The results.
#[derive(Clone, Debug)]
pub struct Overload {
    /// The peak rate of recorded visits.
    pub peak: f64,
    /// The steps above the peak rate.
    pub steps: Vec<Step>,
    /// Time from the end of the last step to the first complete visit.
    pub recovery: Option<Duration>,
    /// The longest visit in the second after the last step.
    pub aftermath: Duration,
    /// The longest visit in a second before the overload.
    pub normal: Duration,
    /// Resident memory before the overload, and its peak.
    pub memory: (Option<Mebibytes>, Option<Mebibytes>),
}

/// The results of one rate.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The intended rate, as a multiple of the peak.
    pub factor: f64,
    /// Visits sent per second.
    pub offered: f64,
    /// Visits recorded per second.
    pub goodput: f64,
    /// The 99th percentile of refusals.
    pub refusal_p99: Duration,
    /// The 99th percentile of recorded visits, timed from when they were due.
    pub accepted_p99: Duration,
    /// The highest observed queue depth.
    pub max_queue_depth: f64,
    /// Refused visits.
    pub refused: usize,
    /// Visits neither recorded nor refused.
    pub broken: usize,
}

/// The delay to and from Postgres, in each direction.
pub const DISTANCE: Duration = Duration::from_millis(40);
/// The queue's capacity.
pub const CAPACITY: usize = 16;
/// As many batches as the service has in flight at most, and one in the queue: no visit is refused.
const CLOSED_CLIENTS: usize = (4 + 1) * CAPACITY;
/// Enough that each due visit finds a free connection.
const CONNECTIONS: usize = 512;
const SECOND: Duration = Duration::from_secs(1);

/// Sends each of these multiples of the peak rate for `duration`.
pub fn run(factors: &[f64], duration: Duration) -> Result<Overload> {
    let ground = Ground::start(Needs {
        proxies: true,
        ..Needs::default()
    })?;
    ground
        .postgres_proxy
        .change(|rules| rules.delay_each_way(DISTANCE));
    let mut service = Service::new(&ground)?;
    service.set("QUEUE_CAPACITY", &CAPACITY.to_string());
    service.start()?;
    service.wait_until_ready()?;

    let visit_in_turn = |clients, duration| {
        let visits = closed(service.address, clients, duration);
        ground.runtime.block_on(visits)
    };
    visit_in_turn(CLOSED_CLIENTS, SECOND);
    let normal = longest(&visit_in_turn(1, SECOND));
    let complete =
        |visits: &[Visit]| visits.iter().filter(|visit| visit.is_complete()).count() as f64;
    let at_peak = visit_in_turn(CLOSED_CLIENTS, duration);
    let peak = complete(&at_peak) / duration.as_secs_f64();
    let before = service.memory();

    let mut steps = Vec::new();
    for &factor in factors {
        let offered = factor * peak;
        let flood = ground
            .runtime
            .spawn(open(service.address, offered, duration));
        let mut max_queue_depth = 0_f64;
        while !flood.is_finished() {
            let depth = service
                .metric("visitas_queue_depth")
                .unwrap_or(f64::INFINITY);
            max_queue_depth = max_queue_depth.max(depth);
            std::thread::sleep(Duration::from_millis(50));
        }
        let visits = ground.runtime.block_on(flood)?;
        steps.push(Step::new(factor, &visits, duration, max_queue_depth));
    }

    let ended = Instant::now();
    let after = visit_in_turn(1, SECOND);
    let first = after.iter().find(|visit| visit.is_complete());
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
    fn new(
        factor: f64,
        visits: &[(Instant, Visit)],
        duration: Duration,
        max_queue_depth: f64,
    ) -> Self {
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
        let complete = visits
            .iter()
            .filter(|(_, visit)| visit.is_complete() && in_time(visit));
        let goodput = complete.count();
        let refused = took(|visit| visit.outcome == Outcome::Refused, false);
        let accepted = took(Visit::is_recorded, true);
        let a_second = |number: usize| number as f64 / duration.as_secs_f64();
        Self {
            factor,
            offered: a_second(visits.len()),
            goodput: a_second(goodput),
            refusal_p99: p99(&refused),
            accepted_p99: p99(&accepted),
            max_queue_depth,
            refused: refused.len(),
            broken: visits.len() - refused.len() - accepted.len(),
        }
    }
}

/// The 99th percentile of sorted durations.
fn p99(sorted: &[Duration]) -> Duration {
    let index = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

fn longest(visits: &[Visit]) -> Duration {
    visits.iter().map(Visit::took).max().unwrap_or_default()
}

/// Closed loop: each client sends its next visit after a response.
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

/// Open loop: sends visits at a constant rate and returns each with the time when it was due. The
/// connections take turns.
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

/// The visits of all clients, once the last client has ended.
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
