"""How many nodes each group keeps: one fraction for all, or the degrees of freedom at a common lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.bounds.spectral import paper_width
from specprune.compress.cost import CostModel

ALLOCATIONS = ("uniform", "dof", "theory")
_STEPS = 60
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


def uniform_allocation(cost: CostModel, keep: float, traces: Mapping[str, float], lam: float) -> Allocation:
    """Keep the same fraction of every group, as large as the budget allows.

    Args:
        cost: cost as a function of widths.
        keep: fraction of the full cost that may be used, in (0, 1].
        traces: group name to Tr Sigma.
        lam: relative lambda; lambda_l = lam * Tr Sigma_l.

    Raises:
        ValueError: even one node a group costs more than the budget.
    """

    def widths(fraction: float) -> dict[str, int]:
        return {name: max(1, math.floor(fraction * full + 1e-9)) for name, full in cost.full.items()}

    return Allocation(_largest(cost, keep, widths), {name: lam * trace for name, trace in traces.items()})


def dof_allocation(cost: CostModel, keep: float, spectra: Mapping[str, np.ndarray]) -> Allocation:
    """Keep the degrees of freedom of every group at one common relative lambda (the practical mode).

    lambda_l = c Tr Sigma_l and m_l = ceil(N_l(lambda_l)), with the smallest c whose widths fit the budget.

    Args:
        cost: cost as a function of widths.
        keep: fraction of the full cost that may be used, in (0, 1].
        spectra: group name to the eigenvalues of Sigma.

    Raises:
        ValueError: even one node a group costs more than the budget.
    """
    relative = {name: values / values.sum() for name, values in spectra.items()}

    def lam_of(fraction: float) -> float:
        return 10.0 ** (2.0 - 14.0 * fraction)

    def widths(fraction: float) -> dict[str, int]:
        lam = lam_of(fraction)
        return {
            name: min(cost.full[name], max(1, math.ceil(degrees_of_freedom(values, lam))))
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


def _largest(cost: CostModel, keep: float, widths: Callable[[float], dict[str, int]]) -> dict[str, int]:
    return dict(cost.full) if keep >= 1.0 else widths(_bisect(cost, keep, widths))


def _bisect(cost: CostModel, keep: float, widths: Callable[[float], dict[str, int]]) -> float:
    """Return the largest position in [0, 1] whose widths fit the budget; widths must grow with the position."""
    budget = keep * cost.total() * (1 + _ROUNDING)
    low, high = 0.0, 1.0
    if cost.total(widths(low)) > budget:
        smallest = cost.total(widths(low)) / cost.total()
        raise ValueError(
            f"keep={keep}: with the smallest widths the network still costs {smallest:.4g} of the full one "
            "(what is outside the groups is not pruned); ask for more"
        )
    if cost.total(widths(high)) <= budget:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.total(widths(middle)) <= budget else (low, middle)
    return low
