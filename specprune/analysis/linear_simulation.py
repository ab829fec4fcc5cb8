"""Pruned least squares by simulation: many training sets at once, what `specprune.bounds` predicts for each.

Also for what has no formula: features that are correlated, and fitted again on the examples that have chosen them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specprune.bounds.bound import check_count
from specprune.bounds.correlated_features import CorrelatedProblem, Estimate, ReluFeatures
from specprune.bounds.overparameterized import LinearProblem
from specprune.bounds.pruned_risks import METHODS

Problem = LinearProblem | CorrelatedProblem | ReluFeatures

_NUMBERS_AT_ONCE = 1 << 23  # of features of training sets; everything takes some ten times 64 MiB
_DEPENDENT = 1e-5


@dataclass(frozen=True)
class SimulatedRisks:
    """Mean test risks over training sets, noise included.

    Attributes:
        size: k, features that were trained on.
        keep: s, features that were kept.
        draws: number of training sets.
        risks: a mean and its standard error for each of ``specprune.bounds.pruned_risks.METHODS``.
    """

    size: int
    keep: int
    draws: int
    risks: dict[str, Estimate]

    def to_record(self) -> dict[str, Any]:
        """Return one flat record."""
        record: dict[str, Any] = {"size": self.size, "keep": self.keep, "draws": self.draws}
        for name, estimate in self.risks.items():
            record |= {name: estimate.value, f"{name}_error": estimate.error}
        return record


def simulate_risks(
    problem: Problem,
    keep: int,
    *,
    size: int | None = None,
    draws: int = 200,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SimulatedRisks:
    """Draw training sets, fit, prune and fit again, and return the mean test risks.

    The risk of each solution is exact, (b - beta)^T covariance (b - beta) + noise; only the training sets are drawn.
    "hessian" uses the mean squares of the features in the training set.

    Args:
        problem: independent, correlated or ReLU features.
        keep: s, how many features are kept.
        size: k, the first features, which are trained on; all if None.  Only for independent features.
        draws: number of training sets, at least 2.
        seed: of the draws.
        device: where to compute, in float64.

    Returns:
        Means and their standard errors.

    Raises:
        ValueError: sizes out of range, or equal to n, where the mean is infinite or nearly so; more features kept than
            the covariance has dimensions.
    """
    keep, draws = check_count("keep", keep), check_count("draws", draws, 2)
    if size is not None and not isinstance(problem, LinearProblem):
        raise ValueError(f"size = {size}: only independent features can be left out; build the smaller problem instead")
    width = _width(problem) if size is None else check_count("size", size)
    if not keep <= width <= _width(problem) or problem.n in (keep, width):
        raise ValueError(
            f"keep = {keep} of size = {width} features: expected keep <= size <= {_width(problem)}, "
            f"and neither equal to n = {problem.n}"
        )
    model = _Model(problem, width, torch.device(device))
    if keep > model.rank:
        raise ValueError(f"keep = {keep}: the features have only {model.rank} dimensions; keep at most as many")
    generator = torch.Generator(model.device).manual_seed(check_count("seed", seed, low=0))
    at_once = max(1, min(draws, _NUMBERS_AT_ONCE // (problem.n * max(_width(problem), problem.n))))
    parts = []
    for start in range(0, draws, at_once):
        parts.append(_risks(model, min(at_once, draws - start), keep, generator))
    values = torch.cat(parts, 1).cpu().numpy()
    means, errors = values.mean(1), values.std(1, ddof=1) / math.sqrt(draws)
    risks = {name: Estimate(float(m), float(e)) for name, m, e in zip(METHODS, means, errors, strict=True)}
    return SimulatedRisks(width, keep, draws, risks)


def _width(problem: Problem) -> int:
    return len(problem.weights) if isinstance(problem, ReluFeatures) else len(problem.beta)


class _Model:
    """How to draw training sets, and what a solution costs."""

    def __init__(self, problem: Problem, width: int, device: torch.device) -> None:
        self.n, self.width, self.device, self.rank = problem.n, width, device, width
        self.span: Tensor | None = None
        self.draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
        if isinstance(problem, LinearProblem):
            deviation, beta = self._tensor(np.sqrt(problem.variances)), self._tensor(problem.beta)
            self.energy = (deviation * beta)[:width] ** 2
            self.beta, self.noise = beta[:width], float(problem.effective_noise(np.array([width]))[0])
            self.covariance = deviation[:width] ** 2
            self.draw = lambda count, generator: self._linear(count, generator, deviation[:width], None)
            return
        gaussian = problem.equivalent() if isinstance(problem, ReluFeatures) else problem
        self.rank = len(gaussian.eigenvalues)
        self.beta, self.noise = self._tensor(gaussian.beta), gaussian.noise
        self.covariance = self._tensor(gaussian.covariance)
        self.energy = self.covariance.diagonal() * self.beta**2
        if self.rank < min(self.n, width):
            self.span = self._tensor(gaussian.eigenvectors)
        if isinstance(problem, ReluFeatures):
            self.draw = lambda count, generator: self._relu(problem, count, generator)
        else:
            roots = self._tensor(np.sqrt(gaussian.eigenvalues))
            vectors = self._tensor(gaussian.eigenvectors)
            self.draw = lambda count, generator: self._linear(count, generator, roots, vectors)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _normal(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=self.device, generator=generator)

    def _linear(
        self, count: int, generator: torch.Generator, deviation: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        features = self._normal(count, self.n, len(deviation), generator=generator) * deviation
        features = features if vectors is None else features @ vectors.T
        noise = math.sqrt(self.noise) * self._normal(count, self.n, generator=generator)
        return features, features @ self.beta + noise

    def _relu(self, problem: ReluFeatures, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = self._normal(count, self.n, problem.weights.shape[1], generator=generator)
        noise = math.sqrt(problem.noise) * self._normal(count, self.n, generator=generator)
        targets = inputs @ self._tensor(problem.coefficients) + noise
        return (inputs @ self._tensor(problem.weights).T).relu(), targets

    def risk(self, solutions: Tensor) -> Tensor:
        """Return the exact risks of solutions (draws, k)."""
        error = solutions - self.beta
        mixed = error * self.covariance if self.covariance.ndim == 1 else error @ self.covariance
        return self.noise + (mixed * error).sum(1)


def least_norm(features: Tensor, targets: Tensor) -> Tensor:
    """Return the least-squares solutions of least norm.

    By Cholesky's factor of the normal equations; where its diagonal says that these lose digits, as for equal features,
    by the pseudoinverse.

    Args:
        features: shape (draws, n, k).
        targets: shape (draws, n).

    Returns:
        Shape (draws, k).
    """
    tall = features.shape[2] < features.shape[1]
    factor, failed = torch.linalg.cholesky_ex(features.mT @ features if tall else features @ features.mT)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    if failed.any() or (diagonal.amin(1) < _DEPENDENT * diagonal.amax(1)).any():
        return (torch.linalg.pinv(features, rtol=_DEPENDENT**2) @ targets[:, :, None])[:, :, 0]
    if tall:
        return torch.cholesky_solve(features.mT @ targets[:, :, None], factor)[:, :, 0]
    return (features.mT @ torch.cholesky_solve(targets[:, :, None], factor))[:, :, 0]


def _risks(model: _Model, count: int, keep: int, generator: torch.Generator) -> Tensor:
    """Return the risks of `METHODS`, shape (methods, count)."""
    features, targets = model.draw(count, generator)
    others, other_targets = model.draw(count, generator)
    if model.span is None:
        solution = least_norm(features, targets)
    else:
        solution = least_norm(features @ model.span, targets) @ model.span.T
    best = model.energy.argsort(descending=True, stable=True)[:keep].expand(count, keep)
    deviation = features.square().mean(1).sqrt()
    found = {"unpruned": model.risk(solution)}
    for rule, kept in (
        ("magnitude", solution.abs().topk(keep, 1).indices),
        ("hessian", (solution.abs() * deviation).topk(keep, 1).indices),
        ("oracle", best),
    ):
        found[rule] = model.risk(_scattered(solution.gather(1, kept), kept, model.width))
        found[f"{rule}_refit"] = model.risk(_refitted(features, targets, kept))
        found[f"{rule}_fresh"] = model.risk(_refitted(others, other_targets, kept))
    return torch.stack([found[name] for name in METHODS])


def _refitted(features: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    columns = features.gather(2, kept[:, None, :].expand(-1, features.shape[1], -1))
    return _scattered(least_norm(columns, targets), kept, features.shape[2])


def _scattered(values: Tensor, kept: Tensor, width: int) -> Tensor:
    return values.new_zeros(len(values), width).scatter(1, kept, values)
