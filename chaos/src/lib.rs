//! Breaks what the service stands on, and sees what became of what it had acknowledged.
//!
//! In reading order: a `fault` is tried on its `ground` by a `trial`, while the clients of the
//! `ledger` write down what they are told; the judge of histories (`lab`) compares. `overload` and
//! `hostile` are about visitors instead of stores, `bounds` about what the service takes, `rolling`
//! about replicas that restart; `report` writes it all down. Everything here is on the loopback
//! interface, ends with this program, and is bounded in time.

#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "the library is for this program and its test alone"
)]

pub mod bounds;
mod chance;
pub mod fault;
pub mod ground;
pub mod hostile;
pub mod ledger;
pub mod overload;
pub mod report;
pub mod rolling;
pub mod service;
pub mod trial;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::fault::Fault;
use crate::report::Tried;
use crate::trial::Effort;

/// Each fault once, as short as it still shows, four at a time. All 16 clients stay: each replica must
/// have visits in flight when a fault strikes. They pause so that four faults fit on two cores.
pub const SHORT: Effort = Effort {
    repetitions: 1,
    kills: 1,
    hold: Duration::from_secs(1),
    pause: Duration::from_secs(3),
    aftermath: Duration::from_millis(1300),
    stop: true,
    at_once: 4,
    visit_pause: Duration::from_millis(20),
};

/// Tries faults, those whose name contains `only` where it is given, and reports each as it ends. The
/// results are in the order of the faults.
pub fn faults(only: Option<&str>, effort: Effort, report: impl Fn(&Tried) + Sync) -> Vec<Tried> {
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
                    let tried = try_fault(fault, effort);
                    report(&tried);
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    all.insert(index, tried);
                }
            });
        }
    });
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.into_values().collect()
}

fn try_fault(fault: &Fault, effort: Effort) -> Tried {
    match trial::hindrance(fault) {
        Some(why) => Tried::Skipped(fault.name, why),
        None => match trial::run(fault, effort) {
            Ok(trial) => Tried::Ran(Box::new(trial)),
            // The other faults are tried all the same.
            Err(error) => Tried::Failed(fault.name, format!("{error:#}")),
        },
    }
}
