//! Errors as a client sees them: a problem document (RFC 9457) with the status and no internal
//! detail.
//!
//! Must not know: why a request failed.

use std::any::Any;

use axum::BoxError;
use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of a problem document.
pub(super) const MEDIA_TYPE: &str = "application/problem+json";

/// A problem document (RFC 9457).
#[derive(Serialize, ToSchema)]
pub(super) struct Problem {
    /// Always `about:blank`: the problem has no more to it than its status
    r#type: &'static str,
    /// The status in words
    title: &'static str,
    /// The status, for a reader that sees the body alone
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
}

impl Problem {
    /// The document for a status.
    pub(super) fn new(status: StatusCode) -> Self {
        Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
        }
    }
}

/// Replaces the body of every error without a body of its own by a problem document: errors of the
/// router (404, 405), of a handler that panicked (500) and of a stream too many (503).
pub(super) fn problem_document<B>(response: http::Response<B>) -> Response
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let response = response.map(Body::new);
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    if !is_error || response.headers().get(CONTENT_TYPE).is_some_and(is_own) {
        return response;
    }
    let Ok(body) = serde_json::to_vec(&Problem::new(status)) else {
        return response;
    };
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(CONTENT_LENGTH);
    parts
        .headers
        .insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    Response::from_parts(parts, Body::from(body))
}

/// Whether a body is a handler's own: JSON, or the page.
fn is_own(content_type: &HeaderValue) -> bool {
    content_type == "application/json" || content_type.as_bytes().starts_with(b"text/html")
}

/// Keeps caches from storing a response without `Cache-Control`, since each is true only at its own
/// moment. Without this header a cache may store some by its own judgement, such as a 404 or a
/// scrape (RFC 9111, section 4.2.2).
pub(super) fn not_stored(mut response: Response) -> Response {
    response
        .headers_mut()
        .entry(CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

/// The response to a request whose handler panicked. The log has the panic's message.
pub(super) fn panicked(_panic: Box<dyn Any + Send>) -> http::Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    response
}
