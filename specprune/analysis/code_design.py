"""Networks of the language without their weights: their layers, what the first one reads, and real-valued scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specprune.analysis.certificate import LabelledImages
from specprune.bounds.bound import check_number
from specprune.compress.front_ends import EDGES, PIXELS, edge_maps, feature_channels, mirrored, pixel_sums
from specprune.compress.vocabulary import (
    CONV,
    DEPTHWISE,
    FILTER_BANK,
    FILTERS,
    LINEAR,
    MAX_CHANNELS,
    IntegerNetwork,
    LayerSpec,
)

_MANY = 20_000


@dataclass(frozen=True)
class Design:
    """A network of the language without its weights.

    Attributes:
        channels: of the images.
        pooling: side of the squares that pixels are summed over.
        mirror: whether the scores of the mirror image are added.
        layers: as in `IntegerNetwork`.
        features: "pixels" or "edges".
    """

    channels: int
    pooling: int
    mirror: bool
    layers: tuple[LayerSpec, ...]
    features: str = PIXELS

    @property
    def owners(self) -> tuple[LayerSpec, ...]:
        """The layers that have weights of their own, in order."""
        return tuple(layer for layer in self.layers if layer.owns_weights)

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The shapes of the weights, one for each of `owners`."""
        width = feature_channels(self.features, self.channels)
        found = []
        for layer in self.layers:
            if layer.owns_weights:
                found.append(layer.weight_shape(width))
            width = layer.out_channels
        return tuple(found)

    def network(self, weights: Sequence[Tensor]) -> IntegerNetwork:
        """Return the network with these weights, rounded to its grid.

        Args:
            weights: of shapes `shapes`.

        Raises:
            ValueError: the layers or shapes do not fit together.
        """
        arrays = [rounded(w.detach(), layer.levels) for w, layer in zip(weights, self.owners, strict=True)]
        whole = tuple(array.cpu().numpy().astype(np.int64) for array in arrays)
        return IntegerNetwork(self.channels, self.pooling, self.mirror, self.layers, whole, self.features)


def design_of(network: IntegerNetwork) -> Design:
    """Return a network's design."""
    return Design(network.channels, network.pooling, network.mirror, network.layers, network.features)


def rounded(weights: Tensor, levels: int) -> Tensor:
    """Return the nearest whole numbers from -levels to levels."""
    return weights.round().clamp(-levels, levels)


def front_end(design: Design, pixels: Tensor) -> Tensor:
    """Return the maps that the first layer reads, those of the mirror images last where there are any.

    Args:
        design: whose front end.
        pixels: uint8, shape (n, channels, height, width).

    Returns:
        float32 whole numbers, shape (views, n, maps, height, width), with 2 views for mirror images and 1 without.
    """
    make = edge_maps if design.features == EDGES else lambda part: pixel_sums(part, design.pooling)
    maps = torch.cat([make(part) for part in pixels.split(500)])
    views = [maps, mirrored(design.features, maps)] if design.mirror else [maps]
    return torch.stack(views).float()


def scores(maps: Tensor, weights: Sequence[Tensor], layers: Sequence[LayerSpec]) -> Tensor:
    """Return class scores, differentiable and in floating point.

    Args:
        maps: what the first layer reads, shape (n, channels, height, width).
        weights: one tensor for each layer that owns weights.
        layers: of the design.

    Returns:
        Sums over positions, shape (n, classes).
    """
    own = iter(weights)
    latest = maps
    for layer in layers:
        if layer.owns_weights:
            latest = next(own)
        kernel = filter_kernels(layer.out_channels, maps) if layer.kind == FILTERS else latest
        if layer.kind == LINEAR:
            maps = maps.sum((2, 3), keepdim=True)
        groups = 1 if layer.kind in (CONV, LINEAR) else len(kernel)
        maps = F.conv2d(maps, kernel, None, layer.stride, layer.padding, 1, groups)
        if layer.relu:
            maps = maps.relu_()
    return maps.sum((2, 3))


def filter_kernels(channels: int, like: Tensor) -> Tensor:
    """Return the fixed kernels of a "filters" layer, of about unit gain, which changes no decision."""
    bank = torch.from_numpy(FILTER_BANK[np.arange(channels) % len(FILTER_BANK)]).to(like)[:, None]
    return bank / 8


def gains(design: Design) -> list[float]:
    """Return a factor per layer that keeps float32 in range: one over the root of a kernel's number of weights."""
    return [1 / math.sqrt(math.prod(shape[1:])) for shape in design.shapes]


def scaled_design(design: Design, factor: float) -> Design:
    """Return a design with all widths multiplied, rounded, and kept between 1 and the language's limit.

    Args:
        design: whose last layer stays as it is.
        factor: above 0.

    Raises:
        ValueError: the factor is not above 0.
    """
    factor = check_number("factor", factor, 0.0, open_low=True)
    layers = []
    width = 0
    for layer in design.layers[:-1]:
        # Layers that do not mix channels have as many as the layer before.
        mixes = layer.kind not in (FILTERS, DEPTHWISE)
        width = max(1, min(MAX_CHANNELS, round(factor * layer.out_channels))) if mixes or not width else width
        layers.append(dataclasses.replace(layer, out_channels=width))
    return dataclasses.replace(design, layers=(*layers, design.layers[-1]))


def default_design(dataset: LabelledImages) -> Design:
    """Return the design that is tried where none is given, by the size and number of the training images.

    Grey images: pooled to sides of at most 16, convolutions down to 3 x 3 (2 x 2, and fewer weights, for fewer than
    20,000 images), and a layer that reads every position: on MNIST, such a layer was worth more than any other choice
    (9.6 % against 12 % with one that reads sums).  Colour images: the fixed edge maps, mixed by 1 x 1
    convolutions around fixed filters, and again a layer that reads every position.

    Args:
        dataset: with its training images.

    Raises:
        ValueError: the images are of a size that no design here fits.
    """
    _, channels, height, width = dataset.train_inputs.shape
    if channels == 3 and height == width and height in (16, 32, 64):
        return _colour_design(dataset.classes, height // 8)
    pooling = next((side for side in (1, 2, 4, 8) if height // side <= 16), None)
    fits = height == width and channels in (1, 2, 4) and pooling is not None and height % pooling == 0
    if not fits or pooling is None or height // pooling < 8:
        raise ValueError(
            f"{dataset.name}: no default design for images of {channels} x {height} x {width}; give one (`design`)"
        )
    side = height // pooling
    if len(dataset.train_targets) < _MANY:
        layers = []
        while side > 2:
            side = (side - 1) // 2 + 1
            layers.append(LayerSpec(CONV, 4, 3, 2, 1, 2))
    else:
        layers = [LayerSpec(CONV, 6, 3, 1, 1, 3)]
        while side > 8:
            side = (side - 1) // 2 + 1
            layers.append(LayerSpec(CONV, 6, 3, 2, 1, 3))
        layers.append(LayerSpec(CONV, 8, 3, 2, 0, 3))
        side = (side - 3) // 2 + 1
    layers.append(LayerSpec(CONV, dataset.classes, side, 1, 0, layers[-1].levels, relu=False))
    return Design(channels, pooling, False, tuple(layers))


def _colour_design(classes: int, side: int) -> Design:
    layers = (
        LayerSpec(CONV, 20, 1, 1, 0, 2, relu=False),
        LayerSpec(FILTERS, 20, 3, 2, 1),
        LayerSpec(CONV, 8, 1, 1, 0, 2),
        LayerSpec(CONV, classes, side, 1, 0, 2, relu=False),
    )
    return Design(3, 1, True, layers, EDGES)
