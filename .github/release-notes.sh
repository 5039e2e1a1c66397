#!/bin/sh
# Prints the section of CHANGELOG.md about a version. Fails unless the version is that of the program
# and of the image's label, and has a section.
#
#   .github/release-notes.sh 0.1.0
set -eu
cd "$(dirname "$0")/.."
if [ $# != 1 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

fail() {
    echo "release: $*" >&2
    exit 1
}

grep -qFx "version = \"$1\"" Cargo.toml || fail "Cargo.toml has another version than $1"
grep -qF "org.opencontainers.image.version=\"$1\"" Dockerfile || fail "the label in Dockerfile has another version than $1"
notes=$(awk -v heading="## [$1]" '/^## / { inside = index($0, heading) == 1; next } inside' CHANGELOG.md)
[ -n "$notes" ] || fail "CHANGELOG.md has no section $1"
printf '%s\n' "$notes"
