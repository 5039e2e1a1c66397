//! Where a setting's text comes from: a flag, the environment, a secret's file, a store's URL or
//! the default, and how an error names it.
//!
//! Knows no particular setting, save the driver's variables that have to be refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;

use clap::ArgMatches;

use super::kind::{FilePath, Kind, Rejection, read_secret};
use super::roots;
use super::setting::{About, Fallback, OBEYED_BY_THE_DRIVER, Setting, all};
use super::url::Parts;
use super::value::{Certificates, Secret};

/// A bad command line or setting, in one line that names it, its value unless that is secret, and
/// what is accepted.
#[derive(Debug, thiserror::Error)]
#[error("{line}")]
pub struct ConfigError {
    line: String,
}

impl ConfigError {
    /// The process's exit status.
    pub const EXIT_STATUS: u8 = 2;

    pub(super) fn new(line: &str) -> Self {
        // A value is escaped before it gets here; this holds the promise of one line for the rest.
        let line = line.replace(char::is_control, " ");
        Self { line }
    }
}

/// Reads settings one by one, and remembers them for the `config` command.
pub(super) struct Reader<'a> {
    flags: &'a ArgMatches,
    environment: &'a dyn Fn(&str) -> Option<OsString>,
    /// What files and URLs hold, by the variable that it stands for.
    unpacked: BTreeMap<&'static str, Given>,
    effective: BTreeMap<&'static str, Given>,
}

/// A setting's text and its origin.
#[derive(Clone)]
struct Given {
    text: String,
    origin: Origin,
}

#[derive(Clone, Copy)]
enum Origin {
    Default,
    Environment,
    Flag,
    /// The file that this variable names.
    File(&'static str),
    /// The URL in this variable.
    Url(&'static str),
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        flags: &'a ArgMatches,
        environment: &'a dyn Fn(&str) -> Option<OsString>,
    ) -> Self {
        Self {
            flags,
            environment,
            unpacked: BTreeMap::new(),
            effective: BTreeMap::new(),
        }
    }

    /// A setting that has a default.
    pub(super) fn required<K: Kind>(
        &mut self,
        setting: &'static Setting<K>,
    ) -> Result<K::Value, ConfigError> {
        self.optional(setting)?.ok_or_else(|| {
            let (variable, accepts) = (setting.about.variable, setting.kind.accepts());
            ConfigError::new(&format!("{variable} is not set: expected {accepts}"))
        })
    }

    /// A setting that may be left out.
    pub(super) fn optional<K: Kind>(
        &mut self,
        setting: &'static Setting<K>,
    ) -> Result<Option<K::Value>, ConfigError> {
        let about = &setting.about;
        let given = match (self.given(about)?, &about.fallback) {
            (Some(given), _) => given,
            (None, Fallback::Value(text)) => Given {
                text: (*text).to_owned(),
                origin: Origin::Default,
            },
            (None, Fallback::Absent(_)) => return Ok(None),
        };
        let value = setting
            .kind
            .parse(&given.text)
            .map_err(|rejection| rejected(setting, &given, rejection))?;
        let text = match setting.kind.shown(&value) {
            Some(shown) => shown,
            None if about.secret => Secret::MASK.to_owned(),
            None => given.text,
        };
        self.settle(about, text, given.origin);
        Ok(Some(value))
    }

    /// A setting that takes the place of a more general one.
    pub(super) fn specific<K: Kind>(
        &mut self,
        specific: &'static Setting<K>,
        general: &'static Setting<K>,
    ) -> Result<Option<K::Value>, ConfigError> {
        let value = self.optional(general)?;
        if let Some(value) = self.optional(specific)? {
            return Ok(Some(value));
        }
        if let Some(given) = self.effective.get(general.about.variable).cloned() {
            self.settle(&specific.about, given.text, given.origin);
        }
        Ok(value)
    }

    /// A secret, given by its variable or in a file.
    pub(super) fn secret<K: Kind>(
        &mut self,
        setting: &'static Setting<K>,
        file: &'static Setting<FilePath>,
    ) -> Result<Option<K::Value>, ConfigError> {
        if let Some(path) = self.optional(file)? {
            self.refuse_together(&file.about, &[&setting.about])?;
            let text = read_secret(&path).map_err(|rejection| {
                let given = Given {
                    text: path.to_string_lossy().into_owned(),
                    origin: self.origin(&file.about),
                };
                rejected(file, &given, rejection)
            })?;
            let origin = Origin::File(file.about.variable);
            self.unpacked
                .insert(setting.about.variable, Given { text, origin });
        }
        self.optional(setting)
    }

    /// Takes the parts of a URL for the settings that they stand for.
    pub(super) fn unpack(&mut self, url: &'static About, parts: Parts) {
        let origin = Origin::Url(url.variable);
        self.unpacked.extend(
            parts
                .into_iter()
                .map(|(about, text)| (about.variable, Given { text, origin })),
        );
    }

    /// Fails if one of `others` is given as well.
    pub(super) fn refuse_together(
        &self,
        about: &'static About,
        others: &[&'static About],
    ) -> Result<(), ConfigError> {
        for other in others {
            if let Some(given) = self.given(other)? {
                return Err(ConfigError::new(&format!(
                    "{}: contradicts {}; expected only one of the two",
                    named(other, &given),
                    about.variable,
                )));
            }
        }
        Ok(())
    }

    /// Fails if a variable is set that the Postgres driver would obey behind these settings' back.
    /// The value stays unsaid: it may be a private key.
    pub(super) fn refuse_driver_variables(&self) -> Result<(), ConfigError> {
        for (variable, remedy) in OBEYED_BY_THE_DRIVER {
            if self.variable(variable)?.is_some() {
                return Err(ConfigError::new(&format!(
                    "{variable} is set, and the Postgres driver would obey it: {remedy}"
                )));
            }
        }
        Ok(())
    }

    /// The system's root certificates, for a client that does not find them by itself.
    pub(super) fn system_roots(&self) -> Option<Certificates> {
        roots::handed_on(self.environment)
    }

    /// Names a setting that was read, with its value, for an error about several.
    pub(super) fn name(&self, about: &'static About) -> String {
        match self.effective.get(about.variable) {
            Some(given) => named(about, given),
            None => about.variable.to_owned(),
        }
    }

    /// Whether a setting that was read has its default.
    pub(super) fn is_default(&self, about: &'static About) -> bool {
        matches!(self.origin(about), Origin::Default)
    }

    /// Records what a setting that was left out amounts to, given another (or the same, if nothing
    /// but the surroundings decides).
    pub(super) fn derive(&mut self, about: &'static About, text: &str, from: &'static About) {
        self.settle(about, text.to_owned(), self.origin(from));
    }

    /// The effective settings in the order of the help, a line each: `VARIABLE=value`, and where
    /// the value comes from. Secrets are masked.
    pub(super) fn listing(&self) -> String {
        let mut listing = String::new();
        for (about, _) in all() {
            let (text, origin) = match self.effective.get(about.variable) {
                Some(given) => (&*given.text, given.origin),
                None => ("(none)", Origin::Default),
            };
            let text = text.replace(char::is_control, "\u{fffd}");
            let setting = format!("{}={text}", about.variable);
            let origin = match origin {
                Origin::Default => "default",
                Origin::Environment => "environment",
                Origin::Flag => "flag",
                Origin::File(variable) | Origin::Url(variable) => variable,
            };
            // Writing to a String cannot fail.
            let _ = writeln!(listing, "{setting:<60} # {origin}");
        }
        listing
    }

    fn settle(&mut self, about: &'static About, text: String, origin: Origin) {
        self.effective
            .insert(about.variable, Given { text, origin });
    }

    fn origin(&self, about: &'static About) -> Origin {
        self.effective
            .get(about.variable)
            .map_or(Origin::Default, |given| given.origin)
    }

    /// The text of a setting, unless it is left to its default.
    fn given(&self, about: &'static About) -> Result<Option<Given>, ConfigError> {
        // A secret has no flag, which is an error here and means the same as an absent one.
        let flag = self.flags.try_get_one::<OsString>(about.variable);
        if let Ok(Some(text)) = flag {
            let text = text
                .clone()
                .into_string()
                .map_err(|_| not_unicode(&format!("--{} ({})", about.flag(), about.variable)))?;
            let origin = Origin::Flag;
            return Ok(Some(Given { text, origin }));
        }
        if let Some(text) = self.variable(about.variable)? {
            let origin = Origin::Environment;
            return Ok(Some(Given { text, origin }));
        }
        Ok(self.unpacked.get(about.variable).cloned())
    }

    /// A variable's value. An empty one counts as unset: OpenTelemetry says so, and Compose passes
    /// an optional variable on as an empty one.
    fn variable(&self, variable: &str) -> Result<Option<String>, ConfigError> {
        match (self.environment)(variable) {
            Some(text) if !text.is_empty() => text
                .into_string()
                .map(Some)
                .map_err(|_| not_unicode(variable)),
            _ => Ok(None),
        }
    }
}

fn rejected<K: Kind>(
    setting: &'static Setting<K>,
    given: &Given,
    rejection: Rejection,
) -> ConfigError {
    let name = named(&setting.about, given);
    let why = rejection.map_or_else(String::new, |why| format!("{why}; "));
    let accepts = setting.kind.accepts();
    ConfigError::new(&format!("{name}: {why}expected {accepts}"))
}

fn not_unicode(name: &str) -> ConfigError {
    ConfigError::new(&format!("{name}: the value is not UTF-8; expected text"))
}

/// Names a setting the way it was given, with its value unless that is secret.
fn named(about: &About, given: &Given) -> String {
    let variable = about.variable;
    let value = displayed(&given.text);
    match given.origin {
        Origin::Url(url) => format!("{url}, its {variable} part (value hidden)"),
        Origin::File(file) => format!("{variable} from {file} (value hidden)"),
        _ if about.secret => format!("{variable} (value hidden)"),
        Origin::Flag => format!("--{}={value} ({variable})", about.flag()),
        Origin::Environment => format!("{variable}={value}"),
        Origin::Default => format!("{variable}={value} (default)"),
    }
}

/// A value, quoted, escaped and cut to a sensible length. What precedes an `@` is hidden: it is the
/// password of a URL that was given where a host or an address belongs.
pub(super) fn displayed(text: &str) -> String {
    let text = match text.rsplit_once('@') {
        Some((before, after)) => {
            // What has other characters is no scheme.
            let is_of_a_scheme = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
            let scheme = match before.find("://") {
                Some(at) if before[..at].bytes().all(is_of_a_scheme) => &before[..at + 3],
                _ => "",
            };
            format!("{scheme}{}@{after}", Secret::MASK)
        }
        None => text.to_owned(),
    };
    let mut characters = text.chars();
    let mut shown: String = characters.by_ref().take(100).collect();
    if characters.next().is_some() {
        shown.push('…');
    }
    format!("{shown:?}")
}
