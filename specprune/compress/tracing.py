"""What runs in a forward pass, in which order, and what stands in the way of pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData
from specprune.compress.surgery import CARRIERS, NORMS, RECURRENT

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, *RECURRENT)


@dataclass(frozen=True)
class Trace:
    """One forward pass.

    Args:
        order: the layers in the order in which they ran first.
        direct: layer to the batch norm that reads its outputs directly.
        blocked: module to the reason why its shape cannot be changed.
    """

    order: list[str]
    direct: dict[str, str]
    blocked: dict[str, str]


def small_batch(batch: Any) -> Any:
    """Return the first two samples of a batch of any kind."""
    return map_tensors(batch, lambda tensor: tensor[:2] if tensor.dim() else tensor)


def noisy_batch(batch: Any) -> Any:
    """Return the last two samples of a batch, with noise of the batch's size in place of real numbers.

    Checks on it see what they would not see on samples that are blank.
    """

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        rows = tensor[-2:]
        if not tensor.is_floating_point():
            return rows
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scale = float(tensor.double().square().mean().sqrt())
        return (noise * (scale if 0 < scale < float("inf") else 1.0)).to(rows)

    return map_tensors(batch, change)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with a function applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [map_tensors(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def trace(work: nn.Module, data: CalibrationData, batch: Any) -> Trace:
    """Run the network once and return what was seen.

    Args:
        work: the network in evaluation mode.
        data: how to call it.
        batch: what to call it on.

    Raises:
        ValueError: NaN or Inf in a layer's inputs; the layer is named.
        TypeError: the network returns something else than one tensor of real numbers.
    """
    order: list[str] = []
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    direct: dict[str, str] = {}
    runs: dict[str, int] = {}
    bare: dict[str, tuple[Tensor, int]] = {}
    blocked = _fixed_modules(work)
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def first(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                bare[name] = output, _version(output)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in order:
                blocked.setdefault(name, f"{name!r} runs more than once in a forward pass")
            else:
                order.append(name)
            if not args:
                blocked.setdefault(name, f"{name!r} is called by keyword; call it with its input alone, layer(inputs)")
            elif (kwargs or len(args) > 1) and not isinstance(module, (nn.MultiheadAttention, *RECURRENT)):
                blocked.setdefault(name, f"{name!r} is called with more than its input; call it as layer(inputs)")
            elif isinstance(args[0], Tensor) and not bool(torch.isfinite(args[0]).all()):
                raise ValueError(f"NaN or Inf in the inputs of layer {name!r}: check the data and the layers before it")
            if isinstance(output, Tensor):
                # The tensor is kept, so that its id is not used again; its version tells if it was changed in place.
                outputs[id(output)] = (name, output, _version(output))
                if name in bare and (bare[name][0] is not output or bare[name][1] != _version(output)):
                    blocked.setdefault(name, f"a forward hook of {name!r} changes its outputs: remove it first")

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            runs[name] = runs.get(name, 0) + 1
            if args and id(args[0]) in outputs:
                source, tensor, version = outputs[id(args[0])]
                # A norm over the tokens of a Linear is not one over its outputs.
                aligned = tensor.dim() == 2 or not isinstance(work.get_submodule(source), nn.Linear)
                if _version(tensor) == version and aligned:
                    direct[source] = name

        if isinstance(module, NORMS):
            hooks.append(module.register_forward_pre_hook(before))
        elif isinstance(module, LAYERS):
            hooks.append(module.register_forward_hook(first, prepend=True))
            hooks.append(module.register_forward_hook(after, with_kwargs=True))

    for name, module in work.named_modules():
        watch(name, module)
    try:
        with torch.no_grad():
            output = data.call(work, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"the model returned a {kind}, expected one tensor of real numbers: pass "
            "forward=callable(model, batch) that returns the tensor to preserve"
        )
    for name, count in runs.items():
        if count > 1:
            blocked.setdefault(name, f"{name!r} runs more than once in a forward pass")
            direct = {layer: norm for layer, norm in direct.items() if norm != name}
    for name in _used_twice(work, data, batch):
        blocked.setdefault(name, f"a tensor of {name!r} is used more than once in a forward pass (tied weights)")
    return Trace(order, direct, blocked)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of the inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _fixed_modules(work: nn.Module) -> dict[str, str]:
    """Return the modules whose tensors must not change shape: frozen, shared, parametrized, or with a pre-hook."""
    blocked: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in work.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            label = f"{name}.{key}".lstrip(".")
            if not parameter.requires_grad:
                blocked[name] = (
                    f"{label!r} is frozen (requires_grad=False), and pruning would change it: call "
                    "requires_grad_(True) on a copy of the model first"
                )
            if parameter.is_complex():
                blocked[name] = f"{label!r} is complex; only real weights are refitted"
            other = owners.setdefault(id(parameter), label)
            if other != label:
                reason = f"{other!r} and {label!r} share one tensor; tied weights are not pruned"
                blocked.update({name: reason, other.rpartition(".")[0]: reason})
        if hasattr(module, "parametrizations") or getattr(module, "_forward_pre_hooks", None):
            what = "a parametrization" if hasattr(module, "parametrizations") else "a forward pre-hook"
            reason = f"module {name or type(module).__name__!r} has {what}: remove it before pruning"
            blocked.update({inner: reason for inner, _ in module.named_modules(prefix=name)})
    return blocked


def _used_twice(work: nn.Module, data: CalibrationData, batch: Any) -> set[str]:
    """Return the modules with a tensor that two operations use, as a decoder that multiplies by `encoder.weight.T`."""
    owned = {
        id(parameter): name
        for name, module in work.named_modules()
        # A recurrent layer uses its own weights once a step, which is not tying.
        if isinstance(module, (*LAYERS, *CARRIERS, nn.Embedding)) and not isinstance(module, RECURRENT)
        for parameter in module.parameters(recurse=False)
    }
    with torch.enable_grad():
        root = data.call(work, batch).grad_fn
    seen, waiting = {root}, [root] if root is not None else []
    uses: dict[int, int] = {}
    while waiting:
        for step, _ in waiting.pop().next_functions:
            key = id(getattr(step, "variable", None))
            if key in owned:
                uses[key] = uses.get(key, 0) + 1
            if step is not None and step not in seen:
                seen.add(step)
                waiting.append(step)
    return {owned[key] for key, count in uses.items() if count > 1}
