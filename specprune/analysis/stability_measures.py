"""Measures made of what a network bears: noise on its weights, weights taken away, inputs moved; and of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from specprune.analysis.cover_complexity import cover_complexity as measure_cover
from specprune.analysis.cover_complexity import smoothness as measure_smoothness
from specprune.analysis.measured_network import Measure, MeasuredNetwork, as_measure, measures_in

JIN = "Jin, Lu, Tang and Karniadakis 2019, arXiv:1905.11427"


@as_measure(r"\delta_f(1/2)", JIN, cost="noise", higher_is_worse=False)
def smoothness(net: MeasuredNetwork) -> float:
    """How far a training input moves, at least, before the probability of a class changes by one half."""

    def probabilities(inputs: Tensor) -> Tensor:
        return torch.softmax(net.folded(inputs), dim=1)

    return measure_smoothness(probabilities, net.inputs).distance


@as_measure(r"(1 - \rho_T) / \mathrm{CD}", JIN, cost="pass", needs="population")
def cover_complexity(net: MeasuredNetwork) -> float:
    """How badly the training set covers the law of the data, relative to how far its classes lie apart."""
    if net.population is None:
        raise ValueError("the law of the data is not known: give population=")
    return measure_cover(net.inputs, net.targets, *net.population).cover_complexity


STABILITY_MEASURES: tuple[Measure, ...] = measures_in(globals())
