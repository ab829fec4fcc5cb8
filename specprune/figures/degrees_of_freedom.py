"""Figure: how many degrees of freedom each layer's inputs have, at every level of regularisation."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specprune.analysis import LayerSpectrum
from specprune.bounds.degrees_of_freedom import inverse_degrees_of_freedom
from specprune.figures.setting import FigureSetting
from specprune.figures.style import REFERENCE, figure_style, finish_figure, new_figure, numbers, series_style

_LAMBDAS = np.logspace(-8, 0, 65)


def compute(setting: FigureSetting) -> dict[str, Any]:
    """Return N(lambda) of every layer over relative lambdas from 1e-8 to 1.

    Args:
        setting: network and data.

    Returns:
        "label", "lambdas" (shares of Tr Sigma), and "layers": name, width, "counts" N(lambda), "effective_rank" and
        the relative lambda at which N(lambda) is that rank (0 where it is the full rank).
    """
    layers = [_layer(spectrum) for spectrum in setting.spectra.values()]
    return {"label": setting.label, "lambdas": _LAMBDAS.tolist(), "layers": layers}


def _layer(spectrum: LayerSpectrum) -> dict[str, Any]:
    rank = min(spectrum.effective_rank, float(np.count_nonzero(spectrum.eigenvalues)))
    return {
        "layer": spectrum.layer,
        "width": spectrum.width,
        "counts": [spectrum.degrees_of_freedom(lam) for lam in _LAMBDAS],
        "effective_rank": rank,
        "effective_rank_lambda": inverse_degrees_of_freedom(spectrum.eigenvalues, rank) / spectrum.trace,
    }


def draw(data: dict[str, Any]) -> Figure:
    """Draw N(lambda), both axes logarithmic, with the widths as dotted ceilings and the effective ranks as stars.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (ax,) = new_figure()
        lams = numbers(data["lambdas"])
        for k, layer in enumerate(data["layers"]):
            ax.plot(lams, numbers(layer["counts"]), label=_label(layer), markevery=0.13, **series_style(k))
        for k, width in enumerate(sorted({layer["width"] for layer in data["layers"]})):
            ax.axhline(width, label="width of a layer" if k == 0 else None, **REFERENCE)
        for k, layer in enumerate(data["layers"]):
            # A flat spectrum has its full rank at lambda = 0, which a logarithmic axis shows at its left end.
            x = max(layer["effective_rank_lambda"], lams.min())
            ax.plot(
                [x],
                [layer["effective_rank"]],
                label=r"$N = r_\mathrm{eff}$" if k == 0 else None,
                linestyle="none",
                marker="*",
                markersize=9,
                markerfacecolor=series_style(k)["color"],
                markeredgecolor="black",
                markeredgewidth=0.5,
                zorder=3,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(r"relative regularisation $\lambda\,/\,\mathrm{Tr}\,\Sigma$")
        ax.set_ylabel(r"degrees of freedom $N(\lambda)$ (nodes)")
        finish_figure(figure, data["label"])
    return figure


def _label(layer: dict[str, Any]) -> str:
    # The effective ranks of layers are often so close that the stars overlap: the numbers tell them apart.
    return rf"{layer['layer']}, $r_\mathrm{{eff}}$ = {layer['effective_rank']:.1f}"
