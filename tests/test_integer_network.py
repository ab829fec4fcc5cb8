"""Whole-number inference: what a slow twin computes, in any batch, thread count and memory format."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress.front_ends import edge_maps, feature_ranges, mirrored, pixel_sums
from specprune.compress.integer_network import (
    IntegerRunner,
    count_errors,
    decide,
    integer_pixels,
    layer_ranges,
    predict,
)
from specprune.compress.vocabulary import FILTER_BANK, IntegerNetwork, LayerSpec


def random_pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# --- slow twins, in Python's whole numbers -------------------------------------------------------------------------


def slow_at(plane, row, column):
    """A value of a map that goes on beyond its border."""
    return plane[min(max(row, 0), len(plane) - 1)][min(max(column, 0), len(plane[0]) - 1)]


def slow_map(height, width, value):
    return [[value(row, column) for column in range(width)] for row in range(height)]


def slow_edges(image):
    """docs/language.md, place by place; image: (3, height, width)."""
    red, green, blue = image.tolist()
    height, width = len(red), len(red[0])

    def mixed(r, g, b):
        return slow_map(height, width, lambda i, j: (r * red[i][j] + g * green[i][j] + b * blue[i][j]) // 16)

    def squares(plane, side):
        return slow_map(
            len(plane) // side,
            len(plane[0]) // side,
            lambda i, j: sum(plane[side * i + a][side * j + b] for a in range(side) for b in range(side)),
        )

    def halved(plane):
        return [[value // 4 for value in row] for row in squares(plane, 2)]

    directions = (
        ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)),
        ((-2, -1, 0), (-1, 0, 1), (0, 1, 2)),
        ((-1, -2, -1), (0, 0, 0), (1, 2, 1)),
        ((0, 1, 2), (-1, 0, 1), (-2, -1, 0)),
    )

    def changes(plane):
        size = len(plane), len(plane[0])
        return [
            slow_map(
                *size,
                lambda i, j, k=kernel: sum(
                    k[a][b] * slow_at(plane, i + a - 1, j + b - 1) for a in range(3) for b in range(3)
                ),
            )
            for kernel in directions
        ]

    def surround(plane):
        smooth = (1, 4, 6, 4, 1)

        def value(i, j):
            around = sum(
                smooth[a] * smooth[b] * slow_at(plane, i + a - 2, j + b - 2) for a in range(5) for b in range(5)
            )
            change = 256 * plane[i][j] - around
            return change // 16 if change >= 0 else -(-change // 16)

        return [slow_map(len(plane), len(plane[0]), value)]

    def normalised(planes, gain):
        size = len(planes[0]), len(planes[0][0])
        strength = slow_map(*size, lambda i, j: sum(abs(plane[i][j]) for plane in planes))
        local = slow_map(
            *size, lambda i, j: sum(slow_at(strength, i + a, j + b) for a in range(-3, 4) for b in range(-3, 4))
        )
        return [
            slow_map(*size, lambda i, j, p=plane: abs(p[i][j]) * gain * 49 // (local[i][j] + 1400 * 49))
            for plane in planes
        ]

    def pooled(plane, side):
        return [[min(value // side**2, 255) for value in row] for row in squares(plane, side)]

    def halves(planes, gain, side):
        strengths = normalised(planes, gain)
        for sign in (1, -1):
            for plane, strength in zip(planes, strengths, strict=True):
                part = [
                    [value if sign * change > 0 else 0 for value, change in zip(*rows, strict=True)]
                    for rows in zip(strength, plane, strict=True)
                ]
                yield pooled(part, side)

    luma, blueness, redness = mixed(77, 150, 29), mixed(-43, -85, 128), mixed(128, -107, -21)
    maps = [[[value // 128 - 255 for value in row] for row in squares(luma, 4)]]
    for colour in (blueness, redness):
        maps.append([[max(-255, min(255, value // 64)) for value in row] for row in squares(colour, 4)])
    maps += [*halves(changes(luma), 512, 4), *halves(changes(halved(luma)), 512, 2)]
    for colour in (blueness, redness):
        maps += [pooled(plane, 2) for plane in normalised(changes(halved(colour)), 256)]
    maps += [*halves(surround(luma), 256, 4), *halves(surround(halved(luma)), 256, 2)]
    return np.array(maps)


def slow_features(network, image):
    if network.features == "edges":
        return slow_edges(image)
    side = network.pooling
    channels, height, width = image.shape
    found = np.zeros((channels, height // side, width // side), dtype=object)
    for c, i, j in np.ndindex(channels, height, width):
        found[c, i // side, j // side] += int(image[c, i, j])
    return found


def slow_scores(network, image):
    """Class scores of one image, by the definition, in Python's whole numbers."""
    total = [0] * network.classes
    for view in (image, image[:, :, ::-1]) if network.mirror else (image,):
        values = np.array(slow_features(network, view), dtype=object)
        own = iter(network.weights)
        latest = None
        for spec in network.layers:
            if spec.kind == "filters":
                weights = np.stack([FILTER_BANK[c % 4][None] for c in range(spec.out_channels)])
            else:
                latest = weights = latest if spec.tied else next(own)
            weights = weights.astype(object)
            if spec.kind == "linear":
                values = values.sum((1, 2), keepdims=True)
            pad = spec.padding
            padded = np.zeros((len(values), values.shape[1] + 2 * pad, values.shape[2] + 2 * pad), dtype=object)
            padded[:, pad : pad + values.shape[1], pad : pad + values.shape[2]] = values
            k = spec.kernel
            rows = range(0, padded.shape[1] - k + 1, spec.stride)
            columns = range(0, padded.shape[2] - k + 1, spec.stride)
            outputs = np.zeros((spec.out_channels, len(rows), len(columns)), dtype=object)
            mixing = spec.kind in ("conv", "linear")
            for o, (i, row), (j, column) in (
                (o, i, j) for o in range(spec.out_channels) for i in enumerate(rows) for j in enumerate(columns)
            ):
                window = padded[:, row : row + k, column : column + k]
                outputs[o, i, j] = (weights[o] * (window if mixing else window[o : o + 1])).sum()
            values = np.maximum(outputs, 0) if spec.relu else outputs
        for c in range(network.classes):
            total[c] += int(values[c].sum())
    return total


# --- networks of every kind ------------------------------------------------------------------------------------------


def make(layers, channels=1, pooling=1, mirror=False, features="pixels", seed=0):
    generator = np.random.default_rng(seed)
    width = 31 if features == "edges" else channels
    weights = []
    for layer in layers:
        if layer.owns_weights:
            weights.append(generator.integers(-layer.levels, layer.levels + 1, layer.weight_shape(width)))
        width = layer.out_channels
    return IntegerNetwork(channels, pooling, mirror, tuple(layers), tuple(weights), features)


HEAD = LayerSpec("linear", 3, 1, 1, 0, 3, relu=False)
NETWORKS = {
    "convolutions": make([LayerSpec("conv", 4, 3, 2, 1, 2), LayerSpec("conv", 5, 2, 1, 0, 3), HEAD], pooling=2),
    "raw": make([LayerSpec("conv", 3, 5, 4, 2, 15, "position", relu=False), HEAD], channels=2),
    "mirrored": make([LayerSpec("conv", 4, 4, 2, 0, 1), HEAD], channels=3, mirror=True),
    "depthwise": make([LayerSpec("conv", 6, 1, 1, 0, 3), LayerSpec("depthwise", 6, 3, 2, 1, 2, relu=False), HEAD]),
    "points": make([LayerSpec("conv", 6, 1, 4, 0, 3), LayerSpec("depthwise", 6, 2, 2, 0, 3), HEAD], channels=2),
    "filters": make([LayerSpec("conv", 6, 1, 1, 0, 3), LayerSpec("filters", 6, 3, 2, 1, relu=True), HEAD], pooling=4),
    "tied": make([LayerSpec("conv", 1, 3, 1, 1, 7), LayerSpec("conv", 1, 3, 2, 0, 7, tied=True), HEAD]),
    "ends in maps": make([LayerSpec("conv", 4, 3, 2, 1, 2), LayerSpec("conv", 3, 3, 1, 1, 2, relu=False)], mirror=True),
    "large sums": make([LayerSpec("conv", 8, 3, 1, 1, 15), LayerSpec("conv", 8, 3, 1, 1, 15), HEAD], seed=1),
    "edges": make([LayerSpec("conv", 4, 3, 2, 1, 2), HEAD], channels=3, features="edges", mirror=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_decisions_are_those_of_the_slow_twin(name):
    network = NETWORKS[name]
    pixels = random_pixels(3, network.channels, 16, 24, seed=2)
    pixels[1] = 0  # all scores equal: the first class of several wins
    scores = [slow_scores(network, image) for image in pixels.numpy()]
    assert IntegerRunner(network, 16, 24)(pixels).tolist() == scores
    assert predict(network, pixels).tolist() == [values.index(max(values)) for values in scores]
    assert scores[0] != scores[2]
    if network.features == "pixels":
        assert scores[1] == [0, 0, 0]


def test_edges_are_those_of_the_slow_twin():
    pixels = random_pixels(3, 3, 12, 16, seed=3)
    pixels[1] = pixels[1] // 32  # little contrast
    pixels[2, :, :, 5:] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]  # colours at their limits
    pixels[2, :, :, :5] = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
    found = edge_maps(pixels)
    assert found.shape == (3, 31, 3, 4)
    assert found.dtype == torch.int32
    for ours, image in zip(found, pixels.numpy(), strict=True):
        assert np.array_equal(ours.numpy(), slow_edges(image))


def test_edges_of_the_mirror_image_are_the_mirrored_edges():
    """Turning an image over swaps left with right, and the two diagonals: no side is treated better."""
    pixels = random_pixels(4, 3, 16, 16, seed=4)
    assert torch.equal(edge_maps(pixels.flip(3)), mirrored("edges", edge_maps(pixels)))
    assert torch.equal(pixel_sums(pixels.flip(3), 2), mirrored("pixels", pixel_sums(pixels, 2)))


@pytest.mark.parametrize("worst", ["checkers", "extremes", "lines", "even"])
def test_edges_stay_in_their_range(worst):
    """Images made to exceed 2^31, were that possible: black and white, pure colours, thin lines."""
    generator = np.random.default_rng(0)
    pixels = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    if worst == "checkers":
        pixels[:] = ((torch.arange(16)[:, None] // 2 + torch.arange(16) // 2) % 2 * 255).to(torch.uint8)
    elif worst == "extremes":
        pixels = torch.from_numpy(generator.choice(np.array([0, 255], np.uint8), (16, 3, 16, 16)))
    elif worst == "lines":
        pixels[torch.arange(16), :, torch.arange(16)] = 255
    else:
        pixels[:] = (torch.arange(16) * 17)[:, None, None, None].to(torch.uint8)
    found = edge_maps(pixels)
    lows, highs = feature_ranges("edges", 3, 1)
    assert all(int(found[:, c].min()) >= low for c, low in enumerate(lows))
    assert all(int(found[:, c].max()) <= high for c, high in enumerate(highs))
    assert np.array_equal(found[7].numpy(), slow_edges(pixels[7].numpy()))
    if worst == "even":
        assert int(found[:, 3:].max()) == 0  # no edge anywhere, and none at the border


def test_edges_are_frozen():
    """The front end is part of version 1; this checksum was taken when it was settled."""
    pixels = (37 * np.arange(2 * 3 * 16 * 16) ** 2 // 11 % 256).astype(np.uint8).reshape(2, 3, 16, 16)
    found = edge_maps(torch.from_numpy(pixels)).numpy().astype("<i4")
    assert zlib.crc32(found.tobytes()) == 542585412


def test_grey_values_of_edges():
    pixels = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert edge_maps(pixels)[0, :3, 0, 0].tolist() == [255, 0, 0]
    assert edge_maps(pixels * 0)[0, :3, 0, 0].tolist() == [-255, 0, 0]


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_threads_and_memory_formats_make_no_difference(name, monkeypatch):
    network = NETWORKS[name]
    pixels = random_pixels(60, network.channels, 16, 24, seed=5)
    runner = IntegerRunner(network, 16, 24)
    scores = runner(pixels)
    for size in (1, 7):
        assert torch.equal(torch.cat([runner(part) for part in pixels.split(size)]), scores)
    assert torch.equal(runner(pixels.contiguous(memory_format=torch.channels_last)), scores)
    assert torch.equal(runner(pixels.flip(2).flip(2).transpose(2, 3).contiguous().transpose(2, 3)), scores)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(runner(pixels), scores)
    finally:
        torch.set_num_threads(threads)
    classes = predict(network, pixels)
    monkeypatch.setattr(IntegerRunner, "batch_size", lambda self: 11)
    assert torch.equal(predict(network, pixels), classes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_accelerators_agree(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    network = NETWORKS[name]
    pixels = random_pixels(500, network.channels, 16, 24, seed=6)
    runner = IntegerRunner(network, 16, 24, "cuda")
    assert torch.equal(runner(pixels.cuda()).cpu(), IntegerRunner(network, 16, 24)(pixels))


def test_a_search_may_start_behind_the_layer_that_it_changed():
    network = NETWORKS["convolutions"]
    pixels = random_pixels(20, 1, 16, 24)
    runner = IntegerRunner(network, 16, 24)
    values = runner.front_end(pixels)
    assert torch.equal(values, pixel_sums(pixels, 2).float())
    for number in range(3):
        values = runner.layer(number, values)
    assert torch.equal(runner.scores(values), runner(pixels))


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(NETWORKS)))
@settings(max_examples=40, deadline=None)
def test_ranges_enclose_every_value(seed, name):
    """Also those of images that are built to make sums large: black and white, after the signs of the weights."""
    network = make(
        NETWORKS[name].layers, NETWORKS[name].channels, NETWORKS[name].pooling, NETWORKS[name].mirror,
        NETWORKS[name].features, seed,
    )  # fmt: skip
    pixels = torch.from_numpy(
        np.random.default_rng(seed).choice(np.array([0, 255], np.uint8), (20, network.channels, 16, 24))
    )
    ranges = layer_ranges(network, 16, 24)
    runner = IntegerRunner(network, 16, 24)
    values = runner.front_end(pixels)
    for number, found in enumerate(ranges):
        values = runner.layer(number, values)
        assert values.shape[2:] == (found.height, found.width)
        assert float(values.abs().max()) <= found.largest
    assert float(runner(pixels).abs().max()) <= ranges[-1].largest


def test_ranges_are_reached():
    """A white image through positive weights: nothing smaller would do."""
    network = IntegerNetwork(
        1, 2, True,
        (LayerSpec("conv", 2, 3, 1, 0, 2), LayerSpec("linear", 2, 1, 1, 0, 3, relu=False)),
        (np.full((2, 1, 3, 3), 2), np.full((2, 2, 1, 1), 3)),
    )  # fmt: skip
    ranges = layer_ranges(network, 8, 12)
    assert [(part.height, part.width) for part in ranges] == [(2, 4), (1, 1)]
    assert ranges[0].largest == 9 * 2 * 4 * 255
    white = torch.full((1, 1, 8, 12), 255, dtype=torch.uint8)
    assert IntegerRunner(network, 8, 12)(white).tolist() == [[ranges[1].largest] * 2]
    assert ranges[1].largest == 2 * 8 * 2 * 3 * 9 * 2 * 4 * 255


def test_sums_beyond_single_precision_are_still_exact():
    """Scores of some 2^27, of which float32 knows only every 16th."""
    specs = LayerSpec("conv", 1, 8, 1, 0, 15), LayerSpec("conv", 2, 8, 1, 0, 15, relu=False)
    weights = np.full((1, 1, 8, 8), 15), np.full((2, 1, 8, 8), 15)
    weights[0][0, 0, 0, 0] = weights[1][1, 0, 7, 7] = 14
    network = IntegerNetwork(1, 1, False, specs, weights)
    ranges = layer_ranges(network, 15, 15)
    assert ranges[0].largest < 2**24 < ranges[1].largest < 2**28
    assert IntegerRunner(network, 15, 15).types == [torch.float32, torch.float64]
    pixels = random_pixels(20, 1, 15, 15) // 8 + 224
    scores = IntegerRunner(network, 15, 15)(pixels)
    assert scores.tolist() == [slow_scores(network, image) for image in pixels.numpy()]
    assert float(scores.min()) > 2**26
    assert bool((scores != scores.float().double()).any())


def test_networks_that_float64_cannot_hold_are_refused():
    deep = [LayerSpec("conv", 8, 3, 1, 1, 15) for _ in range(6)]
    network = make([*deep, HEAD])
    with pytest.raises(ValueError, match=r"layer 5 could make sums of .*limit 2\^53"):
        predict(network, random_pixels(1, 1, 16, 16))


def test_images_that_do_not_fit_are_refused():
    network = NETWORKS["convolutions"]
    for pixels, match in (
        (random_pixels(2, 1, 15, 24), "expected multiples of 2"),
        (random_pixels(2, 3, 16, 24), r"expected uint8 \(n, \*\(1, 16, 24\)\)"),
        (random_pixels(2, 1, 16, 24).float(), "expected uint8"),
        (random_pixels(1, 16, 24), r"expected \(n, channels, height, width\)"),
        (random_pixels(2, 1, 2, 2), "kernel is larger than its map"),
    ):
        with pytest.raises(ValueError, match=match):
            predict(network, pixels)
    with pytest.raises(ValueError, match="expected multiples of 4, for colours and normalised edges"):
        predict(NETWORKS["edges"], random_pixels(1, 3, 14, 16))
    with pytest.raises(ValueError, match="expected one an image"):
        count_errors(network, random_pixels(2, 1, 16, 24), torch.zeros(3, dtype=torch.int64))


def test_errors_are_counted():
    network = NETWORKS["convolutions"]
    pixels = random_pixels(50, 1, 16, 24, seed=7)
    classes = predict(network, pixels)
    assert count_errors(network, pixels, classes) == 0
    wrong = classes.clone()
    wrong[:8] = (wrong[:8] + 1) % 3
    assert count_errors(network, pixels, wrong) == 8


def test_the_first_of_several_best_classes_wins():
    scores = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-2.0, -5.0, -1.0]])
    assert decide(scores).tolist() == [1, 0, 2]


def test_pixels_are_the_nearest_whole_numbers():
    eight_bit = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(integer_pixels(eight_bit.float() / 255), eight_bit)
    assert torch.equal(integer_pixels((eight_bit.double() / 255).float()), eight_bit)
    sixteenths = torch.tensor([0, 1, 8, 15, 16]).reshape(1, 1, 1, 5) / 16
    assert integer_pixels(sixteenths).flatten().tolist() == [0, 16, 128, 239, 255]
    assert integer_pixels(torch.zeros(0, 1, 2, 2)).shape == (0, 1, 2, 2)
    for bad, match in (
        (torch.full((1, 1, 1, 1), 1.1), "rescale them"),
        (torch.full((1, 1, 1, 1), float("nan")), "expected"),
        (eight_bit, "expected floats"),
        (torch.zeros(3, 3), "expected floats"),
    ):
        with pytest.raises(ValueError, match=match):
            integer_pixels(bad)


def test_memory_stays_bounded():
    small, large = IntegerRunner(NETWORKS["raw"], 16, 24), IntegerRunner(NETWORKS["large sums"], 512, 512)
    assert small.batch_size() == 1000
    assert large.batch_size() == 1
