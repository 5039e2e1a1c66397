//! The routes, and the layers that every request passes on its way to a handler.
//!
//! Must not know: how a connection is served.

mod feed;
mod health;
mod language;
mod negotiation;
mod page;
mod problem;
mod renderings;
mod scrape;
mod snapshot;
mod state;
mod stream;
mod visit;
mod visits;

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

pub use self::feed::Feed;
use self::page::assets;
pub use self::renderings::Renderings;
pub use self::state::{AppState, Parts};
use crate::telemetry::request::{Observed, Observer};

const STREAM: &str = "/visitas/stream";

/// Builds the router of the main listener, with `/metrics` unless that has a listener of its own.
pub fn main_router(state: &AppState, observer: Arc<Observer>) -> Router {
    let mut router = Router::new()
        .route("/", get(visit::record).head(visit::head))
        .route("/visitas", get(visits::show))
        .route(STREAM, get(stream::open))
        .route("/assets/{file}", get(assets::file))
        .route("/favicon.ico", get(assets::favicon))
        .route("/robots.txt", get(assets::robots))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live));
    if state.has_metrics {
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
            .layer(observer.layer(observed))
            .map_response(problem::not_stored)
            .map_response(problem::problem_document)
            .layer(CatchPanicLayer::custom(problem::panicked)),
    )
}

/// Probes, scrapes and the page's files are not traced: they would outnumber visits. A stream lasts
/// as long as somebody watches.
fn observed(route: &str) -> Observed {
    match route {
        STREAM => Observed::Untimed,
        "/metrics" | "/favicon.ico" | "/robots.txt" => Observed::Timed,
        _ if route.starts_with("/health") || route.starts_with("/assets/") => Observed::Timed,
        _ => Observed::Traced,
    }
}
