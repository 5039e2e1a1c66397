//! `GET /metrics`: every metric, in the format that the scraper prefers.
//!
//! Must not know: any metric by its name.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE, VARY};
use mediatype::{MediaType, MediaTypeList, Name, ReadParams as _};

use super::state::AppState;
use crate::metrics::Format;
use crate::store::Store as _;

/// Renders every metric, in the format that the scraper prefers.
pub(super) async fn render(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let format = format(&headers);
    let content_type = match format {
        Format::Text => "text/plain; version=0.0.4; charset=utf-8",
        Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
    };
    let renderings = state.renderings.clone();
    let text = renderings.text(format, move || {
        state.postgres.report();
        state.redis.report();
        state.recorder.report();
        state.telemetry.render_metrics(format)
    });
    let headers = [(CONTENT_TYPE, content_type), (VARY, ACCEPT.as_str())];
    (headers, text.await).into_response()
}

/// OpenMetrics for a scraper that names it and prefers nothing else; otherwise the text format, even
/// if neither is accepted (RFC 9110, 12.5.1).
fn format(headers: &HeaderMap) -> Format {
    let (mut openmetrics, mut text) = (0.0, 0.0);
    for accepted in headers.get_all(ACCEPT) {
        let list = MediaTypeList::new(accepted.to_str().unwrap_or_default());
        for media in list.flatten() {
            let weight = weight(&media);
            if is_type(&media, "application", "openmetrics-text", "1.0.0") {
                openmetrics = weight.max(openmetrics);
            } else if is_type(&media, "text", "plain", "0.0.4") {
                text = weight.max(text);
            }
        }
    }
    if openmetrics > 0.0 && openmetrics >= text {
        Format::OpenMetrics
    } else {
        Format::Text
    }
}

/// Whether `media` is the type `main/sub`, in this version if it names a version.
fn is_type(media: &MediaType<'_>, main: &str, sub: &str, version: &str) -> bool {
    let named = media.get_param(Name::new_unchecked("version"));
    media.ty == main && media.subty == sub && named.is_none_or(|named| named == version)
}

/// How much a scraper prefers a media type, from 0 (not at all) to 1.
fn weight(media: &MediaType<'_>) -> f32 {
    media
        .get_param(Name::new_unchecked("q"))
        .map_or(Some(1.0), |weight| weight.as_str().parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn openmetrics_is_for_a_scraper_that_names_it_and_prefers_nothing_else() {
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,\
            application/openmetrics-text;version=0.0.1;q=0.75,\
            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,\
            text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,\
            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for accepted in [
            prometheus_2,
            prometheus_3,
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; Version=\"1.0.0\"",
            "application/openmetrics-text;escaping=\"a,b;q=0\";q=0.001",
            "application/openmetrics-text;q=0.5, Text/Plain;q=0.5",
            "text/plain;version=1.0.0, application/openmetrics-text;q=0.1",
            "application/openmetrics-text;q=0, application/openmetrics-text;q=0.2",
        ] {
            assert_eq!(
                format(&accept(&[accepted])),
                Format::OpenMetrics,
                "{accepted}"
            );
        }
        for refused in [
            "application/openmetrics-text;version=0.0.1",
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;q=0, */*",
            "application/openmetrics-text;q=0.4, text/plain",
            "text/plain;q=0.1, text/plain;q=0.5, application/openmetrics-text;q=0.4",
            "application/openmetrics-text;q=much",
            "application/openmetrics-text;q=nan",
            "application/openmetrics-text;q=-1",
            "*/*",
            "text/html, application/xhtml+xml",
            "",
            "ação, ;;,=",
            "application/openmetrics-text\\\";q=\"/,|",
        ] {
            assert_eq!(format(&accept(&[refused])), Format::Text, "{refused}");
        }
    }

    #[test]
    fn accept_can_be_several_lines() {
        let both = ["text/plain;q=0.5", "application/openmetrics-text"];
        assert_eq!(format(&accept(&both)), Format::OpenMetrics);
        assert_eq!(format(&HeaderMap::new()), Format::Text);
    }

    fn accept(lines: &[&str]) -> HeaderMap {
        let values = lines
            .iter()
            .map(|line| HeaderValue::from_bytes(line.as_bytes()));
        values
            .map(|value| (ACCEPT, value.expect("a header's value")))
            .collect()
    }
}
