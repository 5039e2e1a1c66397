//! The state that the handlers share: the recorder, the stores and the phase of a stop.
//!
//! Must not know: what a handler does with it.

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

/// The fields of [`AppState`].
pub struct Parts {
    /// Takes visits.
    pub recorder: Recorder,
    /// The database.
    pub postgres: Arc<Postgres>,
    /// The cache.
    pub redis: Arc<Redis>,
    /// Renders metrics.
    pub telemetry: Arc<Telemetry>,
    /// Lets one rendering run at a time.
    pub renderings: Renderings,
    /// The phase of a stop.
    pub lifecycle: Lifecycle,
}

impl AppState {
    /// The state of one service.
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
