//! The page: what a browser gets in place of JSON.
//!
//! Must not know: how a visit is recorded, and how a request chooses the page.

pub(super) mod assets;
mod chart;
mod present;
mod view;
mod words;

use askama::Template as _;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{
    CONTENT_LANGUAGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use self::assets::AssetUrls;
use self::view::{Links, Page, StoreView, Timing, Visit};
use super::language::Language;
use super::snapshot::{Snapshot, milliseconds, status};
use super::state::AppState;
use crate::recorder::{self, Recorded, Refusal};
use crate::store::{Availability, Store as _};
use crate::telemetry::span::current_trace;

/// Everything comes from this service, and nothing is written into the page's markup.
const CONTENT_SECURITY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
    img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";
const ROBOTS: HeaderName = HeaderName::from_static("x-robots-tag");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// The names of the headers that only the page has.
pub(super) const PAGE_HEADERS: [&str; 4] = [
    "content-language",
    "content-security-policy",
    "x-content-type-options",
    "x-robots-tag",
];

/// The page of a request that is a visit.
pub(super) fn of_visit(
    state: &AppState,
    language: Language,
    recorded: &Result<Recorded, Refusal>,
) -> Response {
    let mut snapshot = Snapshot::take(state);
    let (visit, timing) = match recorded {
        Ok(recorded) => {
            // The monitor's reading can be a second older than the visit.
            snapshot.total_registros_db = snapshot.total_registros_db.max(Some(recorded.total));
            snapshot.visitas_redis = snapshot.visitas_redis.max(recorded.redis);
            snapshot.redis_status = status(recorded.redis.is_some());
            let timing = Timing::from(recorded.timing);
            let visit = Visit::Recorded {
                total: recorded.total,
                redis: recorded.redis,
                timing,
                batch_size: recorded.batch_size,
            };
            (visit, Some(timing))
        }
        Err(refusal) => {
            if refusal.is_of_postgres() {
                snapshot.db_status = status(false);
            }
            let visit = Visit::Refused {
                in_doubt: *refusal == Refusal::InDoubt,
                reason: *refusal,
            };
            (visit, None)
        }
    };
    let mut response = respond(state, language, &snapshot, Some(visit));
    if let Some(value) = timing.and_then(server_timing) {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    response
}

/// The page without a visit.
pub(super) fn of_snapshot(state: &AppState, language: Language) -> Response {
    respond(state, language, &Snapshot::take(state), None)
}

/// Sets the headers of the page.
pub(super) fn set_headers(headers: &mut HeaderMap, language: Language) {
    for (name, value) in [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_LANGUAGE, language.tag()),
        (CONTENT_SECURITY_POLICY, CONTENT_SECURITY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (ROBOTS, "noindex"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

fn respond(
    state: &AppState,
    language: Language,
    snapshot: &Snapshot,
    visit: Option<Visit>,
) -> Response {
    let trace = current_trace().filter(|_| visit.is_some());
    let trace = trace.map(|trace| trace.to_string());
    let public = &state.page;
    let jaeger = public.jaeger_public_url.as_deref();
    let jaeger = jaeger.filter(|_| state.telemetry.is_exporting());
    let page = Page {
        language,
        postgres: store(state.postgres.availability()),
        redis: store(state.redis.availability()),
        snapshot,
        visit,
        links: Links {
            other_language: match language {
                Language::English => "/visitas?lang=pt",
                Language::Portuguese => "/visitas?lang=en",
            },
            metrics: state.has_metrics.then_some("/metrics"),
            health: "/health",
            api: "/openapi.json",
            jaeger: jaeger.map(|url| match &trace {
                Some(trace) => format!("{url}/trace/{trace}"),
                None => url.to_owned(),
            }),
            grafana: public.grafana_public_url.as_deref(),
            prometheus: public.prometheus_public_url.as_deref(),
        },
        trace,
        version: crate::VERSION,
        revision: crate::REVISION,
        assets: AssetUrls::new(),
    };
    // The template writes to memory, which does not fail.
    let Ok(html) = page.render() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let mut response = Response::new(Body::from(html));
    set_headers(response.headers_mut(), language);
    response
}

fn store(availability: &Availability) -> StoreView {
    let last_total = availability.last_count();
    StoreView {
        since: availability.since().into(),
        last_total: last_total.map(|(total, at)| (total, at.into())),
    }
}

impl From<recorder::Timing> for Timing {
    fn from(timing: recorder::Timing) -> Self {
        Self {
            queue_ms: milliseconds(timing.queue),
            postgres_ms: milliseconds(timing.postgres),
            redis_ms: milliseconds(timing.redis),
        }
    }
}

/// The timing as a header (W3C Server Timing), which browsers show to developers.
fn server_timing(timing: Timing) -> Option<HeaderValue> {
    let Timing {
        queue_ms,
        postgres_ms,
        redis_ms,
    } = timing;
    let value = format!("queue;dur={queue_ms}, postgres;dur={postgres_ms}, redis;dur={redis_ms}");
    HeaderValue::try_from(value).ok()
}
