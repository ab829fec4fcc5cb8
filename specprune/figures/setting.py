"""What the figures are about: one trained network on one data set, with the measurements that figures share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

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

    def __post_init__(self) -> None:
        if self.calibration < 1 or not self.keep:
            raise ValueError(
                f"calibration={self.calibration}, keep={self.keep}: expected at least one image and one fraction"
            )

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
