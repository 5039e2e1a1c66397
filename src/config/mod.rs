//! The settings and the command line: this is the only reader of the environment.
//!
//! Everything is read and checked before anything is done; the first thing that is wrong ends the
//! program with one line. A command reads the settings that it uses, and no others: `healthcheck`
//! works beside a broken database setting. This file opens no connection, binds no address and
//! starts no logging.
//!
//! `setting` is the table, `kind` and `url` read one value each, `source` knows where they come
//! from, `read` puts them together, and `cli` makes flags and help of the table. `roots` finds the
//! system's root certificates, and hides them from the Postgres driver.

mod cli;
mod kind;
mod read;
mod roots;
mod setting;
mod source;
#[cfg(test)]
mod tests;
mod url;
mod value;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use http::Uri;

use self::cli::Parsed;
pub use self::source::ConfigError;
use self::source::Reader;
pub use self::value::{Certificates, Compression, LogFormat, Root, Sampler, Secret, SslMode};

/// The program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The git revision that the program was built from.
pub const REVISION: &str = match option_env!("VISITAS_REVISION") {
    Some(revision) if !revision.is_empty() => revision,
    _ => "unknown",
};

/// What to run, with the settings that it needs.
#[derive(Clone, Debug)]
pub enum Command {
    /// Serve until stopped.
    Serve(Box<Config>),
    /// Bring the database's tables up to date.
    Migrate {
        /// Where they are.
        postgres: PostgresConfig,
        /// How to log meanwhile.
        log: LogConfig,
    },
    /// Ask a running service for its health.
    Healthcheck {
        /// What to ask: absolute, with the scheme `http`.
        url: Uri,
    },
    /// Add to Redis what it lacks of the count in Postgres.
    Reconcile {
        /// Where the count is.
        postgres: PostgresConfig,
        /// What is added to.
        redis: RedisConfig,
        /// How to log meanwhile.
        log: LogConfig,
    },
    /// Count the rows anew.
    Recount {
        /// Where they are.
        postgres: PostgresConfig,
        /// How to log meanwhile.
        log: LogConfig,
    },
    /// Print this text, which ends in a newline: the help, the version or the effective settings.
    Print(String),
}

/// Every setting of the service.
#[derive(Clone, Debug)]
pub struct Config {
    /// The database.
    pub postgres: PostgresConfig,
    /// The cache.
    pub redis: RedisConfig,
    /// Listening and connections.
    pub http: HttpConfig,
    /// Recording of visits.
    pub visit: VisitConfig,
    /// Stopping.
    pub shutdown: ShutdownConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

/// The database. `DATABASE_URL` stands for all fields but the timeout.
#[derive(Clone, Debug)]
pub struct PostgresConfig {
    /// `DB_HOST`: a name, an address without brackets, or the absolute path of a socket's directory.
    pub host: String,
    /// `DB_PORT`.
    pub port: u16,
    /// `DB_USER`.
    pub user: String,
    /// `DB_PASSWORD` or `DB_PASSWORD_FILE`.
    pub password: Option<Secret>,
    /// `DB_NAME`.
    pub database: String,
    /// `DB_SSLMODE`.
    pub ssl_mode: SslMode,
    /// `DB_SSLROOTCERT`; without it the system's roots hold. The file is read again for each session.
    pub ssl_root_cert: Option<PathBuf>,
    /// `DB_TIMEOUT`: the deadline of one call.
    pub timeout: Duration,
}

impl PostgresConfig {
    /// The server's `lock_timeout`, in whole milliseconds: 70 % of the call's deadline. A statement
    /// that still waits has then certainly failed, with time left to say so.
    #[must_use]
    pub fn lock_timeout(&self) -> Duration {
        self.percent_of_timeout(70)
    }

    /// The server's `statement_timeout`, in whole milliseconds: 85 % of the call's deadline, so that
    /// a lock's own timeout fires first and its error is the one that is seen.
    #[must_use]
    pub fn statement_timeout(&self) -> Duration {
        self.percent_of_timeout(85)
    }

    fn percent_of_timeout(&self, percent: u128) -> Duration {
        let milliseconds = self.timeout.as_millis().saturating_mul(percent) / 100;
        Duration::from_millis(u64::try_from(milliseconds).unwrap_or(u64::MAX))
    }
}

/// The cache. `REDIS_URL` stands for all fields but the certificates and the timeout.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `REDIS_HOST`: a name, or an address without brackets.
    pub host: String,
    /// `REDIS_PORT`.
    pub port: u16,
    /// Whether `REDIS_URL` is a `rediss://` one.
    pub tls: bool,
    /// The user in `REDIS_URL`.
    pub username: Option<String>,
    /// `REDIS_PASSWORD` or `REDIS_PASSWORD_FILE`.
    pub password: Option<Secret>,
    /// The database's number in `REDIS_URL`, otherwise 0.
    pub database: i64,
    /// `REDIS_TLS_CA`, or the system's roots where the driver does not find them; without it those
    /// hold that it finds.
    pub tls_ca: Option<Certificates>,
    /// `REDIS_TIMEOUT`: the deadline of one call, checkout included.
    pub timeout: Duration,
}

/// Listening and connections.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// `BIND_ADDR`; with port 0 the system chooses one.
    pub bind_addr: SocketAddr,
    /// `METRICS_ADDR`: if set, `/metrics` is served there and only there.
    pub metrics_addr: Option<SocketAddr>,
    /// `HTTP_MAX_CONNECTIONS`: connections open at a time; beyond it the one idle longest is closed.
    pub max_connections: usize,
    /// `HEADER_TIMEOUT`: to receive a request's headers, from their first byte.
    pub header_timeout: Duration,
    /// `IDLE_TIMEOUT`: how long a connection, a new one included, stays open without a request.
    pub idle_timeout: Duration,
}

/// Recording of visits.
#[derive(Clone, Debug)]
pub struct VisitConfig {
    /// `VISIT_TIMEOUT`: the deadline of one visit, its wait in the queue included.
    pub timeout: Duration,
    /// `QUEUE_CAPACITY`: visits that may wait to be recorded.
    pub queue_capacity: usize,
}

/// Stopping.
#[derive(Clone, Debug)]
pub struct ShutdownConfig {
    /// `SHUTDOWN_DELAY`: how long everything is still served; may be zero.
    pub delay: Duration,
    /// `SHUTDOWN_TIMEOUT`: how long the rest may take.
    pub timeout: Duration,
}

impl ShutdownConfig {
    /// The part of `timeout` that requests under way have. The rest is for what ends after them,
    /// each of which may stand still; what they leave of it is for the process itself.
    #[must_use]
    pub fn for_requests(&self) -> Duration {
        self.timeout.saturating_sub(self.rest())
    }

    /// The part for the last spans, whose collector can stall.
    #[must_use]
    pub fn for_spans(&self) -> Duration {
        self.rest() * 6 / 10
    }

    /// The part for tasks that cannot be cancelled, such as a name being looked up.
    #[must_use]
    pub fn for_tasks(&self) -> Duration {
        self.rest() / 20
    }

    /// The part for scrapers of `METRICS_ADDR`, whose listener ends last.
    #[must_use]
    pub fn for_scrapes(&self) -> Duration {
        self.rest() / 20
    }

    /// The part for the last lines of the log, whose reader can stall.
    #[must_use]
    pub fn for_log(&self) -> Duration {
        self.rest() * 2 / 10
    }

    fn rest(&self) -> Duration {
        (self.timeout / 5).min(Duration::from_secs(2))
    }
}

/// Logs and traces.
#[derive(Clone, Debug)]
pub struct TelemetryConfig {
    /// Logs.
    pub log: LogConfig,
    /// Traces; `None` if `OTEL_SDK_DISABLED` is true.
    pub traces: Option<TracesConfig>,
    /// Whether `OTEL_PROPAGATORS` has W3C's trace context. It holds without traces too: log lines
    /// have the caller's trace.
    pub trace_context: bool,
}

/// Logs.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// `LOG_FORMAT`.
    pub format: LogFormat,
    /// `RUST_LOG`: directives that `EnvFilter` accepts.
    pub filter: String,
    /// `ACCESS_SLOW`: requests that take longer have a line at level info.
    pub access_slow: Duration,
}

/// Traces.
#[derive(Clone, Debug)]
pub struct TracesConfig {
    /// `None` without an endpoint, or if `OTEL_TRACES_EXPORTER` is none.
    pub exporter: Option<ExporterConfig>,
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`.
    pub sampler: Sampler,
    /// `OTEL_SERVICE_NAME`, otherwise `service.name` of `OTEL_RESOURCE_ATTRIBUTES`.
    pub service_name: String,
    /// `OTEL_RESOURCE_ATTRIBUTES`, decoded, without `service.name`.
    pub resource_attributes: Vec<(String, String)>,
    /// `OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT`, otherwise `OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`: the
    /// most characters of an attribute's value.
    pub value_length_limit: usize,
    /// `OTEL_BSP_SCHEDULE_DELAY`: the pause between two exports.
    pub schedule_delay: Duration,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`: spans that may wait for export.
    pub max_queue_size: usize,
    /// `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`: spans of one export, at most the queue's size.
    pub max_export_batch_size: usize,
}

/// Where spans are exported to, by OTLP over HTTP. Each variable has a `TRACES_` one that wins.
#[derive(Clone, Debug)]
pub struct ExporterConfig {
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`, complete with `/v1/traces`.
    pub endpoint: String,
    /// `OTEL_EXPORTER_OTLP_HEADERS`: valid header names and values, decoded.
    pub headers: Vec<(String, Secret)>,
    /// `OTEL_EXPORTER_OTLP_TIMEOUT` or `OTEL_BSP_EXPORT_TIMEOUT`, whichever is shorter.
    pub timeout: Duration,
    /// `OTEL_EXPORTER_OTLP_COMPRESSION`.
    pub compression: Compression,
    /// The system's roots, where the exporter does not find them.
    pub roots: Option<Certificates>,
}

impl Command {
    /// The database that it opens sessions with.
    fn postgres(&self) -> Option<&PostgresConfig> {
        match self {
            Self::Serve(config) => Some(&config.postgres),
            Self::Migrate { postgres, .. }
            | Self::Reconcile { postgres, .. }
            | Self::Recount { postgres, .. } => Some(postgres),
            Self::Healthcheck { .. } | Self::Print(_) => None,
        }
    }
}

/// Reads this process's command line and environment.
///
/// # Errors
/// As [`parse`].
pub fn from_process() -> Result<Command, ConfigError> {
    parse(
        std::env::args_os(),
        &process_environment,
        std::io::stdout().is_terminal(),
    )
}

/// Sees to it that a command whose database has certificates of its own to trust trusts no others.
/// For that the program may be executed again, so this must be called before anything is started.
///
/// # Errors
/// If the program cannot be executed.
pub fn trust_no_other(command: &Command) -> anyhow::Result<()> {
    let roots = command
        .postgres()
        .and_then(|postgres| postgres.ssl_root_cert.as_ref());
    if roots.is_none() {
        return Ok(());
    }
    roots::hide(&process_environment)
        .context("keeping the system's root certificates from Postgres, as DB_SSLROOTCERT asks")
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that reads it"
)]
fn process_environment(variable: &str) -> Option<OsString> {
    std::env::var_os(variable)
}

/// Reads a command line, whose first item is the program's name, and an environment. `terminal`
/// says whether the logs go to one, which decides how they are written unless a setting does.
///
/// # Errors
/// The first thing that is malformed, out of range or contradictory.
pub fn parse(
    arguments: impl IntoIterator<Item = OsString>,
    environment: &dyn Fn(&str) -> Option<OsString>,
    terminal: bool,
) -> Result<Command, ConfigError> {
    let (command, flags) = match cli::parse(arguments)? {
        Parsed::Print(text) => return Ok(Command::Print(text)),
        Parsed::Run(command, flags) => (command, flags),
    };
    let reader = &mut Reader::new(&flags, environment);
    Ok(match command.as_str() {
        cli::HEALTHCHECK => Command::Healthcheck {
            url: match flags.get_one::<OsString>(cli::URL) {
                Some(url) => read::healthcheck_url(&url.to_string_lossy())?,
                None => read::own_health(reader)?,
            },
        },
        cli::MIGRATE => Command::Migrate {
            postgres: read::postgres(reader)?,
            log: read::log(reader, terminal)?,
        },
        cli::RECONCILE => {
            let (postgres, redis) = read::stores(reader)?;
            let log = read::log(reader, terminal)?;
            Command::Reconcile {
                postgres,
                redis,
                log,
            }
        }
        cli::RECOUNT => Command::Recount {
            postgres: read::postgres(reader)?,
            log: read::log(reader, terminal)?,
        },
        cli::CONFIG => {
            read::service(reader, terminal)?;
            Command::Print(reader.listing())
        }
        _ => Command::Serve(Box::new(read::service(reader, terminal)?)),
    })
}
