"""The examples, for sphinx-gallery: it reads comments in reStructuredText, and theirs are in Markdown.

Before sphinx-gallery runs, each script is written anew with its Markdown cells translated. After it ran, the files that
it offers for download are replaced by the scripts as they are, and by notebooks with the same cells.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from sphinx.application import Sphinx
from written import heading, indented, source_digest, write_pages

#: The translated scripts, under the folder of the documentation; sphinx-gallery reads them.
TRANSLATED = "_scripts"
#: What sphinx-gallery writes.
FOLDER = "examples"
STAMP = ".source"
_LINES = {"h1": "=", "h2": "-", "h3": "~"}
_MARKDOWN = MarkdownIt("commonmark").use(dollarmath_plugin)


def cells(text: str) -> list[tuple[str, str]]:
    """Split a script in percent format into its cells: ("markdown" or "code", text without comment signs)."""
    before, *parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    if before.strip() or not parts:
        raise ValueError(f"a script of cells starts with '# %%', not with {text[:40]!r}")
    found = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        if kind.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()))
        elif not kind.strip():
            found.append(("code", body.strip()))
        else:
            raise ValueError(f"cell {kind.strip()!r}: expected '# %%' or '# %% [markdown]'")
    return found


def restructured(markdown: str) -> str:
    """Translate Markdown with dollar math to reStructuredText.

    Args:
        markdown: headings, paragraphs, lists, math, and in them emphasis, code, math and links.

    Returns:
        The same in reStructuredText.

    Raises:
        ValueError: a construct that is not translated.
    """
    return "\n".join(_blocks(iter(_MARKDOWN.parse(markdown)), "")).strip() + "\n"


def _blocks(tokens: Iterator[Token], end: str) -> Iterator[str]:
    for token in tokens:
        if token.type == end:
            return
        if token.type == "heading_open":
            yield heading(_inline(next(tokens).children or []), _LINES[token.tag])
            next(tokens)
        elif token.type == "paragraph_open":
            yield _inline(next(tokens).children or []) + "\n"
            next(tokens)
        elif token.type == "math_block":
            yield f".. math::\n\n{indented(token.content.strip())}\n"
        elif token.type == "fence":
            yield f".. code-block:: {token.info.strip() or 'text'}\n\n{indented(token.content)}\n"
        elif token.type in ("bullet_list_open", "ordered_list_open"):
            yield from _items(tokens, token.type.replace("open", "close"))
        else:
            raise ValueError(f"Markdown construct {token.type!r} ({token.content!r}) is not translated")


def _items(tokens: Iterator[Token], end: str) -> Iterator[str]:
    for token in tokens:
        if token.type == end:
            return
        mark = f"{token.info}. " if end.startswith("ordered") else "- "
        text = "\n".join(_blocks(tokens, "list_item_close"))
        yield mark + indented(text, len(mark)).strip() + "\n"


def _inline(tokens: Sequence[Token]) -> str:
    """Return the text of a paragraph; inline markup touches no letters, and emphasis holds no other markup."""
    parts: list[tuple[str, bool]] = []  # text, and whether it is markup
    mark, link = "", ""
    for token in tokens:
        if token.type == "text":
            text = re.sub(r"([\\*`_|])", r"\\\1", token.content)
            inner = text.strip()
            if not inner or not (mark or link):
                parts.append((text, False))
            elif link:
                parts.append((f"`{text} <{link}>`__", True))
            else:  # the blanks at both ends stay outside: "**what $x$ is**"
                left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
                parts += [(left, False), (f"{mark}{inner}{mark}", True), (right, False)]
        elif token.type == "softbreak":
            parts.append(("\n", False))
        elif token.type == "math_inline":
            parts.append((f":math:`{token.content.strip()}`", True))
        elif token.type == "code_inline":
            parts.append((f"``{token.content}``", True))
        elif token.type in ("strong_open", "em_open"):
            mark = token.markup
        elif token.type in ("strong_close", "em_close"):
            mark = ""
        elif token.type == "link_open":
            link = str(token.attrs["href"])
        elif token.type == "link_close":
            link = ""
        else:
            raise ValueError(f"Markdown construct {token.type!r} ({token.content!r}) is not translated")
    return _joined([part for part in parts if part[0]])


def _joined(parts: Sequence[tuple[str, bool]]) -> str:
    text, was_markup = "", False
    for part, is_markup in parts:
        touches = text and not text[-1].isspace() and not part[0].isspace()
        if (
            touches
            and (was_markup or is_markup)
            and (text[-1].isalnum() or part[0].isalnum() or was_markup == is_markup)
        ):
            text += "\\ "
        text, was_markup = text + part, is_markup
    return text


def translated(script: str) -> str:
    """Return a script of Markdown cells as one that sphinx-gallery reads."""
    (kind, title), *rest = cells(script)
    if kind != "markdown":
        raise ValueError("an example starts with a Markdown cell that has its title")
    parts = [f'r"""\n{restructured(title)}"""\n']
    for kind, text in rest:
        if kind == "markdown":
            comment = "\n".join(f"# {line}".rstrip() for line in restructured(text).splitlines())
            parts.append(f"# %%\n{comment}\n")
        else:  # the empty line keeps a comment at the top of the code from being taken for text
            parts.append(f"# %%\n\n{text}\n")
    return "\n".join(parts)


def notebook(script: str) -> str:
    """Return a script of cells as a Jupyter notebook."""
    written: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        written.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _sources(app: Sphinx) -> list[Path]:
    return sorted((Path(app.srcdir).parent / "examples").glob("[0-9]*.py"))


def write_scripts(app: Sphinx) -> None:
    """Write the translated scripts, and see that all are run again where the package is not the one that ran them."""
    target, stamp = Path(app.srcdir) / FOLDER, Path(app.srcdir) / FOLDER / STAMP
    digest = source_digest()
    if stamp.exists() and stamp.read_text() != digest:
        for path in target.glob("*.md5"):
            path.unlink()
    readme = (Path(app.srcdir).parent / "examples" / "README.md").read_text(encoding="utf-8")
    header = re.sub(r"^\|.*\n", "", readme, flags=re.MULTILINE)  # the pictures below take the place of the table
    write_pages(Path(app.srcdir) / TRANSLATED, {"GALLERY_HEADER.rst": restructured(header)})
    scripts = {path.name: translated(path.read_text(encoding="utf-8")) for path in _sources(app)}
    write_pages(Path(app.srcdir) / TRANSLATED, scripts, ".py")


def offer_originals(app: Sphinx) -> None:
    """Put the scripts as they are, and notebooks of the same cells, where the pages offer files for download."""
    target = Path(app.srcdir) / FOLDER
    for path in _sources(app):
        text = path.read_text(encoding="utf-8")
        files = {path.name: text, f"{path.stem}.ipynb": notebook(text)}
        with zipfile.ZipFile(target / f"{path.stem}.zip", "w") as archive:
            for name, content in files.items():
                (target / name).write_text(content, encoding="utf-8")
                archive.writestr(name, content)
    (target / STAMP).write_text(source_digest())


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_scripts, priority=100)
    app.connect("builder-inited", offer_originals, priority=900)  # sphinx-gallery has 500
    return {"parallel_read_safe": True}
