#!/usr/bin/env python3
"""Break the service in one place at a time and see whether a test notices.

    tests/mutants.py [--files PATH ...] [--every N] [--minutes N] [--workers N]
                     [--retry RESULT] [--faults] [--tests NAME ...]

cargo-mutants (`cargo install cargo-mutants --locked`) lists the mutants. Each worker builds one mutant
after the other in a work tree of its own, and runs the tests of the committed revision that are listed
below for the mutated file: the unit tests of its module, and integration tests. A mutant is caught as
soon as a test fails, by itself once more, or when the tests hang, and missed if all tests pass. With
--faults those that were missed meet the tests of `make faults`, one mutant at a time, since these
tests read clocks. The lists are short, so that a missed mutant takes a minute: with --retry and --tests
it meets the tests that should catch it. Without a mutant all tests have to pass, as in
`make test`. A mutant that does not compile is not counted. Results are kept in
tests/mutants.json, so a run continues where the last one ended, on any machine. A mutant is tried again
when its file has changed (its unit tests apart), or with --retry, as `--retry missed` after a new test.
tests/mutants_missed.json says of a mutant that no test can catch, or need not, why.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TREES = ROOT / "target" / "mutants"
# What earlier runs found, by version of the file and mutant.
KNOWN = ROOT / "tests" / "mutants.json"
# Why a mutant is missed, by its file and what it changes.
REASONS = ROOT / "tests" / "mutants_missed.json"

# Seconds without a line of output after which a build, or a run of tests, counts as hanging.
TIMEOUT = 120
# The same for unit tests: a mutant that never waits keeps the processors busy.
UNIT_TIMEOUT = 50

MISSED = "missed"
# Missed by the tests of `make faults` as well.
MISSED_BY_ALL = "missed by all"

# A test that many mutants fail, whichever file they are in.
QUICK = ["http::second_visit_counts_two"]
# Files that the simulated schedules run through.
SIMULATED = [
    "src/recorder/mod.rs", "src/recorder/pace.rs", "src/recorder/timer.rs", "src/recorder/turns.rs",
    "src/store/availability.rs", "src/store/call.rs", "src/store/error.rs", "src/store/pool.rs",
    "src/store/watch.rs",
]
TESTS = {
    "src/lifecycle.rs": ["commands::", "rolling::", "shutdown::"],
    "src/recorder/": [
        "abandoned::", "batch::", "http::", "late::", "load::", "outage::", "page::", "promise::", "relapse::",
        "shutdown::", "spans::", "unread::",
    ],
    "src/routes/health.rs": ["commands::", "http::", "outage::", "replaced::", "restored::", "roles::", "shutdown::"],
    "src/routes/visit.rs": ["http::", "kept::", "late::", "outage::", "page::", "promise::", "restored::", "spans::"],
    "src/store/": ["batch::", "metrics::", "outage::", "relapse::", "resources::", "restored::", "spans::", "spared::"],
    "src/store/availability.rs": [
        "http::health_", "log::", "outage::", "page::", "redis_logins::", "relapse::", "roles::", "spared::",
        "visitas_route::",
    ],
    "src/store/call_metrics.rs": ["exposition::", "metrics::", "observability::", "spans::"],
    "src/store/error.rs": ["abandoned::", "metrics::", "outage::", "promise::", "relapse::", "replaced::", "spans::"],
    "src/store/files.rs": ["logins::", "roots::"],
    "src/store/postgres/attempts.rs": ["adoption::"],
    "src/store/postgres/error.rs": [
        "relapse::", "roles::", "tls::", "spans::", "outage::", "restored::", "adoption::", "logins::",
    ],
    "src/store/postgres/login.rs": ["logins::", "roots::", "strangers::", "tls::", "urls::"],
    "src/store/postgres/long_session.rs": ["adoption::", "repair::"],
    "src/store/postgres/migrate.rs": [
        "commands::migrate", "adoption::service_migrates", "adoption::wait_for_the_migration_lock", "ledger::",
        "replaced::missing_object", "roles::sessions", "roles::upgrade", "kept::trigger_that_misses",
    ],
    "src/store/postgres/mod.rs": ["count::", "outage::", "repair::", "kept::first_visit", "replaced::missing_object"],
    "src/store/postgres/route.rs": ["outage::", "far::"],
    "src/store/postgres/session.rs": ["poolers::", "promise::", "outage::", "count::", "urls::", "tls::"],
    "src/store/postgres/statements.rs": [
        "count::", "kept::", "promise::", "repair::recount", "ledger::objects", "roles::right", "roles::each_command",
    ],
    "src/store/postgres/trust.rs": ["roots::", "tls::"],
    "src/store/redis/": ["redis_logins::", "relapse::", "repair::reconcile", "outage::"],
    "src/store/watch.rs": ["repair::gauges", "relapse::", "outage::"],
}
ROOMS = ["src/recorder/", "src/routes/health.rs", "src/routes/visit.rs", "src/lifecycle.rs", "src/store/"]

results = threading.Lock()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--files", nargs="+", default=ROOMS, metavar="PATH")
    arguments.add_argument("--every", type=int, default=1, metavar="N", help="try each Nth mutant only")
    arguments.add_argument("--minutes", type=float, default=240, metavar="N", help="stop after N minutes")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="mutants tried at a time")
    arguments.add_argument("--retry", metavar="RESULT", help="try mutants again that had this result")
    arguments.add_argument("--faults", action="store_true", help="try missed mutants with the tests of make faults")
    arguments.add_argument("--tests", nargs="+", metavar="NAME", help="the tests to run instead of the listed ones")
    options = arguments.parse_args()
    if options.faults:
        options.workers, options.retry = 1, MISSED

    trees = [Tree(number) for number in range(options.workers)]
    mutants = list_mutants(trees[0], options.files)[:: options.every]
    known = json.loads(KNOWN.read_text())
    reasons = json.loads(REASONS.read_text())
    waiting = queue.SimpleQueue()
    for mutant in mutants:
        result = known.get(mutant["key"])
        # An explained one is not worth the time.
        if (result is None and not options.faults) or (result == options.retry and change_of(mutant) not in reasons):
            waiting.put(mutant)
    print(f"{len(mutants)} mutants, {waiting.qsize()} of them to try", flush=True)

    ends = time.monotonic() + options.minutes * 60
    workers = [threading.Thread(target=work, args=(tree, waiting, known, ends, options)) for tree in trees]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    tried = [mutant for mutant in mutants if mutant["key"] in known]
    missed = [mutant for mutant in tried if known[mutant["key"]] in (MISSED, MISSED_BY_ALL)]
    uncompiled = sum(known[mutant["key"]] == "does not compile" for mutant in tried)
    caught = len(tried) - len(missed) - uncompiled
    unexplained = [mutant["name"] for mutant in missed if change_of(mutant) not in reasons]
    print(f"{caught} caught, {len(missed)} missed, {uncompiled} do not compile, {len(mutants) - len(tried)} not tried")
    for name in unexplained:
        print(f"missed without a reason: {name}")
    return 1 if unexplained else 0


def change_of(mutant):
    """The name of a mutant without its place, which changes with every line above."""
    return re.sub(r"^(\S+?):\d+:\d+", r"\1", mutant["name"])


def work(tree, waiting, known, ends, options):
    """Tries mutants until none waits or the time is over."""
    while time.monotonic() < ends:
        try:
            mutant = waiting.get_nowait()
        except queue.Empty:
            return
        started = time.monotonic()
        with results:
            catchers = catchers_of(mutant["file"], known)
        result = tree.attempt(mutant, options, catchers)
        seconds = time.monotonic() - started
        with results:
            known[mutant["key"]] = result
            save(known, tree)
            print(f"{seconds:4.0f} s  {mutant['name']}: {result}", flush=True)


def save(known, tree):
    """Keeps the results for the committed versions of the files."""
    versions = {tree.version(file) for file in {key.split(" ", 1)[1].split(":", 1)[0] for key in known}}
    kept = {key: result for key, result in known.items() if key.split(" ", 1)[0] in versions}
    KNOWN.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")


def list_mutants(tree, files):
    patterns = [argument for file in files for argument in ("--file", f"{file}**" if file.endswith("/") else file)]
    unique = {}
    for mutant in json.loads(tree.run("cargo", "mutants", "--list", "--json", "--diff", *patterns)):
        mutant["key"] = f"{tree.version(mutant['file'])} {mutant['name']}"
        unique[mutant["name"]] = mutant
    return [unique[name] for name in sorted(unique)]


class Tree:
    """A work tree of the committed revision, with its tests built."""

    def __init__(self, number):
        self.path = TREES / str(number)
        # Nobody reads the debug information, and it is half of the time of a build. Few schedules,
        # since tests with real servers follow.
        self.environment = {
            **os.environ, "CARGO_TARGET_DIR": str(self.path / "target"), "CARGO_PROFILE_DEV_DEBUG": "false",
            "SCHEDULES": "400",
        }
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        if self.path.exists():
            self.run("git", "checkout", "--quiet", "--force", "--detach", head)
        else:
            command = ["git", "worktree", "add", "--quiet", "--force", "--detach", self.path, head]
            subprocess.run(command, cwd=ROOT, check=True)
        self.tests = self.build_tests()

    def build_tests(self):
        messages = self.run("cargo", "test", "--package", "visitas", "--locked", "--no-run", "--message-format", "json")
        for line in messages.splitlines():
            message = json.loads(line)
            if message.get("executable") and message["target"]["name"] == "it":
                # A copy, since a later build of the mutated program can replace the file.
                copy = self.path / "target" / "it"
                copy.write_bytes(pathlib.Path(message["executable"]).read_bytes())
                copy.chmod(0o755)
                return copy
        sys.exit("no test program was built")

    def attempt(self, mutant, options, catchers):
        file = self.path / mutant["file"]
        source = file.read_text()
        command = ["patch", "--quiet", "--strip=0"]
        subprocess.run(command, cwd=self.path, input=mutant["diff"], text=True, check=True)
        try:
            if self.failure(["cargo", "build", "--locked", "--bin", "visitas"]):
                return "does not compile"
            # Golden files are found by this variable. Builds do not get it: build scripts would run again.
            program = ["env", f"CARGO_MANIFEST_DIR={self.path}", self.tests]
            unit = ["cargo", "test", "--package", "visitas", "--lib", "--locked", "--"]
            integration = options.tests or filters_of(mutant["file"])
            if options.faults:
                failure = self.confirmed_failure(program, ["--ignored", *integration])
                return f"caught: {failure}" if failure else MISSED_BY_ALL
            if options.tests:
                failure = self.confirmed_failure(program, options.tests)
                return f"caught: {failure}" if failure else MISSED
            if failure := self.confirmed_failure(program, QUICK):
                return f"caught: {failure}"
            if units := units_of(mutant["file"], source):
                if self.failure([*unit[:-1], "--no-run", "--quiet"]):
                    return "does not compile"
                if failure := self.confirmed_failure(unit, units, UNIT_TIMEOUT):
                    return f"caught: {failure}"
            if first := [test for test in catchers if test.startswith(tuple(integration))]:
                if failure := self.confirmed_failure(program, ["--exact", *first]):
                    return f"caught: {failure}"
            # One module after the other, in the order of the list.
            for module in integration:
                if failure := self.confirmed_failure(program, [module]):
                    return f"caught: {failure}"
            return MISSED
        finally:
            file.write_text(source)

    def confirmed_failure(self, command, filters, limit=TIMEOUT):
        """The first failed test that fails by itself as well: one that only a busy machine failed is no catch."""
        passed = []
        while failure := self.failure([*command, *filters, *passed], limit):
            if "::" not in failure or self.failure([*command, "--include-ignored", "--exact", failure], limit):
                return failure
            passed += ["--skip", failure]
        return None

    def failure(self, command, limit=TIMEOUT):
        """Runs a command; returns its first failed test, what else is wrong, or None. Its whole process group ends with it."""
        process = subprocess.Popen(
            command, cwd=self.path, env=self.environment, start_new_session=True, bufsize=0,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        try:
            while select.select([process.stdout], [], [], limit)[0]:
                # Unbuffered, so that what has been read is all that select does not see.
                line = process.stdout.readline().decode(errors="replace")
                if failed := re.match(r"test (\S+) .*\.\.\. FAILED", line):
                    return failed[1]
                if not line:
                    return f"status {process.returncode}" if process.wait() else None
            return "hangs"
        finally:
            kill(process)
            process.wait()

    @functools.cache
    def version(self, file):
        """Names what is committed of a file but its unit tests; a mutant can be in its place. None if there is none."""
        shown = subprocess.run(["git", "show", f"HEAD:{file}"], cwd=self.path, capture_output=True)
        if shown.returncode:
            return None
        return hashlib.sha256(shown.stdout.split(b"\n#[cfg(test)]\nmod tests {")[0]).hexdigest()[:12]

    def run(self, *command):
        command = [str(part) for part in command]
        return subprocess.check_output(command, cwd=self.path, env=self.environment, text=True)


def kill(process):
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def filters_of(file):
    return TESTS[max((key for key in TESTS if file.startswith(key)), key=len)]


def catchers_of(file, known):
    """The tests that have caught another mutant of a file: they catch most of the others, too."""
    caught = [(key.split(" ", 1)[1], result.removeprefix("caught: ")) for key, result in known.items()]
    return sorted({test for name, test in caught if name.startswith(f"{file}:") and "::" in test})


def units_of(file, source):
    if file in SIMULATED:
        return ["recorder::", "store::"]
    module = file.removeprefix("src/").removesuffix(".rs").removesuffix("/mod").replace("/", "::")
    return [f"{module}::tests::"] if "#[cfg(test)]" in source else []


if __name__ == "__main__":
    sys.exit(main())
