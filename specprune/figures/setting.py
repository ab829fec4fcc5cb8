"""What the figures are about: one trained network on one data set, with the measurements that figures share."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specprune._files import read_json, write_text
from specprune._records import to_json
from specprune.analysis import Spectra, Tradeoff, layer_spectra, tradeoff
from specprune.analysis.tradeoff import KEEP_GRID
from specprune.compress import CalibrationData
from specprune.compress.cost import smallest_fraction
from specprune.testbed import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FigureSetting:
    """A trained network, its data, and what to measure on them.

    Measurements are made when a figure first asks for them, and kept.

    Args:
        model: the trained network; left as it is.
        dataset: what it was trained on.
        label: a title for the figures, such as "digits, mlp-128-128-128".
        calibration: number of training images to measure spectra and to prune on (all, if there are fewer).
        keep: fractions of the FLOPs to prune to; those below the smallest network there is are left out.
        seed: of all random choices.
        tradeoff: the trade-off curve, if it is known already; `curve` computes it if None.
        quick: fewer settings and repetitions in the figures that vary some of their own.

    Raises:
        ValueError: no calibration image, or no fraction.
    """

    model: nn.Module
    dataset: Dataset
    label: str
    calibration: int = 5000
    keep: tuple[float, ...] = KEEP_GRID
    seed: int = 0
    tradeoff: Tradeoff | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        if self.calibration < 1 or not self.keep:
            raise ValueError(
                f"calibration={self.calibration}, keep={self.keep}: expected at least one image and one fraction"
            )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that the figures' data depend on, large things as SHA-256 digests, for JSON."""
        data = self.dataset
        tensors = (data.train_inputs, data.train_targets, data.test_inputs, data.test_targets)
        curve = None if self.tradeoff is None else _digest([self.tradeoff.to_json().encode()])
        return {
            "label": self.label,
            "network": _digest([str(self.model).encode(), *_tensor_bytes(self.model.state_dict().values())]),
            "data": data.name,
            "samples": [len(data.train_inputs), len(data.test_inputs)],
            "data_digest": _digest(_tensor_bytes(tensors)),
            "calibration": self.calibration,
            "keep": list(self.keep),
            "tradeoff": curve,
            "seed": self.seed,
            "quick": self.quick,
        }

    @cached_property
    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The first training images, as many as `calibration` says."""
        return self.dataset.train_batches(limit=self.calibration)

    @cached_property
    def budgets(self) -> tuple[float, ...]:
        """The fractions of `keep` that some network meets, rising.

        Raises:
            ValueError: none is met.
        """
        least = smallest_fraction(self.model, CalibrationData(self.calibration_batches))
        met = tuple(sorted(fraction for fraction in set(self.keep) if fraction > least))
        if not met:
            raise ValueError(f"keep={self.keep}: one node a group already costs {least:.3g} of the FLOPs; keep more")
        if len(met) < len(set(self.keep)):
            logger.info("one node a group costs %.3g of the FLOPs: smaller fractions of keep are left out", least)
        return met

    @cached_property
    def spectra(self) -> Spectra:
        """Spectra of all layers' inputs on the calibration images."""
        return layer_spectra(self.model, self.calibration_batches)

    @cached_property
    def curve(self) -> Tradeoff:
        """The trade-off curve over all training images; its `refit_*` columns are fitted on the calibration images."""
        if self.tradeoff is not None:
            return self.tradeoff
        return tradeoff(
            self.model,
            self.dataset.train_batches(),
            self.dataset.test_batches(),
            keep=self.budgets,
            calibration=self.calibration_batches,
            input_radius=self.dataset.input_radius,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Conditions:
    """What figures without a trained network depend on.

    Args:
        seed: of all random choices.
        quick: small problems and few draws: seconds instead of minutes.
        device: where to simulate and train.
    """

    seed: int = 0
    quick: bool = False
    device: torch.device | str = "cpu"

    @property
    def inputs(self) -> dict[str, Any]:
        """All that the figures' data depend on, for JSON."""
        return {"seed": self.seed, "quick": self.quick}


@dataclass(frozen=True)
class Parts:
    """Finished parts of a figure's data, kept in files until all are there, so that an interrupted run can go on.

    Args:
        folder: where to keep them; None keeps nothing.
    """

    folder: Path | None = None

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a part: from its file if there is one, else computed and written down.

        Args:
            name: a file name without suffix; each part of a figure has its own.
            compute: returns the part, in types that `to_json` takes.

        Returns:
            The part as JSON gives it back.
        """
        if self.folder is None:
            return json.loads(to_json(compute()))
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_text(path, to_json(compute()) + "\n")
        return read_json(path, f"a part of a figure; delete {path.parent.name} to make it again")


def _tensor_bytes(tensors: Iterable[Tensor]) -> Iterable[bytes]:
    for tensor in tensors:
        yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _digest(chunks: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()
