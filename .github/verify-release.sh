#!/bin/sh
# Verifies that a released image is what this repository's release workflow built from the version's
# tag: its provenance and its list of contents (by gh), and its signature (by cosign). Prints the digest.
#
#   .github/verify-release.sh OWNER/REPOSITORY 0.1.0
#
# Needs cosign 3, and gh 2.67 that is logged in.
set -eu
if [ $# != 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
repository=$1 version=$2
image=ghcr.io/$(printf %s "$repository" | tr '[:upper:]' '[:lower:]')
# The workflow that signed, at the tag from which it built.
signer=https://github.com/$repository/.github/workflows/build.yml@refs/tags/v$version

attested() { # attested IMAGE PREDICATE: prints the digest that the attestation is about
    gh attestation verify "oci://$1" --predicate-type "$2" --repo "$repository" --cert-identity "$signer" \
        --deny-self-hosted-runners --format json --jq '.[0].verificationResult.statement.subject[0].digest.sha256'
}

# From here on all is about the same bytes, wherever the tag points by then.
digest=sha256:$(attested "$image:$version" https://slsa.dev/provenance/v1)
attested "$image@$digest" https://spdx.dev/Document/v2.3 >/dev/null
cosign verify "$image@$digest" --certificate-identity "$signer" \
    --certificate-oidc-issuer https://token.actions.githubusercontent.com >/dev/null
echo "$image@$digest is release $version: provenance, list of contents and signature verified"
