"""The two modules of a low-rank layer: what they are, and how they share the geometry of the layer they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from specprune.compress.layers import is_layer

Factorable = nn.Linear | nn.Conv2d
FIRST_AXES: dict[int, tuple[int, ...]] = {0: (0, 1), 1: (1,), 2: (0,), 3: ()}  # kernel axes among the columns


class SlicedLinear(nn.Module):
    """Linear maps side by side: input slice i to output slice i, without bias.

    Args:
        slices: number of slices k.
        in_features: number of inputs, a multiple of k.
        out_features: number of outputs, a multiple of k.
        device: of the weights.
        dtype: of the weights.

    The weights have shape (k, in_features / k, out_features / k) and are zero at first.
    """

    def __init__(
        self,
        slices: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (slices, in_features // slices, out_features // slices)
        self.slices, self.in_features, self.out_features = slices, in_features, out_features
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out_features) for inputs of shape (..., in_features)."""
        return torch.einsum("...ki,kij->...kj", inputs.unflatten(-1, (self.slices, -1)), self.weight).flatten(-2)

    def extra_repr(self) -> str:
        """Return the sizes, for `repr`."""
        return f"slices={self.slices}, in_features={self.in_features}, out_features={self.out_features}"


class FactoredLayer(nn.Sequential):
    """A low-rank layer: an ordinary `nn.Sequential` of two modules that remembers how they came from one.

    Args:
        parts: the modules.
        folding: 0..3; None where it is not known, as in a part that was sliced out.
    """

    def __init__(self, *parts: Any, folding: int | None = None) -> None:
        super().__init__(*parts)
        self.folding = folding


@dataclass(frozen=True)
class PartSizes:
    """Sizes of a low-rank layer.

    Args:
        inputs: number of input features or channels.
        slices: number of slices k of them.
        width: number of nodes between the two modules, k times the rank.
        outputs: number of output features or channels.
    """

    inputs: int
    slices: int
    width: int
    outputs: int


def empty_layer(layer: Factorable, folding: int, sizes: PartSizes, device: torch.device | str) -> FactoredLayer:
    """Return a low-rank layer with weights yet to be written, of the layer's dtype, mode and need of gradients.

    Args:
        layer: whose geometry the modules get, and whose bias the second has if there is one; sizes may differ.
        folding: 0..3.
        sizes: of the new layer.
        device: of the weights.
    """
    place: dict[str, Any] = {"device": device, "dtype": layer.weight.dtype}
    first: Factorable | SlicedLinear
    bias = layer.bias is not None
    # `skip_init` leaves the random state alone.
    if isinstance(layer, nn.Linear):
        second: Factorable = skip_init(nn.Linear, sizes.width, sizes.outputs, bias=bias, **place)
        if sizes.slices > 1:
            first = SlicedLinear(sizes.slices, sizes.inputs, sizes.width, **place)
        else:
            first = skip_init(nn.Linear, sizes.inputs, sizes.width, bias=False, **place)
    else:
        axes = FIRST_AXES[folding]
        others = tuple(axis for axis in (0, 1) if axis not in axes)
        ends = {"groups": sizes.slices, "bias": False, **_geometry(layer, axes)}
        first = skip_init(nn.Conv2d, sizes.inputs, sizes.width, **ends, **place)
        second = skip_init(nn.Conv2d, sizes.width, sizes.outputs, bias=bias, **_geometry(layer, others), **place)
    for part in (first, second):
        part.weight.requires_grad_(layer.weight.requires_grad)
    if second.bias is not None and layer.bias is not None:
        second.bias.requires_grad_(layer.bias.requires_grad)
    return FactoredLayer(first, second, folding=folding).train(layer.training)


def _geometry(layer: nn.Conv2d, axes: tuple[int, ...]) -> dict[str, Any]:
    """Return kernel, stride, padding and dilation of the part that has these axes."""

    def own(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    padding = layer.padding
    return {
        "kernel_size": own(layer.kernel_size, 1),
        "stride": own(layer.stride, 1),
        "padding": padding if isinstance(padding, str) else own(padding, 0),  # "same" pads a kernel of size 1 by 0
        "dilation": own(layer.dilation, 1),
        "padding_mode": layer.padding_mode if axes else "zeros",
    }


def refusal(module: nn.Module) -> str | None:
    """Return why a module cannot become a low-rank layer, or None if it can."""
    if is_layer(module):
        return None if module.get_parameter("weight").numel() else "it has no weights"
    if type(module) is nn.Conv2d:
        return f"it has groups={module.groups}: its weight is no matrix that reads all channels"
    return f"it is a {type(module).__name__}, only Linear and Conv2d with groups=1 are known"
