//! What an error of the Postgres driver means for the call that failed.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::error::{Cause, Error};

/// What the server said: its message with detail and hint. The driver would add a line number,
/// which is one of the server's own source.
#[derive(Debug, thiserror::Error)]
struct ServerError(Box<PgDatabaseError>);

impl std::fmt::Display for ServerError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.0.message())?;
        if let Some(detail) = self.0.detail() {
            write!(formatter, " (detail: {detail})")?;
        }
        if let Some(hint) = self.0.hint() {
            write!(formatter, " (hint: {hint})")?;
        }
        Ok(())
    }
}

/// What a failed statement says about itself.
pub(super) fn failure(error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(answer) => {
            let answer = answer.downcast::<PgDatabaseError>();
            let code = answer.code().to_owned();
            let ended = matches!(answer.severity(), PgSeverity::Fatal | PgSeverity::Panic);
            let source = Cause::from(ServerError(answer));
            if ended {
                Error::Ended { code, source }
            } else {
                Error::Refused { code, source }
            }
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
            Error::Connection(error.into())
        }
        _ => Error::Unexpected(error.into()),
    }
}

/// What a failed attempt to open a session says: nothing had been asked yet, so that whatever
/// the server answered is a refusal.
pub(super) fn connect_failure(error: sqlx::Error) -> Error {
    match failure(error) {
        Error::Ended { code, source } => Error::Refused { code, source },
        other => other,
    }
}
