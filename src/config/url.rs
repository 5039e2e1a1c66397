//! The URLs: of the two stores, taken apart into the settings that they stand for, and of the
//! collector.
//!
//! A store's URL holds a password, so no message from here repeats any part of one: what looks like
//! a host may be a piece of a password that was not percent-encoded.

use url::Url;

use super::kind::{Kind, Rejection, percent_decoded};
use super::setting::{
    About, DB_HOST, DB_NAME, DB_PASSWORD, DB_PORT, DB_SSLMODE, DB_SSLROOTCERT, DB_USER, REDIS_HOST,
    REDIS_PASSWORD, REDIS_PORT,
};
use super::value::Secret;

/// The texts of the settings that a URL stands for, which those settings' own kinds then read.
pub(super) type Parts = Vec<(&'static About, String)>;

#[derive(Debug)]
pub(super) struct PostgresUrl;

/// A Postgres URL taken apart.
pub(super) struct PostgresParts {
    pub(super) parts: Parts,
    shown: String,
}

impl PostgresParts {
    /// Whether the URL names certificates to trust.
    pub(super) fn names_root_cert(&self) -> bool {
        let variable = DB_SSLROOTCERT.about.variable;
        self.parts
            .iter()
            .any(|(about, _)| about.variable == variable)
    }
}

impl Kind for PostgresUrl {
    type Value = PostgresParts;
    const VALUE_NAME: &'static str = "URL";
    const SECRET: bool = true;

    fn accepts(&self) -> String {
        "postgres://user:password@host:port/database?sslmode=…&sslrootcert=…, percent-encoded"
            .to_owned()
    }

    fn parse(&self, text: &str) -> Result<PostgresParts, Rejection> {
        let url = store_url(text, &["postgres", "postgresql"])?;
        let mut parts = vec![(&DB_HOST.about, host(&url)?)];
        if let Some(port) = url.port() {
            parts.push((&DB_PORT.about, port.to_string()));
        }
        if !url.username().is_empty() {
            parts.push((&DB_USER.about, percent_decoded(url.username())?));
        }
        if let Some(password) = password(&url)? {
            parts.push((&DB_PASSWORD.about, password));
        }
        let path = url.path().trim_start_matches('/');
        if !path.is_empty() {
            parts.push((&DB_NAME.about, percent_decoded(path)?));
        }
        for (name, value) in url.query_pairs() {
            let about = match &*name {
                "sslmode" => &DB_SSLMODE.about,
                "sslrootcert" => &DB_SSLROOTCERT.about,
                _ => return Err(Some(unsupported_parameter(&name))),
            };
            if parts
                .iter()
                .any(|(earlier, _)| earlier.variable == about.variable)
            {
                return Err(Some(format!("has {name} twice")));
            }
            parts.push((about, value.into_owned()));
        }
        let shown = masked(url);
        Ok(PostgresParts { parts, shown })
    }

    fn shown(&self, value: &PostgresParts) -> Option<String> {
        Some(value.shown.clone())
    }
}

#[derive(Debug)]
pub(super) struct RedisUrl;

/// A Redis URL taken apart.
pub(super) struct RedisParts {
    pub(super) parts: Parts,
    pub(super) tls: bool,
    pub(super) username: Option<String>,
    pub(super) database: i64,
    shown: String,
}

impl Kind for RedisUrl {
    type Value = RedisParts;
    const VALUE_NAME: &'static str = "URL";
    const SECRET: bool = true;

    fn accepts(&self) -> String {
        "redis:// or rediss:// and user:password@host:port/number, percent-encoded".to_owned()
    }

    fn parse(&self, text: &str) -> Result<RedisParts, Rejection> {
        let url = store_url(text, &["redis", "rediss"])?;
        if url.query().is_some() {
            return Err(Some("has query parameters".to_owned()));
        }
        let mut parts = vec![(&REDIS_HOST.about, host(&url)?)];
        if let Some(port) = url.port() {
            parts.push((&REDIS_PORT.about, port.to_string()));
        }
        let username = percent_decoded(url.username())?;
        match password(&url)? {
            Some(password) => parts.push((&REDIS_PASSWORD.about, password)),
            // Most likely the password itself, without the colon before it.
            None if !username.is_empty() => {
                return Err(Some("has a user without a password".to_owned()));
            }
            None => {}
        }
        let database = match url.path().trim_start_matches('/') {
            "" => 0,
            number => number
                .parse::<u32>()
                .map_err(|_| Some("has a database that is not a number".to_owned()))?
                .into(),
        };
        Ok(RedisParts {
            parts,
            tls: url.scheme() == "rediss",
            username: (!username.is_empty()).then_some(username),
            database,
            shown: masked(url),
        })
    }

    fn shown(&self, value: &RedisParts) -> Option<String> {
        Some(value.shown.clone())
    }
}

/// A collector's URL. Credentials and tokens have their own setting, which is secret.
#[derive(Debug)]
pub(super) struct Endpoint;

impl Kind for Endpoint {
    type Value = String;
    const VALUE_NAME: &'static str = "URL";

    fn accepts(&self) -> String {
        "an http:// or https:// URL without user, query and fragment".to_owned()
    }

    fn parse(&self, text: &str) -> Result<String, Rejection> {
        let url = Url::parse(text).map_err(|_| None)?;
        let accepted = matches!(url.scheme(), "http" | "https")
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
            // The exporter takes the text as it is, and its parser is stricter than a browser's.
            && text.parse::<http::Uri>().is_ok_and(|uri| uri.host().is_some());
        if accepted {
            Ok(text.to_owned())
        } else {
            Err(None)
        }
    }
}

fn store_url(text: &str, schemes: &[&str]) -> Result<Url, Rejection> {
    let not_a_url = || Some(format!("not a {}:// URL", schemes.join(":// or ")));
    if text.contains(char::is_whitespace) || text.contains(char::is_control) {
        return Err(not_a_url());
    }
    let url = Url::parse(text).map_err(|error| match error {
        url::ParseError::InvalidPort => Some(
            "has a port that is not a number (or a password that is not percent-encoded)"
                .to_owned(),
        ),
        _ => not_a_url(),
    })?;
    if !schemes.contains(&url.scheme()) {
        return Err(not_a_url());
    }
    if url.fragment().is_some() {
        return Err(Some("has a fragment (in a password, # is %23)".to_owned()));
    }
    if url.path().contains('@') {
        return Err(Some(
            "has an @ in its path, where it is %40 (in a password, / is %2F)".to_owned(),
        ));
    }
    if url.path().matches('/').count() > 1 {
        return Err(Some("has more than one / in its path".to_owned()));
    }
    Ok(url)
}

fn host(url: &Url) -> Result<String, Rejection> {
    match url.host_str() {
        Some(host) if !host.is_empty() => percent_decoded(host),
        _ => Err(Some("has no host".to_owned())),
    }
}

fn password(url: &Url) -> Result<Option<String>, Rejection> {
    match url.password() {
        Some(password) if !password.is_empty() => percent_decoded(password).map(Some),
        _ => Ok(None),
    }
}

/// Names a parameter only if it is one that other drivers know: an unknown one may be a piece of a
/// password with a question mark in it.
fn unsupported_parameter(name: &str) -> String {
    const KNOWN_ELSEWHERE: [&str; 12] = [
        "application_name",
        "channel_binding",
        "connect_timeout",
        "host",
        "hostaddr",
        "options",
        "password",
        "pgbouncer",
        "sslcert",
        "sslkey",
        "statement-cache-capacity",
        "target_session_attrs",
    ];
    if KNOWN_ELSEWHERE.contains(&name) {
        format!("has the parameter {name}, which is not supported")
    } else {
        "has a parameter other than sslmode and sslrootcert".to_owned()
    }
}

fn masked(mut url: Url) -> String {
    // It fails for a URL that can have no password, which then has none to mask.
    if url.password().is_some() && url.set_password(Some(Secret::MASK)).is_err() {
        return Secret::MASK.to_owned();
    }
    url.to_string()
}
