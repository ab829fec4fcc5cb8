"""What a layer and its low-rank versions cost: weights, or FLOPs of one sample (two a multiply-add)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.tracing import small_batch

LOW_RANK_MEASURES = ("params", "flops")


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer, of which a low-rank version of rank j costs j times `rank_cost`.

    Args:
        spectra: of the layer.
        runs: multiply-adds a weight in one sample, times two: FLOPs are counted; None counts weights.
        maps: (input sizes, output sizes) along the kernel axes, of each call of a convolution.
    """

    spectra: LayerSpectra
    runs: int | None = None
    maps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def dense(self) -> int:
        """Cost of the layer as it is; biases are not counted."""
        return self.spectra.dense_parameters * (self.runs or 1)

    def rank_cost(self, folding: int, slices: int) -> int:
        """Return the cost of one rank.

        A convolution with a stride along an axis that only the second part has runs its first part at every input.

        Args:
            folding: 0..3.
            slices: number of slices k.
        """
        if self.runs is None:
            return self.spectra.rank_parameters(folding, slices)
        rows, columns = self.spectra.folded_shape(folding)
        inside = self.spectra.first_axes(folding)
        first = sum(
            math.prod(after[axis] if axis in inside else before[axis] for axis in range(len(after)))
            for before, after in self.maps
        )
        second = sum(math.prod(after) for _, after in self.maps)
        more = first / second if second else 1.0
        return math.ceil(self.runs * (columns * more + slices * rows) - 1e-6)


def layer_costs(
    model: nn.Module, spectra: Sequence[LayerSpectra], flops: Mapping[str, int] | None, data: CalibrationData | None
) -> list[LayerCost]:
    """Return the cost of each layer.

    Args:
        model: the network, in evaluation mode.
        spectra: of layers that run.
        flops: FLOPs of one sample by module, from `module_flops`; None counts weights.
        data: calibration data, of which two samples are run; None with weights.
    """
    if flops is None or data is None:
        return [LayerCost(layer) for layer in spectra]
    maps = _maps(model, [layer.name for layer in spectra], data)
    return [
        LayerCost(layer, flops[layer.name] // layer.dense_parameters, tuple(maps.get(layer.name, ())))
        for layer in spectra
    ]


@torch.no_grad()
def _maps(
    model: nn.Module, names: Sequence[str], data: CalibrationData
) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return the sizes of the inputs and outputs of every call of the convolutions among some layers."""
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def note(name: str, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        inputs = args[0] if args else keywords["input"]
        found.setdefault(name, []).append((tuple(inputs.shape[-2:]), tuple(output.shape[-2:])))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, keywords, output, name=name: note(name, args, keywords, output), with_kwargs=True
        )
        for name in names
        if isinstance(model.get_submodule(name), nn.Conv2d)
    ]
    try:
        data.call(model, small_batch(data.first()))
    finally:
        for handle in handles:
            handle.remove()
    return found
