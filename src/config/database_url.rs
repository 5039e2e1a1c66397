//! `DATABASE_URL`: what libpq, and so psql, reads from it.
//!
//! Must not know: the settings of the parts.

use super::parameters::{POSTGRES, Unenforced, is_one_of, judge, plain};
use super::url::{SEVERAL_HOSTS, StoreUrl, read_part};
use super::value::{Accept, Secret, accept, host, one_of, port, text};

/// The URL of a database, taken apart.
pub(super) struct DatabaseUrl {
    pub(super) user: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) database: Database,
    /// The URL without its secrets.
    pub(super) masked: String,
    pub(super) unenforced: Vec<Unenforced>,
}

/// Which database a URL leads to, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Database {
    pub(super) host: String,
    pub(super) port: Option<u16>,
    pub(super) name: Option<String>,
    /// One of libpq's words.
    pub(super) sslmode: Option<&'static str>,
    pub(super) sslrootcert: Option<String>,
    pub(super) sslcert: Option<String>,
    pub(super) sslkey: Option<String>,
    /// Command-line options for the server.
    pub(super) options: Option<String>,
}

/// The words of libpq, and node-postgres's word for encryption without verification.
const SSL_MODES: &[(&str, &str)] = &[
    ("disable", "disable"),
    ("allow", "allow"),
    ("prefer", "prefer"),
    ("require", "require"),
    ("no-verify", "require"),
    ("verify-ca", "verify-ca"),
    ("verify-full", "verify-full"),
];

/// The parameters whose values are shown, without underscores and hyphens. They are those that set
/// something here; but options can contain a setting that is a secret.
const SHOWN: &str = "currentschema dbname host hostaddr port schema schemasearchpath searchpath ssl \
    sslcert sslkey sslmode sslrootcert user username";

/// The schemes of URLs that lead to PostgreSQL: libpq's, and names that frameworks use.
const SCHEMES: &str = "pgsql postgis postgres postgresql psql timescale timescaledb";

impl DatabaseUrl {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// Why the URL is refused, to follow the variable's name.
    pub(super) fn parse(url: &Secret) -> Result<Self, String> {
        let url = StoreUrl::parse(url)?;
        let scheme = url.scheme.strip_prefix("jdbc:").unwrap_or(&url.scheme);
        // SQLAlchemy names its driver in the scheme.
        let (scheme, _driver) = scheme.split_once('+').unwrap_or((scheme, ""));
        if scheme.starts_with("cockroach") {
            return Err("leads to CockroachDB, which is not supported".to_owned());
        }
        if !SCHEMES.split(' ').any(|known| known == scheme) {
            return Err("is not a postgres:// or postgresql:// URL".to_owned());
        }
        if url.fragment.is_some() {
            return Err("has a fragment (encode # as %23)".to_owned());
        }
        let mut user = url.user.clone();
        let mut password = url.password.clone();
        let mut name = url.database()?;
        let mut host = url.host.clone();
        let mut port_text = url.port.clone();
        let (mut address, mut encrypted, mut ssl) = (None, false, None);
        let mut database = Database::default();
        let mut unenforced = Vec::new();
        for (parameter, value) in &url.query {
            let given = Some(value.clone()).filter(|value| !value.is_empty());
            match &*plain(parameter) {
                // As in libpq, a parameter wins over the same part before the query.
                "user" | "username" => user = given.or(user),
                "pass" | "password" | "passwd" | "pwd" => {
                    password = given.map(Secret::from).or(password);
                }
                "dbname" => name = given.or(name),
                "host" => host = given.or(host),
                "port" => port_text = given.or(port_text),
                "hostaddr" => address = given,
                "options" => database.options = given.map(checked_options).transpose()?,
                "sslrootcert" => database.sslrootcert = given,
                "sslcert" => database.sslcert = given,
                "sslkey" => database.sslkey = given,
                "sslmode" => {
                    database.sslmode = given.map(|mode| ssl_mode(&mode)).transpose()?;
                }
                "ssl" => match &*value.to_ascii_lowercase() {
                    // No word asks for an unencrypted connection, so the default stays.
                    "" | "0" | "false" | "no" | "off" => {}
                    "1" | "on" | "true" | "yes" => encrypted = true,
                    mode => {
                        ssl = Some(ssl_mode(mode)?);
                    }
                },
                "currentschema" | "schema" | "schemasearchpath" | "searchpath" => {
                    if !leads_to_public(value) {
                        return Err(format!("has the parameter {parameter}: {IN_PUBLIC}"));
                    }
                }
                _ => unenforced.extend(judge("DATABASE_URL", POSTGRES, parameter, value)?),
            }
        }
        let host = match (host, address) {
            (Some(_), Some(_)) => {
                return Err("has a hostaddr and a host: expected one of them".to_owned());
            }
            (host, address) => host
                .or(address)
                .ok_or("has no host (a Unix socket is host=/directory)")?,
        };
        if host.contains(',') || port_text.as_ref().is_some_and(|text| text.contains(',')) {
            return Err(SEVERAL_HOSTS.to_owned());
        }
        let read_name = |variable, part: Option<String>| {
            part.map(|part| read_part(variable, &part, &role_or_database()))
                .transpose()
        };
        database.host = read_part("DB_HOST", &host, &host_or_directory())?;
        database.name = read_name("DB_NAME", name)?;
        database.port = port_text
            .map(|text| read_part("DB_PORT", &text, &port()))
            .transpose()?;
        database.take_mode(encrypted, ssl)?;
        Ok(Self {
            user: read_name("DB_USER", user)?,
            password: password.filter(|password| !password.expose().is_empty()),
            database,
            masked: url.masked(is_shown),
            unenforced,
        })
    }
}

impl Database {
    /// Derives the TLS mode from `ssl`, true or a mode, and refuses what contradicts it.
    fn take_mode(&mut self, encrypted: bool, ssl: Option<&'static str>) -> Result<(), String> {
        if ssl.is_some_and(|mode| *self.sslmode.get_or_insert(mode) != mode) {
            return Err("has ssl and sslmode, which contradict each other".to_owned());
        }
        match self.sslmode {
            None if encrypted => self.sslmode = Some("require"),
            Some("disable" | "allow" | "prefer") if encrypted => {
                return Err("has ssl=true, which contradicts its sslmode".to_owned());
            }
            _ => {}
        }
        Ok(())
    }
}

const IN_PUBLIC: &str = "the service keeps its tables in the schema public";

/// Checks the options for the server. The service's own follow them and win; these two would make
/// visits fail or the count wrong without an error at the login.
fn checked_options(options: String) -> Result<String, String> {
    let mut words = words_of(&options).into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c") {
            Some("") => words.next().unwrap_or_default(),
            Some(setting) => setting.to_owned(),
            None => match word.strip_prefix("--") {
                Some(setting) => setting.to_owned(),
                None => continue,
            },
        };
        let (name, value) = setting.split_once('=').unwrap_or((&setting, ""));
        match &*name.replace('-', "_").to_ascii_lowercase() {
            "search_path" if !leads_to_public(value) => {
                return Err(format!("has options with search_path: {IN_PUBLIC}"));
            }
            name @ ("default_transaction_read_only" | "session_replication_role") => {
                return Err(format!(
                    "has options with {name}, which would stop the count"
                ));
            }
            _ => {}
        }
    }
    Ok(options)
}

/// Splits options at blanks, as the server does: a backslash makes the next character a part of the
/// word.
fn words_of(options: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        if character == '\\' {
            word.extend(characters.next());
        } else if character.is_ascii_whitespace() {
            words.push(std::mem::take(&mut word));
        } else {
            word.push(character);
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

fn leads_to_public(path: &str) -> bool {
    let first = path.split(',').next().unwrap_or_default();
    first.is_empty() || first.trim_matches([' ', '"', '\'']) == "public"
}

fn ssl_mode(text: &str) -> Result<&'static str, String> {
    read_part("DB_SSLMODE", &text.replace('_', "-"), &one_of(SSL_MODES))
}

fn is_shown(parameter: &str) -> bool {
    is_one_of(SHOWN, parameter)
}

/// Accepts the name of a role or of a database.
pub(super) fn role_or_database() -> Accept<String> {
    accept("1 to 63 bytes without control characters", |name| {
        text(name, 63)
    })
}

/// Accepts where a server listens.
pub(super) fn host_or_directory() -> Accept<String> {
    accept(
        "one host name, one IP address without a zone such as %eth0, or an absolute path",
        |text| {
            if text.starts_with('/') {
                return (!text.contains(char::is_control)).then(|| text.to_owned());
            }
            host(text)
        },
    )
}
