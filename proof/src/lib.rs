//! Tests the promise where killed processes prove nothing: the power is cut, a machine is lost.
//!
//! In reading order: `isolate` runs a test in namespaces that clean up after it; `disk` is a disk
//! whose power can be cut, `site` the servers on it, `powercut` the cuts. `chaos` has the clients
//! and the replicas, `lab` the judge of histories.

#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "the library is for this program and its tests alone"
)]

pub mod disk;
pub mod isolate;
pub mod powercut;
pub mod site;
