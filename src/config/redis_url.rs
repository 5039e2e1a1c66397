//! `REDIS_URL`, in the forms of Redis, Valkey and the drivers of other languages.
//!
//! Must not know: the settings of the parts.

use super::parameters::{REDIS, Unenforced, is_one_of, judge, plain};
use super::url::{StoreUrl, read_part};
use super::value::{Accept, Secret, accept, host, parsed, port};

/// The URL of a cache, taken apart.
pub(super) struct RedisUrl {
    pub(super) user: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) cache: Cache,
    /// The URL without its secrets.
    pub(super) masked: String,
    pub(super) unenforced: Vec<Unenforced>,
}

/// Which database of which server a URL leads to, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cache {
    /// A host, or the path of a Unix socket.
    pub(super) host: String,
    pub(super) port: Option<u16>,
    pub(super) database: i64,
    pub(super) tls: bool,
}

/// The parameters whose values are shown, those that set something here, without underscores and
/// hyphens.
const SHOWN: &str = "database db ssl tls user username virtualhost";

const NO_SENTINEL: &str =
    "leads to Redis Sentinel, which is not supported: name the primary itself";
const NO_CLUSTER: &str =
    "leads to a Redis Cluster, which is not supported: name a server that keeps every key";

impl RedisUrl {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// Why the URL is refused, to follow the variable's name.
    pub(super) fn parse(url: &Secret) -> Result<Self, String> {
        let url = StoreUrl::parse(url)?;
        let (mut tls, is_socket) = match &*url.scheme {
            "redis" | "valkey" | "keydb" | "dragonfly" => (false, false),
            "rediss" | "valkeys" | "keydbs" | "dragonflys" | "redis+tls" | "redis+ssl"
            | "valkey+tls" | "valkey+ssl" => (true, false),
            "unix" | "redis+unix" | "valkey+unix" | "redis+socket" | "redis-socket" => {
                (false, true)
            }
            scheme if scheme.contains("sentinel") => return Err(NO_SENTINEL.to_owned()),
            scheme if scheme.contains("cluster") => return Err(NO_CLUSTER.to_owned()),
            _ => return Err("is not a redis:// URL".to_owned()),
        };
        if let Some(fragment) = &url.fragment {
            return Err(match &**fragment {
                "insecure" => {
                    "has #insecure, but certificates are always verified: set REDIS_TLS_CA"
                }
                _ => "has a fragment (encode # as %23)",
            }
            .to_owned());
        }
        let host = match (&url.host, is_socket) {
            (Some(host), false) => host.clone(),
            (None, true) => url.file()?,
            (None, false) => return Err("has no host (a Unix socket is unix:///path)".to_owned()),
            (Some(_), true) => {
                return Err(
                    "has a host, but leads to a Unix socket (write unix:///path)".to_owned(),
                );
            }
        };
        let (mut user, mut password) = (url.user.clone(), url.password.clone());
        let mut number = if is_socket { None } else { url.database()? };
        let mut unenforced = Vec::new();
        for (parameter, value) in &url.query {
            let given = Some(value.clone()).filter(|value| !value.is_empty());
            match &*plain(parameter) {
                "user" | "username" => user = given.or(user),
                // phpredis calls it auth.
                "auth" | "pass" | "password" | "passwd" | "pwd" => {
                    password = given.map(Secret::from).or(password);
                }
                "database" | "db" | "virtualhost" => {
                    if number.is_some() && given.is_some() && number != given {
                        return Err(format!(
                            "names two databases: {parameter} contradicts another part"
                        ));
                    }
                    number = given.or(number);
                }
                "ssl" | "tls" => match &*value.to_ascii_lowercase() {
                    "1" | "on" | "true" | "yes" => tls = true,
                    "" | "0" | "false" | "no" | "off" if !tls => {}
                    "0" | "false" | "no" | "off" => {
                        return Err(format!(
                            "has {parameter}={value}, which contradicts TLS by rediss://"
                        ));
                    }
                    _ => return Err(format!("has the parameter {parameter}: expected true")),
                },
                _ => unenforced.extend(judge("REDIS_URL", REDIS, parameter, value)?),
            }
        }
        if user.is_some() && password.is_none() {
            // The user is most likely a password without the colon before it.
            return Err(
                "has a user without a password (a password alone has a colon before it: \
                 redis://:password@host)"
                    .to_owned(),
            );
        }
        if tls && is_socket {
            return Err("asks for TLS on a Unix socket".to_owned());
        }
        let number = number.map(|number| {
            let number: Option<u32> = parsed(&number);
            number.ok_or("has a database that is not a number")
        });
        // A user can have no password, and logs in with an empty one. Without a user there is
        // nothing to log in with.
        let password = password.filter(|password| user.is_some() || !password.expose().is_empty());
        Ok(Self {
            user,
            password,
            cache: Cache {
                host: read_part("REDIS_HOST", &host, &host_or_socket())?,
                port: url
                    .port
                    .as_ref()
                    .map(|text| read_part("REDIS_PORT", text, &port()))
                    .transpose()?,
                database: number.transpose()?.map_or(0, i64::from),
                tls,
            },
            masked: url.masked(is_shown),
            unenforced,
        })
    }
}

fn is_shown(parameter: &str) -> bool {
    is_one_of(SHOWN, parameter)
}

/// Accepts where a server listens.
pub(super) fn host_or_socket() -> Accept<String> {
    accept(
        "one host name, one IP address without a zone such as %eth0, or the absolute path of a \
         socket",
        |text| {
            if text.starts_with('/') {
                let is_path = text.len() > 1 && !text.contains(char::is_control);
                return is_path.then(|| text.to_owned());
            }
            host(text)
        },
    )
}
