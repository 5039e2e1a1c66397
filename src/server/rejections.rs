//! Counts requests that were rejected before they reached a route, by reason, and logs their number
//! at most once a second.
//!
//! Must not know: which client sent them.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::Counter;

use crate::metrics::catalog::REJECTED;

/// Why a request was rejected before it reached a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// It is not HTTP/1.
    Malformed,
    /// Its headers are longer or more numerous than the service accepts.
    HeadersTooLarge,
    /// Its headers did not arrive in time.
    HeaderTimeout,
    /// A TLS handshake; the service speaks no TLS.
    Tls,
    /// A preface of the PROXY protocol, which the service does not speak.
    ProxyProtocol,
    /// It does not name its host as HTTP requires.
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

/// Counts rejected requests: all of them for the metric, and those since the last log line for the
/// next one.
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
    /// Counts a rejected request.
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
        let count =
            |reason: Rejection| Some(since_last[reason as usize]).filter(|&count| count > 0);
        tracing::warn!(
            requests = total,
            malformed = count(Rejection::Malformed),
            headers_too_large = count(Rejection::HeadersTooLarge),
            header_timeout = count(Rejection::HeaderTimeout),
            tls = count(Rejection::Tls),
            proxy_protocol = count(Rejection::ProxyProtocol),
            host = count(Rejection::Host),
            "requests rejected before they reached a route"
        );
    }
}

/// The first bytes of a TLS handshake: the record's type and its major version.
const TLS_HELLO: &[u8] = &[0x16, 3];
/// The first bytes of a PROXY preface; hyper drops the line ends at the start of version 2.
const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\0\r\nQUIT\n";

/// Why hyper rejected the bytes that it had read.
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
