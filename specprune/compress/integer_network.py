"""Networks of the language, run in whole numbers: the same decisions on every machine.

Pixels are whole numbers 0 to 255, front ends keep them whole, weights are whole numbers, so is every value.
float32 holds whole numbers exactly up to 2^24 and float64 up to 2^53, so that matrix products compute exactly what
whole-number arithmetic would, in any order, provided no partial sum is larger.  That is checked beforehand, for all
images of a size and not only for those at hand.  Convolutions of libraries may use transforms instead (Winograd,
Fourier), which round; here every product is one that the definition has.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specprune.compress.front_ends import EDGE_SIDE, EDGES, WHITE, edge_maps, feature_ranges, mirrored, pixel_sums
from specprune.compress.vocabulary import CONV, LINEAR, IntArray, IntegerNetwork, LayerSpec

_EXACT32, _EXACT64 = 2**24, 2**53
_MOST_VALUES = 1 << 22  # in the largest array of a batch: 32 MiB of float64


@dataclass(frozen=True)
class LayerRange:
    """What a layer does to an image size, and how large its sums can become.

    Attributes:
        height: of the layer's output map.
        width: of the layer's output map.
        largest: no sum of some of the terms of an output exceeds this, for any image.
    """

    height: int
    width: int
    largest: int


def integer_pixels(inputs: Tensor) -> Tensor:
    """Return images in [0, 1] as whole numbers 0 to 255, each the nearest (even of two): exact for 8-bit images.

    Args:
        inputs: float pixels in [0, 1], shape (n, channels, height, width).

    Returns:
        uint8, the same shape, on the same device.

    Raises:
        ValueError: another shape or type, or a pixel outside [0, 1].
    """
    if inputs.ndim != 4 or not inputs.is_floating_point():
        raise ValueError(
            f"images: got {inputs.dtype} of shape {tuple(inputs.shape)}; expected floats (n, channels, height, width)"
        )
    if not len(inputs):
        return inputs.to(torch.uint8)
    low, high = float(inputs.min()), float(inputs.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"pixels from {low:g} to {high:g}: expected [0, 1]; rescale them")
    return torch.cat([(part.double() * WHITE).round().to(torch.uint8) for part in inputs.split(4096)])


def layer_ranges(network: IntegerNetwork, height: int, width: int) -> tuple[LayerRange, ...]:
    """Return the map and the largest possible sum of every layer, for images of a size.

    The values of each channel are enclosed in an interval around zero.  A sum of some of an output's terms lies
    between the sum of their least and the sum of their greatest values, whatever the order.

    Args:
        network: the network.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        One `LayerRange` a layer; the last one's `largest` includes the sums over positions and mirror images.

    Raises:
        ValueError: the front end's squares do not fit into the size, a kernel is larger than its map, or sums of 2^53
            or more are possible, which would not be exact.
    """
    side = EDGE_SIDE if network.features == EDGES else network.pooling
    if height < 1 or width < 1 or height % side or width % side:
        raise ValueError(f"images of {height} x {width} pixels: expected multiples of {side}, for {network.front_end}")
    height, width = height // side, width // side
    low, high = feature_ranges(network.features, network.channels, network.pooling)
    found = []
    for number, (layer, kernels) in enumerate(zip(network.layers, network.kernels, strict=True)):
        if layer.kind == LINEAR:
            low, high = [value * height * width for value in low], [value * height * width for value in high]
            sums = max(*high, -min(low))
            height = width = 1
        else:
            sums = 0
            height, width = (_map_side(layer, side, number) for side in (height, width))
        low, high = _intervals(layer, kernels, low, high)
        sums = max(sums, *high, *(-value for value in low))
        if number == len(network.layers) - 1:
            sums *= height * width * (2 if network.mirror else 1)
        if sums >= _EXACT64:
            raise ValueError(
                f"layer {number} could make sums of {sums:.3g}, which float64 does not hold exactly (limit 2^53); "
                "use fewer levels, channels or layers"
            )
        found.append(LayerRange(height, width, sums))
        if layer.relu:
            low = [0] * len(low)
    return tuple(found)


def _map_side(layer: LayerSpec, side: int, number: int) -> int:
    reach = side + 2 * layer.padding - layer.kernel
    if reach < 0:
        raise ValueError(f"layer {number}: its kernel is larger than its map of side {side}, got {layer}")
    return reach // layer.stride + 1


def _intervals(layer: LayerSpec, kernels: IntArray, low: list[int], high: list[int]) -> tuple[list[int], list[int]]:
    """Return the least and greatest sums per output channel, in whole numbers of any size."""
    up = np.maximum(kernels, 0).sum((2, 3)).tolist()
    down = np.maximum(-kernels, 0).sum((2, 3)).tolist()
    lows, highs = [], []
    for out in range(layer.out_channels):
        inputs = range(len(low)) if layer.kind in (CONV, LINEAR) else (out,)
        pairs = [(p, m, low[i], high[i]) for p, m, i in zip(up[out], down[out], inputs, strict=True)]
        lows.append(sum(p * least - m * greatest for p, m, least, greatest in pairs))
        highs.append(sum(p * greatest - m * least for p, m, least, greatest in pairs))
    return lows, highs


class IntegerRunner:
    """Runs a network on images of one size, layer by layer, exactly.

    A search keeps the output of each layer and starts again behind the one it changed: `front_end`, then `layer` for
    each, then `scores`.

    Args:
        network: the network.
        height: of the images, in pixels.
        width: of the images, in pixels.
        device: where to compute.

    Raises:
        ValueError: the network does not run on such images exactly; see `layer_ranges`.
    """

    def __init__(self, network: IntegerNetwork, height: int, width: int, device: torch.device | str = "cpu") -> None:
        self.network = network
        self.height, self.width = height, width
        self.ranges = layer_ranges(network, height, width)
        # Short formats (TF32, bfloat16) may replace float32 where someone allowed it, float64 never.
        narrow = torch.device(device).type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        self.types = [torch.float32 if narrow and part.largest < _EXACT32 else torch.float64 for part in self.ranges]
        self.kernels = [
            torch.from_numpy(kernels.copy()).to(device, dtype)
            for kernels, dtype in zip(network.kernels, self.types, strict=True)
        ]

    def batch_size(self) -> int:
        """Return how many images to run at once, so that memory stays bounded whatever the network."""
        maps = [self.network.in_channels * self.height * self.width]
        channels = self.network.in_channels
        for spec, kernels, found in zip(self.network.layers, self.kernels, self.ranges, strict=True):
            maps.append(max(channels * spec.kernel**2, len(kernels)) * found.height * found.width)
            channels = len(kernels)
        return max(1, min(1000, _MOST_VALUES // max(maps)))

    def front_end(self, pixels: Tensor) -> Tensor:
        """Return the maps that the first layer reads, in float32: the same for all networks with the same front end.

        Args:
            pixels: whole numbers 0 to 255 (uint8), shape (n, channels, height, width).

        Raises:
            ValueError: another type or shape.
        """
        expected = (self.network.channels, self.height, self.width)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"pixels: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 (n, *{expected})")
        maps = edge_maps(pixels) if self.network.features == EDGES else pixel_sums(pixels, self.network.pooling)
        return maps.float()  # at most 255 * 64: exact

    def layer(self, number: int, values: Tensor) -> Tensor:
        """Return the outputs of one layer.

        Args:
            number: which layer, from 0.
            values: the outputs of the layer before it, or of `front_end`.
        """
        spec, kernels = self.network.layers[number], self.kernels[number]
        values = values.to(self.types[number])
        if spec.kind == LINEAR:
            values = values.sum((2, 3), keepdim=True)
        outputs = _sums_of_products(values, kernels, spec)
        return outputs.relu_() if spec.relu else outputs

    def scores(self, values: Tensor) -> Tensor:
        """Return class scores, (n, classes) in float64, from the outputs of the last layer."""
        return values.double().sum((2, 3))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return class scores of a batch: whole numbers in float64, shape (n, classes).

        Args:
            pixels: as for `front_end`, on the runner's device.
        """
        maps = self.front_end(pixels)
        views = (maps, mirrored(self.network.features, maps)) if self.network.mirror else (maps,)
        total = torch.zeros(len(pixels), self.network.classes, dtype=torch.float64, device=pixels.device)
        for values in views:
            for number in range(len(self.kernels)):
                values = self.layer(number, values)
            total += self.scores(values)
        return total


def _sums_of_products(values: Tensor, kernels: Tensor, spec: LayerSpec) -> Tensor:
    """Return a convolution term by term: those of libraries may use transforms, which round.

    Args:
        values: shape (n, in, height, width).
        kernels: shape (out, in, kernel, kernel), with 1 for in where channels are not mixed.
        spec: kind, stride and padding.

    Returns:
        Shape (n, out, height', width').
    """
    height, width = ((side + 2 * spec.padding - spec.kernel) // spec.stride + 1 for side in values.shape[2:])
    if spec.kind in (CONV, LINEAR):
        plain = spec.kernel == spec.stride == 1
        patches = values.flatten(2) if plain else F.unfold(values, spec.kernel, 1, spec.padding, spec.stride)
        return (kernels.flatten(1) @ patches).unflatten(2, (height, width))
    padded = F.pad(values, [spec.padding] * 4)
    total = values.new_zeros(*values.shape[:2], height, width)
    for row, column in itertools.product(range(spec.kernel), repeat=2):
        rows = slice(row, row + spec.stride * (height - 1) + 1, spec.stride)
        columns = slice(column, column + spec.stride * (width - 1) + 1, spec.stride)
        total.addcmul_(padded[:, :, rows, columns], kernels[:, 0, row, column, None, None])
    return total


def decide(scores: Tensor) -> Tensor:
    """Return the class with the largest score; the lowest of several.

    Args:
        scores: shape (n, classes).

    Returns:
        int64, shape (n,).
    """
    classes = scores.shape[1]
    numbers = torch.arange(classes, device=scores.device)
    return torch.where(scores == scores.amax(1, keepdim=True), numbers, classes).amin(1)


@torch.no_grad()
def predict(network: IntegerNetwork, pixels: Tensor) -> Tensor:
    """Return the classes that a network gives to images.

    Args:
        network: the network.
        pixels: whole numbers 0 to 255 (uint8), shape (n, channels, height, width).

    Returns:
        int64, shape (n,), on the pixels' device.

    Raises:
        ValueError: another type or shape, or the network does not run on such images exactly.
    """
    if pixels.ndim != 4:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (n, channels, height, width)")
    runner = IntegerRunner(network, pixels.shape[2], pixels.shape[3], pixels.device)
    parts = [decide(runner(part)) for part in pixels.split(runner.batch_size())]
    return torch.cat(parts)


def count_errors(network: IntegerNetwork, pixels: Tensor, targets: Tensor) -> int:
    """Return how many images a network gives another class than their label.

    Args:
        network: the network.
        pixels: as for `predict`.
        targets: int64 labels, shape (n,).

    Raises:
        ValueError: the shapes do not fit.
    """
    if targets.shape != pixels.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} labels for {tuple(pixels.shape)} pixels: expected one an image")
    return int((predict(network, pixels) != targets).sum())
