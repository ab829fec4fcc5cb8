"""Feed hostile files to every reader of the package, and count what is refused, what is accepted and what fails.

Each reader gets, for each of its sound files: fixed attacks (every truncation of a small file, bombs, sizes that lie,
pickles, names that lead elsewhere), things that are no regular files (folders, FIFOs, devices, links), and random
changes of bytes, JSON, arrays, zip and gzip with the checksums made right again.  A failure is

- an exception other than ValueError, or than FileNotFoundError where no regular file is there;
- more than the reader's limit of processor time (1 s for up to 128 KB, in proportion for more; a drawn
  figure has more), or no answer: 10 s of waiting for
  something (30 s with a figure), or 12 times as long on the clock of a busy machine;
- more than 256 MB of memory beyond what the process had, which RLIMIT_AS holds it to (a refused allocation counts);
- an accepted file whose contents break what the reader promises;
- code that runs: an audit hook watches unpickling, imports, exec, system, subprocesses, and files opened for writing
  or removed; and every pickle used would leave a file behind.

Each reader runs in a process of its own.  Random changes depend on seed, reader and number alone.  With atheris
installed, `--coverage-guided READER` lets it choose the changes; nothing else needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import mmap
import os
import platform
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from attacks import contents, places, prepare
from hostile_readers import Reader, all_readers

from specprune._files import write_text
from specprune._records import format_table, to_json

MEMORY = 256 << 20
_KEPT_FAILURES = 40
# Larger files get more time, in proportion, up to a megabyte.
_FULL_TIME, _LONG_FILE = 128 << 10, 1 << 20
_FORMAT = "qdd"  # number of the input, when it began, and the processor time used by then
_STAMP = struct.calcsize(_FORMAT)
_RUNNING_CODE = ("exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")
_RUNNING_CODE += ("pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect", "code.__new__", "os.spawn")
_CHANGING_FILES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_CHANGING_FILES += ("shutil.rmtree", "shutil.move", "shutil.copyfile")


@dataclass
class Tally:
    """What happened to one reader."""

    reader: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    failures: int = 0
    slowest: float = 0.0
    peak_mb: float = 0.0
    checksum: str = ""
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def fail(self, label: str, reason: str) -> None:
        self.failures += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.examples) < _KEPT_FAILURES:
            self.examples.setdefault(reason, label)


class _Watch:
    """An audit hook that notes what a reader must not do; it can be switched off, but not removed."""

    def __init__(self) -> None:
        self.on, self.writer, self.seen = False, False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if event in _RUNNING_CODE or event == "import" or (not self.writer and (writes or event in _CHANGING_FILES)):
            self.on = False
            self.seen.append(f"{event} {str(arguments)[:100]}")
            self.on = True


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    return 0


def _inputs(reader: Reader, count: int, seed: int, marker: str, cuts: int | None):
    """Yield (label, seed, content or None, place) of all attacks on a reader; None stands for what is no file."""
    for number, sound in enumerate(reader.seeds):
        yield f"sound file {number}", sound, sound.content, None
        for label, content in contents(reader, sound, marker, cuts):
            yield f"{sound.file} {number}: {label}", sound, content, None
    for number in range(count):
        rng = random.Random(f"{seed}/{reader.name}/{number}")
        sound = rng.choice(reader.seeds)
        yield f"random change {number} of {sound.file}", sound, sound.mutate(sound.content, rng), None


def _trial(reader: Reader, path: Path, label: str, tally: Tally, watch: _Watch, absent: bool = False) -> None:
    """Read one file, and judge."""
    tally.tried += 1
    outcome, problem = "refused", ""
    watch.on, watch.seen[:] = True, []
    start = time.process_time()
    try:
        found = reader.read(path)
        outcome = "accepted"
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and not absent:
            problem = f"FileNotFoundError: {str(error)[:60]}"
        cause = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause):
                problem = "an allocation beyond the ceiling, caught"
            cause = cause.__cause__ or cause.__context__
        if len(str(error)) > 20_000:
            problem = "a message of more than 20000 characters"
    except MemoryError:
        problem = "MemoryError"
    except OSError as error:
        # Reading that file, and writing where a folder is, the system refuses.
        natural = "/proc/self/mem" in label or (watch.writer and "is a folder" in label)
        problem = "" if natural else f"{type(error).__name__}: {str(error)[:60]}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(last) if "/specprune/" in f.filename), last[-1])
        problem = f"{type(error).__name__} in {Path(place.filename).name}:{place.name}: {str(error)[:60]}"
    used = time.process_time() - start
    watch.on = False
    if outcome == "accepted":
        try:
            reader.check(found)
        except BaseException as error:
            problem = f"accepted, but {type(error).__name__}: {str(error)[:60]}"
    if watch.seen:
        problem = f"did {watch.seen[0]}"
    if label.startswith("sound file") and outcome != "accepted":
        problem = problem or "a sound file was refused"
    tally.slowest = max(tally.slowest, used)
    size = min(path.stat().st_size, _LONG_FILE) if path.is_file() else 0
    if used > reader.seconds * max(1.0, size / _FULL_TIME):
        problem = problem or f"more than {reader.seconds:g} s"
    if problem:
        tally.fail(label, problem)
    elif outcome == "accepted":
        tally.accepted += 1
    else:
        tally.refused += 1


def _work(reader: Reader, count: int, seed: int, first: int, folder: Path, shared: mmap.mmap, cuts: int | None) -> None:
    """Run the attacks from number `first` on in this process, and write the tally."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.register(signal.SIGUSR1, file=open(folder / "stack", "w"))  # noqa: SIM115
    tally = Tally(reader.name)
    marker = str(folder / "unpickled")
    place = folder / "work"
    place.mkdir(exist_ok=True)
    watch = _Watch()
    watch.writer = reader.name in ("CIFAR-10 archive", "redrawn figures", "parts of figures")  # they are to write
    for sound in reader.seeds:  # modules that a reader loads when it is first used
        for name, content in {**sound.others, sound.file: sound.content}.items():
            (place / name).write_bytes(content)
        reader.check(reader.read(place / sound.file))
        for content in (b"PK\3\4", b"{", sound.content[:-1]):
            (place / sound.file).write_bytes(content)
            with contextlib.suppress(Exception):
                reader.read(place / sound.file)
    before, resident = _status("VmSize"), _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, resource.RLIM_INFINITY))
    last = None
    number = 0
    for number, (label, sound, content, _) in enumerate(_safely(_inputs(reader, count, seed, marker, cuts), before)):
        _note(shared, max(number, first), label)
        if number < first:
            continue
        if sound is not last:
            for name, other in sound.others.items():
                (place / name).write_bytes(other)
            last = sound
        (place / sound.file).write_bytes(content)
        _trial(reader, place / sound.file, label, tally, watch)
        if number % 20 == 0 or not ("random" in label or "truncated" in label):
            _save(folder, first, tally)
    for sound in reader.seeds:
        here = folder / "places"
        here.mkdir(exist_ok=True)
        for name, other in sound.others.items():
            (here / name).write_bytes(other)
        for label, path in places(reader, sound, here):
            number += 1
            _note(shared, max(number, first), f"{sound.file} is {label}")
            if number >= first:
                _save(folder, first, tally)
                _trial(reader, path, f"{sound.file} is {label}", tally, watch, absent=True)
    if Path(marker).exists():
        tally.fail("any", "a pickle was run")
    tally.peak_mb = max(0, _status("VmHWM") - resident) / 2**20
    _save(folder, first, tally)


def _safely(made, before: int):
    """Yield the inputs, which are made without the ceiling: bombs are large before they are packed."""
    while True:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        item = next(made, None)
        if item is None:
            return
        resource.setrlimit(resource.RLIMIT_AS, (max(before, _status("VmSize")) + MEMORY, resource.RLIM_INFINITY))
        yield item


def _note(shared: mmap.mmap, number: int, label: str, later: float = 0.0) -> None:
    """Tell the process that waits which input is next, and when it began."""
    text = label.encode("utf-8", "replace")[:200].ljust(200, b"\0")
    used = time.process_time() if not later else 0.0
    shared[:] = struct.pack(_FORMAT, number, time.monotonic() + later, used) + text


def _save(folder: Path, first: int, tally: Tally) -> None:
    (folder / f"tally-{first}.json").write_text(json.dumps(asdict(tally)))


def _progress(process: int) -> tuple[str, float]:
    """Return whether a process runs or could (R), sleeps (S) or waits for a disk (D), and its processor time."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def attack(reader: Reader, count: int, seed: int, folder: Path, cuts: int | None = None) -> Tally:
    """Return what happens to a reader; a process that hangs or dies is replaced, and its input counted as a failure.

    Args:
        reader: the reader.
        count: random changes.
        seed: of these.
        folder: for files.
        cuts: as `contents` takes it.
    """
    shared = mmap.mmap(-1, _STAMP + 200)
    total, first, deaths = Tally(reader.name, checksum=reader.checksum), 0, []
    patience = 10.0 if reader.seconds <= 1 else 30.0
    for sound in reader.seeds:  # in this process, for the modules that a reader loads when it is first used
        here = folder / "sound"
        here.mkdir(parents=True, exist_ok=True)
        for name, content in {**sound.others, sound.file: sound.content}.items():
            (here / name).write_bytes(content)
        reader.check(reader.read(here / sound.file))
    while True:
        own = folder / f"run-{len(deaths)}"
        own.mkdir(parents=True)
        _note(shared, first, "the start", 30.0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _work(reader, count, seed, first, own, shared, cuts)
                code = 0
            except BaseException:
                (own / "crash").write_text(traceback.format_exc())
            os._exit(code)
        reason = ""
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.02)
            _, began, used = struct.unpack_from(_FORMAT, shared)
            waited = time.monotonic() - began
            # On a busy machine a process may wait for its turn; one that sleeps has been given something without end.
            state, processor = _progress(child)
            if waited > patience and (state == "S" or processor - used > patience or waited > 12 * patience):
                reason = f"no answer within {patience:g} s"
                os.kill(child, signal.SIGUSR1)
                time.sleep(0.2)
                os.kill(child, signal.SIGKILL)
                break
        _, status = os.waitpid(child, 0)
        for path in own.glob("tally-*.json"):
            part = json.loads(path.read_text())
            for key in ("tried", "refused", "accepted", "failures"):
                setattr(total, key, getattr(total, key) + part[key])
            total.slowest, total.peak_mb = max(total.slowest, part["slowest"]), max(total.peak_mb, part["peak_mb"])
            for name, value in part["reasons"].items():
                total.reasons[name] = total.reasons.get(name, 0) + value
            total.examples = {**part["examples"], **total.examples}
        if status == 0:
            break
        if (own / "crash").exists():
            raise RuntimeError(f"the campaign itself failed at {reader.name}:\n{(own / 'crash').read_text()}")
        number = max(first, struct.unpack_from(_FORMAT, shared)[0])
        stack = (own / "stack").read_text().splitlines() if (own / "stack").exists() else []
        reason += "".join(f" in {line.strip()}" for line in stack if "/specprune/" in line)[:150]
        deaths.append(number)
        total.tried += 1
        label = shared[_STAMP:].rstrip(b"\0").decode("utf-8", "replace")
        total.fail(label, reason or f"the process died of signal {status & 127}")
        first = number + 1
        if len(deaths) > 20 or first == 0:
            total.fail("any", "given up")
            break
    return total


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    for name in ("specprune", "atheris"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=84_000, help="random changes in all, shared out over the readers")
    parser.add_argument("--seed", type=int, default=0, help="of the random changes")
    parser.add_argument("--readers", nargs="+", help="only readers whose names have one of these words")
    parser.add_argument("--coverage-guided", metavar="READER", help="let atheris choose the changes of one reader")
    parser.add_argument("--out", type=Path, default=Path("results/stress"), help="folder for files.json")
    options, rest = parser.parse_known_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        os.chdir(folder)
        readers = all_readers(folder / "seeds")
        if options.coverage_guided:
            from coverage_guided import fuzz

            return fuzz(next(r for r in readers if options.coverage_guided in r.name), rest, folder)
        if options.readers:
            readers = [r for r in readers if any(word in r.name for word in options.readers)]
        weights = sum(reader.weight for reader in readers) or 1.0
        prepare()
        tallies = []
        for number, reader in enumerate(readers):
            count = round(options.inputs * reader.weight / weights) if reader.weight else options.inputs // 2000
            tallies.append(attack(reader, count, options.seed, folder / f"reader-{number}"))
            print(
                f"{reader.name}: {tallies[-1].tried} tried, {tallies[-1].failures} failures",
                file=sys.stderr,
                flush=True,
            )
        os.chdir("/")
    seconds = time.perf_counter() - start
    processor = sum(os.times()[:4])  # of the children, too
    rows = [{k: v for k, v in asdict(t).items() if k not in ("reasons", "examples")} for t in tallies]
    numbers = ("tried", "refused", "accepted", "failures")
    rows.append({"reader": "all", **{k: sum(row[k] for row in rows) for k in numbers}})
    rows[-1] |= {k: max(row[k] for row in rows[:-1]) for k in ("slowest", "peak_mb")}
    versions = _versions()
    print(
        format_table(
            rows,
            title=f"Hostile files, seed {options.seed}: {seconds:.0f} s, {processor:.0f} s of processor time",
        )
    )
    most = max(r.seconds for r in readers)
    print(f"Limits: 1 s of processor time for up to 128 KB, in proportion for more; a drawn figure: {most:g} s;")
    print(f"{MEMORY >> 20} MB of memory.")
    print(f"Versions: {versions}")
    print(f"atheris: {versions['atheris']} (optional: --coverage-guided READER)")
    for tally in tallies:
        for reason, count in sorted(tally.reasons.items(), key=lambda item: -item[1]):
            print(f"FAILURE {tally.reader}: {reason} ({count} times; {tally.examples.get(reason, '')})")
    record = {
        "seed": options.seed,
        "seconds": seconds,
        "processor_seconds": processor,
        "versions": versions,
        "readers": [asdict(t) for t in tallies],
    }
    out = options.out if options.out.is_absolute() else Path(_STARTED_IN) / options.out
    write_text(out / "files.json", to_json(record) + "\n")
    return 1 if rows[-1]["failures"] else 0


_STARTED_IN = os.getcwd()
if __name__ == "__main__":
    sys.exit(main())
