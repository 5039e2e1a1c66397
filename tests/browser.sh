#!/usr/bin/env bash
# Opens the page in Chromium and checks what a person would see, with axe-core's accessibility rules.
#
#   tests/browser.sh          every test
#   tests/browser.sh outage   the tests with this in their name
#
# The pictures are in target/screenshots. Needs chromium, chromedriver and npm, and axe-core, a package
# of npm that is kept in target/axe once it is downloaded. Where one of them can be neither found nor
# got, this says SKIPPED, and that is no failure. The checksum is of the package as published.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=$PWD/target
axe_version=4.14.1
axe_sum=e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745

main() {
    # The stores must be there; only the browser can be missing.
    mkdir -p target
    devstack/install.sh
    # chromedriver finds either of them.
    local browser=chromium
    [ -z "$(command -v google-chrome)" ] || browser=google-chrome
    if ! devstack/install.sh "$browser=chromium" chromedriver=chromium-driver npm=npm; then
        skip "a program is missing that cannot be installed here (see above)"
    fi
    [ "$(cat target/axe/sum 2>/dev/null)" = "$axe_sum" ] || download
    cargo build --locked --quiet --bin visitas
    # Each test has a browser and stores of its own, which are too many for a small machine at once.
    cargo test --locked --package browser -- --test-threads=2 "$@"
}

download() {
    local new
    new=$(mktemp -d target/axe.XXXXXX)
    trap "rm -rf '$PWD/$new'" EXIT
    if ! (cd "$new" && npm pack --loglevel=error "axe-core@$axe_version" >/dev/null) 2>"$new/log"; then
        cat "$new/log" >&2
        # What npm says when there is no way to its registry.
        ! grep -Eq 'code (E[A-Z_]*SOCKET_TIMEOUT|ENOTFOUND|EAI_AGAIN|ECONN[A-Z]*|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH)' "$new/log" ||
            skip "npm's registry cannot be reached, so there is no axe-core"
        fail "npm cannot download axe-core@$axe_version"
    fi
    echo "$axe_sum  $new/axe-core-$axe_version.tgz" | sha256sum --check --quiet ||
        fail "axe-core@$axe_version is not the package that was expected"
    tar -xzf "$new/axe-core-$axe_version.tgz" -C "$new" package/axe.min.js package/LICENSE
    echo "$axe_sum" >"$new/package/sum"
    rm -rf target/axe
    mv "$new/package" target/axe
}

skip() {
    echo "== make browser SKIPPED: $*"
    exit 0
}

fail() {
    echo "browser: $*" >&2
    exit 1
}

main "$@"
