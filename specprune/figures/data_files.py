"""A figure's record in a JSON file; long lists of numbers are kept in an NPZ file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from specprune._files import load_arrays, save_arrays, write_text
from specprune._records import jsonable, to_json

_KIND = "figure data"
_LONG = 500
_REFERENCE = "npz"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, lists of 500 numbers or more as arrays in `<stem>.npz`; each file whole or not at all.

    Args:
        path: the JSON file.
        record: with a "digest", which says that both files belong together.
    """
    arrays: dict[str, np.ndarray] = {}
    short = _take_out(jsonable(record), arrays)
    beside = path.with_suffix(".npz")
    if arrays:
        save_arrays(beside, arrays, {"kind": _KIND, "digest": record["digest"]})
    write_text(path, to_json(short) + "\n")
    if not arrays:
        beside.unlink(missing_ok=True)  # of an earlier record


def read_record(path: Path) -> dict[str, Any]:
    """Return a record that `write_record` wrote, with its arrays as lists.

    Args:
        path: the JSON file.

    Raises:
        FileNotFoundError: there is no such file, or its NPZ file is gone.
        ValueError: it is not a figure's record, or the NPZ file is of another one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["figure"], record["data"]
        if not _refers(record["data"]):
            return record
        digest = record["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a figure's data as make_figures writes them ({error!r})") from error
    beside = path.with_suffix(".npz")
    arrays, header = load_arrays(beside, _KIND)
    if header.get("digest") != digest:
        raise ValueError(f"{beside}: not written together with {path.name}; delete both and make the figure again")
    try:
        return _put_back(record, arrays)
    except KeyError as error:
        raise ValueError(f"{beside}: has no array {error}, which {path.name} refers to") from error


def _take_out(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        return {key: _take_out(item, arrays) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    kinds = {type(item) for item in value}
    if len(value) < _LONG or kinds not in ({float}, {int}):
        return [_take_out(item, arrays) for item in value]
    name = f"array_{len(arrays)}"
    arrays[name] = np.array(value)
    return {_REFERENCE: name}


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {_REFERENCE}


def _refers(value: Any) -> bool:
    if _is_reference(value):
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_refers(item) for item in items)


def _put_back(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if _is_reference(value):
        return arrays[value[_REFERENCE]].tolist()
    if isinstance(value, dict):
        return {key: _put_back(item, arrays) for key, item in value.items()}
    return [_put_back(item, arrays) for item in value] if isinstance(value, list) else value
