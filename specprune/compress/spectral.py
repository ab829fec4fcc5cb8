"""Spectral pruning of a network: measure, allocate, select, cut, reconstruct, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.bounds.nodes import WeightedNodes, feasibility, reconstruction_matrix, sample_nodes, weighted_nodes
from specprune.bounds.spectral import paper_width
from specprune.compress.allocation import (
    ALLOCATIONS,
    Allocation,
    dof_allocation,
    lambda_allocation,
    uniform_allocation,
)
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.cost import CostModel, cost_model, count_params, group_params, module_flops
from specprune.compress.groups import Group, find_groups, remove_nodes
from specprune.compress.layers import get_layer
from specprune.compress.moments import Moments, check_finite_weights, collect_moments
from specprune.compress.reconstruction import RECONSTRUCTIONS, fold_consumer, refit_consumer
from specprune.compress.report import GroupReport, Pruned, PruneReport
from specprune.compress.selection import RULES, NodeStatistics, information_losses, select_nodes

MIN_LAMBDA = 1e-14
_DRAWS = 10  # a draw is good with probability at least 1/5, so that ten fail with probability 0.8^10 = 0.11 at most
_DEAD_WEIGHT = 1e-12


def prune(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keep: float | None = None,
    *,
    widths: Mapping[str, int] | None = None,
    moments: Moments | None = None,
    measure: str = "flops",
    allocation: str = "uniform",
    selection: str = "greedy",
    theta: float = 0.0,
    reconstruction: str = "sequential",
    lam: float = 1e-6,
    ridge: float = 1e-6,
    positions: int | None = 32,
    forward: Forward | None = None,
    seed: int = 0,
) -> Pruned:
    """Return a smaller network that computes nearly the same as the given one, from unlabelled data.

    In each group (the outputs of one layer) a set J of nodes is kept, the others are removed, and the layer that reads
    them is refitted on what is left.  No labels and no gradients are used.

    Args:
        model: a chain of Linear, Conv2d, BatchNorm, activations, pooling, dropout and flattening; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device.
        keep: fraction of `measure` to keep, in (0, 1]; left out with `widths`, and where `lam` gives the widths.
        widths: group name to number of nodes, instead of `keep`; groups that are not named stay whole.
        moments: channel-level moments of this model over these batches, from `collect_moments`; collected if None.
        measure: "flops" (`torch.utils.flop_counter`, two a multiply-add), "params" or "nodes".
        allocation: "uniform" (same fraction everywhere), "dof" (degrees of freedom at a common relative lambda: the
            one that meets `keep`, or `lam` without `keep`), or "theory" (5 N log(80 N) nodes at `lam`).
        selection: "greedy", "leverage" (drawn until there are enough different nodes; with allocation="theory" the
            theorem's independent draws, repeated ones merged), "cholesky", "magnitude" or "random".
        theta: weight of the input information loss against the output loss in the greedy rule, 0..1.
        reconstruction: "sequential", "patch", "channel" (the paper's) or "none".
        lam: relative lambda, lambda_l = lam * Tr Sigma_l; "dof" with `keep` finds its own.
        ridge: relative ridge of the least squares in "sequential" and "patch".
        positions: output positions per image that the least squares of a convolution sees; None takes all.
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the random rules and of the positions.

    Returns:
        The new network, the report, the groups and the kept nodes.

    Raises:
        ValueError: an argument out of range, a network that is not a chain, frozen or non-finite weights, empty or
            mismatched batches, or a budget that cannot be met.
        TypeError: batches that cannot be iterated twice.

    Source:
        Suzuki et al. 2020, "Spectral Pruning", arXiv:1808.08558 (selection, degrees of freedom, channel mix); the
        sequential least squares is ours.
    """
    start = time.perf_counter()
    settings = {
        "keep": keep,
        "widths": None if widths is None else dict(widths),
        "measure": measure,
        "allocation": allocation,
        "selection": selection,
        "theta": theta,
        "reconstruction": reconstruction,
        "lam": lam,
        "ridge": ridge,
        "positions": positions,
        "seed": seed,
    }
    _check_arguments(keep, widths, allocation, selection, theta, reconstruction, lam, ridge, positions)
    check_finite_weights(model)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    original = copy.deepcopy(model).eval()
    groups = find_groups(original, data)
    if moments is None:
        moments = collect_moments(original, data, [group.consumer for group in groups])
    _check_moments(moments, original, groups)
    norms = {group.name: group.direct_norm for group in groups}
    statistics = {group.name: node_statistics(original, moments, group, norms.get(group.consumer)) for group in groups}
    cost = cost_model(original, data, groups, measure)
    plan = _allocate(cost, statistics, keep, widths, allocation, lam)
    generator = np.random.default_rng(seed)
    chosen: dict[str, WeightedNodes] = {}
    seconds = {}
    for group in groups:
        begin = time.perf_counter()
        chosen[group.name] = _choose(statistics[group.name], plan, group, allocation, selection, theta, generator)
        seconds[group.name] = time.perf_counter() - begin
    kept = {name: nodes.indices for name, nodes in chosen.items()}
    small = remove_nodes(original, data, groups, kept)
    changed = False
    for index, group in enumerate(groups):
        begin = time.perf_counter()
        outputs = kept.get(group.consumer)
        whole = len(kept[group.name]) == group.width
        changed = changed or not whole
        # Nothing is refitted whose inputs are those of the original network.
        if reconstruction == "none" or (whole and not (changed and reconstruction == "sequential")):
            pass
        elif reconstruction == "channel":
            mix = reconstruction_matrix(statistics[group.name].covariance, chosen[group.name], plan.lams[group.name])
            fold_consumer(original, small, group, mix, outputs)
        else:
            refit_consumer(
                original,
                small,
                data,
                group,
                kept[group.name],
                outputs,
                norms.get(group.consumer),
                sequential=reconstruction == "sequential",
                ridge=ridge,
                positions=positions,
                seed=seed + index,
            )
        seconds[group.name] += time.perf_counter() - begin
    check_finite_weights(small)
    flops = module_flops(original, data), module_flops(small, data)
    rows = tuple(
        _report(
            group,
            statistics[group.name],
            chosen[group.name],
            plan.lams[group.name],
            flops=(flops[0].get(group.name, 0), flops[1].get(group.name, 0)),
            params=(group_params(original, group), group_params(small, group)),
            seconds=seconds[group.name],
        )
        for group in groups
    )
    report = PruneReport(
        rows,
        settings,
        sum(flops[0].values()),
        sum(flops[1].values()),
        count_params(original),
        count_params(small),
        moments.samples,
        time.perf_counter() - start,
    )
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes[name]
    return Pruned(small, report, groups, chosen)


def node_statistics(model: nn.Module, moments: Moments, group: Group, norm: str | None = None) -> NodeStatistics:
    """Return what selection needs to know about a group, from channel-level moments of its consumer's inputs.

    Args:
        model: the network.
        moments: of at least the group's consumer.
        group: from `find_groups`.
        norm: the batch norm that reads the consumer's outputs directly; its gain is multiplied into the consumer's
            weights Z, so that the output loss is measured where the activation sees it.

    Returns:
        Covariance, Z^T Z (summed over kernel offsets or pixels) and magnitudes of the group's nodes.
    """
    consumer = get_layer(model, group.consumer)
    weight = consumer.weight.detach().to(torch.float64)
    if norm is not None:
        weight = weight * norm_gain(model, norm).reshape(-1, *[1] * (weight.dim() - 1))
    columns = weight.reshape(weight.shape[0], group.width, -1).transpose(1, 2).reshape(-1, group.width)
    own = get_layer(model, group.name).weight.detach().to(torch.float64).flatten(1)
    return NodeStatistics(
        covariance=moments[group.consumer].node_covariance(group.width),
        consumer_gram=(columns.T @ columns).cpu().numpy(),
        magnitudes=own.norm(dim=1).cpu().numpy(),
    )


def norm_gain(model: nn.Module, name: str) -> Tensor:
    """Return what a batch norm in evaluation mode multiplies each node with, gamma / sqrt(var + eps), in float64."""
    norm: Any = dict(model.named_modules())[name]
    scale = (norm.running_var.to(torch.float64) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach().to(torch.float64)


def _check_arguments(
    keep: float | None,
    widths: Mapping[str, int] | None,
    allocation: str,
    selection: str,
    theta: float,
    reconstruction: str,
    lam: float,
    ridge: float,
    positions: int | None,
) -> None:
    for label, value, allowed in (
        ("allocation", allocation, ALLOCATIONS),
        ("selection", selection, tuple(sorted(RULES))),
        ("reconstruction", reconstruction, RECONSTRUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{label}={value!r}: expected one of {allowed}")
    by_lambda = keep is None and widths is None and allocation in ("dof", "theory")
    if by_lambda + (keep is not None) + (widths is not None) != 1 or (keep is not None and allocation == "theory"):
        raise ValueError(
            f"keep={keep}, widths={widths}, allocation={allocation!r}: give keep, or widths, or neither of them with "
            "allocation='dof' or 'theory', which then take the widths from lam"
        )
    if keep is not None and not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep}: expected the fraction to keep, above 0 and at most 1 (0.3 keeps 30 %)")
    if not 0.0 <= theta <= 1.0:
        raise ValueError(f"theta={theta}: expected a number between 0 and 1")
    if not MIN_LAMBDA <= lam < 1e6:
        raise ValueError(
            f"lam={lam}: expected a positive number, lambda relative to the trace of the covariance, of at least "
            f"{MIN_LAMBDA:g} (the size of rounding)"
        )
    if not 0.0 <= ridge < 1e6:
        raise ValueError(f"ridge={ridge}: expected a number that is not negative, relative to the mean eigenvalue")
    if positions is not None and positions < 1:
        raise ValueError(f"positions={positions}: expected at least 1, or None for all")


def _check_moments(moments: Moments, model: nn.Module, groups: tuple[Group, ...]) -> None:
    for group in groups:
        weight = get_layer(model, group.consumer).weight
        if moments.level != "channel" or group.consumer not in moments:
            raise ValueError(
                f"moments of {moments.level} level for {list(moments)}: expected channel level, with {group.consumer!r}"
            )
        if len(moments[group.consumer].total) != weight.shape[1]:
            raise ValueError(
                f"the moments of {group.consumer!r} have {len(moments[group.consumer].total)} columns, the layer reads "
                f"{weight.shape[1]}: they are of another model"
            )


def _allocate(
    cost: CostModel,
    statistics: Mapping[str, NodeStatistics],
    keep: float | None,
    widths: Mapping[str, int] | None,
    allocation: str,
    lam: float,
) -> Allocation:
    traces = {name: float(np.trace(entry.covariance)) for name, entry in statistics.items()}
    dead = [name for name, trace in traces.items() if trace <= 0]
    if dead:
        raise ValueError(f"the nodes of {dead} are zero on all calibration data: nothing to measure; check the data")
    if widths is not None:
        wrong = {
            name: width
            for name, width in widths.items()
            if not isinstance(width, int | np.integer) or not 1 <= width <= cost.full.get(name, 0)
        }
        if wrong:
            raise ValueError(f"widths={wrong}: the groups and their full widths are {cost.full}")
        return Allocation({**cost.full, **widths}, {name: lam * trace for name, trace in traces.items()})
    if allocation == "uniform" and keep is not None:
        return uniform_allocation(cost, keep, traces, lam)
    spectra = {name: entry.spectrum for name, entry in statistics.items()}
    if allocation == "dof" and keep is not None:
        return dof_allocation(cost, keep, spectra)
    return lambda_allocation(cost.full, spectra, lam, theory=allocation == "theory")


def _choose(
    statistics: NodeStatistics,
    plan: Allocation,
    group: Group,
    allocation: str,
    selection: str,
    theta: float,
    generator: np.random.Generator,
) -> WeightedNodes:
    """Return the kept nodes of one group with their weights, in ascending order."""
    width, lam = plan.widths[group.name], plan.lams[group.name]
    scores = statistics.leverage(lam)
    whole = WeightedNodes(np.arange(group.width), np.ones(group.width))
    if allocation == "theory" and selection == "leverage":
        # The theorem's own draw: M independent nodes, repeated ones merged; drawn anew until it is a good one.
        size = paper_width(float(degrees_of_freedom(statistics.spectrum, lam)))
        for _ in range(_DRAWS):
            drawn = weighted_nodes(sample_nodes(scores, size, generator), scores)
            if feasibility(statistics.covariance, drawn, lam).holds:
                break
        return whole if len(drawn.indices) == group.width else drawn
    if width == group.width:
        return whole
    indices = select_nodes(selection, statistics, width, lam=lam, theta=theta, generator=generator)
    # A rule may choose a node that carries nothing; it has no leverage, and a tiny weight keeps it out of s.
    floor = np.finfo(np.float64).eps / len(scores)
    nodes = weighted_nodes(np.sort(indices), np.maximum(scores, floor))
    return WeightedNodes(nodes.indices, np.where(scores[nodes.indices] <= floor, _DEAD_WEIGHT, nodes.weights))


def _report(
    group: Group,
    statistics: NodeStatistics,
    nodes: WeightedNodes,
    lam: float,
    *,
    flops: tuple[int, int],
    params: tuple[int, int],
    seconds: float,
) -> GroupReport:
    spectrum = statistics.spectrum
    if len(nodes.indices) == group.width:  # in closed form: the difference of matrices would be rounding noise
        c, s = float(spectrum[0] / (spectrum[0] + lam)), 1.0
    else:
        check = feasibility(statistics.covariance, nodes, lam)
        c, s = check.c, check.s
    input_loss, output_loss = information_losses(statistics, nodes, lam)
    return GroupReport(
        group=group.name,
        consumer=group.consumer,
        width_before=group.width,
        width_after=len(nodes.indices),
        lam=lam,
        dof=float(degrees_of_freedom(spectrum, lam)),
        leverage_kept=float(statistics.leverage(lam)[nodes.indices].sum()),
        c=c,
        s=s,
        input_loss=input_loss,
        output_loss=output_loss,
        flops_before=flops[0],
        flops_after=flops[1],
        params_before=params[0],
        params_after=params[1],
        seconds=seconds,
    )
