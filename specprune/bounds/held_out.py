"""Bounds from examples that training never saw: what a test set promises, with nothing but its size.

Setting.  A network was fixed before m i.i.d. test examples were drawn; it errs on k of them, so k is binomial with the
unknown error rate p.  Each function returns an upper confidence bound on p, rounded up.  These hold for the network
itself, need no prior, and are the yardstick for bounds from the training set.  A test set that was used to choose the
network (its width, its regularisation) promises nothing.
"""

from __future__ import annotations

import math

from scipy.special import betaincc, betainccinv

from specprune.bounds.bound import Bound, Hypothesis, check_count, check_number
from specprune.bounds.occam import invert_binary_kl

#: Relative accuracy that is asked of the binomial tail, far above what its computation loses.
_SLACK = 1e-9
_UNSEEN = Hypothesis("the network was fixed before the test examples were seen (assumed)", None, True)


def binomial_upper_limit(successes: int, trials: int, delta: float) -> float:
    """Return the Clopper-Pearson upper confidence limit of a probability, rounded up.

    inf {p : P(Binomial(trials, p) <= successes) <= delta}; 1 if all trials succeeded.

    Args:
        successes: how often the event happened.
        trials: number of independent trials.
        delta: allowed probability that the limit is too low, in (0, 1).

    Returns:
        p in (0, 1], at which the tail is below delta by more than what its computation loses.

    Raises:
        ValueError: if successes exceeds trials, or an input is out of range.

    Source: Clopper and Pearson 1934, one-sided.
    """
    successes, trials = check_count("successes", successes, low=0), check_count("trials", trials)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if successes > trials:
        raise ValueError(f"successes must be at most trials, got {successes} of {trials}")
    if successes == trials:
        return 1.0
    # P(Binomial(n, p) <= k) is the upper tail of a beta distribution at p.
    value = float(betainccinv(successes + 1, trials - successes, delta))
    widening, goal = 2.0**-50, delta - _SLACK * min(delta, 1 - delta)
    while value < 1 and float(betaincc(successes + 1, trials - successes, value)) > goal:
        value, widening = min(value * (1 + widening), 1.0), 2 * widening
    return value


def _check(errors: int, n: int, delta: float) -> tuple[int, int, float]:
    n = check_count("n", n)
    errors = check_count("errors", errors, low=0)
    if errors > n:
        raise ValueError(f"errors must be at most n = {n}, got {errors}")
    return errors, n, check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)


def _bound(name: str, errors: int, n: int, value: float, delta: float, covers: str, theorem: str, source: str) -> Bound:
    rate = errors / n
    return Bound(
        name,
        value,
        {"empirical": rate, "confidence": value - rate},
        confidence=1 - delta,
        covers=covers,
        loss="0-1",
        hypotheses=(_UNSEEN,),
        trivial=1.0,
        theorem=theorem,
        source=source,
    )


def clopper_pearson_bound(errors: int, n: int, delta: float, *, covers: str) -> Bound:
    """Bound the true error by the exact binomial tail: the largest p that makes so few errors not too unlikely.

    value = sup {p : P(Binomial(n, p) <= errors) >= delta}; 1 if every answer is wrong.

    Args:
        errors: wrong answers on the test set.
        n: number of test examples.
        delta: allowed probability of failure, in (0, 1).
        covers: the network that was tested.

    Returns:
        A `Bound` with terms empirical and confidence, the smallest that is valid for all p.

    Raises:
        ValueError: if an input is out of range.

    Source: Clopper and Pearson 1934; Langford 2005.
    """
    errors, n, delta = _check(errors, n, delta)
    # For a delta of about 1/2 and more the limit lies below the observed rate.
    value = max(binomial_upper_limit(errors, n, delta), errors / n)
    return _bound(
        "test set (Clopper-Pearson)", errors, n, value, delta, covers, "exact binomial bound", "Clopper, Pearson 1934"
    )


def chernoff_bound(errors: int, n: int, delta: float, *, covers: str) -> Bound:
    """Bound the true error by Chernoff's inequality: invert kl(errors/n || p) = ln(1/delta)/n.

    Args:
        errors: wrong answers on the test set.
        n: number of test examples.
        delta: allowed probability of failure, in (0, 1).
        covers: the network that was tested.

    Returns:
        A `Bound` with terms empirical and confidence, between `clopper_pearson_bound` and `hoeffding_bound`.

    Raises:
        ValueError: if an input is out of range.

    Source: Chernoff 1952; Langford 2005.
    """
    errors, n, delta = _check(errors, n, delta)
    # The quotient may have been rounded down, which the next float repairs.
    rate = min(math.nextafter(errors / n, 1.0), 1.0) if errors else 0.0
    value = invert_binary_kl(rate, math.log(1 / delta) / n)
    return _bound("test set (Chernoff)", errors, n, value, delta, covers, "Chernoff bound, kl form", "Chernoff 1952")


def hoeffding_bound(errors: int, n: int, delta: float, *, covers: str) -> Bound:
    """Bound the true error by the test error plus sqrt(ln(1/delta) / (2n)).

    Args:
        errors: wrong answers on the test set.
        n: number of test examples.
        delta: allowed probability of failure, in (0, 1).
        covers: the network that was tested.

    Returns:
        A `Bound` with terms empirical and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Hoeffding 1963, Theorem 1.
    """
    errors, n, delta = _check(errors, n, delta)
    # Four roundings, none beyond half a unit in the last place of the sum: four units up cover them.
    value = errors / n + math.sqrt(math.log(1 / delta) / (2 * n))
    for _ in range(4):
        value = math.nextafter(value, math.inf)
    return _bound("test set (Hoeffding)", errors, n, value, delta, covers, "Hoeffding's inequality", "Hoeffding 1963")
