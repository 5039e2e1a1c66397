//! The activity of a connection: one of five states, each with its timeout.
//!
//! Must not know: how bytes are read and written.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, fence};
use std::task::Waker;

use tokio::time::Instant;

use super::shared::Shared;

/// The state of a connection, by what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// The client, to start a request. Entered at accept, and when the kernel has all of a
    /// response.
    Idle,
    /// The client, to complete its headers. Entered at their first byte.
    Headers,
    /// The handler. Entered when hyper calls the service.
    Handling,
    /// The client, to read a response. Entered when a write would block, and again at each byte.
    Writing,
    /// The client, to close its side; the server has closed its own.
    Lingering,
}

/// Values of `idle_since` for a connection that is not idle, and for one that closes because it is
/// idle.
const BUSY: u64 = 0;
const ENDING: u64 = u64::MAX;

/// The activity of a connection. The connection's task writes it, and the server writes it to evict
/// or wake the connection. The server uses a fence for that, so relaxed order is enough.
pub(super) struct Activity {
    /// A [`State`].
    state: AtomicU8,
    /// Whether the state was entered since the last look at the clock.
    moved: AtomicBool,
    /// Whether hyper has the whole response, or none is due.
    responded: AtomicBool,
    /// Set by [`Activity::announce_close`].
    closing: AtomicBool,
    /// Whether the response is one that ends only with the server.
    endless: AtomicBool,
    /// The last four bytes that were read.
    tail: AtomicU32,
    /// When the connection became idle, by [`Shared::moment`]; or [`BUSY`], or [`ENDING`].
    idle_since: AtomicU64,
    /// Wakes the connection's task, whose waker is always the same.
    waker: OnceLock<Waker>,
}

impl Activity {
    /// The activity of a connection that was accepted at this moment.
    pub(super) fn new(accepted: u64) -> Self {
        Self {
            state: AtomicU8::new(State::Idle as u8),
            moved: AtomicBool::new(false),
            responded: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            endless: AtomicBool::new(false),
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

    /// When the connection became idle, if it is idle and stays open.
    pub(super) fn idle_since(&self) -> Option<u64> {
        let since = self.idle_since.load(Relaxed);
        (since != BUSY && since != ENDING).then_some(since)
    }

    /// Closes the connection if it has been idle since this moment. A request that arrives
    /// meanwhile is served.
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
        // A task that has not run yet sees the change at its first turn.
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    /// Closes the connection because its idle timeout has passed, unless a request has arrived.
    pub(super) fn expire(&self) {
        self.idle_since.store(ENDING, Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.state() == State::Idle && self.idle_since.load(Relaxed) == ENDING
    }

    /// Notes that a response says `Connection: close` for a reason that the client does not know.
    pub(super) fn announce_close(&self) {
        self.closing.store(true, Relaxed);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// Notes that the response ends only with the server.
    pub(super) fn start_endless(&self) {
        self.endless.store(true, Relaxed);
    }

    /// From now on the connection cannot be evicted.
    pub(super) fn mark_busy(&self) {
        self.idle_since.store(BUSY, Relaxed);
    }

    pub(super) fn enter(&self, state: State) {
        self.state.store(state as u8, Relaxed);
        self.moved.store(true, Relaxed);
    }

    /// When the current state times out, if it can. `since` is when the state was entered; this
    /// updates it if the state has changed.
    pub(super) fn deadline(&self, since: &mut Instant, shared: &Shared) -> Option<Instant> {
        let state = self.state();
        if self.moved.swap(false, Relaxed) && state != State::Handling {
            *since = Instant::now();
            if state == State::Idle {
                // From now on the connection can be evicted.
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
        // The rest of an endless response must not hold a drain.
        let is_last = match state {
            State::Idle => true,
            State::Writing => self.endless.load(Relaxed),
            _ => false,
        };
        let last_call = shared.last_call.get().filter(|_| is_last);
        deadline.into_iter().chain(last_call.copied()).min()
    }

    pub(super) fn note_read(&self, bytes: &[u8]) {
        let last = &bytes[bytes.len().saturating_sub(4)..];
        let tail = last.iter().fold(self.tail.load(Relaxed), |tail, &byte| {
            tail << 8 | u32::from(byte)
        });
        self.tail.store(tail, Relaxed);
        if self.state() == State::Idle {
            self.start_headers();
        }
    }

    pub(super) fn start_headers(&self) {
        self.mark_busy();
        self.enter(State::Headers);
    }

    pub(super) fn start_request(&self) {
        self.mark_busy();
        self.endless.store(false, Relaxed);
        self.responded.store(false, Relaxed);
        self.enter(State::Handling);
    }

    /// Notes that hyper has all of the response; the kernel can have less.
    pub(super) fn complete_response(&self) {
        self.responded.store(true, Relaxed);
        if self.state() != State::Writing {
            self.enter(self.after_response());
        }
    }

    pub(super) fn note_blocked_write(&self) {
        // Only a byte that is written gives the client more time.
        if self.state() != State::Writing {
            self.enter(State::Writing);
        }
    }

    pub(super) fn note_write(&self) {
        if self.state() == State::Writing {
            self.enter(if self.responded.load(Relaxed) {
                self.after_response()
            } else {
                State::Handling
            });
        }
    }

    /// The state after a response. Bytes after the last request start the next one, unless they end
    /// as headers do: then hyper has read all of them.
    fn after_response(&self) -> State {
        let [_, bytes @ ..] = self.tail.load(Relaxed).to_be_bytes();
        if bytes == *b"\n\r\n" || bytes[1..] == *b"\n\n" {
            State::Idle
        } else {
            State::Headers
        }
    }
}
