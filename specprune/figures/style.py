"""How all figures look: one style, colours that everyone can tell apart, sizes of a paper's columns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from specprune.analysis.tradeoff import CURVE_STYLES

STYLE = "specprune.figures.specprune"
COLUMN_WIDTHS = {1: 3.4, 2: 7.0}

# Okabe and Ito's colours, distinguishable with any colour vision; yellow is left out, it is too light for a line.
BLACK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
MARKERS = ("o", "v", "^", "s", "D", "P", "X")
LINE_STYLES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))

# What a curve means has one look in all figures, the one of `Tradeoff.plot`.
ROLES = CURVE_STYLES
REFERENCE: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 0.8}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Use the package's style inside a `with` block, whatever the caller's settings; they are put back afterwards."""
    with matplotlib.style.context(STYLE, after_reset=True):
        try:
            yield
        finally:
            interactive = matplotlib.is_interactive()
    # A notebook turns this on when it opens its first figure; put back, it would show none of the later ones.
    matplotlib.interactive(interactive)


def series_style(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of the index-th of many equal curves, such as layers.

    Colours repeat after seven curves, and line styles after four, so that 28 curves differ.
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5,
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def new_figure(
    columns: int = 1, panels: int = 1, height: float = 2.4, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as one or two columns of a paper, with panels side by side.

    It belongs to no window and to no global list of figures, so it needs no closing.

    Args:
        columns: 1 (3.4 inches) or 2 (7.0 inches).
        panels: number of axes, at least 1.
        height: in inches, without the legends that `finish_figure` adds.
        sharey: whether all panels have one vertical axis, labelled at the left.

    Raises:
        ValueError: another number of columns, or no panel.
    """
    if columns not in COLUMN_WIDTHS or panels < 1:
        raise ValueError(f"columns={columns}, panels={panels}: expected 1 or 2 columns and at least 1 panel")
    figure = Figure(figsize=(COLUMN_WIDTHS[columns], height), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=sharey, squeeze=False)[0])


def finish_figure(figure: Figure, title: str, columns: int = 2) -> None:
    """Put a legend above each panel, where it cannot cover a curve, and a title above all.

    The figure grows by the height of its tallest legend, so that panels keep their size.

    Args:
        figure: from `new_figure`, with labelled curves.
        title: one line.
        columns: of a legend; fewer where the labels are too long for that.
    """
    figure.suptitle(title)
    room = figure.bbox.width / len(figure.axes)
    tallest = 0.0
    for ax in figure.axes:
        for ncols in range(columns, 0, -1):
            legend = ax.legend(
                loc="lower left", bbox_to_anchor=(-0.15, 1.0), ncols=ncols, borderaxespad=0.2, markerscale=0.8
            )
            size = legend.get_window_extent()
            if size.width <= 0.98 * room:
                break
        tallest = max(tallest, size.height / figure.dpi)
    figure.set_figheight(figure.get_figheight() + tallest)


def shared_legend(figure: Figure, axes: Sequence[Axes], title: str) -> None:
    """Put one legend below all panels, and a title above them; the figure grows by the legend's height.

    Args:
        figure: with a constrained layout and labelled curves.
        axes: whose curves are in the legend; of equal labels the first counts.
        title: one line.
    """
    figure.suptitle(title)
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for ncols in range(len(handles), 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)
        size = legend.get_window_extent()
        if size.width <= 0.98 * figure.bbox.width or ncols == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def numbers(values: Iterable[Any]) -> np.ndarray:
    """Return values read from JSON as floats; None becomes NaN, which is not drawn, and "inf" infinity."""
    return np.array([np.nan if value is None else float(value) for value in values])


def kept_axis(ax: Axes, fractions: Iterable[float], what: str = "FLOPs") -> None:
    """Make x a logarithmic axis of what is kept, as fractions in (0, 1] labelled in percent."""
    smallest = min(fractions)
    ticks = [tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= 0.9 * smallest]
    ax.set_xscale("log")
    ax.set_xlim(0.85 * smallest, 1.15)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{100 * tick:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"{what} kept (%)")
