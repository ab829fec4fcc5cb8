"""Norm bounds by Rademacher complexity: the error of the ORIGINAL network from the norms of its weights.

All four have the same frame.  For losses in [0, 1], with probability at least 1 - delta, for all f of a class:

    P(error of f) <= ramp error on the sample + 2 R + 3 sqrt(ln(2/delta) / (2n)),

R the empirical Rademacher complexity of the ramp losses clip(1 - margin/gamma, 0, 1), which may use the sample's own
||X||_F (symmetrisation and McDiarmid twice; Mohri, Rostamizadeh and Talwalkar, Theorem 3.3).  The class is given by
norms and gamma.  As these depend on the data, each is rounded to a power of two 2^k, k from a prefix code, and the
price C in nats joins ln(2/delta): a union over all classes at once.  The ramp loss is sqrt(2)/gamma-Lipschitz in the
logits, so Maurer's vector contraction (2016) gives, with independent signs e_ik for n examples and K classes,

    R <= 2/(gamma n) E sup_f sum_ik e_ik f_k(x_i).

Two peelings of this supremum (Q_L >= prod_l rho_l ||A_l||_F; z_k = sup over the first L - 1 layers of
||sum_i e_ik h(x_i)||).  By Cauchy-Schwarz it is at most ||A_L||_F sqrt(sum_k z_k^2) <= ||A_L||_F sqrt(K E z_1^2).
One step: for unit rows w and a convex increasing g, homogeneity and the contraction lemma (Ledoux and Talagrand,
Theorem 4.12) give E g(sup ||sum e sigma(W f)||) <= 2 E g(rho ||W||_F sup ||sum e f||).

* g(t) = max(t, 0)^2 and induction:  E z_1^2 <= 2^(L-1) (prod rho ||A||_F ||X||_F)^2.               (Neyshabur 2015)
* g(t) = exp(lambda t), the best lambda, and Var z_1 <= (prod ||X||_F)^2 by bounded differences (Efron and Stein):
  E z_1^2 <= ((1 + sqrt(2 (L-1) ln 2))^2 + 1) (prod rho ||A||_F ||X||_F)^2.                          (Golowich 2018)

The norms are products over layers, so by positive homogeneity one exponent pays for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from scipy.special import logsumexp

from specprune.bounds.bound import ORIGINAL, Bound, Hypothesis, check_number
from specprune.bounds.logs import exp_of, log_of, log_product
from specprune.bounds.norms import (
    InputNorms,
    LayerNorms,
    entropy_rademacher,
    product_exponent,
    shape_hypotheses,
)
from specprune.bounds.occam import integer_code_length, power_of_two_above, power_of_two_below

_LN2 = math.log(2)


def _bound(
    name: str,
    rademacher: float,
    inputs: InputNorms,
    gamma_exponent: int,
    price: float,
    delta: float,
    empirical_ramp: float,
    covers: str,
    hypotheses: Sequence[Hypothesis],
    theorem: str,
    source: str,
) -> Bound:
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    price += inputs.price + integer_code_length(gamma_exponent)
    terms = {
        "empirical": check_number("empirical_ramp", empirical_ramp, 0.0, 1.0),
        "variance": 2 * rademacher,
        "confidence": 3 * math.sqrt((math.log(2 / delta) + price) / (2 * inputs.samples)),
    }
    return Bound.from_terms(
        name,
        terms,
        confidence=1 - delta,
        covers=covers,
        loss=f"ramp({2.0**gamma_exponent:g})",
        hypotheses=hypotheses,
        trivial=1.0,
        theorem=theorem,
        source=source,
    )


def _check_layers(layers: Sequence[LayerNorms]) -> None:
    if not layers:
        raise ValueError("layers must hold at least one LayerNorms, got none")


def bartlett_bound(
    layers: Sequence[LayerNorms],
    inputs: InputNorms,
    *,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    version: Literal["union", "fixed"] = "union",
    limits: Sequence[tuple[float, float]] | None = None,
    covers: str = ORIGINAL,
) -> Bound:
    """Bound the error by spectral norms and distances to a reference: few changed rows, few ways to overfit.

    With s_l >= ||A_l||_2, a_l >= ||A_l^T - M_l^T||_{2,1}, N_l = 2 rows_l columns_l + 1, rho_l the Lipschitz constants:

    1. One layer.  {Z A^T} over all ||A^T||_{2,1} <= a has, for every epsilon > 0, a cover of at most N^(a ||Z||_F /
       epsilon)^2 elements: Z A^T / (a ||Z||_F) is a mean of 2 rows columns matrices of norm at most 1; the average
       of k of them, drawn at random, is off by at most (1 - |u|^2)/k in mean square, and 0 is off by |u|^2, so the
       better of the two has error at most 1/(k + 1), and k + 1 = ceil((a ||Z||_F / epsilon)^2) is enough.  (This
       removes the ceiling that Maurey's lemma usually carries.)  The norm limits are convex, so projecting the centres
       keeps the cover and puts them into the class.
    2. All layers.  An error epsilon_l behind layer l grows by rho_l prod_{k>l} rho_k s_k, and ||Z_l||_F <= prod_{k<l}
       rho_k s_k ||X||_F.  The best shares epsilon_l give ln N(epsilon) <= (||X||_F R_A / epsilon)^2,
       R_A = prod_l rho_l s_l * (sum_l (a_l sqrt(ln N_l) / s_l)^(2/3))^(3/2).
    3. The ramp loss multiplies the radius by sqrt(2)/gamma; then `entropy_rademacher`.

    value = empirical + 2 R + 3 sqrt((ln(2/delta) + C) / (2n)),  R = min_m exp(-m)/2 + sqrt(2) e m sqrt(2) ||X||_F R_A /
    (gamma n).  Any Lipschitz maps that send 0 to 0 may stand between the layers, pooling included.

    Args:
        layers: input side first.
        inputs: norms of the training inputs.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_ramp: ramp loss at gamma on the n examples.
        version: "union" rounds every s_l and a_l up to a power of two and pays for it; "fixed" takes the class that
            `limits` gives, which must have been written down before the data were seen.
        limits: for "fixed": (s_l, a_l) for each layer.  None takes the measured norms, and the hypothesis that they
            were fixed in advance is marked broken.
        covers: the network spoken of.

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Bartlett, Foster and Telgarsky 2017 (arXiv:1706.08498), Theorem 1.1; constants derived here (theirs come
        from the margin's 2/gamma, Dudley's 12 and a cut-off at 1/n: 72 ln(n) in place of our 2 * 3.84 * sqrt(2) m).
    """
    _check_layers(layers)
    exponent = power_of_two_below(gamma)
    price = 0.0
    hypotheses: list[Hypothesis] = [Hypothesis("the reference was fixed before the data (assumed)", None, True)]
    if version == "union":
        if limits is not None:
            raise ValueError("limits belong to version='fixed'; version='union' takes the measured norms")
        chosen = []
        for layer in layers:
            pair = power_of_two_above(layer.operator_norm), power_of_two_above(layer.two_one_distance)
            price += integer_code_length(pair[0]) + integer_code_length(pair[1])
            chosen.append((pair[0] * _LN2, pair[1] * _LN2))
    elif version == "fixed":
        measured = [(layer.operator_norm, layer.two_one_distance) for layer in layers]
        given = measured if limits is None else list(limits)
        if len(given) != len(layers):
            raise ValueError(f"limits has {len(given)} entries for {len(layers)} layers; give one pair for each layer")
        outside = sum(s > p or a > q for (s, a), (p, q) in zip(measured, given, strict=True))
        hypotheses.append(Hypothesis("norm limits were fixed before the data", None, limits is not None))
        hypotheses.append(Hypothesis("every layer keeps its norm limits (layers that do not)", outside, outside == 0))
        chosen = [(log_of(check_number("limit", p, 0.0)), log_of(check_number("limit", q, 0.0))) for p, q in given]
    else:
        raise ValueError(f"version is {version!r}; expected 'union' or 'fixed'")
    parts = []
    for index, (layer, (_, log_a)) in enumerate(zip(layers, chosen, strict=True)):
        others = math.fsum(s for k, (s, _) in enumerate(chosen) if k != index)
        parts.append(2 / 3 * (log_a + 0.5 * math.log(math.log(2 * layer.rows * layer.columns + 1)) + others))
    log_radius = float(logsumexp(parts)) * 1.5 + log_product([layer.lipschitz for layer in layers])
    log_radius += log_of(inputs.extended_frobenius) + 0.5 * _LN2 - exponent * _LN2
    return _bound(
        f"Bartlett 2017 ({version})",
        entropy_rademacher(log_radius, inputs.samples),
        inputs,
        exponent,
        price,
        delta,
        empirical_ramp,
        covers,
        hypotheses,
        "spectrally normalised margin bound",
        "Bartlett, Foster and Telgarsky 2017 (arXiv:1706.08498), Theorem 1.1; constants derived here",
    )


def _peeled(
    name: str,
    source: str,
    layers: Sequence[LayerNorms],
    inputs: InputNorms,
    factors: Sequence[float],
    log_constant: float,
    *,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    covers: str,
    hypotheses: Sequence[Hypothesis] = (),
) -> Bound:
    """Return empirical + 2 * 2/(gamma n) exp(log_constant) 2^k + confidence, 2^k the rounded product of the factors."""
    exponent, size = power_of_two_below(gamma), product_exponent(factors)
    log_complexity = log_constant + (1 + size - exponent) * _LN2 - math.log(inputs.samples)
    return _bound(
        name,
        exp_of(log_complexity),
        inputs,
        exponent,
        integer_code_length(size),
        delta,
        empirical_ramp,
        covers,
        (*hypotheses, *shape_hypotheses(layers, elementwise=True)),
        "norm bound by peeling",
        source,
    )


def golowich_bound(
    layers: Sequence[LayerNorms],
    inputs: InputNorms,
    *,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    version: Literal["frobenius", "l1"] = "frobenius",
    covers: str = ORIGINAL,
) -> Bound:
    """Bound the error by the product of norms and only the square root of the depth.

    value = empirical + 2 R + 3 sqrt((ln(2/delta) + C) / (2n)), where 2^k >= the product of norms and

        frobenius:  R = 2/(gamma n) 2^k sqrt(K) ||X||_F sqrt((1 + sqrt(2 (L-1) ln 2))^2 + 1),  prod_l rho_l ||A_l||_F,
        l1:         R = 2/(gamma n) 2^k K max_j ||X[:, j]|| sqrt(2 (L ln 2 + ln d)),  prod_l rho_l ||A_l||_{1,inf}.

    Proof of the first: module docstring.  Of the second: with row sums at most M the step reads E g(sup ||sum e
    sigma(W f)||_inf) <= 2 E g(rho M sup ||sum e f||_inf); after L - 1 steps with g = exp(lambda t), the largest of 2d
    sums of signs has E exp <= 2d exp(lambda^2 max_j ||X[:, j]||^2 / 2); the best lambda; K rows in the last layer.

    Args:
        layers: input side first; elementwise positively homogeneous maps between them.
        inputs: norms of the training inputs.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_ramp: ramp loss at gamma on the n examples.
        version: "frobenius", or "l1" for the largest l1 norms of rows (then the inputs count coordinate by coordinate).
        covers: the network spoken of.

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Golowich, Rakhlin and Shamir 2018 (arXiv:1712.06541), Theorems 1 and 2, for one output; several classes and
        the constants derived here.
    """
    _check_layers(layers)
    steps, classes = (len(layers) - 1) * 2 * _LN2, layers[-1].rows
    if version == "frobenius":
        factors = [norm for layer in layers for norm in (layer.frobenius, layer.lipschitz)]
        log_constant = 0.5 * math.log(classes * ((1 + math.sqrt(steps)) ** 2 + 1)) + log_of(inputs.extended_frobenius)
    elif version == "l1":
        factors = [norm for layer in layers for norm in (layer.one_inf, layer.lipschitz)]
        spread = 2 * (len(layers) * _LN2 + math.log(layers[0].columns))
        log_constant = math.log(classes) + 0.5 * math.log(spread) + log_of(inputs.extended_coordinate)
    else:
        raise ValueError(f"version is {version!r}; expected 'frobenius' or 'l1'")
    return _peeled(
        f"Golowich 2018 ({version})",
        "Golowich, Rakhlin and Shamir 2018 (arXiv:1712.06541); several classes and constants derived here",
        layers,
        inputs,
        factors,
        log_constant,
        gamma=gamma,
        delta=delta,
        empirical_ramp=empirical_ramp,
        covers=covers,
    )


def neyshabur_2015_bound(
    layers: Sequence[LayerNorms],
    inputs: InputNorms,
    *,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    covers: str = ORIGINAL,
) -> Bound:
    """Bound the error by the product of Frobenius norms, with a factor that doubles every two layers.

    value = empirical + 2 R + 3 sqrt((ln(2/delta) + C) / (2n)),  R = 2/(gamma n) 2^k sqrt(K) ||X||_F 2^((L-1)/2),
    2^k >= prod_l rho_l ||A_l||_F.  Proof: module docstring; the source's first moments give 2^L, second moments the
    square root of that.

    Args:
        layers: input side first; elementwise positively homogeneous maps between them.
        inputs: norms of the training inputs.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_ramp: ramp loss at gamma on the n examples.
        covers: the network spoken of.

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Neyshabur, Tomioka and Srebro 2015 (arXiv:1503.00036), for one output; form after the source, constants
        derived here.
    """
    _check_layers(layers)
    depth, classes = len(layers), layers[-1].rows
    return _peeled(
        "Neyshabur 2015",
        "Neyshabur, Tomioka and Srebro 2015 (arXiv:1503.00036); several classes and constants derived here",
        layers,
        inputs,
        [norm for layer in layers for norm in (layer.frobenius, layer.lipschitz)],
        0.5 * (math.log(classes) + (depth - 1) * _LN2) + log_of(inputs.extended_frobenius),
        gamma=gamma,
        delta=delta,
        empirical_ramp=empirical_ramp,
        covers=covers,
    )


def neyshabur_2019_bound(
    layers: Sequence[LayerNorms],
    units: float,
    inputs: InputNorms,
    *,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    covers: str = ORIGINAL,
) -> Bound:
    """Bound the error of a two-layer network unit by unit, so that many small units cost no more than a few.

    value = empirical + 2 R + 3 sqrt((ln(2/delta) + C) / (2n)),  R = 2/(gamma n) 2^k sqrt(2K) ||X||_F,
    2^k >= rho_1 rho_2 sum_j ||u_j|| ||v_j||.

    Proof.  By homogeneity each unit is (||u_j|| ||v_j||) times one with unit norms, so f is a multiple of a mean of
    such units, and the supremum is attained at one unit:  E sup_u sqrt(sum_k (sum_i e_ik sigma(u x_i))^2) <=
    sqrt(K E sup_u (sum_i e_i1 sigma(u x_i))^2) <= sqrt(2K) ||X||_F, the last step as in the module docstring.

    The source measures units from a reference U_0 and then pays sqrt(h/n) for h units; with the reference 0, as here,
    one exponent pays for all units and that term vanishes.

    Args:
        layers: two of them, with elementwise positively homogeneous maps.
        units: sum_j ||u_j|| ||v_j|| from `unit_product`, with biases in homogeneous coordinates.
        inputs: norms of the training inputs.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_ramp: ramp loss at gamma on the n examples.
        covers: the network spoken of.

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range, or there are not two layers.

    Source: Neyshabur, Li, Bhojanapalli, LeCun and Srebro 2019 (arXiv:1805.12076); the form for the reference 0 and its
        constants derived here.
    """
    if len(layers) != 2:
        raise ValueError(f"neyshabur_2019_bound speaks of two layers, got {len(layers)}; use golowich_bound instead")
    return _peeled(
        "Neyshabur 2019",
        "Neyshabur et al. 2019 (arXiv:1805.12076); form for the reference 0 and constants derived here",
        layers,
        inputs,
        [check_number("units", units, 0.0), *(layer.lipschitz for layer in layers)],
        0.5 * math.log(2 * layers[-1].rows) + log_of(inputs.extended_frobenius),
        gamma=gamma,
        delta=delta,
        empirical_ramp=empirical_ramp,
        covers=covers,
    )
