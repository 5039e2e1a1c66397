#!/usr/bin/env bash
# Drives `docker compose` as a user does, and prints one line per case: whether its fact holds.
#
#   tests/e2e.sh              every case
#   tests/e2e.sh CASE...      these cases, by the names of their functions
#
# Needs Docker Engine 25 with Compose 2.24, curl, bash, git, tar, gzip and GNU coreutils. It uses its own
# project name and ports, ignores .env and the caller's variables, and removes what it made, and only
# that, however it ends. A case whose image cannot be pulled is SKIPPED, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

# --- cases, in the order in which they run; each begins with all three services up ---

cases=(
    compose_files_are_valid_without_a_warning
    names_are_derived_from_the_project
    cold_start_on_a_fresh_volume_is_healthy_five_times
    visit_answers_with_both_totals
    web_pings_db_and_cache
    web_reaches_the_host_by_name
    wrong_value_in_env_is_named_in_the_log
    ps_says_that_all_three_are_healthy
    total_survives_down_and_up
    web_reports_an_outage_of_db_and_continues_its_count
    replaced_volume_of_db_is_used_without_a_restart_of_web
    web_serves_visits_without_the_cache
    web_starts_with_a_cache_that_never_becomes_healthy
    stopped_service_does_not_resolve
    killed_web_restarts_by_itself
    web_stops_on_sigterm_at_once
    web_runs_without_privileges
    stores_are_reached_from_inside_only_and_hold_few_capabilities
    every_service_is_bounded
    db_and_cache_have_the_documented_settings
    image_says_what_it_is_and_holds_no_secret
    secrets_in_the_build_folder_do_not_get_into_the_image
    change_of_the_source_does_not_rebuild_dependencies
    released_image_needs_nothing_but_its_compose_file
    every_variable_of_env_example_takes_effect
    env_example_shows_the_defaults
    passwords_are_made_as_documented
    every_setting_reaches_web
    url_in_env_replaces_the_settings_of_its_parts
    env_is_read_with_a_byte_order_mark_and_cr_lf
    checkout_with_autocrlf_has_the_same_bytes
    passwords_come_from_files
    passwords_in_files_may_end_in_cr_lf
    unreadable_password_file_ends_web_with_a_line_that_names_it
    db_is_never_healthy_while_it_is_initialised
    volume_of_the_flask_version_is_adopted
    web_is_reached_by_both_families_on_a_network_with_ipv6
    absent_collector_neither_slows_web_nor_fills_its_log
    watchers_start_without_web_from_a_private_clone_behind_a_proxy
    prometheus_scrapes_web_and_evaluates_every_expression
    prometheus_without_rules_is_not_healthy
    trace_of_a_visit_shows_both_store_calls
    slow_visits_lead_from_the_alert_to_the_trace_and_the_log
    refused_visits_raise_the_availability_alert
    jaeger_stays_within_its_memory_under_load
    grafana_has_its_data_sources_and_dashboards
    scale_without_its_file_is_refused
    scaled_web_serves_by_three_replicas_behind_one_port
    scaled_balancer_has_no_privileges_and_stops_in_time
    scaled_visits_have_unique_numbers_in_order
    scaled_replica_that_is_killed_fails_only_its_own_visits
    scaled_replica_that_is_stopped_fails_no_visit
    scaled_to_two_and_to_four_fails_no_visit
    scaled_replicas_speak_for_themselves_while_db_is_down
    scaled_replicas_are_found_by_prometheus
    scaled_web_returns_to_one_replica
    tour_does_what_it_says
    down_with_volumes_leaves_nothing
    interrupted_run_leaves_nothing
    volume_of_the_users_project_is_untouched
)

compose_files_are_valid_without_a_warning() {
    local said
    said=$(compose --profile '*' config --quiet 2>&1 && with_secrets config --quiet 2>&1 &&
        scaled config --quiet 2>&1 && with_secrets --file docker-compose.scale.yml config --quiet 2>&1) || fail "config fails: $said"
    [ -z "$said" ] || fail "config says: $said"
    # The Alertmanager of the runbook, and the stores of one's own.
    block_of observability/runbook.md '# docker-compose.override.yml' >"$work/override.yml"
    said=$(compose --file "$work/override.yml" --profile '*' config --quiet 2>&1) || fail "config with an Alertmanager fails: $said"
    block_of docs/compose.md 'services:' >"$work/override.yml"
    block_of docs/compose.md 'DATABASE_URL=postgres://user:password@host.docker.internal/visits' >"$work/own"
    said=$(env_file=$work/own; compose --file "$work/override.yml" config web 2>&1) || fail "config with other stores fails: $said"
    lacks "$said" -E '^ +(DB_HOST: db|REDIS_HOST: cache|DB_PASSWORD: senha123|depends_on:)' || fail "web keeps other settings: $said"
}

names_are_derived_from_the_project() {
    # `scaled` takes its settings from there, too.
    local config env_file=$work/patient
    config=$(compose --project-name other --profile '*' config && scaled --project-name other config)
    grep -q 'container_name: other-web' <<<"$config" || fail "the container is not called other-web"
    grep -q 'container_name: other-balancer' <<<"$config" || fail "the container is not called other-balancer"
    grep -q 'name: other-net' <<<"$config" || fail "the network is not called other-net"
    grep -q 'name: other_db-data' <<<"$config" || fail "the volume is not called other_db-data"
    lacks "$config" -E 'name: .*desafio3' || fail "a name is that of the user's project"
    # As in a second clone, whose .env has this line.
    { cat "$env_file"; echo COMPOSE_PROJECT_NAME=other; } >"$work/other"
    [ "$(clean docker compose --env-file "$work/other" --file docker-compose.yml --profile '*' config &&
        clean docker compose --env-file "$work/other" --file docker-compose.yml --file docker-compose.scale.yml config)" = "$config" ] ||
        fail "COMPOSE_PROJECT_NAME in .env does not name the project"
}

cold_start_on_a_fresh_volume_is_healthy_five_times() {
    local started
    for round in 1 2 3 4 5; do
        remove_everything
        started=$(now)
        compose up --detach --build --wait --wait-timeout 120
        note "round $round: $(since "$started") s from up to healthy"
        for service in web db cache; do is_healthy $service || fail "$service is $(health $service)"; done
        [ "$(total)" = 1 ] || fail "the volume was not fresh"
    done
}

visit_answers_with_both_totals() {
    visit | grep -Eqx '\{"db_status":"ok","redis_status":"ok","total_registros_db":[0-9]+,"visitas_redis":[0-9]+\}' ||
        fail "the response is $(visit)"
}

web_pings_db_and_cache() {
    compose exec -T web ping -c 2 db
    compose exec -T web ping -c 2 cache
}

web_reaches_the_host_by_name() {
    compose exec -T web getent hosts host.docker.internal
}

wrong_value_in_env_is_named_in_the_log() {
    local status=0 started
    { cat "$env_file"; echo DB_TIMEOUT=soon; } >"$work/wrong"
    started=$(now)
    (env_file=$work/wrong; compose up --detach --wait --wait-timeout 120 web) || status=$?
    [ $status = 1 ] || fail "up --wait ends with $status"
    note "$(since "$started") s until up --wait fails"
    compose logs web | grep -F "invalid value 'soon' for '--db-timeout <DB_TIMEOUT>'" || fail "$(compose logs web)"
}

ps_says_that_all_three_are_healthy() {
    local listed
    listed=$(compose ps --format '{{.Name}} {{.Status}}')
    for service in web db cache; do
        grep -q "^$project-$service Up .*(healthy)" <<<"$listed" || fail "ps says: $listed"
    done
}

total_survives_down_and_up() {
    local before after
    before=$(total)
    compose down
    compose up --detach --wait
    after=$(visit)
    [ "$(field total_registros_db <<<"$after")" = $((before + 1)) ] || fail "the response after total $before is $after"
    [ "$(field visitas_redis <<<"$after")" = 1 ] || fail "the cache did not start over: $after"
}

web_reports_an_outage_of_db_and_continues_its_count() {
    local before incarnation
    before=$(total)
    incarnation=$(incarnation_of web)
    compose stop db
    within 5 status_is 503 /health
    status_is 503 / || fail "a visit is not answered with 503"
    [[ $(curl -s "$url/") == '{"db_status":"erro",'*'"total_registros_db":null,'* ]] || fail "$(curl -s "$url/")"
    within 60 health_is unhealthy web
    compose start db
    within 60 health_is healthy web
    [ "$(total)" = $((before + 1)) ] || fail "the total did not continue from $before"
    [ "$(incarnation_of web)" = "$incarnation" ] || fail "web was restarted"
}

replaced_volume_of_db_is_used_without_a_restart_of_web() {
    local web_before started
    visit >/dev/null
    web_before=$(incarnation_of web)
    compose rm --stop --force db
    docker volume rm "${project}_db-data" >/dev/null
    within 5 status_is 503 /health
    compose up --detach db
    within 30 is_healthy db || fail "db is $(health db)"
    started=$(now)
    within 10 status_is 200 / || fail "no visit succeeds"
    note "$(since "$started") s from a healthy db to a visit"
    within 5 is_healthy web || fail "web is $(health web)"
    [ "$(sql 'select count(*) from visitas')" = "$(($(total) - 1))" ] || fail "the total is not the number of rows"
    [ "$(incarnation_of web)" = "$web_before" ] || fail "web was restarted"
}

web_serves_visits_without_the_cache() {
    local before incarnation
    before=$(total)
    incarnation=$(incarnation_of web)
    compose stop cache
    within 5 says '"status":"degraded"' /health
    status_is 200 /health || fail "degraded is not answered with 200"
    [[ $(visit) == *'"redis_status":"erro","total_registros_db":'$((before + 1))',"visitas_redis":null}' ]] || fail "$(visit)"
    is_healthy web || fail "web is $(health web)"
    compose start cache
    within 30 says '"status":"ok","checks"' /health
    [ "$(visit | field visitas_redis)" = 1 ] || fail "the cache does not count again"
    [ "$(incarnation_of web)" = "$incarnation" ] || fail "web was restarted"
}

web_starts_with_a_cache_that_never_becomes_healthy() {
    cat >"$work/sick-cache.yml" <<'END'
services:
  cache:
    healthcheck: { test: ["CMD", "false"], interval: 500ms, retries: 2, start_period: 1s }
END
    compose down
    compose --file "$work/sick-cache.yml" up --detach
    within 30 health_is unhealthy cache
    within 60 health_is healthy web
    visit
}

stopped_service_does_not_resolve() {
    local service
    local resolver
    compose exec -T web getent hosts db cache || fail "the names do not resolve while all services are up"
    for service in web db cache; do
        [ "$(docker container inspect --format '{{.HostConfig.DnsSearch}}' "$project-$service")" = '[.]' ] || fail "$service uses the host's search domain"
        resolver=$(compose exec -T $service cat /etc/resolv.conf)
        grep -q ^nameserver <<<"$resolver" || fail "$service has no name server: $resolver"
        lacks "$resolver" -E ^search || fail "$service has a search domain"
    done
    compose stop db
    # getent exits with 2 if it does not find a name.
    ends_with 2 compose exec -T web getent hosts db || fail "db resolves although it is stopped"
    ends_with 2 compose exec -T web getent hosts jaeger || fail "jaeger resolves although it is absent"
}

killed_web_restarts_by_itself() {
    local before incarnation process
    before=$(total)
    incarnation=$(incarnation_of web)
    process=$(docker container inspect --format '{{.State.Pid}}' "$project-web")
    # From the host: a container's processes cannot kill its first process.
    docker run --rm --pid host --user 0 --entrypoint sh "$image" -c "kill -9 $process"
    within 30 incarnation_is_not "$incarnation" web
    within 60 health_is healthy web
    [ "$(total)" = $((before + 1)) ] || fail "the total did not continue from $before"
}

web_stops_on_sigterm_at_once() {
    local started
    [ "$(compose exec -T web cat /proc/1/comm)" = visitas ] || fail "process 1 is not visitas"
    started=$(now)
    compose stop web
    [ "$(docker container inspect --format '{{.State.ExitCode}}' "$project-web")" = 0 ] || fail "web did not exit with 0"
    less "$(since "$started")" 5 || fail "the stop took $(since "$started") s"
}

web_runs_without_privileges() {
    local status
    status=$(compose exec -T web cat /proc/1/status)
    grep -Eq '^Uid:\s10001\s10001\s' <<<"$status" || fail "$(grep Uid <<<"$status")"
    for set in CapInh CapPrm CapEff CapBnd CapAmb; do
        grep -Eq "^$set:\s0+$" <<<"$status" || fail "$(grep $set <<<"$status")"
    done
    grep -Eq '^NoNewPrivs:\s1$' <<<"$status" || fail "web can gain privileges"
    for place in / /usr/local/bin /etc /home; do
        refuses 'Read-only file system' compose exec -T --user 0 web sh -c "touch $place/there" || fail "$place can be written to"
    done
    compose exec -T web sh -c 'touch /tmp/there && rm /tmp/there' || fail "/tmp cannot be written to"
    [ "$(compose exec -T web sh -c 'command -v curl || command -v wget || echo none')" = none ] || fail "the image has curl or wget"
}

stores_are_reached_from_inside_only_and_hold_few_capabilities() {
    for service in db cache; do
        [ "$(docker container inspect --format '{{len .HostConfig.PortBindings}}' "$project-$service")" = 0 ] || fail "$service publishes a port"
        [[ $(docker container inspect --format '{{.HostConfig.SecurityOpt}}' "$project-$service") == *no-new-privileges* ]] || fail "$service can gain privileges"
    done
    # The entry point has CHOWN, DAC_OVERRIDE, FOWNER, SETGID and SETUID; the server has none.
    [ "$(process_status db CapBnd)" = 00000000000000cb ] || fail "the capability bound of db is $(process_status db CapBnd)"
    [ "$(process_status db CapEff)" = 0000000000000000 ] || fail "the capabilities of db are $(process_status db CapEff)"
    [ "$(process_status cache CapBnd)" = 0000000000000000 ] || fail "the capability bound of cache is $(process_status cache CapBnd)"
    [ "$(process_status cache Uid)" = 999 ] || fail "cache runs as $(process_status cache Uid)"
}

every_service_is_bounded() {
    local config services missing
    config=$(scaled --profile '*' config)
    services=$(scaled --profile '*' config --services | wc -l)
    for bound in '    mem_limit: ' '    cpus: ' '    pids_limit: ' '        max-size: ' '    restart: unless-stopped' \
        '    healthcheck:' '      - no-new-privileges:true' '    cap_drop:'; do
        [ "$(grep -c "^$bound" <<<"$config")" = "$services" ] || fail "not every service has$bound"
    done
    for service in web db cache; do
        missing=$(docker container inspect --format '
            {{- if not .HostConfig.Memory}} memory{{end}}{{if not .HostConfig.NanoCpus}} CPU{{end}}
            {{- if not .HostConfig.PidsLimit}} pids{{end}}' "$project-$service")
        [ -z "$missing" ] || fail "$service is not bounded in:$missing"
    done
}

db_and_cache_have_the_documented_settings() {
    local setting
    for setting in data_checksums=on fsync=on synchronous_commit=on idle_in_transaction_session_timeout=1min \
        tcp_keepalives_idle=30 tcp_keepalives_interval=10 tcp_keepalives_count=3 client_connection_check_interval=10s; do
        # sql connects by TCP, because the keepalives of a Unix socket are always 0.
        [ "$(sql "show ${setting%=*}")" = "${setting#*=}" ] || fail "${setting%=*} is $(sql "show ${setting%=*}")"
    done
    for setting in save= appendonly=no maxmemory=67108864 maxmemory-policy=noeviction; do
        [ "$(compose exec -T cache redis-cli --raw config get "${setting%=*}" | tail -n +2)" = "${setting#*=}" ] ||
            fail "$(compose exec -T cache redis-cli config get "${setting%=*}")"
    done
}

image_says_what_it_is_and_holds_no_secret() {
    local version label
    version=$(compose exec -T web visitas --version)
    label=$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.version"}}' "$image")
    [[ $version == "visitas $label "* ]] || fail "the label says $label, the program $version"
    for label in title description licenses revision; do
        docker image inspect --format '{{json .Config.Labels}}' "$image" | grep -q "org.opencontainers.image.$label" || fail "no label $label"
    done
    [ "$(docker image inspect --format '{{.Config.User}}' "$image")" = 10001:10001 ] || fail "the image's user is not a number"
    local environment history
    environment=$(docker image inspect --format '{{json .Config.Env}}' "$image")
    history=$(docker history --no-trunc "$image")
    grep -q PATH= <<<"$environment" || fail "the image's environment cannot be read: $environment"
    lacks "$environment" -i passw || fail "the image's environment has a password"
    grep -q visitas <<<"$history" || fail "the image's history cannot be read: $history"
    lacks "$history" -F senha123 || fail "a layer's command has the password"
    # A file that is not sent to the build cannot get into a layer.
    local files
    # find also looks for the program, so that an empty result means that it failed.
    files=$(docker run --rm --user 0 --entrypoint find "$image" / -xdev -newer /etc/debian_version \
        \( -name '.env*' -o -name '*secret*' -o -name '*.rs' -o -name .git -o -path /usr/local/bin/visitas \) -print)
    [ "$(grep -v ^/usr/share <<<"$files")" = /usr/local/bin/visitas ] || fail "the image holds more than the program: $files"
    note "$(docker image ls --format '{{.Size}}' "$image") is the image"
}

secrets_in_the_build_folder_do_not_get_into_the_image() {
    local canary=c4nary9Zx7Qk2 context=$work/at-hand layers=$work/layers name=$project-at-hand
    mkdir -p "$context/secrets" "$layers"
    cp -r .dockerignore Dockerfile docker-compose.yml Cargo.toml Cargo.lock build.rs assets src migrations templates "$context"
    cp --parents */Cargo.toml "$context"
    printf '%s\n' "DB_PASSWORD=$canary" "OTEL_RESOURCE_ATTRIBUTES=key=$canary" >"$context/.env"
    echo "$canary" | tee "$context/secrets/db_password" >"$context/secrets/redis_password"
    trap "docker image rm --force $name-web >/dev/null 2>&1" EXIT
    clean env DB_PASSWORD=$canary REDIS_URL=redis://:$canary@cache OTEL_EXPORTER_OTLP_HEADERS=key=$canary \
        docker compose --project-name "$name" --project-directory "$context" --file "$context/docker-compose.yml" \
        build web >"$work/build.log" 2>&1 || { cat "$work/build.log"; return 1; }
    docker save "$name-web" | tar -xC "$layers"
    # Otherwise a failed search would look like an absent canary.
    [ "$(blobs_with usr/local/bin/visitas "$layers")" -gt 0 ] || fail "the layers cannot be searched"
    [ "$(blobs_with "$canary" "$layers")" = 0 ] || fail "a layer holds the canary"
    docker history --no-trunc "$name-web" >"$work/history" || fail "the image has no history"
    ends_with 1 grep -F "$canary" "$work/history" || fail "the history holds the canary"
    docker image inspect "$name-web" >"$work/description" || fail "the image has no description"
    ends_with 1 grep -F "$canary" "$work/description" || fail "the image's description holds the canary"
    ends_with 1 grep -F "$canary" "$work/build.log" || fail "the build's output holds the canary"
}

change_of_the_source_does_not_rebuild_dependencies() {
    local context=$work/context
    mkdir "$context"
    cp -r .dockerignore Dockerfile Cargo.toml Cargo.lock build.rs assets src migrations templates "$context"
    cp --parents */Cargo.toml "$context"
    echo '// Changed.' >>"$context/src/main.rs"
    clean docker build --progress plain --output type=cacheonly --target dependencies "$context" >"$work/build.log" 2>&1 || { cat "$work/build.log"; return 1; }
    local step
    step=$(sed -n 's/^\(#[0-9]*\) .*RUN .*cargo .* build --release .*/\1/p' "$work/build.log" | head -1)
    grep -qx "$step CACHED" "$work/build.log" || { cat "$work/build.log"; fail "dependencies were built again"; }
}

released_image_needs_nothing_but_its_compose_file() {
    local release=$work/release name=$project-release started took
    mkdir "$release"
    docker image tag "$image" "$name:1.0"
    trap "docker image rm $name:1.0 >/dev/null 2>&1" EXIT
    .github/release-compose.sh "$name:1.0" >"$release/docker-compose.yml"
    remove_everything
    started=$(now)
    clean docker compose --project-name "$project" --env-file "$env_file" --file "$release/docker-compose.yml" up --detach --wait --wait-timeout 120
    visit
    took=$(since "$started")
    note "$took s from up to the first visit, with images cached"
    less "$took" 20 || fail "the first visit took $took s"
    [ "$(docker container inspect --format '{{.Config.Image}}' "$project-web")" = "$name:1.0" ] || fail "web runs another image"
    remove_everything
}

every_variable_of_env_example_takes_effect() {
    local -A sample=(
        [WEB_PORT]=127.0.0.1:19001 [JAEGER_PORT]=19002 [PROMETHEUS_PORT]='[::1]:19003' [GRAFANA_PORT]=0.0.0.0:19004
        [DB_USER]=ana [DB_PASSWORD]="'s3nha \$x # y'" [DB_NAME]=outra_base [DB_HOST]=db.example [DB_PORT]=5433
        [REDIS_HOST]=cache.example [REDIS_PORT]=6380 [DB_SSLMODE]=require [SECRETS_DIR]="$work/elsewhere"
        [DB_TIMEOUT]=1900ms [REDIS_TIMEOUT]=123ms [VISIT_TIMEOUT]=2900ms [QUEUE_CAPACITY]=4321
        [HTTP_MAX_CONNECTIONS]=4322 [HEADER_TIMEOUT]=4s [IDLE_TIMEOUT]=77s [SHUTDOWN_DELAY]=3s [SHUTDOWN_TIMEOUT]=9s
        [PAGE_STREAMS_MAX]=77 [JAEGER_PUBLIC_URL]=http://jaeger.example [PROMETHEUS_PUBLIC_URL]=http://prometheus.example
        [GRAFANA_PUBLIC_URL]=https://grafana.example/tools
        [STOP_GRACE_PERIOD]=33s [LOG_FORMAT]=pretty [RUST_LOG]=visitas=debug [ACCESS_SLOW]=444ms
        [OTEL_EXPORTER_OTLP_ENDPOINT]=http://collector.example:4318 [OTEL_SERVICE_NAME]=outro
        [OTEL_RESOURCE_ATTRIBUTES]=deployment.environment=e2e [OTEL_TRACES_SAMPLER]=parentbased_traceidratio
        [OTEL_TRACES_SAMPLER_ARG]=0.25 [VISITAS_REVISION]=f00dcafe1234 [METRICS_ADDR]=0.0.0.0:9464
        [OTEL_EXPORTER_OTLP_HEADERS]=key=f00d [DATABASE_URL]=postgres://ana:f00d@db.example/outra_base
        [REDIS_URL]=redis://:f00d@cache.example:6380 [WEB_REPLICAS]=5 [VISITAS_IMAGE]="$image"
    )
    local variable plain changed listing value
    for variable in "${!sample[@]}"; do
        grep -q "^#$variable=" .env.example || fail "$variable is not in .env.example"
    done
    plain=$(with_secrets --profile '*' config && compose config && scaled config)
    : >"$work/all"
    # The project's name is a flag in these tests; another case is about it.
    for variable in $(sed -n 's/^#\([A-Z_]*\)=.*/\1/p' .env.example | grep -vx COMPOSE_PROJECT_NAME); do
        [ -n "${sample[$variable]:-}" ] || fail "$variable has no sample here"
        echo "$variable=${sample[$variable]}" >"$work/one"
        # A URL contradicts the settings of its parts.
        [[ $variable =~ ^(DATABASE|REDIS)_URL$ ]] || cat "$work/one" >>"$work/all"
        changed=$(env_file=$work/one; with_secrets --profile '*' config && compose config && scaled config) || fail "$variable is refused"
        [ "$changed" != "$plain" ] || fail "$variable changes nothing"
    done
    # Each variable of .env.example that Compose gives to web takes effect there.
    listing=$(env_file=$work/all; compose run --rm --no-deps -T web config)
    for variable in $(compose config --format json | tr ',{' '\n\n' | sed -n 's/^ *"\([A-Z_]*\)": .*/\1/p' | sort -u); do
        value=${sample[$variable]:-}
        [[ $variable =~ ^(DB_PASSWORD|OTEL_EXPORTER_OTLP_HEADERS)$ ]] && value='****'
        [[ -z $value || $variable =~ ^(VISITAS_REVISION|DATABASE_URL|REDIS_URL)$ ]] || grep -Eq "^$variable=${value//\*/\\*} +# environment$" <<<"$listing" ||
            fail "$variable has no effect in web: $(grep "^$variable=" <<<"$listing")"
    done
    # A password that needs quotes.
    [[ $(env_file=$work/all; compose config) == *"POSTGRES_PASSWORD: 's3nha \$\$x # y'"* ]] || fail "the password did not survive"
}

env_example_shows_the_defaults() {
    # OTEL_TRACES_SAMPLER_ARG contradicts the default sampler.
    sed -n 's/^#\([A-Z_]*=\)/\1/p' .env.example | grep -Ev '^(OTEL_TRACES_SAMPLER_ARG|COMPOSE_PROJECT_NAME)=' >"$work/uncommented"
    : >"$work/empty"
    local with without
    with=$(env_file=$work/uncommented; compose run --rm --no-deps -T web config && { with_secrets --profile '*' config && scaled config; } | grep -v '^      [A-Z_]*:') ||
        fail "config fails"
    without=$(env_file=$work/empty; compose run --rm --no-deps -T web config && { with_secrets --profile '*' config && scaled config; } | grep -v '^      [A-Z_]*:') ||
        fail "config fails"
    diff <(sed 's/ *# .*//' <<<"$without") <(sed 's/ *# .*//' <<<"$with") || fail "a default in .env.example differs"
}

passwords_are_made_as_documented() {
    local commands
    commands=$(block_of docs/compose.md 'mkdir secrets')
    mkdir "$work/owner"
    (cd "$work/owner" && eval "$(grep -v '^docker compose' <<<"$commands")")
    for file in db_password redis_password; do
        grep -Eqx '[0-9a-f]{48}' "$work/owner/secrets/$file" || fail "$file has $(wc -c <"$work/owner/secrets/$file") bytes"
        [ "$(stat -c %a "$work/owner/secrets/$file" "$work/owner/secrets" | paste -sd ' ')" = '444 700' ] || fail "others can change $file"
    done
    ends_with 1 cmp -s "$work"/owner/secrets/* || fail "both passwords are the same"
}

every_setting_reaches_web() {
    local variable value given missing=
    : >"$work/all"
    for variable in $(settings); do
        case $variable in PORT) value=5432 ;; *) value=given-$variable ;; esac
        echo "$variable=$value" >>"$work/all"
    done
    [ "$(wc -l <"$work/all")" -gt 50 ] || fail "docs/settings.md lists too few settings"
    given=$(env_file=$work/all; compose config web)
    while IFS='=' read -r variable value; do
        grep -Eq "^ +$variable: \"?$value\"?$" <<<"$given" || missing+=" $variable"
    done <"$work/all"
    [ -z "$missing" ] || fail "these do not reach web:$missing"
    grep -q 'target: 5432' <<<"$given" || fail "the published port does not lead to PORT"
}

# The names of the program's settings; a test keeps this file and the program the same.
settings() { sed -n 's/^| `\([A-Z_]*\)` .*/\1/p' docs/settings.md; }

url_in_env_replaces_the_settings_of_its_parts() {
    local listing
    printf '%s\n' 'DATABASE_URL=postgres://ana:s3gredo@banco:5433/outra?sslmode=disable' 'REDIS_URL=redis://:s3gredo@memoria:6380/2' >"$work/urls"
    listing=$(env_file=$work/urls; compose run --rm --no-deps -T web config) || fail "web refuses the URLs: $listing"
    for line in DB_HOST=banco DB_PORT=5433 DB_USER=ana DB_NAME=outra DB_SSLMODE=disable REDIS_HOST=memoria REDIS_PORT=6380; do
        grep -Eq "^$line +# " <<<"$listing" || fail "$line is not in $listing"
    done
    # Both by hand is a contradiction, as it is without Compose.
    echo DB_HOST=outro >>"$work/urls"
    listing=$(env_file=$work/urls; ends_with 2 compose run --rm --no-deps -T web config 2>&1) || fail "it is accepted: $listing"
    [[ $listing == *DATABASE_URL*DB_HOST* || $listing == *DB_HOST*DATABASE_URL* ]] || fail "$listing"
}

env_is_read_with_a_byte_order_mark_and_cr_lf() {
    local plain windows
    sed 's/^#DB_TIMEOUT=.*/DB_TIMEOUT=1900ms/; s/^#DB_PASSWORD=.*/DB_PASSWORD=s3gredo/' .env.example >"$work/lf"
    { printf '\xef\xbb\xbf'; sed 's/$/\r/' "$work/lf"; } >"$work/cr-lf"
    sed 's/$/\r/' docker-compose.yml >"$work/docker-compose.yml"
    plain=$(env_file=$work/lf; compose --project-directory "$PWD" config)
    windows=$(clean docker compose --project-name "$project" --project-directory "$PWD" --env-file "$work/cr-lf" --file "$work/docker-compose.yml" config)
    grep -q 'DB_TIMEOUT: 1900ms$' <<<"$plain" || fail "$plain"
    [ "$windows" = "$plain" ] || fail "$(diff <(echo "$plain") <(echo "$windows"))"
}

checkout_with_autocrlf_has_the_same_bytes() {
    git rev-parse HEAD >/dev/null 2>&1 || { echo "this is no git repository"; exit $skipped; }
    git clone --quiet --config core.autocrlf=true --config core.eol=crlf . "$work/windows"
    # The checksum of a migration is in each database, and a script with CR does not run.
    [ "$(git -C "$work/windows" ls-files --eol | grep -c 'w/crlf\|w/mixed')" = 0 ] || fail "$(git -C "$work/windows" ls-files --eol)"
    [ "$(git -C "$work/windows" ls-files --eol migrations | grep -c w/lf)" -ge 3 ] || fail "no migrations are there"
}

passwords_come_from_files() {
    local password='s3gredo "com" \barra'
    make_secrets "$password"
    remove_everything
    with_secrets up --detach --wait --wait-timeout 120
    visit | grep -q '"db_status":"ok","redis_status":"ok"' || fail "$(visit)"
    local inspected
    for service in web db cache; do
        inspected=$(docker container inspect "$project-$service")
        grep -q '"Env"' <<<"$inspected" || fail "$service cannot be inspected: $inspected"
        lacks "$inspected" -F s3gredo || fail "docker inspect shows the password of $service"
        lacks "$inspected" -F senha123 || fail "$service also has the default password"
    done
    [[ $(docker exec "$project-cache" redis-cli ping 2>&1) == *NOAUTH* ]] || fail "the cache needs no password"
    refuses 'password authentication failed' docker exec -e PGPASSWORD=senha123 "$project-db" psql -h db -U usuario -d desafio3db -c 'select 1' ||
        fail "db still accepts the default password"
    remove_everything
}

passwords_in_files_may_end_in_cr_lf() {
    make_secrets s3gredo '\r\n'
    remove_everything
    with_secrets up --detach --wait --wait-timeout 120
    visit | grep -q '"db_status":"ok","redis_status":"ok"' || fail "$(visit)"
    remove_everything
}

unreadable_password_file_ends_web_with_a_line_that_names_it() {
    local said status=0
    make_secrets anything
    chmod 0600 "$work/secrets/db_password"
    said=$(deadline=30 with_secrets run --rm --no-deps -T web 2>&1) || status=$?
    [ $status = 2 ] || fail "it ended with $status: $said"
    grep -q "'/run/secrets/db_password' for '--db-password-file <DB_PASSWORD_FILE>': cannot be read by uid 10001" <<<"$said" || fail "$said"
}

db_is_never_healthy_while_it_is_initialised() {
    remove_everything
    # 4 s are enough for several probes.
    echo 'sleep 4' >"$work/slow.sh"
    cat >"$work/slow-db.yml" <<END
services:
  db:
    volumes: ["$work/slow.sh:/docker-entrypoint-initdb.d/slow.sh:ro"]
END
    chmod 0755 "$work/slow.sh"
    compose --file "$work/slow-db.yml" up --detach db
    local observed=0
    while ! docker logs "$project-db" 2>&1 | grep -q 'init process complete'; do
        [ "$(health db)" = starting ] || fail "db is $(health db) before it is initialised"
        observed=$((observed + 1))
        [ $observed -lt 600 ] || fail "db is not initialised in time"
        sleep 0.1
    done
    [ $observed -gt 20 ] || fail "initialisation was too quick to observe"
    within 30 health_is healthy db
    remove_everything
}

volume_of_the_flask_version_is_adopted() {
    remove_everything
    compose up --detach --wait db
    sql "create table visitas (id serial primary key, data_hora timestamp default now());
         insert into visitas (data_hora) select '2024-05-01 12:00' from generate_series(1, 41)" >/dev/null
    compose down
    compose up --detach --wait --wait-timeout 120
    [ "$(total)" = 42 ] || fail "the total is $(total)"
    [ "$(sql "select count(*) from visitas where data = '2024-05-01 12:00+00'")" = 41 ] || fail "the times of old visits are lost"
    remove_everything
}

web_is_reached_by_both_families_on_a_network_with_ipv6() {
    local port
    port=$(free_port)
    cat >"$work/ipv6.yml" <<END
services: { web: { ports: !override ["$port:5000"] } }
networks: { default: { enable_ipv6: true, ipam: { config: [{ subnet: "fd00:15::/64" }] } } }
END
    remove_everything
    # Other cases have another network of this name.
    trap remove_everything EXIT
    compose --file "$work/ipv6.yml" up --detach --wait --wait-timeout 120
    for address in 127.0.0.1 '[::1]' localhost; do
        curl -fsS --max-time 10 "http://$address:$port/" || fail "no visit by $address"
    done
}

absent_collector_neither_slows_web_nor_fills_its_log() {
    local peer lines
    peer=$(free_port)
    # `down` does not remove a container of `run`, which would keep the network.
    trap 'docker rm --force "$project-peer" >/dev/null 2>&1' EXIT
    compose run --detach --name "$project-peer" --no-deps --publish "127.0.0.1:$peer:5000" -e OTEL_EXPORTER_OTLP_ENDPOINT= web
    within 30 curl -fs "http://127.0.0.1:$peer/health"
    compose up --detach --wait --force-recreate --no-deps web
    # Until then web tries to export.
    within 60 gave_up_exporting
    echo 1000 >"$work/best-without" && echo 1000 >"$work/best-with"
    # In turns, because other load on this machine comes and goes; a slow exporter stays slow.
    for _ in 1 2 3 4 5; do is_half_as_fast_as_without_an_exporter "http://127.0.0.1:$peer" || true; done
    within 60 is_half_as_fast_as_without_an_exporter "http://127.0.0.1:$peer"
    note "500 visits in a row took $(cat "$work/best-without") s without an exporter, $(cat "$work/best-with") s with an absent collector"
    lines=$(docker logs "$project-web" 2>&1 | grep -c collector || true)
    [ "$lines" = 1 ] || fail "$lines log lines about the collector"
    lines=$(docker logs "$project-web" 2>&1 | grep -vc '"target":"access"' || true)
    # At least the line about the collector.
    [ "$lines" -gt 0 ] && [ "$lines" -lt 20 ] || fail "$lines log lines"
}

watchers_start_without_web_from_a_private_clone_behind_a_proxy() {
    need_watchers
    compose down
    (umask 077 && mkdir "$work/clone" && cp -r docker-compose.yml observability "$work/clone")
    behind_a_proxy compose --project-directory "$work/clone" --profile obs up --detach --build --wait --wait-timeout 60 "${watchers[@]}"
    refuses 'No such container' docker container inspect "$project-web" || fail "web was started too"
}

prometheus_scrapes_web_and_evaluates_every_expression() {
    need_image prometheus
    local expression silent=()
    compose --profile obs up --detach --wait --wait-timeout 120 web prometheus
    docker exec "$project-prometheus" promtool check config /etc/prometheus/prometheus.yml
    within 30 prometheus_has 'up{job="visitas"} == 1'
    [ "$(expressions | wc -l)" -gt 50 ] || fail "expressions were not found: $(expressions)"
    while IFS= read -r expression; do
        within 60 prometheus_has "$expression" || silent+=("$expression")
    done < <(expressions)
    [ ${#silent[@]} = 0 ] || fail "no series: $(printf '%s\n' "${silent[@]}")"
    local rules
    rules=$(curl -fsg "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/rules")
    grep -q '"health":"ok"' <<<"$rules" || fail "no rule was evaluated: $rules"
    lacks "$rules" -F '"health":"err"' || fail "a rule cannot be evaluated"
}

prometheus_without_rules_is_not_healthy() {
    need_image prometheus
    cat >"$work/no-rules.yml" <<'END'
services:
  prometheus:
    command: ["--config.file=/dev/null", "--storage.tsdb.path=/prometheus"]
    healthcheck: { interval: 500ms, retries: 2, start_period: 1s }
END
    compose --file "$work/no-rules.yml" --profile obs up --detach prometheus
    within 30 curl -fs "http://127.0.0.1:$PROMETHEUS_PORT/-/healthy"
    within 30 health_is unhealthy prometheus
}

slow_visits_lead_from_the_alert_to_the_trace_and_the_log() {
    need_watchers
    local trace found took call env_file=$work/patient
    start_observed
    # Far shorter than web's lock timeout, so that every visit succeeds.
    hold_the_count 0.55 50 &
    within 20 count_is_held
    for _ in $(seq 60); do visit >/dev/null; done &
    within 60 prometheus_has 'ALERTS{alertname="VisitasLatencyBurnFast"}'
    prometheus_lacks 'ALERTS{alertname="VisitasAvailabilityBurnFast"}' || fail "slow visits raise the availability alert"
    within 20 exemplar_of_a_slow_visit
    trace=$(exemplar_of_a_slow_visit)
    within 20 curl -fs "http://127.0.0.1:$JAEGER_PORT/api/traces/$trace"
    found=$(curl -fs "http://127.0.0.1:$JAEGER_PORT/api/traces/$trace")
    read -r took call < <(longest_call <<<"$found")
    [ "$call" = 'SELECT registrar_visitas' ] && [ "$took" -gt 500000 ] || fail "the longest call is $call of $took µs"
    note "the exemplar's trace has $call of $took µs"
    docker logs "$project-web" 2>&1 | grep -F "\"trace_id\":\"$trace\"" | grep -F '"http.response.status_code":200' ||
        fail "the log has no line of $trace"
    wait
}

refused_visits_raise_the_availability_alert() {
    need_watchers
    start_observed
    # Longer than web's lock timeout.
    hold_the_count 5 5 &
    within 20 count_is_held
    for _ in $(seq 40); do curl -s -o /dev/null "$url/"; done &
    within 60 prometheus_has 'ALERTS{alertname="VisitasAvailabilityBurnFast"}'
    wait
}

trace_of_a_visit_shows_both_store_calls() {
    need_image jaeger
    compose --profile obs up --detach --wait --wait-timeout 120 web jaeger
    # The first visits can go untraced: web notices the collector only by a successful export.
    within 60 some_trace_shows 'SELECT registrar_visitas' INCRBY
    curl -fs "http://127.0.0.1:$JAEGER_PORT/api/services" | grep -q '"visitas"' || fail "Jaeger does not know the service"
}

jaeger_stays_within_its_memory_under_load() {
    need_image jaeger
    local incarnation most found searches=()
    compose --profile obs up --detach --wait --wait-timeout 120 web jaeger
    within 60 some_trace_shows INCRBY
    incarnation=$(incarnation_of jaeger)
    most=$(sed -n 's/^ *max_traces: //p' observability/jaeger.yml)
    within 300 exported_spans_exceed $((most * 6))
    # Searches for everything must fit as well.
    for search in 1 2 3 4; do
        curl -fs "http://127.0.0.1:$JAEGER_PORT/api/traces?service=visitas&limit=$most" >"$work/search$search" &
        searches+=($!)
    done
    for search in "${searches[@]}"; do wait "$search" || fail "a search was not answered"; done
    found=$(grep -o '"traceID":"[0-9a-f]*","spans"' "$work/search1" | wc -l)
    note "Jaeger holds $found traces in $(docker stats --no-stream --format '{{.MemUsage}}' "$project-jaeger")"
    # Its maximum, so the search returned all traces.
    [ "$found" = "$most" ] || fail "Jaeger holds $found traces"
    within 60 some_trace_shows INCRBY
    [ "$(incarnation_of jaeger)" = "$incarnation" ] || fail "Jaeger was restarted"
    is_healthy jaeger || fail "Jaeger is $(health jaeger)"
}

grafana_has_its_data_sources_and_dashboards() {
    need_image grafana
    compose --profile grafana up --detach --wait --wait-timeout 180
    for source in prometheus jaeger; do
        within 30 curl -fs "http://127.0.0.1:$GRAFANA_PORT/api/datasources/uid/$source/health"
    done
    for dashboard in visitas-visits visitas-stores; do
        within 30 curl -fs "http://127.0.0.1:$GRAFANA_PORT/api/dashboards/uid/$dashboard"
    done
}

# --- several replicas behind HAProxy; each case begins with three ---

scale_without_its_file_is_refused() {
    refuses 'Remove the custom name to scale the service' compose up --detach --scale web=3
    is_healthy web || fail "web is $(health web)"
}

scaled_web_serves_by_three_replicas_behind_one_port() {
    local replica address ids
    start_scaled
    [ "$(replicas | wc -l)" = 3 ] || fail "the replicas are $(replicas)"
    for replica in $(replicas); do
        [ "$(docker container inspect --format '{{.State.Health.Status}} {{len .HostConfig.PortBindings}}' "$replica")" = 'healthy 0' ] ||
            fail "$replica is not healthy, or has a port of the host"
    done
    visit | grep -q '"db_status":"ok","redis_status":"ok"' || fail "$(visit)"
    ids=$(for _ in $(seq 20); do curl -fsS "$url/visitas" -H 'accept: application/json' | grep -o '"id":"[^"]*"'; done | sort -u)
    [ "$(wc -l <<<"$ids")" = 3 ] || fail "these replicas answer: $ids"
    # Line by line, as web sends it.
    [ "$(timeout 5 curl -fsSN "$url/visitas/stream" | grep -c '^data:')" -ge 3 ] || fail "the stream is held back"
}

scaled_balancer_has_no_privileges_and_stops_in_time() {
    local status started stream
    start_scaled
    [ "$(process_status balancer Uid)" = 99 ] || fail "the balancer runs as $(process_status balancer Uid)"
    for status in CapPrm CapEff CapBnd; do
        [ "$(process_status balancer $status)" = 0000000000000000 ] || fail "the balancer has $(process_status balancer $status)"
    done
    [ "$(process_status balancer NoNewPrivs)" = 1 ] || fail "the balancer can gain privileges"
    refuses 'Read-only file system' docker exec "$project-balancer" touch /var/lib/haproxy/there
    # A stream never ends by itself.
    curl -sN "$url/visitas/stream" >"$work/stream" &
    stream=$!
    within 10 grep -q ^data: "$work/stream"
    started=$(now)
    scaled stop balancer
    less "$(since "$started")" 8 || fail "the stop took $(since "$started") s"
    note "the balancer, with a stream open, stops in $(since "$started") s"
    wait $stream || true
    scaled up --detach --wait --scale web=3
}

scaled_visits_have_unique_numbers_in_order() {
    local replica
    start_scaled
    begin_load
    visited 2000
    end_load
    no_visit_failed
    for replica in $(replicas); do
        [ "$(metric_of "$replica" 'visitas_visits_total{outcome="ok"}')" -gt 100 ] || fail "$replica records nothing"
    done
}

scaled_replica_that_is_killed_fails_only_its_own_visits() {
    local killed=$project-web-2 address failed
    start_scaled
    address=$(address_of "$killed")
    began=$(date --utc +%FT%T.%NZ)
    begin_load
    # In the middle of visits: nearly always the count is held, and all clients wait.
    hold_the_count 0.4 20 &
    within 20 count_is_held
    docker run --rm --pid host --user 0 --entrypoint sh "$image" -c "kill -9 $(docker container inspect --format '{{.State.Pid}}' "$killed")"
    wait $!
    # Docker starts it again, and HAProxy sends it visits again.
    within 60 replica_is_healthy "$killed"
    within 20 replica_records "$killed"
    end_load
    failed=$(counted refused in_doubt broken wrong not_sent)
    note "$failed visits were in flight on the killed replica"
    # Sixteen clients are spread evenly.
    [ "$failed" -gt 0 ] && [ "$failed" -le 6 ] || fail "of 16 visits in flight, $failed failed"
    [ "$(counted refused not_sent)" = 0 ] || fail "a visit that was not sent was not sent to another replica"
    lacks "$(unanswered | grep -v "server=$address ")" 'no response' || fail "a visit failed that was not on $address"
    balancer_says 'Server ready/replica[0-9]* is \(DOWN\|going DOWN\)' || fail "HAProxy did not notice"
}

scaled_replica_that_is_stopped_fails_no_visit() {
    local stopped=$project-web-3
    start_scaled
    begin_load
    docker stop "$stopped"
    [ "$(docker container inspect --format '{{.State.ExitCode}}' "$stopped")" = 0 ] || fail "it did not exit with 0"
    visited 200
    docker start "$stopped"
    within 60 replica_is_healthy "$stopped"
    within 20 replica_records "$stopped"
    docker restart "$project-web-1"
    within 60 replica_is_healthy "$project-web-1"
    end_load
    no_visit_failed
}

scaled_to_two_and_to_four_fails_no_visit() {
    start_scaled
    begin_load
    scaled up --detach --wait --wait-timeout 120 --scale web=2
    [ "$(replicas | wc -l)" = 2 ] || fail "the replicas are $(replicas)"
    visited 200
    scaled up --detach --wait --wait-timeout 120 --scale web=4
    [ "$(replicas | wc -l)" = 4 ] || fail "the replicas are $(replicas)"
    within 20 replica_records "$project-web-4"
    end_load
    no_visit_failed
}

scaled_replicas_speak_for_themselves_while_db_is_down() {
    local said
    start_scaled
    began=$(date --utc +%FT%T.%NZ)
    scaled stop db
    within 10 balancer_says 'backend ready has no server available'
    said=$(curl -s --max-time 10 "$url/")
    [[ $said == '{"db_status":"erro",'*'"total_registros_db":null,'* ]] || fail "$said"
    status_is 503 /health || fail "the health is not 503"
    status_is 200 /visitas || fail "the page is gone"
    scaled start db
    within 30 status_is 200 /
    within 30 status_is 200 /health
}

scaled_replicas_are_found_by_prometheus() {
    need_image prometheus
    local expression silent=() gone address
    start_scaled
    scaled --profile obs up --detach --build --wait --wait-timeout 120 --no-recreate --scale web=3 web prometheus
    within 30 prometheus_has 'count(up{job="visitas"} == 1) == 3'
    within 60 prometheus_has 'count(rate(visitas_visits_total{job="visitas", outcome="ok"}[1m])) == 3'
    while IFS= read -r expression; do
        within 60 prometheus_has "$expression" || silent+=("$expression")
    done < <(expressions)
    [ ${#silent[@]} = 0 ] || fail "no series: $(printf '%s\n' "${silent[@]}")"
    prometheus_has 'visitas_build_info{job="visitas"}' || fail "no build is known"
    # A replica that hangs stays in the network's DNS.
    gone=$project-web-2
    address=$(address_of "$gone")
    docker pause "$gone"
    within 20 prometheus_has "up{job=\"visitas\", instance=\"$address:5000\"} == 0"
    within 60 prometheus_has "ALERTS{alertname=\"VisitasDown\", instance=\"$address:5000\", alertstate=\"firing\"}"
    docker unpause "$gone"
    within 20 prometheus_has 'count(up{job="visitas"} == 1) == 3'
    # One that has ended does not, and nothing starts it again.
    docker kill "$gone"
    within 30 prometheus_has 'count(up{job="visitas"}) == 2'
    within 30 prometheus_has 'ALERTS{alertname="VisitasReplicasMissing"}'
    docker start "$gone"
    within 60 prometheus_has 'count(up{job="visitas"} == 1) == 3'
    within 20 prometheus_lacks 'ALERTS{alertname="VisitasReplicasMissing"}'
}

scaled_web_returns_to_one_replica() {
    local before
    start_scaled
    before=$(total)
    compose up --detach --wait --wait-timeout 120 --remove-orphans
    is_healthy web || fail "web is $(health web)"
    [ "$(total)" = $((before + 1)) ] || fail "the total did not continue from $before"
    [ -z "$(replicas | grep -vx "$project-web")" ] || fail "these are left: $(replicas)"
    refuses 'No such container' docker container inspect "$project-balancer"
}

# tour_does_what_it_says
. tests/tour.sh

down_with_volumes_leaves_nothing() {
    compose --profile obs up --detach --wait --wait-timeout 120 web db cache "${watchers[@]}"
    print_memory
    # A volume that only an image declares lacks the project's label, and `down` does not remove it.
    local containers volumes left
    containers=$(compose --profile '*' ps --quiet)
    [ -n "$containers" ] || fail "nothing runs"
    volumes=$(docker container inspect --format '{{range .Mounts}}{{if eq .Type "volume"}}{{println .Name}}{{end}}{{end}}' $containers)
    grep -q "^${project}_" <<<"$volumes" || fail "no volume is found: $volumes"
    # Containers without a volume print empty lines.
    lacks "$(grep . <<<"$volumes")" -Ev "^${project}_" || fail "there is a volume without a name"
    compose --profile obs down --volumes
    left=$(remains "$project")
    [ -z "$left" ] || fail "left: $left"
}

interrupted_run_leaves_nothing() {
    compose down
    "$0" total_survives_down_and_up >"$work/interrupted.log" 2>&1 &
    local run=$! other=visitas-e2e-$! left
    within 60 exists "$other-db"
    kill -TERM $run
    ends_with 130 wait $run || fail "the interrupted run did not exit with 130"
    left=$(remains "$other")
    [ -z "$left" ] || fail "left: $left"
}

volume_of_the_users_project_is_untouched() {
    [ "$(users_volume)" = "$users_volume_before" ] || fail "the volume was $users_volume_before and is $(users_volume)"
}

# --- helpers of the cases ---

# run_cases, within, refuses, fail and their like
. tests/cases.sh
# compose, visit, sql, begin_load and their like
. tests/stack.sh

project=visitas-e2e-$$
image=$project-web
watchers=()

with_secrets() { compose --file docker-compose.secrets.yml "$@"; }

# With the long timeouts.
scaled() { compose --env-file "$work/patient" --file docker-compose.scale.yml "$@"; }

# Runs a command with a Docker client that gives every container the variables of a proxy, which does
# not answer.
behind_a_proxy() {
    local user=${DOCKER_CONFIG:-$HOME/.docker} name proxy=http://127.0.0.1:9
    mkdir -p "$work/docker"
    # Plugins and contexts are there, too.
    for name in cli-plugins contexts; do [ ! -e "$user/$name" ] || ln -sfn "$user/$name" "$work/docker/$name"; done
    printf '{"currentContext":"%s","proxies":{"default":{"httpProxy":"%s","httpsProxy":"%s","allProxy":"%s","noProxy":"%s"}}}' \
        "$(clean docker context show)" $proxy $proxy $proxy localhost,127.0.0.1,.example >"$work/docker/config.json"
    DOCKER_CONFIG=$work/docker "$@"
}

status_is() { [ "$(curl -s --max-time 10 -o /dev/null -w '%{http_code}' "$url$2")" = "$1" ]; }

says() { curl -s --max-time 10 "$url$2" | grep -qF "$1"; }

health() { docker container inspect --format '{{.State.Health.Status}}' "$project-$1" 2>/dev/null || echo absent; }

health_is() { [ "$(health "$2")" = "$1" ]; }

is_healthy() { health_is healthy "$1"; }

# --- helpers of the cases with several replicas ---

start_scaled() {
    need_balancer
    scaled up --detach --build --wait --wait-timeout 180 --scale web=3
    # What the build has left to be written would delay commits.
    sync
}

need_balancer() {
    local name
    name=$(sed -n 's/^FROM //p' deploy/haproxy/Dockerfile)
    docker image inspect "$name" >/dev/null 2>&1 || deadline=600 clean docker pull --quiet "$name" >/dev/null 2>&1 ||
        { echo "the image $name cannot be pulled"; exit $skipped; }
}

# The names of web's containers.
replicas() { docker ps --filter "label=com.docker.compose.project=$project" --filter label=com.docker.compose.service=web --format '{{.Names}}' | sort; }

address_of() { docker container inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$1"; }

replica_is_healthy() { [ "$(docker container inspect --format '{{.State.Health.Status}}' "$1")" = healthy ]; }

# metric_of REPLICA SERIES: its value, rounded down. The image has no client, so db's container asks.
metric_of() {
    docker exec "$project-db" bash -c "exec 3<>/dev/tcp/$(address_of "$1")/5000; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3" |
        awk -v series="$2" 'index($0, series " ") == 1 { printf "%d", $2 }'
}

# Whether a replica has recorded ten visits since its start.
replica_records() { [ "$(metric_of "$1" 'visitas_visits_total{outcome="ok"}')" -gt 10 ]; }

# Ends the clients, and fails if what they saw contradicts the rows.
end_load() {
    local status=0
    stop_load || status=$?
    note "$(cat "$work/visits")"
    [ $status = 0 ] || fail "numbers are wrong: $(cat "$work/visits")"
}

no_visit_failed() {
    local failures=(in_doubt broken wrong not_sent refused)
    # HAProxy before 3.1 sends visits to a replica that has just started. It refuses some: they are
    # certainly not recorded.
    if docker exec "$project-balancer" haproxy -v | grep -Eq 'version (2|3\.0)\.'; then unset 'failures[-1]'; fi
    [ "$(counted "${failures[@]}")" = 0 ] || fail "visits failed: $(cat "$work/visits")"
}

# balancer_says PATTERN: prints HAProxy's lines of this kind since $began.
balancer_says() { docker logs --since "$began" "$project-balancer" 2>&1 | grep "$1"; }

# HAProxy's lines about requests that no replica answered. It says nothing about a client whose
# connection it closes because the replica closed its own.
unanswered() { balancer_says '^no response: ' || true; }

# block_of DOCUMENT LINE: the document's block of code whose first line this is.
block_of() {
    awk -v first="$2" '/^```/ { inside = 0; start = 1; next }
        start { inside = $0 == first; start = 0 }
        inside' "$1" | grep .
}

# Changes whenever the container runs another process.
incarnation_of() { docker container inspect --format '{{.Id}} {{.State.StartedAt}} {{.RestartCount}}' "$project-$1"; }

incarnation_is_not() { [ "$(incarnation_of "$2")" != "$1" ]; }

exists() { docker container inspect "$1" >/dev/null 2>&1; }

# process_status SERVICE FIELD: of the container's first process.
process_status() { docker exec "$project-$1" awk -v field="$2:" '$1 == field { print $2 }' /proc/1/status; }

# blobs_with TEXT FOLDER: how many files of a saved image hold TEXT, compressed files included.
blobs_with() {
    local blob found=0
    while IFS= read -r blob; do
        # grep counts, so that it reads to the end and gzip gets no SIGPIPE.
        [ "$(gzip -dcf <"$blob" | grep -acF "$1")" = 0 ] || found=$((found + 1))
    done < <(find "$2" -type f)
    echo $found
}

make_secrets() {
    rm -rf "$work/secrets" && mkdir -m 0700 "$work/secrets"
    printf "%s${2:-\\n}" "$1" | tee "$work/secrets/db_password" >"$work/secrets/redis_password"
    chmod 0444 "$work/secrets/"*
}

# Measures both once more, and compares the best rounds so far.
is_half_as_fast_as_without_an_exporter() {
    visits_in_a_row "$1" "$work/best-without"
    visits_in_a_row "$url" "$work/best-with"
    less "$(cat "$work/best-with")" "$(awk "BEGIN { print 2 * $(cat "$work/best-without") }")"
}

visits_in_a_row() {
    local started took
    started=$(now)
    curl -fsS --max-time 60 "$1/?[1-500]" -o /dev/null
    took=$(since "$started")
    if less "$took" "$(cat "$2")"; then echo "$took" >"$2"; fi
}

# spans_exported FILTER...: the sum of the samples that pass the filter.
spans_exported() {
    curl -fs "$url/metrics" | grep '^otel_sdk_exporter_span_exported_total{' | "$@" | awk '{ sum += $2 } END { printf "%d", sum }'
}

gave_up_exporting() {
    curl -fsS "$url/?[1-20]" -o /dev/null
    [ "$(spans_exported grep error_type)" -gt 0 ] &&
        # A visit that is not sampled has no traceresponse.
        [ "$(curl -fs -D - -o /dev/null "$url/?[1-10]" | grep -ci ^traceresponse)" -le 1 ]
}

exported_spans_exceed() {
    curl -fsS --parallel --parallel-max 16 --max-time 60 "$url/?[1-4000]" -o /dev/null 2>/dev/null
    [ "$(spans_exported grep -v error_type)" -gt "$1" ]
}

# Makes a visit, and looks for its trace once its spans have had time to arrive.
some_trace_shows() {
    local trace word found
    trace=$(curl -fs -D - -o /dev/null "$url/" | sed -n 's/^traceresponse: 00-\([0-9a-f]*\)-.*/\1/Ip')
    [ -n "$trace" ] || return 1
    for _ in $(seq 40); do
        found=$(curl -s "http://127.0.0.1:$JAEGER_PORT/api/traces/$trace")
        for word in "$@"; do [[ $found == *"\"operationName\":\"$word\""* ]] || continue 2 ; done
        return 0
    done
    return 1
}

# Whether an expression returns a series.
prometheus_has() { curl -fsG "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" --data-urlencode "query=$1" | grep -q '"result":\[{'; }

# Whether an expression was evaluated and returns none.
prometheus_lacks() {
    curl -fsG "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" --data-urlencode "query=$1" |
        grep -q '^{"status":"success",.*"result":\[\]'
}

# Prints every expression of the dashboards and of the rules, one per line, without the comparisons of
# alerts, which return nothing while all is well.
expressions() {
    {
        sed -n 's/^ *"expr": \("\(\\.\|[^"\\]\)*"\).*/\1/p' observability/grafana/dashboards/*.json
        curl -fs "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/rules" | grep -o '"query":"\(\\.\|[^"\\]\)*"' | sed 's/^"query"://'
    } | sed -E 's/^"//; s/"$//; s/\\n/ /g; s/\\u003c/</g; s/\\u003e/>/g; s/\\u0026/\&/g; s/\\(.)/\1/g
        s/ (==|!=|<=|>=|<|>) [0-9.]+//g; s/\$__rate_interval/1m/g; s/\$instance/.*/g'
}

# Starts with fresh volumes and with tracing, so that earlier measurements have no influence.
start_observed() {
    remove_everything
    # Spans and scrapes, too, must take no notice of it.
    behind_a_proxy compose --profile obs up --detach --wait --wait-timeout 120 web prometheus jaeger
    within 60 some_trace_shows INCRBY
    within 30 prometheus_has 'up{job="visitas"} == 1'
}

# hold_the_count SECONDS TIMES: keeps every recorder waiting; between two holds, one has its turn.
hold_the_count() {
    for _ in $(seq "$2"); do
        printf 'begin; select travar_contagem(); select pg_sleep(%s); commit;\n' "$1"
    done | compose exec -T -e PGPASSWORD=senha123 db psql -h 127.0.0.1 -U usuario -d desafio3db -qAt >/dev/null
}

count_is_held() { [ "$(sql "select count(*) from pg_stat_activity where query like '%pg_sleep%' and pid <> pg_backend_pid()")" -gt 0 ]; }

# The trace of a visit that took between half a second and a whole one.
exemplar_of_a_slow_visit() {
    curl -fsG "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query_exemplars" --data-urlencode "start=$(($(date +%s) - 300))" \
        --data-urlencode "end=$(($(date +%s) + 1))" \
        --data-urlencode 'query=http_server_request_duration_seconds_bucket{http_route="/",http_response_status_code="200",le=~"0.75|1.0"}' |
        grep -o '"trace_id":"[0-9a-f]*"' | tail -1 | cut -d '"' -f 4 | grep .
}

# The microseconds of a trace's longest call, and its name.
longest_call() {
    grep -o '"operationName":"[^"]*"\|"duration":[0-9]*' |
        awk -F : '/operationName/ { gsub("\"", "", $2); name = $2 } /duration/ && name !~ /^GET/ && $2 > longest { longest = $2; call = name }
            END { print longest, call }'
}

# Prints what is left of a project; fails if Docker cannot tell.
remains() {
    docker ps --all --quiet --filter "label=com.docker.compose.project=$1" &&
        docker network ls --quiet --filter "label=com.docker.compose.project=$1" &&
        docker volume ls --quiet --filter "label=com.docker.compose.project=$1"
}

print_memory() { note "$(docker stats --no-stream --format '{{.Name}} {{.MemUsage}}' $(compose --profile '*' ps --quiet))"; }

need_image() { [[ " ${watchers[*]} " == *" $1 "* ]] || { echo "the image of $1 cannot be pulled"; exit $skipped; }; }

need_watchers() { need_image jaeger; need_image prometheus; }

# Finds the optional services whose image is here or can be pulled.
find_watchers() {
    local name
    for service in jaeger prometheus grafana; do
        name=$(sed -n "s/^FROM \(.*\) AS $service$/\1/p" observability/Dockerfile)
        if docker image inspect "$name" >/dev/null 2>&1 || deadline=600 clean docker pull --quiet "$name" >/dev/null 2>&1; then
            watchers+=("$service")
        fi
    done
}

# --- a user's volume, real or a decoy, that the cases must leave unchanged ---

users_volume=desafio3_db-data
decoy=

users_volume() { docker volume inspect --format '{{.CreatedAt}} {{.Mountpoint}} {{.Labels}}' $users_volume 2>&1; }

make_decoy() {
    docker volume inspect $users_volume >/dev/null 2>&1 && return
    docker volume create --label visitas-e2e="$$" $users_volume >/dev/null
    decoy=yes
}

# --- running the cases ---

clean_up() {
    trap '' INT TERM HUP
    remove_everything >/dev/null 2>&1 || echo "could not remove everything of project $project"
    docker image rm --force "$image" "$project"-{balancer,jaeger,prometheus,grafana} >/dev/null 2>&1 || true
    if [ -n "$decoy" ]; then docker volume rm $users_volume >/dev/null 2>&1 || true; fi
    rm -rf "$work"
}

# Most cases begin with all three services up.
prepare() {
    case $1 in
    cold_start*|compose_files*|names_*|every_setting_*|env_is_read*|checkout_*|interrupted*|volume_of_the_users*|scaled_*|tour_*) ;;
    *) compose up --detach --wait --wait-timeout 120 --remove-orphans ;;
    esac
}

main() {
    docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 ||
        { echo "needs a running Docker Engine with Compose 2.24 or newer" >&2; exit 1; }

    work=$(mktemp -d)
    trap 'exit 130' INT TERM HUP
    trap clean_up EXIT

    WEB_PORT=$(free_port) JAEGER_PORT=$(free_port) PROMETHEUS_PORT=$(free_port) GRAFANA_PORT=$(free_port)
    url=http://127.0.0.1:$WEB_PORT
    env_file=$work/env
    printf '%s\n' >"$env_file" WEB_PORT=127.0.0.1:$WEB_PORT JAEGER_PORT=127.0.0.1:$JAEGER_PORT \
        PROMETHEUS_PORT=127.0.0.1:$PROMETHEUS_PORT GRAFANA_PORT=127.0.0.1:$GRAFANA_PORT "SECRETS_DIR=$work/secrets"
    # The same with timeouts by which a disk that stalls for a second fails no visit: PostgreSQL waits for
    # it at each commit.
    { cat "$env_file"; printf '%s\n' DB_TIMEOUT=3s VISIT_TIMEOUT=4s; } >"$work/patient"
    make_decoy
    users_volume_before=$(users_volume)
    find_watchers

    run_cases "${@:-${cases[@]}}"
    echo "$verdict"
    [ $failed = 0 ]
}

# In one line, so that an edit of this file during the run does not change the run.
main "$@"; exit
