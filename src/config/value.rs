//! The types of values that are more than a number, a text or a duration.
//!
//! They know nothing of settings or of how they are written.

use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::kind::read_bounded;

/// Text that is never shown: `Debug` and `Display` write `****`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// What stands for a secret wherever it would be shown.
    pub(super) const MASK: &'static str = "****";

    /// Takes a text that is not to be shown from here on.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one call that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(Self::MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(Self::MASK)
    }
}

/// Certificates to trust.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificates {
    /// The file they were read from.
    pub path: PathBuf,
    /// The file's contents, in PEM.
    pub pem: Vec<u8>,
}

impl Certificates {
    const MAX_BYTES: u64 = 4 << 20;

    /// Reads a file in PEM with at least one certificate.
    ///
    /// # Errors
    /// Why that is not what it is, to follow the file's name.
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
}

impl Certificates {
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

impl fmt::Debug for Certificates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Certificates({})", self.path.display())
    }
}

/// Encryption of the connection to Postgres, as libpq has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never encrypted.
    Disable,
    /// Encrypted if the server insists.
    Allow,
    /// Encrypted if the server can.
    Prefer,
    /// Always encrypted, with whatever certificate.
    Require,
    /// … with a certificate by a trusted authority.
    VerifyCa,
    /// … that is also made out to the host's name.
    VerifyFull,
}

impl SslMode {
    /// Whether the server's certificate is verified, so that trusted ones matter.
    #[must_use]
    pub fn verifies(self) -> bool {
        matches!(self, Self::VerifyCa | Self::VerifyFull)
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// An object a line.
    Json,
    /// For people.
    Pretty,
}

/// Compression of what is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// RFC 1952.
    Gzip,
}

/// Which requests are traced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Whether a sampled or unsampled parent decides before `root` does.
    pub parent_based: bool,
    /// Decides when no parent does.
    pub root: Root,
}

/// The decision about a trace that starts here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Root {
    /// Every trace.
    AlwaysOn,
    /// No trace.
    AlwaysOff,
    /// This share of the traces, from 0 to 1, by trace id.
    Ratio(f64),
}
