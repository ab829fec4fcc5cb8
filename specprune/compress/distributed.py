"""Data-parallel runs: every process reads its own share of the data, and sums over all of them decide.

Nothing here acts outside an initialised `torch.distributed` process group, so the same code runs alone.  All processes
must make the same calls in the same order; what they decide on is bitwise the same on each, because all of them take
the sums (and the traced batch) of one and the same reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specprune.compress.moments import LayerMoments


def is_parallel() -> bool:
    """Return whether this process is one of several in a `torch.distributed` group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes (the tensor itself when there is one).

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return values
    total = values.detach().clone().contiguous()
    try:
        dist.all_reduce(total)
        dist.broadcast(total, 0)  # reductions may round differently on different processes
    except RuntimeError as error:
        raise RuntimeError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost the others while summing: one of them has "
            f"died or does not answer (its own output tells why): {error}"
        ) from error
    return total


def first_of(value: Any) -> Any:
    """Return the first process's value that is not None, on every process; the value itself when there is one.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return value
    has = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    has[dist.get_rank()] = float(value is not None)
    if dist.get_backend() == "nccl":
        has = has.cuda()
    owners = sum_over_processes(has).nonzero().flatten().tolist()
    if not owners:
        return None
    box = [value]
    dist.broadcast_object_list(box, owners[0])
    return box[0]


def reduce_moments(
    sums: Mapping[str, LayerMoments], widths: Mapping[str, int], device: torch.device
) -> dict[str, LayerMoments]:
    """Return the moments summed over all processes; a process without data takes part with zeros.

    Args:
        sums: layer name to this process's moments; layers that did not run are absent.
        widths: layer name to the number of columns, for all layers, in the same order on every process.
        device: of the model.
    """
    if not is_parallel():
        return dict(sums)
    reduced = {}
    for name, width in widths.items():
        own = sums.get(name)
        flat = torch.zeros(1 + width + width * width, dtype=torch.float64, device=device)
        if own is not None:
            flat[0] = own.rows
            flat[1 : 1 + width] = own.total
            flat[1 + width :] = own.gram.flatten()
        flat = sum_over_processes(flat)
        rows = int(flat[0])
        if rows:
            reduced[name] = LayerMoments(rows, flat[1 : 1 + width].clone(), flat[1 + width :].reshape(width, width))
    return reduced
