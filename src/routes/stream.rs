//! `GET /visitas/stream`: the JSON of `GET /visitas` as server-sent events, once a second and at
//! each change of a store's state.
//!
//! Must not know: what a snapshot contains.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt as _};
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, StatusCode};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::feed::{Slot, Watcher};
use super::snapshot::Snapshot;
use super::state::AppState;
use crate::lifecycle::{Lifecycle, Phase};
use crate::server::Endless;
use crate::store::Store as _;

/// Tells proxies not to collect events before they pass them on.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// How often a comment is sent.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
const COMMENT: &[u8] = b":\n\n";
/// How long a browser waits before it connects again, in milliseconds.
const RETRY: &[u8] = b"retry: 1000\n\n";

/// An open stream.
struct Viewer {
    watcher: Watcher,
    comments: Interval,
    lifecycle: Lifecycle,
    _slot: Slot,
}

/// Follow totals, states and recent rates
///
/// Server-sent events: the JSON of `/visitas`, once a second and at each change of a store's state,
/// with a comment every 15 s. Ends when the service begins to stop.
#[utoipa::path(get, path = "/visitas/stream", operation_id = "followVisits", responses(
    (status = OK, description = "Events without an end.", body = String,
        content_type = "text/event-stream",
        headers(("x-accel-buffering" = String, description = "`no`: proxies pass events on at once")),
        example = json!("retry: 1000\n\ndata: {\"db_status\":\"ok\",…}\n\n")),
    (status = SERVICE_UNAVAILABLE, description = "Too many streams are open."),
))]
pub(super) async fn open(State(state): State<AppState>) -> Response {
    let Some(slot) = state.feed.take_slot() else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let changes = [
        state.postgres.availability().changes(),
        state.redis.availability().changes(),
    ];
    let rendered = state.clone();
    let mut watcher = state.feed.watch(changes, move || event(&rendered));
    // Even a service that is stopping sends one event, so that a page that connects to it again
    // stays true.
    let first = [Bytes::from_static(RETRY), watcher.latest()];
    let mut comments = interval_at(Instant::now() + COMMENT_INTERVAL, COMMENT_INTERVAL);
    comments.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let viewer = Viewer {
        watcher,
        comments,
        lifecycle: state.lifecycle.clone(),
        _slot: slot,
    };
    let events = stream::iter(first).chain(viewer.events());
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, Infallible>)));
    response.extensions_mut().insert(Endless);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    response
}

/// An event with what is known now.
fn event(state: &AppState) -> Bytes {
    // Plain fields always serialise.
    let json = Snapshot::take(state).to_json().unwrap_or_default();
    [b"data: ", &json[..], b"\n\n"].concat().into()
}

impl Viewer {
    fn events(self) -> impl Stream<Item = Bytes> {
        stream::unfold(self, async |mut viewer| {
            let next = viewer.next().await?;
            Some((next, viewer))
        })
    }

    /// The next event or comment; `None` once the service begins to stop.
    async fn next(&mut self) -> Option<Bytes> {
        tokio::select! {
            biased;
            () = self.lifecycle.wait_for(Phase::Leaving) => None,
            _ = self.comments.tick() => Some(Bytes::from_static(COMMENT)),
            event = self.watcher.next() => event,
        }
    }
}
