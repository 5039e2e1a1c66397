//! `GET /`: records one visit and responds with its number in both stores.
//!
//! Must not know: SQL, Redis commands, metrics and span fields.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{self, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use hyper::body::Frame;
use serde::Serialize;

use super::state::AppState;
use crate::recorder::Refusal;
use crate::store::Store as _;

/// The response's body, with its fields in the order of the challenge.
#[derive(Debug, Serialize)]
struct VisitBody {
    db_status: &'static str,
    redis_status: &'static str,
    total_registros_db: Option<i64>,
    visitas_redis: Option<i64>,
}

/// The number of headers in a response, with those that the layers add.
const HEADERS: usize = 8;

/// Records this request as a visit.
pub(super) async fn record(State(state): State<AppState>) -> Response {
    match state.recorder.record().await {
        Ok(recorded) => respond(
            StatusCode::OK,
            &VisitBody {
                db_status: status(true),
                redis_status: status(recorded.redis.is_some()),
                total_registros_db: Some(recorded.total),
                visitas_redis: recorded.redis,
            },
        ),
        Err(refusal) => unavailable(&state, refusal),
    }
}

/// `HEAD /` records no visit, so the length of a `GET`'s body is unknown.
pub(super) async fn head() -> Response {
    let mut response = Response::new(Body::new(UnknownLength));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// An empty body of unknown length. For any other empty body the router would send
/// `Content-Length: 0`, which says that `GET /` has no body (RFC 9110, section 8.6).
struct UnknownLength;

impl HttpBody for UnknownLength {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }
}

/// The response to a visit that is not known to be recorded. Its Redis fields are those of the
/// monitor's last reading, so that a failing database costs no Redis call.
fn unavailable(state: &AppState, refusal: Refusal) -> Response {
    let postgres_works = match refusal {
        Refusal::QueueFull | Refusal::Stopping => state.postgres.availability().is_up(),
        Refusal::Failed | Refusal::InDoubt => false,
    };
    let redis = state.redis.availability().count();
    let body = VisitBody {
        db_status: status(postgres_works),
        redis_status: status(redis.is_some()),
        total_registros_db: None,
        visitas_redis: redis,
    };
    let mut response = respond(StatusCode::SERVICE_UNAVAILABLE, &body);
    let headers = response.headers_mut();
    // If the visit can have been recorded, a retry could count it twice.
    if refusal != Refusal::InDoubt {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn status(works: bool) -> &'static str {
    if works { "ok" } else { "erro" }
}

fn respond(status: StatusCode, body: &VisitBody) -> Response {
    let Ok(mut json) = serde_json::to_vec(body) else {
        // Four plain fields always serialise.
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    // With a newline a terminal shows its next prompt on a line of its own.
    json.push(b'\n');
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
