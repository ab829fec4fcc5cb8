"""Pruning a network of the language: what can be left out is, and every channel keeps its fixed kernel."""

import dataclasses

import pytest
import torch

from specprune.analysis.code_design import Design, gains, scaled_design, scores
from specprune.analysis.code_pruning import can_be_pruned_to, pruned_weights
from specprune.compress.vocabulary import LayerSpec

PLAIN = Design(
    1,
    1,
    False,
    (
        LayerSpec("conv", 3, 3, 1, 1, 2),
        LayerSpec("conv", 4, 3, 2, 1, 2),
        LayerSpec("linear", 3, 1, 1, 0, 2, relu=False),
    ),
)
FILTERED = Design(
    1,
    1,
    False,
    (
        LayerSpec("conv", 8, 1, 1, 0, 2, relu=False),
        LayerSpec("filters", 8, 3, 2, 1),
        LayerSpec("conv", 4, 1, 1, 0, 2),
        LayerSpec("conv", 3, 4, 1, 0, 2, relu=False),
    ),
)
EARLY = (LayerSpec("filters", 1, 3, 1, 1), *PLAIN.layers)
ODD = (dataclasses.replace(FILTERED.layers[0], out_channels=6), dataclasses.replace(FILTERED.layers[1], out_channels=6))
TIED = (PLAIN.layers[0], LayerSpec("conv", 3, 3, 1, 1, 2), LayerSpec("conv", 3, 3, 1, 1, 2, tied=True))


def maps():
    return torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def scored(design, weights):
    scaled = [weight * gain for weight, gain in zip(weights, gains(design), strict=True)]
    return scores(maps(), scaled, design.layers)


@pytest.mark.parametrize("design", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_a_network_with_doubled_channels_is_pruned_to_the_single_one(design):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in design.shapes]
    # Twice the channels, in random proportions, say the same.
    wide, doubled = scaled_design(design, 2), []
    for number, weight in enumerate(weights):
        inputs = torch.cat([weight, weight], 1) / 2 if number else weight
        last = number == len(weights) - 1
        doubled.append(inputs if last else torch.cat([inputs, inputs]))
    assert [tuple(weight.shape) for weight in doubled] == list(wide.shapes)
    found = pruned_weights(wide, doubled, design, maps())
    assert [tuple(weight.shape) for weight in found] == list(design.shapes)
    expected, got = scored(design, weights), scored(design, found)
    ratio = got.norm() / expected.norm()
    torch.testing.assert_close(got, expected * ratio, atol=1e-3 * float(got.abs().max()), rtol=1e-3)


def test_pruning_a_random_wide_network_keeps_most_of_its_scores():
    wide = scaled_design(FILTERED, 3)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator) for shape in wide.shapes]
    found = pruned_weights(wide, weights, FILTERED, maps())
    target, got = scored(wide, weights).double(), scored(FILTERED, found).double()
    scale = (target * got).sum() / got.square().sum()
    fresh = scored(FILTERED, [torch.randn(shape, generator=generator) for shape in FILTERED.shapes]).double()
    fresh_scale = (target * fresh).sum() / fresh.square().sum()
    error = (target - scale * got).square().sum()
    assert error < 0.5 * (target - fresh_scale * fresh).square().sum()


def test_which_designs_can_be_pruned_to():
    assert can_be_pruned_to(PLAIN)
    assert can_be_pruned_to(FILTERED)
    for layers in (PLAIN.layers[-1:], EARLY, (*ODD, *FILTERED.layers[2:]), TIED, FILTERED.layers[:2]):
        assert not can_be_pruned_to(dataclasses.replace(FILTERED, layers=layers))
    relu = (dataclasses.replace(FILTERED.layers[0], relu=True), *FILTERED.layers[1:])
    assert not can_be_pruned_to(dataclasses.replace(FILTERED, layers=relu))
