"""Test risk of pruned least squares: by size, by importance, by an oracle; as it is, and fitted again.

By the law in `overparameterized`, pruning sees h_i ~ N(theta_i, gamma / n), and the solution has beta_hat_i = t_i h_i /
sqrt(variances_i).  Keeping the s largest of |beta_hat_i| ("magnitude") or of sqrt(variances_i) |beta_hat_i| ("hessian")
keeps D_i = {|h_i| > a_i}, with a_i = lambda sqrt(variances_i) / t_i or lambda / t_i, and lambda such that sum P(D_i) is
s.  With M_j = E[h^j; D],

    risk = sigma_k^2 + sum_i [theta_i^2 (1 - M_0) + t_i^2 M_2 - 2 t_i theta_i M_1 + theta_i^2 M_0].

Fitted again, "fresh" means on n new examples, "refit" on the same ones.  The same examples have chosen the features, so
that the choice leans on their noise: near the peak the refit costs more than on new examples, far beyond it less.  Its
closed form follows from two stages of approximate message passing: the second denoiser 1[D] t' (h + b eta(h)) sees the
first stage's field, and its Onsager term holds the density at the threshold.

"hessian" takes the features' true deviations.  Those of n examples differ by a share of 1 / sqrt(2n), which decides
among features that are otherwise equal to within less.

Source: Chang, Li, Oymak and Thrampoulidis 2021 (arXiv:2012.08749) for pruning; the refit on the same examples and the
arrangement in tail moments are derived here.  All are checked by simulation (tests/test_overparameterized.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from specprune._records import format_table, to_json
from specprune.bounds.bound import FloatArray
from specprune.bounds.overparameterized import (
    IntArray,
    LeastSquaresLaw,
    LinearProblem,
    check_sizes,
    find_roots,
    free_share,
    least_squares_law,
    ridge_of_least_norm,
    shrinkage_of,
)

MAGNITUDE, HESSIAN = "magnitude", "hessian"
RULES = (MAGNITUDE, HESSIAN)
_AT_ONCE = 1 << 21  # rows times features
_MISSED = 1e-6  # of the wanted number of features
_LARGEST_DENSITY = 0.8  # 2 / sqrt(2 pi), rounded up


@dataclass(frozen=True, eq=False)
class PrunedRisks:
    """Test risks E (y - x . beta_hat)^2, noise included, one row for each size k and kept number s; shape (rows,) each.

    Attributes:
        size: k, features that were trained on.
        keep: s, features that are kept.
        unpruned: of least squares on k features.
        magnitude: after keeping the s largest coefficients.
        hessian: after keeping the s largest of coefficient times the feature's deviation.
        oracle: after keeping the s features of the first k with the largest variance times squared true coefficient.
        magnitude_refit: as `magnitude`, fitted again on the same examples.
        hessian_refit: as `hessian`, fitted again on the same examples.
        magnitude_fresh: as `magnitude`, fitted again on as many new examples.
        hessian_fresh: as `hessian`, fitted again on as many new examples.
        oracle_refit: least squares on the oracle's features alone: "train small, with the right features known".
    """

    size: IntArray
    keep: IntArray
    unpruned: FloatArray
    magnitude: FloatArray
    hessian: FloatArray
    oracle: FloatArray
    magnitude_refit: FloatArray
    hessian_refit: FloatArray
    magnitude_fresh: FloatArray
    hessian_fresh: FloatArray
    oracle_refit: FloatArray

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a row."""
        names = [field.name for field in fields(self)]
        columns = [getattr(self, name).tolist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def to_json(self) -> str:
        """Return all rows as JSON."""
        return to_json(self.to_records())

    def __str__(self) -> str:
        return format_table(self.to_records(), title="test risk of least squares, pruned and fitted again")


METHODS = tuple(field.name for field in fields(PrunedRisks) if field.name not in ("size", "keep"))


def pruned_risks(problem: LinearProblem, sizes: ArrayLike, keep: ArrayLike) -> PrunedRisks:
    """Return the test risks of all ways to prune least squares, for several sizes.

    Args:
        problem: what is learnt.
        sizes: k, features that are trained on; scalar or shape (rows,).
        keep: s, how many are kept, at most k; scalar or shape (rows,).

    Returns:
        One row for each pair; `sizes` and `keep` are repeated to the same length.

    Raises:
        ValueError: k or s out of range; k or s equal to n, where a risk is not finite.

    Source: see the module.
    """
    kept = check_sizes(keep, problem.features, problem.n, "keep")
    size = check_sizes(sizes, problem.features, problem.n)
    try:
        size, kept = (row.copy() for row in np.broadcast_arrays(size, kept))
    except ValueError:
        raise ValueError(
            f"{len(size)} sizes and {len(kept)} numbers to keep: expected one of either, or as many"
        ) from None
    if (kept > size).any():
        first = int((kept > size).argmax())
        raise ValueError(f"keep = {kept[first]} of size = {size[first]} features; expected at most as many")
    blocks = math.ceil(len(size) * problem.features / _AT_ONCE)
    parts = [
        _risks(problem, *rows) for rows in zip(np.array_split(size, blocks), np.array_split(kept, blocks), strict=True)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in METHODS}
    return PrunedRisks(size=size, keep=kept, **found)


def _risks(problem: LinearProblem, size: IntArray, keep: IntArray) -> dict[str, FloatArray]:
    law = least_squares_law(problem, size)
    mask = oracle_support(problem, size, keep)
    found: dict[str, FloatArray] = {"unpruned": law.gamma, "oracle": _masked_risk(law, mask)}
    for rule in RULES:
        chosen = _choose(law, keep, rule)
        found[rule] = _pruned_risk(law, chosen)
        found[f"{rule}_refit"] = _refit_risk(law, chosen)
        found[f"{rule}_fresh"] = _support_risk(problem, chosen.m0)
    found["oracle_refit"] = _support_risk(problem, mask.astype(np.float64))
    return found


def trained_small_risk(problem: LinearProblem, keep: int) -> float:
    """Return the risk of least squares on the s features, of all P, that carry most of the signal.

    Args:
        problem: what is learnt.
        keep: s, from 1 to P, but n.

    Raises:
        ValueError: another number.

    Source: standard; the fixed point of `overparameterized` on those features.
    """
    rows = check_sizes(keep, problem.features, problem.n, "keep")
    mask = oracle_support(problem, np.full(1, problem.features), rows)
    return float(_support_risk(problem, mask.astype(np.float64))[0])


def oracle_support(problem: LinearProblem, sizes: IntArray, keep: IntArray) -> NDArray[np.bool_]:
    """Return which s of the first k features carry most of the signal, ties to the first; shape (rows, P)."""
    energy = np.where(np.arange(problem.features) < sizes[:, None], problem.signal**2, -1.0)
    return _largest(energy, keep)


def _largest(values: FloatArray, keep: IntArray) -> NDArray[np.bool_]:
    ranks = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(ranks < keep[:, None])


@dataclass(frozen=True, eq=False)
class _Choice:
    """Which h lead to a kept feature: |h| > a; arrays of shape (rows, P).

    Attributes:
        threshold: a.
        m0: P(D).
        m1: E[h; D].
        m2: E[h^2; D].
        above: density of h at a.
        below: density of h at -a.
    """

    threshold: FloatArray
    m0: FloatArray
    m1: FloatArray
    m2: FloatArray
    above: FloatArray
    below: FloatArray


def _fixed(law: LeastSquaresLaw, mask: NDArray[np.bool_]) -> _Choice:
    """Return the choice of given features, whatever h is."""
    theta = law.problem.signal
    zeros = np.zeros(mask.shape)
    variance = (law.gamma / law.problem.n)[:, None]
    return _Choice(zeros, mask.astype(np.float64), mask * theta, mask * (theta**2 + variance), zeros, zeros)


def _choose(law: LeastSquaresLaw, keep: IntArray, rule: str) -> _Choice:
    """Return the choice of the `keep` largest in expectation, by a rule."""
    problem, used = law.problem, law.used
    # Where nothing is pruned, and where the solution is certain, the choice is.
    scores = np.abs(law.mean) * (1.0 if rule == MAGNITUDE else np.sqrt(problem.variances))
    certain = _fixed(law, _largest(np.where(used, scores, -1.0), keep))
    rows = np.flatnonzero((keep < law.sizes) & (law.gamma > 0))
    if not rows.size:
        return certain
    part, theta = used[rows], problem.signal
    deviation = np.sqrt(law.gamma[rows] / problem.n)[:, None]
    shrinkage = np.where(part, law.shrinkage[rows], 1.0)
    scale = (np.sqrt(problem.variances) if rule == MAGNITUDE else 1.0) / shrinkage
    wanted = keep[rows].astype(np.float64)

    def excess(log_lambda: FloatArray, row: FloatArray) -> FloatArray:
        own = row.astype(np.int64)
        limit = np.exp(log_lambda)[:, None] * scale[own]
        inside = ndtr((limit - theta) / deviation[own]) - ndtr((-limit - theta) / deviation[own])
        return ((1 - inside) * part[own]).sum(1) - wanted[own]

    # P(|h| <= a) <= 2 a x largest density, and a union bound, enclose the root.
    count = law.sizes[rows].astype(np.float64)
    low = np.log((count - wanted) * deviation[:, 0] / (_LARGEST_DENSITY * (scale * part).sum(1)))
    far = np.abs(theta) - ndtri(wanted / (2 * count))[:, None] * deviation
    high = np.log(np.where(part, far / scale, 0.0).max(1))
    threshold = np.exp(find_roots(excess, low, high, np.arange(len(rows))))[:, None] * scale
    moments = _tail_moments(theta, deviation, threshold)
    # Where h is certain to within rounding, no threshold parts features that are equal: the certain choice does.
    met = np.abs((moments[0] * part).sum(1) - wanted) <= _MISSED * wanted
    found = []
    for field, new in zip(fields(_Choice), (threshold, *moments), strict=True):
        array = getattr(certain, field.name).copy()
        array[rows[met]] = (new * part)[met]
        found.append(array)
    return _Choice(*found)


def _tail_moments(mean: FloatArray, deviation: FloatArray, threshold: FloatArray) -> tuple[FloatArray, ...]:
    """Return E[h^j; |h| > a] for j = 0, 1, 2, and the densities at a and -a, for h ~ N(mean, deviation^2)."""
    upper, lower = (threshold - mean) / deviation, (threshold + mean) / deviation
    above, below = (np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi) for u in (upper, lower))
    right, left = ndtr(-upper), ndtr(-lower)
    m0 = right + left
    m1 = mean * m0 + deviation * (above - below)
    m2 = (mean**2 + deviation**2) * m0 + deviation * ((mean + threshold) * above + (threshold - mean) * below)
    return m0, m1, m2, above / deviation, below / deviation


def _masked_risk(law: LeastSquaresLaw, mask: NDArray[np.bool_]) -> FloatArray:
    theta, n = law.problem.signal, law.problem.n
    inside = law.lack**2 * theta**2 + (law.gamma / n)[:, None] * law.shrinkage**2
    return law.problem.noise + np.where(mask, inside, theta**2).sum(1)


def _pruned_risk(law: LeastSquaresLaw, choice: _Choice) -> FloatArray:
    theta, t = law.problem.signal, law.shrinkage
    return law.problem.noise + (theta**2 + t**2 * choice.m2 - 2 * t * theta * choice.m1).sum(1)


def _support_risk(problem: LinearProblem, share: FloatArray) -> FloatArray:
    """Least squares on features that others than these examples have chosen, each with a probability (rows, P)."""
    theta = problem.signal
    c = ridge_of_least_norm(problem.variances, share, problem.n)
    t, lack = shrinkage_of(problem.variances, c)
    left = problem.noise + (theta**2 * (1 - share)).sum(1) + (share * lack**2 * theta**2).sum(1)
    return left / free_share(share, t, lack, c, problem.n)


def _refit_risk(law: LeastSquaresLaw, choice: _Choice) -> FloatArray:
    """Least squares on features that the same examples have chosen: two stages of approximate message passing.

    C is the covariance of the two stages' residuals, b the coefficient of the first stage's solution in the second
    denoiser; both follow from two linear equations.
    """
    problem, theta, t, lack = law.problem, law.problem.signal, law.shrinkage, law.lack
    n, a = problem.n, choice.threshold
    certain = law.gamma == 0
    gamma = np.where(certain, 1.0, law.gamma)[:, None]
    c = ridge_of_least_norm(problem.variances, choice.m0, n)
    again, lack_again = shrinkage_of(problem.variances, c)
    # Moments of h - theta on D, without subtracting large numbers: E[h - theta; D] and E[(h - theta)^2; D].
    both = choice.above + choice.below
    first = gamma / n * (choice.above - choice.below)
    second = gamma / n * (choice.m0 + (a - theta) * choice.above + (a + theta) * choice.below)
    plain = -lack * theta * choice.m0 + t * first  # E[t h - theta; D]
    outside = -lack * theta * (1 - choice.m0) - t * first  # E[t h - theta; not D]
    centred = -lack * theta * first + t * second  # E[(h - theta) (t h - theta); D]
    product = centred + theta * plain  # E[h (t h - theta); D]
    a0 = problem.noise + (-theta * outside - lack_again * theta * plain).sum(1)
    a1 = (again * centred / gamma).sum(1)
    a2 = -(again * lack * product).sum(1)
    b0 = (again * theta * (choice.above - choice.below)).sum(1) / n
    b1 = (again / gamma * (choice.above * (a - theta) + choice.below * (a + theta))).sum(1) / n
    b2 = (again * (t * choice.m0 - lack * a * both)).sum(1) / n
    matrix = np.stack([np.stack([1 - a1, -a2], 1), np.stack([-b1, 1 - b2], 1)], 1)
    solution = np.linalg.solve(matrix, np.stack([a0, b0], 1)[:, :, None])[:, :, 0]
    covariance, carried = solution[:, :1], solution[:, 1:]
    slope = again * (covariance / gamma - carried * lack)
    constant = -lack_again * theta - again * carried * lack * theta
    error = constant**2 * choice.m0 + 2 * constant * slope * first + slope**2 * second
    left = problem.noise + (theta**2 * (1 - choice.m0)).sum(1) + error.sum(1)
    share = (again**2 * choice.m0).sum(1) / n
    found = (left - share * (covariance**2 / gamma)[:, 0]) / free_share(choice.m0, again, lack_again, c, n)
    return np.where(certain, _support_risk(problem, choice.m0), found)
