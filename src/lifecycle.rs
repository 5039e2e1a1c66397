//! The phases of a stop. Every part of the service that acts on a phase waits for it here.
//!
//! Must not know: what a part does in a phase, and how long a phase lasts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio_util::sync::CancellationToken;

/// How far the service is on its way from start to end. A later phase is never followed by an
/// earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// No stop was requested.
    Serving,
    /// A stop was requested. Everything is still served, readiness is 503, and responses say
    /// `Connection: close`, so that clients move.
    Leaving,
    /// No new connection is accepted; requests on open connections are still served.
    Draining,
    /// Every request has its response, or the drain timeout has passed, and telemetry is flushed.
    Ended,
}

/// The phase that the service is in. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle(Arc<Phases>);

#[derive(Debug, Default)]
struct Phases {
    /// Read at every request, since a token would take a lock.
    current: AtomicU8,
    leaving: CancellationToken,
    draining: CancellationToken,
    ended: CancellationToken,
}

impl Lifecycle {
    /// Enters a phase, and every earlier phase that was skipped.
    pub fn enter(&self, phase: Phase) {
        self.0.current.fetch_max(phase as u8, Ordering::AcqRel);
        for (entered, token) in self.0.tokens() {
            if entered <= phase {
                token.cancel();
            }
        }
    }

    /// Whether the service is in this phase or in a later one.
    #[must_use]
    pub fn has_reached(&self, phase: Phase) -> bool {
        self.0.current.load(Ordering::Acquire) >= phase as u8
    }

    /// Waits until the service is in this phase or in a later one.
    pub async fn wait_for(&self, phase: Phase) {
        for (entered, token) in self.0.tokens() {
            if entered == phase {
                token.cancelled().await;
            }
        }
    }
}

impl Phases {
    fn tokens(&self) -> [(Phase, &CancellationToken); 3] {
        [
            (Phase::Leaving, &self.leaving),
            (Phase::Draining, &self.draining),
            (Phase::Ended, &self.ended),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phase_is_reached_once_it_or_a_later_one_is_entered() {
        let lifecycle = Lifecycle::default();
        assert!(lifecycle.has_reached(Phase::Serving));
        assert!(!lifecycle.has_reached(Phase::Leaving));
        lifecycle.enter(Phase::Draining);
        for phase in [Phase::Serving, Phase::Leaving, Phase::Draining] {
            lifecycle.wait_for(phase).await;
            assert!(lifecycle.has_reached(phase));
        }
        lifecycle.enter(Phase::Leaving);
        assert!(lifecycle.has_reached(Phase::Draining));
        assert!(!lifecycle.has_reached(Phase::Ended));
    }
}
