"""Pruned least squares on correlated features: by draws from its Gaussian law; random ReLU features; one shared factor.

With covariance Sigma = U diag(l) U^T, least squares is as if drawn from

    beta_hat ~ (Sigma + c)^-1 Sigma^(1/2) (Sigma^(1/2) beta + sqrt(gamma / n) g),  g ~ N(0, I),

with c and gamma as for independent features of variances l (`overparameterized`).  Risks of pruned solutions are
averages over such draws, which need no data.  For features that the *same* examples have chosen and that are correlated
no closed form is known here, and none is given: `specprune.analysis.linear_simulation` measures it.

Source: Chang, Li, Oymak and Thrampoulidis 2021 (arXiv:2012.08749); the draws are derived and checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import FloatArray, check_count, check_number
from specprune.bounds.degrees_of_freedom import check_covariance, clip_eigenvalues
from specprune.bounds.overparameterized import free_share, ridge_of_least_norm, shrinkage_of
from specprune.bounds.pruned_risks import HESSIAN, MAGNITUDE, RULES

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class CorrelatedProblem:
    """Regression on Gaussian features: y = <x, beta> + sigma z, x ~ N(0, covariance).

    Attributes:
        covariance: symmetric positive semidefinite, shape (k, k).
        beta: true coefficients, shape (k,).
        noise: sigma^2, at least 0.
        n: number of training examples, at least 2.
        eigenvalues: those above 0, shape (r,).
        eigenvectors: their vectors, whose span least norm never leaves, shape (k, r).

    Raises:
        ValueError: a covariance that is not symmetric positive semidefinite; other shapes; values out of range.
    """

    covariance: FloatArray
    beta: FloatArray
    noise: float
    n: int
    eigenvalues: FloatArray = field(init=False, repr=False)
    eigenvectors: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = np.asarray(self.covariance)
        covariance = check_covariance(given)
        values, vectors = np.linalg.eigh(covariance)
        values = clip_eigenvalues(values, _TOLERANCE)
        if given.dtype == np.float32:  # its rounding looks like small eigenvalues
            values[values <= len(values) * np.finfo(np.float32).eps * values.max()] = 0.0
        beta = np.array(self.beta, dtype=np.float64)
        if beta.shape != values.shape or not np.isfinite(beta).all():
            raise ValueError(
                f"beta must be finite, of shape {values.shape} like the covariance, got shape {beta.shape}"
            )
        object.__setattr__(self, "covariance", covariance)
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "noise", check_number("noise", self.noise, 0.0))
        object.__setattr__(self, "n", check_count("n", self.n, low=2))
        object.__setattr__(self, "eigenvalues", values[values > 0])
        object.__setattr__(self, "eigenvectors", vectors[:, values > 0])

    def risk(self, solutions: FloatArray) -> FloatArray:
        """Return noise + (b - beta)^T covariance (b - beta) for solutions b of shape (..., k)."""
        error = solutions - self.beta
        return self.noise + np.einsum("...i,...i->...", error @ self.covariance, error)

    def restricted(self, support: ArrayLike) -> CorrelatedProblem:
        """Return the problem that least squares on some features solves: the others are predicted, or act as noise.

        Args:
            support: different indices of features, shape (s,).

        Raises:
            ValueError: something else.
        """
        kept = np.asarray(support)
        whole = kept.dtype.kind in "iu" and kept.ndim == 1 and kept.size > 0
        if not whole or kept.min() < 0 or kept.max() >= len(self.beta) or len(np.unique(kept)) < len(kept):
            raise ValueError(
                f"support must be different indices from 0 to {len(self.beta) - 1}, got {support!r}; "
                "turn a mask into indices with np.flatnonzero"
            )
        rest = np.setdiff1d(np.arange(len(self.beta)), kept)
        inside, across = self.covariance[np.ix_(kept, kept)], self.covariance[np.ix_(kept, rest)]
        mix = np.linalg.lstsq(inside, across, rcond=None)[0]
        left = self.covariance[np.ix_(rest, rest)] - across.T @ mix
        noise = self.noise + max(0.0, float(self.beta[rest] @ left @ self.beta[rest]))
        return CorrelatedProblem(inside, self.beta[kept] + mix @ self.beta[rest], noise, self.n)


@dataclass(frozen=True, eq=False)
class CorrelatedLaw:
    """Gaussian law of least squares on correlated features.

    Attributes:
        problem: what is learnt.
        c: ridge that least norm amounts to, 0 for fewer dimensions than examples.
        gamma: test risk.
        mean: E beta_hat, shape (k,).
        factor: A with beta_hat = mean + A g, g ~ N(0, I), shape (k, r).
    """

    problem: CorrelatedProblem
    c: float
    gamma: float
    mean: FloatArray
    factor: FloatArray

    def draws(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Return solutions drawn from the law, shape (count, k)."""
        noise = generator.standard_normal((count, self.factor.shape[1]))
        return self.mean + noise @ self.factor.T


def correlated_law(problem: CorrelatedProblem) -> CorrelatedLaw:
    """Return where least squares on all features ends.

    Args:
        problem: whose covariance may have any rank but n.

    Raises:
        ValueError: the rank is n: there the risk grows without bound.

    Source: see the module.
    """
    values, vectors, n = problem.eigenvalues, problem.eigenvectors, problem.n
    if len(values) == n:
        raise ValueError(
            f"the covariance has rank {n}, the number of examples: there the risk grows without bound; "
            "take more or fewer features"
        )
    used, true = np.ones((1, len(values))), vectors.T @ problem.beta
    c = ridge_of_least_norm(values, used, n)
    shrinkage, lack = shrinkage_of(values, c)
    bias = float((values * (lack[0] * true) ** 2).sum())
    gamma = (problem.noise + bias) / float(free_share(used, shrinkage, lack, c, n)[0])
    factor = vectors * (np.sqrt(gamma / n) * shrinkage[0] / np.sqrt(values))
    return CorrelatedLaw(problem, float(c[0]), gamma, vectors @ (shrinkage[0] * true), factor)


@dataclass(frozen=True)
class Estimate:
    """A mean over draws.

    Attributes:
        value: the mean.
        error: its standard error.
    """

    value: float
    error: float


@dataclass(frozen=True)
class CorrelatedRisks:
    """Test risks on correlated features, noise included; names as in `PrunedRisks`.

    There is no "refit" on the same examples: the law does not say on which of their noise the choice leans.

    Attributes:
        keep: s.
        unpruned: of least squares on all features.
        magnitude: after keeping the s largest coefficients.
        hessian: after keeping the s largest of coefficient times the feature's deviation.
        magnitude_fresh: as `magnitude`, fitted again on as many new examples.
        hessian_fresh: as `hessian`, fitted again on as many new examples.
        oracle_refit: least squares on the s features with the largest variance times squared true coefficient.
    """

    keep: int
    unpruned: float
    magnitude: Estimate
    hessian: Estimate
    magnitude_fresh: Estimate
    hessian_fresh: Estimate
    oracle_refit: float

    def to_record(self) -> dict[str, Any]:
        """Return one flat record."""
        record: dict[str, Any] = {}
        for name, value in vars(self).items():
            record |= (
                {name: value.value, f"{name}_error": value.error} if isinstance(value, Estimate) else {name: value}
            )
        return record


def correlated_risks(
    problem: CorrelatedProblem, keep: int, *, draws: int = 400, fresh_draws: int = 20, seed: int = 0
) -> CorrelatedRisks:
    """Return the test risks of pruned least squares on correlated features.

    Args:
        problem: what is learnt.
        keep: s, from 1 to the number of features, but n.
        draws: from the law, for the pruned risks.
        fresh_draws: of supports, for those fitted again on new examples: each is a problem of its own.
        seed: of the draws.

    Returns:
        Means over draws, with their standard errors.

    Raises:
        ValueError: as `correlated_law`; `keep` out of range, or n.

    Source: see the module.
    """
    features = len(problem.beta)
    keep, draws = check_count("keep", keep), check_count("draws", draws, 2)
    fresh_draws = check_count("fresh_draws", fresh_draws, 2)
    if keep > features or keep == problem.n:
        raise ValueError(
            f"keep must be from 1 to {features}, the number of features, but not n = {problem.n}; got {keep}"
        )
    law = correlated_law(problem)
    solutions = law.draws(draws, np.random.default_rng(seed))
    variances = np.diag(problem.covariance)
    found: dict[str, Estimate] = {}
    for rule in RULES:
        scores = np.abs(solutions) * (1.0 if rule == MAGNITUDE else np.sqrt(variances))
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        pruned = np.zeros_like(solutions)
        np.put_along_axis(pruned, kept, np.take_along_axis(solutions, kept, 1), 1)
        found[rule] = _estimate(problem.risk(pruned))
        again = [correlated_law(problem.restricted(np.sort(support))).gamma for support in kept[:fresh_draws]]
        found[f"{rule}_fresh"] = _estimate(np.array(again))
    small = correlated_small_risk(problem, keep)
    return CorrelatedRisks(
        keep,
        law.gamma,
        found[MAGNITUDE],
        found[HESSIAN],
        found[f"{MAGNITUDE}_fresh"],
        found[f"{HESSIAN}_fresh"],
        small,
    )


def correlated_small_risk(problem: CorrelatedProblem, keep: int) -> float:
    """Return the risk of least squares on the s features with the largest variance times squared coefficient.

    Args:
        problem: what is learnt.
        keep: s, from 1 to the number of features.

    Raises:
        ValueError: as `correlated_law`, for those features.
    """
    energy = np.diag(problem.covariance) * problem.beta**2
    return correlated_law(problem.restricted(np.sort(np.argsort(-energy, kind="stable")[:keep]))).gamma


def _estimate(values: FloatArray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


@dataclass(frozen=True, eq=False)
class ReluFeatures:
    """Regression on random ReLU features: y = <a, x> + sigma_0 z, features phi_i = max(0, <r_i, x>), x ~ N(0, I_d).

    Attributes:
        weights: r, one row a feature, shape (k, d).
        coefficients: a, shape (d,).
        noise: sigma_0^2, at least 0.
        n: number of training examples, at least 2.

    Raises:
        ValueError: other shapes, values that are not finite or out of range, a feature with zero weights.
    """

    weights: FloatArray
    coefficients: FloatArray
    noise: float
    n: int

    def __post_init__(self) -> None:
        rows, target = np.array(self.weights, dtype=np.float64), np.array(self.coefficients, dtype=np.float64)
        finite = bool(np.isfinite(rows).all() and np.isfinite(target).all())
        if rows.ndim != 2 or target.shape != rows.shape[1:] or not finite:
            raise ValueError(
                "weights and coefficients must be finite, of shapes (k, d) and (d,); "
                f"got {rows.shape} and {target.shape}"
            )
        if not rows.any(axis=1).all():
            raise ValueError(f"weights: feature {int((~rows.any(axis=1)).argmax())} has zero weights; leave it out")
        object.__setattr__(self, "weights", rows)
        object.__setattr__(self, "coefficients", target)
        object.__setattr__(self, "noise", check_number("noise", self.noise, 0.0))
        object.__setattr__(self, "n", check_count("n", self.n, low=2))

    def equivalent(self) -> CorrelatedProblem:
        """Return the Gaussian problem that least squares on these features amounts to.

        With u the angle between r_i and r_j,

            E phi_i phi_j = |r_i| |r_j| (sin u + (pi - u) cos u) / (2 pi),   E phi_i y = r_i . a / 2,

        and what no combination of features explains of y acts as noise.  That Gaussian features with these moments lead
        to the same risks is a limit law of many inputs: within 2 % at d = 120 and n = 600, 7 % at d = 40 and n = 200
        near the peak; with few inputs it fails (k = 400, n = 200: 0.20 against 0.25 at d = 8, 0.4 against 8 at d = 3).

        Source: Cho and Saul 2009 (arc-cosine kernel); Gaussian equivalence as in Chang et al. 2021 (arXiv:2012.08749).
        """
        rows, target = self.weights, self.coefficients
        norms = np.linalg.norm(rows, axis=1)
        cosine = np.clip(rows @ rows.T / np.outer(norms, norms), -1.0, 1.0)
        np.fill_diagonal(cosine, 1.0)
        angle = np.arccos(cosine)
        covariance = np.outer(norms, norms) * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
        cross = 0.5 * rows @ target
        beta = np.asarray(np.linalg.lstsq(covariance, cross, rcond=None)[0], dtype=np.float64)
        unexplained = max(0.0, float(target @ target) - float(cross @ beta))
        return CorrelatedProblem(covariance, beta, self.noise + unexplained, self.n)


@dataclass(frozen=True)
class RankOneRisks:
    """Excess risks, noise not included, of least squares on features that are multiples of one factor.

    Attributes:
        pruned: after keeping the features with the largest loadings.
        refit: after fitting those again, on the same examples.
    """

    pruned: float
    refit: float


def rank_one_risks(loadings: ArrayLike, beta: ArrayLike, noise: float, n: int, keep: int) -> RankOneRisks:
    """Return what pruning costs where all features are multiples of one: nothing, once they are fitted again.

    With covariance v v^T and zeta the share of |v|^2 in the kept loadings, exactly for every n >= 3,

        pruned: zeta^2 sigma^2 / (n - 2) + (1 - zeta)^2 (v . beta)^2,    refit: sigma^2 / (n - 2).

    Args:
        loadings: v, not all 0, shape (p,).
        beta: true coefficients, shape (p,).
        noise: sigma^2, at least 0.
        n: number of training examples, at least 3.
        keep: s, from 1 to p.

    Raises:
        ValueError: values that are not finite, of other shapes, or out of range.

    Source: Chang et al. 2021 (arXiv:2012.08749), as recalled; derived and checked by simulation here.
    """
    v, true = np.asarray(loadings, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    if v.ndim != 1 or v.shape != true.shape or not (np.isfinite(v).all() and np.isfinite(true).all()) or not v.any():
        raise ValueError(
            f"loadings and beta must be finite, of one shape (p,), and not all 0; got {v.shape}, {true.shape}"
        )
    noise, n, keep = check_number("noise", noise, 0.0), check_count("n", n, low=3), check_count("keep", keep)
    if keep > len(v):
        raise ValueError(f"keep = {keep} of {len(v)} features; expected at most as many")
    energy = np.sort((v / np.abs(v).max()) ** 2)[::-1]
    share = float(energy[:keep].sum() / energy.sum())
    variance = noise / (n - 2)
    with np.errstate(over="ignore", invalid="ignore"):
        signal = float(np.square(v @ true))
    if not math.isfinite(signal):
        raise ValueError("loadings and beta are so large that (v . beta)^2 exceeds float64; scale them down")
    return RankOneRisks(share**2 * variance + (1 - share) ** 2 * signal, variance)
