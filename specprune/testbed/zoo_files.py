"""The files of a zoo: a manifest of what it is and a shard for the networks that were trained together."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specprune._files import load_arrays, read_json, write_text
from specprune._records import shortened, to_json
from specprune.testbed.zoo import ZooSetting

MANIFEST = "zoo.json"
SHARD = "zoo shard"
MEASURED = ("epochs", "converged", "diverged", "train_loss", "train_error", "test_loss", "test_error")
_FORMAT = 1
_KIND = "zoo"
# Shards have no other names: what a manifest lists is read, and renamed where it is damaged.
_SHARD_NAME = re.compile(r"[0-9a-f]{24}\.npz")


def check_plan(place: Path, found: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse a zoo of another plan than the one that was asked for."""
    for name, value in plan.items():
        if found.get(name) != value:
            raise ValueError(
                f"{place} holds a zoo with {name} {found.get(name)}, asked for {value}: "
                "give the same again, or another folder"
            )


def read_manifest(place: Path) -> dict[str, Any]:
    """Return the manifest of a zoo, checked."""
    path = place / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (expected the folder of a zoo)")
    try:
        manifest = read_json(path, "the manifest of a zoo")
        if manifest["kind"] != _KIND or manifest["format"] != _FORMAT:
            raise ValueError(f"kind {manifest['kind']!r}, format {manifest['format']!r}; this version reads {_FORMAT}")
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a readable manifest of a zoo ({shortened(str(error))})") from error
    return dict(manifest)


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that is not as `write_manifest` writes it."""
    plan, shards = manifest["plan"], manifest["shards"]
    sizes = [*plan["input_shape"], plan["classes"], plan["max_epochs"]]
    whole = all(type(size) is int and 1 <= size < 2**31 for size in sizes)
    if len(sizes) != 5 or not whole or math.prod(sizes[:3]) >= 2**31:
        raise ValueError(f"images, classes and epochs {sizes}: expected five positive whole numbers")
    if type(plan["target_loss"]) not in (int, float):
        raise ValueError(f"target_loss {plan['target_loss']!r}: expected a number")
    for record in manifest["settings"]:
        if type(ZooSetting(**record).data) is not str:
            raise ValueError(f"data {record['data']!r}: expected a name")
    if not isinstance(shards, dict):
        raise ValueError(f"shards {shortened(repr(shards))}: expected an object")
    odd = [name for name in shards if not _SHARD_NAME.fullmatch(name)]
    if odd:
        raise ValueError(f"a shard {shortened(repr(odd[0]))}: expected names of 24 hexadecimal digits and .npz")


def write_manifest(
    place: Path,
    plan: Mapping[str, Any],
    settings: Sequence[ZooSetting],
    shards: Mapping[str, Mapping[str, Any]],
    chunks: Mapping[str, Sequence[ZooSetting]],
) -> None:
    """Write what the zoo is; shards list the places of their settings, those finished before and those to come."""
    index = {setting: k for k, setting in enumerate(settings)}
    held = {name: [index[ZooSetting(**r["setting"])] for r in header["networks"]] for name, header in shards.items()}
    planned = {name: [index[setting] for setting in chunk] for name, chunk in chunks.items()}
    manifest = {
        "kind": _KIND,
        "format": _FORMAT,
        "plan": plan,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "settings": [dataclasses.asdict(setting) for setting in settings],
        "shards": {**held, **planned},
    }
    write_text(place / MANIFEST, to_json(manifest) + "\n")


def read_shards(
    place: Path, names: Iterable[str], whole: bool
) -> tuple[dict[str, dict[str, Any]], list[tuple[Path, str]]]:
    """Return the headers of the shards that are there by name, and those that cannot be read, with the reason.

    Args:
        place: the folder.
        names: of the shards that the manifest lists.
        whole: read and check the weights as well.
    """
    headers, damaged = {}, []
    for name in names:
        path = place / name
        if path.is_file():
            try:
                header = load_arrays(path, SHARD, None if whole else [])[1]
                _check_header(header)
                headers[name] = header
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                reason = shortened(str(error))
                named = isinstance(error, ValueError) and str(path) in reason
                damaged.append((path, reason if named else f"{path}: a damaged header ({reason})"))
    return headers, damaged


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse a shard's header that is not as `train_zoo` writes it."""
    if not isinstance(header["networks"], list) or not isinstance(header["parameters"], list):
        raise ValueError("networks and parameters: expected lists")
    if type(header["seconds"]) not in (int, float) or header["seconds"] < 0:
        raise ValueError(f"seconds {header['seconds']!r}: expected a number that is not negative")
    for record in header["networks"]:
        if type(ZooSetting(**record["setting"]).data) is not str:
            raise ValueError(f"data {record['setting']['data']!r}: expected a name")
        if type(record["epochs"]) is not int or record["epochs"] < 0:
            raise ValueError(f"epochs {record['epochs']!r}: expected a whole number")
        if type(record["converged"]) is not bool or type(record["diverged"]) is not bool:
            raise ValueError(f"converged {record['converged']!r}, diverged {record['diverged']!r}: expected booleans")
        for key in ("train_error", "test_error"):
            if type(record[key]) not in (int, float) or not 0 <= record[key] <= 1:
                raise ValueError(f"{key} {record[key]!r}: expected a share")
        for key in ("train_loss", "test_loss"):
            if type(record[key]) not in (int, float) and record[key] not in ("inf", "-inf", "nan"):
                raise ValueError(f"{key} {record[key]!r}: expected a number")


def shard_name(settings: Sequence[ZooSetting]) -> str:
    """Return the name of the shard that holds some settings."""
    return hashlib.sha256("".join(setting.digest for setting in settings).encode()).hexdigest()[:24] + ".npz"
