//! Watches both stores: probes one that is down until a visit would succeed, and reads what those
//! that are up have counted.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::availability::{Availability, PROBE_PAUSE};
use super::error::Error;
use crate::metrics::catalog::{DRIFT, REDIS_VISITS, ROWS};

/// A store that is watched.
pub trait Store {
    /// Whether the store does what a visit needs, as far as is known.
    fn availability(&self) -> &Availability;

    /// The longest that a call takes.
    fn timeout(&self) -> Duration;

    /// Does on a new connection all that a visit needs, and keeps nothing of it. If it succeeds
    /// the store is up, and the connection is there for the next visit.
    ///
    /// # Errors
    ///
    /// Why a visit would fail.
    fn probe(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// How many visits the store has counted.
    ///
    /// # Errors
    ///
    /// Why it could not be read.
    fn total(&self) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Publishes what the store's connections are doing.
    fn report(&self);
}

/// How often the stores are read: what they have counted, and whether they still answer.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// Watches both stores for as long as the future is polled. Counts and drift are `NaN` before.
pub fn watch(postgres: Arc<impl Store>, redis: Arc<impl Store>) -> impl Future<Output = ()> {
    publish(None, None, None);
    async move {
        let publish = |drift| {
            let rows = postgres.availability().count();
            publish(rows, redis.availability().count(), drift);
        };
        tokio::join!(
            recover(&*postgres, publish),
            recover(&*redis, publish),
            read(&*postgres, &*redis, publish)
        );
    }
}

/// Sets the gauges of what the stores have counted, as far as is known.
fn publish(rows: Option<i64>, redis: Option<i64>, drift: Option<i64>) {
    for (gauge, count) in [(ROWS, rows), (REDIS_VISITS, redis), (DRIFT, drift)] {
        let value = count.map_or(f64::NAN, |count| count as f64);
        gauge.with([]).set(value);
    }
}

/// Probes a store whenever it is down. A probe does what a visit needs, so a store is marked up
/// only if a visit would succeed.
async fn recover(store: &impl Store, publish: impl Fn(Option<i64>)) {
    let availability = store.availability();
    loop {
        availability.down().await;
        // Its counts are unknown from here on.
        publish(None);
        tokio::time::sleep(availability.relapse_pause()).await;
        while !availability.is_up() && Box::pin(store.probe()).await.is_err() {
            tokio::time::sleep(PROBE_PAUSE).await;
        }
    }
}

/// Reads what both stores have counted. Redis is read before Postgres and again after it, when no
/// increment of a batch that Postgres had recorded by then can still be in flight. So visits that
/// come meanwhile are not taken for a difference between the two.
async fn read(postgres: &impl Store, redis: &impl Store, publish: impl Fn(Option<i64>)) {
    let mut ticks = tokio::time::interval(READ_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let before = read_if_up(redis).await;
        let rows = read_if_up(postgres).await;
        tokio::time::sleep(redis.timeout()).await;
        let after = read_if_up(redis).await;
        let drift = match (rows, before, after) {
            (Some(rows), Some(before), Some(after)) => Some(nearest_drift(rows, before, after)),
            _ => None,
        };
        publish(drift);
    }
}

/// What a store has counted; `None` while that is unknown. The availability has the reason.
async fn read_if_up(store: &impl Store) -> Option<i64> {
    if store.availability().is_up() {
        store.total().await.ok()
    } else {
        None
    }
}

/// The distance of the rows from Redis that is certain: the smallest that any value of Redis
/// between its two readings has.
fn nearest_drift(rows: i64, before: i64, after: i64) -> i64 {
    let (low, high) = (before.min(after), before.max(after));
    match (rows.cmp(&low), rows.cmp(&high)) {
        (Ordering::Less, _) => rows.saturating_sub(low),
        (_, Ordering::Greater) => rows.saturating_sub(high),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::nearest_drift;

    #[test]
    fn visits_between_the_readings_are_no_drift() {
        assert_eq!(nearest_drift(105, 100, 110), 0);
        assert_eq!(nearest_drift(100, 100, 100), 0);
        assert_eq!(nearest_drift(97, 100, 110), -3);
        assert_eq!(nearest_drift(113, 100, 110), 3);
        // The cache has started over between the readings.
        assert_eq!(nearest_drift(105, 104, 1), 1);
    }
}
