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

use std::time::Duration;

use crate::fault::Fault;
use crate::report::Tried;
use crate::trial::Effort;

/// Each fault once, as short as it still shows itself.
pub const SHORT: Effort = Effort {
    repetitions: 1,
    kills: 1,
    hold: Duration::from_secs(1),
    pause: Duration::from_secs(3),
    aftermath: Duration::from_millis(1300),
    stop: true,
};

/// Tries faults, those whose name contains `only` where it is given, and tells of each as it ends.
pub fn faults(only: Option<&str>, effort: Effort, tell: impl Fn(&Tried)) -> Vec<Tried> {
    let wanted = |fault: &&Fault| only.is_none_or(|only| fault.name.contains(only));
    let mut all = Vec::new();
    for fault in fault::ALL.iter().filter(wanted) {
        let tried = match trial::hindrance(fault) {
            Some(why) => Tried::Skipped(fault.name, why),
            None => match trial::run(fault, effort) {
                Ok(trial) => Tried::Ran(Box::new(trial)),
                // The others are to be tried all the same.
                Err(error) => Tried::Failed(fault.name, format!("{error:#}")),
            },
        };
        tell(&tried);
        all.push(tried);
    }
    all
}
