"""Spectral pruning of a wide network of the language to a design's widths, where a training on the grid can start."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from specprune.analysis.code_design import Design
from specprune.compress.spectral import prune
from specprune.compress.vocabulary import LINEAR

_AT_ONCE = 500


def pruned_weights(
    wide: Design, weights: Sequence[Tensor], design: Design, maps: Tensor, seed: int = 0
) -> list[Tensor]:
    """Prune a wide network spectrally to the widths of a narrow one, and return the refitted weights.

    Args:
        wide: design of the wide network, of untied convolutions and linear layers.
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
    widths = {f"layer{number}": layer.out_channels for number, layer in enumerate(design.layers[:-1])}
    pruned = prune(_module(wide, weights), list(maps.split(_AT_ONCE)), widths=widths, seed=seed)
    found = [module.weight for module in pruned.model.modules() if isinstance(module, nn.Conv2d)]
    return [weight.detach().cpu().clone() for weight in found]


class _SumPositions(nn.Module):
    """Sums over positions."""

    def forward(self, values: Tensor) -> Tensor:
        return values.sum((2, 3), keepdim=True)


def _module(design: Design, weights: Sequence[Tensor]) -> nn.Sequential:
    """Return a design of convolutions as an ordinary network, for pruning."""
    children: dict[str, nn.Module] = {}
    for number, (layer, weight) in enumerate(zip(design.layers, weights, strict=True)):
        if layer.kind == LINEAR:
            children[f"sum{number}"] = _SumPositions()
        # On "meta", no weights are drawn, which would move the global random state.
        sizes = weight.shape[1], len(weight), layer.kernel, layer.stride, layer.padding
        conv = nn.Conv2d(*sizes, bias=False, device="meta")
        conv.weight = nn.Parameter(weight.detach().clone() / math.sqrt(weight[0].numel()))
        children[f"layer{number}"] = conv
        if layer.relu:
            children[f"relu{number}"] = nn.ReLU()
    children["sum"] = _SumPositions()
    children["flatten"] = nn.Flatten()
    return nn.Sequential(OrderedDict(children))
