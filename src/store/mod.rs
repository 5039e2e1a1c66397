//! The two stores, each behind one type whose connections nobody else can reach.
//!
//! Everything here talks to a store through [`crate::telemetry::call`], so no call can be made
//! without being measured. It knows nothing of HTTP.

mod pool;
pub mod postgres;
pub mod redis;
mod state;

use std::time::Duration;

pub use self::postgres::Postgres;
pub use self::redis::Redis;
pub use self::state::State;

/// What both stores have in common: they are watched.
pub trait Store {
    /// Whether the store does what a visit needs, as far as is known.
    fn state(&self) -> &State;

    /// Does on a new connection all that a visit needs, and keeps nothing of it. If it succeeds
    /// the store is up, and the connection is there for the next visit.
    ///
    /// # Errors
    ///
    /// Why a visit would fail.
    fn probe(&self) -> impl Future<Output = Result<(), Error>> + Send;

    /// How many visits the store has counted.
    ///
    /// # Errors
    ///
    /// Why it could not be read.
    fn total(&self) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Publishes what the store's connections are doing.
    fn report(&self);
}

/// Why a call to a store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store did not answer before the call's deadline. What it was asked may still happen.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The store could not be reached, or the connection broke before an answer was read.
    #[error("connection failed")]
    Connection(#[source] Cause),
    /// The store answered with an error: what it was asked has not happened.
    #[error("refused with {code}")]
    Refused {
        /// The SQLSTATE, or the first word of Redis's error.
        code: String,
        /// The driver's error.
        #[source]
        source: Cause,
    },
    /// The store ended the session while it answered (SQLSTATE class 57P, severity FATAL): what
    /// it was asked may have happened just before.
    #[error("session ended with {code}")]
    Ended {
        /// The SQLSTATE.
        code: String,
        /// The driver's error.
        #[source]
        source: Cause,
    },
    /// The answer was not what the call expects.
    #[error("unexpected answer")]
    Unexpected(#[source] Cause),
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

impl Error {
    /// The SQLSTATE or Redis error prefix, where the store sent one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } | Self::Ended { code, .. } => Some(code),
            Self::Timeout(_) | Self::Connection(_) | Self::Unexpected(_) => None,
        }
    }

    /// The value of `error.type`: the store's own code, or a word for what happened instead.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Connection(_) => "connection",
            Self::Unexpected(_) => "_OTHER",
            Self::Refused { code, .. } | Self::Ended { code, .. } => code,
        }
    }

    /// Whether a statement that failed like this, once sent, has certainly had no effect.
    #[must_use]
    pub fn is_definite(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the connection is still in step with the store after this.
    fn leaves_connection_usable(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// The error and its causes in one line, for the log.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(source) = cause {
            line.push_str(": ");
            line.push_str(&source.to_string());
            cause = source.source();
        }
        line
    }
}
