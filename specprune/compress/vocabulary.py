"""What the language can say, version 1: layers, networks, and the frequencies of a header's choices.

Networks without biases and with ReLU are positively homogeneous: multiplying a layer by a positive number multiplies
the class scores and changes no decision.  So a network is whole numbers, without scales and codebooks.  The frequencies
and limits below are part of the language: changing any of them makes another one, which needs another version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specprune.compress.front_ends import EDGE_SIDE, EDGES, PIXELS, feature_channels

IntArray = NDArray[np.int64]

VERSION = 1
MAX_DEPTH = 16
MAX_CHANNELS = 64
#: Weights of all layers together, those of a tied or fixed layer counted each time they are used.
MAX_WEIGHTS = 1 << 15
#: No word of version 1 is longer: at most 2^15 weights of at most 33 values.
MAX_BYTES = 1 << 16

CONV, LINEAR, DEPTHWISE, FILTERS = "conv", "linear", "depthwise", "filters"
#: Where a weight's adaptive counts are shared: in its layer, output channel, input channel or kernel position.
CONTEXTS = ("layer", "output", "input", "position")

# What a header chooses among, and with which frequencies, in the order of the coder.
VERSIONS = (1,) * 256
FEATURES = {PIXELS: 1, EDGES: 1}
POOLINGS = {1: 1, 2: 1, 4: 1, 8: 1}
MIRRORS = {False: 3, True: 1}
CHANNELS = {1: 4, 3: 2, 2: 1, 4: 1}
DEPTHS = dict.fromkeys(range(1, MAX_DEPTH + 1), 1)
_YES_NO = {False: 1, True: 1}
TIED = {False: 7, True: 1}
KINDS = {CONV: 8, LINEAR: 4, DEPTHWISE: 2, FILTERS: 2}
WIDTHS = {c: 8 if c <= 16 else 4 if c <= 32 else 2 for c in range(1, MAX_CHANNELS + 1)}
KERNELS = {3: 16, 1: 4, 5: 4, 2: 2, 4: 2, 7: 2, 6: 1, 8: 1}
STRIDES = {1: 4, 2: 3, 4: 1}
PADDED = {True: 3, False: 1}
LEVELS = {1: 4, 2: 4, 3: 4, 4: 1, 5: 1, 7: 1, 15: 1}
CONTEXT_CHOICES = dict(zip(CONTEXTS, (5, 1, 1, 1), strict=True))
RELU = {CONV: {True: 15, False: 1}, LINEAR: {True: 15, False: 1}}
RELU |= {DEPTHWISE: {False: 3, True: 1}, FILTERS: {False: 3, True: 1}}

#: The fixed kernels of a "filters" layer, taken in turn by its channels: smoothing, two derivatives, smoothing.
FILTER_BANK: IntArray = np.array(
    [
        [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
        [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],
        [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
        [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
    ]
)
FILTER_BANK.flags.writeable = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what a word's header says of it.

    Attributes:
        kind: "conv"; "linear" (of the sum over all positions, as a 1 x 1 kernel); "depthwise" (one kernel a channel,
            no mixing); or "filters" (depthwise with the fixed 3 x 3 kernels of `FILTER_BANK`, which cost nothing).
        out_channels: how many there are afterwards, 1 to 64.
        kernel: side of the kernel, 1 to 8.
        stride: 1, 2 or 4.
        padding: zeros on each side: 0 or kernel // 2.
        levels: K; weights are from -K to K.  One of 1, 2, 3, 4, 5, 7, 15.
        contexts: which weights share adaptive counts: one of `CONTEXTS`.
        relu: whether negative values are set to zero afterwards; the last layer never does.
        tied: whether the weights are those of the nearest earlier layer that has its own; the shapes must agree.

    Raises:
        ValueError: a field is not as above.
    """

    kind: str
    out_channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    levels: int = 1
    contexts: str = "layer"
    relu: bool = True
    tied: bool = False

    def __post_init__(self) -> None:
        for name, table in (
            ("kind", KINDS),
            ("out_channels", WIDTHS),
            ("kernel", KERNELS),
            ("stride", STRIDES),
            ("levels", LEVELS),
            ("contexts", CONTEXT_CHOICES),
            ("relu", _YES_NO),
            ("tied", _YES_NO),
        ):
            check_field(name, getattr(self, name), table)
        if self.padding not in (0, self.kernel // 2):
            raise ValueError(f"padding {self.padding!r}: expected 0 or kernel // 2 = {self.kernel // 2}")
        if self.kind == LINEAR and (self.kernel, self.stride, self.padding) != (1, 1, 0):
            raise ValueError(f"a linear layer has kernel 1, stride 1 and padding 0; got {self}")
        fixed = (self.kernel, self.padding, self.levels, self.contexts, self.tied)
        if self.kind == FILTERS and fixed != (3, 1, 1, "layer", False):
            raise ValueError(f"a filters layer has kernel 3, padding 1, no tying, and nothing to code; got {self}")

    @property
    def owns_weights(self) -> bool:
        """Whether the word sends weights for this layer."""
        return self.kind != FILTERS and not self.tied

    def weight_shape(self, in_channels: int) -> tuple[int, int, int, int]:
        """Return (out, in, height, width) of the layer's kernels; in is 1 where channels are not mixed."""
        mixed = in_channels if self.kind in (CONV, LINEAR) else 1
        return self.out_channels, mixed, self.kernel, self.kernel


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network of the language: integer weights on integer pixels.

    Attributes:
        channels: of the images, 1 to 4.
        pooling: pixels are first summed over squares of this side: 1 (none), 2, 4 or 8; 1 with "edges".
        mirror: whether the class scores of the image and of its mirror image are added.
        layers: 1 to 16 of them; the class scores are the sums over all positions of the last one's outputs.
        weights: int64, of shape `weight_shape`, one array for each layer that owns weights, in order; read-only.
        features: "pixels", or "edges" for the fixed maps of ``specprune.compress.front_ends``, for 3 channels only.

    Raises:
        ValueError: the layers do not fit together, a weight is beyond its layer's levels, or a limit is exceeded.
    """

    channels: int
    pooling: int
    mirror: bool
    layers: tuple[LayerSpec, ...]
    weights: tuple[IntArray, ...]
    features: str = PIXELS

    def __post_init__(self) -> None:
        check_field("channels", self.channels, CHANNELS)
        check_field("pooling", self.pooling, POOLINGS)
        check_field("mirror", self.mirror, MIRRORS)
        check_field("features", self.features, FEATURES)
        if self.features == EDGES and (self.channels, self.pooling) != (3, 1):
            raise ValueError(
                f"edges are made of images with 3 channels, and pooled already; got {self.channels} channels "
                f"and pooling {self.pooling}, expected 3 and 1"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        shapes = weight_shapes(self.in_channels, self.layers)
        if len(shapes) != len(self.weights):
            raise ValueError(f"got {len(self.weights)} weight arrays; the layers have weights of shapes {shapes}")
        owners = (layer for layer in self.layers if layer.owns_weights)
        copies = []
        for layer, shape, weights in zip(owners, shapes, self.weights, strict=True):
            array = np.array(weights)  # a private copy: a word must not change under a certificate
            if array.dtype.kind not in "iu" or array.shape != shape:
                raise ValueError(f"weights: got {array.dtype} of shape {array.shape}, expected integers, shape {shape}")
            if int(array.max()) > layer.levels or int(array.min()) < -layer.levels:
                raise ValueError(f"weights from {array.min()} to {array.max()}: beyond the levels of {layer}")
            array = array.astype(np.int64)
            array.flags.writeable = False
            copies.append(array)
        object.__setattr__(self, "weights", tuple(copies))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntegerNetwork):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        header = self.channels, self.features, self.pooling, self.mirror, self.layers
        return *header, tuple(array.tobytes() for array in self.weights)

    @property
    def in_channels(self) -> int:
        """Number of maps that the first layer reads."""
        return feature_channels(self.features, self.channels)

    @property
    def classes(self) -> int:
        """Number of class scores."""
        return self.layers[-1].out_channels

    @property
    def front_end(self) -> str:
        """The fixed transforms in words, for tables; nothing in them was learnt."""
        maps = "pixels" if self.pooling == 1 else f"sums of {self.pooling} x {self.pooling} pixels"
        if self.features == EDGES:
            maps = f"colours and normalised edges of {EDGE_SIDE} x {EDGE_SIDE} pixels"
        return maps + (", image and mirror image" if self.mirror else "")

    @property
    def kernels(self) -> tuple[IntArray, ...]:
        """The kernels that each layer uses, tied and fixed ones included, of shape `weight_shape`."""
        found: list[IntArray] = []
        own = iter(self.weights)
        latest: IntArray | None = None
        for layer in self.layers:
            if layer.kind == FILTERS:
                turn = np.arange(layer.out_channels) % len(FILTER_BANK)
                found.append(FILTER_BANK[turn][:, None])
                continue
            if layer.owns_weights:
                latest = next(own)
            assert latest is not None  # the first layer cannot be tied
            found.append(latest)
        return tuple(found)


def check_field(name: str, value: object, table: dict) -> None:
    """Refuse a value that the language has no word for."""
    # Types as well: True equals 1, and would be written as another field's value.
    if not any(type(value) is type(known) and value == known for known in table):
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, sorted(table)))}")


def weight_shapes(channels: int, layers: Sequence[LayerSpec]) -> list[tuple[int, int, int, int]]:
    """Return the shapes of the weights that a word sends, after checking that the layers fit together."""
    if not 1 <= len(layers) <= MAX_DEPTH:
        raise ValueError(f"{len(layers)} layers: expected 1 to {MAX_DEPTH}")
    if layers[-1].relu or layers[-1].kind in (DEPTHWISE, FILTERS):
        raise ValueError(f"the last layer must be a conv or linear layer without ReLU, got {layers[-1]}")
    shapes = []
    source: tuple[LayerSpec, tuple[int, int, int, int]] | None = None
    used = 0
    for number, layer in enumerate(layers):
        shape = layer.weight_shape(channels)
        if layer.kind in (DEPTHWISE, FILTERS) and layer.out_channels != channels:
            raise ValueError(f"layer {number} reads {channels} channels and does not mix them, got {layer}")
        if layer.owns_weights:
            shapes.append(shape)
            source = layer, shape
        elif layer.tied:
            if source is None:
                raise ValueError(f"layer {number} is tied, but no earlier layer has weights of its own")
            first, expected = source
            same = (first.kind, first.levels, first.contexts) == (layer.kind, layer.levels, layer.contexts)
            if not same or shape != expected:
                raise ValueError(
                    f"layer {number} is tied to {first} with weights {expected}; kind, levels, contexts and the shape "
                    f"must agree, got {layer} with weights {shape}"
                )
        used += math.prod(shape)
        if used > MAX_WEIGHTS:
            raise ValueError(f"more than {MAX_WEIGHTS} weights up to layer {number}; the language has no such network")
        channels = layer.out_channels
    return shapes
