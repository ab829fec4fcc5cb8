"""Elimination and addition of units against recomputation from the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress import blocks
from specprune.compress.blocks import MIN_RIDGE, Item, backward_path, greedy_path, kept_units, loss_curve

RIDGE = 1e-4


def make_item(units, width, seed=0, free=0, outputs=4, rank=None):
    """A problem with `width` columns a unit in mixed order, and `free` columns that belong to none."""
    generator = np.random.default_rng(seed)
    size = units * width + free
    rows = generator.standard_normal((rank or 3 * size, size)) @ generator.standard_normal((size, size))
    gram = rows.T @ rows / len(rows)
    cross = gram @ generator.standard_normal((size, outputs)) + 0.1 * generator.standard_normal((size, outputs))
    order = generator.permutation(size)[: units * width].reshape(units, width)
    return Item(torch.as_tensor(gram), torch.as_tensor(cross), order)


def explained(items, kept, ridge=RIDGE):
    """Tr P_J^T K_JJ^-1 P_J with the columns of the kept units and of no unit, by a dense solve."""
    total = 0.0
    for item in items:
        gram, cross = item.gram.numpy(), item.cross.numpy()
        damped = gram + max(ridge, MIN_RIDGE) * np.trace(gram) / len(gram) * np.eye(len(gram))
        free = np.setdiff1d(np.arange(len(gram)), item.columns.ravel())
        columns = np.concatenate([free, item.columns[list(kept)].ravel()]).astype(int)
        if len(columns):
            total += np.sum(cross[columns] * np.linalg.solve(damped[np.ix_(columns, columns)], cross[columns]))
    return total


def naive_backward(items, size):
    kept, order, values = list(range(len(items[0].columns))), [], []
    while len(kept) > size:
        full = explained(items, kept)
        losses = [full - explained(items, [u for u in kept if u != out]) for out in kept]
        place = int(np.argmin(losses))
        order.append(kept.pop(place))
        values.append(losses[place])
    return order, values


def naive_greedy(items, size):
    left, chosen, values = list(range(len(items[0].columns))), [], []
    for _ in range(size):
        now = explained(items, chosen)
        gains = [explained(items, [*chosen, unit]) - now for unit in left]
        place = int(np.argmax(gains))
        chosen.append(left.pop(place))
        values.append(gains[place])
    return chosen, values


PROBLEMS = {
    "nodes": lambda: [make_item(12, 1)],
    "blocks": lambda: [make_item(9, 3)],
    "free columns": lambda: [make_item(8, 2, free=5)],
    "several": lambda: [make_item(9, 1, 1), make_item(9, 4, 2), make_item(9, 2, 3, free=2)],
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("pending", [1, 5, 256])
def test_paths_are_those_of_the_definition(monkeypatch, name, pending):
    monkeypatch.setattr(blocks, "PENDING", pending)
    items = PROBLEMS[name]()
    units = len(items[0].columns)
    before = [(item.gram.clone(), item.cross.clone()) for item in items]
    for find, naive, steps in ((backward_path, naive_backward, 1), (greedy_path, naive_greedy, units - 1)):
        path = find(items, steps, RIDGE)
        order, values = naive(items, steps)
        assert path.order.tolist() == order
        np.testing.assert_allclose(path.values, values, rtol=1e-6, atol=1e-9 * explained(items, range(units)))
    for item, (gram, cross) in zip(items, before, strict=True):  # what is handed over stays
        assert torch.equal(item.gram, gram)
        assert torch.equal(item.cross, cross)


@pytest.mark.parametrize("name", PROBLEMS)
def test_curves_are_losses_of_the_kept_sets(name):
    items = PROBLEMS[name]()
    units = len(items[0].columns)
    path = backward_path(items, 1, RIDGE)
    curve = loss_curve(path, units)
    full = explained(items, range(units))
    assert np.isnan(curve[0])
    assert len(curve) == units + 1
    for size in range(1, units + 1):
        kept = kept_units(path, units, size)
        assert len(kept) == size
        assert np.all(np.diff(kept) > 0)
        assert kept.tolist() == kept_units(backward_path(items, size, RIDGE), units, size).tolist()
        assert curve[size] == pytest.approx(full - explained(items, kept), rel=1e-6, abs=1e-9 * full)


@pytest.mark.parametrize("seed", range(4))
def test_both_are_better_than_chance(seed):
    items = [make_item(20, 2, seed), make_item(20, 1, seed + 50)]
    generator = np.random.default_rng(seed)
    for size in (4, 10, 16):
        random = max(explained(items, generator.permutation(20)[:size]) for _ in range(40))
        assert explained(items, kept_units(backward_path(items, size, RIDGE), 20, size)) >= random
        if size < 16:  # where most stay, adding is the weaker way
            assert explained(items, greedy_path(items, size, RIDGE).order) >= random


def test_backward_finds_a_pair_that_only_helps_together():
    """x1 and x2 = x1 + a small y: the target y needs both, and each alone says nothing about it."""
    generator = np.random.default_rng(0)
    x, y, z = generator.standard_normal((3, 2000))
    rows = np.stack([x, x + 0.1 * y, z + 0.5 * y], 1)
    item = Item(
        torch.as_tensor(rows.T @ rows / 2000), torch.as_tensor(rows.T @ y[:, None] / 2000), np.arange(3)[:, None]
    )
    assert kept_units(backward_path([item], 2, 0.0), 3, 2).tolist() == [0, 1]
    assert 2 in greedy_path([item], 2, 0.0).order


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 3), free=st.integers(0, 3), size=st.integers(1, 7))
def test_the_names_of_units_and_columns_do_not_matter(seed, width, free, size):
    item = make_item(8, width, seed, free=free)
    generator = np.random.default_rng(seed)
    units, columns = generator.permutation(8), generator.permutation(len(item.gram))
    place = np.argsort(columns)
    moved = Item(item.gram[columns][:, columns], item.cross[columns], place[item.columns[units]])
    for find in (backward_path, greedy_path):
        plain, other = find([item], size, RIDGE), find([moved], size, RIDGE)
        assert units[other.order].tolist() == plain.order.tolist()
        np.testing.assert_allclose(other.values, plain.values, rtol=1e-5, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), other=st.floats(1e-3, 1e3))
def test_the_unit_of_the_inputs_does_not_matter(seed, scale, other):
    item = make_item(8, 2, seed)
    scaled = Item(item.gram * scale**2, item.cross * scale * other, item.columns)
    for find in (backward_path, greedy_path):
        assert find([item], 3, RIDGE).order.tolist() == find([scaled], 3, RIDGE).order.tolist()


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_copies_go_first_and_cost_nothing(ridge):
    item = make_item(6, 2, 3)
    twice = np.concatenate([np.arange(12), item.columns[[1, 4]].ravel()])
    doubled = Item(item.gram[twice][:, twice], item.cross[twice], np.concatenate([item.columns, [[12, 13], [14, 15]]]))
    path = backward_path([doubled], 1, ridge)
    pairs = ({1, 6}, {4, 7})
    assert all(len(set(path.order[:2].tolist()) & pair) == 1 for pair in pairs)
    total = float((item.cross * torch.linalg.solve(item.gram, item.cross)).sum())
    assert path.values[:2].max() < 1e-3 * total
    assert path.values[2] > 1e-3 * total
    assert sorted([*path.order.tolist(), *kept_units(path, 8, 1).tolist()]) == list(range(8))
    greedy = greedy_path([doubled], 8, ridge).order
    assert sorted(greedy.tolist()) == list(range(8))
    assert all(len(set(greedy[:6].tolist()) & pair) == 1 for pair in pairs)


def test_singular_and_empty_problems_do_not_crash():
    low = make_item(10, 2, 1, rank=5)
    zero = Item(
        torch.zeros(10, 10, dtype=torch.float64), torch.zeros(10, 3, dtype=torch.float64), np.arange(10)[:, None]
    )
    dead = make_item(10, 1, 2)
    dead.gram[3] = dead.gram[:, 3] = 0
    dead.cross[3] = 0
    for items in ([low], [zero], [dead], [low, zero, dead]):
        for path in (backward_path(items, 1, 0.0), greedy_path(items, 9, 0.0)):
            assert len(set(path.order.tolist())) == 9
            assert np.all(np.isfinite(path.values))
            assert np.all(path.values >= 0)
    unit = int(np.flatnonzero(dead.columns[:, 0] == 3)[0])
    assert backward_path([dead], 9, 0.0).order.tolist() == [unit]
    assert unit not in greedy_path([dead], 9, 0.0).order


def test_nothing_is_eliminated_when_all_stay():
    path = backward_path([make_item(5, 1)], 5, RIDGE)
    assert len(path.order) == len(path.values) == 0
    assert kept_units(path, 5, 5).tolist() == list(range(5))
