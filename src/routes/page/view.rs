//! What the page's template is given: plain values.
//!
//! Must not know: HTTP, and where a value comes from.

use askama::Template;
use time::OffsetDateTime;

use super::assets::AssetUrls;
use super::{chart, words};
use crate::recorder::Refusal;
use crate::routes::language::Language;
use crate::routes::snapshot::Snapshot;

/// The page.
#[derive(Debug, Template)]
#[template(path = "page.html")]
pub(super) struct Page<'a> {
    pub(super) language: Language,
    /// What `GET /visitas` has as JSON: states, totals and rates.
    pub(super) snapshot: &'a Snapshot,
    pub(super) postgres: StoreView,
    pub(super) redis: StoreView,
    /// This request's visit; `None` on `/visitas`, which records none.
    pub(super) visit: Option<Visit>,
    /// The trace of this request, if it is sampled.
    pub(super) trace: Option<String>,
    pub(super) links: Links<'a>,
    pub(super) version: &'static str,
    pub(super) revision: &'static str,
    pub(super) assets: AssetUrls,
}

/// A store's details that the JSON does not have.
#[derive(Debug, Clone)]
pub(super) struct StoreView {
    /// Since when it is up or down.
    pub(super) since: OffsetDateTime,
    /// The total as last read, even if that was before an outage, and when it was read.
    pub(super) last_total: Option<(i64, OffsetDateTime)>,
}

/// How the visit of a request ended.
#[derive(Debug, Clone)]
pub(super) enum Visit {
    /// In the database, committed and flushed.
    Recorded {
        /// The visit's number.
        total: i64,
        /// Its number in Redis; `None` if it was not counted there.
        redis: Option<i64>,
        timing: Timing,
        /// Visits that the same commit recorded, this one included.
        batch_size: usize,
    },
    /// Not known to be recorded. The response is a 503.
    Refused {
        /// Whether the visit can have been recorded all the same. Otherwise it certainly was not,
        /// and the response has `Retry-After: 1`.
        in_doubt: bool,
        /// Why: `QueueFull` (overload), `Stopping`, `Failed` or `InDoubt` (the database).
        reason: Refusal,
    },
}

/// Where a visit's time went, in milliseconds.
#[derive(Debug, Clone, Copy)]
#[expect(
    clippy::struct_field_names,
    reason = "the unit is part of a number's name"
)]
pub(super) struct Timing {
    pub(super) queue_ms: f64,
    pub(super) postgres_ms: f64,
    /// Hardly anything if Redis was skipped because it is down.
    pub(super) redis_ms: f64,
}

/// Links to other pages; `None` where there is none.
#[derive(Debug, Clone)]
pub(super) struct Links<'a> {
    /// This page in the other language, which records no visit.
    pub(super) other_language: &'static str,
    /// `None` if `METRICS_ADDR` has metrics on a listener of their own.
    pub(super) metrics: Option<&'static str>,
    pub(super) health: &'static str,
    pub(super) api: &'static str,
    /// Jaeger's page of this request's trace, or Jaeger's start page for a request without one.
    /// `None` while no span is being exported.
    pub(super) jaeger: Option<String>,
    pub(super) grafana: Option<&'a str>,
    pub(super) prometheus: Option<&'a str>,
}

impl Page<'_> {
    /// Whether this page is `/visitas`, which records no visit.
    fn is_view_only(&self) -> bool {
        self.visit.is_none()
    }
}

impl Timing {
    pub(super) fn total_ms(&self) -> f64 {
        self.queue_ms + self.postgres_ms + self.redis_ms
    }
}
