"""The page of all figures, drawn from small networks and problems, with the commands that make them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from sphinx.application import Sphinx
from sphinx.util import logging
from written import heading, source_digest, write_pages

from specprune.figures import FIGURES, GROUPS, GalleryFigure, figures_of

logger = logging.getLogger(__name__)
FOLDER = "figures"
STAMP = ".source"
#: Pixels of the page for an inch on paper, so that letters of all figures have one size.
SCALE = 130


def draw_figures(folder: Path) -> None:
    """See that the pictures of all figures, and their data, are in the folder and are those of this source."""
    digest, stamp = source_digest(), folder / STAMP
    whole = all((folder / f"{name}.png").exists() for name in FIGURES)
    if whole and stamp.exists() and stamp.read_text() == digest:
        return
    logger.info("drawing %d figures ...", len(FIGURES))
    for path in folder.glob("*.json"):  # the command would not compute these again
        path.unlink()
    command = ["-m", "specprune", "figures", "all", "--quick", "--format", "png", "--out", str(folder)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"specprune figures all --quick failed: {done.stderr}")
    stamp.write_text(digest)


def _section(figure: GalleryFigure, picture: Path) -> str:
    width = SCALE * plt.imread(picture).shape[1] / 200  # figures have 200 dots an inch
    network = " --weights FILE" if figure.needs == "network" else ""
    return "\n".join(
        [
            heading(figure.name, "~"),
            f"{figure.title[0].upper()}{figure.title[1:]}.\n",
            f".. image:: {figure.name}.png",
            f"   :alt: {figure.title}",
            f"   :width: {width:.0f}px\n",
            ".. code-block:: text\n",
            f"   specprune figures {figure.name}{network}\n",
        ]
    )


def write_figures(app: Sphinx) -> None:
    """Draw the figures and write their page."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    draw_figures(folder)
    parts = [
        heading("Figures", "="),
        "All figures that ``specprune figures`` draws, here with ``--quick``: small networks and problems, few draws.",
        "They show what a figure looks like, not what is true of large networks. Without ``--quick`` the commands take",
        "minutes; ``FILE`` is a checkpoint of ``specprune train``, and without ``--weights`` a network is trained on",
        "the digits that come with the package. Beside each picture lie its data and what made them.\n",
    ]
    for group in GROUPS:
        names = figures_of(group)
        if names:
            parts += [
                heading(group[0].upper() + group[1:], "-"),
                *(_section(FIGURES[name], folder / f"{name}.png") for name in names),
            ]
    write_pages(folder, {"index.rst": "\n".join(parts)})


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_figures, priority=100)
    return {"parallel_read_safe": True}
