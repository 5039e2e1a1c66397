# The tour (docs/tour.md), as a reader takes it: its commands in their order, and what it says about
# them. Sourced by tests/e2e.sh.
#
# The commands come from the tour. `next PATTERN` runs the next one, which must match the pattern, and
# compares its output with the block `text` that follows it. So no command is left out, and each
# assertion stands where the tour makes its promise.

tour_does_what_it_says() {
    need_watchers
    tour=$PWD/docs/tour.md root=$PWD taken=0
    remove_everything
    trap "cd '$root'; remove_everything" EXIT
    read_the_tour
    replace_programs
    cd "$work"

    # 1. Start it, and see a visit.
    next 'git clone URL visitas'
    next 'cd visitas'
    next 'docker compose --profile obs up -d --build --wait'
    for service in web db cache jaeger prometheus; do is_healthy $service || fail "$service is $(health $service)"; done
    page_says / 200 'class="number[^>]*>1<' || fail "the page does not say 1: $(cat "$work/page")"
    page_says / 200 'class="number[^>]*>2<' || fail "the page does not say 2: $(cat "$work/page")"

    # 2. A slow visit, explained by its trace.
    # A commit that waits for what the build has left to be written would exceed web's lock timeout.
    sync
    next 'docker compose exec -d db psql *lock table visitas *'
    within 10 table_is_held
    next 'curl "http://localhost:8000/??1-5?"'
    [ "$(field total_registros_db <"$output" | paste -sd ' ')" = '3 4 5 6 7' ] || fail "the numbers are not 3 to 7"
    [ $taken -le 5 ] || fail "$taken commands led to the slow visit"
    within 30 link_leads_to_a_trace
    within 30 trace_blames_postgres
    within 30 page_links_to_its_trace

    # 3. The database stops responding.
    within 120 table_is_free
    next 'docker compose pause db'
    within 5 page_says /visitas 200 'data-postgres="erro"'
    within 5 status_is 503 /health
    next 'curl -i http://localhost:8000'
    next 'curl http://localhost:8000/health'
    next 'curl -s http://localhost:8000/metrics *'
    next 'docker compose logs *'
    [ "$(grep -c '"message":"store is down"' "$output")" = 1 ] || fail "the log has more lines than one: $(cat "$output")"
    within 90 alert_fires VisitasStoreDown
    next 'docker compose unpause db'
    within 10 status_is 200 /health
    within 5 page_says /visitas 200 'data-postgres="ok"'
    next 'curl http://localhost:8000'
    counts_every_row
    next 'docker compose logs *'
    within 60 prometheus_lacks 'ALERTS{alertname="VisitasStoreDown"}'

    # 4. The cache stops.
    next 'docker compose stop cache'
    within 5 says '"status":"degraded"' /health
    next 'curl http://localhost:8000'
    next 'docker compose start cache'
    within 10 says '"status":"ok","checks"' /health
    next 'curl http://localhost:8000'
    [ "$(field visitas_redis <"$output")" = 1 ] || fail "the cache does not count from 1"
    next 'docker compose exec -T web visitas reconcile'
    next 'curl http://localhost:8000'
    [ "$(field visitas_redis <"$output")" = "$(field total_registros_db <"$output")" ] || fail "the stores differ"

    # 5. Three lines that keep the count exact.
    local before
    before=$(field total_registros_db <"$output")
    next 'docker compose exec -T db psql *delete from visitas *'
    next 'curl http://localhost:8000'
    [ "$(field total_registros_db <"$output")" = $((before - 3 + 1)) ] || fail "the total ignores the deleted rows"
    counts_every_row
    next 'docker compose exec -T db psql *count*'
    grep -qx " *$((before - 3 + 1))" "$output" || fail "count(*) is another number"
    next 'docker compose exec -T db psql *sf registrar_visitas*'

    # 6. Stop it.
    next 'docker compose --profile obs down -v'
    [ -z "$(remains "$project")" ] || fail "left: $(remains "$project")"
    [ ! -e "$work/tour/$((taken + 1)).command" ] || fail "not tried: $(cat "$work/tour/$((taken + 1)).command")"
}

# Writes each command of the tour to a file, and next to it the lines that follow it as its output.
read_the_tour() {
    mkdir "$work/tour"
    awk -v place="$work/tour/" '
        /^```/ { kind = kind ? "" : substr($0, 4); next }
        kind == "sh" { n++; print >(place n ".command") }
        kind == "text" { print >(place n ".output") }' "$tour"
}

# next PATTERN: takes the next command, which must match the pattern, and runs it in this shell.
next() {
    local command expected
    taken=$((taken + 1))
    command=$(cat "$work/tour/$taken.command") || fail "the tour has no further command for: $1"
    output=$work/tour/$taken.printed
    # shellcheck disable=SC2053
    [[ $command == $1 ]] || fail "the next command of the tour is: $command"
    eval "${command//localhost:8000/127.0.0.1:$WEB_PORT}" >"$output" 2>"$work/tour/errors" ||
        fail "$command: status $?: $(cat "$output" "$work/tour/errors")"
    [ -e "$work/tour/$taken.output" ] || return 0
    sed -i 's/\r$//' "$output"
    # Each line occurs, whole, with other numbers and with anything in place of an ellipsis.
    while IFS= read -r expected; do
        expected=$(sed -E 's/[][(){}.*+?|^$\\]/\\&/g; s/[0-9]+/[0-9]+/g; s/…/.*/g' <<<"$expected")
        grep -Eqx -e " *$expected" "$output" || fail "$command prints no $expected: $(tail -20 "$output")"
    done <"$work/tour/$taken.output"
}

# --- what the tour's commands run ---

replace_programs() {
    # The working tree in place of a clone, so that uncommitted changes are tried, too; with an .env
    # that keeps the containers apart from the user's.
    git() {
        [ "$*" = 'clone URL visitas' ] || { command git "$@"; return; }
        mkdir visitas
        (cd "$root" && { command git ls-files --cached --others --exclude-standard; ls -d .git/HEAD .git/packed-refs .git/refs/heads 2>/dev/null; } |
            tar -cf - -T - 2>/dev/null) | tar -xf - -C visitas
        { cat "$env_file"; echo "COMPOSE_PROJECT_NAME=$project"; } >visitas/.env
    }
    # Without the user's variables.
    docker() { clean docker "$@"; }
}

# --- what it promises ---

# page_says PATH STATUS WORDS: what a browser gets.
page_says() {
    [ "$(curl -s --max-time 10 -H 'Accept: text/html' -o "$work/page" -w '%{http_code} %{content_type}' "$url$1")" = "$2 text/html; charset=utf-8" ] &&
        grep -q "$3" "$work/page"
}

# A visit by a browser, and the API behind the page's link.
page_links_to_its_trace() {
    local link
    page_says / 200 'class="trace" href=' || return 1
    link=$(sed -n 's/.*class="trace" href="\([^"]*\)".*/\1/p' "$work/page")
    [[ $link == "http://127.0.0.1:$JAEGER_PORT/trace/"* ]] || { echo "the link is $link"; return 1; }
    echo "${link##*/}" >"$work/trace"
    within 20 trace_is_complete
}

table_is_held() { [ "$(table_locks)" -gt 0 ]; }

table_is_free() { [ "$(table_locks)" = 0 ]; }

table_locks() { sql "select count(*) from pg_locks where relation = 'visitas'::regclass and mode = 'ExclusiveLock'"; }

# The link of the tour to the exemplars, followed to the visit's id.
link_leads_to_a_trace() {
    local link
    link=$(grep -o 'http://localhost:9090/api/v1/query_exemplars[^)]*' "$tour")
    curl -fsg "${link/localhost:9090/127.0.0.1:$PROMETHEUS_PORT}" >"$work/exemplars" || return 1
    trace=$(grep -o '"trace_id":"[0-9a-f]*"' "$work/exemplars" | tail -1 | cut -d '"' -f 4)
    [ -n "$trace" ] || return 1
    echo "$trace" >"$work/trace"
}

# The API behind http://localhost:16686/trace/TRACE_ID.
trace_blames_postgres() {
    local took call
    trace_is_complete || return 1
    read -r took call < <(longest_call <"$work/spans")
    [ "$call" = 'SELECT registrar_visitas' ] && [ "$took" -gt 500000 ]
}

trace_is_complete() {
    curl -fs "http://127.0.0.1:$JAEGER_PORT/api/traces/$(cat "$work/trace")" >"$work/spans" &&
        grep -q '"operationName":"GET /"' "$work/spans" && grep -q '"operationName":"INCRBY"' "$work/spans"
}

# The API behind http://localhost:9090/alerts.
alert_fires() { prometheus_has "ALERTS{alertname=\"$1\",alertstate=\"firing\"}"; }

counts_every_row() {
    [ "$(field total_registros_db <"$output")" = "$(sql 'select count(*) from visitas')" ] || fail "the total is not the number of rows: $(cat "$output")"
}
