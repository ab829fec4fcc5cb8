"""What a network answers on labelled data: logits, error rate, margins."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData, batch_targets
from specprune.compress.layers import is_layer

_CPU_ROWS, _DEVICE_ROWS = 512, 8192  # inputs run at a time: what suits caches, and what keeps an accelerator busy


def double_copy(model: nn.Module) -> nn.Module:
    """Return a float64 copy of a network in evaluation mode, whose layers take inputs of every floating type.

    Distances between networks may be far below the rounding of float32, so they are measured between such copies.
    """
    work = copy.deepcopy(model).eval().double()
    for module in work.modules():
        if is_layer(module):
            module.register_forward_pre_hook(_widen)
    return work


def _widen(_: nn.Module, args: tuple[Any, ...]) -> Any:
    return double_batch(args)


def double_batch(batch: Any) -> Any:
    """Return a batch of any kind with its floating point tensors in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: double_batch(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [double_batch(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


class DoubleBatches:
    """The batches of some calibration data in float64, for a model from `double_copy`.

    Args:
        data: the data.
        model: the network that they are for, whose device and dtype they are checked against.
    """

    def __init__(self, data: CalibrationData, model: nn.Module) -> None:
        self.data, self.model = data, model

    def __iter__(self) -> Iterator[Any]:
        return (double_batch(batch) for batch in self.data.passes(self.model, "reading in float64"))


class NonFiniteOutputs(ValueError):
    """A network answers NaN or Inf."""


@torch.no_grad()
def collect_logits(model: nn.Module, data: CalibrationData, title: str = "evaluating") -> tuple[np.ndarray, np.ndarray]:
    """Return a classifier's logits and the true classes.

    Args:
        model: run in evaluation mode on a copy.
        data: labelled batches.
        title: what the progress bar says.

    Returns:
        (n, classes) float64 logits and (n,) integer targets.

    Raises:
        TypeError: batches without targets.
        ValueError: outputs that are not (n, classes), or targets that are no class numbers.
        NonFiniteOutputs: outputs that are NaN or infinite; the first layer with such outputs is named.
    """
    (logits,), targets = collect_logits_of([model], data, title)
    return logits, targets


@torch.no_grad()
def collect_logits_of(
    models: Sequence[nn.Module], data: CalibrationData, title: str = "evaluating"
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the logits of several classifiers on the same samples in the same order, and the true classes.

    All are run in one pass, since a loader that shuffles gives another order in the next one.

    Args:
        models: as in `collect_logits`.
        data: as in `collect_logits`.
        title: as in `collect_logits`.

    Raises:
        TypeError: as in `collect_logits`.
        ValueError: as in `collect_logits`.
    """
    copies = [copy.deepcopy(model).eval() for model in models]
    logits: list[list[np.ndarray]] = [[] for _ in models]
    targets = []
    for batch in data.passes(copies[0], title):
        for part, work in zip(logits, copies, strict=True):
            part.append(data.call(work, batch).to(torch.float64).cpu().numpy())
            if not np.all(np.isfinite(part[-1])):
                raise NonFiniteOutputs(_first_non_finite(work, functools.partial(data.call, batch=batch)))
        targets.append(batch_targets(batch).cpu().numpy())
    labels = np.concatenate(targets)
    return [_checked(np.concatenate(part), labels) for part in logits], labels


def _checked(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if outputs.ndim != 2 or outputs.shape[1] < 2 or labels.shape != (len(outputs),):
        raise ValueError(
            f"outputs of shape {outputs.shape} and targets of shape {labels.shape}: expected a classifier's "
            "(n, classes) logits with at least two classes, and (n,) class numbers"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise ValueError(
            f"targets of dtype {labels.dtype} between {labels.min()} and {labels.max()}: expected integers from 0 to "
            f"{outputs.shape[1] - 1}"
        )
    return outputs


def _first_non_finite(model: nn.Module, run: Callable[[nn.Module], Any]) -> str:
    """Say where NaN or Inf come up first when a network runs."""
    places = []

    def watch(name: str, module: nn.Module) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value, kind in ((args[0] if args else None, "inputs"), (output, "outputs")):
                if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                    places.append(f"the {kind} of layer {name!r}")

        module.register_forward_hook(after)

    work = copy.deepcopy(model)
    for name, module in work.named_modules():
        if name and next(module.children(), None) is None:
            watch(name, module)
    run(work)
    place = places[0] if places else "the outputs of the network"
    return f"NaN or Inf in {place}: check the data, its weights and those before it"


def error_rate(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the fraction of samples whose largest logit is not that of the true class, in [0, 1]."""
    return float(np.mean(logits.argmax(axis=1) != targets))


def root_mean_square(values: np.ndarray) -> float:
    """Return sqrt of the mean over samples of the squared Euclidean norm of the rows, ||f||_n."""
    return float(np.sqrt(np.mean(np.sum(np.square(values), axis=1))))


def run_in_parts(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a network in evaluation mode on all inputs, run some hundreds at a time."""
    rows = _CPU_ROWS if inputs.device.type == "cpu" else _DEVICE_ROWS
    return torch.cat([model(part) for part in inputs.split(rows)])


def check_labelled(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Check that inputs (n, ...) and int64 targets (n,) are tensors on the model's device, n at least 1.

    Raises:
        TypeError: inputs or targets that are not tensors.
        ValueError: shapes, types or devices that do not fit.
    """
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if inputs.ndim < 1 or len(inputs) == 0 or targets.shape != inputs.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"inputs of shape {tuple(inputs.shape)}, targets of shape {tuple(targets.shape)} and {targets.dtype}: "
            "expected (n, ...) and int64 of shape (n,), n at least 1"
        )
    devices = {str(value.device) for value in (inputs, targets, *model.parameters())}
    if len(devices) > 1:
        raise ValueError(f"model, inputs and targets lie on the devices {sorted(devices)}; move them to one")


def checked_logits(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return a classifier's logits on labelled tensors, after checking that everything fits.

    Args:
        model: in evaluation mode.
        inputs: as in `check_labelled`.
        targets: class numbers, as there.

    Returns:
        Float64, shape (n, classes).

    Raises:
        TypeError: as in `check_labelled`.
        ValueError: as there; targets that are no class numbers, or outputs that are no logits.
        NonFiniteOutputs: as in `collect_logits`.
    """
    check_labelled(model, inputs, targets)
    with torch.no_grad():
        outputs = run_in_parts(model, inputs).double()
        _checked(outputs.cpu().numpy(), targets.cpu().numpy())
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteOutputs(_first_non_finite(model, functools.partial(run_in_parts, inputs=inputs)))
    return outputs
