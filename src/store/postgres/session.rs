//! Opens a session with Postgres, and checks whether it still works.
//!
//! Must not know: statements.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::pki_types::UnixTime;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, Row as _};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::error::{failure, is_about_a_certificate, tls_error};
use super::login::Login;
use super::{route, trust};
use crate::config::{Certificates, Credentials, Identity, PostgresConfig};
use crate::store::call::Operation;
use crate::store::error::Error;
use crate::store::files::{Files, unread};
use crate::store::pool::Connect;

/// How long a migration or a recount waits for a lock. It is well above Postgres's
/// `deadlock_timeout`, after which an autovacuum that holds the lock is cancelled.
const LONG_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The share of a call's timeout after which an attempt to open a session ends, so that its error,
/// which says what was tried, comes before the call's own.
const SHARE: f64 = 0.95;

/// How many times a new session is pinged at most to measure the round trip.
const ROUND_TRIPS: u32 = 5;
/// After this time no further ping follows.
const MEASURING: Duration = Duration::from_millis(20);

/// The first `server_version_num` that has `transaction_timeout`.
const HAS_TRANSACTION_TIMEOUT: u32 = 170_000;

static PING: Operation = Operation::command("PING");

/// The parameters of every session, apart from the timeouts.
const PINNED: [(&str, &str); 12] = [
    // Each statement of the recording function must see the changes of the lock's last holder.
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
    // Compiling or planning a statement of the recording function costs more than running it, and
    // by default Postgres plans some of them at every call.
    ("jit", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// A parameter of ours with a random value, which only a session that got all of this program's
/// parameters has. A pooler whose configuration holds the others for its sessions shares those with
/// clients that can change them.
const MARK: &str = "visitas.sessao";

/// Reads the settings that [`Session::verify`] checks, in their base units, and the mark.
macro_rules! settings {
    () => {
        "select name, setting from pg_catalog.pg_settings \
          where name in ('default_transaction_isolation', 'synchronous_commit', 'search_path', \
                'plan_cache_mode', 'lock_timeout', 'statement_timeout', 'transaction_timeout') \
         union all select 'visitas.sessao', coalesce(current_setting('visitas.sessao', true), '')"
    };
}
const SETTINGS: &str = settings!();
/// Turns `transaction_timeout` off first. An older server refuses a session that names it.
const SETTINGS_WITHOUT_TIMEOUT: &str = concat!(
    "select 'transaction_timeout', set_config('transaction_timeout', '0', false) union all ",
    settings!()
);

/// How to open a session. It sets every parameter that exact counting depends on, so that no
/// default of the server, the database or the role can weaken it.
#[derive(Debug, Clone)]
pub(super) struct Session {
    config: Arc<PostgresConfig>,
    options: PgConnectOptions,
    /// The value of [`MARK`].
    mark: String,
    files: Files,
    /// Looking up a name blocks, too.
    names: Files,
    /// In nanoseconds: the shortest that any new session has measured. The others can have waited
    /// for a processor.
    round_trip: Arc<AtomicU64>,
}

/// What the files of a session hold.
struct Contents {
    credentials: Credentials<String>,
    roots: Option<Vec<u8>>,
    identity: Option<Identity>,
}

impl Session {
    pub(super) fn new(config: &PostgresConfig) -> Self {
        let mut options = driver_options(config.options.as_deref())
            .host(&config.db_host)
            .port(config.db_port)
            .database(&config.db_name)
            .ssl_mode(config.db_sslmode)
            .application_name("visitas")
            // No number here is a fraction, and a pooler refuses the parameter.
            .extra_float_digits(None)
            // Errors are logged once, where they are handled, and slow calls are a histogram.
            .disable_statement_logging();
        if config.db_host.starts_with('/') {
            // As in libpq, a Unix socket is never encrypted.
            options = options.socket(&config.db_host).ssl_mode(PgSslMode::Disable);
        }
        let mark = RandomState::new().hash_one(MARK).to_string();
        options = options.options(PINNED).options([(MARK, &mark)]);
        Self {
            config: Arc::new(config.clone()),
            options,
            mark,
            files: Files::default(),
            names: Files::default(),
            round_trip: Arc::new(AtomicU64::new(u64::MAX)),
        }
    }

    /// How long a message and its reply take on the network.
    pub(super) fn round_trip(&self) -> Duration {
        Duration::from_nanos(self.round_trip.load(Ordering::Relaxed))
    }

    /// Opens a session without a statement timeout, for migrations and counting.
    pub(super) async fn open_long(&self) -> Result<PgConnection, Error> {
        self.open_with(LONG_LOCK_TIMEOUT, Duration::ZERO).await
    }

    async fn open_with(&self, lock: Duration, statement: Duration) -> Result<PgConnection, Error> {
        let timeout = self.config.db_timeout.mul_f64(SHARE);
        let deadline = Instant::now() + timeout;
        // Which role to try is known only now: a file can name another one than before.
        let Ok(contents) = timeout_at(deadline, self.read_files()).await else {
            let why = unread(&self.config.files());
            return Err(Error::NoSession(timeout, why.into()));
        };
        let contents = contents?;
        let login = self.login(&contents);

        let Ok(addresses) = timeout_at(deadline, self.look_up()).await else {
            let why = "the host name could not be looked up in time";
            return Err(login.timeout(timeout, why, "check the DNS"));
        };
        let addresses = addresses.map_err(|error| login.unknown_host(error))?;

        let mut options = self.with_timeouts(lock, statement);
        if statement.is_zero() {
            // Rows that a policy hides must not be missing from a count: the statement fails.
            options = options.options([("row_security", "off")]);
        }
        let options = with_contents(options, contents);
        // Before the deadline, so that the error names the addresses that are silent.
        let reached_by = deadline - timeout / 10;
        let connecting = Box::pin(async {
            let mut connection = self
                .connect(&options, &addresses, reached_by, &login)
                .await?;
            self.verify(&mut connection, lock, statement, &login)
                .await?;
            Ok(connection)
        });
        timeout_at(deadline, connecting).await.unwrap_or_else(|_| {
            let check = "check the network and firewalls, and whether the server hangs";
            Err(login.timeout(timeout, "no answer", check))
        })
    }

    fn login(&self, contents: &Contents) -> Login {
        let credentials = &contents.credentials;
        let config = &self.config;
        let (host, port) = (&config.db_host, config.db_port);
        let place = if host.starts_with('/') {
            format!("{host}/.s.PGSQL.{port}")
        } else if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        Login {
            place,
            database: config.db_name.clone(),
            user: credentials.user.clone(),
            mode: config.db_sslmode,
            password_setting: config.password_setting(),
            has_password: credentials.password.is_some(),
            has_certificate: contents.identity.is_some(),
        }
    }

    /// Reads what the files of the settings hold now. As with psql, an authority that was removed
    /// from its file is no longer trusted, and without the file none is.
    async fn read_files(&self) -> Result<Contents, Error> {
        let config = Arc::clone(&self.config);
        let read = move || {
            let roots = config.db_sslrootcert.as_ref().map(|roots| {
                let file = &roots.path;
                trusted(file).map_err(|why| format!("{} {why}", file.display()))
            });
            Ok(Contents {
                credentials: config.credentials()?,
                roots: roots.transpose()?,
                identity: config.identity()?,
            })
        };
        self.files.read(read).await
    }

    /// Looks up the addresses of the host; none if it has no name.
    async fn look_up(&self) -> Result<Vec<SocketAddr>, Error> {
        let (host, port) = (self.config.db_host.clone(), self.config.db_port);
        if host.starts_with('/') || host.parse::<IpAddr>().is_ok() {
            return Ok(Vec::new());
        }
        let look_up = move || {
            let addresses = (host, port).to_socket_addrs();
            let addresses = addresses.map_err(|error| error.to_string())?;
            Ok(addresses.collect())
        };
        self.names.read(look_up).await
    }

    fn with_timeouts(&self, lock: Duration, statement: Duration) -> PgConnectOptions {
        // The server times out before the client does, so that a wait ends in a definite failure.
        let milliseconds = |duration: Duration| duration.as_millis().to_string();
        self.options.clone().options([
            ("lock_timeout", milliseconds(lock)),
            ("statement_timeout", milliseconds(statement)),
            // A transaction is idle only while `reconcile` asks Redis.
            (
                "idle_in_transaction_session_timeout",
                milliseconds(self.config.db_timeout.saturating_mul(4)),
            ),
        ])
    }

    /// Opens a session, by a second attempt without TLS or with it where libpq makes one, too.
    async fn connect(
        &self,
        options: &PgConnectOptions,
        addresses: &[SocketAddr],
        reached_by: Instant,
        login: &Login,
    ) -> Result<PgConnection, Error> {
        let connect = async |options: &PgConnectOptions| {
            // A name with one address has no second way.
            if addresses.len() < 2 {
                return options.connect().await;
            }
            route::connect_to_any(options, addresses, reached_by).await
        };
        match connect(options).await {
            Ok(connection) => Ok(connection),
            Err(first) => {
                let Some(mode) = second_mode(options.get_ssl_mode(), &first) else {
                    return Err(login.failure(first, None));
                };
                connect(&options.clone().ssl_mode(mode))
                    .await
                    .map_err(|second| login.failure(first, Some(second)))
            }
        }
    }

    /// Checks that the session has the settings that exact counting and the promise depend on. A pooler
    /// can drop them, and a pooler or a login trigger can change them after the session has begun. A
    /// timeout that fires while a commit waits for its standby would make the commit visible, and even
    /// acknowledge it, before the standby has it.
    async fn verify(
        &self,
        connection: &mut PgConnection,
        lock: Duration,
        statement: Duration,
        login: &Login,
    ) -> Result<(), Error> {
        let settings = if connection.server_version_num() >= Some(HAS_TRANSACTION_TIMEOUT) {
            SETTINGS_WITHOUT_TIMEOUT
        } else {
            SETTINGS
        };
        let rows = sqlx::raw_sql(settings).fetch_all(connection).await;
        let settings = rows.and_then(|rows| {
            let settings = rows
                .iter()
                .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            settings.collect::<Result<Vec<(String, String)>, sqlx::Error>>()
        });
        let settings = settings.map_err(|error| login.failure(error, None))?;
        let milliseconds = |duration: Duration| duration.as_millis().to_string();
        let (lock, statement) = (milliseconds(lock), milliseconds(statement));
        let pinned = |name: &str| match name {
            "lock_timeout" => Some(&*lock),
            "statement_timeout" => Some(&*statement),
            "transaction_timeout" => Some("0"),
            MARK => Some(&*self.mark),
            _ => PINNED
                .iter()
                .find(|(pinned, _)| *pinned == name)
                .map(|(_, value)| *value),
        };
        let changed = settings.iter().filter_map(|(name, value)| {
            let pinned = pinned(name)?;
            (pinned != value).then(|| format!("{name} is {value:?} in place of {pinned:?}"))
        });
        let changed: Vec<_> = changed.collect();
        if changed.is_empty() {
            Ok(())
        } else {
            Err(login.without_settings(&changed.join(", ")))
        }
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

fn with_contents(options: PgConnectOptions, contents: Contents) -> PgConnectOptions {
    let Credentials { user, password } = contents.credentials;
    // Without a password sqlx would read one from the environment.
    let password = password.as_ref().map_or("", |password| password.expose());
    let mut options = options.username(&user).password(password);
    if let Some(roots) = contents.roots {
        options = options.ssl_root_cert_from_pem(roots);
    }
    if let Some(identity) = contents.identity {
        options = options
            .ssl_client_cert_from_pem(identity.certificates.pem)
            .ssl_client_key_from_pem(identity.key.expose());
    }
    options
}

/// How libpq tries once more after this failure, if it does. The driver alone never encrypts in the
/// mode `allow`, and always in the mode `prefer` if the server can.
fn second_mode(mode: PgSslMode, failure: &sqlx::Error) -> Option<PgSslMode> {
    let code = failure
        .as_database_error()
        .map(|refusal| refusal.code().unwrap_or_default());
    match mode {
        // A second attempt without TLS sends the password in the clear to a server that asks for
        // it, so only what can depend on encryption leads to one: a login that was refused (class
        // 28), a rule that the server's settings do not fit (class F0), a server or pooler that
        // breaks the protocol off (class 08), or TLS itself.
        PgSslMode::Prefer => {
            let is_refused = code.is_some_and(|code| {
                ["28", "F0", "08"]
                    .iter()
                    .any(|class| code.starts_with(class))
            });
            // libpq, too, sees a refusal of its certificate only after the handshake.
            let is_tls = tls_error(failure).is_some_and(|error| !is_about_a_certificate(error));
            (is_refused || is_tls).then_some(PgSslMode::Disable)
        }
        PgSslMode::Allow => code.is_some().then_some(PgSslMode::Prefer),
        _ => None,
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
        let (lock, statement) = (self.config.lock_timeout(), self.config.statement_timeout());
        let mut session = self.open_with(lock, statement).await?;
        let opened = Instant::now();
        for _ in 0..ROUND_TRIPS {
            let sent = Instant::now();
            Self::ping(&mut session).await?;
            let took = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.round_trip.fetch_min(took, Ordering::Relaxed);
            if opened.elapsed() > MEASURING {
                break;
            }
        }
        Ok(session)
    }

    async fn ping(connection: &mut PgConnection) -> Result<(), Error> {
        connection.ping().await.map_err(failure)
    }
}
