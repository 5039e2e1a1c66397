//! Opens a session with Postgres, and checks whether it still works.
//!
//! Must not know: statements.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::sync::Mutex;
use url::Url;

use super::error::{connect_failure, failure};
use super::trust;
use crate::config::{Certificates, PostgresConfig};
use crate::store::call::Operation;
use crate::store::error::Error;
use crate::store::pool::Connect;

/// How long a migration or a recount waits for a lock. It is well above Postgres's
/// `deadlock_timeout`, after which an autovacuum that holds the lock is cancelled.
const LONG_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The first `server_version_num` that has `transaction_timeout`.
const HAS_TRANSACTION_TIMEOUT: u32 = 170_000;

static PING: Operation = Operation::command("PING");

/// How to open a session. It sets every parameter that exact counting depends on, so that no
/// default of the server, the database or the role can weaken it.
#[derive(Debug, Clone)]
pub(super) struct Session {
    options: PgConnectOptions,
    roots: Option<Roots>,
    lock_timeout: Duration,
    statement_timeout: Duration,
    timeout: Duration,
}

impl Session {
    pub(super) fn new(config: &PostgresConfig) -> Self {
        let mut options = driver_options(config.options.as_deref())
            .host(&config.db_host)
            .port(config.db_port)
            .username(&config.db_user)
            // Without a password sqlx would read one from the environment.
            .password(
                config
                    .db_password
                    .as_ref()
                    .map_or("", |password| password.expose()),
            )
            .database(&config.db_name)
            .ssl_mode(config.db_sslmode)
            .application_name("visitas")
            // Errors are logged once, where they are handled, and slow calls are a histogram.
            .disable_statement_logging();
        if config.db_host.starts_with('/') {
            options = options.socket(&config.db_host);
        }
        options = options.options([
            // Each statement of the recording function must see the changes of the lock's last
            // holder.
            ("default_transaction_isolation", "read committed"),
            // A 200 means committed and flushed.
            ("synchronous_commit", "on"),
            ("search_path", "public"),
            ("TimeZone", "UTC"),
            // Notices are for a person at a terminal.
            ("client_min_messages", "warning"),
            // An idle session is waiting for the next visit.
            ("idle_session_timeout", "0"),
            // A client whose host has failed must not keep its locks for hours.
            ("tcp_keepalives_idle", "5"),
            ("tcp_keepalives_interval", "5"),
            ("tcp_keepalives_count", "2"),
            ("tcp_user_timeout", "15000"),
            // Compiling or planning a statement of the recording function costs more than running
            // it, and by default Postgres plans some of them at every call.
            ("jit", "off"),
            ("plan_cache_mode", "force_generic_plan"),
        ]);
        Self {
            options,
            roots: config.db_sslrootcert.as_ref().map(Roots::new),
            lock_timeout: config.lock_timeout(),
            statement_timeout: config.statement_timeout(),
            timeout: config.db_timeout,
        }
    }

    /// Opens a session without a statement timeout, for migrations and counting.
    pub(super) async fn open_long(&self) -> Result<PgConnection, Error> {
        self.open_with(LONG_LOCK_TIMEOUT, Duration::ZERO).await
    }

    async fn open_with(&self, lock: Duration, statement: Duration) -> Result<PgConnection, Error> {
        // The server times out before the client does, so that a wait ends in a definite failure.
        let milliseconds = |duration: Duration| duration.as_millis().to_string();
        let mut options = self.options.clone().options([
            ("lock_timeout", milliseconds(lock)),
            ("statement_timeout", milliseconds(statement)),
            // A transaction is idle only while `reconcile` asks Redis.
            (
                "idle_in_transaction_session_timeout",
                milliseconds(self.timeout.saturating_mul(4)),
            ),
        ]);
        if let Some(roots) = &self.roots {
            options = options.ssl_root_cert_from_pem(roots.read().await?);
        }
        let mut connection = options.connect().await.map_err(connect_failure)?;
        if connection.server_version_num() >= Some(HAS_TRANSACTION_TIMEOUT) {
            // Not among the options above, since an older server refuses a session that names it.
            sqlx::query("set transaction_timeout = 0")
                .execute(&mut connection)
                .await
                .map_err(connect_failure)?;
        }
        Ok(connection)
    }
}

/// The driver's options, with command-line options for the server that precede this program's: the
/// last one of a name wins. The driver reads such options from a URL only.
fn driver_options(for_the_server: Option<&str>) -> PgConnectOptions {
    // With a password in the URL the driver looks for none in the user's files.
    const IGNORED: &str = "postgres://ignored:ignored@ignored";
    let url = for_the_server
        .and_then(|options| Url::parse_with_params(IGNORED, [("options", options)]).ok());
    url.and_then(|url| PgConnectOptions::from_url(&url).ok())
        .unwrap_or_else(PgConnectOptions::new_without_pgpass)
}

/// The file of `DB_SSLROOTCERT`.
#[derive(Debug, Clone)]
struct Roots {
    file: PathBuf,
    /// Held while a thread reads, so that a file system that hangs blocks one thread at most.
    reading: Arc<Mutex<()>>,
}

impl Roots {
    fn new(certificates: &Certificates) -> Self {
        Self {
            file: certificates.path.clone(),
            reading: Arc::default(),
        }
    }

    /// Reads the certificates to trust, in PEM, from the file as it is now. As with psql, an
    /// authority that was removed from the file is no longer trusted, and without the file none is.
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
    // The driver also trusts the certificates that it finds by itself.
    if !rustls_native_certs::load_native_certs().certs.is_empty() {
        return Err("cannot replace the system's root certificates".to_owned());
    }
    let certificates = Certificates::read(file)?;
    let roots = trust::roots(&certificates.pem, UnixTime::now());
    if roots.is_empty() {
        return Err("holds no complete authority for servers that is valid now".to_owned());
    }
    Ok(Certificates::in_pem(&roots))
}

impl Connect for Session {
    type Connection = PgConnection;

    const PING: &'static Operation = &PING;

    async fn open(&self) -> Result<PgConnection, Error> {
        self.open_with(self.lock_timeout, self.statement_timeout)
            .await
    }

    async fn ping(&self, connection: &mut PgConnection) -> Result<(), Error> {
        connection.ping().await.map_err(failure)
    }
}
