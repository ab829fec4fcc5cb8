"""Occam bound: the code obeys Kraft, the inversion rounds outward, and the bound covers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune.bounds.occam import (
    binary_kl,
    integer_code_length,
    invert_binary_kl,
    network_code_length,
    occam_bound,
    occam_bound_relaxed,
    power_of_two_above,
    power_of_two_below,
    quantise,
    tensor_code_length,
)

PROBABILITY = st.floats(0.0, 1.0)


def test_kraft_of_integers_and_bits():
    total = math.fsum(math.exp(-integer_code_length(k)) for k in range(-3000, 3001))
    assert 0.749 < total <= 0.75
    assert math.fsum(1 / (b * (b + 1)) for b in range(1, 100_000)) <= 1


def test_kraft_of_whole_networks():
    """Enumerate a tiny family: 1 prunable layer of width <= 2, two tensors, every exponent, bits and weight value."""
    original, total = 2, 0.0
    for width, bits in itertools.product((1, 2), range(1, 9)):
        counts = [width, width]
        for k1, k2 in itertools.product(range(-40, 41), repeat=2):
            length = network_code_length(counts, [k1, k2], bits, [original])
            total += 2.0 ** (bits * sum(counts)) * math.exp(-length)  # so many networks share this length
    assert total <= 1
    assert total >= 0.4  # 8/9 of bits * (3/4)^2 of the exponents, less the tails: the code wastes little


def test_code_length_by_hand():
    assert tensor_code_length(100, 4, 0) == pytest.approx(400 * math.log(2) + math.log(4))
    assert tensor_code_length(1, 1, -3) == pytest.approx(math.log(2) + math.log(2 * 4 * 5))
    expected = 4 * 12 * math.log(2) + math.log(4) + math.log(12) + math.log(20) + math.log(50) + math.log(60)
    assert network_code_length([10, 2], [0, 1], 4, [50, 60]) == pytest.approx(expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_quantised_values_lie_on_the_grid_that_is_paid_for(bits):
    tensor = np.random.default_rng(0).normal(0, 3, (7, 5))
    result = quantise(tensor, bits)
    step = 2.0 ** (result.k + 1 - bits)
    levels = result.values / step
    assert np.all(levels == np.round(levels))
    assert result.values.min() >= -(2.0**result.k)
    assert result.values.max() <= 2.0**result.k - step
    assert len(np.unique(result.values)) <= 2**bits
    assert np.max(np.abs(result.values - tensor)) <= step
    assert 2.0 ** (result.k - 1) < np.max(np.abs(tensor)) <= 2.0**result.k


def test_quantise_edges():
    assert quantise(np.zeros(3), 4).k == 0
    assert quantise([1e-320], 4).values == 0.0
    np.testing.assert_array_equal(quantise([-1.0, 0.5], 2).values, [-1.0, 0.5])
    for bad in ([math.nan], []):
        with pytest.raises(ValueError, match="finite"):
            quantise(bad, 4)
    with pytest.raises(ValueError, match="53"):
        quantise([1.0], 54)


@given(st.floats(1e-300, 1e300))
def test_powers_of_two_bracket(value):
    above, below = power_of_two_above(value), power_of_two_below(value)
    assert math.ldexp(1.0, below) <= value <= math.ldexp(1.0, above)
    assert above - below <= 1


@given(PROBABILITY, PROBABILITY)
def test_binary_kl_obeys_pinsker(q, p):
    assert binary_kl(q, p) >= 2 * (p - q) ** 2 * (1 - 1e-9) - 1e-15
    assert binary_kl(q, q) == 0


@given(PROBABILITY, st.floats(1e-6, 20.0))
def test_kl_inverse_rounds_outward(q, budget):
    p = invert_binary_kl(q, budget)
    assert q <= p <= 1
    assert p == 1 or binary_kl(q, p) >= budget
    # Round trip: one float below, the budget is not reached yet.
    below = np.nextafter(p, 0.0)
    assert below <= q or binary_kl(q, below) <= budget


@given(PROBABILITY, PROBABILITY, st.floats(1e-4, 5.0), st.floats(1e-4, 5.0))
def test_kl_inverse_is_monotone(q1, q2, b1, b2):
    low = invert_binary_kl(min(q1, q2), min(b1, b2))
    assert low <= invert_binary_kl(max(q1, q2), max(b1, b2)) * (1 + 1e-9)


def test_kl_inverse_closed_forms():
    assert invert_binary_kl(0.0, 0.3) == pytest.approx(1 - math.exp(-0.3), rel=1e-14)
    assert invert_binary_kl(0.3, 0.0) == 0.3
    assert invert_binary_kl(1.0, 0.1) == 1.0
    assert invert_binary_kl(0.2, math.inf) == 1.0
    for q, budget in ((-0.1, 1.0), (1.1, 1.0), (0.5, -1.0), (0.5, math.nan)):
        with pytest.raises(ValueError):
            invert_binary_kl(q, budget)


def test_reference_value():
    """Arithmetic check: 60 000 examples, 2000 parameters of 4 bits, 2 % training error gives about 14 %."""
    code = 2000 * 4 * math.log(2) + 60
    assert occam_bound(0.02, 60_000, code, 0.05).value == pytest.approx(0.144, abs=1e-3)


@given(PROBABILITY, st.integers(1, 10**6), st.floats(0.0, 1e4), st.floats(1e-6, 0.999))
def test_kl_form_is_below_the_relaxed_form_and_monotone(error, n, code, delta):
    bound = occam_bound(error, n, code, delta)
    assert bound.value <= occam_bound_relaxed(error, n, code, delta).value * (1 + 1e-9)
    assert bound.value == pytest.approx(sum(bound.terms.values()))
    assert occam_bound(error, 2 * n, code, delta).value <= bound.value * (1 + 1e-9)
    assert occam_bound(error, n, code, delta / 2).value >= bound.value * (1 - 1e-9)
    assert occam_bound(error, n, code + 1, delta).value >= bound.value * (1 - 1e-9)


def coverage_failures(delta, charge, trials=4000):
    """Share of samples on which some member of a finite class breaks its bound; risks are known by construction."""
    generator = np.random.default_rng(11)
    risks = np.concatenate([[0.02, 0.05, 0.1], np.linspace(0.2, 0.6, 61)])
    n = 60
    counts = generator.binomial(n, risks, size=(trials, len(risks)))
    code = math.log(len(risks)) if charge else 0.0  # uniform prior over the class
    limit = np.array([occam_bound(k / n, n, code, delta).value for k in range(n + 1)])
    return float(np.mean(np.any(risks > limit[counts], axis=1)))


@pytest.mark.parametrize("delta", [0.2, 0.05])
def test_bound_covers_all_members_at_once(delta):
    assert coverage_failures(delta, charge=True) <= delta
    # Without the price of the choice the bound breaks: the test above can fail.
    assert coverage_failures(delta, charge=False) > delta


def test_refusals():
    for arguments in ((1.2, 10, 1.0, 0.1), (0.1, 0, 1.0, 0.1), (0.1, 10, -1.0, 0.1), (0.1, 10, 1.0, 0.0)):
        with pytest.raises(ValueError):
            occam_bound(*arguments)
    with pytest.raises(ValueError, match="one entry a tensor"):
        network_code_length([1, 2], [0], 4)
    with pytest.raises(TypeError):
        tensor_code_length(10, 4, 0.5)
    with pytest.raises(ValueError):
        network_code_length([1], [0], 4, [0])


def test_hopeless_bound_is_called_vacuous():
    assert occam_bound(0.1, 10, 1e6, 0.05).vacuous
    assert occam_bound_relaxed(0.1, 10, 1e6, 0.05).vacuous
    assert not occam_bound(0.1, 10_000, 100.0, 0.05).vacuous
