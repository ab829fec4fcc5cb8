"""Certificates along the pruning path: how few nodes are best for a promise, and how other short words compare.

A narrow network has a short word and many training errors, a wide one the reverse: bias falls and variance rises with
the width, and here their sum is a number that holds.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specprune._records import format_table, to_json
from specprune.analysis.certificate import LabelledImages
from specprune.analysis.certify import certify
from specprune.analysis.code_baselines import Baseline, float_baseline, subspace_baseline
from specprune.analysis.code_design import Design, default_design, scaled_design
from specprune.analysis.code_training import TrainingImages, training_images
from specprune.analysis.tradeoff import CURVE_STYLES
from specprune.bounds.bound import check_number
from specprune.compress.integer_network import integer_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

#: Dimensions of the random subspace that is compared with.
SUBSPACE = 1000
#: Test errors that were certified with probability 0.95 from the training set alone, with a prior that was fixed before
#: the data: Lotfi et al. 2022 (arXiv:2211.13609), their table of data-independent bounds.
PUBLISHED = {"mnist": 0.116, "fashion-mnist": 0.328, "cifar10": 0.582}
FACTORS = (0.35, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class PathPoint:
    """One width of the path.

    Attributes:
        factor: of the default widths.
        widths: channels of the layers that are searched over.
        weights: how many the word sends.
        bits: length of the word.
        train_error: of the network.
        test_error: of the network; nothing was chosen by it.
        certificate: what the word promises.
    """

    factor: float
    widths: tuple[int, ...]
    weights: int
    bits: int
    train_error: float
    test_error: float
    certificate: float


@dataclass(frozen=True)
class CertificatePath:
    """Certificates of several widths, and what they are compared with.

    Attributes:
        data: name of the data set.
        front_end: the fixed transforms before the first layer.
        n: training images.
        delta: each certificate fails with at most this probability.
        points: by rising width.
        baselines: other short words, trained in the same time as each point.
        published: the best published value of the kind, where there is one.
    """

    data: str
    front_end: str
    n: int
    delta: float
    points: tuple[PathPoint, ...]
    baselines: tuple[Baseline, ...] = ()
    published: float | None = None

    @property
    def best(self) -> PathPoint:
        """The width with the lowest certificate; whoever quotes it pays for no choice, as the word names the width."""
        return min(self.points, key=lambda point: point.certificate)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a width."""
        return [dataclasses.asdict(point) for point in self.points]

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(dataclasses.asdict(self))

    def __str__(self) -> str:
        rows: list[dict[str, Any]] = [
            {
                "network": "pruned to " + "-".join(map(str, point.widths)),
                "certificate": f"{point.certificate:.2%}",
                "train": f"{point.train_error:.2%}",
                "test": f"{point.test_error:.2%}",
                "bits": point.bits,
                "weights": point.weights,
            }
            for point in self.points
        ]
        for baseline in self.baselines:
            rows.append(
                {
                    "network": baseline.method,
                    "certificate": f"{baseline.value:.2%}",
                    "train": f"{baseline.train_error:.2%}",
                    "bits": round(baseline.bits),
                    "weights": baseline.weights,
                }
            )
        title = f"{self.data}, {self.front_end}: certificates with probability {1 - self.delta:g}, n = {self.n}"
        text = format_table(rows, title=title)
        if self.published is not None:
            text += f"\npublished (Lotfi et al. 2022, data-independent prior): {self.published:.1%}"
        return text

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw certificate, training error and their difference (the price of the bits) against bits.

        Args:
            ax: where to draw; a new figure if None.  Nothing is shown and no global setting is changed.

        Returns:
            The Axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt  # imported late: a search without plots should not load it

            _, ax = plt.subplots(figsize=(5.0, 3.4), layout="constrained")
        bits = [point.bits for point in self.points]
        for label, values, role in (
            ("certificate", [point.certificate for point in self.points], "bound"),
            ("training error (bias)", [point.train_error for point in self.points], "bias"),
            ("price of the bits (variance)", [p.certificate - p.train_error for p in self.points], "variance"),
            ("test error (measured)", [point.test_error for point in self.points], "test"),
        ):
            ax.plot(bits, [100 * value for value in values], label=label, **CURVE_STYLES[role])
        if self.published is not None:
            ax.axhline(100 * self.published, color="0.45", linestyle=":", linewidth=0.8, label="published")
        ax.set_xlabel("length of the word [bits]")
        ax.set_ylabel("error [%]")
        ax.set_ylim(bottom=0)
        return ax


def certificate_path(
    dataset: LabelledImages,
    *,
    minutes: float,
    out: str | os.PathLike[str],
    factors: Sequence[float] = FACTORS,
    design: Design | None = None,
    baselines: bool = True,
    seed: int = 0,
    delta: float = 0.05,
    device: torch.device | str = "cpu",
) -> CertificatePath:
    """Search for certificates at several widths of one design, and by other ways, each for the same time.

    Args:
        dataset: the certificates are about.
        minutes: of search, for each width and each baseline.
        out: folder; each width gets a folder in it, with its network, and can be resumed.
        factors: of the design's widths.
        design: of factor 1; `default_design` if None.
        baselines: whether to train a random subspace and real numbers as well.
        seed: of all random choices.
        delta: allowed probability of failure of each certificate, in (0, 1).
        device: where to train and search; the baselines stay on the CPU.

    Returns:
        The path.

    Raises:
        ValueError: no time, no factor, or data that `certify` refuses.
    """
    minutes = check_number("minutes", minutes, 0.0, open_low=True)
    if not factors:
        raise ValueError("factors: got none; give at least one, such as 1.0")
    base = default_design(dataset) if design is None else design
    points = []
    for factor in sorted(set(factors)):
        own = scaled_design(base, factor)
        folder = Path(out) / f"width-{factor:g}"
        run = certify(dataset, minutes=minutes, seed=seed, out=folder, design=own, delta=delta, device=device)
        found = run.certificate
        points.append(
            PathPoint(
                factor,
                tuple(layer.out_channels for layer in own.owners[:-1]),
                found.weights,
                found.bits,
                found.train_error,
                found.test_error,
                found.value,
            )
        )
    others = _baselines(dataset, base, max(factors), minutes, seed, delta) if baselines else ()
    front_end = found.front_end
    n = len(dataset.train_targets)
    return CertificatePath(dataset.name, front_end, n, delta, tuple(points), others, PUBLISHED.get(dataset.name))


def _baselines(
    dataset: LabelledImages, design: Design, widest: float, minutes: float, seed: int, delta: float
) -> tuple[Baseline, ...]:
    """Train both baselines for as many epochs as the time allows."""
    wide = scaled_design(design, widest)
    images = training_images(wide, integer_pixels(dataset.train_inputs), dataset.train_targets)
    rows = max(images.n // 10, min(images.n, 200))
    part = TrainingImages(images.maps[:, :rows], images.targets[:rows])

    def subspace(data: TrainingImages, epochs: int) -> Baseline:
        return subspace_baseline(wide, data, SUBSPACE, epochs=epochs, seed=seed, delta=delta)

    def real(data: TrainingImages, epochs: int) -> Baseline:
        return float_baseline(design, data, epochs=epochs, seed=seed, delta=delta)

    found = []
    for train in (subspace, real):
        logger.info("baseline: %s", train.__name__)
        began = time.monotonic()
        train(part, 8)
        epoch = (time.monotonic() - began) / 8 * images.n / rows
        found.append(train(images, max(1, int(60 * minutes / epoch))))
    return tuple(found)
