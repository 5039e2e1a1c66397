//! What a connection is doing: one of five states, each with its timeout.
//!
//! Must not know: how bytes are read and written.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, fence};
use std::task::Waker;

use tokio::time::Instant;

use super::shared::Shared;

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// The client, to begin a request. Entered by accept, and when the kernel has a response.
    Idle,
    /// The client, to end the headers it has begun. Entered with a byte.
    Headers,
    /// The handler. Entered when hyper calls the service.
    Handling,
    /// The client, to take a response. Entered when a write would block, and again with each byte.
    Writing,
    /// The client, to close: the server has.
    Lingering,
}

/// [`Activity::idle_since`] of a connection that is not idle, and of one that closes for that.
const BUSY: u64 = 0;
const ENDING: u64 = u64::MAX;

/// What a connection is doing. The connection's task writes it, and so does the server that evicts
/// or wakes the connection; the server has a fence for that, so relaxed order is enough.
pub(super) struct Activity {
    /// A [`State`].
    state: AtomicU8,
    /// The state was entered since the clock last looked.
    moved: AtomicBool,
    /// hyper holds the whole response, or none is due.
    responded: AtomicBool,
    /// Set by [`Activity::announce_close`].
    closing: AtomicBool,
    /// The last four bytes that were read.
    tail: AtomicU32,
    /// Since when it is idle, by [`Shared::moment`]; or [`BUSY`], or [`ENDING`].
    idle_since: AtomicU64,
    /// Wakes the connection's task, whose waker is always the same.
    waker: OnceLock<Waker>,
}

impl Activity {
    /// For a connection that was accepted at this moment.
    pub(super) fn new(accepted: u64) -> Self {
        Self {
            state: AtomicU8::new(State::Idle as u8),
            moved: AtomicBool::new(false),
            responded: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            tail: AtomicU32::new(0),
            idle_since: AtomicU64::new(accepted),
            waker: OnceLock::new(),
        }
    }

    pub(super) fn state(&self) -> State {
        match self.state.load(Relaxed) {
            0 => State::Idle,
            1 => State::Headers,
            2 => State::Handling,
            3 => State::Writing,
            _ => State::Lingering,
        }
    }

    /// Notes the waker of the connection's task at its first turn.
    pub(super) fn set_waker(&self, waker: &Waker) {
        if self.waker.get().is_none() {
            self.waker.get_or_init(|| waker.clone());
            // Either the task sees in this turn what the server has changed, or the server sees the
            // waker.
            fence(SeqCst);
        }
    }

    /// Since when it is idle, if it is and stays open.
    pub(super) fn idle_since(&self) -> Option<u64> {
        let since = self.idle_since.load(Relaxed);
        (since != BUSY && since != ENDING).then_some(since)
    }

    /// Closes it if it has been idle since this moment. A request that arrives meanwhile is served.
    pub(super) fn evict(&self, since: u64) -> bool {
        let evicted = self
            .idle_since
            .compare_exchange(since, ENDING, Relaxed, Relaxed)
            .is_ok();
        if evicted {
            self.wake();
        }
        evicted
    }

    /// Wakes the connection's task, which then sees what the server has changed.
    pub(super) fn wake(&self) {
        fence(SeqCst);
        // A task that has not run yet will see it anyway.
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    /// The connection closes because it has been idle for too long, unless a request has arrived.
    pub(super) fn expire(&self) {
        self.idle_since.store(ENDING, Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.state() == State::Idle && self.idle_since.load(Relaxed) == ENDING
    }

    /// A response says `Connection: close` for a reason that the client does not know.
    pub(super) fn announce_close(&self) {
        self.closing.store(true, Relaxed);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// From now on its place cannot be taken.
    pub(super) fn mark_busy(&self) {
        self.idle_since.store(BUSY, Relaxed);
    }

    pub(super) fn enter(&self, state: State) {
        self.state.store(state as u8, Relaxed);
        self.moved.store(true, Relaxed);
    }

    /// When the present state times out, if it can. `since` is when the state was entered, updated
    /// here when the state has changed.
    pub(super) fn deadline(&self, since: &mut Instant, shared: &Shared) -> Option<Instant> {
        let state = self.state();
        if self.moved.swap(false, Relaxed) && state != State::Handling {
            *since = Instant::now();
            if state == State::Idle {
                // From now on its place can be needed for another connection.
                self.idle_since.store(shared.moment(*since), Relaxed);
            }
        }
        let limit = match state {
            // Handlers bound their own time, and lingering is bounded where it happens.
            State::Handling | State::Lingering => return None,
            State::Idle => shared.limits.idle_timeout,
            State::Headers => shared.limits.header_timeout,
            State::Writing => shared.limits.stall_timeout,
        };
        let deadline = since.checked_add(limit);
        let last_call = shared.last_call.get().filter(|_| state == State::Idle);
        deadline.into_iter().chain(last_call.copied()).min()
    }

    pub(super) fn bytes_read(&self, bytes: &[u8]) {
        let last = &bytes[bytes.len().saturating_sub(4)..];
        let tail = last.iter().fold(self.tail.load(Relaxed), |tail, &byte| {
            tail << 8 | u32::from(byte)
        });
        self.tail.store(tail, Relaxed);
        if self.state() == State::Idle {
            self.headers_begun();
        }
    }

    pub(super) fn headers_begun(&self) {
        self.mark_busy();
        self.enter(State::Headers);
    }

    pub(super) fn request_begun(&self) {
        self.mark_busy();
        self.responded.store(false, Relaxed);
        self.enter(State::Handling);
    }

    /// hyper has all of the response; the kernel can have less.
    pub(super) fn response_complete(&self) {
        self.responded.store(true, Relaxed);
        if self.state() != State::Writing {
            self.enter(self.after_response());
        }
    }

    pub(super) fn write_blocked(&self) {
        // Only a byte that is written gives the client more time.
        if self.state() != State::Writing {
            self.enter(State::Writing);
        }
    }

    pub(super) fn bytes_written(&self) {
        if self.state() == State::Writing {
            self.enter(if self.responded.load(Relaxed) {
                self.after_response()
            } else {
                State::Handling
            });
        }
    }

    /// Bytes behind the last request begin the next one, unless they end as headers do: hyper then
    /// has all of it.
    fn after_response(&self) -> State {
        let [_, bytes @ ..] = self.tail.load(Relaxed).to_be_bytes();
        if bytes == *b"\n\r\n" || bytes[1..] == *b"\n\n" {
            State::Idle
        } else {
            State::Headers
        }
    }
}
