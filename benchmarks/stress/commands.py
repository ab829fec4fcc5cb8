"""Commands of specprune, each with what tells whether it left whole files, lost nothing, and ended as it should."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from specprune._files import load_arrays, read_lines
from specprune._verify import verified
from specprune.figures.data_files import read_record
from specprune.testbed import CATALOG, load_checkpoint, load_zoo
from specprune.testbed.catalog import RemoteFile

NET = "mlp-16-16"


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
        return ["train", "--data", "digits", "--net", NET, "--epochs", "12", "--out", str(folder)]

    def whole(folder: Path) -> None:
        for path in folder.glob("*.npz"):
            load_checkpoint(path)

    return Job("train", words, whole, lambda f: arrays_digest(f / f"digits-{NET}-0.npz"), exclusive=False)


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
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
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
