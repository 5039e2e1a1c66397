//! Tests the promise where killed processes prove nothing: the power is cut, a machine is lost.
//!
//! In reading order: `isolate` runs a test in namespaces that clean up after it; `disk` is a disk
//! whose power can be cut, `site` the servers on it, `powercut` the cuts; `compare` holds the
//! counters of `counters/` to the same test. `cluster` has the three machines that `failover` loses
//! and that `order` counts on. `document` has the reports' text. `chaos` has the clients and the
//! replicas, `lab` the judge of histories.

#![expect(
    clippy::missing_errors_doc,
    clippy::must_use_candidate,
    reason = "the library is for this program and its tests alone"
)]

pub mod cluster;
pub mod compare;
pub mod disk;
pub mod document;
pub mod failover;
pub mod isolate;
pub mod order;
pub mod powercut;
pub mod site;
