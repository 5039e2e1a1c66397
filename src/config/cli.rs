//! The command line: commands, a flag for every setting that is no secret, and the help.
//!
//! Knows no setting by name: flags and help are made from the table. The environment is left
//! alone; clap would take an empty variable for a value.

use std::ffi::OsString;
use std::fmt::Write as _;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Command, value_parser};

use super::setting::{About, Fallback, all};
use super::source::{ConfigError, displayed};
use super::{REVISION, VERSION};

pub(super) const SERVE: &str = "serve";
pub(super) const MIGRATE: &str = "migrate";
pub(super) const HEALTHCHECK: &str = "healthcheck";
pub(super) const RECONCILE: &str = "reconcile";
pub(super) const RECOUNT: &str = "recount";
pub(super) const CONFIG: &str = "config";
/// The one flag that is no setting.
pub(super) const URL: &str = "url";

/// What a command line amounts to.
pub(super) enum Parsed {
    /// Text to print: the help or the version.
    Print(String),
    /// A command, and the flags that were given.
    Run(String, ArgMatches),
}

/// Reads a command line, the program's own name first.
pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Parsed, ConfigError> {
    let mut matches = match command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => {
            return match error.kind() {
                ErrorKind::DisplayHelp => Ok(Parsed::Print(error.render().to_string())),
                ErrorKind::DisplayVersion => {
                    Ok(Parsed::Print(format!("visitas {VERSION} ({REVISION})\n")))
                }
                _ => Err(in_one_line(&error)),
            };
        }
    };
    // Flags are global, so the subcommand's matches have those before it, too.
    Ok(match matches.remove_subcommand() {
        Some((name, matches)) => Parsed::Run(name, matches),
        None => Parsed::Run(SERVE.to_owned(), matches),
    })
}

fn command() -> Command {
    let mut secrets = String::new();
    let mut flags = Vec::new();
    for (about, accepts) in all() {
        if !about.secret {
            flags.push(
                Arg::new(about.variable)
                    .long(about.flag())
                    .value_name(about.value_name)
                    .value_parser(value_parser!(OsString))
                    .help(help(about, &accepts))
                    .help_heading(about.heading)
                    .hide_default_value(true)
                    .global(true),
            );
            continue;
        }
        if secrets.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(secrets, "{}:", about.heading);
        }
        let (variable, help) = (about.variable, help(about, &accepts));
        let _ = write!(secrets, "  {variable}\n          {help}\n\n");
    }
    let url = Arg::new(URL)
        .long(URL)
        .value_name("URL")
        .value_parser(value_parser!(OsString))
        .help("What to ask [default: /health at BIND_ADDR, on this host]");
    Command::new("visitas")
        .about("Counts visits, in Postgres and in Redis, and serves the count over HTTP.")
        .version(VERSION)
        .propagate_version(true)
        .after_help(format!(
            "{secrets}A flag wins over its variable, and an empty variable counts as unset."
        ))
        .args(flags)
        .subcommand(Command::new(SERVE).about("Serve; what runs without a command"))
        .subcommand(Command::new(MIGRATE).about("Bring the database's tables up to date"))
        .subcommand(
            Command::new(HEALTHCHECK)
                .about("Ask a running service for its health: exit 0 or 1")
                .arg(url),
        )
        .subcommand(Command::new(RECONCILE).about("Add what Redis lacks of Postgres's count"))
        .subcommand(Command::new(RECOUNT).about("Count the rows anew, locking them meanwhile"))
        .subcommand(Command::new(CONFIG).about("Print the effective settings, secrets masked"))
        .disable_help_subcommand(true)
        .next_line_help(true)
        .max_term_width(100)
}

fn help(about: &About, accepts: &str) -> String {
    let (help, variable) = (about.help.trim(), about.variable);
    let fallback = match about.fallback {
        Fallback::Value(text) | Fallback::Absent(text) => text,
    };
    format!("{help} Takes {accepts}. [env: {variable}] [default: {fallback}]")
}

/// Clap's errors span several lines and may repeat what was typed: a URL with its password, say.
fn in_one_line(error: &clap::Error) -> ConfigError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    let argument = text(ContextKind::InvalidArg);
    if let Some(about) = argument.and_then(secret_with_flag) {
        return ConfigError::new(&format!(
            "--{} does not exist: {} is a secret; expected by environment or in a file",
            about.flag(),
            about.variable
        ));
    }
    let what = match error.kind() {
        ErrorKind::UnknownArgument => "unknown argument",
        ErrorKind::InvalidSubcommand => "unknown command",
        ErrorKind::ArgumentConflict => "given more than once:",
        ErrorKind::InvalidValue => "needs a value:",
        _ => "not understood:",
    };
    let culprit = argument
        .or_else(|| text(ContextKind::InvalidSubcommand))
        .map_or_else(String::new, |culprit| format!(" {}", displayed(culprit)));
    let suggestion = text(ContextKind::SuggestedArg)
        .or_else(|| text(ContextKind::SuggestedSubcommand))
        .map_or_else(String::new, |suggestion| {
            format!("; did you mean {suggestion}?")
        });
    ConfigError::new(&format!("{what}{culprit}{suggestion}; see visitas --help"))
}

fn secret_with_flag(argument: &str) -> Option<&'static About> {
    let flag = argument.strip_prefix("--")?.split('=').next()?;
    all()
        .into_iter()
        .map(|(about, _)| about)
        .find(|about| about.secret && about.flag() == flag)
}
