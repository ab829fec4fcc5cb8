"""Figure: the generalization gap of a zoo of networks against some measures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from specprune._records import jsonable
from specprune.analysis.measure_ranking import MeasureRanking
from specprune.analysis.measure_table import MeasureTable
from specprune.figures.measure_ranking import digits_zoo
from specprune.figures.setting import Conditions, Parts
from specprune.figures.style import BLACK, COLOURS, MARKERS, figure_style, new_figure

_SHOWN = ("pacbayes_mag_flatness", "params", "dof_1e-3", "log_bartlett")
_SPECTRAL_SHOWN = ("dof_1e-3", "spectral_prunability")
_CROWD = 150  # more networks than this get smaller marks


def compute(conditions: Conditions, parts: Parts) -> dict[str, Any]:
    """Train a small zoo on the digits and take four measures of its networks: flatness, size, dimensions, norms.

    Args:
        conditions: seed and device; quick ones take fewer and smaller networks.
        parts: networks that are trained or measured stay so when a run is interrupted.

    Returns:
        See `from_table`.
    """
    table = digits_zoo(conditions, parts, _SHOWN).table
    return from_table(table, _SHOWN, f"digits, {len(table)} networks")


def best_and_spectral(table: MeasureTable, ranking: MeasureRanking) -> tuple[str, ...]:
    """Return up to four measures worth a panel: the two that predict best, and two spectral ones if they are there.

    Args:
        table: what was measured.
        ranking: of the measures.
    """
    best = sorted(ranking.to_records(), key=lambda record: -record["psi"])[:2]
    spectral = [name for name in _SPECTRAL_SHOWN if name in table.measures]
    return tuple(dict.fromkeys([*(record["measure"] for record in best), *spectral]))


def from_table(table: MeasureTable, names: Sequence[str], label: str) -> dict[str, Any]:
    """Return the figure's data: networks are coloured by n, if the zoo varies it.

    Args:
        table: networks, measures and gaps.
        names: one to four measures.
        label: the figure's title.
    """
    axes = table.hyperparameters
    group = "n" if "n" in axes else next(iter(axes))
    return {
        "label": label,
        "group": group,
        "groups": jsonable(axes[group].tolist()),
        "gap": jsonable(np.asarray(table.gap).tolist()),
        "measures": {name: jsonable(np.asarray(table.column(name)).tolist()) for name in names},
    }


def draw(data: Mapping[str, Any]) -> Figure:
    """Draw the gap against the ranks of the measures.

    Args:
        data: what `from_table` returned.
    """
    return draw_scatter(data["measures"], data["gap"], data["groups"], data["group"], data["label"])


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
    size = 2.0 if len(groups) > _CROWD else 3.5
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
                    markersize=size,
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
            handles,
            labels,
            loc="outside lower center",
            ncols=len(kinds),
            markerscale=4 / size,
            frameon=False,
            fontsize=7,
        )
        figure.suptitle(title)
    return figure
