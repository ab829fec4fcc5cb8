"""Degrees of freedom, their inverse, leverage scores and power laws: identities, properties, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.bounds.degrees_of_freedom import (
    degrees_of_freedom,
    effective_rank,
    eigenvalues,
    fit_power_law,
    inverse_degrees_of_freedom,
    leverage_scores,
    power_law_degrees_of_freedom,
)

SPECTRA = st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=30)


def covariance(size, seed, rank=None):
    data = np.random.default_rng(seed).standard_normal((rank or 3 * size, size)) * np.arange(1, size + 1) ** -0.7
    return data.T @ data / len(data)


def test_matches_the_trace_definition():
    s = covariance(12, 0)
    expected = np.trace(s @ np.linalg.inv(s + 0.01 * np.eye(12)))
    assert degrees_of_freedom(eigenvalues(s), 0.01) == pytest.approx(expected, rel=1e-12)


def test_vectorised_over_lambda():
    mu = np.array([3.0, 1.0, 0.0])
    lams = np.array([[0.0, 0.5], [1.0, 2.0]])
    values = degrees_of_freedom(mu, lams)
    assert values.shape == (2, 2)
    assert values[0, 0] == 2.0  # the rank
    assert values[1, 1] == degrees_of_freedom(mu, 2.0) == pytest.approx(3 / 5 + 1 / 3)


@given(SPECTRA, st.floats(1e-8, 1e6), st.floats(1.0001, 1e3))
def test_decreases_in_lambda(mu, lam, factor):
    assert degrees_of_freedom(mu, lam * factor) <= degrees_of_freedom(mu, lam) <= len(mu)


def test_decreases_strictly_where_float64_can_tell():
    lams = np.logspace(-4, 4, 50)
    assert np.all(np.diff(degrees_of_freedom(np.array([3.0, 1.0, 0.1]), lams)) < 0)


@given(SPECTRA, st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_scale_invariance(mu, lam, c):
    assert degrees_of_freedom(np.array(mu) * c, lam * c) == pytest.approx(degrees_of_freedom(mu, lam), rel=1e-9)


@given(SPECTRA, st.floats(1e-6, 1.0))
def test_inverse_rounds_outward_and_is_tight(mu, share):
    target = share * len(mu)
    lam = inverse_degrees_of_freedom(mu, target)
    assert degrees_of_freedom(mu, lam) <= target
    if lam > 0:
        assert degrees_of_freedom(mu, lam * (1 - 1e-12)) >= target * (1 - 1e-9)


def test_inverse_refuses_impossible_targets():
    assert inverse_degrees_of_freedom([2.0, 1.0, 0.0], 2) == 0.0
    for target in (2.5, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="target must be a finite number in"):
            inverse_degrees_of_freedom([2.0, 1.0, 0.0], target)
    with pytest.raises(ValueError, match="all zero"):
        inverse_degrees_of_freedom([0.0], 1)


def test_eigenvalues_clip_rounding_and_refuse_negative():
    s = covariance(10, 1, rank=4)
    mu = eigenvalues(s)
    assert np.all(np.diff(mu) <= 0)
    assert np.count_nonzero(mu) == 4
    assert degrees_of_freedom(mu, 0.0) == 4
    with pytest.raises(ValueError, match="positive semidefinite"):
        eigenvalues(np.diag([1.0, -0.1]))
    with pytest.raises(ValueError, match="symmetric"):
        eigenvalues([[1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(ValueError, match="NaN"):
        eigenvalues([[math.nan]])
    with pytest.raises(ValueError, match="square"):
        eigenvalues(np.ones((2, 3)))


@pytest.mark.parametrize("lam", [1e-6, 1e-2, 10.0])
def test_leverage_scores_match_the_definition(lam):
    s = covariance(9, 2)
    direct = np.diag(s @ np.linalg.inv(s + lam * np.eye(9)))
    np.testing.assert_allclose(leverage_scores(s, lam), direct / direct.sum(), rtol=1e-8)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-4, 10.0))
def test_leverage_scores_sum_to_one_and_follow_permutations(seed, lam):
    s = covariance(8, seed)
    order = np.random.default_rng(seed).permutation(8)
    scores = leverage_scores(s, lam)
    assert scores.sum() == pytest.approx(1.0)
    assert np.all(scores >= 0)
    np.testing.assert_allclose(leverage_scores(s[np.ix_(order, order)], lam), scores[order], atol=1e-10)


def test_leverage_scores_refuse():
    with pytest.raises(ValueError, match="zero"):
        leverage_scores(np.zeros((3, 3)), 0.1)
    with pytest.raises(ValueError, match="lam"):
        leverage_scores(np.eye(3), 0.0)


def test_effective_rank():
    assert effective_rank([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3.0)
    assert effective_rank([5.0]) == pytest.approx(1.0)
    assert 1 < effective_rank([1.0, 0.1, 0.01]) < 3
    with pytest.raises(ValueError):
        effective_rank([0.0, 0.0])


def test_power_law_fit_recovers_the_truth_and_its_envelope_dominates():
    j = np.arange(1, 101.0)
    fit = fit_power_law(3.0 * j ** (-1 / 0.4))
    assert (fit.mu0, fit.beta, fit.r_squared) == pytest.approx((3.0, 0.4, 1.0))
    noisy = 3.0 * j**-2.5 * np.exp(np.random.default_rng(0).normal(0, 0.3, 100))
    fit = fit_power_law(noisy, first=3, last=80)
    assert np.all(np.sort(noisy)[::-1] <= fit.envelope * j ** (-1 / fit.beta))
    assert (fit.first, fit.last) == (3, 80)


def test_power_law_fit_refuses():
    for bad in ([1.0, 0.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError):
            fit_power_law(bad)
    with pytest.raises(ValueError, match="widen the range"):
        fit_power_law([3.0, 2.0, 1.0], first=3)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("lam", [1e-6, 1e-3, 1e-1])
def test_closed_form_dominates_the_sum_and_is_sharp(beta, lam):
    ceiling = power_law_degrees_of_freedom(2.0, beta, lam)
    j = np.arange(1, 200001.0)
    exact = degrees_of_freedom(2.0 * j ** (-1 / beta), lam)
    assert exact <= ceiling
    # An integral test: sum and integral of a decreasing function bounded by 1 differ by at most 1.
    if beta <= 0.3:  # slower decay needs more than 200 000 terms
        assert exact >= ceiling - 1 - 1e-2


def test_closed_form_equals_the_integral():
    from scipy.integrate import quad

    value, _ = quad(lambda x: 1 / (1 + 0.05 * x ** (1 / 0.4)), 0, np.inf)
    assert power_law_degrees_of_freedom(1.0, 0.4, 0.05) == pytest.approx(value, rel=1e-7)


def test_closed_form_refuses_slow_decay():
    with pytest.raises(ValueError, match="use degrees_of_freedom"):
        power_law_degrees_of_freedom(1.0, 1.0, 0.1)
