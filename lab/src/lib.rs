//! Shared by the tests, bench, chaos and proof: starts the service under test, visits it, breaks its
//! connections, and judges its responses.
//!
//! In reading order: `program` finds the service's executable, `process` runs it, `output` reads
//! what it prints, `stack` has the settings of its stores. `client`, `visitor`, `rolling` and
//! `paced` visit it. `proxy` breaks its connections, `collector` receives its spans, `metrics`
//! reads its metrics. `history` judges the clients' responses against the rows. `measure`, `report`
//! and `machine` produce figures and tables; `stalls` measures the machine's own delays; `ports`
//! and `wait` are small tools.
//!
//! Everything runs on the loopback interface. `devstack` starts the stores.

#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "tools of tests: an error or a panic ends the run with its reason"
)]

pub mod client;
pub mod collector;
pub mod history;
pub mod machine;
pub mod measure;
pub mod metrics;
pub mod output;
pub mod paced;
pub mod ports;
pub mod process;
pub mod processor;
pub mod program;
pub mod proxy;
pub mod report;
pub mod rolling;
pub mod stack;
pub mod stalls;
pub mod visitor;
pub mod wait;
