"""How many units each group keeps: the caller's budget turned into widths."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from torch import nn

from specprune.compress.allocation import (
    Allocation,
    dof_allocation,
    lambda_allocation,
    loss_allocation,
    uniform_allocation,
)
from specprune.compress.blocks import backward_path, kept_units, loss_curve
from specprune.compress.context import Context, consumer_items, propose_units
from specprune.compress.cost import CostModel, cost_model
from specprune.compress.distributed import decided_by_first
from specprune.compress.divergence import Reference
from specprune.compress.latency import latency_fraction
from specprune.compress.selection import NodeStatistics
from specprune.compress.sensitivity import calibrated_curves, measured_curves, measured_loss
from specprune.compress.surgery import Group, remove_nodes

_SAMPLES = 500  # on which divergences are measured


def make_plan(context: Context, curves: Mapping[str, np.ndarray]) -> Allocation:
    """Return the width and lambda of every group.

    Args:
        context: of the run.
        curves: from `predicted_curves`.

    Raises:
        ValueError: widths that do not fit the groups, or a budget that cannot be met.
    """
    settings, groups = context.settings, context.structure.groups
    by_time = settings.measure == "latency"
    cost = cost_model(context.original, context.data, groups, "flops" if by_time else settings.measure)
    if not by_time or settings.keep is None:
        return _allocate(context, cost, settings.keep, curves)

    def build(fraction: float) -> nn.Module:
        plan = _allocate(context, cost, fraction, curves)
        return remove_nodes(context.original, groups, {name: range(k) for name, k in plan.widths.items()})

    # The clock of one process decides for all.
    fraction = decided_by_first(partial(latency_fraction, context.original, context.data, settings.keep, build))
    return _allocate(context, cost, fraction, curves)


def _allocate(context: Context, cost: CostModel, keep: float | None, curves: Mapping[str, np.ndarray]) -> Allocation:
    settings, statistics = context.settings, context.statistics
    traces = {name: float(np.trace(entry.covariance)) for name, entry in statistics.items()}
    lams = {name: settings.lam * trace for name, trace in traces.items()}
    if settings.widths is not None:
        wrong = {
            name: width
            for name, width in settings.widths.items()
            if not isinstance(width, int | np.integer) or not 1 <= width <= cost.full.get(name, 0)
        }
        if wrong:
            raise ValueError(f"widths={wrong}: the groups and their full widths are {cost.full}")
        return Allocation({**cost.full, **settings.widths}, lams)
    # A head is not a matter of alignment.
    multiples = {g.name: 1 if g.kind == "heads" else settings.round_to for g in context.structure.groups}
    if keep is not None and settings.allocation == "uniform":
        return uniform_allocation(cost, keep, traces, settings.lam, multiples)
    if keep is not None and settings.allocation in ("calibrated", "sensitivity"):
        return loss_allocation(cost, keep, curves, lams, multiples)
    spectra = {name: entry.spectrum for name, entry in statistics.items()}
    if keep is not None:
        return dof_allocation(cost, keep, spectra, multiples)
    return lambda_allocation(cost.full, spectra, settings.lam, theory=settings.allocation == "theory")


def predicted_curves(context: Context) -> dict[str, np.ndarray]:
    """Return each group's (width + 1,) predicted divergence with k units kept, where the allocation asks for it."""
    settings, groups = context.settings, context.structure.groups
    if settings.widths is not None or settings.allocation not in ("calibrated", "sensitivity"):
        return {}
    reference = Reference(context.original, context.data, _SAMPLES)
    paths, residuals = {}, {}
    for group in groups:
        items = consumer_items(context, group, context.problems, {})
        if items:
            paths[group.name] = backward_path(items, 1, settings.ridge)
            residuals[group.name] = loss_curve(paths[group.name], group.width)
        else:
            residuals[group.name] = _eigenvalue_curve(context.statistics[group.name])

    def choose(group: Group, size: int) -> np.ndarray:
        if settings.selection in ("backward", "thorough") and group.name in paths:
            return kept_units(paths[group.name], group.width, size)
        lam = settings.lam * float(np.trace(context.statistics[group.name].covariance))
        return propose_units(context, group, size, lam, context.problems, context.original, {})

    def measure(group: Group, kept: np.ndarray) -> float:
        return measured_loss(context.original, context.problems, context.norms, group, kept, reference, settings.ridge)

    if settings.allocation == "sensitivity":
        return measured_curves(groups, choose, measure)
    return calibrated_curves(groups, residuals, choose, measure)


def _eigenvalue_curve(statistics: NodeStatistics) -> np.ndarray:
    """Return the (units + 1,) share of the trace outside the k leading eigenvectors, where no problem is at hand."""
    spectrum = statistics.spectrum
    return np.concatenate([[1.0], 1.0 - np.cumsum(spectrum) / spectrum.sum()]).clip(0.0)
