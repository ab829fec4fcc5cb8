"""Batches of data for a model: what counts as a batch, and the checks every pass over them makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from specprune.compress.distributed import first_of, is_parallel, sum_over_processes
from specprune.compress.out_of_memory import telling_what_to_lower

Forward = Callable[[nn.Module, Any], Tensor]
_EMPTY = "batches is empty: give at least one batch with at least one sample"


class StopForward(Exception):
    """Raised by a hook to leave a forward pass once it has seen what it needs."""


def batch_inputs(batch: Any) -> Any:
    """Return the inputs of a batch: the batch itself, the first item of a pair, or the mapping.

    Args:
        batch: a tensor, a tuple or list `(inputs, targets)` or `(inputs,)`, or a mapping of tensors.

    Raises:
        TypeError: the batch is none of these.
    """
    if isinstance(batch, Tensor | Mapping):
        return batch
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | Mapping):
        return batch[0]
    raise TypeError(
        f"a batch is a tensor, a pair (inputs, targets) or a mapping of tensors, got {type(batch).__name__}; "
        "adapt the loader or pass forward=callable(model, batch)"
    )


def batch_targets(batch: Any) -> Tensor:
    """Return the targets of a batch: the second item of a pair, or the "labels" of a mapping.

    Raises:
        TypeError: the batch has no targets.
    """
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return batch["labels"]
    raise TypeError(f"this needs labelled batches (inputs, targets), got a {type(batch).__name__} without targets")


def call_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """Run the model on a batch: `model(inputs)`, `model(**mapping)` without "labels", or `forward(model, batch)`.

    Where the model returns a record with `logits`, as Hugging Face models do, these are returned.
    """
    if forward is not None:
        return forward(model, batch)
    inputs = batch_inputs(batch)
    if isinstance(inputs, Mapping):  # "labels" are the targets, see `batch_targets`
        output = model(**{key: value for key, value in inputs.items() if key != "labels"})
    else:
        output = model(inputs)
    logits = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    return output if logits is None else logits


def _tensors(batch: Any) -> list[Tensor]:
    """Return the input tensors of a batch; of a batch that only the caller's `forward` understands, all tensors."""
    try:
        inputs = batch_inputs(batch)
    except TypeError:
        found = [item for item in batch if isinstance(item, Tensor)] if isinstance(batch, tuple | list) else []
        if not found:
            raise
        return found
    return [v for v in inputs.values() if isinstance(v, Tensor)] if isinstance(inputs, Mapping) else [inputs]


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first input tensor."""
    return len(_tensors(batch)[0])


def _check_batch(index: int, batch: Any, model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    for tensor in _tensors(batch):
        if parameter is None:
            return
        if tensor.device != parameter.device:
            raise ValueError(
                f"batch {index} is on device {tensor.device}, the model on {parameter.device}: "
                f"move one of them, for example model.to('{tensor.device}')"
            )
        if tensor.is_floating_point() and tensor.dtype != parameter.dtype:
            raise ValueError(
                f"batch {index} has dtype {tensor.dtype}, the model's parameters {parameter.dtype}: "
                "cast one of them, for example inputs.to(parameter.dtype)"
            )


def fingerprint(batch: Any) -> float:
    """Return a number that tells a batch from others, and from itself in another order."""
    total = 0.0
    for tensor in _tensors(batch):
        flat = tensor.detach().reshape(len(tensor), -1).to(torch.float64)
        weights = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=torch.float64) * 0.7 + 0.1)
        total += float(flat.flatten() @ weights)
    return total


class CalibrationData:
    """A re-iterable set of batches that checks itself on every pass.

    Every pass checks devices and dtypes; passes after the first also check that the loader gave the same data again.
    The check sums a fixed nonlinear function of each sample, so a loader that only reorders its samples passes, and
    one that augments them at random, or is used up after one pass, is reported.

    Args:
        batches: any re-iterable of `(inputs, targets)`, of inputs alone, or of mappings (a DataLoader, a list).
        forward: optional `forward(model, batch) -> output` for models that are called in another way.

    Raises:
        TypeError: `batches` is an iterator, which cannot be read twice, or not iterable at all.
    """

    def __init__(self, batches: Iterable[Any], forward: Forward | None = None) -> None:
        if isinstance(batches, Tensor | str) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be a re-iterable of batches (a DataLoader or a list), got {type(batches).__name__}; "
                "wrap a single tensor as [tensor]"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is a one-pass iterator ({type(batches).__name__}) and cannot be read again: pass the "
                "DataLoader itself or a list, for example list(batches)"
            )
        self._batches = batches
        self._forward = forward
        self._first_pass: tuple[int, float] | None = None
        self._shared_first: Any = None

    def first(self, model: nn.Module | None = None) -> Any:
        """Return the first batch that has samples; of several processes, that of the first one with data, on all.

        Args:
            model: if given, the batch must share its device and dtype.

        Raises:
            ValueError: no batch has samples, or device or dtype do not match.
        """
        batch = self._shared_first
        if batch is None:
            batch = first_of(next(self.head(), None))
            if is_parallel():  # every process must ask for it the first time; after that, each may alone
                self._shared_first = batch
        if batch is None:
            raise ValueError(_EMPTY)
        if model is not None:
            _check_batch(0, batch, model)
        return batch

    def head(self) -> Iterator[Any]:
        """Yield this process's batches from the start, but those without samples; the caller stops when it likes."""
        for batch in self._batches:
            if batch_size(batch) > 0:
                yield batch

    def call(self, model: nn.Module, batch: Any) -> Tensor:
        """Run `model` on `batch` in the way the caller asked for.

        Raises:
            torch.OutOfMemoryError: saying what to lower.
        """
        with telling_what_to_lower("running the model on a batch", "give smaller batches"):
            return call_model(model, batch, self._forward)

    def passes(self, model: nn.Module, title: str) -> Iterator[Any]:
        """Yield every batch with samples once, with a progress bar on terminals.

        A process without data takes part in a data-parallel run as long as another one has some.  All processes must
        go through to the end of the pass.

        Args:
            model: whose device and dtype the batches must share.
            title: what the progress bar says.

        Raises:
            ValueError: no batch or no sample, a device or dtype mismatch, or other data than on the first pass.
        """
        samples, checksum = 0, torch.zeros((), dtype=torch.float64)
        total = len(self._batches) if isinstance(self._batches, Sized) else None
        for index, batch in enumerate(tqdm(self._batches, desc=title, total=total, leave=False, disable=None)):
            _check_batch(index, batch, model)
            if batch_size(batch) == 0:
                continue
            samples += batch_size(batch)
            for tensor in _tensors(batch):
                checksum = checksum + _checksum(tensor)
            yield batch
        if self._first_pass is None:
            everywhere = sum_over_processes(torch.tensor(float(samples), dtype=torch.float64))
            if everywhere == 0:
                raise ValueError(_EMPTY)
            self._first_pass = (samples, float(checksum))
            return
        before, previous = self._first_pass
        now = float(checksum)  # the only time that an accelerator is waited for
        if before and not samples:
            raise ValueError(_EMPTY)
        if before != samples or abs(previous - now) > 1e-6 * max(abs(previous), 1e-12):
            raise ValueError(
                f"batches gave other data on this pass ({samples} samples, checksum {now:.9g}) than on the first "
                f"({before} samples, checksum {previous:.9g}): switch off random augmentation and sampling, or pass a "
                "fixed list of batches"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """Return an order-free checksum: the sum over samples of p^2 (1 + sign(p) / 2), p a projection of the sample."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    flat = tensor.detach().reshape(len(tensor), -1).to(torch.float64)
    direction = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64) * 1.7 + 0.3)
    projections = flat @ direction
    return (projections.square() * (1 + projections.sign() / 2)).sum()
