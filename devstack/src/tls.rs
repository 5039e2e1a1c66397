//! Certificates for local servers, from an authority whose key is discarded after signing.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::place::{self, Home};

/// PEM files in the folder of a server.
pub(crate) struct Files {
    pub(crate) ca: PathBuf,
    /// For `localhost` and 127.0.0.1.
    pub(crate) certificate: PathBuf,
    /// Only the servers' account can read the key; otherwise Postgres would not start.
    pub(crate) key: PathBuf,
}

impl Files {
    pub(crate) fn generate(home: &Home) -> Result<Self> {
        let mut authority = CertificateParams::default();
        authority
            .distinguished_name
            .push(DnType::CommonName, "devstack");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority_key = KeyPair::generate()?;
        let ca = authority.self_signed(&authority_key)?;
        let key = KeyPair::generate()?;
        let mut server = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        server
            .distinguished_name
            .push(DnType::CommonName, "localhost");
        let certificate = server.signed_by(&key, &Issuer::new(authority, authority_key))?;

        let files = Self {
            ca: home.path.join("ca.pem"),
            certificate: home.path.join("server.pem"),
            key: home.path.join("server.key"),
        };
        fs::write(&files.ca, ca.pem())?;
        fs::write(&files.certificate, certificate.pem())?;
        let _ = fs::remove_file(&files.key);
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&files.key)?;
        std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
        place::change_owner(&files.key)?;
        Ok(files)
    }
}
