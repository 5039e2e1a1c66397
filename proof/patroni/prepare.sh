#!/bin/sh
# Installs Patroni, in the versions that requirements.txt names, for the account of the servers:
#
#   proof/patroni/prepare.sh FOLDER
#
# What was installed from the same file is kept. If it cannot be installed, the last line of standard
# error says why, and the test is skipped.
set -eu
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")"

sources=$(cksum <requirements.txt)
if [ "$(cat "$folder/built" 2>/dev/null)" = "$sources" ]; then
    exit 0
fi
rm -rf "$folder/built" "$folder/venv"

# The system's, since another one can lie in a home that the servers' account cannot enter.
python=/usr/bin/python3
[ -x "$python" ] || python=python3
$python -m venv "$folder/venv" >&2 || {
    echo "$python has no venv" >&2
    exit 1
}
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check \
    --timeout 15 --retries 1 --require-hashes --requirement requirements.txt
"$folder/venv/bin/patroni" --version >&2
echo "$sources" >"$folder/built"
