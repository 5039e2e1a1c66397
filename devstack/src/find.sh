# Finds the servers. install.sh sources this file and find.rs runs it, so both find the same ones.
# shellcheck shell=sh

# Prints the major version and the program folder of the newest supported PostgreSQL.
find_postgres() {
    if [ -n "${DEVSTACK_PG_BIN-}" ]; then
        set -- "$DEVSTACK_PG_BIN"
    else
        set -- /usr/lib/postgresql/*/bin /usr/pgsql-*/bin \
            /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin
        if [ -n "$(command -v pg_config)" ]; then
            set -- "$@" "$(pg_config --bindir)"
        fi
    fi
    newest=0
    for bin in "$@"; do
        if ! [ -x "$bin/initdb" ] || ! [ -x "$bin/psql" ] || ! [ -x "$bin/pg_isready" ]; then
            continue
        fi
        major=$("$bin/postgres" --version 2>/dev/null | sed -n 's/^[^0-9]*\([0-9]*\).*/\1/p')
        if [ "${major:-0}" -ge 14 ] && [ "$major" -le 18 ] && [ "$major" -gt "$newest" ]; then
            newest=$major
            newest_bin=$bin
        fi
    done
    if [ "$newest" -gt 0 ]; then
        echo "$newest $newest_bin"
        return 0
    fi
    explain_missing "PostgreSQL 14 to 18" "${DEVSTACK_PG_BIN-}" postgresql postgresql@16 \
        "DEVSTACK_PG_BIN to the folder that holds its initdb and postgres"
}

# Prints the major version and the path of redis-server.
find_redis() {
    if [ -n "${DEVSTACK_REDIS_SERVER-}" ]; then
        set -- "$DEVSTACK_REDIS_SERVER"
    else
        set -- redis-server /usr/bin/redis-server /usr/local/bin/redis-server \
            /opt/homebrew/bin/redis-server
    fi
    for redis in "$@"; do
        path=$(command -v "$redis") || continue
        major=$("$path" --version 2>/dev/null | sed -n 's/^.* v=\([0-9]*\)\..*/\1/p')
        if [ "${major:-0}" -ge 6 ]; then
            echo "$major $path"
            return 0
        fi
    done
    explain_missing "Redis 6 or newer" "${DEVSTACK_REDIS_SERVER-}" redis-server redis \
        "DEVSTACK_REDIS_SERVER to the path of its redis-server"
}

# Prints what is missing, where a variable said to look for it, and how to install it. Always fails.
explain_missing() {
    sudo='sudo '
    if [ "$(id -u)" -eq 0 ]; then
        sudo=
    fi
    cat >&2 <<EOF
$1 was not found${2:+ in $2}. Install it:
  Debian, Ubuntu:  ${sudo}apt-get install -y --no-install-recommends $3
  macOS:           brew install $4
or set $5.
EOF
    return 1
}
