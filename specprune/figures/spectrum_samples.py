"""Figure: what the number of images does to the measured eigenvalues of each layer's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from specprune.analysis import layer_spectra
from specprune.compress import collect_moments
from specprune.figures.setting import FigureSetting
from specprune.figures.style import COLUMN_WIDTHS, figure_style, numbers, series_style, shared_legend

_COUNTS = (30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
_PANELS = 6
_ACROSS = 3
_ROW_HEIGHT = 1.9
_LOWEST = 1e-9
_BATCH = 1000


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return every layer's eigenvalues, measured on nested random subsets of the training images.

    With fewer images than nodes the covariance of a fully connected layer's inputs has at most as many eigenvalues
    above 0 as there are images; a convolution pools its pixels and needs fewer images.

    Args:
        setting: network and data.

    Returns:
        "label", "samples" (numbers of images, rising) and "layers", at most six that are evenly spread over the
        network: name, width, and for each number of images "shares" mu_j / Tr Sigma (falling) and "effective_ranks".
    """
    dataset = setting.dataset
    total = len(dataset.train_inputs)
    counts = [count for count in _COUNTS if count < total] + [total]
    counts = counts[:3] if setting.quick else counts[-5:]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(setting.seed)).to(dataset.train_inputs.device)
    names = _spread(list(setting.spectra))
    layers: list[dict[str, Any]] = [
        {"layer": name, "width": setting.spectra[name].width, "shares": [], "effective_ranks": []} for name in names
    ]
    for count in counts:
        images = dataset.train_inputs[order[:count]]
        spectra = layer_spectra(setting.model, [], names, moments=collect_moments(setting.model, images.split(_BATCH)))
        for layer in layers:
            spectrum = spectra[layer["layer"]]
            # What is measured beyond the number of rows is rounding.
            positive = np.maximum(spectrum.eigenvalues[: spectrum.samples], 0.0)
            layer["shares"].append((positive / spectrum.trace).tolist())
            layer["effective_ranks"].append(spectrum.effective_rank)
    return {"label": setting.label, "samples": counts, "layers": layers}


def _spread(names: list[str]) -> list[str]:
    """Return at most as many names as there are panels, evenly spread, the first and the last among them."""
    if len(names) <= _PANELS:
        return names
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, _PANELS)]


def draw(data: dict[str, Any]) -> Figure:
    """Draw one panel a layer, with one curve a number of images.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        layers = data["layers"]
        across = min(_ACROSS, len(layers))
        rows = -(-len(layers) // across)
        width = COLUMN_WIDTHS[2 if across > 1 else 1]
        figure = Figure(figsize=(width, _ROW_HEIGHT * rows), layout="constrained")
        fields = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
        for place, (ax, layer) in enumerate(zip(fields, layers, strict=False)):
            for k, (count, shares) in enumerate(zip(data["samples"], layer["shares"], strict=True)):
                values = numbers(shares)
                values = values[values > _LOWEST]  # below is what single precision leaves of 0
                index = np.arange(1, len(values) + 1)
                ax.plot(index, values, label=f"{count} images", markevery=(0.03 * k, 0.2), **series_style(k))
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlabel(f"index $j$ ({layer['layer']}, {layer['width']} nodes)")
            if place % across == 0:
                ax.set_ylabel(r"share of the trace $\mu_j\,/\,\mathrm{Tr}\,\Sigma$")
        for ax in fields[len(layers) :]:
            ax.set_axis_off()
        shared_legend(figure, fields[:1], data["label"])
    return figure
