"""Test set bounds: exact coverage for every error rate, order, and independent numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from specprune.bounds.bound import ORIGINAL, PRUNED
from specprune.bounds.held_out import (
    binomial_upper_limit,
    chernoff_bound,
    clopper_pearson_bound,
    hoeffding_bound,
)
from specprune.bounds.occam import invert_binary_kl
from specprune.bounds.symbolic_pac_bayes import statements

BOUNDS = {"clopper_pearson": clopper_pearson_bound, "chernoff": chernoff_bound, "hoeffding": hoeffding_bound}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("n", [1, 5, 40, 300])
@pytest.mark.parametrize("delta", [0.3, 0.05, 0.001])
def test_exact_coverage(name, n, delta):
    counts = np.arange(n + 1)
    limit = np.array([BOUNDS[name](k, n, delta, covers=ORIGINAL).value for k in range(n + 1)])
    worst = 0.0
    # Just above each limit the failure probability peaks; a grid alone would miss the worst error rates.
    for p in np.unique(np.concatenate([np.linspace(0.001, 0.999, 97), np.minimum(limit * (1 + 1e-9), 1)])):
        failure = float(np.sum(stats.binom.pmf(counts[limit < p], n, p)))
        worst = max(worst, failure)
    assert worst <= delta * (1 + 1e-6)
    if name == "clopper_pearson":
        assert worst >= delta * (1 - 1e-5)  # exact: nothing smaller is valid


def test_clopper_pearson_against_independent_numbers():
    # No error among n: p = 1 - delta^(1/n).  All but one wrong: p^n = 1 - delta.
    for n in (1, 10, 10_000):
        assert clopper_pearson_bound(0, n, 0.05, covers=PRUNED).value == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-8)
        value = clopper_pearson_bound(n - 1, n, 0.05, covers=PRUNED).value
        assert value == pytest.approx((1 - 0.05) ** (1 / n), rel=1e-8)
    assert clopper_pearson_bound(10, 10, 0.05, covers=PRUNED).value == 1
    # SciPy's own two-sided interval at twice the delta has this upper end.
    interval = stats.binomtest(173, 10_000).proportion_ci(0.95, method="exact")
    assert clopper_pearson_bound(173, 10_000, 0.025, covers=PRUNED).value == pytest.approx(interval.high, rel=1e-8)


@given(st.integers(1, 10**6), st.floats(0.0, 1.0), st.floats(1e-9, 0.99))
def test_order_monotony_and_terms(n, share, delta):
    errors = min(int(share * (n + 1)), n)
    exact, chernoff, hoeffding = (f(errors, n, delta, covers=PRUNED) for f in BOUNDS.values())
    assert errors / n <= exact.value <= chernoff.value * (1 + 1e-8)
    assert chernoff.value <= hoeffding.value * (1 + 1e-9)
    assert exact.value == 1 or stats.binom.cdf(errors, n, exact.value) <= delta
    for function, bound in zip(BOUNDS.values(), (exact, chernoff, hoeffding), strict=True):
        assert bound.value == pytest.approx(sum(bound.terms.values()), rel=1e-14)
        assert (bound.covers, bound.confidence) == (PRUNED, 1 - delta)
        assert function(errors, n, delta / 2, covers=PRUNED).value >= bound.value * (1 - 1e-9)
        assert function(errors, 2 * n, delta, covers=PRUNED).value <= bound.value * (1 + 1e-9)
        if errors < n:
            assert function(errors + 1, n, delta, covers=PRUNED).value >= bound.value * (1 - 1e-9)


def test_rounded_outward():
    for errors, n, delta in ((1, 3, 0.1), (17, 1000, 0.05), (333, 1000, 0.01)):
        exact = errors / n + math.sqrt(math.log(1 / delta) / (2 * n))
        assert exact < hoeffding_bound(errors, n, delta, covers=PRUNED).value <= exact * (1 + 1e-14)
        assert stats.binom.cdf(errors, n, clopper_pearson_bound(errors, n, delta, covers=PRUNED).value) <= delta


# The limit of any probability


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(1e-6, 0.6))
def test_binomial_limit_is_clopper_pearson_and_rounds_up(n, share, delta):
    k = int(share * n)
    limit = binomial_upper_limit(k, n, delta)
    expected = 1.0 if k == n else stats.beta.isf(delta, k + 1, n - k)
    assert expected * (1 - 1e-12) <= limit <= expected * (1 + 1e-8)
    assert k == n or special.bdtr(k, n, limit) <= delta


@pytest.mark.parametrize("delta", [0.05, 0.3, 0.9])
def test_binomial_limit_covers_exactly(delta):
    """P(limit < p) summed over all counts, at the p where it is worst: right below each limit."""
    n = 23
    limits = np.array([binomial_upper_limit(k, n, delta) for k in range(n + 1)])
    for p in np.concatenate([limits[:-1] * (1 - 1e-9), np.linspace(0.01, 0.99, 60)]):
        missed = float(stats.binom.pmf(np.arange(n + 1), n, p)[limits < p].sum())
        assert missed <= delta + 1e-9
    # Tight: just above a limit, the count that gave it is missed, with probability delta.
    p = limits[3] * (1 + 1e-9)
    assert float(stats.binom.cdf(3, n, p)) == pytest.approx(delta, rel=1e-6)


def test_no_success_has_a_closed_form():
    for n, delta in ((10, 0.1), (10_000, 0.01)):
        exact = 1 - delta ** (1 / n)
        assert exact * (1 - 1e-12) <= binomial_upper_limit(0, n, delta) <= exact * (1 + 1e-8)


def test_formulas_are_the_code():
    formulas = {statement.name: statement.lambdify() for statement in statements() if "test_set" in statement.name}
    value = hoeffding_bound(17, 1000, 0.05, covers=PRUNED).value
    assert value == pytest.approx(formulas["test_set_hoeffding"](0.017, 1000, 0.05), rel=1e-12)
    budget = float(formulas["test_set_chernoff"](1000, 0.05))
    assert chernoff_bound(17, 1000, 0.05, covers=PRUNED).value == pytest.approx(invert_binary_kl(0.017, budget))


def test_refusals():
    for function in BOUNDS.values():
        for errors, n, delta in ((-1, 10, 0.1), (11, 10, 0.1), (1, 0, 0.1), (1, 10, 0.0), (1, 10, 1.0)):
            with pytest.raises(ValueError):
                function(errors, n, delta, covers=PRUNED)
        with pytest.raises(TypeError):
            function(0.1, 10, 0.1, covers=PRUNED)
