"""What each image data set consists of: shapes, files, checksums and mirrors, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT_VARIABLE = "SPECPRUNE_DATA"


@dataclass(frozen=True)
class RemoteFile:
    """One file that the mirrors offer.

    Attributes:
        name: the file's name, appended to a mirror's address.
        sha256: hexadecimal SHA-256 of the uncompressed content for ".gz" idx files, of the file itself for archives.
        size: bytes of what is hashed; nothing longer is ever written or decompressed.
        archive: whether it is a tar archive holding the data files, rather than one gzipped data file.
    """

    name: str
    sha256: str
    size: int
    archive: bool = False


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and what it must look like.

    Attributes:
        name: the name that `load_dataset` knows it by.
        input_shape: (channels, height, width) of an image.
        classes: how many labels there are: 0, ..., classes - 1.
        train_size: how many training images.
        test_size: how many test images.
        layout: "csv" (comes with the package), "idx" (MNIST's format) or "cifar" (CIFAR-10's binary format).
        files: the data files in reading order, without ".gz"; for idx: train images, train labels, test images,
            test labels; for cifar: the training files, then the test file.
        subfolder: a folder that the official archive unpacks to, searched as well; "" for none.
        file_bytes: length of every data file, for cifar; 0 otherwise.
        downloads: the files to fetch.
        mirrors: base addresses, tried in order.
    """

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    train_size: int
    test_size: int
    layout: str
    files: tuple[str, ...]
    subfolder: str = ""
    file_bytes: int = 0
    downloads: tuple[RemoteFile, ...] = ()
    mirrors: tuple[str, ...] = ()


def _idx_source(name: str, hashes: tuple[str, str, str, str], mirrors: tuple[str, ...]) -> Source:
    """Return the entry of a set in MNIST's format; `hashes` follow the order of the files."""
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    # 16 and 8 are the lengths of the idx headers of a three- and a one-dimensional array.
    sizes = (16 + 60000 * 28 * 28, 8 + 60000, 16 + 10000 * 28 * 28, 8 + 10000)
    downloads = tuple(
        RemoteFile(f"{file}.gz", digest, size) for file, digest, size in zip(files, hashes, sizes, strict=True)
    )
    return Source(name, (1, 28, 28), 10, 60000, 10000, "idx", files, downloads=downloads, mirrors=mirrors)


#: All data sets by name.
CATALOG: dict[str, Source] = {
    "digits": Source("digits", (1, 8, 8), 10, 1400, 397, "csv", ("digits.csv",)),
    "mnist": _idx_source(
        "mnist",
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    ),
    "fashion-mnist": _idx_source(
        "fashion-mnist",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
    ),
    "cifar10": Source(
        "cifar10",
        (3, 32, 32),
        10,
        50000,
        10000,
        "cifar",
        (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"),
        "cifar-10-batches-bin",
        30730000,
        (
            RemoteFile(
                "cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                170052171,
                archive=True,
            ),
        ),
        ("https://www.cs.toronto.edu/~kriz/",),
    ),
}


def find_source(name: str) -> Source:
    """Return the catalog's entry for a data set.

    Raises:
        ValueError: there is no data set of that name.
    """
    if name not in CATALOG:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(CATALOG)}")
    return CATALOG[name]


def cache_folder() -> Path:
    """Return the user's folder for downloaded data: $XDG_CACHE_HOME/specprune, else ~/.cache/specprune."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specprune"


def data_places(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return where data is looked for, in order: `data_dir`, $SPECPRUNE_DATA, the cache; absent ones left out."""
    given = [data_dir, os.environ.get(ENVIRONMENT_VARIABLE)]
    places = [Path(place).expanduser() for place in given if place]
    return list(dict.fromkeys([*places, cache_folder()]))
