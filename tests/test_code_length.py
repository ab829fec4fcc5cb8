"""Code-length certificates: never below the truth, hardly above it, monotone, and covering."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import betainc

from specprune.bounds.code_length import (
    code_length_bound,
    code_length_kl_bound,
    code_length_limit,
    log_tail_above,
    samples_needed,
)


def exact_log_tail(errors, n, p):
    """ln P(Binomial(n, p) <= errors), term by term from the largest down, with 60 digits."""
    with mpmath.workdps(60):
        p = mpmath.mpf(p)
        log_first = (
            mpmath.loggamma(n + 1)
            - mpmath.loggamma(errors + 1)
            - mpmath.loggamma(n - errors + 1)
            + errors * mpmath.log(p)
            + (n - errors) * mpmath.log1p(-p)
        )
        term = total = mpmath.mpf(1)
        for i in range(errors, 0, -1):
            term *= i * (1 - p) / ((n - i + 1) * p)
            total += term
            if term < total * mpmath.mpf(10) ** -45 and i < (n + 1) * p:
                break
        return log_first + mpmath.log(total)


@st.composite
def problems(draw, most=3000):
    n = draw(st.integers(1, most))
    errors = draw(st.integers(0, n - 1))
    p = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
    return errors, n, max(errors / n + (1 - errors / n) * p, 1e-12)


@given(problems())
@settings(deadline=None, max_examples=150)
@example((0, 1, 0.5))
@example((1, 2, math.nextafter(0.5, 1)))
@example((2999, 3000, math.nextafter(1, 0)))
@example((21325, 50000, 0.565))
@example((5000, 60000, 5001 / 60000))
@example((400_000, 1_000_000, 0.4000001))
def test_the_tail_is_never_below_the_truth_and_close_to_it(problem):
    errors, n, p = problem
    if p * n <= errors or p >= 1:
        return
    found, truth = log_tail_above(errors, n, p), exact_log_tail(errors, n, p)
    assert found >= truth
    assert float(found - truth) < 0.003 + 1e-13 * (n + abs(found))


def test_rounding_never_wins():
    """A hundred million trials: each term of the logarithm is off by more than all series leave open."""
    n = 10**8
    for step in range(40):
        errors = 3 * 10**7 + 12345 * step
        for p in (0.45, 0.6, 0.8):
            found = log_tail_above(errors, n, p)
            assert found >= exact_log_tail(errors, n, p)


def test_the_series_closed_by_geometry_is_still_above():
    """2^14 terms do not exhaust this sum: what is left is bounded by a geometric series."""
    errors, n = 3 * 10**8, 10**9
    p = (errors + 3) / n
    found = log_tail_above(errors, n, p)
    normal = 0.5 * math.erfc(3 / math.sqrt(2 * n * 0.21))  # close to one half, by the central limit theorem
    assert math.log(normal) < found < math.log(normal) + 0.5


@pytest.mark.parametrize(
    ("errors", "n", "bits"),
    [
        (0, 1, 0),
        (0, 60000, 2600),
        (3, 10, 2),
        (1371, 60000, 2612),
        (21325, 50000, 2784),
        (59000, 60000, 40),
        (50, 100, 9),
    ],
)
@pytest.mark.parametrize("delta", [0.05, 1e-6])
def test_limits_against_sixty_digits(errors, n, bits, delta):
    """The tail at the limit is at most delta 2^-bits, and at a limit smaller by a part in 10^9 it is not."""
    with mpmath.workdps(60):
        goal = mpmath.log(mpmath.mpf(delta)) - bits * mpmath.log(2)
        limit = code_length_limit(errors, n, bits, delta)
        assert limit == 1 or exact_log_tail(errors, n, limit) <= goal
        below = mpmath.mpf(limit) * (1 - mpmath.mpf(10) ** -9)
        # the correction of Stirling's series is exact enough from about ten errors on
        if errors >= 10 or errors == 0:
            assert exact_log_tail(errors, n, below) > goal


@given(st.integers(1, 400), st.data())
@settings(max_examples=100)
def test_limits_against_the_incomplete_beta_function(n, data):
    errors = data.draw(st.integers(0, n - 1))
    bits = data.draw(st.floats(0, 300))
    limit = code_length_limit(errors, n, bits, 0.05)
    if limit < 1:  # P(Binomial(n, p) <= k) = I_(1-p)(n - k, k + 1)
        assert betainc(n - errors, errors + 1, 1 - limit) <= 0.05 * 2.0**-bits * (1 + 1e-7)


def test_published_numbers_of_the_prototypes():
    assert code_length_limit(21325, 50000, 2784, 0.05) == pytest.approx(0.5650, abs=5e-5)
    assert code_length_limit(round(0.0376 * 60000), 60000, 2714, 0.05) == pytest.approx(0.1050, abs=2e-4)


@given(st.integers(1, 10**6), st.data())
@settings(max_examples=150)
def test_more_errors_bits_or_confidence_cost_and_samples_pay(n, data):
    errors = data.draw(st.integers(0, n - 1))
    bits = data.draw(st.integers(0, 10**5))
    delta = data.draw(st.floats(1e-12, 0.5))
    limit = code_length_limit(errors, n, bits, delta)
    assert errors / n < limit <= 1
    slack = 1e-12 * (1 + n / 10**3)  # each is rounded up on its own
    assert code_length_limit(errors + 1, n, bits, delta) >= limit - slack
    assert code_length_limit(errors, n, bits + 1, delta) >= limit - slack
    assert code_length_limit(errors, n, bits, delta / 2) >= limit - slack
    assert code_length_limit(errors, n + 1, bits, delta) <= limit + slack


@given(st.integers(1, 10**6), st.data())
@settings(max_examples=60)
def test_a_bit_more_is_worth_half_the_delta(n, data):
    errors = data.draw(st.integers(0, n - 1))
    bits = data.draw(st.integers(0, 5000))
    limit = code_length_limit(errors, n, bits + 1, 0.1)
    assert limit == pytest.approx(code_length_limit(errors, n, bits, 0.05), rel=1e-9)


@given(st.integers(1, 10**5), st.data())
@settings(max_examples=60)
def test_the_exact_form_is_never_above_the_kl_form(n, data):
    errors = data.draw(st.integers(0, n))
    bits = data.draw(st.integers(0, 5000))
    exact, kl = code_length_bound(errors, n, bits, 0.05), code_length_kl_bound(errors, n, bits, 0.05)
    assert errors / n <= exact.value <= kl.value <= 1
    assert exact.terms["empirical"] + exact.terms["variance"] == pytest.approx(exact.value)
    assert exact.confidence == 0.95
    assert exact.loss == "0-1"


def failures(paid, draws=2000, n=60, delta=0.2, words=64, seed=0):
    """Share of training sets on which some word of a finite language breaks its promise."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(1 + np.arange(words), 12)  # sum of 2^-length is at most 1
    lengths[12:] = 18
    assert np.sum(2.0**-lengths) <= 1
    risks = generator.uniform(0.2, 0.6, words)
    table = {
        bits: np.array([code_length_limit(k, n, bits if paid else 0, delta) for k in range(n + 1)])
        for bits in set(lengths.tolist())
    }
    counts = generator.binomial(n, risks, (draws, words))  # independent: the worst case of the union
    limits = np.stack([table[bits][counts[:, word]] for word, bits in enumerate(lengths.tolist())], axis=1)
    return float((limits < risks).any(1).mean())


def test_all_promises_of_a_language_hold_at_once():
    """delta = 20 %, 2000 training sets: three standard deviations above it are 22.7 %."""
    assert failures(paid=True) <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 2000)


def test_without_paying_for_the_choice_they_do_not():
    assert failures(paid=False) > 0.9


@given(st.floats(0, 3000), st.integers(2, 100))
@settings(max_examples=50)
def test_samples_needed_is_where_a_perfect_word_starts_to_say_something(bits, classes):
    n = samples_needed(bits, 0.05, classes)
    assert code_length_limit(0, n + 1, bits, 0.05) < 1 - 1 / classes
    if n > 2:
        assert code_length_limit(0, n - 2, bits, 0.05) > 1 - 1 / classes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((5, 4, 1, 0.05), "errors must be at most n = 4, got 5"),
        ((-1, 4, 1, 0.05), "errors must be at least 0"),
        ((0, 0, 1, 0.05), "n must be at least 1"),
        ((0, 4, -1, 0.05), "bits"),
        ((0, 4, math.nan, 0.05), "bits"),
        ((0, 4, 1, 0.0), "delta"),
        ((0, 4, 1, 1.0), "delta"),
        ((0, 10**10, 1, 0.05), "n must be at most 1000000000"),
    ],
)
def test_bad_numbers(arguments, match):
    for function in (code_length_limit, code_length_bound, code_length_kl_bound):
        with pytest.raises(ValueError, match=match):
            function(*arguments)


def test_bad_types_and_places():
    with pytest.raises(TypeError, match="errors must be an integer"):
        code_length_limit(1.5, 10, 1, 0.05)
    with pytest.raises(ValueError, match=r"p above errors/n, got errors = 5 and p = 0\.5"):
        log_tail_above(5, 10, 0.5)
    with pytest.raises(ValueError, match="classes"):
        samples_needed(10, 0.05, 1)
