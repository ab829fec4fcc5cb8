"""Ways to compress one network to equal size: what each keeps, how fast it is, and how far it is from the original."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from specprune._records import format_table, to_json, to_latex_table
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.divergence import Reference
from specprune.compress.latency import measure_latency
from specprune.compress.pruning import prune_sweep
from specprune.compress.report import Pruned

logger = logging.getLogger(__name__)

KEEPS = (0.5, 0.3, 0.2)
#: name of a method to the arguments of `prune` that make it, where they are not the defaults
METHODS: dict[str, dict[str, str]] = {
    "spectral": {},
    "hybrid": {"method": "hybrid"},
    "fitted low rank": {"method": "fitted"},
    "spectral, uniform": {"allocation": "uniform"},
    "greedy (paper)": {"selection": "greedy", "allocation": "uniform"},
    "thinet + refit": {"selection": "thinet", "allocation": "uniform"},
    "magnitude + refit": {"selection": "magnitude", "allocation": "uniform"},
    "magnitude, no refit": {"selection": "magnitude", "allocation": "uniform", "reconstruction": "none"},
    "random + refit": {"selection": "random", "allocation": "uniform"},
    "ALDS": {"method": "alds"},
    "ALDS+": {"method": "alds+"},
    "ALDS + refit": {"method": "refit"},
    "ALDS, published search": {"method": "alternating"},
    "low rank, data": {"method": "data"},
    "low rank, constant": {"method": "constant"},
    "low rank, energy": {"method": "energy"},
    "low rank, L-Rank": {"method": "lrank"},
    "low rank, PCA": {"method": "pca"},
    "PFP": {"method": "pfp"},
    "PFP, random": {"method": "pfp-random"},
    "PFP, hybrid": {"method": "pfp-hybrid"},
    "SiPP": {"method": "sipp", "measure": "params"},
}
_LATEX_COLUMNS = {
    "method": "method",
    "flops_kept": "FLOPs kept",
    "params_kept": "parameters kept",
    "error": "error",
    "divergence": "divergence",
    "promised": "promised",
    "local_error": "local error",
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
        nonzero: fraction of the parameters that is left and not zero; only SiPP sets parameters to zero.
        latency_1: measured time over the original's, one sample; None if it was not measured.
        latency_64: the same for a batch of 64.
        error: error rate in [0, 1]; None where `Comparison.base_error` is.
        divergence: mean KL divergence of the outputs from the original's in nats (of one value: relative squared
            difference).
        promised: the method's own ceiling on its local errors, the largest over layers or groups; None if it has none.
        local_error: the largest local error, on the calibration data (see `PruneReport.local_errors`).
        seconds: time of the pruning; what a method does once for all budgets is split evenly.
    """

    method: str
    keep: float
    flops_kept: float
    params_kept: float
    nonzero: float
    latency_1: float | None
    latency_64: float | None
    error: float | None
    divergence: float
    promised: float | None
    local_error: float | None
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """A budget that a method cannot meet, and why."""

    method: str
    keep: float
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All methods at all budgets.

    Args:
        points: method by method, in the order of the budgets.
        refused: what could not be made.
        base_error: error rate of the original network; None without labels of a classifier.
        measured_on: "test" or "calibration": the data that error and divergence are about.
        keeps: the budgets.
        measure: what they are fractions of, "flops" or "params"; for SiPP the weights that are not zero.
        seed: of the random rules.
    """

    points: tuple[ComparisonPoint, ...]
    refused: tuple[Refusal, ...]
    base_error: float | None
    measured_on: str
    keeps: tuple[float, ...]
    measure: str
    seed: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a network."""
        return [asdict(point) for point in self.points]

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(asdict(self))

    def to_latex(self) -> str:
        """Return one row a network as a LaTeX tabular, which needs the package booktabs."""
        return to_latex_table(self.to_records(), _LATEX_COLUMNS)

    def __str__(self) -> str:
        base = "no labels of a classifier" if self.base_error is None else f"original: error {self.base_error:.4f}"
        equal = {"flops": "FLOPs", "params": "parameters"}[self.measure]
        title = f"methods at equal {equal}, measured on the {self.measured_on} data; {base}"
        lines = [format_table(self.to_records(), title=title)]
        return "\n".join([*lines, *(f"{one.method}, keep {one.keep:g}: {one.reason}" for one in self.refused)])


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    methods: Sequence[str] = tuple(METHODS),
    measure: str = "flops",
    latency: bool = True,
    forward: Forward | None = None,
    seed: int = 0,
) -> Comparison:
    """Compress one network by several methods to the same size, and measure what comes out.

    Args:
        model: any network that `prune` takes; left as it is.
        batches: calibration data, as in `prune`.
        test: other data to measure error and divergence on; the calibration data if None.
        keeps: fractions of the size to keep.
        methods: keys of `METHODS`.
        measure: the size, "flops" or "params".
        latency: whether to measure times.
        forward: optional `forward(model, batch)`.
        seed: of the random rules.

    Returns:
        The comparison.  Errors are given where the data have class numbers and the network gives (n, classes).

    Raises:
        ValueError: unknown methods or measure, or no method can meet any budget.
        TypeError: batches that cannot be iterated twice.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods={list(methods)}: expected some of {list(METHODS)}")
    if measure not in ("flops", "params"):
        raise ValueError(f"measure={measure!r}: expected 'flops' or 'params'")
    if not keeps:
        raise ValueError("keeps is empty: give at least one fraction to keep, for example [0.5, 0.3]")
    data = CalibrationData(batches, forward)
    used = data if test is None else CalibrationData(test, forward)
    original = copy.deepcopy(model).eval()
    base = classifier_error(original, used)
    reference = Reference(original, used, _SAMPLES)
    points, refused = [], []
    for name in tqdm(methods, desc="comparing", disable=None):
        settings = {"measure": measure, **METHODS[name]}
        results = sweep_or_reasons(original, data, keeps, seed=seed, **settings)
        made = [result for result in results if not isinstance(result, str)]
        seconds = sum(result.report.seconds for result in made) / max(len(made), 1)
        for keep, result in zip(keeps, results, strict=True):
            if isinstance(result, str):
                logger.info("%s, keep=%g: %s", name, keep, result)
                refused.append(Refusal(name, float(keep), result))
                continue
            times = measure_latency(original, result.model, data) if latency else ()
            ratios = {entry.batch: entry.after_ms / entry.before_ms for entry in times}
            error = None if base is None else error_rate(*collect_logits(result.model, used))
            divergence = reference.divergence(result.model)
            points.append(_point(name, keep, result, ratios, error, divergence, seconds))
        logger.info("%s: done", name)
    if not points:
        raise ValueError(refused[0].reason)
    measured_on = "calibration" if test is None else "test"
    return Comparison(tuple(points), tuple(refused), base, measured_on, tuple(map(float, keeps)), measure, seed)


def sweep_or_reasons(
    model: nn.Module, data: CalibrationData, keeps: Sequence[float], **settings: Any
) -> list[Pruned | str]:
    """Return what `prune_sweep` gives; where a budget cannot be met, the reason in its place.

    Args:
        model: as in `prune`.
        data: calibration data.
        keeps: the fractions to keep.
        **settings: other arguments of `prune`.
    """
    try:
        return list(prune_sweep(model, data, keeps, **settings))
    except ValueError:
        found: list[Pruned | str] = []
        for keep in keeps:
            try:
                found += prune_sweep(model, data, [keep], **settings)
            except ValueError as reason:
                found.append(str(reason))
        return found


def _point(
    name: str,
    keep: float,
    pruned: Pruned,
    ratios: dict[int, float],
    error: float | None,
    divergence: float,
    seconds: float,
) -> ComparisonPoint:
    report, errors = pruned.report, pruned.report.local_errors()
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in pruned.model.parameters())
    return ComparisonPoint(
        method=name,
        keep=float(keep),
        flops_kept=report.flops_after / report.flops_before,
        params_kept=report.params_after / report.params_before,
        nonzero=nonzero / report.params_before,
        latency_1=ratios.get(1),
        latency_64=ratios.get(64),
        error=error,
        divergence=divergence,
        promised=max((entry.promised for entry in errors), default=None),
        local_error=max((entry.measured for entry in errors), default=None),
        seconds=seconds,
    )


def classifier_error(model: nn.Module, data: CalibrationData) -> float | None:
    """Return a classifier's error rate; None where the data have no class numbers or the model is no classifier."""
    try:
        return error_rate(*collect_logits(model, data))
    except (TypeError, ValueError) as reason:
        logger.info("no error rate: %s", reason)
        return None
