//! What the tests, bench and chaos share: the service under test, what it runs on, and how it is
//! visited, broken, watched and judged.
//!
//! In reading order: `program` (which one, and whether it is current) runs as a `process`, whose
//! `output` is read, on the stores of a `stack`. `client`, `visitor`, `rolling` and `paced` visit
//! it; it reaches its stores by a `proxy` and a `collector` for its spans, and `metrics` reads what
//! it exposes. The judge of the `history` compares what clients were told with what is stored.
//! `measure`, `report` and `machine` make figures and tables, `stalls` says what the machine kept
//! waiting; `ports` and `wait` are small tools.
//!
//! Everything is on the loopback interface. It starts no store: `devstack` does.

#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "tools of tests: an error or a panic ends the run and says why"
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
