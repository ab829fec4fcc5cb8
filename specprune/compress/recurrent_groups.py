"""Which hidden nodes of recurrent layers can be pruned, and who reads them: found by gradients between neighbours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData
from specprune.compress.layers import is_refittable
from specprune.compress.recurrent import recurrent_fault
from specprune.compress.surgery import CARRIERS, RECURRENT, Group, Skipped, Slice
from specprune.compress.tracing import LAYERS, Trace, map_tensors

logger = logging.getLogger(__name__)


@dataclass
class _Read:
    """What one module, or the network's output (name ""), received in a run: its only input, and anything else."""

    name: str
    inputs: Tensor | None
    others: list[Tensor]


@dataclass
class _Run:
    """A run in which every layer's output was cut off from what is behind it.

    Args:
        states: recurrent layer to the tensors put in place of its outputs and its last hidden state.
        cells: recurrent layer to the one in place of its last cell state.
        reads: what was read.
        refused: recurrent layer to the reason why it cannot be pruned.
    """

    states: dict[str, list[Tensor]] = field(default_factory=dict)
    cells: dict[str, list[Tensor]] = field(default_factory=dict)
    reads: list[_Read] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class _RefusedError(Exception):
    """Why one group cannot be pruned."""


def recurrent_groups(
    model: nn.Module, data: CalibrationData, batch: Any, trace: Trace, fault: Callable[[Group], str]
) -> tuple[list[Group], list[Skipped]]:
    """Return the groups of hidden nodes of recurrent layers, and the ones left whole.

    Who reads a hidden state is found by gradients in a copy in which every layer's output is cut off, so that they run
    between neighbours only: an input feature of a layer belongs to the one hidden node that it depends on.

    Args:
        model: the network; left as it is.
        data: how to call it.
        batch: what to call it on, a few samples.
        trace: what `trace` saw of this network.
        fault: why removing nodes of a group and zeroing their readers disagree, "" if they agree.
    """
    names = [name for name in trace.order if isinstance(model.get_submodule(name), RECURRENT)]
    if not names:
        return [], []
    try:
        runs = _runs(model, data, batch)
    except Exception as error:  # the network's own code may refuse other hidden states in any way
        logger.debug("the recurrent layers could not be traced", exc_info=True)
        return [], [Skipped(name, f"tracing failed: {type(error).__name__}: {error}") for name in names]
    groups: list[Group] = []
    skipped: list[Skipped] = []
    for name in names:
        try:
            group = _read_group(model, name, runs, trace)
        except _RefusedError as refusal:
            skipped.append(Skipped(name, str(refusal)))
            continue
        reason = fault(group)
        if reason:
            skipped.append(Skipped(name, reason))
        else:
            groups.append(group)
    return groups, skipped


def _runs(model: nn.Module, data: CalibrationData, batch: Any) -> list[_Run]:
    """Run twice, with hidden states of opposite signs: a rectifier behind them passes each value in one of the runs."""
    try:
        wide = map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return [_cut_run(copy.deepcopy(model).double().eval(), data, wide, sign) for sign in (1.0, -1.0)]
    except (RuntimeError, TypeError):  # a model that makes tensors of its own precision
        return [_cut_run(copy.deepcopy(model).eval(), data, batch, sign) for sign in (1.0, -1.0)]


def _cut_run(work: nn.Module, data: CalibrationData, batch: Any, sign: float) -> _Run:
    run = _Run()
    generator = torch.Generator().manual_seed(0)

    def state(tensor: Tensor) -> Tensor:
        # Away from zero, where rectifiers and maxima have no clear gradient.
        drawn = (0.5 + torch.rand(tensor.shape, generator=generator)) * (
            2 * torch.randint(0, 2, tensor.shape, generator=generator) - 1
        )
        return (sign * drawn).to(tensor).requires_grad_()

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plain = bool(args) and isinstance(args[0], Tensor)
        others = _tensors((args[1:] if plain else args, kwargs))
        # Copies: a tensor that is changed in place later would stand for something else.
        run.reads.append(_Read(name, args[0].clone() if plain else None, [tensor.clone() for tensor in others]))

    def carrier(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: note(name, args, kwargs)

    def layer(name: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            note(name, args, kwargs)
            if not isinstance(module, RECURRENT):
                return map_tensors(output, lambda tensor: tensor.detach())
            if not isinstance(output[0], Tensor):
                run.refused[name] = "it reads a PackedSequence; pad the sequences instead"
                return output
            if _tensors((args[1:], kwargs.get("hx"))):
                run.refused[name] = "its first hidden state is passed by the caller; leave it out where it is zero"
            last, cell = output[1] if isinstance(output[1], tuple) else (output[1], None)
            states = [state(output[0]), state(last)]
            run.states.setdefault(name, []).extend(states)
            copies: list[Tensor] = [leaf.clone() for leaf in states]  # a leaf itself cannot be changed in place
            if cell is None:
                return copies[0], copies[1]
            memory = state(cell)
            run.cells.setdefault(name, []).append(memory)
            return copies[0], (copies[1], memory.clone())

        return after

    for name, module in work.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(layer(name), with_kwargs=True)
        elif isinstance(module, CARRIERS) and getattr(module, "num_parameters", 0) != 1:
            module.register_forward_pre_hook(carrier(name), with_kwargs=True)
    with torch.enable_grad():
        run.reads.append(_Read("", data.call(work, batch), []))
    return run


def _tensors(value: Any) -> list[Tensor]:
    """Return all tensors of real numbers in a nest of containers."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [tensor for tensor in found if tensor.is_floating_point()]


def _read_group(model: nn.Module, name: str, runs: Sequence[_Run], trace: Trace) -> Group:
    module = model.get_submodule(name)
    reason = recurrent_fault(module) or runs[0].refused.get(name, "") or trace.blocked.get(name, "")
    if reason:
        raise _RefusedError(reason)
    hidden = int(module.hidden_size)  # type: ignore[arg-type]
    patterns: dict[str, np.ndarray] = {}
    for run in runs:
        states = run.states[name]
        for read in run.reads:
            label = f"{read.name!r}" if read.name else "the network's output"
            everything = read.others if read.inputs is None else [read.inputs, *read.others]
            if any(_depends(tensor, run.cells.get(name, [])) for tensor in everything):
                raise _RefusedError(f"{label} reads its cell state, which is left whole")
            if any(_depends(tensor, states) for tensor in read.others):
                raise _RefusedError(f"{label} reads its hidden states otherwise than as its only input")
            if read.inputs is None or not _depends(read.inputs, states):
                continue
            if not read.name:
                raise _RefusedError("its hidden states are outputs of the network, or reach them past all layers")
            axis = _feature_axis(model.get_submodule(read.name), read.name, read.inputs)
            found = _pattern(read.inputs, axis, states, hidden)
            patterns[read.name] = patterns.get(read.name, False) | found
    entries = {label: Slice(label, _one_to_one(label, pattern)) for label, pattern in patterns.items()}
    carriers = [label for label in entries if isinstance(model.get_submodule(label), CARRIERS)]
    consumers = sorted((label for label in entries if label not in carriers), key=trace.order.index)
    if not consumers:
        raise _RefusedError("no layer reads its hidden states")
    reasons = [trace.blocked[label] for label in (*carriers, *consumers) if label in trace.blocked]
    if reasons:
        raise _RefusedError("; ".join(dict.fromkeys(reasons)))
    return Group(
        name=name,
        width=hidden,
        producers=(Slice(name, np.arange(hidden)[:, None]),),
        carriers=tuple(entries[label] for label in carriers),
        consumers=tuple(entries[label] for label in consumers),
        kind="hidden",
    )


def _depends(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    if not leaves or not tensor.requires_grad:
        return False
    # Random weights: gradients that cancel would need a coincidence.
    weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor) + 0.5
    found = torch.autograd.grad(tensor, leaves, weights, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def _feature_axis(module: nn.Module, name: str, inputs: Tensor) -> int:
    """Return the axis along which a reader of hidden states has its input features or channels."""
    if isinstance(module, nn.Linear):
        return inputs.dim() - 1
    if isinstance(module, RECURRENT):
        fault = recurrent_fault(module)
        if fault:
            raise _RefusedError(f"read by {name!r}, of which no inputs can be cut: {fault}")
        return inputs.dim() - 1
    if isinstance(module, CARRIERS):
        return min(1, inputs.dim() - 1)
    if not is_refittable(module):
        raise _RefusedError(f"read by {name!r} ({type(module).__name__}), of which no inputs can be cut")
    return inputs.dim() - 1 - len(module.kernel_size)  # type: ignore[arg-type]


def _pattern(inputs: Tensor, axis: int, states: Sequence[Tensor], hidden: int) -> np.ndarray:
    """Return the (features, hidden) matrix of which input feature depends on which hidden node."""
    weights = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(2)).to(inputs) + 0.5
    rows = []
    for feature in range(inputs.shape[axis]):
        part = inputs.select(axis, feature)
        found = torch.autograd.grad(part, states, weights.select(axis, feature), retain_graph=True, allow_unused=True)
        used = [gradient.reshape(-1, hidden).abs().sum(0) for gradient in found if gradient is not None]
        rows.append(torch.stack(used).sum(0) > 0 if used else torch.zeros(hidden, dtype=torch.bool))
    return torch.stack([row.cpu() for row in rows]).numpy()


def _one_to_one(name: str, pattern: np.ndarray) -> np.ndarray:
    """Return the (hidden, slots) input features of each hidden node."""
    mixed = np.flatnonzero(pattern.sum(1) > 1)
    if len(mixed):
        raise _RefusedError(
            f"input {mixed[0]} of {name!r} depends on several hidden state nodes; they are mixed on the way"
        )
    counts = pattern.sum(0)
    if counts.min() != counts.max():
        raise _RefusedError(
            f"{name!r} reads some hidden state nodes more often than others ({counts.min()}..{counts.max()})"
        )
    return np.stack([np.flatnonzero(column) for column in pattern.T])
