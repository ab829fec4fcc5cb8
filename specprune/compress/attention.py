"""Attention whose heads can be removed: the same computation in four Linear layers, and putting it into networks."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function


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
        with torch.device("meta"):  # no weights are drawn, which would move the caller's random numbers
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
    inputs, outputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    _copy_into(layer, weight.T, bias)
    return layer.train(module.training)


def _copy_into(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
