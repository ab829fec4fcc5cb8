"""Near-low-rank weights: fits, covers, truncation, r_hat, and the bound of the original network built from them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from specprune.bounds.bound import ORIGINAL
from specprune.bounds.low_rank import (
    DecayFit,
    SpectralLayer,
    fit_decay,
    low_rank_bound,
    low_rank_cover,
    rank_profile,
    truncate,
    truncation_error,
)
from specprune.bounds.occam import integer_code_length
from specprune.bounds.symbolic_uncompressed import low_rank_distance, statements
from specprune.bounds.uncompressed import LossPair, pair_bound, uncompressed_bound

STATEMENTS = {item.name: item for item in statements()}
PAIR = LossPair(n=10**6, gamma=1.0, original=0.1, compressed=0.11, loss_distance=0.02, output_distance=0.01)


def power_layer(outputs, inputs, alpha=1.5, scale=1.0, biases=0, bias_norm=0.0):
    values = scale * np.arange(1.0, min(outputs, inputs) + 1) ** -alpha
    return SpectralLayer(outputs, inputs, biases, values, bias_norm)


LAYERS = [power_layer(30, 20, biases=30, bias_norm=0.3), power_layer(10, 30, alpha=2.0)]


def random_network(seed, sizes=(7, 9, 6, 4)):
    generator = np.random.default_rng(seed)
    return [
        (
            scipy.stats.ortho_group.rvs(b, random_state=generator)[:, : min(a, b)]
            * (generator.uniform(0.5, 2) * np.arange(1.0, min(a, b) + 1) ** -generator.uniform(0.3, 2))
            @ scipy.stats.ortho_group.rvs(a, random_state=generator)[: min(a, b)],
            generator.standard_normal(b),
        )
        for a, b in itertools.pairwise(sizes)
    ]


def forward(parameters, x):
    for k, (w, b) in enumerate(parameters):
        x = x @ w.T + b
        if k < len(parameters) - 1:
            x = np.maximum(x, 0)
    return x


def spectral(parameters):
    return [
        SpectralLayer(*w.shape, len(b), np.linalg.svd(w, compute_uv=False), float(np.linalg.norm(b)))
        for w, b in parameters
    ]


# Fits


@pytest.mark.parametrize("exponent", [0.3, 1.0, 3.7])
def test_exact_power_laws_are_recovered(exponent):
    fit = fit_decay(2.5 * np.arange(1.0, 41) ** -exponent)
    assert fit.exponent == pytest.approx(exponent, rel=1e-10)
    assert fit.scale == pytest.approx(2.5, rel=1e-10)
    assert fit.r_squared == pytest.approx(1)
    assert fit.standard_error == pytest.approx(0, abs=1e-10)


def test_fit_against_scipy():
    generator = np.random.default_rng(0)
    values = np.sort(np.arange(1.0, 61) ** -0.8 * np.exp(0.3 * generator.standard_normal(60)))[::-1]
    for first, last in ((1, None), (3, 50)):
        fit = fit_decay(values, first, last)
        chosen = slice(first - 1, last)
        line = scipy.stats.linregress(np.log(np.arange(1, 61)[chosen]), np.log(values[chosen]))
        assert fit.exponent == pytest.approx(-line.slope, rel=1e-10)
        assert fit.standard_error == pytest.approx(line.stderr, rel=1e-8)
        assert fit.r_squared == pytest.approx(line.rvalue**2, rel=1e-8)
        ceiling = fit.scale * np.arange(1.0, 61) ** -fit.exponent
        assert np.all(values <= ceiling)
        assert np.max(values / ceiling) == pytest.approx(1, abs=1e-9)  # and it is the smallest such scale
    assert fit_decay([3.0, 1.0]).standard_error is None
    assert "standard_error" in str(fit_decay(values))
    with pytest.raises(ValueError, match="does not decay"):
        fit_decay([1.0, 1.0, 1.0])


# Truncation


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_truncation_against_numpy(shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in range(1, 5):
        cut, error = truncate(matrix, rank)
        assert np.linalg.matrix_rank(cut) == rank
        assert error == pytest.approx(values[rank], rel=1e-12)
        assert np.linalg.norm(matrix - cut, 2) == pytest.approx(error, rel=1e-10)
        assert np.linalg.norm(matrix - cut) == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-10)
    whole, error = truncate(matrix, 99)
    assert np.array_equal(whole, matrix)
    assert error == 0
    for bad in (np.zeros(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite with shape"):
            truncate(bad, 1)
    with pytest.raises(ValueError, match="rank"):
        truncate(matrix, 0)


@pytest.mark.parametrize("seed", range(8))
def test_truncated_networks_stay_below_both_ceilings(seed):
    network = random_network(seed)
    layers = spectral(network)
    fits = [fit_decay(layer.singular_values) for layer in layers]
    x = np.random.default_rng(seed).standard_normal((400, 7))
    radius = float(np.linalg.norm(x, axis=1).max())
    seen = []
    for ranks in [(1, 1, 1), (2, 3, 1), (7, 2, 4), (4, 4, 3), (7, 6, 4)]:
        cut = [(truncate(w, rank)[0], b) for (w, b), rank in zip(network, ranks, strict=True)]
        gap = float(np.linalg.norm(forward(network, x) - forward(cut, x), axis=1).max())
        error = truncation_error(layers, ranks, fits, radius)
        assert gap <= error.tails * (1 + 1e-9) + 1e-12
        assert error.tails <= error.power_law * (1 + 1e-9)
        seen.append(error.tails)
    assert seen[-1] == 0  # full ranks move nothing
    assert seen[0] > seen[3] > 0


def test_r_hat_with_equal_constants_is_the_paper_s():
    layers = [power_layer(9, 9, alpha=1.2, scale=1.7) for _ in range(4)]
    fits = [DecayFit(1.2, None, 1.7, 1.0, 1, 9)] * 4
    error = truncation_error(layers, [2, 3, 5, 8], fits, 3.0)
    assert error.power_law == pytest.approx(1.7 * 1.7**3 * 3.0 * sum(s**-1.2 for s in (2, 3, 5, 8)), rel=1e-12)
    assert low_rank_distance(4).lambdify()(1.7, 1.7, 3.0, 1.2, 2, 3, 5, 8) == pytest.approx(error.power_law, rel=1e-12)
    assert error.tails == pytest.approx(1.7**4 * 3.0 * sum((s + 1) ** -1.2 for s in (2, 3, 5, 8)), rel=1e-12)
    huge = [power_layer(9, 9, scale=1e200) for _ in range(4)]
    assert truncation_error(huge, [2] * 4, [DecayFit(1.5, None, 1e200, 1.0, 1, 9)] * 4, 1.0).power_law == math.inf


# The cover


def test_factors_move_products_as_the_proof_says():
    """||AB - A'B'|| <= 2 e R for factors of norm sqrt(R), each within e sqrt(R)."""
    generator = np.random.default_rng(2)
    for _ in range(200):
        r = generator.uniform(0.1, 5)

        def ball(shape, r=r):
            matrix = generator.standard_normal(shape)
            return matrix * math.sqrt(r) / np.linalg.norm(matrix, 2)

        a, b = ball((5, 2)), ball((2, 6))
        c = ball((5, 2)) if generator.random() < 0.2 else a * (1 - generator.uniform(0, 0.5))
        d = ball((2, 6)) if generator.random() < 0.2 else b * (1 - generator.uniform(0, 0.5))
        e = max(np.linalg.norm(a - c, 2), np.linalg.norm(b - d, 2)) / math.sqrt(r)
        assert np.linalg.norm(a @ b - c @ d, 2) <= 2 * e * r * (1 + 1e-12)
        left, values, right = np.linalg.svd(a @ b, full_matrices=False)
        half = (left * np.sqrt(values), np.sqrt(values)[:, None] * right)
        assert max(np.linalg.norm(x, 2) for x in half) <= math.sqrt(r) * (1 + 1e-9)


def test_cover_is_no_smaller_than_a_packing():
    """Points further apart than epsilon need different centres of an epsilon/2-cover: a lower limit on N."""
    generator = np.random.default_rng(3)
    for m, p in ((1, 1), (2, 2), (1, 3)):
        epsilon, chosen = 0.5, []
        for _ in range(1500):
            a, b = generator.standard_normal(p), generator.standard_normal(m)
            point = np.outer(a, b) / np.linalg.norm(a) / np.linalg.norm(b) * generator.uniform(0, 1) ** 0.5
            if all(np.linalg.norm(point - other, 2) > epsilon for other in chosen):
                chosen.append(point)
        assert len(chosen) > 2
        assert math.log(len(chosen)) <= low_rank_cover(1, p, m, math.log(1 / (epsilon / 2)))


@given(st.integers(1, 30), st.integers(1, 30), st.floats(-1, 40), st.data())
def test_cover_by_hand_and_below_the_usual_one(p, m, log_ratio, data):
    rank = data.draw(st.integers(1, min(m, p)))
    nats = low_rank_cover(rank, p, m, log_ratio)
    ratio = math.exp(log_ratio)
    assert nats == pytest.approx(min(rank * (m + p) * math.log(1 + 4 * ratio), m * p * math.log(1 + 2 * ratio)))
    if ratio >= 1 / 3:
        assert nats <= rank * (m + p + 1) * math.log(9 * ratio) + 1e-9
    formula = STATEMENTS["low_rank_cover"].lambdify()(rank, p, m, ratio, 1.0)
    assert nats <= formula * (1 + 1e-12)
    if 2 * rank <= min(m, p) / 2:
        assert nats == pytest.approx(formula, rel=1e-12)
    with pytest.raises(ValueError, match="at most min"):
        low_rank_cover(min(m, p) + 1, p, m, 1.0)
    assert math.isfinite(low_rank_cover(rank, p, m, 1e6))


# The bound


def test_low_rank_bound_by_hand():
    """One layer and one candidate at full rank of F's cut: every part written out."""
    layer = power_layer(4, 3, alpha=0.01, scale=1.9, biases=4, bias_norm=0.4)
    bound = low_rank_bound([layer], [([1], PAIR)], input_radius=3.0, delta=0.05)
    ratio = 2.0 * 3.0 * 2 * math.sqrt(2) * PAIR.n  # s D 2L / epsilon, and B 2L / epsilon below
    shifts = 4 * math.log1p(2 * 0.5 * 2 * math.sqrt(2) * PAIR.n)
    log_g = min(7 * math.log1p(4 * ratio), 12 * math.log1p(2 * ratio)) + shifts
    log_f = 12 * math.log1p(2 * ratio) + shifts
    price = integer_code_length(0) + integer_code_length(1) + integer_code_length(-1) + math.log(3)
    expected = pair_bound(
        PAIR,
        log_original=log_f,
        log_compressed=log_g,
        delta=0.05,
        price_original=math.log(3),
        price_compressed=price,
        slack_original=1e-6,
        slack_compressed=1e-6,
    )
    assert bound.terms == pytest.approx(expected.terms)
    assert (bound.covers, bound.confidence) == (ORIGINAL, 0.95)


def test_low_rank_bound_with_a_cut():
    """F cut at rank 1: the tail rounded up to 2^-7 enters as slack, its exponent as price."""
    values = np.array([1.0, 0.007, 0.006, 0.005, 0.004, 0.003, 0.002, 0.001])
    layer, pair = SpectralLayer(8, 8, 0, values, 0.0), replace(PAIR, n=3000)
    bound = low_rank_bound([layer], [([1], pair)], input_radius=1.0, delta=0.05)
    nats = 16 * math.log1p(4 * 2 * math.sqrt(2) * 3000)
    price = integer_code_length(0) * 2 + math.log(8)
    cut = pair_bound(
        pair,
        log_original=nats,
        log_compressed=nats,
        delta=0.05,
        price_original=math.log(8) + integer_code_length(-7),
        price_compressed=price,
        slack_original=1 / 3000 + math.sqrt(2) * 2**-7,
        slack_compressed=1 / 3000,
    )
    assert bound.value == pytest.approx(cut.value, rel=1e-12)
    assert bound.value < low_rank_bound([layer], [([8], pair)], input_radius=1.0, delta=0.05).value


def test_the_best_candidate_is_taken():
    near = replace(PAIR, loss_distance=0.001, compressed=0.1)
    candidates = [([1, 1], replace(PAIR, loss_distance=0.4)), ([5, 3], near), ([20, 10], near)]
    values = [low_rank_bound(LAYERS, [c], input_radius=2.0, delta=0.05).value for c in candidates]
    assert low_rank_bound(LAYERS, candidates, input_radius=2.0, delta=0.05).value == min(values)
    assert values[1] == min(values)


def test_low_rank_beats_the_plain_cover_and_says_something():
    from specprune.bounds.covering import LayerSize

    layers = [power_layer(300, 200, alpha=4.0), power_layer(10, 300, alpha=4.0)]
    sizes = [LayerSize(layer.outputs * layer.inputs, 0, 1.0, 0.0) for layer in layers]
    low = low_rank_bound(layers, [([3, 3], PAIR)], input_radius=1.0, delta=0.05)
    plain = uncompressed_bound(sizes, sizes, PAIR, input_radius=1.0, delta=0.05)
    assert plain.value > 2 * low.value
    assert not low.vacuous


def test_low_rank_bound_is_monotone():
    base = low_rank_bound(LAYERS, [([3, 2], PAIR)], input_radius=2.0, delta=0.05)
    assert not base.vacuous
    larger = [replace(layer, singular_values=4 * layer.singular_values) for layer in LAYERS]
    for layers, pair, radius, delta in (
        (larger, PAIR, 2.0, 0.05),
        (LAYERS, replace(PAIR, n=10**5), 2.0, 0.05),
        (LAYERS, replace(PAIR, loss_distance=0.3), 2.0, 0.05),
        (LAYERS, PAIR, 9.0, 0.05),
        (LAYERS, PAIR, 2.0, 0.01),
    ):
        assert low_rank_bound(layers, [([3, 2], pair)], input_radius=radius, delta=delta).value > base.value
    steps = [low_rank_bound(LAYERS, [([r, r], PAIR)], input_radius=2.0, delta=0.05).value for r in (1, 3, 5)]
    assert steps == sorted(steps)


def test_permuting_nodes_changes_nothing():
    network = random_network(4)
    order = np.random.default_rng(0).permutation(9)
    (w1, b1), (w2, b2), last = network
    moved = [(w1[order], b1[order]), (w2[:, order], b2), last]
    values = [
        low_rank_bound(spectral(net), [([2, 2, 2], PAIR)], input_radius=4.0, delta=0.05).value
        for net in (network, moved)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_hypotheses_report_r_hat_next_to_the_measured_distance():
    bound = low_rank_bound(LAYERS, [([3, 2], PAIR)], input_radius=2.0, delta=0.05, measured_radius=1.5)
    assert bound.valid
    assert [h.value for h in bound.hypotheses] == [1.5, 0.01, 0.01]
    assert "r_hat" in bound.hypotheses[1].statement
    assert "(3, 2)" in bound.hypotheses[1].statement
    # A distance above what truncation can do shows that the pair is not of this network.
    wrong = low_rank_bound(LAYERS, [([3, 2], replace(PAIR, output_distance=50.0))], input_radius=2.0, delta=0.05)
    assert not wrong.valid
    flat = SpectralLayer(3, 3, 0, np.ones(3), 0.0)
    assert low_rank_bound([flat], [([3], replace(PAIR, output_distance=0.0))], input_radius=1.0, delta=0.05).valid


def test_extremes_stay_finite():
    for scale in (1e300, 1e-300, 0.0):
        layers = [power_layer(9, 9, scale=scale)] * 5
        bound = low_rank_bound(layers, [([2] * 5, PAIR)], input_radius=1.0, delta=0.05)
        assert math.isfinite(bound.value)


def test_rank_profile():
    layer = SpectralLayer(4, 5, 0, np.array([2.0, 1.0, 0.5, 0.1]), 0.0)
    assert [rank_profile([layer], level)[0] for level in (0.0, 0.05, 0.2, 0.25, 0.5, 0.9)] == [4, 3, 3, 2, 1, 1]
    assert rank_profile([SpectralLayer(2, 2, 0, np.zeros(2), 0.0)], 0.1) == (1,)


def test_refusals():
    with pytest.raises(ValueError, match="singular values"):
        SpectralLayer(3, 4, 0, np.ones(4), 0.0)
    with pytest.raises(ValueError, match="at least one pair"):
        low_rank_bound(LAYERS, [], input_radius=1.0, delta=0.05)
    with pytest.raises(ValueError, match="one entry for each"):
        low_rank_bound(LAYERS, [([1], PAIR)], input_radius=1.0, delta=0.05)
    with pytest.raises(ValueError, match="at most min"):
        low_rank_bound(LAYERS, [([99, 1], PAIR)], input_radius=1.0, delta=0.05)
    with pytest.raises(ValueError, match="fits"):
        truncation_error(LAYERS, [1, 1], [], 1.0)
    with pytest.raises(ValueError, match="depth"):
        low_rank_distance(0)
