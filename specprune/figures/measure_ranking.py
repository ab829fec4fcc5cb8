"""Figure: measures ranked by how well they predict the generalization gap over a zoo of networks."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specprune._measures import MeasuredZoo, measured_zoo
from specprune._records import jsonable
from specprune.analysis.measure_ranking import MeasureRanking
from specprune.analysis.spectral_measures import SPECTRAL_MEASURES
from specprune.figures.setting import Conditions, Parts
from specprune.figures.style import BLUE, REFERENCE, VERMILION, figure_style, new_figure
from specprune.testbed import ZOO_GRIDS, load_dataset, train_zoo, zoo_grid

#: set in bold: what this package is about
SPECTRAL = (
    *(measure.name for measure in SPECTRAL_MEASURES),
    "spectral_prunability",
    "spectral_prunability_weights",
)
_FEW: dict[str, Any] = {"dropout": 0.0}  # 72 networks of one seed, as the default grid has
_QUICK: dict[str, Any] = {"width": (16, 48), "depth": (1, 2), "n": (80, 160, 320), "batch_size": 32, **_FEW}
_QUICK_MEASURES = (
    "params",
    "log_prod_of_fro",
    "log_path_norm",
    "log_bartlett",
    "inverse_margin",
    "effective_rank",
    "dof_1e-3",
    "compression_bound",
)
_ROW = 0.135  # inches a measure
_PANELS = (
    ("psi", r"granulated correlation $\Psi$", BLUE, "o"),
    ("mean_error", "mean sign error, all pairs alike", VERMILION, "s"),
)


def compute(conditions: Conditions, parts: Parts) -> dict[str, Any]:
    """Train a small zoo on the digits, measure its networks and rank the measures.

    Args:
        conditions: seed and device; quick ones take fewer and smaller networks, and eight measures.
        parts: networks that are trained or measured stay so when a run is interrupted.

    Returns:
        See `from_ranking`.
    """
    found = digits_zoo(conditions, parts, _QUICK_MEASURES if conditions.quick else None)
    return from_ranking(found.ranking, f"digits, {found.ranking.networks} networks")


def digits_zoo(conditions: Conditions, parts: Parts, names: Sequence[str] | None) -> MeasuredZoo:
    """Return the measures of some networks on the digits: 72, or 24 small ones if quick.

    Args:
        conditions: seed and device.
        parts: where the networks are kept until the figure is done.
        names: measures; None for all.
    """
    axes = {**ZOO_GRIDS["default"], **(_QUICK if conditions.quick else _FEW), "seed": conditions.seed}
    dataset = load_dataset("digits")
    with contextlib.ExitStack() as stack:
        folder = parts.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train_zoo(dataset, zoo_grid(data="digits", **axes), folder / "zoo", device=conditions.device)
        return measured_zoo(folder / "zoo", "digits", None, folder / "measured.jsonl", names, seed=conditions.seed)


def from_ranking(ranking: MeasureRanking, label: str) -> dict[str, Any]:
    """Return the figure's data.

    Args:
        ranking: from `specprune.analysis.measure_ranking.rank_measures`.
        label: the figure's title.
    """
    return {"label": label, "level": ranking.level, "measures": jsonable(ranking.to_records())}


def draw(data: Mapping[str, Any]) -> Figure:
    """Draw the ranking.

    Args:
        data: what `from_ranking` returned.
    """
    return draw_ranking(data["measures"], f"{data['label']}, {100 * data['level']:g} % intervals", SPECTRAL)


def draw_ranking(records: Sequence[Mapping[str, Any]], title: str, highlight: Sequence[str] = ()) -> Figure:
    """Draw every measure as a row: how it correlates with the gap, and how often it is wrong at worst.

    Args:
        records: of `MeasureRanking.to_records`, best first.
        title: one line.
        highlight: measures whose names are set in bold.

    Returns:
        A figure of a paper's full width, as tall as there are measures; bars are the intervals.
    """
    rows = sorted(records, key=lambda record: -float(record["psi"]))
    places = np.arange(len(rows))[::-1]
    with figure_style():
        figure, axes = new_figure(columns=2, panels=2, height=0.8 + _ROW * len(rows))
        for ax, (name, label, colour, marker) in zip(axes, _PANELS, strict=True):
            values = np.array([float(record[name]) for record in rows])
            reach = np.abs(np.array([[float(r[f"{name}_low"]), float(r[f"{name}_high"])] for r in rows]).T - values)
            ax.errorbar(values, places, xerr=reach, fmt=marker, color=colour, markersize=3, elinewidth=0.8)
            ax.axvline(0.0 if name == "psi" else 0.5, **REFERENCE)  # what a constant measure gets
            ax.set_xlabel(label)
            ax.set_ylim(-0.8, len(rows) - 0.2)
            ax.set_yticks(places, [record["measure"] if ax is axes[0] else "" for record in rows], fontsize=6)
            ax.grid(axis="y", linewidth=0.3, color="0.9")
            ax.set_axisbelow(True)
        axes[1].set_xlim(-0.02, 1.02)
        for tick, record in zip(axes[0].get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if record["measure"] in highlight else "normal")
        figure.suptitle(title)
    return figure
