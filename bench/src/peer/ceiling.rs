//! The ceiling: a constant of a response's size, from the HTTP library's own server and router
//! alone.

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;

const BODY: &str = r#"{"db_status":"ok","redis_status":"ok","total_registros_db":1234567,"visitas_redis":1234567}"#;

pub(super) fn router() -> Router {
    Router::new().route(
        "/",
        get(async || ([(CONTENT_TYPE, "application/json")], BODY)),
    )
}
