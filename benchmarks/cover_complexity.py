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
from collections.abc import Sequence
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
from specprune.figures.style import COLOURS, MARKERS, REFERENCE, figure_style, finish_figure, new_figure
from specprune.testbed import Dataset, Recipe, default_recipe, load_dataset, train

SIZES = (1000, 5000, 20000)  # and all
_LARGEST = 5000  # training set of the convolutional network, but for --whole, which takes half an hour more
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


def readings(found: torch.Tensor, targets: torch.Tensor, measured: CoverComplexity) -> dict[str, float]:
    """Return other ratios of the same kind, none of them the paper's; inf where the difference is not above 0.

    Averaged over the classes j of test images: "closest class" has, for the mutual distance, the class that is closest
    to class j on average; "closest image" the nearest image of any other class; "squares" squared distances.
    """
    own = found.gather(1, targets[:, None])[:, 0]
    others = found.scatter(1, targets[:, None], math.inf)
    means = measured.distances.clone().fill_diagonal_(math.inf)  # [i, j]: from class j's images to class i's
    classes = len(measured.classes)

    def ratio(total: float, apart: float) -> float:
        return total / apart if apart > 0 else math.inf

    def by_class(values: torch.Tensor) -> float:
        return float(np.mean([float(values[targets == k].mean()) for k in range(classes)]))

    squares = others.square().masked_fill(others.isinf(), 0).sum(1) / (classes - 1)
    return {
        "closest class": ratio(measured.total_distance, float(means.amin(0).mean()) - measured.self_distance),
        "closest image": ratio(measured.total_distance, by_class(others.amin(1)) - measured.self_distance),
        "squares": ratio(float(measured.nearest.square().mean()), by_class(squares) - by_class(own.square())),
    }


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


def measured_record(dataset: Dataset, found: torch.Tensor, size: int, classes: int) -> dict[str, Any]:
    """Return the cover complexity of one training set, and what else its distances say."""
    measured = covers(dataset, found, size, classes)
    test = dataset.test_targets < classes
    return {
        "data": dataset.name,
        "size": size,
        **measured.to_records()[0],
        "neighbour_error": neighbour_error(dataset, found, classes),
        "readings": readings(found[test][:, :classes], dataset.test_targets[test], measured),
    }


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Return how well y is a multiple of x, or a multiple and a constant.

    "share" is 1 - (sum of squared residuals) / (sum of squared deviations of y from its mean), for either line.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    spread = float(np.square(b - b.mean()).sum())
    multiple = float(a @ b / (a @ a))
    fitted = stats.linregress(a, b)
    return {
        "points": len(a),
        "multiple": multiple,
        "share of multiple": 1 - float(np.square(b - multiple * a).sum()) / spread,
        "slope": float(fitted.slope),
        "intercept": float(fitted.intercept),
        "pearson": float(fitted.rvalue),
        "spearman": float(stats.spearmanr(a, b).statistic),
    }


def fits(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of error / sqrt(K) over cover complexity and over the 1-nearest-neighbour error / sqrt(K)."""
    names = sorted({record["data"] for record in records})
    most: dict[tuple[str, str], int] = {}
    for record in records:
        key = record["data"], record["net"]
        most[key] = max(most.get(key, 0), record["size"])
    groups = {
        "largest sizes": [r for r in records if r["size"] == most[r["data"], r["net"]] and r["classes"] == 10],
        "all sizes": [r for r in records if r["classes"] == 10],
        "all sizes and classes": list(records),
        "the same without cifar10": [r for r in records if r["data"] != "cifar10"],
        **{name: [r for r in records if r["data"] == name and r["classes"] == 10] for name in names},
    }
    rows = []
    for group, members in groups.items():
        for net in NETS:
            chosen = [record for record in members if record["net"] == net]
            scaled = [record["test_error"] / math.sqrt(record["classes"]) for record in chosen]
            for against in ("cover_complexity", "neighbour_error"):
                root = [math.sqrt(r["classes"]) if against == "neighbour_error" else 1.0 for r in chosen]
                x = [record[against] / scale for record, scale in zip(chosen, root, strict=True)]
                if len(chosen) > 2:
                    rows.append({"group": group, "net": net, "against": against, **line(x, scaled)})
    return rows


def orders(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rank correlation of each reading with the test errors of the sets of all ten classes."""
    rows = []
    for net in NETS:
        chosen = [record for record in records if record["net"] == net and record["classes"] == 10]
        errors = [record["test_error"] for record in chosen]
        values = {"cover complexity": [record["cover_complexity"] for record in chosen]}
        for name in chosen[0]["readings"]:
            values[name] = [record["readings"][name] for record in chosen]
        values["1 nearest neighbour"] = [record["neighbour_error"] for record in chosen]
        # Infinite readings are equal and largest.
        rows += [
            {"net": net, "reading": k, "spearman": float(stats.spearmanr(v, errors)[0])} for k, v in values.items()
        ]
    return rows


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the scaled errors over the cover complexity, and the multiple of it that fits best."""
    with figure_style():
        figure, (ax,) = new_figure(height=2.6)
        names = sorted({record["data"] for record in records})
        for colour, name in zip(COLOURS, names, strict=False):
            for marker, net in zip(MARKERS, NETS, strict=False):
                own = [record for record in records if (record["data"], record["net"]) == (name, net)]
                for few in (False, True):
                    chosen = [record for record in own if (record["classes"] < 10) == few]
                    ax.plot(
                        [record["cover_complexity"] for record in chosen],
                        [100 * record["test_error"] / math.sqrt(record["classes"]) for record in chosen],
                        color=colour,
                        marker=marker,
                        markersize=4,
                        linestyle="none" if few else "-",
                        linewidth=0.6,
                        markerfacecolor="none" if few else colour,
                        label=name if marker == MARKERS[0] and not few else None,
                    )
        for marker, net in zip(MARKERS, NETS, strict=False):
            ax.plot([], [], color="0.45", marker=marker, markersize=4, linestyle="none", label=net.partition("-")[0])
        ax.plot([], [], "s", color="0.45", markersize=4, markerfacecolor="none", label="2 or 5 classes")
        all_sizes = [record for record in records if record["classes"] == 10]
        x = np.array([record["cover_complexity"] for record in all_sizes])
        multiple = line(x, [100 * record["test_error"] / math.sqrt(10) for record in all_sizes])["multiple"]
        ends = np.array([0.8 * x.min(), 1.2 * x.max()])
        ax.plot(ends, multiple * ends, **REFERENCE, label="best multiple")
        ax.set(xscale="log", yscale="log", xlabel="cover complexity", ylabel="test error / sqrt(K)  (%)")
        finish_figure(figure, "Is the error linear in the cover complexity?")
        with atomic_write(path) as stream:
            figure.savefig(stream, format="png", dpi=200)


def conclude(sets: list[dict[str, Any]], networks: list[dict[str, Any]], out: Path) -> None:
    """Print the tables and write them with the figure."""
    by_set = {(record["data"], record["size"], record["classes"]): record for record in sets}
    records = [{**by_set[run["data"], run["size"], run["classes"]], **run} for run in networks]
    payload = {
        **where_run("specprune", "torch", "numpy", "scipy"),
        "fits": fits(records),
        "orders": orders(records),
        "sets": sets,
        "networks": networks,
    }
    columns = ["data", "train", "classes", "total_distance", "self_distance", "mutual_distance", "cover_complexity"]
    print(format_table(sets, [*columns, "neighbour_error"], "distances"))
    columns = ["data", "train", "classes", "net", "epochs", "cover_complexity", "train_error", "test_error"]
    print(format_table(records, columns, "networks"))
    print(format_table(payload["fits"], title="error / sqrt(K) as a line"))
    print(format_table(payload["orders"], title="rank correlation with the error, all sizes of ten classes"))
    write_text(out / "cover_complexity.json", to_json(payload) + "\n")
    draw(records, out / "cover-complexity.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits,mnist,fashion-mnist,cifar10")
    parser.add_argument("--seeds", type=int, default=1, help="networks of each kind for each training set")
    parser.add_argument("--work", type=Path, default=Path("results/cover_complexity"))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--whole", action="store_true", help="train the convolutional network on whole sets too")
    parser.add_argument(
        "--part",
        choices=("distances", "conclude", "all"),
        default="all",
        help="stop after the distances, or sum up the networks that there are, or everything",
    )
    options = parser.parse_args()
    runs = options.work / "networks.jsonl"
    datasets = {name: nested(load_dataset(name)) for name in options.data.split(",")}
    found = {name: measured_distances(dataset, options.work) for name, dataset in datasets.items()}
    if options.part == "distances":
        return
    done = {_key(record) for record in read_records(runs)}
    tasks = [
        (size, classes, net, seed, name)
        for name, dataset in datasets.items()
        for size, classes in plan(dataset)
        for net in NETS
        for seed in range(options.seeds)
        # The part below the whole has distances only: errors there end between those of its neighbours.
        if size != SIZES[-1] and (options.whole or size <= _LARGEST or net.startswith("mlp"))
    ]
    for size, classes, net, seed, name in sorted(tasks):  # small training sets first
        if options.part == "all" and (name, size, classes, net, seed) not in done:
            record = trained_record(datasets[name], size, classes, net, seed)
            append_record(runs, record)
            print(format_table([record]), flush=True)
    seen = {_key(record): record for record in read_records(runs)}
    sets = [
        measured_record(dataset, found[name][size], size, classes)
        for name, dataset in datasets.items()
        for size, classes in plan(dataset)
    ]
    keys = [(name, size, classes, net, seed) for size, classes, net, seed, name in tasks]
    networks = [seen[key] for key in keys if key in seen]
    conclude(sets, networks, options.out)


if __name__ == "__main__":
    main()
