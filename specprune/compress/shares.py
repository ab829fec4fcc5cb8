"""What sampling by sensitivity needs: the largest shares of inputs in sums, the draws, and the errors they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.bounds.bound import FloatArray, check_number
from specprune.bounds.sensitivity_sampling import (
    dropping_error_bound,
    epsilon_for_sensitivity,
    expected_distinct,
    samples_needed_for_sensitivity,
)
from specprune.compress.batches import CalibrationData
from specprune.compress.distributed import is_parallel
from specprune.compress.layers import Positions, get_layer, patch_rows

VARIANTS = ("deterministic", "random", "hybrid")
_LOWEST, _HIGHEST = 1e-6, 1e9  # of the epsilon that is searched: all inputs kept, one draw
_STEPS = 60
_CHUNK = 2**20  # numbers that one intermediate tensor may hold; what fits the cache is twice as fast


@dataclass(frozen=True)
class Sensitivities:
    """The largest shares of units in the sums that read them, over all calibration inputs.

    Args:
        values: (units,) s_j: over outputs, positions and inputs x, the largest share of unit j in the positive or in
            the negative part of an output; 0 where nothing is positive or negative.
        outputs: number of sums that this was taken over: outputs times positions times inputs.
    """

    values: FloatArray
    outputs: int

    @property
    def total(self) -> float:
        """S, the sum of the sensitivities."""
        return float(self.values.sum())


@dataclass(frozen=True)
class Sampled:
    """Which inputs of a sum are kept, and what that promises.

    Args:
        indices: the kept inputs, ascending.
        factors: what their weights are multiplied with.
        epsilon: ceiling on |z_hat - z| over the sum of the absolute terms.
    """

    indices: np.ndarray
    factors: FloatArray
    epsilon: float


def check_arguments(keep: float, variant: str, delta: float) -> None:
    """Check what both ways of sampling take.

    Raises:
        ValueError: a value out of range, an unknown variant, or a data-parallel run.
        TypeError: a fraction that is no number.
    """
    check_number("keep", keep, 0.0, 1.0, open_low=True)
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: expected one of {VARIANTS}")
    if is_parallel():  # each process would see its own maxima, and decide for itself
        raise ValueError("sampling by sensitivity runs in one process: call it before the processes start")


@torch.no_grad()
def layer_rows(
    model: nn.Module, names: Sequence[str], data: CalibrationData, title: str
) -> Iterator[dict[str, Tensor]]:
    """Yield, for every batch, what each layer multiplies its weight matrix with, at all positions.

    Args:
        model: the network, in evaluation mode.
        names: Linear or convolution layers.
        data: calibration data.
        title: what the progress bar says.

    Yields:
        Layer name to (rows, columns), the rows of all its runs; layers that do not run are left out.

    Raises:
        ValueError: NaN or Inf in the inputs of a layer, which is named; or as in `CalibrationData.passes`.
    """
    for batch in data.passes(model, title):
        found: dict[str, list[Tensor]] = {}
        handles = [
            get_layer(model, name).register_forward_pre_hook(partial(_note, name, found), with_kwargs=True)
            for name in names
        ]
        try:
            data.call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        yield {name: torch.cat(parts) for name, parts in found.items()}


def _note(
    name: str, found: dict[str, list[Tensor]], layer: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    inputs = args[0] if args else keywords["input"]
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError(f"NaN or Inf in the inputs of layer {name!r}: check the data and earlier layers")
    if not isinstance(layer, nn.Linear) and inputs.dim() == layer.weight.dim() - 1:
        inputs = inputs[None]  # a convolution also takes one image without a batch axis
    # A copy, because what follows may work in place.
    found.setdefault(name, []).append(patch_rows(layer, inputs, Positions(None)).clone())


def largest_shares(rows: Tensor, weight: Tensor, columns: np.ndarray) -> Tensor:
    """Return the largest share of each unit in the positive or negative part of each output, over rows.

    Args:
        rows: (rows, d) what the layer reads.
        weight: (outputs, d) its weights, float64.
        columns: (units, slots) columns that belong to each unit; the parts are sums over these alone.

    Returns:
        (units, outputs) float64 in [0, 1]; 0 where a part is 0.
    """
    units, slots = columns.shape
    best = weight.new_zeros((units, len(weight)))
    if slots == 0:
        return best
    index = torch.as_tensor(columns, device=weight.device)
    weights = weight[:, index].permute(1, 2, 0)  # (units, slots, outputs)
    step = max(1, _CHUNK // max(units * len(weight), units * slots))
    for chunk in rows.split(step):
        inputs = chunk.to(torch.float64)[:, index].transpose(0, 1)  # (units, rows, slots)
        above, below = inputs.clamp_min(0), (-inputs).clamp_min(0)
        for sign in (1.0, -1.0):
            own = above @ (sign * weights).clamp_min(0)
            if bool((below > 0).any()):  # not after a ReLU
                own += below @ (-sign * weights).clamp_min(0)
            whole = own.sum(0)
            # Not times 1 / whole, which is infinite for subnormal sums.
            best = torch.maximum(best, (own / torch.where(whole > 0, whole, 1.0)).amax(1))
    return best.clamp_max(1.0)


def largest_error(rows: Tensor, before: Tensor, after: Tensor) -> float:
    """Return the largest |z_hat - z| / sum of |w a| over rows and outputs; 0 where a sum has no terms.

    Args:
        rows: (rows, d) float64 inputs.
        before: (outputs, d) weights.
        after: (outputs, d) weights.
    """
    error = (rows @ (after - before).T).abs()
    scale = rows.abs() @ before.abs().T
    return float(torch.where(scale > 0, error / scale, 0.0).max())


def draws_for(entry: Sensitivities, epsilon: float, delta: float) -> int:
    """Return the number of draws that promises epsilon at all sums of the entry, with probability 1 - delta."""
    return samples_needed_for_sensitivity(entry.total, epsilon, delta, entry.outputs)


def _certain(probabilities: FloatArray, samples: int) -> np.ndarray:
    """Return which inputs "hybrid" keeps without drawing: those that are drawn at least once on average."""
    return probabilities * samples >= 1 - 1e-12


def planned_width(values: FloatArray, samples: int, variant: str) -> int:
    """Return the number of different inputs to expect after so many draws, rounded up; at least one.

    Args:
        values: (inputs,) sensitivities.
        samples: number of draws m.
        variant: "deterministic", "random" or "hybrid".
    """
    total = values.sum()
    if total == 0:
        return 1
    probabilities = values / total
    if variant != "hybrid":
        return max(1, math.ceil(expected_distinct(probabilities, samples) - 1e-9))
    fixed = _certain(probabilities, samples)
    rest = np.where(fixed, 0.0, probabilities)
    drawn = expected_distinct(rest / rest.sum(), max(samples - int(fixed.sum()), 1)) if rest.sum() > 0 else 0.0
    return max(1, int(fixed.sum()) + math.ceil(drawn - 1e-9))


def smallest_epsilon(size: Callable[[float], float], budget: float, full: float) -> float:
    """Return the smallest epsilon whose size is within the budget, by bisection of its logarithm.

    Args:
        size: what is kept at an epsilon.
        budget: the most that may be kept.
        full: what there is.

    Raises:
        ValueError: even one input in every sum is too much.
    """
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    if size(_HIGHEST) > budget:
        raise ValueError(
            f"keep allows {budget:.0f} of {full:.0f} parameters, but {size(_HIGHEST):.0f} are left with one input in "
            "every sum; ask for more"
        )
    if size(_LOWEST) <= budget:
        return _LOWEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(math.exp(middle)) <= budget else (middle, high)
    return math.exp(high)


def choose_inputs(
    entry: Sensitivities, samples: int, variant: str, delta: float, generator: np.random.Generator
) -> Sampled:
    """Return which inputs are kept, with their factors, and the error that this promises.

    Args:
        entry: their sensitivities.
        samples: number of draws m; "deterministic" keeps as many inputs as m draws give different ones on average.
        variant: "deterministic", "random" or "hybrid".
        delta: allowed probability that the draws break the promise, in (0, 1).
        generator: of the draws.

    Returns:
        The kept inputs; the first one alone, if none ever contributes.
    """
    values, total = entry.values, entry.total
    if total == 0:
        return Sampled(np.array([0]), np.ones(1), 0.0)
    if variant == "deterministic":
        order = np.argsort(-values, kind="stable")
        count = planned_width(values, samples, variant)
        return Sampled(np.sort(order[:count]), np.ones(count), dropping_error_bound(values[order[count:]]).value)
    fixed = _certain(values / total, samples) if variant == "hybrid" else np.zeros(len(values), dtype=bool)
    factors = fixed.astype(np.float64)
    rest = np.where(fixed, 0.0, values)
    left, epsilon = float(rest.sum()), 0.0
    if left > 0:
        draws = max(samples - int(fixed.sum()), 1)
        probabilities = rest / left
        counts = generator.multinomial(draws, probabilities)
        factors[counts > 0] = counts[counts > 0] / (draws * probabilities[counts > 0])
        epsilon = epsilon_for_sensitivity(left, draws, delta, entry.outputs)
    indices = np.flatnonzero(factors)
    return Sampled(indices, factors[indices], epsilon)
