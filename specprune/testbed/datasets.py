"""Image classification data in memory: one that comes with the package, three that are read from files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import logging
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune._files import DEFLATE_RATIO, most_packed
from specprune.testbed.catalog import Source, data_places, find_source

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_MOST_DIMENSIONS = 4
_CIFAR_RECORD = 1 + 3 * 32 * 32
# Of average difficulty: one network errs on 1 % to 5 % of the test part, depending on this seed.
_DIGITS_SEED = 2
_DIGITS_WHITE = 16


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of labelled images.

    Attributes:
        name: what `load_dataset` calls it.
        train_inputs: float32 pixels in [0, 1], (n, channels, height, width).
        train_targets: int64 labels in 0, ..., classes - 1, (n,).
        test_inputs: as `train_inputs`, of the m test images.
        test_targets: as `train_targets`, (m,).
        classes: number of classes.

    Raises:
        ValueError: shapes, types or ranges are not as above.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int

    def __post_init__(self) -> None:
        for part, inputs, targets in (
            ("train", self.train_inputs, self.train_targets),
            ("test", self.test_inputs, self.test_targets),
        ):
            _check_part(f"{self.name} {part}", inputs, targets, self.classes)
        if self.train_inputs.shape[1:] != self.test_inputs.shape[1:]:
            raise ValueError(
                f"{self.name}: training images have shape {tuple(self.train_inputs.shape[1:])}, "
                f"test images {tuple(self.test_inputs.shape[1:])}; expected the same"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train_inputs.shape[1:]
        return channels, height, width

    @property
    def input_radius(self) -> float:
        """Largest Euclidean norm that an image can have: sqrt(d) for the pixel box [0, 1]^d.

        It holds for every image of that size, seen or not, so a bound may use it without looking at the data.
        """
        return math.sqrt(math.prod(self.input_shape))

    def train_batches(self, size: int = 500, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the training set in order as (inputs, targets) views.

        Args:
            size: images a batch; the last batch may be smaller.
            limit: stop after this many images; by default all are used.

        Returns:
            A list, so that it can be gone through again and again.

        Raises:
            ValueError: `size` or `limit` is below 1.
        """
        return _batches(self.train_inputs, self.train_targets, size, limit)

    def test_batches(self, size: int = 500, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the test set in order as (inputs, targets) views; arguments as for `train_batches`."""
        return _batches(self.test_inputs, self.test_targets, size, limit)

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data with its tensors on `device`."""
        return replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )


def _check_part(label: str, inputs: Tensor, targets: Tensor, classes: int) -> None:
    if inputs.ndim != 4 or inputs.dtype != torch.float32 or len(inputs) == 0:
        raise ValueError(
            f"{label} inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}; "
            "expected torch.float32 of shape (n, channels, height, width) with n >= 1"
        )
    if targets.shape != inputs.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{label} targets: got {targets.dtype} of shape {tuple(targets.shape)}; "
            f"expected torch.int64 of shape ({len(inputs)},), a label for each image"
        )
    if inputs.is_meta:
        return  # shapes without values
    low, high = float(inputs.min()), float(inputs.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{label} inputs: values from {low:g} to {high:g}; expected [0, 1], so rescale the pixels")
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= classes:
        raise ValueError(f"{label} targets: labels from {least} to {most}; expected 0 to {classes - 1}")


def _batches(inputs: Tensor, targets: Tensor, size: int, limit: int | None) -> list[tuple[Tensor, Tensor]]:
    if size < 1:
        raise ValueError(f"batch size {size}: expected at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1 image, or None for all")
    count = len(inputs) if limit is None else min(limit, len(inputs))
    return [
        (inputs[start : min(start + size, count)], targets[start : min(start + size, count)])
        for start in range(0, count, size)
    ]


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by name: digits comes with the package, the others are read from files on this machine.

    Files are looked for in `data_dir`, then in $SPECPRUNE_DATA, then in the user's cache ($XDG_CACHE_HOME or
    ~/.cache, folder specprune); in each place in the folder `name` first and then in the place itself.

    Args:
        name: "digits", "mnist", "fashion-mnist" or "cifar10".
        data_dir: a folder to look in first.

    Returns:
        The data as float32 images in [0, 1] and int64 labels, on the CPU.

    Raises:
        ValueError: there is no such data set, or a file is damaged or is not what the name says.
        FileNotFoundError: the files, or one of them, are nowhere.
    """
    source = find_source(name)
    if source.layout == "csv":
        return _load_digits(source)
    folder = _find_folder(source, data_dir)
    logger.info("reading %s from %s", name, folder)
    try:
        train, test = _read_idx_set(source, folder) if source.layout == "idx" else _read_cifar_set(source, folder)
    except ValueError as error:
        raise ValueError(
            f"{error}. Remove or replace that file; `specprune data {name}` downloads the published one."
        ) from error
    return Dataset(name, *train, *test, source.classes)


def randomize_labels(dataset: Dataset, fraction: float = 1.0, seed: int = 0) -> Dataset:
    """Return the data with a share of the training labels drawn anew, uniformly over the classes.

    A network that fits such labels has learnt nothing, so a bound on its test error has to say so.

    Args:
        dataset: the data; it is left as it is.
        fraction: share of training labels to replace, in [0, 1].
        seed: which labels, and by what.

    Raises:
        ValueError: `fraction` is outside [0, 1].

    Source:
        C. Zhang, S. Bengio, M. Hardt, B. Recht, O. Vinyals, "Understanding deep learning requires rethinking
        generalization", ICLR 2017, section 2.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction}: expected a share between 0 and 1")
    if fraction == 0:
        return dataset
    generator = np.random.default_rng(seed)
    count = len(dataset.train_targets)
    chosen = torch.from_numpy(generator.permutation(count)[: round(fraction * count)])
    labels = torch.from_numpy(generator.integers(dataset.classes, size=len(chosen)))
    targets = dataset.train_targets.clone()
    targets[chosen.to(targets.device)] = labels.to(targets.device)
    return replace(dataset, train_targets=targets)


def _load_digits(source: Source) -> Dataset:
    packed = importlib.resources.files("specprune.testbed").joinpath("data", f"{source.files[0]}.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8)
    # The file is in order of collection: without a permutation train and test would have different writers.
    order = np.random.default_rng(_DIGITS_SEED).permutation(len(table))
    pixels, labels = table[order, :-1].reshape(-1, *source.input_shape), table[order, -1]
    cut = source.train_size
    train = _tensors(pixels[:cut], labels[:cut], _DIGITS_WHITE)
    return Dataset(source.name, *train, *_tensors(pixels[cut:], labels[cut:], _DIGITS_WHITE), source.classes)


def _tensors(pixels: np.ndarray, labels: np.ndarray, white: int = 255) -> tuple[Tensor, Tensor]:
    """Return uint8 pixels 0..white as float32 in [0, 1], and uint8 labels as int64."""
    inputs = torch.from_numpy(pixels.astype(np.float32) / np.float32(white))
    return inputs, torch.from_numpy(labels.astype(np.int64))


def _find_folder(source: Source, data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the first folder that holds all of the set's files."""
    places = data_places(data_dir)
    for place in places:
        bases = (place / source.name, place)
        folders = [*bases, *(base / source.subfolder for base in bases if source.subfolder)]
        missing = [[file for file in source.files if not _find_file(source, folder, file)] for folder in folders]
        for folder, absent in zip(folders, missing, strict=True):
            if not absent:
                return folder
        for folder, absent in zip(folders, missing, strict=True):
            if len(absent) < len(source.files):  # a broken set is something to mend, not to pass over
                raise FileNotFoundError(
                    f"{folder} has some files of {source.name} but not {', '.join(absent)}. "
                    f"Complete or remove it; `specprune data {source.name}` downloads the set."
                )
    raise FileNotFoundError(
        f"{source.name}: found no {source.files[0]}{'[.gz]' if source.layout == 'idx' else ''} in "
        + ", ".join(f"{place / source.name} or {place}" for place in places)
        + f". Run `specprune data {source.name}` to download it, or set SPECPRUNE_DATA to the folder that has it."
    )


def _find_file(source: Source, folder: Path, file: str) -> Path | None:
    endings = ("", ".gz") if source.layout == "idx" else ("",)
    return next((folder / (file + ending) for ending in endings if (folder / (file + ending)).is_file()), None)


def _paths(source: Source, folder: Path) -> list[Path]:
    return [path for file in source.files if (path := _find_file(source, folder, file)) is not None]


def _read_idx_set(source: Source, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) of the training and of the test set, checked against the catalog's SHA-256."""
    _, height, width = source.input_shape
    shapes: list[tuple[int, ...]] = []
    for count in (source.train_size, source.test_size):
        shapes += [(count, height, width), (count,)]
    digests = {file.name.removesuffix(".gz"): file.sha256 for file in source.downloads}
    arrays = []
    for file, path, shape in zip(source.files, _paths(source, folder), shapes, strict=True):
        array = read_idx(path, shape)
        if array.ndim == 1:
            _check_labels(path, array, source.classes)
        # MNIST and Fashion-MNIST share file names and shapes: only the content tells one from the other.
        digest = hashlib.sha256(_idx_header(array.shape))
        digest.update(array.data)
        if digest.hexdigest() != digests[file]:
            raise ValueError(
                f"{path}: has the right shape but is not {source.name}'s {file}: expected SHA-256 {digests[file]} "
                f"of the uncompressed content, found {digest.hexdigest()}"
            )
        arrays.append(array)
    with_channel = source.input_shape
    return (
        _tensors(arrays[0].reshape(-1, *with_channel), arrays[1]),
        _tensors(arrays[2].reshape(-1, *with_channel), arrays[3]),
    )


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise ValueError(f"{path}: found a label {labels.max()}, expected labels from 0 to {classes - 1}")


def _idx_header(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


def _describe(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) + " uint8"


def read_idx(path: str | os.PathLike[str], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read an idx file of unsigned bytes, the format of MNIST, plain or gzipped (by the name's ".gz").

    Args:
        path: the file.
        shape: what its shape must be; checked on the header, before anything else is read. By default any shape
            of one to four dimensions.

    Returns:
        A uint8 array of the shape that the header states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not idx, holds another type, has another shape, or is shorter or longer than its
            header says.

    Source:
        Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section "File formats".
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{target}: no such file (expected an idx file)")
    packed = target.suffix == ".gz"
    wanted = f" (expected {_describe(shape)})" if shape is not None else ""
    try:
        with gzip.open(target, "rb") if packed else open(target, "rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 8 or not 1 <= magic[3] <= _MOST_DIMENSIONS:
                raise ValueError(
                    f"{target}: starts with bytes {magic.hex(' ') or '(none)'}, expected 00 00 08 and a number of "
                    f"dimensions from 01 to {_MOST_DIMENSIONS:02d}, as an idx file of unsigned bytes does{wanted}"
                )
            lengths = stream.read(4 * magic[3])
            if len(lengths) < 4 * magic[3]:
                raise ValueError(f"{target}: ends within its header{wanted}")
            found = struct.unpack(f">{magic[3]}I", lengths)
            if shape is not None and found != tuple(shape):
                raise ValueError(f"{target}: header says {_describe(found)}, expected {_describe(shape)}")
            promised = math.prod(found)
            held = target.stat().st_size
            header_size = len(magic) + len(lengths)
            # Before anything of the promised size is made: can a file of this length hold it at all?
            # And is it so long that what follows has no end, such as a gzip file filled up with zeros?
            fits = promised <= held * DEFLATE_RATIO and held <= most_packed(header_size + promised)
            if not (fits if packed else held == header_size + promised):
                raise ValueError(
                    f"{target}: header says {_describe(found)}, {header_size + promised} bytes with the header; "
                    f"found a file of {held} bytes"
                )
            content = bytearray()
            while chunk := stream.read(min(_CHUNK, promised + 1 - len(content))):
                content += chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{target}: damaged or truncated gzip file ({error}){wanted}") from error
    if len(content) != promised:
        amount = "more" if len(content) > promised else f"only {len(content)}"
        raise ValueError(f"{target}: header says {_describe(found)}, {promised} bytes of data; found {amount}")
    return np.frombuffer(content, dtype=np.uint8).reshape(found)


def read_cifar_binary(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of CIFAR-10's binary version: records of a label byte and 3072 pixel bytes.

    Args:
        path: the file.

    Returns:
        The images as uint8, (n, 3, 32, 32), channels in the order red, green, blue; and the labels as uint8, (n,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its length is not that of whole records, or a label is not in 0, ..., 9.

    Source:
        A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009; layout from the data's page.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{target}: no such file (expected a CIFAR-10 .bin file)")
    size = target.stat().st_size
    if size == 0 or size % _CIFAR_RECORD:
        raise ValueError(f"{target}: found {size} bytes, expected a positive multiple of {_CIFAR_RECORD}")
    records = np.fromfile(target, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].copy()
    _check_labels(target, labels, 10)
    return images, labels


def _read_cifar_set(source: Source, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    parts = []
    for path in _paths(source, folder):
        expected, size = source.file_bytes // _CIFAR_RECORD, path.stat().st_size
        if size != source.file_bytes:  # before anything of that size is made
            found = f"{size / _CIFAR_RECORD:.12g}"
            raise ValueError(f"{path}: expected {expected} records of {_CIFAR_RECORD} bytes, found {found}")
        images, labels = read_cifar_binary(path)
        parts.append((images, labels))
    train = np.concatenate([images for images, _ in parts[:-1]]), np.concatenate([labels for _, labels in parts[:-1]])
    return _tensors(*train), _tensors(*parts[-1])
