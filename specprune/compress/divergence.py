"""How far a changed network's outputs are from the original's, without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.distributed import process_count, sum_over_processes

_MAX_ELEMENTS = 2**26  # of kept reference outputs: a language model's are large


def output_divergence(reference: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean over samples (and tokens or pixels) of the difference of two networks' outputs.

    Several outputs are taken as logits: KL(softmax(reference) || softmax(outputs)) in nats, over the last axis of
    (n, classes) or (n, tokens, classes) and over the second of (n, classes, ...) maps.  A single output is a value:
    the squared difference over the reference's mean square.

    Args:
        reference: the original network's outputs.
        outputs: the other network's, of the same shape.

    Returns:
        A scalar that gradients flow through.
    """
    axis = 1 if reference.dim() in (2, 4, 5) else reference.dim() - 1
    if reference.dim() < 2 or reference.shape[axis] == 1:
        energy = reference.square().mean()
        return (outputs - reference).square().mean() / torch.where(energy > 0, energy, 1.0)
    old = functional.log_softmax(reference.movedim(axis, -1), -1)
    new = functional.log_softmax(outputs.movedim(axis, -1), -1)
    return (old.exp() * (old - new)).sum(-1).mean()


class Reference:
    """The original network's outputs on the first calibration batches, kept to measure others against.

    Args:
        model: the original network.
        data: calibration data.
        samples: about how many samples to use, of all processes together; whole batches are taken.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, data: CalibrationData, samples: int) -> None:
        self._data = data
        self._parts: list[tuple[Any, Tensor]] = []
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        seen = elements = 0
        for batch in data.head():
            outputs = data.call(model, batch)
            self._parts.append((batch, outputs))
            seen += batch_size(batch)
            elements += outputs.numel()
            if seen * process_count() >= samples or elements >= _MAX_ELEMENTS:
                break

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> float:
        """Return the mean divergence of a network's outputs from the original's on these samples (all processes')."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch, outputs in self._parts:
            count = batch_size(batch)
            total[0] += count * output_divergence(outputs.double(), self._data.call(model, batch).double())
            total[1] += count
        total = sum_over_processes(total)
        return float(total[0] / total[1])
