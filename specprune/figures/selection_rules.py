"""Figure: what the choice of nodes is worth, and what the refit of the weights is worth."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from specprune.compress import CalibrationData, collect_moments, prune
from specprune.figures.setting import FigureSetting, Parts
from specprune.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    PURPLE,
    REFERENCE,
    VERMILION,
    figure_style,
    finish_figure,
    kept_axis,
    new_figure,
    numbers,
)
from specprune.testbed import evaluate

logger = logging.getLogger(__name__)

_RANDOM_RULES = ("leverage", "random")
_REPEATS = 3
_CURVES = (
    ("greedy", "sequential"),
    ("leverage", "sequential"),
    ("cholesky", "sequential"),
    ("magnitude", "sequential"),
    ("random", "sequential"),
    ("greedy", "none"),
    ("magnitude", "none"),
)
_STYLES: dict[str, dict[str, Any]] = {
    "greedy": {"color": BLUE, "marker": "o"},
    "leverage": {"color": VERMILION, "marker": "^"},
    "cholesky": {"color": GREEN, "marker": "s"},
    "magnitude": {"color": BLACK, "marker": "v"},
    "random": {"color": PURPLE, "marker": "X"},
}


def compute(setting: FigureSetting, parts: Parts) -> dict[str, Any]:
    """Return the test accuracy after pruning by each rule, to the same widths, with and without the refit.

    Args:
        setting: network and data.  Random rules are run with three seeds, from `setting.seed` on.
        parts: each curve is one.

    Returns:
        "label", "base_accuracy" of the unpruned network, and "curves": rule, reconstruction, and "points" with the
        FLOPs kept and the "accuracies" of all runs.
    """
    data = CalibrationData(setting.calibration_batches)
    test = setting.dataset.test_batches()
    moments = collect_moments(setting.model, data)

    def points(rule: str, reconstruction: str) -> list[dict[str, Any]]:
        found = []
        for keep in setting.budgets:
            accuracies = []
            for repeat in range(_REPEATS if rule in _RANDOM_RULES else 1):
                pruned = prune(
                    setting.model,
                    data,
                    keep,
                    moments=moments,
                    allocation="uniform",
                    selection=rule,
                    reconstruction=reconstruction,
                    seed=setting.seed + repeat,
                )
                accuracies.append(1.0 - evaluate(pruned.model, test)[0])
            kept = pruned.report.flops_after / pruned.report.flops_before
            found.append({"flops_kept": kept, "accuracies": accuracies})
        logger.info("%s, reconstruction %s: done", rule, reconstruction)
        return found

    curves = []
    for rule, reconstruction in tqdm(_CURVES, desc="rules", disable=None, leave=False):
        found = parts.get(f"{rule}-{reconstruction}", partial(points, rule, reconstruction))
        curves.append({"rule": rule, "reconstruction": reconstruction, "points": found})
    base = 1.0 - evaluate(setting.model, test)[0]
    return {"label": setting.label, "base_accuracy": base, "curves": curves}


def draw(data: dict[str, Any]) -> Figure:
    """Draw accuracies against FLOPs kept: means as lines, smallest to largest as bands; dashed without the refit.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (ax,) = new_figure(height=2.6)
        for curve in data["curves"]:
            kept = numbers(point["flops_kept"] for point in curve["points"])
            runs = np.array([point["accuracies"] for point in curve["points"]], dtype=float)
            refit = curve["reconstruction"] != "none"
            style = {**_STYLES[curve["rule"]], "linestyle": "-" if refit else "--"}
            if not refit:
                style["markerfacecolor"] = "white"
            name = curve["rule"] if refit else f"{curve['rule']}, no refit"
            if runs.shape[1] > 1:
                name += f" ({runs.shape[1]} seeds)"
                ax.fill_between(kept, runs.min(axis=1), runs.max(axis=1), color=style["color"], alpha=0.2, linewidth=0)
            ax.plot(kept, runs.mean(axis=1), label=name, **style)
        ax.axhline(data["base_accuracy"], label="unpruned network", **REFERENCE)
        kept_axis(ax, [point["flops_kept"] for curve in data["curves"] for point in curve["points"]])
        ax.set_ylim(0.0, 1.02)
        ax.set_ylabel("test accuracy")
        finish_figure(figure, data["label"])
    return figure
