#!/usr/bin/env bash
# Applies deploy/kubernetes to a cluster and drives it as its operator does. Prints one line per case:
# whether its fact holds, and a table of what the visitors saw.
#
#   tests/e2e-kubernetes.sh              every case
#   tests/e2e-kubernetes.sh CASE...      these cases, by the names of their functions
#
# E2E_KUBECONFIG is the file that leads to the cluster; the user's own configuration is never used. The
# cluster must have the images visitas:local (or E2E_IMAGE), postgres:16 and redis:7, a default class
# of storage, and NodePorts that answer on 127.0.0.1. E2E_DEFINITIONS is a folder with the definitions of
# the Prometheus Operator and of CloudNativePG. Needs kubectl, curl, openssl, bash, GNU coreutils and
# target/debug/chaos, which `make e2e-kubernetes` builds.
#
# The objects are in a namespace of their own. They are removed at the end, however it comes. What cannot
# be had is SKIPPED, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

# --- cases, in the order in which they run; each of the later ones begins with three ready replicas ---

cases=(
    every_overlay_is_rendered_without_a_warning
    api_server_accepts_every_object
    kube_linter_accepts_every_object
    local_has_three_ready_replicas
    database_is_migrated_once_by_pods_that_start_together
    web_runs_without_privileges
    db_and_cache_have_the_settings_of_compose
    settings_of_the_manifest_take_effect
    passwords_are_in_files_alone
    metrics_have_a_port_of_their_own
    replicas_count_together
    rolling_update_fails_no_visit
    evicted_pod_fails_no_visit
    killed_pod_fails_no_visit_but_its_own
    scaled_deployment_fails_no_visit
    autoscaler_follows_the_load
    database_pod_is_replaced_with_its_volume
    database_without_its_volume_is_used_without_a_restart_of_web
    web_of_production_verifies_the_certificate_of_the_database
)

every_overlay_is_rendered_without_a_warning() {
    local overlay said
    for overlay in local observed production; do
        said=$(kubectl kustomize "deploy/kubernetes/$overlay" 2>&1 >"$work/$overlay.yaml") || fail "$overlay: $said"
        [ -z "$said" ] || fail "$overlay: $said"
        note "$overlay has $(grep -c ^kind: "$work/$overlay.yaml") objects"
    done
}

api_server_accepts_every_object() {
    local overlay mistake
    define_objects_of_operators
    in_namespace "$namespace-dry" deploy/kubernetes/base/namespace.yaml | k apply -f -
    for overlay in local observed production; do
        render "$namespace-dry" "deploy/kubernetes/$overlay" >"$work/$overlay.yaml"
        accepts "$work/$overlay.yaml" || fail "$overlay is not accepted"
    done
    # The same objects with a mistake, so that an API server that looks at nothing is noticed.
    for mistake in 'local/maxUnavailable: 1/maxUnavailble: 1' 'local/runAsNonRoot: true/runAsNonRoot: false' \
        'observed/sampleLimit:/samplesLimit:' 'observed/for: 30s/for: soon' 'production/method: any/method: some'; do
        overlay=${mistake%%/*}
        sed "s/${mistake#*/}/" "$work/$overlay.yaml" >"$work/wrong.yaml"
        ! cmp -s "$work/$overlay.yaml" "$work/wrong.yaml" || fail "nothing is changed by $mistake"
        ! accepts "$work/wrong.yaml" || fail "$overlay is accepted with $mistake"
    done
    k delete namespace "$namespace-dry" --wait=false
}

kube_linter_accepts_every_object() {
    local linter overlay
    linter=$(find_linter) || { echo "$linter"; exit $skipped; }
    for overlay in local production; do
        # `observed` is in addition to either, and its Service selects their pods.
        { kubectl kustomize "deploy/kubernetes/$overlay" && echo --- && kubectl kustomize deploy/kubernetes/observed; } >"$work/$overlay.yaml"
        "$linter" lint "$work/$overlay.yaml" || fail "$overlay"
    done
    # A pod that can change its own files.
    sed 's/readOnlyRootFilesystem: true/readOnlyRootFilesystem: false/' "$work/local.yaml" >"$work/wrong.yaml"
    refuses no-read-only-root-fs "$linter" lint "$work/wrong.yaml" || fail "a mistake is accepted"
}

local_has_three_ready_replicas() {
    local started
    started=$(now)
    apply
    within 120 replicas_are 3
    note "$(since "$started") s from kubectl apply to three ready replicas, with a fresh database"
    within 30 total
    [ "$(restarts)" = "0 0 0" ] || fail "a pod of web was restarted while the database was away: $(restarts)"
    visit | grep -Eqx '\{"db_status":"ok","redis_status":"ok","total_registros_db":1,"visitas_redis":1\}' || fail "the first visit is answered $(visit)"
}

database_is_migrated_once_by_pods_that_start_together() {
    local pod log migrated=0
    for pod in $(web_pods); do
        log=$(k logs "$pod")
        grep -q '"migrations.applied":[1-9]' <<<"$log" && migrated=$((migrated + 1))
    done
    [ $migrated = 1 ] || fail "$migrated pods have migrated the database"
}

web_runs_without_privileges() {
    local pod status place
    pod=$(one_pod)
    status=$(k exec "$pod" -- cat /proc/1/status)
    grep -Eq '^Uid:\s10001\s10001\s' <<<"$status" || fail "$(grep Uid <<<"$status")"
    for set in CapInh CapPrm CapEff CapBnd CapAmb; do
        grep -Eq "^$set:\s0+$" <<<"$status" || fail "$(grep $set <<<"$status")"
    done
    grep -Eq '^NoNewPrivs:\s1$' <<<"$status" || fail "web can gain privileges"
    for place in / /tmp /run/secrets/visitas; do
        refuses 'Read-only file system' k exec "$pod" -- touch "$place/there" || fail "$place can be written to"
    done
    refuses 'No such file' k exec "$pod" -- ls /var/run/secrets/kubernetes.io || fail "web can call the API server"
}

db_and_cache_have_the_settings_of_compose() {
    local setting
    for setting in data_checksums=on fsync=on synchronous_commit=on idle_in_transaction_session_timeout=1min client_connection_check_interval=10s; do
        [ "$(sql "show ${setting%=*}")" = "${setting#*=}" ] || fail "${setting%=*} is $(sql "show ${setting%=*}")"
    done
    for setting in save= appendonly=no maxmemory=67108864 maxmemory-policy=noeviction; do
        [ "$(redis config get "${setting%=*}" | tail -n +2)" = "${setting#*=}" ] || fail "$(redis config get "${setting%=*}")"
    done
}

settings_of_the_manifest_take_effect() {
    local listing setting
    listing=$(k exec "$(one_pod)" -- visitas config)
    while read -r setting; do
        grep -Eq "^${setting/\[/\\[} +# environment$" <<<"$listing" || fail "$setting has no effect: $(grep "^${setting%%=*}=" <<<"$listing")"
    done < <(grep -E '^[A-Z_]+=' deploy/kubernetes/base/web.env)
}

passwords_are_in_files_alone() {
    local pod
    for pod in $(web_pods) db-0 $(pods_of cache); do
        k get pod "$pod" -o yaml >"$work/pod.yaml"
        grep -q 'mountPath: /run/secrets' "$work/pod.yaml" || fail "$pod has no secrets"
        ends_with 1 grep -F senha123 "$work/pod.yaml" || fail "the password of $pod is in its description"
        # Redis writes over its own.
        [[ $pod != cache-* ]] || continue
        k exec "$pod" -- cat /proc/1/environ | tr '\0' '\n' >"$work/environment"
        grep -q ^PATH= "$work/environment" || fail "the environment of $pod cannot be read"
        ends_with 1 grep -F senha123 "$work/environment" || fail "the password of $pod is in its environment"
    done
    # By the pod's own address, because the image trusts its socket and 127.0.0.1.
    refuses 'password authentication failed' k exec db-0 -- sh -c 'PGPASSWORD=wrong exec psql -h "$(hostname -i)" -U usuario -d desafio3db -c "select 1"' ||
        fail "db accepts any password"
    [[ $(k exec deployment/cache -- redis-cli ping 2>&1) == *NOAUTH* ]] || fail "the cache needs no password"
}

metrics_have_a_port_of_their_own() {
    local pod
    for pod in $(web_pods); do
        [ -n "$(metric_of "$pod" 'visitas_visits_total{outcome="ok"}')" ] || fail "$pod has no metrics"
    done
    status_is 404 /metrics || fail "the Service leads to the metrics"
}

replicas_count_together() {
    local pod sum=0
    begin_load
    until_visited 2000
    for pod in $(web_pods); do
        [ "$(metric_of "$pod" visitas_http_connections)" -gt 0 ] || fail "$pod has no connection"
    done
    end_load "three replicas"
    no_visit_failed
    # Every visit of this namespace, each counted by its replica.
    for pod in $(web_pods); do sum=$((sum + $(metric_of "$pod" 'visitas_visits_total{outcome="ok"}'))); done
    [ "$(rows)" = $sum ] || fail "the replicas have counted $sum visits, the table has $(rows) rows"
    [ "$(redis get visitas_home)" = $sum ] || fail "Redis has counted $(redis get visitas_home)"
}

rolling_update_fails_no_visit() {
    local before started
    before=$(web_pods)
    begin_load
    started=$(now)
    k rollout restart deployment/web
    k rollout status deployment/web --timeout 180s
    within 60 are_gone $before
    note "$(since "$started") s until the last of the three is replaced"
    until_visited 500
    note "connections by pod: $(connections)"
    end_load "rolling update"
    no_visit_failed
}

evicted_pod_fails_no_visit() {
    local first second started
    read -r first second _ < <(web_pods | paste -sd ' ')
    begin_load
    started=$(now)
    evict "$first" || fail "the eviction is refused"
    refuses "would violate the pod's disruption budget" evict "$second" || fail "two replicas are evicted at the same time"
    within 90 are_gone "$first"
    within 60 replicas_are 3
    note "$(since "$started") s until the evicted pod is gone and replaced; a second eviction is refused meanwhile"
    until_visited 500
    end_load "evicted pod"
    no_visit_failed
}

killed_pod_fails_no_visit_but_its_own() {
    local pod process own started
    pod=$(one_pod)
    process=$(process_of "$pod") || { echo "the pod's process is not on this machine"; exit $skipped; }
    begin_load
    own=$(metric_of "$pod" visitas_http_connections)
    started=$(now)
    kill -KILL "$process"
    within 30 restarted "$pod"
    within 60 replicas_are 3
    note "$(since "$started") s until the killed pod is ready again"
    until_visited 500
    end_load "killed pod"
    [ $((refused + in_doubt + wrong)) = 0 ] || fail "another pod failed visits"
    [ "$broken" -le "$own" ] || fail "$broken visits failed, and the killed pod had $own connections"
    note "the killed pod had $own connections"
}

scaled_deployment_fails_no_visit() {
    local before
    # It would scale back.
    k delete horizontalpodautoscaler web
    begin_load
    k scale deployment/web --replicas 5
    within 60 replicas_are 5
    until_visited 500
    before=$(web_pods)
    k scale deployment/web --replicas 3
    within 60 replicas_are 3
    until_visited 500
    end_load "scaled to five and to three"
    no_visit_failed
    [ "$(grep -c . <<<"$before")" = 5 ] || fail "there were not five pods: $before"
}

autoscaler_follows_the_load() {
    local started
    k get apiservice v1beta1.metrics.k8s.io >/dev/null 2>&1 || { echo "the cluster has no metrics-server"; exit $skipped; }
    # A small machine reaches this load, and the replicas leave within seconds.
    k patch horizontalpodautoscaler web --type json --patch '[
        { "op": "replace", "path": "/spec/metrics/0/resource/target/averageValue", "value": "20m" },
        { "op": "replace", "path": "/spec/behavior/scaleDown", "value": { "stabilizationWindowSeconds": 15, "policies": [{ "type": "Pods", "value": 3, "periodSeconds": 5 }] } }]'
    begin_load 1
    started=$(now)
    within 150 replicas_exceed 3
    note "$(since "$started") s of load until a fourth replica is ready"
    until_visited 2000
    end_load "load that adds replicas"
    no_visit_failed
    begin_load 400
    started=$(now)
    within 180 replicas_are 3
    note "$(since "$started") s after the load until three replicas are left"
    end_load "little load while replicas leave"
    no_visit_failed
}

database_pod_is_replaced_with_its_volume() {
    local before processes
    before=$(rows)
    processes=$(incarnations)
    begin_load
    k delete pod db-0
    k rollout status statefulset/db --timeout 120s
    within 60 replicas_are 3
    until_visited 500
    end_load "database pod replaced, with its volume"
    [ $((broken + wrong)) = 0 ] || fail "$broken visits got no response, $wrong a wrong one"
    [ "$(rows)" -gt $((before + answered)) ] || fail "rows are missing"
    [ "$(incarnations)" = "$processes" ] || fail "a pod of web was restarted"
    note "no acknowledged visit for $silence_ms ms"
}

database_without_its_volume_is_used_without_a_restart_of_web() {
    local processes started
    processes=$(incarnations)
    k scale statefulset/db --replicas 0
    within 60 are_gone db-0
    k delete persistentvolumeclaim data-db-0
    open_volumes
    k scale statefulset/db --replicas 1
    k rollout status statefulset/db --timeout 120s
    started=$(now)
    within 60 visit
    note "$(since "$started") s from a ready database to a visit"
    [ "$(field total_registros_db <"$work/last")" = 1 ] || fail "the count does not begin with 1: $(cat "$work/last")"
    within 60 replicas_are 3
    [ "$(incarnations)" = "$processes" ] || fail "a pod of web was restarted"
}

# Without the operator: one PostgreSQL has the names, the Secrets and the kind of certificate that
# CloudNativePG gives to its own.
web_of_production_verifies_the_certificate_of_the_database() {
    namespace=$namespace-tls
    define_objects_of_operators
    in_namespace "$namespace" deploy/kubernetes/base/namespace.yaml | k apply -f -
    k create secret generic cache --from-literal=password="$(openssl rand -hex 24)"
    k create secret generic db-app --type kubernetes.io/basic-auth --from-literal=username=usuario --from-literal=password="$(openssl rand -hex 24)"
    certify "$work/right" db-rw
    certify "$work/wrong" db-rw
    k create secret tls db-server --cert "$work/right/server.crt" --key "$work/right/server.key"
    k create secret generic db-ca --from-file=ca.crt="$work/wrong/ca.crt" --from-file=ca.key="$work/wrong/ca.key"
    open_volumes
    production_without_operator | k apply -f -
    k rollout status statefulset/db --timeout 120s
    within 60 logs_say 'store is down.*certificate'
    replicas_are 3 && fail "web trusts another authority"
    k create secret generic db-ca --from-file=ca.crt="$work/right/ca.crt" --from-file=ca.key="$work/right/ca.key" --dry-run=client -o yaml | k replace -f -
    k rollout restart deployment/web
    within 120 replicas_are 3
    url=http://127.0.0.1:$(port)
    within 30 total
    [ "$(visit | field total_registros_db)" = 1 ] || fail "$(visit)"
    [ "$(sql "select count(*) > 0 and bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid) where application_name = 'visitas'")" = t ] ||
        fail "a session of web is not encrypted"
    refuses 'No such file' k exec "$(one_pod)" -- ls /run/secrets/visitas/ca.key || fail "web has the authority's key"
    [ "$(k exec "$(one_pod)" -- ls /run/secrets/visitas | paste -sd ' ')" = 'db_ca.crt db_password redis_password' ] || fail "web has other files"
}

# --- helpers of the cases ---

# run_cases, within, refuses, fail and their like
. tests/cases.sh

namespace=visitas-e2e-$$
chaos=target/debug/chaos
linter_version=v0.8.3
selector=app.kubernetes.io/component=web

k() { kubectl --namespace "$namespace" "$@"; }

# render NAMESPACE KUSTOMIZATION [FIELD]: its objects in another namespace, with further fields.
render() {
    local at
    at=$(mktemp -d "$work/overlay.XXXX")
    printf '%s\n' "namespace: $1" "resources: [$(realpath --relative-to "$at" "$2")]" "${3:-}" >"$at/kustomization.yaml"
    kubectl kustomize "$at"
}

# in_namespace NAMESPACE FILE: the file with another namespace.
in_namespace() { sed "s/name: desafio3$/name: $1/" "$2"; }

# Applies `local`, with a port for the test's visitors, and with timeouts by which a disk that stalls for
# a second fails no visit: PostgreSQL waits for it at each commit.
apply() {
    open_volumes
    render "$namespace" deploy/kubernetes/local "
images: [{ name: visitas, newName: ${image%:*}, newTag: '${image##*:}' }]
patches:
  - patch: '[{ \"op\": \"add\", \"path\": \"/spec/type\", \"value\": \"NodePort\" }]'
    target: { kind: Service, name: web }
  - target: { kind: Deployment, name: web }
    patch: |
      - { op: add, path: /spec/template/spec/containers/0/env, value: [{ name: DB_TIMEOUT, value: 3s }, { name: VISIT_TIMEOUT, value: 4s }] }" |
        k apply -f -
    url=http://127.0.0.1:$(port)
}

port() { k get service web -o 'jsonpath={.spec.ports[0].nodePort}'; }

# `production`, with the PostgreSQL of `local` in place of the operator's.
production_without_operator() {
    local here=$work/without-operator
    mkdir -p "$here/production"
    cat >"$here/production/kustomization.yaml" <<END
resources: [$(realpath --relative-to "$here/production" deploy/kubernetes/production)]
images: [{ name: registry.example/visitas, newName: ${image%:*}, newTag: '${image##*:}' }]
patches:
  - patch: '{ apiVersion: postgresql.cnpg.io/v1, kind: Cluster, metadata: { name: db }, \$patch: delete }'
  - patch: '{ apiVersion: postgresql.cnpg.io/v1, kind: ScheduledBackup, metadata: { name: db }, \$patch: delete }'
  - patch: '{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: { name: db }, \$patch: delete }'
  - patch: '[{ "op": "add", "path": "/spec/type", "value": "NodePort" }]'
    target: { kind: Service, name: web }
END
    cat >"$here/kustomization.yaml" <<END
namespace: $namespace
resources: [production, $(realpath --relative-to "$here" deploy/kubernetes/db)]
patches:
  - patch: '[{ "op": "replace", "path": "/metadata/name", "value": "db-rw" }]'
    target: { kind: Service, name: db }
  - target: { kind: StatefulSet, name: db }
    patch: |
      - { op: add, path: /spec/template/spec/containers/0/args/-, value: -cssl=on }
      - { op: add, path: /spec/template/spec/containers/0/args/-, value: -cssl_cert_file=/run/secrets/server/tls.crt }
      - { op: add, path: /spec/template/spec/containers/0/args/-, value: -cssl_key_file=/run/secrets/server/tls.key }
      - { op: add, path: /spec/template/spec/containers/0/volumeMounts/-, value: { name: server, mountPath: /run/secrets/server } }
      - { op: add, path: /spec/template/spec/volumes/-, value: { name: server, secret: { secretName: db-server, defaultMode: 0440 } } }
END
    kubectl kustomize "$here"
}

# certify FOLDER NAME: an authority of its own, and a server's certificate for this name.
certify() {
    local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2)
    mkdir "$1"
    openssl req -x509 "${key[@]}" -keyout "$1/ca.key" -out "$1/ca.crt" -subj "/OU=$namespace/CN=db" \
        -addext keyUsage=critical,keyCertSign
    openssl req -x509 "${key[@]}" -keyout "$1/server.key" -out "$1/server.crt" -subj "/CN=$2" -CA "$1/ca.crt" -CAkey "$1/ca.key" \
        -addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage=serverAuth -addext "subjectAltName=DNS:$2,DNS:$2.$namespace,DNS:$2.$namespace.svc"
}

logs_say() { k logs --selector $selector --tail 200 --prefix=false | grep -E "$1"; }

# A hostPath volume that an administrator has made belongs to root, so a pod's fsGroup has no effect on it.
open_volumes() {
    local path
    for path in $(k get persistentvolume -o 'jsonpath={range .items[?(@.status.phase=="Available")]}{.spec.hostPath.path}{"\n"}{end}'); do
        [ ! -d "$path" ] || [ -n "$(ls -A "$path")" ] || chmod 0777 "$path"
    done
}

# accepts FILE: whether the API server would accept the objects without a warning.
accepts() {
    local said
    said=$(k apply --namespace "$namespace-dry" --dry-run=server --validate=strict -f "$1" 2>&1) || { grep -v ' (server dry run)$' <<<"$said"; return 1; }
    ends_with 1 grep -i warning <<<"$said"
}

define_objects_of_operators() {
    local file name
    for file in "${E2E_DEFINITIONS:-/nowhere}"/*.yaml; do
        [ -e "$file" ] || continue
        name=$(kubectl create --dry-run=client -o name -f "$file")
        k get "$name" >/dev/null 2>&1 && continue
        # By the server, because the largest do not fit into the annotation of a client.
        k apply --server-side -f "$file"
        echo "$name" >>"$work/defined"
        # A definition that has no conditions yet is an error.
        within 30 k wait --for condition=Established --timeout 5s "$name"
    done
    for name in servicemonitors.monitoring.coreos.com prometheusrules.monitoring.coreos.com clusters.postgresql.cnpg.io scheduledbackups.postgresql.cnpg.io; do
        k get customresourcedefinition "$name" >/dev/null 2>&1 || { echo "the cluster lacks $name, and E2E_DEFINITIONS names no folder with it"; exit $skipped; }
    done
}

# Prints the path of kube-linter, or why there is none.
find_linter() {
    local folder=$PWD/target/tools
    command -v kube-linter && return
    if [ ! -x "$folder/kube-linter" ]; then
        command -v go >/dev/null || { echo "neither kube-linter nor Go is installed"; return 1; }
        GOBIN=$folder timeout 900 go install "golang.stackrox.io/kube-linter/cmd/kube-linter@$linter_version" >"$work/go.log" 2>&1 ||
            { echo "kube-linter $linter_version cannot be installed: $(tail -1 "$work/go.log")"; return 1; }
    fi
    echo "$folder/kube-linter"
}

# The pods of a component that are not about to end.
pods_of() {
    k get pod --selector "app.kubernetes.io/component=$1" -o 'jsonpath={range .items[*]}{.metadata.name} {.metadata.deletionTimestamp}{"\n"}{end}' | awk 'NF == 1 { print $1 }'
}

web_pods() { pods_of web; }

one_pod() { web_pods | sed -n 1p; }

# The number of pods that are ready, and whether all that are there are ready and stay.
replicas_are() {
    k get pod --selector $selector -o 'jsonpath={range .items[*]}{.metadata.deletionTimestamp} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' |
        awk -v wanted="$1" '{ all++ } $0 == " True" { ready++ } END { exit !(all == wanted && ready == wanted) }'
}

replicas_exceed() { [ "$(k get deployment web -o 'jsonpath={.status.readyReplicas}')" -gt "$1" ]; }

are_gone() {
    local pod
    for pod in "$@"; do ! k get pod "$pod" >/dev/null 2>&1 || return 1; done
}

# Changes whenever a container of web runs another process.
incarnations() { k get pod --selector $selector -o 'jsonpath={range .items[*]}{.status.containerStatuses[0].containerID}{"\n"}{end}' | sort; }

restarts() { k get pod --selector $selector -o 'jsonpath={range .items[*]}{.status.containerStatuses[0].restartCount}{"\n"}{end}' | paste -sd ' '; }

restarted() { [ "$(k get pod "$1" -o 'jsonpath={.status.containerStatuses[0].restartCount}')" -gt 0 ]; }

# The process of a pod of web, if it is on this machine and may be killed.
process_of() {
    local uid file process
    uid=$(k get pod "$1" -o 'jsonpath={.metadata.uid}')
    for file in $(grep -lE "pod(${uid}|${uid//-/_})" /proc/[0-9]*/cgroup 2>/dev/null); do
        process=${file//[!0-9]/}
        [ "$(cat "/proc/$process/comm" 2>/dev/null)" = visitas ] && kill -0 "$process" 2>/dev/null && echo "$process" && return
    done
    return 1
}

evict() {
    printf '{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"%s","namespace":"%s"}}' "$1" "$namespace" |
        k create --raw "/api/v1/namespaces/$namespace/pods/$1/eviction" -f -
}

# metric_of POD SERIES
metric_of() {
    k get --raw "/api/v1/namespaces/$namespace/pods/$1:9464/proxy/metrics" | awk -v series="$2" '$1 == series { print $2 }'
}

connections() { for pod in $(web_pods); do metric_of "$pod" visitas_http_connections; done | paste -sd ' '; }

sql() { k exec db-0 -- psql -U usuario -d desafio3db -Atc "$1"; }

rows() { sql 'select count(*) from visitas'; }

redis() { k exec deployment/cache -- sh -c 'REDISCLI_AUTH=$(cat /run/secrets/cache/password) exec redis-cli --raw "$@"' redis "$@"; }

visit() { curl -fsS --max-time 10 "$url/"; }

field() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"; }

# As the monitor of a replica has last read it; no visit.
total() { curl -fsS --max-time 5 "$url/visitas" | field total_registros_db; }

status_is() { [ "$(curl -s --max-time 10 -o /dev/null -w '%{http_code}' "$url$2")" = "$1" ]; }

# begin_load [PAUSE]: sixteen clients, each over one connection that it keeps, which pause for this many
# milliseconds between two visits. They repeat a request only if no byte of it was sent.
begin_load() {
    # What earlier work has left to be written would delay commits.
    sync
    mkfifo "$work/fifo"
    "$chaos" visit --pause "${1:-10}" "127.0.0.1:$(port)" -- kubectl --namespace "$namespace" exec db-0 -- psql -U usuario -d desafio3db -Atc \
        'select (extract(epoch from data) * 1000000)::bigint from visitas order by id' <"$work/fifo" >"$work/visited" &
    load=$!
    # The clients leave when this end is closed.
    exec 9>"$work/fifo"
    rm "$work/fifo"
    load_began=$(now)
    until_visited 100
}

until_visited() {
    local least
    least=$(total)
    least=$((least + $1))
    within 60 total_is_at_least $least
}

total_is_at_least() { [ "$(total)" -ge "$1" ]; }

# end_load NAME: ends the clients, and adds a line to the table. Sets a variable for each figure.
end_load() {
    local took
    took=$(since "$load_began")
    exec 9>&-
    wait "$load" || fail "the visits are not exact: $(cat "$work/visited")"
    . <(tr ' ' '\n' <"$work/visited")
    printf '| %s | %s | %d | %d | %d | %d | %d | %d | %d | %d |\n' "$1" "$took" "$answered" $((refused + in_doubt + broken + wrong)) "$not_sent" \
        "$lost" "$duplicated" "$out_of_order" "$longest_ms" "$silence_ms" >>"$work/table"
}

# A client that is refused for seconds has no failed visit, and no answer either.
no_visit_failed() {
    [ $((refused + in_doubt + broken + wrong)) = 0 ] || fail "visits failed: $(cat "$work/visited")"
    [ "$silence_ms" -lt 2000 ] || fail "no visit was answered for $silence_ms ms"
}

# --- running the cases ---

clean_up() {
    trap '' INT TERM HUP
    local name
    k delete namespace "$namespace" "$namespace-dry" "$namespace-tls" --ignore-not-found --timeout 90s >/dev/null 2>&1 || echo "could not remove namespace $namespace"
    while read -r name; do k delete "$name" --timeout 30s >/dev/null 2>&1 || true; done <"$work/defined"
    rm -rf "$work"
}

# The later cases begin with three ready replicas.
prepare() {
    case $1 in
    every_overlay_*|api_server_*|kube_linter_*|local_*|web_of_production_*) ;;
    *) apply && within 120 replicas_are 3 && within 30 total ;;
    esac
}

main() {
    [ -n "${E2E_KUBECONFIG:-}" ] || { echo "SKIPPED: E2E_KUBECONFIG names no cluster"; exit 0; }
    export KUBECONFIG=$E2E_KUBECONFIG
    image=${E2E_IMAGE:-visitas:local}
    work=$(mktemp -d)
    touch "$work/defined"
    trap 'exit 130' INT TERM HUP
    trap clean_up EXIT
    k version >"$work/version" || { echo "the cluster of $KUBECONFIG does not answer" >&2; exit 1; }
    [ -x "$chaos" ] || { echo "$chaos is not built: make e2e-kubernetes builds it" >&2; exit 1; }
    sed -n 's/^Server Version: /# Kubernetes /p' "$work/version"

    run_cases "${@:-${cases[@]}}"
    if [ -e "$work/table" ]; then
        echo
        echo '| sixteen clients that keep their connections | s | visits answered | failed | connects refused | lost | duplicated | out of order | longest, ms | no answer for, ms |'
        echo '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |'
        cat "$work/table"
        echo
    fi
    echo "$verdict"
    [ $failed = 0 ]
}

# In one line, so that an edit of this file during the run does not change the run.
main "$@"; exit
