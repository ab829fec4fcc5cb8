"""Local search: predicted, incremental and full evaluation agree, and nothing is kept that does not help."""

import itertools

import numpy as np
import pytest
import torch
from test_code_training import DESIGNS, SMALL, halves, whole_weights

from specprune.analysis.code_design import Design
from specprune.analysis.code_margins import Change, NearBoundary, margins_of
from specprune.analysis.code_search import CodeSearch
from specprune.analysis.code_training import random_start, train_epochs, training_images, word_bits
from specprune.bounds.code_length import code_length_limit
from specprune.compress.integer_network import count_errors
from specprune.compress.vocabulary import LayerSpec

DEEP = Design(
    1,
    1,
    False,
    (
        LayerSpec("conv", 3, 3, 1, 1, 2),
        LayerSpec("conv", 3, 3, 2, 1, 2, "input"),
        LayerSpec("conv", 4, 1, 1, 0, 1, relu=False),
        LayerSpec("linear", 2, 1, 1, 0, 2, relu=False),
    ),
)


def searched(design, n=80, seed=0, near=50):
    side = 16 if design.features == "edges" else 8
    generator = torch.Generator().manual_seed(seed)
    # Coarse patterns: on noise, a network gives all images the same class.
    blocks = torch.randint(256, (n, design.channels, 2, 2), dtype=torch.uint8, generator=generator)
    pixels = blocks.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    targets = torch.randint(design.layers[-1].out_channels, (n,), generator=generator)
    images = training_images(design, pixels, targets)
    return CodeSearch(design.network(whole_weights(design, seed)), design, images, near=near), pixels, targets


def near(search, rows):
    return NearBoundary(search.design, search.images, rows, search._weights())


def some_changes(search, generator, count):
    changes = []
    for _ in range(count):
        weights = []
        for owner in generator.integers(0, len(search.arrays), generator.integers(1, 3)):
            levels = search.design.owners[owner].levels
            place = int(generator.integers(search.arrays[owner].size))
            weights.append((int(owner), place, int(generator.integers(-levels, levels + 1))))
        changes.append(Change(*zip(*sorted(weights), strict=True)))
    return changes


@pytest.mark.parametrize("design", [*DESIGNS, DEEP])
def test_incremental_errors_are_those_of_the_changed_network(design):
    search, _, targets = searched(design)
    rows = torch.arange(0, 80, 2)
    stored = near(search, rows)
    changes = some_changes(search, np.random.default_rng(1), 30)
    found = stored.errors_after(changes)
    before = [array.copy() for array in search.arrays]
    differ = 0
    for change, errors in zip(changes, found, strict=True):
        search._apply(change)
        wrong = (search._all_scores()[rows].argmax(1) != targets[rows]).sum()
        assert errors == int(wrong)
        differ += errors != stored.errors
        search._restore(search.errors, before)
    assert differ  # or the test could not fail


@pytest.mark.parametrize("design", [DESIGNS[1], DEEP])
def test_slopes_are_derivatives_of_the_margins(design):
    search, _, _ = searched(design, n=12)
    stored = near(search, torch.arange(12))
    slopes = stored.slopes()
    first, close = 0, []
    for owner, (array, gain) in enumerate(zip(search.arrays, search.gains, strict=True)):
        for place in range(0, array.size, max(1, array.size // 5)):
            moved = []
            for step in (-1e-3, 1e-3):
                weights = search._weights()
                weights[owner].view(-1)[place] += step * gain
                search._weights = lambda weights=weights: weights
                moved.append(margins_of(search._all_scores(), search.images.targets))
                del search._weights
            found = (moved[1] - moved[0]) / 2e-3
            close.append(torch.isclose(found, slopes[first + place] * gain, rtol=0.02, atol=0.01).float().mean())
        first += array.size
    assert torch.stack(close).mean() > 0.9  # kinks spoil some


def test_extra_bits_are_those_of_the_changed_word():
    search, _, _ = searched(DEEP)
    singles = search._singles()
    expected = sum(array.size * 2 * layer.levels for array, layer in zip(search.arrays, DEEP.owners, strict=True))
    assert len(singles.bits) == expected
    before, length = [array.copy() for array in search.arrays], word_bits(search.network())
    assert search.bits == pytest.approx(length)
    for i in range(0, expected, 37):
        change = Change((int(singles.owner[i]),), (int(singles.place[i]),), (int(singles.value[i]),))
        assert search._extra_bits(change) == pytest.approx(singles.bits[i])
        search._apply(change)
        assert word_bits(search.network()) - length == pytest.approx(singles.bits[i])
        search._restore(search.errors, before)


def trained_search(n=600, **settings):
    pixels, targets = halves(n)
    images = training_images(SMALL, pixels, targets)
    state = train_epochs(SMALL, images, random_start(SMALL, 0), 3, seed=0, batch=20)
    return CodeSearch(SMALL.network(state.weights), SMALL, images, **settings), pixels, targets


def test_rounds_lower_the_certificate_and_keep_the_books():
    search, pixels, targets = trained_search(near=200)
    values = [search.certificate]
    for pairs in (False, True, False, True):
        kept = search.round(pairs=pairs, tries=64)
        values.append(search.certificate)
        assert (values[-1] < values[-2]) == (kept > 0)
    assert values[-1] < values[0] - 0.01
    network = search.network()
    assert count_errors(network, pixels, targets) == search.errors
    assert search.certificate == code_length_limit(search.errors, 600, word_bits(network), 0.05)
    assert search.tried >= search.kept > 0


def test_what_helps_near_the_boundary_alone_is_taken_back():
    search, _, _ = trained_search(near=12)
    refused = 0
    for _ in range(12):
        before, tried = search.certificate, search.tried
        kept = search.round(tries=32)
        assert (search.certificate < before) == (kept > 0)
        assert search.certificate <= before
        refused += search.tried - tried - kept
    assert refused


@pytest.mark.slow
def test_what_is_left_is_a_local_optimum():
    search, pixels, targets = trained_search(near=600)
    before = -1
    while search.tried > before:
        before = search.tried
        search.round(tries=1000)
    reached = search.certificate
    for owner, (array, layer) in enumerate(zip(search.arrays, SMALL.owners, strict=True)):
        for place, value in itertools.product(range(array.size), range(-layer.levels, layer.levels + 1)):
            arrays = [a.copy() for a in search.arrays]
            arrays[owner].ravel()[place] = value
            network = SMALL.network([torch.from_numpy(a) for a in arrays])
            errors = count_errors(network, pixels, targets)
            assert code_length_limit(errors, 600, word_bits(network), 0.05) >= reached


def test_the_clock_stops_a_round():
    search, _, _ = trained_search()
    assert search.round(out_of_time=lambda: True) == 0
    assert search.tried == 0
