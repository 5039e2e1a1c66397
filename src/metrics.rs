//! `GET /metrics`: everything that is counted, and what is read only when somebody asks.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;

use crate::service::Service;
use crate::store::Store as _;
use crate::telemetry::metric;

/// Renders every metric.
pub async fn render(State(service): State<Service>) -> Response {
    service.postgres.report();
    service.redis.report();
    metric::queue_depth(service.recorder.depth());
    let text = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (text, service.telemetry.render_metrics()).into_response()
}
