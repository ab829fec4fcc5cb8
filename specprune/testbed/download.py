"""Downloading the public data sets: resumable, checked by SHA-256, and never half-written."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from specprune._files import atomic_write, lock_folder, most_packed
from specprune.testbed.catalog import RemoteFile, Source, cache_folder, find_source

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_TIMEOUT_SECONDS = 30.0
_TRIES = 3


def download_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    mirrors: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Download a data set from public mirrors into a folder where `load_dataset` finds it.

    A file is written as NAME.part, continued there after an interruption, and gets its name once its SHA-256 is
    right. Files that are there and right are kept.

    Args:
        name: "mnist", "fashion-mnist" or "cifar10".
        data_dir: the data go to the folder `name` in it; by default in the user's cache. For another folder than
            the cache, tell `load_dataset` by its `data_dir` or by $SPECPRUNE_DATA.
        mirrors: base addresses (http or https) to try in order, instead of the public ones.
        progress: whether to show progress bars (on terminals only).

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: the name is unknown, the set needs no download, an address is not http or https, or another
            download is at work in the folder.
        ConnectionError: no mirror gave a right file; the message has each mirror's reason.
    """
    source = find_source(name)
    if not source.downloads:
        raise ValueError(f"{name} comes with the package and needs no download; use load_dataset({name!r})")
    bases = tuple(source.mirrors if mirrors is None else mirrors)
    if not bases or not all(base.startswith(("http://", "https://")) for base in bases):
        raise ValueError(f"mirrors {bases}: expected at least one address, each starting with http:// or https://")
    folder = (Path(data_dir).expanduser() if data_dir is not None else cache_folder()) / name
    with lock_folder(folder):
        for file in source.downloads:
            if _is_there(source, file, folder):
                logger.info("%s: %s is there and right", name, file.name)
                continue
            part = _obtain(file, bases, folder, progress)
            if file.archive:
                _extract(part, source, folder)
                part.unlink()
            else:
                os.replace(part, folder / file.name)
    return folder


def _is_there(source: Source, file: RemoteFile, folder: Path) -> bool:
    """Return whether the folder has what the file gives, whole and right."""
    if file.archive:  # the extracted files were checked with their archive; here their lengths tell they are whole
        paths = [folder / member for member in source.files]
        return all(path.is_file() and path.stat().st_size == source.file_bytes for path in paths)
    plain = folder / file.name.removesuffix(".gz")
    if plain.is_file():  # `load_dataset` prefers it, so a wrong one must not hide a right download
        if _find_fault(plain, file) is None:
            return True
        raise ValueError(f"{plain}: is not the published {plain.name} and would be read first; remove it")
    packed = folder / file.name
    return packed.is_file() and _find_fault(packed, file) is None


def _obtain(file: RemoteFile, bases: Sequence[str], folder: Path, progress: bool) -> Path:
    """Return the path of the complete and right NAME.part, from the first mirror that gives it."""
    part = folder / f"{file.name}.part"
    if part.is_symlink() or (part.exists() and not part.is_file()):  # writing would go elsewhere, or wait for ever
        raise ValueError(f"{part}: is not a regular file; remove it")
    if part.is_file() and _find_fault(part, file) is None:
        return part
    reasons = []
    for base in bases:
        url = f"{base.rstrip('/')}/{file.name}"
        logger.info("downloading %s", url)
        reason = _try_mirror(url, file, part, progress)
        if reason is None:
            return part
        logger.warning("%s: %s", url, reason)
        reasons.append(f"{url}: {reason}")
    raise ConnectionError(f"no mirror gave {file.name}, for {folder}:\n  " + "\n  ".join(reasons))


def _try_mirror(url: str, file: RemoteFile, part: Path, progress: bool) -> str | None:
    """Bring `part` to the whole file; return None on success, else why this mirror failed."""
    reason = "unreachable"
    for _ in range(_TRIES):
        start = part.stat().st_size if part.is_file() else 0
        try:
            start = _transfer(url, file, part, start, progress)
        except (OSError, http.client.HTTPException) as error:
            reason = f"{error}" or type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # longer than the mirror's file: it was of another one
            elif not part.is_file() or part.stat().st_size <= start:
                return reason
            continue
        fault = _find_fault(part, file)
        if fault is None:
            return None
        part.unlink()
        reason = fault
        if start == 0:
            return reason
        # Otherwise the first bytes came from elsewhere, and mirrors compress differently: once more from the start.
    return reason


def _transfer(url: str, file: RemoteFile, part: Path, start: int, progress: bool) -> int:
    """Append to `part` from byte `start` on, or rewrite it where the server ignores that; return where it began."""
    headers = {"User-Agent": "specprune", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if start and response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0
        _check_range(response, start)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isascii() and length.isdigit() and len(length) < 20 else None
        most = _most_bytes(file)
        if total is not None and total > most:
            raise ConnectionError(f"offers {total} bytes, expected at most {most}")
        received = start
        with (
            open(part, "ab" if start else "wb") as stream,
            tqdm(
                total=total,
                initial=start,
                desc=file.name,
                unit="B",
                unit_scale=True,
                disable=None if progress else True,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if received > most:
                    stream.truncate(0)  # nothing of this is worth resuming
                    raise ConnectionError(f"sends more than the {most} bytes expected")
                stream.write(chunk)
                bar.update(len(chunk))
    if total is not None and received < total:
        raise ConnectionError(f"broke off after {received} of {total} bytes")
    return start


def _check_range(response: http.client.HTTPResponse, start: int) -> None:
    """Refuse a partial answer that does not begin at byte `start`."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        stated = response.headers.get("Content-Range", "")
        if not stated.startswith(f"bytes {start}-"):
            raise ConnectionError(f"asked for the bytes from {start} on, got Content-Range {stated!r}")


def _most_bytes(file: RemoteFile) -> int:
    return file.size if file.archive else most_packed(file.size)


def _find_fault(path: Path, file: RemoteFile) -> str | None:
    """Return None where the content's length and SHA-256 are right, else what is wrong with it."""
    packed = not file.archive and path.name != file.name.removesuffix(".gz")
    digest, size = hashlib.sha256(), 0
    if packed and path.stat().st_size > most_packed(file.size):  # zeros behind a gzip file would be read to their end
        return f"expected at most {most_packed(file.size)} bytes, found {path.stat().st_size}"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
            while chunk := stream.read(min(_CHUNK, file.size + 1 - size)):
                digest.update(chunk)
                size += len(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return f"damaged or truncated gzip file ({error})"
    if size != file.size:
        return f"expected {file.size} bytes of content, found {'more' if size > file.size else size}"
    if digest.hexdigest() != file.sha256:
        return f"expected SHA-256 {file.sha256}, found {digest.hexdigest()}"
    return None


def _extract(archive: Path, source: Source, folder: Path) -> None:
    """Write the data files of a checked archive into the folder; names in the archive choose no path."""
    wanted = set(source.files)
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isreg():
                    continue
                content = packed.extractfile(member)
                if content is None or member.size != source.file_bytes:
                    raise ValueError(f"{archive}: {name} has {member.size} bytes, expected {source.file_bytes}")
                with content, atomic_write(folder / name) as stream:
                    shutil.copyfileobj(content, stream, _CHUNK)
                wanted.remove(name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged archive ({error})") from error
    if wanted:
        raise ValueError(f"{archive}: lacks {', '.join(sorted(wanted))}")
