"""All figures of one setting in a folder, each as its data (JSON), a PDF and a PNG."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from specprune import __version__
from specprune._files import atomic_write, write_text
from specprune._records import to_json
from specprune.figures import (
    approximation_error,
    bias_variance,
    bound_bars,
    comparison,
    degrees_of_freedom,
    eigenvalue_decay,
    selection_rules,
)
from specprune.figures.setting import FigureSetting
from specprune.figures.style import figure_style

logger = logging.getLogger(__name__)

FIGURES: dict[str, ModuleType] = {
    "eigenvalue_decay": eigenvalue_decay,
    "degrees_of_freedom": degrees_of_freedom,
    "approximation_error": approximation_error,
    "bias_variance": bias_variance,
    "bound_bars": bound_bars,
    "selection_rules": selection_rules,
    "comparison": comparison,
}
# Without a date and a program version, the same data give the same file.
_METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}


def make_figures(setting: FigureSetting, out: str | os.PathLike[str], names: Sequence[str] | None = None) -> list[Path]:
    """Compute and draw figures, and write each as `<name>.json`, `<name>.pdf` and `<name>.png`.

    The data are written before anything is drawn, so that a figure can be drawn again (`redraw`) without computing.

    Args:
        setting: network and data.
        out: the folder; made if it is not there.
        names: keys of `FIGURES`; all of them if None.

    Returns:
        The files, in the order in which they were written.

    Raises:
        ValueError: an unknown name, or a network that pruning or the bounds refuse.
    """
    chosen = list(FIGURES) if names is None else list(names)
    for name in chosen:
        _find(name)
    folder = Path(out)
    paths = []
    for name in chosen:
        logger.info("figure %s: computing", name)
        record = {"figure": name, "provenance": _provenance(setting), "data": FIGURES[name].compute(setting)}
        path = folder / f"{name}.json"
        write_text(path, to_json(record) + "\n")
        paths += [path, *redraw(path)]
        logger.info("figure %s: written to %s", name, path.with_suffix(".pdf"))
    return paths


def redraw(path: str | os.PathLike[str]) -> list[Path]:
    """Draw a figure from the data that `make_figures` saved, and write PDF and PNG beside them.

    Args:
        path: the JSON file.

    Returns:
        The PDF and the PNG file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold the data of a figure.
    """
    source = Path(path)
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
        name, data = record["figure"], record["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: expected a figure's data as make_figures writes them ({error!r})") from error
    figure = _find(name).draw(data)
    return save_figure(figure, source.with_suffix(""))


def _find(name: Any) -> ModuleType:
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: expected one of {', '.join(FIGURES)}")
    return FIGURES[name]


def save_figure(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    """Write a figure as `<stem>.pdf` and `<stem>.png`, each whole or not at all, without dates.

    Args:
        figure: what a figure module's `draw` returned.
        stem: path without a suffix.

    Returns:
        The two files.
    """
    paths = [Path(f"{os.fspath(stem)}.{kind}") for kind in _METADATA]
    for path, kind in zip(paths, _METADATA, strict=True):
        with figure_style(), atomic_write(path) as stream:
            figure.savefig(stream, format=kind, metadata=_METADATA[kind])
    return paths


def _provenance(setting: FigureSetting) -> dict[str, Any]:
    return {
        "label": setting.label,
        "seed": setting.seed,
        "calibration": setting.calibration,
        "specprune": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
