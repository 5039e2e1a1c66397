//! `GET /`: records one visit and responds with its number in both stores, as JSON or, for a client
//! that prefers it, as the page.
//!
//! Must not know: SQL, Redis commands, metrics and span fields.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::SystemTime;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER, VARY};
use http::{HeaderValue, StatusCode};
use hyper::body::Frame;
use serde::Serialize;
use utoipa::ToSchema;

use super::negotiation::Wanted;
use super::page;
use super::snapshot::{Status, status};
use super::state::AppState;
use crate::recorder::{Recorded, Refusal, Timing};
use crate::store::Store as _;
use crate::telemetry::late::Timeline;

/// The response's body, with its fields in the order of the challenge.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Visit, description = "A visit's number in both stores.")]
struct VisitBody {
    db_status: Status,
    redis_status: Status,
    /// The visit's number: the rows of the table once it was recorded
    #[schema(required, minimum = 1)]
    total_registros_db: Option<i64>,
    /// The visit's number in Redis; of a failed visit, the count as last read
    #[schema(required)]
    visitas_redis: Option<i64>,
}

/// The number of headers in a response, with those that the layers add.
const HEADERS: usize = 9;

/// Record a visit
///
/// As a page for a client that prefers `text/html` (`*/*` and an absent `Accept` get JSON), in
/// Portuguese where `Accept-Language` prefers it, otherwise in English.
#[utoipa::path(get, path = "/", operation_id = "recordVisit", params(
    ("accept-language" = Option<String>, Header, description = "The language of the page.",
        example = "pt-BR"),
    ("sec-purpose" = Option<String>, Header, description = "A browser's `prefetch` records \
        nothing.", example = "prefetch"),
), responses(
    (status = OK, description = "The visit is in Postgres, committed and flushed. It is counted in \
        Redis too, unless `redis_status` is `erro`.",
        headers(
            ("vary" = String, description = "`Accept, Accept-Language`"),
            ("server-timing" = Option<String>, description = "On a page: where the time went, in \
                milliseconds."),
        ),
        content(
            (VisitBody = "application/json", examples(
                ("both" = (summary = "Counted in both stores", value = json!({
                    "db_status": "ok", "redis_status": "ok",
                    "total_registros_db": 42, "visitas_redis": 42
                }))),
                ("degraded" = (summary = "Redis is down", value = json!({
                    "db_status": "ok", "redis_status": "erro",
                    "total_registros_db": 42, "visitas_redis": null
                }))),
            )),
            (String = "text/html", example = json!("<!doctype html>…")),
        )),
    (status = NO_CONTENT, description = "A prefetch or prerender: no visit is recorded, and the \
        browser asks again when the page is opened."),
    (status = SERVICE_UNAVAILABLE, description = "The visit is certainly not recorded, or, without \
        `Retry-After`, in doubt.",
        headers(
            ("vary" = String, description = "`Accept, Accept-Language`"),
            ("retry-after" = Option<u32>, description = "In seconds; absent if the visit can have \
                been recorded, because a retry could count it twice."),
        ),
        content(
            (VisitBody = "application/json", examples(
                ("down" = (summary = "Postgres is down", value = json!({
                    "db_status": "erro", "redis_status": "ok",
                    "total_registros_db": null, "visitas_redis": 41
                }))),
                ("shed" = (summary = "The queue is full", value = json!({
                    "db_status": "ok", "redis_status": "ok",
                    "total_registros_db": null, "visitas_redis": 41
                }))),
            )),
            (String = "text/html", example = json!("<!doctype html>…")),
        )),
))]
pub(super) async fn record(State(state): State<AppState>, request: Request) -> Response {
    let wanted = Wanted::by(request.headers());
    drop(request);
    if wanted.prefetch {
        // The browser asks again when the page is opened.
        return StatusCode::NO_CONTENT.into_response();
    }
    let arrived = SystemTime::now();
    let recorded = state.recorder.record(arrived).await;
    let mut response = match wanted.page {
        None => respond(&body(&state, &recorded)),
        Some(language) => page::of_visit(&state, language, &recorded),
    };
    set_vary(&mut response);
    // Half of `ACCESS_SLOW`, since the request takes longer than its visit.
    if let Ok(recorded) = &recorded
        && recorded.timing.total() >= state.access_slow / 2
    {
        response
            .extensions_mut()
            .insert(timeline(arrived, recorded.timing));
    }
    if let Err(refusal) = recorded {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        // If the visit can have been recorded, a retry could count it twice.
        if refusal != Refusal::InDoubt {
            let retry_after = HeaderValue::from_static("1");
            response.headers_mut().insert(RETRY_AFTER, retry_after);
        }
    }
    response
}

/// Ask for the headers alone
///
/// Records no visit, so the length of a `GET`'s body is unknown.
#[utoipa::path(head, path = "/", operation_id = "recordVisitHead", params(
    ("accept-language" = Option<String>, Header, description = "The language of the page.",
        example = "pt-BR"),
    ("sec-purpose" = Option<String>, Header, description = "As for a `GET`.",
        example = "prefetch"),
), responses(
    (status = OK, description = "The service responds.",
        headers(("vary" = String, description = "`Accept, Accept-Language`")),
        content((VisitBody = "application/json"), (String = "text/html"))),
    (status = NO_CONTENT, description = "A prefetch or prerender, as for a `GET`."),
))]
pub(super) async fn head(request: Request) -> Response {
    let wanted = Wanted::by(request.headers());
    if wanted.prefetch {
        // A HEAD gets what a GET would (RFC 9110, section 9.3.2), as far as no visit decides it.
        return StatusCode::NO_CONTENT.into_response();
    }
    let mut response = Response::new(Body::new(UnknownLength));
    if let Some(language) = wanted.page {
        page::set_headers(response.headers_mut(), language);
    } else {
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
    }
    set_vary(&mut response);
    response
}

/// Where the time of a visit went, as the page's `Server-Timing` names it.
fn timeline(arrived: SystemTime, timing: Timing) -> Timeline {
    let parts = [
        ("queue", timing.queue),
        ("postgres", timing.postgres),
        ("redis", timing.redis),
    ];
    Timeline {
        began: arrived,
        parts: parts.into(),
    }
}

/// Says that the response depends on these headers (RFC 9110, section 12.5.5).
fn set_vary(response: &mut Response) {
    let vary = HeaderValue::from_static("Accept, Accept-Language");
    response.headers_mut().insert(VARY, vary);
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

/// The body for a visit. If it is not known to be recorded, the Redis fields are those of the last
/// reading or batch, so that a failing database costs no Redis call.
fn body(state: &AppState, recorded: &Result<Recorded, Refusal>) -> VisitBody {
    match recorded {
        Ok(recorded) => VisitBody {
            db_status: status(true),
            redis_status: status(recorded.redis.is_some()),
            total_registros_db: Some(recorded.total),
            visitas_redis: recorded.redis,
        },
        Err(refusal) => {
            let postgres_works = !refusal.is_of_postgres() && state.postgres.availability().is_up();
            let redis = state.redis.availability().count();
            VisitBody {
                db_status: status(postgres_works),
                redis_status: status(redis.is_some()),
                total_registros_db: None,
                visitas_redis: redis,
            }
        }
    }
}

fn respond(body: &VisitBody) -> Response {
    let Ok(mut json) = serde_json::to_vec(body) else {
        // Four plain fields always serialise.
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    // With a newline a terminal shows its next prompt on a line of its own.
    json.push(b'\n');
    let mut response = Response::new(Body::from(json));
    let headers = response.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
