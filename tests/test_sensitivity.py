"""Loss curves from measurements, and the widths they lead to, against brute force."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import randomise, small_mlp, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress import CalibrationData, collect_moments, find_groups
from specprune.compress.allocation import loss_allocation
from specprune.compress.cost import CostModel, CostTerm
from specprune.compress.divergence import Reference, output_divergence
from specprune.compress.reconstruction import problem_from_moments
from specprune.compress.sensitivity import SENSITIVITY_WIDTHS, calibrated_curves, measured_curves, measured_loss
from specprune.compress.surgery import Group, Slice


def group_of(width, name="a"):
    units = np.arange(width)[:, None]
    return Group(name, width, (Slice(name, units),), (), (Slice("z", units),))


def first(group, size):
    return np.arange(size)


def residual_of(width, power=1.3):
    curve = np.arange(width + 1, dtype=float)
    curve[1:] = curve[1:] ** -power - width**-power
    return curve


@settings(max_examples=40, deadline=None)
@given(width=st.integers(5, 80), factor=st.floats(1e-3, 1e3), power=st.floats(0.4, 2.9))
def test_the_law_is_recovered(width, factor, power):
    group, residual = group_of(width), residual_of(width)
    measured = []

    def measure(_, kept):
        measured.append(len(kept))
        return factor * residual[len(kept)] ** power

    curve = calibrated_curves([group], {"a": residual}, first, measure)["a"]
    assert len(measured) == 2
    inner = np.arange(1, width)
    expected = factor * np.maximum(residual[inner], 1e-12) ** power
    np.testing.assert_allclose(curve[inner], expected, rtol=1e-6)
    assert curve[width] == 0
    assert curve[0] == math.inf


def test_noise_does_not_bend_the_curve_beyond_use():
    group, residual = group_of(20), residual_of(20)
    for values in ((1.0, 1e-9), (1e-9, 1.0)):  # far too steep, and rising with the width
        answers = iter(values)
        curve = calibrated_curves([group], {"a": residual}, first, lambda _, __, answers=answers: next(answers))["a"]
        assert np.all(np.diff(curve) <= 0)
        assert np.all(np.isfinite(curve[1:]))
        slope = (np.log(curve[4]) - np.log(curve[10])) / (np.log(residual[4]) - np.log(residual[10]))
        assert slope == pytest.approx(3.0 if values[0] == 1.0 else 0.3, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 80), seed=st.integers(0, 1000))
def test_measured_curves_pass_through_their_points(width, seed):
    values = np.sort(np.random.default_rng(seed).uniform(0.01, 1, width + 1))[::-1]
    points = {}

    def measure(_, kept):
        points[len(kept)] = values[len(kept)]
        return points[len(kept)]

    curve = measured_curves([group_of(width)], first, measure)["a"]
    assert set(points) == {min(width, max(1, round(share * width))) for share in SENSITIVITY_WIDTHS}
    for size, value in points.items():
        assert curve[size] == (pytest.approx(value, rel=1e-12) if size < width else 0.0)
    assert np.all(np.diff(curve) <= 0)
    between = [k for k in range(min(points), max(points)) if k not in points]
    for k in between:  # straight in the logarithm
        low, high = max(p for p in points if p < k), min(p for p in points if p > k)
        share = (k - low) / (high - low)
        assert math.log(curve[k]) == pytest.approx((1 - share) * math.log(points[low]) + share * math.log(points[high]))


def test_the_measured_loss_is_that_of_the_refitted_network():
    model = randomise(small_mlp((8, 12, 9, 3))).double().eval()
    data = CalibrationData([tensor(60, 8, dtype=torch.float64)])
    group = find_groups(model, data).groups[0]
    moments = collect_moments(model, data, ["fc2"], level="patch")["fc2"]
    problems = {"fc2": problem_from_moments(model, "fc2", moments, intercept=True)}
    kept = np.array([0, 3, 4, 7, 10])
    before = copy.deepcopy(model.state_dict())
    found = measured_loss(model, problems, {}, group, kept, Reference(model, data, 100), 0.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = data.first()
    with torch.no_grad():
        hidden = torch.relu(model.fc1(x))[:, kept]
        design = torch.cat([hidden, torch.ones(60, 1)], 1)
        second = design @ torch.linalg.lstsq(design, model.fc2(torch.relu(model.fc1(x)))).solution
        expected = output_divergence(model(x), model.fc3(torch.relu(second)))
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert found > 0
    whole = measured_loss(model, problems, {}, group, np.arange(12), Reference(model, data, 100), 0.0)
    assert whole < 1e-12


# Widths from loss curves.


def chain(full):
    a, b, c = ((name, 1.0) for name in "abc")
    terms = (
        CostTerm(5.0 * full["a"], (), (a,)),
        CostTerm(float(full["a"] * full["b"]), (a,), (b,)),
        CostTerm(float(full["b"] * full["c"]), (b,), (c,)),
        CostTerm(3.0 * full["c"], (c,), ()),
    )
    return CostModel(full, terms)


def convex_losses(full, seed):
    generator = np.random.default_rng(seed)
    losses = {}
    for name, width in full.items():
        steps = np.sort(generator.exponential(size=width))[::-1] * generator.uniform(0.1, 10)
        losses[name] = np.concatenate([[math.inf], np.cumsum(steps[::-1])[::-1][1:], [0.0]])
    return losses


def loss_of(losses, widths):
    return sum(losses[name][k] for name, k in widths.items())


def test_the_allocation_is_nearly_optimal():
    excess = []
    generator = np.random.default_rng(0)
    for seed in range(60):
        full = {name: int(generator.integers(4, 12)) for name in "abc"}
        cost, losses, keep = chain(full), convex_losses(full, seed), generator.uniform(0.3, 0.9)
        lams = dict.fromkeys(full, 2.0)
        allocation = loss_allocation(cost, keep, losses, lams)
        budget = keep * cost.total() * (1 + 1e-12)
        assert cost.total(allocation.widths) <= budget
        assert allocation.lams == lams
        fitting = [
            widths
            for sizes in itertools.product(*(range(1, width + 1) for width in full.values()))
            if cost.total(widths := dict(zip(full, sizes, strict=True))) <= budget
        ]
        best = min(loss_of(losses, widths) for widths in fitting)
        excess.append(loss_of(losses, allocation.widths) / best - 1)
        random = fitting[generator.integers(len(fitting))]
        assert loss_of(losses, allocation.widths) <= loss_of(losses, random) * (1 + 1e-12)
        for name in full:  # nothing that fits is left out
            if allocation.widths[name] < full[name]:
                wider = {**allocation.widths, name: allocation.widths[name] + 1}
                assert cost.total(wider) > budget
    assert min(excess) >= -1e-12
    assert np.median(excess) < 0.05
    assert np.mean(excess) < 0.15


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), keep=st.floats(0.05, 1.0), multiple=st.integers(1, 5))
def test_budgets_and_multiples_are_kept(data, seed, keep, multiple):
    full = {name: data.draw(st.integers(1, 150)) for name in "abc"}
    cost, losses = chain(full), convex_losses(full, seed)
    multiples = dict.fromkeys(full, multiple)
    smallest = {name: min(width, multiple) for name, width in full.items()}
    if cost.total(smallest) > keep * cost.total() * (1 + 1e-12):
        with pytest.raises(ValueError, match="with the smallest widths the network still costs"):
            loss_allocation(cost, keep, losses, {}, multiples)
        return
    widths = loss_allocation(cost, keep, losses, {}, multiples).widths
    assert cost.total(widths) <= keep * cost.total() * (1 + 1e-9)
    assert all(1 <= widths[name] <= full[name] for name in full)
    assert all(widths[name] % multiple == 0 or widths[name] == full[name] for name in full)
    if keep == 1.0:
        assert widths == full


def test_a_flat_stretch_behind_a_steep_step_is_found():
    """Group a loses much with its first node and nothing with the next six; b loses a little with each."""
    full = {"a": 8, "b": 8}
    cost = CostModel(full, (CostTerm(8.0, (), (("a", 1.0),)), CostTerm(8.0, (), (("b", 1.0),))))
    losses = {
        "a": np.array([math.inf, *[1.0] * 7, 0.0]),
        "b": np.array([math.inf, *np.arange(7, -1, -1) * 0.4]),
    }
    widths = loss_allocation(cost, 10 / 16, losses, {}).widths
    assert widths["b"] == 8
    assert widths["a"] == 2
