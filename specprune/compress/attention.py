"""Attention heads as prunable groups: which rows make a head, which columns read it, what counts the heads.

A head is found where it acts, at the calls of `scaled_dot_product_attention`: derivatives tell which outputs of Linear
layers enter the queries, keys and values of each head, and which inputs of Linear layers its result enters.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from specprune.compress.batches import CalibrationData
from specprune.compress.surgery import Attribute, Group, Skipped, Slice
from specprune.compress.tracing import Trace, map_tensors

logger = logging.getLogger(__name__)

SEED = 0  # of the directions along which dependence is tested; any direction in general position will do
_HEADS = (
    *("num_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "h", "num_attention_heads", "attention_heads"),
    *("num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "num_key_value_heads", "num_q_heads", "num_query_heads"),
    *("n_local_heads", "n_local_kv_heads", "num_k_heads", "num_v_heads", "num_key_heads", "num_value_heads"),
)
_INNER = ("all_head_size", "split_size", "inner_dim", "inner_size", "attn_dim", "attention_dim", "q_size", "kv_size")
_EMBEDDING = ("embed_dim", "embedding_dim", "hidden_size", "hidden_dim", "d_model", "n_embd", "kv_dim", "dim")


class HeadAttention(nn.Module):
    """Multi-head attention with four Linear layers, whose heads together may be narrower than the embedding.

    It computes what `nn.MultiheadAttention` computes, and is called in the same way.

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: number of heads.
        head_dim: width of one head.
        dropout: probability with which attention weights are dropped while training.
        bias: whether the four layers have biases.
        kdim: width of the keys; the embedding's by default.
        vdim: width of the values; the embedding's by default.
        batch_first: whether inputs are (batch, length, features), not (length, batch, features).
    """

    # `nn.TransformerEncoderLayer` reads these before it bypasses the layers; they say that it must not.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.q_proj = nn.Linear(embed_dim, inner, bias)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, inner, bias)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, inner, bias)
        self.out_proj = nn.Linear(inner, embed_dim, bias)

    @classmethod
    def like(cls, attention: nn.MultiheadAttention) -> HeadAttention:
        """Return the twin of an `nn.MultiheadAttention`: copies of its weights, the same outputs.

        Raises:
            ValueError: it was made with add_bias_kv or add_zero_attn.
        """
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "HeadAttention has no extra key and value: got an nn.MultiheadAttention with add_bias_kv="
                f"{attention.bias_k is not None}, add_zero_attn={attention.add_zero_attn}, expected both False"
            )
        twin = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.head_dim,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
        )
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        layers = (twin.q_proj, twin.k_proj, twin.v_proj, twin.out_proj)
        pairs = (*zip(weights, biases, strict=True), (attention.out_proj.weight, attention.out_proj.bias))
        for layer, (weight, bias) in zip(layers, pairs, strict=True):
            _copy_into(layer, weight, bias)
        return twin.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values and, if asked for, the attention weights, as `nn.MultiheadAttention` does.

        Args:
            query: (length, embed_dim), (length, batch, embed_dim), or (batch, length, embed_dim) with `batch_first`.
            key: the same with the keys' length and width.
            value: the same with the keys' length and the values' width.
            key_padding_mask: (batch, keys) or (keys,): True, or what is added to the scores, where to look away.
            need_weights: whether to return the weights as well, which is slower.
            attn_mask: (queries, keys) or (batch * heads, queries, keys), of the same two kinds.
            average_attn_weights: whether to return the mean of the weights over the heads.
            is_causal: says that `attn_mask` is the causal mask.

        Raises:
            ValueError: a tensor of another shape, or `is_causal` without `attn_mask`.
        """
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
            raise ValueError(f"query, key and value must all have 3 dimensions, or 2 without a batch; got {shapes}")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True says what attn_mask is, and attn_mask is None: pass the causal mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _scores_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = weighted_attention(q, k, v, mask, dropout)
            if average_attn_weights:
                weights = weights.mean(dim=1)
            if not batched:
                weights = weights.squeeze(0)
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _split(self, features: Tensor) -> Tensor:
        """Return (batch, length, heads * width) as (batch, heads, length, width)."""
        return features.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        """Return what `print` shows of the numbers that the layers do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, batch_first={self.batch_first}"


def _scores_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores, in a shape that spreads to (batch, heads, queries, keys)."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    total = None
    if attn_mask is not None:
        if attn_mask.shape not in ((queries, keys), (batch * heads, queries, keys)):
            raise ValueError(
                f"attn_mask has shape {tuple(attn_mask.shape)}, expected {(queries, keys)} or "
                f"{(batch * heads, queries, keys)}"
            )
        total = _added(attn_mask, q.dtype)
        total = total.reshape(batch, heads, queries, keys) if total.dim() == 3 else total[None, None]
    if padding is not None:
        padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
        if padding.shape != (batch, keys):
            raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)}, expected {(batch, keys)}")
        padding = _added(padding, q.dtype)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Return `scaled_dot_product_attention` and its weights (batch, heads, queries, keys).

    It follows the protocol of `torch.overrides`, so that a `TorchFunctionMode` sees it as one call.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(weighted_attention, (q, k, v), q, k, v, mask, dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
    if dropout > 0:
        weights = functional.dropout(weights, dropout)
    return weights @ v, weights


def replace_attention(model: nn.Module) -> nn.Module:
    """Return a copy in which every `nn.MultiheadAttention` is a `HeadAttention` with the same weights and outputs.

    So is every `Conv1D` of Hugging Face, a linear layer stored transposed, an `nn.Linear`.  Attention with an extra key
    and value stays, and so do subclasses and modules with hooks or with tensors that other modules share.  A network
    made by the same code gets the same layers, so a pruned one can be rebuilt from it.

    The nested tensors of `nn.TransformerEncoder` are switched off with them: what it returns at padded positions, zeros
    in evaluation mode without gradients, becomes what it returns there in all other cases.

    Args:
        model: any network; left as it is.
    """
    work = copy.deepcopy(model)
    owners: dict[int, set[int]] = {}
    for module in work.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    twins = {module: twin for module in work.modules() if _is_plain(module, owners) and (twin := _twin(module))}
    if work in twins:
        return twins[work]
    for module in list(work.modules()):
        for name, child in module._modules.items():
            if child in twins:
                module._modules[name] = twins[child]
    for module in work.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, HeadAttention) for m in module.modules()):
            module.use_nested_tensor = False
    return work


def _is_plain(module: nn.Module, owners: dict[int, set[int]]) -> bool:
    """Return whether a copy of its weights loses nothing of the module: it has no hooks and shares no tensors."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(len(owners[id(parameter)]) == 1 for parameter in module.parameters()) and not any(
        getattr(inner, hook) for inner in module.modules() for hook in hooks
    )


def _twin(module: nn.Module) -> nn.Module | None:
    """Return what a module is replaced by; None if it stays."""
    if type(module) is nn.MultiheadAttention:
        known = type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        return HeadAttention.like(module) if known and module.bias_k is None and not module.add_zero_attn else None
    if (type(module).__module__, type(module).__name__) != ("transformers.pytorch_utils", "Conv1D"):
        return None
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    layer = nn.Linear(*weight.shape)
    _copy_into(layer, weight.T, bias)
    return layer.train(module.training)


def _copy_into(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


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
    for names in ((), _HEADS, (*_HEADS, *_INNER), (*_HEADS, *_INNER, *_EMBEDDING)):
        attributes = tuple(
            Attribute(".".join(owner), name, values[name] // group.width)
            for name in names
            if type(values.get(name)) is int
            and values[name] in (heads if name in _HEADS else inner)
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
