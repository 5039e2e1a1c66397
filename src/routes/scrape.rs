//! `GET /metrics`: every metric, in the format that the scraper prefers, compressed if it accepts
//! that.
//!
//! Must not know: any metric by its name.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, VARY};
use http::{HeaderMap, HeaderValue};
use mediatype::{MediaType, Name, ReadParams as _};

use super::negotiation::{accepted, elements, parameter_weight, weight};
use super::renderings::Kind;
use super::state::AppState;
use crate::metrics::Format;
use crate::store::Store as _;

const TEXT_EXAMPLE: &str = "# HELP visitas_queue_depth Visits that wait to be recorded.\n\
    # TYPE visitas_queue_depth gauge\n\
    visitas_queue_depth 0\n";
const OPENMETRICS_EXAMPLE: &str = "# TYPE visitas_queue_depth gauge\n\
    # HELP visitas_queue_depth Visits that wait to be recorded.\n\
    visitas_queue_depth 0\n\
    # EOF\n";

/// Every metric, for Prometheus
///
/// OpenMetrics with exemplars for a scraper that prefers it by `Accept`, compressed for one that
/// accepts that.
#[utoipa::path(get, path = "/metrics", operation_id = "getMetrics",
    params(
        ("accept-encoding" = Option<String>, Header, description = "`gzip` compresses the response",
            example = "gzip"),
    ),
    responses((status = OK, description = "Every metric.",
        headers(
            ("vary" = String, description = "`Accept, Accept-Encoding`"),
            ("content-encoding" = Option<String>, description = "`gzip` where that is accepted"),
        ),
        content(
            (String = "text/plain", example = json!(TEXT_EXAMPLE)),
            (String = "application/openmetrics-text", example = json!(OPENMETRICS_EXAMPLE)),
        ),
    )),
)]
pub(super) async fn render(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let (format, gzip) = (format(&headers), accepts_gzip(&headers));
    let content_type = match format {
        Format::Text => "text/plain; version=0.0.4; charset=utf-8",
        Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
    };
    let renderings = state.renderings.clone();
    let rendering = renderings.share(Kind { format, gzip }, move || {
        state.postgres.report();
        state.redis.report();
        state.recorder.report();
        state.telemetry.render_metrics(format)
    });
    let headers = [
        (CONTENT_TYPE, content_type),
        (VARY, "Accept, Accept-Encoding"),
    ];
    let mut response = (headers, rendering.await).into_response();
    if gzip {
        let gzip = HeaderValue::from_static("gzip");
        response.headers_mut().insert(CONTENT_ENCODING, gzip);
    }
    response
}

/// OpenMetrics for a scraper that names it and prefers nothing else; otherwise the text format, even
/// if neither is accepted (RFC 9110, 12.5.1).
fn format(headers: &HeaderMap) -> Format {
    let (mut openmetrics, mut text) = (0.0, 0.0);
    for media in accepted(headers) {
        let weight = weight(&media);
        if is_type(&media, "application", "openmetrics-text", "1.0.0") {
            openmetrics = weight.max(openmetrics);
        } else if is_type(&media, "text", "plain", "0.0.4") {
            text = weight.max(text);
        }
    }
    if openmetrics > 0.0 && openmetrics >= text {
        Format::OpenMetrics
    } else {
        Format::Text
    }
}

/// Whether the scraper accepts gzip and prefers nothing else. One that does not say what it accepts
/// gets plain text, which everything can read (RFC 9110, 12.5.3).
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut identity, mut others) = (None, None, None);
    for coding in elements(headers, ACCEPT_ENCODING) {
        let (name, parameter) = coding.split_once(';').unwrap_or((coding, "q=1"));
        let weight = parameter_weight(parameter);
        let named = match &*name.trim_ascii().to_ascii_lowercase() {
            "gzip" | "x-gzip" => &mut gzip,
            "identity" => &mut identity,
            "*" => &mut others,
            _ => continue,
        };
        *named = Some(weight.unwrap_or(0.0).max(named.unwrap_or(0.0)));
    }
    let gzip = gzip.or(others).unwrap_or(0.0);
    gzip > 0.0 && gzip >= identity.or(others).unwrap_or(0.0)
}

/// Whether `media` is the type `main/sub`, in this version if it names a version.
fn is_type(media: &MediaType<'_>, main: &str, sub: &str, version: &str) -> bool {
    let named = media.get_param(Name::new_unchecked("version"));
    media.ty == main && media.subty == sub && named.is_none_or(|named| named == version)
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use http::header::ACCEPT;

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
            "a\u{e7}\u{e3}o, application/openmetrics-text",
        ] {
            assert_eq!(
                format(&headers(&ACCEPT, &[accepted])),
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
            assert_eq!(
                format(&headers(&ACCEPT, &[refused])),
                Format::Text,
                "{refused}"
            );
        }
    }

    #[test]
    fn accept_can_be_several_lines() {
        let both = ["text/plain;q=0.5", "application/openmetrics-text"];
        assert_eq!(format(&headers(&ACCEPT, &both)), Format::OpenMetrics);
        assert_eq!(format(&HeaderMap::new()), Format::Text);
    }

    #[test]
    fn gzip_is_for_a_scraper_that_names_it_and_prefers_nothing_else() {
        for accepted in [
            "gzip",
            "GZip",
            "x-gzip",
            "gzip, deflate, br, zstd",
            "deflate;q=0.9 , gzip ; Q=0.001",
            "gzip;q=1.0, identity; q=0.5, *;q=0",
            "identity;q=0.5, gzip;q=0.5",
            "identity;q=0, *",
            "*",
            "gzip;q=0, gzip;q=0.2",
            "a\u{e7}\u{e3}o, gzip, br\u{e9}",
        ] {
            let headers = headers(&ACCEPT_ENCODING, &[accepted]);
            assert!(accepts_gzip(&headers), "{accepted}");
        }
        for refused in [
            "",
            "identity",
            "gzip;q=0",
            "gzip;q=0.000, *",
            "gzip;q=0.5, identity",
            "gzip;q=0.2, *;q=0.5",
            "*;q=0",
            "deflate, br",
            "gzipped",
            "gzip;q=nan",
            "gzip;q=-1",
            "gzip;q=much",
            "gzip;",
            "ação, gzip\u{e9}",
        ] {
            let headers = headers(&ACCEPT_ENCODING, &[refused]);
            assert!(!accepts_gzip(&headers), "{refused}");
        }
        let lines = ["br", "gzip"];
        assert!(accepts_gzip(&headers(&ACCEPT_ENCODING, &lines)));
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    fn headers(name: &HeaderName, lines: &[&str]) -> HeaderMap {
        let values = lines
            .iter()
            .map(|line| HeaderValue::from_bytes(line.as_bytes()));
        values
            .map(|value| (name.clone(), value.expect("a header's value")))
            .collect()
    }
}
