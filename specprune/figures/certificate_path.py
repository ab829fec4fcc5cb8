"""Figure: certificates along the pruning path; training error falls with the bits, their price rises."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis.certificate_path import FACTORS, CertificatePath, PathPoint, certificate_path
from specprune.figures.setting import Conditions, Parts
from specprune.figures.style import figure_style, finish_figure, new_figure
from specprune.testbed import load_dataset


def compute(conditions: Conditions, parts: Parts) -> dict[str, Any]:
    """Search for certificates on the digits at several widths, half a minute each (three seconds if quick).

    The search stops by the clock: its result is a valid certificate, but not the same one every time.

    Args:
        conditions: seed and device.
        parts: each width's search goes on where it was interrupted.

    Returns:
        See `from_path`.
    """
    with contextlib.ExitStack() as stack:
        folder = parts.folder or stack.enter_context(tempfile.TemporaryDirectory())
        path = certificate_path(
            load_dataset("digits"),
            minutes=0.05 if conditions.quick else 0.5,
            factors=(0.5, 1.0, 2.0) if conditions.quick else FACTORS,
            baselines=False,
            seed=conditions.seed,
            device=conditions.device,
            out=folder,
        )
    return from_path(path)


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
