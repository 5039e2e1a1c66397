//! What the handlers share: the recorder, the stores and whether the service is about to stop.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::metrics::Scrapes;
use crate::recorder::Recorder;
use crate::store::{Postgres, Redis};
use crate::telemetry::Telemetry;

/// The parts of the service. Cheap to clone.
#[derive(Clone)]
pub struct Service(Arc<Parts>);

/// What [`Service`] leads to.
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
    pub scrapes: Scrapes,
    leaving: AtomicBool,
}

impl Service {
    /// A service that is not about to stop.
    #[must_use]
    pub fn new(
        recorder: Recorder,
        postgres: Arc<Postgres>,
        redis: Arc<Redis>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self(Arc::new(Parts {
            recorder,
            postgres,
            redis,
            telemetry,
            scrapes: Scrapes::default(),
            leaving: AtomicBool::new(false),
        }))
    }
}

impl Deref for Service {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl Parts {
    /// From here on the service says that it is not ready.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether the service has been told to stop.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}
