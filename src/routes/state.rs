//! The state that the handlers share: the recorder, the stores, the page's settings and the phase of
//! a stop.
//!
//! Must not know: what a handler does with it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::feed::Feed;
use super::renderings::Renderings;
use crate::config::PageConfig;
use crate::lifecycle::Lifecycle;
use crate::rates::Rates;
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
    /// What the recorder did in the last minutes.
    pub rates: Arc<Rates>,
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
    /// The page's streams.
    pub feed: Feed,
    /// Where the page's links lead.
    pub page: PageConfig,
    /// Whether visitors can read `/metrics`.
    pub has_metrics: bool,
    /// Requests that take longer are slow.
    pub access_slow: Duration,
    /// When the service started.
    pub started: SystemTime,
}

impl From<Parts> for AppState {
    fn from(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

impl Deref for AppState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}
