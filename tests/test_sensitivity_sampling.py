"""Sampling by sensitivity: every probability statement against draws, the extremal case against exact binomials."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from specprune.bounds.sensitivity_sampling import (
    dropping_error_bound,
    epsilon_for_sensitivity,
    expected_distinct,
    new_input_bound,
    samples_needed_for_sensitivity,
    sampling_error_bound,
)

DRAWS = 4000


def shares(weight, inputs):
    """Return (x, i, j) contributions w_ij a_j(x), and their absolute values over the sum of these."""
    terms = weight[None] * inputs[:, None]
    return terms, np.abs(terms) / np.abs(terms).sum(2, keepdims=True)


def relative_errors(terms, values, samples, generator, draws=DRAWS):
    """Return (draws, x, i) errors |z_hat - z| / zeta of sampled sums."""
    probabilities = values / values.sum()
    counts = generator.multinomial(samples, probabilities, size=draws)
    factors = np.divide(counts, samples * probabilities, out=np.zeros(counts.shape), where=probabilities > 0)
    estimate = np.einsum("dj,xij->dxi", factors, terms)
    return np.abs(estimate - terms.sum(2)) / np.abs(terms).sum(2)


def coverage(errors, epsilon, delta):
    """Check failures against delta, with five deviations of slack, and return the ratio of the quantile to epsilon."""
    failures = np.mean(errors > epsilon)
    assert failures <= delta + 5 * math.sqrt(delta * (1 - delta) / len(errors))
    return float(np.quantile(errors, 1 - delta)) / epsilon


def finite_set(signed, seed=0, outputs=5, inputs=12, width=40):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((outputs, width))
    points = generator.standard_normal((inputs, width))
    points = points if signed else np.maximum(points, 0)
    return (weight, points) if signed else (np.abs(weight), points)


@pytest.mark.parametrize("signed", [False, True])
def test_one_output_is_covered(signed):
    terms, share = shares(*finite_set(signed))
    values = share.max((0, 1))
    delta, samples = 0.05, 400
    epsilon = epsilon_for_sensitivity(values.sum(), samples, delta)
    errors = relative_errors(terms, values, samples, np.random.default_rng(1))
    ratios = [coverage(errors[:, x, i], epsilon, delta) for x in range(12) for i in range(5)]
    assert 0.2 < max(ratios) < 1  # not absurdly loose, though no input is the worst one


@pytest.mark.parametrize("signed", [False, True])
def test_all_outputs_of_the_finite_set_are_covered_at_once(signed):
    terms, share = shares(*finite_set(signed))
    values = share.max((0, 1))
    bound = sampling_error_bound(values.sum(), 400, 0.05, outputs=60)
    errors = relative_errors(terms, values, 400, np.random.default_rng(2)).max((1, 2))
    assert 0.2 < coverage(errors, bound.value, 0.05) < 1
    assert bound.valid
    assert bound.confidence == 0.95
    assert bound.value <= bound.terms["range"] + bound.terms["deviation"]


def test_with_signs_the_parts_give_the_same_promise_at_a_larger_sum():
    weight, points = finite_set(True)
    terms, share = shares(weight, points)
    above, below = np.maximum(terms, 0), np.maximum(-terms, 0)
    parts = np.maximum(above / above.sum(2, keepdims=True), below / below.sum(2, keepdims=True))
    assert np.all(parts >= share - 1e-15)
    values = parts.max((0, 1))
    assert values.sum() > share.max((0, 1)).sum()
    errors = relative_errors(terms, values, 400, np.random.default_rng(3)).max((1, 2))
    coverage(errors, sampling_error_bound(values.sum(), 400, 0.05, outputs=60).value, 0.05)


def test_where_some_inputs_are_kept_the_rest_counts_alone():
    terms, share = shares(*finite_set(True))
    values = share.max((0, 1))
    rest = np.where(values >= np.quantile(values, 0.6), 0.0, values)
    generator = np.random.default_rng(4)
    zeta = np.abs(terms).sum(2)
    part = np.where(rest > 0, terms, 0.0)
    errors = relative_errors(part, rest, 300, generator) * np.abs(part).sum(2) / zeta
    epsilon = epsilon_for_sensitivity(rest.sum(), 300, 0.05, outputs=60)
    assert 0.1 < coverage(errors.max((1, 2)), epsilon, 0.05) < 1


def failure(size, samples, epsilon):
    """Return P(|S/m Binomial(m, 1/S) - 1| > epsilon), exactly: S equal blocks of which each x uses one."""
    above = math.floor((1 + epsilon) * samples / size + 1e-9)
    below = math.ceil((1 - epsilon) * samples / size - 1e-9) - 1
    return binom.sf(above, samples, 1 / size) + binom.cdf(below, samples, 1 / size)


@pytest.mark.parametrize("size", [2, 5, 50])
@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-8])
def test_the_worst_case_is_covered_and_nearly_reached(size, delta):
    samples = 1000 * size
    epsilon = epsilon_for_sensitivity(size, samples, delta)
    assert failure(size, samples, epsilon) <= delta
    assert failure(size, samples, 0.45 * epsilon) > delta  # no constant below 0.45 would do


def test_the_published_form_fails_without_its_constant_and_holds_with_two():
    size, samples, delta = 50, 50_000, 1e-3

    def published(constant):
        u = 2 * constant * size * math.log(2 / delta) / (3 * samples)
        return (u + math.sqrt(u * u + 6 * u)) / 2

    assert failure(size, samples, published(1)) == pytest.approx(0.0042, rel=0.03)
    for m in (1, 10, 1000, 10**6):
        u = 2 * 2 * size * math.log(2 / delta) / (3 * m)
        assert (u + math.sqrt(u * u + 6 * u)) / 2 > epsilon_for_sensitivity(size, m, delta)


@settings(max_examples=200, deadline=None)
@given(
    total=st.floats(1e-3, 1e4),
    epsilon=st.floats(1e-4, 1e3),
    delta=st.floats(1e-16, 0.9),
    outputs=st.integers(1, 10**9),
)
def test_samples_and_epsilon_are_inverse(total, epsilon, delta, outputs):
    samples = samples_needed_for_sensitivity(total, epsilon, delta, outputs)
    assert epsilon_for_sensitivity(total, samples, delta, outputs) <= epsilon * (1 + 1e-12)
    if samples > 1:
        assert epsilon_for_sensitivity(total, samples - 1, delta, outputs) >= epsilon * (1 - 1e-12)


def test_the_count_by_hand():
    assert samples_needed_for_sensitivity(10, 0.5, 0.02, 1) == math.ceil(10 * 7 / 0.75 * math.log(100))
    assert samples_needed_for_sensitivity(0, 0.5, 0.02) == 1
    assert epsilon_for_sensitivity(0, 3, 0.02) == 0


def test_a_new_input_is_covered_by_exchangeability():
    generator = np.random.default_rng(5)
    width, examples, samples, delta = 6, 79, 60, 0.05
    ratios = []
    for _ in range(2000):
        points = np.maximum(generator.standard_normal((examples + 1, width)), 0) + 1e-3
        values = (points / points.sum(1, keepdims=True))[:-1].max(0)
        counts = generator.multinomial(samples, values / values.sum())
        estimate = np.sum(points[-1] * counts / (samples * values / values.sum()))
        bound = new_input_bound(values.sum(), samples, delta, 1, units=width, examples=examples)
        ratios.append(abs(estimate / points[-1].sum() - 1) / bound.value)
    failed = 1 - bound.confidence
    assert failed == pytest.approx(delta + width / (examples + 1))
    assert np.mean(np.array(ratios) > 1) <= failed + 5 * math.sqrt(failed / 2000)
    assert np.quantile(ratios, 1 - failed) > 0.2


@pytest.mark.parametrize("examples", [5, 20])
def test_shares_of_a_new_input_are_missed_as_rarely_as_said(examples):
    generator = np.random.default_rng(6)
    width = 3
    points = generator.exponential(size=(4000, examples + 1, width))
    share = points / points.sum(2, keepdims=True)
    missed = np.any(share[:, -1] > share[:, :-1].max(1), axis=1).mean()
    promised = width / (examples + 1)
    assert missed <= promised + 5 * math.sqrt(promised / 4000)
    assert missed > 0.5 * promised


def test_the_tail_condition_gives_what_it_says():
    """Shares that are small as often as the condition allows are missed as often as the bound says."""
    generator = np.random.default_rng(7)
    constant, examples, units = 3.0, 12, 4
    # P(g <= 1 / C) is exactly exp(-1 / C): the edge of the condition, with M = 1.
    level = math.exp(-1 / constant)
    g = np.where(generator.random((20_000, examples, units)) < level, 1 / constant - 1e-9, 1.0)
    missed = np.any(constant * g.max(1) < 1, axis=1).mean()
    bound = new_input_bound(2.0, 100, 0.05, 3, units=units, examples=examples, tail=constant)
    promised = 1 - bound.confidence - 0.05
    assert promised == pytest.approx(units * math.exp(-examples / constant))
    assert missed <= promised + 5 * math.sqrt(promised / 20_000)
    assert missed > 0.8 * promised
    assert bound.value == epsilon_for_sensitivity(6.0, 100, 0.05, 3)
    assert bound.valid
    assert "assumed" in str(bound)


def test_dropping_is_covered_and_reached():
    terms, share = shares(*finite_set(True))
    values = share.max((0, 1))
    order = np.argsort(values)
    for count in (0, 1, 5, 20, 40):
        dropped = order[:count]
        error = (np.abs(terms[:, :, dropped].sum(2)) / np.abs(terms).sum(2)).max()
        bound = dropping_error_bound(values[dropped])
        assert error <= bound.value * (1 + 1e-12)
        assert bound.confidence is None
    assert dropping_error_bound(values[order[:1]]).value == pytest.approx(share[:, :, order[0]].max())
    assert dropping_error_bound(values).vacuous


def test_the_estimate_is_right_on_average():
    terms, share = shares(*finite_set(True))
    values = share.max((0, 1))
    probabilities = values / values.sum()
    counts = np.random.default_rng(8).multinomial(50, probabilities, size=20_000)
    estimate = np.einsum("dj,xij->dxi", counts / (50 * probabilities), terms)
    deviation = estimate.std(0) / math.sqrt(20_000)
    assert np.all(np.abs(estimate.mean(0) - terms.sum(2)) < 5 * deviation)


def test_expected_distinct_against_draws():
    p = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    counts = np.random.default_rng(9).multinomial(7, p, size=20_000)
    found = (counts > 0).sum(1)
    assert expected_distinct(p, 7) == pytest.approx(found.mean(), abs=5 * found.std() / math.sqrt(20_000))
    assert expected_distinct(p, 0) == 0
    assert expected_distinct(p, 10**15) == pytest.approx(4)
    assert expected_distinct([1.0], 1) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samples_needed_for_sensitivity(-1, 0.1, 0.1), "total_sensitivity"),
        (lambda: samples_needed_for_sensitivity(1, 0, 0.1), "epsilon"),
        (lambda: samples_needed_for_sensitivity(1, 1e-200, 0.1), "larger epsilon"),
        (lambda: samples_needed_for_sensitivity(1, 0.1, 1), "delta"),
        (lambda: epsilon_for_sensitivity(math.nan, 3, 0.1), "total_sensitivity"),
        (lambda: epsilon_for_sensitivity(1, 0, 0.1), "samples"),
        (lambda: epsilon_for_sensitivity(1, 1, 0.1, 0), "outputs"),
        (lambda: new_input_bound(1, 1, 0.1, 1, units=10, examples=9), "too few"),
        (lambda: new_input_bound(1, 1, 0.1, 1, units=10, examples=99, tail=0.5), "tail"),
        (lambda: dropping_error_bound([-1.0]), "dropped"),
        (lambda: expected_distinct([1.5], 3), "at most 1"),
        (lambda: expected_distinct([0.5], -1), "samples"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
