//! What the handlers share: the recorder, the stores and the phase of a stop.

use std::ops::Deref;
use std::sync::Arc;

use super::renderings::Renderings;
use crate::lifecycle::Lifecycle;
use crate::recorder::Recorder;
use crate::store::{Postgres, Redis};
use crate::telemetry::Telemetry;

/// State shared by the handlers. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Parts>);

/// What [`AppState`] refers to.
pub struct Parts {
    /// Takes visits.
    pub recorder: Recorder,
    /// The database.
    pub postgres: Arc<Postgres>,
    /// The cache.
    pub redis: Arc<Redis>,
    /// Renders metrics.
    pub telemetry: Arc<Telemetry>,
    /// Lets one scrape render at a time.
    pub renderings: Renderings,
    /// How far a stop has come.
    pub lifecycle: Lifecycle,
}

impl AppState {
    /// What the handlers of a service share, in a phase of its life.
    #[must_use]
    pub fn new(
        recorder: Recorder,
        postgres: Arc<Postgres>,
        redis: Arc<Redis>,
        telemetry: Arc<Telemetry>,
        lifecycle: Lifecycle,
    ) -> Self {
        Self(Arc::new(Parts {
            recorder,
            postgres,
            redis,
            telemetry,
            renderings: Renderings::default(),
            lifecycle,
        }))
    }
}

impl Deref for AppState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}
