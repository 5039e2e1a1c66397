//! `GET /visitas`: what is known about visits, without recording one.
//!
//! Must not know: how a snapshot is made.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, VARY};
use http::{HeaderValue, StatusCode, Uri};
use url::form_urlencoded;

use super::language::Language;
use super::negotiation::Wanted;
use super::page;
use super::snapshot::Snapshot;
use super::state::AppState;

/// Responds with the snapshot as JSON, or with the page for a client that prefers it.
pub(super) async fn show(State(state): State<AppState>, request: Request) -> Response {
    let mut response = match Wanted::by(request.headers()).page {
        Some(language) => page::of_snapshot(&state, chosen(request.uri()).unwrap_or(language)),
        None => json(&state),
    };
    let vary = HeaderValue::from_static("Accept, Accept-Language");
    response.headers_mut().insert(VARY, vary);
    response
}

fn json(state: &AppState) -> Response {
    let Ok(mut json) = Snapshot::take(state).to_json() else {
        // Plain fields always serialise.
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    json.push(b'\n');
    let mut response = Response::new(Body::from(json));
    let content_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The language that `?lang=` names, if it names one that there is.
fn chosen(uri: &Uri) -> Option<Language> {
    let query = uri.query().unwrap_or_default();
    let (_, language) =
        form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "lang")?;
    match &*language {
        "pt" => Some(Language::Portuguese),
        "en" => Some(Language::English),
        _ => None,
    }
}
