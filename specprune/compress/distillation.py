"""Label-free distillation: a few gradient steps towards the original network's outputs, as the last step of pruning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.distributed import is_parallel, sum_over_processes
from specprune.compress.divergence import Reference, output_divergence
from specprune.compress.tracing import map_tensors

BATCH = 128
LEARNING_RATE = 3e-4  # ten times as much loses accuracy on small calibration sets
_HALF = (torch.float16, torch.bfloat16)
_SAMPLES = 500  # on which the outcome is checked
_FAR = 1.0  # nats, or the outputs' own mean square: no network that is of any use is so far from the original


def distill(pruned: nn.Module, original: nn.Module, data: CalibrationData, steps: int, seed: int) -> None:
    """Train the pruned network, in place, towards the original's outputs on the calibration data; no labels are used.

    Adam with a half-cosine rate minimises `output_divergence`.  Batch norms keep their statistics.

    Args:
        pruned: the network to train; all its floating-point parameters move.
        original: the teacher, left as it is.
        data: calibration data, this process's share; batches of more than 128 samples are split.  A network in
            half precision is trained as a float32 copy.
        steps: how many optimizer steps.
        seed: of the order of the samples.

    Raises:
        ValueError: the loss is no longer finite, the network is further from the original than before, and far, or
            float32 copies cannot be called in the way of the network in half precision.
    """
    original.eval()
    pruned.eval()
    reference = Reference(original, data, _SAMPLES)
    before = reference.divergence(pruned)
    if all(p.dtype in _HALF for p in pruned.parameters() if p.is_floating_point()):
        # Steps of this size are lost in the rounding of half precision, and Adam's squares vanish.
        student = copy.deepcopy(pruned).float()
        try:
            _train(student, copy.deepcopy(original).float(), data, steps, seed, wide=True)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            raise ValueError(
                "a network in half precision is distilled as a float32 copy, which its `forward` gives other numbers "
                f"({error}): cast them there to next(model.parameters()).dtype, or leave out distill_steps"
            ) from error
        pruned.load_state_dict(student.state_dict())
    else:
        _train(pruned, original, data, steps, seed)
    after = reference.divergence(pruned)
    if not after <= max(before, _FAR):
        raise ValueError(
            f"distillation raised the divergence of the outputs from {before:.3g} to {after:.3g}: its steps of "
            f"{LEARNING_RATE:g} a weight do not suit weights of this size; leave out distill_steps, or rescale "
            "the network"
        )


def _train(
    pruned: nn.Module, original: nn.Module, data: CalibrationData, steps: int, seed: int, *, wide: bool = False
) -> None:
    """Take the steps; with `wide`, batches of half precision are made float32, as the networks were."""
    parameters = [p for p in pruned.parameters() if p.is_floating_point() and p.requires_grad]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    samples = _endless(data, torch.Generator().manual_seed(seed))
    loss = torch.zeros((), device=parameters[0].device)
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc="distilling", leave=False, disable=None):
            optimizer.zero_grad(set_to_none=True)
            batch = next(samples, None)
            if batch is not None:
                batch = map_tensors(batch, _widened) if wide else batch
                with torch.no_grad():
                    target = data.call(original, batch)
                loss = output_divergence(target, data.call(pruned, batch))
                loss.backward()
            loss = _over_processes(parameters, loss.detach(), 0 if batch is None else batch_size(batch))
            optimizer.step()
            schedule.step()
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the distillation loss became {float(loss)}; use fewer distill_steps")
    optimizer.zero_grad(set_to_none=True)


def _over_processes(parameters: list[nn.Parameter], loss: Tensor, count: int) -> Tensor:
    """Make gradients, in place, and the loss the means over the samples of all processes, of which this one has some.

    A process without data takes part with zero gradients.
    """
    if not is_parallel():
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    kind = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)  # the same on every process
    parts = [part.flatten().to(kind) for part in (*gradients, loss, torch.ones_like(loss))]
    total = sum_over_processes(torch.cat(parts) * count)
    *shared, mean, _ = (total / total[-1]).split([len(part) for part in parts])
    for parameter, part in zip(parameters, shared, strict=True):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
    return mean.reshape(())


def _endless(data: CalibrationData, generator: torch.Generator) -> Iterator[Any]:
    """Yield parts of batches for ever; nothing where there is no data."""
    empty = True
    while True:
        for batch in data.head():
            empty = False
            count = batch_size(batch)
            order = torch.randperm(count, generator=generator)
            for part in order.split(BATCH):
                yield map_tensors(batch, partial(_rows, part=part, count=count))
        if empty:
            return


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _rows(tensor: Tensor, part: Tensor, count: int) -> Tensor:
    return tensor[part.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor
