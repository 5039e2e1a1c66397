//! Which certificates of `DB_SSLROOTCERT` a server's certificate may rest on.
//!
//! rustls trusts every certificate that it is given as a root. OpenSSL, and so psql, asks more of one, and what
//! psql refuses is not to be accepted here. This file opens no connection.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

/// Those certificates of a file in PEM that are of an authority, are valid at `now`, and lead by
/// their issuers' names to a certificate of the same file that is its own issuer.
pub(super) fn roots(pem: &[u8], now: UnixTime) -> Vec<CertificateDer<'static>> {
    let given: Vec<_> = CertificateDer::pem_slice_iter(pem).flatten().collect();
    let mut authorities: Vec<_> = given
        .iter()
        .filter_map(|certificate| Some((certificate, EndEntityCert::try_from(certificate).ok()?)))
        .filter(|(certificate, parsed)| is_authority(certificate, parsed, now))
        .collect();
    let mut roots = Vec::new();
    // Each round takes those whose issuer has been taken, as its own issuer is at once.
    loop {
        let subjects: Vec<_> = roots
            .iter()
            .map(|(_, root): &(_, EndEntityCert<'_>)| root.subject().to_owned())
            .collect();
        let taken = authorities.extract_if(.., |(_, authority)| {
            authority.issuer() == authority.subject()
                || subjects.iter().any(|subject| subject == authority.issuer())
        });
        let before = roots.len();
        roots.extend(taken);
        if roots.len() == before {
            break;
        }
    }
    roots
        .into_iter()
        .map(|(certificate, _)| certificate.clone().into_owned())
        .collect()
}

/// webpki does not say it directly. Asked to accept a certificate as a server's, it looks at the
/// time first, and then refuses an authority's for being one.
fn is_authority(
    certificate: &CertificateDer<'_>,
    parsed: &EndEntityCert<'_>,
    now: UnixTime,
) -> bool {
    let Ok(itself) = anchor_from_trusted_cert(certificate).map(|anchor| [anchor]) else {
        return false;
    };
    let verified = parsed.verify_for_usage(
        ALL_VERIFICATION_ALGS,
        &itself,
        &[],
        now,
        KeyUsage::server_auth(),
        None,
        None,
    );
    matches!(verified, Err(webpki::Error::CaUsedAsEndEntity))
}
