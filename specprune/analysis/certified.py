"""What a search for a certificate found: the network, its certificate, and how it got there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from specprune._records import format_table, to_json
from specprune.analysis.certificate import Certificate
from specprune.compress.vocabulary import IntegerNetwork


@dataclass(frozen=True)
class Step:
    """A moment at which the certificate fell.

    Attributes:
        seconds: since the start of the run, interruptions left out.
        phase: what found it: "training" or "search", and the number of the round.
        value: the certified error.
        errors: on the training set, counted in floating point; the final certificate counts in whole numbers.
        bits: of the word.
    """

    seconds: float
    phase: str
    value: float
    errors: int
    bits: int


@dataclass(frozen=True, eq=False)
class Certified:
    """What a run found.

    Attributes:
        network: the best network.
        certificate: what its word promises.
        history: every improvement, in order.
        start: "pruned" or "scratch".
        seed: of all random choices.
        seconds: used.
        contradictory: how many training errors no classifier can avoid, as equal images have different labels.
    """

    network: IntegerNetwork
    certificate: Certificate
    history: tuple[Step, ...]
    start: str
    seed: int
    seconds: float
    contradictory: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record for each improvement."""
        common = {"data": self.certificate.data, "start": self.start, "seed": self.seed}
        return [{**common, **dataclasses.asdict(step)} for step in self.history]

    def to_json(self) -> str:
        """Return the certificate and how it was found as JSON."""
        return to_json(
            {
                "certificate": json.loads(self.certificate.to_json()),
                "start": self.start,
                "seed": self.seed,
                "seconds": self.seconds,
                "contradictory": self.contradictory,
                "history": [dataclasses.asdict(step) for step in self.history],
            }
        )

    def __str__(self) -> str:
        rows = [
            {
                "seconds": round(step.seconds),
                "phase": step.phase,
                "certificate": f"{step.value:.3%}",
                "train": f"{step.errors / self.certificate.n:.3%}",
                "bits": step.bits,
            }
            for step in _thinned(self.history, 12)
        ]
        title = f"{self.certificate.data}, {self.start} start, seed {self.seed}, {self.seconds:.0f} s"
        text = f"{format_table(rows, title=title)}\n\n{self.certificate}"
        if self.contradictory:
            text += (
                f"\nWarning: equal training images have different labels, so that at least {self.contradictory} errors "
                "are unavoidable."
            )
        return text


def _thinned(steps: Sequence[Step], most: int) -> list[Step]:
    if len(steps) <= most:
        return list(steps)
    places = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
    return [steps[place] for place in places]


def contradictory_labels(pixels: Tensor, targets: Tensor) -> int:
    """Return how many errors no classifier can avoid: equal images that are not of their group's most frequent class.

    Args:
        pixels: uint8, shape (n, ...).
        targets: int64 labels, (n,).
    """
    rows = np.ascontiguousarray(pixels.cpu().numpy().reshape(len(pixels), -1))
    _, group = np.unique(rows.view([("", np.void, rows.shape[1])]).ravel(), return_inverse=True)
    pairs, counts = np.unique(np.stack([group.ravel(), targets.cpu().numpy()]), axis=1, return_counts=True)
    most = np.zeros(int(group.max()) + 1, dtype=np.int64)
    np.maximum.at(most, pairs[0], counts)
    return int(len(rows) - most.sum())
