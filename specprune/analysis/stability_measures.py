"""Measures made of what a network bears: noise on its weights, weights taken away, inputs moved; and of the data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from specprune.analysis.cover_complexity import cover_complexity as measure_cover
from specprune.analysis.cover_complexity import smoothness as measure_smoothness
from specprune.analysis.flatness import flatness_measure, magnitude_pacbayes_measure, pacbayes_measure
from specprune.analysis.measured_network import Measure, MeasuredNetwork, as_measure, measures_in
from specprune.analysis.norm_measures import JIANG, root

JIN = "Jin, Lu, Tang and Karniadakis 2019, arXiv:1905.11427"
KUHN = "Kuhn et al. 2021, arXiv:2103.06002"


@as_measure(r"\sqrt{(\|w - w_0\|^2 / (4 \sigma^2) + \ln(m / \sigma) + 10) / m}", JIANG, cost="noise", needs="start")
def pacbayes_init(net: MeasuredNetwork) -> float:
    """Distance from the start in units of the noise that the weights bear."""
    moved = float(np.linalg.norm(net.vector - net.start_vector))
    return root(pacbayes_measure(moved, net.sigma, net.samples), net.samples)


@as_measure(r"\sqrt{(\|w\|^2 / (4 \sigma^2) + \ln(m / \sigma) + 10) / m}", JIANG, cost="noise")
def pacbayes_orig(net: MeasuredNetwork) -> float:
    """Length of the weights in units of the noise that they bear."""
    return root(pacbayes_measure(float(np.linalg.norm(net.vector)), net.sigma, net.samples), net.samples)


@as_measure(r"\sqrt{1 / (\sigma^2 m)}", JIANG, cost="noise")
def pacbayes_flatness(net: MeasuredNetwork) -> float:
    """One over the noise on the weights that costs a tenth of the training accuracy."""
    return root(flatness_measure(net.sigma), net.samples)


@as_measure(
    r"\sqrt{(\tfrac14 \sum_i \ln \frac{\epsilon^2 + (\sigma'^2 + 1) \|w - w_0\|^2 / \omega}"
    r"{\epsilon^2 + \sigma'^2 (w_i - w_{0,i})^2} + \ln(m / \sigma') + 10) / m}",
    JIANG,
    cost="noise",
    needs="start",
)
def pacbayes_mag_init(net: MeasuredNetwork) -> float:
    """Distance from the start in units of noise in proportion to the weights."""
    moves = net.vector - net.start_vector
    value = magnitude_pacbayes_measure(float(np.linalg.norm(moves)), moves, net.relative_sigma, net.samples)
    return root(value, net.samples)


@as_measure(
    r"(\tfrac14 \sum_i \ln \frac{\epsilon^2 + (\sigma'^2 + 1) \|w\|^2 / \omega}"
    r"{\epsilon^2 + \sigma'^2 (w_i - w_{0,i})^2} + \ln(m / \sigma') + 10) / m",
    JIANG,
    cost="noise",
    needs="start",
)
def pacbayes_mag_orig(net: MeasuredNetwork) -> float:
    """Length of the weights in units of noise in proportion to them; without the root, for it may be negative."""
    moves = net.vector - net.start_vector
    length = float(np.linalg.norm(net.vector))
    return magnitude_pacbayes_measure(length, moves, net.relative_sigma, net.samples) / net.samples


@as_measure(r"\sqrt{1 / (\sigma'^2 m)}", JIANG, cost="noise")
def pacbayes_mag_flatness(net: MeasuredNetwork) -> float:
    """One over the noise in proportion to the weights that costs a tenth of the training accuracy."""
    return root(flatness_measure(net.relative_sigma), net.samples)


@as_measure(
    r"\min \{\alpha : \hat L(P_{\alpha'} w) \le \hat L(w) + 0.1 \ \forall \alpha' \ge \alpha\}", KUHN, cost="noise"
)
def prunability(net: MeasuredNetwork) -> float:
    """Share of the weights that magnitude pruning must keep for a training loss 0.1 above the network's."""
    return net.magnitude_prunability.fraction("absolute")


@as_measure(
    r"\min \{\alpha : \hat L(P_{\alpha'} w) \le 1.1 \hat L(w) \ \forall \alpha' \ge \alpha\}", KUHN, cost="noise"
)
def prunability_relative(net: MeasuredNetwork) -> float:
    """Share of the weights that magnitude pruning must keep for a training loss of 1.1 times the network's."""
    return net.magnitude_prunability.fraction("relative")


@as_measure(
    r"\min \{\alpha : \hat L(R_{\alpha'} w) \le \hat L(w) + 0.1 \ \forall \alpha' \ge \alpha\}", KUHN, cost="noise"
)
def prunability_random(net: MeasuredNetwork) -> float:
    """Share of the weights that random pruning must keep for a training loss 0.1 above the network's."""
    return net.random_prunability.fraction("absolute")


@as_measure(
    r"\min \{\alpha : \hat L(R_{\alpha'} w) \le 1.1 \hat L(w) \ \forall \alpha' \ge \alpha\}", KUHN, cost="noise"
)
def prunability_random_relative(net: MeasuredNetwork) -> float:
    """Share of the weights that random pruning must keep for a training loss of 1.1 times the network's."""
    return net.random_prunability.fraction("relative")


@as_measure(r"\sqrt{\alpha \omega / m}", KUHN, cost="noise")
def prunability_weights(net: MeasuredNetwork) -> float:
    """Number of weights that magnitude pruning must keep for a training loss 0.1 above the network's."""
    weights = sum(matrix.size for matrix in net.matrices)
    return root(net.magnitude_prunability.fraction("absolute") * weights, net.samples)


@as_measure(
    r"\min \{\alpha : \hat L(S_{\alpha'} w) \le \hat L(w) + 0.1 \ \forall \alpha' \ge \alpha\}", "here", cost="pruning"
)
def spectral_prunability(net: MeasuredNetwork) -> float:
    """Share of the FLOPs that spectral pruning must keep for a training loss 0.1 above the network's."""
    return net.spectral_prunability.fraction("absolute")


@as_measure(r"\sqrt{\alpha F / m}", "here", cost="pruning")
def spectral_prunability_weights(net: MeasuredNetwork) -> float:
    """Multiplications that spectral pruning must keep for a training loss 0.1 above the network's."""
    return math.sqrt(net.spectral_prunability.fraction("absolute") * net.flops / 2 / net.samples)


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
