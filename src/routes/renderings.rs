//! Shares one rendering of the metrics between concurrent scrapers, so that many scrapers cost
//! hardly more than one.
//!
//! Must not know: what is rendered.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use tokio::sync::Mutex;
use tokio::task::JoinError;

use crate::metrics::Format;

/// Shares renderings between scrapers. One rendering runs at a time, and every scraper that asks
/// before the next rendering starts gets that one. So scrapers use at most one thread, and wait for
/// at most the rendering in progress and one of each format.
#[derive(Debug, Clone, Default)]
pub struct Renderings(Arc<Mutex<Latest>>);

/// The last rendering of each format, and when it started.
type Latest = [Option<(Instant, Bytes)>; 2];

impl Renderings {
    /// Returns the text of a rendering that starts after this call.
    pub(super) async fn text(
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
        // The rendering holds the lock, so that no second one starts when its scraper disconnects.
        let rendering = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let text = Bytes::from(render());
            latest[format as usize] = Some((began, text.clone()));
            text
        });
        match rendering.await.map_err(JoinError::try_into_panic) {
            Ok(text) => text,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ended before the rendering started, and drops this future too.
            Err(Err(_cancelled)) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    /// A renderer whose text is the number of renderings started so far.
    struct Counter {
        renderings: Renderings,
        started: Arc<AtomicUsize>,
    }

    impl Counter {
        fn new() -> Self {
            Self {
                renderings: Renderings::default(),
                started: Arc::default(),
            }
        }

        fn ask(
            &self,
            format: Format,
            meanwhile: impl FnOnce() + Send + 'static,
        ) -> JoinHandle<Bytes> {
            let renderings = self.renderings.clone();
            let started = Arc::clone(&self.started);
            tokio::spawn(async move {
                let render = move || {
                    let turn = started.fetch_add(1, Ordering::SeqCst) + 1;
                    meanwhile();
                    turn.to_string()
                };
                renderings.text(format, render).await
            })
        }

        /// Starts a rendering that lasts until the sender is dropped, at the latest at the test's
        /// end.
        async fn hold(&self) -> (JoinHandle<Bytes>, mpsc::Sender<()>) {
            let (gate, closed) = mpsc::channel::<()>();
            let held = self.ask(Format::Text, move || closed.recv().unwrap_or_default());
            while self.started.load(Ordering::SeqCst) == 0 {
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
        // The runtime has one thread, so every scraper has asked when this task continues.
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
    async fn each_format_has_its_own_rendering() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        let mut others = Vec::new();
        for _ in 0..50 {
            for format in [Format::Text, Format::OpenMetrics] {
                others.push((format, counter.ask(format, || {})));
                // Makes scrapers of the two formats wait alternately.
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
        // The test asserts that nothing happens, so there is no fact to wait for.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(counter.started.load(Ordering::SeqCst), 1);
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
}
