"""Figure: ways to compress to equal size: error, or divergence from the original where no labels are, against size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from specprune.analysis.comparison import Comparison, compare
from specprune.figures.setting import FigureSetting
from specprune.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    REFERENCE,
    SKY,
    VERMILION,
    figure_style,
    finish_figure,
    kept_axis,
    new_figure,
    numbers,
)

# The methods that are drawn; `specprune compare` prints the others, too.
_STYLES: dict[str, dict[str, Any]] = {
    "spectral": {"color": VERMILION, "marker": "s"},
    "hybrid": {"color": BLACK, "marker": "*"},
    "fitted low rank": {"color": GREEN, "marker": "^"},
    "greedy (paper)": {"color": BLUE, "marker": "o"},
    "thinet + refit": {"color": ORANGE, "marker": "D"},
    "magnitude + refit": {"color": BLACK, "marker": "v", "linestyle": "--"},
    "ALDS": {"color": SKY, "marker": "P"},
    "PFP": {"color": PURPLE, "marker": "X"},
    "magnitude, no refit": {"color": BLACK, "marker": "v", "linestyle": ":", "markerfacecolor": "white"},
}


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return the test error of every method at the setting's budgets.

    Args:
        setting: network and data.
    """
    found = compare(
        setting.model,
        setting.calibration_batches,
        setting.dataset.test_batches(),
        keeps=setting.budgets,
        methods=tuple(_STYLES),
        latency=False,
        seed=setting.seed,
    )
    return from_comparison(found, setting.label)


def from_comparison(comparison: Comparison, label: str) -> dict[str, Any]:
    """Return the figure's data from a comparison that is there already.

    Args:
        comparison: from `compare`.
        label: the figure's title.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in (one for one in comparison.points if one.method in _STYLES):
        kept = point.flops_kept if comparison.measure == "flops" else point.params_kept
        shown = {"kept": kept, "error": point.error, "divergence": point.divergence}
        curves.setdefault(point.method, []).append(shown)
    return {
        "label": label,
        "measure": comparison.measure,
        "measured_on": comparison.measured_on,
        "base_error": comparison.base_error,
        "curves": [{"method": method, "points": points} for method, points in curves.items()],
    }


def draw(data: dict[str, Any]) -> Figure:
    """Draw one line a method against what is kept, and the original network as a dotted line.

    Args:
        data: what `compute` returned.
    """
    labelled = data["base_error"] is not None
    quantity, base = ("error", data["base_error"]) if labelled else ("divergence", 0.0)
    with figure_style():
        figure, (ax,) = new_figure(height=2.6)
        for place, curve in enumerate(data["curves"]):
            points = sorted(curve["points"], key=lambda point: point["kept"])
            kept = numbers(point["kept"] for point in points)
            values = numbers(point[quantity] for point in points)
            style = {"markersize": 4, "zorder": 3 - 0.1 * place, **_STYLES[curve["method"]]}
            ax.plot(kept, values, label=curve["method"], **style)
        ax.axhline(base, label="original network", **REFERENCE)
        shown = [point for curve in data["curves"] for point in curve["points"]]
        kept_axis(ax, [point["kept"] for point in shown], {"flops": "FLOPs", "params": "parameters"}[data["measure"]])
        _spread(ax, numbers([base, *(point[quantity] for point in shown)]))
        if labelled:
            ax.set_ylabel("test error (%)" if data["measured_on"] == "test" else "error on calibration data (%)")
        else:
            ax.set_ylabel("divergence from the original")
        scale = 100 if labelled else 1
        ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{scale * tick:g}"))
        finish_figure(figure, data["label"])
    return figure


def _spread(ax: Axes, values: np.ndarray) -> None:
    """Make y a logarithmic axis, for methods differ by orders of magnitude; linear below the least that is not 0."""
    positive = values[values > 1e-9]
    least, most = (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
    ax.set_yscale("symlog", linthresh=least)
    steps = (1, 2, 5) if most < 1e3 * least else (1,)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [step * 10.0**power for power in decades for step in steps]
    bottom = 0.0 if values.min() < least else 0.85 * least
    ax.set_ylim(bottom, 1.15 * most)
    ax.yaxis.set_major_locator(FixedLocator([0.0, *(tick for tick in ticks if least <= tick)]))
    ax.yaxis.set_minor_locator(NullLocator())
