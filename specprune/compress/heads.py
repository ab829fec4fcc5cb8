"""Attention heads as prunable groups: which rows make a head, which columns read it, what counts the heads.

A head is found where it acts, at the calls of `scaled_dot_product_attention`: derivatives tell which outputs of Linear
layers enter the queries, keys and values of each head, and which inputs of Linear layers its result enters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from specprune.compress.attention import weighted_attention
from specprune.compress.batches import CalibrationData
from specprune.compress.surgery import Attribute, Group, Skipped, Slice
from specprune.compress.tracing import Trace, map_tensors

logger = logging.getLogger(__name__)

SEED = 0  # of the directions along which dependence is tested; any direction in general position will do
HEAD_COUNTS = (
    *("num_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "h", "num_attention_heads", "attention_heads"),
    *("num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "num_key_value_heads", "num_q_heads", "num_query_heads"),
    *("n_local_heads", "n_local_kv_heads", "num_k_heads", "num_v_heads", "num_key_heads", "num_value_heads"),
)
INNER_WIDTHS = (
    "all_head_size",
    "split_size",
    "inner_dim",
    "inner_size",
    "attn_dim",
    "attention_dim",
    "q_size",
    "kv_size",
)
EMBEDDING_WIDTHS = ("embed_dim", "embedding_dim", "hidden_size", "hidden_dim", "d_model", "n_embd", "kv_dim", "dim")


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of attention.

    Args:
        parts: queries, keys and values, each (..., heads, length, width).
        result: a leaf with the values of what it returned.
    """

    parts: tuple[Tensor, Tensor, Tensor]
    result: Tensor


@dataclass(frozen=True, eq=False)
class _Record:
    """A forward pass in pieces, so that derivatives run from one Linear layer or attention to the next ones only.

    Args:
        calls: the calls of attention.
        outputs: each run of a Linear layer with a leaf that has its outputs.
        inputs: each run of a Linear layer with its inputs.
        weights: other module to its parameters of two and more dimensions, in the order in which the modules ran.
    """

    calls: list[_Call]
    outputs: list[tuple[str, Tensor]]
    inputs: list[tuple[str, Tensor]]
    weights: dict[str, list[Tensor]]


class _RefusedError(Exception):
    """Why the heads of one call cannot be pruned."""


class AttentionCalls(TorchFunctionMode):
    """While it is active, notes every call of attention and cuts the autograd graph behind its result.

    Tracers that follow the graph are spared what is inside attention, where they would find no nodes to prune.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not functional.scaled_dot_product_attention and func is not weighted_attention:
            return output
        result, *rest = output if isinstance(output, tuple) else (output,)
        leaf = result.detach().requires_grad_()
        q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        self.calls.append(_Call((q, k, v), leaf))
        attended = leaf.clone()  # what follows may write into it, which a leaf forbids
        return (attended, *rest) if isinstance(output, tuple) else attended


def head_groups(
    model: nn.Module, data: CalibrationData, batch: Any, trace: Trace, fault: Callable[[Group], str]
) -> tuple[list[Group], list[Skipped]]:
    """Return the attention heads that can be removed, one group for every attention, and those left whole.

    A unit is one head: the outputs of Linear layers that enter its queries, keys and values, and the inputs of the
    Linear layers that read its result.  Heads that share keys and values (grouped queries) are one unit.

    Args:
        model: the network, with `replace_attention` done; left as it is.
        data: how to call it.
        batch: what to call it on.
        trace: what `trace` saw of this network.
        fault: why removing units of a group is not what zeroing their readers is; "" if it is the same.
    """
    groups: list[Group] = []
    skipped = [
        Skipped(name, "an nn.MultiheadAttention of another kind (extra keys, hooks, shared or changed tensors)")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and name in trace.order
    ]
    try:
        record = _record(model, data, batch)
    except Exception as error:  # hooks and modes that a network does not bear are a reason to leave it whole
        logger.debug("the attention calls could not be recorded", exc_info=True)
        return [], [*skipped, Skipped("attention", f"tracing failed: {type(error).__name__}: {error}")]
    settled: set[str] = set()
    for number, call in enumerate(record.calls):
        makers = [_makers(part, record) for part in call.parts]
        name = next(iter(makers[2]), "") or _other_maker(call.parts[2], record) or f"attention {number}"
        if name in settled:
            continue  # the same layers attend in several calls, in chunks say: the first one spoke for all
        settled.add(name)
        try:
            groups.append(_checked(model, _units_of(name, call, makers, record, trace), call, makers, fault))
        except _RefusedError as reason:
            skipped.append(Skipped(name, str(reason)))
        except RuntimeError as error:
            logger.debug("the heads of %s could not be read", name, exc_info=True)
            skipped.append(Skipped(name, f"not understood by the tracer: {type(error).__name__}: {error}"))
    return groups, skipped


def _record(model: nn.Module, data: CalibrationData, batch: Any) -> _Record:
    """Run the network in float64, in its own precision if it cannot be run in float64."""
    try:
        wide = map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return _run(copy.deepcopy(model).double(), data, wide)
    except (RuntimeError, TypeError):
        return _run(copy.deepcopy(model), data, batch)


def _run(work: nn.Module, data: CalibrationData, batch: Any) -> _Record:
    record = _Record([], [], [], {})

    def watch(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                record.inputs.append((name, args[0].clone()))

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            record.outputs.append((name, leaf))
            return leaf.clone()  # an activation may write into it, which a leaf forbids

        def note(module: nn.Module, _args: Any, _output: Any) -> None:
            record.weights[name] = [p for p in module.parameters(recurse=False) if p.dim() > 1 and p.requires_grad]

        if type(module) is nn.Linear:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            module.register_forward_hook(note)

    for name, module in work.eval().named_modules():
        watch(name, module)
    for parameter in work.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    with torch.enable_grad(), AttentionCalls() as watcher:
        data.call(work, batch)
    record.calls.extend(watcher.calls)
    return record


def _direction(tensor: Tensor, head: int | None = None) -> Tensor:
    """Return random numbers of a tensor's shape, on all heads or on one head of it alone."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    if head is None:
        return drawn
    alone = torch.zeros_like(drawn)
    alone[..., head, :, :] = drawn[..., head, :, :]
    return alone


def _makers(part: Tensor, record: _Record) -> dict[str, np.ndarray]:
    """Return the Linear layers that make queries, keys or values, as (heads, outputs) of what enters which head."""
    if part.dim() < 3 or not part.requires_grad:
        return {}
    whole = _derivatives(part, [leaf for _, leaf in record.outputs], _direction(part))
    near = [run for run, found in zip(record.outputs, whole, strict=True) if found is not None]
    patterns = {name: np.zeros((part.shape[-3], leaf.shape[-1]), dtype=bool) for name, leaf in near}
    for head in range(part.shape[-3]) if near else ():
        found = _derivatives(part, [leaf for _, leaf in near], _direction(part, head))
        for (name, _), derivative in zip(near, found, strict=True):
            if derivative is not None:
                patterns[name][head] |= _nonzero(derivative)
    return patterns


def _derivatives(of: Tensor, by: Sequence[Tensor], along: Tensor) -> Sequence[Tensor | None]:
    return torch.autograd.grad(of, by, along, retain_graph=True, allow_unused=True) if by else ()


def _nonzero(derivative: Tensor) -> np.ndarray:
    """Return which features have a nonzero entry anywhere."""
    return (derivative.reshape(-1, derivative.shape[-1]) != 0).any(dim=0).cpu().numpy()


def _other_maker(part: Tensor, record: _Record) -> str:
    """Return the last module with a matrix, no Linear layer, that the queries, keys or values depend on; or ""."""
    for name, weights in reversed(record.weights.items()):
        if part.requires_grad and any(found is not None for found in _derivatives(part, weights, _direction(part))):
            return name
    return ""


def _readers(call: _Call, record: _Record) -> dict[str, np.ndarray]:
    """Return the Linear layers that read an attention's result, as (heads, inputs) of what depends on which head."""
    patterns: dict[str, np.ndarray] = {}
    for name, inputs in record.inputs:
        if not inputs.requires_grad or _derivatives(inputs, [call.result], _direction(inputs))[0] is None:
            continue
        # The derivative along a head is the derivative of the reverse derivative, which is linear in `along`.
        along = torch.zeros_like(inputs, requires_grad=True)
        (reverse,) = torch.autograd.grad(inputs, call.result, along, create_graph=True)
        patterns.setdefault(name, np.zeros((call.result.shape[-3], inputs.shape[-1]), dtype=bool))
        for head, pattern in enumerate(patterns[name]):
            (forward,) = _derivatives(reverse, [along], _direction(reverse, head))
            if forward is not None:
                pattern |= _nonzero(forward)
    return patterns


def _units_of(name: str, call: _Call, makers: list[dict[str, np.ndarray]], record: _Record, trace: Trace) -> Group:
    """Return the heads of one call as a group without attributes.

    Raises:
        _RefusedError: they cannot be told apart, or something else than Linear layers makes or reads them.
    """
    for what, part, found in zip(("queries", "keys", "values"), call.parts, makers, strict=True):
        if not found:
            other = _other_maker(part, record)
            raise _RefusedError(f"no Linear layer makes the {what}" + (f"; {other!r} does" if other else ""))
    readers = _readers(call, record)
    if not readers:
        raise _RefusedError("no Linear layer reads the result of the attention")
    heads = call.result.shape[-3]
    producers: dict[str, np.ndarray] = {}
    for found in makers:
        for label, pattern in found.items():  # with fewer heads than queries have, each one serves a row of them
            spread = pattern[np.arange(heads) * len(pattern) // heads]
            producers[label] = producers.get(label, np.zeros_like(spread)) | spread
    reasons = [trace.blocked[label] for label in (*producers, *readers) if label in trace.blocked]
    if reasons:
        raise _RefusedError("; ".join(dict.fromkeys(reasons)))
    units = _joined([*producers.values(), *readers.values()])
    if units.max() == 0:
        if heads == 1:
            raise _RefusedError("the attention has one head")
        mixed = [label for label, pattern in (*producers.items(), *readers.items()) if _joined([pattern]).max() == 0]
        raise _RefusedError(f"all {heads} heads share features of {', '.join(map(repr, mixed)) or 'several layers'}")
    first = trace.order.index
    return Group(
        name=name,
        width=int(units.max()) + 1,
        producers=tuple(_slice(label, producers[label], units) for label in sorted(producers, key=first)),
        carriers=(),
        consumers=tuple(_slice(label, readers[label], units) for label in sorted(readers, key=first)),
        kind="heads",
    )


def _joined(patterns: list[np.ndarray]) -> np.ndarray:
    """Return the unit of every head: heads that share a feature, directly or through others, are one unit."""
    features = np.concatenate(patterns, axis=1).astype(np.int64)
    return connected_components(features @ features.T, directed=False)[1]


def _slice(label: str, pattern: np.ndarray, units: np.ndarray) -> Slice:
    entries = [np.flatnonzero(pattern[units == unit].any(axis=0)) for unit in range(units.max() + 1)]
    sizes = {len(entry) for entry in entries}
    if len(sizes) > 1 or 0 in sizes:
        raise _RefusedError(f"{label!r} has unequal numbers of features for the heads ({sorted(sizes)})")
    return Slice(label, np.array(entries))


def _checked(
    model: nn.Module, group: Group, call: _Call, makers: list[dict[str, np.ndarray]], fault: Callable[[Group], str]
) -> Group:
    """Return the group with the integers of the network's own code that must change with it, found by trying.

    Raises:
        _RefusedError: the network does not compute the right thing with any of them.
    """
    owner, *others = [entry.module.split(".")[:-1] for entry in group.producers]
    while any(other[: len(owner)] != owner for other in others):
        owner.pop()
    rows = [sum(int(pattern.any(axis=0).sum()) for pattern in found.values()) for found in makers]
    heads = {count // part.shape[-1] for count, part in zip(rows, call.parts, strict=True)}
    inner = {*rows, *(entry.index.size for entry in group.consumers)}
    values = vars(model.get_submodule(".".join(owner)))
    tried: list[tuple[Attribute, ...]] = []
    first = ""
    for names in ((), HEAD_COUNTS, (*HEAD_COUNTS, *INNER_WIDTHS), (*HEAD_COUNTS, *INNER_WIDTHS, *EMBEDDING_WIDTHS)):
        attributes = tuple(
            Attribute(".".join(owner), name, values[name] // group.width)
            for name in names
            if type(values.get(name)) is int
            and values[name] in (heads if name in HEAD_COUNTS else inner)
            and values[name] % group.width == 0
        )
        if attributes in tried:
            continue
        tried.append(attributes)
        candidate = replace(group, attributes=attributes)
        problem = fault(candidate)
        if not problem:
            return candidate
        first = first or problem
    changed = ", ".join(attribute.name for attribute in tried[-1])
    raise _RefusedError(first + (f" (nor with other values of {changed})" if changed else ""))
