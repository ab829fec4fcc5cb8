"""Provable filter pruning: keep the channels that ever make up a large share of some output of their readers.

The promises are local: each layer on the inputs that it has in the original network, over the calibration data.
Nothing is refitted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune._records import format_table, to_json
from specprune.bounds.bound import FloatArray
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.cost import cost_model, count_params
from specprune.compress.groups import find_groups
from specprune.compress.layers import Layer, blocks, get_layer, is_refittable, set_weight_matrix, weight_matrix
from specprune.compress.moments import check_finite_weights
from specprune.compress.shares import (
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
from specprune.compress.surgery import Group, Skipped, copy_modes, input_columns, remove_nodes

SAMPLING_DELTA = 0.01  # by default


@dataclass(frozen=True)
class SampledGroup:
    """What sampling did to one group.

    Args:
        group: the layer that makes the units.
        consumer: the layers that read them.
        width_before: number of units.
        width_after: number of units kept.
        total_sensitivity: S, the sum of the units' sensitivities.
        samples: draws that the common epsilon asks for.
        outputs: sums that the promise covers.
        epsilon_promised: ceiling on |z_hat - z| over the sum of the absolute terms, at all these sums at once, with
            probability 1 - delta over the draws; from 1 on it says nothing.
        epsilon_measured: the largest such error, over the calibration data.
    """

    group: str
    consumer: str
    width_before: int
    width_after: int
    total_sensitivity: float
    samples: int
    outputs: int
    epsilon_promised: float
    epsilon_measured: float


@dataclass(frozen=True)
class SampledNetwork:
    """A network pruned by channel sensitivities.

    Args:
        model: the smaller network, in the mode of the original.
        groups: one report a group.
        kept: group name to the kept units, ascending.
        sensitivities: group name to its units' sensitivities.  As `scores` of `prune` with selection="scores" and the
            same widths, they give the deterministic cut with its consumers refitted.
        epsilon: the common epsilon from which the numbers of draws come.
        skipped: what was left whole, and why.
        params_before: number of parameters.
        params_after: the same, after.
        cost_planned: what the network would cost with the expected numbers of different channels, which met the
            budget, in the measure of the budget; for "deterministic" this is what it costs.
    """

    model: nn.Module
    groups: tuple[SampledGroup, ...]
    kept: dict[str, np.ndarray]
    sensitivities: dict[str, FloatArray]
    epsilon: float
    skipped: tuple[Skipped, ...]
    params_before: int
    params_after: int
    cost_planned: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a group."""
        return [asdict(group) for group in self.groups]

    def to_json(self) -> str:
        """Return all but the network as JSON."""
        return to_json({name: value for name, value in vars(self).items() if name != "model"})

    def __str__(self) -> str:
        share = self.params_after / self.params_before
        head = f"parameters {self.params_before} -> {self.params_after} ({share:.1%}), epsilon {self.epsilon:.3g}"
        lines = [format_table(self.to_records(), title=head)]
        return "\n".join([*lines, *(f"left whole: {entry.name}: {entry.reason}" for entry in self.skipped)])


def prune_by_sampling(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keep: float,
    *,
    variant: str = "deterministic",
    measure: str = "params",
    delta: float = SAMPLING_DELTA,
    forward: Forward | None = None,
    seed: int = 0,
) -> SampledNetwork:
    """Return a smaller network that keeps the channels which ever make up a large share of what reads them.

    One epsilon for all groups gives each its number of draws m = m(epsilon) and from it the number of different
    channels to expect; the smallest epsilon that meets the budget is taken.  "deterministic" keeps that many channels
    of largest sensitivity; "random" draws, and multiplies the consumers' weights of channel j by n_j / (m p_j), which
    is right on average; "hybrid" keeps those with p_j >= 1 / m as they are and draws m less their number from the
    others, which promises no more error than m random draws.  Channels that never contribute over the data go first.

    Args:
        model: any network that `find_groups` knows; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device.
        keep: fraction of `measure` to keep, in (0, 1]; met within one channel of one group, except for "hybrid",
            where several channels may become certain at once.  Draws that went on until the budget is met would be
            biased: for "random" and "hybrid" the expected widths meet it, and the drawn ones scatter around.
        variant: "deterministic", "random" or "hybrid".
        measure: "params", "flops" or "nodes".
        delta: allowed probability that the draws of a group break its promise, in (0, 1).
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the draws.

    Returns:
        The network, and a report for each group.

    Raises:
        ValueError: an argument out of range, a budget that cannot be met, nothing to prune, non-finite weights or
            inputs of a layer, or a data-parallel run.
        TypeError: batches that cannot be iterated twice.

    Source: Liebenwein et al. 2020, arXiv:1911.07412.  Differences: a channel's share is that of the sum over its kernel
        entries, which the promise needs and which is at most the largest share of a kernel entry among its like; the
        constants are those of `epsilon_for_sensitivity`.
    """
    check_arguments(keep, variant, delta)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    return SampledNetworks(model, data, measure).make(keep, variant, delta, seed)


class SampledNetworks:
    """The sampled versions of one network, whose sensitivities are measured once; see `prune_by_sampling`.

    Args:
        model: the network; left as it is.
        data: calibration data.
        measure: "params", "flops" or "nodes".
    """

    def __init__(self, model: nn.Module, data: CalibrationData, measure: str) -> None:
        check_finite_weights(model)
        self.model, self.data = model, data
        structure = find_groups(model, data)
        self.original = structure.prepared(model)
        self.groups = [group for group in structure.groups if _is_readable(self.original, group)]
        left = [group for group in structure.groups if group not in self.groups]
        self.skipped = (*structure.skipped, *(Skipped(g.name, "a recurrent layer reads its units") for g in left))
        if not self.groups:
            raise ValueError(f"no group is read by Linear or convolution layers only; left whole: {self.skipped}")
        self.cost = cost_model(self.original, data, self.groups, measure)
        self.found = unit_sensitivities(self.original, self.groups, data)

    def make(self, keep: float, variant: str, delta: float, seed: int) -> SampledNetwork:
        """Return the network at a budget; the arguments are those of `prune_by_sampling`."""
        cost, found, groups = self.cost, self.found, self.groups

        def widths(epsilon: float) -> dict[str, int]:
            return {
                name: planned_width(entry.values, draws_for(entry, epsilon, delta), variant)
                for name, entry in found.items()
            }

        epsilon = smallest_epsilon(lambda value: cost.total(widths(value)), keep * cost.total(), cost.total())
        generator = np.random.default_rng(seed)
        draws = {name: draws_for(entry, epsilon, delta) for name, entry in found.items()}
        chosen = {name: choose_inputs(entry, draws[name], variant, delta, generator) for name, entry in found.items()}
        work = copy.deepcopy(self.original)
        scale_units(work, groups, {name: (entry.indices, entry.factors) for name, entry in chosen.items()})
        measured = measured_errors(self.original, work, groups, self.data)
        kept = {name: entry.indices for name, entry in chosen.items()}
        small = remove_nodes(work, groups, kept)
        copy_modes(self.model, small)
        rows = tuple(
            SampledGroup(
                group.name,
                ", ".join(entry.module for entry in group.consumers),
                group.width,
                len(kept[group.name]),
                found[group.name].total,
                draws[group.name],
                found[group.name].outputs,
                chosen[group.name].epsilon,
                measured[group.name],
            )
            for group in groups
        )
        return SampledNetwork(
            small,
            rows,
            kept,
            {name: entry.values for name, entry in found.items()},
            epsilon,
            self.skipped,
            count_params(self.original),
            count_params(small),
            round(cost.total(widths(epsilon))),
        )


def _is_readable(model: nn.Module, group: Group) -> bool:
    return group.kind != "hidden" and all(is_refittable(model.get_submodule(e.module)) for e in group.consumers)


@torch.no_grad()
def unit_sensitivities(model: nn.Module, groups: Sequence[Group], data: CalibrationData) -> dict[str, Sensitivities]:
    """Return the sensitivity of every unit of some groups, in one pass over the data.

    s_j = max over consumers, outputs, positions and inputs of c_j+ / sum_k c_k+ and c_j- / sum_k c_k-, where c_j+ and
    c_j- are the sums of the positive and of the negative products w a over the columns of unit j (its kernel entries,
    the pixels of a flattened map).  The sums over k run over the group.

    Args:
        model: from `Structure.prepared`, in evaluation mode.
        groups: whose consumers are Linear or convolution layers.
        data: calibration data.

    Returns:
        Group name to its sensitivities, float64; consumers count in the batches in which they run.

    Raises:
        ValueError: NaN or Inf in the inputs of a consumer, which is named; or as in `CalibrationData.passes`.

    Source: Liebenwein et al. 2020, arXiv:1911.07412, see `prune_by_sampling`.
    """
    values = {group.name: np.zeros(group.width) for group in groups}
    outputs = dict.fromkeys(values, 0)
    names = list(dict.fromkeys(entry.module for group in groups for entry in group.consumers))
    for inputs in layer_rows(model, names, data, "measuring sensitivities"):
        for group in groups:
            for entry in (one for one in group.consumers if one.module in inputs):
                layer = get_layer(model, entry.module)
                columns = input_columns(layer, entry.index).reshape(group.width, -1)
                rows = inputs[entry.module]
                for weight, part, own in _parts(layer, columns):
                    shares = largest_shares(rows[:, part], weight, own).amax(1)
                    values[group.name] = np.maximum(values[group.name], shares.cpu().numpy())
                outputs[group.name] += len(rows) * len(weight_matrix(layer))
    return {name: Sensitivities(values[name], outputs[name]) for name in values}


def _parts(layer: Layer, columns: np.ndarray) -> Iterator[tuple[Tensor, slice, np.ndarray]]:
    """Yield each block of a layer: its float64 weights, its columns of the rows, and which of these a unit has."""
    matrix = weight_matrix(layer).to(torch.float64)
    for outputs, part in blocks(layer):
        own = [[c - part.start for c in unit if part.start <= c < part.stop] for unit in columns.tolist()]
        yield matrix[outputs], part, np.array(own, dtype=np.int64)


@torch.no_grad()
def scale_units(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, tuple[np.ndarray, FloatArray]]) -> None:
    """Multiply, in place, what consumers read of each unit: by its factor if it is kept, by 0 if not.

    Args:
        model: from `Structure.prepared`.
        groups: the groups.
        kept: group name to the kept units and their factors.
    """
    for group in groups:
        factors = np.zeros(group.width)
        indices, scales = kept[group.name]
        factors[indices] = scales
        for entry in group.consumers:
            layer = get_layer(model, entry.module)
            columns = input_columns(layer, entry.index).reshape(group.width, -1)
            matrix = weight_matrix(layer).clone()
            for outputs, part in blocks(layer):
                own = np.ones(part.stop - part.start)
                for factor, unit in zip(factors, columns, strict=True):
                    own[[c - part.start for c in unit if part.start <= c < part.stop]] = factor
                matrix[outputs] *= torch.as_tensor(own, device=matrix.device).to(matrix.dtype)
            set_weight_matrix(layer, matrix)


@torch.no_grad()
def measured_errors(
    original: nn.Module, work: nn.Module, groups: Sequence[Group], data: CalibrationData
) -> dict[str, float]:
    """Return each group's largest |z_hat - z| / sum of |w a|, over outputs, positions and inputs, in one pass.

    Args:
        original: the network whose inputs and sums count.
        work: the same network with scaled columns.
        groups: the groups; the sums run over the columns of the group alone.
        data: calibration data.

    Raises:
        ValueError: NaN or Inf in the inputs of a consumer.
    """
    errors = {group.name: 0.0 for group in groups}
    names = list(dict.fromkeys(entry.module for group in groups for entry in group.consumers))
    for inputs in layer_rows(original, names, data, "measuring errors"):
        for group in groups:
            for entry in (one for one in group.consumers if one.module in inputs):
                before, after = get_layer(original, entry.module), get_layer(work, entry.module)
                columns = input_columns(before, entry.index).reshape(group.width, -1)
                new = _parts(after, columns)
                for (old, part, own), (scaled, _, _) in zip(_parts(before, columns), new, strict=True):
                    index = torch.as_tensor(own.ravel(), device=old.device)
                    rows = inputs[entry.module][:, part][:, index].to(torch.float64)
                    error = largest_error(rows, old[:, index], scaled[:, index])
                    errors[group.name] = max(errors[group.name], error)
    return errors
