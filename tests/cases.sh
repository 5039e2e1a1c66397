# Runs cases, the functions of a test, one after the other, and prints a line for each. Sourced by
# tests/e2e.sh and tests/e2e-kubernetes.sh, which have `prepare NAME` (what a case needs before it begins)
# and a folder `work`.

# The status of a case that something is missing for; the last line that it prints says what.
skipped=77

# run_cases NAME...: sets `verdict`, a line, and `failed`, how many did. Never in a condition: there, the
# shell ignores `set -e` in each case.
run_cases() {
    local case begun
    begun=$(now)
    passed=0 failed=0 skips=0
    for case in "$@"; do run_case "$case"; done
    verdict="$passed passed, $failed failed, $skips skipped in $(since "$begun") s"
}

run_case() {
    local status=0 started
    started=$(now)
    : >"$work/notes"
    set +e
    (
        set -e
        prepare "$1"
        "$1"
    ) >"$work/log" 2>&1
    status=$?
    set -e
    case $status in
    0) echo "ok - $1 ($(since "$started") s)"; passed=$((passed + 1)) ;;
    $skipped) echo "ok - $1 # SKIPPED: $(tail -1 "$work/log")"; skips=$((skips + 1)) ;;
    # Without the progress of Compose and of builds.
    *) echo "not ok - $1 ($(since "$started") s)"; failed=$((failed + 1))
        grep -Ev '^(#[0-9]| (Container|Network|Volume) |$)' "$work/log" | tail -40 | sed 's/^/#   /' || true ;;
    esac
    cat "$work/notes"
}

# within SECONDS COMMAND...: repeats the command until it succeeds.
within() {
    local deadline=$((SECONDS + $1)); shift
    until "$@" >"$work/last" 2>&1; do
        [ $SECONDS -lt $deadline ] || { cat "$work/last"; fail "timed out: $*"; }
        sleep 0.2
    done
}

# ends_with STATUS COMMAND...: whether the command exits with this status. A command that cannot be run
# exits with another status than one that refuses.
ends_with() {
    local wanted=$1 status=0; shift
    "$@" || status=$?
    [ $status = "$wanted" ] || { echo "status $status: $*"; return 1; }
}

# refuses WORDS COMMAND...: whether the command fails with these words.
refuses() {
    local words=$1 said; shift
    if said=$("$@" 2>&1); then
        echo "succeeds: $*"
        return 1
    fi
    grep -F "$words" <<<"$said" || { echo "$said"; return 1; }
}

# lacks TEXT FILTER...: whether grep finds nothing in TEXT; an error of grep does not count.
lacks() {
    local text=$1; shift
    ends_with 1 grep "$@" <<<"$text"
}

now() { date +%s.%N; }

since() { awk "BEGIN { printf \"%.1f\", $(now) - $1 }"; }

less() { awk "BEGIN { exit !($1 < $2) }"; }

note() { sed 's/^/# /' <<<"$*" >>"$work/notes"; }

fail() { echo "failed: $*"; exit 1; }
