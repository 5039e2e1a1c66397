//! The questions that are asked, a file each. Each returns its section of the report.

mod connections;
mod footprint;
mod latency;
mod limits;
mod outage;
mod replicas;
mod rows;
mod snapshot;
mod soak;
mod throughput;

pub(crate) use connections::connections;
pub(crate) use footprint::footprint;
pub(crate) use latency::{lone, paced};
pub(crate) use limits::limits;
pub(crate) use outage::outage;
pub(crate) use replicas::replicas;
pub(crate) use rows::rows;
pub(crate) use snapshot::snapshot;
pub(crate) use soak::soak;
pub(crate) use throughput::throughput;

use crate::subject::{Subject, Traces};

/// Where nothing else is said: enough for every batch to be well filled.
const CONNECTIONS: usize = 256;

/// The service as it is meant to run, with everything on.
const VISITAS: Subject = Subject::Visitas(Traces::Hundredth);
