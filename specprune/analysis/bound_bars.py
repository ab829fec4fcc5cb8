"""Bounds as bars: how far each is from saying something, and from the measured error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: distinguishable with any colour vision; hatching carries the difference in grey print.
_KINDS: dict[str, dict[str, Any]] = {
    "holds, below 1": {"color": "#009E73"},
    "holds, vacuous": {"color": "#56B4E9", "hatch": "//"},
    "a hypothesis is broken": {"color": "#E69F00", "hatch": "xx"},
}


def draw_bars(records: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw one horizontal bar a bound on a logarithmic axis, with the measured test errors and the vacuous line at 1.

    Args:
        records: from `BoundTable.to_records`.
        ax: where to draw; a new figure if None.  Nothing is shown and no global setting is changed.

    Returns:
        The Axes.
    """
    shown = [record for record in records if _number(record["value"]) < math.inf]
    if ax is None:
        import matplotlib.pyplot as plt  # imported late: tables without plots should not load it

        _, ax = plt.subplots(figsize=(6.5, 0.8 + 0.2 * len(shown)), layout="constrained")
    values = [_number(record["value"]) for record in shown]
    tests = [(row, _number(record["test_error"])) for row, record in enumerate(shown) if record.get("test_error")]
    low = min([0.1, *(value for _, value in tests), *values]) / 2
    named: set[str] = set()
    for row, (record, value) in enumerate(zip(shown, values, strict=True)):
        kind = _kind(record)
        style = {"height": 0.7, "edgecolor": "white", "linewidth": 0, **_KINDS[kind]}
        ax.barh(row, value - low, left=low, label="_" if kind in named else kind, **style)
        named.add(kind)
    if tests:
        rows, errors = zip(*tests, strict=True)
        style = {"linestyle": "none", "marker": "|", "color": "black", "markersize": 6, "markeredgewidth": 1.5}
        ax.plot(errors, rows, label="test error", **style)
    ax.axvline(1.0, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.set_xlim(low, 2 * max([1.0, *values]))
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_yticks(range(len(shown)), [f"{record['bound']} [{record['net']}]" for record in shown])
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("bound on the error rate (vacuous from 1)")
    ax.set_ylabel("bound [network]")
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    return ax


def _number(value: Any) -> float:
    return float(value)  # JSON has infinities as text


def _kind(record: Mapping[str, Any]) -> str:
    if not record["hypotheses_hold"]:
        return "a hypothesis is broken"
    return "holds, vacuous" if record["vacuous"] else "holds, below 1"
