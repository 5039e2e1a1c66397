//! Whether a store is up: whether a visit's call would succeed, derived from the outcome of calls.
//!
//! One value per store drives readiness, the refusal or skipping of calls while the store is down,
//! the gauge `visitas_dependency_up` and the log lines of an outage. Several calls can be in flight:
//! the outcome of a call that began before the last change says nothing about the store since, so
//! the calls that fail together are one outage. Must not know: how a call is made.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use metrics::Gauge;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use super::error::{Error, System};
use crate::metrics::catalog::DEPENDENCY_UP;

/// Whether one store is up. It starts as down, until a first call has succeeded.
#[derive(Debug)]
pub struct Availability {
    system: System,
    up: AtomicBool,
    up_gauge: Gauge,
    count: AtomicI64,
    probe_due: Notify,
    changes: watch::Sender<()>,
    details: Mutex<Details>,
}

#[derive(Debug)]
struct Details {
    since: Instant,
    /// The same moment by the wall clock, for people.
    since_time: SystemTime,
    /// The last count that was read, and when; kept while the count is unknown.
    last_count: Option<(i64, SystemTime)>,
    /// When the batch ended whose count this is.
    last_batch: Option<Instant>,
    /// The reason in the last log line of the current outage, and when that was logged.
    reason: Option<(String, Instant)>,
    /// Why the last reading was refused, until a probe has succeeded.
    refused_reading: Option<String>,
    /// When the reason of a refused reading was logged last.
    refusal_reported: Option<Instant>,
    last_success: Option<Instant>,
    latency: Option<Duration>,
    relapses: u32,
}

/// The value of `count` while it is unknown. No store reaches it.
const UNKNOWN: i64 = i64::MIN;
/// How long to pause after a probe that failed.
pub(super) const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause before the probe of a store that relapses.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A store that refuses a visit this soon after a successful probe has relapsed: the probe does not
/// detect its fault.
const RELAPSE: Duration = Duration::from_secs(1);
/// Minimum time between log lines about a changed reason of an outage.
const REASON_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum time between log lines about refused readings of a store that is up.
const REFUSAL_INTERVAL: Duration = Duration::from_mins(1);

impl Availability {
    pub(super) fn new(system: System) -> Self {
        let up_gauge = DEPENDENCY_UP.with([system.name()]);
        up_gauge.set(0.0);
        Self {
            system,
            up: AtomicBool::new(false),
            up_gauge,
            count: AtomicI64::new(UNKNOWN),
            probe_due: Notify::new(),
            changes: watch::Sender::new(()),
            details: Mutex::new(Details {
                since: Instant::now(),
                since_time: SystemTime::now(),
                last_count: None,
                last_batch: None,
                reason: None,
                refused_reading: None,
                refusal_reported: None,
                last_success: None,
                latency: None,
                relapses: 0,
            }),
        }
    }

    /// Whether a visit's call would succeed, by the last call or probe.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// How long the last successful call took; `None` while the store is down.
    #[must_use]
    pub fn latency(&self) -> Option<Duration> {
        self.is_up().then(|| self.details().latency).flatten()
    }

    /// How many visits the store has counted, by the last reading or batch; `None` while unknown.
    #[must_use]
    pub fn count(&self) -> Option<i64> {
        let count = self.count.load(Ordering::Relaxed);
        (count != UNKNOWN).then_some(count)
    }

    /// Since when the store has been up or down.
    #[must_use]
    pub fn since(&self) -> SystemTime {
        self.details().since_time
    }

    /// The last count that was read, even if it is unknown by now, and when it was read.
    #[must_use]
    pub fn last_count(&self) -> Option<(i64, SystemTime)> {
        self.details().last_count
    }

    /// Sees each change from up to down and back, if only the last of several.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Waits until only a probe can tell whether a visit would succeed: until the store is down, or
    /// has refused a reading. Returns at once if it is down already.
    pub(super) async fn wait_until_probe_is_due(&self) {
        let probe_due = self.probe_due.notified();
        if self.is_up() {
            probe_due.await;
        }
    }

    /// How long to wait before the first probe: zero, unless the store has just gone down and visits
    /// failed right after the last successful probes. Then it doubles each time.
    pub(super) fn relapse_pause(&self) -> Duration {
        match self.details().relapses {
            relapses if relapses > 0 && !self.is_up() => pause_after(relapses),
            _ => Duration::ZERO,
        }
    }

    /// Whether the outcome of a call that began at this moment no longer matters.
    pub(super) fn is_outdated(&self, began: Instant) -> bool {
        began < self.details().since
    }

    /// Records that a visit's call, or a probe, that began at this moment has succeeded.
    pub(super) fn record_success(&self, began: Instant) {
        let mut details = self.details();
        if began < details.since {
            return;
        }
        let now = Instant::now();
        details.last_success = Some(now);
        details.latency = Some(now - began);
        if self.up.swap(true, Ordering::AcqRel) {
            return;
        }
        self.up_gauge.set(1.0);
        details.since_time = SystemTime::now();
        self.changes.send_replace(());
        if details.reason.take().is_some() {
            info!(
                store = self.system.name(),
                down.seconds = (now - details.since).as_secs_f64(),
                "store is up again"
            );
        }
        details.since = now;
    }

    /// Records that a visit's call, or a probe, has failed, which is not outdated.
    pub(super) fn record_failure(&self, error: &Error) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        let mut details = self.details();
        let now = Instant::now();
        if self.up.swap(false, Ordering::AcqRel) {
            let was_up = now - details.since;
            // A probe detects a broken connection. And if the store was up for longer than the last
            // pause, this is another fault.
            let relapsed = error.is_definite() && was_up < RELAPSE + pause_after(details.relapses);
            details.relapses = if relapsed {
                details.relapses.saturating_add(1)
            } else {
                0
            };
            details.since = now;
            details.since_time = SystemTime::now();
            self.up_gauge.set(0.0);
            self.changes.send_replace(());
        }
        self.probe_due.notify_waiters();
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

    /// Records a reading that succeeded. It measures the latency; it does not show that visits
    /// succeed.
    pub(super) fn record_reading(&self, count: i64, took: Duration) {
        let mut details = self.details();
        details.refused_reading = None;
        details.latency = Some(took);
        // A batch that has ended since the reading began knows better.
        let is_newer = |batch: Instant| batch.elapsed() <= took;
        let is_known = self.count.load(Ordering::Relaxed) != UNKNOWN;
        if !(is_known && details.last_batch.is_some_and(is_newer)) {
            self.count.store(count, Ordering::Relaxed);
            details.last_count = Some((count, SystemTime::now()));
        }
    }

    /// Records the count that a batch has left whose call began at this moment, so that a visit that
    /// was answered is in it. Of two batches that were in flight together the one with the higher
    /// count was recorded later, whichever ends first. An unknown count of a store that is down stays
    /// unknown.
    pub fn record_count(&self, count: i64, began: Instant) {
        let mut details = self.details();
        let known = self.count.load(Ordering::Relaxed);
        let overlaps = details.last_batch.is_some_and(|ended| began < ended);
        // A reading can end well after the store went down, and before the batch.
        let is_known = self.is_up() || known != UNKNOWN;
        if is_known && !(overlaps && count < known) {
            self.count.store(count, Ordering::Relaxed);
            details.last_count = Some((count, SystemTime::now()));
            details.last_batch = Some(Instant::now());
        }
    }

    /// Whether a visit, or a probe, has succeeded since this moment. If so, a reading that began then
    /// and has failed did so for a reason that does not concern visits.
    pub(super) fn has_succeeded_since(&self, began: Instant) -> bool {
        self.details()
            .last_success
            .is_some_and(|last| last >= began)
    }

    /// Records that a reading that started at `began` has failed. The failure counts only if no
    /// visit has succeeded since.
    pub(super) fn record_reading_failure(&self, began: Instant, error: &Error) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        if !self.has_succeeded_since(began) {
            self.record_failure(error);
        }
    }

    /// Records that the store, which responds, has refused a reading. If no visit has succeeded
    /// meanwhile, a probe is needed to tell whether the store is up: a visit needs other objects.
    pub(super) fn record_refused_reading(&self, error: &Error, needs_probe: bool) {
        self.count.store(UNKNOWN, Ordering::Relaxed);
        self.details().refused_reading = Some(error.chain());
        if needs_probe {
            self.probe_due.notify_waiters();
        } else {
            self.report_refused_reading();
        }
    }

    /// Logs why the count of a store that is up was not read, once a minute at most.
    pub(super) fn report_refused_reading(&self) {
        let mut details = self.details();
        let is_due = details
            .refusal_reported
            .is_none_or(|last| last.elapsed() >= REFUSAL_INTERVAL);
        if let Some(error) = details.refused_reading.take()
            && self.is_up()
            && is_due
        {
            details.refusal_reported = Some(Instant::now());
            warn!(
                store = self.system.name(),
                error, "count cannot be read, visits are recorded"
            );
        }
    }

    fn details(&self) -> MutexGuard<'_, Details> {
        // No code panics while it holds this lock; if some did, the details would still be
        // consistent, since each field is independent.
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pause after this many relapses in a row.
fn pause_after(relapses: u32) -> Duration {
    PROBE_PAUSE
        .saturating_mul(1 << relapses.min(10))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

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
            availability.record_success(Instant::now());
            availability.record_failure(&error);
            pauses.push(availability.relapse_pause());
        }
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert_eq!(pauses[0], 2 * PROBE_PAUSE);
        assert_eq!(pauses[7], LONGEST_PAUSE);
        // A store that refuses a reading is probed at once.
        availability.record_success(Instant::now());
        assert_eq!(availability.relapse_pause(), Duration::ZERO);
    }

    #[test]
    fn first_outage_is_probed_at_once() {
        let availability = Availability::new(System::Redis);
        availability.record_success(Instant::now());
        availability.details().since -= Duration::from_mins(1);
        availability.record_failure(&Error::Timeout(Duration::ZERO));
        assert_eq!(availability.relapse_pause(), Duration::ZERO);
        // A network that is cut again and again is probed at once each time.
        availability.record_success(Instant::now());
        availability.record_failure(&reset());
        assert_eq!(availability.relapse_pause(), Duration::ZERO);
    }

    #[test]
    fn calls_that_fail_together_are_one_outage() {
        let availability = Availability::new(System::Redis);
        availability.record_success(Instant::now());
        let sent_together = Instant::now();
        availability.record_failure(&reset());
        // Its reply was on the way when the store failed.
        availability.record_success(sent_together);
        assert!(!availability.is_up());
        availability.record_success(Instant::now());
        assert!(availability.is_up());
        // Its connection had fallen silent before the store was up again.
        assert!(availability.is_outdated(sent_together));
        assert!(!availability.is_outdated(Instant::now()));
    }

    #[test]
    fn count_is_that_of_the_batch_recorded_last() {
        let availability = Availability::new(System::Postgresql);
        availability.record_success(Instant::now());
        let (first, second) = (Instant::now(), Instant::now());
        availability.record_count(20, second);
        availability.record_count(10, first);
        assert_eq!(availability.count(), Some(20));
        // After a deletion by hand.
        availability.record_count(5, Instant::now());
        assert_eq!(availability.count(), Some(5));
    }

    #[test]
    fn reading_that_began_before_the_end_of_a_batch_does_not_replace_its_count() {
        let availability = Availability::new(System::Postgresql);
        availability.record_success(Instant::now());
        availability.record_count(20, Instant::now());
        availability.record_reading(10, Duration::from_secs(1));
        assert_eq!(availability.count(), Some(20));
        // After an outage the reading is all that is known.
        availability.record_failure(&reset());
        availability.record_reading(10, Duration::from_secs(1));
        assert_eq!(availability.count(), Some(10));
    }

    #[test]
    fn reason_that_changes_is_logged_once_a_second_at_most() {
        let logged = logged(|| {
            let availability = Availability::new(System::Redis);
            let timeout = || Error::Timeout(Duration::from_secs(1));
            availability.record_failure(&timeout());
            availability.record_failure(&reset());
            if let Some((_, logged)) = &mut availability.details().reason {
                *logged -= REASON_INTERVAL;
            }
            availability.record_failure(&timeout());
            availability.record_failure(&Error::Unexpected(Cause::from("no number")));
        });
        let lines: Vec<_> = logged.lines().collect();
        assert!(
            matches!(
                lines[..],
                [first, second]
                    if first.contains("store is down") && first.contains("no response")
                        && second.contains("store is still down") && second.contains("no number")
            ),
            "{logged}"
        );
    }

    #[test]
    fn refused_readings_of_a_store_that_is_up_are_logged_once_a_minute() {
        let logged = logged(|| {
            let availability = Availability::new(System::Postgresql);
            let refuse = |reason: &str| {
                let error = Error::Unexpected(Cause::from(reason));
                availability.record_refused_reading(&error, false);
            };
            refuse("down");
            availability.record_success(Instant::now());
            refuse("first");
            // One in five readings looks at more than the others.
            availability.record_reading(1, Duration::ZERO);
            refuse("second");
            if let Some(reported) = &mut availability.details().refusal_reported {
                *reported -= REFUSAL_INTERVAL;
            }
            refuse("third");
        });
        let reasons: Vec<_> = logged
            .lines()
            .filter_map(|line| line.split(": ").last())
            .collect();
        assert_eq!(reasons, ["first\"", "third\""], "{logged}");
    }

    #[test]
    fn success_counts_for_the_moments_before_it() {
        let availability = Availability::new(System::Postgresql);
        let began = Instant::now();
        assert!(!availability.has_succeeded_since(began));
        availability.record_success(began);
        assert!(availability.has_succeeded_since(began));
        assert!(!availability.has_succeeded_since(began + RELAPSE));
    }

    #[test]
    fn refused_reading_is_not_logged_if_the_probe_reads_the_count() {
        let logged = logged(|| {
            let availability = Availability::new(System::Postgresql);
            availability.record_success(Instant::now());
            let error = Error::Unexpected(Cause::from("damaged"));
            availability.record_refused_reading(&error, true);
            availability.record_reading(1, Duration::ZERO);
            availability.report_refused_reading();
        });
        assert_eq!(logged, "");
    }

    /// What `work` logs.
    fn logged(work: impl FnOnce()) -> String {
        let log = Log::default();
        let lines = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || lines.clone())
            .with_ansi(false)
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    }

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reset() -> Error {
        Error::Connection(Cause::from("reset"))
    }
}
