"""Results as records, JSON, aligned tables and LaTeX tables: what every result class shares."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: JSON in a file may not be nested deeper: what goes through it calls itself at every level.
_DEEPEST = 64


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


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "||": r"$\|$",
    "|": "$|$",
    "<=": r"$\leq$",
    ">=": r"$\geq$",
    "<": "$<$",
    ">": "$>$",
    **{character: "\\" + character for character in "&%$#_{}"},
}
_SPECIAL = re.compile(r"<=|>=|\|\||" + "|".join(re.escape(key) for key in _LATEX if len(key) == 1))
_POWER = re.compile(r"(-?[\d.]+)e([+-]\d+)")


def escape_latex(text: str) -> str:
    """Return text with the characters escaped that LaTeX would take for commands; comparisons become formulas."""
    return _SPECIAL.sub(lambda found: _LATEX[found.group()], text)


def to_latex_table(
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    caption: str = "",
    *,
    mark: Callable[[Mapping[str, Any], str, str], str] | None = None,
) -> str:
    """Return records as a LaTeX table in the manner of booktabs: numbers to the right, text to the left.

    Args:
        records: one mapping a row.
        columns: the keys to show, in order, or a mapping from these to their headings in plain words; by default those
            of the first record.
        caption: in plain words; without one it is a bare tabular, with one a table that floats.
        mark: takes a record, a key and the finished cell, and returns the cell as it is to be shown.

    Returns:
        LaTeX that needs the package booktabs, with a newline at the end.

    Raises:
        ValueError: there is no record, or no column.
    """
    names = list(columns) if columns is not None else list(records[0]) if records else []
    if not records or not names:
        raise ValueError(f"{len(records)} records, {len(names)} columns: a LaTeX table needs at least one of each")
    heads = [columns[name] if isinstance(columns, Mapping) else name for name in names]
    rows = []
    for record in records:
        cells = [(name, _latex_cell(record.get(name))) for name in names]
        rows.append([cell if mark is None else mark(record, name, cell) for name, cell in cells])
    places = "".join("l" if any(isinstance(record.get(name), str) for record in records) else "r" for name in names)
    lines = [rf"\begin{{tabular}}{{{places}}}", r"\toprule", _latex_row(escape_latex(head) for head in heads)]
    lines += [r"\midrule", *map(_latex_row, rows), r"\bottomrule", r"\end{tabular}"]
    if caption:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(caption)}}}", *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(value: Any) -> str:
    text = format_value(value)
    if isinstance(value, str | list | tuple | bool | np.bool_) or value is None:
        # Behind the end of a row, LaTeX would take these for a length and a command.
        return ("{}" if text.startswith(("[", "*")) else "") + escape_latex(text)
    if text in ("inf", "-inf"):
        return rf"${text[:-3]}\infty$"
    power = _POWER.fullmatch(text)
    if power is not None:
        return rf"${power[1]} \cdot 10^{{{int(power[2])}}}$"
    return f"${text}$" if text.startswith("-") else text


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


def from_json(text: str) -> Any:
    """Return the value of strict JSON text (RFC 8259), from a file that somebody else may have written.

    Args:
        text: a JSON document.

    Raises:
        ValueError: it is not JSON, has NaN or Infinity or a number too large for a float, the same key twice in an
            object, or is nested more than 64 deep.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique_keys,
        )
    except RecursionError:
        raise ValueError(f"JSON nested more than {_DEEPEST} deep") from None
    level, depth = [value], 0
    while level := [item for outer in level if isinstance(outer, dict | list) for item in _items(outer)]:
        depth += 1
        if depth >= _DEEPEST:
            raise ValueError(f"JSON nested more than {_DEEPEST} deep")
    return value


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(text)} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"the number {shortened(text)} is too large")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shortened(repr(next(key for key in keys if keys.count(key) > 1)))} is there twice")
    return found


def shortened(text: str) -> str:
    """Return text for a message: 200 characters at most."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def to_json(payload: Any) -> str:
    """Return strict JSON text (RFC 8259) of mappings, sequences, numbers, NumPy values and strings."""
    return json.dumps(jsonable(payload), indent=2, allow_nan=False)
