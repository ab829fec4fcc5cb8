"""Training the networks of the experiments, measuring them, and keeping them in files."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from specprune._files import load_arrays, save_arrays
from specprune._records import shortened
from specprune.testbed.datasets import Dataset, randomize_labels
from specprune.testbed.networks import TaskShape, build_network

logger = logging.getLogger(__name__)

_KIND = "trained network"
_OPTIMIZERS = ("adam", "sgd")
_MOMENTUM = 0.9
_WARM_UP = 0.2
# The tensors that a network has at least for each width in its name.
_TENSORS_A_WIDTH = {"mlp": 2, "vgg": 6, "resnet": 24}


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on, besides the data itself.

    Attributes:
        data: name of the data set.
        net: name of the network, as `build_network` takes it.
        epochs: passes over the training set.
        batch_size: images a step; an incomplete last batch is left out of the epoch.
        learning_rate: peak of the schedule (linear rise over the first fifth of the steps, then a half cosine to 0).
        weight_decay: coefficient; decoupled for "adam" (AdamW), an L2 penalty for "sgd".
        optimizer: "adam", or "sgd" with Nesterov momentum 0.9.
        random_labels: share of the training labels drawn anew before training, in [0, 1].
        label_seed: seed of those labels, as `randomize_labels` takes it.
        seed: of the initial weights and of the order of the images.

    Raises:
        ValueError: a number is out of its range, or the optimizer is unknown.
    """

    data: str
    net: str
    epochs: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    optimizer: str = "adam"
    random_labels: float = 0.0
    label_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs {self.epochs}, batch_size {self.batch_size}: expected at least 1 each")
        if not (0 < self.learning_rate < math.inf) or not (0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}: "
                "expected a positive and a non-negative number"
            )
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}: expected one of {', '.join(_OPTIMIZERS)}")
        if not 0 <= self.random_labels <= 1:
            raise ValueError(f"random_labels {self.random_labels}: expected a share between 0 and 1")


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and how it came about.

    Attributes:
        model: the network, in evaluation mode.
        recipe: what it was trained by.
        history: one record an epoch: "epoch" from 1, "loss" (mean cross-entropy in nats) and "error" (share of wrong
            answers), both averaged over the epoch's steps while the weights moved.
        train_error: share of wrong answers on the training set as trained on (with its random labels, if any).
        test_error: share of wrong answers on the test set.
        input_shape: (channels, height, width) of an image.
        classes: number of classes.
    """

    model: nn.Module
    recipe: Recipe
    history: tuple[dict[str, float], ...]
    train_error: float
    test_error: float
    input_shape: tuple[int, int, int]
    classes: int


def initial_network(trained: TrainedNetwork) -> nn.Module:
    """Return the network as it was before the first step of its training: a point that no data had a say in.

    Args:
        trained: from `train` or `load_checkpoint`.

    Returns:
        The network on the CPU, in evaluation mode.
    """
    shape = TaskShape(trained.input_shape, trained.classes)
    return build_network(trained.recipe.net, shape, trained.recipe.seed).eval()


def default_recipe(data: str, net: str, seed: int = 0) -> Recipe:
    """Return settings that train `net` on `data` to a usual accuracy in a short time.

    Args:
        data: name of the data set.
        net: name of the network, as `build_network` takes it.
        seed: of the initial weights and of the order of the images.
    """
    if net.startswith("mlp"):
        if data == "digits":
            return Recipe(data, net, epochs=40, batch_size=64, learning_rate=5e-3, seed=seed)
        return Recipe(data, net, epochs=8, seed=seed)
    epochs = {"digits": 20, "mnist": 4, "fashion-mnist": 4}.get(data, 15)
    return Recipe(data, net, epochs, learning_rate=0.1, weight_decay=5e-4, optimizer="sgd", seed=seed)


def _rate_factor(step: int, steps: int) -> float:
    """Return the learning rate of step 0, ..., steps - 1 as a share of its peak."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay, momentum=_MOMENTUM, nesterov=True)


def train(dataset: Dataset, recipe: Recipe, device: torch.device | str = "cpu") -> TrainedNetwork:
    """Train a network from scratch by minimizing the cross-entropy, all data being on the device.

    The result depends on the recipe alone (on the CPU, for one number of threads); the global random state is
    neither used nor changed.

    Args:
        dataset: the data; its name must be the recipe's.
        recipe: network, optimizer and seeds.
        device: where to train; the model stays there.

    Returns:
        The network in evaluation mode, with its history and errors.

    Raises:
        ValueError: the data are not the recipe's, the batch size exceeds the training set, or the loss is no longer
            finite.
    """
    count = len(dataset.train_inputs)
    if dataset.name != recipe.data:
        raise ValueError(
            f"the recipe is for data {recipe.data!r}, got {dataset.name!r}; pass the one or adapt the other"
        )
    if recipe.batch_size > count:
        raise ValueError(f"batch_size {recipe.batch_size} exceeds the {count} training images; lower it")
    data = randomize_labels(dataset, recipe.random_labels, recipe.label_seed).to(device)
    model = build_network(recipe.net, data, recipe.seed).to(device)
    optimizer = _make_optimizer(model, recipe)
    steps = recipe.epochs * (count // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    order = torch.Generator().manual_seed(recipe.seed)
    history: list[dict[str, float]] = []
    with tqdm(total=recipe.epochs, desc=f"{recipe.net} on {recipe.data}", unit="epoch", disable=None) as bar:
        for epoch in range(1, recipe.epochs + 1):
            permutation = torch.randperm(count, generator=order).to(device)
            loss, error = _run_epoch(model, data, permutation, recipe.batch_size, optimizer, schedule)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss became {loss} in epoch {epoch} of {recipe.epochs}: lower the learning rate "
                    f"(learning_rate={recipe.learning_rate:g} with {recipe.optimizer})"
                )
            history.append({"epoch": epoch, "loss": loss, "error": error})
            logger.debug("epoch %d: loss %.4f, error %.4f", epoch, loss, error)
            bar.set_postfix(loss=f"{loss:.4f}", error=f"{error:.2%}")
            bar.update()
    model.eval()
    train_error, _ = evaluate(model, data.train_batches())
    test_error, _ = evaluate(model, data.test_batches())
    logger.info("%s on %s: train error %.4f, test error %.4f", recipe.net, recipe.data, train_error, test_error)
    return TrainedNetwork(model, recipe, tuple(history), train_error, test_error, data.input_shape, data.classes)


def _run_epoch(
    model: nn.Module,
    data: Dataset,
    permutation: Tensor,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[float, float]:
    """Take one step a batch and return the mean loss and the error rate along the way."""
    model.train()
    batches = permutation[: len(permutation) // batch_size * batch_size].split(batch_size)
    # Sums stay on the device: reading them once an epoch does not hold up an accelerator.
    loss_sum = torch.zeros((), device=permutation.device)
    wrong = torch.zeros((), dtype=torch.int64, device=permutation.device)
    for chosen in batches:
        targets = data.train_targets[chosen]
        outputs = model(data.train_inputs[chosen])
        loss = functional.cross_entropy(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach()
        wrong += (outputs.detach().argmax(dim=1) != targets).sum()
    return float(loss_sum) / len(batches), float(wrong) / (len(batches) * batch_size)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the share of wrong answers and the mean cross-entropy (nats) of a model in evaluation mode.

    Args:
        model: maps (n, channels, height, width) to (n, classes); every part's mode is restored afterwards.
        batches: pairs of inputs and int64 targets (n,), moved to the model's device as needed.

    Raises:
        ValueError: there are no images.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    count, wrong, loss_sum = 0, 0, 0.0
    model.eval()
    try:
        for inputs, targets in batches:
            outputs = model(inputs.to(device))
            answers = targets.to(device)
            loss_sum += float(functional.cross_entropy(outputs, answers, reduction="sum"))
            wrong += int((outputs.argmax(dim=1) != answers).sum())
            count += len(answers)
    finally:
        for module, mode in modes:
            module.training = mode
    if count == 0:
        raise ValueError("evaluate got no images; expected at least one batch of (inputs, targets)")
    return wrong / count, loss_sum / count


def save_checkpoint(path: str | os.PathLike[str], trained: TrainedNetwork) -> None:
    """Write a trained network with its recipe and history to one `.npz` file, whole or not at all.

    Args:
        path: the file to write.
        trained: what `train` returned.

    Raises:
        ValueError: the model is not the network that the recipe names (it was pruned, say), so that it could not be
            rebuilt from the file.
    """
    state = trained.model.state_dict()
    expected = build_network(trained.recipe.net, TaskShape(trained.input_shape, trained.classes)).state_dict()
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in (state, expected)]
    differing = sorted(name for name in expected.keys() | state.keys() if kinds[0].get(name) != kinds[1].get(name))
    if differing:
        raise ValueError(
            f"cannot save: the model differs from {trained.recipe.net!r} in {', '.join(differing)}; "
            "give a recipe whose `net` names this very network, and its weights in float32"
        )
    header = {
        "kind": _KIND,
        "recipe": dataclasses.asdict(trained.recipe),
        "history": trained.history,
        "train_error": trained.train_error,
        "test_error": trained.test_error,
        "input_shape": trained.input_shape,
        "classes": trained.classes,
    }
    save_arrays(path, {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}, header)


def load_checkpoint(path: str | os.PathLike[str]) -> TrainedNetwork:
    """Read what `save_checkpoint` wrote; the data set is not needed.

    Args:
        path: the file to read.

    Returns:
        The network on the CPU in evaluation mode, with its recipe, history and errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a trained network of this package.
    """
    arrays, header = load_arrays(path, _KIND)
    try:
        return _rebuild(arrays, header)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{os.fspath(path)}: not a usable {_KIND}: {shortened(str(error))}; expected a file written by "
            "save_checkpoint"
        ) from error


def _rebuild(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> TrainedNetwork:
    recipe = _recipe(header["recipe"])
    channels, height, width = (_whole(size, 1, 2**31) for size in header["input_shape"])
    _whole(channels * height * width, 1, 2**31)
    task = TaskShape((channels, height, width), _whole(header["classes"], 1, 2**31))
    family, *widths = recipe.net.split("-")
    if len(widths) * _TENSORS_A_WIDTH.get(family, 1) > len(arrays):
        raise ValueError(f"{len(arrays)} tensors are too few for {len(widths)} widths of a network {family}")
    with torch.device("meta"):  # sizes that a file only states take no memory
        model = build_network(recipe.net, task)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    if found != expected:
        differing = [name for name in [*expected, *found] if found.get(name) != expected.get(name)]
        raise ValueError(f"the tensors {differing[:3]} are not those of {recipe.net!r} for {task}")
    model.load_state_dict(tensors, assign=True)
    model.eval()
    errors = [header["train_error"], header["test_error"]]
    if not all(type(error) in (int, float) and 0 <= error <= 1 for error in errors):
        raise ValueError(f"the errors {errors}: expected shares between 0 and 1")
    history = tuple(dict(record) for record in header["history"])
    if not all(type(value) in (int, float) for record in history for value in record.values()):
        raise ValueError("the history has values that are no numbers")
    return TrainedNetwork(model, recipe, history, float(errors[0]), float(errors[1]), task.input_shape, task.classes)


def _recipe(record: Mapping[str, Any]) -> Recipe:
    """Return a recipe from a file, with every value of the type that it has when `train` writes it."""
    if not isinstance(record, dict):
        raise ValueError(f"recipe: {record!r}, expected an object")
    for field in dataclasses.fields(Recipe):
        value = record.get(field.name, field.default)
        if field.type == "int":
            _whole(value, -(2**63), 2**64)
        elif (type(value) is not str) if field.type == "str" else (type(value) not in (int, float)):
            raise ValueError(f"recipe: {field.name} {value!r}, expected a {field.type}")
    return Recipe(**record)


def _whole(value: Any, least: int, beyond: int) -> int:
    if type(value) is not int or not least <= value < beyond:
        raise ValueError(f"{value!r}: expected a whole number from {least} to {beyond - 1}")
    return value
