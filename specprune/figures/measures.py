"""Figures of measures over a zoo of networks: the ranking with its intervals, and scatter plots against the gap."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from specprune.analysis.measure_ranking import MeasureRanking
from specprune.analysis.measure_table import MeasureTable
from specprune.analysis.spectral_measures import SPECTRAL_MEASURES
from specprune.figures.gallery import save_figure
from specprune.figures.style import BLACK, BLUE, COLOURS, MARKERS, REFERENCE, VERMILION, figure_style, new_figure

#: set in bold: what this package is about
SPECTRAL = (
    *(measure.name for measure in SPECTRAL_MEASURES),
    "spectral_prunability",
    "spectral_prunability_weights",
)
_SCATTERED = ("dof_1e-3", "spectral_prunability")
_ROW = 0.135  # inches a measure
_PANELS = (
    ("psi", r"granulated correlation $\Psi$", BLUE, "o"),
    ("mean_error", "mean sign error, all pairs alike", VERMILION, "s"),
)


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


def draw_scatter(
    values: Mapping[str, ArrayLike], gaps: ArrayLike, groups: Sequence[Any], group: str, title: str
) -> Figure:
    """Draw the gap against the rank of some measures, one panel each, with one colour a group of networks.

    Args:
        values: up to four measures, name to values, one a network, each so that a larger one predicts a larger gap.
        gaps: generalization gaps, one a network.
        groups: what colours the networks, such as their n.
        group: its name.
        title: one line.

    Returns:
        A figure of a paper's full width.

    Raises:
        ValueError: no measure, or more than four.
    """
    if not 1 <= len(values) <= 4:
        raise ValueError(f"{len(values)} measures: expected one to four, one a panel")
    kinds = sorted(set(groups))
    with figure_style():
        figure, axes = new_figure(columns=2, panels=len(values), height=2.1)
        for ax, (name, column) in zip(axes, values.items(), strict=True):
            ranks = (rankdata(column) - 0.5) / len(groups)
            for number, kind in enumerate(kinds):
                chosen = [index for index, own in enumerate(groups) if own == kind]
                ax.plot(
                    ranks[chosen],
                    100 * np.asarray(gaps)[chosen],
                    linestyle="none",
                    marker=MARKERS[number % len(MARKERS)],
                    color=COLOURS[(number + 1) % len(COLOURS)],
                    markersize=2,
                    markeredgewidth=0,
                    alpha=0.6,
                    label=f"{group} = {kind}",
                )
            ax.set_title(name, fontsize=7, color=BLACK)
            ax.set_xlabel("rank of the measure")
            ax.set_xlim(-0.02, 1.02)
        axes[0].set_ylabel("generalization gap (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(kinds), markerscale=2, frameon=False, fontsize=7
        )
        figure.suptitle(title)
    return figure


def save_zoo_figures(table: MeasureTable, ranking: MeasureRanking, out: str | os.PathLike[str]) -> list[Path]:
    """Write the ranking, and the gap against the two best and the spectral measures, as PDF and PNG.

    Args:
        table: networks, measures and gaps.
        ranking: of the measures.
        out: the folder.

    Returns:
        The files.
    """
    records = ranking.to_records()
    title = f"{ranking.networks} networks, {100 * ranking.level:g} % intervals"
    paths = save_figure(draw_ranking(records, title, SPECTRAL), Path(out) / "measure_ranking")
    best = [record["measure"] for record in sorted(records, key=lambda record: -record["psi"])][:2]
    names = list(dict.fromkeys([*best, *(name for name in _SCATTERED if name in table.measures)]))
    axes = table.hyperparameters
    group = "n" if "n" in axes else next(iter(axes))
    figure = draw_scatter(
        {name: table.column(name) for name in names}, table.gap, axes[group].tolist(), group, f"{len(table)} networks"
    )
    return paths + save_figure(figure, Path(out) / "measure_scatter")
