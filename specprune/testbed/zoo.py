"""Zoos: many small networks that differ in what they are trained by, each with its own training set and start."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import to_json
from specprune.testbed.datasets import Dataset, randomize_labels
from specprune.testbed.networks import ImageTask, mlp, vgg

FAMILIES = ("mlp", "conv")
_SHUFFLE_SEED = 0
_LABEL_SEED = 0


@dataclass(frozen=True)
class ZooSetting:
    """Everything that one network of a zoo depends on, besides the data and when its training ends.

    Attributes:
        data: name of the data set.
        family: "mlp" (fully connected) or "conv" (3x3 convolutions with batch normalization), see `zoo_network`.
        width: of every hidden layer, or channels of every convolution.
        depth: number of hidden layers, or of convolutions.
        n: training examples; equal n means the same examples, and fewer are among more.
        learning_rate: of SGD with momentum 0.9, constant.
        batch_size: examples a step, at most n; an incomplete last batch is left out of the epoch.
        weight_decay: coefficient of the L2 penalty, on all parameters.
        dropout: share of the hidden units left out at each step, in [0, 1).
        label_noise: share of the training labels drawn anew, in [0, 1]; the same draw for all networks.
        seed: of the initial weights, the order of the examples and the dropout.

    Raises:
        ValueError: a number is out of its range, or the family is unknown.
        TypeError: a count is not a whole number.
    """

    data: str
    family: str
    width: int
    depth: int
    n: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r}: expected one of {', '.join(FAMILIES)}")
        for name in ("width", "depth", "n", "batch_size", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} {value!r}: expected a whole number")
            if not least <= value < 2**32:
                raise ValueError(f"{name} {value}: expected a whole number from {least} to 2**32 - 1")
            object.__setattr__(self, name, int(value))
        for name in ("learning_rate", "weight_decay", "dropout", "label_noise"):  # 0 and 0.0 are one setting
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.batch_size > self.n:
            raise ValueError(f"batch_size {self.batch_size} exceeds the n = {self.n} training examples; lower it")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}: "
                "expected a positive and a non-negative number"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.label_noise <= 1:
            raise ValueError(
                f"dropout {self.dropout}, label_noise {self.label_noise}: expected a share in [0, 1) and one in [0, 1]"
            )

    @property
    def group(self) -> tuple[str, int, int, int, bool]:
        """What networks that are trained together must share: shapes of the weights and batches, dropout or not."""
        return self.family, self.width, self.depth, self.batch_size, self.dropout > 0

    @property
    def digest(self) -> str:
        """SHA-256 of the setting, in hexadecimal."""
        return hashlib.sha256(to_json(dataclasses.asdict(self)).encode()).hexdigest()


def zoo_grid(**axes: Any) -> tuple[ZooSetting, ...]:
    """Return the settings of all combinations, the last axis varying fastest.

    zoo_grid(data="digits", family="mlp", width=[16, 48], ...) has one setting for each width.

    Args:
        axes: fields of `ZooSetting`, each with one value or with an iterable of values.

    Raises:
        ValueError: an axis is empty or has a value twice, or a setting is out of range.
        TypeError: there is no such field, or a field without default is missing.
    """
    values: dict[str, tuple[Any, ...]] = {}
    for name, given in axes.items():
        values[name] = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
        if not values[name] or len(set(values[name])) < len(values[name]):
            raise ValueError(f"axis {name}={list(values[name])}: expected at least one value, and none twice")
    return tuple(ZooSetting(**dict(zip(values, point, strict=True))) for point in itertools.product(*values.values()))


#: axes of the grids by name.  Learning rate and weight decay do not vary: with the loss at which training stops given,
#: they were seen to move the gap by less than noise, but to keep networks from getting there.
ZOO_GRIDS: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "family": "mlp",
        "width": (48, 160),
        "depth": (1, 2),
        "n": (150, 500),
        "learning_rate": 0.04,
        "batch_size": 32,
        "label_noise": (0.0, 0.1),
        "seed": (0, 1),
    },
    "default": {
        "family": "mlp",
        "width": (48, 160),
        "depth": (1, 2, 3),
        "n": (150, 300, 600),
        "learning_rate": 0.04,
        "batch_size": (16, 64),
        "dropout": (0.0, 0.1),
        "label_noise": (0.0, 0.1),
        "seed": (0, 1, 2),
    },
    "conv": {
        "family": "conv",
        "width": (8, 16),
        "depth": (2, 3),
        "n": (150, 300),
        "learning_rate": 0.04,
        "batch_size": (16, 64),
        "label_noise": (0.0, 0.1),
        "seed": (0, 1),
    },
}


def zoo_network(setting: ZooSetting, task: ImageTask) -> nn.Sequential:
    """Return the network of a setting with its initial weights; the global random state is left alone.

    "mlp" is `mlp` with `depth` hidden layers.  "conv" is `vgg` with `depth` convolutions and one 2x2 max-pooling, after
    the first convolution, where the image has at least 2x2 pixels.  With dropout, a Dropout follows every ReLU.

    Args:
        setting: family, width, depth, dropout and seed count.
        task: what says the shape of the images and the number of classes.

    Returns:
        A chain of layers on the CPU, in training mode, with PyTorch's own initial weights for the seed.
    """
    plain = _plain_network(setting, task)
    plain.to_empty(device="cpu")
    _draw_weights(plain, torch.Generator().manual_seed(setting.seed))
    if not setting.dropout:
        return plain
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in plain.named_children():
        layers[name] = layer
        if isinstance(layer, nn.ReLU):
            layers[name.replace("relu", "drop")] = nn.Dropout(setting.dropout)
    return nn.Sequential(layers)


def zoo_shapes(setting: ZooSetting, task: ImageTask) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a setting's network, by name, without making them.

    Args:
        setting: family, width and depth count.
        task: what says the shape of the images and the number of classes.
    """
    state = _plain_network(setting, task).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}


def _plain_network(setting: ZooSetting, task: ImageTask) -> nn.Sequential:
    """Return the network of a setting without dropout and without weights."""
    channels, height, width = task.input_shape
    sizes = [setting.width] * setting.depth
    with torch.device("meta"):  # draws nothing; the global random state is shared by all threads
        if setting.family == "mlp":
            return mlp((channels * height * width, *sizes, task.classes))
        return vgg(sizes, task.classes, channels, pools=(1,) if min(height, width) > 1 else ())


def _draw_weights(network: nn.Sequential, generator: torch.Generator) -> None:
    """Give a network the initial weights that its layers' constructors draw after `torch.manual_seed`."""
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, *_bias_range(layer.weight), generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()


def _bias_range(weight: torch.Tensor) -> tuple[float, float]:
    bound = 1 / math.sqrt(weight[0].numel())
    return -bound, bound


def zoo_examples(dataset: Dataset, n: int) -> Dataset:
    """Return the data with the first n training examples of one fixed shuffle, and all test examples.

    Args:
        dataset: all data; left as they are.
        n: how many.

    Raises:
        ValueError: there are fewer.
    """
    count = len(dataset.train_inputs)
    if not 1 <= n <= count:
        raise ValueError(f"n = {n}: expected 1 to {count}, the training examples of {dataset.name}")
    chosen = torch.from_numpy(np.random.default_rng(_SHUFFLE_SEED).permutation(count)[:n])
    chosen = chosen.to(dataset.train_inputs.device)
    return replace(dataset, train_inputs=dataset.train_inputs[chosen], train_targets=dataset.train_targets[chosen])


def own_labels(examples: Dataset, setting: ZooSetting) -> Dataset:
    """Return the first n training examples with the labels that a network is trained on.

    The noise is drawn for these n alone, so that its share is exact, and by one fixed seed.

    Args:
        examples: from `zoo_examples`, at least n.
        setting: n and label_noise count.

    Raises:
        ValueError: the setting is for other data, or asks for more examples than there are.
    """
    if setting.data != examples.name:
        raise ValueError(f"the setting is for data {setting.data!r}, got {examples.name!r}; pass the one or the other")
    count = len(examples.train_inputs)
    if setting.n > count:
        raise ValueError(f"n = {setting.n} exceeds the {count} training examples of {examples.name}; lower it")
    first = replace(
        examples,
        train_inputs=examples.train_inputs[: setting.n],
        train_targets=examples.train_targets[: setting.n],
    )
    return randomize_labels(first, setting.label_noise, _LABEL_SEED)


def zoo_training_set(dataset: Dataset, setting: ZooSetting) -> Dataset:
    """Return the data as one network of the zoo saw them: its n training examples with its labels, and all tests.

    Args:
        dataset: all data, as `load_dataset` gives them.
        setting: n and label_noise count.

    Raises:
        ValueError: the setting is for other data, or asks for more examples than there are.
    """
    return own_labels(zoo_examples(dataset, min(setting.n, len(dataset.train_inputs))), setting)
