"""Figure: the trade-off of the theory; as the pruned network grows, its bias falls and its variance rises."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis import Tradeoff, TradeoffPoint
from specprune.figures.setting import FigureSetting
from specprune.figures.style import REFERENCE, ROLES, figure_style, finish_figure, new_figure, numbers


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return the whole trade-off curve.

    Args:
        setting: network and data.

    Returns:
        "label", and "tradeoff": the fields of `Tradeoff`, every network's terms of Theorems A and C among them.
    """
    return from_tradeoff(setting.curve, setting.label)


def from_tradeoff(curve: Tradeoff, label: str) -> dict[str, Any]:
    """Return the figure's data from a trade-off curve that is there already.

    Args:
        curve: from `specprune.tradeoff`.
        label: the figure's title.
    """
    fields = {name: getattr(curve, name) for name in Tradeoff.__dataclass_fields__ if name != "points"}
    return {"label": label, "tradeoff": jsonable({**fields, "points": curve.to_records()})}


def draw(data: dict[str, Any]) -> Figure:
    """Draw two panels against the number of parameters: Theorem A's terms, and Theorem C's on a logarithmic axis.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (left, right) = new_figure(columns=2, panels=2)
        fields = data["tradeoff"]
        points = tuple(TradeoffPoint(**point) for point in fields["points"])
        curve = Tradeoff(**{**fields, "points": points})
        curve.plot(left)
        left.set_ylabel("error rate (Theorem A)")
        _draw_margins(right, curve)
        finish_figure(figure, data["label"])
    return figure


def _draw_margins(ax: Axes, curve: Tradeoff) -> None:
    """Draw Theorem C; its bias is 0 for the unpruned network, which a logarithmic axis cannot show."""
    params = numbers(point.params for point in curve.points)
    for label, attribute, role in (
        ("bound: sum of all terms", "margin_bound", "bound"),
        (r"bias: $\sqrt{2}\,\|f - f^\sharp\|_n\,/\,\gamma$", "margin_bias", "bias"),
        ("variance: covering", "margin_variance", "variance"),
    ):
        values = numbers(getattr(point, attribute) for point in curve.points)
        shown = values > 0
        # The variance is nearly all of the bound: a larger marker lets the bound be seen behind it.
        size = 6.5 if role == "bound" else 4
        ax.plot(params[shown], values[shown], label=label, **{**ROLES[role], "markersize": size})
    ax.axhline(1.0, label="vacuous above", **REFERENCE)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("parameters of the pruned network")
    ax.set_ylabel("error rate (Theorem C)")
