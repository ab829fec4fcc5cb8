"""Cover complexity of image data sets, and whether test errors of trained networks are linear in it.

Training sets are nested: the first n images of a random order, of all classes or of the first K only.  For every data
set the distances from each test image to each class's nearest training image are found once, exactly, and kept for
each n (`--work`); every network's errors are appended to a file as soon as it is trained.  A stopped run goes on where
it was.  The end prints tables and writes the records, the fits and a figure.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pruning_quality import append_record, read_records, where_run
from scipy import stats

from specprune._files import atomic_write, load_arrays, save_arrays, write_text
from specprune._records import format_table, to_json
from specprune.analysis.cover_complexity import CoverComplexity, class_distances, cover_from_distances
from specprune.figures.style import COLOURS, MARKERS, REFERENCE, figure_style, new_figure
from specprune.testbed import Dataset, Recipe, default_recipe, load_dataset, train

SIZES = (1000, 5000, 20000)  # and all
CLASSES = (2, 5)  # and all; fewer classes take the images of the first `_FEW` that belong to them
NETS = ("mlp-128-128", "vgg-8-8-16-16-32-32")
_FEW = 5000
_KIND = "class distances"
_EPOCHS = {"mlp": 60, "vgg": 20}  # at 1000 images


def nested(dataset: Dataset) -> Dataset:
    """Return the data with the training images in a random order, whose first n are the training set of size n."""
    order = torch.randperm(len(dataset.train_inputs), generator=torch.Generator().manual_seed(0))
    return replace(dataset, train_inputs=dataset.train_inputs[order], train_targets=dataset.train_targets[order])


def sizes_of(dataset: Dataset) -> list[int]:
    """Return the sizes of the training sets, rising."""
    count = len(dataset.train_inputs)
    return [size for size in SIZES if size < count] + [count]


def measured_distances(dataset: Dataset, folder: Path) -> dict[int, torch.Tensor]:
    """Return training set size -> distances (test images, classes), computing what the folder does not have yet."""
    found: dict[int, torch.Tensor] = {}
    classes = torch.arange(dataset.classes)
    nearest = torch.full((len(dataset.test_inputs), dataset.classes), math.inf, dtype=torch.float64)
    before = 0
    for size in sizes_of(dataset):
        path = folder / f"{dataset.name}-{size}.npz"
        if path.exists():
            nearest = torch.from_numpy(load_arrays(path, _KIND)[0]["distances"])
        else:
            start = time.perf_counter()
            part = slice(before, size)
            apart = class_distances(
                dataset.train_inputs[part], dataset.train_targets[part], dataset.test_inputs, classes
            )
            nearest = torch.minimum(nearest, apart)
            seconds = time.perf_counter() - start
            header = {"kind": _KIND, "data": dataset.name, "train": size, "from": before, "seconds": seconds}
            save_arrays(path, {"distances": nearest.numpy()}, header)
            print(f"{dataset.name}: images {before} to {size} in {seconds:.0f} s", flush=True)
        found[size], before = nearest, size
    return found


def restricted(dataset: Dataset, size: int, classes: int) -> Dataset:
    """Return the first `size` training images and all test images, of the first `classes` classes only."""
    kept = dataset.train_targets[:size] < classes
    test = dataset.test_targets < classes
    return Dataset(
        dataset.name,
        dataset.train_inputs[:size][kept],
        dataset.train_targets[:size][kept],
        dataset.test_inputs[test],
        dataset.test_targets[test],
        classes,
    )


def covers(dataset: Dataset, found: torch.Tensor, size: int, classes: int) -> CoverComplexity:
    """Return the cover complexity of the first `size` images of the first `classes` classes."""
    test = dataset.test_targets < classes
    count = int((dataset.train_targets[:size] < classes).sum())
    dimension = math.prod(dataset.input_shape)
    kept = found[test][:, :classes]
    # `Dataset` holds pixels in [0, 1].
    return cover_from_distances(
        kept, dataset.test_targets[test], torch.arange(classes), count, dimension, unit_box=True
    )


def neighbour_error(dataset: Dataset, found: torch.Tensor, classes: int) -> float:
    """Return the share of test images whose nearest training image has another label."""
    test = dataset.test_targets < classes
    return float((found[test][:, :classes].argmin(1) != dataset.test_targets[test]).double().mean())


def recipe(dataset: Dataset, net: str, seed: int) -> Recipe:
    """Return the settings of `default_recipe` with many passes over small training sets and few over large ones."""
    passes = _EPOCHS[net.partition("-")[0]] * (1000 / len(dataset.train_inputs)) ** (2 / 3)
    settings = default_recipe(dataset.name, net, seed)
    return replace(settings, epochs=max(2, round(passes)), batch_size=64)


def trained_record(dataset: Dataset, size: int, classes: int, net: str, seed: int) -> dict[str, Any]:
    """Return the errors of one network and how it was trained."""
    data = restricted(dataset, size, classes)
    settings = recipe(data, net, seed)
    start = time.perf_counter()
    network = train(data, settings)
    return {
        "data": dataset.name,
        "size": size,
        "classes": classes,
        "net": net,
        "seed": seed,
        "epochs": settings.epochs,
        "train_error": network.train_error,
        "test_error": network.test_error,
        "seconds": time.perf_counter() - start,
    }


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("data", "size", "classes", "net", "seed"))


def plan(dataset: Dataset) -> list[tuple[int, int]]:
    """Return the (size, classes) of the training sets."""
    sizes = sizes_of(dataset)
    few = max(size for size in sizes if size <= _FEW)
    return [(size, dataset.classes) for size in sizes] + [(few, classes) for classes in CLASSES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits,mnist,fashion-mnist,cifar10")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each kind for each training set")
    parser.add_argument("--work", type=Path, default=Path("results/cover_complexity"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--part", choices=("distances", "all"), default="all", help="stop after the distances")
    options = parser.parse_args()
    runs = options.work / "networks.jsonl"
    datasets = {name: nested(load_dataset(name)) for name in options.data.split(",")}
    for name, dataset in datasets.items():
        measured_distances(dataset, options.work)
    if options.part == "distances":
        return
    done = {_key(record) for record in read_records(runs)}
    tasks = [
        (size, classes, net, seed, name)
        for name, dataset in datasets.items()
        for size, classes in plan(dataset)
        for net in NETS
        for seed in range(options.seeds)
    ]
    for size, classes, net, seed, name in sorted(tasks):  # small training sets first
        if (name, size, classes, net, seed) not in done:
            record = trained_record(datasets[name], size, classes, net, seed)
            append_record(runs, record)
            print(format_table([record]), flush=True)


if __name__ == "__main__":
    main()
