//! Converts errors of the Postgres driver to the store's errors.
//!
//! Must not know: which statement failed.

use std::io;

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::store::error::{Cause, Error};

/// An error of the server, shown as [`message`] has it, with what to do.
#[derive(Debug, thiserror::Error)]
struct ServerError(Box<PgDatabaseError>);

impl std::fmt::Display for ServerError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&message(&self.0))?;
        match advice(&self.0) {
            Some(advice) => write!(formatter, "; {advice}"),
            None => Ok(()),
        }
    }
}

/// What to do about an error whose message does not say it.
fn advice(error: &PgDatabaseError) -> Option<&'static str> {
    Some(match error.code() {
        "25006" => {
            "visits need a server that accepts writes: name the primary, or turn off \
             default_transaction_read_only for the role, the database or the server"
        }
        // The message is in the server's language; the names of its routines are not.
        "42501"
            if matches!(
                error.routine(),
                Some("check_enable_rls" | "ExecWithCheckOptions")
            ) =>
        {
            "a policy on the table hides rows from the role, or keeps it from inserting: see Row \
             security in docs/connecting.md"
        }
        "3F000" if error.message().contains("\"public\"") => {
            "create the schema, and grant the role USAGE and CREATE on it"
        }
        _ => return None,
    })
}

/// The server's message with its detail and hint. The driver would add a line number of the
/// server's own source.
pub(super) fn message(error: &PgDatabaseError) -> String {
    let mut text = error.message().to_owned();
    for (name, part) in [("detail", error.detail()), ("hint", error.hint())] {
        if let Some(part) = part {
            text.extend([" (", name, ": ", part, ")"]);
        }
    }
    text
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
            Error::Connection(breakage(&error).into())
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

/// Says in plain words how a session broke. The driver's text would cite its libraries.
fn breakage(error: &sqlx::Error) -> String {
    if let Some(error) = tls_error(error) {
        return format!("TLS failed ({error})");
    }
    match error {
        sqlx::Error::Io(error) if is_closed(error) => {
            format!("the server closed the connection ({})", error.kind())
        }
        sqlx::Error::Io(error) => error.to_string(),
        _ => "the server does not answer as Postgres does".to_owned(),
    }
}

/// Whether the server, or a program on the way to it, has closed the connection.
pub(super) fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
    )
}

/// The error of TLS that ended an attempt to open a session, if one did.
pub(super) fn tls_error(error: &sqlx::Error) -> Option<&rustls::Error> {
    match error {
        sqlx::Error::Tls(error) => error.downcast_ref(),
        sqlx::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

/// Whether the server refuses the client's certificate, or its absence.
pub(super) fn is_about_a_certificate(error: &rustls::Error) -> bool {
    use rustls::AlertDescription::{
        AccessDenied, BadCertificate, CertificateExpired, CertificateRequired, CertificateRevoked,
        CertificateUnknown, DecryptError, NoCertificate, UnknownCA, UnsupportedCertificate,
    };
    matches!(
        error,
        rustls::Error::AlertReceived(
            AccessDenied
                | BadCertificate
                | CertificateExpired
                | CertificateRequired
                | CertificateRevoked
                | CertificateUnknown
                | DecryptError
                | NoCertificate
                | UnknownCA
                | UnsupportedCertificate
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(kind: io::ErrorKind) -> sqlx::Error {
        sqlx::Error::Io(io::Error::new(kind, "loose cable"))
    }

    #[test]
    fn broken_session_is_explained_in_plain_words() {
        let handshake = rustls::Error::General("handshake".to_owned());
        let wrapped = io::Error::other(handshake.clone());
        for (error, expected) in [
            (
                io(io::ErrorKind::ConnectionReset),
                "the server closed the connection (connection reset)",
            ),
            (io(io::ErrorKind::HostUnreachable), "loose cable"),
            (
                sqlx::Error::Tls(handshake.clone().into()),
                "TLS failed (unexpected error: handshake)",
            ),
            (
                sqlx::Error::Io(wrapped),
                "TLS failed (unexpected error: handshake)",
            ),
            (
                sqlx::Error::Protocol("sqlx-postgres: 0x7f".to_owned()),
                "the server does not answer as Postgres does",
            ),
        ] {
            match failure(error) {
                Error::Connection(why) => assert_eq!(why.to_string(), expected),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            failure(sqlx::Error::RowNotFound),
            Error::Unexpected(_)
        ));
    }

    #[test]
    fn alerts_about_a_certificate_differ_from_others() {
        use rustls::AlertDescription::{CertificateRequired, HandshakeFailure, UnknownCA};
        let is_about = |alert| is_about_a_certificate(&rustls::Error::AlertReceived(alert));
        assert!(is_about(CertificateRequired));
        assert!(is_about(UnknownCA));
        assert!(!is_about(HandshakeFailure));
        assert!(!is_about_a_certificate(&rustls::Error::EncryptError));
    }
}
