//! Requests that were rejected before they reached a route: each is counted, and a line a second
//! says how many there were.
//!
//! Must not know: who sent them, and what they said.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::Counter;

use crate::metrics::catalog::REJECTED;

/// Why a request was rejected before it reached a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// It is no HTTP/1.
    Malformed,
    /// Its headers are longer, or more, than the service reads.
    HeadersTooLarge,
    /// Its headers did not arrive in time.
    HeaderTimeout,
    /// A TLS handshake; the service speaks no TLS.
    Tls,
    /// A preface of the PROXY protocol, which the service does not speak.
    ProxyProtocol,
    /// It does not name its host as HTTP demands.
    Host,
}

impl Rejection {
    /// Every reason.
    pub const ALL: [Self; 6] = [
        Self::Malformed,
        Self::HeadersTooLarge,
        Self::HeaderTimeout,
        Self::Tls,
        Self::ProxyProtocol,
        Self::Host,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::HeadersTooLarge => "headers_too_large",
            Self::HeaderTimeout => "header_timeout",
            Self::Tls => "tls",
            Self::ProxyProtocol => "proxy_protocol",
            Self::Host => "host",
        }
    }
}

/// Counts rejected requests: all for the metric, and those since the last line for the next one.
#[derive(Debug)]
pub struct Rejections {
    all: [Counter; Rejection::ALL.len()],
    since_last: [AtomicU64; Rejection::ALL.len()],
}

impl Default for Rejections {
    fn default() -> Self {
        Self {
            all: Rejection::ALL.map(|reason| REJECTED.with([reason.label()])),
            since_last: Default::default(),
        }
    }
}

impl Rejections {
    /// Counts one.
    pub fn count(&self, reason: Rejection) {
        self.all[reason as usize].increment(1);
        self.since_last[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Logs how many were counted since the last line, if any. Called once a second.
    pub fn report(&self) {
        let since_last = self
            .since_last
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
