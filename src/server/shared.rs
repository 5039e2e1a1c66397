//! A server's parameters, and the state that its connections share.
//!
//! Must not know: how connections are accepted and served.

use std::sync::OnceLock;
use std::time::Duration;

use axum::Router;
use tokio::time::Instant;

use super::rejections::Rejection;
use crate::lifecycle::{Lifecycle, Phase};

/// Limits on what a client can cost. After each of the timeouts the connection is closed without a
/// response, as hyper and nginx do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of open connections. Beyond it the connection that has been idle longest is
    /// closed for a new one; if none is idle, new connections wait in the kernel's backlog, where
    /// they cost no file descriptor of this process. Resident memory of a connection, measured by
    /// `make chaos`: 3 KiB if silent, 12 KiB if used, 47 KiB with incomplete headers, and 106 KiB
    /// at worst, for a client that sends requests and does not read. The kernel's buffers come on
    /// top.
    pub max_connections: usize,
    /// From the first byte of a request's headers to their last. Time spent on responses does not
    /// count: headers that start while an earlier request is in flight are timed from its response.
    pub header_timeout: Duration,
    /// From accept, or from the end of a response, to the first byte of the next request.
    pub idle_timeout: Duration,
    /// Without a single byte taken of a response that is ready. Bytes in the kernel's send buffer
    /// (up to 4 MiB) count as taken, and that buffer asks for more only when a good part of it is
    /// empty.
    pub stall_timeout: Duration,
}

/// Marks a response, as an extension, whose body ends only when the service stops. A client that does
/// not read it is disconnected a second after the server has begun to drain, as an idle one is.
#[derive(Clone, Copy, Debug)]
pub struct Endless;

/// The callbacks through which a server reports.
pub struct Events {
    /// Called with the number of open connections whenever it changes.
    pub connections: Box<dyn Fn(usize) + Send + Sync>,
    /// Called with the reason when a request is rejected before the router.
    pub rejected: Box<dyn Fn(Rejection) + Send + Sync>,
}

/// When a server acts on a stop.
pub struct Stop {
    /// The phases.
    pub lifecycle: Lifecycle,
    /// From this phase on, every response says `Connection: close`.
    pub leave_at: Phase,
    /// In this phase the server stops accepting, and drains.
    pub drain_at: Phase,
    /// Maximum time to drain.
    pub drain: Duration,
}

/// The state that all connections of a server share.
pub(super) struct Shared {
    pub(super) router: Router,
    pub(super) limits: Limits,
    pub(super) events: Events,
    pub(super) stop: Stop,
    started: Instant,
    /// When to close connections that are idle, once the server drains.
    pub(super) last_call: OnceLock<Instant>,
}

impl Shared {
    pub(super) fn new(router: Router, limits: Limits, events: Events, stop: Stop) -> Self {
        Self {
            router,
            limits,
            events,
            stop,
            started: Instant::now(),
            last_call: OnceLock::new(),
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.stop.lifecycle.has_reached(self.stop.leave_at)
    }

    /// A moment as nanoseconds since the server started, plus 1.
    pub(super) fn moment(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.started);
        since.as_secs() * 1_000_000_000 + u64::from(since.subsec_nanos()) + 1
    }
}
