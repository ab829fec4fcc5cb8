"""Certificates from the training set alone: a short word for a network, its training errors, and what follows.

A certificate says: with probability at least 1 - delta over the draw of the training set, the network that this word
describes errs on at most that share of new examples.  Nothing here shares code with a search except the decoder: the
word is decoded, its errors are counted in whole-number arithmetic, and the binomial tail is inverted.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specprune._files import atomic_write
from specprune._records import format_table, format_value, to_json
from specprune.bounds.bound import Bound, check_number
from specprune.bounds.code_length import code_length_bound, code_length_kl_bound, samples_needed
from specprune.compress.integer_network import count_errors, integer_pixels, layer_ranges
from specprune.compress.language import decode, encode, ideal_bits, length_in_bits
from specprune.compress.vocabulary import MAX_BYTES, VERSION, IntegerNetwork

#: What a file of ours starts with; a CRC-32 of the word and the word itself follow.
MAGIC = b"spnw"
#: How the names of such files end.
SUFFIX = ".spnw"
_HEADER_BYTES = len(MAGIC) + 4


class LabelledImages(Protocol):
    """What a certificate is about: a training set, and a test set that is looked at only to report.

    Attributes:
        name: for tables.
        train_inputs: float pixels in [0, 1], (n, channels, height, width).
        train_targets: int64 labels in 0, ..., classes - 1, (n,).
        test_inputs: as `train_inputs`.
        test_targets: as `train_targets`.
        classes: number of classes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def train_inputs(self) -> Tensor: ...  # noqa: D102
    @property
    def train_targets(self) -> Tensor: ...  # noqa: D102
    @property
    def test_inputs(self) -> Tensor: ...  # noqa: D102
    @property
    def test_targets(self) -> Tensor: ...  # noqa: D102
    @property
    def classes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Certificate:
    """What a word promises on a training set.

    Attributes:
        data: name of the data set.
        front_end: the fixed transforms before the first layer.
        version: of the language; its 8 bits are part of `bits`.
        bits: length of the word.
        header_bits: ideal length of version and header.
        layer_bits: ideal length of each layer's weights; 0 where it has none of its own.
        weights: how many weights the word sends.
        nonzero: how many of them are not zero.
        errors: wrong answers on the training set.
        n: training images.
        test_errors: wrong answers on the test set, which nothing was chosen by.
        test_n: test images.
        binomial: the certificate.
        kl: the same by Chernoff's inequality, for comparison.
    """

    data: str
    front_end: str
    version: int
    bits: int
    header_bits: float
    layer_bits: tuple[float, ...]
    weights: int
    nonzero: int
    errors: int
    n: int
    test_errors: int
    test_n: int
    binomial: Bound
    kl: Bound

    @property
    def value(self) -> float:
        """The certified error: the exact binomial bound."""
        return self.binomial.value

    @property
    def train_error(self) -> float:
        """Share of wrong answers on the training set."""
        return self.errors / self.n

    @property
    def test_error(self) -> float:
        """Share of wrong answers on the test set."""
        return self.test_errors / self.test_n

    def to_records(self) -> list[dict[str, Any]]:
        """Return one flat record."""
        return [
            {
                "data": self.data,
                "front_end": self.front_end,
                "version": self.version,
                "bits": self.bits,
                "header_bits": self.header_bits,
                "layer_bits": self.layer_bits,
                "weights": self.weights,
                "nonzero": self.nonzero,
                "errors": self.errors,
                "n": self.n,
                "train_error": self.train_error,
                "certificate": self.binomial.value,
                "certificate_kl": self.kl.value,
                "confidence": self.binomial.confidence,
                "test_errors": self.test_errors,
                "test_n": self.test_n,
                "test_error": self.test_error,
            }
        ]

    def to_json(self) -> str:
        """Return the record as strict JSON text."""
        return to_json(self.to_records()[0])

    def __str__(self) -> str:
        body = " + ".join(f"{bits:.0f}" for bits in self.layer_bits)
        rows = [
            {"what": "certificate", "value": _percent_above(self.value, 3), "note": "binomial tail, exact"},
            {
                "what": "certificate (kl)",
                "value": _percent_above(self.kl.value, 3),
                "note": "the same by Chernoff's inequality",
            },
            {"what": "training error", "value": f"{self.train_error:.3%}", "note": f"{self.errors} of {self.n}"},
            {"what": "test error", "value": f"{self.test_error:.3%}", "note": f"{self.test_errors} of {self.test_n}"},
            {"what": "bits", "value": str(self.bits), "note": f"header {self.header_bits:.0f}, layers {body}"},
            {"what": "weights", "value": str(self.weights), "note": f"{self.nonzero} not zero"},
            {"what": "front end", "value": self.front_end, "note": f"fixed; language version {self.version}"},
        ]
        sure = format_value(self.binomial.confidence)
        said = (
            f"With probability at least {sure} over the draw of the {self.n} training examples, this network errs on "
            f"at most {_percent_above(self.value, 2)} of new ones."
        )
        if self.binomial.vacuous:
            said = "This word is too long, or errs too often, to promise anything (vacuous)."
        return f"{format_table(rows, title=f'Certificate, {self.data}')}\n{said}"


def _percent_above(value: float, digits: int) -> str:
    """Return a percentage that is rounded up: what is printed must still hold."""
    return f"{min(math.ceil(value * 10 ** (digits + 2)) / 10**digits, 100.0):.{digits}f}%"


def certificate_of(network: IntegerNetwork, dataset: LabelledImages, delta: float = 0.05) -> Certificate:
    """Return what a network's word promises, from its errors on the training set.

    Args:
        network: a network of the language, however it was found.
        dataset: whose training set it may have seen as often as its search liked.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        The certificate; the test error in it is reported and used for nothing.

    Raises:
        ValueError: the images or classes are not those of the network, a class is missing from the training set, or
            there are so few samples that not even a network without errors would beat guessing.
    """
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    _check_images(network, dataset)
    bits = length_in_bits(network)
    n = len(dataset.train_targets)
    needed = samples_needed(bits, delta, dataset.classes)
    if n < needed:
        raise ValueError(
            f"{dataset.name}: {n} training images are too few for a word of {bits} bits: not even without an error "
            f"would it beat guessing among {dataset.classes} classes; {needed} or more images are needed, or fewer bits"
        )
    errors = count_errors(network, integer_pixels(dataset.train_inputs), dataset.train_targets)
    test_errors = count_errors(network, integer_pixels(dataset.test_inputs), dataset.test_targets)
    lengths = ideal_bits(network)
    return Certificate(
        data=dataset.name,
        front_end=network.front_end,
        version=VERSION,
        bits=bits,
        header_bits=lengths[0],
        layer_bits=lengths[1:],
        weights=sum(array.size for array in network.weights),
        nonzero=sum(int(np.count_nonzero(array)) for array in network.weights),
        errors=errors,
        n=n,
        test_errors=test_errors,
        test_n=len(dataset.test_targets),
        binomial=code_length_bound(errors, n, bits, delta),
        kl=code_length_kl_bound(errors, n, bits, delta),
    )


def _check_images(network: IntegerNetwork, dataset: LabelledImages) -> None:
    """Refuse data that the network cannot be about, before anything is computed."""
    for part, inputs, targets in (
        ("training", dataset.train_inputs, dataset.train_targets),
        ("test", dataset.test_inputs, dataset.test_targets),
    ):
        if inputs.ndim != 4 or inputs.shape[1] != network.channels or len(inputs) == 0:
            raise ValueError(
                f"{dataset.name}: {part} images of shape {tuple(inputs.shape)}; "
                f"the network expects (n, {network.channels}, height, width) with n >= 1"
            )
        if targets.shape != inputs.shape[:1]:
            raise ValueError(f"{dataset.name}: {len(inputs)} {part} images, but labels of shape {tuple(targets.shape)}")
        layer_ranges(network, inputs.shape[2], inputs.shape[3])
    if network.classes != dataset.classes:
        raise ValueError(
            f"{dataset.name} has {dataset.classes} classes; the network has {network.classes}: it is for other data"
        )
    present = torch.unique(dataset.train_targets).tolist()
    if not set(present) <= set(range(dataset.classes)):
        raise ValueError(f"{dataset.name}: labels {present}; expected 0 to {dataset.classes - 1}")
    missing = sorted(set(range(dataset.classes)) - set(present))
    if missing:
        raise ValueError(
            f"{dataset.name}: no training image of class {', '.join(map(str, missing))}; "
            "a certificate about this data set needs all of them"
        )


def to_file_bytes(network: IntegerNetwork) -> bytes:
    """Return a network as the content of a file: magic, CRC-32 of the word, word (whose first byte is its version).

    Magic and CRC are no part of the word and cost no bits: they tell damage, and choose nothing.

    Args:
        network: any network of the language.
    """
    word = encode(network)
    return MAGIC + zlib.crc32(word).to_bytes(4, "big") + word


def from_file_bytes(data: bytes) -> IntegerNetwork:
    """Return the network in a file's content.

    Args:
        data: what `to_file_bytes` returned.

    Raises:
        ValueError: it is something else, damaged, cut off, too long or of another version.
    """
    if data[: len(MAGIC)] != MAGIC or len(data) <= _HEADER_BYTES:
        raise ValueError(f"starts with {data[:_HEADER_BYTES].hex(' ') or 'nothing'}: not a specprune network file")
    word = data[_HEADER_BYTES:]
    if len(word) > MAX_BYTES:
        raise ValueError(f"a word of more than {MAX_BYTES} bytes: no network of the language is that long")
    if zlib.crc32(word).to_bytes(4, "big") != data[len(MAGIC) : _HEADER_BYTES]:
        raise ValueError("the checksum does not fit: the file is damaged, cut off or was changed")
    return decode(word)


def save_network(path: str | os.PathLike[str], network: IntegerNetwork) -> None:
    """Write a network to a file, whole or not at all.

    Args:
        path: the file.
        network: any network of the language.
    """
    with atomic_write(path) as stream:
        stream.write(to_file_bytes(network))


def load_network(path: str | os.PathLike[str]) -> IntegerNetwork:
    """Read a network from a file; never more of it than the longest word.

    Args:
        path: what `save_network` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of ours, or damaged.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"{target}: no such file (expected a network of the language)")
    with open(target, "rb") as stream:
        data = stream.read(_HEADER_BYTES + MAX_BYTES + 1)
    try:
        return from_file_bytes(data)
    except ValueError as error:
        raise ValueError(f"{target}: {error}") from error


def verify(data: bytes, dataset: LabelledImages, delta: float = 0.05) -> Certificate:
    """Decode a file's content, count its errors, and return the certificate that it earns.

    The file makes no claim that would have to be believed: whatever network it holds gets its own certificate.

    Args:
        data: what `to_file_bytes` returned, and `save_network` wrote.
        dataset: which data it is about.
        delta: allowed probability of failure, in (0, 1).

    Raises:
        ValueError: as `from_file_bytes` and `certificate_of`.
    """
    return certificate_of(from_file_bytes(data), dataset, delta)
