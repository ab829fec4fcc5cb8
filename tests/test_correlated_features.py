"""Correlated features: draws from the Gaussian law, restricted problems, random ReLU features, one shared factor."""

import importlib

import numpy as np
import pytest

from specprune.analysis.linear_simulation import least_norm, simulate_risks
from specprune.bounds.correlated_features import (
    CorrelatedProblem,
    ReluFeatures,
    correlated_law,
    correlated_risks,
    rank_one_risks,
)
from specprune.bounds.overparameterized import LinearProblem, least_squares_law
from specprune.bounds.pruned_risks import pruned_risks

FREE = ("unpruned", "magnitude", "hessian", "magnitude_fresh", "hessian_fresh", "oracle_refit")


def blocks(correlation, k=300, n=120, group=5, noise=0.1):
    block = (1 - correlation) * np.eye(group) + correlation
    scale = np.sqrt(np.repeat((1.0 + np.arange(k // group)) ** -0.5, group))
    covariance = np.kron(np.eye(k // group), block) * np.outer(scale, scale)
    beta = np.ones(k)
    return CorrelatedProblem(covariance, beta / np.sqrt(beta @ covariance @ beta), noise, n)


def value(found):
    return getattr(found, "value", found), getattr(found, "error", 0.0)


def test_a_diagonal_covariance_is_the_independent_case():
    generator = np.random.default_rng(0)
    variances, beta = generator.uniform(0.5, 2, 150), generator.normal(size=150)
    correlated = CorrelatedProblem(np.diag(variances), beta, 0.3, 60)
    independent = LinearProblem(variances, beta, 0.3, 60)
    one, other = correlated_law(correlated), least_squares_law(independent, 150)
    assert one.c == pytest.approx(other.c[0])
    assert one.gamma == pytest.approx(other.gamma[0])
    np.testing.assert_allclose(one.mean, other.mean[0])
    np.testing.assert_allclose(np.sqrt((one.factor**2).sum(1)), other.deviation[0])
    exact, drawn = pruned_risks(independent, 150, 30), correlated_risks(correlated, 30, draws=800, fresh_draws=60)
    for name in FREE:
        mean, error = value(getattr(drawn, name))
        assert abs(mean - getattr(exact, name)[0]) < 3 * error + 0.02 * mean, name


def test_strong_features_lose_no_digits():
    variances, beta = np.logspace(6, -6, 21), np.zeros(21)
    beta[0] = 1.0  # whose shrinkage is 1 up to the twelfth digit: its bias is all that this model errs on
    one = correlated_law(CorrelatedProblem(np.diag(variances), beta, 0.0, 20))
    other = least_squares_law(LinearProblem(variances, beta, 0.0, 20), 21)
    assert one.gamma == pytest.approx(other.gamma[0], rel=1e-9, abs=0)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_draws_from_the_law_are_what_simulations_give(correlation):
    problem = blocks(correlation)
    law, simulated = correlated_risks(problem, 40), simulate_risks(problem, 40, draws=120)
    for name in FREE:
        mean, error = value(getattr(law, name))
        other = simulated.risks[name]
        assert abs(mean - other.value) < 3 * np.hypot(error, other.error) + 0.02 * mean, name
    assert "magnitude_refit" not in law.to_record()
    assert law.to_record()["magnitude_error"] > 0


def test_refit_helps_where_features_share_their_inputs_and_not_where_they_are_independent():
    generator = np.random.default_rng(6)
    weights, target = generator.standard_normal((400, 20)) / np.sqrt(20), generator.standard_normal(20)
    shared = simulate_risks(ReluFeatures(weights, target / np.linalg.norm(target), 0.1, 100), 40, draws=40).risks
    independent = simulate_risks(blocks(0.0, k=400, n=100), 40, draws=40).risks
    assert shared["magnitude_refit"].value < 0.8 * shared["magnitude"].value
    assert independent["magnitude_refit"].value > independent["magnitude"].value


def test_a_restricted_problem_predicts_the_other_features():
    generator = np.random.default_rng(1)
    mix = generator.normal(size=(6, 6))
    problem = CorrelatedProblem(mix @ mix.T, generator.normal(size=6), 0.2, 20)
    small = problem.restricted([1, 4])
    inputs = generator.multivariate_normal(np.zeros(6), problem.covariance, 400_000)
    targets = inputs @ problem.beta
    fitted = np.linalg.lstsq(inputs[:, [1, 4]], targets, rcond=None)[0]
    np.testing.assert_allclose(small.beta, fitted, atol=0.02 * np.abs(fitted).max())
    left = np.mean((targets - inputs[:, [1, 4]] @ fitted) ** 2) + 0.2
    assert small.noise == pytest.approx(left, rel=0.01)


def test_singular_covariances():
    generator = np.random.default_rng(2)
    mix = generator.normal(size=(30, 12))
    problem = CorrelatedProblem(mix @ mix.T, mix @ generator.normal(size=12), 1.0, 40)
    assert len(problem.eigenvalues) == 12
    law = correlated_law(problem)
    # Least squares in 12 dimensions, whatever the 30 features.
    assert law.gamma == pytest.approx(1 / (1 - 12 / 40))
    simulated = simulate_risks(problem, 8, draws=300)
    found = simulated.risks["unpruned"]
    assert abs(found.value - law.gamma) < 3 * found.error + 0.05 * law.gamma
    with pytest.raises(ValueError, match="only 12 dimensions"):
        simulate_risks(problem, 20)
    with pytest.raises(ValueError, match="rank 12, the number of examples"):
        correlated_law(CorrelatedProblem(mix @ mix.T, np.ones(30), 1.0, 12))


def test_relu_moments():
    generator = np.random.default_rng(3)
    features = ReluFeatures(generator.normal(size=(5, 4)), generator.normal(size=4), 0.3, 50)
    inputs = generator.standard_normal((1_000_000, 4))
    values = np.maximum(inputs @ features.weights.T, 0)
    targets = inputs @ features.coefficients
    problem = features.equivalent()
    moments = values.T @ values / len(values)
    np.testing.assert_allclose(problem.covariance, moments, atol=0.01 * moments.max())
    np.testing.assert_allclose(problem.covariance @ problem.beta, values.T @ targets / len(values), atol=0.02)
    left = np.mean((targets - values @ problem.beta) ** 2) + 0.3
    assert problem.noise == pytest.approx(left, rel=0.01)


@pytest.mark.slow
def test_relu_features_behave_like_gaussian_ones():
    generator = np.random.default_rng(4)
    weights = generator.standard_normal((750, 120)) / np.sqrt(120)
    target = generator.standard_normal(120)
    features = ReluFeatures(weights, target / np.linalg.norm(target), 0.1, 600)
    law, simulated = correlated_risks(features.equivalent(), 180), simulate_risks(features, 180, draws=60)
    for name in FREE:
        mean, error = value(getattr(law, name))
        other = simulated.risks[name]
        assert abs(mean - other.value) < 2 * np.hypot(error, other.error) + 0.02 * mean, name


def test_rank_one_lemma():
    generator = np.random.default_rng(5)
    loadings, beta, n, keep = generator.exponential(size=30), generator.normal(size=30), 12, 8
    formula = rank_one_risks(loadings, beta, 1.5, n, keep)
    factor = generator.standard_normal((200_000, n))
    targets = factor * (loadings @ beta) + np.sqrt(1.5) * generator.standard_normal(factor.shape)
    slope = (factor * targets).sum(1) / (factor**2).sum(1)  # of the factor
    solution = slope[:, None] * loadings / (loadings @ loadings)
    kept = np.argsort(-loadings)[:keep]
    errors = solution[:, kept] @ loadings[kept] - loadings @ beta, slope - loadings @ beta
    for error, expected in zip(errors, (formula.pruned, formula.refit), strict=True):
        assert np.mean(error**2) == pytest.approx(expected, abs=4 * np.std(error**2) / np.sqrt(len(error)))
    assert rank_one_risks(loadings, beta, 0.0, n, 30).pruned == pytest.approx(0, abs=1e-12)


def test_equal_features_can_be_kept_together():
    doubled = np.kron(np.eye(20), np.ones((2, 2)))
    problem = CorrelatedProblem(doubled, np.ones(40) / np.sqrt(80), 0.1, 50)
    law, found = correlated_risks(problem, 12), simulate_risks(problem, 12, draws=100).risks
    for name in ("unpruned", "oracle_refit"):
        assert abs(getattr(law, name) - found[name].value) < 3 * found[name].error + 0.05 * found[name].value


def test_hugely_different_variances_are_simulated_right():
    variances = np.ones(100)
    variances[:5] = 1e18
    problem = LinearProblem(variances, 1 / np.sqrt(100 * variances), 0.1, 30)
    found = simulate_risks(problem, 10, draws=60).risks["unpruned"]
    theory = least_squares_law(problem, 100).gamma[0]
    assert abs(found.value - theory) < 4 * found.error + 0.1 * theory


def test_a_covariance_in_single_precision_has_its_rank():
    mix = np.random.default_rng(0).normal(size=(30, 12))
    single = CorrelatedProblem((mix @ mix.T).astype(np.float32), np.ones(30), 1.0, 25)
    double = CorrelatedProblem(mix @ mix.T, np.ones(30), 1.0, 25)
    assert len(single.eigenvalues) == len(double.eigenvalues) == 12
    assert correlated_law(single).gamma == pytest.approx(correlated_law(double).gamma, rel=1e-3)


@pytest.mark.parametrize("support", [np.arange(300) < 3, [1.7], [1, 1], [-1], [300], []])
def test_supports_are_indices(support):
    with pytest.raises(ValueError, match="different indices from 0 to 299"):
        blocks(0.5).restricted(support)


def test_more_draws_than_fit_at_once(monkeypatch):
    module = importlib.import_module("specprune.analysis.linear_simulation")
    problem = LinearProblem(np.ones(60), np.ones(60) / 8, 0.5, 20)
    whole = simulate_risks(problem, 10, draws=90).risks["unpruned"]
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 20 * 60 * 40)
    calls = []
    real = module._risks
    monkeypatch.setattr(module, "_risks", lambda model, count, *rest: calls.append(count) or real(model, count, *rest))
    parts = simulate_risks(problem, 10, draws=90).risks["unpruned"]
    assert calls == [40, 40, 10]
    assert parts != whole
    assert abs(parts.value - whole.value) < 4 * (parts.error + whole.error)


def test_least_norm_is_that_of_a_pseudoinverse():
    import torch

    generator = torch.Generator().manual_seed(0)
    for width in (4, 12):
        features = torch.randn(3, 8, width, dtype=torch.float64, generator=generator)
        targets = torch.randn(3, 8, dtype=torch.float64, generator=generator)
        expected = (torch.linalg.pinv(features) @ targets[:, :, None])[:, :, 0]
        torch.testing.assert_close(least_norm(features, targets), expected, rtol=1e-8, atol=1e-10)


def test_simulations_are_reproducible_and_refuse_bad_sizes():
    import torch

    problem = LinearProblem(np.ones(40), np.ones(40), 1.0, 15)
    state = torch.get_rng_state()
    one, other = (simulate_risks(problem, 5, size=30, draws=10, seed=7) for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)
    assert one.to_record()["unpruned"] == one.risks["unpruned"].value
    for keep, size in ((5, 15), (15, 30), (31, 30), (5, 41)):
        with pytest.raises(ValueError, match="expected keep <= size <= 40, and neither equal to n = 15"):
            simulate_risks(problem, keep, size=size)
    with pytest.raises(ValueError, match="only independent features can be left out"):
        simulate_risks(blocks(0.5), 5, size=100)


def test_bad_input():
    with pytest.raises(ValueError, match="positive semidefinite"):
        CorrelatedProblem(np.diag([1.0, -1.0]), np.ones(2), 0.0, 5)
    with pytest.raises(ValueError, match="square"):
        CorrelatedProblem(np.ones((2, 3)), np.ones(2), 0.0, 5)
    with pytest.raises(ValueError, match=r"beta must be finite, of shape \(2,\)"):
        CorrelatedProblem(np.eye(2), np.ones(3), 0.0, 5)
    with pytest.raises(ValueError, match="noise"):
        CorrelatedProblem(np.eye(2), np.ones(2), -0.1, 5)
    with pytest.raises(ValueError, match="keep must be from 1 to 300"):
        correlated_risks(blocks(0.5), 301)
    with pytest.raises(ValueError, match="not n = 120; got 120"):
        correlated_risks(blocks(0.5), 120)
    with pytest.raises(ValueError, match="feature 1 has zero weights"):
        ReluFeatures(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2), 0.0, 5)
    with pytest.raises(ValueError, match=r"of shapes \(k, d\) and \(d,\)"):
        ReluFeatures(np.ones((3, 2)), np.ones(3), 0.0, 5)
    with pytest.raises(ValueError, match="n must be at least 3"):
        rank_one_risks(np.ones(3), np.ones(3), 1.0, 2, 2)
    with pytest.raises(ValueError, match="keep = 4 of 3 features"):
        rank_one_risks(np.ones(3), np.ones(3), 1.0, 5, 4)
    with pytest.raises(ValueError, match="not all 0"):
        rank_one_risks(np.zeros(3), np.ones(3), 1.0, 5, 2)
