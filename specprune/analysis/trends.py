"""How the bounds move: along sample size, width, depth, label noise and pruning rate, next to the measured gap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import kendalltau
from torch import nn

from specprune._records import format_table, to_json
from specprune.analysis.approximation import output_distance
from specprune.analysis.chain import trace_chain
from specprune.analysis.coded import coded_pac_bayes_bounds, occam_results
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.layer_norms import measure_norms
from specprune.analysis.margin_bounds import input_norm, layer_sizes, with_radius
from specprune.bounds.bound import ORIGINAL, PRUNED, QUANTISED, Bound, check_number
from specprune.bounds.covering import covering_bound, dudley_bound, ramp_loss
from specprune.bounds.norms_pac_bayes import margin_error, neyshabur_2018_bound
from specprune.bounds.norms_rademacher import (
    bartlett_bound,
    golowich_bound,
    neyshabur_2015_bound,
    neyshabur_2019_bound,
)
from specprune.bounds.occam import occam_bound_relaxed
from specprune.compress import CalibrationData

_RESOLVED = 3.0  # standard errors
_COVERS = (covering_bound, dudley_bound)


@dataclass(frozen=True, eq=False)
class TrendPoint:
    """One trained network, and where it lies on one or more axes.

    Args:
        settings: axis to setting, such as {"width": 128, "depth": 2}: a base network is part of every axis.
        model: a trained classifier, a chain.
        train: the labelled training set that the model was trained on, all of it.
        test: labelled samples of the same distribution, not used in training: for networks trained on noisy labels
            these need the same noise, for a bound speaks of the distribution that the training set came from.
        reference: a network of the same shape that was fixed before the data, from which Bartlett's and Neyshabur's
            distances are measured; zero if None.
        original: the network that the model was pruned from; None if it was not pruned.
        original_widths: width of each prunable group before pruning.
        input_radius: bound on ||x|| over all possible inputs; None if it is not known.
    """

    settings: Mapping[str, float]
    model: nn.Module
    train: Iterable[Any]
    test: Iterable[Any]
    reference: nn.Module | None = None
    original: nn.Module | None = None
    original_widths: tuple[int, ...] = ()
    input_radius: float | None = None

    def __post_init__(self) -> None:
        if not self.settings or not all(math.isfinite(setting) for setting in self.settings.values()):
            raise ValueError(f"settings {dict(self.settings)}: expected at least one axis, each with a finite number")


@dataclass(frozen=True)
class TrendRow:
    """One bound on one network, at one place on an axis.

    Attributes:
        axis: what is varied.
        setting: its value.
        bound: the bound.
        samples: size n of the training set.
        train_error: 0-1 error on the training set of the network that the bound speaks of (for bounds on the code: of
            the rounded network).
        test_error: its error on the test set.
        test_samples: size of the test set.
    """

    axis: str
    setting: float
    bound: Bound
    samples: int
    train_error: float
    test_error: float
    test_samples: int

    @property
    def gap(self) -> float:
        """Test error minus training error; chance may make it negative."""
        return self.test_error - self.train_error

    @property
    def gap_deviation(self) -> float:
        """Standard error of the gap as an estimate of true minus training error, from the finite test set."""
        return math.sqrt(self.test_error * (1 - self.test_error) / self.test_samples)


@dataclass(frozen=True)
class Trends:
    """Bounds along axes.

    Attributes:
        rows: axis by axis as they were found, and along each axis by rising setting.
        gamma: the one margin at which all bounds from margins were computed.
        delta: every bound holds by itself with probability at least 1 - delta.
    """

    rows: tuple[TrendRow, ...]
    gamma: float
    delta: float

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes, in the order in which they were found."""
        return tuple(dict.fromkeys(row.axis for row in self.rows))

    def along(self, axis: str) -> dict[str, tuple[TrendRow, ...]]:
        """Return one bound after the other along an axis: name to rows by rising setting."""
        chosen = [row for row in self.rows if row.axis == axis]
        names = dict.fromkeys(row.bound.name for row in chosen)
        return {name: tuple(row for row in chosen if row.bound.name == name) for name in names}

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record for each axis, setting and bound: value, terms, errors of the network it speaks of, gap."""
        return [
            {
                "axis": row.axis,
                "setting": row.setting,
                "bound": row.bound.name,
                "value": row.bound.value,
                "vacuous": row.bound.vacuous,
                "hypotheses_hold": row.bound.valid,
                **{name: row.bound.terms.get(name) for name in ("empirical", "bias", "variance", "confidence")},
                "covers": row.bound.covers,
                "loss": row.bound.loss,
                "samples": row.samples,
                "train_error": row.train_error,
                "test_error": row.test_error,
                "gap": row.gap,
            }
            for row in self.rows
        ]

    def correlations(self) -> list[dict[str, Any]]:
        """Return how each bound moves along each axis, and whether it moves as what it bounds does.

        One record for each axis and bound: "points"; "ratio", the last value over the first; and Kendall's rank
        correlations (1: always in the same direction, -1: always in the opposite one, None: one of the two does not
        move) of the value "with_setting", "with_gap" and "with_test_error".  "gap_resolved" says whether the gap moves
        by more than three standard errors of a difference; if not, its order is mostly chance, and so are
        "with_gap" and "with_test_error".
        """
        records = []
        for axis in self.axes:
            for name, rows in self.along(axis).items():
                values = [row.bound.value for row in rows]
                low, high = (pick(rows, key=lambda row: row.gap) for pick in (min, max))
                records.append(
                    {
                        "axis": axis,
                        "bound": name,
                        "points": len(rows),
                        "ratio": values[-1] / values[0] if math.isfinite(values[0]) else None,
                        "with_setting": _kendall(values, [row.setting for row in rows]),
                        "with_gap": _kendall(values, [row.gap for row in rows]),
                        "with_test_error": _kendall(values, [row.test_error for row in rows]),
                        "gap_resolved": high.gap - low.gap
                        > _RESOLVED * math.hypot(low.gap_deviation, high.gap_deviation),
                    }
                )
        return records

    def to_json(self) -> str:
        """Return margin, confidence, all records and the correlations as JSON."""
        return to_json(
            {
                "gamma": self.gamma,
                "delta": self.delta,
                "records": self.to_records(),
                "correlations": self.correlations(),
            }
        )

    def __str__(self) -> str:
        found = {(record["axis"], record["bound"]): record for record in self.correlations()}
        parts = [
            f"bounds on the error rate, each with probability {1 - self.delta:g}; those from margins at the one margin "
            f"{self.gamma:g}",
            "ratio: last value over first; tau: Kendall's rank correlation with the setting; tau_gap: with the "
            "measured gap of the network that the bound speaks of",
        ]
        for axis in self.axes:
            lines = self.along(axis)
            settings = sorted({row.setting for rows in lines.values() for row in rows})
            # Bounds on the code speak of the rounded networks; the errors shown are those of the networks themselves.
            shown = next(name for name, rows in lines.items() if rows[0].bound.covers != QUANTISED)
            table: list[dict[str, Any]] = [
                {"bound": f"measured: {label}", **{f"{row.setting:g}": getattr(row, name) for row in lines[shown]}}
                for label, name in (("training error", "train_error"), ("test error", "test_error"), ("gap", "gap"))
            ]
            for name, rows in lines.items():
                cells = {f"{row.setting:g}": row.bound.value for row in rows}
                record = found[axis, name]
                moves = {"ratio": record["ratio"], "tau": record["with_setting"], "tau_gap": record["with_gap"]}
                table.append({"bound": name, **cells, **moves})
            title = f"\n{axis}" + (
                "" if found[axis, shown]["gap_resolved"] else "; the gap moves no more than by chance"
            )
            parts.append(
                format_table(table, ["bound", *(f"{x:g}" for x in settings), "ratio", "tau", "tau_gap"], title)
            )
        return "\n".join(parts)


def bound_trends(points: Iterable[TrendPoint], *, gamma: float = 1.0, delta: float = 0.05) -> Trends:
    """Return the bounds that are cheap on networks along axes, with the measured errors beside them.

    - On the network written down in few bits: Occam's bound in kl and square-root form, and the PAC-Bayes forms.
    - From margins: covering (one cover, Dudley), Bartlett 2017, Golowich 2018, Neyshabur 2015, 2018 and, for two
      layers, 2019.  All at the same margin gamma: where a bound may choose its margin, it takes a wider one for
      larger norms, says less and less about the network, and hides the trend.  Norms are rounded up to powers of
      two, the price of choosing them with the data, so bounds on one product of norms move in factors of 2.

    Each bound holds by itself with probability 1 - delta.

    Args:
        points: the networks; taken one by one, so that a generator may train them on the way.
        gamma: margin width in logit units, a power of two, fixed before any of the networks was looked at.
        delta: each bound fails with at most this probability.

    Returns:
        The trends.

    Raises:
        ValueError: there is no network, one is no chain with known Lipschitz constants, the margin is no power of two,
            or unsuitable data.
        TypeError: unlabelled batches.
    """
    gamma = check_number("gamma", gamma, 0.0, open_low=True)
    if math.frexp(gamma)[0] != 0.5:
        raise ValueError(f"gamma must be a power of two, as the bounds round it down to one, got {gamma!r}")
    rows = [row for point in points for row in _rows(point, gamma, delta)]
    if not rows:
        raise ValueError("points holds no network; give at least one TrendPoint")
    axes = list(dict.fromkeys(row.axis for row in rows))
    return Trends(tuple(sorted(rows, key=lambda row: (axes.index(row.axis), row.setting))), gamma, delta)


def _rows(point: TrendPoint, gamma: float, delta: float) -> Iterator[TrendRow]:
    train, test = CalibrationData(point.train), CalibrationData(point.test)
    for model, bounds in (_code_bounds(point, train, delta), _margin_bounds(point, train, gamma, delta)):
        logits, targets = collect_logits(model, train)
        test_logits, test_targets = collect_logits(model, test)
        errors = error_rate(logits, targets), error_rate(test_logits, test_targets)
        for axis, setting in point.settings.items():
            for bound in bounds:
                yield TrendRow(axis, float(setting), bound, len(targets), *errors, len(test_targets))


def _code_bounds(point: TrendPoint, train: CalibrationData, delta: float) -> tuple[nn.Module, list[Bound]]:
    """Return the network rounded to the bits that suit Occam's bound best, and the bounds on it."""
    widths = list(point.original_widths)
    results = occam_results(point.model, train, widths, delta=delta)
    # Above a few nats an example the kl form is 1 up to rounding: the square-root form decides.
    best = min(results.values(), key=lambda result: (result.bound.value, result.train_error + result.complexity))
    length, samples = best.network.code_length(widths), len(collect_logits(best.network.model, train)[1])
    relaxed = occam_bound_relaxed(best.train_error, samples, length, delta)
    return best.network.model, [best.bound, relaxed, *coded_pac_bayes_bounds(best, samples, length, delta)]


def _margin_bounds(
    point: TrendPoint, train: CalibrationData, gamma: float, delta: float
) -> tuple[nn.Module, list[Bound]]:
    """Return the network itself, and the bounds on it from its norms, all at one margin."""
    model, widths = point.model, point.original_widths
    logits, targets = collect_logits(model, train)
    first, distance = logits, 0.0
    if point.original is not None:
        first, _ = collect_logits(point.original, train)
        distance = output_distance(point.original, model, train)[0]
    measured = input_norm(train, model)
    covering: dict[str, Any] = {
        "input_radius": measured if point.input_radius is None else point.input_radius,
        "n": len(targets),
        "gamma": gamma,
        "delta": delta,
        "empirical_ramp": ramp_loss(first, targets, gamma),
        "approximation_error": distance,
        "original_widths": widths,
        "measured_radius": measured,
    }
    sizes = layer_sizes(trace_chain(model, train))
    found = [with_radius(theorem(sizes, **covering), point.input_radius, measured) for theorem in _COVERS]
    norms = measure_norms(model, train, reference=point.reference)
    # Pruned widths were chosen with the data: the bounds hold for all widths 1..m_l at once with these shares of delta.
    share = delta * math.exp(-math.fsum(math.log(width) for width in widths))
    shared: dict[str, Any] = {
        "gamma": gamma,
        "delta": share,
        "covers": ORIGINAL if point.original is None else PRUNED,
    }
    ramp = {"empirical_ramp": ramp_loss(logits, targets, gamma), **shared}
    error = {
        "empirical_margin_error": margin_error(logits, targets, gamma),
        "input_radius": point.input_radius,
        **shared,
    }
    priced = [
        bartlett_bound(norms.layers, norms.inputs, **ramp),
        golowich_bound(norms.layers, norms.inputs, **ramp),
        golowich_bound(norms.layers, norms.inputs, version="l1", **ramp),
        neyshabur_2015_bound(norms.layers, norms.inputs, **ramp),
        neyshabur_2018_bound(norms.layers, norms.inputs, **error),
        neyshabur_2018_bound(norms.layers, norms.inputs, version="layers", **error),
    ]
    if norms.units is not None:
        priced.append(neyshabur_2019_bound(norms.layers, norms.units, norms.inputs, **ramp))
    return model, [*found, *(replace(bound, confidence=1 - delta) for bound in priced)]


def _kendall(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Return Kendall's tau-b; None where it is not defined: fewer than two points, or all of one kind equal.

    Numbers that agree to nine digits count as equal: a kl form far in the vacuous is 1 up to rounding.
    """
    one, other = ([float(f"{value:.9g}") for value in series] for series in (values, others))
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(kendalltau(one, other).statistic)
