//! `REDIS_*`: how to reach Redis.
//!
//! Must not know: how a connection is opened.

use std::time::Duration;

use clap::Args;

use super::roots;
use super::sources::{Sources, identity, invalid};
use super::url::StoreUrl;
use super::value::{
    Accept, Certificates, Credentials, Identity, PrivateKey, Secret, SecretFile, accept, duration,
    host, parsed, port, within,
};

const SCHEMES: &[&str] = &["redis", "rediss"];

const FORM: &str = "redis:// or rediss:// and user:password@host:port/number, percent-encoded";

/// The settings that a URL contains.
const PARTS_OF_A_URL: [&str; 4] = [
    "redis_host",
    "redis_port",
    "redis_password",
    "redis_password_file",
];

/// The cache. After `finish` the fields hold the values from a URL or a file too.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Redis")]
pub struct RedisConfig {
    /// Host name or address
    #[arg(long, env, default_value = "localhost", value_parser = a_host())]
    pub redis_host: String,
    /// TCP port
    #[arg(long, env, default_value = "6379", value_parser = port())]
    pub redis_port: u16,
    /// PEM file of certificates to trust instead of the system's, for a rediss:// URL
    #[arg(long, env)]
    pub redis_tls_ca: Option<Certificates>,
    /// PEM file of the client certificate and its issuers, for a rediss:// URL; read again for each connection
    #[arg(long, env)]
    redis_tls_cert: Option<Certificates>,
    /// PEM file of REDIS_TLS_CERT's private key; read again for each connection
    #[arg(long, env)]
    redis_tls_key: Option<PrivateKey>,
    /// Timeout of one call; below 70 % of DB_TIMEOUT
    #[arg(long, env, default_value = "250ms", value_parser = within(duration, "1ms", "30s"))]
    pub redis_timeout: Duration,
    /// Password
    #[arg(long, env, hide = true, conflicts_with = "redis_password_file")]
    pub redis_password: Option<Secret>,
    /// File that holds REDIS_PASSWORD
    #[arg(long, env)]
    redis_password_file: Option<SecretFile>,
    /// redis:// or rediss:// and user:password@host:port/number, percent-encoded, instead of the settings of its parts
    #[arg(long, env, hide = true, conflicts_with_all = PARTS_OF_A_URL, conflicts_with = "redis_url_file")]
    redis_url: Option<Secret>,
    /// File that holds REDIS_URL
    #[arg(long, env, conflicts_with_all = PARTS_OF_A_URL)]
    redis_url_file: Option<SecretFile>,
    /// Whether the URL's scheme is `rediss`.
    #[arg(skip)]
    pub tls: bool,
    /// The user in the URL.
    #[arg(skip)]
    pub username: Option<String>,
    /// The database's number in the URL, otherwise 0.
    #[arg(skip)]
    pub database: i64,
    /// The client certificate at the start.
    #[arg(skip)]
    identity: Option<Identity>,
}

impl RedisConfig {
    /// The user and the password for a new connection: those at the start, or what
    /// `REDIS_PASSWORD_FILE` or `REDIS_URL_FILE` holds now. Blocks while it reads the file.
    ///
    /// # Errors
    ///
    /// Why the file is refused, with its variable and path and without its contents.
    pub fn credentials(&self) -> Result<Credentials<Option<String>>, String> {
        let mut credentials = Credentials {
            user: self.username.clone(),
            password: self.redis_password.clone(),
        };
        if let Some(file) = &self.redis_password_file {
            let password = file.read_again();
            credentials.password =
                Some(password.map_err(|why| format!("REDIS_PASSWORD_FILE {why}"))?);
        }
        if let Some(file) = &self.redis_url_file {
            let url = file
                .read_again()
                .and_then(|url| StoreUrl::parse(&url, SCHEMES))
                .map_err(|why| format!("REDIS_URL_FILE {why}"))?;
            credentials = Credentials {
                user: url.user,
                password: url.password,
            };
        }
        Ok(credentials)
    }

    /// The client certificate for a new connection, from its files as they are now, if there is
    /// one. Blocks while it reads the files.
    ///
    /// # Errors
    ///
    /// Why a file is refused, with its path.
    pub fn identity(&self) -> Result<Option<Identity>, String> {
        self.identity.as_ref().map(Identity::read_again).transpose()
    }

    /// Reads the settings that the URL and the files of secrets contain, and refuses
    /// contradictions.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        let file = self.redis_password_file.as_ref();
        sources.secret("REDIS_PASSWORD", &mut self.redis_password, file)?;
        let file = self.redis_url_file.as_ref();
        sources.secret("REDIS_URL", &mut self.redis_url, file)?;
        if let Some(url) = self.redis_url.take() {
            self.take_url(&url, sources)
                .map_err(|why| sources.refuse("REDIS_URL", &format!("{why}; expected {FORM}")))?;
        }
        if self.redis_tls_ca.is_some() && !self.tls {
            return Err(invalid(
                "REDIS_TLS_CA has no effect without TLS: expected REDIS_URL to be a rediss:// URL",
            ));
        }
        self.identity = identity(
            ("REDIS_TLS_CERT", self.redis_tls_cert.as_ref()),
            ("REDIS_TLS_KEY", self.redis_tls_key.as_ref()),
        )?;
        if self.identity.is_some() && !self.tls {
            return Err(invalid(
                "REDIS_TLS_CERT has no effect without TLS: expected REDIS_URL to be a rediss:// URL",
            ));
        }
        if self.tls && self.redis_tls_ca.is_none() {
            self.redis_tls_ca = roots::load_system_roots(sources.environment);
        }
        Ok(())
    }

    fn take_url(&mut self, url: &Secret, sources: &mut Sources<'_>) -> Result<(), String> {
        let url = StoreUrl::parse(url, SCHEMES)?;
        if !url.query.is_empty() {
            return Err("has query parameters".to_owned());
        }
        if url.user.is_some() && url.password.is_none() {
            // The user is most likely a password without the colon before it.
            return Err("has a user without a password".to_owned());
        }
        let mut parts = sources.parts_of("REDIS_URL", url.masked);
        parts.take(
            "REDIS_HOST",
            Some(url.host),
            &a_host(),
            &mut self.redis_host,
        )?;
        parts.take("REDIS_PORT", url.port, &port(), &mut self.redis_port)?;
        if url.password.is_some() {
            parts.note("REDIS_PASSWORD", Secret::MASK);
        }
        self.redis_password = url.password;
        self.tls = url.scheme == "rediss";
        self.username = url.user;
        if let Some(path) = url.path {
            let number: u32 = parsed(&path).ok_or("has a database that is not a number")?;
            self.database = number.into();
        }
        Ok(())
    }
}

fn a_host() -> Accept<String> {
    accept("a host name or an IP address", host)
}
