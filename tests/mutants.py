#!/usr/bin/env python3
"""Break the service in one place at a time and see whether a test notices.

    tests/mutants.py [--files PATH ...] [--every N] [--minutes N]

cargo-mutants (`cargo install cargo-mutants --locked`) lists the mutants. The script builds each mutant
in a separate work tree and runs the tests of the committed revision against it: first a few quick
integration tests, then the tests listed below for the mutated file, then the unit tests of its module.
A mutant is caught if a test fails or hangs, and missed if all tests pass. A mutant that does not
compile is not counted. Results are kept in target/mutants.json, so a run that was stopped continues
where it ended; a mutant is tried again when its file has changed.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TREE = ROOT / "target" / "mutants"
# What earlier runs found, by file and mutant.
KNOWN = ROOT / "target" / "mutants.json"

# Seconds after which a run of tests counts as hanging.
QUICK_TIMEOUT = 60
FULL_TIMEOUT = 400

# Tests that most mutants fail, whichever file they are in.
QUICK = ["http::second_visit_counts_two", "commands::"]
STORE = [
    "adoption::", "batch::", "commands::", "count::", "kept::", "outage::", "promise::", "relapse::",
    "repair::", "replaced::", "restored::", "spans::", "spared::",
]
TESTS = {
    "src/recorder.rs": ["abandoned::", "batch::", "load::", "outage::", "promise::", "shutdown::", "spans::", "unread::"],
    "src/routes/health.rs": ["adoption::", "http::", "outage::", "restored::", "shutdown::"],
    "src/routes/visit.rs": ["http::", "outage::", "promise::"],
    "src/lifecycle.rs": ["rolling::", "shutdown::"],
    "src/store/postgres/trust.rs": ["roots::"],
    "src/store/postgres/session.rs": ["roots::", "tls::", *STORE],
    "src/store/": STORE,
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--files", nargs="+", default=list(TESTS), metavar="PATH")
    arguments.add_argument("--every", type=int, default=1, metavar="N", help="try each Nth mutant only")
    arguments.add_argument("--minutes", type=float, default=240, metavar="N", help="stop after N minutes")
    options = arguments.parse_args()

    make_tree()
    mutants = list_mutants(options.files)[:: options.every]
    tests = build_tests()
    print(f"{len(mutants)} mutants", flush=True)
    ends = time.monotonic() + options.minutes * 60
    results = {"caught": [], "missed": [], "does not compile": []}
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    for number, mutant in enumerate(mutants, 1):
        key = f"{source_of(mutant)} {mutant['name']}"
        if key not in known:
            if time.monotonic() > ends:
                print(f"stopped: {options.minutes:g} minutes have passed", flush=True)
                break
            started = time.monotonic()
            known[key] = attempt(mutant, tests)
            KNOWN.write_text(json.dumps(known, indent=1))
            seconds = time.monotonic() - started
            print(f"{number:4} {known[key]:28} {seconds:4.0f} s  {mutant['name']}", flush=True)
        result = known[key].removesuffix(" by a unit test").removesuffix(" by an integration test")
        results[result].append(mutant)
    print(", ".join(f"{len(found)} {result}" for result, found in results.items()))
    for mutant in results["missed"]:
        print(f"missed: {mutant['name']}")
    return 1 if results["missed"] else 0


def make_tree():
    """A work tree of the committed revision, built once with all its tests."""
    if TREE.exists():
        run("git", "-C", TREE, "checkout", "--quiet", "--force", "--detach", run("git", "rev-parse", "HEAD").strip())
    else:
        run("git", "worktree", "add", "--quiet", "--force", "--detach", TREE, "HEAD")


def list_mutants(files):
    patterns = [argument for file in files for argument in ("--file", f"{file}**" if file.endswith("/") else file)]
    mutants = json.loads(run("cargo", "mutants", "--list", "--json", "--diff", *patterns, cwd=TREE))
    unique = {mutant["name"]: mutant for mutant in mutants}
    return [unique[name] for name in sorted(unique)]


def source_of(mutant):
    """The version of the mutant's file, by git."""
    return run("git", "hash-object", mutant["file"], cwd=TREE).strip()[:12]


def build_tests():
    messages = run(
        "cargo", "test", "--package", "visitas", "--locked", "--no-run", "--message-format", "json", cwd=TREE
    )
    for line in messages.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "it":
            # A copy, since a later build of the mutated program can replace the file.
            copy = TREE / "target" / "it"
            copy.write_bytes(pathlib.Path(message["executable"]).read_bytes())
            copy.chmod(0o755)
            return copy
    sys.exit("no test program was built")


def attempt(mutant, tests):
    file = TREE / mutant["file"]
    source = file.read_text()
    subprocess.run(["patch", "--quiet", "--strip=0"], cwd=TREE, input=mutant["diff"], text=True, check=True)
    try:
        if not passes(["cargo", "build", "--locked", "--bin", "visitas"], 600):
            return "does not compile"
        full = ["--include-ignored", *filters_of(mutant["file"])]
        for filters, timeout in ((QUICK, QUICK_TIMEOUT), (full, FULL_TIMEOUT)):
            if not passes([tests, *filters], timeout):
                return "caught by an integration test"
        module = mutant["file"].removeprefix("src/").removesuffix(".rs").removesuffix("/mod").replace("/", "::")
        unit = ["cargo", "test", "--package", "visitas", "--lib", "--locked", f"{module}::"]
        if not passes(unit, 600):
            return "caught by a unit test"
        return "missed"
    finally:
        file.write_text(source)


def filters_of(file):
    return TESTS[max((key for key in TESTS if file.startswith(key)), key=len)]


def passes(command, timeout):
    """Whether a command succeeds in time. Its whole process group ends with it."""
    environment = {**os.environ, "CARGO_MANIFEST_DIR": str(TREE), "CARGO_TARGET_DIR": str(TREE / "target")}
    process = subprocess.Popen(
        command, cwd=TREE, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run(*command, cwd=ROOT):
    environment = {**os.environ, "CARGO_TARGET_DIR": str(TREE / "target")}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    sys.exit(main())
