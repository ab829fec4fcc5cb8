"""How long networks take: measured, for one sample and for a batch, original and pruned side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.tracing import map_tensors

BATCHES = (1, 64)
_WARM_UP = 2
_SECONDS = 0.3  # measured a network and batch size, at least `_REPEATS` runs
_REPEATS = 5
_STEPS = 7


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass, median over runs that alternate between the two networks.

    Args:
        batch: samples a pass.
        before_ms: milliseconds of the original network.
        after_ms: milliseconds of the pruned network.
    """

    batch: int
    before_ms: float
    after_ms: float

    @property
    def speed_up(self) -> float:
        """How many times faster the pruned network is."""
        return self.before_ms / self.after_ms


def measure_latency(
    original: nn.Module, pruned: nn.Module, data: CalibrationData, batches: tuple[int, ...] = BATCHES
) -> tuple[Latency, ...]:
    """Return the measured time of both networks for several batch sizes.

    Args:
        original: one network.
        pruned: the other.
        data: calibration data; its first batch is repeated or shortened to the size.
        batches: the sizes.
    """
    found = []
    first = data.first()
    for size in batches:
        batch = resized(first, size)
        before, after = _median_ms((original, pruned), data, batch)
        found.append(Latency(size, before, after))
    return tuple(found)


def latency_fraction(
    original: nn.Module, data: CalibrationData, keep: float, build: Callable[[float], nn.Module]
) -> float:
    """Return the largest fraction of FLOPs whose network is measured to take at most `keep` of the original's time.

    Args:
        original: the network before pruning.
        data: calibration data.
        keep: fraction of the time, in (0, 1].
        build: gives a network (of any weights) with that fraction of the FLOPs; raises ValueError where none has.

    Raises:
        ValueError: even the smallest network takes longer.
    """
    batch = resized(data.first(), BATCHES[-1])
    low, high = 0.0, 1.0
    best: float | None = None
    ratios = []
    for _ in range(_STEPS):
        middle = (low + high) / 2
        try:
            model = build(middle)
        except ValueError:
            low = middle
            continue
        before, after = _median_ms((original, model), data, batch)
        ratios.append(after / before)
        if after <= keep * before:
            best, low = middle, middle
        else:
            high = middle
    if best is None:
        raise ValueError(
            f"keep={keep} of the latency: the fastest network tried takes {min(ratios, default=1.0):.3g} of the "
            "original's time (what is not pruned takes time as well); ask for more"
        )
    return best


def resized(batch: Any, size: int) -> Any:
    """Return the batch with `size` samples: its first ones, repeated if there are fewer."""
    count = batch_size(batch)
    index = torch.arange(size) % count

    def take(tensor: Tensor) -> Tensor:
        return tensor[index.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor

    return map_tensors(batch, take)


@torch.no_grad()
def _median_ms(models: tuple[nn.Module, nn.Module], data: CalibrationData, batch: Any) -> tuple[float, float]:
    modes = [[(module, module.training) for module in model.modules()] for model in models]
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))

    def once(model: nn.Module) -> float:
        start = time.perf_counter()
        data.call(model, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times: tuple[list[float], list[float]] = ([], [])
    try:
        for model in models:
            model.eval()
            for _ in range(_WARM_UP):
                once(model)
        while len(times[0]) < _REPEATS or sum(times[0]) < _SECONDS:
            for model, spent in zip(models, times, strict=True):  # alternating: a busy machine slows both
                spent.append(once(model))
    finally:
        for saved in modes:
            for module, training in saved:
                module.training = training
    return float(np.median(times[0]) * 1e3), float(np.median(times[1]) * 1e3)
