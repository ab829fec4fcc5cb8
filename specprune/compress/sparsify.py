"""Single weights by sensitivity: set to zero the weights that never make up a large share of their output.

This does not shrink layers, so it is reported as sparsity.  The promises are local, as in `sampling`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.bounds.sensitivity_sampling import dropping_error_bound
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.layers import get_layer, is_layer, layer_names, set_weight_matrix, weight_matrix
from specprune.compress.moments import check_finite_weights
from specprune.compress.shares import (
    Sampled,
    Sensitivities,
    check_arguments,
    choose_inputs,
    draws_for,
    largest_error,
    largest_shares,
    layer_rows,
    planned_width,
    smallest_epsilon,
)


@dataclass(frozen=True)
class SparseLayer:
    """What sampling did to the weights of one layer.

    Args:
        layer: its name.
        weights_before: number of its weights.
        weights_after: number of weights that are kept.
        largest_total: the largest sum of sensitivities of one output's weights.
        epsilon_promised: ceiling on |z_hat - z| over the sum of the absolute terms, at all outputs, positions and
            calibration inputs at once, with probability 1 - delta over the draws; from 1 on it says nothing.
        epsilon_measured: the largest such error.
    """

    layer: str
    weights_before: int
    weights_after: int
    largest_total: float
    epsilon_promised: float
    epsilon_measured: float


@dataclass(frozen=True)
class SparsifiedNetwork:
    """A network of the old shape in which weights of little sensitivity are zero.

    Args:
        model: the network, in the mode of the original.
        layers: one report a layer.
    """

    model: nn.Module
    layers: tuple[SparseLayer, ...]

    @property
    def density(self) -> float:
        """The kept fraction of the weights of these layers."""
        return sum(row.weights_after for row in self.layers) / sum(row.weights_before for row in self.layers)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer."""
        return [asdict(layer) for layer in self.layers]

    def to_json(self) -> str:
        """Return all but the network as JSON."""
        return to_json({"density": self.density, "layers": self.to_records()})

    def __str__(self) -> str:
        return format_table(self.to_records(), title=f"kept {self.density:.1%} of the weights")


@torch.no_grad()
def sparsify_by_sampling(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keep: float,
    *,
    variant: str = "deterministic",
    delta: float = 0.01,
    forward: Forward | None = None,
    seed: int = 0,
) -> SparsifiedNetwork:
    """Return a copy of the network that keeps the weights which ever make up a large share of their output.

    "deterministic" keeps the weights of largest sensitivity of all layers together, unchanged.  "random" takes one
    epsilon for all outputs, draws m(epsilon) weights of each with probabilities proportional to their sensitivities,
    and multiplies weight j by n_j / (m p_j), which is right on average; the expected number of different weights meets
    the budget, the drawn one scatters around it.  "hybrid" takes for each output the one of the two, at the same
    expected number, that promises less error.

    Args:
        model: any network with Linear or Conv2d layers; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device.
        keep: fraction of the weights of these layers to keep, in (0, 1]; biases are left alone.
        variant: "deterministic", "random" or "hybrid".
        delta: allowed probability that the draws of a layer break its promise, in (0, 1).
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the draws.

    Returns:
        The network, and a report for each Linear and each Conv2d (of one block) that runs.

    Raises:
        ValueError: an argument out of range, a budget that cannot be met, no such layer, non-finite weights or inputs
            of a layer, or a data-parallel run.
        TypeError: batches that cannot be iterated twice.

    Source: Baykal et al. 2019, arXiv:1910.05422.  Differences: one epsilon for all outputs in place of a convex
        programme for its mean, and the constants of `epsilon_for_sensitivity`.
    """
    check_arguments(keep, variant, delta)
    check_finite_weights(model)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    work = copy.deepcopy(model).eval()
    names = [
        name for name in layer_names(work) if is_layer(get_layer(work, name)) and get_layer(work, name).weight.numel()
    ]
    found = weight_sensitivities(work, names, data)
    if not found:
        raise ValueError(f"{type(model).__name__} runs no Linear and no Conv2d with groups=1: nothing to sparsify")
    generator = np.random.default_rng(seed)
    full = sum(entry.values.size for entries in found.values() for entry in entries)
    if variant == "deterministic":
        chosen = _largest(found, int(keep * full + 1e-9))
    else:
        chosen = _drawn(found, keep * full, full, variant, delta, generator)
    small = copy.deepcopy(model)
    for name, kept in chosen.items():
        factors = np.zeros(weight_matrix(get_layer(model, name)).shape)
        for own, row in zip(factors, kept, strict=True):
            own[row.indices] = row.factors
        matrix = weight_matrix(get_layer(model, name))
        scaled = matrix.to(torch.float64) * torch.as_tensor(factors, device=matrix.device)
        set_weight_matrix(get_layer(small, name), scaled.to(matrix.dtype))
    errors = dict.fromkeys(found, 0.0)
    for inputs in layer_rows(work, list(found), data, "measuring errors"):
        for name, rows in inputs.items():
            before, after = (weight_matrix(get_layer(net, name)).to(torch.float64) for net in (work, small))
            errors[name] = max(errors[name], largest_error(rows.to(torch.float64), before, after))
    layers = tuple(
        SparseLayer(
            name,
            sum(entry.values.size for entry in entries),
            sum(len(row.indices) for row in chosen[name]),
            max(entry.total for entry in entries),
            max(row.epsilon for row in chosen[name]),
            errors[name],
        )
        for name, entries in found.items()
    )
    return SparsifiedNetwork(small, layers)


@torch.no_grad()
def weight_sensitivities(model: nn.Module, names: list[str], data: CalibrationData) -> dict[str, list[Sensitivities]]:
    """Return the sensitivities of the weights of some layers, in one pass over the data.

    s_ij = max over positions and inputs of (w_ij a_j)+ / sum_k (w_ik a_k)+ and (w_ij a_j)- / sum_k (w_ik a_k)-.

    Args:
        model: the network, in evaluation mode.
        names: Linear or Conv2d layers with one block.
        data: calibration data.

    Returns:
        Layer name to one entry for each output, over the columns of its weight matrix.  Each counts the sums of its
        whole layer, which its promise is to cover.  Layers that do not run are left out.

    Raises:
        ValueError: NaN or Inf in the inputs of a layer, which is named; or as in `CalibrationData.passes`.

    Source: Baykal et al. 2019, arXiv:1910.05422.
    """
    values: dict[str, np.ndarray] = {}
    sums = dict.fromkeys(names, 0)
    for inputs in layer_rows(model, names, data, "measuring sensitivities"):
        for name, rows in inputs.items():
            weight = weight_matrix(get_layer(model, name)).to(torch.float64)
            shares = largest_shares(rows, weight, np.arange(weight.shape[1])[:, None]).T.cpu().numpy()
            values[name] = np.maximum(values.get(name, 0.0), shares)
            sums[name] += len(rows) * len(weight)
    return {name: [Sensitivities(row, sums[name]) for row in values[name]] for name in names if name in values}


def _largest(found: dict[str, list[Sensitivities]], count: int) -> dict[str, list[Sampled]]:
    """Keep the `count` weights of largest sensitivity over all layers."""
    everything = np.concatenate([entry.values for entries in found.values() for entry in entries])
    kept = np.zeros(len(everything), dtype=bool)
    kept[np.argsort(-everything, kind="stable")[:count]] = True
    chosen: dict[str, list[Sampled]] = {name: [] for name in found}
    start = 0
    for name, entries in found.items():
        for entry in entries:
            own = kept[start : start + len(entry.values)]
            start += len(entry.values)
            indices = np.flatnonzero(own)
            epsilon = dropping_error_bound(entry.values[~own]).value
            chosen[name].append(Sampled(indices, np.ones(len(indices)), epsilon))
    return chosen


def _drawn(
    found: dict[str, list[Sensitivities]],
    budget: float,
    full: int,
    variant: str,
    delta: float,
    generator: np.random.Generator,
) -> dict[str, list[Sampled]]:
    """Draw weights for every output with one epsilon; for "hybrid", where dropping does not promise less."""
    everything = [entry for entries in found.values() for entry in entries]

    def size(epsilon: float) -> int:
        return sum(planned_width(entry.values, draws_for(entry, epsilon, delta), "random") for entry in everything)

    epsilon = smallest_epsilon(size, budget, full)
    chosen: dict[str, list[Sampled]] = {name: [] for name in found}
    for name, entries in found.items():
        for entry in entries:
            draws = draws_for(entry, epsilon, delta)
            row = choose_inputs(entry, draws, "random", delta, generator)
            if variant == "hybrid":
                other = choose_inputs(entry, draws, "deterministic", delta, generator)
                row = other if other.epsilon <= row.epsilon else row
            chosen[name].append(row)
    return chosen
