//! Whether the collector accepts spans, by the outcome of exports: a breaker for the sampler, and
//! the log lines about outages and rejections.
//!
//! Must not know: how spans are sent, and what they are about.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::Counter;
use opentelemetry_sdk::error::OTelSdkError;
use tracing::{info, warn};

use crate::metrics::catalog::SPANS_EXPORTED;
use crate::metrics::limit::OTHER;

static EXPORTED: LazyLock<Counter> = LazyLock::new(|| spans_exported(""));
static NOT_EXPORTED: LazyLock<Counter> = LazyLock::new(|| spans_exported(OTHER));

fn spans_exported(error_type: &str) -> Counter {
    let component = "otlp_http_span_exporter";
    SPANS_EXPORTED.with([&format!("{component}/0"), component, error_type])
}

/// Creates the series before there is a collector.
pub(super) fn declare_metrics() {
    LazyLock::force(&EXPORTED);
    LazyLock::force(&NOT_EXPORTED);
}

/// The state of the collector. After three failed attempts in a row the sampler samples at most one
/// request a second, enough for a retry, until an export succeeds. So an absent collector costs
/// almost nothing.
#[derive(Debug)]
pub(super) struct Collector {
    started: Instant,
    /// Failed attempts since the last export that succeeded.
    failures: AtomicUsize,
    /// Whether an export has succeeded since the start.
    has_exported: AtomicBool,
    /// The second since `started`, from 1, in which the open breaker last admitted a request.
    admitted: AtomicU64,
    /// The capacity of the queue of spans.
    queue: usize,
    /// Spans that are queued or being exported. Decreases only under the lock of `status`, so that
    /// no span counts twice as lost.
    unexported: AtomicUsize,
    status: Mutex<Status>,
}

#[derive(Debug, Default)]
struct Status {
    attempt: Attempt,
    outage: Option<Outage>,
    /// Rejected spans since the last log line about them.
    rejected: usize,
    rejection_logged: Option<Instant>,
}

/// The details of an export's last attempt that the SDK's result omits.
#[derive(Debug, Default)]
struct Attempt {
    rejected: usize,
    /// Why there was no response.
    error: Option<String>,
}

/// A series of failed exports.
#[derive(Debug)]
struct Outage {
    since: Instant,
    lost: usize,
    /// The reason in the last log line.
    reason: String,
    logged: Instant,
}

const FAILURES_UNTIL_OPEN: usize = 3;
const REASON_INTERVAL: Duration = Duration::from_secs(1);
const REJECTION_INTERVAL: Duration = Duration::from_mins(1);

impl Collector {
    /// A collector that accepts spans until exports fail. `queue` spans can wait for it.
    pub(super) fn new(queue: usize) -> Self {
        Self {
            started: Instant::now(),
            failures: AtomicUsize::new(0),
            has_exported: AtomicBool::new(false),
            admitted: AtomicU64::new(0),
            queue,
            unexported: AtomicUsize::new(0),
            status: Mutex::default(),
        }
    }

    /// Whether there is room for spans that a trace can do without: they would use at most half of
    /// the queue.
    pub(super) fn has_room(&self) -> bool {
        self.unexported.load(Ordering::Relaxed) < self.queue / 2
    }

    /// Whether a request can be sampled now.
    pub(super) fn admits(&self) -> bool {
        !self.is_down() || self.admits_in(self.started.elapsed().as_secs() + 1)
    }

    /// Whether the breaker is open.
    pub(super) fn is_down(&self) -> bool {
        self.failures.load(Ordering::Relaxed) >= FAILURES_UNTIL_OPEN
    }

    /// Whether spans reach the collector, as far as exports tell: one has succeeded, and the breaker
    /// is closed.
    pub(super) fn accepts_spans(&self) -> bool {
        self.has_exported.load(Ordering::Relaxed) && !self.is_down()
    }

    fn admits_in(&self, second: u64) -> bool {
        // The load spares later requests of the same second the write. A request whose second is
        // over must not move `admitted` back.
        self.admitted.load(Ordering::Relaxed) < second
            && self.admitted.fetch_max(second, Ordering::Relaxed) < second
    }

    /// Counts a queued span.
    pub(super) fn count_queued(&self) {
        self.unexported.fetch_add(1, Ordering::AcqRel);
    }

    /// Records an attempt to export that succeeded, and how many spans the collector rejected.
    pub(super) fn record_attempt_success(&self, rejected: usize) {
        self.status().attempt = Attempt {
            rejected,
            error: None,
        };
    }

    /// Records an attempt to export that failed, with an error if there was no response. Each of an
    /// export's attempts counts, since all of them together take almost a second.
    pub(super) fn record_attempt_failure(&self, error: Option<String>) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.status().attempt = Attempt { rejected: 0, error };
    }

    /// Records an export of `spans` spans that succeeded. A collector that rejects some of them is
    /// up.
    pub(super) fn record_export(&self, spans: usize) {
        self.failures.store(0, Ordering::Relaxed);
        self.has_exported.store(true, Ordering::Relaxed);
        let mut status = self.status();
        let rejected = std::mem::take(&mut status.attempt).rejected.min(spans);
        EXPORTED.increment((spans - rejected) as u64);
        NOT_EXPORTED.increment(rejected as u64);
        self.unexported.fetch_sub(spans, Ordering::AcqRel);
        if rejected > 0 {
            status.record_rejected(rejected);
        }
        if let Some(outage) = status.outage.take() {
            info!(
                down.seconds = outage.since.elapsed().as_secs_f64(),
                spans.lost = outage.lost,
                "span export recovered"
            );
        }
    }

    /// Records an export of `spans` spans that failed.
    pub(super) fn record_export_failure(&self, spans: usize, result: &OTelSdkError) {
        NOT_EXPORTED.increment(spans as u64);
        let now = Instant::now();
        let mut status = self.status();
        let error = std::mem::take(&mut status.attempt).error;
        let error = error.unwrap_or_else(|| result.to_string());
        self.unexported.fetch_sub(spans, Ordering::AcqRel);
        let Some(outage) = &mut status.outage else {
            warn!(error, "span export failing");
            status.outage = Some(Outage {
                since: now,
                lost: spans,
                reason: error,
                logged: now,
            });
            return;
        };
        outage.lost += spans;
        if outage.reason != error && now - outage.logged >= REASON_INTERVAL {
            warn!(error, "span export still failing");
            outage.reason = error;
            outage.logged = now;
        }
    }

    /// How many spans are lost if the collector accepts no more: those of the current outage, and
    /// those that are not exported yet.
    pub(super) fn lost_spans(&self) -> usize {
        let status = self.status();
        let lost = status.outage.as_ref().map_or(0, |outage| outage.lost);
        lost + self.unexported.load(Ordering::Acquire)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Status {
    /// Logs rejections at most once a minute; each line counts all since the last one.
    fn record_rejected(&mut self, spans: usize) {
        self.rejected += spans;
        let logged = self.rejection_logged;
        if logged.is_none_or(|logged| logged.elapsed() >= REJECTION_INTERVAL) {
            warn!(spans.lost = self.rejected, "collector rejected spans");
            self.rejection_logged = Some(Instant::now());
            self.rejected = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_breaker_admits_one_request_a_second() {
        let collector = Collector::new(0);
        assert!(collector.admits_in(5));
        assert!(!collector.admits_in(5));
        assert!(collector.admits_in(6));
        assert!(!collector.admits_in(5), "a second that is over");
        assert!(!collector.admits_in(6));
    }
}
