"""Figure: how fast the eigenvalues of each layer's inputs fall, and the power laws fitted to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specprune.analysis import LayerSpectrum
from specprune.figures.setting import FigureSetting
from specprune.figures.style import figure_style, finish_figure, new_figure, numbers, series_style

# Eigenvalues below this share of the largest are rounding noise; the power law is fitted to those above.
_NOISE = 1e-12


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return every layer's eigenvalues as shares of their sum, with the fitted power law.

    Args:
        setting: network and data.

    Returns:
        "label", and "layers": name, "shares" mu_j / Tr Sigma of the positive eigenvalues, and "fit" (scale mu0 as a
        share, beta and R^2 of mu_j = mu0 j^(-1/beta)), None where fewer than three eigenvalues are positive.
    """
    return {"label": setting.label, "layers": [_layer(spectrum) for spectrum in setting.spectra.values()]}


def _layer(spectrum: LayerSpectrum) -> dict[str, Any]:
    values = spectrum.eigenvalues
    positive = values[values > _NOISE * values[0]]
    fit = None
    if len(positive) >= 3:
        law = spectrum.power_law()
        fit = {"mu0": law.mu0 / spectrum.trace, "beta": law.beta, "r_squared": law.r_squared}
    return {"layer": spectrum.layer, "shares": (positive / spectrum.trace).tolist(), "fit": fit}


def draw(data: dict[str, Any]) -> Figure:
    """Draw shares against index, both logarithmic, with the fits as thin straight lines.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (ax,) = new_figure()
        for k, layer in enumerate(data["layers"]):
            shares = numbers(layer["shares"])
            index = np.arange(1, len(shares) + 1)
            style = series_style(k)
            # markevery as a float spaces markers evenly on the page; by index they would crowd at the right.
            ax.plot(index, shares, label=_label(layer), markevery=0.08, **style)
            if layer["fit"] is not None:
                fitted = layer["fit"]["mu0"] * index ** (-1.0 / layer["fit"]["beta"])
                ax.plot(index, fitted, color=style["color"], linewidth=0.5)
        lowest = min(min(numbers(layer["shares"])) for layer in data["layers"])
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(max(0.3 * lowest, 1e-10), 2.0)
        ax.set_xlabel("index $j$ of the eigenvalue")
        ax.set_ylabel(r"share of the trace $\mu_j\,/\,\mathrm{Tr}\,\Sigma$")
        finish_figure(figure, data["label"])
    return figure


def _label(layer: dict[str, Any]) -> str:
    fit = layer["fit"]
    if fit is None:
        return str(layer["layer"])
    return rf"{layer['layer']}: $j^{{-{1 / fit['beta']:.1f}}}$, $R^2$ = {fit['r_squared']:.2f}"
