#!/usr/bin/env bash
# Asks the real service what its description allows, and what it does not: Schemathesis with every
# check, first with both stores and then with none.
#
#   tests/api.sh       needs curl, and a python3 that can make virtual environments
#
# Schemathesis comes from PyPI, in the versions of tests/schemathesis.txt, and is kept in target/.
# Where PyPI cannot be reached this says SKIPPED, and that is no failure.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=$PWD/target
venv=$CARGO_TARGET_DIR/schemathesis
program=$CARGO_TARGET_DIR/debug/visitas

# A stream never ends, so Schemathesis would wait for its body. The integration tests read it.
endless=/visitas/stream

main() {
    case ${1-} in
        '') install
            cargo build --locked --quiet --package visitas --package devstack
            # Stores that refuse every connection.
            DB_HOST=127.0.0.1 DB_PORT=1 REDIS_HOST=127.0.0.1 REDIS_PORT=1 "$0" with no stores 503
            # Its own data, not those of `make run`.
            folder=$(target/debug/devstack folder)/api
            rm -rf "$folder"
            DEVSTACK_DIR=$folder target/debug/devstack run -- "$0" with both stores ;;
        with) check "$@" ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
}

# Makes the virtual environment, unless it has these versions.
install() {
    local log=$venv.log python=python3
    cmp -s tests/schemathesis.txt $venv/versions.txt && return
    devstack/install.sh python3:ensurepip=python3-venv
    # Debian's package is for Debian's python3.
    $python -c 'import ensurepip' 2>/dev/null || python=/usr/bin/python3
    echo "== downloading Schemathesis"
    rm -rf $venv
    $python -m venv $venv
    if ! $venv/bin/pip install --quiet --disable-pip-version-check --requirement tests/schemathesis.txt >$log 2>&1; then
        cat $log >&2
        # What pip says without a way to the index, the second where it does not try again.
        grep -Eq 'connection broken by|from versions: none' $log || exit 1
        echo "== make api SKIPPED: PyPI cannot be reached, so there is no Schemathesis"
        exit 0
    fi
    cp tests/schemathesis.txt $venv/versions.txt
}

# check with WHICH stores [STATUS]: starts the service with the stores of the environment, and tests
# it. A response with a 5xx other than STATUS is a failure.
check() {
    local work service url file
    echo "== the service $1 $2 $3"
    work=$(mktemp -d)
    BIND_ADDR=127.0.0.1:0 RUST_LOG=warn,visitas=info $program serve >"$work/log" &
    service=$!
    trap "kill $service; wait $service || true; rm -rf $work" EXIT
    url=$(address "$work/log")
    # A file's name has its hash, so it has to be given; half of the time, since others are 404.
    file=$(curl -fsS -H 'Accept: text/html' "$url/visitas" | grep -o 'page\.[0-9a-f]*\.css')
    cat >"$work/schemathesis.toml" <<END
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx"${4+, \"$4\"}]
[dictionaries]
files.values = ["$file"]
[parameters]
"path.file" = { dictionary = "files", probability = 0.5 }
[warnings]
fail-on = true
END
    # The same requests in each run, bounded in number. It leaves its files in the folder where it runs.
    (cd "$work" && timeout 300 "$venv/bin/schemathesis" --config-file schemathesis.toml run "$url/openapi.json" \
        --checks all --exclude-path $endless --generation-deterministic --max-examples 25 --request-timeout 30 --no-color)
}

# The address that the service logs when it listens.
address() {
    local found
    for _ in $(seq 300); do
        found=$(sed -n 's/.*"message":"listening".*"address":"\([^"]*\)".*/\1/p; s/.*"address":"\([^"]*\)".*"message":"listening".*/\1/p' "$1")
        if [ -n "$found" ]; then
            echo "http://$found"
            return
        fi
        sleep 0.1
    done
    cat "$1" >&2
    echo "api: the service does not listen" >&2
    return 1
}

main "$@"
