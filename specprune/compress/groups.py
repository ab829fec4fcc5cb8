"""Which nodes can be removed and who consumes them: an adapter over Torch-Pruning's dependency graph, with guards.

A group is the outputs of one Linear or Conv2d layer together with the batch norm that follows and the one layer that
consumes them.  Chains of Linear, Conv2d, BatchNorm, elementwise activations, pooling, dropout and flattening have such
groups only.  Every other coupling (residual sums, concatenation, several consumers, grouped convolutions, attention,
layer norm, recurrent layers) is refused with the reason, never pruned wrongly.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData
from specprune.compress.layers import get_layer, is_layer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SELF_CHECK_FACTOR = 4.0  # times the square root of the rounding unit; sums reorder when a layer shrinks


@dataclass(frozen=True)
class Group:
    """One prunable set of nodes.

    Args:
        name: the layer whose outputs the nodes are.
        width: number of nodes (output features or channels).
        norms: the batch norms over the nodes.
        direct_norm: the one among them that reads the layer's outputs directly, if there is one.
        consumer: the layer that reads the nodes.
        slots: columns of the consumer's inputs per node: 1, or the pixels of a channel after flattening.
    """

    name: str
    width: int
    norms: tuple[str, ...]
    direct_norm: str | None
    consumer: str
    slots: int


def find_groups(model: nn.Module, data: CalibrationData) -> tuple[Group, ...]:
    """Return the prunable groups of a chain network, in the order in which their consumers run.

    The groups are checked numerically: in a copy half of the nodes are removed, in another the consumers' columns of
    the same nodes are set to zero, and both must give the same outputs.

    Args:
        model: a chain of Linear, Conv2d, BatchNorm, activations, pooling, dropout and flattening; left as it is.
        data: calibration data; two samples of the first batch are run.

    Returns:
        One group for every Linear and Conv2d layer but the last.

    Raises:
        ValueError: frozen or shared parameters, a coupling that is not a chain, nothing to prune, or a failed
            numerical check; the message names the layers. Also a mismatch of device or dtype, and NaN in the data.
        TypeError: the model returns something else than one tensor.
    """
    _check_parameters(model)
    batch = small_batch(data.first(model))
    work = copy.deepcopy(model).eval()
    order, direct = trace_order(work, data, batch)
    _check_single_use(work, data, batch)
    graph = _dependency_graph(work, data, batch)
    names = {module: name for name, module in work.named_modules()}
    groups, refused = [], []
    for name in order:
        try:
            group = _read_group(graph, work, names, name, direct)
        except _RefusedError as reason:
            refused.append(f"{name}: {reason}")
            continue
        if group is not None:
            groups.append(group)
    if refused:
        raise ValueError(
            "this network is not a chain of Linear and Conv2d layers, which is what can be pruned here:\n  "
            + "\n  ".join(refused)
        )
    if not groups:
        raise ValueError(
            f"nothing can be pruned: no Linear or Conv2d layer feeds another one in {type(model).__name__} "
            f"(layers that ran: {order or 'none'})"
        )
    _self_check(model, data, batch, tuple(groups))
    return tuple(sorted(groups, key=lambda group: order.index(group.consumer)))


def remove_nodes(
    model: nn.Module, data: CalibrationData, groups: Sequence[Group], keep: Mapping[str, Sequence[int] | np.ndarray]
) -> nn.Module:
    """Return a smaller copy of the model in which every group holds only the kept nodes, in their old order.

    Args:
        model: the network that `groups` was found on; left as it is.
        data: calibration data; two samples are traced.
        groups: from `find_groups`.
        keep: group name to the indices of the nodes that stay.

    Raises:
        ValueError: an unknown group, or indices that are empty, repeated or out of range.
    """
    work = copy.deepcopy(model)
    training = work.training
    graph = _dependency_graph(work.eval(), data, small_batch(data.first()))
    for group in groups:
        kept = np.unique(np.asarray(keep[group.name], dtype=np.int64))
        if len(kept) == 0 or len(kept) != len(keep[group.name]) or kept[0] < 0 or kept[-1] >= group.width:
            raise ValueError(
                f"group {group.name!r} has nodes 0..{group.width - 1}; got the nodes to keep {list(keep[group.name])}"
            )
        drop = np.setdiff1d(np.arange(group.width), kept).tolist()
        if drop:
            layer = get_layer(work, group.name)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, prune, drop).prune()
    return work.train(training)


class _RefusedError(Exception):
    """Why one group cannot be pruned."""


def _check_parameters(model: nn.Module) -> None:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"the parameters {frozen[:3]}{' ...' if len(frozen) > 3 else ''} are frozen (requires_grad=False), and "
            "pruning would change them: call requires_grad_(True) on a copy of the model first"
        )
    owners: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}".lstrip(".")
            if id(parameter) in owners and owners[id(parameter)] != name:
                raise ValueError(
                    f"{owners[id(parameter)]!r} and {name!r} share one tensor; tied weights are not pruned"
                )
            owners[id(parameter)] = name
        if hasattr(module, "parametrizations") or getattr(module, "_forward_pre_hooks", None):
            what = "a parametrization" if hasattr(module, "parametrizations") else "a forward pre-hook"
            raise ValueError(f"module {module_name or type(module).__name__!r} has {what}: remove it before pruning")


def _check_single_use(work: nn.Module, data: CalibrationData, batch: Any) -> None:
    """Refuse tensors that the forward pass uses twice, for example a decoder that multiplies by `encoder.weight.T`."""
    owned = {
        id(parameter): f"{name}.{key}"
        for name, module in work.named_modules()
        if is_layer(module) or isinstance(module, NORMS)
        for key, parameter in module.named_parameters(recurse=False)
    }
    with torch.enable_grad():
        root = data.call(work, batch).grad_fn
    seen, waiting, used = {root}, [root] if root is not None else [], set()
    while waiting:
        for step, _ in waiting.pop().next_functions:
            name = owned.get(id(getattr(step, "variable", None)))
            if name is not None and name in used:
                raise ValueError(f"{name!r} is used more than once in a forward pass; tied weights are not pruned")
            if name is not None:
                used.add(name)
            if step is not None and step not in seen:
                seen.add(step)
                waiting.append(step)


def small_batch(batch: Any) -> Any:
    """Return the first two samples of a batch of any kind."""
    return _map_tensors(batch, lambda tensor: tensor[:2])


def _map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [_map_tensors(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def trace_order(work: nn.Module, data: CalibrationData, batch: Any) -> tuple[list[str], dict[str, str]]:
    """Return the layers in the order in which they run, and which batch norm reads which layer's outputs directly.

    Raises:
        ValueError: a layer runs more than once.
    """
    order: list[str] = []
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    direct: dict[str, str] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name in order:
                raise ValueError(f"layer {name!r} runs more than once in a forward pass; shared layers are not pruned")
            if not args:
                raise ValueError(f"layer {name!r} is called by keyword; call it with its input alone, layer(inputs)")
            if not bool(torch.isfinite(args[0]).all()):
                raise ValueError(f"NaN or Inf in the inputs of layer {name!r}: check the data and the layers before it")
            order.append(name)
            # The tensor is kept, so that its id is not used again; its version tells whether it was changed in place.
            outputs[id(output)] = (name, output, output._version)

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in outputs:
                source, tensor, version = outputs[id(args[0])]
                if tensor._version == version:
                    direct[source] = name

        if isinstance(module, NORMS):
            hooks.append(module.register_forward_pre_hook(before))
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            hooks.append(module.register_forward_hook(after))

    for name, module in work.named_modules():
        watch(name, module)
    with torch.no_grad():
        output = data.call(work, batch)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"the model returned a {kind}, expected one tensor of real numbers: pass "
            "forward=callable(model, batch) that returns the tensor to preserve"
        )
    for hook in hooks:
        hook.remove()
    return order, direct


def _dependency_graph(work: nn.Module, data: CalibrationData, batch: Any) -> torch_pruning.DependencyGraph:
    # Torch-Pruning's defaults are shared mutable objects, so every dictionary and list is passed anew.
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            work,
            example_inputs=batch,
            forward_fn=lambda model, example: data.call(model, example),
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )


def _read_group(
    graph: torch_pruning.DependencyGraph,
    work: nn.Module,
    names: Mapping[nn.Module, str],
    name: str,
    direct: Mapping[str, str],
) -> Group | None:
    """Return the group of one layer's outputs, None for the network's own outputs."""
    module = dict(work.named_modules())[name]
    if not is_layer(module):
        raise _RefusedError(f"{type(module).__name__} (grouped, transposed, 1d and 3d layers are not supported)")
    layer = get_layer(work, name)
    if layer not in graph.module2node:
        raise _RefusedError("not reached by tracing (is its output unused, or detached from the graph?)")
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    width = layer.weight.shape[0]
    norms: list[str] = []
    consumers: dict[str, int] = {}
    is_output = False
    for dependency, indices in graph.get_pruning_group(layer, prune, list(range(width))):
        target = dependency.target.module
        if target is layer or type(target) in (
            torch_pruning.ops._ElementWiseOp,
            torch_pruning.ops._ReshapeOp,
        ):
            continue
        if type(target) is torch_pruning.ops._OutputOp:
            is_output = True
            continue
        label = names.get(target, type(target).__name__)
        if isinstance(target, NORMS):
            if target.running_mean is None:
                raise _RefusedError(f"{label} normalises each batch by itself (track_running_stats=False)")
            norms.append(label)
        elif is_layer(target) and graph.is_in_channel_pruning_fn(dependency.handler):
            if list(indices) != list(range(len(indices))) or len(indices) % width:
                raise _RefusedError(f"{label} reads the nodes in an order that is not understood")
            if target.weight.shape[1] != len(indices):
                raise _RefusedError(f"{label} reads {target.weight.shape[1]} inputs that are not the {width} nodes")
            consumers[label] = len(indices) // width
        else:
            raise _RefusedError(f"coupled with {label} ({type(target).__name__})")
    if not consumers:
        return None
    if is_output:
        raise _RefusedError(f"read by {sorted(consumers)} and also an output of the network")
    if len(consumers) > 1:
        raise _RefusedError(f"read by several layers: {sorted(consumers)}")
    ((consumer, slots),) = consumers.items()
    return Group(name, width, tuple(norms), direct.get(name), consumer, slots)


@torch.no_grad()
def _self_check(model: nn.Module, data: CalibrationData, batch: Any, groups: tuple[Group, ...]) -> None:
    """Remove nodes in one copy and zero the consumers' columns in another; the outputs must agree.

    All groups are checked together first; only when that fails, one by one to name the culprit.
    """
    if _removal_error(model, data, batch, groups) <= 1:
        return
    for group in groups:
        error = _removal_error(model, data, batch, (group,))
        if not error <= 1:
            raise ValueError(
                f"group {group.name!r}: removing nodes and zeroing the columns of {group.consumer!r} give different "
                f"outputs ({error:.2g} times what rounding explains); something between the two layers mixes nodes"
            )
    raise ValueError(f"removing nodes of {[group.name for group in groups]} together changes the outputs wrongly")


def _removal_error(model: nn.Module, data: CalibrationData, batch: Any, groups: tuple[Group, ...]) -> float:
    """Return the error over the tolerance, the larger of two patterns: either alone may be blind to a reordering."""
    errors = [_pattern_error(model, data, batch, groups, pattern) for pattern in (_first_half, _every_second)]
    return float(np.max(errors))  # unlike Python's max, it keeps NaN


def _first_half(width: int) -> np.ndarray:
    return np.arange((width + 1) // 2)


def _every_second(width: int) -> np.ndarray:
    return np.arange(0, width, 2)


def _pattern_error(
    model: nn.Module,
    data: CalibrationData,
    batch: Any,
    groups: tuple[Group, ...],
    pattern: Callable[[int], np.ndarray],
) -> float:
    zeroed = copy.deepcopy(model).eval()
    keep = {}
    for group in groups:
        kept = pattern(group.width)
        keep[group.name] = kept
        columns = get_layer(zeroed, group.consumer).weight
        dropped = np.setdiff1d(np.arange(group.width), kept)
        columns.view(columns.shape[0], group.width, -1)[:, torch.as_tensor(dropped, device=columns.device)] = 0
    try:
        small = remove_nodes(model, data, groups, keep).eval()
        found, wanted = _outputs((small, zeroed), data, batch)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"the network does not run after removing nodes of {[group.name for group in groups]}: {error}"
        ) from error
    if found.shape != wanted.shape:
        return math.inf
    scale = float(wanted.abs().max())
    tolerance = SELF_CHECK_FACTOR * math.sqrt(torch.finfo(wanted.dtype).eps)
    return float((found - wanted).abs().max()) / (scale if scale > 0 else 1.0) / tolerance


def _outputs(models: Sequence[nn.Module], data: CalibrationData, batch: Any) -> list[Tensor]:
    """Run the models in float64, where weak mixing shows; in their own precision if they cannot be run in float64."""
    try:
        wide = _map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return [data.call(copy.deepcopy(model).double(), wide) for model in models]
    except (RuntimeError, TypeError):
        return [data.call(model, batch) for model in models]
