//! Requests that were rejected before they reached a route: each is counted, and a line a second
//! says how many there were.
//!
//! Must not know: who sent them, and what they said.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::{self, Rejection};

/// Counts rejected requests since the last line about them.
#[derive(Debug, Default)]
pub struct Rejections([AtomicU64; Rejection::ALL.len()]);

impl Rejections {
    /// Counts one.
    pub fn count(&self, reason: Rejection) {
        metrics::rejected(reason);
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Logs how many were counted since the last line, if any. Called once a second.
    pub fn report(&self) {
        let since_last = self
            .0
            .each_ref()
            .map(|count| count.swap(0, Ordering::Relaxed));
        let total: u64 = since_last.iter().sum();
        if total == 0 {
            return;
        }
        // A reason that did not occur has no field.
        let of = |reason: Rejection| Some(since_last[reason as usize]).filter(|&count| count > 0);
        tracing::warn!(
            requests = total,
            malformed = of(Rejection::Malformed),
            headers_too_large = of(Rejection::HeadersTooLarge),
            header_timeout = of(Rejection::HeaderTimeout),
            tls = of(Rejection::Tls),
            proxy_protocol = of(Rejection::ProxyProtocol),
            host = of(Rejection::Host),
            "requests rejected before they reached a route"
        );
    }
}
