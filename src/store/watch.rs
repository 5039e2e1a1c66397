//! Watches both stores: probes a store that is down until a visit would succeed, and reads the
//! counts of stores that are up.
//!
//! Must not know: SQL and Redis commands.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::availability::{Availability, PROBE_PAUSE};
use super::error::Error;
use crate::metrics::catalog::{DRIFT, REDIS_VISITS, ROWS};

/// A store that is watched.
pub trait Store {
    /// Whether the store is up.
    fn availability(&self) -> &Availability;

    /// The timeout of a call.
    fn timeout(&self) -> Duration;

    /// Rehearses a visit on a new connection, without recording it. If it succeeds, the store is up
    /// and the connection is in the pool.
    ///
    /// # Errors
    ///
    /// Why a visit would fail.
    fn probe(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// How many visits the store has counted.
    ///
    /// # Errors
    ///
    /// Why the count could not be read.
    fn total(&self) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Publishes the state of the store's connections.
    fn report(&self);
}

/// How often the counts of the stores are read.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// Watches both stores for as long as the future is polled. Sets counts and drift to `NaN` before.
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

/// Sets the gauges of the counts and of the drift; `None` is unknown.
fn publish(rows: Option<i64>, redis: Option<i64>, drift: Option<i64>) {
    for (gauge, count) in [(ROWS, rows), (REDIS_VISITS, redis), (DRIFT, drift)] {
        let value = count.map_or(f64::NAN, |count| count as f64);
        gauge.with([]).set(value);
    }
}

/// Probes a store whenever it is down, or has refused a reading. A probe does what a visit needs, so
/// a store is marked up only if a visit would succeed, and down if not.
async fn recover(store: &impl Store, publish: impl Fn(Option<i64>)) {
    let availability = store.availability();
    loop {
        availability.wait_until_probe_is_due().await;
        // From now on the store's count is unknown.
        publish(None);
        tokio::time::sleep(availability.relapse_pause()).await;
        while Box::pin(store.probe()).await.is_err() {
            tokio::time::sleep(PROBE_PAUSE).await;
        }
        availability.report_refused_reading();
    }
}

/// How much longer than `REDIS_TIMEOUT` after a commit an increment of its batch can be in flight: the
/// reply of Postgres travels, and timers are late.
const SETTLE_MARGIN: Duration = Duration::from_millis(50);

/// How long after a commit no increment of its batch is in flight any more.
#[must_use]
pub fn settle_time(redis_timeout: Duration) -> Duration {
    redis_timeout + SETTLE_MARGIN
}

/// Reads the counts of both stores. Redis is read before Postgres and again after it, once no
/// increment of a batch in that reading of Postgres can still be in flight. So visits that arrive
/// meanwhile do not count as drift.
async fn read(postgres: &impl Store, redis: &impl Store, publish: impl Fn(Option<i64>)) {
    let mut ticks = tokio::time::interval(READ_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let before = read_if_up(redis).await;
        let rows = read_if_up(postgres).await;
        tokio::time::sleep(settle_time(redis.timeout())).await;
        let after = read_if_up(redis).await;
        let drift = match (rows, before, after) {
            (Some(rows), Some(before), Some(after)) => Some(nearest_drift(rows, before, after)),
            _ => None,
        };
        publish(drift);
    }
}

/// Reads the count of a store that is up; `None` on failure, whose reason the availability has.
async fn read_if_up(store: &impl Store) -> Option<i64> {
    if store.availability().is_up() {
        store.total().await.ok()
    } else {
        None
    }
}

/// The drift that is certain: the smallest distance of the rows from any value that Redis can have
/// had between its two readings.
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
    use std::time::Duration;

    use super::{nearest_drift, settle_time};

    #[test]
    fn increments_have_ended_once_the_stores_have_settled() {
        for timeout in [Duration::from_millis(1), Duration::from_secs(1)] {
            assert!(settle_time(timeout) > timeout);
        }
    }

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
