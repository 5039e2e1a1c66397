//! Whether a store does what a visit needs of it, as the outcome of every call tells.
//!
//! One value per store drives readiness, the refusal or skipping of calls while the store is
//! down, the gauge `visitas_dependency_up` and the two log lines of an outage. It makes no call.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::{info, warn};

use super::Error;
use crate::telemetry::metric::{self, System};

/// The state of one store. It starts as down: nothing is known to work before it has worked.
#[derive(Debug)]
pub struct State {
    system: System,
    up: AtomicBool,
    count: AtomicI64,
    went_down: Notify,
    details: Mutex<Details>,
}

#[derive(Debug)]
struct Details {
    since: Instant,
    announced: bool,
    last_success: Option<Instant>,
    latency: Option<Duration>,
}

/// A count that is not known. No store counts this far down.
const UNKNOWN: i64 = i64::MIN;

impl State {
    pub(super) fn new(system: System) -> Self {
        metric::dependency_up(system, false);
        Self {
            system,
            up: AtomicBool::new(false),
            count: AtomicI64::new(UNKNOWN),
            went_down: Notify::new(),
            details: Mutex::new(Details {
                since: Instant::now(),
                announced: false,
                last_success: None,
                latency: None,
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
    pub async fn down(&self) {
        let went_down = self.went_down.notified();
        if self.is_up() {
            went_down.await;
        }
    }

    /// A call that a visit needs, or a probe that does the same, has succeeded.
    pub(super) fn succeeded(&self, took: Duration) {
        let mut details = self.details();
        details.last_success = Some(Instant::now());
        details.latency = Some(took);
        if self.up.swap(true, Ordering::AcqRel) {
            return;
        }
        metric::dependency_up(self.system, true);
        if details.announced {
            info!(
                store = self.system.name(),
                down.seconds = details.since.elapsed().as_secs_f64(),
                "store is up again"
            );
        }
        details.announced = false;
        details.since = Instant::now();
    }

    /// A call that a visit needs, or a probe, has failed.
    pub(super) fn failed(&self, error: &Error) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        let mut details = self.details();
        if self.up.swap(false, Ordering::AcqRel) {
            details.since = Instant::now();
            metric::dependency_up(self.system, false);
        }
        self.went_down.notify_waiters();
        if !details.announced {
            details.announced = true;
            warn!(
                store = self.system.name(),
                error = error.chain(),
                "store is down"
            );
        }
    }

    /// A reading has succeeded: it tells how fast the store answers, not that it takes visits.
    pub(super) fn read(&self, count: i64, took: Duration) {
        self.count.store(count, Ordering::Relaxed);
        self.details().latency = Some(took);
    }

    /// A reading that began at `began` has failed. It counts only where no visit has succeeded
    /// since: a reading may fail for a reason that does not concern visits.
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
