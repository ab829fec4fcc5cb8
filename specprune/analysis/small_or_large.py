"""Train small, or train large and prune? The question of Chang et al. 2021, answered for a given problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from specprune._records import to_json
from specprune.analysis.double_descent import METHOD_LABELS, usual_sizes
from specprune.analysis.linear_simulation import simulate_risks
from specprune.bounds.bound import check_count
from specprune.bounds.correlated_features import CorrelatedProblem, correlated_risks, correlated_small_risk
from specprune.bounds.overparameterized import IntArray, LinearProblem, check_sizes
from specprune.bounds.pruned_risks import pruned_risks, trained_small_risk

#: Ways to prune that need no other data and no knowledge of the truth.
PRACTICAL = ("magnitude", "hessian", "magnitude_refit", "hessian_refit")


@dataclass(frozen=True)
class SmallOrLarge:
    """Whether it is better to train small, or to train large and prune.

    Attributes:
        keep: s, features of either model in the end.
        small_risk: test risk of least squares on the right s features: of all, those with the largest variance times
            squared coefficient.
        size: the best size to train and prune.
        method: the best way to prune, of `PRACTICAL`.
        large_risk: test risk of that.
        error: standard error of `large_risk`: 0 where it is exact.
    """

    keep: int
    small_risk: float
    size: int
    method: str
    large_risk: float
    error: float

    @property
    def gain(self) -> float:
        """How much lower the risk is after training large; below 0 if training small is better."""
        return self.small_risk - self.large_risk

    def to_record(self) -> dict[str, Any]:
        """Return one flat record."""
        return {**vars(self), "gain": self.gain}

    def to_json(self) -> str:
        """Return the answer as JSON."""
        return to_json(self.to_record())

    def __str__(self) -> str:
        best = f"train on {self.size} features and prune to {self.keep} ({METHOD_LABELS[self.method]})"
        small = f"train on the right {self.keep} features"
        first, second = (best, small) if self.gain > 0 else (small, best)
        risks = sorted((self.small_risk, self.large_risk))
        return f"Better: {first}, risk {risks[0]:.4g}; next: {second}, risk {risks[1]:.4g}."


def small_or_large(
    problem: LinearProblem | CorrelatedProblem,
    keep: int,
    sizes: ArrayLike | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SmallOrLarge:
    """Say whether to train small, even with the right features known, or to train large and prune.

    For independent features all risks are exact limits.  For correlated ones pruned risks are averages over draws from
    the Gaussian law, and refits on the same examples, for which there is no formula, are simulated.

    Args:
        problem: covariance, signal, noise and number of examples; its first k features are what a size k trains on.
        keep: s, target number of features, not n.
        sizes: to choose from, above s, none equal to n; about 60 (8 for correlated features) if None.
        draws: for correlated features.
        seed: of the draws.
        device: where to simulate.

    Returns:
        The best size and way, and how it compares.

    Raises:
        ValueError: sizes or keep out of range, or equal to n.
        TypeError: another kind of problem.

    Source: the question of Chang et al. 2021 (arXiv:2012.08749).
    """
    keep = check_count("keep", keep)
    if isinstance(problem, LinearProblem):
        chosen = usual_sizes(problem, keep) if sizes is None else check_sizes(sizes, problem.features, problem.n)
        chosen = _larger(chosen, keep)
        risks = pruned_risks(problem, chosen, keep)
        table = np.stack([getattr(risks, method) for method in PRACTICAL])
        row, column = np.unravel_index(table.argmin(), table.shape)
        return SmallOrLarge(
            keep, trained_small_risk(problem, keep), int(chosen[column]), PRACTICAL[row], float(table.min()), 0.0
        )
    if not isinstance(problem, CorrelatedProblem):
        raise TypeError(
            f"problem of type {type(problem).__name__}: expected LinearProblem or CorrelatedProblem; "
            "of random ReLU features pass problem.equivalent()"
        )
    features = len(problem.beta)
    if keep >= features:
        raise ValueError(f"keep = {keep} of {features} features; expected fewer")
    if sizes is None:
        even = np.unique(np.geomspace(keep + 1, features, 8).round().astype(np.int64))
        chosen = even[even != problem.n]
    else:
        chosen = check_sizes(sizes, features, problem.n)
    best = (np.inf, 0.0, 0, "")
    for size in _larger(chosen, keep).tolist():
        part = problem.restricted(np.arange(size))
        found = correlated_risks(part, keep, draws=draws, fresh_draws=2, seed=seed)
        simulated = simulate_risks(part, keep, draws=draws, seed=seed, device=device)
        estimates = {"magnitude": found.magnitude, "hessian": found.hessian}
        estimates |= {method: simulated.risks[method] for method in PRACTICAL if method not in estimates}
        for method, estimate in estimates.items():
            best = min(best, (estimate.value, estimate.error, size, method))
    return SmallOrLarge(keep, correlated_small_risk(problem, keep), best[2], best[3], best[0], best[1])


def _larger(sizes: IntArray, keep: int) -> IntArray:
    larger = sizes[sizes > keep]
    if not larger.size:
        raise ValueError(f"keep = {keep}: no size above it; give sizes to train on that are larger")
    return larger
