//! `GET /`: records one visit and says what both stores have counted.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde::Serialize;

use crate::recorder::Refusal;
use crate::service::Service;
use crate::store::Store as _;

/// The answer, its fields in the order the challenge has them.
#[derive(Debug, Serialize)]
struct Answer {
    db_status: &'static str,
    redis_status: &'static str,
    total_registros_db: Option<i64>,
    visitas_redis: Option<i64>,
}

/// As many as an answer has, with those that others add.
const HEADERS: usize = 8;

/// Records the visit that this request is.
pub async fn record(State(service): State<Service>) -> Response {
    match service.recorder.record().await {
        Ok(recorded) => respond(
            StatusCode::OK,
            &Answer {
                db_status: status(true),
                redis_status: status(recorded.redis.is_some()),
                total_registros_db: Some(recorded.total),
                visitas_redis: recorded.redis,
            },
        ),
        Err(refusal) => unavailable(&service, refusal),
    }
}

/// `HEAD /` is no visit.
pub async fn head() -> Response {
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (StatusCode::OK, headers).into_response()
}

/// A visit that is not known to be recorded. What it says of Redis is what was last read there,
/// so that a database that fails costs Redis nothing.
fn unavailable(service: &Service, refusal: Refusal) -> Response {
    let postgres_works = match refusal {
        Refusal::QueueFull | Refusal::Stopping => service.postgres.state().is_up(),
        Refusal::Failed | Refusal::Late => false,
    };
    let redis = service.redis.state().count();
    let answer = Answer {
        db_status: status(postgres_works),
        redis_status: status(redis.is_some()),
        total_registros_db: None,
        visitas_redis: redis,
    };
    let mut response = respond(StatusCode::SERVICE_UNAVAILABLE, &answer);
    let headers = response.headers_mut();
    headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn status(works: bool) -> &'static str {
    if works { "ok" } else { "erro" }
}

fn respond(status: StatusCode, answer: &Answer) -> Response {
    let Ok(body) = serde_json::to_vec(answer) else {
        // Four plain fields always serialise.
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
