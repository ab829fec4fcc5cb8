"""Figure: every bound on one network and its pruned version as a bar, with the measured errors."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis import BoundTable, bound_table
from specprune.analysis.bound_bars import draw_bars
from specprune.compress import prune
from specprune.figures.setting import FigureSetting
from specprune.figures.style import figure_style, finish_figure, new_figure

KEEP = 0.05


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return the bounds on the network, and on what is left of it at 5 % of the FLOPs or the least it can be pruned to.

    Args:
        setting: network and data.

    Returns:
        "label", "delta", "samples" and "records": one for each bound.
    """
    keep = next((budget for budget in setting.budgets if budget >= KEEP), setting.budgets[-1])
    pruned = prune(setting.model, setting.calibration_batches, keep, seed=setting.seed)
    table = bound_table(
        setting.model,
        setting.dataset.train_batches(),
        pruned,
        setting.dataset.test_batches(),
        input_radius=setting.dataset.input_radius,
        seed=setting.seed,
    )
    return from_table(table, setting.label)


def from_table(table: BoundTable, label: str) -> dict[str, Any]:
    """Return the figure's data from a table that is there already.

    Args:
        table: from `specprune.bound_table`.
        label: the figure's title.
    """
    return {
        "label": label,
        "delta": table.delta,
        "samples": table.samples,
        "records": jsonable(table.to_records()),
    }


def draw(data: dict[str, Any]) -> Figure:
    """Draw one bar a bound.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (ax,) = new_figure(columns=2, height=0.9 + 0.15 * len(data["records"]))
        draw_bars(data["records"], ax)
        finish_figure(figure, f"{data['label']}: n = {data['samples']}, each with probability {1 - data['delta']:g}", 4)
    return figure
