"""Does a measure predict the generalization gap?  Rank correlations and sign errors over a table of networks.

Every statistic asks about pairs of networks: does the one with the larger measure have the larger gap?  They differ in
the pairs that they ask about.  All pairs: `kendall_tau`.  Pairs that differ in one hyperparameter only: `granulated`
(average over hyperparameters) and `sign_error` (worst case over environments).  Pairs by the settings of two
hyperparameters: `conditional_mutual_information`.  Intervals and rankings are in `specprune.analysis.measure_ranking`.

Ties of a measure count as half right, half wrong, everywhere: a constant measure has tau = psi = information = 0 and
sign error 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import xlogy
from scipy.stats import kendalltau

from specprune.analysis.measure_table import Changes, IntArray, MeasureTable, single_changes
from specprune.bounds.bound import FloatArray, check_number, check_vector

_ROWS = 256  # networks whose pairs are looked at together
_PRODUCTS = 4_000_000  # of pairs and resamples that are weighted together; both bound the memory
_SIGNS = (1, 0, -1)  # of a measure's difference; reversed, they are the signs of the same pairs seen from the other end


def kendall_tau(measure: ArrayLike, gap: ArrayLike) -> float:
    """Return by how much more often a measure orders two networks rightly than wrongly, from -1 to 1.

    tau_b = (C - D) / sqrt((C + D + T_m) (C + D + T_g)), with C pairs ordered rightly, D wrongly, T_m tied in the
    measure only and T_g in the gap only; 0 if all are tied.

    Args:
        measure: of shape (networks,).
        gap: of shape (networks,).

    Raises:
        ValueError: not two finite vectors of one length of at least two.

    Source: Kendall 1945; without ties, tau of Jiang et al. 2019 (arXiv:1912.02178).
    """
    mu, g = check_vector("measure", measure, low=-np.inf), check_vector("gap", gap, low=-np.inf)
    if len(mu) != len(g) or len(g) < 2:
        raise ValueError(f"measure and gap have {len(mu)} and {len(g)} entries; expected the same number, at least two")
    if np.ptp(mu) == 0 or np.ptp(g) == 0:
        return 0.0
    return float(kendalltau(mu, g).statistic)


@dataclass(frozen=True)
class Granulated:
    """The granulated Kendall coefficient.

    Attributes:
        psi: mean over the hyperparameters, from -1 to 1.
        by_hyperparameter: mean over the settings of the others; hyperparameters that never change alone are missing.
    """

    psi: float
    by_hyperparameter: dict[str, float]


def granulated(table: MeasureTable, measure: str) -> Granulated:
    """Return how well a measure orders networks that differ in one hyperparameter, averaged over hyperparameters.

    psi = mean over i of psi_i, psi_i = mean over cells of tau, tau = mean over the pairs of a cell of
    sgn(mu_a - mu_b) sgn(g_a - g_b), where a cell has all networks that agree in every hyperparameter but i.  Repeats
    are not paired with each other: such a pair says nothing about i.  Cells without a pair (fewer than two settings
    of i) are left out, and so are hyperparameters without a cell.

    Args:
        table: the networks.
        measure: name of the measure.

    Raises:
        ValueError: no such measure, or no two networks that differ in exactly one hyperparameter.

    Source: Jiang et al. 2019 (arXiv:1912.02178).
    """
    changes = single_changes(table)
    values = granulated_by_hyperparameter(table, measure, changes, np.ones((1, len(table))))[0]
    seen = {name: float(v) for name, v in zip(table.hyperparameters, values, strict=True) if np.isfinite(v)}
    return Granulated(float(np.mean(list(seen.values()))), seen)


def granulated_by_hyperparameter(
    table: MeasureTable, measure: str, changes: Changes, counts: NDArray[np.generic]
) -> FloatArray:
    """Return psi_i when networks occur several times.

    Args:
        table: the networks.
        measure: name of the measure.
        changes: of `single_changes`.
        counts: how often each network occurs, of shape (resamples, networks).

    Returns:
        Of shape (resamples, hyperparameters), NaN where no pair is left.
    """
    agreement = 1 - 2 * _sign_errors(table, measure, changes)
    number = len(changes.cell_hyperparameter)
    cells = _group_means(changes, changes.cell, number, agreement, np.ones(len(agreement)), counts)
    onehot = np.eye(len(table.hyperparameters))[changes.cell_hyperparameter]
    return np.concatenate([_row_means(means, onehot) for means in cells])


def _row_means(values: FloatArray, onehot: FloatArray) -> FloatArray:
    """Means by group of the entries that are numbers, of shape (rows, groups)."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: FloatArray = (np.where(known, values, 0) @ onehot) / (known @ onehot)
    return means


def _sign_errors(table: MeasureTable, measure: str, changes: Changes) -> FloatArray:
    mu, a, b = table.column(measure), changes.first, changes.second
    return (1 - np.sign(mu[a] - mu[b]) * np.sign(table.gap[a] - table.gap[b])) / 2


def _group_means(
    changes: Changes, group: IntArray, groups: int, values: FloatArray, weights: FloatArray, counts: NDArray[np.generic]
) -> Iterator[FloatArray]:
    """Weighted means by group of values of pairs, some resamples at a time, of shape (resamples, groups)."""
    where = (group, np.arange(len(group)))
    total = csr_array((weights, where), shape=(groups, len(group)))
    summed = csr_array((weights * values, where), shape=(groups, len(group)))
    rows = max(1, _PRODUCTS // len(group))
    for start in range(0, len(counts), rows):
        some = np.asarray(counts[start : start + rows], dtype=np.float64).T
        pairs = some[changes.first] * some[changes.second]
        with np.errstate(invalid="ignore"):
            yield ((summed @ pairs) / (total @ pairs)).T


@dataclass(frozen=True, eq=False)
class SignErrors:
    """How often a measure orders two networks wrongly, by environment.

    Attributes:
        errors: of shape (environments,), from 0 (always right) over 1/2 (a coin) to 1.
        hyperparameters: what changes in each environment.
        effective_pairs: (sum w)^2 / sum w^2 of each environment.
        mean: over environments.
        percentile_90: over environments.
        maximum: over environments, the robust error.
    """

    errors: FloatArray
    hyperparameters: tuple[str, ...]
    effective_pairs: FloatArray

    @property
    def mean(self) -> float:
        """Mean over environments."""
        return float(self.errors.mean())

    @property
    def percentile_90(self) -> float:
        """90th percentile over environments."""
        return float(np.percentile(self.errors, 90))

    @property
    def maximum(self) -> float:
        """Maximum over environments."""
        return float(self.errors.max())


def sign_error(table: MeasureTable, measure: str, *, pooled: bool = False, effective_pairs: float = 12.0) -> SignErrors:
    """Return how often a measure says wrongly which way the gap moves when one hyperparameter is changed.

    error(e) = sum w l / sum w over the pairs of environment e, l = (1 - sgn(mu_a - mu_b) sgn(g_a - g_b)) / 2, with
    (`noise_weight` - 1/2)_+ for w, or 1 if the table has no n_test.  The pairs of an environment are all repeats of
    one configuration against all repeats of another that differs in one hyperparameter.

    Args:
        table: the networks.
        measure: name of the measure.
        pooled: pool the pairs with the same change of the same hyperparameter, whatever the other settings; for
            zoos with few repeats, whose environments would hold a few pairs each.
        effective_pairs: smallest effective number of pairs, (sum w)^2 / sum w^2, of environments to report; the
            default is the paper's.

    Returns:
        Errors of the environments that are left.

    Raises:
        ValueError: no such measure, effective_pairs below 1, or no environment is left.

    Source: Dziugaite et al. 2020 (arXiv:2010.11924), and the authors' code.
    """
    changes = single_changes(table, pooled=pooled)
    kept, size = environments(changes, effective_pairs)
    errors = environment_errors(table, measure, changes, kept, np.ones((1, len(table))))
    names = list(table.hyperparameters)
    which = changes.environment_hyperparameter[kept]
    return SignErrors(np.concatenate(list(errors))[0], tuple(names[i] for i in which), size)


def environments(changes: Changes, effective_pairs: float) -> tuple[IntArray, FloatArray]:
    """Return which environments have enough pairs, and their effective numbers of pairs.

    Args:
        changes: of `single_changes`.
        effective_pairs: smallest effective number of pairs.

    Raises:
        ValueError: effective_pairs below 1, or none is left.
    """
    check_number("effective_pairs", effective_pairs, 1)
    weight, place = changes.noise_weight, changes.environment
    total, square = np.bincount(place, weight), np.bincount(place, weight**2)
    size = np.divide(total**2, square, out=np.zeros_like(total), where=square > 0)
    kept = np.flatnonzero(size >= effective_pairs * (1 - 1e-9))
    if not len(kept):
        raise ValueError(
            f"no environment has {effective_pairs:g} effective pairs, the largest has {size.max():.3g}: train more "
            "repeats, pool the environments, or ask for fewer pairs"
        )
    return kept, size[kept]


def environment_errors(
    table: MeasureTable, measure: str, changes: Changes, kept: IntArray, counts: NDArray[np.generic]
) -> Iterator[FloatArray]:
    """Yield the sign errors by environment when networks occur several times, some resamples at a time.

    Args:
        table: the networks.
        measure: name of the measure.
        changes: of `single_changes`.
        kept: which environments, of `environments`.
        counts: how often each network occurs, of shape (resamples, networks).

    Yields:
        Arrays of shape (some resamples, environments), NaN where no pair is left.
    """
    errors, number = _sign_errors(table, measure, changes), len(changes.environment_hyperparameter)
    for means in _group_means(changes, changes.environment, number, errors, changes.noise_weight, counts):
        yield means[:, kept]


@dataclass(frozen=True, eq=False)
class ConditionalInformation:
    """Normalised mutual information of a measure and the gap.

    Attributes:
        value: from 0 (the settings tell all that the measure tells) to 1 (the measure tells the order of the gaps).
        given: the hyperparameters that leave the measure the least.
        without: the value without one of the networks, of shape (networks,).
    """

    value: float
    given: tuple[str, ...]
    without: FloatArray


def conditional_mutual_information(table: MeasureTable, measure: str) -> ConditionalInformation:
    """Return how much a measure tells about the order of two gaps to one who knows any two hyperparameters of both.

    K = min over |S| <= 2 of I(V_mu; V_g | U_S) / H(V_g | U_S), where V are the signs of the differences over ordered
    pairs of networks and U_S the settings of the hyperparameters in S of both networks; frequencies for
    probabilities, cells U_S weighted by their numbers of pairs.  Pairs with equal gaps have no order to tell and are
    left out, and so are S that leave nothing to tell (H = 0); equal measures are a third sign.  Cells of few pairs bias
    the information upwards.

    Args:
        table: the networks.
        measure: name of the measure.

    Raises:
        ValueError: no such measure.

    Source: Jiang et al. 2019 (arXiv:1912.02178).
    """
    mu, codes, names = table.column(measure), table.codes(), list(table.hyperparameters)
    choices = [chosen for size in range(3) for chosen in combinations(range(len(names)), size)]
    groups = [np.unique(_joined(codes, chosen), return_inverse=True)[1] for chosen in choices]
    onehots = [np.eye(int(group.max()) + 1, dtype=np.float32)[group] for group in groups]
    as_larger, as_smaller = _partners(mu, table.gap, np.concatenate(onehots, axis=1))
    splits = np.cumsum([onehot.shape[1] for onehot in onehots])[:-1]
    larger, smaller = np.split(as_larger, splits, axis=2), np.split(as_smaller, splits, axis=2)
    scores = np.stack([_scores(*item) for item in zip(groups, larger, smaller, strict=True)])
    least = scores.min(axis=0)
    given = choices[int(scores[:, 0].argmin())]
    # All gaps tied: no S has anything to tell.
    least = np.where(np.isfinite(least), least, 0)
    return ConditionalInformation(float(least[0]), tuple(names[i] for i in given), least[1:])


def _joined(codes: IntArray, chosen: tuple[int, ...]) -> IntArray:
    """One number for the settings of one or two hyperparameters together."""
    joined = np.zeros(len(codes), dtype=np.int64)
    for which in chosen:
        joined = joined * len(codes) + codes[:, which]
    return joined


def _partners(mu: FloatArray, gap: FloatArray, onehot: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Count each network's partners with smaller gaps, and with larger gaps, by sign of the measure and by group.

    The sign is always that of the network with the larger gap minus the other.  Shapes (signs, networks, groups).
    """
    below, above = (np.empty((3, len(gap), onehot.shape[1])) for _ in range(2))
    for start in range(0, len(gap), _ROWS):
        rows = slice(start, start + _ROWS)
        order = np.sign(mu[rows, None] - mu)
        wider, narrower = gap[rows, None] > gap, gap[rows, None] < gap
        for k, sign in enumerate(_SIGNS):
            below[k, rows] = (wider & (order == sign)).astype(np.float32) @ onehot
            above[k, rows] = (narrower & (order == -sign)).astype(np.float32) @ onehot
    return below, above


def _scores(group: IntArray, below: FloatArray, above: FloatArray) -> FloatArray:
    """I / H given one S: of all networks, then without each of them; inf where H = 0."""
    size = below.shape[2]
    table = np.stack([np.eye(size)[group].T @ each for each in below])  # [sign, group of larger gap, of smaller]
    whole = _information(table, table.transpose(0, 2, 1))
    # Without network a, counts change where a's group meets any group: row and column `group[a]` of the table.
    row, column = table[:, group, :], table.transpose(0, 2, 1)[:, group, :]
    own = np.eye(size)[group]
    left = _information(row - below - own * above, column - above - own * below)
    # Off the diagonal, each cell stands for its mirror image as well.
    changed = ((left - _information(row, column)) * (2 - own)).sum(axis=2)
    total = whole.sum(axis=(1, 2))[:, None]
    information, entropy = np.concatenate([total, total + changed], axis=1)
    ratio = np.full(len(entropy), np.inf)
    np.divide(information, entropy, out=ratio, where=entropy > 1e-9 * len(group))
    return ratio.clip(0)


def _information(forward: FloatArray, backward: FloatArray) -> FloatArray:
    """Pairs times I(V_mu; V_g), and pairs times H(V_g), of cells; `backward` counts the pairs seen from the other end.

    Both have shape (signs, ...); returns (2, ...).
    """
    backward = backward[::-1]
    gaps = xlogy(forward.sum(0), forward.sum(0)) + xlogy(backward.sum(0), backward.sum(0))
    total = forward.sum(0) + backward.sum(0)
    signs = xlogy(forward + backward, forward + backward).sum(0)
    joint = (xlogy(forward, forward) + xlogy(backward, backward)).sum(0)
    entropy = xlogy(total, total) - gaps
    return np.stack([joint - signs + entropy, entropy])
