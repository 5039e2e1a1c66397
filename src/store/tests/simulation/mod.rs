//! The decisions of recorder, pool, availability and watch in simulated time.
//!
//! A schedule makes some thirty visits over model stores with random delays, and something goes
//! wrong meanwhile: deadlines, replies, a stop, a relapse and several batches in flight meet in ways
//! that few real clients do. The judge of histories judges it, and so do the invariants in `world`.
//! A schedule follows from its seed: a seed that fails prints its timeline, and fails again.
//!
//! `SCHEDULES=n` runs so many, `SEED=n` one.

mod chance;
mod model;
mod server;
mod signal;
mod tally;
mod timeline;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use self::world::Report;

/// As many as take some seconds without optimization.
const SCHEDULES: u64 = 2000;

#[test]
fn no_schedule_loses_repeats_or_misnumbers_a_visit() {
    if let Some(seed) = number("SEED") {
        let report = run(seed);
        println!("{}", report.timeline);
        assert!(!report.timeline.is_violated(), "seed {seed}");
        return;
    }
    let schedules = number("SCHEDULES").unwrap_or(SCHEDULES);
    let (began, next) = (Instant::now(), AtomicU64::new(0));
    let threads = thread::available_parallelism().map_or(2, usize::from);
    let totals = thread::scope(|scope| {
        let runners: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| run_until(&next, schedules)))
            .collect();
        let totals = runners.into_iter().map(|runner| {
            let joined = runner.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        totals.fold(Totals::default(), Totals::plus)
    });
    println!(
        "{schedules} schedules in {:.1} s: {} visits in {} batches; at most {} batches at once with Postgres, \
         in {} schedules more than one",
        began.elapsed().as_secs_f64(),
        totals.visits,
        totals.batches,
        totals.most_calls,
        totals.overlapping,
    );
    assert_eq!(totals.near_overlapping, 0, "batches to near stores overlap");
    assert!(
        2 * totals.overlapping > totals.far,
        "batches to far stores do not overlap: {totals:?}"
    );
}

#[test]
fn schedule_follows_from_its_seed() {
    for seed in 0..100 {
        let (first, second) = (run(seed), run(seed));
        let (first, second) = (first.timeline.to_string(), second.timeline.to_string());
        let differs = first
            .lines()
            .zip(second.lines())
            .find(|(first, second)| first != second);
        assert_eq!(differs, None, "SEED={seed}");
        assert_eq!(first.len(), second.len(), "SEED={seed}");
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    visits: usize,
    batches: usize,
    most_calls: usize,
    far: usize,
    /// Schedules with several batches in flight.
    overlapping: usize,
    near_overlapping: usize,
}

impl Totals {
    fn of(report: &Report) -> Self {
        let overlaps = report.most_calls > 1;
        Self {
            visits: report.visits,
            batches: report.batches,
            most_calls: report.most_calls,
            far: usize::from(report.is_far),
            overlapping: usize::from(overlaps),
            near_overlapping: usize::from(overlaps && !report.is_far),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            visits: self.visits + other.visits,
            batches: self.batches + other.batches,
            most_calls: self.most_calls.max(other.most_calls),
            far: self.far + other.far,
            overlapping: self.overlapping + other.overlapping,
            near_overlapping: self.near_overlapping + other.near_overlapping,
        }
    }
}

/// Runs the schedules of the next seeds, until all have run.
fn run_until(next: &AtomicU64, schedules: u64) -> Totals {
    let mut totals = Totals::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= schedules {
            return totals;
        }
        let report = run(seed);
        assert!(
            !report.timeline.is_violated(),
            "SEED={seed} fails:\n{}",
            report.timeline
        );
        totals = totals.plus(Totals::of(&report));
    }
}

fn run(seed: u64) -> Report {
    metrics::with_local_recorder(&tally::Tally, || world::run(seed))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the size of a run is no setting of the service"
)]
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
