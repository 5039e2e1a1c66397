//! Breaks the service's dependencies under load and checks that every acknowledged visit is kept.
//!
//! In reading order: a `trial` injects a `fault` into its `ground` (the environment), while the
//! clients of the `ledger` record their responses; the judge of histories (`lab`) compares them
//! with the rows. `overload` and `hostile` test the service with clients instead of store faults,
//! `bounds` measures its resource use, `rolling` restarts replicas; `report` writes the results.
//! Everything runs on the loopback interface, ends with this program, and is bounded in time.
//! `visit` alone starts nothing: it judges a service that another program runs.

#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "the library is for this program and its test alone"
)]

pub mod bounds;
pub mod chance;
pub mod fault;
pub mod ground;
pub mod hostile;
pub mod ledger;
pub mod overload;
pub mod report;
pub mod rolling;
pub mod service;
pub mod trial;
pub mod visit;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::fault::Fault;
use crate::report::FaultResult;
use crate::trial::Effort;

/// Each fault once, as short as possible, three at a time. All 16 clients stay: each replica needs
/// visits in flight when a fault begins. They pause so that three faults fit on two cores.
pub const SHORT: Effort = Effort {
    repetitions: 1,
    kills: 1,
    hold: Duration::from_secs(1),
    pause: Duration::from_secs(3),
    aftermath: Duration::from_millis(1300),
    stop: true,
    at_once: 3,
    visit_pause: Duration::from_millis(20),
};

/// Tests all faults, or those whose name contains `only`, and reports each result as it comes. The
/// returned results are in the order of the faults.
pub fn faults(
    only: Option<&str>,
    effort: Effort,
    report: impl Fn(&FaultResult) + Sync,
) -> Vec<FaultResult> {
    let wanted = |fault: &&Fault| only.is_none_or(|only| fault.name.contains(only));
    let faults: Vec<_> = fault::ALL.iter().filter(wanted).collect();
    let next = AtomicUsize::new(0);
    let all = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..effort.at_once {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(fault) = faults.get(index) else {
                        return;
                    };
                    let result = test_fault(fault, effort);
                    report(&result);
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    all.insert(index, result);
                }
            });
        }
    });
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.into_values().collect()
}

fn test_fault(fault: &Fault, effort: Effort) -> FaultResult {
    match ground::skip_reason(fault.needs()) {
        Some(why) => FaultResult::Skipped(fault.name, why),
        None => match trial::run(fault, effort) {
            Ok(trial) => FaultResult::Completed(Box::new(trial)),
            // The other faults are still tested.
            Err(error) => FaultResult::Failed(fault.name, format!("{error:#}")),
        },
    }
}
