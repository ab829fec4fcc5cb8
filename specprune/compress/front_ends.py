"""Fixed transforms of images before a network's first layer: no data, no learning, whole numbers throughout.

"pixels" are sums over squares of pixels.  "edges" describes a colour image by 31 maps of a quarter of its side: mean
brightness and colour, and how strongly brightness and colour change in four directions, compared with how strongly they
change around there.  Such descriptions are decades older than the data sets (histograms of oriented gradients, contrast
normalisation as in the eye), but they are prior knowledge all the same: every table names the transform.

Only sums, products and floor divisions of whole numbers below 2^31 occur, so that all machines agree on every value.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The pixel value that stands for 1.
WHITE = 255
PIXELS, EDGES = "pixels", "edges"
EDGE_CHANNELS = 31
#: An "edges" map has a quarter of the image's side.
EDGE_SIDE = 4

# Brightness and two colour differences, in sixteenths of a pixel value: 0 to 4080, and twice -2040 to 2040.
_LUMA, _BLUE, _RED = (77, 150, 29), (-43, -85, 128), (128, -107, -21)
_REACH = 3  # local strength is the mean over 7 x 7 places
_PLACES = (2 * _REACH + 1) ** 2
_FLOOR = 1400  # what is added to the local strength, so that noise in even areas stays small


# The mirror image of right, down right, down, up right is left, down left, down, up left: falling instead of rising.
_RISING_OR_FALLING = (4, 7, 2, 5, 0, 3, 6, 1)
_SIZES = (0, 3, 2, 1)
_MIRROR_ORDER = [
    *range(3),
    *(start + place for start in (3, 11) for place in _RISING_OR_FALLING),
    *(start + place for start in (19, 23) for place in _SIZES),
    *range(27, 31),
]


def feature_channels(features: str, channels: int) -> int:
    """Return how many maps a front end makes of an image with so many channels."""
    return EDGE_CHANNELS if features == EDGES else channels


def feature_ranges(features: str, channels: int, pooling: int) -> tuple[list[int], list[int]]:
    """Return the least and the greatest value of each map, over all images.

    Args:
        features: "pixels" or "edges".
        channels: of the images.
        pooling: side of the squares that pixels are summed over.
    """
    if features == EDGES:
        signed = 3
        return [-WHITE] * signed + [0] * (EDGE_CHANNELS - signed), [WHITE] * EDGE_CHANNELS
    return [0] * channels, [WHITE * pooling**2] * channels


def pixel_sums(pixels: Tensor, side: int) -> Tensor:
    """Return the sums of pixels over squares.

    Args:
        pixels: whole numbers 0 to 255 (uint8), shape (n, channels, height, width); height and width are multiples of
            `side`.
        side: of the squares.

    Returns:
        int32, shape (n, channels, height / side, width / side).
    """
    return _square_sums(pixels.int(), side)


def edge_maps(pixels: Tensor) -> Tensor:
    """Return brightness, colour, and normalised edges of colour images, at a quarter of their side.

    With y the brightness and g_i its differences in four directions, an edge map is the mean over squares of the
    positive (or negative) part of 512 g_i / (1400 + local mean of sum_i |g_i|).  docs/language.md has all of it.

    Args:
        pixels: red, green and blue from 0 to 255 (uint8), shape (n, 3, height, width); height and width are multiples
            of 4.

    Returns:
        int32, shape (n, 31, height / 4, width / 4): brightness, blue and red difference, from -255 to 255; then from 0
        to 255 the oriented differences of brightness, 4 rising and 4 falling, at full and at half resolution; the sizes
        of the oriented differences of blue and of red at half resolution; centre brighter and darker than its
        surround, at full and at half resolution.

    Source: derived here, after histograms of oriented gradients (Dalal and Triggs 2005) and divisive normalisation.
    """
    red, green, blue = pixels.int().unbind(1)
    fine, blueness, redness = (_divide(r * red + g * green + b * blue, 16)[:, None] for r, g, b in (_LUMA, _BLUE, _RED))
    coarse = _square_means(fine, 2)
    maps = [
        _square_sums(fine, 4).floor_divide(128) - WHITE,
        *(_divide(_square_sums(colour, 4), 64).clamp(-WHITE, WHITE) for colour in (blueness, redness)),
    ]
    for luma, side in ((fine, 4), (coarse, 2)):
        maps += _halves(_differences(luma), 512, side)
    for colour in (blueness, redness):
        changes = _differences(_square_means(colour, 2))
        maps.append(_pool(_normalised(changes, 256), 2))
    for luma, side in ((fine, 4), (coarse, 2)):
        maps += _halves(_centre_surround(luma), 256, side)
    return torch.cat(maps, 1)


def mirrored(features: str, maps: Tensor) -> Tensor:
    """Return the maps of the mirror images: the mirrored maps, with left and right directions exchanged.

    Args:
        features: "pixels" or "edges".
        maps: from `pixel_sums` or `edge_maps`, shape (n, maps, height, width).
    """
    turned = maps.flip(3)
    return turned[:, _MIRROR_ORDER] if features == EDGES else turned


def _divide(values: Tensor, divisor: int | Tensor) -> Tensor:
    """Return the quotients rounded down, also those of negative numbers."""
    return torch.div(values, divisor, rounding_mode="floor")


def _square_sums(maps: Tensor, side: int) -> Tensor:
    for axis in (2, 3):
        parts = maps.unflatten(axis, (-1, side)).unbind(axis + 1)
        maps = sum(parts[1:], start=parts[0])  # several times faster than a sum over the axis
    return maps


def _square_means(maps: Tensor, side: int) -> Tensor:
    return _divide(_square_sums(maps, side), side**2)


def _pool(maps: Tensor, side: int) -> Tensor:
    return _square_means(maps, side).clamp(max=WHITE)


def _padded(maps: Tensor, reach: int) -> Tensor:
    """Return maps that go on beyond their border with the values at the border."""
    for axis in (2, 3):
        places = torch.arange(-reach, maps.shape[axis] + reach, device=maps.device)
        maps = maps.index_select(axis, places.clamp(0, maps.shape[axis] - 1))
    return maps


def _weighted(padded: Tensor, kernel: tuple[int, ...], axis: int) -> Tensor:
    """Return sums along one axis with whole-number weights; the map loses what its padding added."""
    size = padded.shape[axis] - len(kernel) + 1
    parts = [padded.narrow(axis, place, size) for place in range(len(kernel))]
    total = parts[0] * kernel[0]
    for part, weight in zip(parts[1:], kernel[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _differences(luma: Tensor) -> Tensor:
    """Return the differences of one map to the right, down right, down and up right: (n, 4, height, width)."""
    height, width = luma.shape[2:]
    padded = _padded(luma, 1)

    def at(down: int, right: int) -> Tensor:
        return padded[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    corners = at(1, 1) - at(-1, -1), at(-1, 1) - at(1, -1)
    right, down = at(0, 1) - at(0, -1), at(1, 0) - at(-1, 0)
    return torch.cat(
        [
            corners[0] + corners[1] + 2 * right,
            2 * corners[0] + right + down,
            corners[0] - corners[1] + 2 * down,
            2 * corners[1] + right - down,
        ],
        1,
    )


def _centre_surround(luma: Tensor) -> Tensor:
    """Return 16 times the difference between a place and the smoothed map around it, rounded towards zero."""
    smooth = (1, 4, 6, 4, 1)
    around = _weighted(_weighted(_padded(luma, 2), smooth, 2), smooth, 3)
    change = 256 * luma - around
    return change.sign() * change.abs().floor_divide(16)


def _normalised(changes: Tensor, gain: int) -> Tensor:
    """Return gain |change| / (1400 + mean over 7 x 7 places of the sum of |change| over the maps), rounded down."""
    strength = changes.abs()
    box = (1,) * (2 * _REACH + 1)
    local = _weighted(_weighted(_padded(strength.sum(1, keepdim=True, dtype=torch.int32), _REACH), box, 2), box, 3)
    return _divide(strength * (gain * _PLACES), local + _FLOOR * _PLACES)


def _halves(changes: Tensor, gain: int, side: int) -> list[Tensor]:
    """Return the pooled rising and falling parts."""
    signed = _normalised(changes, gain) * changes.sign()
    return [_pool(part.clamp(min=0), side) for part in (signed, -signed)]
