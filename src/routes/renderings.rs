//! Shares one rendering of the metrics between concurrent scrapers, so that many scrapers cost
//! hardly more than one.
//!
//! A rendering is compressed before it is shared, so many scrapers that accept gzip cost one
//! compression, and no worker that serves visits does it.
//!
//! Must not know: what is rendered.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::sync::Mutex;
use tokio::task::JoinError;

use crate::metrics::Format;

/// Shares renderings between scrapers. One rendering runs at a time, and every scraper that asks
/// before the next rendering starts gets that one. So scrapers use at most one thread, and wait for
/// at most the rendering in progress and one of each kind.
#[derive(Debug, Clone, Default)]
pub struct Renderings(Arc<Mutex<Latest>>);

/// The last rendering of each kind, and when it started.
type Latest = [Option<(Instant, Bytes)>; 4];

/// What a scraper gets. Each kind has its own renderings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) format: Format,
    /// Whether it is compressed.
    pub(super) gzip: bool,
}

impl Renderings {
    /// Returns a rendering that starts after this call.
    pub(super) async fn share(
        &self,
        kind: Kind,
        render: impl FnOnce() -> String + Send + 'static,
    ) -> Bytes {
        let asked = Instant::now();
        let place = 2 * kind.format as usize + usize::from(kind.gzip);
        let mut latest = Arc::clone(&self.0).lock_owned().await;
        if let Some((began, rendering)) = &latest[place]
            && *began > asked
        {
            return rendering.clone();
        }
        // The rendering holds the lock, so that no second one starts when its scraper disconnects.
        let rendering = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let text = render().into_bytes();
            let rendering = Bytes::from(if kind.gzip { compress(&text) } else { text });
            latest[place] = Some((began, rendering.clone()));
            rendering
        });
        match rendering.await.map_err(JoinError::try_into_panic) {
            Ok(rendering) => rendering,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ended before the rendering started, and drops this future too.
            Err(Err(_cancelled)) => std::future::pending().await,
        }
    }
}

/// Compresses by the fastest level: series repeat each other, so a better level gains little.
fn compress(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let written = encoder.write_all(text).and_then(|()| encoder.finish());
    // Writing to memory does not fail.
    written.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::Read as _;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use flate2::read::GzDecoder;
    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    const TEXT: Kind = Kind {
        format: Format::Text,
        gzip: false,
    };
    const OPENMETRICS: Kind = Kind {
        format: Format::OpenMetrics,
        ..TEXT
    };

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

        fn ask(&self, kind: Kind, meanwhile: impl FnOnce() + Send + 'static) -> JoinHandle<Bytes> {
            let renderings = self.renderings.clone();
            let started = Arc::clone(&self.started);
            tokio::spawn(async move {
                let render = move || {
                    let turn = started.fetch_add(1, Ordering::SeqCst) + 1;
                    meanwhile();
                    turn.to_string()
                };
                renderings.share(kind, render).await
            })
        }

        /// Starts a rendering that lasts until the sender is dropped, at the latest at the test's
        /// end.
        async fn hold(&self) -> (JoinHandle<Bytes>, mpsc::Sender<()>) {
            let (gate, closed) = mpsc::channel::<()>();
            let held = self.ask(TEXT, move || closed.recv().unwrap_or_default());
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
        let others: Vec<_> = (0..50).map(|_| counter.ask(TEXT, || {})).collect();
        // The runtime has one thread, so every scraper has asked when this task continues.
        yield_now().await;
        drop(gate);
        assert_eq!(first.await.unwrap(), "1");
        for other in others {
            assert_eq!(other.await.unwrap(), "2");
        }
        let later = counter.ask(TEXT, || {});
        assert_eq!(later.await.unwrap(), "3");
    }

    #[tokio::test]
    async fn each_kind_has_its_own_rendering() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        let mut others = Vec::new();
        for _ in 0..50 {
            for kind in [TEXT, OPENMETRICS] {
                others.push((kind, counter.ask(kind, || {})));
                // Makes scrapers of the two kinds wait alternately.
                yield_now().await;
            }
        }
        drop(gate);
        assert_eq!(first.await.unwrap(), "1");
        for (kind, other) in others {
            let turn = if kind == TEXT { "2" } else { "3" };
            assert_eq!(other.await.unwrap(), turn);
        }
    }

    #[tokio::test]
    async fn scrapers_that_accept_gzip_share_one_compression() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        let gzip = Kind { gzip: true, ..TEXT };
        let others: Vec<_> = (0..50).map(|_| counter.ask(gzip, || {})).collect();
        yield_now().await;
        drop(gate);
        first.await.unwrap();
        let mut shared = HashSet::new();
        for other in others {
            let compressed = other.await.unwrap();
            shared.insert(compressed.as_ptr());
            let mut text = String::new();
            GzDecoder::new(&*compressed)
                .read_to_string(&mut text)
                .unwrap();
            assert_eq!(text, "2");
        }
        assert_eq!(shared.len(), 1);
    }

    #[tokio::test]
    async fn scraper_that_has_left_keeps_its_turn() {
        let counter = Counter::new();
        let (first, gate) = counter.hold().await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let second = counter.ask(TEXT, || {});
        // The test asserts that nothing happens, so there is no fact to wait for.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(counter.started.load(Ordering::SeqCst), 1);
        drop(gate);
        assert_eq!(second.await.unwrap(), "2");
    }

    #[tokio::test]
    async fn rendering_that_panics_leaves_the_next_alone() {
        let counter = Counter::new();
        let first = counter.ask(TEXT, || panic!("on purpose"));
        assert!(first.await.unwrap_err().is_panic());
        assert_eq!(counter.ask(TEXT, || {}).await.unwrap(), "2");
    }
}
