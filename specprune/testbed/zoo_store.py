"""The store of a zoo: a folder with a manifest and shards, filled by several processes, resumed after a kill.

`zoo.json` says what the zoo is (the plan) and which shard is to hold which settings, before training starts.
A shard is one `.npz` file with the networks that were trained together, written whole or not at all.  What is finished
is what a readable shard holds: nothing else is believed.  No file has pickled objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from specprune._files import DEFLATE_RATIO, load_arrays, lock_folder, save_arrays
from specprune._records import format_table, to_json
from specprune.testbed.datasets import Dataset
from specprune.testbed.ensemble import MAX_EPOCHS, TARGET_LOSS, check_limits, train_together
from specprune.testbed.networks import TaskShape
from specprune.testbed.zoo import ZooSetting, zoo_examples, zoo_network, zoo_shapes
from specprune.testbed.zoo_files import (
    MANIFEST,
    MEASURED,
    SHARD,
    check_plan,
    read_manifest,
    read_shards,
    shard_name,
    write_manifest,
)

logger = logging.getLogger(__name__)

_DAMAGED = ".damaged"
_MOST_DEPTH = 1000
_AXES = tuple(field.name for field in dataclasses.fields(ZooSetting))
_QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "largest": 1.0}


@dataclass(frozen=True, eq=False)
class ZooNetwork:
    """One finished network of a zoo; its weights stay in the file until they are asked for.

    Attributes:
        setting: what it was trained by.
        epochs: passes over its training examples.
        converged: whether its training loss reached the target.
        diverged: whether its training loss was no longer finite; then there are no weights.
        train_loss: mean cross-entropy (nats) on its n training examples with its labels, in evaluation mode.
        train_error: share of wrong answers there.
        test_loss: mean cross-entropy on the test examples.
        test_error: share of wrong answers there.
        task: shape of the images, and number of classes.
        shard: the file with its weights.
        row: its place in the shard.
    """

    setting: ZooSetting
    epochs: int
    converged: bool
    diverged: bool
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    task: TaskShape
    shard: Path
    row: int

    @property
    def gap(self) -> float:
        """Generalization gap: test_error - train_error, the latter on the labels trained on."""
        return self.test_error - self.train_error

    def initial(self) -> nn.Sequential:
        """Return the network as it was before the first step, in evaluation mode on the CPU."""
        return zoo_network(self.setting, self.task).eval()

    def model(self) -> nn.Sequential:
        """Return the trained network, in evaluation mode on the CPU.

        Raises:
            ValueError: the training diverged, or the file is damaged.
            FileNotFoundError: the file is gone.
        """
        if self.diverged:
            raise ValueError(f"{self.setting}: its training diverged, so no weights were kept; leave it out")
        name = _weights_name(self.row)
        arrays, header = load_arrays(self.shard, SHARD, [name])
        shapes = _check_layers(self.shard, header, self.setting, self.task)
        sizes, weights = [math.prod(shape) for shape in shapes.values()], arrays[name]
        if weights.shape != (sum(sizes),) or weights.dtype != np.float32:
            raise ValueError(
                f"{self.shard}: {name} is {weights.dtype} of shape {weights.shape}, expected float32 of shape "
                f"{(sum(sizes),)}"
            )
        network = self.initial()
        state = network.state_dict()
        for (key, shape), part in zip(shapes.items(), torch.from_numpy(weights).split(sizes), strict=True):
            state[key] = part.view(shape)
        for key, tensor in state.items():
            if not tensor.is_floating_point():  # a batch norm's counter of batches
                state[key] = torch.tensor(self.epochs * (self.setting.n // self.setting.batch_size))
        network.load_state_dict(state)
        return network

    def to_record(self) -> dict[str, Any]:
        """Return the setting and what was measured, by name."""
        measured = {name: getattr(self, name) for name in MEASURED}
        return {**dataclasses.asdict(self.setting), **measured, "gap": self.gap}


@dataclass(frozen=True, eq=False)
class Zoo:
    """The finished networks of a zoo.

    Attributes:
        folder: where it is stored.
        target_loss: mean cross-entropy (nats) on its training examples at which a network stopped.
        max_epochs: when it stopped at the latest.
        networks: the finished ones, in the order of the plan's settings.
        missing: the settings not yet trained.
        seconds: time that the training took, summed over processes.
    """

    folder: Path
    target_loss: float
    max_epochs: int
    networks: tuple[ZooNetwork, ...]
    missing: tuple[ZooSetting, ...]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return how many networks there are, converged, diverged and missing, and how fast they were trained."""
        return {
            "networks": len(self.networks),
            "converged": sum(network.converged for network in self.networks),
            "diverged": sum(network.diverged for network in self.networks),
            "missing": len(self.missing),
            "seconds": self.seconds,
            "per_second": len(self.networks) / self.seconds if self.seconds else None,
        }

    def quantiles(self) -> list[dict[str, Any]]:
        """Return the spread of epochs, errors and gap over the converged networks, one record a quantity."""
        kept = [network for network in self.networks if network.converged]
        if not kept:
            return []
        names = ("epochs", "train_error", "test_error", "gap")
        columns = {name: [float(getattr(network, name)) for network in kept] for name in names}
        return [
            {"quantity": name, **{label: float(np.quantile(column, q)) for label, q in _QUANTILES.items()}}
            for name, column in columns.items()
        ]

    def by_axis(self) -> list[dict[str, Any]]:
        """Return one record for every value of every axis that varies: counts, and means over the converged."""
        records = []
        for axis in _AXES:
            values = sorted({getattr(network.setting, axis) for network in self.networks})
            for value in values if len(values) > 1 else []:
                there = [network for network in self.networks if getattr(network.setting, axis) == value]
                kept = [network for network in there if network.converged]
                means = {
                    name: float(np.mean([getattr(network, name) for network in kept])) if kept else None
                    for name in ("epochs", "test_error", "gap")
                }
                records.append({"axis": axis, "value": value, "networks": len(there), "converged": len(kept), **means})
        return records

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record for every finished network."""
        return [network.to_record() for network in self.networks]

    def to_json(self) -> str:
        """Return plan, summary and records as JSON."""
        plan = {"target_loss": self.target_loss, "max_epochs": self.max_epochs}
        tables = {"quantiles": self.quantiles(), "by_axis": self.by_axis(), "networks": self.to_records()}
        return to_json({**plan, "summary": self.summary(), **tables})

    def __str__(self) -> str:
        title = f"zoo in {self.folder}: cross-entropy {self.target_loss:g} within {self.max_epochs} epochs"
        tables = [format_table([self.summary()], title=title)]
        tables.append(format_table(self.quantiles(), title="spread over the converged networks"))
        tables.append(format_table(self.by_axis(), title="means over the converged networks"))
        return "\n\n".join(tables)


def train_zoo(
    dataset: Dataset,
    settings: Iterable[ZooSetting],
    folder: str | os.PathLike[str],
    *,
    target_loss: float = TARGET_LOSS,
    max_epochs: int = MAX_EPOCHS,
    together: int = 64,
    jobs: int | None = None,
    device: torch.device | str = "cpu",
) -> Zoo:
    """Train what is missing of a zoo in a folder, many networks at once, and return all that is there.

    A kill at any moment loses no more than the chunks in work; the same call then goes on.  Settings may be added
    later.  One call at a time works in a folder; others are refused.

    Args:
        dataset: the data of all settings, on the CPU.
        settings: what to train; those that the folder has already are not trained again.
        folder: of the store; made if need be.
        target_loss: each network stops where its training loss (nats) is at most this.
        max_epochs: each network stops after as many at the latest, and then has not converged.
        together: networks trained at once, which make one shard.
        jobs: processes at once; by default what `joblib.parallel_config` says, or else 1.  That context also chooses
            the backend: processes or threads of this machine, dask or ray.
        device: of the training.

    Returns:
        The zoo with all its finished networks, from this call and earlier ones.

    Raises:
        ValueError: settings are missing, twice there or for other data, the folder holds a zoo of another plan, or
            another call is at work there.
    """
    wanted = tuple(settings)
    check_limits(target_loss, max_epochs)
    _check_settings(wanted, dataset, together)
    place = Path(folder)
    plan = _plan(dataset, target_loss, max_epochs)
    with lock_folder(place):
        return _train_missing(dataset, wanted, place, plan, together, jobs, str(device))


def _train_missing(
    dataset: Dataset,
    wanted: tuple[ZooSetting, ...],
    place: Path,
    plan: dict[str, Any],
    together: int,
    jobs: int | None,
    device: str,
) -> Zoo:
    manifest: dict[str, Any] = {"plan": plan, "settings": [], "shards": {}}
    if (place / MANIFEST).exists():
        manifest = read_manifest(place)
    check_plan(place, manifest["plan"], plan)
    shards, damaged = read_shards(place, manifest["shards"], whole=True)
    for name, header in [*shards.items()]:
        try:
            _shard_networks(place / name, header, _task(plan))
        except ValueError as error:
            damaged.append((place / name, str(error)))
            del shards[name]
    for path, reason in damaged:
        logger.warning("%s; its networks are trained again, the file is kept as %s", reason, path.name + _DAMAGED)
        path.rename(path.with_name(path.name + _DAMAGED))
    finished = {ZooSetting(**record["setting"]) for header in shards.values() for record in header["networks"]}
    chunks = {shard_name(chunk): chunk for chunk in _chunks([s for s in wanted if s not in finished], together)}
    known = [ZooSetting(**record) for record in manifest["settings"]]
    everything = list(dict.fromkeys([*known, *finished, *wanted]))
    write_manifest(place, plan, everything, shards, chunks)
    if chunks:
        examples = zoo_examples(dataset, max(setting.n for chunk in chunks.values() for setting in chunk))
        _train_chunks(examples, chunks, place, (plan["target_loss"], plan["max_epochs"]), jobs, device)
    return load_zoo(place)


def load_zoo(folder: str | os.PathLike[str]) -> Zoo:
    """Return the finished networks of a zoo, whether or not it is complete; weights are read when asked for.

    Args:
        folder: what `train_zoo` was given.

    Raises:
        FileNotFoundError: there is no zoo.
        ValueError: the manifest or a shard is damaged.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    shards, damaged = read_shards(place, manifest["shards"], whole=False)
    if damaged:
        raise ValueError(
            "; ".join(error for _, error in damaged) + "; the same train_zoo (or `specprune zoo`) trains it again"
        )
    plan = manifest["plan"]
    found: dict[ZooSetting, ZooNetwork] = {}
    for name, header in shards.items():
        for network in _shard_networks(place / name, header, _task(plan)):
            found.setdefault(network.setting, network)
    settings = [ZooSetting(**record) for record in manifest["settings"]]
    return Zoo(
        place,
        plan["target_loss"],
        plan["max_epochs"],
        tuple(found[setting] for setting in settings if setting in found),
        tuple(setting for setting in settings if setting not in found),
        sum(float(header["seconds"]) for header in shards.values()),
    )


def _task(plan: Mapping[str, Any]) -> TaskShape:
    channels, height, width = plan["input_shape"]
    return TaskShape((channels, height, width), plan["classes"])


def _shard_networks(path: Path, header: Mapping[str, Any], task: TaskShape) -> list[ZooNetwork]:
    """Return what a shard's header says of its networks, checked, without their weights."""
    networks = []
    checked: set[tuple[str, int, int, bool]] = set()
    for row, record in enumerate(header["networks"]):
        setting = ZooSetting(**record["setting"])
        measured = {key: record[key] for key in MEASURED}
        for key in ("train_loss", "test_loss"):  # JSON has them as words where they are not finite
            measured[key] = float(measured[key])
        layers = setting.family, setting.width, setting.depth, setting.dropout > 0
        if (header["parameters"] or not measured["diverged"]) and layers not in checked:
            _check_layers(path, header, setting, task)
            checked.add(layers)
        networks.append(ZooNetwork(setting, **measured, task=task, shard=path, row=row))
    return networks


def _check_layers(
    path: Path, header: Mapping[str, Any], setting: ZooSetting, task: TaskShape
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in a shard, which are those of the setting's network, and fit into the file."""
    stated = header["parameters"]
    if setting.depth < min(len(stated), _MOST_DEPTH):  # each layer has weights, and takes time to make
        shapes = zoo_shapes(setting, task)
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        same = [[key, list(shape)] for key, shape in shapes.items()] == stated
        if same and size <= DEFLATE_RATIO * path.stat().st_size:
            return shapes
    raise ValueError(f"{path}: holds other layers than {setting} has; was it made by another version?")


def _check_settings(settings: Sequence[ZooSetting], dataset: Dataset, together: int) -> None:
    if not settings:
        raise ValueError("a zoo needs at least one setting, got none; `zoo_grid` makes them")
    if len(set(settings)) < len(settings):
        twice = next(setting for k, setting in enumerate(settings) if setting in settings[:k])
        raise ValueError(f"{twice} is given twice; give every setting once")
    for setting in settings:
        if setting.data != dataset.name:
            raise ValueError(f"{setting}: is for data {setting.data!r}, got {dataset.name!r}")
        if setting.n > len(dataset.train_inputs):
            raise ValueError(f"{setting}: n exceeds the {len(dataset.train_inputs)} training examples; lower it")
        if setting.depth >= _MOST_DEPTH:
            raise ValueError(f"{setting}: expected fewer than {_MOST_DEPTH} layers; lower depth")
    if together < 1:
        raise ValueError(f"together {together}: expected at least 1 network")


def _plan(dataset: Dataset, target_loss: float, max_epochs: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in (dataset.train_inputs, dataset.train_targets, dataset.test_inputs, dataset.test_targets):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return {
        "data": dataset.name,
        "data_sha256": digest.hexdigest(),
        "input_shape": list(dataset.input_shape),
        "classes": dataset.classes,
        "target_loss": float(target_loss),
        "max_epochs": int(max_epochs),
    }


def _chunks(settings: Iterable[ZooSetting], together: int) -> list[list[ZooSetting]]:
    """Return chunks of one group each, those of similar duration side by side, the longest first."""
    groups: dict[tuple[Any, ...], list[ZooSetting]] = {}
    for setting in settings:
        groups.setdefault(setting.group, []).append(setting)
    chunks = []
    for group in groups.values():
        group.sort(key=lambda s: (s.n, s.label_noise, s.learning_rate, s.dropout, s.weight_decay, s.seed))
        chunks += [group[start : start + together] for start in range(0, len(group), together)]
    return sorted(chunks, key=lambda chunk: -sum(s.n * s.depth / s.batch_size for s in chunk))


def _weights_name(row: int) -> str:
    return f"weights{row}"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: the products are small, and the processes share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_chunks(
    examples: Dataset,
    chunks: Mapping[str, Sequence[ZooSetting]],
    place: Path,
    limits: tuple[float, int],
    jobs: int | None,
    device: str,
) -> None:
    """Train chunks in parallel; this process alone writes, each shard as it is ready."""
    tasks = (delayed(_train_chunk)(name, examples, chunk, *limits, device) for name, chunk in chunks.items())
    count = sum(len(chunk) for chunk in chunks.values())
    with _one_thread(), tqdm(total=count, desc="zoo", unit="network", disable=None, leave=False) as bar:
        for name, arrays, header in Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks):
            save_arrays(place / name, arrays, header)
            bar.update(len(header["networks"]))


def _train_chunk(
    name: str, examples: Dataset, settings: Sequence[ZooSetting], target_loss: float, max_epochs: int, device: str
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Return a shard: its name, one vector of weights for each network that has some, and the header."""
    started = time.perf_counter()
    with _one_thread():
        runs = train_together(examples.to(device), settings, target_loss=target_loss, max_epochs=max_epochs)
    kept = {row: run.weights for row, run in enumerate(runs) if run.weights is not None}
    shapes = [(key, list(tensor.shape)) for key, tensor in next(iter(kept.values()), {}).items()]
    arrays = {
        _weights_name(row): np.concatenate([tensor.numpy().ravel() for tensor in weights.values()])
        for row, weights in kept.items()
    }
    records = [
        {"setting": dataclasses.asdict(run.setting), **{key: getattr(run, key) for key in MEASURED}} for run in runs
    ]
    header = {"kind": SHARD, "parameters": shapes, "networks": records, "seconds": time.perf_counter() - started}
    return name, arrays, header
