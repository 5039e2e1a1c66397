#!/usr/bin/env bash
# Cuts the power of the machine that runs `docker compose`, prints what was lost, and writes it into
# docs/kills.md. The volume of `db` lies on ext4 in an image on XFS: `cp --reflink=always` copies at one
# instant what had reached the device, and nothing of the page cache. proof/src/disk.rs says more.
#
#   tests/powercut-compose.sh
#
# Needs root (or a sudo that asks nothing), a Docker Engine on this machine, loop devices, xfsprogs and
# e2fsprogs; elsewhere it says SKIPPED and why. It uses its own project name and port, ignores .env, and
# removes what it made, and only that, however it ends.
set -euo pipefail
cd "$(dirname "$0")/.."

# within, fail and their like
. tests/cases.sh
# compose, rows, begin_load and their like
. tests/stack.sh

project=visitas-powercut-$$
cuts_under_load=4
# Debian keeps the tools of an administrator where only root looks for programs.
PATH=$PATH:/usr/sbin:/sbin

# --- what is cut ---

just_after_the_first_start() {
    start_on_an_empty_disk
    begin_load
    cut_power
    start_again
    end_load "just after \`docker compose up\` on a new volume" 1
    is_exact
}

under_load() {
    start_on_an_empty_disk
    begin_load
    for _ in $(seq $cuts_under_load); do
        sleep "$(awk "BEGIN { print 0.3 + 1.5 * $RANDOM / 32768 }")"
        cut_power
        start_again
        visited 200
    done
    end_load "under load" $cuts_under_load
    is_exact
}

# Must lose visits: otherwise the test sees no missing flush.
control() {
    start_on_an_empty_disk 'services: { db: { command: [postgres, -cfsync=off] } }'
    begin_load
    # So that the server starts again: what it has until now is on the disk.
    docker exec "$project-db" sync
    sleep 2
    cut_power
    start_again
    end_load "control: \`fsync=off\`" 1
    [ "$(counted lost)" -gt 0 ] || fail "the control lost no visit: this test is blind"
}

# --- helpers ---

# start_on_an_empty_disk [SETTINGS]: with these settings next to docker-compose.yml, an override file.
start_on_an_empty_disk() {
    remove_everything >"$work/log" 2>&1
    unmount_disk
    image=$work/store/empty
    as_root truncate --size 2G "$image"
    as_root mkfs.ext4 -q "$image"
    as_root mount -o loop "$image" "$work/disk"
    # Not the root of the disk, where `lost+found` is: initdb wants an empty folder.
    as_root mkdir "$work/disk/data"
    as_root sync --file-system "$work/disk"
    printf '%s\n' "${1:-}" 'volumes:' '  db-data:' '    driver: local' \
        "    driver_opts: { type: none, o: bind, device: $work/disk/data }" >"$work/override.yml"
    start_again --build
    as_root test -e "$work/disk/data/PG_VERSION" || fail "the database is not on the disk"
}

start_again() {
    compose --file "$work/override.yml" up --detach --wait --wait-timeout 120 "$@" >"$work/log" 2>&1 ||
        { tail -1 "$work/log"; compose logs --tail 2; fail "the stack does not start"; }
}

# Copies the disk, kills the containers, and puts the copy in the place of the disk. Responses after the
# copy do not count: with the power off, no client would have had them.
cut_power() {
    local cut copy
    copy=$work/store/$((++copies))
    cut=${EPOCHREALTIME/[.,]/}
    as_root cp --reflink=always "$image" "$copy"
    compose kill >"$work/log" 2>&1
    echo "$cut ${EPOCHREALTIME/[.,]/}" >&"$load_input"
    unmount_disk
    image=$copy
    as_root mount -o loop "$image" "$work/disk"
}

# Waits until Docker has let go of the disk, too.
unmount_disk() {
    [ -n "$image" ] || return 0
    as_root umount "$work/disk"
    within 10 is_free "$image"
    as_root rm "$image"
}

is_free() { [ -z "$(as_root losetup --associated "$1")" ]; }

# end_load WHAT CUTS: ends the clients, and adds a row to the table.
end_load() {
    status=0
    stop_load || status=$?
    [ $status -le 1 ] || fail "the visits cannot be judged: $(cat "$work/visits")"
    echo "powercut-compose: $1: $(cat "$work/visits")" >&2
    printf '| %s ' "$1" "$2" "$(grouped answered)" "$(grouped lost)" "$(grouped duplicated)" "$(grouped out_of_order)" \
        "$(grouped in_doubt broken)" "$(counted silence_ms | awk '{ printf "%.1f s", $1 / 1000 }')" >>"$work/table"
    echo '|' >>"$work/table"
}

# grouped NAME...: the sum of these counts, with a space between thousands.
grouped() { counted "$@" | sed -E ':again; s/([0-9])([0-9]{3})($| )/\1 \2\3/; t again'; }

# Whether the judge found nothing wrong, and the number of one more visit is that of the rows.
is_exact() {
    local before
    [ $status = 0 ] || fail "numbers are wrong: $(cat "$work/visits")"
    before=$(rows)
    [ "$(total)" = $((before + 1)) ] || fail "the total is wrong with $before rows"
}

as_root() { if [ $EUID = 0 ]; then "$@"; else sudo -n "$@"; fi; }

skip_reason() {
    local program
    as_root true 2>/dev/null || { echo "needs root, or a sudo that asks for no password"; return; }
    for program in mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs; do
        command -v "${program%:*}" >/dev/null || { echo "needs ${program%:*} (package ${program#*:})"; return; }
    done
    [ -e /dev/loop-control ] || { echo "needs loop devices"; return; }
    clean docker compose version >/dev/null 2>&1 && clean docker info >/dev/null 2>&1 ||
        { echo "needs a running Docker Engine with Compose 2.24 or newer"; return; }
    # An engine in a virtual machine, or without root, does not see what is mounted here.
    [ "$(clean docker info --format '{{.Name}} {{.KernelVersion}}')" = "$(uname -nr)" ] &&
        lacks "$(clean docker info --format '{{.SecurityOptions}}')" name=rootless >/dev/null ||
        echo "needs a Docker Engine on this machine that runs as root"
}

make_store() {
    mkdir "$work/store" "$work/disk" &&
        truncate --size 12G "$work/backing" &&
        mkfs.xfs -q -m reflink=1 "$work/backing" &&
        as_root mount -o loop "$work/backing" "$work/store" &&
        # The mount keeps the space until it ends, and nothing else does.
        rm "$work/backing"
}

clean_up() {
    trap '' INT TERM HUP
    [ -z "$load" ] || kill "$load" 2>/dev/null || true
    remove_everything >/dev/null 2>&1 || echo "could not remove everything of project $project"
    docker image rm --force "$project-web" >/dev/null 2>&1 || true
    for mount in disk store; do
        ! mountpoint --quiet "$work/$mount" || as_root umount --lazy "$work/$mount"
    done
    rm -rf --one-file-system "$work"
}

main() {
    local why
    why=$(skip_reason)
    if [ -n "$why" ]; then echo "powercut-compose: SKIPPED: $why"; return; fi

    work=$(mktemp -d) load='' image='' copies=0
    WEB_PORT=$(free_port)
    url=http://127.0.0.1:$WEB_PORT
    env_file=$work/env
    echo "WEB_PORT=127.0.0.1:$WEB_PORT" >"$env_file"
    trap 'exit 130' INT TERM HUP
    trap clean_up EXIT
    make_store >"$work/log" 2>&1 ||
        { echo "powercut-compose: SKIPPED: cannot mount XFS from a loop device: $(tail -1 "$work/log")"; return; }

    printf '| %s ' >"$work/table" "the power is cut" cuts acknowledged lost duplicated "out of order" "in doubt" "longest time without a 200"
    printf '%s\n' >>"$work/table" '|' '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |'
    just_after_the_first_start
    under_load
    control
    cat "$work/table"
    "${CARGO_TARGET_DIR:-target}/debug/proof" compose <"$work/table"
}

# In one line, so that an edit of this file during the run does not change the run.
main "$@"; exit
