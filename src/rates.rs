//! The rates of this replica: for each 5 s of the last 10 minutes how many visits were recorded and
//! refused, and how long recorded visits took.
//!
//! The recorder adds a batch at a time under one lock. A reader gets the finished intervals without
//! copying them. Memory is bounded: one histogram, and a few numbers for each finished interval.
//!
//! Intervals begin at multiples of 5 s of the wall clock, so those of several replicas agree. Must
//! not know: stores and HTTP.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;

/// What this replica did in one interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// When the interval began.
    pub began: SystemTime,
    /// Visits recorded.
    pub visits: u64,
    /// Visits refused or in doubt.
    pub failures: u64,
    /// The median of the recorded visits' durations, within 1 %; `None` without a visit.
    pub p50: Option<Duration>,
    /// The 99th percentile, within 1 %.
    pub p99: Option<Duration>,
}

/// The finished intervals of the last 10 minutes, the oldest first.
pub type History = Arc<Vec<Rate>>;

/// The rates of the last 10 minutes.
#[derive(Debug)]
pub struct Rates(Mutex<Intervals>);

#[derive(Debug)]
struct Intervals {
    /// The number of the interval in progress, from the epoch.
    current: u64,
    failures: u64,
    /// Durations of the visits recorded in the interval in progress, in microseconds.
    durations: Histogram<u32>,
    finished: History,
}

const INTERVAL: Duration = Duration::from_secs(5);
/// Intervals that are kept: those of 10 minutes.
const KEPT: u64 = 120;
/// Durations from here on count as this one; no visit can take longer than `VISIT_TIMEOUT`, which
/// is at most 2 minutes.
const LONGEST: Duration = Duration::from_mins(3);
/// A clock that is set back by more than this many intervals starts the history over, since its
/// times would repeat.
const SET_BACK: u64 = 12;

impl Rates {
    /// Rates without a visit.
    ///
    /// # Errors
    ///
    /// Never: the histogram's bounds are constants.
    pub fn new() -> anyhow::Result<Self> {
        let longest = u64::try_from(LONGEST.as_micros())?;
        let current = interval_at(SystemTime::now());
        Ok(Self(Mutex::new(Intervals {
            current,
            failures: 0,
            durations: Histogram::new_with_bounds(1, longest, 2)?,
            finished: Arc::new(empty_until(current).collect()),
        })))
    }

    /// Adds recorded visits, by how long each took from its request to the end of its batch.
    pub fn add(&self, durations: impl IntoIterator<Item = Duration>) {
        let mut intervals = self.intervals();
        for duration in durations {
            let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
            intervals.durations.saturating_record(micros);
        }
    }

    /// Adds visits that were refused or are in doubt.
    pub fn add_failures(&self, visits: usize) {
        if visits > 0 {
            self.intervals().failures += visits as u64;
        }
    }

    /// The finished intervals. Those from before this replica started are empty.
    #[must_use]
    pub fn history(&self) -> History {
        Arc::clone(&self.intervals().finished)
    }

    fn intervals(&self) -> MutexGuard<'_, Intervals> {
        let mut intervals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        intervals.advance(interval_at(SystemTime::now()));
        intervals
    }
}

/// The number of the interval that contains a moment.
fn interval_at(moment: SystemTime) -> u64 {
    let since_epoch = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    since_epoch.as_secs() / INTERVAL.as_secs()
}

/// When an interval begins.
fn time_of(interval: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(interval * INTERVAL.as_secs())
}

/// The intervals that are kept at the beginning of this one, without a visit.
fn empty_until(current: u64) -> impl Iterator<Item = Rate> {
    (current.saturating_sub(KEPT)..current).map(|interval| Rate {
        began: time_of(interval),
        visits: 0,
        failures: 0,
        p50: None,
        p99: None,
    })
}

impl Intervals {
    /// Finishes every interval before this one.
    fn advance(&mut self, now: u64) {
        if now + SET_BACK < self.current {
            self.finished = Arc::new(empty_until(now).collect());
            self.current = now;
        }
        if now <= self.current {
            return;
        }
        let last = Rate {
            began: time_of(self.current),
            visits: self.durations.len(),
            failures: std::mem::take(&mut self.failures),
            p50: quantile(&self.durations, 0.5),
            p99: quantile(&self.durations, 0.99),
        };
        self.durations.reset();
        let since = empty_until(now).filter(|rate| rate.began > last.began);
        let finished = self.finished.iter().copied().chain([last]).chain(since);
        let first = time_of(now.saturating_sub(KEPT));
        let kept = finished.filter(|rate| rate.began >= first).collect();
        self.finished = Arc::new(kept);
        self.current = now;
    }
}

fn quantile(durations: &Histogram<u32>, quantile: f64) -> Option<Duration> {
    (!durations.is_empty()).then(|| Duration::from_micros(durations.value_at_quantile(quantile)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds visits of these durations in an interval.
    fn add(rates: &Rates, interval: u64, millis: impl IntoIterator<Item = u64>) {
        let mut intervals = rates.0.lock().unwrap();
        intervals.advance(interval);
        for millis in millis {
            intervals.durations.saturating_record(1000 * millis);
        }
    }

    fn history(rates: &Rates, now: u64) -> History {
        let mut intervals = rates.0.lock().unwrap();
        intervals.advance(now);
        Arc::clone(&intervals.finished)
    }

    fn rates_from(interval: u64) -> Rates {
        let rates = Rates::new().unwrap();
        let mut intervals = rates.0.lock().unwrap();
        intervals.finished = Arc::new(empty_until(interval).collect());
        intervals.current = interval;
        drop(intervals);
        rates
    }

    fn began(rate: &Rate) -> u64 {
        interval_at(rate.began)
    }

    #[test]
    fn interval_in_progress_is_not_in_the_history() {
        let rates = rates_from(1000);
        add(&rates, 1000, [1, 2, 3]);
        let visits = |now| {
            history(&rates, now)
                .iter()
                .map(|rate| rate.visits)
                .sum::<u64>()
        };
        assert_eq!(visits(1000), 0);
        assert_eq!(visits(1001), 3);
        let last = history(&rates, 1001)[119];
        assert_eq!((last.visits, began(&last)), (3, 1000));
    }

    #[test]
    fn quantiles_are_those_of_the_interval() {
        let rates = rates_from(1000);
        add(&rates, 1000, 1..=200);
        add(&rates, 1001, [7; 10]);
        let finished = history(&rates, 1002);
        let near = |found: Option<Duration>, millis: u64| {
            let found = found.expect("a visit").as_secs_f64() * 1e3;
            assert!(
                (found / millis as f64 - 1.0).abs() <= 0.011,
                "{found} {millis}"
            );
        };
        near(finished[118].p50, 100);
        near(finished[118].p99, 198);
        near(finished[119].p50, 7);
        near(finished[119].p99, 7);
    }

    #[test]
    fn history_has_ten_minutes_and_its_gaps_are_empty() {
        let rates = rates_from(1000);
        for interval in 1000..1200 {
            add(&rates, interval, [1]);
        }
        let finished = history(&rates, 1200);
        let of: Vec<_> = finished.iter().map(began).collect();
        assert_eq!(of, (1080..1200).collect::<Vec<_>>());
        assert!(finished.iter().all(|rate| rate.visits == 1));
        let finished = history(&rates, 1210);
        assert_eq!(finished.len(), 120);
        assert_eq!(began(&finished[119]), 1209);
        let visits: u64 = finished.iter().map(|rate| rate.visits).sum();
        assert_eq!(visits, 110);
        let finished = history(&rates, 9000);
        let of: Vec<_> = finished.iter().map(began).collect();
        assert_eq!(of, (8880..9000).collect::<Vec<_>>());
        assert!(
            finished
                .iter()
                .all(|rate| rate.visits == 0 && rate.p99.is_none())
        );
    }

    #[test]
    fn clock_that_is_set_back_repeats_no_interval() {
        let rates = rates_from(1000);
        add(&rates, 1000, [1]);
        add(&rates, 1005, [1, 1]);
        add(&rates, 1004, [1]);
        let finished = history(&rates, 1006);
        assert_eq!(began(&finished[119]), 1005);
        assert_eq!(finished[119].visits, 3, "a small step");
        add(&rates, 500, [1]);
        let finished = history(&rates, 501);
        let of: Vec<_> = finished.iter().map(began).collect();
        assert_eq!(of, (381..501).collect::<Vec<_>>());
        assert_eq!(finished[119].visits, 1);
    }
}
