//! `GET /health`: whether the service records visits.
//!
//! The routes only read the state that the monitor keeps, so they respond at once even while a
//! store hangs. Must not know: how a store is probed.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;

use super::state::AppState;
use crate::lifecycle::Phase;
use crate::store::{Availability, Store as _};

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
    count: Check,
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

/// `GET /health` and `/health/ready`: whether the service records visits.
pub(super) async fn ready(State(state): State<AppState>) -> Response {
    let migrated = state.postgres.is_migrated();
    let recount_due = state.postgres.is_recount_due();
    let postgres = check(state.postgres.availability());
    let redis = check(state.redis.availability());
    let leaving = state.lifecycle.has_reached(Phase::Leaving);
    let status = if !state.postgres.availability().is_up() || !migrated || leaving {
        Overall::Unavailable
    } else if !state.redis.availability().is_up() || recount_due {
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
            count: Check {
                status: if recount_due { "recount_due" } else { "ok" },
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
    (code, Json(report)).into_response()
}

/// `GET /health/live`: whether the process responds at all.
pub(super) async fn live() -> Response {
    Json(serde_json::json!({ "status": "ok" })).into_response()
}

fn check(availability: &Availability) -> Check {
    Check {
        status: if availability.is_up() {
            "ok"
        } else {
            "unavailable"
        },
        latency_ms: availability
            .latency()
            .map(|latency| (latency.as_secs_f64() * 1e6).round() / 1e3),
    }
}
