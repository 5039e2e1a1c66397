//! The routes, and what every request passes on its way to one.

mod health;
pub mod problem;
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

/// Every route of the main listener. `/metrics` is one of them unless it has a listener of its own.
pub fn of_visitors(state: &AppState, observer: Arc<Observer>, with_metrics: bool) -> Router {
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

/// The one route of the listener at `METRICS_ADDR`.
pub fn of_metrics(state: &AppState, observer: Arc<Observer>) -> Router {
    let router = Router::new().route("/metrics", get(scrape::render));
    layered(router.with_state(state.clone()), observer)
}

/// The first layer sees a request first: what is observed includes what the others refuse, and a
/// panic is caught before it can pass anything unobserved. They are one stack, since axum allocates
/// again for each layer that is added by itself.
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
