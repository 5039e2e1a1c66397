//! The settings and the command line. Only this folder reads the environment.
//!
//! A setting is one field of a struct in this folder. The field's name gives the variable and the
//! flag their names; its doc comment is the help; a field with `hide` is a secret, which has no
//! flag and is never shown. clap reads them. Each struct's `finish` does what clap cannot: it reads
//! the settings that a URL or a file contains, and refuses contradictions.
//!
//! Every setting is read and checked before the command runs. A command reads only the settings
//! that it uses: `healthcheck` works while a database setting is wrong. This folder opens no
//! connection, binds no address and starts no logging.

#![expect(
    clippy::doc_markdown,
    reason = "the doc comments of settings are the help, which is not Markdown"
)]

mod database_url;
mod http;
mod page;
mod parameters;
mod postgres;
mod redis;
mod redis_url;
mod roots;
mod sources;
mod telemetry;
#[cfg(test)]
mod tests;
mod url;
mod value;

use std::ffi::OsString;

use anyhow::Context as _;
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, FromArgMatches as _, Subcommand};

pub use self::http::{HealthcheckConfig, HttpConfig, ListenConfig, ShutdownConfig, VisitConfig};
pub use self::page::PageConfig;
pub use self::parameters::Unenforced;
pub use self::postgres::PostgresConfig;
pub use self::redis::RedisConfig;
use self::roots::Environment;
use self::sources::{Sources, invalid, variable_of};
pub use self::telemetry::{
    Compression, ExporterConfig, LogConfig, LogFormat, Root, Sampler, TelemetryConfig, TracesConfig,
};
pub use self::value::{Certificates, Credentials, Identity, PrivateKey, Secret};

/// The program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The git revision that the program was built from.
pub const REVISION: &str = match option_env!("VISITAS_REVISION") {
    Some(revision) if !revision.is_empty() => revision,
    _ => "unknown",
};

/// The command to run, with the settings that it uses.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the service (the default)
    Serve(Box<Config>),
    /// Bring the database to this version
    Migrate(Box<DatabaseConfig>),
    /// Ask a running service whether it records visits: exit status 0 or 1
    Healthcheck(HealthcheckConfig),
    /// Add to Redis what it lacks of the total, under the count's lock
    Reconcile(Box<StoresConfig>),
    /// Recount the rows; visits wait until it finishes
    Recount(Box<DatabaseConfig>),
    /// Print the effective settings, secrets masked
    Config(Box<Config>),
}

/// The settings of a command that uses the database.
#[derive(Args, Clone, Debug)]
pub struct DatabaseConfig {
    /// The database.
    #[command(flatten)]
    pub postgres: PostgresConfig,
    /// Logs.
    #[command(flatten)]
    pub log: LogConfig,
}

/// The settings of a command that uses both stores.
#[derive(Args, Clone, Debug)]
pub struct StoresConfig {
    /// The database.
    #[command(flatten)]
    pub postgres: PostgresConfig,
    /// The cache.
    #[command(flatten)]
    pub redis: RedisConfig,
    /// Logs.
    #[command(flatten)]
    pub log: LogConfig,
}

/// Every setting of the service.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Config {
    /// The database.
    #[command(flatten)]
    pub postgres: PostgresConfig,
    /// The cache.
    #[command(flatten)]
    pub redis: RedisConfig,
    /// Listening and connections.
    #[command(flatten)]
    pub http: HttpConfig,
    /// Recording of visits.
    #[command(flatten)]
    pub visit: VisitConfig,
    /// Stopping.
    #[command(flatten)]
    pub shutdown: ShutdownConfig,
    /// The page.
    #[command(flatten)]
    pub page: PageConfig,
    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryConfig,
    /// The text that `visitas config` prints.
    #[arg(skip)]
    pub listing: String,
}

impl Command {
    fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        match self {
            Self::Serve(config) | Self::Config(config) => config.finish(sources),
            Self::Migrate(config) | Self::Recount(config) => config.postgres.finish(sources),
            Self::Reconcile(config) => {
                finish_stores(&mut config.postgres, &mut config.redis, sources)
            }
            Self::Healthcheck(config) => config.finish(sources),
        }
    }

    /// The parameters of URLs that ask for something that the command does not do.
    #[must_use]
    pub fn unenforced(&self) -> Vec<Unenforced> {
        let (postgres, redis) = match self {
            Self::Serve(config) | Self::Config(config) => (&config.postgres, Some(&config.redis)),
            Self::Migrate(config) | Self::Recount(config) => (&config.postgres, None),
            Self::Reconcile(config) => (&config.postgres, Some(&config.redis)),
            Self::Healthcheck(_) => return Vec::new(),
        };
        let of_redis = redis.iter().flat_map(|redis| &redis.unenforced);
        postgres
            .unenforced
            .iter()
            .chain(of_redis)
            .cloned()
            .collect()
    }

    /// The settings of the database, if the command opens sessions with it.
    fn postgres(&self) -> Option<&PostgresConfig> {
        match self {
            Self::Serve(config) => Some(&config.postgres),
            Self::Migrate(config) | Self::Recount(config) => Some(&config.postgres),
            Self::Reconcile(config) => Some(&config.postgres),
            Self::Healthcheck(_) | Self::Config(_) => None,
        }
    }
}

impl Config {
    fn finish(&mut self, sources: &mut Sources<'_>) -> Result<(), clap::Error> {
        finish_stores(&mut self.postgres, &mut self.redis, sources)?;
        self.http.finish(sources)?;
        // A visit waits for one call to each store, one after the other.
        let calls = self.postgres.db_timeout + self.redis.redis_timeout;
        if self.visit.visit_timeout < calls {
            return Err(invalid(format!(
                "VISIT_TIMEOUT ({}) must be at least DB_TIMEOUT + REDIS_TIMEOUT ({calls:?})",
                sources.shown("VISIT_TIMEOUT"),
            )));
        }
        self.telemetry.finish(sources)?;
        self.listing = sources.listing(&Self::augment_args(clap::Command::default()));
        Ok(())
    }
}

/// A Redis call must end before Postgres gives up a lock: `reconcile` waits for the calls in flight
/// while it holds one.
fn finish_stores(
    postgres: &mut PostgresConfig,
    redis: &mut RedisConfig,
    sources: &mut Sources<'_>,
) -> Result<(), clap::Error> {
    postgres.finish(sources)?;
    redis.finish(sources)?;
    if redis.redis_timeout >= postgres.lock_timeout() {
        return Err(invalid(format!(
            "REDIS_TIMEOUT ({}) must be below {:?} (70 % of DB_TIMEOUT, {})",
            sources.shown("REDIS_TIMEOUT"),
            postgres.lock_timeout(),
            sources.shown("DB_TIMEOUT"),
        )));
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "only this function and clap read the environment"
)]
fn process_environment(variable: &str) -> Option<OsString> {
    std::env::var_os(variable)
}

/// Reads this process's command line and environment.
///
/// # Errors
///
/// The first setting that is malformed, out of range or contradictory; or a text to print, the help
/// or the version. The error knows its exit status.
pub fn from_process() -> Result<Command, clap::Error> {
    parse(std::env::args_os(), &process_environment)
}

/// Hides the system's root certificates from a command that has `DB_SSLROOTCERT`. This can execute
/// the program again, so it must be called before anything is started.
///
/// # Errors
///
/// If the program cannot be executed.
pub fn trust_no_other(command: &Command) -> anyhow::Result<()> {
    let roots = command
        .postgres()
        .and_then(|postgres| postgres.db_sslrootcert.as_ref());
    if roots.is_none() {
        return Ok(());
    }
    roots::hide(&process_environment)
        .context("keeping the system's root certificates from Postgres, as DB_SSLROOTCERT asks")
}

/// Reads a command line, whose first item is the program's name, and the variables of
/// `environment`.
fn parse(
    arguments: impl IntoIterator<Item = OsString>,
    environment: Environment<'_>,
) -> Result<Command, clap::Error> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut program = program();
    match arguments.get(1).and_then(|first| first.to_str()) {
        Some("-h" | "--help" | "-V" | "--version") => program = with_every_setting(program),
        Some(first) if !first.starts_with('-') => {}
        // clap reads the variables of a command and of its parents. If the service's settings were
        // the program's own, they would be read for every command.
        _ => arguments.insert(1, "serve".into()),
    }
    // A command's help also names the variables that are empty.
    let asks_for_help = |argument: &OsString| argument == "-h" || argument == "--help";
    if !arguments.iter().any(asks_for_help) {
        program = program.mut_subcommands(|command| without_empty(command, environment));
    }
    let command = arguments
        .get(1)
        .and_then(|name| program.find_subcommand(name))
        .cloned()
        .unwrap_or_default();
    for variable in command.get_arguments().filter_map(Arg::get_env) {
        let variable = variable.to_string_lossy();
        if environment(&variable).is_some_and(|value| value.to_str().is_none()) {
            return Err(invalid(format!("{variable} is not UTF-8: expected text")));
        }
    }
    let mut matches = program.try_get_matches_from(arguments).map_err(masked)?;
    let mut run = Command::from_arg_matches(&matches)?;
    if let Some((_, matches)) = matches.remove_subcommand() {
        refuse_secret_flags(&command, &matches)?;
        run.finish(&mut Sources::new(matches, environment))?;
    }
    Ok(run)
}

/// The command line, with the commands and their settings.
fn program() -> clap::Command {
    let program = clap::Command::new("visitas")
        .version(format!("{VERSION} ({REVISION})"))
        .propagate_version(true)
        .disable_help_subcommand(true)
        .next_line_help(true)
        .max_term_width(100);
    Command::augment_subcommands(program)
        .about("Counts visits, in Postgres and in Redis, and serves the count over HTTP")
        .mut_subcommands(|command| documented(command).display_name("visitas"))
}

/// The program with each setting as a flag of its own, as its help shows it.
fn with_every_setting(program: clap::Command) -> clap::Command {
    let about = program.get_about().cloned().unwrap_or_default();
    documented(Config::augment_args(program)).about(about)
}

/// Adds to the help of a command which values each setting accepts, and the secrets, which have no
/// flag.
fn documented(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|argument| {
        let help = argument.get_help().cloned().unwrap_or_default();
        let accepted = argument.get_possible_values();
        let argument = argument.hide_env_values(true).hide_possible_values(true);
        match accepted.first() {
            Some(accepted) => argument.help(format!("{help} [accepts: {}]", accepted.get_name())),
            None => argument,
        }
    });
    let entry = |secret: &Arg| {
        let help = secret.get_help().cloned().unwrap_or_default();
        let variable = variable_of(secret);
        format!("  {variable}\n          {help} [env: {variable}]\n\n")
    };
    let entries: Vec<String> = secrets(&command).map(entry).collect();
    if entries.is_empty() {
        return command;
    }
    command.after_help(format!(
        "Secrets, by environment only:\n{}\
         A flag wins over its variable, and an empty variable counts as unset.",
        entries.concat()
    ))
}

/// The settings that have no flag and are never shown.
fn secrets(command: &clap::Command) -> impl Iterator<Item = &Arg> {
    let settings = command.get_arguments();
    settings.filter(|setting| setting.is_hide_set())
}

/// Hides empty variables from clap, which would take them for values. OpenTelemetry treats an empty
/// variable as unset, and Compose passes an unset optional variable on as an empty one.
fn without_empty(command: clap::Command, environment: Environment<'_>) -> clap::Command {
    command.mut_args(|argument| {
        let value = argument
            .get_env()
            .and_then(|variable| environment(&variable.to_string_lossy()));
        match value {
            Some(value) if !value.is_empty() => argument,
            _ => argument.env(Resettable::Reset),
        }
    })
}

/// Refuses a secret that was given by a flag, since other users can read a process's command line.
fn refuse_secret_flags(command: &clap::Command, matches: &ArgMatches) -> Result<(), clap::Error> {
    for secret in secrets(command) {
        if matches.value_source(secret.get_id().as_str()) == Some(ValueSource::CommandLine) {
            let variable = variable_of(secret);
            return Err(invalid(format!(
                "{variable} is a secret, and other users can read a command line: expected in the \
                 environment"
            )));
        }
    }
    Ok(())
}

/// Masks the text before an `@` wherever clap's error quotes the command line or the environment:
/// it can be the password of a URL that was set where a host or an address belongs.
fn masked(mut error: clap::Error) -> clap::Error {
    for kind in [
        ContextKind::InvalidArg,
        ContextKind::InvalidValue,
        ContextKind::InvalidSubcommand,
    ] {
        if let Some(ContextValue::String(text)) = error.get(kind) {
            let text = ContextValue::String(displayed(text));
            error.insert(kind, text);
        }
    }
    error
}

/// A text with everything before an `@` masked, escaped and cut to 100 characters.
fn displayed(text: &str) -> String {
    let text = match text.rsplit_once('@') {
        Some((_, after)) => format!("{}@{after}", Secret::MASK),
        None => text.to_owned(),
    };
    let mut characters = text.escape_debug();
    let mut shown: String = characters.by_ref().take(100).collect();
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}
