"""A network in few bits: batch norms folded, every tensor rounded to a grid, and the length of its description."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from specprune.bounds.occam import Quantised, network_code_length, quantise
from specprune.compress.batches import CalibrationData
from specprune.compress.surgery import NORMS
from specprune.compress.tracing import small_batch, trace

_CLIPPED = (0, 1, 2)  # how many powers of two below the largest entry the grid may end
_FOLD_TOLERANCE = 1e-3  # folding reorders float32 sums; folding what is also read elsewhere changes the outputs wholly


@dataclass(frozen=True)
class QuantisedNetwork:
    """A network whose weights and biases lie on a grid of 2^bits values a tensor.

    Args:
        model: the rounded network, with its batch norms folded in; evaluation mode.
        bits: bits per entry.
        counts: entries of each tensor.
        exponents: k of each tensor; its grid covers [-2^k, 2^k).
    """

    model: nn.Module
    bits: int
    counts: tuple[int, ...]
    exponents: tuple[int, ...]

    def code_length(self, widths: Sequence[int]) -> float:
        """Return the length of the network's description in nats, given the widths that pruning started from."""
        return network_code_length(self.counts, self.exponents, self.bits, widths)


def fold_batch_norms(model: nn.Module, data: CalibrationData) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are folded into the layers they read, exactly.

    Args:
        model: a network whose batch norms each read one Linear or Conv2d layer directly; left as it is.
        data: calibration data; two samples are run.

    Raises:
        ValueError: a batch norm that reads something else, which cannot be folded, or that is not the only one to read
            its layer.
    """
    work = copy.deepcopy(model).eval()
    batch = small_batch(data.first())
    direct = trace(work, data, batch).direct
    modules = dict(work.named_modules())
    for name, norm_name in direct.items():
        layer, norm = modules[name], modules[norm_name]
        if norm.running_mean is None:
            raise ValueError(f"the batch norm {norm_name!r} has no running statistics and cannot be folded")
        if norm.weight is None:
            norm.weight = nn.Parameter(torch.ones_like(norm.running_mean))
        if norm.bias is None:
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(layer, norm)
        for parameter in fused.parameters():  # torch freezes a bias that was not there before
            parameter.requires_grad_(layer.weight.requires_grad)
        work.set_submodule(name, fused)
        work.set_submodule(norm_name, nn.Identity())
    left = [name for name, module in work.named_modules() if isinstance(module, NORMS)]
    if left:
        raise ValueError(f"the batch norms {left} do not read a Linear or Conv2d layer directly and cannot be folded")
    with torch.no_grad():
        wanted, found = data.call(copy.deepcopy(model).eval(), batch), data.call(work, batch)
    if float((found - wanted).abs().max()) > _FOLD_TOLERANCE * float(wanted.abs().max()):
        raise ValueError(f"folding {sorted(direct.values())} changes the outputs: their layers are read elsewhere too")
    return work


@torch.no_grad()
def quantise_network(folded: nn.Module, bits: int) -> QuantisedNetwork:
    """Return a network rounded to `bits` bits per entry, each tensor on the grid [-2^k, 2^k) that suits it best.

    Args:
        folded: a network without batch norms, from `fold_batch_norms`; left as it is.
        bits: bits per entry, at least 1.

    Returns:
        The rounded network; k is the exponent with the smallest mean square rounding error among the one that clips
        nothing and the two below it.

    Raises:
        ValueError: the network has buffers, whose content would be free, or a tensor without entries.
    """
    work = copy.deepcopy(folded).eval()
    buffers = [name for name, _ in work.named_buffers()]
    if buffers:
        raise ValueError(
            f"the buffers {buffers[:3]} are no part of the description that is paid for; fold or remove them"
        )
    empty = [name for name, parameter in work.named_parameters() if not parameter.numel()]
    if empty:
        raise ValueError(
            f"{empty[0]!r} has no entries: a network is written down without its empty layers, remove them"
        )
    counts, exponents = [], []
    for parameter in work.parameters():
        array = parameter.detach().to(torch.float64).cpu().numpy()
        rounded = _best_grid(array, bits)
        parameter.copy_(torch.from_numpy(rounded.values))
        counts.append(parameter.numel())
        exponents.append(rounded.k)
    return QuantisedNetwork(work, bits, tuple(counts), tuple(exponents))


def _best_grid(array: np.ndarray, bits: int) -> Quantised:
    whole = quantise(array, bits)
    candidates = [whole, *(quantise(array, bits, whole.k - shift) for shift in _CLIPPED[1:])]
    return min(candidates, key=lambda rounded: float(np.square(rounded.values - array).sum()))
