"""Files that are whole or absent: atomic writes, and arrays with a JSON header in one file without pickle."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import math
import os
import re
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from specprune._records import from_json, shortened, to_json

logger = logging.getLogger(__name__)

HEADER = "__header__"
_PART = ".part"  # ends the names of files that are being written
#: Deflate stores at most 258 bytes in 2 bits: nothing unpacks to more than this times its length.
DEFLATE_RATIO = 1032
#: No name of an array or of a network's module is longer.
MOST_NAME = 1000
_CHUNK = 1 << 20
_MOST_TEXT = 1 << 28
#: A header unpacks to at most this, and this times its packed length: real ones are packed 10 to 30 times.
_HEADER_BYTES, _HEADER_RATIO = 1 << 20, 64
#: The numbers that an array may hold: little-endian ones, as all machines that PyTorch runs on write them.
_DTYPES = frozenset(("|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8"))
_DTYPES |= {"<f2", "<f4", "<f8", "<c8", "<c16"}
#: What NumPy writes before the numbers of an array, in version 1.0 of its format.
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}(?:, |,(?=\))|(?=\))))*)\), \} *\n"
)
#: what zipfile raises on damaged files, and on files of another kind
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
    struct.error,
)


def most_packed(size: int) -> int:
    """Return how long a gzip file of so many bytes can be: what does not compress grows by a few bytes a block."""
    return size + size // 1000 + (1 << 16)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing bytes; rename it to `path` on success, remove it on failure.

    Temporary files for the same `path` that killed processes of this machine left are removed (on POSIX systems).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent, glob.escape(target.name))
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.{_machine()}-{os.getpid()}-", suffix=_PART
    )
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


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files that killed processes of this machine left for files of a name (a pattern)."""
    if os.name != "posix":  # there is no asking whether a process runs
        return
    machine = _machine()
    for leftover in folder.glob(f".{name}.{glob.escape(machine)}-*{_PART}"):
        process = leftover.name.rpartition(f".{machine}-")[2].partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):  # another user's
                leftover.unlink()


def _machine() -> str:
    """Return a name of this machine or container: what numbers of processes belong to."""
    try:
        return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's, or the system cannot say
        return True
    return True


@contextlib.contextmanager
def lock_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a folder, made if need be, inside a `with` block; a killed run leaves no lock behind.

    On POSIX systems, temporary files that killed processes of this machine left there are removed.  The lock is the
    system's, on the folder itself; where the system or the file system has none, nothing is locked.

    Raises:
        ValueError: another run has the folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl  # not everywhere

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another run is at work in this folder; wait for it, or give another"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning("%s: this file system cannot lock it (%s); start no second run there", folder, error)
        _remove_leftovers(folder, "*")
        yield
    finally:
        os.close(handle)


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
    """Return the finished lines of a file that `append_line` wrote; none if there is no such file.

    Raises:
        ValueError: it is no regular file, is too large, or is not UTF-8 text.
    """
    if not os.path.lexists(path):
        return []
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a regular file; remove it, or choose another folder")
    content = _read_bytes(path, "lines of text")
    return _decoded(path, content[: content.rfind(b"\n") + 1], "lines of text").split("\n")[:-1]


def _read_bytes(path: str | os.PathLike[str], expected: str) -> bytes:
    """Return the content of a regular file: no device or pipe, which might never end."""
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{target}: no such file (expected {expected})")
    size = target.stat().st_size
    if size > _MOST_TEXT:
        raise ValueError(f"{target}: {size} bytes; expected {expected}, of at most {_MOST_TEXT} bytes")
    return target.read_bytes()


def _decoded(path: str | os.PathLike[str], content: bytes, expected: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path}: not UTF-8 text ({where}); expected {expected}") from error


def read_json(path: str | os.PathLike[str], expected: str) -> Any:
    """Return the value of a file of strict JSON.

    Args:
        path: the file to read.
        expected: what it should be, for messages.

    Raises:
        FileNotFoundError: there is no such regular file.
        ValueError: it is larger than 256 MB, or is not strict JSON in UTF-8, see `from_json`.
    """
    text = _decoded(path, _read_bytes(path, expected), expected)
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as {expected} ({error})") from error


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Save named arrays and a JSON header in one `.npz` file, whole or not at all.

    Args:
        path: the file to write.
        arrays: name to array, of any numeric dtype (no object arrays).
        header: what describes them; must have a "kind", which `load_arrays` checks.

    Raises:
        ValueError: an array holds Python objects, or anything else than numbers, or has a name of over 1000 characters.
    """
    for name, array in arrays.items():
        if len(name) > MOST_NAME:
            raise ValueError(f"the name {shortened(name)!r} has {len(name)} characters, expected at most {MOST_NAME}")
        if array.dtype.str not in _DTYPES:
            held = "Python objects" if array.dtype == object else array.dtype
            raise ValueError(f"array {name!r} holds {held}; only numeric arrays can be saved without pickle")
    text = np.frombuffer(to_json(header).encode("utf-8"), dtype=np.uint8)
    with atomic_write(path) as stream:
        np.savez_compressed(stream, **{HEADER: text, **arrays})  # type: ignore[arg-type]


def load_arrays(
    path: str | os.PathLike[str], kind: str, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load what `save_arrays` wrote, never unpickling.

    Nothing is believed of the sizes that the file states: an array is made once its size is known to be that of the
    unpacked bytes, and those to be no more than the packed ones can hold.

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
        with zipfile.ZipFile(target) as archive:
            members = _members(archive, target.stat().st_size)
            header = _read_header(archive, members.pop(HEADER))
            found = header.get("kind") if isinstance(header, dict) else None
            if isinstance(header, dict) and found == kind:
                chosen = members if names is None else {name: members[name] for name in names}
                return {name: _read_array(archive, info) for name, info in chosen.items()}, header
    except _DAMAGE as error:
        reason = shortened(str(error))
        raise ValueError(f"{target}: not a readable specprune {kind} file ({reason})") from error
    raise ValueError(f"{target}: holds {shortened(repr(found))}, expected a specprune {kind} file")


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the arrays of an archive by name, after checking what its directory says of them."""
    found: dict[str, zipfile.ZipInfo] = {}
    packed = 0
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename or name in found or len(name) > MOST_NAME:
            raise ValueError(f"the member {shortened(repr(info.filename))} is no array, or is there twice")
        ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}.get(info.compress_type, 0)
        if info.file_size > ratio * info.compress_size:
            raise ValueError(f"the array {shortened(repr(name))} cannot have {info.file_size} bytes")
        packed += info.compress_size
        found[name] = info
    if packed > size:
        raise ValueError(f"its members have {packed} bytes together, the file {size}")
    return found


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    most = _HEADER_BYTES + _HEADER_RATIO * info.compress_size
    if info.file_size > most:
        raise ValueError(f"a header of {info.file_size} bytes, expected at most {most}")
    return from_json(_read_array(archive, info).tobytes().decode("utf-8"))


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        magic, length = stream.read(8), int.from_bytes(stream.read(2), "little")
        stated = _ARRAY_HEADER.fullmatch(stream.read(length))
        if magic != b"\x93NUMPY\1\0" or stated is None or stated[1].decode() not in _DTYPES:
            raise ValueError(
                f"the array {shortened(repr(info.filename))} is not of numbers, or not in NumPy's format 1.0"
            )
        dtype, shape = np.dtype(stated[1].decode()), tuple(int(size) for size in stated[3].split(b",") if size.strip())
        promised, held = math.prod(shape) * dtype.itemsize, info.file_size - 10 - length
        if promised != held:
            raise ValueError(f"the array {shortened(repr(info.filename))} says {promised} bytes and has {held}")
        flat = np.empty(math.prod(shape), dtype)
        content, filled = flat.view(np.uint8), 0
        while chunk := stream.read(_CHUNK):  # to the end, where zipfile compares the checksum
            content[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
        if filled < held:
            raise ValueError(f"the array {shortened(repr(info.filename))} ends after {filled} of {held} bytes")
    return flat.reshape(shape[::-1]).T if stated[2] == b"True" else flat.reshape(shape)
