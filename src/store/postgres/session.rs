//! How a session with Postgres is opened, and what its errors mean.
//!
//! It knows no statement.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgSeverity, PgSslMode};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::sync::Mutex;

use super::trust;
use crate::config::{Certificates, PostgresConfig, SslMode};
use crate::store::pool::Connect;
use crate::store::{Cause, Error};

/// Whoever is in the way of a migration or of a recount is waited for this long. It is well above
/// Postgres's `deadlock_timeout`, after which an autovacuum in the way is cancelled.
const UNHURRIED_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How to open a session. Everything that the promise of a visit stands on is pinned here, so
/// that no default of the server, the database or the role can weaken it.
#[derive(Debug, Clone)]
pub(super) struct Session {
    options: PgConnectOptions,
    roots: Option<Roots>,
    lock_timeout: Duration,
    statement_timeout: Duration,
    deadline: Duration,
}

impl Session {
    pub(super) fn new(config: &PostgresConfig) -> Self {
        let mut options = PgConnectOptions::new_without_pgpass()
            .host(&config.host)
            .port(config.port)
            .username(&config.user)
            // Without a password of ours sqlx would take one from the environment.
            .password(
                config
                    .password
                    .as_ref()
                    .map_or("", |password| password.expose()),
            )
            .database(&config.database)
            .ssl_mode(match config.ssl_mode {
                SslMode::Disable => PgSslMode::Disable,
                SslMode::Allow => PgSslMode::Allow,
                SslMode::Prefer => PgSslMode::Prefer,
                SslMode::Require => PgSslMode::Require,
                SslMode::VerifyCa => PgSslMode::VerifyCa,
                SslMode::VerifyFull => PgSslMode::VerifyFull,
            })
            .application_name("visitas")
            // Errors are logged once, where they are handled, and slow calls are a histogram.
            .disable_statement_logging();
        if config.host.starts_with('/') {
            options = options.socket(&config.host);
        }
        options = options.options([
            // Each statement of the recording function must see what the lock's last holder did.
            ("default_transaction_isolation", "read committed"),
            // A 200 means committed and flushed.
            ("synchronous_commit", "on"),
            ("search_path", "public"),
            ("TimeZone", "UTC"),
            // Compiling a statement of the recording function costs more than running it, and so
            // does planning it: left to choose, Postgres plans some of them at every call.
            ("jit", "off"),
            ("plan_cache_mode", "force_generic_plan"),
        ]);
        Self {
            options,
            roots: config.ssl_root_cert.clone().map(Roots::new),
            lock_timeout: config.lock_timeout(),
            statement_timeout: config.statement_timeout(),
            deadline: config.timeout,
        }
    }

    /// A session without a limit on how long a statement may run, for migrations and counting.
    pub(super) async fn open_unhurried(&self) -> Result<PgConnection, Error> {
        let timeouts = timeouts(UNHURRIED_LOCK_TIMEOUT, Duration::ZERO);
        tokio::time::timeout(self.deadline, self.connect(timeouts))
            .await
            .map_err(|_elapsed| Error::Timeout(self.deadline))?
    }

    async fn connect(&self, timeouts: [(&'static str, String); 2]) -> Result<PgConnection, Error> {
        let mut options = self.options.clone().options(timeouts);
        if let Some(roots) = &self.roots {
            options = options.ssl_root_cert_from_pem(roots.read().await?);
        }
        options.connect().await.map_err(connect_failure)
    }
}

/// The file of `DB_SSLROOTCERT`.
#[derive(Debug, Clone)]
struct Roots {
    file: PathBuf,
    /// Held while a thread reads, so that a file system that stands still takes no more than one.
    reading: Arc<Mutex<()>>,
}

impl Roots {
    fn new(file: PathBuf) -> Self {
        Self {
            file,
            reading: Arc::default(),
        }
    }

    /// Certificates to trust, in PEM, as the file holds them now: as with psql, an authority that
    /// was taken out of it is not trusted any longer, and without the file none is.
    async fn read(&self) -> Result<Vec<u8>, Error> {
        let reading = Arc::clone(&self.reading).lock_owned().await;
        let file = self.file.clone();
        let read = tokio::task::spawn_blocking(move || {
            let _reading = reading;
            trusted(&file).map_err(|why| format!("{} {why}", file.display()))
        });
        match read.await {
            Ok(Ok(pem)) => Ok(pem),
            Ok(Err(why)) => Err(Error::Connection(why.into())),
            Err(error) => Err(Error::Connection(error.into())),
        }
    }
}

fn trusted(file: &Path) -> Result<Vec<u8>, String> {
    // The driver adds those that it finds by itself to what it is given.
    if !rustls_native_certs::load_native_certs().certs.is_empty() {
        return Err("cannot replace the system's root certificates".to_owned());
    }
    let certificates = Certificates::read(file)?;
    let roots = trust::roots(&certificates.pem, UnixTime::now());
    if roots.is_empty() {
        return Err("holds no certificate of an authority that is valid now".to_owned());
    }
    Ok(Certificates::in_pem(&roots))
}

impl Connect for Session {
    type Connection = PgConnection;

    async fn open(&self) -> Result<PgConnection, Error> {
        self.connect(timeouts(self.lock_timeout, self.statement_timeout))
            .await
    }

    async fn ping(&self, connection: &mut PgConnection) -> Result<(), Error> {
        connection.ping().await.map_err(failure)
    }
}

/// The server gives up before the client does, so that a wait ends in a definite failure.
fn timeouts(lock: Duration, statement: Duration) -> [(&'static str, String); 2] {
    [
        ("lock_timeout", lock.as_millis().to_string()),
        ("statement_timeout", statement.as_millis().to_string()),
    ]
}

/// What a failed statement says about itself.
pub(super) fn failure(error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(answer) => {
            let answer = answer.downcast::<PgDatabaseError>();
            let code = answer.code().to_owned();
            let ended = matches!(answer.severity(), PgSeverity::Fatal | PgSeverity::Panic);
            let source = answer as Cause;
            if ended {
                Error::Ended { code, source }
            } else {
                Error::Refused { code, source }
            }
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
            Error::Connection(error.into())
        }
        _ => Error::Unexpected(error.into()),
    }
}

/// What a failed attempt to open a session says: nothing had been asked yet, so that whatever
/// the server answered is a refusal.
fn connect_failure(error: sqlx::Error) -> Error {
    match failure(error) {
        Error::Ended { code, source } => Error::Refused { code, source },
        other => other,
    }
}
