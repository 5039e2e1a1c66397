//! Which certificates of `DB_SSLROOTCERT` a server's certificate may rest on.
//!
//! rustls trusts every certificate that it is given as a root. OpenSSL, and so psql, asks more of one, and what
//! psql refuses of the file's certificates is refused here. rustls alone judges the certificates
//! that the server sends, and the driver offers no way to add to that. It reads no key usage in
//! them, and does not enforce how many may follow an authority of the file (`pathLenConstraint`).
//! `SECURITY.md` lists what psql refuses and rustls accepts. This file opens no connection.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert};
use x509_cert::der::oid::db::rfc5280::ID_KP_SERVER_AUTH;
use x509_cert::der::{Decode as _, Header, Reader as _, SliceReader};
use x509_cert::ext::pkix::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, NameConstraints,
    SubjectKeyIdentifier,
};
use x509_cert::{Certificate, TbsCertificate};

/// Those certificates of a file in PEM that are of an authority for servers, are valid at `now`,
/// and were issued by themselves or, in steps, by such a one of the same file.
pub(super) fn roots(pem: &[u8], now: UnixTime) -> Vec<CertificateDer<'static>> {
    let given: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
    let mut authorities: Vec<_> = given
        .iter()
        .filter_map(|certificate| Authority::read(certificate, now))
        .collect();
    let mut roots: Vec<_> = authorities
        .extract_if(.., |authority| authority.is_named_by(authority))
        .collect();
    // Each round takes those whose issuer has been taken.
    loop {
        let taken: Vec<_> = authorities
            .extract_if(.., |authority| {
                let issuer = roots.iter().find(|root| root.vouches_for(authority));
                if let Some(issuer) = issuer {
                    authority.room = authority.room.min(issuer.room - 1);
                }
                issuer.is_some()
            })
            .collect();
        if taken.is_empty() {
            break;
        }
        roots.extend(taken);
    }
    roots
        .into_iter()
        .map(|authority| authority.certificate.clone().into_owned())
        .collect()
}

struct Authority<'a> {
    certificate: &'a CertificateDer<'a>,
    /// For its key, and because critical extensions that are not understood are refused with it.
    verifier: EndEntityCert<'a>,
    parsed: Certificate,
    /// What its issuer has signed.
    signed: &'a [u8],
    /// How many authorities may follow below.
    room: usize,
}

impl<'a> Authority<'a> {
    /// Nothing if the certificate says that it is not an authority for servers at `now`.
    fn read(certificate: &'a CertificateDer<'a>, now: UnixTime) -> Option<Self> {
        let parsed = Certificate::from_der(certificate).ok()?;
        let content = parsed.tbs_certificate();
        let (_, basic) = content.get_extension::<BasicConstraints>().ok()??;
        let usage = content.get_extension::<KeyUsage>().ok()?;
        let purposes = content.get_extension::<ExtendedKeyUsage>().ok()?;
        let fits = basic.ca
            && usage.is_none_or(|(_, usage)| usage.key_cert_sign())
            // OpenSSL does not take "any purpose" for this one.
            && purposes.is_none_or(|(_, purposes)| purposes.0.contains(&ID_KP_SERVER_AUTH))
            && is_valid(content, now);
        let mut reader = SliceReader::new(certificate).ok()?;
        Header::decode(&mut reader).ok()?;
        fits.then_some(Self {
            certificate,
            verifier: EndEntityCert::try_from(certificate).ok()?,
            signed: reader.tlv_bytes().ok()?,
            room: basic.path_len_constraint.map_or(usize::MAX, usize::from),
            parsed,
        })
    }

    /// Whether the other one names this one as its issuer, and no other key or certificate.
    fn is_named_by(&self, other: &Self) -> bool {
        let content = self.parsed.tbs_certificate();
        let Ok(key) = content.get_extension::<SubjectKeyIdentifier>() else {
            return false;
        };
        let named = other.parsed.tbs_certificate();
        let Ok(named) = named.get_extension::<AuthorityKeyIdentifier>() else {
            return false;
        };
        let (named_key, named_serial) = named.map_or((None, None), |(_, named)| {
            (named.key_identifier, named.authority_cert_serial_number)
        });
        other.verifier.issuer() == self.verifier.subject()
            && named_key.is_none_or(|named| key.is_none_or(|(_, key)| key.0 == named))
            && named_serial.is_none_or(|named| named == *content.serial_number())
    }

    /// Whether the other one is to be trusted for having been issued by this one. rustls would not
    /// see the names to which this one is limited, so one that is limited vouches for none.
    fn vouches_for(&self, other: &Self) -> bool {
        let content = self.parsed.tbs_certificate();
        let signature = other.parsed.signature().raw_bytes();
        self.room > 0
            && content
                .filter_extensions::<NameConstraints>()
                .next()
                .is_none()
            && self.is_named_by(other)
            && ALL_VERIFICATION_ALGS.iter().any(|algorithm| {
                let verified = self
                    .verifier
                    .verify_signature(*algorithm, other.signed, signature);
                verified.is_ok()
            })
    }
}

fn is_valid(content: &TbsCertificate, now: UnixTime) -> bool {
    let validity = content.validity();
    let seconds = |time: x509_cert::time::Time| time.to_unix_duration().as_secs();
    (seconds(validity.not_before)..=seconds(validity.not_after)).contains(&now.as_secs())
}
