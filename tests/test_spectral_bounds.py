"""Sampling and approximation theorems: coverage by Monte Carlo, identities, and the order of the error bounds."""

import itertools
import math

import numpy as np
import pytest
from scipy.linalg import eigh

from specprune.bounds.degrees_of_freedom import degrees_of_freedom, eigenvalues, leverage_scores
from specprune.bounds.spectral import (
    Feasibility,
    WeightedNodes,
    approximation_a_priori,
    approximation_certificate,
    feasibility,
    margin_transfer,
    paper_width,
    prune_dense_layer,
    reconstruction_matrix,
    residual_covariance,
    row_norm_bound,
    sample_nodes,
    samples_needed,
    sampling_failure_probability,
    weighted_nodes,
)

SIZE = 50


def spectrum_covariance(kind, seed=0, size=SIZE):
    """Four ways a layer can look; orthogonal nodes are the hardest, for none can stand in for another."""
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.standard_normal((size, size)))
    j = np.arange(1, size + 1.0)
    if kind == "power":
        return rotation * j**-2.0 @ rotation.T
    if kind == "exponential":
        return rotation * np.exp(-0.5 * j) @ rotation.T
    if kind == "orthogonal":
        return np.diag(generator.uniform(0.5, 1.0, size))
    low = generator.standard_normal((size, 4)) * np.exp(generator.normal(0, 1, (size, 1)))
    return low @ low.T / size + np.diag(np.exp(generator.normal(-3, 2, size)))


KINDS = ["power", "exponential", "heterogeneous", "orthogonal"]
CASES = [(kind, share) for kind in KINDS for share in (1e-1, 1e-2)]


def draw_conditions(covariance, lam, samples, draws, seed):
    scores = leverage_scores(covariance, lam)
    generator = np.random.default_rng(seed)
    results = [
        feasibility(covariance, weighted_nodes(sample_nodes(scores, samples, generator), scores), lam)
        for _ in range(draws)
    ]
    return np.array([item.c for item in results]), np.array([item.s for item in results])


@pytest.mark.parametrize("form", ["bach", "explicit"])
@pytest.mark.parametrize("delta", [0.2, 0.05])
@pytest.mark.parametrize(("kind", "share"), CASES)
def test_sampling_theorem_covers(kind, share, delta, form):
    covariance = spectrum_covariance(kind)
    mu = eigenvalues(covariance)
    lam = share * mu[0]
    samples = samples_needed(degrees_of_freedom(mu, lam), delta, form=form, ratio=share)
    c, _ = draw_conditions(covariance, lam, samples, draws=300, seed=1)
    assert np.mean(c > 4) <= delta
    # The certified probability at this size must be what was asked for.
    assert sampling_failure_probability(degrees_of_freedom(mu, lam), samples, share) <= delta


@pytest.mark.parametrize(("kind", "share"), [case for case in CASES if case != ("power", 1e-1)])
def test_too_few_samples_fail_often(kind, share):
    """The coverage test can fail: N draws are not enough."""
    covariance = spectrum_covariance(kind)
    mu = eigenvalues(covariance)
    dof = degrees_of_freedom(mu, share * mu[0])
    c, _ = draw_conditions(covariance, share * mu[0], math.ceil(dof), draws=200, seed=2)
    assert np.mean(c > 4) > 0.2
    assert sampling_failure_probability(dof, math.ceil(dof), share) == 1.0


@pytest.mark.parametrize(("kind", "share"), CASES)
def test_failure_probability_bounds_the_frequency_at_every_size(kind, share):
    covariance = spectrum_covariance(kind)
    mu = eigenvalues(covariance)
    dof = degrees_of_freedom(mu, share * mu[0])
    for factor in (2, 6, 12):
        samples = math.ceil(factor * dof)
        c, _ = draw_conditions(covariance, share * mu[0], samples, draws=100, seed=3)
        ceiling = sampling_failure_probability(dof, samples, share)
        assert np.mean(c > 4) <= ceiling + 3 * math.sqrt(0.25 / 100) * (ceiling < 1)


@pytest.mark.parametrize(("kind", "share"), CASES)
def test_both_conditions_hold_with_probability_one_fifth(kind, share):
    covariance = spectrum_covariance(kind)
    mu = eigenvalues(covariance)
    width = paper_width(degrees_of_freedom(mu, share * mu[0]))
    c, s = draw_conditions(covariance, share * mu[0], width, draws=200, seed=4)
    assert np.mean(s <= 5 / 3) >= 2 / 5
    assert np.mean((c <= 4) & (s <= 5 / 3)) >= 1 / 5
    assert s.mean() == pytest.approx(1.0, abs=0.2)  # E s = 1 exactly


def test_sample_counts():
    assert samples_needed(10.0, 0.2) == math.ceil(32 / 9 * 10.25 * math.log(4 * 10 * 2 / 0.2))
    assert samples_needed(10.0, 0.2, form="bach") == paper_width(10.0) == math.ceil(50 * math.log(800))
    assert samples_needed(0.5, 0.9) >= 1
    for dof in np.linspace(0.5, 200, 300):  # the claimed implication bach => explicit
        for delta in (2e-4, 0.01, 0.2, 0.99):
            assert samples_needed(dof, delta, form="bach") >= samples_needed(dof, delta)


def test_bernstein_side_condition_costs_nothing():
    """Where t >= sqrt(v) + L/3 fails (t = 3/4, v = N/M, L = 1/M), the formula claims nothing anyway."""
    for dof in np.geomspace(0.01, 300, 200):
        ratio = max(0.0, 1 / dof - 1)  # the smallest that a covariance with this N allows
        for samples in (1, 2, 3, 5, 10, 50, 200, 500):
            if math.sqrt(dof / samples) + 1 / (3 * samples) > 3 / 4:
                assert sampling_failure_probability(dof, samples, ratio) == 1.0


def test_samples_needed_refuses():
    with pytest.raises(ValueError, match="use form='explicit'"):
        samples_needed(10.0, 0.2, form="bach", ratio=2.0)
    with pytest.raises(ValueError, match="use form='explicit'"):
        samples_needed(10.0, 1e-5, form="bach")
    with pytest.raises(ValueError, match="no covariance allows"):
        samples_needed(0.1, 0.2)
    with pytest.raises(ValueError, match="'bach' or 'explicit'"):
        samples_needed(10.0, 0.2, form="other")
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            samples_needed(10.0, delta)


def test_merged_draws_equal_the_multiset():
    covariance = spectrum_covariance("power")
    lam = 0.01
    scores = leverage_scores(covariance, lam)
    draws = sample_nodes(scores, 60, np.random.default_rng(5))
    assert len(np.unique(draws)) < len(draws)
    # Twin: every draw its own row and column, tau = lambda M q.
    gram = covariance[np.ix_(draws, draws)] + np.diag(lam * len(draws) * scores[draws])
    twin_mix = np.linalg.solve(gram, covariance[draws]).T
    twin_residual = covariance - twin_mix @ covariance[draws]
    nodes = weighted_nodes(draws, scores)
    np.testing.assert_allclose(residual_covariance(covariance, nodes, lam), twin_residual, atol=1e-10)
    summed = np.stack([twin_mix[:, draws == j].sum(axis=1) for j in nodes.indices], axis=1)
    np.testing.assert_allclose(reconstruction_matrix(covariance, nodes, lam), summed, atol=1e-10)
    # sum over draws of (v_j)^2 / (q_j M) is the weighted norm.
    v = np.random.default_rng(6).standard_normal(SIZE)
    assert np.sum(nodes.weights * v[nodes.indices] ** 2) == pytest.approx(np.mean(v[draws] ** 2 / scores[draws]))


def test_no_pruning_has_unit_weights():
    nodes = weighted_nodes(np.arange(5), np.full(5, 0.2))
    np.testing.assert_allclose(nodes.weights, 1.0)
    covariance = spectrum_covariance("power", size=5)
    small = feasibility(covariance, nodes, 1e-9)
    assert small.s == pytest.approx(1.0)
    assert small.c <= 1 + 1e-3  # lambda S / (S + lambda) < lambda
    assert small.holds


def test_residual_is_the_worst_ridge_error():
    """Identity (P): the sup over unit z of the ridge problem is lambda_max of the residual, reached by A' z."""
    covariance = spectrum_covariance("heterogeneous", size=12)
    lam = 0.05
    scores = leverage_scores(covariance, lam)
    nodes = weighted_nodes([0, 3, 3, 7], scores)
    residual = residual_covariance(covariance, nodes, lam)
    mix = reconstruction_matrix(covariance, nodes, lam)

    def objective(z, alpha):
        error = z.copy()
        error[nodes.indices] -= alpha
        return error @ covariance @ error + lam * np.sum(alpha**2 / nodes.weights)

    generator = np.random.default_rng(7)
    values, vectors = np.linalg.eigh(residual)
    for _ in range(20):
        z = generator.standard_normal(12)
        z /= np.linalg.norm(z)
        best = objective(z, mix.T @ z)
        assert best == pytest.approx(z @ residual @ z, rel=1e-10)
        assert best <= values[-1] * (1 + 1e-10)
        assert objective(z, mix.T @ z + 1e-3 * generator.standard_normal(len(nodes.indices))) > best
    assert objective(vectors[:, -1], mix.T @ vectors[:, -1]) == pytest.approx(values[-1], rel=1e-10)
    assert feasibility(covariance, nodes, lam).c == pytest.approx(values[-1] / lam, rel=1e-9)


def random_network(seed):
    """A ReLU network with decaying weights, inputs, and the activations entering each prunable layer."""
    generator = np.random.default_rng(seed)
    sizes = [10, 32, 32, 32, 4]
    weights = [
        generator.standard_normal((b, a)) * np.arange(1, b + 1)[:, None] ** -0.4 / math.sqrt(a)
        for a, b in itertools.pairwise(sizes)
    ]
    biases = [0.1 * generator.standard_normal(b) for b in sizes[1:]]
    x = generator.standard_normal((400, 10)) * np.arange(1, 11) ** -1.0
    return weights, biases, x


def forward(weights, biases, x):
    hidden = []
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = x @ w.T + b
        if k < len(weights) - 1:
            x = np.maximum(x, 0)
            hidden.append(x)
    return x, hidden


@pytest.mark.parametrize("choice", ["leverage", "every second node"])
@pytest.mark.parametrize("share", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_error_below_certificate_below_a_priori(seed, share, choice):
    weights, biases, x = random_network(seed)
    output, hidden = forward(weights, biases, x)
    generator = np.random.default_rng(100 + seed)
    covariances = [h.T @ h / len(h) for h in hidden]
    lams = [share * np.trace(s) for s in covariances]
    scores = [leverage_scores(s, lam) for s, lam in zip(covariances, lams, strict=True)]
    chosen = [
        sample_nodes(q, paper_width(max(0.5, degrees_of_freedom(eigenvalues(s), lam))), generator)
        if choice == "leverage"
        else np.argsort(-q)[: len(q) // 2]
        for q, s, lam in zip(scores, covariances, lams, strict=True)
    ]
    nodes = [weighted_nodes(draws, q) for draws, q in zip(chosen, scores, strict=True)]
    conditions = [feasibility(s, j, lam) for s, j, lam in zip(covariances, nodes, lams, strict=True)]

    following = [*nodes[1:], None]
    consumers = [
        prune_dense_layer(w, s, j, lam, after)
        for w, s, j, lam, after in zip(weights[1:], covariances, nodes, lams, following, strict=True)
    ]
    small_weights, small_biases = [weights[0][nodes[0].indices]], [biases[0][nodes[0].indices]]
    for k, after in enumerate(following):
        kept = slice(None) if after is None else after.indices
        small_weights.append(weights[k + 1][kept] @ reconstruction_matrix(covariances[k], nodes[k], lams[k]))
        small_biases.append(biases[k + 1][kept])
    small_output, _ = forward(small_weights, small_biases, x)

    measured = math.sqrt(np.mean(np.sum((output - small_output) ** 2, axis=1)))
    certificate = approximation_certificate([c.local_error for c in consumers], [c.gain for c in consumers])
    norms = [row_norm_bound(w, last=k == 2) for k, w in enumerate(weights[1:])]
    prior = approximation_a_priori(lams, norms, feasibilities=conditions, constants="measured")
    assert measured <= certificate.value * (1 + 1e-10)
    assert certificate.value <= prior.value  # measured c and s: for ANY choice of nodes
    theory = approximation_a_priori(lams, norms, feasibilities=conditions)
    assert theory.valid == all(item.holds for item in conditions)
    if theory.valid:
        assert prior.value <= theory.value * (1 + 1e-12)
    assert certificate.value == pytest.approx(sum(certificate.terms.values()))


@pytest.mark.parametrize("last", [False, True])
def test_local_error_and_gain_match_their_definitions(last):
    generator = np.random.default_rng(12)
    phi = np.maximum(generator.standard_normal((300, 8)) @ generator.standard_normal((8, 8)), 0)
    covariance, lam = phi.T @ phi / len(phi), 0.5
    weight = generator.standard_normal((5, 8))
    nodes = weighted_nodes([0, 2, 2, 5, 7], leverage_scores(covariance, lam))
    after = None if last else WeightedNodes(np.array([1, 3, 4]), np.array([0.3, 2.0, 5.0]))
    layer = prune_dense_layer(weight, covariance, nodes, lam, after)
    rows, omega = (np.arange(5), np.ones(5)) if after is None else (after.indices, after.weights)
    small = weight[rows] @ reconstruction_matrix(covariance, nodes, lam)
    gap = phi @ weight[rows].T - phi[:, nodes.indices] @ small.T
    assert layer.local_error == pytest.approx(math.sqrt(np.mean(np.sum(omega * gap**2, axis=1))), rel=1e-10)
    # The gain is the largest ratio of the weighted norms: the top generalised eigenvalue of the two quadratic forms.
    ratios = eigh(small.T @ np.diag(omega) @ small, np.diag(nodes.weights), eigvals_only=True)
    assert layer.gain == pytest.approx(math.sqrt(ratios[-1]), rel=1e-10)


def test_a_priori_by_hand():
    good = [Feasibility(1.0, 1.2, True), Feasibility(4.0, 1.5, True)]
    bound = approximation_a_priori([0.04, 0.09], [3.0, 2.0], feasibilities=good)
    last = 2 * 2.0
    first = math.sqrt(20 / 3) * 3.0
    assert bound.value == pytest.approx(first * last * 0.2 + last * 0.3)
    assert bound.valid
    measured = approximation_a_priori([0.04, 0.09], [3.0, 2.0], feasibilities=good, constants="measured")
    assert measured.value == pytest.approx(math.sqrt(1.5) * 3.0 * (2 * 2.0) * 0.2 + 4.0 * 0.3)
    wide = approximation_a_priori([0.04], [2.0], scales=[4.0], spreads=[9.0])
    assert wide.value == pytest.approx(2 * 3 * 2.0 * 0.2 * 4.0)


def test_a_priori_reports_broken_and_unmeasured_hypotheses():
    broken = approximation_a_priori([0.1], [1.0], feasibilities=[Feasibility(817.0, 1.0, False)])
    assert not broken.valid
    assert "BROKEN: c_1 <= 4" in str(broken)
    unmeasured = approximation_a_priori([0.1], [1.0], output_norm=0.1)
    assert not unmeasured.valid
    assert unmeasured.vacuous
    assert "not measured" in str(unmeasured)


def test_certificate_by_hand_and_overflow():
    bound = approximation_certificate([1.0, 2.0, 3.0], [100.0, 0.5, 4.0], output_norm=20.0)
    assert bound.terms == pytest.approx({"layer_1": 2.0, "layer_2": 8.0, "layer_3": 3.0})
    assert not bound.vacuous
    huge = approximation_certificate([1.0, 0.0, 0.0, 0.0], [1.0, 1e200, 1e200, 1e200])
    assert huge.value == math.inf
    assert huge.vacuous
    assert approximation_certificate([1.0, 0.5], [1.0, 0.0]).value == 0.5


def test_margin_transfer_bounds_the_ramp_loss():
    from specprune.bounds.covering import ramp_loss

    generator = np.random.default_rng(8)
    for _ in range(200):
        f, g = generator.standard_normal((2, 1, 5))
        gap = abs(ramp_loss(f, [1], 0.7) - ramp_loss(g, [1], 0.7))
        assert gap <= margin_transfer(0.7) * np.linalg.norm(f - g) + 1e-12


def test_refusals():
    covariance = spectrum_covariance("power", size=6)
    with pytest.raises(ValueError, match="leverage score 0"):
        weighted_nodes([0], [0.0, 1.0])
    with pytest.raises(ValueError, match="sum to 1"):
        weighted_nodes([0], [0.5, 0.6])
    with pytest.raises(ValueError, match="distinct"):
        WeightedNodes(np.array([1, 1]), np.ones(2))
    with pytest.raises(ValueError, match="positive"):
        WeightedNodes(np.array([1, 2]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="6 nodes"):
        residual_covariance(covariance, WeightedNodes(np.array([6]), np.ones(1)), 0.1)
    with pytest.raises(ValueError, match="lam"):
        residual_covariance(covariance, WeightedNodes(np.array([0]), np.ones(1)), 0.0)
    with pytest.raises(ValueError, match="columns"):
        prune_dense_layer(np.ones((2, 5)), covariance, WeightedNodes(np.array([0]), np.ones(1)), 0.1)
    with pytest.raises(ValueError, match="one entry a layer"):
        approximation_certificate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="one entry a layer"):
        approximation_a_priori([1.0], [1.0], feasibilities=[])
    with pytest.raises(ValueError, match="needs feasibilities"):
        approximation_a_priori([1.0], [1.0], constants="measured")
