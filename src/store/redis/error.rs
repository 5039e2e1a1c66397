//! Converts errors of the Redis driver to the store's errors, and says what to check.
//!
//! Must not know: which command failed.

use std::sync::Arc;

use redis::RedisError;
use rustls::CertificateError;

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

/// Converts the error of an attempt to connect and log in. `tried` says what was tried, and
/// `is_encrypted` whether by TLS.
///
/// The server's own words are left out: a server that does not know `AUTH` repeats the password.
pub(super) fn login_failure(error: &RedisError, tried: &str, is_encrypted: bool) -> Error {
    if let Some(code) = error.code() {
        let check = hint(error).unwrap_or("the server refuses the login: check its log");
        return Error::Refused {
            code: code.to_owned(),
            source: Cause::from(format!("{tried}; {check}")),
        };
    }
    let has_ended = error.is_connection_dropped();
    let check = match tls_error(error) {
        Some(error) => tls_hint(&error),
        None if has_ended && is_encrypted => {
            "check that the port is the one for TLS, and whether the server wants a client \
             certificate (REDIS_TLS_CERT and REDIS_TLS_KEY)"
        }
        None if has_ended => "check whether the port is one for TLS, which needs a rediss:// URL",
        None => "check that Redis is running there",
    };
    let cause = Cause::from(format!("{error}; {tried}; {check}"));
    if error.is_io_error() || has_ended {
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
fn tls_hint(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidMessage(_) => {
            "check whether the port is one for TLS: without TLS it needs a redis:// URL"
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "set REDIS_TLS_CA to the certificate of the authority that signed the server's"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            "set the host to a name in the certificate's subjectAltName, or add this one there \
             (a name in its subject does not count)"
        }
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.0.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity) =>
        {
            "the server's certificate is one of an authority, such as a self-signed one: let an \
             authority of your own sign a server's certificate, as docs/connecting.md shows"
        }
        rustls::Error::AlertReceived(_) => {
            "check REDIS_TLS_CERT and REDIS_TLS_KEY, and the server's tls-ca-cert-file: it can \
             want a client certificate of its authority"
        }
        _ => "check the server's certificate",
    }
}
