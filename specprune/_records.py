"""Results as records, JSON and aligned tables: what every result class shares."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def format_value(value: Any) -> str:
    """Return a table cell: four significant digits for floats, plain text for the rest."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    if isinstance(value, list | tuple):
        return " ".join(format_value(item) for item in value)
    return str(value)


def format_table(records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, title: str = "") -> str:
    """Return records as an aligned text table: numbers to the right, text to the left.

    Args:
        records: one mapping a row.
        columns: the keys to show, in order; by default those of the first record.
        title: a line above the table.

    Returns:
        The table without a trailing newline; "(empty)" where there is no record.
    """
    head = [title] if title else []
    if not records:
        return "\n".join([*head, "(empty)"])
    names = list(columns) if columns is not None else list(records[0])
    rows = [[format_value(record.get(name)) for name in names] for record in records]
    right = [all(not isinstance(record.get(name), str) for record in records) for name in names]
    widths = [max(len(name), *(len(row[k]) for row in rows)) for k, name in enumerate(names)]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs).rstrip()

    return "\n".join([*head, line(names), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def escape_latex(text: str) -> str:
    """Return text with the characters escaped that LaTeX would take for commands."""
    for character in ("&", "%", "$", "#", "_"):
        text = text.replace(character, "\\" + character)
    return text


def jsonable(value: Any) -> Any:
    """Return `value` in types that strict JSON has; infinities and NaN become the strings "inf", "-inf", "nan"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return value if value is None or isinstance(value, str) else str(value)


def to_json(payload: Any) -> str:
    """Return strict JSON text (RFC 8259) of mappings, sequences, numbers, NumPy values and strings."""
    return json.dumps(jsonable(payload), indent=2, allow_nan=False)
