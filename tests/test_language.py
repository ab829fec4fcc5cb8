"""The language: words are read back, obey Kraft, cost what they should; damage is found out in bounded time."""

import dataclasses
import itertools
import math
import re
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress import vocabulary
from specprune.compress.language import (
    context_numbers,
    counts_bits,
    decode,
    encode,
    header_bits,
    ideal_bits,
    layer_bits,
    length_in_bits,
    value_counts,
)
from specprune.compress.range_coder import Encoder
from specprune.compress.vocabulary import CONTEXTS, FILTER_BANK, IntegerNetwork, LayerSpec

LEVELS = (1, 2, 3, 4, 5, 7, 15)
FROZEN = (
    (259, "0126071388cc7cea78ac37bd85e798975a73717b00874dacff173a90a558ee4c40"),
    (166, "019e410ab3989030630e08c9a60c1a6966bd3a4cfc"),
    (74, "01b8832220bd1fc2bbc0"),
)
DOCS = Path(__file__).parents[1] / "docs" / "language.md"


@st.composite
def layers(draw, width, source, last):
    """One layer on `width` maps; `source` is the latest one with weights of its own and how many maps that reads."""
    kinds = ("conv", "linear") if last else ("conv", "linear", "depthwise", "filters")
    stride, relu = draw(st.sampled_from((1, 2, 4))), not last and draw(st.booleans())
    fits = source is not None and (source[0].kind == "depthwise" or source[1] == width)
    fits = fits and source[0].kind in kinds and (source[0].kind != "depthwise" or source[0].out_channels == width)
    if fits and draw(st.booleans()):
        return dataclasses.replace(source[0], stride=1 if source[0].kind == "linear" else stride, relu=relu, tied=True)
    kind = draw(st.sampled_from(kinds))
    if kind == "filters":
        return LayerSpec(kind, width, 3, stride, 1, relu=relu)
    levels, contexts = draw(st.sampled_from(LEVELS)), draw(st.sampled_from(CONTEXTS))
    out = width if kind == "depthwise" else draw(st.integers(1, 7) | st.sampled_from((17, 64)))
    if kind == "linear":
        return LayerSpec(kind, out, 1, 1, 0, levels, contexts, relu)
    kernel = draw(st.sampled_from((1, 2, 3, 4, 5, 8)))
    padding = draw(st.sampled_from((0, kernel // 2)))
    return LayerSpec(kind, out, kernel, stride, padding, levels, contexts, relu)


@st.composite
def networks(draw):
    channels = draw(st.integers(1, 4))
    features = draw(st.sampled_from(("pixels", "edges"))) if channels == 3 else "pixels"
    width = 31 if features == "edges" else channels
    chosen, source, arrays = [], None, []
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    depth = draw(st.integers(1, 4))
    for number in range(depth):
        layer = draw(layers(width, source, number == depth - 1))
        if layer.owns_weights:
            source = layer, width
            shape = layer.weight_shape(width)
            spread = draw(st.floats(0.1, 10.0))
            arrays.append(
                np.clip(np.round(generator.normal(0, spread, shape)), -layer.levels, layer.levels).astype(int)
            )
        chosen.append(layer)
        width = layer.out_channels
    pooling = 1 if features == "edges" else draw(st.sampled_from((1, 2, 4, 8)))
    return channels, pooling, draw(st.booleans()), tuple(chosen), tuple(arrays), features


def build(parts):
    """The network, or None where the random parts exceed the language's limits."""
    used = width = 0
    for spec in parts[3]:
        shape = spec.weight_shape(width or (31 if parts[5] == "edges" else parts[0]))
        used, width = used + int(np.prod(shape)), spec.out_channels
    if used > vocabulary.MAX_WEIGHTS:
        with pytest.raises(ValueError, match="no such network"):
            IntegerNetwork(*parts)
        return None
    return IntegerNetwork(*parts)


def small(levels=2, seed=0, **header):
    """Two convolutions and a linear layer on one channel, 180 weights."""
    generator = np.random.default_rng(seed)
    specs = (
        LayerSpec("conv", 4, 3, 2, 1, levels),
        LayerSpec("conv", 3, 3, 2, 1, levels, "output"),
        LayerSpec("linear", 10, 1, 1, 0, levels, relu=False),
    )
    shapes = [(4, 1, 3, 3), (3, 4, 3, 3), (10, 3, 1, 1)]
    weights = tuple(generator.integers(-levels, levels + 1, shape) for shape in shapes)
    return IntegerNetwork(
        header.get("channels", 1), header.get("pooling", 2), header.get("mirror", False), specs, weights
    )


def digits(network):
    length = length_in_bits(network)
    return "".join(f"{byte:08b}" for byte in encode(network))[:length]


@given(networks())
@settings(max_examples=150, deadline=None)
def test_round_trip_and_lengths(parts):
    network = build(parts)
    if network is None:
        return
    word, length = encode(network), length_in_bits(network)
    assert word[0] == vocabulary.VERSION
    assert len(word) == (length + 7) // 8
    again = decode(word)
    assert again == network
    assert hash(again) == hash(network)
    for ours, theirs in zip(again.weights, network.weights, strict=True):
        assert np.array_equal(ours, theirs)
    ideal = ideal_bits(network)
    assert len(ideal) == 1 + len(network.layers)
    assert ideal[0] == header_bits(network)
    assert sum(ideal) - 1e-3 <= length < sum(ideal) + 2 + 1e-3


# --- a second encoder, with the frequencies that the documentation gives --------------------------------


def documented_choices():
    """The header's tables of docs/language.md: for each row its name and what the alternatives' frequencies are."""
    text = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z_ ]+) \| [^|]+ \| ([^|]+: [^|]+) \|$", text, re.MULTILINE)
    found = {}
    for name, cells in rows:
        table = {}
        for part in cells.split("; ")[0].split(", "):
            left, right = part.split(": ")
            if " to " in left:
                first, last = map(int, left.split(" to "))
                table |= dict.fromkeys(range(first, last + 1), int(right.split()[0]))
            else:
                value = {"yes": True, "no": False}.get(left, int(left) if left.isdigit() else left)
                table[value] = int(right)
        found.setdefault(name, []).append(table)
    return found


def described_steps(network):
    """All choices of a network's word, in order, as docs/language.md has them: (frequencies, chosen)."""
    tables = documented_choices()

    def step(name, value, which=0):
        table = tables[name][which]
        assert value in table
        return tuple(table.values()), list(table).index(value)

    yield step("version", 1)
    yield step("channels", network.channels)
    if network.channels == 3:
        yield step("features", network.features)
    if network.features == "pixels":
        yield step("pooling", network.pooling)
    yield step("mirror", network.mirror)
    yield step("number of layers", len(network.layers))
    something_sent = False
    for number, layer in enumerate(network.layers):
        if something_sent:
            yield step("tied", layer.tied)
        if not layer.tied:
            yield step("kind", layer.kind)
            if layer.kind in ("conv", "linear"):
                yield step("out_channels", layer.out_channels)
            if layer.kind in ("conv", "depthwise"):
                yield step("kernel", layer.kernel)
            if layer.kind != "filters":
                yield step("levels", layer.levels)
                yield step("contexts", layer.contexts)
                something_sent = True
        if layer.kind != "linear":
            yield step("stride", layer.stride)
        if layer.kind in ("conv", "depthwise") and layer.kernel > 1:
            yield step("padded", layer.padding > 0)
        if number < len(network.layers) - 1:
            yield step("relu", layer.relu, layer.kind in ("depthwise", "filters"))
    owners = [layer for layer in network.layers if not layer.tied and layer.kind != "filters"]
    for layer, array in zip(owners, network.weights, strict=True):
        counts = {}

        def bit(key, value, counts=counts):
            seen = counts.setdefault(key, [1, 1])
            frequencies = tuple(seen)
            seen[value] += 2
            return frequencies, value

        for (out, into, row, column), weight in np.ndenumerate(array):
            where = {"layer": 0, "output": out, "input": into, "position": (row, column)}[layer.contexts]
            yield bit((where, 0), int(weight != 0))
            if weight:
                yield bit((where, "negative"), int(weight < 0))
                for below in range(1, layer.levels):
                    yield bit((where, below), int(abs(weight) > below))
                    if abs(weight) == below:
                        break


def described_word(network):
    """The digits of the word, by docs/language.md; whole numbers of any size need no carry."""
    low, width, moved = 0, 2**64, 0
    for frequencies, chosen in described_steps(network):
        total, before = sum(frequencies), sum(frequencies[:chosen])
        start = width * before // total
        width = width * (before + frequencies[chosen]) // total - start
        low += start
        while width <= 2**56:
            low, width, moved = 256 * low, 256 * width, moved + 8
    for digits in range(65):
        step = 2 ** (64 - digits)
        place = -(-low // step)
        if (place + 1) * step <= low + width:
            return f"{place:0{moved + digits}b}"
    raise AssertionError


@given(networks())
@settings(max_examples=60, deadline=None)
def test_words_are_those_that_the_documentation_describes(parts):
    network = build(parts)
    if network is not None and sum(array.size for array in network.weights) < 2000:
        assert digits(network) == described_word(network)


def test_the_documentation_has_the_tables_of_the_code():
    tables = documented_choices()
    for name, expected in (
        ("channels", vocabulary.CHANNELS),
        ("features", vocabulary.FEATURES),
        ("pooling", vocabulary.POOLINGS),
        ("mirror", vocabulary.MIRRORS),
        ("number of layers", vocabulary.DEPTHS),
        ("tied", vocabulary.TIED),
        ("kind", vocabulary.KINDS),
        ("out_channels", vocabulary.WIDTHS),
        ("kernel", vocabulary.KERNELS),
        ("levels", vocabulary.LEVELS),
        ("contexts", vocabulary.CONTEXT_CHOICES),
        ("stride", vocabulary.STRIDES),
        ("padded", vocabulary.PADDED),
        ("relu", vocabulary.RELU["conv"]),
    ):
        assert list(tables[name][0].items()) == list(expected.items())
    assert list(tables["relu"][1].items()) == list(vocabulary.RELU["filters"].items())
    assert len(tables["version"][0]) == len(vocabulary.VERSIONS) == 256
    assert vocabulary.RELU["conv"] == vocabulary.RELU["linear"]
    assert vocabulary.RELU["depthwise"] == vocabulary.RELU["filters"]
    text = DOCS.read_text(encoding="utf-8")
    for number in (
        f"version {vocabulary.VERSION}",
        f"at most {vocabulary.MAX_WEIGHTS}",
        f"than {vocabulary.MAX_BYTES} bytes",
    ):
        assert number in text


def adaptive_cost(weights, levels, contexts):
    """A slow twin of `layer_bits`: one estimate after the other."""
    counts, total = {}, 0.0

    def bit(key, value):
        nonlocal total
        seen = counts.setdefault(key, [0.5, 0.5])
        total -= math.log2(seen[value] / sum(seen))
        seen[value] += 1

    for (out, into, row, column), weight in np.ndenumerate(weights):
        where = {"layer": 0, "output": out, "input": into, "position": (row, column)}[contexts]
        bit((where, "nonzero"), int(weight != 0))
        if weight:
            bit((where, "negative"), int(weight < 0))
            for below in range(1, levels):
                bit((where, below), int(abs(weight) > below))
                if abs(weight) == below:
                    break
    return total


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_cost_of_weights_is_that_of_the_estimates_in_turn(levels, contexts):
    weights = np.random.default_rng(levels).integers(-levels, levels + 1, (4, 3, 2, 2))
    weights[weights == levels] = 0
    assert layer_bits(weights, levels, contexts) == pytest.approx(adaptive_cost(weights, levels, contexts), abs=1e-8)
    numbers = context_numbers(weights.shape, contexts)
    counts = value_counts(weights, levels, numbers)
    assert counts.shape == (len(set(numbers.tolist())), 2 * levels + 1)
    assert counts.sum() == weights.size
    moved = weights.copy()
    moved[1, 2, 1, 0] = -levels  # a search moves a weight by moving a count
    place = numbers[np.ravel_multi_index((1, 2, 1, 0), weights.shape)]
    counts[place, weights[1, 2, 1, 0] + levels] -= 1
    counts[place, 0] += 1
    assert counts_bits(counts) == pytest.approx(adaptive_cost(moved, levels, contexts), abs=1e-8)


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(("levels", "shape"), [(1, (2, 2, 1, 2)), (2, (2, 2, 1, 1)), (3, (1, 2, 1, 2))])
def test_weights_share_exactly_the_whole_interval(levels, shape, contexts):
    """The probabilities of all arrays of a shape sum to one: nothing is promised twice and nothing wasted."""
    values = range(-levels, levels + 1)
    total = math.fsum(
        2.0 ** -layer_bits(np.array(entries).reshape(shape), levels, contexts)
        for entries in itertools.product(values, repeat=math.prod(shape))
    )
    assert total == pytest.approx(1, abs=1e-9)


def tiny_specs(last):
    relu = (False,) if last else (False, True)
    for out, positive, contexts in itertools.product((1, 2), relu, ("layer", "input")):
        yield LayerSpec("linear", out, 1, 1, 0, 1, contexts, positive)
        if last or contexts == "layer":
            yield LayerSpec("conv", out, 1, 4, 0, 1, contexts, positive)


def tiny_networks():
    """All one- and two-layer networks of a sublanguage on one channel, ties included: some thousands."""
    for last in tiny_specs(True):
        for entries in itertools.product((-1, 0, 1), repeat=last.out_channels):
            for pooling, mirror in itertools.product((1, 8), (False, True)):
                yield IntegerNetwork(1, pooling, mirror, (last,), (np.array(entries).reshape(-1, 1, 1, 1),))
    for first, last in itertools.product(tiny_specs(False), tiny_specs(True)):
        sizes = first.out_channels, last.out_channels * first.out_channels
        for entries in itertools.product((-1, 0, 1), repeat=sizes[0]):
            array = np.array(entries).reshape(-1, 1, 1, 1)
            tied = dataclasses.replace(last, tied=True)
            if first.out_channels == 1 and (first.kind, first.contexts, 1) == (last.kind, last.contexts, sizes[1]):
                yield IntegerNetwork(1, 1, False, (first, tied), (array,))
            if first.contexts == "input" and sizes[1] > 2:
                continue
            for more in itertools.product((-1, 0, 1), repeat=sizes[1]):
                second = np.array(more).reshape(last.out_channels, first.out_channels, 1, 1)
                yield IntegerNetwork(1, 1, False, (first, last), (array, second))


def test_kraft_and_prefixes_by_enumeration():
    words = {}
    for network in tiny_networks():
        word = digits(network)
        assert words.setdefault(word, network) == network  # two networks never share a word
    assert len(words) > 5_000
    assert sum(Fraction(1, 2 ** len(word)) for word in words) <= 1
    ordered = sorted(words)  # a word and what it begins are neighbours, or have only such between them
    assert not any(after.startswith(before) for before, after in itertools.pairwise(ordered))


def test_headers_obey_kraft_too():
    """All headers of one layer, over all front ends: their shares sum to less than the version's share."""
    total = 0.0
    pairs = [(c, "pixels", p) for c in range(1, 5) for p in (1, 2, 4, 8)] + [(3, "edges", 1)]
    for channels, features, pooling in pairs:
        for out, levels, contexts in itertools.product(range(1, 65), LEVELS, CONTEXTS):
            specs = [LayerSpec("linear", out, 1, 1, 0, levels, contexts, False)]
            if out % 16 == 1 and levels == 1:
                specs += [LayerSpec("conv", out, 3, s, p, levels, contexts, False) for s in (1, 2, 4) for p in (0, 1)]
            for spec in specs:
                shape = spec.weight_shape(31 if features == "edges" else channels)
                network = IntegerNetwork(channels, pooling, True, (spec,), (np.zeros(shape, int),), features)
                total += 2.0 ** -header_bits(network)
    assert total <= 2.0**-8 / 16 / 4  # version, depth 1 of 16, mirror image
    assert total >= 2.0**-8 / 16 / 4 * 0.25  # linear layers alone have a quarter


def test_the_version_costs_eight_bits():
    assert encode(small())[0] == 1
    changed = bytes([2]) + encode(small())[1:]
    with pytest.raises(ValueError, match="version 2 of the language; this program reads version 1"):
        decode(changed)


def formulaic(channels, pooling, mirror, specs, features):
    """Weights by a formula, so that no generator of random numbers can change them."""
    weights, width = [], 31 if features == "edges" else channels
    for spec in specs:
        if spec.owns_weights:
            shape = spec.weight_shape(width)
            weights.append((7 * np.arange(math.prod(shape)) ** 2 % (2 * spec.levels + 1) - spec.levels).reshape(shape))
        width = spec.out_channels
    return IntegerNetwork(channels, pooling, mirror, tuple(specs), tuple(weights), features)


def test_version_1_is_frozen():
    """These words were written when version 1 was settled; if one changes, it is another version."""
    head = LayerSpec("linear", 3, 1, 1, 0, 2, relu=False)
    grey = [
        LayerSpec("conv", 2, 3, 2, 1, 2),
        LayerSpec("depthwise", 2, 2, 1, 0, 4, "position", relu=False),
        LayerSpec("conv", 4, 1, 1, 0, 15, "input"),
        LayerSpec("filters", 4, 3, 2, 1, relu=True),
        head,
    ]
    tied = [LayerSpec("conv", 3, 3, 1, 1, 1, "output"), LayerSpec("conv", 3, 3, 4, 0, 1, "output", tied=True), head]
    edges = [LayerSpec("conv", 2, 1, 1, 0, 3), head]
    for network, length, word in (
        (formulaic(1, 2, False, grey, "pixels"), *FROZEN[0]),
        (formulaic(3, 8, True, tied, "pixels"), *FROZEN[1]),
        (formulaic(3, 1, True, edges, "edges"), *FROZEN[2]),
    ):
        assert (length_in_bits(network), encode(network).hex()) == (length, word)
        assert decode(bytes.fromhex(word)) == network


def test_cut_off_words_and_what_follows_are_refused():
    word = encode(small())
    for size in range(len(word)):
        with pytest.raises(ValueError):
            decode(word[:size])
    for rest in (b"\0", b"\1", b"\xff", b"\0" * 100, word):
        with pytest.raises(ValueError, match="followed by something else"):
            decode(word + rest)
    with pytest.raises(ValueError, match="expected 1 to"):
        decode(word + b"\0" * vocabulary.MAX_BYTES)


def test_flipped_bits_give_an_error_or_another_network_that_pays_for_itself():
    original = small()
    word = encode(original)
    start = time.perf_counter()
    for place in range(8 * len(word)):
        changed = bytearray(word)
        changed[place // 8] ^= 1 << (place % 8)
        try:
            found = decode(bytes(changed))
        except ValueError:
            continue
        assert found != original
        assert encode(found) == bytes(changed)
    assert time.perf_counter() - start < 60


@given(st.binary(min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_network_or_a_value_error(data):
    for word in (data, b"\1" + data):
        try:
            network = decode(word)
        except ValueError:
            continue
        assert encode(network) == word


def absurd_word(out=64, depth=16, ending=b""):
    """Version 1, then 16 convolutions of 8 x 8 kernels on 64 channels: a header that promises 4 million weights."""
    encoder = Encoder()
    encoder.choice(1, (1,) * 256)
    for value, table in ((4, vocabulary.CHANNELS), (1, vocabulary.POOLINGS), (False, vocabulary.MIRRORS)):
        encoder.choice(list(table).index(value), tuple(table.values()))
    encoder.choice(depth - 1, (1,) * 16)
    for number in range(depth):
        fields = [(False, vocabulary.TIED)] if number else []
        fields += [("conv", vocabulary.KINDS), (out, vocabulary.WIDTHS), (8, vocabulary.KERNELS)]
        fields += [(15, vocabulary.LEVELS), ("layer", vocabulary.CONTEXT_CHOICES), (1, vocabulary.STRIDES)]
        fields += [(True, vocabulary.PADDED)]
        fields += [(True, vocabulary.RELU["conv"])] if number < depth - 1 else []
        for value, table in fields:
            encoder.choice(list(table).index(value), tuple(table.values()))
    return encoder.finish()[0] + ending


@pytest.mark.parametrize("ending", [b"", b"\0" * 60_000, b"\xff" * 60_000])
def test_headers_that_promise_too_much_are_refused_at_once(ending):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="more than 32768 weights"):
        decode(absurd_word(ending=ending))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("filling", [b"", b"\0", b"\x55", b"\xff"])
def test_the_largest_words_take_bounded_time(filling):
    """16384 weights of up to 15: whatever follows the header, a second or so is enough to find out."""
    start = time.perf_counter()
    with pytest.raises(ValueError):
        decode(absurd_word(depth=2, out=15, ending=filling * 60_000))
    assert time.perf_counter() - start < 20


def test_no_word_is_longer_than_the_limit_says():
    """The worst that 15 levels and the most weights can do is about 5 bits a weight: a third of the limit."""
    specs = (LayerSpec("linear", 8, 1, 1, 0), LayerSpec("conv", 63, 8, 1, 0, 15, "position", relu=False))
    weights = np.random.default_rng(0).integers(-15, 16, (63, 8, 8, 8))
    network = IntegerNetwork(1, 1, False, specs, (np.ones((8, 1, 1, 1), int), weights))
    word = encode(network)
    assert len(word) < vocabulary.MAX_BYTES // 2
    assert decode(word) == network


def test_kernels_are_tied_and_fixed_as_described():
    own = np.arange(-4, 5).reshape(1, 1, 3, 3)
    specs = (
        LayerSpec("conv", 1, 3, 1, 1, 4),
        LayerSpec("filters", 1),
        LayerSpec("conv", 1, 3, 2, 0, 4, relu=False, tied=True),
    )
    network = IntegerNetwork(1, 1, False, specs, (own,))
    kernels = network.kernels
    assert np.array_equal(kernels[0], own)
    assert np.array_equal(kernels[2], own)
    assert np.array_equal(kernels[1][0, 0], FILTER_BANK[0])
    wide = IntegerNetwork(
        1,
        1,
        False,
        (LayerSpec("linear", 6, 1, 1, 0), LayerSpec("filters", 6), LayerSpec("linear", 2, 1, 1, 0, relu=False)),
        (np.ones((6, 1, 1, 1), int), np.ones((2, 6, 1, 1), int)),
    )
    assert np.array_equal(wide.kernels[1][:, 0], FILTER_BANK[[0, 1, 2, 3, 0, 1]])
    assert ideal_bits(network)[2:] == (0.0, 0.0)


def test_networks_are_values():
    network = small()
    assert network == small()
    assert network != small(seed=1)
    assert network != small(mirror=True)
    assert network != "a network"
    with pytest.raises(ValueError, match="read-only"):
        network.weights[0][0, 0, 0, 0] = 1
    mine = np.ones((4, 1, 3, 3), np.int8)
    copied = IntegerNetwork(1, 2, False, network.layers, (mine, *network.weights[1:]))
    mine[:] = 0
    assert int(copied.weights[0].min()) == 1


def test_front_ends_have_names():
    assert small(pooling=1).front_end == "pixels"
    assert small(mirror=True).front_end == "sums of 2 x 2 pixels, image and mirror image"
    spec = LayerSpec("linear", 2, 1, 1, 0, relu=False)
    network = IntegerNetwork(3, 1, True, (spec,), (np.zeros((2, 31, 1, 1), int),), "edges")
    assert network.front_end == "colours and normalised edges of 4 x 4 pixels, image and mirror image"
    assert network.in_channels == 31
    assert header_bits(network) < header_bits(
        dataclasses.replace(network, features="pixels", weights=(np.zeros((2, 3, 1, 1), int),))
    )


LINEAR = LayerSpec("linear", 2, 1, 1, 0, relu=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "dense"}, "kind 'dense': expected one of"),
        ({"out_channels": 0}, "out_channels 0"),
        ({"out_channels": 65}, "out_channels 65"),
        ({"out_channels": True}, "out_channels True"),
        ({"kernel": 9}, "kernel 9"),
        ({"kernel": 3.0}, r"kernel 3\.0"),
        ({"stride": 3}, "stride 3"),
        ({"padding": 2}, r"padding 2: expected 0 or kernel // 2 = 1"),
        ({"levels": 6}, "levels 6"),
        ({"contexts": "row"}, "contexts 'row'"),
        ({"relu": 1}, "relu 1"),
        ({"tied": None}, "tied None"),
        ({"kind": "linear"}, "a linear layer has kernel 1"),
        ({"kind": "filters", "levels": 2}, "a filters layer has"),
        ({"kind": "filters", "tied": True}, "a filters layer has"),
    ],
)
def test_bad_layers(change, match):
    with pytest.raises(ValueError, match=match):
        LayerSpec(**({"kind": "conv", "out_channels": 4} | change))


def test_bad_networks():
    ones = np.ones((2, 1, 1, 1), int)
    good = (1, 1, False, (LINEAR,), (ones,))
    for place, value, match in (
        (0, 5, "channels 5"),
        (1, 3, "pooling 3"),
        (2, 0, "mirror 0"),
        (3, (), "0 layers: expected 1 to 16"),
        (3, (LINEAR,) * 17, "17 layers"),
        (3, (dataclasses.replace(LINEAR, relu=True),), "without ReLU"),
        (3, (LayerSpec("depthwise", 1, relu=False),), "last layer must be a conv or linear"),
        (3, (LayerSpec("depthwise", 2), LINEAR), "reads 1 channels and does not mix"),
        (3, (dataclasses.replace(LINEAR, tied=True),), "no earlier layer has weights"),
        (3, (LayerSpec("linear", 2, 1, 1, 0), dataclasses.replace(LINEAR, tied=True)), "is tied to"),
        (4, (), "got 0 weight arrays"),
        (4, (ones, ones), "got 2 weight arrays"),
        (4, (ones[0],), "expected integers, shape"),
        (4, (ones * 1.0,), "got float64"),
        (4, (ones * 2,), "beyond the levels"),
        (4, (ones * -2,), "beyond the levels"),
    ):
        parts = list(good)
        parts[place] = value
        with pytest.raises(ValueError, match=match):
            IntegerNetwork(*parts)
    with pytest.raises(ValueError, match="features 'wavelets'"):
        IntegerNetwork(*good, "wavelets")
    with pytest.raises(ValueError, match="got 1 channels and pooling 1, expected 3 and 1"):
        IntegerNetwork(*good, "edges")


def test_bad_words_and_weights():
    with pytest.raises(TypeError, match="a word is bytes, got str"):
        decode("word")
    with pytest.raises(ValueError, match="a word of 0 bytes"):
        decode(b"")
    with pytest.raises(ValueError, match="levels 6"):
        layer_bits(np.ones((1, 1, 1, 1), int), 6)
    with pytest.raises(ValueError, match="entries from -1 to 1"):
        layer_bits(np.full((1, 1, 1, 1), 2), 1)
    with pytest.raises(ValueError, match="contexts 'row'"):
        context_numbers((1, 1, 1, 1), "row")
