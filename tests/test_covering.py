"""Covering bounds: the Lipschitz sum behind them, hand-computed values, monotonicity, huge norms, prices."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune.bounds.covering import LayerSize, covering_bound, dudley_bound, optimal_polynomial_width, ramp_loss
from specprune.bounds.occam import integer_code_length

BOUNDS = [covering_bound, dudley_bound]
LAYERS = [LayerSize(200, 10, 1.5, 0.3), LayerSize(100, 10, 2.0, 0.5), LayerSize(30, 3, 0.9, 0.1)]
SETTING = {"input_radius": 2.0, "n": 1000, "gamma": 1.0, "delta": 0.05, "empirical_ramp": 0.1}


def network(seed, sizes=(6, 5, 4, 3)):
    generator = np.random.default_rng(seed)
    return [(generator.standard_normal((b, a)), generator.standard_normal(b)) for a, b in itertools.pairwise(sizes)]


def forward(parameters, x):
    for k, (w, b) in enumerate(parameters):
        x = x @ w.T + b
        if k < len(parameters) - 1:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_lipschitz_sum_behind_the_covers(seed, size):
    """||f_theta - f_theta'|| <= sum_l Pi_l (D_l ||dW||_op + ||db||), with norms that hold for both networks."""
    one = network(seed)
    generator = np.random.default_rng(50 + seed)
    two = [
        (w + size * generator.standard_normal(w.shape), b + size * generator.standard_normal(b.shape)) for w, b in one
    ]
    x = generator.standard_normal((300, 6))
    radius = np.linalg.norm(x, axis=1).max()
    s = [max(np.linalg.norm(w, 2), np.linalg.norm(v, 2)) for (w, _), (v, _) in zip(one, two, strict=True)]
    norms = [max(np.linalg.norm(b), np.linalg.norm(c)) for (_, b), (_, c) in zip(one, two, strict=True)]
    d = [radius]
    for k in range(3):
        d.append(s[k] * d[-1] + norms[k])
    moves = [(np.linalg.norm(w - v, 2), np.linalg.norm(b - c)) for (w, b), (v, c) in zip(one, two, strict=True)]
    limit = sum(math.prod(s[k + 1 :]) * (d[k] * moves[k][0] + moves[k][1]) for k in range(3))
    gap = np.linalg.norm(forward(one, x) - forward(two, x), axis=1).max()
    assert gap <= limit
    # The common-norm form of Dudley's theorem: every block within r moves the network by at most r G.
    s_bar, b_bar, r = max(s), max(norms), max(max(pair) for pair in moves)
    common, g = [radius], 0.0
    for k in range(3):
        g += s_bar ** (2 - k) * (common[-1] + 1)
        common.append(s_bar * common[-1] + b_bar)
    assert limit <= r * g * (1 + 1e-12)


def test_covering_number_of_a_ball():
    """Step 2 in one dimension, where a minimal cover can be counted: [-r, r] by intervals of half-length e."""
    for r, e in ((1.0, 0.3), (2.0, 0.01), (1.0, 5.0)):
        assert max(1, math.ceil(r / e)) <= 1 + 2 * r / e


def test_covering_by_hand():
    layers = [LayerSize(6, 2, 1.9, 0.7), LayerSize(4, 0, 0.5, 0.0)]
    bound = covering_bound(
        layers,
        input_radius=3.0,
        n=500,
        gamma=0.7,
        delta=0.1,
        empirical_ramp=0.2,
        approximation_error=0.05,
        original_widths=[8],
    )
    gamma, s1, b1, s2 = 0.5, 2.0, 1.0, 0.5
    eps = gamma / (math.sqrt(2) * 500)
    cover = 6 * math.log(1 + 8 * s1 * 3 * s2 / eps) + 2 * math.log(1 + 8 * b1 * s2 / eps)
    cover += 4 * math.log(1 + 8 * s2 * (s1 * 3 + b1) / eps)
    price = sum(math.log(2 * (k + 1) * (k + 2)) for k in (1, 1, 0, 1)) + math.log(8)  # gamma, s1, b1, s2; width
    assert bound.terms["empirical"] == 0.2
    assert bound.terms["bias"] == pytest.approx(math.sqrt(2) / gamma * 0.05)
    assert bound.terms["variance"] == pytest.approx(math.sqrt(cover / 1000) + 2 / 500)
    total = math.sqrt((cover + price + math.log(10)) / 1000)
    assert bound.terms["variance"] + bound.terms["confidence"] == pytest.approx(total + 2 / 500)
    assert bound.loss == "ramp(0.5)"


def test_dudley_by_hand():
    layers = [LayerSize(6, 2, 1.9, 0.7), LayerSize(4, 0, 0.5, 0.0)]
    bound = dudley_bound(layers, input_radius=3.0, n=500, gamma=0.7, delta=0.1, empirical_ramp=0.2, original_widths=[8])
    g = 2.0 * (3 + 1) + (2 * 3 + 1)
    k = 2 * 2.0 * g * math.sqrt(2) / 0.5
    price = math.log(12) + math.log(12) + math.log(4) + math.log(8)  # gamma = 2^-1, s = 2^1, B = 2^0; width
    assert bound.terms["variance"] == pytest.approx(6 * math.sqrt(12 / 500 * (1 + math.log(1 + 4 * k))))
    assert bound.terms["confidence"] == pytest.approx(math.sqrt((math.log(10) + price) / 1000))
    assert bound.terms["bias"] == 0


def test_entropy_integral_constant():
    """Steps 2 and 3: the sum over the chain's links lies below the integral, and that below its closed form."""
    from scipy.integrate import quad

    for k in (0.01, 1.0, 50.0, 1e4):
        exact, _ = quad(lambda e, k=k: math.log1p(k / e), 0, 0.25, limit=200)
        assert exact == pytest.approx(math.log1p(4 * k) / 4 + k * math.log1p(0.25 / k), rel=1e-6)
        root, _ = quad(lambda e, k=k: math.sqrt(math.log1p(k / e)), 0, 0.25, limit=200)
        reach = [0.5**j for j in range(1, 60)]  # of the centres: the constant 1/2 reaches every loss within 1/2
        links = sum((a + b) * math.sqrt(2 * 2 * math.log1p(k / b)) for a, b in itertools.pairwise(reach))
        assert links <= 12 * root <= 3 * math.sqrt(1 + math.log1p(4 * k))


def test_chaining_bounds_the_rademacher_average():
    """All losses clip(w x, 0, 1), w in [0, 2], x in [0, 1]: simulated, and the chain above it."""
    from scipy.integrate import quad

    n, rng = 400, np.random.default_rng(0)
    points = rng.random(n)
    losses = np.clip(np.linspace(0, 2, 401)[:, None] * points, 0, 1)
    average = np.mean([np.max(losses @ rng.choice([-1.0, 1.0], n)) / n for _ in range(400)])
    root, _ = quad(lambda e: math.sqrt(math.log1p(2 / e)), 0, 0.25)  # centres e apart: 1 + 2 / e of them
    assert 0.01 < average < 12 / math.sqrt(n) * root


@pytest.mark.parametrize("bound", BOUNDS)
def test_monotone(bound):
    base = bound(LAYERS, **SETTING)
    assert base.value == pytest.approx(sum(base.terms.values()))
    assert bound(LAYERS, **{**SETTING, "n": 4000}).value < base.value
    assert bound(LAYERS, **{**SETTING, "delta": 0.01}).value > base.value
    assert bound(LAYERS, **{**SETTING, "gamma": 4.0}).terms["variance"] < base.terms["variance"]
    assert bound(LAYERS, **{**SETTING, "input_radius": 20.0}).value > base.value
    wider = [replace(layer, weights=4 * layer.weights) for layer in LAYERS]
    assert bound(wider, **SETTING).terms["variance"] > 1.5 * base.terms["variance"]
    assert bound(LAYERS, approximation_error=0.3, **SETTING).terms["bias"] == pytest.approx(0.3 * math.sqrt(2))
    assert bound(LAYERS, original_widths=[300, 300], **SETTING).value > base.value


@pytest.mark.parametrize("bound", BOUNDS)
def test_norms_are_rounded_up_and_margin_down(bound):
    """Anything between two powers of two gives the same bound, so the union over the grid pays for the choice."""
    lower = [replace(layer, operator_norm=1.01, bias_norm=1.01) for layer in LAYERS]
    upper = [replace(layer, operator_norm=2.0, bias_norm=2.0) for layer in LAYERS]
    assert bound(lower, **SETTING).value == bound(upper, **SETTING).value
    assert bound(LAYERS, **{**SETTING, "gamma": 1.99}).value == bound(LAYERS, **SETTING).value
    assert bound(LAYERS, **{**SETTING, "gamma": 0.99}).value > bound(LAYERS, **SETTING).value


@pytest.mark.parametrize("bound", BOUNDS)
def test_huge_norms_do_not_overflow(bound):
    layers = [LayerSize(10, 2, 1e300, 1e300)] * 6
    result = bound(layers, **SETTING)
    assert math.isfinite(result.value)
    assert result.vacuous
    tiny = bound([LayerSize(10, 2, 0.0, 0.0)] * 3, **{**SETTING, "n": 10**6})
    assert math.isfinite(tiny.value)
    assert tiny.value > 0.1


@pytest.mark.parametrize("bound", BOUNDS)
def test_not_always_vacuous(bound):
    result = bound([LayerSize(10, 2, 1.0, 1.0)], **{**SETTING, "n": 10**6})
    assert not result.vacuous


@pytest.mark.parametrize("bound", BOUNDS)
def test_input_radius_is_checked_against_the_data(bound):
    assert bound(LAYERS, measured_radius=1.9, **SETTING).valid
    broken = bound(LAYERS, measured_radius=2.1, **SETTING)
    assert not broken.valid
    assert "BROKEN" in str(broken)
    assert "assumed" in bound(LAYERS, **SETTING).hypotheses[0].statement


def test_margin_price_is_charged():
    """At a margin of 2^-10 the price of gamma enters: ln 264 against ln 4."""
    fine = dudley_bound(LAYERS, **{**SETTING, "gamma": 2.0**-10})
    coarse = dudley_bound(LAYERS, **SETTING)
    gap = 2 * 1000 * (fine.terms["confidence"] ** 2 - coarse.terms["confidence"] ** 2)
    assert gap == pytest.approx(integer_code_length(-10) - integer_code_length(0))


@pytest.mark.parametrize("bound", BOUNDS)
def test_refusals(bound):
    for change in ({"n": 0}, {"gamma": 0.0}, {"delta": 1.0}, {"empirical_ramp": 1.5}, {"input_radius": math.inf}):
        with pytest.raises(ValueError):
            bound(LAYERS, **{**SETTING, **change})
    with pytest.raises(ValueError, match="at least one"):
        bound([], **SETTING)
    with pytest.raises(ValueError, match="operator_norm"):
        LayerSize(1, 1, math.nan, 1.0)


def test_ramp_loss_by_hand_and_order():
    logits = np.array([[2.0, 0.0, 1.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert ramp_loss(logits, [0, 1, 0], 1.0) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    generator = np.random.default_rng(3)
    random, labels = generator.standard_normal((500, 4)), generator.integers(0, 4, 500)
    error = np.mean(random.argmax(axis=1) != labels)
    losses = [ramp_loss(random, labels, gamma) for gamma in (1e-6, 0.1, 1.0, 10.0)]
    assert error <= losses[0] + 1e-12
    assert losses == sorted(losses)
    for bad in ([0, 1], [0, 1, 3], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="labels"):
            ramp_loss(logits, bad, 1.0)


@given(st.floats(0.05, 0.95), st.integers(10, 10**7), st.floats(0.1, 10.0))
def test_polynomial_width_is_the_minimiser(beta, n, factor):
    width, value = optimal_polynomial_width(n, beta)
    other = width * factor
    assert value <= (other ** (-1 / (2 * beta)) + other / math.sqrt(n)) * (1 + 1e-12)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_polynomial_rate(beta):
    (w1, v1), (w2, v2) = optimal_polynomial_width(10**4, beta), optimal_polynomial_width(10**8, beta)
    assert math.log(w2 / w1) / math.log(1e4) == pytest.approx(beta / (1 + 2 * beta))
    assert math.log(v2 / v1) / math.log(1e4) == pytest.approx(-1 / (2 * (1 + 2 * beta)))


@pytest.mark.parametrize(("theorem", "n"), [(covering_bound, 3000), (dudley_bound, 10_000)])
def test_coverage(theorem, n):
    """Linear classifiers of points on a circle with noisy labels: known risks, the worst of 96 networks each time."""
    atoms, noise, draws, delta = 64, 0.1, 1000, 0.2
    angles = 2 * np.pi * (np.arange(atoms) + 0.5) / atoms
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    directions = 2 * np.pi * np.arange(32) / 32
    weights = np.stack([np.cos(directions), np.sin(directions)], 1)
    half = points @ weights.T  # logits (s w x, -s w x), so that the margin of class 0 is 2 s w x
    right = points[:, 0] > 0
    risks = np.mean(np.where((half > 0) == right[:, None], noise, 1 - noise), 0)
    generator = np.random.default_rng(0)
    chances = np.stack([np.where(right, 1 - noise, noise), np.where(right, noise, 1 - noise)]) / atoms
    counts = generator.multinomial(n, chances.ravel(), draws).reshape(draws, 2, atoms)
    worst, informative = np.full(draws, -np.inf), 0
    for scale in (0.5, 1.0, 2.0):
        layer = LayerSize(4, 0, math.sqrt(2) * scale, 0.0)
        rest = theorem([layer], input_radius=1.0, n=n, gamma=1.0, delta=delta, empirical_ramp=0.0).value
        losses = np.stack([np.clip(1 - 2 * scale * half, 0, 1), np.clip(1 + 2 * scale * half, 0, 1)])
        empirical = np.einsum("dka,kaw->dw", counts, losses) / n
        worst = np.maximum(worst, (risks - empirical - rest).max(1))
        informative += int(np.sum(empirical.min(1) + rest < 0.9))
    assert informative > draws  # in most of them the bound says something
    assert np.mean(worst > 0) <= delta
