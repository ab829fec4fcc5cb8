"""Running sums of rows and of their outer products: symmetric and shift structure, single products, double sums."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import TypeGuard

import torch
from scipy.linalg import blas
from torch import Tensor, nn
from torch.nn import functional

from specprune.compress.layers import Convolution, Layer, output_size

CHUNK = 1024  # rows whose products BLAS adds up before they go to the float64 sums; it sums by blocks of its own
PART = 256  # the same for narrow matrices, whose products are added one by one
LINE = 1024  # pixels of a line, over all images of a part, whose products are added one by one
WIDE = 128  # columns from which BLAS syrk, half of the products, beats a batched product
_STRIP = 256  # rows of a triangle that are handled at a time
_NARROW_MAP = 4  # channels below which explicit patches are cheaper than their shifts
_SHIFTED = (nn.Conv1d, nn.Conv2d)
_SMALL, _LARGE = 1e-15, 1e17  # of a column's largest number, between which float32 holds the sums of its squares

Range = tuple[int, int]


class GramSum:
    """The number of rows seen, their sum, and the sum of their outer products.

    Rows of float64 are multiplied in float64, all others in float32.  A few hundred products are added up in that
    precision, then the sums in float64, so that the error does not grow with the number of rows.  In float32 that of
    entry (i, j) is about 1e-7 of sqrt(G_ii G_jj), and up to 2e-6 where the data repeat a few values (half
    precision, equal numbers), for then the roundings have a sign in common.

    On the CPU a wide matrix takes only half of the products, by BLAS syrk, and rows whose squares leave the range of
    float32 are multiplied in float64.  Nothing here waits for an accelerator, where such squares become Inf or 0.

    Args:
        columns: d, the length of a row.
        device: where the rows are.
        wide: multiply all rows in float64, for what is centred afterwards: that cancels all but the spread.

    Attributes:
        rows: how many rows were added.
        total: (d,) float64 sum of the rows.
    """

    def __init__(self, columns: int, device: torch.device, *, wide: bool = False) -> None:
        self.rows = 0
        self._wide = wide
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self._gram: Tensor | None = None
        self._half = device.type == "cpu" and columns >= WIDE  # only the lower triangle is summed
        self._pending: Tensor | None = None
        self._pending_rows = 0
        self._by_offset: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add the rows of an (n, d) matrix."""
        rows = self._widen(rows, (0,))
        self.rows += len(rows)
        if self._gram is None:
            self._gram = torch.zeros(len(self.total), len(self.total), dtype=torch.float64, device=self.total.device)
        with full_precision(rows.device):
            whole = len(rows) // PART * PART
            if self._half:
                for part in rows.split(CHUNK):
                    self.total += part.sum(0)
                    self._add_half(self._gram, part)
                return
            # A part of the rows has PART * d numbers, its product d * d: no more products at once than rows.
            together = PART * max(1, len(rows) // max(1, len(self.total)))
            for start in range(0, whole, together):
                parts = rows[start : min(start + together, whole)].unflatten(0, (-1, PART))
                self.total += parts.sum(1).sum(0, dtype=torch.float64)
                self._gram += torch.bmm(parts.mT, parts).sum(0, dtype=torch.float64)
            if whole < len(rows):
                rest = rows[whole:]
                self.total += rest.sum(0)
                self._gram += rest.T @ rest

    def add_patches(self, layer: Convolution, inputs: Tensor) -> None:
        """Add the patches of all output positions of a convolution for which `is_shiftable` holds.

        The Gram entry of the columns (c, o) and (c', o') is the sum of x_c(p + o) x_c'(p + o') over output positions
        p.  It depends on the shift o' - o alone, but for the ends of the range of p, so that 13 products of shifted
        maps replace the 45 pairs of offsets of a 3x3 kernel.  The maps are laid out with the images innermost: a
        horizontal shift is then a contiguous slice, a vertical one another slice of the batch of products, and the
        ends are cut exactly (strips of columns apart, lines by adding only those that count).

        Args:
            layer: a Conv1d or Conv2d of stride 1; of a grouped one, the columns are those of all its blocks.
            inputs: (n, channels, length) or (n, channels, height, width).
        """
        maps, axes = _planes(layer, self._widen(inputs, (0, *range(2, inputs.dim()))))
        self.rows += len(maps) * math.prod(axis.outputs for axis in axes)
        channels, offsets = maps.shape[1], axes[0].kernel * axes[1].kernel
        if self._by_offset is None:
            shape = (axes[0].kernel, axes[1].kernel, axes[0].kernel, axes[1].kernel, channels, channels)
            self._by_offset = torch.zeros(shape, dtype=torch.float64, device=maps.device)
        with full_precision(maps.device):
            sums = maps.sum(0).to(torch.float64)
            totals = [
                sums[:, slice(*axes[0].span(a, a)), slice(*axes[1].span(b, b))].sum((1, 2))
                for a in range(axes[0].kernel)
                for b in range(axes[1].kernel)
            ]
            self.total += torch.stack(totals, 1).reshape(channels * offsets)
            for part in maps.split(max(1, LINE // maps.shape[3])):
                _add_shifts(self._by_offset, part, axes)

    def finish(self) -> Tensor:
        """Return the (d, d) float64 sum of the outer products; no rows can be added after that."""
        parts = []
        if self._gram is not None:
            self._flush(self._gram)
            parts.append(_mirrored(self._gram) if self._half else self._gram)
        if self._by_offset is not None:
            parts.append(_in_order(self._by_offset))
        self._gram = self._by_offset = self._pending = None
        return parts[0] if len(parts) == 1 else torch.add(*parts)

    def _widen(self, rows: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the rows in the precision of their products; all axes but that of the columns are named."""
        if rows.dtype == torch.float64 or self._wide:
            return rows.to(torch.float64)
        rows = rows.to(torch.float32)
        if rows.device.type == "cpu" and rows.numel():
            largest = torch.linalg.vector_norm(rows, math.inf, axes)
            if bool(((largest > _LARGE) | ((largest > 0) & (largest < _SMALL))).any()):
                return rows.to(torch.float64)
        return rows

    def _add_half(self, gram: Tensor, part: Tensor) -> None:
        """Add the lower triangle of the outer products of at most CHUNK rows."""
        array = part.contiguous().numpy().T  # (d, n) in Fortran order without a copy
        if part.dtype == torch.float64:
            blas.dsyrk(1.0, array, beta=1.0, c=gram.numpy().T, overwrite_c=1)
            return
        if self._pending_rows + len(part) > CHUNK:
            self._flush(gram)
        if self._pending is None:
            self._pending = torch.empty(gram.shape)  # syrk with beta = 0 writes what is read
        blas.ssyrk(1.0, array, beta=float(self._pending_rows > 0), c=self._pending.numpy().T, overwrite_c=1)
        self._pending_rows += len(part)

    def _flush(self, gram: Tensor) -> None:
        if self._pending is None or self._pending_rows == 0:
            return
        for start in range(0, len(gram), _STRIP):
            stop = start + _STRIP
            gram[start:stop, :stop] += self._pending[start:stop, :stop]
        self._pending_rows = 0


def _mirrored(gram: Tensor) -> Tensor:
    """Copy the lower triangle of a matrix into the upper one, in place."""
    for start in range(0, len(gram), _STRIP):
        stop = start + _STRIP
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        gram[start:stop, stop:] = gram[stop:, start:stop].T
    return gram


def _in_order(by_offset: Tensor) -> Tensor:
    """Return the Gram matrix over (channel, offset) from its blocks of offsets (a, b) not after (a', b')."""
    offsets, channels = math.prod(by_offset.shape[:2]), by_offset.shape[-1]
    blocks = by_offset.reshape(offsets, offsets, channels, channels)
    for first in range(offsets):
        blocks[first + 1 :, first] = blocks[first, first + 1 :].mT
    return blocks.permute(2, 0, 3, 1).reshape(channels * offsets, channels * offsets)


class _Axis:
    """One spatial axis of a convolution of stride 1: which input pixels meet which kernel offset.

    Args:
        kernel: number of kernel offsets.
        dilation: pixels between two of them.
        before: zeros before the first pixel.
        length: number of pixels.
        outputs: number of output positions.
    """

    def __init__(self, kernel: int, dilation: int, before: int, length: int, outputs: int) -> None:
        self.kernel, self.dilation, self.before, self.length, self.outputs = kernel, dilation, before, length, outputs

    def span(self, first: int, second: int) -> Range:
        """Return the pixels p that meet offset `first` while p + lag, a pixel too, meets offset `second`."""
        lag = (second - first) * self.dilation
        start = first * self.dilation - self.before
        low = max(start, 0, -lag)
        return low, max(low, min(start + self.outputs, self.length, self.length - lag))


def is_shiftable(layer: Layer, inputs: Tensor) -> TypeGuard[Convolution]:
    """Return whether `GramSum.add_patches` can take these inputs, and is cheaper than explicit patches."""
    if not isinstance(layer, _SHIFTED) or set(layer.stride) != {1} or layer.in_channels < _NARROW_MAP:
        return False
    pairs = zip(output_size(layer, inputs), layer.kernel_size, strict=True)
    return math.prod(layer.kernel_size) > 1 and all(outputs >= 2 * kernel for outputs, kernel in pairs)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Form float32 products as such: no autocast and no TF32 inside; the settings are put back afterwards."""
    with _no_tf32(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    # the older functions refuse to work once the caller has set one of these
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def _planes(layer: Convolution, inputs: Tensor) -> tuple[Tensor, tuple[_Axis, _Axis]]:
    """Return the inputs as (n, channels, height, width) maps, and the two axes; of a signal, the height is 1."""
    pads = list(layer._reversed_padding_repeated_twice)
    outputs = output_size(layer, inputs)
    if layer.padding_mode != "zeros":  # what is padded is then made of pixels like all others
        inputs = functional.pad(inputs, pads, mode=layer.padding_mode)
        pads = [0] * len(pads)
    axes = [
        _Axis(layer.kernel_size[k], layer.dilation[k], pads[-2 - 2 * k], inputs.shape[2 + k], outputs[k])
        for k in range(len(outputs))
    ]
    if len(axes) == 1:
        return inputs[:, :, None], (_Axis(1, 1, 0, 1, 1), axes[0])
    return inputs, (axes[0], axes[1])


def _add_shifts(gram: Tensor, maps: Tensor, axes: tuple[_Axis, _Axis]) -> None:
    """Add the products of some images, at offsets (a, b) not after (a', b'), to gram[a, b, a', b', c, c']."""
    vertical, horizontal = axes
    count, channels, height, width = maps.shape
    # (channels, height, width * images): a shift by one column is a shift by `count` numbers
    lines = maps.reshape(count, -1).T.reshape(channels, height, width * count).transpose(0, 1)
    for i in range(vertical.kernel):
        down = i * vertical.dilation
        rows = [vertical.span(a, a + i) for a in range(vertical.kernel - i)]
        for j in range(0 if i == 0 else 1 - horizontal.kernel, horizontal.kernel):
            right = j * horizontal.dilation
            offsets = range(max(0, -j), horizontal.kernel - max(0, j))
            columns = [horizontal.span(b, b + j) for b in offsets]
            for start, stop in _segments(columns):
                left = lines[: max(0, height - down), :, start * count : stop * count]
                other = lines[down:, :, (start + right) * count : (stop + right) * count]
                products = torch.bmm(left, other.mT)
                sums = [products[slice(*span)].sum(0) for span in rows]
                for b, (low, high) in zip(offsets, columns, strict=True):
                    if low <= start and stop <= high:
                        for a, block in enumerate(sums):
                            gram[a, b, a + i, b + j] += block


def _segments(spans: list[Range]) -> list[Range]:
    """Return the ranges between neighbouring ends of the spans that lie in one of them."""
    ends = sorted({end for span in spans for end in span})
    return [(a, b) for a, b in itertools.pairwise(ends) if any(low <= a and b <= high for low, high in spans)]
