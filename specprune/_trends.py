"""The networks behind the trends: each differs from one base network in one thing, all trained by the same recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from specprune.analysis.trends import TrendPoint
from specprune.compress import prune
from specprune.testbed import Dataset, Recipe, TrainedNetwork, initial_network, randomize_labels, train

SAMPLES = "training samples"
WIDTH = "width"
DEPTH = "hidden layers"
NOISE = "share of random labels"
KEEP = "share of FLOPs kept"


@dataclass(frozen=True)
class TrendPlan:
    """Settings of the networks along every axis; the base network's are `base_*`, no label noise, and no pruning.

    Attributes:
        base_samples: size of the training set.
        base_width: of all hidden layers.
        base_depth: number of hidden layers.
        samples: sizes of nested training sets, the first images each.
        widths: of all hidden layers.
        depths: numbers of hidden layers.
        noises: shares of training labels drawn at random.
        keeps: fractions of the FLOPs that the base network is pruned to.
        steps: of the optimizer, the same for all networks.
        batch_size: images a step.
        learning_rate: of AdamW, at its peak.
    """

    base_samples: int
    base_width: int
    base_depth: int
    samples: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    noises: tuple[float, ...]
    keeps: tuple[float, ...]
    steps: int
    batch_size: int
    learning_rate: float

    def net(self, width: int, depth: int) -> str:
        """Return the name of a network, as `build_network` takes it."""
        return "-".join(["mlp", *[str(width)] * depth])


DIGITS = TrendPlan(
    base_samples=1400,
    base_width=128,
    base_depth=2,
    samples=(175, 350, 700),
    widths=(16, 32, 64, 256),
    depths=(1, 3, 4, 5),
    noises=(0.25, 0.5, 1.0),
    keeps=(0.5, 0.2, 0.1, 0.05, 0.02),
    steps=4000,
    batch_size=64,
    learning_rate=3e-3,
)
# Random labels of 10000 images can be learnt by heart in minutes, those of 60000 cannot.
LARGER = replace(
    DIGITS,
    base_samples=10000,
    base_width=256,
    samples=(1250, 2500, 5000, 20000, 40000),
    widths=(32, 64, 128, 512),
    steps=8000,
    batch_size=128,
    learning_rate=2e-3,
)


def default_plan(data: str) -> TrendPlan:
    """Return the plan for a data set by name: about a minute on one core for digits, several for the larger sets."""
    return DIGITS if data == "digits" else LARGER


def trend_points(dataset: Dataset, plan: TrendPlan, seed: int = 0) -> Iterator[TrendPoint]:
    """Train the networks of a plan one after the other.

    With label noise the test labels get the same share of random ones: bounds speak of the distribution that the
    training set comes from.  Exactly that share is replaced; given which, the examples are independent and their mean
    risk is that of the mixture, which is all that the bounds need (Hoeffding 1956: a sum of independent coins is more
    concentrated than a binomial one of the same mean).

    Args:
        dataset: the data.
        plan: sizes and settings.
        seed: of initial weights, orders and random labels.

    Returns:
        The points, the base network first; it lies on all axes.

    Raises:
        ValueError: the data set has too few images.
    """
    most = max((plan.base_samples, *plan.samples))
    if len(dataset.train_inputs) < most:
        raise ValueError(f"{dataset.name} has {len(dataset.train_inputs)} training images, the plan needs {most}")
    data = _first(dataset, plan.base_samples)
    base = _fit(data, plan, plan.base_width, plan.base_depth, seed)
    settings = {
        SAMPLES: plan.base_samples,
        WIDTH: plan.base_width,
        DEPTH: plan.base_depth,
        NOISE: 0.0,
    }
    yield _point(settings, base, data)
    for samples in plan.samples:
        fewer = _first(dataset, samples)
        yield _point({SAMPLES: samples}, _fit(fewer, plan, plan.base_width, plan.base_depth, seed), fewer)
    for width in plan.widths:
        yield _point({WIDTH: width}, _fit(data, plan, width, plan.base_depth, seed), data)
    for depth in plan.depths:
        yield _point({DEPTH: depth}, _fit(data, plan, plan.base_width, depth, seed), data)
    for noise in plan.noises:
        noisy = _noisy(data, noise, seed)
        yield _point({NOISE: noise}, _fit(noisy, plan, plan.base_width, plan.base_depth, seed), noisy)
    # Pruned networks have no initialisation of their shape, so on this axis all distances are measured from zero.
    yield replace(_point({KEEP: 1.0}, base, data), reference=None)
    for keep in plan.keeps:
        pruned = prune(base.model, data.train_batches(), keep, seed=seed)
        yield replace(
            _point({KEEP: keep}, base, data),
            model=pruned.model,
            reference=None,
            original=base.model,
            original_widths=tuple(group.width for group in pruned.groups),
        )


def _first(dataset: Dataset, samples: int) -> Dataset:
    return replace(dataset, train_inputs=dataset.train_inputs[:samples], train_targets=dataset.train_targets[:samples])


def _noisy(dataset: Dataset, noise: float, seed: int) -> Dataset:
    """Return the data with random labels among those of both parts, drawn independently."""
    trained = randomize_labels(dataset, noise, seed)
    swapped = replace(dataset, train_inputs=dataset.test_inputs, train_targets=dataset.test_targets)
    tested = randomize_labels(swapped, noise, seed + 1)
    return replace(trained, test_targets=tested.train_targets)


def _fit(dataset: Dataset, plan: TrendPlan, width: int, depth: int, seed: int) -> TrainedNetwork:
    epochs = -(-plan.steps // (len(dataset.train_inputs) // plan.batch_size))
    recipe = Recipe(dataset.name, plan.net(width, depth), epochs, plan.batch_size, plan.learning_rate, seed=seed)
    return train(dataset, recipe, dataset.train_inputs.device)


def _point(settings: dict[str, float], trained: TrainedNetwork, dataset: Dataset) -> TrendPoint:
    device: torch.device = dataset.train_inputs.device
    return TrendPoint(
        settings,
        trained.model,
        dataset.train_batches(),
        dataset.test_batches(),
        reference=initial_network(trained).to(device),
        input_radius=dataset.input_radius,
    )
