"""Widths from budgets: met, maximal, monotone; and widths from degrees of freedom."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress.allocation import dof_allocation, lambda_allocation, uniform_allocation
from specprune.compress.cost import CostModel, CostTerm

keeps = st.floats(0.05, 1.0)


@st.composite
def chains(draw):
    """A chain a -> b -> c with costs as of linear layers, and a fixed part."""
    full = {name: draw(st.integers(2, 60)) for name in "abc"}
    fixed = draw(st.integers(0, 5))
    terms = (
        CostTerm(2.0 * 10 * full["a"], (), (("a", 1.0),)),
        CostTerm(2.0 * full["a"] * full["b"], (("a", 1.0),), (("b", 1.0),)),
        CostTerm(2.0 * full["b"] * full["c"], (("b", 1.0),), (("c", 1.0),)),
        CostTerm(2.0 * full["c"] * 3, (("c", 1.0),), ()),
        CostTerm(float(fixed), (), ()),
    )
    return CostModel(full, terms)


@st.composite
def spectra_of(draw, full):
    spectra = {}
    for name, width in full.items():
        decay = draw(st.floats(0.2, 3.0))
        rank = draw(st.integers(1, width))
        scale = 10.0 ** draw(st.integers(-3, 3))
        spectra[name] = scale * np.where(np.arange(width) < rank, np.arange(1.0, width + 1) ** -decay, 0.0)
    return spectra


def dof(values, lam):
    return sum(value / (value + lam) for value in values)


def uniform_widths(full, fraction):
    return {name: max(1, math.floor(fraction * width + 1e-9)) for name, width in full.items()}


def fits(cost, widths, keep):
    return cost.total(widths) <= keep * cost.total() * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(cost=chains(), keep=keeps)
def test_uniform_widths_are_the_largest_that_fit(cost, keep):
    # The twin walks through every fraction at which a width changes, just after the change.
    steps = {(k - 1e-9) / width + 1e-14 for width in cost.full.values() for k in range(1, width + 1)}
    fitting = [f for f in sorted({0.0} | steps) if fits(cost, uniform_widths(cost.full, f), keep)]
    if not fitting:
        with pytest.raises(ValueError, match="smallest widths"):
            uniform_allocation(cost, keep, {}, 1e-6)
        return
    allocation = uniform_allocation(cost, keep, dict.fromkeys(cost.full, 2.0), 1e-6)
    assert allocation.widths == uniform_widths(cost.full, fitting[-1])
    assert allocation.lams == dict.fromkeys(cost.full, 2e-06)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), cost=chains(), keep=keeps)
def test_widths_by_degrees_of_freedom(data, cost, keep):
    spectra = data.draw(spectra_of(cost.full))
    if not fits(cost, dict.fromkeys(cost.full, 1), keep):
        with pytest.raises(ValueError, match="smallest widths"):
            dof_allocation(cost, keep, spectra)
        return
    allocation = dof_allocation(cost, keep, spectra)
    relative = {name: allocation.lams[name] / spectra[name].sum() for name in spectra}
    common = relative["a"]
    assert all(value == pytest.approx(common, rel=1e-12) for value in relative.values())
    if keep == 1.0:
        assert allocation.widths == cost.full
        return
    assert fits(cost, allocation.widths, keep)
    for name, width in allocation.widths.items():
        exact = dof(spectra[name], allocation.lams[name])
        assert max(1, math.ceil(exact * (1 - 1e-9))) <= width <= min(cost.full[name], math.ceil(exact * (1 + 1e-9)))
    # Maximal: a slightly smaller lambda breaks the budget, unless it is the smallest that is tried.
    if common > 1.1e-12:
        more = {n: dof(values, allocation.lams[n] * (1 - 1e-9)) * (1 + 1e-9) for n, values in spectra.items()}
        assert not fits(cost, {n: min(cost.full[n], max(1, math.ceil(count))) for n, count in more.items()}, keep)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), cost=chains(), keep=keeps, more=keeps)
def test_a_larger_budget_never_narrows_a_group(data, cost, keep, more):
    spectra = data.draw(spectra_of(cost.full))
    low, high = sorted((keep, more))
    for allocate in (
        lambda share: uniform_allocation(cost, share, dict.fromkeys(cost.full, 1.0), 1e-6),
        lambda share: dof_allocation(cost, share, spectra),
    ):
        try:
            narrow = allocate(low).widths
        except ValueError:
            continue
        wide = allocate(high).widths
        assert all(narrow[name] <= wide[name] for name in narrow)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), cost=chains(), power=st.integers(-6, 6))
def test_the_unit_of_the_nodes_does_not_matter(data, cost, power):
    spectra = data.draw(spectra_of(cost.full))
    scaled = {name: values * 2.0**power for name, values in spectra.items()}  # exact in binary
    try:
        plain = dof_allocation(cost, 0.5, spectra)
    except ValueError:
        return
    other = dof_allocation(cost, 0.5, scaled)
    assert other.widths == plain.widths
    for name in plain.lams:
        assert other.lams[name] == pytest.approx(plain.lams[name] * 2.0**power, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(cost=chains(), data=st.data())
def test_a_budget_met_to_the_last_bit_is_met(cost, data):
    widths = uniform_widths(cost.full, data.draw(st.floats(0.0, 1.0)))
    keep = cost.total(widths) / cost.total()
    found = uniform_allocation(cost, keep, {}, 1e-6).widths
    assert all(found[name] >= widths[name] for name in widths)


def test_keeping_everything():
    cost = CostModel({"a": 7}, (CostTerm(7.0, (), (("a", 1.0),)),))
    spectra = {"a": np.array([1.0, 0, 0, 0, 0, 0, 0])}
    assert uniform_allocation(cost, 1.0, {"a": 1.0}, 1e-6).widths == {"a": 7}
    assert dof_allocation(cost, 1.0, spectra).widths == {"a": 7}
    assert dof_allocation(cost, 0.99, spectra).widths == {"a": 1}  # no more than the rank


def test_impossible_budgets_say_what_is_possible():
    cost = CostModel({"a": 10}, (CostTerm(5.0, (), (("a", 1.0),)), CostTerm(5.0, (), ())))
    for allocate in (
        lambda: uniform_allocation(cost, 0.5, {}, 1e-6),
        lambda: dof_allocation(cost, 0.5, {"a": np.ones(10)}),
    ):
        with pytest.raises(ValueError, match=r"keep=0\.5: with the smallest widths the network still costs 0\.55"):
            allocate()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), exponent=st.floats(-6, -2))
def test_widths_at_a_given_lambda(data, exponent):
    full = {name: data.draw(st.integers(2, 400)) for name in "ab"}
    spectra = data.draw(spectra_of(full))
    shares = [values.max() / values.sum() for values in spectra.values()]  # the theorem asks for lambda below them
    lam = min(10.0**exponent, *shares)
    plain = lambda_allocation(full, spectra, lam, theory=False)
    theory = lambda_allocation(full, spectra, lam, theory=True)
    for name, values in spectra.items():
        level = lam * values.sum()
        assert plain.lams[name] == theory.lams[name] == pytest.approx(level, rel=1e-12)
        count = dof(values, level)
        for allocation, wish in ((plain, count), (theory, 5 * count * math.log(80 * count))):
            choices = {min(full[name], max(1, math.ceil(wish * (1 + e)))) for e in (-1e-9, 0, 1e-9)}
            assert allocation.widths[name] in choices


def test_the_theorem_is_silent_above_the_largest_eigenvalue():
    spectra = {"a": np.array([3.0, 1.0])}
    assert lambda_allocation({"a": 2}, spectra, 0.75, theory=True).widths == {"a": 2}
    with pytest.raises(ValueError, match=r"lam=0\.8: .* largest eigenvalue, which is 0\.75 of the trace in group 'a'"):
        lambda_allocation({"a": 2}, spectra, 0.8, theory=True)
    assert lambda_allocation({"a": 2}, spectra, 0.8, theory=False).widths == {"a": 1}
