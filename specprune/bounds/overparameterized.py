"""Least squares with more features than examples: where it ends, coordinate by coordinate, and what it costs.

Model.  y = x . beta + sigma z with x ~ N(0, diag(variances)) and z ~ N(0, 1).  Least squares sees n examples and the
first k features; the others act as noise, sigma_k^2 = sigma^2 + sum_(i > k) variances_i beta_i^2.  For k > n it is
the interpolating solution of least norm.

Fixed point.  With theta_i = sqrt(variances_i) beta_i, there is one c >= 0 (the paper's xi is 1/c) with

    sum_(i <= k) t_i = n,  t_i = variances_i / (variances_i + c),     for k > n;     c = 0 and t_i = 1 for k < n,

    gamma = (sigma_k^2 + sum_i (1 - t_i)^2 theta_i^2) / (1 - sum_i t_i^2 / n),

and in the limit of many examples and features the solution is as if each coordinate were drawn for itself,

    beta_hat_i ~ N(t_i beta_i, (gamma / n) t_i^2 / variances_i),

for averages over coordinates.  gamma is the test risk E (y - x . beta_hat)^2.  At k = n it has no finite limit: the
peak of double descent.

Source: Chang, Li, Oymak and Thrampoulidis 2021 (arXiv:2012.08749, Definition 2 and Theorem 1 as recalled; the form here
is derived and checked by simulation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import elementwise

from specprune.bounds.bound import FloatArray, check_count, check_number, check_vector

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """Regression on independent Gaussian features: y = x . beta + sigma z.

    Attributes:
        variances: of the features, each above 0, shape (P,).
        beta: true coefficients, shape (P,).
        noise: sigma^2, at least 0.
        n: number of training examples, at least 2.

    Raises:
        ValueError: values that are not finite, of other shapes, or out of range.
    """

    variances: FloatArray
    beta: FloatArray
    noise: float
    n: int

    def __post_init__(self) -> None:
        variances = check_vector("variances", self.variances).copy()
        beta = np.array(self.beta, dtype=np.float64)
        if (variances == 0).any():
            raise ValueError(f"variances: feature {int(variances.argmin())} is always 0; leave it out")
        if beta.shape != variances.shape or not np.isfinite(beta).all():
            raise ValueError(f"beta must be finite, of shape {variances.shape} like variances, got shape {beta.shape}")
        object.__setattr__(self, "variances", variances)
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "noise", check_number("noise", self.noise, 0.0))
        object.__setattr__(self, "n", check_count("n", self.n, low=2))

    @property
    def features(self) -> int:
        """P, the number of features."""
        return len(self.variances)

    @property
    def signal(self) -> FloatArray:
        """theta, the coefficients of features scaled to variance 1, shape (P,)."""
        return np.sqrt(self.variances) * self.beta

    @property
    def null_risk(self) -> float:
        """Risk of the prediction 0."""
        return self.noise + float((self.signal**2).sum())

    def effective_noise(self, sizes: IntArray) -> FloatArray:
        """Return sigma_k^2, what the first k features leave unexplained, in the shape of `sizes`."""
        left = np.concatenate([np.cumsum((self.signal**2)[::-1])[::-1], [0.0]])
        return self.noise + left[sizes]


@dataclass(frozen=True, eq=False)
class LeastSquaresLaw:
    """Law of least squares on the first k features, for several k: one row each.

    Attributes:
        problem: what is learnt.
        sizes: k, shape (rows,).
        noise: sigma_k^2, shape (rows,).
        c: ridge that least norm amounts to; 0 for k < n.  Shape (rows,).
        shrinkage: t_i, 0 for features beyond the first k, shape (rows, P).
        lack: 1 - t_i, also where t_i is close to 1, shape (rows, P).
        gamma: test risk, shape (rows,).
    """

    problem: LinearProblem
    sizes: IntArray
    noise: FloatArray
    c: FloatArray
    shrinkage: FloatArray
    lack: FloatArray
    gamma: FloatArray

    @property
    def xi(self) -> FloatArray:
        """The paper's xi = 1/c, infinite for k < n, shape (rows,)."""
        return np.divide(1.0, self.c, out=np.full_like(self.c, np.inf), where=self.c > 0)

    @property
    def used(self) -> NDArray[np.bool_]:
        """Which features each row uses, shape (rows, P)."""
        return np.arange(self.problem.features) < self.sizes[:, None]

    @property
    def mean(self) -> FloatArray:
        """E beta_hat, shape (rows, P)."""
        return self.shrinkage * self.problem.beta

    @property
    def deviation(self) -> FloatArray:
        """Standard deviation of each coordinate of beta_hat, shape (rows, P)."""
        return np.sqrt(self.gamma / self.problem.n)[:, None] * self.shrinkage / np.sqrt(self.problem.variances)


def check_sizes(sizes: ArrayLike, features: int, n: int, name: str = "sizes") -> IntArray:
    """Return numbers of features as an array, if each is from 1 to P and none is n.

    Args:
        sizes: one or more whole numbers.
        features: P.
        n: number of examples, where the risk has no finite limit.
        name: the argument's name, for the message.

    Returns:
        Shape (rows,).

    Raises:
        ValueError: other numbers, or n itself.
    """
    found = np.atleast_1d(np.asarray(sizes))
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be one or more whole numbers, got {sizes!r}")
    if found.min() < 1 or found.max() > features:
        raise ValueError(
            f"{name} must be from 1 to the number of features, {features}; got {found.min()}..{found.max()}"
        )
    if (found == n).any():
        raise ValueError(
            f"{name} holds {n}, the number of examples: there the risk grows without bound, the peak of double "
            f"descent; ask for {n - 1} or {n + 1} instead"
        )
    return found.astype(np.int64)


def least_squares_law(problem: LinearProblem, sizes: ArrayLike) -> LeastSquaresLaw:
    """Return where least squares ends with each number of features, and its test risk.

    Args:
        problem: what is learnt.
        sizes: k, numbers of features, any from 1 to P but n; scalar or shape (rows,).

    Raises:
        ValueError: other sizes.

    Source: see the module.
    """
    rows = check_sizes(sizes, problem.features, problem.n)
    used = (np.arange(problem.features) < rows[:, None]).astype(np.float64)
    c = ridge_of_least_norm(problem.variances, used, problem.n)
    shrinkage, lack = shrinkage_of(problem.variances, c)
    noise = problem.effective_noise(rows)
    bias = (used * lack**2 * problem.signal**2).sum(1)
    gamma = (noise + bias) / free_share(used, shrinkage, lack, c, problem.n)
    return LeastSquaresLaw(problem, rows, noise, c, used * shrinkage, np.where(used > 0, lack, 1.0), gamma)


def shrinkage_of(variances: FloatArray, c: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return t = variances / (variances + c) and 1 - t, each without cancellation, shape (rows, P).

    Args:
        variances: shape (P,).
        c: shape (rows,).
    """
    total = variances + c[:, None]
    return variances / total, c[:, None] / total


def free_share(share: FloatArray, shrinkage: FloatArray, lack: FloatArray, c: FloatArray, n: int) -> FloatArray:
    """Return 1 - sum_i w_i t_i^2 / n, which for c > 0 is sum_i w_i t_i (1 - t_i) / n, without cancellation.

    Args:
        share: w, shape (rows, P).
        shrinkage: t, shape (rows, P).
        lack: 1 - t, shape (rows, P).
        c: shape (rows,).
        n: number of examples.
    """
    return np.where(c > 0, (share * shrinkage * lack).sum(1) / n, 1 - (share * shrinkage**2).sum(1) / n)


def ridge_of_least_norm(variances: FloatArray, weights: FloatArray, n: int) -> FloatArray:
    """Return c >= 0 with sum_i w_i variances_i / (variances_i + c) = n, or 0 where sum_i w_i <= n.

    Args:
        variances: each above 0, shape (P,).
        weights: w, each from 0 to 1: shares of the features that are used, shape (rows, P).
        n: number of examples.

    Returns:
        c of shape (rows,).
    """
    total = weights.sum(1)
    found = np.zeros(len(total))
    rows = np.flatnonzero(total > n)
    if not rows.size:
        return found
    # t >= 1 - c / smallest and t <= variance / c enclose the root.
    smallest = np.where(weights[rows] > 0, variances, np.inf).min(1)
    low = np.log(smallest) + np.log1p(-n / total[rows])
    high = np.log((weights[rows] * variances).sum(1) / n)

    def excess(log_c: FloatArray, row: FloatArray) -> FloatArray:
        chosen = row.astype(np.int64)
        return (weights[chosen] * (variances / (variances + np.exp(log_c)[:, None]))).sum(1) - n

    found[rows] = np.exp(find_roots(excess, low, high, rows))
    return found


def find_roots(function: Callable[..., FloatArray], low: FloatArray, high: FloatArray, rows: IntArray) -> FloatArray:
    """Return the roots of falling functions, one a row, by Chandrupatla's method.

    Args:
        function: takes points and the rows they belong to (as floats), both of shape (m,).
        low: where each is at least 0, up to rounding.
        high: where each is at most 0, up to rounding.
        rows: the rows.

    Raises:
        ArithmeticError: a root was not found.
    """
    # Where an enclosing value is itself the root, rounding may give both ends the same sign.
    width = 1e-9 + 1e-12 * np.maximum(np.abs(low), np.abs(high))
    result = elementwise.find_root(function, (low - width, high + width), args=(rows.astype(np.float64),), maxiter=200)
    if not np.all(result.success):
        raise ArithmeticError(f"no root found for rows {rows[~result.success].tolist()}; please report the input")
    return np.asarray(result.x)
