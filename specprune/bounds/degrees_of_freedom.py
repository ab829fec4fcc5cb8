"""How many dimensions a layer really uses: eigenvalues, degrees of freedom, leverage scores, power laws."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import overload

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from specprune.bounds.bound import FloatArray, Record, check_number, check_vector


def check_covariance(covariance: ArrayLike, name: str = "covariance") -> FloatArray:
    """Return a covariance matrix as a finite, exactly symmetric float64 array.

    Args:
        covariance: array of shape (m, m), in squared units of the node outputs.
        name: the argument's name, for the message.

    Returns:
        The symmetric part of the matrix, shape (m, m).

    Raises:
        ValueError: if the matrix is not square, not finite, or not symmetric beyond rounding (relative 1e-6, the
            size of float32 rounding).
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"{name} must be a square matrix of shape (m, m), got shape {matrix.shape}")
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"{name} holds NaN or infinite entries; check the activations it was computed from")
    asymmetry = float(np.max(np.abs(matrix - matrix.T)))
    if asymmetry > 1e-6 * float(np.max(np.abs(matrix))):
        raise ValueError(f"{name} must be symmetric, but entries differ by up to {asymmetry:g}; pass (S + S.T) / 2")
    return (matrix + matrix.T) / 2


def clip_eigenvalues(values: FloatArray, tolerance: float) -> FloatArray:
    """Return eigenvalues with rounding noise around zero set to zero.

    Args:
        values: eigenvalues of a symmetric matrix, shape (m,), any order.
        tolerance: largest negative eigenvalue put down to rounding, relative to the largest eigenvalue.

    Returns:
        Non-negative eigenvalues in the same order.

    Raises:
        ValueError: if an eigenvalue is clearly negative.
    """
    largest = float(np.max(np.abs(values)))
    smallest = float(values.min())
    if smallest < -tolerance * largest:
        raise ValueError(
            f"covariance must be positive semidefinite, but its smallest eigenvalue is {smallest:g} "
            f"(largest {largest:g}); use a Gram matrix, or raise tolerance={tolerance:g} if this is rounding"
        )
    # Below this level float64 eigensolvers return noise of either sign; it is the level numpy's matrix_rank uses.
    noise = len(values) * float(np.finfo(np.float64).eps) * largest
    return np.where(values <= noise, 0.0, values)


def eigenvalues(covariance: ArrayLike, *, tolerance: float = 1e-6) -> FloatArray:
    """Return the eigenvalues of a covariance matrix, largest first, with rounding noise set to zero.

    Args:
        covariance: (m, m) symmetric positive semidefinite; noncentered second moments of the m node outputs.
        tolerance: eigenvalues down to -tolerance * largest count as rounding (1e-6 suits float32 data).

    Returns:
        mu of shape (m,), descending, non-negative, in squared units of the node outputs.

    Raises:
        ValueError: if the matrix is not square, finite, symmetric and positive semidefinite.

    Source: standard linear algebra (LAPACK symmetric eigensolver).
    """
    matrix = check_covariance(covariance)
    return np.sort(clip_eigenvalues(scipy.linalg.eigvalsh(matrix), tolerance))[::-1]


@overload
def degrees_of_freedom(eigenvalues: ArrayLike, lam: float) -> float: ...
@overload
def degrees_of_freedom(eigenvalues: ArrayLike, lam: FloatArray) -> FloatArray: ...
def degrees_of_freedom(eigenvalues: ArrayLike, lam: float | FloatArray) -> float | FloatArray:
    """Return the number of directions whose variance stands above the noise level lambda, counted softly.

    N(lambda) = sum_j mu_j / (mu_j + lambda).  It falls from the rank (at lambda = 0) to 0.

    Args:
        eigenvalues: mu of shape (m,), non-negative, any order.
        lam: regularisation, non-negative, in the units of the eigenvalues; a number or an array of any shape.

    Returns:
        N(lambda), a pure number between 0 and m: a float for a number, an array of `lam`'s shape for an array.

    Raises:
        ValueError: if an input is negative or not finite.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), degrees of freedom of layer l; Bach 2017.
    """
    mu = check_vector("eigenvalues", eigenvalues)
    levels = np.asarray(lam, dtype=np.float64)
    if not np.all(np.isfinite(levels)) or (levels.size and float(levels.min()) < 0):
        raise ValueError(f"lam must be finite and at least 0, got {lam!r}")
    mu = mu[mu > 0]  # a zero eigenvalue counts 0 at every lambda, also at lambda = 0
    counts = np.sum(mu / (mu + levels[..., np.newaxis]), axis=-1)
    return float(counts) if levels.ndim == 0 else counts


def inverse_degrees_of_freedom(eigenvalues: ArrayLike, target: float) -> float:
    """Return the smallest lambda whose degrees of freedom do not exceed the target, rounded up.

    lambda* = inf {lambda >= 0 : N(lambda) <= target}.  Bisection on log lambda; the upper end of the last bracket is
    returned, so N(result) <= target always holds.

    Args:
        eigenvalues: mu of shape (m,), non-negative, any order.
        target: wished degrees of freedom, in (0, rank].

    Returns:
        lambda in the units of the eigenvalues; 0.0 when the target is the rank itself.

    Raises:
        ValueError: if the target is not in (0, rank] or an eigenvalue is invalid.

    Source: the function is continuous and strictly decreasing on a non-zero spectrum.
    """
    mu = check_vector("eigenvalues", eigenvalues)
    rank = int(np.count_nonzero(mu))
    if rank == 0:
        raise ValueError("eigenvalues are all zero: every lambda has 0 degrees of freedom, nothing can be inverted")
    target = check_number("target", target, 0.0, float(rank), open_low=True)
    if target == rank:
        return 0.0
    # N(lambda) <= trace / lambda, so this end satisfies the inequality up to rounding; doubling removes the rounding.
    high = max(float(np.sum(mu)) / target, float(np.finfo(np.float64).tiny))
    while degrees_of_freedom(mu, high) > target:
        high *= 2.0
    low = high
    while degrees_of_freedom(mu, low) <= target:
        low, high = low / 4.0, low  # low reaches 0 in the worst case, where N = rank > target
    while True:
        middle = math.sqrt(low) * math.sqrt(high) if low > 0 else high / 2
        if not low < middle < high:
            return high
        if degrees_of_freedom(mu, middle) > target:
            low = middle
        else:
            high = middle


def leverage_scores(covariance: ArrayLike, lam: float, *, tolerance: float = 1e-6) -> FloatArray:
    """Return each node's share of the degrees of freedom: the probabilities of importance sampling.

    q_j = [S (S + lambda I)^(-1)]_jj / N(lambda), computed from the eigenvectors as
    sum_k V_jk^2 mu_k / (mu_k + lambda), a sum of non-negative numbers without cancellation.

    Args:
        covariance: S, shape (m, m), symmetric positive semidefinite.
        lam: regularisation, positive, in the units of S.
        tolerance: as in `eigenvalues`.

    Returns:
        q of shape (m,), non-negative, summing to 1.

    Raises:
        ValueError: if S is not a covariance matrix or is zero, or if lam is not positive.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558); Bach 2017 (JMLR 18), optimised sampling.
    """
    matrix = check_covariance(covariance)
    lam = check_number("lam", lam, 0.0, open_low=True)
    values, vectors = scipy.linalg.eigh(matrix)
    values = clip_eigenvalues(values, tolerance)
    if not np.any(values > 0):
        raise ValueError("covariance is zero: no node carries any variance, so leverage scores do not exist")
    scores = np.square(vectors) @ (values / (values + lam))
    return scores / float(np.sum(scores))


def effective_rank(eigenvalues: ArrayLike) -> float:
    """Return the exponential of the entropy of the normalised spectrum: how many equal eigenvalues it resembles.

    exp(-sum_j p_j ln p_j) with p_j = mu_j / sum mu.  Free of any lambda, between 1 and the rank.

    Args:
        eigenvalues: mu of shape (m,), non-negative, not all zero.

    Returns:
        The effective rank, a pure number.

    Raises:
        ValueError: if the spectrum is zero or invalid.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    mu = check_vector("eigenvalues", eigenvalues)
    mu = mu[mu > 0]
    if mu.size == 0:
        raise ValueError("eigenvalues are all zero: the effective rank is undefined")
    shares = mu / float(mu.max())  # divide twice: the sum of huge eigenvalues may overflow
    shares = shares[shares > 0] / float(shares.sum())  # what is 1e308 times smaller than the largest counts nothing
    return float(np.exp(-np.sum(shares * np.log(shares))))


@dataclass(frozen=True)
class PowerLaw(Record):
    """A fitted spectrum mu_j ~ mu0 * j^(-1/beta); a small beta is a fast decay.

    Attributes:
        mu0: fitted scale, in the units of the eigenvalues.
        beta: fitted decay index; the exponent is -1/beta.
        r_squared: share of the variance of log mu_j explained by the line.
        first: first index used in the fit (counting from 1).
        last: last index used in the fit.
        envelope: smallest scale with mu_j <= envelope * j^(-1/beta) for EVERY j; use it, not mu0, in upper bounds.
    """

    mu0: float
    beta: float
    r_squared: float
    first: int
    last: int
    envelope: float


def fit_power_law(eigenvalues: ArrayLike, first: int = 1, last: int | None = None) -> PowerLaw:
    """Fit mu_j = mu0 * j^(-1/beta) by least squares of log mu_j on log j.

    Args:
        eigenvalues: mu of shape (m,), non-negative; sorted here in descending order.
        first: first index used, counting from 1.
        last: last index used; by default, and at most, the last positive eigenvalue.

    Returns:
        The fitted `PowerLaw`, with the envelope that turns it into an upper bound.

    Raises:
        ValueError: if fewer than two positive eigenvalues remain, or the spectrum does not decay.

    Source: ordinary least squares; the envelope is derived here.
    """
    mu = np.sort(check_vector("eigenvalues", eigenvalues))[::-1]
    rank = int(np.count_nonzero(mu))
    stop = rank if last is None else min(int(last), rank)
    if first < 1 or stop - first < 1:
        raise ValueError(
            f"a power law needs two positive eigenvalues: first={first}, last={last} leave the indices "
            f"{first}..{stop} of {rank} positive ones; widen the range"
        )
    index = np.arange(first, stop + 1, dtype=np.float64)
    x, y = np.log(index), np.log(mu[first - 1 : stop])
    slope, intercept = np.polyfit(x, y, 1)
    # A flat spectrum fits with a slope of rounding size, which is no decay.
    if slope >= -1e-12:
        raise ValueError(f"the spectrum does not decay (log-log slope {slope:g}), so no beta > 0 exists")
    spread = float(np.sum((y - y.mean()) ** 2))
    r_squared = 1.0 - float(np.sum((y - slope * x - intercept) ** 2)) / spread
    everywhere = np.log(mu[:rank]) - slope * np.log(np.arange(1, rank + 1))
    # One rounding step up, so that the envelope dominates in float64 as well.
    envelope = float(np.exp(everywhere.max()) * (1 + 1e-12))
    return PowerLaw(float(np.exp(intercept)), float(-1 / slope), r_squared, first, stop, envelope)


def power_law_degrees_of_freedom(mu0: float, beta: float, lam: float) -> float:
    """Return the closed-form ceiling on the degrees of freedom of a power-law spectrum.

    If mu_j <= mu0 * j^(-1/beta) for all j >= 1 (any number of nodes) and 0 < beta < 1, then
    N(lambda) <= integral_0^inf dx / (1 + (lambda/mu0) x^(1/beta)) = pi*beta/sin(pi*beta) * (mu0/lambda)^beta.

    Args:
        mu0: scale, positive, in the units of lambda (take `PowerLaw.envelope` to get an upper bound).
        beta: decay index in (0, 1).
        lam: regularisation, positive.

    Returns:
        The ceiling on N(lambda), a pure number; inf where it exceeds float64.

    Raises:
        ValueError: if beta >= 1 (the integral diverges: use the finite sum `degrees_of_freedom`), or an input is
            not positive.

    Source: rate as in Suzuki et al. 2018/2020 (arXiv:1808.08558); the exact constant is derived here.
    """
    mu0 = check_number("mu0", mu0, 0.0, open_low=True)
    lam = check_number("lam", lam, 0.0, open_low=True)
    beta = check_number("beta", beta, 0.0, open_low=True)
    if beta >= 1:
        raise ValueError(f"beta must be below 1, got {beta:g}: the infinite sum diverges; use degrees_of_freedom")
    exponent = beta * (math.log(mu0) - math.log(lam))
    factor = math.pi * beta / math.sin(math.pi * beta)
    logarithm = math.log(factor) + exponent
    return factor * math.exp(exponent) if logarithm < math.log(sys.float_info.max) else math.inf
