"""A figure's record in a JSON file; long lists of numbers are kept in an NPZ file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specprune._files import load_arrays, read_json, save_arrays, write_text
from specprune._records import jsonable, shortened, to_json

_KIND = "figure data"
_LONG = 500
_REFERENCE = "npz"
#: What `np.array` makes of lists of whole numbers, and of floats.
_LISTS = (np.dtype(np.int64).str, np.dtype(np.uint64).str, np.dtype(np.float64).str)
#: In all arrays together: as lists, numbers take ten times the room.
_MOST_NUMBERS = 4_000_000


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, lists of 500 numbers or more as arrays in `<stem>.npz`; each file whole or not at all.

    Args:
        path: the JSON file.
        record: with a "digest", which says that both files belong together.

    Raises:
        ValueError: more than 4 million numbers in long lists.
    """
    arrays: dict[str, np.ndarray] = {}
    short = _take_out(jsonable(record), arrays)
    _check_count(arrays, path)
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
    expected = "a figure's data as make_figures writes them"
    record = read_json(path, expected)
    if not isinstance(record, dict) or type(record.get("figure")) is not str or "data" not in record:
        raise ValueError(f"{path}: has no name of a figure, or no data; expected {expected}")
    references = list(_references(record))
    if not references:
        return record
    beside = path.with_suffix(".npz")
    arrays, header = load_arrays(beside, _KIND)
    if "digest" not in record or header.get("digest") != record["digest"]:
        raise ValueError(f"{beside}: not written together with {path.name}; delete both and make the figure again")
    missing = [name for name in references if type(name) is not str or name not in arrays]
    if missing or len(set(references)) < len(references):
        raise ValueError(
            f"{beside}: has no array {shortened(repr(missing))}, which {path.name} refers to"
            if missing
            else f"{path}: refers to an array twice; expected {expected}"
        )
    odd = [name for name, array in arrays.items() if array.dtype.str not in _LISTS or array.ndim != 1]
    if odd or not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"{beside}: {odd[:3]} or others are no lists of finite numbers; make the figure again")
    _check_count(arrays, beside)
    return {key: _put_back(value, arrays) for key, value in record.items()}


def _check_count(arrays: dict[str, np.ndarray], path: Path) -> None:
    count = sum(array.size for array in arrays.values())
    if count > _MOST_NUMBERS:
        raise ValueError(f"{path}: {count} numbers in long lists, expected at most {_MOST_NUMBERS}")


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


def _references(value: Any) -> Iterator[Any]:
    """Yield the names of the arrays that a record refers to."""
    if _is_reference(value):
        yield value[_REFERENCE]
        return
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(item)


def _put_back(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if _is_reference(value):
        return arrays[value[_REFERENCE]].tolist()
    if isinstance(value, dict):
        return {key: _put_back(item, arrays) for key, item in value.items()}
    return [_put_back(item, arrays) for item in value] if isinstance(value, list) else value
