//! Selects the certificates of `DB_SSLROOTCERT` that rustls may trust.
//!
//! rustls trusts every certificate that it gets as a root. OpenSSL, and so psql, checks more, and
//! this file refuses the certificates of `DB_SSLROOTCERT` that psql refuses. Only rustls checks the
//! certificates that the server sends, and the driver offers no way to add checks. rustls reads no
//! key usage in them, and does not enforce the `pathLenConstraint` of an authority in the file.
//! `SECURITY.md` lists the certificates that psql refuses and rustls accepts. Must not know: how a
//! connection is opened.

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

/// The certificates in PEM that belong to an authority for servers, are valid at `now`, and are
/// self-issued or issued by another certificate that this returns.
pub(super) fn roots(pem: &[u8], now: UnixTime) -> Vec<CertificateDer<'static>> {
    let given: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
    let mut authorities: Vec<_> = given
        .iter()
        .filter_map(|certificate| Authority::read(certificate, now))
        .collect();
    let mut roots: Vec<_> = authorities
        .extract_if(.., |authority| authority.is_named_by(authority))
        .collect();
    // Each round takes the certificates whose issuer has been taken.
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
    /// Verifies signatures by its key. Its parser refuses unknown critical extensions.
    verifier: EndEntityCert<'a>,
    parsed: Certificate,
    /// The bytes that its issuer has signed.
    signed: &'a [u8],
    /// Maximum number of authorities below this one.
    room: usize,
}

impl<'a> Authority<'a> {
    /// `None` unless the certificate belongs to an authority for servers and is valid at `now`.
    fn read(certificate: &'a CertificateDer<'a>, now: UnixTime) -> Option<Self> {
        let parsed = Certificate::from_der(certificate).ok()?;
        let content = parsed.tbs_certificate();
        let (_, basic) = content.get_extension::<BasicConstraints>().ok()??;
        let usage = content.get_extension::<KeyUsage>().ok()?;
        let purposes = content.get_extension::<ExtendedKeyUsage>().ok()?;
        let fits = basic.ca
            && usage.is_none_or(|(_, usage)| usage.key_cert_sign())
            // Like OpenSSL, "any purpose" does not include this purpose.
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

    /// Whether `other` names this certificate as its issuer, and no other key or serial number.
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

    /// Whether `other` can be trusted because this authority has issued it. rustls would not see
    /// this authority's name constraints, so an authority with name constraints vouches for none.
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
