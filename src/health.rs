//! Health: what watches the two stores, and the routes that tell what it saw.
//!
//! The routes only read what is known, so they answer at once whatever the stores do.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{CACHE_CONTROL, HeaderValue};
use serde::Serialize;

use crate::lifecycle::Phase;
use crate::service::Service;
use crate::store::{Postgres, Redis, State as StoreState, Store};
use crate::telemetry::metric;

/// While a store is up it is read this often: what it has counted, and whether it still answers.
const READ_EVERY: Duration = Duration::from_secs(1);
/// While it is down a probe asks this often whether a visit would succeed.
const PROBE_EVERY: Duration = Duration::from_millis(100);

/// Watches both stores for as long as it is polled.
pub async fn watch(postgres: &Postgres, redis: &Redis) {
    let publish = || metric::rows(postgres.state().count(), redis.state().count());
    tokio::join!(watch_store(postgres, publish), watch_store(redis, publish));
}

/// Reads a store while it is up and probes it while it is down. A probe does what a visit needs,
/// so that the store is never called up for less.
async fn watch_store(store: &impl Store, publish: impl Fn()) {
    let state = store.state();
    loop {
        if state.is_up() {
            // What came of it is in the state. A store that goes down is probed at once, whatever a
            // reading still waits for.
            tokio::select! {
                _ = store.total() => {}
                () = state.down() => {}
            }
            publish();
            tokio::select! {
                () = tokio::time::sleep(READ_EVERY) => {}
                () = state.down() => publish(),
            }
        } else if store.probe().await.is_err() {
            tokio::time::sleep(PROBE_EVERY).await;
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    status: Overall,
    checks: Checks,
    version: &'static str,
}

#[derive(Debug, Serialize)]
struct Checks {
    postgres: Check,
    redis: Check,
    migrations: Check,
}

#[derive(Debug, Serialize)]
struct Check {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Overall {
    Ok,
    Degraded,
    Unavailable,
}

/// `GET /health` and `/health/ready`: whether visits are recorded.
pub async fn ready(State(service): State<Service>) -> Response {
    let migrated = service.postgres.is_migrated();
    let postgres = check(service.postgres.state());
    let redis = check(service.redis.state());
    let leaving = service.lifecycle.has_reached(Phase::Leaving);
    let status = if !service.postgres.state().is_up() || !migrated || leaving {
        Overall::Unavailable
    } else if !service.redis.state().is_up() {
        Overall::Degraded
    } else {
        Overall::Ok
    };
    let report = Report {
        status,
        checks: Checks {
            postgres,
            redis,
            migrations: Check {
                status: if migrated { "ok" } else { "pending" },
                latency_ms: None,
            },
        },
        version: crate::VERSION,
    };
    let code = if status == Overall::Unavailable {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    let no_store = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (code, no_store, Json(report)).into_response()
}

/// `GET /health/live`: whether the process serves at all.
pub async fn live() -> Response {
    let no_store = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (no_store, Json(serde_json::json!({ "status": "ok" }))).into_response()
}

fn check(state: &StoreState) -> Check {
    Check {
        status: if state.is_up() { "ok" } else { "unavailable" },
        latency_ms: state
            .latency()
            .map(|latency| (latency.as_secs_f64() * 1e6).round() / 1e3),
    }
}
