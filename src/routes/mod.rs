//! The routes, and the layers that every request passes on its way to a handler.
//!
//! Must not know: how a connection is served.

mod description;
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
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::description::Description;
pub use self::feed::Feed;
use self::page::assets;
pub use self::renderings::Renderings;
pub use self::state::{AppState, Parts};
use crate::telemetry::request::{Observed, Observer};

const STREAM: &str = "/visitas/stream";

/// Builds the router of the main listener, with `/metrics` unless that has a listener of its own.
pub fn main_router(state: &AppState, observer: Arc<Observer>) -> Router {
    // `routes!` takes a route's path and methods from its description.
    let mut router = OpenApiRouter::new()
        .routes(routes!(visit::record, visit::head))
        .routes(routes!(visits::show))
        .routes(routes!(stream::open))
        .routes(routes!(assets::file))
        .routes(routes!(assets::favicon))
        .routes(routes!(assets::robots))
        .routes(routes!(health::health))
        .routes(routes!(health::ready))
        .routes(routes!(health::live));
    if state.has_metrics {
        router = router.routes(routes!(scrape::render));
    }
    let (router, mut api) = router.with_state(state.clone()).split_for_parts();
    let (description, api_of_it) = OpenApiRouter::new()
        .routes(routes!(description::serve))
        .split_for_parts();
    api.merge(api_of_it);
    let description = description.with_state(Description::new(api, |route| {
        observed(route) == Observed::Traced
    }));
    layered(router.merge(description), observer)
}

/// Builds the router of the listener at `METRICS_ADDR`.
pub fn metrics_router(state: &AppState, observer: Arc<Observer>) -> Router {
    let router = OpenApiRouter::new().routes(routes!(scrape::render));
    layered(router.with_state(state.clone()).into(), observer)
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

/// Probes, scrapes and files are not traced: they would outnumber visits. A stream lasts as long as
/// somebody watches.
fn observed(route: &str) -> Observed {
    match route {
        STREAM => Observed::Untimed,
        "/metrics" | "/openapi.json" | "/favicon.ico" | "/robots.txt" => Observed::Timed,
        _ if route.starts_with("/health") || route.starts_with("/assets/") => Observed::Timed,
        _ => Observed::Traced,
    }
}
