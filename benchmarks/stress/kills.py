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
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from specprune._files import load_arrays, read_lines, write_text
from specprune._records import format_table, to_json
from specprune._verify import verified
from specprune.cli import main
from specprune.figures.data_files import read_record
from specprune.testbed import CATALOG, load_checkpoint, load_zoo
from specprune.testbed.catalog import RemoteFile

sys.path.insert(0, str(Path(__file__).parents[1]))

from pruning_quality import where_run

_CONTEXT = multiprocessing.get_context("fork")
_PATIENCE = 300.0  # seconds that a run may take at most
_NET = "mlp-16-16"


@dataclasses.dataclass(frozen=True)
class Job:
    """A command and how to judge what it leaves.

    Attributes:
        name: of the command.
        words: takes the folder; returns the command line.
        whole: takes the folder; raises if a file that is there is not whole.
        result: takes the folder; returns what an undisturbed run leaves too.
        finished: takes the folder; returns marks of what must not be made again.
        exclusive: whether a second run in the folder is refused.
    """

    name: str
    words: Callable[[Path], list[str]]
    whole: Callable[[Path], None]
    result: Callable[[Path], Any]
    finished: Callable[[Path], dict[str, Any]] = lambda _: {}
    exclusive: bool = True


# --- commands


def marks(folder: Path, pattern: str) -> dict[str, Any]:
    """Return name -> what changes when the file is written again."""
    stats = {path.name: path.stat() for path in folder.glob(pattern)}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in stats.items()}


def arrays_digest(path: Path) -> str:
    with np.load(path, allow_pickle=False) as archive:
        return hashlib.sha256(b"".join(archive[name].tobytes() for name in sorted(archive.files))).hexdigest()


def json_result(path: Path) -> Any:
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["result"] if "result" in record else record["data"]


def whole_json(folder: Path, pattern: str = "*.json") -> None:
    for path in folder.glob(pattern):
        json.loads(path.read_text(encoding="utf-8"))


def whole_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG"), path
        assert b"IEND" in content[-12:], path
    for path in folder.glob("*.pdf"):
        content = path.read_bytes()
        assert content.startswith(b"%PDF"), path
        assert content.rstrip().endswith(b"%%EOF"), path


def train_job() -> Job:
    def words(folder: Path) -> list[str]:
        return ["train", "--data", "digits", "--net", _NET, "--epochs", "12", "--out", str(folder)]

    def whole(folder: Path) -> None:
        for path in folder.glob("*.npz"):
            load_checkpoint(path)

    return Job("train", words, whole, lambda f: arrays_digest(f / f"digits-{_NET}-0.npz"), exclusive=False)


def tradeoff_job(weights: Path) -> Job:
    def words(folder: Path) -> list[str]:
        return ["tradeoff", "--weights", str(weights), "--calibration", "300", "--out", str(folder)]

    def whole(folder: Path) -> None:
        whole_json(folder)
        whole_pictures(folder)

    return Job("tradeoff", words, whole, lambda f: json_result(f / "tradeoff.json"), exclusive=False)


def figures_job() -> Job:
    names = ("eigenvalue_decay", "accuracy", "double_descent")

    def words(folder: Path) -> list[str]:
        return ["figures", *names, "--quick", "--out", str(folder)]

    def whole(folder: Path) -> None:
        for path in folder.glob("*.json"):
            read_record(path)
        whole_pictures(folder)

    def finished(folder: Path) -> dict[str, Any]:
        parts = {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in folder.glob(".*/*.json")}
        done = {path.stem for path in folder.glob("*.json")}  # whose parts are removed
        kept = {name: mark for name, mark in parts.items() if name[1:].rpartition("-")[0] not in done}
        return {**marks(folder, "*.json"), **kept}

    return Job("figures", words, whole, lambda f: [json_result(f / f"{n}.json") for n in names], finished)


def zoo_job() -> Job:
    def words(folder: Path) -> list[str]:
        axes = "--width 8,12,16 --depth 1 --n 60,120 --learning-rate 0.05 --batch-size 20,30 --dropout 0 --seeds 0,1"
        stops = "--label-noise 0 --weight-decay 0 --target-loss 0.05 --max-epochs 60 --together 3"
        return ["zoo", "--data", "digits", *axes.split(), *stops.split(), "--out", str(folder)]

    def whole(folder: Path) -> None:
        if (folder / "manifest.json").exists():
            for network in load_zoo(folder).networks:
                network.model()

    def result(folder: Path) -> Any:
        networks = sorted(load_zoo(folder).networks, key=lambda n: n.setting.digest)
        return [(n.setting.digest, n.epochs, n.train_loss, n.test_error) for n in networks]

    return Job("zoo", words, whole, result, lambda f: marks(f, "*.npz"))


def measures_job(zoo: Path) -> Job:
    names = ("params", "log_prod_of_fro", "effective_rank", "dof_1e-3")

    def words(folder: Path) -> list[str]:
        return ["measures", *names, "--zoo", str(zoo), "--out", str(folder)]

    def whole(folder: Path) -> None:
        for line in read_lines(folder / "measured.jsonl"):
            json.loads(line)
        whole_json(folder)
        whole_pictures(folder)

    def finished(folder: Path) -> dict[str, Any]:
        return dict.fromkeys(read_lines(folder / "measured.jsonl"), 1)

    return Job("measures", words, whole, lambda f: json_result(f / "measures.json"), finished)


def certify_job() -> Job:
    seconds = 8.0

    def words(folder: Path) -> list[str]:
        return ["certify", "--data", "digits", "--budget", f"{seconds / 60:.5f}", "--out", str(folder)]

    def value(folder: Path) -> float:
        return verified(folder / "best.spnw", "digits", None, 0.05).value

    def whole(folder: Path) -> None:
        if (folder / "best.spnw").exists():
            value(folder)
        if (folder / "state.npz").exists():
            load_arrays(folder / "state.npz", "certify state")

    def finished(folder: Path) -> dict[str, Any]:
        """A certificate never gets worse: the best one so far, as a threshold that the next one meets or beats."""
        return {"certified": value(folder)} if (folder / "best.spnw").exists() else {}

    # The search stops by the clock: that it says less than 1 is what all runs share.
    return Job("certify", words, whole, lambda f: value(f) < 1, finished)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the files of its class slowly, and knows ranges."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        step = max(1, len(content) // 40)
        with contextlib.suppress(ConnectionError):
            for begin in range(start, len(content), step):
                self.wfile.write(content[begin : begin + step])
                self.wfile.flush()
                time.sleep(0.005)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def tiny_sets() -> dict[str, bytes]:
    """Make MNIST and CIFAR-10 small random sets in the catalog; return the files that a mirror must serve."""
    generator = np.random.default_rng(0)

    def idx(array: np.ndarray) -> bytes:
        return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()

    plain = {}
    for part, count in (("train", 1000), ("t10k", 200)):
        plain[f"{part}-images-idx3-ubyte.gz"] = idx(generator.integers(256, size=(count, 28, 28)).astype(np.uint8))
        plain[f"{part}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8) % 10)
    sums = tuple(RemoteFile(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in plain.items())
    CATALOG["mnist"] = dataclasses.replace(CATALOG["mnist"], train_size=1000, test_size=200, downloads=sums)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in CATALOG["cifar10"].files:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            rows = generator.integers(256, size=(200, 3073)).astype(np.uint8)
            rows[:, 0] %= 10
            member.size = rows.size
            archive.addfile(member, io.BytesIO(rows.tobytes()))
    content = packed.getvalue()
    remote = RemoteFile("cifar-10-binary.tar.gz", hashlib.sha256(content).hexdigest(), len(content), archive=True)
    CATALOG["cifar10"] = dataclasses.replace(
        CATALOG["cifar10"], train_size=1000, test_size=200, file_bytes=200 * 3073, downloads=(remote,)
    )
    return {**{name: gzip.compress(data, mtime=0) for name, data in plain.items()}, remote.name: content}


@contextlib.contextmanager
def mirror() -> Iterator[None]:
    """Serve the tiny sets on this machine, in a process of its own, and make it their only mirror."""
    Mirror.files = tiny_sets()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    for name in ("mnist", "cifar10"):
        CATALOG[name] = dataclasses.replace(CATALOG[name], mirrors=(base,))
    process = _CONTEXT.Process(target=server.serve_forever, daemon=True)
    process.start()
    server.server_close()
    try:
        yield
    finally:
        process.kill()
        process.join()


def data_job(name: str) -> Job:
    def place(folder: Path) -> Path:
        return folder / name

    def final_files(folder: Path) -> list[Path]:
        return [path for path in sorted(place(folder).glob("*")) if path.suffix != ".part" and path.name[0] != "."]

    def whole(folder: Path) -> None:
        sums = {file.name: file.sha256 for file in CATALOG[name].downloads}
        for path in final_files(folder):
            if path.suffix == ".gz":
                assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == sums[path.name], path
            else:
                assert path.stat().st_size == CATALOG[name].file_bytes, path

    def result(folder: Path) -> Any:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in final_files(folder)}

    def finished(folder: Path) -> dict[str, Any]:
        # An archive whose extraction was cut off is extracted again, from the archive on the disk.
        return marks(place(folder), "*.gz") if name == "mnist" else {}

    return Job(f"data {name}", lambda f: ["data", name, "--data-dir", str(f)], whole, result, finished)


# --- what is done to them


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
        return root / "weights" / f"digits-{_NET}-0.npz"

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
