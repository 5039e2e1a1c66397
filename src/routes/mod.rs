//! The routes, and the layers that every request passes on its way to a handler.
//!
//! Must not know: how a connection is served.

mod health;
mod problem;
mod renderings;
mod scrape;
mod state;
mod visit;

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

pub use self::state::AppState;
use crate::telemetry::request::Observer;

/// Builds the router of the main listener, with `/metrics` unless that has a listener of its own.
pub fn main_router(state: &AppState, observer: Arc<Observer>, with_metrics: bool) -> Router {
    let mut router = Router::new()
        .route("/", get(visit::record).head(visit::head))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live));
    if with_metrics {
        router = router.route("/metrics", get(scrape::render));
    }
    layered(router.with_state(state.clone()), observer)
}

/// Builds the router of the listener at `METRICS_ADDR`.
pub fn metrics_router(state: &AppState, observer: Arc<Observer>) -> Router {
    let router = Router::new().route("/metrics", get(scrape::render));
    layered(router.with_state(state.clone()), observer)
}

/// Adds the layers. The first layer is the outermost: it observes the responses of all others, and
/// a panic becomes a response before it reaches that layer. They are one stack, since axum
/// allocates once for each layer that is added by itself.
pub fn layered(router: Router, observer: Arc<Observer>) -> Router {
    router.layer(
        ServiceBuilder::new()
            .layer(observer.layer(is_traced))
            .map_response(problem::not_stored)
            .map_response(problem::problem_document)
            .layer(CatchPanicLayer::custom(problem::panicked)),
    )
}

/// Probes and scrapes are not traced: they would outnumber visits.
fn is_traced(route: &str) -> bool {
    route != "/metrics" && !route.starts_with("/health")
}
