"""How fast the spectra of a network decay: singular values of its weights, eigenvalues of its layers' inputs.

The theorems for the original network ask for sigma_j <= V_0 j^(-alpha) (weights) and mu_j <= U_0 j^(-beta) (covariance
of a layer's inputs); here a LARGE exponent is a fast decay, while `PowerLaw.beta` is the inverse of such an exponent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.analysis.chain import ChainLayer
from specprune.analysis.spectra import layer_spectra
from specprune.bounds.low_rank import DecayFit, SpectralLayer, fit_decay, truncate
from specprune.compress import Moments
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.layers import get_layer


@dataclass(frozen=True)
class LayerDecay:
    """The decays of one layer.

    Args:
        layer: its name.
        outputs: rows of the weight matrix.
        inputs: columns of the weight matrix (of a convolution: channels * kernel offsets).
        singular_values: of the weight matrix, falling.
        eigenvalues: of the noncentred covariance of the nodes that the layer reads, falling.
        weight: fit sigma_j <= V_0 j^(-alpha); None where nothing decays (one positive value, or a flat spectrum).
        covariance: fit mu_j <= U_0 j^(-beta); None likewise.
    """

    layer: str
    outputs: int
    inputs: int
    singular_values: np.ndarray
    eigenvalues: np.ndarray
    weight: DecayFit | None
    covariance: DecayFit | None


@dataclass(frozen=True)
class NetworkDecay:
    """The decays of all layers, in the order in which the network runs them.

    Args:
        layers: one entry a layer.
    """

    layers: tuple[LayerDecay, ...]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer: alpha and beta with standard errors, scales and R^2."""
        return [
            {
                "layer": item.layer,
                "outputs": item.outputs,
                "inputs": item.inputs,
                **_columns(item.weight, "alpha", "V_0"),
                **_columns(item.covariance, "beta", "U_0"),
            }
            for item in self.layers
        ]

    def to_json(self) -> str:
        """Return records and all singular values and eigenvalues as JSON."""
        return to_json(
            {
                "layers": self.to_records(),
                "singular_values": {item.layer: item.singular_values for item in self.layers},
                "eigenvalues": {item.layer: item.eigenvalues for item in self.layers},
            }
        )

    def __str__(self) -> str:
        return format_table(self.to_records(), title="decay: sigma_j <= V_0 j^(-alpha), mu_j <= U_0 j^(-beta)")


def _columns(fit: DecayFit | None, exponent: str, scale: str) -> dict[str, float | None]:
    return {
        exponent: None if fit is None else fit.exponent,
        f"{exponent}_error": None if fit is None else fit.standard_error,
        scale: None if fit is None else fit.scale,
        f"{exponent}_r2": None if fit is None else fit.r_squared,
    }


def measure_decay(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    layers: Sequence[str] | None = None,
    *,
    moments: Moments | None = None,
    forward: Forward | None = None,
) -> NetworkDecay:
    """Return how fast the singular values of each layer's weights, and its inputs' eigenvalues, fall.

    Args:
        model: any module with Linear or ungrouped Conv2d layers; left as it is.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings.
        layers: names of the layers to measure; by default all that run.
        moments: channel-level moments of the model to use instead of running it.
        forward: optional `forward(model, batch)`.

    Returns:
        Fits by layer; of a convolution, the matrix is outputs x (channels * kernel offsets), and a node is a channel.

    Raises:
        ValueError: as `layer_spectra`.

    Source:
        Assumptions of Suzuki, Abe and Nishimura 2020, arXiv:1909.11274; least squares in logarithms.
    """
    spectra = layer_spectra(model, batches, layers, moments=moments, forward=forward)
    result = []
    for name, spectrum in spectra.items():
        matrix = _matrix(get_layer(model, name).weight)
        values = np.linalg.svd(matrix, compute_uv=False)
        # What float32 rounding left behind has no decay of its own.
        noise = max(matrix.shape) * float(np.finfo(np.float32).eps) * float(values[0])
        weight = _fit(values, int(np.count_nonzero(values > noise)))
        mu = spectrum.eigenvalues
        covariance = _fit(mu, int(np.count_nonzero(mu > 1e-12 * mu[0])))
        result.append(LayerDecay(name, matrix.shape[0], matrix.shape[1], values, mu, weight, covariance))
    return NetworkDecay(tuple(result))


def _matrix(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().to(torch.float64).flatten(1).cpu().numpy()


def _fit(values: np.ndarray, last: int) -> DecayFit | None:
    try:
        return fit_decay(values, last=last)
    except ValueError:  # fewer than two positive values, or no decay
        return None


def spectral_layers(layers: Iterable[ChainLayer]) -> list[SpectralLayer]:
    """Return the layers of a chain as the low-rank bound sees them, with the maps behind each folded in.

    The norms are those of `layer_sizes`: lipschitz * sqrt(overlap) times the singular values of [W_1 ... W_s].

    Args:
        layers: from `trace_chain`.
    """
    return [
        SpectralLayer(
            outputs=len(layer.weight),
            inputs=layer.weight[0].size,
            biases=len(layer.bias),
            singular_values=layer.lipschitz
            * math.sqrt(layer.overlap)
            * np.linalg.svd(layer.weight.reshape(len(layer.weight), -1), compute_uv=False),
            bias_norm=layer.lipschitz * math.sqrt(layer.positions_out) * float(np.linalg.norm(layer.bias)),
        )
        for layer in layers
    ]


@torch.no_grad()
def truncate_weights(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Return a copy of a model with the weight matrices of some layers cut to low rank.

    Args:
        model: left as it is.  Batch norms behind a layer scale its rows, so cut a network with batch norms folded in
            if singular values of `spectral_layers` are to describe the cut.
        ranks: layer name to largest rank; of a convolution, of outputs x (channels * kernel offsets).

    Returns:
        The copy, in float64: rounding to float32 would make it full rank again.

    Raises:
        ValueError: unknown layers, or a rank below 1.
    """
    work = copy.deepcopy(model).double()
    for name, rank in ranks.items():
        weight = get_layer(work, name).weight
        weight.copy_(torch.from_numpy(truncate(_matrix(weight), rank)[0]).reshape(weight.shape))
    return work
