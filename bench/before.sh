#!/bin/sh
# Builds the service of another revision, to compare this one with, and prints where the program is:
#
#   bench/before.sh REVISION
#
# It is built as `make bench` builds this one, in a folder of its own, and kept.
set -eu
cd "$(dirname "$0")/.."
revision=$(git rev-parse --short=12 --verify "$1^{commit}")
folder=$PWD/target/before
source=$folder/$revision
program=$folder/visitas-$revision
if ! [ -x "$program" ]; then
    echo "bench: building the service of $revision" >&2
    rm -rf "$source"
    mkdir -p "$source"
    git archive "$revision" | tar -x -C "$source"
    (
        cd "$source"
        VISITAS_REVISION=$revision CARGO_TARGET_DIR=$folder/build \
            cargo build --release --locked --quiet --bin visitas --workspace >&2
    )
    cp "$folder/build/release/visitas" "$program"
    rm -rf "$source"
fi
echo "$program"
