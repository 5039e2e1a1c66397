//! Clients that visit at once, and the responses that they got.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use lab::history::{self, History, Outcome, Verdict, judge};
use lab::stack;
use lab::visitor::Visitor;
use serde_json::Value;
use tokio::task::JoinSet;

use super::{SOON, Service, World};

/// One visit as its client saw it.
#[derive(Debug, Clone)]
pub(crate) struct Visit {
    /// Which client it was.
    pub(crate) client: usize,
    /// When it was sent.
    pub(crate) sent: Instant,
    /// How long the response took.
    pub(crate) took: Duration,
    /// The status, or 0 if there was no answer.
    pub(crate) status: u16,
    /// Whether the response names a trace.
    pub(crate) sampled: bool,
    /// The response's fields.
    pub(crate) json: Value,
    /// The same visit for the judge of histories.
    judged: history::Visit,
}

impl Visit {
    async fn make(visitor: &mut Visitor) -> Self {
        let judged = visitor.visit().await;
        let response = visitor.response();
        Self {
            client: judged.client,
            sent: judged.sent,
            took: judged.took(),
            status: response.map_or(0, |(head, _)| head.status),
            sampled: response.is_some_and(|(head, _)| head.sampled),
            json: response.map_or(Value::Null, |(_, body)| body.clone()),
            judged,
        }
    }

    /// The number in Postgres of a visit that was acknowledged.
    pub(crate) fn total(&self) -> Option<i64> {
        self.judged.total
    }

    /// The number in Redis, if there is one.
    pub(crate) fn redis(&self) -> Option<i64> {
        self.judged.redis
    }

    /// When its response was read.
    pub(crate) fn answered(&self) -> Instant {
        self.judged.ended
    }
}

/// What the judge of histories finds in all visits that were made in a world, in which Redis was
/// down between two lives at these times.
pub(crate) async fn verdict(
    world: &World,
    visits: &[Visit],
    redis_outages: &[Range<Instant>],
) -> Verdict {
    let rows = stack::rows(&world.postgres, &world.database).expect("the rows");
    let visits: Vec<_> = visits.iter().map(|visit| visit.judged).collect();
    let is_wrong = |visit: &history::Visit| matches!(visit.outcome, Outcome::Wrong(_));
    assert!(!visits.iter().any(is_wrong), "{visits:?}");
    judge(History {
        visits: &visits,
        rows: &rows,
        redis_outages,
    })
}

/// Clients that go on visiting until they are stopped.
pub(crate) struct Load {
    going: Arc<AtomicBool>,
    clients: JoinSet<Vec<Visit>>,
}

impl Load {
    /// Starts clients, each of which keeps one connection and visits again once it is answered.
    pub(crate) fn start(services: &[&Service], clients: usize) -> Self {
        Self::start_until(services, clients, i64::MAX)
    }

    fn start_until(services: &[&Service], clients: usize, visits: i64) -> Self {
        let going = Arc::new(AtomicBool::new(true));
        let left = Arc::new(AtomicI64::new(visits));
        let mut set = JoinSet::new();
        for client in 0..clients {
            let replica = client % services.len();
            let visitor = Visitor::new(client, replica, services[replica].address);
            let mut visitor = visitor.with_timeout(6 * SOON);
            let (going, left) = (Arc::clone(&going), Arc::clone(&left));
            set.spawn(async move {
                let mut visits = Vec::new();
                while going.load(Ordering::Relaxed) && left.fetch_sub(1, Ordering::Relaxed) > 0 {
                    let visit = Visit::make(&mut visitor).await;
                    if visit.status != 200 {
                        // A refusal is quick; asking again at once would only heat the machine.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    visits.push(visit);
                }
                visits
            });
        }
        Self {
            going,
            clients: set,
        }
    }

    /// Lets every client finish its last visit and returns all of them.
    pub(crate) async fn stop(self) -> Vec<Visit> {
        self.going.store(false, Ordering::Relaxed);
        self.finish().await
    }

    async fn finish(mut self) -> Vec<Visit> {
        let mut visits = Vec::new();
        while let Some(client) = self.clients.join_next().await {
            visits.extend(client.expect("a client does not panic"));
        }
        visits
    }
}

/// Makes so many visits from so many clients and returns all of them.
pub(crate) async fn visits(services: &[&Service], clients: usize, count: i64) -> Vec<Visit> {
    Load::start_until(services, clients, count).finish().await
}

/// Whether these are exactly the numbers from 1 to their count.
pub(crate) fn are_one_to_n(numbers: impl Iterator<Item = Option<i64>>) -> bool {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_unstable();
    (1..)
        .map(Some)
        .zip(&numbers)
        .all(|(expected, number)| expected == *number)
}
