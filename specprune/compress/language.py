"""Words of the language: a prefix-free code for networks with whole-number weights; docs/language.md describes it.

A word is one message of the range coder: version, header (choices with fixed frequencies), then the weights layer by
layer.  Its length in bits is what a certificate pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from specprune.compress.front_ends import PIXELS, feature_channels
from specprune.compress.range_coder import AdaptiveBit, Decoder, Encoder, adaptive_bits, choice_bits
from specprune.compress.vocabulary import (
    CHANNELS,
    CONTEXT_CHOICES,
    CONV,
    DEPTHS,
    DEPTHWISE,
    FEATURES,
    FILTERS,
    KERNELS,
    KINDS,
    LEVELS,
    LINEAR,
    MAX_BYTES,
    MIRRORS,
    PADDED,
    POOLINGS,
    RELU,
    STRIDES,
    TIED,
    VERSION,
    VERSIONS,
    WIDTHS,
    IntArray,
    IntegerNetwork,
    LayerSpec,
    check_field,
    weight_shapes,
)


class _Price:
    """Takes choices like an encoder, and adds up their ideal lengths."""

    def __init__(self) -> None:
        self.bits = 0.0

    def choice(self, index: int, frequencies: Sequence[int]) -> None:
        self.bits += choice_bits(index, frequencies)


def _write(coder: Encoder | _Price, value: object, table: dict) -> None:
    coder.choice(list(table).index(value), tuple(table.values()))


def _write_header(coder: Encoder | _Price, network: IntegerNetwork) -> None:
    coder.choice(VERSION, VERSIONS)
    _write(coder, network.channels, CHANNELS)
    if network.channels == 3:
        _write(coder, network.features, FEATURES)
    if network.features == PIXELS:
        _write(coder, network.pooling, POOLINGS)
    _write(coder, network.mirror, MIRRORS)
    _write(coder, len(network.layers), DEPTHS)
    anything_to_tie = False
    for number, layer in enumerate(network.layers):
        _write_layer(coder, layer, anything_to_tie, number == len(network.layers) - 1)
        anything_to_tie |= layer.owns_weights


def _write_layer(coder: Encoder | _Price, layer: LayerSpec, anything_to_tie: bool, last: bool) -> None:
    if anything_to_tie:
        _write(coder, layer.tied, TIED)
    if not layer.tied:
        _write(coder, layer.kind, KINDS)
        if layer.kind in (CONV, LINEAR):
            _write(coder, layer.out_channels, WIDTHS)
        if layer.kind in (CONV, DEPTHWISE):
            _write(coder, layer.kernel, KERNELS)
        if layer.kind != FILTERS:
            _write(coder, layer.levels, LEVELS)
            _write(coder, layer.contexts, CONTEXT_CHOICES)
    if layer.kind != LINEAR:
        _write(coder, layer.stride, STRIDES)
    if layer.kind in (CONV, DEPTHWISE) and layer.kernel > 1:
        _write(coder, layer.padding > 0, PADDED)
    if not last:
        _write(coder, layer.relu, RELU[layer.kind])


def _read_header(decoder: Decoder) -> tuple[int, str, int, bool, tuple[LayerSpec, ...]]:
    def read(table: dict) -> Any:
        return list(table)[decoder.choice(tuple(table.values()))]

    version = decoder.choice(VERSIONS)
    if version != VERSION:
        raise ValueError(f"version {version} of the language; this program reads version {VERSION}")
    channels = read(CHANNELS)
    features = read(FEATURES) if channels == 3 else PIXELS
    pooling = read(POOLINGS) if features == PIXELS else 1
    mirror, depth = read(MIRRORS), read(DEPTHS)
    layers: list[LayerSpec] = []
    source: LayerSpec | None = None
    width = feature_channels(features, channels)
    for number in range(depth):
        layer = _read_layer(read, width, source, number == depth - 1)
        source = layer if layer.owns_weights else source
        width = layer.out_channels
        layers.append(layer)
    return channels, features, pooling, mirror, tuple(layers)


def _read_layer(read: Callable[[dict], Any], width: int, source: LayerSpec | None, last: bool) -> LayerSpec:
    tied = read(TIED) if source is not None else False
    if source is not None and tied:
        kind, out, kernel = source.kind, source.out_channels, source.kernel
        levels, contexts = source.levels, source.contexts
    else:
        kind = read(KINDS)
        out = read(WIDTHS) if kind in (CONV, LINEAR) else width
        kernel = read(KERNELS) if kind in (CONV, DEPTHWISE) else 3 if kind == FILTERS else 1
        levels, contexts = (read(LEVELS), read(CONTEXT_CHOICES)) if kind != FILTERS else (1, "layer")
    stride = read(STRIDES) if kind != LINEAR else 1
    padded = read(PADDED) if kind in (CONV, DEPTHWISE) and kernel > 1 else kind == FILTERS
    relu = False if last else read(RELU[kind])
    return LayerSpec(kind, out, kernel, stride, kernel // 2 if padded else 0, levels, contexts, relu, tied)


def context_numbers(shape: tuple[int, int, int, int], contexts: str) -> IntArray:
    """Return for each weight, in order, which set of adaptive counts it uses.

    Args:
        shape: of the weights, (out, in, height, width).
        contexts: one of `CONTEXTS`.

    Returns:
        Whole numbers from 0, shape (out * in * height * width,).

    Raises:
        ValueError: there are no such contexts.
    """
    check_field("contexts", contexts, CONTEXT_CHOICES)
    out, into, position = np.indices((shape[0], shape[1], shape[2] * shape[3]))
    return {"layer": np.zeros_like(out), "output": out, "input": into, "position": position}[contexts].ravel()


class _Counts:
    """The adaptive contexts of one layer: zero or not, sign, and whether the size is above 1, above 2, ..."""

    def __init__(self, numbers: IntArray, levels: int) -> None:
        count = int(numbers.max()) + 1
        self.nonzero, self.negative = ([AdaptiveBit() for _ in range(count)] for _ in range(2))
        self.larger = [[AdaptiveBit() for _ in range(levels - 1)] for _ in range(count)]


def _write_weights(encoder: Encoder, weights: IntArray, layer: LayerSpec) -> None:
    numbers = context_numbers(weights.shape, layer.contexts)
    counts = _Counts(numbers, layer.levels)
    for weight, number in zip(weights.ravel().tolist(), numbers.tolist(), strict=True):
        encoder.bit(int(weight != 0), counts.nonzero[number])
        if not weight:
            continue
        encoder.bit(int(weight < 0), counts.negative[number])
        size = abs(weight)
        for below, context in enumerate(counts.larger[number], start=1):
            encoder.bit(int(size > below), context)
            if size == below:
                break


def _read_weights(decoder: Decoder, shape: tuple[int, int, int, int], layer: LayerSpec) -> IntArray:
    numbers = context_numbers(shape, layer.contexts)
    counts = _Counts(numbers, layer.levels)
    weights = np.zeros(len(numbers), dtype=np.int64)
    for place, number in enumerate(numbers.tolist()):
        if not decoder.bit(counts.nonzero[number]):
            continue
        negative = decoder.bit(counts.negative[number])
        size = 1
        for context in counts.larger[number]:
            if not decoder.bit(context):
                break
            size += 1
        weights[place] = -size if negative else size
        if decoder.exhausted:
            raise ValueError("the word ends within its weights: it was cut off")
    return weights.reshape(shape)


def _encode(network: IntegerNetwork) -> tuple[bytes, int]:
    encoder = Encoder()
    _write_header(encoder, network)
    for layer, weights in _owned(network):
        _write_weights(encoder, weights, layer)
    return encoder.finish()


def _owned(network: IntegerNetwork) -> Iterator[tuple[LayerSpec, IntArray]]:
    return zip((layer for layer in network.layers if layer.owns_weights), network.weights, strict=True)


def encode(network: IntegerNetwork) -> bytes:
    """Return a network's word, filled up with zero bits to whole bytes.

    Args:
        network: any network of the language.
    """
    return _encode(network)[0]


def length_in_bits(network: IntegerNetwork) -> int:
    """Return the length of a network's word: what a certificate pays.  Padding to bytes is no part of it.

    Args:
        network: any network of the language.
    """
    return _encode(network)[1]


def decode(data: bytes) -> IntegerNetwork:
    """Return the network that a word describes, in time and memory bounded by the language's limits.

    Args:
        data: what `encode` returned.

    Raises:
        TypeError: `data` is not bytes.
        ValueError: it is cut off, too long, of another version, describes no network of the language, or is not what
            `encode` writes for its network.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"a word is bytes, got {type(data).__name__}")
    data = bytes(data)
    if not 0 < len(data) <= MAX_BYTES:
        raise ValueError(f"a word of {len(data)} bytes; expected 1 to {MAX_BYTES}")
    decoder = Decoder(data)
    channels, features, pooling, mirror, layers = _read_header(decoder)
    if decoder.exhausted:
        raise ValueError("the word ends within its header: it was cut off")
    shapes = weight_shapes(
        feature_channels(features, channels), layers
    )  # the limits, before anything of the promised size is made
    owners = [layer for layer in layers if layer.owns_weights]
    weights = tuple(_read_weights(decoder, shape, layer) for layer, shape in zip(owners, shapes, strict=True))
    network = IntegerNetwork(channels, pooling, mirror, layers, weights, features)
    again, length = _encode(network)
    if len(again) != len(data):
        problem = "was cut off" if len(data) < len(again) else "is followed by something else"
        raise ValueError(f"the word of {length} bits takes {len(again)} bytes and {problem}: got {len(data)} bytes")
    if again != data:
        raise ValueError(f"the word of {length} bits is damaged: its last bits are not those that belong to it")
    return network


def header_bits(network: IntegerNetwork) -> float:
    """Return the ideal length in bits of version and header.

    Args:
        network: any network of the language.
    """
    price = _Price()
    _write_header(price, network)
    return price.bits


def layer_bits(weights: IntArray, levels: int, contexts: str = "layer") -> float:
    """Return the ideal length in bits of one layer's weights; it depends on counts alone, not on their order.

    Args:
        weights: integers from -levels to levels, shape (out, in, height, width).
        levels: K.
        contexts: which weights share counts.

    Raises:
        ValueError: a weight is beyond the levels, or there are no such levels or contexts.
    """
    check_field("levels", levels, LEVELS)
    weights = np.asarray(weights)
    if weights.ndim != 4 or weights.size == 0 or int(np.abs(weights).max()) > levels:
        raise ValueError(f"weights of shape {weights.shape}: expected four axes and entries from -{levels} to {levels}")
    numbers = context_numbers(weights.shape, contexts)
    return counts_bits(value_counts(weights, levels, numbers))


def value_counts(weights: IntArray, levels: int, numbers: IntArray) -> IntArray:
    """Return how often each value occurs in each context: all that a layer's length depends on.

    Args:
        weights: integers from -levels to levels.
        levels: K.
        numbers: from `context_numbers`.

    Returns:
        Counts of shape (contexts, 2 K + 1), the column of value v being v + K; a search moves a weight by moving 1.
    """
    count = int(numbers.max()) + 1
    columns = numbers * (2 * levels + 1) + (np.asarray(weights).ravel() + levels)
    return np.bincount(columns, minlength=count * (2 * levels + 1)).reshape(count, 2 * levels + 1).astype(np.int64)


def counts_bits(counts: IntArray) -> float:
    """Return the ideal length in bits of weights with such counts.

    Args:
        counts: from `value_counts`, shape (contexts, 2 K + 1).
    """
    levels = counts.shape[1] // 2
    zeros, negative, positive = counts[:, levels], counts[:, :levels].sum(1), counts[:, levels + 1 :].sum(1)
    sizes = counts[:, levels + 1 :] + counts[:, :levels][:, ::-1]  # of size 1, 2, ..., K
    above = sizes[:, ::-1].cumsum(1)[:, ::-1] - sizes  # larger than 1, 2, ..., K
    bits = adaptive_bits(zeros, negative + positive).sum() + adaptive_bits(positive, negative).sum()
    return float(bits + adaptive_bits(sizes[:, :-1], above[:, :-1]).sum())


def ideal_bits(network: IntegerNetwork) -> tuple[float, ...]:
    """Return the ideal lengths: of version and header, then of each layer's weights (0 where it has none of its own).

    Their sum is below `length_in_bits` by at most 2 bits, and above it by nothing but rounding.

    Args:
        network: any network of the language.
    """
    own = (layer_bits(weights, layer.levels, layer.contexts) for layer, weights in _owned(network))
    return (header_bits(network), *(next(own) if layer.owns_weights else 0.0 for layer in network.layers))
