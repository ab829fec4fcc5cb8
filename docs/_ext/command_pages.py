"""The command-line reference: what each command says to --help."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from sphinx.application import Sphinx
from written import heading, indented, write_pages

from specprune._arguments import build_parser
from specprune.cli import COMMANDS

FOLDER = "commands"
#: Characters in a line of help: what fits into the column of text.
WIDTH = "84"


def help_text(words: Sequence[str]) -> str:
    """Return what the command line prints for these words and --help."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(io.StringIO()) as stream, contextlib.suppress(SystemExit):
            build_parser().parse_args([*words, "--help"])
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return stream.getvalue()


def write_commands(app: Sphinx) -> None:
    """Write the page."""
    parts = [
        heading("Command line", "="),
        "The exit code is 0 for success, 1 for a failed job (with its reason on one line), 2 for bad arguments.\n",
        ".. code-block:: text\n",
        indented(help_text([])),
        "",
    ]
    for name in COMMANDS:
        parts += [heading(f"specprune {name}", "-"), ".. code-block:: text\n", indented(help_text([name])), ""]
    write_pages(Path(app.srcdir) / FOLDER, {"index.rst": "\n".join(parts)})


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_commands, priority=100)
    return {"parallel_read_safe": True}
