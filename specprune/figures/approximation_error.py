"""Figure: how far pruned networks are from the original, measured, certified, and promised by the theorem."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.figures.setting import FigureSetting
from specprune.figures.style import (
    REFERENCE,
    ROLES,
    figure_style,
    finish_figure,
    kept_axis,
    new_figure,
    numbers,
)

_COLUMNS = ("flops_kept", "measured", "layerwise", "certificate", "a_priori", "a_priori_holds", "c_max", "s_max")


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return measured error, certificates and a-priori bound of every network on the trade-off curve.

    Args:
        setting: network and data.

    Returns:
        "label", "output_norm" ||f||_n, "samples", and "points": FLOPs kept, the errors in logit units, and
        whether the theorem's hypotheses c <= 4 and s <= 5/3 hold.
    """
    curve = setting.curve
    points = [{name: record[name] for name in _COLUMNS} for record in curve.to_records()]
    head = {"label": setting.label, "output_norm": curve.output_norm, "samples": curve.samples}
    return {**head, "points": jsonable(points)}  # a bound of a deep network may be infinite


def draw(data: dict[str, Any]) -> Figure:
    """Draw the errors relative to ||f||_n against the FLOPs kept, both logarithmic.

    The unpruned network has no error and cannot be shown on such axes.  Filled markers of the a-priori bound are where
    its hypotheses hold.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (ax,) = new_figure()
        points = data["points"]
        kept = numbers(point["flops_kept"] for point in points)
        relative = {
            name: numbers(point[name] for point in points) / data["output_norm"]
            for name in ("measured", "layerwise", "certificate", "a_priori")
        }
        shown = relative["measured"] > 0
        for name, role, label in (
            ("measured", "test", "measured"),
            ("layerwise", "bias", "certificate, layer by layer"),
            ("certificate", "bound", "certificate, moments"),
        ):
            ax.plot(kept[shown], relative[name][shown], label=label, **ROLES[role])
        ax.axhline(1.0, label=r"$f^\sharp = 0$", **REFERENCE)
        holds = np.array([point["a_priori_holds"] is True for point in points])
        promise = {key: value for key, value in ROLES["variance"].items() if key != "marker"}
        seen = relative["a_priori"] > 0
        ax.plot(kept[seen], relative["a_priori"][seen], **promise)
        for chosen, fill, label in (
            (seen & holds, promise["color"], r"a priori, $c \leq 4$, $s \leq 5/3$"),
            (seen & ~holds, "white", "a priori, hypotheses fail"),
        ):
            if chosen.any():
                style = {**ROLES["variance"], "linestyle": "none", "markerfacecolor": fill}
                ax.plot(kept[chosen], relative["a_priori"][chosen], label=label, **style)
        kept_axis(ax, kept)
        ax.set_yscale("log")
        ax.set_ylabel(r"relative error $\|f - f^\sharp\|_n\,/\,\|f\|_n$")
        finish_figure(figure, data["label"])
    return figure
