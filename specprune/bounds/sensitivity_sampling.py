"""Keeping few terms of many sums at once: importance sampling by sensitivity, with derived constants.

Setting.  Outputs z_i(x) = sum_j c_ij(x), one term an input j (a channel, a weight), zeta_i(x) = sum_j |c_ij(x)|.  The
sensitivity s_j is a ceiling on the share of input j: |c_ij(x)| <= s_j zeta_i(x) for every output i and every x that a
statement speaks of; S = sum_j s_j.  m inputs are drawn independently with p_j = s_j / S, and drawn input j is weighed
by n_j / (m p_j), n_j the number of its draws, so that E z_hat = z.  Every statement has the form
|z_hat - z| <= epsilon zeta.  Where all terms have one sign, zeta = |z| and this is a relative error.

Where contributions are split by sign, zeta = z+ + z-, the larger of the shares c+_j / z+ and c-_j / z- is at least
|c_j| / zeta (a ratio of sums lies between the ratios of the parts), so sensitivities of the parts serve as well.  They
are never smaller than the shares of the absolute values, which already give the same promise.

Only a part of the inputs may be drawn, the rest being kept as they are: S and z_hat - z then run over the part alone,
zeta over all inputs, and S may be below 1.

The theorem.  P(|z_hat_i - z_i| > epsilon zeta_i) <= 2 exp(-m epsilon^2 / (S (2 min(S, 1) + 2 epsilon / 3))) for each
output.

Proof.  Let Y = c_k / p_k for one draw k.  Then E Y = z, |Y| <= S zeta =: b, and E Y^2 = sum_k c_k^2 / p_k
<= S zeta sum_k |c_k| <= S min(S, 1) zeta^2 =: v.  The function (e^y - 1 - y) / y^2 increases, so for t > 0
E exp(t Y) <= 1 + t z + v (e^(t b) - 1 - t b) / b^2, and E exp(t (Y - z)) <= exp(v (e^(t b) - 1 - t b) / b^2).
Chernoff's method with t = ln(1 + u b / v) / b gives Bennett's and from it Bernstein's inequality for the mean of m
draws, P(mean - z >= u) <= exp(-m u^2 / (2 v + 2 b u / 3)); no centring is needed, so signed terms cost nothing.  Put
u = epsilon zeta, repeat for -Y, and add the two.  A union bound covers several outputs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import PRUNED, Bound, FloatArray, Hypothesis, check_count, check_number, check_vector

_LOSS = "error of a sum over its absolute terms"
_SOURCE = "Baykal et al. 2019 (arXiv:1910.05422), Liebenwein et al. 2020 (arXiv:1911.07412); constants derived here"
_INDEPENDENT = Hypothesis("the draws are independent, with probabilities proportional to the sensitivities", None, True)


def _log_term(delta: float, outputs: int) -> float:
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return math.log(2 * check_count("outputs", outputs)) - math.log(delta)


def samples_needed_for_sensitivity(total_sensitivity: float, epsilon: float, delta: float, outputs: int = 1) -> int:
    """Return how many draws keep every output within epsilon of its absolute terms, with probability 1 - delta.

    m = ceil(S (6 min(S, 1) + 2 epsilon) / (3 epsilon^2) ln(2 outputs / delta)).

    Args:
        total_sensitivity: S, the sum of the sensitivities of the inputs that are drawn from.
        epsilon: allowed |z_hat - z| / zeta, positive.
        delta: allowed probability of failure, in (0, 1).
        outputs: number of sums the promise covers at once: outputs times inputs x, if it is for a set of inputs.

    Returns:
        m, at least 1.

    Raises:
        ValueError: if an input is out of range.

    Source: the proof at the top of this module.  The published count has the same shape in S, epsilon and delta, with a
        constant C >= 1 that also pays for sensitivities estimated from a sample, see `new_input_bound`.
    """
    total = check_number("total_sensitivity", total_sensitivity, 0.0)
    epsilon = check_number("epsilon", epsilon, 0.0, open_low=True)
    draws = total * (6 * min(total, 1.0) / epsilon + 2) / (3 * epsilon) * _log_term(delta, outputs)
    if not math.isfinite(draws):
        raise ValueError(f"epsilon={epsilon!r} asks for more draws than float64 can count; ask for a larger epsilon")
    return max(1, math.ceil(draws))


def epsilon_for_sensitivity(total_sensitivity: float, samples: int, delta: float, outputs: int = 1) -> float:
    """Return the error epsilon that so many draws promise, with probability 1 - delta.

    epsilon = (u + sqrt(u^2 + 12 u min(S, 1))) / 2, u = 2 S ln(2 outputs / delta) / (3 m): the inverse of
    `samples_needed_for_sensitivity`.

    The published form has 6 u in place of 12 u, and a constant C in u.  With C = 1 it is wrong, not only unproved:
    where the inputs fall into S equal blocks of which each x uses one, z_hat / z is S / m times a binomial variable of
    m trials, and at S = 50, m = 50000, delta = 0.001 the published value is exceeded with probability 0.0042.  From
    C = 2 on it is above the value given here.

    Args:
        total_sensitivity: S, the sum of the sensitivities of the inputs that are drawn from.
        samples: number of draws m.
        delta: allowed probability of failure, in (0, 1).
        outputs: number of sums the promise covers at once.

    Returns:
        epsilon, a ceiling on |z_hat - z| / zeta; from 1 on, dropping everything is as good.

    Raises:
        ValueError: if an input is out of range.

    Source: the proof at the top of this module.
    """
    total = check_number("total_sensitivity", total_sensitivity, 0.0)
    u = 2 * total * _log_term(delta, outputs) / (3 * check_count("samples", samples))
    return (u + math.sqrt(u * u + 12 * u * min(total, 1.0))) / 2


def sampling_error_bound(total_sensitivity: float, samples: int, delta: float, outputs: int) -> Bound:
    """Bound the error of sums whose terms were drawn by sensitivities that are exact maxima over a finite set.

    The promise is for the inputs x of that set, at all outputs at once, and assumes nothing about them.

    Args:
        total_sensitivity: S, the sum of the sensitivities of the inputs that were drawn from.
        samples: number of draws m.
        delta: allowed probability of failure of the draws, in (0, 1).
        outputs: number of sums covered: outputs times size of the set.

    Returns:
        A `Bound` on the largest |z_hat - z| / zeta, at most the sum of its terms "range" u and "deviation"
        sqrt(3 u min(S, 1)).

    Raises:
        ValueError: if an input is out of range.

    Source: `epsilon_for_sensitivity`.
    """
    return _bound("sampling by sensitivity", total_sensitivity, samples, delta, outputs, delta, (), "for a finite set")


def new_input_bound(
    total_sensitivity: float,
    samples: int,
    delta: float,
    outputs: int,
    *,
    units: int,
    examples: int,
    tail: float | None = None,
) -> Bound:
    """Bound the error of the sampled sums at one new input, where n examples gave the sensitivities.

    Let g_j(x) be the largest share of input j over the outputs of x, and s_j the maximum of g_j over the examples.

    Without `tail`: if x and the examples are exchangeable, g_j(x) is above all n others with probability at most
    1 / (n + 1), so all shares are covered but with probability units / (n + 1), which is added to delta.

    With `tail` = C >= 1, the published way: let M_j be the largest value that g_j can take, F_j its distribution
    function, and assume F_j(M_j / C) <= exp(-1 / C) for every j, with independent examples.  Then C s_j >= M_j for all
    j but with probability units exp(-n / C), which is added to delta, and S becomes C S.  (The published C is 3.)  The
    assumption cannot be proved from the examples, and a unit that is rarely active breaks it.

    Args:
        total_sensitivity: S, the sum of the maxima over the examples.
        samples: number of draws m.
        delta: allowed probability of failure of the draws, in (0, 1).
        outputs: number of sums at one input x: outputs times positions.
        units: number of inputs j that have a sensitivity.
        examples: number of calibration examples n; all positions of one image are one example.
        tail: C; None asks for no assumption on the tails.

    Returns:
        A `Bound` whose confidence counts the draws and the examples.

    Raises:
        ValueError: if an input is out of range, or there are too few examples to promise anything.

    Source: without `tail`, exchangeability, derived here; with it, the assumption of Baykal et al. 2019
        (arXiv:1910.05422) as recalled, constants derived here.
    """
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    units, examples = check_count("units", units), check_count("examples", examples)
    factor = 1.0 if tail is None else check_number("tail", tail, 1.0)
    missed = units / (examples + 1) if tail is None else units * math.exp(-examples / factor)
    if delta + missed >= 1:
        raise ValueError(
            f"examples={examples} are too few for units={units}: some share is missed with probability up to "
            f"{missed:.3g}, above 1 - delta = {1 - delta:.3g}; calibrate on more examples"
        )
    if tail is None:
        condition = "the new input and the examples are exchangeable (assumed)"
    else:
        condition = f"P(g_j <= max g_j / {factor:g}) <= exp(-1 / {factor:g}) for every unit, i.i.d. examples (assumed)"
    total = factor * check_number("total_sensitivity", total_sensitivity, 0.0)
    name = "sampling by sensitivity, new input"
    assumed = (Hypothesis(condition, None, True),)
    return _bound(name, total, samples, delta, outputs, delta + missed, assumed, "for a new input")


def _bound(
    name: str,
    total: float,
    samples: int,
    delta: float,
    outputs: int,
    failure: float,
    hypotheses: tuple[Hypothesis, ...],
    scope: str,
) -> Bound:
    value = epsilon_for_sensitivity(total, samples, delta, outputs)
    u = 2 * total * _log_term(delta, outputs) / (3 * samples)
    return Bound(
        name,
        value,
        {"range": u, "deviation": math.sqrt(3 * u * min(total, 1.0))},
        confidence=1 - failure,
        covers=PRUNED,
        loss=_LOSS,
        hypotheses=(_INDEPENDENT, *hypotheses),
        trivial=1.0,
        theorem=f"Bernstein's inequality for importance sampling, {scope}",
        source=_SOURCE,
    )


def dropping_error_bound(dropped: ArrayLike) -> Bound:
    """Bound the error of sums from which inputs were dropped, the others being left as they are.

    |z_hat - z| = |sum over dropped of c_j| <= min(1, sum over dropped of s_j) zeta, for every x that s covers.

    Args:
        dropped: (k,) sensitivities of the dropped inputs; may be empty.

    Returns:
        A deterministic `Bound` on the largest |z_hat - z| / zeta.

    Raises:
        ValueError: if an entry is negative or not finite.

    Source: the triangle inequality.
    """
    total = math.fsum(check_vector("dropped", dropped, empty=True))
    return Bound(
        "dropping by sensitivity",
        min(1.0, total),
        {"dropped sensitivity": total},
        confidence=None,
        covers=PRUNED,
        loss=_LOSS,
        trivial=1.0,
        theorem="triangle inequality",
        source=_SOURCE,
    )


def expected_distinct(probabilities: ArrayLike, samples: int) -> float:
    """Return how many different inputs so many independent draws give, on average: sum_j 1 - (1 - p_j)^m.

    Args:
        probabilities: (inputs,) probabilities p, each in [0, 1].
        samples: number of draws m, 0 or more.

    Returns:
        The expected number, at most m; one more draw adds at most 1.

    Raises:
        ValueError: if an input is out of range.

    Source: linearity of expectation.
    """
    vector = check_vector("probabilities", probabilities)
    if vector.max() > 1:
        raise ValueError(f"probabilities must be at most 1, got {float(vector.max())!r}; divide them by their sum")
    return float(_hit_probabilities(vector, check_count("samples", samples, low=0)).sum())


def _hit_probabilities(probabilities: FloatArray, samples: int) -> FloatArray:
    if samples == 0:
        return np.zeros_like(probabilities)
    with np.errstate(divide="ignore"):  # a probability of 1 is hit at once
        hit: FloatArray = -np.expm1(samples * np.log1p(-probabilities))
    return hit
