"""Label-free distillation: a few gradient steps towards the original network's outputs, as the last step of pruning."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.distributed import is_parallel, sum_over_processes
from specprune.compress.divergence import output_divergence
from specprune.compress.tracing import map_tensors

BATCH = 128
LEARNING_RATE = 3e-3


def distill(pruned: nn.Module, original: nn.Module, data: CalibrationData, steps: int, seed: int) -> None:
    """Train the pruned network, in place, towards the original's outputs on the calibration data; no labels are used.

    Adam with a half-cosine rate minimises `output_divergence`.  Batch norms keep their statistics.

    Args:
        pruned: the network to train; all its floating-point parameters move.
        original: the teacher, left as it is.
        data: calibration data; batches of more than 128 samples are split.
        steps: how many optimizer steps.
        seed: of the order of the samples.

    Raises:
        ValueError: the loss is no longer finite.
    """
    original.eval()
    pruned.eval()
    parameters = [p for p in pruned.parameters() if p.is_floating_point() and p.requires_grad]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    samples = _endless(data, torch.Generator().manual_seed(seed))
    loss = torch.zeros(())
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc="distilling", leave=False, disable=None):
            batch = next(samples)
            with torch.no_grad():
                target = data.call(original, batch)
            loss = output_divergence(target, data.call(pruned, batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            _share_gradients(parameters)
            optimizer.step()
            schedule.step()
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"the distillation loss became {float(loss.detach())}; use fewer distill_steps")
    optimizer.zero_grad(set_to_none=True)


def _share_gradients(parameters: list[nn.Parameter]) -> None:
    if not is_parallel():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = sum_over_processes(parameter.grad) / dist.get_world_size()


def _endless(data: CalibrationData, generator: torch.Generator) -> Iterator[Any]:
    while True:
        for batch in data.head():
            count = batch_size(batch)
            order = torch.randperm(count, generator=generator)
            for part in order.split(BATCH):
                yield map_tensors(batch, partial(_rows, part=part, count=count))


def _rows(tensor: Tensor, part: Tensor, count: int) -> Tensor:
    return tensor[part.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor
