//! `GET /health`: whether the service records visits.
//!
//! The routes only read the state that the monitor keeps, so they respond at once even while a
//! store hangs. Must not know: how a store is probed.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

use super::state::AppState;
use crate::lifecycle::Phase;
use crate::store::{Availability, Store as _};

/// Whether the service records visits.
#[derive(Debug, IntoResponses)]
pub(super) enum Readiness {
    /// The service records visits: `ok`, or `degraded` while Redis is down or a recount is due.
    #[response(status = OK, examples(
        ("ok" = (value = json!({
            "status": "ok",
            "checks": {
                "postgres": { "status": "ok", "latency_ms": 0.412 },
                "redis": { "status": "ok", "latency_ms": 0.118 },
                "migrations": { "status": "ok" },
                "count": { "status": "ok" }
            },
            "version": "0.1.0"
        }))),
        ("Redis is down" = (value = json!({
            "status": "degraded",
            "checks": {
                "postgres": { "status": "ok", "latency_ms": 0.412 },
                "redis": { "status": "unavailable" },
                "migrations": { "status": "ok" },
                "count": { "status": "ok" }
            },
            "version": "0.1.0"
        }))),
    ))]
    Ready(Report),
    /// Postgres is down, migrations are pending, or the service is stopping.
    #[response(status = SERVICE_UNAVAILABLE, example = json!({
        "status": "unavailable",
        "checks": {
            "postgres": { "status": "unavailable" },
            "redis": { "status": "ok", "latency_ms": 0.118 },
            "migrations": { "status": "pending" },
            "count": { "status": "ok" }
        },
        "version": "0.1.0"
    }))]
    Unavailable(Report),
}

impl IntoResponse for Readiness {
    fn into_response(self) -> Response {
        match self {
            Self::Ready(report) => Json(report).into_response(),
            Self::Unavailable(report) => {
                (StatusCode::SERVICE_UNAVAILABLE, Json(report)).into_response()
            }
        }
    }
}

/// What the monitor has found out.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Report {
    status: Overall,
    checks: Checks,
    /// The program's version
    version: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Overall {
    Ok,
    Degraded,
    Unavailable,
}

/// The checks of a report.
#[derive(Debug, Serialize, ToSchema)]
struct Checks {
    postgres: StoreCheck,
    redis: StoreCheck,
    migrations: MigrationsCheck,
    count: CountCheck,
}

/// Whether visits can use a store.
#[derive(Debug, Serialize, ToSchema)]
struct StoreCheck {
    status: StoreStatus,
    /// How long the last reading took; absent while there is none
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, nullable = false)]
    latency_ms: Option<f64>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum StoreStatus {
    Ok,
    Unavailable,
}

/// Whether the database has this version's tables.
#[derive(Debug, Serialize, ToSchema)]
struct MigrationsCheck {
    status: MigrationsStatus,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum MigrationsStatus {
    Ok,
    Pending,
}

/// Whether the count has to be mended by `visitas recount`.
#[derive(Debug, Serialize, ToSchema)]
struct CountCheck {
    status: CountStatus,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CountStatus {
    Ok,
    RecountDue,
}

/// That the process responds.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Liveness {
    status: Alive,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Alive {
    Ok,
}

/// Whether the service records visits
///
/// Responds within 100 ms, even while a store hangs.
#[utoipa::path(
    get,
    path = "/health",
    operation_id = "getHealth",
    responses(Readiness)
)]
pub(super) async fn health(state: State<AppState>) -> Readiness {
    ready(state).await
}

/// Whether the service records visits
///
/// The same as `/health`, under the name that orchestrators look for.
#[utoipa::path(
    get,
    path = "/health/ready",
    operation_id = "getReadiness",
    responses(Readiness)
)]
pub(super) async fn ready(State(state): State<AppState>) -> Readiness {
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
            migrations: MigrationsCheck {
                status: if migrated {
                    MigrationsStatus::Ok
                } else {
                    MigrationsStatus::Pending
                },
            },
            count: CountCheck {
                status: if recount_due {
                    CountStatus::RecountDue
                } else {
                    CountStatus::Ok
                },
            },
        },
        version: crate::VERSION,
    };
    if status == Overall::Unavailable {
        Readiness::Unavailable(report)
    } else {
        Readiness::Ready(report)
    }
}

/// Whether the process can serve
///
/// Touches no store: a service that waits for Postgres need not be restarted.
#[utoipa::path(get, path = "/health/live", operation_id = "getLiveness", responses(
    (status = OK, description = "The process can serve.", body = Liveness,
        example = json!({ "status": "ok" })),
))]
pub(super) async fn live() -> Json<Liveness> {
    Json(Liveness { status: Alive::Ok })
}

fn check(availability: &Availability) -> StoreCheck {
    StoreCheck {
        status: if availability.is_up() {
            StoreStatus::Ok
        } else {
            StoreStatus::Unavailable
        },
        latency_ms: availability.latency().map(milliseconds),
    }
}

/// In milliseconds, to the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "the number that is printed")]
    fn latency_is_in_milliseconds_to_the_microsecond() {
        assert_eq!(milliseconds(Duration::from_nanos(12_345_678)), 12.346);
    }
}
