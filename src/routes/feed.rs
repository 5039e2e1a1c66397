//! One feed of events for all streams: each event is rendered once, and only while somebody
//! watches. Bounds how many streams are open.
//!
//! Must not know: what an event contains, and how a stream is sent.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::body::Bytes;
use metrics::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::metrics::catalog::PAGE_STREAMS;

/// How often an event is rendered while nothing changes.
const INTERVAL: Duration = Duration::from_secs(1);

/// The feed, and how many streams of it can be open.
pub struct Feed {
    current: Mutex<Weak<Channel>>,
    slots: Arc<Semaphore>,
    open: Gauge,
}

/// The latest event, for as long as somebody watches: dropped with its last watcher, which ends the
/// task that renders.
#[derive(Debug)]
struct Channel {
    latest: watch::Receiver<Bytes>,
    task: AbortHandle,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The place of an open stream among those that can be open.
pub(super) struct Slot {
    open: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.open.decrement(1.0);
    }
}

/// Watches the feed.
#[derive(Debug)]
pub(super) struct Watcher {
    latest: watch::Receiver<Bytes>,
    _channel: Arc<Channel>,
}

impl Feed {
    /// A feed for at most this many streams.
    #[must_use]
    pub fn new(max_streams: usize) -> Self {
        let open = PAGE_STREAMS.with([]);
        open.set(0.0);
        Self {
            current: Mutex::default(),
            slots: Arc::new(Semaphore::new(max_streams)),
            open,
        }
    }

    /// A place for a stream; `None` if as many as can be are open.
    pub(super) fn take_slot(&self) -> Option<Slot> {
        let permit = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        self.open.increment(1.0);
        Some(Slot {
            open: self.open.clone(),
            _permit: permit,
        })
    }

    /// Watches the feed. From the first watcher to the last, `render` makes an event once a second
    /// and whenever one of `changes` does.
    pub(super) fn watch(
        &self,
        mut changes: [watch::Receiver<()>; 2],
        render: impl Fn() -> Bytes + Send + 'static,
    ) -> Watcher {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let running = current.upgrade();
        let channel = running.filter(|channel| !channel.task.is_finished());
        let channel = channel.unwrap_or_else(|| {
            // What changes from here on makes a further event.
            for change in &mut changes {
                change.mark_unchanged();
            }
            let (sender, latest) = watch::channel(render());
            let task = tokio::spawn(publish(sender, changes, render)).abort_handle();
            let channel = Arc::new(Channel { latest, task });
            *current = Arc::downgrade(&channel);
            channel
        });
        Watcher {
            latest: channel.latest.clone(),
            _channel: channel,
        }
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Feed").finish_non_exhaustive()
    }
}

impl Watcher {
    /// The latest event.
    pub(super) fn latest(&mut self) -> Bytes {
        self.latest.borrow_and_update().clone()
    }

    /// Waits for an event after the latest one, and skips those between. `None` if the feed has
    /// ended, by a panic. Safe to cancel.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        self.latest.changed().await.ok()?;
        Some(self.latest())
    }
}

async fn publish(
    latest: watch::Sender<Bytes>,
    [mut first, mut second]: [watch::Receiver<()>; 2],
    render: impl Fn() -> Bytes,
) {
    let mut ticks = interval_at(Instant::now() + INTERVAL, INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = first.changed() => {}
            Ok(()) = second.changed() => {}
        }
        latest.send_replace(render());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A feed whose events are the number of renderings so far.
    struct Counted {
        feed: Feed,
        rendered: Arc<AtomicUsize>,
        change: watch::Sender<()>,
    }

    impl Counted {
        fn new() -> Self {
            Self {
                feed: Feed::new(1),
                rendered: Arc::default(),
                change: watch::Sender::new(()),
            }
        }

        fn watch(&self) -> Watcher {
            let rendered = Arc::clone(&self.rendered);
            let changes = [self.change.subscribe(), self.change.subscribe()];
            self.feed.watch(changes, move || {
                let number = rendered.fetch_add(1, Ordering::SeqCst) + 1;
                number.to_string().into()
            })
        }

        fn rendered(&self) -> usize {
            self.rendered.load(Ordering::SeqCst)
        }

        /// Makes an event without waiting for the second to pass.
        fn change(&self) {
            self.change.send_replace(());
        }
    }

    #[tokio::test]
    async fn many_watchers_share_one_rendering() {
        let counted = Counted::new();
        let mut watchers: Vec<_> = (0..100).map(|_| counted.watch()).collect();
        for watcher in &mut watchers {
            assert_eq!(watcher.latest(), "1");
        }
        for _ in 0..3 {
            counted.change();
            for watcher in &mut watchers {
                watcher.next().await.unwrap();
            }
        }
        // A slow machine adds one a second.
        assert!(counted.rendered() < 50, "{}", counted.rendered());
    }

    #[tokio::test]
    async fn nothing_is_rendered_while_nobody_watches() {
        let counted = Counted::new();
        let (first, mut second) = (counted.watch(), counted.watch());
        second.latest();
        drop(first);
        counted.change();
        second.next().await.unwrap();
        drop(second);
        while counted.change.receiver_count() > 0 {
            tokio::task::yield_now().await;
        }
        let rendered = counted.rendered();
        let latest = counted.watch().latest();
        assert_eq!(
            latest,
            (rendered + 1).to_string(),
            "an event of its own time"
        );
    }

    #[tokio::test]
    async fn change_makes_an_event_at_once() {
        let counted = Counted::new();
        let mut watcher = counted.watch();
        watcher.latest();
        let began = Instant::now();
        for _ in 0..30 {
            counted.change();
            watcher.next().await.unwrap();
        }
        assert!(began.elapsed() < 20 * INTERVAL);
    }

    #[tokio::test]
    async fn event_is_made_each_second() {
        let counted = Counted::new();
        let mut watcher = counted.watch();
        watcher.latest();
        assert_eq!(watcher.next().await.unwrap(), "2");
    }

    #[tokio::test]
    async fn watcher_that_is_slow_gets_the_latest_event() {
        let counted = Counted::new();
        let (mut slow, mut other) = (counted.watch(), counted.watch());
        slow.latest();
        let mut latest = other.latest();
        for _ in 0..5 {
            counted.change();
            latest = other.next().await.unwrap();
        }
        assert_eq!(slow.next().await.unwrap(), latest);
    }

    #[tokio::test]
    async fn feed_that_panicked_starts_over() {
        let feed = Feed::new(1);
        let change = watch::Sender::new(());
        let changes = || [change.subscribe(), change.subscribe()];
        let turn = AtomicUsize::new(0);
        let mut watcher = feed.watch(changes(), move || {
            assert_eq!(turn.fetch_add(1, Ordering::SeqCst), 0, "on purpose");
            Bytes::from("first")
        });
        assert_eq!(watcher.latest(), "first");
        change.send_replace(());
        assert_eq!(watcher.next().await, None);
        assert_eq!(feed.watch(changes(), || "again".into()).latest(), "again");
    }

    #[test]
    fn slot_is_free_again_once_its_stream_has_ended() {
        let feed = Feed::new(1);
        let slot = feed.take_slot();
        assert!(slot.is_some() && feed.take_slot().is_none());
        drop(slot);
        assert!(feed.take_slot().is_some());
    }
}
