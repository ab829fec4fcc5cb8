"""Low-rank layers: the input channels in k slices, each slice of the weight matrix replaced by a thin product.

A layer's weights W (outputs f, inputs c, kernel k1 x k2; a Linear has a 1 x 1 kernel) become a matrix by one of four
foldings, which differ in where the kernel's axes go:

    0:  f x (c k1 k2)      1:  (f k1) x (c k2)      2:  (f k2) x (c k1)      3:  (f k1 k2) x c

The columns are cut into k slices of c / k channels, and slice i becomes W_i ~ U_i (U_i^T W_i) with U_i its first j left
singular vectors.  The new layer is two ordinary ones: a convolution in k groups with the kernel axes of the columns and
no bias, then a convolution with those of the rows and the bias.  That is exact for every stride, dilation and padding
mode: an axis is padded by the part that has its kernel, and padding with zeros, copies or reflections of pixels along
one axis commutes with a convolution without bias along the other.

Source: Liebenwein et al. 2021 (arXiv:2107.11442), sections 2 and 3; the exact error and `moment` are derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from specprune.bounds.low_rank_error import layer_error_bound
from specprune.compress.layers import input_width
from specprune.compress.low_rank_parts import (
    FIRST_AXES,
    Factorable,
    FactoredLayer,
    PartSizes,
    SlicedLinear,
    empty_layer,
    refusal,
)

_REFIT_TOLERANCE = 1e-7  # relative; the moments of single precision models are no better


@dataclass(frozen=True)
class LayerErrors:
    """The error of a low-rank layer, three times, each over the operator norm of its folded weight matrix.

    Args:
        largest: max_i sigma_{i,j+1}, over the slices i; never above `exact`.
        theorem: sqrt(k) times that, Theorem 1 of the source; never below `exact`.
        exact: the operator norm of the difference.
    """

    largest: float
    theorem: float
    exact: float


@dataclass(frozen=True)
class Decomposition:
    """The singular value decompositions of one layer's slices.

    Args:
        folding: 0..3.
        left: (k, rows, r) left singular vectors, float64.
        values: (k, r) singular values, falling, float64.
        right: (k, r, columns / k) the products U_i^T W_i, float64.
        norm: operator norm of the whole folded matrix.
    """

    folding: int
    left: Tensor
    values: Tensor
    right: Tensor
    norm: float

    @property
    def slices(self) -> int:
        """Number of slices k."""
        return len(self.values)

    def errors(self, rank: int) -> LayerErrors:
        """Return the three errors at rank j a slice.

        exact = sqrt(lambda_max(sum_i U_i S_{i,>j}^2 U_i^T)) / norm, computed as the operator norm of the U_i S_{i,>j}
        side by side.

        Args:
            rank: j, 1..r.

        Raises:
            ValueError: the rank is out of range.
        """
        self._check(rank)
        if rank == self.values.shape[1] or self.norm == 0:
            return LayerErrors(0.0, 0.0, 0.0)
        following = self.values[:, rank].cpu().numpy()
        tails = (self.left[:, :, rank:] * self.values[:, None, rank:]).transpose(0, 1).flatten(1)
        exact = float(torch.linalg.matrix_norm(tails, 2)) / self.norm
        return LayerErrors(float(following.max()) / self.norm, layer_error_bound(following, self.norm).value, exact)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return U (k, rows, j) and V (k, j, columns / k), the slices' approximations being U_i V_i.

        Args:
            rank: j, 1..r.

        Raises:
            ValueError: the rank is out of range.
        """
        self._check(rank)
        return self.left[:, :, :rank], self.right[:, :rank]

    def _check(self, rank: int) -> None:
        full = self.values.shape[1]
        if not 1 <= rank <= full:
            raise ValueError(
                f"rank={rank}: with {self.slices} slices in folding {self.folding} it is between 1 and {full}"
            )


@dataclass(frozen=True)
class LayerSpectra:
    """One layer with the spectra of its foldings and slices, each computed once, on the layer's device in float64.

    With `moment`, the noncentred second moment Sigma of what the layer multiplies its weights with, the layer's error
    is measured where its inputs are: W Sigma^(1/2) takes the place of W.  Its truncation, multiplied back by the
    inverse root, is U_j U_j^T W with U_j the eigenvectors of W Sigma W^T, the principal components of the outputs
    without bias; written like this it needs no inverse, and directions without data keep their weights.  Only folding 0
    and one slice: the inputs of two slices are correlated, so the slices' best approximations are not the layer's.

    Args:
        name: what messages call the layer.
        layer: Linear, or Conv2d with groups=1.
        moment: (columns, columns) moment in the order of `weight_matrix`, or None for W itself.

    Raises:
        ValueError: another kind of layer, weights that are not finite, or a moment of another size.
    """

    name: str
    layer: Factorable
    moment: Tensor | None = None

    def __post_init__(self) -> None:
        reason = refusal(self.layer)
        if reason:
            raise ValueError(f"layer {self.name!r}: {reason}; leave it as it is")
        if not bool(torch.isfinite(self.layer.weight).all()):
            raise ValueError(f"layer {self.name!r} has NaN or Inf in its weights: repair or retrain the model before")
        if self.moment is not None and self.moment.shape != (self._columns, self._columns):
            raise ValueError(
                f"layer {self.name!r} weighs {self._columns} columns, got a moment of shape {tuple(self.moment.shape)}"
            )

    @property
    def _columns(self) -> int:
        return self.layer.weight[0].numel()

    @property
    def dense_parameters(self) -> int:
        """Number of weights of the layer as it is; biases stay and are not counted."""
        return self.layer.weight.numel()

    def foldings(self) -> tuple[int, ...]:
        """Return the foldings that differ: axes of kernel size 1 may be on either side."""
        if self.moment is not None:
            return (0,)
        kernel = _weight(self.layer).shape[2:]
        found = {tuple(axis for axis in axes if kernel[axis] > 1): f for f, axes in reversed(FIRST_AXES.items())}
        return tuple(sorted(found.values()))

    def slice_counts(self) -> tuple[int, ...]:
        """Return the possible numbers of slices: the divisors of the number of input channels."""
        channels = _weight(self.layer).shape[1]
        return tuple(k for k in range(1, channels + 1) if channels % k == 0) if self.moment is None else (1,)

    def rank_parameters(self, folding: int, slices: int) -> int:
        """Return how many weights one rank costs: k times the rows and the columns of the folded matrix."""
        rows, columns = self.folded_shape(folding)
        return slices * rows + columns

    def folded_shape(self, folding: int) -> tuple[int, int]:
        """Return (rows, columns) of the folded matrix.

        Raises:
            ValueError: no such folding.
        """
        if folding not in FIRST_AXES:
            raise ValueError(f"layer {self.name!r}: folding={folding!r}, expected one of {tuple(FIRST_AXES)}")
        outputs, channels, *kernel = _weight(self.layer).shape
        inner, outer = _split(kernel, FIRST_AXES[folding])
        return outputs * math.prod(outer), channels * math.prod(inner)

    def first_axes(self, folding: int) -> tuple[int, ...]:
        """Return the kernel axes that the first part has in this folding; the second part has the others."""
        self.folded_shape(folding)
        return FIRST_AXES[folding]

    def values(self, folding: int, slices: int) -> Tensor:
        """Return the (k, r) singular values of the slices, falling.

        Raises:
            ValueError: no such folding or number of slices.
        """
        key = (folding, slices)
        if key not in self._values:
            if self.moment is not None:
                self._values[key] = self.decomposition(folding, slices).values
            else:
                self._values[key] = torch.linalg.svdvals(self._slices(folding, slices))
        return self._values[key]

    def norm(self, folding: int) -> float:
        """Return the operator norm of the folded weight matrix."""
        return float(self.values(folding, 1).max())

    def decomposition(self, folding: int = 0, slices: int = 1) -> Decomposition:
        """Return the decompositions of all slices.

        Raises:
            ValueError: no such folding or number of slices.
        """
        key = (folding, slices)
        if key not in self._decompositions:
            matrices = self._slices(folding, slices)
            if self.moment is None:
                left, values, _ = torch.linalg.svd(matrices, full_matrices=False)
            else:
                gram = matrices @ self.moment.to(matrices) @ matrices.mT
                squares, vectors = torch.linalg.eigh(gram)  # rising
                rank = min(matrices.shape[1:])
                left, values = vectors.flip(2)[:, :, :rank], squares.flip(1)[:, :rank].clamp(min=0).sqrt()
            norm = float(values.max()) if slices == 1 else self.norm(folding)
            self._decompositions[key] = Decomposition(folding, left, values, left.mT @ matrices, norm)
        return self._decompositions[key]

    def build(self, folding: int, slices: int, rank: int) -> FactoredLayer:
        """Return the layer of rank j a slice as two ordinary modules, of the layer's dtype, device and mode.

        Raises:
            ValueError: no such folding, number of slices or rank.
        """
        left, right = self.decomposition(folding, slices).factors(rank)
        return assemble(self.layer, folding, left, right)

    def _slices(self, folding: int, slices: int) -> Tensor:
        """Return the folded weights as (k, rows, columns / k) in float64."""
        rows, columns = self.folded_shape(folding)
        if slices not in self.slice_counts() or (self.moment is not None and folding != 0):
            expected = f"one of {self.slice_counts()}"
            if self.moment is not None:
                expected = "folding 0 and one slice where a moment is given"
            raise ValueError(f"layer {self.name!r}: slices={slices!r} in folding {folding}, expected {expected}")
        weight = _weight(self.layer).to(torch.float64).unflatten(1, (slices, -1))  # (f, k, c / k, k1, k2)
        inner = [3 + axis for axis in FIRST_AXES[folding]]
        outer = [axis for axis in (3, 4) if axis not in inner]
        return weight.permute(1, 0, *outer, 2, *inner).reshape(slices, rows, columns // slices)

    @cached_property
    def _values(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @cached_property
    def _decompositions(self) -> dict[tuple[int, int], Decomposition]:
        return {}


def assemble(layer: Factorable, folding: int, outer: Tensor, inner: Tensor) -> FactoredLayer:
    """Return the layer with the weights sum_i U_i V_i as two ordinary modules, of its dtype, device and mode.

    Args:
        layer: whose geometry and bias the modules get.
        folding: 0..3.
        outer: (k, rows, j) the U_i.
        inner: (k, j, columns / k) the V_i.
    """
    slices, rank = inner.shape[:2]
    sizes = PartSizes(input_width(layer), slices, slices * rank, len(layer.weight))
    made = empty_layer(layer, folding, sizes, layer.weight.device)
    first, second = made.get_parameter("0.weight"), made.get_parameter("1.weight")
    inputs = inner.mT if isinstance(made[0], SlicedLinear) else inner  # (k, columns / k, j), else (k, j, columns / k)
    joined = outer.reshape(slices, len(layer.weight), -1, rank).permute(1, 0, 3, 2)  # (f, k, j, kernel of the rows)
    with torch.no_grad():
        first.copy_(inputs.reshape(first.shape))
        second.copy_(joined.reshape(second.shape))
        if layer.bias is not None:
            made.get_parameter("1.bias").copy_(layer.bias)
    return made


def refit_second(spectra: LayerSpectra, parts: FactoredLayer, cut: tuple[int, int], moment: Tensor) -> None:
    """Give the second part of a layer in folding 0 the weights that do best on data, the first part as it is.

    U = W Sigma V^T (V Sigma V^T)^+ minimises E||W x - U V x||^2, V the block-diagonal weights of the first part; the
    slices' errors then make up for each other.

    Args:
        spectra: of the layer itself, without a moment of its own.
        parts: what `build` made of it in folding 0; its second part is changed.
        cut: number of slices and rank.
        moment: (columns, columns) noncentred second moment Sigma of what the layer multiplies its weights with.

    Source: least squares; derived here.
    """
    slices, rank = cut
    _, right = spectra.decomposition(0, slices).factors(rank)
    first = torch.block_diag(*right)
    weight = _weight(spectra.layer).to(torch.float64).flatten(1)
    crossed = moment.to(first) @ first.mT
    refitted = weight @ crossed @ torch.linalg.pinv(first @ crossed, rtol=_REFIT_TOLERANCE, hermitian=True)
    second = parts.get_parameter("1.weight")
    with torch.no_grad():
        second.copy_(refitted.reshape(second.shape))


def _weight(layer: Factorable) -> Tensor:
    """Return the weights as (f, c, k1, k2)."""
    weight = layer.weight.detach()
    return weight[:, :, None, None] if isinstance(layer, nn.Linear) else weight


def _split(kernel: list[int], axes: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the kernel sizes of the first and the second part; the other part's axes have size 1."""
    inner = [size if axis in axes else 1 for axis, size in enumerate(kernel)]
    return inner, [size if axis not in axes else 1 for axis, size in enumerate(kernel)]


def parameters_after(spectra: LayerSpectra, folding: int, slices: int, rank: int) -> int:
    """Return the number of parameters of the layer that `build` makes, j (k rows + columns) and the biases."""
    biases = 0 if spectra.layer.bias is None else spectra.layer.bias.numel()
    return rank * spectra.rank_parameters(folding, slices) + biases
