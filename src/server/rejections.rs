//! Requests that were rejected before they reached a route: why, and how many. Each is counted, and
//! at most one log line a second says how many there were.
//!
//! Must not know: which client sent them.

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

/// A record of TLS that begins a handshake, and its major version.
const TLS_HELLO: &[u8] = &[0x16, 3];
/// What a PROXY preface begins with; hyper drops the line ends that version 2 begins with.
const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\0\r\nQUIT\n";

/// Why hyper rejected what it had read.
pub(super) fn reason(error: &hyper::Error, read: &[u8]) -> Rejection {
    if error.is_parse_too_large() {
        Rejection::HeadersTooLarge
    } else if read.starts_with(TLS_HELLO) || read == &TLS_HELLO[..1] {
        Rejection::Tls
    } else if read.starts_with(PROXY_V1)
        || (!read.is_empty() && (read.starts_with(PROXY_V2) || PROXY_V2.starts_with(read)))
    {
        Rejection::ProxyProtocol
    } else {
        Rejection::Malformed
    }
}
