"""Code-length certificates: the exact binomial form of the Occam bound, for codes of up to some 10^5 bits.

Theorem.  Fix, before seeing the data, a prefix-free language for classifiers; let bits(h) be the length of h's word, so
that sum_h 2^-bits(h) <= 1 (Kraft).  With probability at least 1 - delta over n i.i.d. examples, for ALL h at once:

    true error(h) <= inf {p : P(Binomial(n, p) <= errors(h)) <= delta 2^-bits(h)}.

Proof.  For one h the count of errors is Binomial(n, true error), so that the right-hand side with e = delta 2^-bits(h)
is Clopper and Pearson's upper limit and fails with probability at most e.  Sum e over all words.  As it holds for all h
at once, a search may look at the training set as often as it likes: only the word that it ends with is paid.

The tail is far below the smallest float (10^5 bits are 10^-30000), so logarithms are used throughout, and every step
rounds towards the larger bound: Stirling's series is cut where its sign is known, the rest of the tail's sum is bounded
by a geometric series, and what float64 may lose is added on top.

Source: Langford 2005, "Tutorial on practical prediction theory for classification", JMLR 6 (Occam's razor bound by
inversion of the binomial tail); the directed rounding is derived here.
"""

from __future__ import annotations

import math

import numpy as np

from specprune.bounds.bound import QUANTISED, Bound, Hypothesis, check_count, check_number
from specprune.bounds.occam import invert_binary_kl

#: What one float64 operation may lose, with a factor for the handful of operations in each term.
_SLACK = 32 * 2.0**-53
_MOST_TERMS = 1 << 14
_MOST_SAMPLES = 10**9  # for which the rounding below was worked out
_FIXED_LANGUAGE = Hypothesis("the language was fixed before the training set was seen (assumed)", None, True)


def log_tail_above(errors: int, n: int, p: float) -> float:
    """Return a number just above ln P(Binomial(n, p) <= errors), for p above errors/n.

    With k = errors, ln pmf(k) = -n kl(k/n || p) + ln sqrt(n / (2 pi k (n - k))) + s(n) - s(k) - s(n - k), where
    s(m) = ln m! - ln(sqrt(2 pi m) (m/e)^m) lies between 1/(12m) - 1/(360m^3) and 1/(12m).  The tail is pmf(k) times
    1 + r_k + r_k r_(k-1) + ... with r_i = i (1 - p) / ((n - i + 1) p), which fall, so that the sum's rest is below a
    geometric series.

    Args:
        errors: k, from 0 to n - 1.
        n: number of trials, 1 to 10^9.
        p: probability, in (errors/n, 1].

    Returns:
        A float not below the logarithm, and above it by less than 0.003 + 1e-13 (n + |result|); -inf for p = 1.

    Raises:
        ValueError: if an input is out of range.

    Source: Stirling's series with its enveloping property; Loader 2000 for the arrangement; rounding derived here.
    """
    n, errors = _check_counts(n, errors)
    p = check_number("p", p, 0.0, 1.0, open_low=True)
    if errors >= n or p * n <= errors:
        raise ValueError(f"errors must be below n = {n} and p above errors/n, got errors = {errors} and p = {p}")
    if p == 1:
        return -math.inf
    if errors == 0:
        value = n * math.log1p(-p)
        return value + _SLACK * abs(value)
    right = n - errors
    q = 1 - p
    if p < 0.5:
        log_right = math.log1p(-p) - math.log1p(-errors / n)
        log_right_error = abs(math.log1p(-p)) + abs(math.log1p(-errors / n))
    else:
        log_right = math.log(n * q / right)
        log_right_error = 1.0
    log_left = math.log(n * p / errors)
    parts = (
        errors * log_left,
        right * log_right,
        0.5 * math.log(n / (2 * math.pi * errors * right)),
        1 / (12 * n) - 1 / (12 * errors) - 1 / (12 * right) + 1 / (360 * errors**3) + 1 / (360 * right**3),
        _log_series_above(errors, n, p),
    )
    # A logarithm of a quotient near 1 is off by what its argument is off, times the factor in front.
    lost = errors * (1 + abs(log_left)) + right * (log_right_error + abs(log_right)) + sum(map(abs, parts))
    return math.fsum(parts) + _SLACK * lost


def _check_counts(n: int, errors: int) -> tuple[int, int]:
    n = check_count("n", n)
    errors = check_count("errors", errors, low=0)
    if n > _MOST_SAMPLES:
        raise ValueError(f"n must be at most {_MOST_SAMPLES}, for which rounding is under control, got {n}")
    if errors > n:
        raise ValueError(f"errors must be at most n = {n}, got {errors}")
    return n, errors


def _log_series_above(errors: int, n: int, p: float) -> float:
    """Return a number just above ln(1 + r_k + r_k r_(k-1) + ...)."""
    terms = min(errors, _MOST_TERMS)
    first = errors * (1 - p) / ((n - errors + 1) * p)
    if first < 1:  # after this many terms the rest is below 2^-60 of the whole
        terms = min(terms, 8 + math.ceil(-60 * math.log(2) / math.log(first)) if first > 0 else 1)
    i = np.arange(errors, errors - terms, -1, dtype=np.float64)
    ratios = i * ((1 - p) / p) / (n + 1 - i)
    products = np.cumprod(ratios)
    total = 1.0 + float(products.sum())
    last = errors - terms
    if last > 0:
        ratio = last * (1 - p) / ((n - last + 1) * p)
        total += float(products[-1]) * ratio / (1 - ratio)
    # A product of up to `terms` rounded factors, and the sum of as many terms; 1 - ratio is above 16000 / n.
    return math.log(total) + 32 * (terms + 8) * 2.0**-53


def _check(errors: int, n: int, bits: float, delta: float) -> tuple[int, int, float]:
    """Return errors, n and a number just below ln(delta 2^-bits)."""
    n, errors = _check_counts(n, errors)
    bits = check_number("bits", bits, 0.0)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    goal = math.log(delta) - bits * math.log(2)
    return errors, n, goal - _SLACK * (abs(math.log(delta)) + abs(goal))


def code_length_limit(errors: int, n: int, bits: float, delta: float) -> float:
    """Return the largest true error that is compatible with so few training errors of so short a word, rounded up.

    inf {p >= errors/n : P(Binomial(n, p) <= errors) <= delta 2^-bits} by bisection on a bracket whose upper end is
    always valid; about a millisecond, so that a search can use it as its objective.

    Args:
        errors: wrong answers on the training set.
        n: number of i.i.d. training examples, at most 10^9.
        bits: length of the classifier's word; lengths between whole bits serve a search.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        p in (errors/n, 1]; 1 if every answer is wrong.

    Raises:
        ValueError: if errors exceeds n, or an input is out of range.

    Source: Langford 2005; the rounding is derived here.
    """
    errors, n, goal = _check(errors, n, bits, delta)
    if errors == n:
        return 1.0
    low, high = errors / n, 1.0
    while True:
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        if middle * n <= errors or log_tail_above(errors, n, middle) > goal:
            low = middle
        else:
            high = middle
    return high


def _bound(name: str, errors: int, n: int, value: float, delta: float, theorem: str) -> Bound:
    rate = errors / n
    return Bound(
        name,
        value,
        {"empirical": rate, "variance": value - rate},
        confidence=1 - delta,
        covers=QUANTISED,
        loss="0-1",
        hypotheses=(_FIXED_LANGUAGE,),
        trivial=1.0,
        theorem=theorem,
        source="Langford 2005; directed rounding derived here",
    )


def code_length_bound(errors: int, n: int, bits: float, delta: float) -> Bound:
    """Bound the true error of a network by its training errors and the length of its word, exactly.

    value = inf {p : P(Binomial(n, p) <= errors) <= delta 2^-bits}, rounded up.

    Args:
        errors: wrong answers on the training set of the network that the word describes.
        n: number of i.i.d. training examples.
        bits: length of its word in a prefix-free language that was fixed before.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical and variance (= value - empirical); never above `code_length_kl_bound`.

    Raises:
        ValueError: if errors exceeds n, or an input is out of range.

    Source: Langford 2005 (binomial tail inversion); see the module's text for the proof.
    """
    value = code_length_limit(errors, n, bits, delta)
    # The kl form is valid for the same event, and the smaller where rounding up costs the most: never above it.
    value = min(value, _kl_limit(errors, n, bits, delta))
    return _bound("code length (binomial)", errors, n, value, delta, "Occam's razor bound, binomial inversion")


def _kl_limit(errors: int, n: int, bits: float, delta: float) -> float:
    errors, n, goal = _check(errors, n, bits, delta)
    # The quotients may have been rounded down, which the next float repairs.
    rate = min(math.nextafter(errors / n, 1.0), 1.0) if errors else 0.0
    budget = math.nextafter(-goal / n, math.inf)
    # What float64 loses in the divergence itself is far below a part in 10^9 of one.
    return min(invert_binary_kl(rate, budget * (1 + 1e-9) + 64 * 2.0**-53), 1.0)


def code_length_kl_bound(errors: int, n: int, bits: float, delta: float) -> Bound:
    """Bound the true error by Chernoff's inequality: invert kl(errors/n || p) = (bits ln 2 + ln(1/delta)) / n.

    Args:
        errors: wrong answers on the training set.
        n: number of i.i.d. training examples.
        bits: length of the network's word.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical and variance, a little above `code_length_bound`.

    Raises:
        ValueError: if errors exceeds n, or an input is out of range.

    Source: Langford 2005 (Occam's razor bound, kl form); as `occam_bound`, with the count and bits instead of nats.
    """
    value = _kl_limit(errors, n, bits, delta)
    return _bound("code length (kl)", errors, n, value, delta, "Occam's razor bound, kl form")


def samples_needed(bits: float, delta: float, classes: int) -> int:
    """Return how many examples it takes until a word without any training error promises more than guessing does.

    The least n with 1 - (delta 2^-bits)^(1/n) < 1 - 1/classes: the next whole number above
    (bits ln 2 + ln(1/delta)) / ln(classes).

    Args:
        bits: length of the word.
        delta: allowed probability of failure, in (0, 1).
        classes: number of classes, at least 2.

    Returns:
        n, at least 1.

    Raises:
        ValueError: if an input is out of range.

    Source: derived here; the binomial tail at no errors is (1 - p)^n.
    """
    bits = check_number("bits", bits, 0.0)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    classes = check_count("classes", classes, low=2)
    return math.floor((bits * math.log(2) - math.log(delta)) / math.log(classes)) + 1
