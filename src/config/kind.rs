//! The kinds of values: how the text of each is read, and what it accepts in words.
//!
//! A kind knows no variable and no other setting, and never repeats the text it was given.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use tracing_subscriber::EnvFilter;

use super::value::{Certificates, Secret};

/// Why a text is not accepted, where that is not plain from what is.
pub(super) type Rejection = Option<String>;

/// A kind of value.
pub(super) trait Kind {
    /// What a text is read into.
    type Value;
    /// Stands for the value in the help.
    const VALUE_NAME: &'static str;
    /// Whether the value is never shown.
    const SECRET: bool = false;

    /// What is accepted, to follow "expected".
    fn accepts(&self) -> String;

    /// Reads a text.
    fn parse(&self, text: &str) -> Result<Self::Value, Rejection>;

    /// The text as the `config` command shows it, where that is not the whole text or, of a secret,
    /// nothing at all.
    fn shown(&self, _value: &Self::Value) -> Option<String> {
        None
    }
}

#[derive(Debug)]
pub(super) struct Text {
    pub(super) max_bytes: usize,
}

impl Kind for Text {
    type Value = String;
    const VALUE_NAME: &'static str = "TEXT";

    fn accepts(&self) -> String {
        format!("1 to {} bytes without control characters", self.max_bytes)
    }

    fn parse(&self, text: &str) -> Result<String, Rejection> {
        accept_if(
            (1..=self.max_bytes).contains(&text.len()) && !text.contains(char::is_control),
            || text.to_owned(),
        )
    }
}

#[derive(Debug)]
pub(super) struct Password;

impl Kind for Password {
    type Value = Secret;
    const VALUE_NAME: &'static str = "TEXT";
    const SECRET: bool = true;

    fn accepts(&self) -> String {
        "one line of text".to_owned()
    }

    fn parse(&self, text: &str) -> Result<Secret, Rejection> {
        accept_if(
            !text.is_empty() && !text.contains(['\0', '\r', '\n']),
            || Secret::new(text),
        )
    }
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) sockets: bool,
}

impl Kind for Host {
    type Value = String;
    const VALUE_NAME: &'static str = "HOST";

    fn accepts(&self) -> String {
        let socket = if self.sockets {
            ", or the absolute path of a socket's directory"
        } else {
            ""
        };
        format!("one host name or IP address{socket}")
    }

    fn parse(&self, text: &str) -> Result<String, Rejection> {
        if text.starts_with('/') {
            return accept_if(self.sockets && !text.contains(char::is_control), || {
                text.to_owned()
            });
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
            .unwrap_or(text);
        let name = (1..=253).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
        accept_if(name || bare.parse::<IpAddr>().is_ok(), || bare.to_owned())
    }
}

#[derive(Debug)]
pub(super) struct Port;

impl Kind for Port {
    type Value = u16;
    const VALUE_NAME: &'static str = "PORT";

    fn accepts(&self) -> String {
        "a port from 1 to 65535".to_owned()
    }

    fn parse(&self, text: &str) -> Result<u16, Rejection> {
        in_range(text, 1..=u16::MAX)
    }
}

#[derive(Debug)]
pub(super) struct Address;

impl Kind for Address {
    type Value = SocketAddr;
    const VALUE_NAME: &'static str = "ADDRESS";

    fn accepts(&self) -> String {
        "an IP address and a port, such as 0.0.0.0:5000 or [::]:5000".to_owned()
    }

    fn parse(&self, text: &str) -> Result<SocketAddr, Rejection> {
        text.parse().map_err(|_| None)
    }
}

#[derive(Debug)]
pub(super) struct Count {
    pub(super) min: usize,
    pub(super) max: usize,
}

impl Kind for Count {
    type Value = usize;
    const VALUE_NAME: &'static str = "NUMBER";

    fn accepts(&self) -> String {
        format!("a number from {} to {}", self.min, self.max)
    }

    fn parse(&self, text: &str) -> Result<usize, Rejection> {
        in_range(text, self.min..=self.max)
    }
}

#[derive(Debug)]
pub(super) struct Ratio;

impl Kind for Ratio {
    type Value = f64;
    const VALUE_NAME: &'static str = "RATIO";

    fn accepts(&self) -> String {
        "a number from 0 to 1".to_owned()
    }

    fn parse(&self, text: &str) -> Result<f64, Rejection> {
        in_range(text, 0.0..=1.0)
    }
}

/// A duration of whole units. A bare number would leave its unit to be guessed.
#[derive(Debug)]
pub(super) struct Durations {
    pub(super) min: Duration,
    pub(super) max: Duration,
}

impl Kind for Durations {
    type Value = Duration;
    const VALUE_NAME: &'static str = "DURATION";

    fn accepts(&self) -> String {
        format!(
            "a duration from {} to {}, such as 250ms, 1s or 2m",
            in_words(self.min),
            in_words(self.max)
        )
    }

    fn parse(&self, text: &str) -> Result<Duration, Rejection> {
        let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
        let milliseconds_per_unit = match &text[digits.len()..] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(None),
        };
        let duration = digits
            .parse::<u64>()
            .map_err(|_| None)?
            .checked_mul(milliseconds_per_unit)
            .map(Duration::from_millis)
            .ok_or(None)?;
        accept_if((self.min..=self.max).contains(&duration), || duration)
    }
}

/// A duration as OpenTelemetry writes it.
#[derive(Debug)]
pub(super) struct Milliseconds {
    pub(super) max: u64,
}

impl Kind for Milliseconds {
    type Value = Duration;
    const VALUE_NAME: &'static str = "MILLISECONDS";

    fn accepts(&self) -> String {
        format!("a number of milliseconds from 1 to {}", self.max)
    }

    fn parse(&self, text: &str) -> Result<Duration, Rejection> {
        in_range(text, 1..=self.max).map(Duration::from_millis)
    }
}

/// One of a few words, in whatever case (OpenTelemetry asks for that).
#[derive(Debug)]
pub(super) struct Choice<T: 'static>(pub(super) &'static [(&'static str, T)]);

impl<T: Copy + PartialEq> Choice<T> {
    /// The word for a value.
    pub(super) fn word(&self, value: T) -> Option<&'static str> {
        self.0
            .iter()
            .find(|(_, candidate)| *candidate == value)
            .map(|(word, _)| *word)
    }
}

impl<T: Copy> Kind for Choice<T> {
    type Value = T;
    const VALUE_NAME: &'static str = "WORD";

    fn accepts(&self) -> String {
        let words: Vec<&str> = self.0.iter().map(|(word, _)| *word).collect();
        match words.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => words.concat(),
        }
    }

    fn parse(&self, text: &str) -> Result<T, Rejection> {
        self.0
            .iter()
            .find(|(word, _)| word.eq_ignore_ascii_case(text))
            .map(|(_, value)| *value)
            .ok_or(None)
    }
}

/// A list of words, as in `OTEL_PROPAGATORS`: whether W3C's trace context is among them.
#[derive(Debug)]
pub(super) struct Propagators;

impl Kind for Propagators {
    type Value = bool;
    const VALUE_NAME: &'static str = "WORDS";

    fn accepts(&self) -> String {
        "tracecontext, baggage, both with a comma between them, or none alone".to_owned()
    }

    fn parse(&self, text: &str) -> Result<bool, Rejection> {
        let mut words: Vec<_> = text
            .split(',')
            .map(|word| word.trim().to_ascii_lowercase())
            .collect();
        words.sort_unstable();
        words.dedup();
        let is_known = |word: &String| matches!(word.as_str(), "tracecontext" | "baggage");
        accept_if(words == ["none"] || words.iter().all(is_known), || {
            words.iter().any(|word| word == "tracecontext")
        })
    }
}

#[derive(Debug)]
pub(super) struct Filter;

impl Kind for Filter {
    type Value = String;
    const VALUE_NAME: &'static str = "DIRECTIVES";

    fn accepts(&self) -> String {
        "directives such as info or visitas=debug,warn".to_owned()
    }

    fn parse(&self, text: &str) -> Result<String, Rejection> {
        // With whitespace before a directive its parser miscounts, and may panic.
        let directives: Vec<&str> = text.split(',').map(str::trim).collect();
        let filter = directives.join(",");
        if filter.is_empty() || EnvFilter::try_new(&filter).is_err() {
            return Err(None);
        }
        Ok(filter)
    }
}

/// A file's path; whoever reads the file says whether it can be.
#[derive(Debug)]
pub(super) struct FilePath;

impl Kind for FilePath {
    type Value = PathBuf;
    const VALUE_NAME: &'static str = "FILE";

    fn accepts(&self) -> String {
        "a readable file that holds the secret, of at most 16384 bytes".to_owned()
    }

    fn parse(&self, text: &str) -> Result<PathBuf, Rejection> {
        accept_if(!text.is_empty(), || PathBuf::from(text))
    }
}

/// The text of a file that holds a secret, without the newline at its end.
pub(super) fn read_secret(path: &Path) -> Result<String, Rejection> {
    let bytes = read_bounded(path, 16_384).map_err(Some)?;
    let text = String::from_utf8(bytes).map_err(|_| Some("is not UTF-8".to_owned()))?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(Some("is empty".to_owned()));
    }
    Ok(secret.to_owned())
}

#[derive(Debug)]
pub(super) struct Pem;

impl Kind for Pem {
    type Value = Certificates;
    const VALUE_NAME: &'static str = "FILE";

    fn accepts(&self) -> String {
        "a readable PEM file with at least one certificate".to_owned()
    }

    fn parse(&self, text: &str) -> Result<Certificates, Rejection> {
        Certificates::read(Path::new(text)).map_err(Some)
    }
}

/// `key=value,key=value`, percent-encoded, as in `OTEL_RESOURCE_ATTRIBUTES`.
#[derive(Debug)]
pub(super) struct Pairs;

impl Kind for Pairs {
    type Value = Vec<(String, String)>;
    const VALUE_NAME: &'static str = "PAIRS";

    fn accepts(&self) -> String {
        "key=value,key=value with other characters percent-encoded".to_owned()
    }

    fn parse(&self, text: &str) -> Result<Self::Value, Rejection> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').ok_or(None)?;
            let (key, value) = (percent_decoded(key.trim())?, percent_decoded(value.trim())?);
            if key.is_empty() {
                return Err(None);
            }
            if pairs.iter().any(|(earlier, _)| *earlier == key) {
                return Err(Some("has a key twice".to_owned()));
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }
}

/// Pairs that are headers. They carry tokens, so they are secret.
#[derive(Debug)]
pub(super) struct Headers;

impl Kind for Headers {
    type Value = Vec<(String, Secret)>;
    const VALUE_NAME: &'static str = "PAIRS";
    const SECRET: bool = true;

    fn accepts(&self) -> String {
        "name=value,name=value with other characters percent-encoded".to_owned()
    }

    fn parse(&self, text: &str) -> Result<Self::Value, Rejection> {
        let headers = Pairs.parse(text)?;
        let valid = headers.iter().all(|(name, value)| {
            HeaderName::from_bytes(name.as_bytes()).is_ok() && HeaderValue::from_str(value).is_ok()
        });
        accept_if(valid, || {
            headers
                .into_iter()
                .map(|(name, value)| (name, Secret::new(value)))
                .collect()
        })
    }
}

/// Decodes percent-encoded UTF-8. A `%` that encodes nothing is an error: it was meant to be `%25`.
pub(super) fn percent_decoded(text: &str) -> Result<String, Rejection> {
    let stray = text.match_indices('%').any(|(at, _)| {
        let digits = text.as_bytes().get(at + 1..at + 3);
        !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    if stray {
        return Err(Some("has a % that encodes nothing (write %25)".to_owned()));
    }
    percent_decode_str(text)
        .decode_utf8()
        .map(String::from)
        .map_err(|_| Some("is not UTF-8 once decoded".to_owned()))
}

/// A duration as a setting would have it, in the largest unit that divides it.
pub(super) fn in_words(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        0 => "0s".to_owned(),
        _ if milliseconds.is_multiple_of(3_600_000) => format!("{}h", milliseconds / 3_600_000),
        _ if milliseconds.is_multiple_of(60_000) => format!("{}m", milliseconds / 60_000),
        _ if milliseconds.is_multiple_of(1_000) => format!("{}s", milliseconds / 1_000),
        _ => format!("{milliseconds}ms"),
    }
}

fn accept_if<T>(accepted: bool, value: impl FnOnce() -> T) -> Result<T, Rejection> {
    if accepted { Ok(value()) } else { Err(None) }
}

fn in_range<T: std::str::FromStr + PartialOrd>(
    text: &str,
    range: RangeInclusive<T>,
) -> Result<T, Rejection> {
    let number = text.parse().map_err(|_| None)?;
    if range.contains(&number) {
        Ok(number)
    } else {
        Err(None)
    }
}

/// Reads a file that someone else names: bounded, and with the user in the error, since the usual
/// cause is a file that only another user may read.
pub(super) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(max_bytes + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| {
        let uid = rustix::process::geteuid().as_raw();
        format!("cannot be read by uid {uid}: {error}")
    })?;
    if bytes.len() as u64 > max_bytes {
        return Err(format!("is larger than {max_bytes} bytes"));
    }
    Ok(bytes)
}
