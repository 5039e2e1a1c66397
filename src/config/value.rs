//! Reads each kind of value from its text, and has the types of secrets, certificates and keys.
//!
//! No error from here repeats a value, which can be a misplaced password. Must not know: any
//! setting.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::builder::{PossibleValue, TypedValueParser};
use percent_encoding::percent_decode_str;
use rustix::fs::{Mode, OFlags};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// A value parser, with the description of accepted values that errors, `--help` and
/// `docs/settings.md` show.
#[derive(Clone)]
pub(super) struct Accept<T> {
    accepted: String,
    read: Arc<Read<T>>,
    mistake: Option<Mistake>,
}

/// A frequent mistake, which an error explains.
#[derive(Clone)]
struct Mistake {
    is_made: fn(&str) -> bool,
    explanation: &'static str,
}

type Read<T> = dyn Fn(&str) -> Option<T> + Send + Sync;

impl<T> Accept<T> {
    /// Reads a text.
    ///
    /// # Errors
    /// A description of accepted values, without the text.
    pub(super) fn read(&self, text: &str) -> Result<T, String> {
        (self.read)(text).ok_or_else(|| {
            let mistake = self.mistake.iter().find(|mistake| (mistake.is_made)(text));
            let explained = mistake.map(|mistake| format!("{}; ", mistake.explanation));
            format!(
                "{}expected {}",
                explained.unwrap_or_default(),
                self.accepted
            )
        })
    }
}

/// Accepts every text that `read` can read; `accepted` follows the word "expected" in an error.
pub(super) fn accept<T>(
    accepted: impl Into<String>,
    read: impl Fn(&str) -> Option<T> + Send + Sync + 'static,
) -> Accept<T> {
    Accept {
        accepted: accepted.into(),
        read: Arc::new(read),
        mistake: None,
    }
}

/// Accepts values from `low` to `high`, both included. Both are written as a user would write them.
pub(super) fn within<T: PartialOrd + 'static>(
    read: fn(&str) -> Option<T>,
    low: &'static str,
    high: &'static str,
) -> Accept<T> {
    accept(format!("{low} to {high}"), move |text| {
        read(text)
            .filter(|value| Some(value) >= read(low).as_ref() && Some(value) <= read(high).as_ref())
    })
}

/// Accepts one of these words in upper or lower case, as OpenTelemetry requires.
pub(super) fn one_of<T: Copy + Send + Sync>(words: &'static [(&'static str, T)]) -> Accept<T> {
    let accepted: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    accept(accepted.join(", "), |text| {
        let mut words = words.iter();
        words.find_map(|(word, value)| word.eq_ignore_ascii_case(text).then_some(*value))
    })
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Accept<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        let accept = self.clone();
        let parser = move |text: &str| accept.read(text);
        parser.parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(std::iter::once(PossibleValue::new(
            self.accepted.clone(),
        ))))
    }
}

/// Reads a value by its type's `FromStr`.
pub(super) fn parsed<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// Accepts durations from `low` to `high`, both included.
pub(super) fn durations(low: &'static str, high: &'static str) -> Accept<Duration> {
    Accept {
        mistake: Some(Mistake {
            is_made: |text| text.bytes().all(|byte| byte.is_ascii_digit()),
            explanation: "lacks a unit (ms, s, m or h)",
        }),
        ..within(duration, low, high)
    }
}

/// Accepts durations as OpenTelemetry writes them, in milliseconds without a unit.
pub(super) fn milliseconds(low: &'static str, high: &'static str) -> Accept<Duration> {
    Accept {
        mistake: Some(Mistake {
            is_made: |text| duration(text).is_some(),
            explanation: "has a unit: write milliseconds without one",
        }),
        ..within(|text| parsed(text).map(Duration::from_millis), low, high)
    }
}

/// Reads a duration of whole units. A number without a unit is refused, since its unit is a guess.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let number = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let milliseconds_per_unit = match &text[number.len()..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let milliseconds = number
        .parse::<u64>()
        .ok()?
        .checked_mul(milliseconds_per_unit)?;
    Some(Duration::from_millis(milliseconds))
}

/// Accepts a TCP port.
pub(super) fn port() -> Accept<u16> {
    within(parsed, "1", "65535")
}

/// Reads text of 1 to `max_bytes` bytes without control characters.
pub(super) fn text(text: &str, max_bytes: usize) -> Option<String> {
    let accepted = (1..=max_bytes).contains(&text.len()) && !text.contains(char::is_control);
    accepted.then(|| text.to_owned())
}

/// Reads a host name, or an IP address with or without brackets. Drops the brackets.
pub(super) fn host(text: &str) -> Option<String> {
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let is_name = (1..=253).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    (is_name || bare.parse::<IpAddr>().is_ok()).then(|| bare.to_owned())
}

/// Pairs of a key and a value.
pub(super) type Pairs = Vec<(String, String)>;

/// Reads `key=value,key=value`, percent-encoded, as in `OTEL_RESOURCE_ATTRIBUTES`.
pub(super) fn pairs(text: &str) -> Result<Pairs, String> {
    const ACCEPTED: &str = "expected key=value,key=value with other characters percent-encoded";
    let mut pairs: Pairs = Vec::new();
    for pair in text.split(',') {
        let (key, value) = pair.split_once('=').ok_or(ACCEPTED)?;
        let (key, value) = (percent_decoded(key.trim())?, percent_decoded(value.trim())?);
        if key.is_empty() || pairs.iter().any(|(earlier, _)| *earlier == key) {
            return Err(format!("contains a key twice or an empty one; {ACCEPTED}"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Decodes percent-encoded UTF-8. A stray `%` is an error, since the user meant `%25`.
pub(super) fn percent_decoded(text: &str) -> Result<String, String> {
    let stray = text.match_indices('%').any(|(at, _)| {
        let digits = text.as_bytes().get(at + 1..at + 3);
        !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    if stray {
        return Err("contains a stray '%'; encode it as %25".to_owned());
    }
    percent_decode_str(text)
        .decode_utf8()
        .map(String::from)
        .map_err(|_| "is not UTF-8 once percent-decoded".to_owned())
}

/// Text that no output contains: `Debug` writes `****`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Shown in place of a secret.
    pub(super) const MASK: &'static str = "****";

    /// The text itself, for the one call that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(Self::MASK)
    }
}

/// The user that logs in to a store, and the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials<User> {
    /// The role, or the user of Redis.
    pub user: User,
    /// The password, if there is one.
    pub password: Option<Secret>,
}

/// A secret's file, which is read again for each new session.
#[derive(Clone, Debug)]
pub(super) struct SecretFile {
    path: PathBuf,
    /// The secret that the file held at the start.
    pub(super) secret: Secret,
    /// Whether it can be read again: not if it is a pipe, and the next read would never end.
    is_regular: bool,
}

impl SecretFile {
    const MAX_BYTES: u64 = 16_384;

    fn read(path: &Path) -> Result<Self, String> {
        Self::new(path, true, read_bounded(path, Self::MAX_BYTES)?)
    }

    fn new(path: &Path, is_regular: bool, bytes: Vec<u8>) -> Result<Self, String> {
        let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8")?;
        let secret = text.trim_end_matches(['\r', '\n']);
        if secret.is_empty() {
            return Err("is empty".to_owned());
        }
        if !is_one_line(secret) {
            return Err("holds more than one line of text".to_owned());
        }
        Ok(Self {
            path: path.to_owned(),
            secret: secret.to_owned().into(),
            is_regular,
        })
    }

    /// The file, for errors; `None` if it is not read again.
    pub(super) fn read_from(&self) -> Option<&Path> {
        self.is_regular.then_some(&*self.path)
    }

    /// Reads the secret that the file holds now. Blocks.
    ///
    /// # Errors
    /// Why the file is refused, to follow the variable's name.
    pub(super) fn read_again(&self) -> Result<Secret, String> {
        if !self.is_regular {
            return Ok(self.secret.clone());
        }
        let now = Self::read(&self.path);
        now.map(|file| file.secret)
            .map_err(|why| format!("({}) {why}", self.path.display()))
    }
}

impl FromStr for SecretFile {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        let path = Path::new(path);
        at_the_start(path, |path| {
            let is_regular = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
            // A pipe waits for what is written into it, as in `<(command)`.
            let bytes = take_bounded(File::open(path), Self::MAX_BYTES)?;
            Self::new(path, is_regular, bytes)
        })
        .map_err(|why| format!("{why}; expected a file that holds a secret"))
    }
}

/// Lists the settings that have a file, with its path.
pub(super) fn listed<const N: usize>(files: [(&str, Option<&Path>); N]) -> String {
    let there = files
        .iter()
        .filter_map(|(setting, path)| path.map(|path| (setting, path)));
    let named = there.map(|(setting, path)| format!("{setting} ({})", path.display()));
    named.collect::<Vec<_>>().join(", ")
}

/// Whether a secret is one line of text.
pub(super) fn is_one_line(secret: &str) -> bool {
    !secret.contains(['\0', '\r', '\n'])
}

/// Certificates to trust.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificates {
    /// The file that holds them.
    pub path: PathBuf,
    /// The file's contents, in PEM.
    pub pem: Vec<u8>,
}

impl Certificates {
    const MAX_BYTES: u64 = 4 << 20;
    /// Names the system's certificates, as in libpq's `sslrootcert=system`.
    const SYSTEM: &str = "system";

    /// Whether these are the system's certificates, by name.
    pub(super) fn are_the_systems(&self) -> bool {
        self.path == Path::new(Self::SYSTEM)
    }

    /// Reads a file in PEM with at least one certificate.
    ///
    /// # Errors
    /// Why the file is refused, to follow its name.
    pub fn read(path: &Path) -> Result<Self, String> {
        let pem = read_bounded(path, Self::MAX_BYTES)?;
        let mut certificates = CertificateDer::pem_slice_iter(&pem).peekable();
        if certificates.peek().is_none() {
            return Err("holds no certificate".to_owned());
        }
        if certificates.any(|certificate| certificate.is_err()) {
            return Err("holds a certificate that is not PEM".to_owned());
        }
        Ok(Self {
            path: path.to_owned(),
            pem,
        })
    }

    /// Writes certificates in PEM (RFC 7468).
    #[must_use]
    pub fn in_pem(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
        let write = |certificate| {
            let text = STANDARD.encode(certificate);
            format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
        };
        let pem: String = certificates.iter().map(write).collect();
        pem.into_bytes()
    }
}

impl FromStr for Certificates {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        if path == Self::SYSTEM {
            return Ok(Self {
                path: path.into(),
                pem: Vec::new(),
            });
        }
        at_the_start(Path::new(path), Self::read)
            .map_err(|why| format!("{why}; expected a PEM file with at least one certificate"))
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Certificates({})", self.path.display())
    }
}

/// The private key of a client certificate. No output contains it.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey {
    path: PathBuf,
    pem: Vec<u8>,
}

impl PrivateKey {
    const MAX_BYTES: u64 = 64 << 10;

    fn read(path: &Path) -> Result<Self, String> {
        let pem = read_bounded(path, Self::MAX_BYTES)?;
        PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|_| "holds no private key in PEM, or an encrypted one")?;
        Ok(Self {
            path: path.to_owned(),
            pem,
        })
    }

    /// The key in PEM, for the one call that needs it.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.pem
    }
}

impl FromStr for PrivateKey {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        at_the_start(Path::new(path), Self::read)
            .map_err(|why| format!("{why}; expected a PEM file with an unencrypted private key"))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PrivateKey({})", self.path.display())
    }
}

/// A client certificate, which a store can ask for, and its key.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate, followed by those of its issuers.
    pub certificates: Certificates,
    /// The certificate's key.
    pub key: PrivateKey,
}

impl Identity {
    /// Puts a certificate and its key together.
    ///
    /// # Errors
    /// Why they do not fit, without a noun before it.
    pub(super) fn new(certificates: Certificates, key: PrivateKey) -> Result<Self, String> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificates.pem).collect();
        let (Ok(chain), Ok(own)) = (chain, PrivateKeyDer::from_pem_slice(&key.pem)) else {
            return Err("are not PEM".to_owned());
        };
        match CertifiedKey::from_der(chain, own, &ring::default_provider()) {
            Ok(_) => Ok(Self { certificates, key }),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err("do not belong together: the key is that of another certificate".to_owned())
            }
            Err(error) => Err(format!("cannot be used: {error}")),
        }
    }

    /// The files of the certificate and of the key.
    pub(super) fn read_from(&self) -> [&Path; 2] {
        [&self.certificates.path, &self.key.path]
    }

    /// Reads both files as they are now. Blocks.
    ///
    /// # Errors
    /// Why a file is refused, with its path.
    pub(super) fn read_again(&self) -> Result<Self, String> {
        let at = |path: &Path, why| format!("{} {why}", path.display());
        let (path, key) = (&self.certificates.path, &self.key.path);
        let certificates = Certificates::read(path).map_err(|why| at(path, why))?;
        let key = PrivateKey::read(key).map_err(|why| at(key, why))?;
        Self::new(certificates, key).map_err(|why| {
            let (path, key) = (path.display(), self.key.path.display());
            format!("{path} and {key} {why}")
        })
    }
}

/// Reads a file on a thread of its own, so that a pipe into which nothing is written, or a file
/// system that hangs, ends in an error.
fn at_the_start<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce(&Path) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    const TIMEOUT: Duration = Duration::from_secs(5);
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || sender.send(read(&path)));
    receiver.recv_timeout(TIMEOUT).unwrap_or_else(|_| {
        Err(format!(
            "could not be read within {TIMEOUT:?}: a pipe into which nothing is written, or a file \
             system that hangs"
        ))
    })
}

/// Reads a regular file of at most `max_bytes` bytes. Opening a pipe does not wait for its writer.
fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>, String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let is_regular = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
    if file.as_ref().is_ok_and(|file| !is_regular(file)) {
        return Err("is not a regular file".to_owned());
    }
    take_bounded(file.map_err(io::Error::from), max_bytes)
}

/// Reads at most `max_bytes` bytes. The error names the user, since the usual cause is a file that
/// only another user may read.
fn take_bounded(file: io::Result<File>, max_bytes: u64) -> Result<Vec<u8>, String> {
    let read = |file: File| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.take(max_bytes + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let mut bytes = file.and_then(read).map_err(|error| {
        let uid = rustix::process::geteuid().as_raw();
        format!("cannot be read by uid {uid}: {error}")
    })?;
    if bytes.len() as u64 > max_bytes {
        return Err(format!("is larger than {max_bytes} bytes"));
    }
    // Editors on Windows begin a file with a byte order mark, which no terminal shows.
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}
