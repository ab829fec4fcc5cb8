"""Figure: how the bounds move with sample size, width, depth, label noise and pruning, next to the measured error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specprune._records import jsonable
from specprune._trends import default_plan, trend_points
from specprune.analysis.trends import Trends, bound_trends
from specprune.bounds.bound import QUANTISED
from specprune.figures.setting import Conditions
from specprune.figures.style import (
    BLACK,
    BLUE,
    COLUMN_WIDTHS,
    GREEN,
    ORANGE,
    PURPLE,
    REFERENCE,
    VERMILION,
    figure_style,
    numbers,
)
from specprune.testbed import load_dataset

_QUICK: dict[str, Any] = {
    "base_samples": 400,
    "base_width": 24,
    "samples": (200,),
    "widths": (12,),
    "depths": (1,),
    "noises": (0.5,),
    "keeps": (0.3,),
    "steps": 100,
}
_COLUMNS = 3
_ROW_HEIGHT = 1.9
_DECADE = 8  # settings this far apart get a logarithmic axis
# One colour a family; the bounds left out run along one of these.
_STYLES: dict[str, dict[str, Any]] = {
    "Bartlett 2017 (union)": {"color": VERMILION, "marker": "s"},
    "Golowich 2018 (frobenius)": {"color": ORANGE, "marker": "D"},
    "Neyshabur 2018 (product)": {"color": PURPLE, "marker": "X"},
    "covering (Dudley)": {"color": GREEN, "marker": "v", "linestyle": "--"},
    "covering (single scale)": {"color": GREEN, "marker": "^"},
    "Occam (relaxed)": {"color": BLUE, "marker": "P", "linestyle": "--"},
    "Occam (kl)": {"color": BLUE, "marker": "o"},
}
_TEST: dict[str, Any] = {"color": BLACK, "marker": ".", "linewidth": 1.6}


def compute(conditions: Conditions) -> dict[str, Any]:
    """Train networks on the digits that differ in one thing each, and return how the bounds on them move.

    Args:
        conditions: seed and device; quick ones take fewer and smaller networks.

    Returns:
        See `from_trends`.
    """
    plan = default_plan("digits")
    if conditions.quick:
        plan = replace(plan, **_QUICK)
    dataset = load_dataset("digits").to(conditions.device)
    trends = bound_trends(trend_points(dataset, plan, conditions.seed))
    return from_trends(trends, f"digits, {plan.net(plan.base_width, plan.base_depth)}")


def from_trends(trends: Trends, label: str) -> dict[str, Any]:
    """Return the figure's data.

    Args:
        trends: from `specprune.analysis.trends.bound_trends`.
        label: the figure's title.

    Returns:
        "label", "gamma", "delta" and "axes": for each the settings, the test errors of the networks themselves, and
        of each bound the settings and values.
    """
    axes = []
    for axis in trends.axes:
        lines = trends.along(axis)
        own = next(rows for rows in lines.values() if rows[0].bound.covers != QUANTISED)
        axes.append(
            {
                "axis": axis,
                "settings": [row.setting for row in own],
                "test_error": [row.test_error for row in own],
                "bounds": [
                    {
                        "bound": name,
                        "settings": [row.setting for row in rows],
                        "values": [row.bound.value for row in rows],
                    }
                    for name, rows in lines.items()
                ],
            }
        )
    return jsonable({"label": label, "gamma": trends.gamma, "delta": trends.delta, "axes": axes})


def draw(data: dict[str, Any]) -> Figure:
    """Draw one panel an axis with the same logarithmic scale of errors, and the legend in a field of its own.

    Args:
        data: what `from_trends` returned.
    """
    with figure_style():
        count = len(data["axes"])
        rows = -(-(count + 1) // _COLUMNS)
        figure = Figure(figsize=(COLUMN_WIDTHS[2], _ROW_HEIGHT * rows), layout="constrained")
        fields = list(figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False).flat)
        for place, (ax, axis) in enumerate(zip(fields, data["axes"], strict=False)):
            _draw_axis(ax, axis)
            if place % _COLUMNS == 0:
                ax.set_ylabel("bound on the error rate")
        for ax in fields[count:]:
            ax.set_axis_off()
        handles, names = fields[0].get_legend_handles_labels()
        fields[count].legend(handles, names, loc="center", markerscale=0.9)
        sure = f"each with probability {1 - data['delta']:g}, margins at {data['gamma']:g}"
        figure.suptitle(f"{data['label']}: {sure}")
    return figure


def _draw_axis(ax: Axes, axis: dict[str, Any]) -> None:
    found = {line["bound"]: line for line in axis["bounds"]}
    for name, style in _STYLES.items():
        if name in found:
            line = found[name]
            ax.plot(numbers(line["settings"]), numbers(line["values"]), label=name, **{"markersize": 3.5, **style})
    ax.axhline(1.0, label="vacuous above", **REFERENCE)
    errors = numbers(axis["test_error"])
    shown = errors > 0  # a logarithmic axis cannot show a network without errors
    settings = numbers(axis["settings"])
    ax.plot(settings[shown], errors[shown], label="test error (measured)", **_TEST)
    ax.set_yscale("log")
    ax.set_xlabel(axis["axis"])
    if settings.min() > 0 and settings.max() >= _DECADE * settings.min():
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(settings.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
