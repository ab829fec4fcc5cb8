"""Gaussian posteriors: weights with noise of their own, a prior whose width is chosen afterwards, an error by sampling.

The posterior Q draws every weight from its own normal distribution; the prior P is normal with one variance for all
weights, from a grid that is priced.  `gaussian_kl` says how far Q is from P, `monte_carlo_error` what some random
networks say about the Gibbs error, which has no formula, and `dziugaite_roy_bound` puts both into the PAC-Bayes theorem
of `pac_bayes`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import Bound, check_count, check_number, check_vector
from specprune.bounds.occam import invert_binary_kl
from specprune.bounds.pac_bayes import langford_seeger_bound

#: Grid of prior variances: c exp(-j / b), j = 1, 2, ...
PRIOR_SCALE, PRIOR_PRECISION = 0.1, 100


def gaussian_kl(mean: ArrayLike, deviation: ArrayLike, prior_mean: ArrayLike, prior_deviation: ArrayLike) -> float:
    """Return how many nats a Gaussian with independent coordinates is away from another one.

    sum_i [ ((s_i/t_i)^2 - 1)/2 - ln(s_i/t_i) + (m_i - w_i)^2 / (2 t_i^2) ], s, t the deviations, m, w the means.

    Args:
        mean: m, shape (d,), weights of the posterior's centre.
        deviation: s, shape (d,), or one positive number for all; same unit as the weights.
        prior_mean: w, shape (d,), or one number.
        prior_deviation: t, shape (d,), or one positive number.

    Returns:
        KL(N(m, diag s^2) || N(w, diag t^2)) in nats; +inf only where float64 overflows.

    Raises:
        ValueError: if shapes do not match, entries are not finite, or a deviation is not positive.

    Source: standard; written with log1p so that equal Gaussians give 0 and nearly equal ones keep their digits.
    """
    m = check_vector("mean", mean, low=-math.inf)
    others = []
    for name, values, low in (
        ("deviation", deviation, 0.0),
        ("prior_mean", prior_mean, -math.inf),
        ("prior_deviation", prior_deviation, 0.0),
    ):
        vector = check_vector(name, np.atleast_1d(np.asarray(values, dtype=np.float64)), low=low)
        if vector.size not in (1, m.size):
            raise ValueError(f"{name} must have 1 or {m.size} entries like mean, got {vector.size}")
        if low == 0 and float(vector.min()) == 0:
            raise ValueError(f"{name} must be positive everywhere, got 0; a point mass is infinitely far from it")
        others.append(vector)
    s, w, t = others
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        excess = (s - t) / t  # s/t - 1
        # log1p keeps the digits near 1; far away the logarithms' difference neither over- nor underflows.
        near = np.abs(excess) < 0.5
        log_ratio = np.where(near, np.log1p(np.where(near, excess, 0.0)), np.log(s) - np.log(t))
        widths = excess * (excess + 2) / 2 - log_ratio
        shifts = ((m - w) / t) ** 2 / 2
        return max(float(np.sum(widths + shifts)), 0.0)


def prior_variance(index: int) -> float:
    """Return the prior's variance at a place of the grid: 0.1 exp(-index / 100), in squared weight units.

    Args:
        index: j = 1, 2, ...

    Returns:
        The variance, below 0.1.

    Raises:
        ValueError: if index is below 1.

    Source: Dziugaite and Roy 2017, arXiv:1703.11008 (c = 0.1, b = 100).
    """
    return PRIOR_SCALE * math.exp(-check_count("index", index) / PRIOR_PRECISION)


def prior_price(index: int) -> float:
    """Return the nats that the choice of the prior's variance costs: ln(pi^2/6) + 2 ln(index).

    Args:
        index: j = 1, 2, ..., the place on the grid of `prior_variance`.

    Returns:
        -ln of the weight 6 / (pi^2 j^2), which sums to 1 over j.

    Raises:
        ValueError: if index is below 1.

    Source: Dziugaite and Roy 2017, arXiv:1703.11008.
    """
    return math.log(math.pi**2 / 6) + 2 * math.log(check_count("index", index))


def monte_carlo_error(sampled_error: float, draws: int, delta: float) -> float:
    """Return an upper confidence bound on the Gibbs error, which is known only from some random networks.

    kl^-1(sampled_error, ln(1/delta) / draws), rounded up.

    Proof.  Let X_j in [0, 1] be independent with means p_j, and weigh them by w_j, sum w_j = 1, w_j <= 1/N.  The
    logarithm of 1 - p_j + p_j e^(t w), which bounds E e^(t w X_j), is convex in w and 0 at 0, hence at w_j at most
    w_j N times that at 1/N; and it is concave in p_j.  So E e^(t sum w_j X_j) <= (1 - p + p e^(t/N))^N, where
    p = sum w_j p_j: the moments of N draws of one coin, for which Chernoff gives
    P(kl(average || p) >= e, average <= p) <= exp(-N e).

    Args:
        sampled_error: average error of the drawn networks on the training examples, in [0, 1].
        draws: N, how many independent networks, each tried on all examples; or, where each is tried on its own share of
            them, all trials divided by the largest share, rounded down.
        delta: allowed probability of failure over the draws, in (0, 1).

    Returns:
        A number in [sampled_error, 1].

    Raises:
        ValueError: if an input is out of range.

    Source: Langford and Caruana 2002, who pay ln(2/delta) for both sides, for equal shares Hoeffding 1963, Theorem 1;
        unequal shares derived here.
    """
    error = check_number("sampled_error", sampled_error, 0.0, 1.0)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return invert_binary_kl(error, math.log(1 / delta) / check_count("draws", draws))


def dziugaite_roy_bound(
    sampled_error: float, kl: float, n: int, delta: float, *, index: int, draws: int, delta_draws: float
) -> Bound:
    """Bound the Gibbs error of a Gaussian posterior: prior variance chosen after the fact, error known from draws.

    value = kl^-1( kl^-1(sampled, ln(1/delta') / N),  (KL + ln(pi^2/6) + 2 ln j + ln(n/delta)) / (n - 1) ).

    Proof.  `langford_seeger_bound` for the prior with variance c exp(-j/b), at confidence 6 delta / (pi^2 j^2), sums to
    delta over j; `monte_carlo_error` fails with probability delta'; kl^-1 grows with its first argument.

    Args:
        sampled_error: average error of the drawn networks on the n examples, in [0, 1].
        kl: KL(Q || P_j) in nats, P_j with the variance `prior_variance(index)`, without the price of j.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure over the sample.
        index: j, place of the prior's variance on the grid; may depend on the data.
        draws: N, independent networks drawn after Q was fixed.
        delta_draws: delta', allowed probability of failure over the draws.

    Returns:
        A `Bound` that holds with probability 1 - delta - delta', with terms empirical (the sampled error), variance
        (what KL adds to it) and confidence (what the draws, the grid and delta add).

    Raises:
        ValueError: if an input is out of range, or delta + delta_draws is not below 1.

    Source: Dziugaite and Roy 2017, arXiv:1703.11008; they pay ln(2/delta') for the draws.
    """
    kl, delta = check_number("kl", kl, 0.0), check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if not check_number("delta_draws", delta_draws, 0.0, 1.0, open_low=True, open_high=True) + delta < 1:
        raise ValueError(f"delta + delta_draws must be below 1, got {delta} + {delta_draws}; lower one of them")
    error = check_number("sampled_error", sampled_error, 0.0, 1.0)
    gibbs = monte_carlo_error(error, draws, delta_draws)
    # A share 6 / (pi^2 j^2) of delta is the same as the price in nats on top of KL.
    bound = langford_seeger_bound(gibbs, kl + prior_price(index), n, delta)
    variance = invert_binary_kl(error, kl / (n - 1)) - error
    return replace(
        bound,
        name="PAC-Bayes (Dziugaite-Roy)",
        terms={"empirical": error, "variance": variance, "confidence": bound.value - error - variance},
        confidence=1 - (delta + delta_draws),
        theorem="PAC-Bayes-kl theorem, Gaussian prior of chosen variance, Monte-Carlo error",
        source="Dziugaite and Roy 2017, arXiv:1703.11008",
    )
