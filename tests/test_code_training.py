"""Training on the grid: the same scores as the exact runner, the price of bits, and runs that can be interrupted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.analysis import code_training
from specprune.analysis.code_design import Design, default_design, design_of, gains, rounded, scores
from specprune.analysis.code_training import (
    COLOUR,
    GREY,
    Latent,
    Recipe,
    count_float_errors,
    random_start,
    rate_gradient,
    start_from,
    train_epochs,
    training_images,
    unit_scores,
    usual_recipe,
    word_bits,
)
from specprune.analysis.code_training import batch_scores as scores_of
from specprune.compress.integer_network import IntegerRunner, count_errors
from specprune.compress.language import length_in_bits
from specprune.compress.vocabulary import LayerSpec
from specprune.testbed import Dataset, load_dataset


def halves(n=600, seed=0, noise=0.05):
    """Two classes: the left or the right half of an image is brighter; some labels are wrong."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 128, (n, 1, 8, 8))
    labels = generator.integers(0, 2, n)
    for image, label in zip(pixels, labels, strict=True):
        image[0, :, 4 * label : 4 * label + 4] += 127
    labels = np.where(generator.random(n) < noise, 1 - labels, labels)
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


SMALL = Design(1, 1, False, (LayerSpec("conv", 3, 3, 2, 1, 2), LayerSpec("conv", 2, 4, 1, 0, 2, relu=False)))
EVERYTHING = (
    LayerSpec("conv", 4, 3, 1, 1, 2),
    LayerSpec("filters", 4, 3, 1, 1),
    LayerSpec("depthwise", 4, 3, 2, 1, 3, relu=False),
    LayerSpec("conv", 4, 3, 1, 1, 2, "output"),
    LayerSpec("conv", 4, 3, 1, 1, 2, "output", tied=True),
    LayerSpec("linear", 3, 1, 1, 0, 7, relu=False),
)
DESIGNS = [
    SMALL,
    Design(1, 2, True, EVERYTHING),
    Design(2, 1, False, EVERYTHING),
    Design(3, 1, True, EVERYTHING, "edges"),
]


def whole_weights(design, seed):
    generator = np.random.default_rng(seed)
    return [
        torch.from_numpy(generator.integers(-layer.levels, layer.levels + 1, shape)).float()
        for layer, shape in zip(design.owners, design.shapes, strict=True)
    ]


@pytest.mark.parametrize("design", DESIGNS)
def test_scores_are_proportional_to_those_of_the_exact_runner(design):
    generator = torch.Generator().manual_seed(1)
    side = 32 if design.features == "edges" else 8
    pixels = torch.randint(256, (6, design.channels, side, side), dtype=torch.uint8, generator=generator)
    images = training_images(design, pixels, torch.zeros(6, dtype=torch.int64))
    weights = whole_weights(design, 0)
    network = design.network(weights)
    exact = IntegerRunner(network, side, side)(pixels)
    scaled = [w * g for w, g in zip(weights, gains(design), strict=True)]
    found = scores_of(images, slice(None), scaled, design)
    np.testing.assert_allclose(unit_scores(found), unit_scores(exact), atol=2e-5)
    assert design_of(network) == design
    assert [tuple(array.shape) for array in network.weights] == list(design.shapes)
    assert math.ceil(word_bits(network)) <= length_in_bits(network) <= word_bits(network) + 2


def test_errors_are_those_of_the_exact_count():
    pixels, targets = halves()
    images = training_images(SMALL, pixels, targets)
    for seed in range(3):
        weights = whole_weights(SMALL, seed)
        assert count_float_errors(images, weights, SMALL) == count_errors(SMALL.network(weights), pixels, targets)


def interpolated_bits(weights, levels):
    """The slow twin: each weight's price on the line between the prices of the whole numbers around it."""
    sizes = [min(levels, abs(round(w))) for w in weights]
    prices = []
    for size in range(levels + 1):
        share = (sizes.count(size) + 0.5) / (len(weights) + 0.5 * (levels + 1))
        prices.append(-math.log2(share) + (size > 0))

    def price(w):
        return float(np.interp(min(abs(w), levels), range(levels + 1), prices))

    return price


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-2.4, 2.4).filter(lambda w: abs(w - round(w)) > 0.01), min_size=1, max_size=12))
def test_rate_gradient_is_the_slope_of_the_interpolated_price(values):
    found = rate_gradient(torch.tensor(values, dtype=torch.float64), 2)
    price = interpolated_bits(values, 2)
    for w, slope in zip(values, found.tolist(), strict=True):
        if abs(w) < 2:
            assert slope == pytest.approx((price(w + 1e-4) - price(w - 1e-4)) / 2e-4, abs=1e-6)
        else:  # beyond the grid it goes on as between its last two values, so that weights are drawn back
            assert slope == pytest.approx((price(2) - price(1)) * np.sign(w), abs=1e-6)


def test_training_learns_and_shortens_the_word():
    pixels, targets = halves()
    images = training_images(SMALL, pixels, targets)
    found = {}
    for rate in (0.0, 5.0):
        state = train_epochs(SMALL, images, random_start(SMALL, 0), 10, seed=0, recipe=Recipe(0.3, rate, 0.0), batch=20)
        weights = [rounded(w, 2) for w in state.weights]
        found[rate] = count_float_errors(images, weights, SMALL) / images.n, word_bits(SMALL.network(weights))
    assert found[0.0][0] < 0.1
    assert found[5.0][1] < found[0.0][1] - 10


def test_damped_weights_end_near_whole_numbers():
    pixels, targets = halves()
    images = training_images(SMALL, pixels, targets)
    distances = []
    for damping in (0.0, 0.03):
        state = train_epochs(
            SMALL, images, random_start(SMALL, 0), 20, seed=0, recipe=Recipe(0.3, 0.0, damping), batch=20
        )
        # One that is pushed beyond the grid is only held back.
        inside = [weight[weight.abs() < 2] for weight in state.weights]
        distances.append(float(torch.cat([(weight - weight.round()).abs() for weight in inside]).mean()))
    assert distances[0] > 0.15
    assert distances[1] < 0.05


def test_colour_images_are_trained_more_slowly():
    assert usual_recipe(DESIGNS[3]) is COLOUR
    assert usual_recipe(SMALL) is GREY
    assert COLOUR.learning_rate < GREY.learning_rate


def test_each_step_sees_one_view(monkeypatch):
    design = Design(1, 1, True, SMALL.layers)
    pixels, targets = halves(200)
    images = training_images(design, pixels, targets)
    seen = []

    def watched(maps, weights, layers):
        seen.append(maps)
        return scores(maps, weights, layers)

    monkeypatch.setattr(code_training, "scores", watched)
    train_epochs(design, images, random_start(design, 0), 2, seed=0, batch=20)
    assert len(seen) == 20
    rows = [{row.numpy().tobytes() for row in view} for view in images.maps]
    views = [[all(row.numpy().tobytes() in own for row in part) for own in rows] for part in seen]
    assert all(sum(view) == 1 for view in views)
    assert 0 < sum(view[0] for view in views) < 20


def test_real_weights_need_no_grid():
    pixels, targets = halves()
    images = training_images(SMALL, pixels, targets)
    state = train_epochs(
        SMALL, images, random_start(SMALL, 0), 6, seed=0, recipe=Recipe(0.1, 0.0, 0.0), batch=20, whole=False
    )
    assert count_float_errors(images, state.weights, SMALL) < 0.1 * images.n
    assert any((w != w.round()).any() for w in state.weights)


def test_an_interrupted_training_ends_where_the_whole_one_does():
    pixels, targets = halves(200)
    images = training_images(SMALL, pixels, targets)
    before = torch.get_rng_state()
    whole = train_epochs(SMALL, images, random_start(SMALL, 3), 4, seed=5, batch=20)
    part = train_epochs(SMALL, images, random_start(SMALL, 3), 4, seed=5, batch=20, after_epoch=lambda s: s.epoch == 2)
    assert part.epoch == 2
    copies = [[tensor.clone() for tensor in moments] for moments in part.moments]
    again = Latent([w.clone() for w in part.weights], part.temperature.clone(), 2, (copies[0], copies[1]))
    again = train_epochs(SMALL, images, again, 4, seed=5, batch=20)
    assert again.epoch == whole.epoch == 4
    for one, other in zip(again.weights, whole.weights, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again.temperature, whole.temperature)
    assert torch.equal(torch.get_rng_state(), before)


def test_starts():
    given_weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7 for shape in SMALL.shapes]
    state = start_from(given_weights, SMALL)
    for one, other in zip(state.weights, given_weights, strict=True):
        assert one.abs().max() <= 2.49
        small = one.abs() < 2.4
        ratio = one[small] / other[small]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected finite ones of \(3, 1, 3, 3\)"):
        start_from([torch.zeros(3, 1, 3, 3), given_weights[1]], SMALL)
    with pytest.raises(ValueError, match="expected finite ones"):
        start_from(given_weights[::-1], SMALL)
    same = random_start(SMALL, 1).weights[0]
    assert torch.equal(same, random_start(SMALL, 1).weights[0])
    assert not torch.equal(same, random_start(SMALL, 2).weights[0])


def test_too_few_images():
    pixels, targets = halves(10)
    images = training_images(SMALL, pixels, targets)
    with pytest.raises(ValueError, match="10 training images are fewer than a batch of 20"):
        train_epochs(SMALL, images, random_start(SMALL, 0), 1, seed=0, batch=20)


def test_default_designs():
    digits = default_design(load_dataset("digits"))
    assert (digits.pooling, len(digits.layers)) == (1, 3)
    large = Dataset("large", *(torch.zeros(20_000, 1, 28, 28), torch.arange(20_000) % 10) * 2, 10)
    design = default_design(large)
    assert design.pooling == 2
    assert [layer.kernel for layer in design.layers] == [3, 3, 3, 3]
    colour = Dataset("colour", *(torch.zeros(100, 3, 32, 32), torch.arange(100) % 10) * 2, 10)
    assert default_design(colour).features == "edges"
    odd = Dataset("odd", *(torch.zeros(100, 1, 28, 30), torch.arange(100) % 10) * 2, 10)
    with pytest.raises(ValueError, match="no default design for images of 1 x 28 x 30; give one"):
        default_design(odd)
