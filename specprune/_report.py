"""What the page of `specprune report` says about a problem: all that can be computed, and why the rest is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specprune import __version__
from specprune._problem import Problem
from specprune.analysis import bound_table, layer_spectra, tradeoff
from specprune.analysis.comparison import classifier_error
from specprune.compress import CalibrationData, Pruned
from specprune.compress.batches import batch_size

if TYPE_CHECKING:
    from specprune.figures import ReportData


def report_data(
    problem: Problem,
    prune: Callable[[], Pruned],
    *,
    data: str,
    calibration: int,
    with_tradeoff: bool = True,
    delta: float,
    input_radius: float | None,
    seed: int,
) -> ReportData:
    """Measure, prune and bound a network; parts that are refused are left out with the reason in the notes.

    Args:
        problem: network and data.
        prune: returns the pruned network.
        data: what to call the data.
        calibration: number of training samples to measure spectra on.
        with_tradeoff: whether to compute the trade-off curve, the longest part.
        delta: failure probability of each bound.
        input_radius: bound on the norm of every possible input, where it is known.
        seed: of random choices.
    """
    from specprune.figures import ReportData, network_facts, prunable_nodes  # draws; the other commands do without

    model, batches = problem.model, problem.calibration(calibration)
    notes: list[str] = []

    def attempt(what: str, compute: Callable[[], Any]) -> Any:
        """Return a part of the page, or note there why it is missing."""
        try:
            return compute()
        except (ValueError, TypeError) as reason:
            notes.append(f"No {what}: {reason}")
            return None

    facts = {**network_facts(model, batches), **_facts(problem, data, seed)}
    spectra = layer_spectra(model, batches)
    nodes = attempt("nodes to prune", lambda: prunable_nodes(model, batches, seed))
    pruned = attempt("pruning", prune)
    common: dict[str, Any] = {"delta": delta, "input_radius": input_radius, "seed": seed}
    bounds = attempt(
        "bounds",
        lambda: bound_table(model, problem.train, pruned, problem.test, reference=problem.initial, **common),
    )
    curve = None
    if with_tradeoff:
        curve = attempt(
            "trade-off curve", lambda: tradeoff(model, problem.train, problem.test, calibration=batches, **common)
        )
    else:
        notes.append("No trade-off curve: left out with --no-tradeoff")
    return ReportData(
        title=problem.label,
        facts=facts,
        spectra=spectra,
        nodes=nodes,
        tradeoff=curve,
        bounds=bounds,
        prune=None if pruned is None else pruned.report,
        notes=tuple(notes),
    )


def _facts(problem: Problem, data: str, seed: int) -> dict[str, str]:
    """Return what is known of the data, the errors and the run, as text for the head of the page."""
    facts = {"data": data}
    sets: tuple[tuple[str, Iterable[Any] | None], ...] = (("training", problem.train), ("test", problem.test))
    for name, batches in sets:
        if batches is None:
            continue
        facts[f"{name} samples"] = str(sum(batch_size(batch) for batch in batches))
        error = classifier_error(problem.model, CalibrationData(batches))
        facts[f"{name} error"] = "not known: no labels" if error is None else f"{error:.2%}"
    facts["seed"] = str(seed)
    facts["versions"] = f"specprune {__version__}, torch {torch.__version__}, numpy {np.__version__}"
    return facts
