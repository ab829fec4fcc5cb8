"""Figure: certificates along the pruning path; training error falls with the bits, their price rises."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis.certificate_path import CertificatePath, PathPoint
from specprune.figures.style import figure_style, finish_figure, new_figure


def from_path(path: CertificatePath) -> dict[str, Any]:
    """Return the figure's data.

    Args:
        path: from `specprune.analysis.certificate_path.certificate_path`.
    """
    fields = {name: getattr(path, name) for name in ("data", "front_end", "n", "delta", "published")}
    return {"label": f"{path.data}, {path.front_end}", **jsonable({**fields, "points": path.to_records()})}


def draw(data: dict[str, Any]) -> Figure:
    """Draw certificate, training error, test error and the price of the bits against the length of the word.

    Args:
        data: what `from_path` returned.
    """
    points = tuple(PathPoint(**{**point, "widths": tuple(point["widths"])}) for point in data["points"])
    path = CertificatePath(
        data["data"], data["front_end"], data["n"], data["delta"], points, published=data["published"]
    )
    with figure_style():
        figure, (ax,) = new_figure(columns=1, panels=1, height=2.6)
        path.plot(ax)
        finish_figure(figure, data["label"])
    return figure
