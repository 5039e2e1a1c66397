//! What the code under test counts in its metrics, on this thread.

use std::cell::Cell;
use std::sync::Arc;

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, SharedString, Unit,
};

/// How often visits had each outcome, in this order.
pub(super) const OUTCOMES: [&str; 6] =
    ["ok", "degraded", "failed", "shed", "in_doubt", "abandoned"];
/// The two stores as metrics name them.
pub(super) const STORES: [&str; 2] = ["postgresql", "redis"];

thread_local! {
    static VISITS: Cell<[u64; 6]> = const { Cell::new([0; 6]) };
    static DOWN: Cell<[u64; 2]> = const { Cell::new([0; 2]) };
}

/// The visits of each outcome since the last call, and how often each store was marked down.
pub(super) fn take() -> ([u64; 6], [u64; 2]) {
    (VISITS.take(), DOWN.take())
}

/// Counts on the thread that changes a metric, whichever thread has made the metric's handle. Every
/// other metric is ignored.
#[derive(Debug)]
pub(super) struct Tally;

#[derive(Debug)]
struct Visits(usize);

#[derive(Debug)]
struct Up(usize);

impl metrics::Recorder for Tally {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        only_label(key, "outcome", &OUTCOMES).map_or_else(Counter::noop, |outcome| {
            Counter::from_arc(Arc::new(Visits(outcome)))
        })
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        only_label(key, "db_system_name", &STORES)
            .map_or_else(Gauge::noop, |store| Gauge::from_arc(Arc::new(Up(store))))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// The index of the value of a series' only label.
fn only_label(key: &Key, name: &str, values: &[&str]) -> Option<usize> {
    let mut labels = key.labels();
    let label = labels.next().filter(|label| label.key() == name)?;
    if labels.next().is_some() {
        return None;
    }
    values.iter().position(|value| *value == label.value())
}

impl CounterFn for Visits {
    fn increment(&self, value: u64) {
        let mut visits = VISITS.get();
        visits[self.0] += value;
        VISITS.set(visits);
    }

    fn absolute(&self, _: u64) {}
}

impl GaugeFn for Up {
    fn increment(&self, _: f64) {}

    fn decrement(&self, _: f64) {}

    fn set(&self, value: f64) {
        if value == 0.0 {
            let mut down = DOWN.get();
            down[self.0] += 1;
            DOWN.set(down);
        }
    }
}
