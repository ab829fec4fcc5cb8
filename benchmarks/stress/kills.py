"""Commands that are killed, run out of space, may not write, or meet another run in their folder.

Every command runs in a forked child of this process, so that libraries are imported once and kills land in the work.
After each stop all files of the folder must be whole, what was finished must stay as it is, and in the end the command,
run again to its end, must leave what an undisturbed run leaves.

A command may be stopped at any moment of its time; times are drawn uniformly, and half of the kills come right after a
file in the folder changed, where they hurt most.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import (
    NET,
    Job,
    certify_job,
    data_job,
    figures_job,
    measures_job,
    mirror,
    tradeoff_job,
    train_job,
    zoo_job,
)

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.cli import main

sys.path.insert(0, str(Path(__file__).parents[1]))

from pruning_quality import where_run

_CONTEXT = multiprocessing.get_context("fork")
_PATIENCE = 300.0  # seconds that a run may take at most


@dataclasses.dataclass
class Count:
    """What was tried with one command, and what went wrong."""

    command: str
    kills: int = 0
    kills_midway: int = 0
    full_disks: int = 0
    read_only: int = 0
    two_runs: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


def child(words: list[str], errors: Path, limit: int | None) -> None:
    """Run a command in this (forked) process: silent, and with files of at most `limit` bytes."""
    os.setpgid(0, 0)
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(handle, 2)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    code = main(words)
    os._exit(code)


def start(job: Job, folder: Path, errors: Path, limit: int | None = None) -> Any:
    process = _CONTEXT.Process(target=child, args=(job.words(folder), errors, limit))
    process.start()
    return process


def run(job: Job, folder: Path, errors: Path, limit: int | None = None) -> int:
    """Run a command to its end; return its exit code."""
    process = start(job, folder, errors, limit)
    process.join(_PATIENCE)
    if process.exitcode is None:
        kill(process)
        raise TimeoutError(f"{job.name} took more than {_PATIENCE:g} s")
    return process.exitcode


def kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def state_of(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for place, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(os.path.join(place, name))
                found.add((os.path.join(place, name), stat.st_size, stat.st_mtime_ns))
    return found


def keeps(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return what of the finished work is gone or was made again; None if nothing."""
    if "certified" in before:
        worse = after.get("certified", 1.0) > before["certified"]
        return f"the certificate went from {before['certified']} to {after.get('certified')}" if worse else None
    lost = [name for name, mark in before.items() if after.get(name) != mark and not _superseded(name, after)]
    return f"made again or lost: {', '.join(lost[:3])}" if lost else None


def _superseded(name: str, after: dict[str, Any]) -> bool:
    """Return whether a part of a figure (".FIGURE-DIGEST/PART") is gone because the figure's data are complete."""
    folder, inside, _ = name.partition("/")
    return bool(inside) and f"{folder[1:].rpartition('-')[0]}.json" in after


def kill_often(job: Job, root: Path, count: Count, kills: int, usual: float, wanted: Any, rng: random.Random) -> None:
    """Kill a command up to three times in a folder, let it end, compare; until it was killed so many times."""
    trial = 0
    while count.kills < kills:
        trial += 1
        folder, errors = root / f"kill-{trial}", root / f"kill-{trial}.err"
        folder.mkdir()
        before: dict[str, Any] = {}
        for _ in range(min(rng.randint(1, 3), kills - count.kills)):
            process = start(job, folder, errors)
            began, delay, at_change = time.monotonic(), rng.uniform(0.0, usual), rng.random() < 0.5
            seen = state_of(folder)
            while process.is_alive() and time.monotonic() - began < _PATIENCE:
                late = time.monotonic() - began >= delay
                if late and (not at_change or state_of(folder) != seen):
                    break
                if not late:
                    seen = state_of(folder)
                time.sleep(0.0005)
            midway = process.is_alive()
            kill(process)
            count.kills += 1
            count.kills_midway += midway
            try:
                job.whole(folder)
                after = job.finished(folder)
            except Exception as error:  # whatever it is, a whole file would not have raised it
                count.failures.append(f"after a kill: {type(error).__name__}: {error}")
                break
            fault = keeps(before, after)
            if fault is not None:
                count.failures.append(f"after a kill: {fault}")
            before = after
        finish(job, folder, errors, count, before, wanted, "a kill")
        shutil.rmtree(folder)


def finish(
    job: Job, folder: Path, errors: Path, count: Count, before: dict[str, Any], wanted: Any, after_what: str
) -> None:
    """Run a command to its end after something happened to it, and compare what it leaves."""
    code = run(job, folder, errors)
    if code != 0:
        count.failures.append(f"rerun after {after_what}: exit code {code}: {errors.read_text()[-300:]}")
        return
    try:
        job.whole(folder)
        if job.result(folder) != wanted:
            count.failures.append(f"rerun after {after_what}: another result")
        fault = keeps(before, job.finished(folder))
    except Exception as error:  # as above
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        count.failures.append(f"rerun after {after_what}: {fault}")
    left = [path.name for path in folder.rglob(".*") if path.name.endswith(".part")]
    if job.exclusive and left:
        count.failures.append(f"rerun after {after_what}: left {', '.join(left)}")


def fill_the_disk(
    job: Job, root: Path, count: Count, times: int, wanted: Any, largest: int, rng: random.Random
) -> None:
    """Run a command where files cannot grow beyond a random size; then where they can."""
    for trial in range(times):
        folder, errors = root / f"full-{trial}", root / f"full-{trial}.err"
        folder.mkdir()
        limit = rng.randrange(0, max(1, largest))
        refused(job, folder, errors, count, "a full disk", run(job, folder, errors, limit))
        count.full_disks += 1
        finish(job, folder, errors, count, job.finished(folder), wanted, "a full disk")
        shutil.rmtree(folder)


def refused(job: Job, folder: Path, errors: Path, count: Count, what: str, code: int) -> None:
    """Note a failure unless a command ended with 1 and one line, and left nothing half-written."""
    said = errors.read_text().strip()
    reasons = [line for line in said.splitlines() if line.startswith(f"specprune {job.name.split()[0]}: ")]
    if code != 1 or len(reasons) != 1 or "Traceback" in said:
        count.failures.append(f"{what}: exit code {code}: {said[-300:] or 'nothing said'}")
    try:
        job.whole(folder)
    except Exception as error:  # as above
        count.failures.append(f"{what}: {type(error).__name__}: {error}")


def small_disk(job: Job, root: Path, count: Count, wanted: Any, sizes: list[int]) -> None:
    """Run a command on file systems of a few kilobytes, then on the same made large."""
    for trial, size in enumerate(sizes):
        folder, errors = root / f"tmpfs-{trial}", root / f"tmpfs-{trial}.err"
        folder.mkdir()
        if not mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)):
            print(f"{job.name}: cannot mount a small file system here; left out")
            return
        try:
            refused(job, folder, errors, count, f"a disk of {size} KiB", run(job, folder, errors))
            count.full_disks += 1
            mount("-o", "remount,size=1g", str(folder))
            finish(job, folder, errors, count, job.finished(folder), wanted, f"a disk of {size} KiB")
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def forbid_writing(job: Job, root: Path, count: Count, wanted: Any) -> None:
    """Run a command into a read-only file system: first empty, then with its own results."""
    folder, errors = root / "read-only", root / "read-only.err"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)):
        print(f"{job.name}: cannot mount a read-only file system here; left out")
        return
    try:
        refused(job, folder, errors, count, "an empty read-only folder", run(job, folder, errors))
        mount("-o", "remount,rw", str(folder))
        finish(job, folder, errors, count, {}, wanted, "a read-only folder")
        before = state_of(folder)
        mount("-o", "remount,ro", str(folder))
        run(job, folder, errors)  # what is finished may be a success, where nothing has to be written
        if state_of(folder) != before:
            count.failures.append("a read-only folder changed")
        job.whole(folder)
        count.read_only += 2
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def two_at_once(job: Job, root: Path, count: Count, times: int, usual: float, wanted: Any, rng: random.Random) -> None:
    """Start a second run in a folder while the first is at work."""
    for trial in range(times):
        folder = root / f"two-{trial}"
        folder.mkdir()
        errors = [root / f"two-{trial}-{k}.err" for k in range(2)]
        first = start(job, folder, errors[0])
        time.sleep(rng.uniform(0.05, 0.5) * usual)
        second = start(job, folder, errors[1])
        for process in (first, second):
            process.join(_PATIENCE)
        codes = (first.exitcode, second.exitcode)
        said = errors[1].read_text()
        if codes[0] != 0 or codes[1] not in (0, 1) or (codes[1] == 1 and "another run is at work" not in said):
            count.failures.append(f"two runs: exit codes {codes}: {errors[0].read_text()[-200:]} {said[-200:]}")
        finish(job, folder, errors[0], count, {}, wanted, "two runs")
        count.two_runs += 1
        shutil.rmtree(folder)


def campaign(job: Job, root: Path, kills: int, times: int, seed: int) -> Count:
    """Do everything to one command; return the counts."""
    rng = random.Random(f"{job.name} {seed}")
    count = Count(job.name)
    place = root / job.name.replace(" ", "-")
    folder, errors = place / "undisturbed", place / "undisturbed.err"
    folder.mkdir(parents=True)
    began = time.monotonic()
    code = run(job, folder, errors)
    usual = time.monotonic() - began
    if code != 0:
        raise RuntimeError(f"{job.name} fails undisturbed: {errors.read_text()}")
    wanted = job.result(folder)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024
    kill_often(job, place, count, kills, usual, wanted, rng)
    fill_the_disk(job, place, count, times, wanted, largest, rng)
    small_disk(job, place, count, wanted, [4, max(4, total // 3)][: max(1, min(2, times))])
    forbid_writing(job, place, count, wanted)
    two_at_once(job, place, count, times, usual, wanted, rng)
    print(f"{job.name}: {count.kills} kills ({count.kills_midway} midway), {len(count.failures)} failures", flush=True)
    for failure in count.failures:
        print(f"   {failure}", flush=True)
    return count


def all_jobs(root: Path) -> dict[str, Callable[[], Job]]:
    """Return command -> how to make its job; some need the results of another."""

    @functools.cache
    def weights() -> Path:
        job = train_job()
        (root / "weights").mkdir()
        assert run(job, root / "weights", root / "weights.err") == 0, (root / "weights.err").read_text()
        return root / "weights" / f"digits-{NET}-0.npz"

    @functools.cache
    def zoo() -> Path:
        job = zoo_job()
        (root / "a-zoo").mkdir()
        assert run(job, root / "a-zoo", root / "zoo.err") == 0, (root / "zoo.err").read_text()
        return root / "a-zoo"

    return {
        "data mnist": lambda: data_job("mnist"),
        "data cifar10": lambda: data_job("cifar10"),
        "train": train_job,
        "tradeoff": lambda: tradeoff_job(weights()),
        "zoo": zoo_job,
        "measures": lambda: measures_job(zoo()),
        "certify": certify_job,
        "figures": figures_job,
    }


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command (default 20)")
    parser.add_argument("--times", type=int, default=3, help="full disks and pairs of runs of each (default 3)")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/stress"))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, mirror():
        jobs = all_jobs(Path(scratch))
        unknown = set(options.only or ()) - set(jobs)
        if unknown:
            parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(jobs)}")
        counts = [
            campaign(jobs[name](), Path(scratch), options.kills, options.times, options.seed)
            for name in options.only or jobs
        ]
    rows = [{**dataclasses.asdict(count), "failures": len(count.failures)} for count in counts]
    numbers = [key for key in rows[0] if key != "command"]
    rows.append({"command": "all", **{key: sum(row[key] for row in rows) for key in numbers}})
    print(format_table(rows))
    record = {
        **where_run("specprune", "torch", "numpy"),
        "seed": options.seed,
        "seconds": time.monotonic() - began,
        "counts": rows,
        "failures": {count.command: count.failures for count in counts},
    }
    write_text(options.out / "kills.json", to_json(record) + "\n")
    print(f"[{options.out / 'kills.json'}]")
    if rows[-1]["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main_()
