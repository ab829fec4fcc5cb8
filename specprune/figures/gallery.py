"""Figures in a folder, each as its data with what made them (JSON), and as pictures."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from specprune import __version__
from specprune._files import atomic_write, lock_folder
from specprune._records import shortened, to_json
from specprune.figures.data_files import read_record, write_record
from specprune.figures.registry import FIGURES, NETWORK, GalleryFigure
from specprune.figures.setting import Conditions, FigureSetting, Parts
from specprune.figures.style import figure_style

logger = logging.getLogger(__name__)

#: The formats of pictures.  Without a date and a program version, the same data give the same file.
FORMATS: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}


def make_figures(
    setting: FigureSetting | None,
    out: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    conditions: Conditions | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    command: str = "",
) -> list[Path]:
    """Compute and draw figures, and write each as `<name>.json` and, in every format, as a picture.

    The data are written before anything is drawn.  Data that are there already and were computed from the same inputs
    by the same version of the package are drawn again, not computed again; to compute them anew, delete the file.

    Args:
        setting: network and data; None where no figure of `names` needs a network.
        out: the folder; made if it is not there.
        names: keys of `FIGURES`; all that can be made from the setting if None.
        conditions: of figures that need no network; by default the setting's seed, quickness and device.
        formats: of the pictures, keys of `FORMATS`.
        command: the words of the command line, for the record.

    Returns:
        The files, in the order in which they were written: data, then pictures.

    Raises:
        ValueError: an unknown name or format, a figure that needs a network without one, or a network that pruning or
            the bounds refuse; another run is at work in the folder.
    """
    unknown = [form for form in formats if form not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats {list(formats)}: expected some of {', '.join(FORMATS)}")
    if conditions is None:
        conditions = Conditions() if setting is None else Conditions(setting.seed, setting.quick, setting.device)
    possible = [name for name, figure in FIGURES.items() if setting is not None or figure.needs != NETWORK]
    chosen = [_find(name) for name in (possible if names is None else names)]
    sources: list[FigureSetting | Conditions] = []
    for figure in chosen:
        if figure.needs == NETWORK and setting is None:
            raise ValueError(f"figure {figure.name!r} needs a trained network and its data: give a FigureSetting")
        sources.append(setting if figure.needs == NETWORK and setting is not None else conditions)
    folder, paths = Path(out), []
    pairs = zip(chosen, sources, strict=True)
    with lock_folder(folder):
        for figure, source in tqdm(pairs, total=len(chosen), desc="figures", disable=None, leave=False):
            path = folder / f"{figure.name}.json"
            _provide(figure, source, path, command)
            record = read_record(path)
            paths += [path, *save_figure(figure.draw(record["data"]), path.with_suffix(""), formats)]
            logger.info("figure %s: drawn beside %s", figure.name, path)
    return paths


def redraw(path: str | os.PathLike[str], formats: Sequence[str] = tuple(FORMATS)) -> list[Path]:
    """Draw a figure from the data that `make_figures` saved, and write the pictures beside them.

    Args:
        path: the JSON file.
        formats: of the pictures, keys of `FORMATS`.

    Returns:
        The pictures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold the data of a figure.
    """
    source = Path(path)
    record = read_record(source)
    entry = _find(record["figure"])
    try:
        figure = entry.draw(record["data"])
    except Exception as error:  # data that no `compute` returned may fail anywhere
        reason = shortened(f"{type(error).__name__}: {error}")
        raise ValueError(f"{source}: not the data of the figure {entry.name!r} ({reason}); make it again") from error
    return save_figure(figure, source.with_suffix(""), formats)


def save_figure(figure: Figure, stem: str | os.PathLike[str], formats: Sequence[str] = tuple(FORMATS)) -> list[Path]:
    """Write a figure as `<stem>.<format>`, each whole or not at all, without dates.

    Args:
        figure: what a figure module's `draw` returned.
        stem: path without a suffix.
        formats: keys of `FORMATS`.

    Returns:
        The files.
    """
    paths = [Path(f"{os.fspath(stem)}.{kind}") for kind in formats]
    for path, kind in zip(paths, formats, strict=True):
        with figure_style(), atomic_write(path) as stream:
            figure.savefig(stream, format=kind, metadata=FORMATS[kind])
    return paths


def _find(name: Any) -> GalleryFigure:
    if name not in FIGURES:
        raise ValueError(f"unknown figure {shortened(repr(name))}: expected one of {', '.join(FIGURES)}")
    return FIGURES[name]


def _provide(figure: GalleryFigure, source: FigureSetting | Conditions, path: Path, command: str) -> None:
    """See that the data of a figure are in the file, computed from these inputs."""
    inputs = {"figure": figure.name, "specprune": __version__, **source.inputs}
    digest = hashlib.sha256(to_json(inputs).encode()).hexdigest()
    if _digest_of(path) == digest:
        logger.info("figure %s: data of the same inputs are there", figure.name)
        return
    logger.info("figure %s: computing", figure.name)
    parts = Parts(path.parent / f".{figure.name}-{digest[:12]}")
    data = figure.compute(source, parts) if figure.in_parts else figure.compute(source)
    record = {
        "figure": figure.name,
        "title": figure.title,
        "inputs": inputs,
        "digest": digest,
        "provenance": _provenance(source, command),
        "data": data,
    }
    write_record(path, record)
    if parts.folder is not None:
        shutil.rmtree(parts.folder, ignore_errors=True)


def _digest_of(path: Path) -> str | None:
    """Return the digest in a figure's file; None if there is no such file, or not a whole one of ours."""
    try:
        return read_record(path).get("digest")
    except (FileNotFoundError, ValueError):
        return None


def _provenance(source: FigureSetting | Conditions, command: str) -> dict[str, Any]:
    device = torch.device(source.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **({"label": source.label, "calibration": source.calibration} if isinstance(source, FigureSetting) else {}),
        "seed": source.seed,
        "quick": source.quick,
        "device": f"{device} ({name})",
        "command": command,
        "specprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
