"""Measures ranked by how well they predict the generalization gap, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from specprune._records import format_table, to_json
from specprune.analysis.correlation import (
    ConditionalInformation,
    conditional_mutual_information,
    environment_errors,
    environments,
    granulated_by_hyperparameter,
    kendall_tau,
)
from specprune.analysis.measure_table import Changes, IntArray, MeasureTable, single_changes
from specprune.bounds.bound import FloatArray, check_count, check_number

_STATISTICS = ("tau", "psi", "information", "mean_error", "percentile_90", "maximum")


@dataclass(frozen=True)
class Estimate:
    """A number and an interval.

    Attributes:
        value: as observed.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class MeasureScore:
    """How well one measure predicts the gap.

    Attributes:
        measure: its name.
        tau: Kendall's tau over all pairs.
        psi: granulated tau.
        information: conditional mutual information.
        mean_error: mean sign error over environments.
        percentile_90: 90th percentile of the sign errors.
        maximum: largest sign error, the robust one.
        worst: the hyperparameter that changes in the environment with the largest error.
        given: the hyperparameters that leave the measure the least information.
        psi_by_hyperparameter: the terms of psi.
    """

    measure: str
    tau: Estimate
    psi: Estimate
    information: Estimate
    mean_error: Estimate
    percentile_90: Estimate
    maximum: Estimate
    worst: str
    given: tuple[str, ...]
    psi_by_hyperparameter: Mapping[str, float]


@dataclass(frozen=True)
class MeasureRanking:
    """Measures, the one with the smallest largest sign error first; ties are broken by percentile_90, then the mean.

    Attributes:
        scores: one a measure.
        networks: how many.
        environments: how many the sign errors are taken over.
        level: of the intervals.
    """

    scores: tuple[MeasureScore, ...]
    networks: int
    environments: int
    level: float

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a measure, intervals as `_low` and `_high`."""
        records = []
        for score in self.scores:
            record: dict[str, Any] = {"measure": score.measure}
            for name in _STATISTICS:
                estimate = getattr(score, name)
                record |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            record |= {"worst": score.worst, "given": " ".join(score.given)}
            records.append(record | {f"psi_{name}": psi for name, psi in score.psi_by_hyperparameter.items()})
        return records

    def to_json(self) -> str:
        """Return everything as JSON."""
        counts = {name: getattr(self, name) for name in ("networks", "environments", "level")}
        return to_json(counts | {"scores": self.to_records()})

    def __str__(self) -> str:
        rows = [
            {"measure": score.measure}
            | {name: str(getattr(score, name)) for name in _STATISTICS}
            | {"worst": score.worst}
            for score in self.scores
        ]
        title = f"{self.networks} networks, {self.environments} environments, {100 * self.level:g} % intervals"
        return format_table(rows, title=title)


def rank_measures(
    table: MeasureTable,
    *,
    pooled: bool = False,
    effective_pairs: float = 12.0,
    resamples: int = 400,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> MeasureRanking:
    """Rank measures by how rarely they are wrong about the effect of one hyperparameter, at worst.

    Intervals are value +- z standard errors, cut to the range of the statistic.  Standard errors are those of the
    bootstrap over networks: each resample draws as many networks with replacement, as if they were a sample of a
    larger zoo, and takes no network as a partner of itself; the environments are those of the whole table.  Percentiles
    of the resamples would not do: with fewer distinct pairs an environment, extreme errors become more extreme, often
    past the observed ones.  For the same reason the intervals of the maximum are a rough guide.  The conditional mutual
    information, whose bootstrap would take a pass over all pairs a resample, has the jackknife's standard error.

    Args:
        table: the networks.
        pooled: as for `sign_error`.
        effective_pairs: as for `sign_error`.
        resamples: how many.
        level: of the intervals.
        seed: of the resampling, or a generator.

    Returns:
        All measures of the table, ranked.

    Raises:
        ValueError: no environment is left, or an argument is out of range.

    Source: Jiang et al. 2019 (arXiv:1912.02178); Dziugaite et al. 2020 (arXiv:2010.11924); for the jackknife and the
        bootstrap, Efron 1982.
    """
    check_count("resamples", resamples, 2)
    check_number("level", level, 0, 1, open_low=True, open_high=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(table), np.full(len(table), 1 / len(table)), size=resamples)
    counts = np.concatenate([np.ones((1, len(table)), dtype=np.int64), drawn])  # the first are the networks as they are
    changes = single_changes(table, pooled=pooled)
    kept, _ = environments(changes, effective_pairs)
    scores = [_score(table, name, changes, kept, counts, level) for name in table.measures]
    scores.sort(key=lambda score: (score.maximum.value, score.percentile_90.value, score.mean_error.value))
    return MeasureRanking(tuple(scores), len(table), len(kept), level)


def _score(
    table: MeasureTable, measure: str, changes: Changes, kept: IntArray, counts: IntArray, level: float
) -> MeasureScore:
    names, mu = list(table.hyperparameters), table.column(measure)
    rows = (np.repeat(np.arange(len(table)), each) for each in counts)
    taus = np.array([kendall_tau(mu[each], table.gap[each]) for each in rows])
    psi = granulated_by_hyperparameter(table, measure, changes, counts)
    errors = list(environment_errors(table, measure, changes, kept, counts))
    spread = np.array([_summary(row) for some in errors for row in some])
    information = conditional_mutual_information(table, measure)
    return MeasureScore(
        measure=measure,
        tau=_estimate(taus, level, -1),
        psi=_estimate(np.array([_summary(row)[0] for row in psi]), level, -1),
        information=_jackknife(information, level),
        mean_error=_estimate(spread[:, 0], level),
        percentile_90=_estimate(spread[:, 1], level),
        maximum=_estimate(spread[:, 2], level),
        worst=names[changes.environment_hyperparameter[kept][int(errors[0][0].argmax())]],
        given=information.given,
        psi_by_hyperparameter={name: float(v) for name, v in zip(names, psi[0], strict=True) if np.isfinite(v)},
    )


def _summary(values: FloatArray) -> tuple[float, float, float]:
    """Mean, 90th percentile and maximum of what a resample left pairs in."""
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan, math.nan
    return float(known.mean()), float(np.percentile(known, 90)), float(known.max())


def _estimate(values: FloatArray, level: float, lowest: float = 0) -> Estimate:
    """The observed value, which comes first, with the standard deviation of the resampled ones."""
    drawn = values[1:][np.isfinite(values[1:])]
    # With a handful of networks, few resamples have a pair, perhaps none.
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else math.inf
    return _around(float(values[0]), error, level, lowest)


def _jackknife(information: ConditionalInformation, level: float) -> Estimate:
    without = information.without
    return _around(information.value, math.sqrt((len(without) - 1) * without.var()), level, 0)


def _around(value: float, error: float, level: float, lowest: float) -> Estimate:
    reach = float(norm.ppf((1 + level) / 2)) * error
    return Estimate(value, max(lowest, value - reach), min(1.0, value + reach))
