//! `GET /metrics`: every metric, in the format that the scraper prefers.
//!
//! Must not know: any metric by its name.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE, VARY};
use mediatype::{MediaType, MediaTypeList, Name, ReadParams as _};
use tokio::sync::Mutex;
use tokio::task::JoinError;

use super::state::AppState;
use crate::metrics::Format;
use crate::store::Store as _;

/// Shares renderings between scrapers. One runs at a time, and every scraper that asks before the
/// next one begins gets that one. So scrapers take at most one thread from the visits, and wait for
/// at most the rendering in progress and one of each format.
#[derive(Debug, Clone, Default)]
pub struct Scrapes(Arc<Mutex<Latest>>);

/// The last rendering of each format, and when it began.
type Latest = [Option<(Instant, Bytes)>; 2];

impl Scrapes {
    /// The text of a rendering that begins after this is called.
    async fn text(
        &self,
        format: Format,
        render: impl FnOnce() -> String + Send + 'static,
    ) -> Bytes {
        let asked = Instant::now();
        let mut latest = Arc::clone(&self.0).lock_owned().await;
        if let Some((began, text)) = &latest[format as usize]
            && *began > asked
        {
            return text.clone();
        }
        // The rendering holds the lock, so that a scraper that disconnects does not start another.
        let rendering = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let text = Bytes::from(render());
            latest[format as usize] = Some((began, text.clone()));
            text
        });
        match rendering.await.map_err(JoinError::try_into_panic) {
            Ok(text) => text,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ended before the rendering began, and drops this future, too.
            Err(Err(_cancelled)) => std::future::pending().await,
        }
    }
}

/// Renders every metric, in the format that the scraper prefers.
pub(super) async fn render(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let format = format(&headers);
    let content_type = match format {
        Format::Text => "text/plain; version=0.0.4; charset=utf-8",
        Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
    };
    let scrapes = state.scrapes.clone();
    let text = scrapes.text(format, move || {
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
            if is(&media, "application", "openmetrics-text", "1.0.0") {
                openmetrics = weight.max(openmetrics);
            } else if is(&media, "text", "plain", "0.0.4") {
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

/// Whether a media type is this one, in this version if it names one.
fn is(media: &MediaType<'_>, main: &str, sub: &str, version: &str) -> bool {
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use http::HeaderValue;
    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    /// Renders how many renderings have begun.
    struct Counter {
        scrapes: Scrapes,
        begun: Arc<AtomicUsize>,
    }

    impl Counter {
        fn new() -> Self {
            Self {
                scrapes: Scrapes::default(),
                begun: Arc::default(),
            }
        }

        fn ask(
            &self,
            format: Format,
            meanwhile: impl FnOnce() + Send + 'static,
        ) -> JoinHandle<Bytes> {
            let scrapes = self.scrapes.clone();
            let begun = Arc::clone(&self.begun);
            tokio::spawn(async move {
                let render = move || {
                    let turn = begun.fetch_add(1, Ordering::SeqCst) + 1;
                    meanwhile();
                    turn.to_string()
                };
                scrapes.text(format, render).await
            })
        }

        /// Begins a rendering that goes on until the sender is dropped, at the latest when the test
        /// ends.
        async fn hold(&self) -> (JoinHandle<Bytes>, mpsc::Sender<()>) {
            let (gate, closed) = mpsc::channel::<()>();
            let held = self.ask(Format::Text, move || closed.recv().unwrap_or_default());
            while self.begun.load(Ordering::SeqCst) == 0 {
                yield_now().await;
            }
            (held, gate)
        }
    }

    #[tokio::test]
    async fn scrapers_that_ask_during_a_rendering_share_the_next() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        let others: Vec<_> = (0..50).map(|_| counter.ask(Format::Text, || {})).collect();
        // The runtime has one thread, so every scraper has asked before this goes on.
        yield_now().await;
        drop(gate);
        assert_eq!(first.await.unwrap(), "1");
        for other in others {
            assert_eq!(other.await.unwrap(), "2");
        }
        let later = counter.ask(Format::Text, || {});
        assert_eq!(later.await.unwrap(), "3");
    }

    #[tokio::test]
    async fn formats_are_told_apart() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        let mut others = Vec::new();
        for _ in 0..50 {
            for format in [Format::Text, Format::OpenMetrics] {
                others.push((format, counter.ask(format, || {})));
                // So that the formats wait in turns.
                yield_now().await;
            }
        }
        drop(gate);
        assert_eq!(first.await.unwrap(), "1");
        for (format, other) in others {
            let turn = if format == Format::Text { "2" } else { "3" };
            assert_eq!(other.await.unwrap(), turn);
        }
    }

    #[tokio::test]
    async fn scraper_that_has_left_keeps_its_turn() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let second = counter.ask(Format::Text, || {});
        // Nothing must happen, so there is no fact to wait for.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(counter.begun.load(Ordering::SeqCst), 1);
        drop(gate);
        assert_eq!(second.await.unwrap(), "2");
    }

    #[tokio::test]
    async fn rendering_that_panics_leaves_the_next_alone() {
        let counter = Counter::new();
        let first = counter.ask(Format::Text, || panic!("on purpose"));
        assert!(first.await.unwrap_err().is_panic());
        assert_eq!(counter.ask(Format::Text, || {}).await.unwrap(), "2");
    }

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
    fn accept_may_be_several_lines() {
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
