"""Covering-number bounds of the pruned network, every constant explicit: how bias and variance move with the width.

Both theorems bound the error of the PRUNED network f# by the margin error of the ORIGINAL network f:

    P(error of f#) <= ramp error of f on the sample + sqrt(2)/gamma * ||f - f#||_n + variance + confidence,

because the ramp loss clip(1 - margin/gamma, 0, 1) dominates the 0-1 loss and is sqrt(2)/gamma-Lipschitz in the logits
(Euclidean norm), for any number of classes.  They are usually vacuous on small data; they are shipped as complexity
measures whose trend in the width is meaningful, and they say when they are vacuous.

What is fixed in advance and what is paid for.  Norms, widths and gamma may depend on the data, so each norm is rounded
UP and gamma DOWN to a power of two 2^k at the price ln(2 (|k|+1)(|k|+2)) nats each, and each width 1..m_l costs
ln m_l.  D_x must hold for every possible input, not only the sample.  Activations are 1-Lipschitz, act elementwise and
map 0 to 0; other Lipschitz constants are to be folded into the operator norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import PRUNED, Bound, FloatArray, Hypothesis, check_count, check_number
from specprune.bounds.chain_cover import LayerSize, log_cover, radius_hypothesis
from specprune.bounds.logs import log1p_exp
from specprune.bounds.occam import integer_code_length, power_of_two_above, power_of_two_below


def margins(logits: ArrayLike, labels: ArrayLike) -> FloatArray:
    """Return by how much every example's true class wins: its logit minus the largest other logit.

    Args:
        logits: shape (n, K), K >= 2.
        labels: true classes, shape (n,), integers in 0..K-1.

    Returns:
        Shape (n,), in logit units; not positive where the network errs or cannot decide.

    Raises:
        ValueError: if shapes or values are invalid.
    """
    scores, classes = np.array(logits, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) == 0 or not np.all(np.isfinite(scores)):
        raise ValueError(f"logits must be finite with shape (n, K), K >= 2, got shape {scores.shape}")
    if classes.shape != (len(scores),) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"labels must be {len(scores)} integers, got shape {classes.shape} of {classes.dtype}")
    if int(classes.min()) < 0 or int(classes.max()) >= scores.shape[1]:
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}, got {classes.min()}..{classes.max()}")
    rows = np.arange(len(scores))
    own = scores[rows, classes]
    scores[rows, classes] = -np.inf
    return own - scores.max(axis=1)


def ramp_losses(logits: ArrayLike, labels: ArrayLike, gamma: float) -> FloatArray:
    """Return every example's ramp loss clip(1 - margin/gamma, 0, 1), whose mean `ramp_loss` is.

    Args:
        logits: shape (n, K), K >= 2.
        labels: true classes, shape (n,), integers in 0..K-1.
        gamma: margin width, positive, in logit units.

    Returns:
        Shape (n,), in [0, 1].

    Raises:
        ValueError: if shapes or values are invalid.

    Source: standard margin loss, as in Bartlett, Foster and Telgarsky 2017.
    """
    gamma = check_number("gamma", gamma, 0.0, open_low=True)
    return np.clip(1 - margins(logits, labels) / gamma, 0.0, 1.0)


def ramp_loss(logits: ArrayLike, labels: ArrayLike, gamma: float) -> float:
    """Return the mean ramp loss clip(1 - margin/gamma, 0, 1), which lies above the 0-1 error.

    The margin is the logit of the true class minus the largest other logit.

    Args:
        logits: shape (n, K), K >= 2.
        labels: true classes, shape (n,), integers in 0..K-1.
        gamma: margin width, positive, in logit units.

    Returns:
        The mean over the n examples, in [0, 1].

    Raises:
        ValueError: if shapes or values are invalid.

    Source: standard margin loss, as in Bartlett, Foster and Telgarsky 2017.
    """
    return float(np.mean(ramp_losses(logits, labels, gamma)))


@dataclass(frozen=True)
class _Setting:
    """Checked inputs shared by both theorems; gamma is the rounded one, log_radius is ln D_x."""

    log_radius: float
    n: int
    gamma: float
    gamma_price: float
    delta: float
    empirical: float
    bias: float
    width_price: float
    hypotheses: tuple[Hypothesis, ...]


def _setting(
    layers: Sequence[LayerSize],
    input_radius: float,
    n: int,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    approximation_error: float,
    original_widths: Sequence[int],
    measured_radius: float | None,
) -> _Setting:
    if not layers:
        raise ValueError("layers must hold at least one LayerSize")
    known = radius_hypothesis(input_radius, measured_radius)
    exponent = power_of_two_below(gamma)
    error = check_number("approximation_error", approximation_error, 0.0)
    return _Setting(
        log_radius=math.log(input_radius),
        n=check_count("n", n),
        gamma=2.0**exponent,
        gamma_price=integer_code_length(exponent),
        delta=check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True),
        empirical=check_number("empirical_ramp", empirical_ramp, 0.0, 1.0),
        bias=math.sqrt(2) / 2.0**exponent * error,
        width_price=math.fsum(math.log(check_count("width", width)) for width in original_widths),
        hypotheses=(known,),
    )


def covering_bound(
    layers: Sequence[LayerSize],
    *,
    input_radius: float,
    n: int,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    approximation_error: float = 0.0,
    original_widths: Sequence[int] = (),
    measured_radius: float | None = None,
) -> Bound:
    """Bound the pruned network's error with one finite cover of all networks of its size and norms.

    With s_l, B_l the norms rounded up to powers of two, D_1 = D_x, D_{l+1} = s_l D_l + B_l, Pi_l = prod_{k>l} s_k:

    1. Exchanging one layer at a time, ||f_theta - f_theta'|| <= sum_l Pi_l (D_l ||dW_l||_op + ||db_l||).
    2. A ball of radius r in d dimensions has an e-cover of (1 + 2r/e)^d of its own points.  Giving each of the 2L
       parts epsilon/(2L):  ln N(epsilon) <= sum_l W_l ln(1 + 4L s_l D_l Pi_l / epsilon)
       + b_l ln(1 + 4L B_l Pi_l / epsilon).
    3. Hoeffding for each of the N centres, with ln(1/delta) + prices; the ramp loss moves by sqrt(2)/gamma * epsilon
       from network to centre, twice (mean and sample).  epsilon = gamma/(sqrt(2) n) makes this 2/n.
    4. On the sample, the ramp loss of f# exceeds that of f by at most sqrt(2)/gamma * ||f - f#||_n.

    value = empirical + sqrt(2)/gamma * error + 2/n + sqrt((ln N + prices + ln(1/delta)) / (2n)).

    Args:
        layers: the pruned network's layers, input side first.
        input_radius: D_x with ||x|| <= D_x for every possible input.
        n: number of i.i.d. examples.
        gamma: margin width in logit units; rounded down to a power of two and priced, so it may be chosen freely.
        delta: allowed probability of failure.
        empirical_ramp: ramp loss of the ORIGINAL network on the n examples, at gamma or at the rounded gamma (the
            ramp loss grows with gamma, so the former is valid and slightly worse).
        approximation_error: ||f - f#||_n on the same examples, in logit units; 0 if f# itself gave `empirical_ramp`.
        original_widths: original width m_l of each layer that could be pruned (price ln m_l).
        measured_radius: largest ||x|| seen, to check D_x; None if not measured.

    Returns:
        A `Bound` with terms empirical, bias, variance (with the 2/n) and confidence (what delta and prices add).

    Raises:
        ValueError: if an input is out of range.

    Source: standard covering argument; all constants derived here, after the bias-variance bound of Suzuki et al.
        2018/2020 (arXiv:1808.08558).
    """
    setting = _setting(
        layers, input_radius, n, gamma, delta, empirical_ramp, approximation_error, original_widths, measured_radius
    )
    log_epsilon = math.log(setting.gamma) - math.log(math.sqrt(2) * setting.n)
    nats, norm_price = log_cover(layers, log_epsilon, input_radius)
    price = setting.gamma_price + setting.width_price + norm_price
    complexity = math.sqrt(nats / (2 * setting.n))
    total = math.sqrt((nats + price + math.log(1 / setting.delta)) / (2 * setting.n))
    return _bound(
        "covering (single scale)",
        setting,
        complexity + 2 / setting.n,
        total - complexity,
        "margin bound, one finite cover",
    )


def dudley_bound(
    layers: Sequence[LayerSize],
    *,
    input_radius: float,
    n: int,
    gamma: float,
    delta: float,
    empirical_ramp: float,
    approximation_error: float = 0.0,
    original_widths: Sequence[int] = (),
    measured_radius: float | None = None,
) -> Bound:
    """Bound the pruned network's error by Dudley's entropy integral: variance 6 sqrt(P/n (1 + ln(1 + 4K))).

    With sbar >= every s_l and Bbar >= every B_l (both rounded up to powers of two), D_1 = D_x, D_{l+1} =
    sbar D_l + Bbar, G = sum_l sbar^(L-l) (D_l + 1) (the 1 only for layers with biases), P = all parameters:

    1. Moving every weight and bias block by at most r moves the network by r G, so an epsilon-cover of the ramp
       losses needs r = gamma epsilon / (sqrt(2) G):  ln N(epsilon) <= P ln(1 + K/epsilon),
       K = 2 max(sbar, Bbar) G sqrt(2)/gamma.  This is a cover at every sample at once, as norms bound all inputs.
    2. Dudley:  Rademacher <= 12/sqrt(n) integral_0^(1/4) sqrt(ln N) d epsilon.  The chain starts at the constant 1/2,
       which is within 1/2 of every loss in [0, 1], and halves the distance at each link, the first one to 1/4.
    3. Jensen, and integral_0^a ln(1 + K/epsilon) d epsilon = a ln(1+K/a) + K ln(1+a/K) <= a (1 + ln(1+K/a)), a = 1/4:
       3 sqrt(P/n (1 + ln(1+4K))).
    4. Symmetrisation doubles (6); McDiarmid adds sqrt((ln(1/delta) + prices) / (2n)); bias as in `covering_bound`.

    value = empirical + sqrt(2)/gamma * error + 6 sqrt(P/n (1 + ln(1+4K))) + sqrt((ln(1/delta) + prices) / (2n)).

    Args:
        layers: as in `covering_bound`.
        input_radius: as in `covering_bound`.
        n: number of i.i.d. examples.
        gamma: margin width in logit units; rounded down to a power of two and priced.
        delta: allowed probability of failure.
        empirical_ramp: as in `covering_bound`.
        approximation_error: as in `covering_bound`.
        original_widths: as in `covering_bound`.
        measured_radius: as in `covering_bound`.

    Returns:
        A `Bound` with terms empirical, bias, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: chaining as in Bartlett, Foster and Telgarsky 2017, Lemma A.5, with another start; this and the rest
        derived here, after Suzuki et al. 2018/2020 (arXiv:1808.08558).
    """
    setting = _setting(
        layers, input_radius, n, gamma, delta, empirical_ramp, approximation_error, original_widths, measured_radius
    )
    exponent = max(power_of_two_above(layer.operator_norm) for layer in layers)
    log_s = exponent * math.log(2)
    price = setting.gamma_price + setting.width_price + integer_code_length(exponent)
    log_b = -math.inf
    if any(layer.biases for layer in layers):
        bias_exponent = max(power_of_two_above(layer.bias_norm) for layer in layers if layer.biases)
        price += integer_code_length(bias_exponent)
        log_b = bias_exponent * math.log(2)
    log_g, log_d = -math.inf, setting.log_radius
    for index, layer in enumerate(layers):
        part = float(np.logaddexp(log_d, 0.0)) if layer.biases else log_d
        log_g = float(np.logaddexp(log_g, (len(layers) - 1 - index) * log_s + part))
        log_d = float(np.logaddexp(log_s + log_d, log_b)) if layer.biases else log_s + log_d
    log_k = math.log(2 * math.sqrt(2)) - math.log(setting.gamma) + max(log_s, log_b) + log_g
    parameters = sum(layer.weights + layer.biases for layer in layers)
    variance = 6 * math.sqrt(parameters / setting.n * (1 + log1p_exp(log_k + math.log(4))))
    confidence = math.sqrt((math.log(1 / setting.delta) + price) / (2 * setting.n))
    return _bound("covering (Dudley)", setting, variance, confidence, "margin bound, entropy integral")


def _bound(name: str, setting: _Setting, variance: float, confidence: float, theorem: str) -> Bound:
    return Bound.from_terms(
        name,
        {"empirical": setting.empirical, "bias": setting.bias, "variance": variance, "confidence": confidence},
        confidence=1 - setting.delta,
        covers=PRUNED,
        loss=f"ramp({setting.gamma:g})",
        hypotheses=setting.hypotheses,
        trivial=1.0,
        theorem=theorem,
        source="Suzuki et al. 2018/2020 (arXiv:1808.08558) has unnamed constants; these are derived here",
    )


def optimal_polynomial_width(n: int, beta: float, bias: float = 1.0, variance: float = 1.0) -> tuple[float, float]:
    """Return the width that balances bias and variance for a power-law spectrum, and the resulting error.

    Minimises bias * m^(-1/(2 beta)) + variance * m / sqrt(n) over real m > 0:
    m* = (bias sqrt(n) / (2 beta variance))^(2 beta / (1 + 2 beta)), of order n^(beta / (1 + 2 beta)); the minimum is
    of order n^(-1 / (2 (1 + 2 beta))).  A fast decay (small beta) asks for a narrow network and gives a better rate.

    Args:
        n: number of examples.
        beta: decay index of mu_j ~ j^(-1/beta), in (0, 1).
        bias: factor of the bias, positive.
        variance: factor of the variance, positive.

    Returns:
        (m*, value at m*).

    Raises:
        ValueError: if an input is out of range.

    Source: rate of Suzuki et al. 2018/2020 (arXiv:1808.08558) up to logarithms; the minimiser is derived here.
    """
    n = check_count("n", n)
    beta = check_number("beta", beta, 0.0, 1.0, open_low=True, open_high=True)
    bias = check_number("bias", bias, 0.0, open_low=True)
    variance = check_number("variance", variance, 0.0, open_low=True)
    width = (bias * math.sqrt(n) / (2 * beta * variance)) ** (2 * beta / (1 + 2 * beta))
    return width, bias * width ** (-1 / (2 * beta)) + variance * width / math.sqrt(n)
