//! Converts errors of the Redis driver to the store's errors, and says what to check.
//!
//! Must not know: which command failed.

use std::sync::Arc;

use redis::RedisError;
use rustls::{AlertDescription, CertificateError};

use crate::store::error::{Cause, Error};

type DriverCause = Arc<dyn std::error::Error + Send + Sync>;

/// Converts the error of a command.
pub(super) fn failure(error: RedisError) -> Error {
    match error.code().map(str::to_owned) {
        Some(code) => {
            let source = match hint(&error) {
                Some(hint) => Cause::from(format!("{error} (hint: {hint})")),
                None => error.into(),
            };
            Error::Refused { code, source }
        }
        None if error.is_io_error() || error.is_connection_dropped() => {
            Error::Connection(error.into())
        }
        None => Error::Unexpected(error.into()),
    }
}

/// Converts the error of an attempt to connect and log in. `attempt` says what was tried, and
/// `is_encrypted` whether by TLS.
///
/// The server's own words are left out: a server that does not know `AUTH` repeats the password.
pub(super) fn login_failure(error: &RedisError, attempt: &str, is_encrypted: bool) -> Error {
    if let Some(code) = error.code() {
        let why = hint(error).unwrap_or("the server refuses the login");
        return Error::Refused {
            code: code.to_owned(),
            source: Cause::from(format!("{attempt}: {why}")),
        };
    }
    let by_tls = tls_error(error);
    let hint = match by_tls.as_ref().and_then(tls_hint) {
        Some(hint) => hint,
        None if by_tls.is_none() && error.is_connection_dropped() && !is_encrypted => {
            " (hint: a port for TLS needs a rediss:// URL)"
        }
        None if by_tls.is_none() && error.is_connection_dropped() => {
            " (hint: the server closed the connection; it can want a client certificate)"
        }
        None => "",
    };
    let cause = Cause::from(format!("{attempt}: {error}{hint}"));
    if error.is_io_error() || error.is_connection_dropped() {
        Error::Connection(cause)
    } else {
        Error::Unexpected(cause)
    }
}

/// What to check after a refusal.
fn hint(error: &RedisError) -> Option<&'static str> {
    let detail = error.detail().unwrap_or_default();
    Some(match error.code()? {
        "WRONGPASS" => {
            "authentication failed: check REDIS_USERNAME and REDIS_PASSWORD, or those of REDIS_URL"
        }
        "NOAUTH" => "the server asks for a password: set REDIS_PASSWORD",
        "NOPERM" => {
            "the user needs the key visitas_home and the commands INCRBY, PING and SELECT: \
             ACL SETUSER name on >password ~visitas_home +incrby +ping +select"
        }
        "READONLY" => "this server is a replica: name the primary, which accepts writes",
        "MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT" => {
            "this server belongs to a Redis Cluster, which is not supported: name a server that \
             keeps every key"
        }
        "DENIED" => {
            "the server is in protected mode and refuses other hosts: give it a password, or bind \
             it to its address"
        }
        "ERR" if detail.contains("cluster mode") => {
            "this server belongs to a Redis Cluster, which is not supported: name a server that \
             keeps every key"
        }
        "ERR"
            if detail.contains("without any password") || detail.contains("no password is set") =>
        {
            "authentication failed: the server has no password for this user: unset REDIS_PASSWORD"
        }
        "ERR" if detail.starts_with("unknown command") => {
            "the server does not know the command; Redis Sentinel (port 26379) is not supported: \
             name the primary itself"
        }
        "ERR" if detail.contains("DB index") => "the server has no database of this number",
        "ERR" if detail.contains("max number of clients") => "the server has no room for a client",
        _ => return None,
    })
}

/// The error of TLS beneath the driver's.
fn tls_error(error: &RedisError) -> Option<rustls::Error> {
    let cause = std::error::Error::source(error)?;
    let cause = cause.downcast_ref::<DriverCause>()?;
    let cause = cause.downcast_ref::<std::io::Error>()?.get_ref()?;
    cause.downcast_ref::<rustls::Error>().cloned()
}

/// What to check after a TLS handshake that failed.
fn tls_hint(error: &rustls::Error) -> Option<&'static str> {
    Some(match error {
        rustls::Error::InvalidMessage(_) => {
            " (hint: the port does not speak TLS: a redis:// URL leads to it)"
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            " (hint: the certificate is not from a trusted authority: REDIS_TLS_CA names others)"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => " (hint: REDIS_URL must have a name of the server's certificate)",
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity") =>
        {
            " (hint: the server shows an authority's own certificate: make it one that an \
             authority has signed)"
        }
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::HandshakeFailure
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown,
        ) => {
            " (hint: the server wants a client certificate of its authority: REDIS_TLS_CERT and \
             REDIS_TLS_KEY)"
        }
        _ => return None,
    })
}
