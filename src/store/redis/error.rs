//! Says in plain words why a connection to Redis could not be opened, or a command failed: with
//! which user, host and TLS, and what to check.
//!
//! The driver's own words are repeated only where an operator can use them. Must not know: which
//! command failed.

use std::io;
use std::sync::Arc;

use redis::{ErrorKind, RedisError};
use rustls::CertificateError;

use crate::store::error::{Cause, Error};

type DriverCause = Arc<dyn std::error::Error + Send + Sync>;

/// The server that a connection leads to, and the user that logs in, for errors.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Such as "as ana at cache:6379, with TLS".
    pub(super) description: String,
    pub(super) is_encrypted: bool,
    pub(super) is_socket: bool,
}

const CHECK_ADDRESS: &str =
    "check that Redis is running there, and REDIS_HOST and REDIS_PORT, or those of REDIS_URL";

const NO_CLUSTER: &str = "this server belongs to a Redis Cluster, which is not supported: name a \
    server that keeps every key";

const NO_USERS: &str = "authentication failed: the server has no password for this user: unset \
    REDIS_PASSWORD";

/// How to make a certificate that is accepted.
const REPLACE: &str = "let an authority of your own sign another one, as docs/connecting.md shows, \
    and set REDIS_TLS_CA to the authority's";

const OTHER_KEY: &str = "the key visitas_home holds another program's value: give this service a \
    server or a database of its own, or delete the key";

impl Peer {
    /// The error of an attempt to connect and log in.
    ///
    /// The server's own words are left out: a server that does not know `AUTH` repeats the password.
    pub(super) fn login_failure(&self, error: &RedisError) -> Error {
        let description = &self.description;
        if let Some(code) = error.code() {
            let check = hint(error).unwrap_or("the server refuses the login: check its log");
            return Error::Refused {
                code: code.to_owned(),
                source: Cause::from(format!("tried {description}; {check}")),
            };
        }
        let (why, check) = self.words(error, self.check_of_a_login());
        connection_error(error, format!("{why}; tried {description}; {check}"))
    }

    /// The error of a command on a connection that has logged in.
    pub(super) fn failure(&self, error: &RedisError) -> Error {
        let description = &self.description;
        if let Some(code) = error.code() {
            let check = hint(error).map_or(String::new(), |check| format!("; {check}"));
            let why = error.detail().unwrap_or("the server refuses the command");
            return Error::Refused {
                code: code.to_owned(),
                source: Cause::from(format!("{why}; sent {description}{check}")),
            };
        }
        let check = "check whether Redis was restarted, its log, and the network";
        let (why, check) = self.words(error, check);
        connection_error(error, format!("{why}; sent {description}; {check}"))
    }

    /// The error of an attempt that could not begin.
    pub(super) fn obstacle(&self, error: Error) -> Error {
        match error {
            Error::Connection(why) => {
                Error::Connection(Cause::from(format!("{why}; tried {}", self.description)))
            }
            other => other,
        }
    }

    /// What to check after an attempt without a response.
    pub(super) fn check_of_silence(&self) -> &'static str {
        if self.is_encrypted {
            "check the network and firewalls, and that the port is one for TLS"
        } else {
            "check the network and firewalls, and whether the server hangs"
        }
    }

    /// What to check if the server closes the connection during the login.
    fn check_of_a_login(&self) -> &'static str {
        if self.is_socket {
            "check the server's log, and that Redis is what listens there"
        } else if self.is_encrypted {
            "check that the port is the one for TLS, whether the server wants a client certificate \
             (REDIS_TLS_CERT and REDIS_TLS_KEY), and the server's log"
        } else {
            "check whether the port is one for TLS, which needs a rediss:// URL, that Redis is \
             what listens there, and the server's log"
        }
    }

    /// Why there is no response, and what to check: `check_of_an_end` if the server closed the
    /// connection.
    fn words(&self, error: &RedisError, check_of_an_end: &'static str) -> (String, &'static str) {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, NotConnected,
            NotFound, PermissionDenied, UnexpectedEof,
        };
        if let Some(error) = tls_error(error) {
            return tls_words(&error);
        }
        if matches!(
            error.kind(),
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType
        ) {
            let why = "what listens there does not answer as Redis does".to_owned();
            return (why, CHECK_ADDRESS);
        }
        let Some(error) = io_error(error) else {
            return (error.to_string(), CHECK_ADDRESS);
        };
        let check = match error.kind() {
            // The driver's words for this differ with the moment at which it notices.
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof => {
                return (
                    "the server closed the connection".to_owned(),
                    check_of_an_end,
                );
            }
            PermissionDenied if self.is_socket => {
                "check the access rights of the socket (unixsocketperm)"
            }
            ConnectionRefused | NotFound if self.is_socket => {
                "check that Redis is running, and that its unixsocket is this path"
            }
            ConnectionRefused => CHECK_ADDRESS,
            _ if self.is_socket => "check the path of the socket",
            _ => "check the network, and REDIS_HOST and REDIS_PORT, or those of REDIS_URL",
        };
        (error.to_string(), check)
    }
}

/// The store's error for one of the driver without a response of the server.
fn connection_error(error: &RedisError, text: String) -> Error {
    if error.is_io_error() {
        Error::Connection(text.into())
    } else {
        Error::Unexpected(text.into())
    }
}

/// What to check after a refusal.
fn hint(error: &RedisError) -> Option<&'static str> {
    let detail = error.detail().unwrap_or_default();
    let has = |part| detail.contains(part);
    Some(match error.code()? {
        "WRONGPASS" => {
            "authentication failed: check REDIS_USERNAME and REDIS_PASSWORD, or those of REDIS_URL"
        }
        "NOAUTH" => "the server asks for a password: set REDIS_PASSWORD, or one in REDIS_URL",
        "NOPERM" => {
            "the user needs the key visitas_home and the commands INCRBY, PING and SELECT: \
             ACL SETUSER name on >password ~visitas_home +incrby +ping +select"
        }
        "LOADING" => "the server reads its data from disk: wait until it has finished",
        "READONLY" => "this server is a replica: name the primary, which accepts writes",
        "MASTERDOWN" => {
            "this server is a replica that has lost its primary: name the primary, which accepts \
             writes"
        }
        "NOREPLICAS" => "the primary has fewer replicas than its min-replicas-to-write",
        "MISCONF" => {
            "the server cannot save its data, so it refuses writes: check its disk and log"
        }
        "OOM" => "the server's memory is full: raise its maxmemory, or set a maxmemory-policy",
        "BUSY" => "a script blocks the server: wait for its end, or end it with SCRIPT KILL",
        "WRONGTYPE" => OTHER_KEY,
        "MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT" | "TRYAGAIN" => NO_CLUSTER,
        "DENIED" => {
            "the server is in protected mode and refuses other hosts: give it a password, or bind \
             it to its address"
        }
        "ERR" if has("cluster mode") => NO_CLUSTER,
        "ERR" if has("without any password") || has("no password is set") => NO_USERS,
        "ERR" if has("invalid password") => "authentication failed: check REDIS_PASSWORD",
        "ERR" if has("wrong number of arguments for 'auth'") => {
            "the server is older than Redis 6 and has no users: unset REDIS_USERNAME"
        }
        "ERR" if has("operation not permitted") => {
            "the server asks for a password: set REDIS_PASSWORD, or one in REDIS_URL"
        }
        "ERR" if has("not an integer") || has("would overflow") => OTHER_KEY,
        "ERR" if detail.starts_with("unknown command") => {
            "the server does not know the command; Redis Sentinel (port 26379) is not supported: \
             name the primary itself"
        }
        "ERR" if has("DB index") => {
            "the server has no database of this number: choose another one in REDIS_URL"
        }
        "ERR" if has("max number of clients") => {
            "the server has no room for a client: raise its maxclients"
        }
        _ => return None,
    })
}

/// The error of input and output beneath the driver's.
fn io_error(error: &RedisError) -> Option<&io::Error> {
    let cause = std::error::Error::source(error)?;
    cause.downcast_ref::<DriverCause>()?.downcast_ref()
}

/// The error of TLS beneath the driver's.
fn tls_error(error: &RedisError) -> Option<rustls::Error> {
    let cause = io_error(error)?.get_ref()?;
    cause.downcast_ref::<rustls::Error>().cloned()
}

/// Why a TLS handshake failed, and what to check.
fn tls_words(error: &rustls::Error) -> (String, &'static str) {
    use rustls::AlertDescription::{HandshakeFailure, InsufficientSecurity, ProtocolVersion};
    let (why, check) = match error {
        rustls::Error::InvalidMessage(_) => (
            "what listens there does not speak TLS",
            "check whether the port is one for TLS: without TLS it needs a redis:// URL",
        ),
        rustls::Error::InvalidCertificate(certificate) => return certificate_words(certificate),
        rustls::Error::AlertReceived(ProtocolVersion | HandshakeFailure | InsufficientSecurity) => {
            (
                "the server refuses the TLS handshake",
                "check that it offers TLS 1.2 or 1.3 (tls-protocols, tls-ciphers)",
            )
        }
        rustls::Error::AlertReceived(_) => (
            "the server refuses the client certificate, or its absence",
            "check REDIS_TLS_CERT and REDIS_TLS_KEY, and the server's tls-ca-cert-file: it can \
             want a client certificate of its authority",
        ),
        _ => (
            "the TLS handshake failed",
            "check the server's certificate and its log",
        ),
    };
    (format!("{why} ({error})"), check)
}

fn certificate_words(certificate: &CertificateError) -> (String, &'static str) {
    let fault = match certificate {
        CertificateError::Other(other) => other.0.downcast_ref(),
        _ => None,
    };
    let (why, check) = match (certificate, fault) {
        (CertificateError::UnknownIssuer, _) => (
            "is signed by no trusted authority",
            "set REDIS_TLS_CA to the certificate of the authority that signed it",
        ),
        (CertificateError::Expired | CertificateError::ExpiredContext { .. }, _) => {
            ("has expired", "renew it, or check this host's clock")
        }
        (CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }, _) => {
            ("is not valid yet", "check this host's clock")
        }
        (
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            _,
        ) => {
            let why = format!(
                "the server's certificate is for another name (invalid peer certificate: {certificate})"
            );
            let check = "set the host of REDIS_URL to a name in the certificate's subjectAltName, \
                or add this one there (a name in its subject does not count)";
            return (why, check);
        }
        (_, Some(webpki::Error::CaUsedAsEndEntity)) => {
            ("is one of an authority, such as a self-signed one", REPLACE)
        }
        (_, Some(webpki::Error::UnsupportedCertVersion)) => {
            ("has version 1, which has no names of hosts", REPLACE)
        }
        // Such as one by an authority that has the trusted one's name and another key.
        _ => (
            "cannot be verified",
            "set REDIS_TLS_CA to the certificate of the authority that signed it, or make another \
             one as docs/connecting.md shows",
        ),
    };
    // The driver's term stays, for a search. Its texts about dates differ each second, and others
    // contain bytes.
    let text = format!("{certificate:?}");
    let mut words = text.split(|character: char| !character.is_alphanumeric());
    let term = words.find(|word| !["Other", "OtherError"].contains(word));
    let term = term.unwrap_or_default().trim_end_matches("Context");
    let why = format!("the server's certificate {why} (invalid peer certificate: {term})");
    (why, check)
}

#[cfg(test)]
mod tests {
    use rustls::{AlertDescription, InvalidMessage, OtherError};

    use super::*;

    const ENDED: &str = "check what ended it";

    fn peer() -> Peer {
        Peer {
            description: "as ana at cache:6379".to_owned(),
            is_encrypted: false,
            is_socket: false,
        }
    }

    fn io(kind: io::ErrorKind) -> RedisError {
        io::Error::new(kind, "loose cable").into()
    }

    fn tls(error: rustls::Error) -> RedisError {
        io::Error::other(error).into()
    }

    fn refusal(code: &str, detail: &str) -> RedisError {
        redis::make_extension_error(code.to_owned(), Some(detail.to_owned()))
    }

    #[test]
    fn what_to_check_after_a_refusal() {
        let password = "set REDIS_PASSWORD, or one in REDIS_URL";
        for (code, detail, check) in [
            ("WRONGPASS", "", "check REDIS_USERNAME and REDIS_PASSWORD"),
            ("NOAUTH", "", password),
            ("NOPERM", "", "~visitas_home +incrby +ping +select"),
            ("LOADING", "", "wait until it has finished"),
            ("READONLY", "", "this server is a replica: name"),
            ("MASTERDOWN", "", "has lost its primary: name"),
            ("NOREPLICAS", "", "min-replicas-to-write"),
            ("MISCONF", "", "cannot save its data"),
            ("OOM", "", "raise its maxmemory"),
            ("BUSY", "", "SCRIPT KILL"),
            ("WRONGTYPE", "", OTHER_KEY),
            ("MOVED", "", NO_CLUSTER),
            ("ASK", "", NO_CLUSTER),
            ("CLUSTERDOWN", "", NO_CLUSTER),
            ("CROSSSLOT", "", NO_CLUSTER),
            ("TRYAGAIN", "", NO_CLUSTER),
            ("DENIED", "", "protected mode"),
            ("ERR", "SELECT is not allowed in cluster mode", NO_CLUSTER),
            (
                "ERR",
                "AUTH called without any password configured",
                NO_USERS,
            ),
            ("ERR", "Client sent AUTH, but no password is set", NO_USERS),
            ("ERR", "invalid password", "check REDIS_PASSWORD"),
            (
                "ERR",
                "wrong number of arguments for 'auth' command",
                "unset REDIS_USERNAME",
            ),
            ("ERR", "operation not permitted", password),
            ("ERR", "value is not an integer or out of range", OTHER_KEY),
            ("ERR", "increment or decrement would overflow", OTHER_KEY),
            ("ERR", "unknown command 'INCRBY'", "Redis Sentinel"),
            (
                "ERR",
                "DB index is out of range",
                "choose another one in REDIS_URL",
            ),
            (
                "ERR",
                "max number of clients reached",
                "raise its maxclients",
            ),
        ] {
            let hint = hint(&refusal(code, detail));
            assert!(
                hint.is_some_and(|hint| hint.contains(check)),
                "{code} {detail}: {hint:?}"
            );
        }
        assert_eq!(hint(&refusal("ERR", "a reason of its own")), None);
        assert_eq!(hint(&refusal("OTHER", "invalid password")), None);
        assert_eq!(hint(&io(io::ErrorKind::ConnectionReset)), None);
    }

    #[test]
    fn words_of_the_server_are_repeated_for_commands_only() {
        let error = refusal("OTHER", "secret words");
        let login = peer().login_failure(&error).chain();
        assert!(!login.contains("secret words"), "{login}");
        assert!(
            login.ends_with(
                "tried as ana at cache:6379; the server refuses the login: check its log"
            ),
            "{login}"
        );
        let command = peer().failure(&error).chain();
        assert!(
            command.ends_with("secret words; sent as ana at cache:6379"),
            "{command}"
        );
    }

    #[test]
    fn what_to_check_after_a_failure_without_a_response() {
        use io::ErrorKind::{
            BrokenPipe, ConnectionRefused, ConnectionReset, HostUnreachable, NotConnected,
            NotFound, PermissionDenied, UnexpectedEof,
        };
        let socket = Peer {
            is_socket: true,
            ..peer()
        };
        let network = "check the network, and REDIS_HOST";
        for (peer, kind, check) in [
            (&peer(), ConnectionRefused, CHECK_ADDRESS),
            (&peer(), NotFound, network),
            (&peer(), PermissionDenied, network),
            (&peer(), HostUnreachable, network),
            (&socket, ConnectionRefused, "its unixsocket is this path"),
            (&socket, NotFound, "its unixsocket is this path"),
            (&socket, PermissionDenied, "unixsocketperm"),
            (&socket, HostUnreachable, "check the path of the socket"),
        ] {
            let (why, found) = peer.words(&io(kind), ENDED);
            assert_eq!(why, "loose cable");
            assert!(found.contains(check), "{kind}: {found}");
        }
        for kind in [BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof] {
            let (why, check) = peer().words(&io(kind), ENDED);
            assert_eq!(
                (&*why, check),
                ("the server closed the connection", ENDED),
                "{kind}"
            );
        }
        for kind in [ErrorKind::Parse, ErrorKind::UnexpectedReturnType] {
            let (why, check) = peer().words(&(kind, "bytes").into(), ENDED);
            assert!(why.ends_with("does not answer as Redis does"), "{why}");
            assert_eq!(check, CHECK_ADDRESS);
        }
        let (why, check) = peer().words(&(ErrorKind::Client, "a reason").into(), ENDED);
        assert!(why.contains("a reason"), "{why}");
        assert_eq!(check, CHECK_ADDRESS);
    }

    #[test]
    fn what_to_check_depends_on_tls_and_sockets() {
        let encrypted = Peer {
            is_encrypted: true,
            ..peer()
        };
        let socket = Peer {
            is_socket: true,
            ..peer()
        };
        assert!(encrypted.check_of_silence().contains("for TLS"));
        assert!(!peer().check_of_silence().contains("TLS"));
        for (peer, check) in [
            (&socket, "Redis is what listens there"),
            (&encrypted, "REDIS_TLS_CERT"),
            (&peer(), "rediss:// URL"),
        ] {
            let found = peer.check_of_a_login();
            assert!(found.contains(check), "{check}: {found}");
        }
    }

    #[test]
    fn what_to_check_after_a_failure_of_tls() {
        use AlertDescription::{
            CertificateRequired, HandshakeFailure, InsufficientSecurity, ProtocolVersion,
        };
        let other = |fault| CertificateError::Other(OtherError(Arc::new(fault)));
        let invalid = rustls::Error::InvalidCertificate;
        let alert = rustls::Error::AlertReceived;
        for (error, why, check) in [
            (
                rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "does not speak TLS",
                "it needs a redis:// URL",
            ),
            (
                alert(ProtocolVersion),
                "refuses the TLS handshake",
                "tls-ciphers",
            ),
            (
                alert(HandshakeFailure),
                "refuses the TLS handshake",
                "tls-ciphers",
            ),
            (
                alert(InsufficientSecurity),
                "refuses the TLS handshake",
                "tls-ciphers",
            ),
            (
                alert(CertificateRequired),
                "refuses the client certificate",
                "REDIS_TLS_CERT and REDIS_TLS_KEY",
            ),
            (
                rustls::Error::EncryptError,
                "the TLS handshake failed",
                "the server's certificate and its log",
            ),
            (
                invalid(CertificateError::UnknownIssuer),
                "is signed by no trusted authority (invalid peer certificate: UnknownIssuer)",
                "set REDIS_TLS_CA to the certificate",
            ),
            (
                invalid(CertificateError::Expired),
                "has expired (invalid peer certificate: Expired)",
                "renew it",
            ),
            (
                invalid(CertificateError::NotValidYet),
                "is not valid yet (invalid peer certificate: NotValidYet)",
                "this host's clock",
            ),
            (
                invalid(CertificateError::NotValidForName),
                "is for another name",
                "set the host of REDIS_URL to a name",
            ),
            (
                invalid(other(webpki::Error::CaUsedAsEndEntity)),
                "such as a self-signed one (invalid peer certificate: CaUsedAsEndEntity)",
                REPLACE,
            ),
            (
                invalid(other(webpki::Error::UnsupportedCertVersion)),
                "no names of hosts (invalid peer certificate: UnsupportedCertVersion)",
                REPLACE,
            ),
            (
                invalid(CertificateError::BadSignature),
                "cannot be verified (invalid peer certificate: BadSignature)",
                "or make another one",
            ),
        ] {
            let (found, advice) = peer().words(&tls(error), ENDED);
            assert!(
                found.contains(why) && advice.contains(check),
                "{found}; {advice}"
            );
        }
    }

    #[test]
    fn broken_connection_differs_from_a_strange_response() {
        let broken = peer().failure(&io(io::ErrorKind::ConnectionReset));
        assert!(matches!(broken, Error::Connection(_)), "{broken:?}");
        let strange = peer().failure(&(ErrorKind::Parse, "bytes").into());
        assert!(matches!(strange, Error::Unexpected(_)), "{strange:?}");
        let obstacle = peer().obstacle(Error::Connection("no file".into()));
        assert!(
            obstacle
                .chain()
                .ends_with("no file; tried as ana at cache:6379"),
            "{}",
            obstacle.chain()
        );
    }
}
