//! `GET /metrics`: everything that is counted, and what is read only when somebody asks.

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
use crate::metrics;
use crate::metrics::openmetrics::Format;
use crate::store::Store as _;

/// What scrapers share: one rendering at a time, for all who asked for its format before it began.
/// However many ask, they take no more than one thread from the visits, and nobody waits for more
/// than the rendering under way and one of each format.
#[derive(Debug, Clone, Default)]
pub struct Scrapes(Arc<Mutex<Latest>>);

/// The last rendering of each format.
#[derive(Debug, Default)]
struct Latest {
    text: Option<Rendered>,
    openmetrics: Option<Rendered>,
}

#[derive(Debug)]
struct Rendered {
    began: Instant,
    text: Bytes,
}

impl Latest {
    fn of(&mut self, format: Format) -> &mut Option<Rendered> {
        match format {
            Format::Text => &mut self.text,
            Format::OpenMetrics => &mut self.openmetrics,
        }
    }
}

impl Scrapes {
    /// The text of a rendering that began when this had been called, never an older one.
    async fn text(
        &self,
        format: Format,
        render: impl FnOnce() -> String + Send + 'static,
    ) -> Bytes {
        let asked = Instant::now();
        let mut latest = Arc::clone(&self.0).lock_owned().await;
        if let Some(rendered) = latest.of(format)
            && rendered.began > asked
        {
            return rendered.text.clone();
        }
        // The lock goes along: a scraper that does not wait does not make room for another thread.
        let rendering = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let text = Bytes::from(render());
            *latest.of(format) = Some(Rendered {
                began,
                text: text.clone(),
            });
            text
        });
        match rendering.await.map_err(JoinError::try_into_panic) {
            Ok(text) => text,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime has ended before it began, and this goes with it.
            Err(Err(_cancelled)) => std::future::pending().await,
        }
    }
}

/// Renders every metric, in the format that the scraper likes best.
pub async fn render(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let format = format(&headers);
    let about = [
        (CONTENT_TYPE, format.content_type()),
        (VARY, ACCEPT.as_str()),
    ];
    let scrapes = state.scrapes.clone();
    let text = scrapes.text(format, move || {
        state.postgres.report();
        state.redis.report();
        metrics::queue_depth(state.recorder.depth());
        state.telemetry.render_metrics(format)
    });
    (about, text.await).into_response()
}

/// OpenMetrics for whoever names it and likes nothing better; the text format for everybody else,
/// also where none of the two is accepted (RFC 9110, 12.5.1).
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

/// How much a media type is liked, from 0 (not at all) to 1.
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
    use proptest::prelude::*;
    use tokio::task::{JoinHandle, yield_now};

    use super::*;
    use crate::property::bounded;

    /// Scrapes of which each says how many have begun.
    struct Counted {
        scrapes: Scrapes,
        begun: Arc<AtomicUsize>,
    }

    impl Counted {
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

        /// Begins a rendering that goes on until what is returned with it is dropped, as it is
        /// when a test ends, however it does.
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
    async fn who_asks_during_a_rendering_shares_the_next() {
        let counted = Counted::new();
        let (first, gate) = counted.hold().await;
        let others: Vec<_> = (0..50).map(|_| counted.ask(Format::Text, || {})).collect();
        // This runtime has one thread: whoever is to ask has asked before this goes on.
        yield_now().await;
        drop(gate);
        assert_eq!(first.await.unwrap(), "1");
        for other in others {
            assert_eq!(other.await.unwrap(), "2");
        }
        let later = counted.ask(Format::Text, || {});
        assert_eq!(later.await.unwrap(), "3");
    }

    #[tokio::test]
    async fn formats_are_told_apart() {
        let counted = Counted::new();
        let (first, gate) = counted.hold().await;
        let mut others = Vec::new();
        for _ in 0..50 {
            for format in [Format::Text, Format::OpenMetrics] {
                others.push((format, counted.ask(format, || {})));
                // So that they wait in turns.
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
        let counted = Counted::new();
        let (first, gate) = counted.hold().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let second = counted.ask(Format::Text, || {});
        // Nothing is to happen: there is nothing to wait for.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(counted.begun.load(Ordering::SeqCst), 1);
        drop(gate);
        assert_eq!(second.await.unwrap(), "2");
    }

    #[tokio::test]
    async fn rendering_that_panics_leaves_the_next_alone() {
        let counted = Counted::new();
        let first = counted.ask(Format::Text, || panic!("as it is tried here"));
        assert!(first.await.unwrap_err().is_panic());
        assert_eq!(counted.ask(Format::Text, || {}).await.unwrap(), "2");
    }

    #[test]
    fn openmetrics_is_for_who_names_it_and_likes_nothing_better() {
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,\
            application/openmetrics-text;version=0.0.1;q=0.75,\
            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,\
            text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,\
            text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for (accept, expected) in [
            (prometheus_2, Format::OpenMetrics),
            (prometheus_3, Format::OpenMetrics),
            ("application/openmetrics-text", Format::OpenMetrics),
            (
                "Application/OpenMetrics-Text; Version=\"1.0.0\"",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text;version=0.0.1", Format::Text),
            ("application/openmetrics-text;version=2.0.0", Format::Text),
            ("application/openmetrics-text;q=0, */*", Format::Text),
            (
                "application/openmetrics-text;q=0.4, text/plain",
                Format::Text,
            ),
            ("application/openmetrics-text;q=much", Format::Text),
            ("*/*", Format::Text),
            ("text/html, application/xhtml+xml", Format::Text),
            ("", Format::Text),
            ("ação, ;;,=", Format::Text),
        ] {
            assert_eq!(format(&asking(&[accept])), expected, "{accept}");
        }
    }

    #[test]
    fn accept_may_be_several_lines() {
        let both = ["text/plain;q=0.5", "application/openmetrics-text"];
        assert_eq!(format(&asking(&both)), Format::OpenMetrics);
        assert_eq!(format(&HeaderMap::new()), Format::Text);
    }

    /// What a list of media ranges is made of, well or badly, between bars.
    const PIECES: &str = "application/openmetrics-text|text/plain|*/*|,|;|q=|0.5|nan|inf|-1|\
        version=|1.0.0|\"|\\| |=|/";

    /// A media range, the format that it names, and how much it is liked in thousandths.
    type Range = (&'static str, Option<Format>, Option<u16>);

    fn ranges() -> impl Strategy<Value = Vec<Range>> {
        let named = prop::sample::select(
            &[
                ("application/openmetrics-text", Some(Format::OpenMetrics)),
                (
                    "APPLICATION/OpenMetrics-Text; Version=1.0.0",
                    Some(Format::OpenMetrics),
                ),
                (
                    "application/openmetrics-text;escaping=\"a,b;q=0\";version=\"1.0.0\"",
                    Some(Format::OpenMetrics),
                ),
                ("application/openmetrics-text;version=0.0.1", None),
                ("text/plain", Some(Format::Text)),
                ("Text/Plain;version=0.0.4;charset=utf-8", Some(Format::Text)),
                ("text/plain;version=1.0.0", None),
                ("text/*", None),
                ("*/*", None),
                (
                    "application/vnd.google.protobuf;proto=io.prometheus.client",
                    None,
                ),
            ][..],
        );
        let range = (named, prop::option::of(0..=1000_u16));
        prop::collection::vec(range.prop_map(|((text, named), q)| (text, named, q)), 0..6)
    }

    fn written(ranges: &[Range]) -> Vec<String> {
        let written = ranges.iter().map(|(text, _, q)| match q {
            Some(q) => format!("{text};q={}.{:03}", q / 1000, q % 1000),
            None => (*text).to_owned(),
        });
        written.collect()
    }

    proptest! {
        #![proptest_config(bounded())]

        #[test]
        fn any_bytes_ask_for_one_of_the_two_formats(
            lines in prop::collection::vec(
                prop_oneof![
                    "[ -~\t]{0,60}".prop_map(String::into_bytes),
                    prop::collection::vec(prop::sample::select(PIECES.split('|').collect::<Vec<_>>()), 0..12)
                        .prop_map(|pieces| pieces.concat().into_bytes()),
                    prop::collection::vec(0x80..=0xff_u8, 0..20),
                ],
                0..4,
            ),
        ) {
            let values = lines.iter().map(|line| (ACCEPT, HeaderValue::from_bytes(line).unwrap()));
            let headers: HeaderMap = values.collect();
            if format(&headers) == Format::OpenMetrics {
                let text = String::from_utf8_lossy(&lines.concat()).to_lowercase();
                prop_assert!(text.contains("application/openmetrics-text"), "{text}");
            }
        }

        #[test]
        fn format_is_the_one_that_is_liked_best(ranges in ranges(), in_lines in any::<bool>()) {
            let liked = |format| {
                let named = ranges.iter().filter(|(_, named, _)| *named == Some(format));
                named.map(|(_, _, q)| q.unwrap_or(1000)).max().unwrap_or(0)
            };
            let (openmetrics, text) = (liked(Format::OpenMetrics), liked(Format::Text));
            let expected = if openmetrics > 0 && openmetrics >= text {
                Format::OpenMetrics
            } else {
                Format::Text
            };
            let written = written(&ranges);
            let lines = if in_lines { written } else { vec![written.join(" ,\t")] };
            let lines: Vec<_> = lines.iter().map(String::as_str).collect();
            prop_assert_eq!(format(&asking(&lines)), expected, "{:?}", lines);
        }
    }

    fn asking(lines: &[&str]) -> HeaderMap {
        let values = lines
            .iter()
            .map(|line| HeaderValue::from_bytes(line.as_bytes()));
        values
            .map(|value| (ACCEPT, value.expect("a header's value")))
            .collect()
    }
}
