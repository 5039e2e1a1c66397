#!/usr/bin/env python3
"""Break recorder, pool and availability in one place at a time and see whether the simulation notices.

    tests/simulation.py [--schedules N] [NAME ...]

Each mutant replaces one text in a copy of the work tree in target/simulation-mutants. It is caught when the
simulation fails or hangs, and missed when all schedules pass. Exits with 1 if one is missed.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = ROOT / "target" / "simulation-mutants"
RECORDER, PACE = "src/recorder/mod.rs", "src/recorder/pace.rs"
POOL, AVAILABILITY = "src/store/pool.rs", "src/store/availability.rs"

# Seconds for the schedules of one mutant; a build has no limit.
TIMEOUT = 240

# A name, a file, and a text that is in it once with what takes its place.
MUTANTS = [
    ("numbers-in-wrong-order", RECORDER, ".zip(batch.visits.queued.drain(..).rev())", ".zip(batch.visits.queued.drain(..))"),
    ("one-number-for-all", RECORDER, "total: total - before,", "total: total - before.min(0),"),
    ("redis-numbers-ahead", RECORDER, "batch.redis.map(|redis| redis - before)", "batch.redis.map(|redis| redis + before)"),
    ("doubt-is-called-failure", RECORDER, "(Outcome::InDoubt, Refusal::InDoubt)\n                } else", "(Outcome::Failed, Refusal::Failed)\n                } else"),
    ("failure-is-called-doubt", RECORDER, "if failure.is_in_doubt() {", "if failure.sent {"),
    ("failed-batch-is-counted", RECORDER, "    if let Ok(total) = total\n", "    if let Ok(total) = total.as_ref().map_or(Ok::<i64, ()>(0), |total| Ok(*total))\n"),
    ("counted-while-redis-is-down", RECORDER, "if has_time && redis.availability().is_up() {", "if has_time {"),
    ("sent-while-postgres-is-down", RECORDER, "if !self.postgres.availability().is_up() {", "if false {"),
    ("turn-ends-at-once", RECORDER, "let _turn = turns.wait(", "let _ = turns.wait("),
    ("visits-wait-while-postgres-is-down", RECORDER, "            Turn::OPEN\n", "            self.pace.turn(Instant::now(), in_flight, Duration::ZERO)\n"),
    ("abandoned-visit-is-sent", RECORDER, "visit.deadline <= now || visit.reply.is_closed();", "visit.deadline <= now;"),
    ("late-visit-is-called-abandoned", RECORDER, "            if visit.deadline <= now {\n", "            if false {\n"),
    ("taken-visits-are-not-published", RECORDER, "self.progress.take(last);", "let _ = last;"),
    ("stop-forgets-what-is-in-flight", RECORDER, "while is_queue_open || !in_flight.is_empty() {", "while is_queue_open {"),
    ("stop-leaves-the-queue-open", RECORDER, "if !self.queue.is_closed() => {\n                    self.queue.close();", "if false => {"),
    ("late-reply-counts-as-recorded", RECORDER, "outcome.count(batch_size - late);", "outcome.count(batch_size);"),
    ("batches-never-overlap", PACE, "if self.recorded < FIRST_BATCHES || !is_far {", "if true {"),
    ("near-batches-overlap", PACE, "if self.recorded < FIRST_BATCHES || !is_far {", "if self.recorded < FIRST_BATCHES {"),
    ("lone-visit-waits", PACE, "if in_flight == 0 {", "if in_flight == 0 && self.left.is_none_or(|left| now >= left + Duration::from_millis(30)) {"),
    ("failure-marks-nothing-down", AVAILABILITY, "if self.up.swap(false, Ordering::AcqRel) {", "if self.up.load(Ordering::Acquire) {"),
    ("earlier-failure-begins-an-outage", AVAILABILITY, "        began < self.details().since\n", "        began < self.details().since && false\n"),
    ("outage-wakes-no-probe", AVAILABILITY, "        self.went_down.notify_waiters();\n", ""),
    ("relapse-has-no-pause", AVAILABILITY, "details.relapses.saturating_add(1)", "details.relapses"),
    ("older-batch-sets-the-count", AVAILABILITY, " && !(overlaps && count < known)", ""),
    ("reading-sets-the-count-back", AVAILABILITY, "if !(is_known && details.last_batch.is_some_and(is_newer)) {", "if true || (is_known && details.last_batch.is_some_and(is_newer)) {"),
    ("connection-with-a-call-is-used-again", POOL, "        link.in_doubt || link.outage", "        link.outage"),
    ("unsent-counts-as-sent", POOL, "let sent = AtomicBool::new(false);", "let sent = AtomicBool::new(true);"),
]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--schedules", type=int, default=50_000, metavar="N", help="for each mutant")
    arguments.add_argument("names", nargs="*", metavar="NAME", help="try these mutants only")
    arguments = arguments.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant[0] in arguments.names]
    missed = [mutant[0] for mutant in chosen if not try_one(mutant, arguments.schedules)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants caught", flush=True)
    sys.exit(1 if missed or not chosen else 0)


def try_one(mutant, schedules):
    name, file, old, new = mutant
    copy_tree()
    path = PLACE / "tree" / file
    text = path.read_text()
    if text.count(old) != 1:
        sys.exit(f"{name}: its text is in {file} {text.count(old)} times")
    path.write_text(text.replace(old, new))
    built = cargo("--no-run", schedules, None)
    if built != 0:
        sys.exit(f"{name} does not compile")
    began = time.monotonic()
    result = cargo("--nocapture", schedules, TIMEOUT)
    how = "missed" if result == 0 else "caught"
    print(f"{how:7} {name} in {time.monotonic() - began:.1f} s", flush=True)
    return result != 0


def copy_tree():
    """Copies what git tracks, and leaves files alone that are as they were, so that builds are short."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listing.stdout.split("\0"):
        source, target = ROOT / name, PLACE / "tree" / name
        if not name or not source.is_file():
            continue
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def cargo(flag, schedules, timeout):
    """Builds or runs the simulation in the copy, and returns its exit status, or None if it hangs."""
    command = ["cargo", "test", "--profile", "simulation", "--package", "visitas", "--lib", "--locked", "--quiet"]
    command += ["--no-run"] if flag == "--no-run" else ["--", "simulation::no_schedule", flag]
    # Not a folder of its own: the dependencies are built already.
    environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target"), "SCHEDULES": str(schedules)}
    with open(PLACE / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=PLACE / "tree", env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            # With the test program that cargo has started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


if __name__ == "__main__":
    main()
