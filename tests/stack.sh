# A Compose project of a test: starting it, visiting it and asking its database. Sourced by tests/e2e.sh and
# tests/powercut-compose.sh, after tests/cases.sh. They set `project`, and have `work` (a folder), `env_file`
# and `url`, which lead to the port `WEB_PORT`.

# Compose without the user's .env, override file and variables.
compose() {
    clean docker compose --project-name "$project" --env-file "$env_file" --file docker-compose.yml "$@"
}

clean() {
    env -i PATH="$PATH" HOME="$HOME" ${DOCKER_HOST:+DOCKER_HOST="$DOCKER_HOST"} ${DOCKER_CONTEXT:+DOCKER_CONTEXT="$DOCKER_CONTEXT"} \
        ${DOCKER_CONFIG:+DOCKER_CONFIG="$DOCKER_CONFIG"} timeout --foreground --kill-after 10 "${deadline:-900}" "$@"
}

remove_everything() { compose --profile '*' down --volumes --remove-orphans --timeout 10; }

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 10000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo $port
}

visit() { curl -fsS --max-time 10 "$url/"; }

field() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"; }

total() { visit | field total_registros_db; }

sql() { compose exec -T -e PGPASSWORD=senha123 db psql -h 127.0.0.1 -U usuario -d desafio3db -Atc "$1"; }

# The clients and the judge of what they see: a program of this repository.
find_clients() {
    command -v cargo >/dev/null || { echo "cargo is needed to build the clients"; exit $skipped; }
    cargo build --workspace --locked --quiet --bin chaos
    chaos=${CARGO_TARGET_DIR:-target}/debug/chaos
}

# Starts clients that visit by the published port until stop_load, each over a connection that it keeps.
begin_load() {
    find_clients
    mkfifo "$work/load"
    "$chaos" visit --pause 5 "127.0.0.1:$WEB_PORT" -- docker exec -e PGPASSWORD=senha123 "$project-db" \
        psql -h 127.0.0.1 -U usuario -d desafio3db -Atc 'select (extract(epoch from data) * 1000000)::bigint from visitas order by id' \
        <"$work/load" >"$work/visits" 2>&1 &
    load=$!
    exec {load_input}>"$work/load"
    rm "$work/load"
    visited 200
}

# visited NUMBER: waits until so many more visits are recorded.
visited() {
    local before
    before=$(rows)
    within 60 rows_exceed $((before + $1))
}

rows() { sql 'select count(*) from visitas'; }

rows_exceed() { [ "$(rows)" -gt "$1" ]; }

# Ends the clients. Its status is that of `chaos visit`; what they saw is in $work/visits.
stop_load() {
    exec {load_input}>&-
    wait $load
}

# counted NAME...: the sum of these counts of the clients.
counted() {
    local sum=0 name number
    for name in "$@"; do
        number=$(grep -o "\b$name=[0-9]*" "$work/visits") || fail "no $name in $(cat "$work/visits")"
        sum=$((sum + ${number#*=}))
    done
    echo $sum
}
