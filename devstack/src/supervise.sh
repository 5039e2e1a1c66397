# Signals all processes of a server. Outlives a killed runner, to stop the servers that it started.
#
#   signal NAME PID    sends the signal to the process and its descendants; after KILL, waits until
#                      they are gone
#   watch FOLDER       kills what the runner started once the runner is gone, then removes FOLDER,
#                      unless FOLDER is an empty string
#
# Every process of Postgres starts its own session, so no process group holds them all.
# shellcheck shell=sh

# Prints a line per process that begins with its id, perhaps its name in parentheses, its state and its
# parent's id. Slim images have no `ps`, macOS no /proc.
processes() {
    if [ -r /proc/self/stat ]; then
        cat /proc/[0-9]*/stat 2>/dev/null
    else
        ps -A -o pid= -o state= -o ppid=
    fi
}

signal() {
    kill -STOP "$2" || return 1 # A stopped process starts no child while its descendants are listed.
    family=$(processes | awk -v root="$2" '
        { sub(/\(.*\)/, ""); parent[$1] = $3 }
        END {
            for (pid in parent) {
                ancestor = pid
                while (ancestor in parent && ancestor != root) ancestor = parent[ancestor]
                if (ancestor == root) print pid
            }
        }')
    # shellcheck disable=SC2086 # One word per id.
    kill -"$1" $family
    tries=0
    while [ "$1" = KILL ] && [ $tries -lt 100 ] && any_left; do
        tries=$((tries + 1))
        sleep 0.02
    done
} 2>/dev/null

# Whether a process of $family still runs; a zombie does not.
any_left() {
    processes | awk -v family="$family" '
        BEGIN { split(family, ids); for (i in ids) wanted[ids[i]] }
        $1 in wanted { sub(/\(.*\)/, ""); if ($2 !~ /^[ZX]/) found = 1 }
        END { exit !found }'
}

# Only the runner holds the other end of standard input, so the input ends when the runner ends,
# also when it is killed. Each line is the process to kill at that point, or 0 for none.
watch() {
    trap '' HUP INT QUIT TERM
    server=0
    while read -r line; do
        server=$line
    done
    if [ "$server" -gt 0 ]; then
        signal KILL "$server"
    fi
    if [ -n "$1" ]; then
        # A killed Postgres leaves a shared memory segment, and a machine has few of them.
        segment=$(sed -n '7s/.* //p' "$1"/postgres-*/postmaster.pid 2>/dev/null)
        if [ -n "$segment" ]; then
            ipcrm -m "$segment" 2>/dev/null
        fi
        rm -rf -- "$1"
    fi
}

"$@"
