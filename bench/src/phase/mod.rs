//! The questions that are asked, a file each. Each returns its section of the report.

mod connections;
mod footprint;
mod latency;
mod limits;
mod outage;
mod profile;
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
pub(crate) use profile::{lone_visit, processors};
pub(crate) use replicas::replicas;
pub(crate) use rows::rows;
pub(crate) use snapshot::snapshot;
pub(crate) use soak::soak;
pub(crate) use throughput::throughput;

use anyhow::Result;

use crate::ground::Ground;
use crate::subject::{Running, Subject, Traces};

/// Where nothing else is said: enough for every batch to be well filled.
const CONNECTIONS: usize = 256;

/// The service as it is meant to run, with everything on.
const VISITAS: Subject = Subject::Visitas(Traces::Hundredth);

/// Starts a subject on an empty table, looks at it, checks its number and stops it.
fn while_serving<T>(
    ground: &mut Ground,
    subject: Subject,
    look: impl FnOnce(&Running) -> Result<T>,
) -> Result<T> {
    let Some(owner) = subject.owner() else {
        return look(&subject.start(ground, "")?);
    };
    let database = ground.database(owner, 0)?;
    let mut running = subject.start(ground, &database)?;
    let seen = look(&running)?;
    running.check_number(ground, &database)?;
    running.process.stop()?;
    ground.settle(&database)?;
    ground.collector.take_server_spans();
    Ok(seen)
}
