"""Files that are whole or absent: atomic writes, and arrays with a JSON header in one file without pickle."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from specprune._records import to_json

HEADER = "__header__"
#: what NumPy and zipfile raise on damaged files, and on files of another kind
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    OSError,
    EOFError,
    RuntimeError,  # with its NotImplementedError: "encrypted", "compression method is not supported"
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing bytes; rename it to `path` on success, remove it on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; results are meant to be shared
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(text.encode("utf-8"))


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append one line of text to a file; a line that a kill left unfinished is removed first."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "ab+") as stream:
        stream.seek(0)
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)
        stream.write(line.encode("utf-8") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the finished lines of a file that `append_line` wrote; none if there is no such file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines()


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Save named arrays and a JSON header in one `.npz` file, whole or not at all.

    Args:
        path: the file to write.
        arrays: name to array, of any numeric dtype (no object arrays).
        header: what describes them; must have a "kind", which `load_arrays` checks.

    Raises:
        ValueError: an array holds Python objects.
    """
    for name, array in arrays.items():
        if array.dtype == object:
            raise ValueError(f"array {name!r} holds Python objects; only numeric arrays can be saved without pickle")
    text = np.frombuffer(to_json(header).encode("utf-8"), dtype=np.uint8)
    with atomic_write(path) as stream:
        np.savez_compressed(stream, **{HEADER: text, **arrays})  # type: ignore[arg-type]


def load_arrays(
    path: str | os.PathLike[str], kind: str, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load what `save_arrays` wrote, never unpickling.

    Args:
        path: the file to read.
        kind: what the header's "kind" must be.
        names: the arrays to read; by default all.  What is not read is not checked for damage.

    Returns:
        The arrays by name, and the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours, is damaged, or is of another kind.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{target}: no such file (expected a specprune {kind} file)")
    try:
        with np.load(target, allow_pickle=False) as archive:
            chosen = archive.files if names is None else names
            arrays = {name: archive[name] for name in chosen if name != HEADER}
            text = archive[HEADER]
        header = json.loads(text.tobytes().decode("utf-8"))
    except _DAMAGE as error:
        raise ValueError(f"{target}: not a readable specprune {kind} file ({error})") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else None
        raise ValueError(f"{target}: holds {found!r}, expected a specprune {kind} file")
    return arrays, header
