"""How many dimensions each layer really uses: spectra of its inputs, degrees of freedom, effective rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from specprune._records import format_table, to_json, to_latex_table
from specprune.bounds.degrees_of_freedom import (
    PowerLaw,
    degrees_of_freedom,
    effective_rank,
    eigenvalues,
    fit_power_law,
    leverage_scores,
)
from specprune.compress import Moments, collect_moments
from specprune.compress.batches import CalibrationData, Forward

LAMBDAS = (1e-2, 1e-4, 1e-6)


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of one layer's inputs.

    Args:
        layer: the layer that reads the nodes.
        covariance: (m, m) noncentred covariance of the nodes.
        eigenvalues: (m,) its eigenvalues, falling.
        samples: number of rows (samples times pixels) behind it.
    """

    layer: str
    covariance: np.ndarray
    eigenvalues: np.ndarray
    samples: int

    @property
    def width(self) -> int:
        """Number of nodes m."""
        return len(self.eigenvalues)

    @property
    def trace(self) -> float:
        """Tr Sigma, the mean square norm of the nodes."""
        return float(self.eigenvalues.sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised eigenvalues, between 1 and m (Roy and Vetterli 2007)."""
        return effective_rank(self.eigenvalues)

    def degrees_of_freedom(self, lam: float) -> float:
        """Return N(lambda) at the relative lambda: lambda = lam * Tr Sigma."""
        return float(degrees_of_freedom(self.eigenvalues, lam * self.trace))

    def leverage(self, lam: float) -> np.ndarray:
        """Return the (m,) leverage scores of the nodes at the relative lambda; they sum to 1."""
        return leverage_scores(self.covariance, lam * self.trace)

    def power_law(self) -> PowerLaw:
        """Return the least squares fit mu_j ~ mu_0 j^(-1/beta) over the positive eigenvalues."""
        positive = int(np.count_nonzero(self.eigenvalues > 1e-12 * self.eigenvalues[0]))
        return fit_power_law(self.eigenvalues, last=positive)


@dataclass(frozen=True)
class Spectra(Mapping[str, LayerSpectrum]):
    """The spectra of all layers' inputs, in the order in which the network runs them.

    Args:
        layers: layer name to spectrum.
    """

    layers: dict[str, LayerSpectrum]

    def __getitem__(self, name: str) -> LayerSpectrum:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer: width, effective rank, N at three relative lambdas, power-law exponent."""
        records = []
        for spectrum in self.layers.values():
            record: dict[str, Any] = {"layer": spectrum.layer, "width": spectrum.width}
            record["effective_rank"] = spectrum.effective_rank
            for lam in LAMBDAS:
                record[f"N({lam:.0e} Tr)"] = spectrum.degrees_of_freedom(lam)
            enough = np.count_nonzero(spectrum.eigenvalues > 1e-12 * spectrum.eigenvalues[0]) >= 3
            fit = spectrum.power_law() if enough else None
            record["beta"] = None if fit is None else fit.beta
            record["fit_r2"] = None if fit is None else fit.r_squared
            records.append(record)
        return records

    def to_json(self) -> str:
        """Return records and all eigenvalues as JSON."""
        return to_json(
            {
                "layers": self.to_records(),
                "eigenvalues": {name: spectrum.eigenvalues for name, spectrum in self.layers.items()},
            }
        )

    def to_latex(self) -> str:
        """Return the records as a LaTeX tabular, which needs the package booktabs."""
        renamed = {"effective_rank": "effective rank", "fit_r2": "R squared of the fit"}
        records = self.to_records()
        return to_latex_table(records, {name: renamed.get(name, name) for name in records[0]})

    def __str__(self) -> str:
        return format_table(self.to_records(), title="degrees of freedom N(lambda) of each layer's inputs")


def layer_spectra(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    layers: Sequence[str] | None = None,
    *,
    moments: Moments | None = None,
    forward: Forward | None = None,
) -> Spectra:
    """Return the spectrum of what each Linear and Conv2d layer receives, from one pass over the data.

    Args:
        model: any module with Linear or ungrouped Conv2d layers; left as it is.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings.
        layers: names of the layers to measure; by default all that run.
        moments: channel-level moments of the model to use instead of running it.
        forward: optional `forward(model, batch)`.

    Returns:
        Spectra by layer; convolutions pool their pixels, so that a node is a channel.

    Raises:
        ValueError: empty batches, unknown layers, layers that are zero on all data, or NaN (the layer is named).

    Source:
        Suzuki et al. 2020, arXiv:1808.08558, section 3 (degrees of freedom); leverage scores: Bach 2017.
    """
    if moments is None:
        moments = collect_moments(model, batches, layers, forward=forward)
    names = list(moments) if layers is None else list(layers)
    missing = [name for name in names if name not in moments]
    if moments.level != "channel" or missing:
        raise ValueError(
            f"the moments are of {moments.level} level and of the layers {list(moments)}; expected channel level"
            + (f", with {missing}" if missing else "")
        )
    spectra = {}
    for name in names:
        entry = moments[name]
        covariance = entry.covariance()
        values = eigenvalues(covariance)
        if values[0] <= 0:
            raise ValueError(f"the inputs of layer {name!r} are zero on all data: nothing to measure")
        spectra[name] = LayerSpectrum(name, covariance, values, entry.rows)
    return Spectra(spectra)
