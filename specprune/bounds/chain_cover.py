"""How many networks a class of chains needs to be covered: sizes and norms of the layers in, logarithms out.

Norms may depend on the data, so each is rounded UP to a power of two 2^k at the price ln(2 (|k|+1)(|k|+2)) nats.  The
radius D_x must hold for every possible input, not only the sample.  Between the layers stand 1-Lipschitz maps that send
0 to 0; other Lipschitz constants are to be folded into the operator norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specprune.bounds.bound import Hypothesis, check_count, check_number
from specprune.bounds.logs import log1p_exp
from specprune.bounds.occam import integer_code_length, power_of_two_above


@dataclass(frozen=True)
class LayerSize:
    """One layer of a network as the covering theorems see it.

    Attributes:
        weights: number of weights W_l.
        biases: number of biases b_l, 0 if there are none.
        operator_norm: at least ||W||_op, times the Lipschitz constant of what follows; pure number.
        bias_norm: at least ||b||_2, in units of the layer's output (of a convolution: the norm of the whole shifted
            map, sqrt(positions) * ||b||_2); ignored without biases.
    """

    weights: int
    biases: int
    operator_norm: float
    bias_norm: float

    def __post_init__(self) -> None:
        check_count("weights", self.weights)
        check_count("biases", self.biases, low=0)
        check_number("operator_norm", self.operator_norm, 0.0)
        check_number("bias_norm", self.bias_norm, 0.0)


@dataclass(frozen=True)
class Geometry:
    """Norms of a chain of layers rounded up to powers of two, and what they imply; logarithms throughout.

    Attributes:
        log_norms: ln s_l, from ||W_l|| <= s_l (with the Lipschitz constant of what follows).
        log_biases: ln B_l; -inf without biases.
        log_inputs: ln D_l, a bound on the input of layer l: D_1 = D_x, D_{l+1} = s_l D_l + B_l.
        log_later: ln Pi_l, Pi_l = prod_{k>l} s_k: how much an error behind layer l grows up to the output.
        price: nats for the rounded norms.
    """

    log_norms: tuple[float, ...]
    log_biases: tuple[float, ...]
    log_inputs: tuple[float, ...]
    log_later: tuple[float, ...]
    price: float


def chain_geometry(norms: Sequence[float], bias_norms: Sequence[float | None], radius: float) -> Geometry:
    """Return the rounded norms of a chain and what they imply for inputs and errors of every layer.

    Args:
        norms: operator norm of each layer, input side first.
        bias_norms: bias norm of each layer in units of its output; None for a layer without biases.
        radius: D_x with ||x|| <= D_x for every possible input.

    Returns:
        The geometry; each rounded norm costs ln(2 (|k|+1)(|k|+2)) nats.

    Raises:
        ValueError: if there is no layer, or a number is out of range.

    Source: derived here.
    """
    if not norms or len(norms) != len(bias_norms):
        raise ValueError(f"a chain needs one bias norm (or None) a layer, got {len(norms)} and {len(bias_norms)}")
    exponents = [power_of_two_above(norm) for norm in norms]
    shifts = [None if norm is None else power_of_two_above(norm) for norm in bias_norms]
    log_s = [k * math.log(2) for k in exponents]
    log_b = [-math.inf if k is None else k * math.log(2) for k in shifts]
    log_d = [math.log(check_number("input_radius", radius, 0.0, open_low=True))]
    for s, b in zip(log_s[:-1], log_b[:-1], strict=True):
        log_d.append(float(np.logaddexp(s + log_d[-1], b)))
    later = tuple(math.fsum(log_s[index + 1 :]) for index in range(len(log_s)))
    price = math.fsum(integer_code_length(k) for k in [*exponents, *shifts] if k is not None)
    return Geometry(tuple(log_s), tuple(log_b), tuple(log_d), later, price)


def log_cover(layers: Sequence[LayerSize], log_epsilon: float, radius: float) -> tuple[float, float]:
    """Return ln N of a sup-norm cover of all chains with these sizes and norms, and the price of the norms.

    ln N(epsilon) <= sum_l W_l ln(1 + 4L s_l D_l Pi_l / epsilon) + b_l ln(1 + 4L B_l Pi_l / epsilon): steps 1 and 2 of
    `covering_bound`.  The centres are networks of the class, so their norms obey the same limits.

    Args:
        layers: input side first.
        log_epsilon: ln of epsilon, in logit units (Euclidean norm over the classes).
        radius: D_x with ||x|| <= D_x for every possible input.

    Returns:
        (ln N, price of the rounded norms), both in nats.

    Raises:
        ValueError: if there is no layer, or a number is out of range.

    Source: standard covering argument; constants derived here.
    """
    norms = [layer.operator_norm for layer in layers]
    geometry = chain_geometry(norms, [layer.bias_norm if layer.biases else None for layer in layers], radius)
    common = math.log(4 * len(layers)) - log_epsilon
    nats = 0.0
    for layer, s, b, d, later in zip(
        layers, geometry.log_norms, geometry.log_biases, geometry.log_inputs, geometry.log_later, strict=True
    ):
        nats += layer.weights * log1p_exp(common + s + d + later)
        nats += layer.biases * log1p_exp(common + b + later) if layer.biases else 0.0
    return nats, geometry.price


def radius_hypothesis(radius: float, measured: float | None) -> Hypothesis:
    """Return the condition ||x|| <= D_x, checked against the largest norm seen if there is one.

    Args:
        radius: D_x.
        measured: largest ||x|| seen; None if not measured.

    Returns:
        The hypothesis.

    Raises:
        ValueError: if a number is out of range.
    """
    radius = check_number("input_radius", radius, 0.0, open_low=True)
    seen = None if measured is None else check_number("measured_radius", measured, 0.0)
    words = "assumed" if seen is None else "largest seen"
    return Hypothesis(f"||x|| <= D_x = {radius:g} for every input ({words})", seen, seen is None or seen <= radius)
