"""Least squares with any number of features: its fixed point and law, and risks when pruned, against simulations."""

import dataclasses
import importlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from specprune.analysis.linear_simulation import simulate_risks
from specprune.bounds.overparameterized import LinearProblem, least_squares_law
from specprune.bounds.pruned_risks import METHODS, _tail_moments, oracle_support, pruned_risks

module = importlib.import_module("specprune.bounds.pruned_risks")


def power_law(n=200, features=1000, noise=0.3):
    variances = (1.0 + np.arange(features)) ** -0.7
    return LinearProblem(variances, np.full(features, 1 / np.sqrt(variances.sum())), noise, n)


def spiked(n=200, features=4000, head=100, value=100.0, noise=0.0):
    variances = np.ones(features)
    variances[:head] = value
    return LinearProblem(variances, np.full(features, 1 / np.sqrt(variances.sum())), noise, n)


PROBLEMS = st.builds(
    lambda seed, n, features, noise: LinearProblem(
        np.random.default_rng(seed).uniform(0.1, 3, features),
        np.random.default_rng(seed + 1).normal(size=features),
        noise,
        n,
    ),
    st.integers(0, 1000),
    st.integers(5, 30),
    st.integers(40, 60),
    st.sampled_from([0.0, 0.5]),
)


@settings(deadline=None, max_examples=40)
@given(PROBLEMS, st.data())
def test_fixed_point_solves_its_equations(problem, data):
    size = data.draw(st.integers(1, problem.features).filter(lambda k: k != problem.n))
    law = least_squares_law(problem, size)
    variances = problem.variances[:size]
    if size < problem.n:
        assert law.c[0] == 0
        assert np.isinf(law.xi[0])
        np.testing.assert_array_equal(law.shrinkage[0], law.used[0])
        assert law.gamma[0] == pytest.approx(problem.effective_noise(law.sizes)[0] / (1 - size / problem.n), rel=1e-12)
        return

    # The slow twin: one scalar at a time.
    def excess(log_c):
        return (variances / (variances + np.exp(log_c))).sum() - problem.n

    c = np.exp(optimize.brentq(excess, -40, 20, xtol=1e-14))
    assert law.c[0] == pytest.approx(c, rel=1e-9)
    assert law.xi[0] == pytest.approx(1 / c, rel=1e-9)
    assert law.shrinkage[0].sum() == pytest.approx(problem.n, rel=1e-9)
    # gamma is its own fixed point: the test risk of the law that it defines.
    error = (law.mean[0] - problem.beta) ** 2 + law.deviation[0] ** 2
    assert law.gamma[0] == pytest.approx(problem.noise + (problem.variances * error).sum(), rel=1e-9)


@settings(deadline=None, max_examples=15)
@given(PROBLEMS, st.data())
def test_scales_and_order_of_features_do_not_matter(problem, data):
    size = data.draw(st.integers(problem.n + 1, problem.features))
    keep = data.draw(st.integers(1, problem.n - 1))
    plain = pruned_risks(problem, size, keep)
    order = np.random.default_rng(0).permutation(size)
    order = np.concatenate([order, np.arange(size, problem.features)])
    permuted = dataclasses.replace(problem, variances=problem.variances[order], beta=problem.beta[order])
    rescaled = dataclasses.replace(problem, variances=4 * problem.variances, beta=problem.beta / 2)
    louder = dataclasses.replace(problem, beta=3 * problem.beta, noise=9 * problem.noise)
    for name in METHODS:
        value = getattr(plain, name)[0]
        assert getattr(pruned_risks(permuted, size, keep), name)[0] == pytest.approx(value, rel=1e-7)
        assert getattr(pruned_risks(rescaled, size, keep), name)[0] == pytest.approx(value, rel=1e-7)
        assert getattr(pruned_risks(louder, size, keep), name)[0] == pytest.approx(9 * value, rel=1e-7)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(1500)


@settings(deadline=None, max_examples=200)
@example(1.1125369292536007e-308, 0.1015625, 0.0)
@given(st.floats(-3, 3), st.floats(0.1, 2), st.floats(0, 4))
def test_tail_moments_are_integrals(mean, deviation, threshold):
    found = _tail_moments(np.array(mean), np.array(deviation), np.array(threshold))
    law = stats.norm(mean, deviation)
    for power in range(3):
        outside = 0.0
        for low, high in ((threshold, threshold + 30), (-threshold - 30, -threshold)):
            h = (low + high) / 2 + (high - low) / 2 * NODES
            outside += (high - low) / 2 * (WEIGHTS * h**power * law.pdf(h)).sum()
        assert found[power] == pytest.approx(outside, abs=1e-9)
    assert found[3] == pytest.approx(law.pdf(threshold))
    assert found[4] == pytest.approx(law.pdf(-threshold))


@pytest.mark.parametrize("size", [60, 250, 700])
def test_the_law_is_that_of_simulated_solutions(size):
    problem = power_law(100, 700)
    law = least_squares_law(problem, size)
    generator = np.random.default_rng(0)
    solutions = []
    for _ in range(400):
        features = generator.standard_normal((100, 700)) * np.sqrt(problem.variances)
        targets = features @ problem.beta + np.sqrt(problem.noise) * generator.standard_normal(100)
        solutions.append(np.linalg.lstsq(features[:, :size], targets, rcond=None)[0])
    mean, deviation = np.mean(solutions, 0), np.std(solutions, 0)
    # Averages over coordinates, as the theorem says: of the bias, and of the spread.
    expected_mean, expected_deviation = law.mean[0, :size], law.deviation[0, :size]
    assert (mean @ problem.beta[:size]) == pytest.approx(expected_mean @ problem.beta[:size], rel=0.02)
    ratio = deviation / expected_deviation
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert np.abs(ratio - 1).max() < 0.2


@pytest.mark.parametrize(
    "problem", [power_law(), spiked(features=1000, head=40, value=25.0, noise=0.1)], ids=["power", "spike"]
)
@pytest.mark.parametrize("size", [120, 260, 800])
def test_theory_is_what_simulations_give(problem, size):
    theory = pruned_risks(problem, size, 40)
    found = simulate_risks(problem, 40, size=size, draws=60, seed=1)
    for name in METHODS:
        value = getattr(theory, name)[0]
        assert abs(found.risks[name].value - value) < 3 * found.risks[name].error + 0.02 * value, name


def test_more_kept_features_than_examples():
    problem = spiked(150, 700, 40, 9.0, 0.5)
    theory = pruned_risks(problem, 700, 220)
    found = simulate_risks(problem, 220, size=700, draws=60, seed=2)
    for name in METHODS:
        value = getattr(theory, name)[0]
        assert abs(found.risks[name].value - value) < 3 * found.risks[name].error + 0.02 * value, name


def test_refit_on_the_same_examples_costs_more_near_the_peak_and_less_far_beyond():
    problem = power_law()
    same, fresh = (getattr(pruned_risks(problem, 260, 40), f"magnitude_{kind}")[0] for kind in ("refit", "fresh"))
    found = simulate_risks(problem, 40, size=260, draws=100, seed=3).risks
    assert same > 1.1 * fresh
    assert found["magnitude_refit"].value - fresh > 10 * found["magnitude_refit"].error
    same, fresh = (getattr(pruned_risks(spiked(), 1000, 100), f"magnitude_{kind}")[0] for kind in ("refit", "fresh"))
    found = simulate_risks(spiked(), 100, size=1000, draws=60, seed=3).risks
    assert same < 0.9 * fresh
    assert fresh - found["magnitude_refit"].value > 5 * found["magnitude_refit"].error


@pytest.mark.parametrize("noise", [1e-12, 1e-16, 1e-20, 1e-24, 1e-30, 1e-40, 0.0])
def test_little_noise_is_as_none(noise):
    # Equal features: any four of ten are kept.
    equal = pruned_risks(LinearProblem(np.ones(10), np.ones(10), noise, 30), 10, 4)
    for name in ("magnitude", "hessian", "oracle"):
        assert getattr(equal, name)[0] == pytest.approx(6, rel=0.03 if noise else 1e-9)
    for name in ("magnitude_fresh", "oracle_refit"):
        assert getattr(equal, name)[0] == pytest.approx(6 / (1 - 4 / 30), rel=1e-4)
    assert equal.magnitude_refit[0] == pytest.approx(6 / (1 - 4 / 30), rel=0.02)
    beta = np.concatenate([np.arange(10.0, 0, -1), np.zeros(10)])
    clear = pruned_risks(LinearProblem(np.ones(20), beta, noise, 30), 20, 15)
    assert 0 <= clear.magnitude_refit[0] <= 10 * noise


def test_extreme_variances():
    """Golden: the fixed point in 60 digits (mpmath), n = 20, twenty variances of 1 and ten of r."""
    import mpmath as mp

    for small in (1e-8, 1e-16, 1e-24):
        problem = LinearProblem(
            np.repeat([1.0, small], [20, 10]), np.repeat([1.0, 1 / np.sqrt(small)], [20, 10]), 0.1, 20
        )
        found = least_squares_law(problem, 30)
        with mp.workdps(60):
            r = mp.mpf(small)
            # 20 / (1 + c) + 10 r / (r + c) = 20 is a quadratic in c: 20 c^2 + 10 r c - 10 r = 0.
            c = (-10 * r + mp.sqrt(100 * r**2 + 800 * r)) / 40
            t, u = 1 / (1 + c), r / (r + c)
            top = mp.mpf("0.1") + 20 * (1 - t) ** 2 + 10 * (1 - u) ** 2
            gamma = top / ((20 * t * (1 - t) + 10 * u * (1 - u)) / 20)
        assert found.gamma[0] == pytest.approx(float(gamma), rel=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    problem = power_law(60, 300)
    sizes = np.array([70, 100, 200, 300, 250])
    whole = pruned_risks(problem, sizes, 20)
    monkeypatch.setattr(module, "_AT_ONCE", 700)
    parts = pruned_risks(problem, sizes, 20)
    for name in METHODS:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)


def test_a_problem_keeps_its_own_numbers():
    variances, beta = np.ones(4), np.ones(4)
    problem = LinearProblem(variances, beta, 0.1, 3)
    variances[0] = beta[0] = -5
    assert problem.variances[0] == problem.beta[0] == 1


def test_values_of_the_two_phenomena():
    """Golden: computed with another program, one scalar root at a time, and confirmed there by simulation."""
    problem = spiked()
    sizes = [120, 150, 195, 205, 260, 400, 1000, 2000, 4000]
    found = pruned_risks(problem, sizes, 100)
    expected = {
        "unpruned": [0.698, 1.108, 10.95, 11.46, 1.427, 0.777, 0.536, 0.469, 0.440],
        "magnitude": [0.721, 1.210, 9.00, 8.70, 1.484, 1.128, 0.906, 0.654, 0.517],
        "hessian": [0.705, 1.119, 10.30, 10.65, 1.334, 0.723, 0.521, 0.470, 0.449],
        "oracle": [0.630, 0.835, 5.76, 6.00, 0.986, 0.655, 0.516, 0.469, 0.449],
        "magnitude_refit": [0.742, 1.314, 1.955, 1.925, 1.994, 1.932, 1.350, 0.869, 0.682],
        "hessian_refit": [0.712, 1.120, 2.93, 2.68, 1.280, 0.851, 0.677, 0.635, 0.609],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1.5e-3)
    np.testing.assert_allclose(found.oracle_refit, 0.5612, rtol=1e-3)
    # Double descent of the pruned model, and large and pruned below small with the right features known.
    assert found.hessian[0] < found.hessian[2] > found.hessian[-1]
    assert found.hessian[-1] < 0.45 < 0.56 < found.oracle_refit[-1]


def test_limits_that_need_no_formula():
    problem = power_law()
    whole = pruned_risks(problem, [60, 300], [60, 300])
    for name in METHODS:  # nothing is pruned
        np.testing.assert_allclose(getattr(whole, name), whole.unpruned, rtol=1e-9)
    # Without noise, and with the whole signal in fewer features than examples, least squares finds it.
    beta = np.zeros(50)
    beta[:10] = np.arange(10, 0, -1)
    exact = pruned_risks(LinearProblem(np.ones(50), beta, 0.0, 30), 20, [4, 15])
    np.testing.assert_allclose(exact.unpruned, 0, atol=1e-12)
    for name in ("magnitude", "hessian", "oracle"):
        np.testing.assert_allclose(getattr(exact, name), [(beta[4:] ** 2).sum(), 0], atol=1e-12)
    refit = (beta[4:] ** 2).sum() / (1 - 4 / 30)
    np.testing.assert_allclose(exact.oracle_refit, [refit, 0], atol=1e-12)
    np.testing.assert_allclose(exact.magnitude_refit, [refit, 0], atol=1e-12)


def test_rows_are_computed_for_themselves():
    problem = spiked(60, 300, 30, 9.0, 0.2)
    sizes, keep = np.array([40, 100, 300, 59]), np.array([20, 30, 90, 59])
    together = pruned_risks(problem, sizes, keep)
    for row, (size, kept) in enumerate(zip(sizes, keep, strict=True)):
        alone = pruned_risks(problem, int(size), int(kept))
        for name in METHODS:
            assert getattr(together, name)[row] == pytest.approx(getattr(alone, name)[0], rel=1e-9)
    assert len(together.to_records()) == 4
    assert '"size": 40' in together.to_json()
    assert "hessian_refit" in str(together)


def test_oracle_takes_what_matters_most_of_the_first_features():
    problem = LinearProblem([1.0, 4.0, 1.0, 9.0], [1.0, 1.0, 3.0, 1.0], 0.0, 2)
    found = oracle_support(problem, np.array([3, 4]), np.array([2, 2]))
    np.testing.assert_array_equal(found, [[False, True, True, False], [False, False, True, True]])


def test_bad_input():
    problem = power_law(20, 50)
    with pytest.raises(ValueError, match=r"sizes holds 20, the number of examples.*19 or 21"):
        pruned_risks(problem, [10, 20], 5)
    with pytest.raises(ValueError, match="keep holds 20"):
        pruned_risks(problem, 30, 20)
    with pytest.raises(ValueError, match="keep = 31 of size = 30 features"):
        pruned_risks(problem, 30, 31)
    with pytest.raises(ValueError, match=r"from 1 to the number of features, 50; got 0\.\.0"):
        pruned_risks(problem, 30, 0)
    with pytest.raises(ValueError, match="3 sizes and 2 numbers to keep"):
        pruned_risks(problem, [30, 31, 32], [3, 4])
    with pytest.raises(ValueError, match="whole numbers"):
        least_squares_law(problem, [2.5])
    with pytest.raises(ValueError, match="noise must be a finite number"):
        LinearProblem([1.0], [1.0], -1.0, 5)
    with pytest.raises(ValueError, match="n must be at least 2"):
        LinearProblem([1.0], [1.0], 0.0, 1)
    with pytest.raises(ValueError, match="feature 1 is always 0"):
        LinearProblem([1.0, 0.0], [1.0, 1.0], 0.0, 5)
    with pytest.raises(ValueError, match="variances"):
        LinearProblem([1.0, -1.0], [1.0, 1.0], 0.0, 5)
    with pytest.raises(ValueError, match=r"beta must be finite, of shape \(2,\)"):
        LinearProblem([1.0, 1.0], [1.0, np.nan], 0.0, 5)
