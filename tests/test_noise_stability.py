"""Noise stability: the concentration of random signs with its constant, the compression lemma, the code's Kraft sum."""

import itertools
import math

import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from specprune.bounds.noise_stability import (
    StableLayer,
    compressed_size,
    layer_accuracies,
    margin_accuracy,
    noise_stability_measure,
    projection_failure,
    projections_needed,
)
from specprune.bounds.projection_code import level_count, level_size, padded_size, projection_code_length
from specprune.bounds.symbolic_noise_stability import compressed_size_formula, statements

STATEMENTS = {statement.name: statement for statement in statements()}
ACCURACY = st.floats(1e-6, 3.0)


def all_signs(size):
    return np.array(list(itertools.product((-1.0, 1.0), repeat=size)))


def project(matrix, k, trials, generator):
    """Draw A^ = (1/k) sum <A, M_l> M_l exactly: of the 2^size sign matrices only the counts matter."""
    signs = all_signs(matrix.size)
    counts = generator.multinomial(k, np.full(len(signs), 1 / len(signs)), size=trials)
    return (counts * (signs @ matrix.ravel())) @ signs / k


def pairs():
    """Matrices and directions u v^T, along the matrix, across it and at random."""
    generator = np.random.default_rng(3)
    u, v = generator.normal(size=3), generator.normal(size=3)
    flat = np.outer([1.0, 1, 1], [1.0, 1, 1])
    return {
        "along": (flat, np.ones(3), np.ones(3)),
        "across": (flat - 3 * np.eye(3), np.ones(3), np.ones(3)),
        "random": (generator.normal(size=(3, 3)), u, v),
        "one entry": (np.diag([1.0, 0, 0]), np.array([1.0, 0, 0]), np.array([1.0, 0, 0])),
    }


@pytest.mark.parametrize("name", list(pairs()))
@pytest.mark.parametrize("t", [-0.45, -0.2, -0.01, 0.01, 0.2, 0.45])
def test_exponential_moment_by_enumeration(name, t):
    """The heart of the proof, without sampling error: ln E exp(t (<a,M><b,M> - rho)) <= -ln(1 - 2|t|)/2 - |t|."""
    matrix, u, v = pairs()[name]
    a, b = matrix.ravel(), np.outer(u, v).ravel()
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    signs = all_signs(9)
    moment = math.log(np.mean(np.exp(t * ((signs @ a) * (signs @ b) - a @ b))))
    assert moment <= -math.log1p(-2 * abs(t)) / 2 - abs(t) + 1e-15


def test_lower_part_of_the_proof():
    """The slopes' difference is what the docstring says, and never negative."""
    t = sp.symbols("t", positive=True)
    upper = -sp.log(1 - 2 * t) / 2 - t
    lower = t + sp.log(1 - t + sp.Rational(3, 2) * t**2)
    claimed = (t**2 / 2 + 6 * t**3) / ((1 - 2 * t) * (1 - t + sp.Rational(3, 2) * t**2))
    assert sp.simplify(sp.diff(upper - lower, t) - claimed) == 0
    epsilon = sp.symbols("epsilon", positive=True)
    rate = epsilon * t - upper
    assert sp.simplify(sp.diff(rate, t).subs(t, epsilon / (2 * (1 + epsilon)))) == 0
    best = sp.expand_log(rate.subs(t, epsilon / (2 * (1 + epsilon))).subs(epsilon, sp.Rational(3, 10)))
    assert float(best) == pytest.approx((0.3 - math.log(1.3)) / 2, rel=1e-12)


def miss_rate(name, epsilon, k, trials=5_000):
    matrix, u, v = pairs()[name]
    drawn = project(matrix, k, trials, np.random.default_rng(17)).reshape(-1, 3, 3) - matrix
    found = np.abs(np.einsum("i,tij,j->t", u, drawn, v))
    return np.mean(found > epsilon * np.linalg.norm(matrix) * np.linalg.norm(u) * np.linalg.norm(v))


@pytest.mark.parametrize("name", list(pairs()))
@pytest.mark.parametrize("eta", [0.3, 0.01])
def test_projection_keeps_its_promise(name, eta):
    for epsilon in (0.2, 0.6):
        k = projections_needed(epsilon, eta)
        assert projection_failure(epsilon, k) <= eta
        assert miss_rate(name, epsilon, k) <= eta


@pytest.mark.parametrize("eta", [0.05, 0.01])
def test_remembered_size_is_too_small(eta):
    """With ln(1/eta)/epsilon^2 sign matrices the promise is broken: the test above can fail."""
    assert miss_rate("along", 0.2, math.ceil(math.log(1 / eta) / 0.2**2)) > 3 * eta


def test_leading_constant_cannot_be_improved():
    """For u v^T along A with many entries, k Var = 2: the exponent k epsilon^2/4 of the bound is that of a Gaussian."""
    side = 20
    generator = np.random.default_rng(5)
    sums = generator.choice([-1.0, 1.0], size=(50_000, side * side)).sum(axis=1) / side
    assert np.var(sums**2) == pytest.approx(2, rel=0.05)
    assert 2 * math.log(2 / 0.01) / projections_needed(1e-4, 0.01) == pytest.approx(1e-8 / 2, rel=1e-3)


@given(ACCURACY, ACCURACY, st.integers(1, 10**6), st.integers(1, 10**6))
def test_failure_falls_with_accuracy_and_size(e1, e2, k1, k2):
    low, high = projection_failure(max(e1, e2), max(k1, k2)), projection_failure(min(e1, e2), min(k1, k2))
    assert low <= high * (1 + 1e-9)


@given(ACCURACY, ACCURACY, st.floats(1e-9, 0.99), st.floats(1e-9, 0.99))
def test_size_grows_with_demands(e1, e2, eta1, eta2):
    much = projections_needed(min(e1, e2), min(eta1, eta2))
    assert much >= projections_needed(max(e1, e2), max(eta1, eta2)) * (1 - 1e-9)
    assert much >= 4 * math.log(2 / min(eta1, eta2)) / min(e1, e2) ** 2 * (1 - 1e-9)


def test_small_accuracies_lose_no_digits():
    with_digits = sp.Float("1e-7", 60) - sp.log(1 + sp.Float("1e-7", 60))
    assert projections_needed(1e-7, 0.1) == pytest.approx(float(2 * math.log(20) / with_digits), rel=1e-12)
    # Both branches meet.
    assert projections_needed(0.01 + 1e-15, 0.1) == pytest.approx(projections_needed(0.01, 0.1), rel=1e-9)
    assert projections_needed(1e-150, 5e-324) > 1e299


def three_layers():
    return [
        StableLayer(300, 20, 0.4, 0.3),
        StableLayer(160, 8, 0.5, 0.6, overlap=9),
        StableLayer(24, 3, 0.7),
    ]


def size(layers=None, **changes):
    setting = {"contraction": 1.4, "smoothness": 20.0, "n": 50, "epsilon": 0.5, "delta": 0.05, **changes}
    return compressed_size(three_layers() if layers is None else layers, **setting)


def test_compressed_size_by_hand():
    result = size()
    share = 0.5 / (3 * 3 * (1 + 1.4 * 0.5))
    forward = [1 / math.sqrt(20), 1 / math.sqrt(8), 1 / math.sqrt(3)]
    wanted = [share * 0.4 * forward[0], share * 0.5 * forward[1] / 3, share * 0.7 * forward[2]]
    np.testing.assert_allclose(result.accuracies, wanted, rtol=1e-14)
    eta = 0.05 / (50 * (20 + 2 * 8 + 3 * 3))
    assert result.sizes == tuple(projections_needed(value, eta) for value in wanted)
    assert result.total == sum(result.sizes)
    assert result.useful == 300 + 160 + 24
    assert result.valid
    assert not size(smoothness=8.9).valid
    assert "no bound" in str(result)
    assert '"valid": true' in result.to_json()


def test_compressed_size_moves_the_right_way():
    base = size().total
    assert size(epsilon=0.6).total < base < size(epsilon=0.4).total
    assert size(delta=0.1).total < base < size(delta=0.01).total
    assert size(contraction=1.2).total < base < size(contraction=2.0).total
    assert size(n=40).total < base < size(n=60).total
    for index in range(3):
        layers = three_layers()
        layer = layers[index]
        layers[index] = StableLayer(layer.weights, layer.outputs, layer.layer_cushion / 2, 0.01, layer.overlap)
        assert size(layers).total > base


def test_degenerate_layers():
    zero = [StableLayer(4, 2, 0.0, 0.5), StableLayer(4, 2, 0.5)]
    assert size(zero).total == math.inf
    assert size(zero).useful == 8
    assert size([StableLayer(4, 2, math.inf)]).total == 1
    assert size([StableLayer(4, 2, 1e-160)]).total == math.inf
    assert size(contraction=math.inf).total == math.inf
    assert noise_stability_measure(zero, contraction=1.0, output_norm=1.0, gamma=1.0, n=10) == math.inf
    tiny = [StableLayer(4, 2, 1e-200, 1e-200)]
    assert noise_stability_measure(tiny, contraction=1.0, output_norm=1.0, gamma=1.0, n=10) == math.inf
    small = [StableLayer(4, 1, 1e-120, 1e-120)] * 3
    assert noise_stability_measure(small, contraction=1.0, output_norm=1.0, gamma=1.0, n=9) == pytest.approx(
        math.sqrt(3) * 1e240, rel=1e-12
    )


def test_measure_by_hand():
    value = noise_stability_measure(three_layers(), contraction=1.4, output_norm=5.0, gamma=0.5, n=50)
    forward = [1 / math.sqrt(20), 1 / math.sqrt(8), 1 / math.sqrt(3)]
    total = sum(o / (mu * f) ** 2 for o, mu, f in zip((1, 9, 1), (0.4, 0.5, 0.7), forward, strict=True))
    assert value == pytest.approx(math.sqrt(1.4**2 * 9 * 25 * total / (0.25 * 50)), rel=1e-12)


def linear_cushions(first, second, samples):
    """Smallest cushions of x -> second (first x); a linear map has no curvature."""
    hidden = samples @ first.T
    outputs = hidden @ second.T
    norm = lambda rows: np.linalg.norm(rows, axis=1)  # noqa: E731
    mu1 = np.min(norm(hidden) / (np.linalg.norm(first) * norm(samples)))
    mu2 = np.min(norm(outputs) / (np.linalg.norm(second) * norm(hidden)))
    between = np.min(norm(outputs) / (np.linalg.norm(second) * norm(hidden)))
    return [StableLayer(first.size, 3, mu1, between), StableLayer(second.size, 3, mu2)]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_compression_lemma_on_linear_networks(epsilon):
    """1000 draws of all signs: all outputs stay within epsilon ||f|| at least as often as promised, and a k 100 000
    times smaller breaks it, so that the test can fail (the lemma's constants are far from tight)."""
    generator = np.random.default_rng(8)
    first, second = np.eye(3) + generator.normal(size=(2, 3, 3)) * 0.4
    samples = generator.normal(size=(6, 3))
    layers = linear_cushions(first, second, samples)
    result = compressed_size(layers, contraction=1.0, smoothness=math.inf, n=6, epsilon=epsilon, delta=0.2)

    def failures(shrink):
        sizes = [max(1, int(k / shrink)) for k in result.sizes]
        one = project(first, sizes[0], 1000, generator).reshape(-1, 3, 3)
        two = project(second, sizes[1], 1000, generator).reshape(-1, 3, 3)
        wanted = samples @ first.T @ second.T
        found = np.einsum("tij,tjk,nk->tni", two, one, samples)
        off = np.linalg.norm(found - wanted, axis=2) > epsilon * np.linalg.norm(wanted, axis=1)
        return np.mean(off.any(axis=1))

    assert failures(1) <= 0.2
    assert failures(100_000) > 0.2


def test_margin_accuracy_keeps_signs():
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(5000, 4)) * 3
    epsilon = margin_accuracy(0.7, float(np.linalg.norm(logits, axis=1).max()))
    direction = generator.normal(size=logits.shape)
    direction[:2500] = 0
    order = np.argsort(logits[:2500], axis=1)
    direction[np.arange(2500), order[:, -1]] = -1  # the worst: own logit down, the next one up
    direction[np.arange(2500), order[:, -2]] = 1
    moved = logits + epsilon * direction * (np.linalg.norm(logits, axis=1) / np.linalg.norm(direction, axis=1)).reshape(
        -1, 1
    )
    top = np.sort(logits, axis=1)
    safe = top[:, -1] - top[:, -2] > 0.7
    np.testing.assert_array_equal(moved.argmax(1)[safe], logits.argmax(1)[safe])
    assert 0.1 < safe.mean() < 1


@pytest.mark.parametrize("weights", [1, 2, 3, 64, 65, 1000])
def test_grid_of_sizes(weights):
    sizes = [level_size(weights, level) for level in range(level_count(weights))]
    assert sizes[0] == padded_size(weights) >= weights
    assert padded_size(weights) < 2 * weights
    assert sizes[-1] == 1
    assert all(a >= b >= (a - 1) / 2**0.25 for a, b in itertools.pairwise(sizes))
    with pytest.raises(ValueError, match="level must be"):
        level_size(weights, level_count(weights))


def test_kraft_of_whole_networks():
    """Enumerate: one matrix of 4 weights, one bias of 1; every level, exponent, bits, seed and grid value."""
    total = 0.0
    for bits, level in itertools.product(range(1, 9), range(level_count(4))):
        for k1, k2 in itertools.product(range(-12, 13), repeat=2):
            length = projection_code_length([4], [level], [1], [k1, k2], bits, 0, [3])
            total += 3 * math.exp(bits * (level_size(4, level) + 1) * math.log(2) - length)
    lengths = np.array([projection_code_length([4], [0], [1], [0, 0], 1, seed, [3]) for seed in range(300)])
    total *= np.exp(lengths[0] - lengths).sum()  # the seed's part is a factor of its own
    assert 0.1 < total <= 1


def test_code_length_by_hand():
    found = projection_code_length([100, 9], [4, 0], [5], [1, -2, 0], 3, 7, [50])
    coefficients = math.log(2) * 3 * (64 + 16 + 5) + math.log(12) + math.log(24) + math.log(4)
    choices = math.log(4 * 7 + 1) + math.log(4 * 4 + 1) + math.log(2 * 8 * 9) + math.log(12) + math.log(50)
    assert found == pytest.approx(coefficients + choices, rel=1e-14)
    with pytest.raises(ValueError, match="one entry a matrix"):
        projection_code_length([4], [0, 0], [], [0], 2, 0)
    with pytest.raises(ValueError, match="seed"):
        projection_code_length([4], [0], [], [0], 2, -1)


def test_statements_equal_the_code():
    for statement in STATEMENTS.values():
        assert statement.latex()
        assert statement.expression.rhs.free_symbols == set(statement.symbols)
    failure, needed = STATEMENTS["matrix_projection_failure"], STATEMENTS["matrix_projection_size"]
    assert failure.lambdify()(0.3, 200) == pytest.approx(projection_failure(0.3, 200), rel=1e-12)
    assert math.ceil(needed.lambdify()(0.3, 0.01)) == projections_needed(0.3, 0.01)
    layers = three_layers()
    result = size()
    accuracy = STATEMENTS["noise_stable_accuracy"].lambdify()
    for layer, found in zip(layers, layer_accuracies(layers, 1.4, 0.5), strict=True):
        number = accuracy(0.5, 3, layer.layer_cushion, layer.forward_cushion, 1.4, layer.overlap)
        assert number == pytest.approx(found, rel=1e-12)
    events = 50 * (20 + 2 * 8 + 3 * 3)
    total = STATEMENTS["noise_stable_size"].lambdify()(events, 0.05, *result.accuracies)
    assert total - 3 <= result.total <= total
    assert total - 3 == pytest.approx(result.total, rel=1e-6)
    assert len(compressed_size_formula(5).symbols) == 7


@pytest.mark.parametrize("name", ["noise_stability_published", "noise_stability_size_published"])
def test_remembered_statements_give_no_number(name):
    with pytest.raises(ValueError, match="unknown constant"):
        STATEMENTS[name].lambdify()


def test_refusals():
    for call in (
        lambda: projection_failure(0.0, 3),
        lambda: projection_failure(0.1, 0),
        lambda: projections_needed(0.0, 0.1),
        lambda: projections_needed(0.1, 1.0),
        lambda: StableLayer(0, 1, 0.5),
        lambda: StableLayer(1, 1, -0.5),
        lambda: StableLayer(1, 1, math.nan),
        lambda: layer_accuracies([], 1.0, 0.1),
        lambda: noise_stability_measure([], contraction=1.0, output_norm=1.0, gamma=1.0, n=1),
        lambda: size(delta=0.0),
        lambda: size(epsilon=0.0),
        lambda: size(contraction=-1.0),
        lambda: size(smoothness=-1.0),
        lambda: margin_accuracy(0.0, 1.0),
        lambda: compressed_size_formula(0),
    ):
        with pytest.raises(ValueError):
            call()
