"""Kolmogorov widths: eigenvalues on the sphere against sampling, quadrature and the kernel; widths against twins."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special

from specprune.bounds.kolmogorov import (
    empirical_tail,
    harmonic_counts,
    neuron_widths,
    relu_kernel,
    relu_spectrum,
    sphere_spectrum,
    widths,
)


def relu(t):
    return np.maximum(t, 0.0)


def sphere(count, dimension, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def polynomials(points, degree):
    """All monomials of one degree; on the sphere they span the harmonics of that degree, and of 2, 4, ... less."""
    columns = itertools.combinations_with_replacement(range(points.shape[1]), degree)
    return np.stack([np.prod(points[:, list(choice)], axis=1) for choice in columns], axis=1)


def sampled_distances(activation, dimension, degrees, points=40000, neurons=200, seed=0):
    """Squared distance of each sampled neuron to polynomials, by least squares on sampled points."""
    x, w = sphere(points, dimension, seed), sphere(neurons, dimension, seed + 1)
    basis = np.concatenate([polynomials(x, degree) for degree in degrees], axis=1)
    values = activation(x @ w.T)
    factor = np.linalg.cholesky(basis.T @ basis)
    explained = np.linalg.solve(factor, basis.T @ values)
    left = (values**2).sum(axis=0) - (explained**2).sum(axis=0)
    return left / (points - basis.shape[1])  # unbiased to first order: the fit takes up a dimension a column


@pytest.mark.parametrize(
    ("dimension", "degrees", "n"), [(5, [0], 1), (5, [1, 2], 20), (5, [1, 4], 75), (10, [0, 1], 11), (10, [1, 2], 65)]
)
def test_relu_widths_agree_with_sampling_to_one_percent(dimension, degrees, n):
    found = sampled_distances(relu, dimension, degrees)
    expected = widths(relu_spectrum(dimension), [n])
    assert expected.floor[0] == pytest.approx(expected.ceiling[0], rel=1e-12)
    assert found.mean() == pytest.approx(expected.tail[0], rel=0.01)
    # Rotation invariance: whole degrees are as far from every neuron, but for the noise of 40 000 points.
    assert found.max() < 1.05 * expected.tail[0]


@pytest.mark.parametrize("dimension", [5, 10])
def test_energies_of_a_degree_agree_with_sampling_to_one_percent(dimension):
    def activation(t):
        return np.tanh(3 * t) + t**2

    records = {record["degree"]: record["energy"] for record in sphere_spectrum(activation, dimension).to_records()}
    distances = [
        sampled_distances(activation, dimension, degrees, points=30000).mean() for degrees in ([0], [0, 1], [1, 2])
    ]
    assert distances[0] - distances[1] == pytest.approx(records[1], rel=0.01)
    assert distances[1] - distances[2] == pytest.approx(records[2], rel=0.01)


@pytest.mark.parametrize("dimension", [5, 10])
def test_kernel_on_sampled_points_has_these_eigenvalues_from_below(dimension):
    n = [0, 1, 1 + dimension]
    expected = widths(relu_spectrum(dimension), n).tail
    small = np.mean([empirical_tail(relu_kernel(sphere(100, dimension, seed)), n) for seed in range(10)], axis=0)
    large = empirical_tail(relu_kernel(sphere(1500, dimension, 1)), n)
    np.testing.assert_allclose(large, expected, rtol=0.02)
    assert small[0] == pytest.approx(expected[0], rel=1e-12)  # the diagonal does not vary
    assert np.all(small[1:] < large[1:])


@pytest.mark.parametrize("dimension", [2, 3, 5, 10, 100])
def test_relu_closed_form_agrees_with_quadrature(dimension):
    exact, found = relu_spectrum(dimension), sphere_spectrum(relu, dimension)
    assert found.trace == pytest.approx(1 / (2 * dimension), rel=1e-12)
    count = len(found.degrees)
    assert count > 10
    assert found.degrees.tolist() == exact.degrees[:count].tolist()
    np.testing.assert_allclose(found.eigenvalues, exact.eigenvalues[:count], rtol=1e-9)
    n = exact.multiplicities[:6].cumsum().astype(int)
    np.testing.assert_allclose(widths(found, n).tail, widths(exact, n).tail, rtol=1e-8)


@pytest.mark.parametrize("dimension", [3, 5, 10])
def test_eigenvalues_are_those_of_the_kernel_as_a_function_of_the_angle(dimension):
    """Funk-Hecke on k itself, by adaptive quadrature and SciPy's Gegenbauer polynomials."""

    def product(t, degree):
        kernel = (math.sqrt(1 - t * t) + t * (math.pi - math.acos(t))) / (2 * math.pi * dimension)
        order = (dimension - 2) / 2
        polynomial = scipy.special.eval_gegenbauer(degree, order, t) / scipy.special.eval_gegenbauer(degree, order, 1.0)
        return kernel * polynomial * (1 - t * t) ** ((dimension - 3) / 2)

    size = math.gamma(dimension / 2) / math.sqrt(math.pi) / math.gamma((dimension - 1) / 2)
    spectrum = relu_spectrum(dimension)
    mu = dict(zip(spectrum.degrees.tolist(), spectrum.eigenvalues.tolist(), strict=True))
    for degree in (0, 1, 2, 3, 4, 5, 6):
        integral = size * scipy.integrate.quad(product, -1, 1, args=(degree,), epsabs=1e-14, limit=200)[0]
        assert integral == pytest.approx(mu.get(degree, 0.0), rel=1e-6, abs=1e-12)
    assert 3 not in mu


def test_counts_of_harmonics():
    assert harmonic_counts(3, 4).tolist() == [1, 3, 5, 7, 9]
    assert harmonic_counts(2, 3).tolist() == [1, 2, 2, 2]
    # Homogeneous polynomials on the sphere are the harmonics of their degree and of 2, 4, ... less.
    counts = harmonic_counts(10, 8)
    assert [counts[k::-2].sum() for k in range(9)] == [math.comb(k + 9, 9) for k in range(9)]


def test_step_and_identity_have_known_eigenvalues():
    linear = sphere_spectrum(lambda t: t, 7)
    assert (linear.degrees.tolist(), linear.remainder) == ([1], 0.0)
    assert linear.eigenvalues[0] == pytest.approx(1 / 49)  # E (w.x)^2 = 1/7, shared by 7 harmonics
    # A neuron sign(w . x) keeps (E |t|)^2 * d of its energy in the linear functions; on S^2, |t| is uniform.
    step = sphere_spectrum(np.sign, 3)
    assert step.trace == pytest.approx(1)
    assert step.eigenvalues[0] * step.multiplicities[0] == pytest.approx(3 / 4, rel=1e-12)
    cosine = sphere_spectrum(lambda t: 8 * t**4 - 8 * t**2 + 1, 2)  # cos 4u on the circle
    assert cosine.degrees.tolist() == [4]
    assert cosine.eigenvalues[0] == pytest.approx(1 / 4)


def test_high_degree_and_dimension_stay_finite():
    for spectrum in (relu_spectrum(100, 60), sphere_spectrum(relu, 100, 60), relu_spectrum(5, 2000)):
        assert np.all(spectrum.eigenvalues > 0)
        assert np.all(np.diff(spectrum.eigenvalues) < 0)
        assert spectrum.remainder < 1e-4 * spectrum.trace
        total = float(spectrum.eigenvalues @ spectrum.multiplicities) + spectrum.remainder
        assert total == pytest.approx(spectrum.trace, rel=1e-9)
    # One value by another route: a ratio of gamma functions as a Pochhammer symbol.
    mu = relu_spectrum(100, 60).eigenvalues[2]
    ratio = scipy.special.poch(50, 1.5)  # Gamma(51.5) / Gamma(50)
    assert mu == pytest.approx((math.sqrt(math.pi) / (4 * math.pi * ratio)) ** 2, rel=1e-11)


def test_widths_are_the_tails_of_the_listed_eigenvalues():
    spectrum = relu_spectrum(4, 8)
    mu = np.repeat(spectrum.eigenvalues, spectrum.multiplicities.astype(int))
    n = np.array([0, 1, 3, 5, 9, 14, 20, len(mu)])
    found = widths(spectrum, n)
    expected = [mu[k:].sum() + spectrum.remainder for k in n]
    np.testing.assert_allclose(found.tail, expected, rtol=1e-12)
    np.testing.assert_allclose(found.floor**2, expected, rtol=1e-12)
    # n = 3, 9 and 20 lie inside a degree: the ceiling is that of the 1, 5 and 14 dimensions before.
    np.testing.assert_allclose(found.ceiling[[2, 4, 6]], found.ceiling[[1, 3, 5]], rtol=1e-12)
    assert np.all(found.ceiling[[2, 4, 6]] > found.floor[[2, 4, 6]])


def test_no_eigenvalue_is_listed_that_an_unseen_one_may_exceed():
    """t + p_9 with all the weight in degree 9: cut at degree 4, nothing but what beats the unseen part is listed."""

    def activation(t):
        return 0.1 * scipy.special.eval_legendre(2, t) + scipy.special.eval_legendre(9, t)

    cut, whole = sphere_spectrum(activation, 3, 4), sphere_spectrum(activation, 3, 12)
    assert cut.degrees.tolist() == []
    assert cut.remainder == pytest.approx(whole.trace)
    assert whole.degrees.tolist() == [9, 2]
    np.testing.assert_allclose(widths(whole, [19, 30]).tail, [0.01 / 5, 0], rtol=1e-10)
    np.testing.assert_allclose(widths(cut, [0]).ceiling, math.sqrt(whole.trace))
    with pytest.raises(ValueError, match="raise max_degree"):
        widths(cut, [1])


def test_smooth_activations_end_where_rounding_begins():
    spectrum = sphere_spectrum(np.tanh, 5)
    assert spectrum.remainder == 0.0
    beyond = int(spectrum.multiplicities.sum()) + 7
    assert widths(spectrum, [beyond]).tail[0] == 0.0
    assert set(spectrum.degrees % 2) == {1}  # odd
    larger = sphere_spectrum(lambda t: np.tanh(20 * t), 5)
    share = [widths(item, [5]).tail[0] / item.trace for item in (spectrum, larger)]
    assert share[1] > 10 * share[0]  # large inner weights are harder


def test_neuron_widths_agree_with_singular_values_of_the_activations():
    generator = np.random.default_rng(3)
    x, w = generator.standard_normal((60, 4)), generator.standard_normal((9, 4))
    activations = relu(x @ w.T)
    found = neuron_widths(activations.T @ activations / 60, range(12))
    left, values, _ = np.linalg.svd(activations)
    for n in range(12):
        basis = left[:, : min(n, 9)]
        distances = ((activations - basis @ (basis.T @ activations)) ** 2).sum(axis=0) / 60
        assert found.tail[n] == pytest.approx((values[n:] ** 2).sum() / (60 * 9), rel=1e-9, abs=1e-15)
        assert found.floor[n] ** 2 == pytest.approx(distances.mean(), rel=1e-9, abs=1e-15)
        assert found.ceiling[n] ** 2 == pytest.approx(distances.max(), rel=1e-9, abs=1e-15)
    assert found.tail[9:].tolist() == [0, 0, 0]


def test_kernel_and_covariance_of_neurons_have_the_same_tails():
    activations = relu(np.random.default_rng(4).standard_normal((30, 12)))
    n = [0, 1, 5, 11, 12, 40]
    by_neurons = neuron_widths(activations.T @ activations / 30, n).tail
    np.testing.assert_allclose(empirical_tail(activations @ activations.T / 12, n), by_neurons, rtol=1e-9, atol=1e-14)


def test_relu_kernel_agrees_with_sampled_neurons():
    points = np.random.default_rng(5).standard_normal((4, 3)) * [[1], [2], [0], [5]]
    w = sphere(400_000, 3, 6)
    values = relu(points @ w.T)
    np.testing.assert_allclose(relu_kernel(points), values @ values.T / len(w), rtol=0.02)
    assert np.all(relu_kernel(points)[2] == 0)


def test_what_is_no_sphere_dimension_kernel_or_activation_is_refused():
    with pytest.raises(ValueError, match="dimension must be at least 2"):
        relu_spectrum(1)
    with pytest.raises(ValueError, match="max_degree must be at least 1"):
        relu_spectrum(3, 0)
    with pytest.raises(ValueError, match="more than 1e308"):
        harmonic_counts(2000, 2000)
    with pytest.raises(ValueError, match="zero everywhere"):
        sphere_spectrum(lambda t: 0 * t, 3)
    with pytest.raises(ValueError, match="too rough"):
        sphere_spectrum(lambda t: np.maximum(t - 0.3, 0), 3)
    with pytest.raises(ValueError, match="finite values"):
        sphere_spectrum(lambda t: np.where(t > 0.9, np.nan, t), 3)
    with pytest.raises(ValueError, match="finite values"):
        sphere_spectrum(np.sum, 3)
    with pytest.raises(ValueError, match="finite, non-empty matrix"):
        relu_kernel([1.0, 2.0])
    with pytest.raises(ValueError, match="kernel must be symmetric"):
        empirical_tail([[1.0, 0.5], [0.0, 1.0]], [1])
    with pytest.raises(ValueError, match="positive semidefinite"):
        neuron_widths([[1.0, 2.0], [2.0, 1.0]], [1])
    for n in ([-1], [0.5], 3, [[1]]):
        with pytest.raises(ValueError, match="n must be a vector"):
            widths(relu_spectrum(3), n)


def test_results_show_themselves():
    spectrum = relu_spectrum(5, 4)
    assert json.loads(spectrum.to_json())["degrees"] == [0, 1, 2, 4]
    assert "d = 5" in str(spectrum)
    found = widths(spectrum, [1, 6])
    assert [record["n"] for record in found.to_records()] == [1, 6]
    assert json.loads(found.to_json())["tail"] == found.tail.tolist()
    assert str(found).count("\n") == 4
