#!/usr/bin/env bash
# Builds the image for each architecture twice, the second time without the cache of the first, and
# compares: both must be the same bytes. They are while Debian's packages and the base images stay the
# same; between two releases of those, nothing else differs.
#
#   tests/image.sh [amd64 arm64]
#
# Needs Docker with Buildx. An architecture whose base image, packages or Rust library cannot be had
# is SKIPPED, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

# What a build says if it lacks something of an architecture, as opposed to what is wrong here.
absent='no match for platform|failed to resolve source metadata|rustup: not found|could not download|component .* is unavailable|toolchain .* does not support|Unable to locate package|Failed to fetch'

main() {
    local architecture
    work=$(mktemp -d)
    builder=''
    trap clean_up EXIT
    choose_builder
    [ $# -gt 0 ] || set -- amd64 arm64
    for architecture in "$@"; do compare "$architecture"; done
}

clean_up() {
    rm -rf "$work"
    [ -z "$builder" ] || docker buildx rm "$builder" >/dev/null 2>&1 || true
}

# Docker's own builder writes images to files only if it keeps them in containerd; a builder in a container
# always does. Where neither can be had, the image's files are compared, without its settings.
choose_builder() {
    written=oci
    if docker info --format '{{.DriverStatus}}' | grep -q io.containerd.snapshotter; then return; fi
    builder=visitas-image-$$
    if ! docker buildx create --name "$builder" --driver docker-container --bootstrap >"$work/log" 2>&1; then
        docker buildx rm "$builder" >/dev/null 2>&1 || true
        echo "== no builder here writes an image to a file: comparing the files in it ($(tail -1 "$work/log"))"
        builder='' written=files
    fi
}

compare() {
    local first second
    if ! build "$1" first; then
        if grep -Eq "$absent" "$work/log"; then
            echo "== the image for $1 SKIPPED: $(grep -Eom 1 ".*($absent).*" "$work/log")"
            return
        fi
        tail -30 "$work/log" >&2
        exit 1
    fi
    build "$1" second --no-cache || { tail -30 "$work/log" >&2; exit 1; }
    first=$(digest first) second=$(digest second)
    if [ "$first" != "$second" ]; then
        echo "the image for $1 differs from one build to the next: $first, $second" >&2
        exit 1
    fi
    echo "== the image for $1 is the same both times: $first"
}

# build ARCHITECTURE NAME [OPTION...]
build() {
    local started=$SECONDS output="type=oci,dest=$work/$2,rewrite-timestamp=true"
    [ $written = oci ] || output="type=tar,dest=$work/$2"
    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) docker buildx build . ${builder:+--builder "$builder"} --platform "linux/$1" "${@:3}" \
        --build-arg "VISITAS_REVISION=$(git rev-parse --short=12 HEAD)" --provenance=false --progress=plain \
        --output "$output" >"$work/log" 2>&1 || return 1
    echo "== the $2 build for $1 took $((SECONDS - started)) s"
}

# The digest of the image, or of its files, that a build wrote.
digest() {
    if [ $written = oci ]; then
        tar -xOf "$work/$1" index.json | grep -o 'sha256:[0-9a-f]*' | head -1
    else
        sha256sum <"$work/$1" | cut -d ' ' -f 1
    fi
}

main "$@"
