//! The sections of the report, one file each.

mod connections;
mod far;
mod footprint;
mod latency;
mod limits;
mod outage;
mod profile;
mod replicas;
mod rows;
mod scale;
mod snapshot;
mod soak;
mod throughput;

pub(crate) use connections::connections;
pub(crate) use far::{far, far_quick};
pub(crate) use footprint::footprint;
pub(crate) use latency::{lone, paced};
pub(crate) use limits::limits;
pub(crate) use outage::outage;
pub(crate) use profile::{lone_visit, processors};
pub(crate) use replicas::replicas;
pub(crate) use rows::rows;
pub(crate) use scale::scale;
pub(crate) use snapshot::snapshot;
pub(crate) use soak::soak;
pub(crate) use throughput::throughput;

use anyhow::Result;

use crate::ground::Ground;
use crate::subject::{Instance, Subject, Traces};

/// The default number of connections: enough to fill every batch well.
const CONNECTIONS: usize = 256;

/// The numbers of connections of a comparison.
const COUNTS: [usize; 4] = [1, 64, 256, 1024];

/// The number of replicas of a comparison with one.
const REPLICAS: usize = 3;

/// The service as in production, with all telemetry on.
const VISITAS: Subject = Subject::Visitas(Traces::Hundredth);

/// Starts a subject on an empty table, runs `work` on it, checks its number and stops it.
fn while_serving<T>(
    ground: &mut Ground,
    subject: Subject,
    work: impl FnOnce(&Instance) -> Result<T>,
) -> Result<T> {
    let Some(owner) = subject.owner() else {
        return work(&subject.start(ground, "")?);
    };
    let database = ground.database(owner, 0)?;
    let mut instance = subject.start(ground, &database)?;
    let result = work(&instance)?;
    instance.check_number(ground, &database)?;
    instance.process.stop()?;
    ground.settle(&database)?;
    ground.collector.take_server_spans();
    Ok(result)
}
