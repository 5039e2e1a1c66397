//! Converts errors of the Postgres driver to the store's errors.
//!
//! Must not know: which statement failed.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::error::{Cause, Error};

/// The server's message with its detail and hint. The driver would add a line number of the
/// server's own source.
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

/// Converts the error of a statement.
pub(super) fn failure(error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(error) => {
            let error = error.downcast::<PgDatabaseError>();
            let code = error.code().to_owned();
            let ended = matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic);
            let source = Cause::from(ServerError(error));
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

/// Converts the error of an attempt to open a session. No statement has been sent yet, so every
/// response of the server is a refusal.
pub(super) fn connect_failure(error: sqlx::Error) -> Error {
    match failure(error) {
        Error::Ended { code, source } => Error::Refused { code, source },
        other => other,
    }
}
