#!/bin/sh
# Builds a peer of this folder, with the versions that its lock file names:
#
#   bench/peers/prepare.sh fastapi|fastify|flask|go FOLDER
#
# Everything goes to FOLDER, caches included; what was built from the same files is kept. If it cannot
# be built, the last line of standard error says why, and the bench skips the peer.
set -eu
peer=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
cd "$(dirname "$0")/$peer"

fail() {
    echo "$1" >&2
    exit 1
}

need() {
    command -v "$1" >/dev/null 2>&1 || fail "$1 is not installed"
}

sources=$(cat ./* | cksum)
if [ "$(cat "$folder/built" 2>/dev/null)" = "$sources" ]; then
    exit 0
fi
rm -f "$folder/built"

case $peer in
fastapi | flask)
    need python3
    python3 -m venv --clear "$folder/venv" >&2 || fail "python3 has no venv"
    "$folder/venv/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check \
        --timeout 15 --retries 1 --require-hashes --requirement requirements.txt
    PYTHONDONTWRITEBYTECODE=1 WEB_CONCURRENCY=1 DB_SESSIONS=1 REDIS_HOST=localhost REDIS_PORT=1 \
        "$folder/venv/bin/python" -c 'import app' ||
        fail "python3 cannot run app.py"
    ;;
fastify)
    need node
    need npm
    cp app.js package.json package-lock.json "$folder"
    cd "$folder"
    npm ci --silent --ignore-scripts --no-audit --no-fund --cache "$folder/cache" >&2 ||
        fail "npm cannot install what package-lock.json names"
    node --input-type=module -e 'import "fastify"; import "ioredis"; import "postgres"' ||
        fail "node cannot run app.js"
    ;;
go)
    need go
    # Files of modules are read-only by default, and `make clean` could not remove them.
    GOFLAGS='-modcacherw -mod=readonly' GOTOOLCHAIN=local GOPATH=$folder/path GOCACHE=$folder/cache \
        go build -trimpath -buildvcs=false -o "$folder/visit" .
    ;;
*)
    fail "no peer is called $peer"
    ;;
esac
echo "$sources" >"$folder/built"
