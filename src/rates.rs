//! The rates of this replica: for each 5 s of the last 10 minutes how many visits were recorded and
//! refused, and how long recorded visits took.
//!
//! The recorder adds a batch at a time under one lock. A reader gets the finished intervals without
//! copying them. Memory is bounded: one histogram, and a few numbers for each finished interval.
//!
//! Intervals begin at multiples of 5 s of the wall clock, so those of several replicas agree. Must
//! not know: stores and HTTP.

use std::collections::VecDeque;
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

/// The finished intervals, the oldest first.
pub type History = Arc<VecDeque<Rate>>;

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
const KEPT: usize = 120;
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
        Ok(Self(Mutex::new(Intervals {
            current: interval_at(SystemTime::now()),
            failures: 0,
            durations: Histogram::new_with_bounds(1, longest, 2)?,
            finished: History::default(),
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

    /// The finished intervals. Fewer than 120 while this replica is young.
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

impl Intervals {
    /// Finishes every interval before this one.
    fn advance(&mut self, now: u64) {
        if now + SET_BACK < self.current {
            self.finished = History::default();
            self.current = now;
        }
        if now <= self.current {
            return;
        }
        // A reader can still hold the old history, which this then copies: once in 5 s.
        let finished = Arc::make_mut(&mut self.finished);
        finished.push_back(Rate {
            began: UNIX_EPOCH + Duration::from_secs(self.current * INTERVAL.as_secs()),
            visits: self.durations.len(),
            failures: std::mem::take(&mut self.failures),
            p50: quantile(&self.durations, 0.5),
            p99: quantile(&self.durations, 0.99),
        });
        self.durations.reset();
        // The intervals without a visit since.
        let kept = KEPT as u64;
        for empty in (self.current + 1).max(now.saturating_sub(kept))..now {
            finished.push_back(Rate {
                began: UNIX_EPOCH + Duration::from_secs(empty * INTERVAL.as_secs()),
                visits: 0,
                failures: 0,
                p50: None,
                p99: None,
            });
        }
        finished.drain(..finished.len().saturating_sub(KEPT));
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
        rates.0.lock().unwrap().current = interval;
        rates
    }

    fn began(rate: &Rate) -> u64 {
        interval_at(rate.began)
    }

    #[test]
    fn interval_in_progress_is_not_in_the_history() {
        let rates = rates_from(1000);
        add(&rates, 1000, [1, 2, 3]);
        assert!(history(&rates, 1000).is_empty());
        let finished = history(&rates, 1001);
        assert_eq!(finished.len(), 1);
        assert_eq!((finished[0].visits, began(&finished[0])), (3, 1000));
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
        near(finished[0].p50, 100);
        near(finished[0].p99, 198);
        near(finished[1].p50, 7);
        near(finished[1].p99, 7);
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
        assert_eq!(finished.len(), KEPT);
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
        assert_eq!(began(&finished[5]), 1005);
        assert_eq!(finished[5].visits, 3, "a small step");
        add(&rates, 500, [1]);
        let finished = history(&rates, 501);
        assert_eq!(finished.iter().map(began).collect::<Vec<_>>(), [500]);
    }
}
