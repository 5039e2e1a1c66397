//! Why a store call failed, and whether it can have taken effect.
//!
//! Must not know: any driver's own errors.

use std::time::Duration;

use crate::causes;
use crate::metrics::limit::OTHER;

/// Which of the two stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum System {
    /// Postgres.
    Postgresql,
    /// Redis.
    Redis,
}

impl System {
    /// The well-known value of `db.system.name`.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
            Self::Redis => "redis",
        }
    }
}

/// Why a store call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store did not respond before the call's deadline. The call can still take effect.
    #[error("no response within {0:?}")]
    Timeout(Duration),
    /// No session could be opened before its deadline: no call was sent.
    #[error("no session within {0:?}")]
    NoSession(Duration, #[source] Cause),
    /// The store could not be reached, or the connection broke before a response was read.
    #[error("connection failed")]
    Connection(#[source] Cause),
    /// The store responded with an error: the call has had no effect.
    #[error("refused with {code}")]
    Refused {
        /// The SQLSTATE, or the first word of Redis's error.
        code: String,
        /// The store's message.
        #[source]
        source: Cause,
    },
    /// The store ended the session during the call (SQLSTATE class 57P, severity FATAL): the call
    /// can have taken effect just before.
    #[error("session ended with {code}")]
    Ended {
        /// The SQLSTATE.
        code: String,
        /// The store's message.
        #[source]
        source: Cause,
    },
    /// The store's response is not one that the call expects.
    #[error("unexpected response")]
    Unexpected(#[source] Cause),
}

pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a visit's call failed.
#[derive(Debug)]
pub struct CallError {
    /// The error.
    pub error: Error,
    /// Whether the call got a connection, so that its statement can have reached the store.
    pub sent: bool,
}

impl Error {
    /// The SQLSTATE or Redis error prefix, where the store sent one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } | Self::Ended { code, .. } => Some(code),
            Self::Timeout(_) | Self::NoSession(..) | Self::Connection(_) | Self::Unexpected(_) => {
                None
            }
        }
    }

    /// The value of `error.type`: the store's own code, or a word for an error without one.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Timeout(_) | Self::NoSession(..) => "timeout",
            Self::Connection(_) => "connection",
            Self::Unexpected(_) => OTHER,
            Self::Refused { code, .. } | Self::Ended { code, .. } => code,
        }
    }

    /// Whether a statement that was sent and failed with this error has certainly had no effect.
    #[must_use]
    pub fn is_definite(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the connection can be used for another call after this error.
    pub(super) fn leaves_connection_usable(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the session has ended with this error.
    pub(super) fn ends_session(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Ended { .. })
    }

    /// The error and its causes in one line, for the log.
    #[must_use]
    pub fn chain(&self) -> String {
        causes::line(self)
    }
}

impl CallError {
    /// Whether the call can have taken effect although it failed.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.sent && !self.error.is_definite()
    }
}
