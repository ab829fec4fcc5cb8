"""All figures: what each shows, what it needs, how its data are computed and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from specprune.figures import (
    accuracy,
    approximation_error,
    bias_variance,
    bound_bars,
    bound_trends,
    certificate_path,
    comparison,
    degrees_of_freedom,
    double_descent,
    eigenvalue_decay,
    measure_ranking,
    measure_scatter,
    selection_rules,
    spectrum_samples,
    uncompressed,
)

SPECTRAL = "spectral pruning"
UNCOMPRESSED = "uncompressed bound"
OVERPARAMETERISED = "over-parameterisation"
NEIGHBOURS = "ALDS comparison"
TIGHTNESS = "tightness"
CERTIFICATE = "certificate"
MEASURES = "measures"
#: The order in which the groups are listed.
GROUPS = (SPECTRAL, UNCOMPRESSED, OVERPARAMETERISED, NEIGHBOURS, TIGHTNESS, CERTIFICATE, MEASURES)

NETWORK = "network"
NOTHING = "nothing"


@dataclass(frozen=True)
class GalleryFigure:
    """A figure of the gallery.

    Attributes:
        name: of its files.
        group: one of `GROUPS`.
        title: what it shows, in one line.
        compute: takes a `FigureSetting` if it needs a network, else `Conditions`, and with `in_parts` a `Parts`;
            returns data for JSON.
        draw: takes these data; returns the figure.
        needs: "network" (a trained network and its data) or "nothing" (it makes its own).
        in_parts: whether `compute` keeps finished parts, so that it goes on where it was interrupted.
    """

    name: str
    group: str
    title: str
    compute: Callable[..., dict[str, Any]]
    draw: Callable[[dict[str, Any]], Figure]
    needs: str = NETWORK
    in_parts: bool = False


def _descent(
    name: str, title: str, compute: Callable[..., dict[str, Any]], above: str, in_parts: bool
) -> GalleryFigure:
    draw = partial(double_descent.draw_panels, title=above)
    return GalleryFigure(name, OVERPARAMETERISED, title, compute, draw, NOTHING, in_parts)


def _of_module(module: Any, group: str, title: str, needs: str = NETWORK, in_parts: bool = False) -> GalleryFigure:
    name = module.__name__.rpartition(".")[2]
    return GalleryFigure(name, group, title, module.compute, module.draw, needs, in_parts)


#: All figures by name, group by group.
FIGURES: dict[str, GalleryFigure] = {
    figure.name: figure
    for figure in (
        _of_module(eigenvalue_decay, SPECTRAL, "eigenvalues of each layer's inputs, with power laws fitted to them"),
        _of_module(spectrum_samples, SPECTRAL, "eigenvalues of each layer's inputs, from few and from many images"),
        _of_module(degrees_of_freedom, SPECTRAL, "degrees of freedom of each layer's inputs against lambda"),
        _of_module(approximation_error, SPECTRAL, "distance of pruned networks from the original: measured, certified"),
        _of_module(accuracy, SPECTRAL, "accuracy against lambda, theta and width", in_parts=True),
        _of_module(selection_rules, SPECTRAL, "what the choice of nodes and the refit are worth", in_parts=True),
        _of_module(bias_variance, SPECTRAL, "the trade-off curve: bias falls with the size, variance rises"),
        _of_module(uncompressed, UNCOMPRESSED, "bounds for the original network through smaller ones", in_parts=True),
        _descent(
            "double_descent",
            "pruned least squares against size, for three covariances",
            double_descent.compute_linear,
            "Pruned least squares: double descent",
            True,
        ),
        _descent(
            "retraining",
            "when a refit of the kept features helps",
            double_descent.compute_retraining,
            "When a refit helps",
            True,
        ),
        _descent(
            "random_features",
            "pruned random ReLU features against their number",
            double_descent.compute_random_features,
            "Random features",
            False,
        ),
        GalleryFigure(
            "network_descent",
            OVERPARAMETERISED,
            "networks of many widths, pruned to ten nodes",
            double_descent.compute_networks,
            partial(double_descent.draw_networks, title="Networks on noisy digits, pruned to 10 nodes"),
            NOTHING,
        ),
        _of_module(comparison, NEIGHBOURS, "nodes, ranks and samples: error at equal FLOPs"),
        _of_module(bound_bars, TIGHTNESS, "every bound on one network and its pruned version"),
        _of_module(bound_trends, TIGHTNESS, "bounds against samples, width, depth, label noise and pruning", NOTHING),
        _of_module(certificate_path, CERTIFICATE, "certificates along the pruning path", NOTHING, True),
        _of_module(measure_ranking, MEASURES, "measures ranked by how well they predict the gap", NOTHING, True),
        _of_module(measure_scatter, MEASURES, "generalization gap against four measures", NOTHING, True),
    )
}


def figures_of(group: str) -> tuple[str, ...]:
    """Return the names of a group's figures.

    Args:
        group: one of `GROUPS`.

    Raises:
        ValueError: there is no such group.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}: expected one of {', '.join(GROUPS)}")
    return tuple(name for name, figure in FIGURES.items() if figure.group == group)
