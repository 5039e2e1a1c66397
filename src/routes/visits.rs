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

/// Read totals, states and recent rates
///
/// Records nothing. Totals are of all replicas, rates of the one that responds. A client that
/// prefers `text/html` gets the page, without a visit of its own.
#[utoipa::path(get, path = "/visitas", operation_id = "getVisits", params(
    ("lang" = Option<String>, Query, description = "The page's language, `pt` or `en`; any other \
        value is ignored.", example = "pt"),
    ("accept-language" = Option<String>, Header, description = "The page's language without \
        `lang`.", example = "pt-BR"),
), responses(
    (status = OK, description = "What is known now, even while both stores are down.",
        headers(("vary" = String, description = "`Accept, Accept-Language`")),
        content(
            (Snapshot = "application/json", example = json!({
                "db_status": "ok", "redis_status": "ok",
                "total_registros_db": 42, "visitas_redis": 42,
                "atualizado_em": "2026-11-26T12:00:07.5Z",
                "replica": {
                    "id": "b6f0c6b0-6b1e-4f5e-8d3b-0d4f8f7c1f52",
                    "desde": "2026-11-26T11:58:00Z",
                    "taxas": [{
                        "em": "2026-11-26T12:00:00Z", "visitas": 3, "falhas": 0,
                        "p50_ms": 1.204, "p99_ms": 2.871
                    }]
                }
            })),
            (String = "text/html", example = json!("<!doctype html>…")),
        )),
))]
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
    // A tag can have a region, in either case: pt-BR.
    let (primary, _) = language.split_once('-').unwrap_or((&language, ""));
    match &*primary.to_ascii_lowercase() {
        "pt" => Some(Language::Portuguese),
        "en" => Some(Language::English),
        _ => None,
    }
}
