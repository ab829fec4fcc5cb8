"""Ways to prune one network at equal budget: what each keeps, how fast it is, and how far it is from the original."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.divergence import Reference
from specprune.compress.latency import measure_latency
from specprune.compress.pruning import prune_sweep

logger = logging.getLogger(__name__)

KEEPS = (0.5, 0.3, 0.2)
#: name of a method to the arguments of `prune` that make it, where they are not the defaults
METHODS: dict[str, dict[str, str]] = {
    "spectral": {},
    "spectral, uniform": {"allocation": "uniform"},
    "greedy (paper)": {"selection": "greedy", "allocation": "uniform"},
    "thinet + refit": {"selection": "thinet", "allocation": "uniform"},
    "magnitude + refit": {"selection": "magnitude", "allocation": "uniform"},
    "magnitude, no refit": {"selection": "magnitude", "allocation": "uniform", "reconstruction": "none"},
    "random + refit": {"selection": "random", "allocation": "uniform"},
}
_SAMPLES = 10_000  # on which the divergence is measured


@dataclass(frozen=True)
class ComparisonPoint:
    """One network made by one method.

    Args:
        method: a key of `METHODS`.
        keep: fraction of the FLOPs that was asked for.
        flops_kept: fraction of the FLOPs that is left.
        params_kept: fraction of the parameters that is left.
        latency_1: measured time over the original's, one sample; None if it was not measured.
        latency_64: the same for a batch of 64.
        error: error rate in [0, 1]; None where `Comparison.base_error` is.
        divergence: mean KL divergence of the outputs from the original's in nats (of one value: relative squared
            difference).
        seconds: time of the pruning; what a method does once for all budgets is split evenly.
    """

    method: str
    keep: float
    flops_kept: float
    params_kept: float
    latency_1: float | None
    latency_64: float | None
    error: float | None
    divergence: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All methods at all budgets.

    Args:
        points: method by method, in the order of the budgets.
        base_error: error rate of the original network; None without labels of a classifier.
        measured_on: "test" or "calibration": the data that error and divergence are about.
        keeps: the budgets.
        seed: of the random rules.
    """

    points: tuple[ComparisonPoint, ...]
    base_error: float | None
    measured_on: str
    keeps: tuple[float, ...]
    seed: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a network."""
        return [asdict(point) for point in self.points]

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(asdict(self))

    def __str__(self) -> str:
        base = "no labels of a classifier" if self.base_error is None else f"original: error {self.base_error:.4f}"
        title = f"methods at equal FLOPs, measured on the {self.measured_on} data; {base}"
        return format_table(self.to_records(), title=title)


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    latency: bool = True,
    forward: Forward | None = None,
    seed: int = 0,
) -> Comparison:
    """Prune one network by every method of `METHODS` to the same FLOPs, and measure what comes out.

    Args:
        model: any network that `prune` takes; left as it is.
        batches: calibration data, as in `prune`.
        test: other data to measure error and divergence on; the calibration data if None.
        keeps: fractions of the FLOPs to keep.
        latency: whether to measure times.
        forward: optional `forward(model, batch)`.
        seed: of the random rules.

    Returns:
        The comparison.  Errors are given where the data have class numbers and the network gives (n, classes).

    Raises:
        ValueError: what `prune` refuses: a budget that cannot be met, say.
        TypeError: batches that cannot be iterated twice.
    """
    data = CalibrationData(batches, forward)
    used = data if test is None else CalibrationData(test, forward)
    original = copy.deepcopy(model).eval()
    base = classifier_error(original, used)
    reference = Reference(original, used, _SAMPLES)
    points = []
    for name, settings in tqdm(METHODS.items(), desc="comparing", disable=None):
        results = prune_sweep(original, data, keeps, seed=seed, **settings)
        seconds = sum(result.report.seconds for result in results) / len(results)
        for keep, result in zip(keeps, results, strict=True):
            report = result.report
            times = measure_latency(original, result.model, data) if latency else ()
            ratios = {entry.batch: entry.after_ms / entry.before_ms for entry in times}
            points.append(
                ComparisonPoint(
                    method=name,
                    keep=float(keep),
                    flops_kept=report.flops_after / report.flops_before,
                    params_kept=report.params_after / report.params_before,
                    latency_1=ratios.get(1),
                    latency_64=ratios.get(64),
                    error=None if base is None else error_rate(*collect_logits(result.model, used)),
                    divergence=reference.divergence(result.model),
                    seconds=seconds,
                )
            )
        logger.info("%s: done", name)
    return Comparison(tuple(points), base, "calibration" if test is None else "test", tuple(map(float, keeps)), seed)


def classifier_error(model: nn.Module, data: CalibrationData) -> float | None:
    """Return a classifier's error rate; None where the data have no class numbers or the model is no classifier."""
    try:
        return error_rate(*collect_logits(model, data))
    except (TypeError, ValueError) as reason:
        logger.info("no error rate: %s", reason)
        return None
