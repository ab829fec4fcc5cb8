"""PAC-Bayes with noise on the weights: the error of the ORIGINAL network from spectral and Frobenius norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from specprune.bounds.bound import ORIGINAL, Bound, Hypothesis, check_number
from specprune.bounds.covering import margins
from specprune.bounds.logs import exp_of, log_of
from specprune.bounds.norms import InputNorms, LayerNorms, product_exponent, shape_hypotheses
from specprune.bounds.occam import integer_code_length, power_of_two_above, power_of_two_below

#: Probability with which the noise may move a margin too far; the entropy of this event is part of the bound.
FAILURE = 0.05


def margin_error(logits: ArrayLike, labels: ArrayLike, gamma: float) -> float:
    """Return the fraction of examples whose margin is at most gamma; it lies above the ramp loss and the 0-1 error.

    The margin is the logit of the true class minus the largest other logit.

    Args:
        logits: shape (n, K), K >= 2.
        labels: true classes, shape (n,), integers in 0..K-1.
        gamma: margin width, positive, in logit units.

    Returns:
        The fraction, in [0, 1].

    Raises:
        ValueError: if shapes or values are invalid.

    Source: Neyshabur, Bhojanapalli and Srebro 2018 (arXiv:1707.09564), section 1.
    """
    gamma = check_number("gamma", gamma, 0.0, open_low=True)
    return float(np.mean(margins(logits, labels) <= gamma))


def noise_ratio(log_sensitivity: float, depth: int) -> float:
    """Return ln eta with (1 + eta)^L = 1 + exp(-log_sensitivity): how loud the noise may be, relative to the weights.

    Args:
        log_sensitivity: ln(2 sqrt(2) B P / gamma), B the input radius and P the product of the norms.
        depth: number of layers L.

    Returns:
        ln eta.

    Source: derived here.
    """
    if log_sensitivity > 30:  # (1 + x)^(1/L) - 1 = x/L up to rounding
        return -log_sensitivity - math.log(depth)
    if log_sensitivity < -700:
        return -log_sensitivity / depth
    root = math.log1p(math.exp(-log_sensitivity)) / depth
    return root if root > 700 else math.log(math.expm1(root))


def neyshabur_2018_bound(
    layers: Sequence[LayerNorms],
    inputs: InputNorms,
    *,
    gamma: float,
    delta: float,
    empirical_margin_error: float,
    input_radius: float | None,
    version: Literal["product", "layers"] = "product",
    covers: str = ORIGINAL,
) -> Bound:
    """Bound the error by how much Gaussian noise the weights bear before a margin moves by gamma/2.

    With B >= ||x'|| for all inputs, rho_l the Lipschitz constants, P a power of two:

    1. If ||A_l|| <= s_l and ||U_l|| <= eta s_l, noise U moves the network by at most B prod rho_l s_l ((1 + eta)^L - 1)
       (induction over layers).  A margin moves by sqrt(2) times that: by at most gamma/2 if (1 + eta)^L = 1 +
       gamma / (2 sqrt(2) B P), P >= prod rho_l s_l.
    2. A Gaussian matrix of standard deviation sigma_l has norm at most sigma_l t_l, t_l = sqrt(rows) + sqrt(columns) +
       sqrt(2 ln(L/q)), but for probability q/L (Davidson and Szarek 2001); so sigma_l = eta s_l / t_l.
    3. Let Q be w + U given that no norm is too large (probability Z >= 1 - q), prior N(M, sigma^2).  By the chain rule
       for the event,  KL(Q||prior) <= (KL + H(Z)) / Z <= (KL + H(q)) / (1 - q) =: D,  H the binary entropy and
       KL = sum_l ||A_l - M_l||_F^2 / (2 sigma_l^2).
    4. Margins move by at most gamma/2, so  error(w) <= E_Q P(margin <= gamma/2)  and, on the sample,
       E_Q (fraction of margins <= gamma/2) <= fraction of margins of w <= gamma.  PAC-Bayes (Maurer 2004) and Pinsker.

    value = margin error + sqrt((D + ln(2 sqrt(n)/delta) + C) / (2n)),  KL = sum_l t_l^2 r_l^2 / (2 eta^2).

    "product": all maps are positively homogeneous, so layers may be scaled until rho_l ||A_l|| = beta, the same for
    all; then only beta^L = prod rho_l ||A_l|| is rounded up to P, M = 0, and r_l = (beta^L/P)^(1/L) ||A_l||_F/||A_l||.
    "layers": any Lipschitz maps and any reference M; every ||A_l|| is rounded up to a power of two s_l, and
    r_l = ||A_l - M_l||_F / s_l.

    Args:
        layers: input side first; dense noise, also where A is a convolution.
        inputs: norms of the training inputs, to check B.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_margin_error: `margin_error` at gamma on the n examples.
        input_radius: bound on ||x|| over all possible inputs (without the constant coordinate, which is added here);
            None takes the largest in the sample, and the hypothesis on it counts as broken.
        version: "product" or "layers".
        covers: the network spoken of.

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Neyshabur, Bhojanapalli and Srebro 2018 (arXiv:1707.09564), Theorem 1, whose 42 e B d sqrt(h ln(4dh)) comes
        from a union over a fine grid of beta, a matrix Bernstein bound and Z = 1/2; constants derived here.
    """
    if not layers:
        raise ValueError("layers must hold at least one LayerNorms, got none")
    n, depth, exponent = inputs.samples, len(layers), power_of_two_below(gamma)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    radius = inputs.largest if input_radius is None else check_number("input_radius", input_radius, 0.0)
    known = "for every input" if input_radius is not None else "for every input (unproved: the sample's own)"
    hypotheses = [
        Hypothesis(
            f"||x|| <= {radius:g} {known}", inputs.largest, input_radius is not None and inputs.largest <= radius
        )
    ]
    logs = [log_of(layer.operator_norm) for layer in layers]
    if version == "product":
        hypotheses += shape_hypotheses(layers, elementwise=False)
        factors = [norm for layer in layers for norm in (layer.operator_norm, layer.lipschitz)]
        size = product_exponent(factors)
        price, log_size = integer_code_length(size), size * math.log(2)
        shrink = min(0.0, math.fsum(map(log_of, factors)) - log_size) / depth
        # A layer that is zero has the ratio 0/0; it needs no code and no scaling.
        log_ratios = [
            shrink + log_of(layer.frobenius) - log if layer.frobenius > 0 else -math.inf
            for layer, log in zip(layers, logs, strict=True)
        ]
    elif version == "layers":
        hypotheses.append(Hypothesis("the reference was fixed before the data (assumed)", None, True))
        sizes = [power_of_two_above(layer.operator_norm) for layer in layers]
        price = math.fsum(map(integer_code_length, sizes))
        log_size = math.fsum([sum(sizes) * math.log(2), *(log_of(layer.lipschitz) for layer in layers)])
        log_ratios = [
            log_of(layer.frobenius_distance) - size * math.log(2) for layer, size in zip(layers, sizes, strict=True)
        ]
    else:
        raise ValueError(f"version is {version!r}; expected 'product' or 'layers'")
    log_reach = log_of(math.hypot(radius, inputs.constant)) + log_size
    log_eta = noise_ratio(1.5 * math.log(2) + log_reach - exponent * math.log(2), depth)
    tail = math.sqrt(2 * math.log(depth / FAILURE))
    parts = [
        2 * (math.log(math.sqrt(layer.rows) + math.sqrt(layer.columns) + tail) + log_ratio)
        for layer, log_ratio in zip(layers, log_ratios, strict=True)
    ]
    divergence = exp_of(float(logsumexp(parts)) - math.log(2) - 2 * log_eta)
    entropy = -FAILURE * math.log(FAILURE) - (1 - FAILURE) * math.log(1 - FAILURE)
    conditional = (divergence + entropy) / (1 - FAILURE)
    price += inputs.price + integer_code_length(exponent)
    variance = math.sqrt(conditional / (2 * n))
    rest = math.log(2 * math.sqrt(n) / delta) + price
    # total - variance without cancellation, and 0 where the variance is infinite.
    confidence = rest / (2 * n) / (math.sqrt((conditional + rest) / (2 * n)) + variance)
    terms = {
        "empirical": check_number("empirical_margin_error", empirical_margin_error, 0.0, 1.0),
        "variance": variance,
        "confidence": confidence,
    }
    return Bound.from_terms(
        f"Neyshabur 2018 ({version})",
        terms,
        confidence=1 - delta,
        covers=covers,
        loss=f"margin({2.0**exponent:g})",
        hypotheses=hypotheses,
        trivial=1.0,
        theorem="PAC-Bayes spectral margin bound",
        source="Neyshabur, Bhojanapalli and Srebro 2018 (arXiv:1707.09564); constants derived here",
    )
