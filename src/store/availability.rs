//! Whether a store does what a visit needs of it, as the outcome of every call tells.
//!
//! One value per store drives readiness, the refusal or skipping of calls while the store is
//! down, the gauge `visitas_dependency_up` and the log lines of an outage. It makes no call.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::Gauge;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::error::{Error, System};
use crate::metrics::catalog::DEPENDENCY_UP;

/// Whether one store is up. It starts as down: nothing is known to work before it has worked.
#[derive(Debug)]
pub struct Availability {
    system: System,
    up: AtomicBool,
    up_gauge: Gauge,
    count: AtomicI64,
    went_down: Notify,
    details: Mutex<Details>,
}

#[derive(Debug)]
struct Details {
    since: Instant,
    /// The reason that the log has for the present outage, and since when.
    reason: Option<(String, Instant)>,
    last_success: Option<Instant>,
    latency: Option<Duration>,
    relapses: u32,
}

/// A count that is not known. No store counts this far down.
const UNKNOWN: i64 = i64::MIN;
/// How long to pause after a probe that failed.
pub(super) const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause before the probe of a store that fails again whenever it is up.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A store that refuses a visit within this after a successful probe has relapsed: the probe could
/// not see what is wrong.
const RELAPSE: Duration = Duration::from_secs(1);
/// How often an outage can say that its reason has changed.
const REASON_INTERVAL: Duration = Duration::from_secs(1);

impl Availability {
    pub(super) fn new(system: System) -> Self {
        let up_gauge = DEPENDENCY_UP.with([system.name()]);
        up_gauge.set(0.0);
        Self {
            system,
            up: AtomicBool::new(false),
            up_gauge,
            count: AtomicI64::new(UNKNOWN),
            went_down: Notify::new(),
            details: Mutex::new(Details {
                since: Instant::now(),
                reason: None,
                last_success: None,
                latency: None,
                relapses: 0,
            }),
        }
    }

    /// Whether the last that is known of the store is that a visit's call succeeds.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// How long the last successful call took; `None` while the store is down.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        self.is_up().then(|| self.details().latency).flatten()
    }

    /// How many visits the store has counted, as last read; `None` while that is not known.
    #[must_use]
    pub fn count(&self) -> Option<i64> {
        let count = self.count.load(Ordering::Relaxed);
        (count != UNKNOWN).then_some(count)
    }

    /// Returns when the store goes down, at once if it is down already.
    pub(super) async fn down(&self) {
        let went_down = self.went_down.notified();
        if self.is_up() {
            went_down.await;
        }
    }

    /// How long to wait before a store that has just gone down is probed. None, except where the
    /// last probes succeeded and a visit then failed at once: then it doubles each time.
    pub(super) fn relapse_pause(&self) -> Duration {
        match self.details().relapses {
            0 => Duration::ZERO,
            relapses => pause_after(relapses),
        }
    }

    /// A call that a visit needs, or a probe that does the same, has succeeded.
    pub(super) fn succeeded(&self, took: Duration) {
        let mut details = self.details();
        let now = Instant::now();
        details.last_success = Some(now);
        details.latency = Some(took);
        if self.up.swap(true, Ordering::AcqRel) {
            return;
        }
        self.up_gauge.set(1.0);
        if details.reason.take().is_some() {
            info!(
                store = self.system.name(),
                down.seconds = (now - details.since).as_secs_f64(),
                "store is up again"
            );
        }
        details.since = now;
    }

    /// A call that a visit needs, or a probe, has failed.
    pub(super) fn failed(&self, error: &Error) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        let mut details = self.details();
        let now = Instant::now();
        if self.up.swap(false, Ordering::AcqRel) {
            let was_up = now - details.since;
            // A connection that breaks is no fault that a probe could not see. And what has been up
            // for longer than it was made to wait is not the same fault.
            let relapsed = error.is_definite() && was_up < RELAPSE + pause_after(details.relapses);
            details.relapses = if relapsed {
                details.relapses.saturating_add(1)
            } else {
                0
            };
            details.since = now;
            self.up_gauge.set(0.0);
        }
        self.went_down.notify_waiters();
        let error = error.chain();
        let message = match &details.reason {
            None => "store is down",
            Some((reason, since)) if *reason != error && now - *since >= REASON_INTERVAL => {
                "store is still down"
            }
            Some(_) => return,
        };
        warn!(store = self.system.name(), error, "{message}");
        details.reason = Some((error, now));
    }

    /// A reading has succeeded: it tells how fast the store answers, not that it takes visits.
    pub(super) fn read(&self, count: i64, took: Duration) {
        self.count.store(count, Ordering::Relaxed);
        self.details().latency = Some(took);
    }

    /// A reading that began at `began` has failed. It counts only where no visit has succeeded
    /// since: a reading can fail for a reason that does not concern visits.
    pub(super) fn reading_failed(&self, began: Instant, error: &Error) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        if self.details().last_success.is_none_or(|last| last < began) {
            self.failed(error);
        }
    }

    fn details(&self) -> MutexGuard<'_, Details> {
        // Nothing panics while it holds this lock; if something did, the details would still be
        // whole, since each field stands alone.
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pause that so many relapses in a row have grown to.
fn pause_after(relapses: u32) -> Duration {
    PROBE_PAUSE
        .saturating_mul(1 << relapses.min(10))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::error::Cause;

    #[test]
    fn pause_grows_while_a_store_fails_right_after_each_probe() {
        let availability = Availability::new(System::Redis);
        let error = Error::Refused {
            code: "P0001".to_owned(),
            source: Cause::from("not today"),
        };
        let mut pauses = Vec::new();
        for _ in 0..8 {
            availability.succeeded(Duration::ZERO);
            availability.failed(&error);
            pauses.push(availability.relapse_pause());
        }
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert_eq!(pauses[0], 2 * PROBE_PAUSE);
        assert_eq!(pauses[7], LONGEST_PAUSE);
    }

    #[test]
    fn first_outage_is_probed_at_once() {
        let availability = Availability::new(System::Redis);
        availability.succeeded(Duration::ZERO);
        availability.details().since -= Duration::from_mins(1);
        availability.failed(&Error::Timeout(Duration::ZERO));
        assert_eq!(availability.relapse_pause(), Duration::ZERO);
        // A network that is cut again and again is probed at once each time.
        availability.succeeded(Duration::ZERO);
        availability.failed(&Error::Connection(Cause::from("reset")));
        assert_eq!(availability.relapse_pause(), Duration::ZERO);
    }
}
