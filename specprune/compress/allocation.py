"""How many nodes each group keeps: one fraction for all, degrees of freedom at one lambda, or least predicted loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.bounds.spectral import paper_width
from specprune.compress.cost import CostModel

ALLOCATIONS = ("calibrated", "sensitivity", "uniform", "dof", "theory")
_STEPS = 60
_GRID = 64  # widths of a group that the allocation by loss tries
_LOOK_AHEAD = 8  # grid steps; a loss curve that is flat further on must not hide behind a steep step
_ROUNDING = 1e-12  # a budget that is met exactly must not fail by the last bit


@dataclass(frozen=True)
class Allocation:
    """Widths, and the lambda of each group that they come from.

    Args:
        widths: group name to the number of nodes it keeps.
        lams: group name to lambda, in units of the group's covariance.
    """

    widths: dict[str, int]
    lams: dict[str, float]


def uniform_allocation(
    cost: CostModel, keep: float, traces: Mapping[str, float], lam: float, multiples: Mapping[str, int] | None = None
) -> Allocation:
    """Keep the same fraction of every group, as large as the budget allows.

    Args:
        cost: cost as a function of widths.
        keep: fraction of the full cost that may be used, in (0, 1].
        traces: group name to Tr Sigma.
        lam: relative lambda; lambda_l = lam * Tr Sigma_l.
        multiples: group name to what its width must be a multiple of, unless it stays whole.

    Raises:
        ValueError: even the smallest widths cost more than the budget.
    """

    def widths(fraction: float) -> dict[str, int]:
        return {
            name: _multiple(fraction * full + 1e-9, full, (multiples or {}).get(name, 1))
            for name, full in cost.full.items()
        }

    return Allocation(_largest(cost, keep, widths), {name: lam * trace for name, trace in traces.items()})


def dof_allocation(
    cost: CostModel, keep: float, spectra: Mapping[str, np.ndarray], multiples: Mapping[str, int] | None = None
) -> Allocation:
    """Keep the degrees of freedom of every group at one common relative lambda (the practical mode).

    lambda_l = c Tr Sigma_l and m_l = ceil(N_l(lambda_l)), with the smallest c whose widths fit the budget.

    Args:
        cost: cost as a function of widths.
        keep: fraction of the full cost that may be used, in (0, 1].
        spectra: group name to the eigenvalues of Sigma.
        multiples: group name to what its width must be a multiple of, unless it stays whole.

    Raises:
        ValueError: even the smallest widths cost more than the budget.
    """
    relative = {name: values / values.sum() for name, values in spectra.items()}

    def lam_of(fraction: float) -> float:
        return 10.0 ** (2.0 - 14.0 * fraction)

    def widths(fraction: float) -> dict[str, int]:
        lam = lam_of(fraction)
        return {
            name: _multiple(math.ceil(degrees_of_freedom(values, lam)), cost.full[name], (multiples or {}).get(name, 1))
            for name, values in relative.items()
        }

    if keep >= 1.0:
        chosen, position = dict(cost.full), 1.0
    else:
        position = _bisect(cost, keep, widths)
        chosen = widths(position)
    return Allocation(chosen, {name: lam_of(position) * float(values.sum()) for name, values in spectra.items()})


def lambda_allocation(
    full: Mapping[str, int], spectra: Mapping[str, np.ndarray], lam: float, *, theory: bool
) -> Allocation:
    """Keep what lambda_l = lam * Tr Sigma_l asks for: m_l = ceil(N_l), or the theorem's ceil(5 N_l log(80 N_l)).

    The theorem often asks for more nodes than there are; then the group stays whole.

    Args:
        full: group name to its full width.
        spectra: group name to the eigenvalues of Sigma.
        lam: relative lambda > 0.
        theory: whether the theorem's width is taken.

    Raises:
        ValueError: `theory`, and lambda_l exceeds the largest eigenvalue of a group: the theorem is silent there.
    """
    lams = {name: lam * float(values.sum()) for name, values in spectra.items()}
    widths = {}
    for name, values in spectra.items():
        if theory and lams[name] > float(values.max()):
            raise ValueError(
                f"lam={lam}: the theorem needs lambda at most the largest eigenvalue, which is "
                f"{float(values.max() / values.sum()):.4g} of the trace in group {name!r}; ask for less"
            )
        dof = float(degrees_of_freedom(values, lams[name]))
        widths[name] = min(full[name], paper_width(dof) if theory else max(1, math.ceil(dof)))
    return Allocation(widths, lams)


def loss_allocation(
    cost: CostModel,
    keep: float,
    losses: Mapping[str, np.ndarray],
    lams: Mapping[str, float],
    multiples: Mapping[str, int] | None = None,
) -> Allocation:
    """Keep what loses least: take nodes where the predicted loss rises least for each unit of cost that it saves.

    Starts from the full network; in every step one group loses some of its nodes (as many as lower the ratio of loss to
    saving most, up to `_LOOK_AHEAD` steps), until the budget is met; then nodes come back where they fit.

    Args:
        cost: cost as a function of widths.
        keep: fraction of the full cost that may be used, in (0, 1].
        losses: group name to the (width + 1,) predicted loss with k nodes kept, not rising with k; entry 0 is unused.
        lams: group name to lambda, handed on.
        multiples: group name to what its width must be a multiple of, unless it stays whole.

    Raises:
        ValueError: even the smallest widths cost more than the budget.
    """
    if keep >= 1.0:
        return Allocation(dict(cost.full), dict(lams))
    budget = keep * cost.total() * (1 + _ROUNDING)
    grids = {
        name: sorted({_multiple(k, full, (multiples or {}).get(name, 1)) for k in width_grid(full)})
        for name, full in cost.full.items()
    }
    _check_smallest(cost, keep, {name: grid[0] for name, grid in grids.items()})
    places = {name: len(grid) - 1 for name, grid in grids.items()}

    def widths(changed: str | None = None, place: int = 0) -> dict[str, int]:
        return {n: grid[place if n == changed else places[n]] for n, grid in grids.items()}

    spent = cost.total(widths())
    while spent > budget:
        best: tuple[float, str, int] | None = None
        changes = cost.changes(widths())
        for name, grid in grids.items():
            first, second = changes[name]
            now = grid[places[name]]
            for place in range(places[name] - 1, max(-1, places[name] - 1 - _LOOK_AHEAD), -1):
                part = (now - grid[place]) / cost.full[name]
                saved = first * part - second * part**2
                rise = max(0.0, float(losses[name][grid[place]] - losses[name][now]))
                ratio = rise / max(saved, _ROUNDING)
                if best is None or ratio < best[0]:
                    best = (ratio, name, place)
        if best is None:  # cannot happen after the check above, short of rounding
            break
        _, chosen, places[chosen] = best
        spent = cost.total(widths())
    while True:  # the last step may have saved more than was needed
        options = [
            (float(losses[name][grid[places[name]]] - losses[name][grid[places[name] + 1]]), name)
            for name, grid in grids.items()
            if places[name] + 1 < len(grid) and cost.total(widths(name, places[name] + 1)) <= budget
        ]
        if not options:
            return Allocation(widths(), dict(lams))
        places[max(options)[1]] += 1


def width_grid(full: int) -> list[int]:
    """Return the widths that are tried: all of small groups, about 64 of large ones."""
    return sorted({1, *np.linspace(1, full, min(full, _GRID)).round().astype(int).tolist()})


def _multiple(width: float, full: int, multiple: int) -> int:
    """Return the width rounded down to a multiple (at least one of it), or the full one."""
    if width >= full:
        return full
    return min(full, max(multiple, math.floor(width / multiple) * multiple))


def _check_smallest(cost: CostModel, keep: float, widths: Mapping[str, int]) -> None:
    smallest = cost.total(widths) / cost.total()
    if smallest > keep * (1 + _ROUNDING):
        raise ValueError(
            f"keep={keep}: with the smallest widths the network still costs {smallest:.4g} of the full one "
            "(what is outside the groups is not pruned); ask for more"
        )


def _largest(cost: CostModel, keep: float, widths: Callable[[float], dict[str, int]]) -> dict[str, int]:
    return dict(cost.full) if keep >= 1.0 else widths(_bisect(cost, keep, widths))


def _bisect(cost: CostModel, keep: float, widths: Callable[[float], dict[str, int]]) -> float:
    """Return the largest position in [0, 1] whose widths fit the budget; widths must grow with the position."""
    budget = keep * cost.total() * (1 + _ROUNDING)
    low, high = 0.0, 1.0
    _check_smallest(cost, keep, widths(low))
    if cost.total(widths(high)) <= budget:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.total(widths(middle)) <= budget else (low, middle)
    return low
