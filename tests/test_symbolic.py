"""SymPy statements: each formula equals the code, each prints, and the rates come out of the algebra."""

import math

import pytest
import sympy as sp

from specprune.bounds.covering import LayerSize, covering_bound, dudley_bound, optimal_polynomial_width
from specprune.bounds.degrees_of_freedom import power_law_degrees_of_freedom
from specprune.bounds.occam import occam_bound_relaxed
from specprune.bounds.spectral import approximation_a_priori, samples_needed, sampling_failure_probability
from specprune.bounds.symbolic import (
    STATEMENTS,
    approximation,
    covering,
    dudley,
    polynomial_rate,
    power_law_constant,
)


def test_every_statement_prints_and_explains_itself():
    assert len(STATEMENTS) > 40
    for name, statement in STATEMENTS.items():
        assert statement.name == name
        assert statement.latex()
        assert statement.assumptions
        assert statement.source
        assert statement.provenance
        assert statement.expression.rhs.free_symbols == set(statement.symbols)
        block = statement.slide()
        assert statement.latex() in block
        assert block.count(r"\item") == len(statement.assumptions)
        assert block.count("{") == block.count("}")


def test_published_form_gives_no_number():
    with pytest.raises(ValueError, match="unknown constant"):
        STATEMENTS["theorem_2_published"].lambdify()
    assert "C_{1}" in STATEMENTS["theorem_2_published"].latex()


def test_degrees_of_freedom():
    formula = STATEMENTS["power_law_degrees_of_freedom"].lambdify()
    assert formula(2.0, 0.4, 0.01) == pytest.approx(power_law_degrees_of_freedom(2.0, 0.4, 0.01), rel=1e-12)


@pytest.mark.parametrize("dof", [0.9, 12.0, 150.0])
@pytest.mark.parametrize("delta", [0.2, 0.01])
def test_sampling(dof, delta):
    explicit = STATEMENTS["samples_explicit"].lambdify()(dof, delta, 0.3)
    assert math.ceil(explicit) == samples_needed(dof, delta, ratio=0.3)
    assert math.ceil(STATEMENTS["samples_bach"].lambdify()(dof, delta)) == samples_needed(dof, delta, form="bach")
    failure = STATEMENTS["sampling_failure"].lambdify()
    assert min(1, failure(dof, 900, 0.3)) == pytest.approx(sampling_failure_probability(dof, 900, 0.3), rel=1e-12)
    # The explicit sample size is exactly where the failure probability meets delta.
    assert failure(dof, explicit, 0.3) == pytest.approx(delta, rel=1e-10)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_approximation(depth):
    lams = [0.1 / (k + 1) for k in range(depth - 1)]
    expected = approximation_a_priori(lams, [1.7] * (depth - 1)).value
    assert approximation(depth).lambdify()(1.7, *lams) == pytest.approx(expected, rel=1e-12)


def test_occam():
    expected = occam_bound_relaxed(0.03, 5000, 321.0, 0.02).value
    assert STATEMENTS["occam_relaxed"].lambdify()(0.03, 321.0, 5000, 0.02) == pytest.approx(expected, rel=1e-12)


def price(*exponents):
    return sum(math.log(2 * (abs(k) + 1) * (abs(k) + 2)) for k in exponents)


def test_covering_and_dudley():
    layers = [LayerSize(20, 5, 2.0, 0.5), LayerSize(15, 3, 4.0, 1.0), LayerSize(9, 3, 0.5, 8.0)]
    setting = {"input_radius": 3.0, "n": 700, "gamma": 0.25, "delta": 0.1, "empirical_ramp": 0.2}
    numbers = [0.2, 0.03, 0.25, 700, 0.1]
    flat = [v for x in layers for v in (x.weights, x.biases, x.operator_norm, x.bias_norm)]
    one = covering_bound(layers, approximation_error=0.03, original_widths=[9, 9], **setting)
    cost = price(-2, 1, 2, -1, -1, 0, 3) + 2 * math.log(9)
    assert covering(3).lambdify()(*numbers, cost, 3.0, *flat) == pytest.approx(one.value, rel=1e-12)
    two = dudley_bound(layers, approximation_error=0.03, original_widths=[9, 9], **setting)
    cost = price(-2, 2, 3) + 2 * math.log(9)
    assert dudley(3).lambdify()(*numbers, cost, 3.0, 55, 4.0, 8.0) == pytest.approx(two.value, rel=1e-12)


def test_polynomial_rate_is_derived():
    rate = polynomial_rate()
    a, b, beta, n, m = rate.symbols
    assert sp.simplify(rate.width_exponent - beta / (1 + 2 * beta)) == 0
    assert sp.simplify(rate.rate_exponent + 1 / (2 * (1 + 2 * beta))) == 0
    numbers = {a: 1.3, b: 0.4, beta: sp.Rational(2, 5), n: 10**5}
    width, value = optimal_polynomial_width(10**5, 0.4, bias=1.3, variance=0.4)
    assert float(rate.width.subs(numbers)) == pytest.approx(width, rel=1e-12)
    assert float(rate.value.subs(numbers)) == pytest.approx(value, rel=1e-12)
    # Stationary, and a minimum: the slope changes sign from minus to plus.
    slope = sp.diff(rate.objective, m).subs(numbers)
    assert float(slope.subs(m, 0.9 * width)) < 0 < float(slope.subs(m, 1.1 * width))
    # Bias and variance fall at the same rate.
    share = rate.value / (b * rate.width / sp.sqrt(n))
    assert float(share.subs(numbers)) == pytest.approx(float(share.subs({**numbers, n: 10**9})), rel=1e-12)


def test_power_law_constant_is_derived():
    constant = power_law_constant()
    (beta,) = constant.free_symbols
    assert float(constant.subs(beta, 0.3)) == pytest.approx(power_law_degrees_of_freedom(1.0, 0.3, 1.0), rel=1e-12)


def test_depth_is_checked():
    with pytest.raises(ValueError, match="at least 2"):
        approximation(1)
