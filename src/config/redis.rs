//! `REDIS_*`: how to reach Redis.
//!
//! Must not know: how a connection is opened.

use std::time::Duration;

use clap::Args;

use super::parameters::Unenforced;
use super::redis_url::{Cache, RedisUrl, host_or_socket};
use super::roots;
use super::sources::{Sources, identity, invalid};
use super::value::{
    Accept, Certificates, Credentials, Identity, PrivateKey, Secret, SecretFile, accept, durations,
    listed, port, text,
};

const FORM: &str = "redis:// or rediss:// and user:password@host:port/number, percent-encoded, or \
    unix:///path?db=number";

/// The settings that a URL contains.
const PARTS_OF_A_URL: [&str; 5] = [
    "redis_host",
    "redis_port",
    "redis_username",
    "redis_password",
    "redis_password_file",
];

/// The cache. After `finish` the fields hold the values from a URL or a file too.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Redis")]
pub struct RedisConfig {
    /// Host name or address, or the absolute path of a Unix socket
    #[arg(long, env, default_value = "localhost", value_parser = host_or_socket())]
    pub redis_host: String,
    /// TCP port
    #[arg(long, env, default_value = "6379", value_parser = port())]
    pub redis_port: u16,
    /// User of the access control list; without it the default user logs in
    #[arg(long, env, value_parser = user())]
    pub redis_username: Option<String>,
    /// PEM file of certificates to trust instead of the system's, for a rediss:// URL; read again for each connection
    #[arg(long, env)]
    redis_tls_ca: Option<Certificates>,
    /// PEM file of the client certificate and its issuers, for a rediss:// URL; read again for each connection
    #[arg(long, env)]
    redis_tls_cert: Option<Certificates>,
    /// PEM file of REDIS_TLS_CERT's private key; read again for each connection
    #[arg(long, env)]
    redis_tls_key: Option<PrivateKey>,
    /// Timeout of one call; below 70 % of DB_TIMEOUT
    #[arg(long, env, default_value = "250ms", value_parser = durations("1ms", "30s"))]
    pub redis_timeout: Duration,
    /// Password
    #[arg(long, env, hide = true, conflicts_with = "redis_password_file")]
    pub redis_password: Option<Secret>,
    /// File that holds REDIS_PASSWORD
    #[arg(long, env)]
    redis_password_file: Option<SecretFile>,
    /// redis:// or rediss:// and user:password@host:port/number, percent-encoded, or unix:///path?db=number, instead of the settings of its parts
    #[arg(long, env, hide = true, conflicts_with_all = PARTS_OF_A_URL, conflicts_with = "redis_url_file")]
    redis_url: Option<Secret>,
    /// File that holds REDIS_URL
    #[arg(long, env, conflicts_with_all = PARTS_OF_A_URL)]
    redis_url_file: Option<SecretFile>,
    /// Whether the URL asks for TLS.
    #[arg(skip)]
    pub tls: bool,
    /// The database's number in the URL, otherwise 0.
    #[arg(skip)]
    pub database: i64,
    /// The parameters of the URL that ask for something that the service does not do.
    #[arg(skip)]
    pub unenforced: Vec<Unenforced>,
    /// The system's authorities, if the driver cannot find them.
    #[arg(skip)]
    system_roots: Option<Certificates>,
    /// The client certificate at the start.
    #[arg(skip)]
    identity: Option<Identity>,
    /// Which database the URL named at the start.
    #[arg(skip)]
    at_the_start: Option<Cache>,
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
            user: self.redis_username.clone(),
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
                .and_then(|url| RedisUrl::parse(&url))
                .map_err(|why| format!("REDIS_URL_FILE {why}"))?;
            if self.at_the_start.as_ref() != Some(&url.cache) {
                return Err(
                    "REDIS_URL_FILE has changed in more than user and password: restart to use it"
                        .to_owned(),
                );
            }
            credentials = Credentials {
                user: url.user,
                password: url.password,
            };
        }
        Ok(credentials)
    }

    /// The authorities to trust for a new connection, from `REDIS_TLS_CA` as it is now. `None` if
    /// the driver finds those of the system by itself. Blocks while it reads the file.
    ///
    /// # Errors
    ///
    /// Why the file is refused, with its path.
    pub fn roots(&self) -> Result<Option<Certificates>, String> {
        let Some(file) = &self.redis_tls_ca else {
            return Ok(self.system_roots.clone());
        };
        let roots = Certificates::read(&file.path);
        roots
            .map(Some)
            .map_err(|why| format!("REDIS_TLS_CA ({}) {why}", file.path.display()))
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

    /// The settings whose files are read for a new connection, with their paths.
    #[must_use]
    pub fn files(&self) -> String {
        let identity = self.identity.as_ref().map(Identity::read_from);
        listed([
            (
                "REDIS_PASSWORD_FILE",
                self.redis_password_file
                    .as_ref()
                    .and_then(SecretFile::read_from),
            ),
            (
                "REDIS_URL_FILE",
                self.redis_url_file.as_ref().and_then(SecretFile::read_from),
            ),
            (
                "REDIS_TLS_CA",
                self.redis_tls_ca.as_ref().map(|roots| &*roots.path),
            ),
            ("REDIS_TLS_CERT", identity.map(|[path, _]| path)),
            ("REDIS_TLS_KEY", identity.map(|[_, path]| path)),
        ])
    }

    /// Reads the settings that the URL and the files of secrets contain, and refuses
    /// contradictions.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        let file = self.redis_password_file.as_ref();
        sources.secret("REDIS_PASSWORD", &mut self.redis_password, file)?;
        let file = self.redis_url_file.as_ref();
        sources.secret("REDIS_URL", &mut self.redis_url, file)?;
        if let Some(url) = self.redis_url.take() {
            let url = RedisUrl::parse(&url)
                .map_err(|why| sources.refuse("REDIS_URL", &format!("{why}; expected {FORM}")))?;
            self.take_url(url, sources);
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
        self.redis_tls_ca.take_if(|roots| roots.are_the_systems());
        if self.tls && self.redis_tls_ca.is_none() {
            self.system_roots = roots::load_system_roots(sources.environment);
        }
        Ok(())
    }

    fn take_url(&mut self, url: RedisUrl, sources: &mut Sources<'_>) {
        let mut parts = sources.parts_of("REDIS_URL", url.masked);
        let cache = url.cache.clone();
        parts.set("REDIS_HOST", Some(cache.host), &mut self.redis_host);
        parts.set("REDIS_PORT", cache.port, &mut self.redis_port);
        if let Some(user) = &url.user {
            parts.note("REDIS_USERNAME", user);
        }
        if url.password.is_some() {
            parts.note("REDIS_PASSWORD", Secret::MASK);
        }
        self.redis_username = url.user;
        self.redis_password = url.password;
        self.tls = cache.tls;
        self.database = cache.database;
        self.unenforced = url.unenforced;
        self.at_the_start = Some(url.cache);
    }
}

fn user() -> Accept<String> {
    accept("1 to 255 bytes without control characters", |name| {
        text(name, 255)
    })
}
