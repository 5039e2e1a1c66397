//! Tools of whoever measures the service: the bench itself and the faults of `chaos`.
//!
//! `place` says what is measured and where, `process` runs it, `client` and `paced` visit it, `sink`
//! takes its spans; `measure` and `report` make figures and tables, `machine` says what they hold for.

pub mod client;
pub mod machine;
pub mod measure;
pub mod paced;
pub mod place;
pub mod process;
pub mod report;
pub mod sink;
