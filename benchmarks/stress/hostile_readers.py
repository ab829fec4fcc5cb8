"""The readers of files that may come from somebody else: sound files for each, how to change them, what must hold."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import math
import random
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._subclasses.schema_check_mode  # these parts torch imports late, when a file names them
import torch.nested._internal.ops
from mutations import (
    mutate_bytes,
    mutate_gzip,
    mutate_json,
    mutate_lines,
    mutate_npz,
    mutate_state_dict,
    mutate_word,
)
from torch import nn
from tqdm import tqdm

from specprune import _measures, _problem
from specprune._files import load_arrays, save_arrays
from specprune.analysis.certificate import certificate_of, load_network, save_network
from specprune.analysis.certify import _Run
from specprune.analysis.code_design import Design
from specprune.analysis.code_training import random_start
from specprune.compress import Moments, collect_moments, load_pruned, low_rank, prune, save_pruned
from specprune.compress.language import decode, encode
from specprune.compress.vocabulary import IntegerNetwork, LayerSpec
from specprune.figures.data_files import read_record, write_record
from specprune.figures.gallery import redraw
from specprune.figures.setting import Parts
from specprune.testbed import Dataset, Recipe, load_checkpoint, load_dataset, load_zoo, read_cifar_binary, read_idx
from specprune.testbed.catalog import RemoteFile, Source
from specprune.testbed.download import _extract, _find_fault
from specprune.testbed.training import save_checkpoint, train
from specprune.testbed.zoo import zoo_grid
from specprune.testbed.zoo_store import train_zoo

Mutate = Callable[[bytes, random.Random], bytes]


@dataclasses.dataclass(frozen=True)
class Seed:
    """A sound file, with the files beside it, and how it is changed."""

    file: str
    content: bytes
    mutate: Mutate
    others: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader: what it is given, what it does, and what holds of everything it returns."""

    name: str
    seeds: tuple[Seed, ...]
    read: Callable[[Path], Any]
    check: Callable[[Any], None]
    checksum: str
    weight: float = 1.0
    seconds: float = 1.0


def tiny_network() -> nn.Sequential:
    """Return the network that state_dict files are loaded into."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def _convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def _halves(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    pixels, labels = generator.integers(0, 128, (n, 1, 8, 8)), generator.integers(0, 2, n)
    for image, label in zip(pixels, labels, strict=True):
        image[0, :, 4 * label : 4 * label + 4] += 127
    return torch.from_numpy(pixels / 255).float(), torch.from_numpy(labels)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _finite_state(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        _require(isinstance(value, torch.Tensor) and value.numel() < 10_000_000, f"{name} is odd")


def _runs(shape: tuple[int, ...]) -> Callable[[nn.Module], None]:
    def check(model: nn.Module) -> None:
        _finite_state(model)
        with torch.no_grad():
            _require(model(torch.zeros(2, *shape)).ndim == 2, "does not run")

    return check


# What files hold.


def _idx(array: np.ndarray) -> bytes:
    lengths = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def _idx_reader() -> Reader:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    plain = (_idx(images), _idx(images[0, 0] % 10))
    seeds = [Seed("images-idx3-ubyte", content, mutate_bytes) for content in plain]
    seeds += [Seed("images-idx3-ubyte.gz", gzip.compress(c, mtime=0), mutate_gzip) for c in plain]

    def check(array: np.ndarray) -> None:
        _require(array.dtype == np.uint8 and 1 <= array.ndim <= 4, f"{array.dtype} {array.shape}")

    return Reader("idx files", tuple(seeds), read_idx, check, "gz: CRC-32; load_dataset: SHA-256", 4.0)


def _cifar_reader() -> Reader:
    records = np.random.default_rng(0).integers(0, 256, (2, 3073)).astype(np.uint8)
    records[:, 0] %= 10

    def check(found: tuple[np.ndarray, np.ndarray]) -> None:
        images, labels = found
        _require(images.shape == (len(labels), 3, 32, 32) and labels.max() < 10, "shapes or labels")

    seed = Seed("data_batch_1.bin", records.tobytes(), mutate_bytes)
    return Reader("CIFAR-10 files", (seed,), read_cifar_binary, check, "none (length and labels)", 3.0)


def _fault_reader() -> Reader:
    content = _idx(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    file = RemoteFile("x.gz", hashlib.sha256(content).hexdigest(), len(content))

    def read(path: Path) -> str:
        if not path.is_file():  # as the callers of `_find_fault` look first
            raise FileNotFoundError(path)
        fault = _find_fault(path, file)
        if fault is not None:
            raise ValueError(fault)
        return fault or "right"

    seed = Seed("x.gz.part", gzip.compress(content, mtime=0), mutate_gzip)
    return Reader("downloaded files", (seed,), read, lambda found: None, "SHA-256 of the content", 4.0)


def _archive_reader(folder: Path) -> Reader:
    source = Source("tiny", (1, 1, 1), 2, 1, 1, "cifar", ("a.bin", "b.bin"), file_bytes=40)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name in ("tiny/readme", "tiny/a.bin", "tiny/b.bin"):
            info = tarfile.TarInfo(name)
            info.size = 40
            archive.addfile(info, io.BytesIO(bytes(range(40))))
    into = folder / "extracted"

    def read(path: Path) -> Path:
        if not path.is_file():  # the archive has been hashed before, so it is a file of the right length
            raise FileNotFoundError(path)
        if path.stat().st_size > 1 << 20:
            raise ValueError(path)
        _extract(path, source, into)
        return into

    def check(place: Path) -> None:
        _require({file.name for file in place.iterdir()} <= {"a.bin", "b.bin"}, f"wrote {list(place.iterdir())}")
        _require(all(file.stat().st_size == 40 and not file.is_symlink() for file in place.iterdir()), "wrong files")

    seed = Seed("tiny.tar.gz", stream.getvalue(), mutate_gzip)
    return Reader("CIFAR-10 archive", (seed,), read, check, "SHA-256 before it is opened (left out here)", 0.7)


def _arrays_reader(folder: Path) -> Reader:
    arrays = {"matrix": np.arange(6.0).reshape(2, 3), "scalar": np.array(7), "bits": np.array([1], np.int16)}
    save_arrays(folder / "a.npz", arrays, {"kind": "test", "list": [1, 2.5, "λ"], "inner": {"x": None}})

    def check(found: tuple[dict, dict]) -> None:
        _require(all(array.dtype.kind in "biuf" for array in found[0].values()), "an odd dtype")
        _require(found[1]["kind"] == "test", "another kind")
        json.dumps(found[1], allow_nan=False)

    seed = Seed("a.npz", (folder / "a.npz").read_bytes(), mutate_npz)
    return Reader("arrays (_files)", (seed,), lambda path: load_arrays(path, "test"), check, "CRC-32 per array", 1.6)


def _pruned_readers(folder: Path) -> list[Reader]:
    found = []
    data = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    images = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, factory, inputs, make in (
        ("pruned dense network", _wide, data, prune),
        ("pruned conv network", _convnet, images, prune),
        ("low-rank network", _wide, data, low_rank),
    ):
        path = folder / "pruned.npz"
        save_pruned(make(factory(), [inputs], 0.5).model, path)
        seed = Seed("pruned.npz", path.read_bytes(), mutate_npz)
        read = lambda path, factory=factory: load_pruned(path, factory)  # noqa: E731
        found.append(Reader(name, (seed,), read, _runs(tuple(inputs.shape[1:])), "CRC-32 per array", 0.8))
    return found


def _checkpoint_reader(folder: Path, digits: Dataset) -> Reader:
    seeds = []
    for net in ("mlp-6-5", "vgg-3-4"):
        trained = train(digits, Recipe("digits", net, epochs=1, batch_size=64))
        save_checkpoint(folder / "net.npz", trained)
        seeds.append(Seed("net.npz", (folder / "net.npz").read_bytes(), mutate_npz))

    def check(trained: Any) -> None:
        if math.prod(trained.input_shape) < 100_000:  # convolutions take any size
            _runs(tuple(trained.input_shape))(trained.model)
        errors = (trained.train_error, trained.test_error)
        _require(all(type(e) is float and 0 <= e <= 1 for e in errors), f"errors {errors}")
        _require(all(type(size) is int and size >= 1 for size in (*trained.input_shape, trained.classes)), "sizes")
        _require(all(isinstance(record, dict) for record in trained.history), "history")
        recipe = trained.recipe
        _require(type(recipe.data) is str and type(recipe.net) is str and type(recipe.seed) is int, f"{recipe}")
        _require(type(recipe.epochs) is int and type(recipe.batch_size) is int, f"{recipe}")

    return Reader("trained network", tuple(seeds), load_checkpoint, check, "CRC-32 per array", 1.2)


def _moments_reader(folder: Path) -> Reader:
    collect_moments(_wide(), [torch.randn(5, 24, generator=torch.Generator().manual_seed(0))]).save(folder / "m.npz")

    def check(moments: Moments) -> None:
        _require(type(moments.samples) is int and moments.samples >= 0, f"samples {moments.samples}")
        _require(moments.level in ("channel", "patch"), f"level {moments.level}")
        for part in moments.values():
            _require(part.total.dtype == part.gram.dtype == torch.float64, "dtypes")
            _require(part.total.ndim == 1 and part.gram.shape == (len(part.total),) * 2, "shapes")
            _require(bool(torch.isfinite(part.gram).all() and torch.isfinite(part.total).all()), "not finite")
            _require(type(part.rows) is int and part.rows >= 0, f"rows {part.rows}")

    seed = Seed("m.npz", (folder / "m.npz").read_bytes(), mutate_npz)
    return Reader("moments", (seed,), Moments.load, check, "CRC-32 per array")


def _state_dict_reader() -> Reader:
    stream = io.BytesIO()
    torch.save(tiny_network().state_dict(), stream)
    seeds = (Seed("w.pt", stream.getvalue(), mutate_state_dict),)
    read = lambda path: _problem._own_model("hostile_readers:tiny_network", path)  # noqa: E731
    return Reader("state_dict (--weights)", seeds, read, _runs((6,)), "CRC-32 per record", 0.5)


def _word_network() -> IntegerNetwork:
    spec = LayerSpec("conv", 2, 2, 1, 0, 1, relu=False)
    return IntegerNetwork(1, 4, False, (spec,), (np.array([[[[1, 0], [1, 0]]], [[[0, 1], [0, 1]]]]),))


def _deep_word() -> IntegerNetwork:
    specs = (
        LayerSpec("conv", 4),
        LayerSpec("depthwise", 4, 3, 2),
        LayerSpec("filters", 4),
        LayerSpec("conv", 6, 3, 1, 1, 7, "position"),
        LayerSpec("linear", 2, 1, 1, 0, 3, relu=False),
    )
    generator = np.random.default_rng(0)
    shapes = ((4, 1, 3, 3), (4, 1, 3, 3), (6, 4, 3, 3), (2, 6, 1, 1))
    levels = (1, 1, 7, 3)
    weights = tuple(generator.integers(-k, k + 1, shape) for k, shape in zip(levels, shapes, strict=True))
    return IntegerNetwork(1, 1, True, specs, weights)


def _certificate_reader(folder: Path, dataset: Dataset) -> Reader:
    seeds = []
    for network in (_word_network(), _deep_word()):
        save_network(folder / "net.spnw", network)
        seeds.append(Seed("net.spnw", (folder / "net.spnw").read_bytes(), mutate_word))

    def read(path: Path) -> Any:
        network = load_network(path)
        return network, certificate_of(network, dataset)

    def check(found: Any) -> None:
        network, certificate = found
        _require(0 <= certificate.value <= 1, f"certificate {certificate.value}")
        _require(decode(encode(network)) == network, "its own word is another network's")

    return Reader("certificate words", tuple(seeds), read, check, "CRC-32 and one word a network", 3.0)


def _zoo_readers(folder: Path, digits: Dataset) -> list[Reader]:
    place = folder / "zoo"
    axes = {"n": (60, 120), "batch_size": 32, "learning_rate": 0.04}
    train_zoo(digits, zoo_grid(data="digits", family="mlp", width=5, depth=2, **axes), place, max_epochs=2)
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    shard = next(name for name in files if name.endswith(".npz"))

    def read(path: Path) -> Any:
        zoo = load_zoo(path.parent)
        for network in zoo.networks:
            if not network.diverged:
                network.initial()
                network.model()
        return zoo

    def check(zoo: Any) -> None:
        zoo.summary(), zoo.quantiles(), zoo.by_axis(), zoo.to_json(), str(zoo)
        for network in zoo.networks:
            _require(network.shard.parent == zoo.folder, f"a shard elsewhere: {network.shard}")
            _require(0 <= network.train_error <= 1 and 0 <= network.test_error <= 1, "errors")
            _require(type(network.epochs) is int and network.epochs >= 0, f"epochs {network.epochs!r}")
            _require(type(network.converged) is bool and type(network.diverged) is bool, "flags")

    def seed(name: str, mutate: Mutate) -> Seed:
        return Seed(name, files[name], mutate, {key: value for key, value in files.items() if key != name})

    return [
        Reader("zoo manifest", (seed("zoo.json", mutate_json),), read, check, "none", 0.6),
        Reader("zoo shard", (seed(shard, mutate_npz),), read, check, "CRC-32 per array", 0.6),
    ]


def _records_reader(folder: Path) -> Reader:
    lines = [
        {"digest": "a" * 64, "values": {"params": 12.0, "margin": 0.5}, "refused": {"x": "no"}},
        {"digest": "b" * 64, "values": {"params": 12.0}, "refused": {}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def check(found: Any) -> None:
        for record in found.values():
            _require(
                all(type(value) in (int, float) and math.isfinite(value) for value in record["values"].values()),
                "a value",
            )
            _require(all(type(value) is str for value in record["refused"].values()), "a reason")

    read = getattr(_measures, "measured_records", lambda path: _measures.measured_networks([], None, path, []) or {})
    return Reader("measured.jsonl", (Seed("measured.jsonl", text, mutate_lines),), read, check, "none", 4.0)


def _figure_readers(folder: Path) -> list[Reader]:
    path = folder / "eigenvalue_decay.json"
    spectrum = list(map(float, 1 / np.arange(1, 601)))
    data = {"eigenvalues": spectrum, "short": spectrum[:20], "note": "x", "nested": [{"a": [1, 2]}]}
    write_record(path, {"figure": "eigenvalue_decay", "title": "t", "inputs": {}, "digest": "d" * 64, "data": data})
    text, beside = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    seeds = (Seed(path.name, text, mutate_json, {path.with_suffix(".npz").name: beside}),)
    seeds += (Seed(path.with_suffix(".npz").name, beside, mutate_npz, {path.name: text}),)

    def read(changed: Path) -> Any:
        return read_record(changed.with_suffix(".json"))

    def check(record: Any) -> None:
        json.dumps(record, allow_nan=False)
        _require(isinstance(record["figure"], str), "no figure's name")

    return [Reader("figure data", seeds, read, check, "npz: CRC-32 and the digest", 3.0)]


def _redraw_reader(folder: Path) -> Reader:
    from specprune.figures import FIGURES
    from specprune.figures.setting import Conditions

    seeds = []
    for name in ("double_descent", "random_features"):
        data = FIGURES[name].compute(
            *((Conditions(quick=True), Parts()) if FIGURES[name].in_parts else (Conditions(quick=True),))
        )
        path = folder / f"{name}.json"
        write_record(path, {"figure": name, "title": "t", "inputs": {}, "digest": "d" * 64, "data": data})
        seeds.append(Seed(path.name, path.read_bytes(), mutate_json))

    def read(path: Path) -> Any:
        return redraw(path, ("png",))

    def check(paths: list[Path]) -> None:
        _require(len(paths) == 1 and paths[0].stat().st_size < 5_000_000, "no picture")

    return Reader("redrawn figures", tuple(seeds), read, check, "none", 0.0, 20.0)


def _state_reader(folder: Path, dataset: Dataset) -> Reader:
    network = _word_network()
    design = Design(1, 4, False, network.layers)
    place = folder / "run"
    run = _Run(dataset, design, place, "scratch", 0, 0.05, 60.0, torch.device("cpu"))
    run.best, run.latent, run.bar = network, random_start(design, 0), None
    run._offer(network, 5, "start")
    run.best, run.value = None, math.inf
    run._offer(network, 5, "start")
    run._save()
    files = {path.name: path.read_bytes() for path in place.iterdir()}

    def read(path: Path) -> _Run:
        again = _Run(dataset, design, path.parent, "scratch", 0, 0.05, 60.0, torch.device("cpu"))
        again._load()
        return again

    def check(again: _Run) -> None:
        if again.best is None:  # a state without its network is that of a run killed before the first one
            _require(not (again.folder / "best.spnw").exists(), "a network that was not read")
            _require((again.round, again.used, again.latent) == (0, 0.0, None), "a state without a network was used")
            return
        _require(0 <= again.value <= 1, f"value {again.value}")
        _require(type(again.round) is int and again.round >= 0, f"round {again.round!r}")
        numbers = (again.used, again.deadline)
        _require(all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers), f"{numbers}")
        _require(type(again.planned) is int, f"planned {again.planned!r}")
        if again.latent is not None:
            shapes = tuple(tuple(w.shape) for w in again.latent.weights)
            _require(shapes == design.shapes, f"shapes {shapes}")
            parts = [
                *again.latent.weights,
                again.latent.temperature,
                *again.latent.moments[0],
                *again.latent.moments[1],
            ]
            _require(all(bool(torch.isfinite(p).all()) and p.dtype == torch.float32 for p in parts), "latent")
            _require(type(again.latent.epoch) is int and again.latent.epoch >= 0, "epoch")

    seeds = tuple(
        Seed(name, files[name], mutate, {key: value for key, value in files.items() if key != name})
        for name, mutate in (("state.npz", mutate_npz), ("best.spnw", mutate_word))
    )
    return Reader("certify state", seeds, read, check, "CRC-32", 0.7)


def _parts_reader() -> Reader:
    def read(path: Path) -> Any:
        return Parts(path.parent).get(path.stem, lambda: {})

    def check(found: Any) -> None:
        json.dumps(found, allow_nan=False)

    seed = Seed("part.json", b'{"a": [1, 2.5, {"b": "x"}], "c": null, "d": [[1, 2], [3, 4]]}', mutate_json)
    return Reader("parts of figures", (seed,), read, check, "none", 3.0)


def all_readers(folder: Path, drawn: bool = True) -> list[Reader]:
    """Return all readers, with sound files made in a folder.

    Args:
        folder: for these files.
        drawn: with the one that draws figures, which takes longest.
    """
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # processes are forked later, and a thread would be lost with the locks that it holds
    digits = load_dataset("digits")
    small = Dataset("halves", *_halves(1300, 0), *_halves(50, 1), 2)
    return [
        _idx_reader(),
        _cifar_reader(),
        _fault_reader(),
        _archive_reader(folder),
        _arrays_reader(folder),
        *_pruned_readers(folder),
        _checkpoint_reader(folder, digits),
        _moments_reader(folder),
        _state_dict_reader(),
        _certificate_reader(folder, small),
        _state_reader(folder, small),
        *_zoo_readers(folder, digits),
        _records_reader(folder),
        *_figure_readers(folder),
        _parts_reader(),
        *([_redraw_reader(folder)] if drawn else []),
    ]
