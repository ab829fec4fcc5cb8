"""The prunable groups of a network: proposed by tracing, accepted only after a numerical check."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.attention import replace_attention
from specprune.compress.batches import CalibrationData
from specprune.compress.coupling import coupled_groups
from specprune.compress.heads import head_groups
from specprune.compress.recurrent_groups import recurrent_groups
from specprune.compress.surgery import Group, Skipped, mask_nodes, prepare, remove_nodes
from specprune.compress.tracing import Trace, map_tensors, noisy_batch, small_batch, trace

logger = logging.getLogger(__name__)

SELF_CHECK_FACTOR = 4.0  # times the square root of the rounding unit; sums reorder when a layer shrinks


@dataclass(frozen=True)
class Structure:
    """What of a network can be pruned.

    Args:
        groups: the prunable groups, in the order in which their first consumers run.
        skipped: what is left whole, and why.
        order: all layers in the order in which they run.
        direct: layer to the batch norm that reads its outputs directly.
    """

    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...]
    order: tuple[str, ...]
    direct: dict[str, str]

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model in which the groups' modules exist, in evaluation mode."""
        return prepare(model, self.groups).eval()


@torch.inference_mode(False)
@torch.enable_grad()
def find_groups(model: nn.Module, data: CalibrationData) -> Structure:
    """Return the sets of nodes of a network that can be removed, and what cannot, with the reason.

    Nodes that are added, multiplied or carried together form one group; a group may have several producers and
    consumers.  Every group is checked numerically: in a copy half of its units are removed, in another the consumers'
    weights on the same units are set to zero, and both must give the same outputs, on samples and on noise.  What fails
    is left whole.

    Args:
        model: any network; left as it is.
        data: calibration data, samples along the first axis of every tensor; two of the first batch are run.

    Raises:
        ValueError: nothing can be pruned (every reason is given), a mismatch of device or dtype, or NaN in the data.
        TypeError: the model returns something else than one tensor.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled by torch.compile: pass model._orig_mod, and compile what comes back")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model is a ScriptModule, whose layers cannot be changed: pass the module it was made from")
    whole_batch = data.first(model)
    batch = small_batch(whole_batch)
    work, seen = _replaced(model, data, batch)
    checks = check_batches(work, data, whole_batch)
    heads, skipped = head_groups(work, data, batch, seen, lambda group: _removal_fault(work, data, checks, [group]))
    hidden, whole = recurrent_groups(work, data, batch, seen, lambda group: _removal_fault(work, data, checks, [group]))
    skipped += whole
    taken = {entry.module for group in (*heads, *hidden) for entry in group.producers}
    taken |= {entry.name for entry in skipped}  # whose reason is told already
    coupled, whole = coupled_groups(work, data, batch, seen, taken)
    checked, failed = _self_check(work, data, checks, [*heads, *hidden, *coupled])
    skipped += [*whole, *failed]
    if not checked:
        listed = "\n  ".join(f"{entry.name}: {entry.reason}" for entry in skipped) or "no layer feeds another one"
        raise ValueError(
            f"nothing can be pruned in {type(model).__name__} (layers that ran: {seen.order or 'none'}):\n  {listed}"
        )
    ordered = sorted(checked, key=lambda group: seen.order.index(group.consumer))
    direct = {
        name: norm
        for name, norm in seen.direct.items()
        if getattr(work.get_submodule(norm), "running_var", None) is not None  # else it has no gain of its own
    }
    return Structure(tuple(ordered), tuple(skipped), tuple(seen.order), direct)


def _replaced(model: nn.Module, data: CalibrationData, batch: Any) -> tuple[nn.Module, Trace]:
    """Return a copy in evaluation mode whose attention can lose heads, if it runs, and what was seen of it."""
    try:
        plain = copy.deepcopy(model).eval()
        work = replace_attention(model).eval()
    except RuntimeError as error:  # tensors that are computed, as those of the old weight_norm
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error
    try:
        seen = trace(work, data, batch)
        if agreement_error(work, plain, data, batch) <= 1:
            return work, seen
    except (AttributeError, RuntimeError):  # the network reads what was replaced
        logger.debug("the network does not run with replaced attention", exc_info=True)
    return plain, trace(plain, data, batch)


@torch.no_grad()
def _self_check(
    model: nn.Module, data: CalibrationData, batches: Sequence[Any], groups: Sequence[Group]
) -> tuple[list[Group], list[Skipped]]:
    """Return the groups for which removing and zeroing agree, one by one and all together, and the others."""
    if not groups or not _removal_fault(model, data, batches, groups):
        return list(groups), []
    good: list[Group] = []
    failed: list[Skipped] = []
    for group in groups:  # together with those that passed, so that what is left is right as a whole
        fault = _removal_fault(model, data, batches, [*good, group])
        if fault:
            failed.append(Skipped(group.name, fault))
        else:
            good.append(group)
    return good, failed


def _removal_fault(model: nn.Module, data: CalibrationData, batches: Sequence[Any], groups: Sequence[Group]) -> str:
    """Return why removing nodes is not what zeroing their readers is, or "" if it is the same.

    Two patterns are tried, because either alone may be blind to a reordering.
    """
    label = [group.name for group in groups][-1]
    for pattern in (_first_half, _every_second):
        try:
            error = _pattern_error(model, data, batches, groups, pattern)
        except Exception as problem:  # the network's own code may fail in any way when a shape is not what it expects
            return f"the network does not run after removing nodes of {label!r}: {type(problem).__name__}: {problem}"
        if not error <= 1:
            readers = ", ".join(repr(entry.module) for entry in groups[-1].consumers)
            return (
                f"removing nodes of {label!r} and zeroing the columns of {readers} give different outputs "
                f"({error:.2g} times what rounding explains); something between the layers mixes nodes"
            )
    return ""


def _first_half(width: int) -> np.ndarray:
    return np.arange((width + 1) // 2)


def _every_second(width: int) -> np.ndarray:
    return np.arange(0, width, 2)


def _pattern_error(
    model: nn.Module,
    data: CalibrationData,
    batches: Sequence[Any],
    groups: Sequence[Group],
    pattern: Callable[[int], np.ndarray],
) -> float:
    keep = {group.name: pattern(group.width) for group in groups}
    zeroed = copy.deepcopy(model).eval()
    mask_nodes(zeroed, groups, keep)
    small = remove_nodes(model, groups, keep).eval()
    return max(agreement_error(small, zeroed, data, batch) for batch in batches)


@torch.no_grad()
def check_batches(model: nn.Module, data: CalibrationData, batch: Any) -> list[Any]:
    """Return what networks are compared on: two samples of a batch, and noise if the model can take it.

    Args:
        model: the network.
        data: how to call it.
        batch: the batch.
    """
    found, noise = [small_batch(batch)], noisy_batch(batch)
    try:
        (outputs,) = _outputs((model,), data, noise)
    except Exception:  # the network's own code may refuse what is no sample in any way
        logger.debug("the network does not run on noise", exc_info=True)
        return found
    return [*found, noise] if bool(torch.isfinite(outputs).all()) else found


@torch.no_grad()
def agreement_error(small: nn.Module, masked: nn.Module, data: CalibrationData, batch: Any) -> float:
    """Return the largest difference of two networks' outputs over what rounding explains: at most 1 if they agree."""
    found, wanted = _outputs((small, masked), data, batch)
    if found.shape != wanted.shape:
        return math.inf
    scale = float(wanted.abs().max())
    tolerance = SELF_CHECK_FACTOR * math.sqrt(torch.finfo(wanted.dtype).eps)
    return float((found - wanted).abs().max()) / (scale if scale > 0 else 1.0) / tolerance


def _outputs(models: Sequence[nn.Module], data: CalibrationData, batch: Any) -> list[Tensor]:
    """Run the models in float64, where weak mixing shows; in their own precision if they cannot be run in float64."""
    try:
        wide = map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return [data.call(copy.deepcopy(model).double(), wide) for model in models]
    except (RuntimeError, TypeError):
        return [data.call(model, batch) for model in models]
