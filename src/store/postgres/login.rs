//! Says in plain words why a session could not be opened: what was tried, and what to check.
//!
//! The driver's own words are repeated only where they cannot contain a part of a password or a
//! key. Must not know: how a session is opened.

use std::fmt;
use std::io;
use std::time::Duration;

use rustls::CertificateError;
use sqlx::postgres::PgSslMode;

use super::error::{connect_failure, is_about_a_certificate, is_closed, message, tls_error};
use crate::store::error::{Cause, Error};

/// What an attempt to open a session tries.
#[derive(Debug, Clone)]
pub(super) struct Login {
    /// `host:port`, or the path of a Unix socket.
    pub(super) place: String,
    pub(super) database: String,
    pub(super) user: String,
    pub(super) mode: PgSslMode,
    /// The setting that the password comes from.
    pub(super) password_setting: &'static str,
    pub(super) has_password: bool,
    pub(super) has_certificate: bool,
}

/// Why an attempt failed, to follow the kind of error, and what to check.
struct Words {
    why: String,
    /// Empty if there is nothing to check.
    check: String,
}

/// How to log in a role whose name or password the driver cannot send with SCRAM.
const OTHER_METHODS: &str = "or let pg_hba.conf ask the role for md5, password or cert";

const NO_POOLER: &str = "connect to the server itself: a pooler such as PgBouncer is not supported";

/// The driver's text if the server's proof at the end of SCRAM is wrong.
const MAC_MISMATCH: &str = "MAC tag mismatch";

/// What decides whether a role may log in.
const RULES: &str = "check that the role exists and has LOGIN, and pg_hba.conf, which decides by \
    role, database, address, encryption and client certificate";

/// What the methods cert and clientcert=verify-full ask for.
const NAME_OF_A_CERTIFICATE: &str = "where pg_hba.conf asks for a client certificate, the CN of \
    DB_SSLCERT's must be the role";

/// How to make a certificate that is accepted.
const REPLACE: &str = "let an authority of your own sign another one, as docs/connecting.md shows, \
    and set DB_SSLROOTCERT to the authority's";

impl Login {
    /// The error of an attempt, and of the second one if `mode` asks for another.
    pub(super) fn failure(&self, first: sqlx::Error, second: Option<sqlx::Error>) -> Error {
        let (mut ways, mut errors) = (self.ways(), (first, second));
        // A rule that shuts one way says less than the reason why the other way failed.
        if let (first, Some(second)) = &mut errors
            && is_shut(first)
            && !is_shut(second)
        {
            std::mem::swap(first, second);
            ways.reverse();
        }
        let (main, other) = errors;
        let Words { mut why, check } = self.words(&main);
        if let Some(other) = other.map(|other| self.words(&other).why)
            && other != why
        {
            let [main, also] = ways;
            why = format!("{main}: {why}; {also}: {other}");
        }
        let source = self.cause(&why, &check);
        match connect_failure(main) {
            Error::Refused { code, .. } => Error::Refused { code, source },
            _ => Error::Connection(source),
        }
    }

    /// The error of an attempt whose host name could not be looked up.
    pub(super) fn unknown_host(&self, error: Error) -> Error {
        match error {
            Error::Connection(why) => {
                Error::Connection(self.cause(&why.to_string(), "check DB_HOST, and the DNS"))
            }
            other => other,
        }
    }

    /// The error of an attempt that took too long.
    pub(super) fn timeout(&self, after: Duration, why: &str, check: &str) -> Error {
        Error::NoSession(after, self.cause(why, check))
    }

    /// The error of a session that lacks the settings that exact counting depends on. `changed`
    /// names each, with both values.
    pub(super) fn without_settings(&self, changed: &str) -> Error {
        let why = format!(
            "a pooler drops the settings of the session, or a login trigger changes them: {changed}"
        );
        Error::Connection(self.cause(&why, NO_POOLER))
    }

    fn cause(&self, why: &str, check: &str) -> Cause {
        let Self {
            place,
            database,
            user,
            mode,
            ..
        } = self;
        let mode = name(*mode);
        let mut text =
            format!("{why}; tried as {user} at {place}, database {database}, sslmode {mode}");
        if !check.is_empty() {
            text.push_str("; ");
            text.push_str(check);
        }
        text.into()
    }

    /// How the first attempt and the second one differ.
    fn ways(&self) -> [&'static str; 2] {
        match self.mode {
            PgSslMode::Allow => ["without TLS", "with TLS"],
            _ => ["with TLS", "without TLS"],
        }
    }

    fn words(&self, error: &sqlx::Error) -> Words {
        if let Some(error) = tls_error(error) {
            return tls_words(error);
        }
        match error {
            sqlx::Error::Database(refusal) => {
                let code = refusal.code().unwrap_or_default();
                self.refusal_words(&code, message(refusal.downcast_ref()))
            }
            sqlx::Error::Io(error) => io_words(error),
            // The server said that it has no TLS.
            sqlx::Error::Tls(error) => words(
                error,
                "turn on ssl in postgresql.conf, or choose another DB_SSLMODE",
            ),
            // Its text can contain a character of the password.
            sqlx::Error::Configuration(error) => self.preparation_words(&error.to_string()),
            sqlx::Error::Protocol(text) => protocol_words(text),
            other => words(other, ""),
        }
    }

    /// The server refused.
    fn refusal_words(&self, code: &str, message: String) -> Words {
        let setting = self.password_setting;
        let check = match code {
            // The server reads the name up to the comma, and expects something else after it.
            "08P01" if self.user.contains(',') => {
                return words(
                    "a role whose name has a comma cannot log in with SCRAM",
                    format!("rename the role, {OTHER_METHODS}"),
                );
            }
            "08P01" if message.starts_with("unsupported startup parameter") => NO_POOLER,
            "28P01" if self.has_password => {
                return words(
                    message,
                    self.with_a_certificate(format!("check {setting} and the role")),
                );
            }
            "28P01" => {
                let check = format!("there is no password: set {setting}");
                return words(message, self.with_a_certificate(check));
            }
            "28000" => return words(message, self.with_a_certificate(RULES.to_owned())),
            "3D000" => "create the database, or check DB_NAME",
            "42501" => "grant the role CONNECT on the database",
            "53300" => "raise max_connections, or the connection limit of the role or database",
            _ => "",
        };
        words(message, check)
    }

    /// Adds what a client certificate must say: the server refuses another one's role in the same
    /// words as a wrong password.
    fn with_a_certificate(&self, check: String) -> String {
        if self.has_certificate {
            format!("{check}; {NAME_OF_A_CERTIFICATE}")
        } else {
            check
        }
    }

    /// The driver could not prepare the role's name or the password for SCRAM.
    fn preparation_words(&self, text: &str) -> Words {
        const UNUSUAL: &str = "has characters that the driver cannot send with SCRAM: unassigned \
            ones such as emoji, control characters, or two writing directions";
        if text.starts_with("Failed to saslprep username") {
            return words(
                format!("the role's name {UNUSUAL}"),
                format!("rename the role, {OTHER_METHODS}"),
            );
        }
        if text.starts_with("Failed to saslprep password") {
            return words(
                format!("the password of {} {UNUSUAL}", self.password_setting),
                format!("change the password, {OTHER_METHODS}"),
            );
        }
        words(
            "the driver refuses the settings",
            "check the files of DB_SSLCERT and DB_SSLKEY",
        )
    }
}

fn words(why: impl fmt::Display, check: impl Into<String>) -> Words {
    Words {
        why: why.to_string(),
        check: check.into(),
    }
}

/// Whether a rule of the server shuts this way to it.
fn is_shut(error: &sqlx::Error) -> bool {
    let refusal = error.as_database_error();
    refusal.is_some_and(|refusal| refusal.code().as_deref() == Some("28000"))
}

fn io_words(error: &io::Error) -> Words {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    if is_closed(error) {
        return closed(error.kind());
    }
    match error.kind() {
        ConnectionRefused | NotFound => words(
            error,
            "check that Postgres is running there, and DB_HOST and DB_PORT",
        ),
        PermissionDenied => words(error, "check the access rights of the socket"),
        _ => words(error, "check the network, and DB_HOST and DB_PORT"),
    }
}

fn closed(error: impl fmt::Display) -> Words {
    words(
        format!("the server closed the connection before the session was open ({error})"),
        "check the server's log, and that Postgres is what listens there",
    )
}

/// The server does not speak as the driver expects.
fn protocol_words(text: &str) -> Words {
    // The driver adds which line of its own source has made the error.
    let (text, _) = text.split_once(" (sqlx").unwrap_or((text, ""));
    if text.contains("authentication m") {
        return words(
            format!("the server asks for a login that the driver lacks ({text})"),
            "let pg_hba.conf ask the role for scram-sha-256, md5, password, cert or trust",
        );
    }
    match text {
        // The driver takes the end of the connection for this response.
        "unexpected response from SSLRequest: 0x00" => closed(io::ErrorKind::UnexpectedEof),
        "unexpected response from SSLRequest: 0x45" => words(
            "the server failed before the login",
            "check the server's log",
        ),
        MAC_MISMATCH => words(
            "the server has not proved that it knows the password",
            "check DB_HOST and DB_PORT: another server can have answered",
        ),
        _ => words(
            "what listens there does not answer as Postgres does",
            "check DB_HOST and DB_PORT",
        ),
    }
}

fn tls_words(error: &rustls::Error) -> Words {
    let rustls::Error::InvalidCertificate(certificate) = error else {
        return if is_about_a_certificate(error) {
            words(
                format!("the server refuses the client certificate ({error})"),
                "check DB_SSLCERT and DB_SSLKEY, and the server's ssl_ca_file",
            )
        } else {
            words(
                format!("the TLS handshake failed ({error})"),
                "check that the server offers TLS 1.2 or 1.3",
            )
        };
    };
    // The driver's term stays, for a search. Its texts about dates differ each second.
    let (why, term, check) = match certificate {
        CertificateError::UnknownIssuer => (
            "the server's certificate is signed by no trusted authority",
            "UnknownIssuer",
            "set DB_SSLROOTCERT to the certificate of the authority that signed it",
        ),
        CertificateError::Other(other) => match other.0.downcast_ref() {
            Some(webpki::Error::CaUsedAsEndEntity) => (
                "the server's certificate is one of an authority, such as a self-signed one",
                "CaUsedAsEndEntity",
                REPLACE,
            ),
            Some(webpki::Error::UnsupportedCertVersion) => (
                "the server's certificate has version 1, which has no names of hosts",
                "UnsupportedCertVersion",
                REPLACE,
            ),
            _ => return unverified(certificate),
        },
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => (
            "the server's certificate has expired",
            "Expired",
            "renew it, or check this host's clock",
        ),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
            "the server's certificate is not valid yet",
            "NotValidYet",
            "check this host's clock",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            return words(
                error,
                "set DB_HOST to a name in the certificate's subjectAltName, or add this one there \
                 (a name in its subject does not count)",
            );
        }
        _ => return unverified(certificate),
    };
    words(format!("{why} (invalid peer certificate: {term})"), check)
}

fn unverified(term: &CertificateError) -> Words {
    words(
        format!("the server's certificate cannot be verified (invalid peer certificate: {term})"),
        REPLACE,
    )
}

/// A mode as `DB_SSLMODE` has it.
fn name(mode: PgSslMode) -> &'static str {
    match mode {
        PgSslMode::Disable => "disable",
        PgSslMode::Allow => "allow",
        PgSslMode::Prefer => "prefer",
        PgSslMode::Require => "require",
        PgSslMode::VerifyCa => "verify-ca",
        PgSslMode::VerifyFull => "verify-full",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{AlertDescription, OtherError};

    use super::*;

    fn login() -> Login {
        Login {
            place: "db:5432".to_owned(),
            database: "visitas".to_owned(),
            user: "ana".to_owned(),
            mode: PgSslMode::Prefer,
            password_setting: "DB_PASSWORD",
            has_password: true,
            has_certificate: false,
        }
    }

    fn io(kind: io::ErrorKind) -> sqlx::Error {
        sqlx::Error::Io(io::Error::new(kind, "broken"))
    }

    fn configuration(text: &'static str) -> sqlx::Error {
        sqlx::Error::Configuration(text.into())
    }

    fn protocol(text: &str) -> sqlx::Error {
        sqlx::Error::Protocol(text.to_owned())
    }

    fn invalid(certificate: CertificateError) -> sqlx::Error {
        sqlx::Error::Tls(rustls::Error::InvalidCertificate(certificate).into())
    }

    fn other(fault: webpki::Error) -> CertificateError {
        CertificateError::Other(OtherError(Arc::new(fault)))
    }

    #[test]
    fn what_to_check_after_a_refusal() {
        let anonymous = Login {
            has_password: false,
            ..login()
        };
        let certified = Login {
            has_certificate: true,
            ..login()
        };
        let comma = Login {
            user: "ana, bia".to_owned(),
            ..login()
        };
        for (login, code, message, check) in [
            (
                &login(),
                "08P01",
                "unsupported startup parameter: jit",
                NO_POOLER,
            ),
            (&login(), "08P01", "invalid startup packet", ""),
            (&login(), "28P01", "no", "check DB_PASSWORD and the role"),
            (
                &anonymous,
                "28P01",
                "no",
                "there is no password: set DB_PASSWORD",
            ),
            (&login(), "28000", "no", RULES),
            (
                &login(),
                "3D000",
                "no",
                "create the database, or check DB_NAME",
            ),
            (
                &login(),
                "42501",
                "no",
                "grant the role CONNECT on the database",
            ),
            (
                &login(),
                "53300",
                "no",
                "raise max_connections, or the connection limit of the role or database",
            ),
            (&login(), "57P03", "no", ""),
        ] {
            let words = login.refusal_words(code, message.to_owned());
            assert_eq!((&*words.why, &*words.check), (message, check), "{code}");
        }
        for code in ["28P01", "28000"] {
            let words = certified.refusal_words(code, String::new());
            assert!(words.check.ends_with(NAME_OF_A_CERTIFICATE), "{code}");
        }
        let words = comma.refusal_words("08P01", String::new());
        assert!(words.why.contains("a comma"), "{}", words.why);
        assert!(words.check.starts_with("rename"), "{}", words.check);
    }

    #[test]
    fn what_to_check_after_a_failure_without_a_response() {
        use io::ErrorKind::{
            ConnectionRefused, ConnectionReset, HostUnreachable, NotFound, PermissionDenied,
        };
        for (error, why, check) in [
            (io(ConnectionRefused), "broken", "Postgres is running there"),
            (io(NotFound), "broken", "Postgres is running there"),
            (io(PermissionDenied), "broken", "rights of the socket"),
            (io(HostUnreachable), "broken", "check the network"),
            (io(ConnectionReset), "the server closed", "the server's log"),
            (
                protocol("unexpected response from SSLRequest: 0x00"),
                "the server closed",
                "the server's log",
            ),
            (
                protocol("unexpected response from SSLRequest: 0x45 (sqlx-postgres 0:1)"),
                "the server failed before the login",
                "the server's log",
            ),
            (
                protocol("unexpected response from SSLRequest: 0x48"),
                "does not answer as Postgres does",
                "check DB_HOST and DB_PORT",
            ),
            (
                protocol("unsupported authentication method: 7"),
                "that the driver lacks (unsupported authentication method: 7)",
                "let pg_hba.conf ask the role",
            ),
            (
                protocol(MAC_MISMATCH),
                "not proved",
                "another server can have answered",
            ),
            (
                configuration("Failed to saslprep username: !"),
                "the role's name has",
                "rename the role",
            ),
            (
                configuration("Failed to saslprep password: !"),
                "the password of DB_PASSWORD has",
                "change the password",
            ),
            (
                configuration("secret"),
                "the driver refuses",
                "DB_SSLCERT and DB_SSLKEY",
            ),
            (sqlx::Error::RowNotFound, "no rows", ""),
        ] {
            let words = login().words(&error);
            assert!(
                words.why.contains(why) && words.check.contains(check),
                "{}; {}",
                words.why,
                words.check
            );
            assert_eq!(words.check.is_empty(), check.is_empty(), "{}", words.check);
            assert!(!words.why.contains("(sqlx"), "{}", words.why);
            assert!(!words.why.contains("secret"), "{}", words.why);
        }
    }

    #[test]
    fn what_to_check_after_a_failure_of_tls() {
        let alert = |alert| sqlx::Error::Tls(rustls::Error::AlertReceived(alert).into());
        for (error, term, check) in [
            (
                sqlx::Error::Tls("no TLS".into()),
                "no TLS",
                "turn on ssl in postgresql.conf",
            ),
            (
                alert(AlertDescription::UnknownCA),
                "refuses the client certificate",
                "DB_SSLCERT and DB_SSLKEY",
            ),
            (
                alert(AlertDescription::HandshakeFailure),
                "the TLS handshake failed",
                "offers TLS 1.2 or 1.3",
            ),
            (
                invalid(CertificateError::UnknownIssuer),
                "by no trusted authority (invalid peer certificate: UnknownIssuer)",
                "set DB_SSLROOTCERT",
            ),
            (
                invalid(other(webpki::Error::CaUsedAsEndEntity)),
                "one of an authority, such as a self-signed one (invalid peer certificate: CaUsed",
                REPLACE,
            ),
            (
                invalid(other(webpki::Error::UnsupportedCertVersion)),
                "has version 1, which has no names of hosts (invalid peer certificate: Unsupported",
                REPLACE,
            ),
            (
                invalid(other(webpki::Error::BadDer)),
                "cannot be verified",
                REPLACE,
            ),
            (
                invalid(CertificateError::Expired),
                "has expired (invalid peer certificate: Expired)",
                "renew it",
            ),
            (
                invalid(CertificateError::NotValidYet),
                "is not valid yet (invalid peer certificate: NotValidYet)",
                "check this host's clock",
            ),
            (
                invalid(CertificateError::NotValidForName),
                "certificate",
                "set DB_HOST to a name",
            ),
            (
                invalid(CertificateError::BadSignature),
                "cannot be verified",
                REPLACE,
            ),
        ] {
            let words = login().words(&error);
            assert!(
                words.why.contains(term) && words.check.contains(check),
                "{}; {}",
                words.why,
                words.check
            );
        }
    }

    #[test]
    fn both_ways_are_named_in_the_order_of_the_mode() {
        for (mode, expected) in [
            (
                PgSslMode::Prefer,
                "with TLS: the server failed before the login; without TLS: broken",
            ),
            (
                PgSslMode::Allow,
                "without TLS: the server failed before the login; with TLS: broken",
            ),
        ] {
            let login = Login { mode, ..login() };
            let error = login.failure(
                protocol("unexpected response from SSLRequest: 0x45"),
                Some(io(io::ErrorKind::ConnectionRefused)),
            );
            let text = error.chain();
            assert!(text.contains(expected), "{text}");
        }
        let twice = login().failure(
            io(io::ErrorKind::ConnectionRefused),
            Some(io(io::ErrorKind::ConnectionRefused)),
        );
        let text = twice.chain();
        assert!(
            !text.contains("with TLS") && !text.contains("without TLS"),
            "{text}"
        );
    }

    #[test]
    fn mode_has_the_name_that_the_setting_gives_it() {
        for text in [
            "disable",
            "allow",
            "prefer",
            "require",
            "verify-ca",
            "verify-full",
        ] {
            assert_eq!(name(text.parse().unwrap()), text);
        }
    }
}
