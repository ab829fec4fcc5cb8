"""Bounds on the original network: binomial limits, Theorems D and E by hand and by simulation, formulas and rates."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.bounds.bound import ORIGINAL, PRUNED, QUANTISED, Bound
from specprune.bounds.chain_cover import LayerSize, chain_geometry, log_cover
from specprune.bounds.covering import ramp_loss, ramp_losses
from specprune.bounds.held_out import binomial_upper_limit
from specprune.bounds.occam import integer_code_length, invert_binary_kl, occam_bound
from specprune.bounds.symbolic_uncompressed import RATES, evaluate_rates, rates_latex, rates_records, statements
from specprune.bounds.uncompressed import (
    LossPair,
    coded_disagreement_bound,
    disagreement_bound,
    loss_pair,
    pair_bound,
    uncompressed_bound,
)

STATEMENTS = {item.name: item for item in statements()}
LAYERS = [LayerSize(200, 10, 1.5, 0.3), LayerSize(100, 10, 2.0, 0.5), LayerSize(30, 3, 0.9, 0.1)]
PAIR = LossPair(n=5000, gamma=1.0, original=0.1, compressed=0.12, loss_distance=0.05, output_distance=0.2)
NUMBERS = {"log_original": 40.0, "log_compressed": 8.0, "delta": 0.05}


def known(value, confidence=None, **change):
    fields = {"covers": QUANTISED, "loss": "0-1", "trivial": 1.0, **change}
    return Bound.from_terms("known", {"empirical": value}, confidence=confidence, **fields)


# Theorem D


def test_disagreement_by_hand():
    compressed = occam_bound(0.03, 5000, 300.0, 0.02)
    bound = disagreement_bound(compressed, 12, 2000, 0.05, candidates=3)
    limit = scipy.stats.beta.isf(0.03 / 3, 13, 1988)
    assert bound.value == pytest.approx(compressed.value + limit, rel=1e-9)
    assert bound.terms == {
        "empirical": 0.03,
        "variance": compressed.terms["variance"],
        "bias": 0.006,
        "confidence": pytest.approx(limit - 0.006),
    }
    assert (bound.covers, bound.loss, bound.confidence) == (ORIGINAL, "0-1", 0.95)
    assert bound.valid


def test_theorem_d_covers_and_is_tight():
    """f errs where g errs, and where they differ: the worst case. The limit alone decides when g's error is known."""
    generator = np.random.default_rng(0)
    error, differ, n, n_u, delta, draws = 0.12, 0.07, 400, 300, 0.1, 4000
    wrong, apart = generator.binomial(n, error, draws), generator.binomial(n_u, differ, draws)
    exact = {k: disagreement_bound(known(error), int(k), n_u, delta).value for k in np.unique(apart)}
    failed = np.mean([error + differ > exact[k] for k in apart])
    assert 0.3 * delta < failed <= delta + 3 * math.sqrt(delta / draws)
    parts = {k: occam_bound(k / n, n, 0.0, delta / 2) for k in np.unique(wrong)}
    bounds = {
        pair: disagreement_bound(parts[pair[0]], int(pair[1]), n_u, delta).value
        for pair in set(zip(wrong, apart, strict=True))
    }
    values = np.array([bounds[pair] for pair in zip(wrong, apart, strict=True)])
    assert np.mean(error + differ > values) <= delta
    assert np.median(values) < 0.35


def test_choosing_among_candidates_is_paid_for():
    generator = np.random.default_rng(1)
    differ, n_u, delta, many = 0.1, 200, 0.1, 30
    best = generator.binomial(n_u, differ, (2000, many)).min(axis=1)
    paid = [disagreement_bound(known(0.2), int(k), n_u, delta, candidates=many).value for k in best]
    unpaid = [disagreement_bound(known(0.2), int(k), n_u, delta).value for k in best]
    assert np.mean(0.2 + differ > np.array(paid)) <= delta
    assert np.mean(0.2 + differ > np.array(unpaid)) > 3 * delta


def test_coded_pairs_cover_when_chosen_on_the_training_set():
    generator = np.random.default_rng(2)
    differ, n, delta, many = 0.25, 60, 0.1, 64
    best = generator.binomial(n, differ, (2000, many)).min(axis=1)

    def failures(code):
        values = {k: coded_disagreement_bound(known(0.1), int(k), n, code, delta).value for k in np.unique(best)}
        assert all(value < 1 for value in values.values())
        return np.mean([0.1 + differ > values[k] for k in best])

    assert failures(math.log(many)) <= delta
    assert failures(0.0) > 2 * delta


def test_coded_pair_by_hand_and_fast_rate():
    compressed = occam_bound(0.1, 10000, 50.0, 0.02)
    bound = coded_disagreement_bound(compressed, 0, 10000, 500.0, 0.05)
    assert bound.value == pytest.approx(compressed.value + 1 - math.exp(-(500 + math.log(1 / 0.03)) / 10000), rel=1e-9)
    # Where f errs on the sample, the long code at the fast rate beats Occam's bound on f itself.
    assert bound.value < occam_bound(0.1, 10000, 500.0, 0.05).value
    assert bound.covers == ORIGINAL


@given(st.integers(1, 3000), st.integers(0, 50), st.floats(0.03, 0.5), st.floats(0, 2000))
def test_theorem_d_is_monotone(n, k, delta, code):
    k = min(k, n - 1)
    compressed = known(0.1, 0.98)
    for bound in (
        lambda k, n, delta: disagreement_bound(compressed, k, n, delta).value,
        lambda k, n, delta: coded_disagreement_bound(compressed, k, n, code, delta).value,
    ):
        assert bound(k + 1, n, delta) >= bound(k, n, delta)
        assert bound(k, n, delta + 0.1) <= bound(k, n, delta)
        assert bound(2 * k, 2 * n, delta) <= bound(k, n, delta) + 1e-12
    more = coded_disagreement_bound(compressed, k, n, code + 1, delta).value
    assert more >= coded_disagreement_bound(compressed, k, n, code, delta).value


def test_theorem_d_refuses():
    with pytest.raises(ValueError, match="used up"):
        disagreement_bound(known(0.1, 0.95), 1, 100, 0.05)
    with pytest.raises(ValueError, match="covers the original net already"):
        disagreement_bound(known(0.1, covers=ORIGINAL), 1, 100, 0.05)
    with pytest.raises(ValueError, match="0-1 or the ramp loss"):
        disagreement_bound(known(0.1, loss="L2(P_n) output error"), 1, 100, 0.05)
    with pytest.raises(ValueError, match="at most trials"):
        disagreement_bound(known(0.1), 101, 100, 0.05)
    with pytest.raises(ValueError, match="at most n"):
        coded_disagreement_bound(known(0.1), 101, 100, 1.0, 0.05)
    with pytest.raises(TypeError, match="integer"):
        disagreement_bound(known(0.1), 0.5, 100, 0.05)
    ramp = known(0.1, covers=PRUNED, loss="ramp(2)")
    assert disagreement_bound(ramp, 1, 100, 0.05).loss == "0-1"


# What Theorem E measures


def test_loss_pair_by_hand():
    f, g = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.5, 0.0], [0.0, 1.0]])
    pair = loss_pair(f, g, [0, 0], 3.9)
    assert (pair.n, pair.gamma, pair.original, pair.compressed) == (2, 2.0, 0.5, 0.625)
    assert pair.loss_distance == pytest.approx(math.sqrt(0.25**2 / 2))
    assert pair.output_distance == pytest.approx(math.sqrt(0.5**2 / 2))
    assert json.loads(pair.to_json())["gamma"] == 2.0


@given(st.integers(0, 10**6), st.floats(-4, 4))
@settings(max_examples=50)
def test_losses_move_less_than_outputs(seed, exponent):
    generator = np.random.default_rng(seed)
    f, labels, gamma = generator.standard_normal((40, 5)), generator.integers(0, 5, 40), 2.0**exponent
    g = f + 10 ** generator.uniform(-3, 0) * generator.standard_normal(f.shape)
    pair = loss_pair(f, g, labels, gamma)
    assert pair.loss_distance <= math.sqrt(2) / pair.gamma * pair.output_distance * (1 + 1e-12)
    losses = ramp_losses(f, labels, gamma)
    assert losses.mean() == pytest.approx(ramp_loss(f, labels, gamma), abs=1e-15)
    assert np.all(
        np.abs(losses - ramp_losses(g, labels, gamma)) <= math.sqrt(2) / gamma * np.linalg.norm(f - g, axis=1)
    )
    assert np.mean(f.argmax(axis=1) != labels) <= pair.original + 1e-12


def test_loss_pair_refuses():
    with pytest.raises(ValueError, match="one shape"):
        loss_pair(np.zeros((3, 2)), np.zeros((3, 3)), [0, 0, 0], 1.0)
    with pytest.raises(ValueError, match="power of two"):
        replace(PAIR, gamma=3.0)
    with pytest.raises(ValueError, match="at least 2"):
        replace(PAIR, n=1)
    with pytest.raises(ValueError, match="loss_distance"):
        replace(PAIR, loss_distance=1.5)


# Theorem E with numbers


def dense_pair_bound(f, g, log_f, log_g, price_f, price_g, a_f, a_g, delta):
    """Theorem E from the vectors of losses, written out once more."""
    n, a = len(f), a_f + a_g
    nats = log_f + log_g + price_f + price_g - math.log(delta / 4)
    distance = np.linalg.norm(f - g) / math.sqrt(n)
    limit = invert_binary_kl(min(g.mean() + a_g, 1), (log_g + price_g - math.log(delta / 2)) / n)
    gap = limit + a_g - g.mean()
    return f.mean() + gap + (distance + a) * math.sqrt(2 * nats / (n - 1)) + 14 / 3 * nats / (n - 1) + 2 * a


@pytest.mark.parametrize("seed", range(4))
def test_pair_bound_against_a_dense_twin(seed):
    generator = np.random.default_rng(seed)
    f = generator.uniform(0, 0.4, 3000)
    g = np.clip(f + 0.1 * generator.standard_normal(3000), 0, 1)
    distance = math.sqrt(np.mean((f - g) ** 2))
    pair = LossPair(3000, 1.0, float(f.mean()), float(g.mean()), distance, 1.0)
    numbers = [*generator.uniform(0, 30, 4), *generator.uniform(0, 0.01, 2)]
    names = ["log_original", "log_compressed", "price_original", "price_compressed"]
    names += ["slack_original", "slack_compressed"]
    bound = pair_bound(pair, delta=0.03, **dict(zip(names, map(float, numbers), strict=True)))
    assert bound.value == pytest.approx(dense_pair_bound(f, g, *numbers, 0.03), rel=1e-12)
    assert all(part >= 0 for part in bound.terms.values())
    assert (bound.covers, bound.confidence, bound.loss) == (ORIGINAL, 0.97, "ramp(1)")


def test_maurer_pontil_constants():
    """The two classical inequalities that Theorem 4 joins give its 7/3: 2 + 1/3, after ln(2/delta) for both."""
    n, nats = np.arange(2, 2000), 3.7
    joined = math.sqrt(2) * math.sqrt(2) * nats / np.sqrt(n * (n - 1.0)) + nats / (3 * n)
    assert np.all(joined <= 7 * nats / (3 * (n - 1.0)))
    # Sample variance (divisor n - 1) of d against its mean square, the step that turns n into n - 1.
    d = np.random.default_rng(0).uniform(-1, 1, (500, 7))
    assert np.all(d.var(axis=1, ddof=1) <= 7 / 6 * np.mean(d**2, axis=1) + 1e-15)


def test_theorem_e_covers_a_finite_class():
    """2000 networks that differ from one g on a few examples; the best on the sample is taken. All risks are 0.3."""
    generator = np.random.default_rng(3)
    n, many, draws, delta = 500, 2000, 1000, 0.1
    ones = generator.binomial(n, 0.3, draws)
    up = generator.binomial((n - ones)[:, None], 9 / 70, (draws, many))
    down = generator.binomial(ones[:, None], 0.3, (draws, many))
    best = np.argmin(up - down, axis=1)
    rows = np.arange(draws)
    bounds = []
    for one, more, less in zip(ones, up[rows, best], down[rows, best], strict=True):
        pair = LossPair(n, 1.0, (one + more - less) / n, one / n, math.sqrt((more + less) / n), 1.0)
        bounds.append(pair_bound(pair, log_original=math.log(many), log_compressed=0.0, delta=delta))
    values = np.array([bound.value for bound in bounds])
    assert np.mean(values < 0.3) <= delta
    assert values.max() < 0.75
    # Without the fast terms the same experiment fails nearly always: they are needed.
    fast = (math.log(many) + math.log(4 / delta)) / (n - 1)
    slow = values - np.array([bound.terms["bias"] for bound in bounds]) - 14 / 3 * fast
    assert np.mean(slow < 0.3) > 0.5


def test_difference_of_losses_covers_tightly():
    """One pair: E d <= mean + fast terms fails at most delta/2 of the time, also for rare differences."""
    generator = np.random.default_rng(4)
    n, draws, delta = 300, 20000, 0.2
    for rare in (0.003, 0.05, 0.5):
        count = generator.binomial(n, rare, draws)
        share = count / n
        nats = math.log(4 / delta)
        pairs = {k: LossPair(n, 1.0, k / n, 0.0, math.sqrt(k / n), 1.0) for k in np.unique(count)}
        bounds = {k: pair_bound(p, log_original=0.0, log_compressed=0.0, delta=delta) for k, p in pairs.items()}
        gap = 1 - (delta / 2) ** (1 / n)  # of g, whose loss is 0 on the sample
        fast = np.array([bounds[k].value - k / n - gap for k in count])
        assert fast == pytest.approx(np.sqrt(share) * math.sqrt(2 * nats / (n - 1)) + 14 * nats / (3 * (n - 1)))
        assert np.mean(share + fast < rare) <= delta / 2


def test_fast_term_vanishes_for_equal_networks():
    same = replace(PAIR, loss_distance=0.0)
    assert pair_bound(same, **NUMBERS).terms["bias"] == 0.0
    near = pair_bound(replace(PAIR, loss_distance=1e-9), **NUMBERS)
    assert 0 < near.terms["bias"] < 1e-9
    # Only the differences of losses pay the big class's root rate: at f = g it enters over n.
    small, big = (pair_bound(same, **{**NUMBERS, "log_original": x}).value for x in (40.0, 140.0))
    assert big - small == pytest.approx(14 * 100 / (3 * 4999))


@given(
    st.floats(0.01, 0.4), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 300), st.floats(0, 0.05)
)
@settings(max_examples=60)
def test_pair_bound_is_monotone(delta, original, compressed, distance, nats, slack):
    pair = LossPair(3000, 1.0, original, compressed, distance, 1.0)
    numbers = {"log_original": nats, "log_compressed": nats / 4, "delta": delta, "slack_original": slack}
    value = pair_bound(pair, **numbers).value
    assert pair_bound(replace(pair, n=4000), **numbers).value <= value
    assert pair_bound(pair, **{**numbers, "delta": delta * 1.5}).value <= value
    assert pair_bound(replace(pair, loss_distance=min(1.0, distance + 0.1)), **numbers).value >= value
    assert pair_bound(pair, **numbers, slack_compressed=0.01).value >= value
    for name in ("log_original", "log_compressed"):
        assert pair_bound(pair, **{**numbers, name: numbers[name] + 1}).value > value
    for name in ("price_original", "price_compressed"):
        assert pair_bound(pair, **numbers, **{name: 1.0}).value > value


# Theorem E with covers


def test_log_cover_by_hand():
    epsilon = 0.25 / (math.sqrt(2) * 700)
    nats, price = log_cover([*LAYERS[:2], LayerSize(50, 0, 3.0, 7.0)], math.log(epsilon), 3.0)
    # Norms 2, 2, 4 and biases 1/2, 1/2, none; inputs within 3, 6.5 and 13.5; later norms 8, 4 and 1.
    terms = [(200, 2 * 3 * 8), (10, 0.5 * 8), (100, 2 * 6.5 * 4), (10, 0.5 * 4), (50, 4 * 13.5)]
    assert nats == pytest.approx(sum(count * math.log1p(12 * size / epsilon) for count, size in terms), rel=1e-12)
    assert price == pytest.approx(math.fsum(integer_code_length(k) for k in (1, 1, 2, -1, -1)), rel=1e-14)
    geometry = chain_geometry([1.5, 3.0], [0.3, None], 3.0)
    assert np.exp(geometry.log_inputs) == pytest.approx([3.0, 2 * 3 + 0.5])
    assert np.exp(geometry.log_later) == pytest.approx([4.0, 1.0])


def test_uncompressed_bound_by_its_parts():
    small = [replace(layer, weights=layer.weights // 4) for layer in LAYERS]
    bound = uncompressed_bound(LAYERS, small, PAIR, input_radius=2.0, delta=0.05, original_widths=[30, 20])
    scale = math.log(1 / (math.sqrt(2) * PAIR.n))
    (log_f, price_f), (log_g, price_g) = log_cover(LAYERS, scale, 2.0), log_cover(small, scale, 2.0)
    price_g += math.log(600) + integer_code_length(0)
    slack = 1 / PAIR.n
    expected = pair_bound(
        PAIR,
        log_original=log_f,
        log_compressed=log_g,
        delta=0.05,
        price_original=price_f,
        price_compressed=price_g,
        slack_original=slack,
        slack_compressed=slack,
    )
    assert bound.terms == pytest.approx(expected.terms)
    coded = uncompressed_bound(LAYERS, 120.0, PAIR, input_radius=2.0, delta=0.05)
    expected = pair_bound(
        PAIR,
        log_original=log_f,
        log_compressed=120.0,
        delta=0.05,
        price_original=price_f,
        price_compressed=integer_code_length(0),
        slack_original=slack,
    )
    assert coded.terms == pytest.approx(expected.terms)


def test_uncompressed_bound_is_monotone_and_checks_the_radius():
    big = replace(PAIR, n=10**7)
    base = uncompressed_bound(LAYERS, LAYERS, big, input_radius=2.0, delta=0.05, measured_radius=1.9)
    assert base.valid
    assert not base.vacuous
    broken = uncompressed_bound(LAYERS, LAYERS, big, input_radius=2.0, delta=0.05, measured_radius=2.1)
    assert not broken.valid
    for change in (
        {"layers": [replace(layer, operator_norm=4 * layer.operator_norm) for layer in LAYERS]},
        {"layers": [replace(layer, weights=2 * layer.weights) for layer in LAYERS]},
        {"input_radius": 9.0},
        {"delta": 0.01},
        {"pair": replace(big, n=10**6)},
        {"pair": replace(big, loss_distance=0.2)},
    ):
        given = {"layers": LAYERS, "pair": big, "input_radius": 2.0, "delta": 0.05, **change}
        layers, pair = given.pop("layers"), given.pop("pair")
        assert uncompressed_bound(layers, LAYERS, pair, **given).value > base.value
    huge = uncompressed_bound([LayerSize(10, 2, 1e300, 1e300)] * 6, 9.0, big, input_radius=2.0, delta=0.05)
    assert math.isfinite(huge.value)


def test_uncompressed_bound_covers():
    """Linear networks on two inputs, fitted by votes and rounded; risks known exactly; the bound is not vacuous."""
    generator = np.random.default_rng(5)
    n, delta, chances = 30000, 0.1, np.array([0.1, 0.85])
    counts = generator.multinomial(n, np.ravel([(1 - chances) / 2, chances / 2], order="F"), 1000)
    truth = np.ravel(
        [(1 - chances) / 2, chances / 2], order="F"
    )  # input 0 class 0, input 0 class 1, input 1 class 0...
    inputs, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    failed, values = 0, []
    for count in counts:
        votes = (count[1::2] - count[::2]) / count.reshape(2, 2).sum(axis=1)
        f = np.outer([-0.5, 0.5], votes)
        g = np.outer([-0.5, 0.5], np.round(8 * votes) / 8)
        loss_f, loss_g = (ramp_losses(w.T[inputs], labels, 0.5) for w in (f, g))
        share = count / n
        distance = math.sqrt(share @ (loss_f - loss_g) ** 2)
        pair = LossPair(n, 0.5, float(share @ loss_f), float(share @ loss_g), distance, 1.0)
        layer, code = LayerSize(4, 0, float(np.linalg.norm(f, 2)), 0.0), 2 * math.log(17)
        bound = uncompressed_bound([layer], code, pair, input_radius=1.0, delta=delta)
        failed += truth @ loss_f > bound.value
        values.append(bound.value)
    assert failed <= delta * len(counts)
    assert max(values) < 0.5


# Formulas


def test_every_statement_prints_and_explains_itself():
    assert len(STATEMENTS) == 9
    for name, statement in STATEMENTS.items():
        assert statement.name == name
        assert statement.latex()
        assert statement.assumptions
        assert statement.source
        assert statement.provenance
        assert statement.expression.rhs.free_symbols == set(statement.symbols)
        if name.endswith("published"):
            with pytest.raises(ValueError, match="unknown constant"):
                statement.lambdify()
        else:
            assert callable(statement.lambdify())


def test_statements_of_theorem_d_are_the_code():
    compressed = known(0.2, 0.98)
    bound = disagreement_bound(compressed, 7, 900, 0.05)
    limit = binomial_upper_limit(7, 900, 0.05 - (1 - 0.98))
    assert STATEMENTS["disagreement"].lambdify()(0.2, limit) == pytest.approx(bound.value, rel=1e-12)
    none = disagreement_bound(compressed, 0, 900, 0.05)
    # The code rounds the limit up, by a share of 1e-9 of the tail.
    exact = STATEMENTS["disagreement_none"].lambdify()(0.2, 900, 0.03)
    assert exact * (1 - 1e-14) <= none.value <= exact * (1 + 1e-10)
    relaxed = STATEMENTS["disagreement_coded"].lambdify()
    for k, code in ((0, 10.0), (30, 100.0), (300, 1.0)):
        value = coded_disagreement_bound(compressed, k, 900, code, 0.05).value
        assert value <= relaxed(0.2, k / 900, code, 900, 0.03)
    # Near 1/2 the inversion of kl and Pinsker's inequality meet.
    assert coded_disagreement_bound(compressed, 450, 900, 1e-3, 0.9).value == pytest.approx(
        relaxed(0.2, 0.5, 1e-3, 900, 0.88), rel=1e-3
    )


@given(st.floats(0, 50), st.floats(0, 500), st.floats(0, 0.02), st.floats(0, 1))
@settings(max_examples=30)
def test_statement_of_theorem_e_is_the_code(log_g, log_f, a, distance):
    pair = replace(PAIR, loss_distance=distance)
    bound = pair_bound(
        pair,
        log_original=log_f,
        log_compressed=log_g,
        delta=0.05,
        price_original=2.0,
        price_compressed=3.0,
        slack_original=a,
        slack_compressed=a / 2,
    )
    limit = invert_binary_kl(min(1.0, 0.12 + a / 2), (log_g + 3 + math.log(40)) / 5000)
    value = STATEMENTS["uncompressed"].lambdify()(
        0.1, limit + a / 2 - 0.12, distance, 1.5 * a, log_f, log_g, 5.0, 5000, 0.05
    )
    assert value == pytest.approx(bound.value, rel=1e-12)


# Rates


RATE_VALUES = {"n": 6e4, "L": 5.0, "m": 300.0, "R_F": 9.0, "R_2": 3.0, "R_21": 40.0, "R_11": 700.0, "kappa": 2.5}
RATE_VALUES |= {"rhat": 0.3, "alpha": 0.8, "beta": 2.2, "f_max": 12.0, "S_mu": 90.0, "S_m": 4000.0}
RATE_VALUES |= {"Rdot": 0.01, "Rbar_n": 0.07}


def test_rates_by_hand():
    n, depth, m, frobenius, operator = 6e4, 5, 300, 9.0, 3.0
    a, b = 0.8, 2.2
    second = 4 * a / (4 * a + b * (2 * a - 1))
    expected = {
        "neyshabur2015": 2**depth * frobenius**depth / n**0.5,
        "bartlett2017": operator**depth / n**0.5 * depth**1.5 * 40 / operator,
        "wei2019": (1 + depth * (2.5**2 * 40) ** (2 / 3) + depth * (2.5 * 700) ** (2 / 3)) ** 1.5 / n**0.5,
        "neyshabur2018": operator ** (depth - 1) * frobenius * math.sqrt(depth**3 * m / n),
        "golowich2018": frobenius**depth * min(n**-0.25, math.sqrt(depth / n)),
        "li2018": operator**depth * depth * m / n**0.5,
        "arora2018": 0.3 + depth * 12 * math.sqrt(90 / n) / 0.3,
        "suzuki2018": 0.3 + math.sqrt(4000 / n),
        "suzuki2020_theorem1": 0.3 / n**0.5 + 0.01 + 0.07,
        "suzuki2020_corollary1": math.sqrt(depth * (depth * 2.5**2) ** (1 / a) * depth * m / n),
        "suzuki2020_theorem4": math.sqrt(depth ** (2 - second) * (depth * m) ** second / n),
    }
    records = evaluate_rates(RATE_VALUES)
    assert {record["name"]: record["rate"] for record in records} == pytest.approx(expected, rel=1e-12)
    for record in records:
        assert record["log10"] == pytest.approx(math.log10(record["rate"]), rel=1e-12)
        assert record["note"] == "constants set to 1"


def test_rates_with_gaps_and_without_overflow():
    deep = {record["name"]: record for record in evaluate_rates({"n": 100.0, "L": 5000.0, "R_F": 50.0})}
    assert deep["neyshabur2015"]["rate"] == math.inf
    assert deep["neyshabur2015"]["log10"] == pytest.approx(5000 * 2 - 1)
    assert deep["li2018"]["missing"] == ["R_2", "m"]
    assert deep["li2018"]["rate"] is None
    slow = {record["name"]: record for record in evaluate_rates({**RATE_VALUES, "alpha": 0.4})}
    assert slow["suzuki2020_theorem4"]["missing"] == ["alpha"]
    with pytest.raises(ValueError, match="no rate depends on"):
        evaluate_rates({"width": 3.0})
    with pytest.raises(ValueError, match="n must be"):
        evaluate_rates({"n": 0.0})


def test_rates_table():
    records = rates_records()
    assert [record["name"] for record in records if not record["original"]] == ["arora2018", "suzuki2018"]
    text = rates_latex()
    assert text.count(r"\\") == len(RATES) + 1
    assert text.startswith(r"\begin{tabular}")
    assert r"\hat{r}" in text
    assert all(record["latex"] in text for record in records)


def test_published_shapes_by_hand():
    """Display only, yet what they display is checked: each right-hand side at numbers, with C = 2."""

    def at(name, **numbers):
        statement = STATEMENTS[f"original_{name}_published"]
        return float(statement.expression.rhs.subs({s: numbers[str(s)] for s in statement.symbols}))

    one = at("theorem_1", Psi_n=0.1, Rbar_n=0.05, Rdot=0.01, rdot=0.3, C=2, t=3, n=100, M=1.5)
    fast = 0.01 * math.log(100) ** 1.5 + 0.3 * math.sqrt(0.03) + (1 + 4.5) / 100
    assert one == pytest.approx(0.1 + 0.1 + 1.5 * math.sqrt(0.06) + 2 * fast)
    two = at("theorem_2", Psi_n=0.1, C=2, M=1.5, A_1=0.02, A_2=0.03, rhat=0.2, alpha=0.8, t=3, n=100)
    inside = 1.5 * 0.02 + 1.5 ** (0.6 / 2.6) * 0.03 ** (1.6 / 2.6) + math.sqrt(0.2**0.75 * 0.03)
    inside += 1.7 * math.sqrt(0.02) + (1 + 4.5) / 100
    assert two == pytest.approx(0.1 + 2 * inside)
    four = at("theorem_4", Psi_n=0.1, C=2, L=5, m=300, alpha=0.8, beta=2.2, n=6e4)
    (rate,) = (record["rate"] for record in evaluate_rates(RATE_VALUES) if record["name"] == "suzuki2020_theorem4")
    assert four == pytest.approx(0.1 + 2 * rate)
