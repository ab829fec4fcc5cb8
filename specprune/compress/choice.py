"""Which units a group keeps: one interface to all selection rules, on single nodes and on blocks of columns.

- "backward": eliminate units by the least loss of the refit that follows, exactly (the default).
- "greedy": the paper's rule, on the covariance of the nodes; on the consumers' columns where units are blocks.
- "thorough": of the sets that several rules propose, the one with the least measured divergence of the outputs.
- "thinet": drop the units whose summed contribution to the consumers' outputs is least, before any refit (Luo et al.
  2017, arXiv:1707.06342, the selection alone).
- "magnitude" (L2), "magnitude_l1", "scores" (the caller's): keep the largest.
- "leverage", "cholesky", "random": see `selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from specprune.compress.blocks import Item, backward_path, greedy_path, kept_units
from specprune.compress.selection import NodeStatistics, select_nodes
from specprune.compress.surgery import Group

SELECTIONS = (
    "backward",
    "greedy",
    "thorough",
    "thinet",
    "magnitude",
    "magnitude_l1",
    "scores",
    "leverage",
    "cholesky",
    "random",
)
NEED_PROBLEMS = ("backward", "thorough", "thinet")
_PROPOSALS = ("backward", "greedy_path", "greedy", "magnitude")

Contribution = Callable[[], np.ndarray]


def choose_units(
    rule: str,
    group: Group,
    size: int,
    statistics: NodeStatistics,
    items: Sequence[Item],
    *,
    lam: float,
    theta: float,
    ridge: float,
    generator: np.random.Generator,
    scores: Mapping[str, np.ndarray] | None = None,
    contribution: Contribution | None = None,
    divergence: Callable[[np.ndarray], float] | None = None,
) -> np.ndarray:
    """Return the units of a group to keep, ascending.

    Args:
        rule: one of `SELECTIONS`.
        group: the group.
        size: how many units.
        statistics: of its nodes.
        items: its consumers' least squares problems, for the rules that need them and for blocks.
        lam: lambda in units of the covariance.
        theta: weight of the input loss in the greedy rule.
        ridge: relative ridge of the least squares.
        generator: source of randomness.
        scores: group name to the (units,) scores of the rules "scores" and "magnitude_l1".
        contribution: gives the (units, units) contribution Gram of the rule "thinet".
        divergence: of the outputs when these units are kept, for the rule "thorough".
    """
    if size == group.width:
        return np.arange(group.width)
    if rule == "backward":
        return kept_units(backward_path(items, size, ridge), group.width, size)
    if rule == "greedy_path" or (rule == "greedy" and group.kind == "heads" and items):
        return np.sort(greedy_path(items, size, ridge).order)
    if rule == "thorough" and divergence is not None:
        proposals = {
            tuple(
                choose_units(
                    one, group, size, statistics, items, lam=lam, theta=theta, ridge=ridge, generator=generator
                ).tolist()
            )
            for one in _PROPOSALS
        }
        return np.array(min(sorted(proposals), key=lambda kept: divergence(np.array(kept))))
    if rule == "thinet" and contribution is not None:
        return thinet_units(contribution(), size)
    if rule in ("scores", "magnitude_l1") and scores is not None:
        order = np.argsort(-np.asarray(scores[group.name], dtype=np.float64), kind="stable")
        return np.sort(order[:size])
    return np.sort(select_nodes(rule, statistics, size, lam=lam, theta=theta, generator=generator))


def thinet_units(contributions: np.ndarray, size: int) -> np.ndarray:
    """Return the units left when those go, one by one, whose joint contribution to the outputs is least.

    Args:
        contributions: (m, m) Q_jk = E <contribution of j, contribution of k> to the consumers' outputs.
        size: how many units stay.

    Returns:
        (size,) units, ascending.

    Source:
        Luo, Wu, Lin 2017, "ThiNet", arXiv:1707.06342, section 3.2 (greedy minimisation of E (sum of dropped)^2).
    """
    width = len(contributions)
    cost = contributions.diagonal().copy()
    free = np.ones(width, dtype=bool)
    for _ in range(width - size):
        unit = int(np.where(free, cost, np.inf).argmin())
        free[unit] = False
        cost += 2 * contributions[unit]
    return np.flatnonzero(free)


def check_scores(scores: Mapping[str, np.ndarray] | None, groups: Sequence[Group]) -> None:
    """Check that the caller's scores name every group and have one finite number a unit.

    Raises:
        ValueError: naming the group and the shapes.
    """
    if scores is None:
        raise ValueError("selection='scores' needs scores={group name: one number a unit}; the larger stay")
    for group in groups:
        given = np.asarray(scores.get(group.name, ()), dtype=np.float64)
        if given.shape != (group.width,) or not np.all(np.isfinite(given)):
            raise ValueError(
                f"scores[{group.name!r}] has shape {given.shape}: expected ({group.width},) finite numbers; "
                f"the groups are {[entry.name for entry in groups]}"
            )
