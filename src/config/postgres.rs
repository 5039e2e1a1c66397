//! `DB_*` and `DATABASE_URL`: how to reach Postgres.
//!
//! Must not know: how a session is opened.

use std::time::Duration;

use clap::Args;
use sqlx::postgres::PgSslMode;

use super::database_url::{Database, DatabaseUrl, host_or_directory, role_or_database};
use super::parameters::Unenforced;
use super::sources::{Sources, identity, invalid};
use super::value::{
    Certificates, Credentials, Identity, PrivateKey, Secret, SecretFile, durations, listed, one_of,
    port,
};

const SSL_MODES: &[(&str, PgSslMode)] = &[
    ("disable", PgSslMode::Disable),
    ("allow", PgSslMode::Allow),
    ("prefer", PgSslMode::Prefer),
    ("require", PgSslMode::Require),
    ("verify-ca", PgSslMode::VerifyCa),
    ("verify-full", PgSslMode::VerifyFull),
];

const FORM: &str = "postgres://user:password@host:port/database, percent-encoded";

/// The settings that a URL contains.
const PARTS_OF_A_URL: [&str; 7] = [
    "db_host",
    "db_port",
    "db_user",
    "db_password",
    "db_password_file",
    "db_name",
    "db_sslmode",
];

/// Variables that the Postgres driver always reads, each with what to do instead. The settings
/// below override the driver's other `PG*` variables.
const OBEYED_BY_THE_DRIVER: [(&str, &str); 4] = [
    ("PGOPTIONS", "session options are not supported"),
    ("PGSSLROOTCERT", "set DB_SSLROOTCERT instead"),
    ("PGSSLCERT", "set DB_SSLCERT instead"),
    ("PGSSLKEY", "set DB_SSLKEY instead"),
];

/// The database. After `finish` the fields hold the values from a URL or a file too.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Postgres")]
pub struct PostgresConfig {
    /// Host name or address, or the absolute path of a Unix socket's directory
    #[arg(long, env, default_value = "localhost", value_parser = host_or_directory())]
    pub db_host: String,
    /// TCP port
    #[arg(long, env, default_value = "5432", value_parser = port())]
    pub db_port: u16,
    /// Role to log in as
    #[arg(long, env, default_value = "usuario", value_parser = role_or_database())]
    pub db_user: String,
    /// Database
    #[arg(long, env, default_value = "desafio3db", value_parser = role_or_database())]
    pub db_name: String,
    /// Whether the connection is encrypted and the server's certificate verified
    #[arg(long, env, default_value = "prefer", value_parser = one_of(SSL_MODES))]
    pub db_sslmode: PgSslMode,
    /// PEM file of certificates to trust instead of the system's, for DB_SSLMODE verify-ca and verify-full; read again for each session. With it require means verify-ca; system names the system's
    #[arg(long, env)]
    pub db_sslrootcert: Option<Certificates>,
    /// PEM file of the client certificate and its issuers; read again for each session
    #[arg(long, env)]
    db_sslcert: Option<Certificates>,
    /// PEM file of DB_SSLCERT's private key; read again for each session
    #[arg(long, env)]
    db_sslkey: Option<PrivateKey>,
    /// Timeout of one call; the server gives up waiting for a lock at 70 % of it, and a statement at 85 %
    #[arg(long, env, default_value = "1s", value_parser = durations("10ms", "1m"))]
    pub db_timeout: Duration,
    /// Password of DB_USER
    #[arg(long, env, hide = true, conflicts_with = "db_password_file")]
    pub db_password: Option<Secret>,
    /// File that holds DB_PASSWORD
    #[arg(long, env)]
    db_password_file: Option<SecretFile>,
    /// postgres://user:password@host:port/database?sslmode=…&sslrootcert=…, percent-encoded, instead of the settings of its parts; libpq's other parameters are accepted
    #[arg(long, env, hide = true, conflicts_with_all = PARTS_OF_A_URL, conflicts_with = "database_url_file")]
    database_url: Option<Secret>,
    /// File that holds DATABASE_URL
    #[arg(long, env, conflicts_with_all = PARTS_OF_A_URL)]
    database_url_file: Option<SecretFile>,
    /// Command-line options for the server, from the URL. The service's own follow them.
    #[arg(skip)]
    pub options: Option<String>,
    /// The parameters of the URL that ask for something that the service does not do.
    #[arg(skip)]
    pub unenforced: Vec<Unenforced>,
    /// The client certificate at the start.
    #[arg(skip)]
    identity: Option<Identity>,
    #[arg(skip)]
    by_url: bool,
    /// Which database the URL named at the start.
    #[arg(skip)]
    at_the_start: Option<Database>,
}

impl PostgresConfig {
    /// The server's `lock_timeout`, in whole milliseconds: 70 % of a call's timeout. A statement
    /// that waits this long certainly fails, and its error arrives before the call times out.
    #[must_use]
    pub fn lock_timeout(&self) -> Duration {
        self.percent_of_timeout(70)
    }

    /// The server's `statement_timeout`, in whole milliseconds: 85 % of a call's timeout, so that
    /// the lock's timeout fires first and the caller sees its error.
    #[must_use]
    pub fn statement_timeout(&self) -> Duration {
        self.percent_of_timeout(85)
    }

    /// The role and the password for a new session: those at the start, or what `DB_PASSWORD_FILE`
    /// or `DATABASE_URL_FILE` holds now. Blocks while it reads the file.
    ///
    /// # Errors
    ///
    /// Why the file is refused, with its variable and path and without its contents.
    pub fn credentials(&self) -> Result<Credentials<String>, String> {
        let mut credentials = Credentials {
            user: self.db_user.clone(),
            password: self.db_password.clone(),
        };
        if let Some(file) = &self.db_password_file {
            let password = file.read_again();
            credentials.password = Some(password.map_err(|why| format!("DB_PASSWORD_FILE {why}"))?);
        }
        if let Some(file) = &self.database_url_file {
            let url = file
                .read_again()
                .and_then(|url| DatabaseUrl::parse(&url))
                .map_err(|why| format!("DATABASE_URL_FILE {why}"))?;
            if self.at_the_start.as_ref() != Some(&url.database) {
                return Err(
                    "DATABASE_URL_FILE has changed in more than user and password: restart to use it"
                        .to_owned(),
                );
            }
            credentials = Credentials {
                user: url.user.unwrap_or(credentials.user),
                password: url.password,
            };
        }
        Ok(credentials)
    }

    /// The setting that the password comes from, or could come from.
    #[must_use]
    pub fn password_setting(&self) -> &'static str {
        match (self.by_url, &self.db_password_file, &self.database_url_file) {
            (_, Some(_), _) => "DB_PASSWORD_FILE",
            (_, _, Some(_)) => "DATABASE_URL_FILE",
            (true, ..) => "DATABASE_URL",
            (false, ..) => "DB_PASSWORD",
        }
    }

    /// The client certificate for a new session, from its files as they are now, if there is one.
    /// Blocks while it reads the files.
    ///
    /// # Errors
    ///
    /// Why a file is refused, with its path.
    pub fn identity(&self) -> Result<Option<Identity>, String> {
        self.identity.as_ref().map(Identity::read_again).transpose()
    }

    /// The settings whose files are read for a new session, with their paths.
    #[must_use]
    pub fn files(&self) -> String {
        let identity = self.identity.as_ref().map(Identity::read_from);
        listed([
            (
                "DB_PASSWORD_FILE",
                self.db_password_file
                    .as_ref()
                    .and_then(SecretFile::read_from),
            ),
            (
                "DATABASE_URL_FILE",
                self.database_url_file
                    .as_ref()
                    .and_then(SecretFile::read_from),
            ),
            (
                "DB_SSLROOTCERT",
                self.db_sslrootcert.as_ref().map(|roots| &*roots.path),
            ),
            ("DB_SSLCERT", identity.map(|[path, _]| path)),
            ("DB_SSLKEY", identity.map(|[_, path]| path)),
        ])
    }

    fn percent_of_timeout(&self, percent: u128) -> Duration {
        let milliseconds = self.db_timeout.as_millis().saturating_mul(percent) / 100;
        Duration::from_millis(u64::try_from(milliseconds).unwrap_or(u64::MAX))
    }

    /// Reads the settings that the URL and the files of secrets contain, and refuses
    /// contradictions.
    pub(super) fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        for (variable, remedy) in OBEYED_BY_THE_DRIVER {
            if sources.variable(variable).is_some() {
                // The error omits the value, which can be a private key.
                return Err(invalid(format!(
                    "{variable} is set, and the Postgres driver would obey it: unset it; {remedy}"
                )));
            }
        }
        let file = self.db_password_file.as_ref();
        sources.secret("DB_PASSWORD", &mut self.db_password, file)?;
        let file = self.database_url_file.as_ref();
        sources.secret("DATABASE_URL", &mut self.database_url, file)?;
        self.by_url = self.database_url.is_some();
        if let Some(url) = self.database_url.take() {
            DatabaseUrl::parse(&url)
                .and_then(|url| self.take_url(url, sources))
                .map_err(|why| {
                    sources.refuse("DATABASE_URL", &format!("{why}; expected {FORM}"))
                })?;
        }
        self.check_roots(sources)?;
        self.identity = identity(
            ("DB_SSLCERT", self.db_sslcert.as_ref()),
            ("DB_SSLKEY", self.db_sslkey.as_ref()),
        )?;
        if self.identity.is_some() && matches!(self.db_sslmode, PgSslMode::Disable) {
            return Err(invalid(
                "DB_SSLCERT has no effect while DB_SSLMODE is disable: expected another mode",
            ));
        }
        Ok(())
    }

    fn take_url(&mut self, url: DatabaseUrl, sources: &mut Sources<'_>) -> Result<(), String> {
        let mut parts = sources.parts_of("DATABASE_URL", url.masked);
        let database = url.database.clone();
        parts.set("DB_HOST", Some(database.host), &mut self.db_host);
        parts.set("DB_PORT", database.port, &mut self.db_port);
        parts.set("DB_USER", url.user, &mut self.db_user);
        parts.set("DB_NAME", database.name, &mut self.db_name);
        if let Some(mode) = database.sslmode {
            self.db_sslmode = one_of(SSL_MODES).read(mode)?;
            parts.note("DB_SSLMODE", mode);
        }
        if url.password.is_some() {
            parts.note("DB_PASSWORD", Secret::MASK);
        }
        self.db_password = url.password;
        let file = ("sslrootcert", database.sslrootcert);
        parts.read("DB_SSLROOTCERT", file, &mut self.db_sslrootcert)?;
        parts.read(
            "DB_SSLCERT",
            ("sslcert", database.sslcert),
            &mut self.db_sslcert,
        )?;
        parts.read(
            "DB_SSLKEY",
            ("sslkey", database.sslkey),
            &mut self.db_sslkey,
        )?;
        self.options = database.options;
        self.unenforced = url.unenforced;
        self.at_the_start = Some(url.database);
        Ok(())
    }

    /// Derives the TLS mode from the authorities to trust, as libpq does, and refuses authorities
    /// that would not be used.
    fn check_roots(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        let roots = self.db_sslrootcert.as_ref();
        let by_name = roots.is_some_and(Certificates::are_the_systems);
        let implied = match self.db_sslmode {
            // Every public authority is trusted, so the name must be verified, too.
            _ if by_name && sources.is_default("DB_SSLMODE") => {
                Some((PgSslMode::VerifyFull, "verify-full"))
            }
            PgSslMode::Require if roots.is_some() && !by_name => {
                Some((PgSslMode::VerifyCa, "verify-ca"))
            }
            _ => None,
        };
        if let Some((mode, shown)) = implied {
            self.db_sslmode = mode;
            sources.note("DB_SSLMODE", shown, "DB_SSLROOTCERT");
        }
        let expected = match self.db_sslmode {
            PgSslMode::VerifyFull => None,
            _ if by_name => Some("verify-full"),
            PgSslMode::VerifyCa => None,
            // The other modes accept any certificate, so the file would only look safe.
            _ if self.db_sslrootcert.is_some() => Some("require, verify-ca or verify-full"),
            _ => None,
        };
        if let Some(expected) = expected {
            return Err(invalid(format!(
                "DB_SSLROOTCERT has no effect while DB_SSLMODE is {}: expected {expected}",
                sources.shown("DB_SSLMODE"),
            )));
        }
        if by_name {
            self.db_sslrootcert = None;
        }
        Ok(())
    }
}
