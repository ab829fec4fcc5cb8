"""Spectral pruning of a wide network of the language to a design's widths, where a training on the grid can start."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specprune.analysis.code_design import Design, filter_kernels
from specprune.compress.pruning import prune
from specprune.compress.vocabulary import CONV, FILTER_BANK, FILTERS, LINEAR, LayerSpec

_AT_ONCE = 500
_KERNELS = len(FILTER_BANK)


def can_be_pruned_to(design: Design) -> bool:
    """Return whether `pruned_weights` takes a design: untied convolutions and linear layers, and filters behind one.

    A "filters" layer gives kernel i mod 4 to channel i, so it must read whole fours of a layer without ReLU.
    """
    before: LayerSpec | None = None
    for layer in design.layers:
        if layer.kind == FILTERS:
            if before is None or before.kind != CONV or before.relu or layer.out_channels % _KERNELS:
                return False
        elif layer.kind not in (CONV, LINEAR) or layer.tied:
            return False
        before = layer
    return len(design.owners) > 1 and design.layers[-1].kind != FILTERS


def pruned_weights(
    wide: Design, weights: Sequence[Tensor], design: Design, maps: Tensor, seed: int = 0
) -> list[Tensor]:
    """Prune a wide network spectrally to the widths of a narrow one, and return the refitted weights.

    Channels before a "filters" layer are pruned in four groups, one for each kernel, so that each keeps its kernel.

    Args:
        wide: design of the wide network, to which `can_be_pruned_to` applies.
        weights: its real-valued weights, of shapes `wide.shapes`.
        design: the same layers with fewer channels.
        maps: what the first layer reads, (n, channels, height, width), to select and refit on.
        seed: of the pruning's random choices.

    Returns:
        Weights of shapes `design.shapes`, on the CPU.

    Raises:
        ValueError: as `specprune.prune`, such as for dead nodes or wrong widths.

    Source: as `specprune.prune` (Suzuki et al. 2020, arXiv:1808.08558, with the sequential refit).
    """
    model = nn.Sequential(OrderedDict(_children(wide, weights)))
    widths: dict[str, int] = {}
    for number, layer in enumerate(design.layers[:-1]):
        if layer.kind == FILTERS:
            del widths[f"layer{number - 1}"]
            widths |= {f"layer{number - 1}.mix{kernel}": layer.out_channels // _KERNELS for kernel in range(_KERNELS)}
        else:
            widths[f"layer{number}"] = layer.out_channels
    pruned = prune(model, list(maps.split(_AT_ONCE)), widths=widths, seed=seed).model
    found = []
    for number, layer in enumerate(design.layers):
        if layer.kind == FILTERS:
            continue
        module = pruned.get_submodule(f"layer{number}")
        if isinstance(module, _Filtered):
            weight = torch.stack([module.mix(kernel).weight for kernel in range(_KERNELS)], 1).flatten(0, 1)
        else:
            assert isinstance(module, nn.Conv2d)
            weight = module.weight
        if number and design.layers[number - 1].kind == FILTERS:
            # Sorted by kernel there, in turns here.
            weight = weight.unflatten(1, (_KERNELS, -1)).transpose(1, 2).flatten(1, 2)
        found.append(weight.detach().cpu().clone())
    return found


class _SumPositions(nn.Module):
    """Sums over positions."""

    def forward(self, values: Tensor) -> Tensor:
        return values.sum((2, 3), keepdim=True)


class _Filtered(nn.Module):
    """A convolution followed by fixed kernels, its channels sorted by their kernel."""

    def __init__(self, weight: Tensor, layer: LayerSpec, filters: LayerSpec) -> None:
        super().__init__()
        kernels = filter_kernels(filters.out_channels, weight)
        for kernel in range(_KERNELS):
            self.add_module(f"mix{kernel}", _conv(weight[kernel::_KERNELS], layer))
            self.add_module(f"filter{kernel}", _conv(kernels[kernel::_KERNELS], filters, depthwise=True))

    def mix(self, kernel: int) -> nn.Conv2d:
        module = self.get_submodule(f"mix{kernel}")
        assert isinstance(module, nn.Conv2d)
        return module

    def forward(self, values: Tensor) -> Tensor:
        parts = [self.get_submodule(f"filter{kernel}")(self.mix(kernel)(values)) for kernel in range(_KERNELS)]
        return torch.cat(parts, 1)


def _conv(weight: Tensor, layer: LayerSpec, *, depthwise: bool = False) -> nn.Conv2d:
    # On "meta", no weights are drawn, which would move the global random state.
    inputs, groups = (len(weight), len(weight)) if depthwise else (weight.shape[1], 1)
    sizes = inputs, len(weight), layer.kernel, layer.stride, layer.padding
    conv = nn.Conv2d(*sizes, groups=groups, bias=False, device="meta")
    conv.weight = nn.Parameter(weight.detach().clone())
    return conv


def _children(design: Design, weights: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Return a design as the parts of an ordinary network, for pruning."""
    children: dict[str, nn.Module] = {}
    own = iter(weights)
    sorted_by_kernel = False
    for number, layer in enumerate(design.layers):
        if layer.kind != FILTERS:
            weight = next(own)
            weight = weight / math.sqrt(weight[0].numel())
            if sorted_by_kernel:
                weight = weight.unflatten(1, (-1, _KERNELS)).transpose(1, 2).flatten(1, 2)
            if layer.kind == LINEAR:
                children[f"sum{number}"] = _SumPositions()
            filters = next((after for after in design.layers[number + 1 : number + 2] if after.kind == FILTERS), None)
            children[f"layer{number}"] = _Filtered(weight, layer, filters) if filters else _conv(weight, layer)
        sorted_by_kernel = layer.kind == FILTERS
        if layer.relu:
            children[f"relu{number}"] = nn.ReLU()
    children["sum"] = _SumPositions()
    children["flatten"] = nn.Flatten()
    return children
