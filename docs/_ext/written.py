"""Files that the build writes: touched only where their text changes, so that a second build reads only what is new."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import specprune


def write_pages(folder: Path, pages: Mapping[str, str], suffix: str = ".rst") -> None:
    """Make a folder hold these pages, and no other ones of the suffix.

    Args:
        folder: made if it is not there.
        pages: their texts by file name.
        suffix: of the files that are removed where `pages` does not have them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{suffix}"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def heading(text: str, line: str) -> str:
    """Return a reStructuredText heading with its underline."""
    return f"{text}\n{line * len(text)}\n"


def indented(text: str, spaces: int = 3) -> str:
    """Return the text with every line moved to the right, empty ones left empty."""
    return "\n".join(" " * spaces + line if line else "" for line in text.splitlines())


@functools.cache
def source_digest() -> str:
    """Return a digest of the package's code, without docstrings and comments.

    What the code computed for the documentation is computed again where this has changed.
    """
    root = Path(specprune.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                del body[0]
        digest.update(f"{path.relative_to(root).as_posix()}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
