//! The effective value of each setting and its origin: clap, a file, a URL or another setting.
//! `visitas config` prints them.
//!
//! Must not know: any setting by name.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches};

use super::roots::Environment;
use super::value::{Certificates, Identity, PrivateKey, Secret, SecretFile, is_one_line};

/// The name of a setting's variable: its field's name in upper case.
pub(super) fn variable_of(setting: &Arg) -> String {
    setting.get_id().as_str().to_ascii_uppercase()
}

/// An error about a setting: it ends the program with exit status 2.
pub(super) fn invalid(message: impl fmt::Display) -> clap::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{message}\n"))
}

/// Shown for a setting that has no value.
const NONE: &str = "(none)";

/// Puts the client certificate of two settings together.
pub(super) fn identity(
    (certificate, certificates): (&str, Option<&Certificates>),
    (variable, key): (&str, Option<&PrivateKey>),
) -> Result<Option<Identity>, clap::Error> {
    match (certificates, key) {
        (None, None) => Ok(None),
        (Some(certificates), Some(key)) => Identity::new(certificates.clone(), key.clone())
            .map(Some)
            .map_err(|why| invalid(format!("{certificate} and {variable} {why}"))),
        _ => Err(invalid(format!(
            "{certificate} and {variable} are one client certificate: expected both or neither"
        ))),
    }
}

/// The value of each setting that a command uses, and its origin.
pub(super) struct Sources<'a> {
    pub(super) environment: Environment<'a>,
    matches: ArgMatches,
    /// Values that clap did not read, each with its origin.
    derived: BTreeMap<&'static str, (String, String)>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(matches: ArgMatches, environment: Environment<'a>) -> Self {
        Self {
            environment,
            matches,
            derived: BTreeMap::new(),
        }
    }

    /// The value of a variable that is not a setting. An empty variable counts as unset.
    pub(super) fn variable(&self, name: &str) -> Option<OsString> {
        (self.environment)(name).filter(|value| !value.is_empty())
    }

    /// Takes a secret from its file, if it has one, and checks that it is one line.
    pub(super) fn secret(
        &mut self,
        variable: &'static str,
        secret: &mut Option<Secret>,
        file: Option<&SecretFile>,
    ) -> Result<(), clap::Error> {
        if let Some(file) = file {
            *secret = Some(file.secret.clone());
            let origin = format!("{variable}_FILE");
            self.derived
                .insert(variable, (Secret::MASK.to_owned(), origin));
        }
        match secret {
            Some(secret) if !is_one_line(secret.expose()) => {
                Err(self.refuse(variable, "expected one line of text"))
            }
            _ => Ok(()),
        }
    }

    /// An error about a secret, without its value.
    pub(super) fn refuse(&self, variable: &str, why: &str) -> clap::Error {
        let (_, origin) = self.effective(variable);
        invalid(format!("{variable} (value hidden, from {origin}): {why}"))
    }

    /// Starts to take a URL apart. From here on the URL is shown as `masked`.
    pub(super) fn parts_of(&mut self, url: &'static str, masked: String) -> Parts<'_, 'a> {
        let (_, origin) = self.effective(url);
        self.derived.insert(url, (masked, origin));
        Parts { url, sources: self }
    }

    /// Notes that a setting got its value from another setting.
    pub(super) fn derive(&mut self, variable: &'static str, shown: &str, from: &'static str) {
        let (_, origin) = self.effective(from);
        self.derived.insert(variable, (shown.to_owned(), origin));
    }

    /// Notes that a setting has this value because of the setting `origin`.
    pub(super) fn note(&mut self, variable: &'static str, shown: &str, origin: &str) {
        let noted = (shown.to_owned(), origin.to_owned());
        self.derived.insert(variable, noted);
    }

    /// Whether a setting has its default.
    pub(super) fn is_default(&self, variable: &str) -> bool {
        self.effective(variable).1 == "default"
    }

    /// The value of a setting, as a user would write it.
    pub(super) fn shown(&self, variable: &str) -> String {
        self.effective(variable).0
    }

    /// The value of a setting, as a user would write it, and where it comes from.
    fn effective(&self, variable: &str) -> (String, String) {
        if let Some(derived) = self.derived.get(variable) {
            return derived.clone();
        }
        let id = variable.to_ascii_lowercase();
        let mut values = self.matches.get_raw(&id).into_iter().flatten();
        let value = values.next().map(|value| value.display().to_string());
        let origin = match self.matches.value_source(&id) {
            Some(ValueSource::EnvVariable) => "environment",
            Some(ValueSource::CommandLine) => "flag",
            _ => "default",
        };
        (value.unwrap_or_else(|| NONE.to_owned()), origin.to_owned())
    }

    /// The effective settings in the order of the help, a line each: `VARIABLE=value`, and where
    /// the value comes from. Secrets are masked.
    pub(super) fn listing(&self, settings: &clap::Command) -> String {
        let line = |setting: &Arg| {
            let variable = variable_of(setting);
            // OpenTelemetry's variables for traces and spans take the place of general ones.
            let general = variable
                .replace("OTLP_TRACES_", "OTLP_")
                .replace("OTEL_SPAN_", "OTEL_");
            let (mut shown, mut origin) = self.effective(&variable);
            if shown == NONE {
                (shown, origin) = self.effective(&general);
            }
            // A derived value is masked already.
            let is_raw = shown != NONE && !self.derived.contains_key(&*variable);
            if setting.is_hide_set() && is_raw {
                Secret::MASK.clone_into(&mut shown);
            }
            let setting = format!("{variable}={}", shown.replace(char::is_control, "\u{fffd}"));
            format!("{setting:<60} # {origin}\n")
        };
        settings.get_arguments().map(line).collect()
    }
}

/// The parts of a store's URL, each of which sets a setting.
pub(super) struct Parts<'s, 'a> {
    url: &'static str,
    sources: &'s mut Sources<'a>,
}

impl Parts<'_, '_> {
    /// Sets a setting from its part, if the URL has that part.
    pub(super) fn set<T: ToString>(
        &mut self,
        variable: &'static str,
        part: Option<T>,
        field: &mut T,
    ) {
        if let Some(part) = part {
            self.note(variable, &part.to_string());
            *field = part;
        }
    }

    /// Reads the file that a parameter names, if the URL has that parameter.
    pub(super) fn read<T: FromStr<Err = String>>(
        &mut self,
        variable: &'static str,
        (parameter, path): (&str, Option<String>),
        field: &mut Option<T>,
    ) -> Result<(), String> {
        let Some(path) = path else {
            return Ok(());
        };
        if field.is_some() {
            return Err(format!("has an {parameter}, which contradicts {variable}"));
        }
        let file = path.parse();
        *field = Some(file.map_err(|why| format!("has an {parameter} that {why}"))?);
        self.note(variable, &path);
        Ok(())
    }

    /// Notes that a setting got this value from the URL.
    pub(super) fn note(&mut self, variable: &'static str, shown: &str) {
        self.sources.note(variable, shown, self.url);
    }
}
