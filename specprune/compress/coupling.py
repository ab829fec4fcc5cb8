"""Which nodes go together and who reads them: groups read from Torch-Pruning's dependency graph.

Torch-Pruning follows the autograd graph and maps indices through sums, concatenation, flattening, slicing and depthwise
or grouped convolutions.  Its answer is a proposal: `find_groups` checks every group numerically.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import nn

from specprune.compress.batches import CalibrationData
from specprune.compress.heads import AttentionCalls
from specprune.compress.layers import is_depthwise, is_refittable
from specprune.compress.surgery import CARRIERS, Group, Skipped, Slice
from specprune.compress.tracing import Trace

logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """Why one group cannot be pruned."""


def coupled_groups(
    model: nn.Module, data: CalibrationData, batch: Any, trace: Trace, taken: Set[str] = frozenset()
) -> tuple[list[Group], list[Skipped]]:
    """Return the groups of channels and features of Linear and convolution layers, and the ones left whole.

    Args:
        model: the network; left as it is.
        data: how to call it.
        batch: what to call it on.
        trace: what `trace` saw of this network.
        taken: layers whose outputs other groups already hold.
    """
    work = copy.deepcopy(model).eval()
    for parameter in work.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # the graph follows gradients; blocked modules are refused below
    roots = [name for name in trace.order if is_refittable(work.get_submodule(name))]
    try:
        graph = _dependency_graph(work, data, batch)
    except Exception as error:  # whatever an operation unknown to the tracer raises, it is a reason to leave it whole
        logger.debug("the dependency graph could not be built", exc_info=True)
        return [], [Skipped(name, f"tracing failed: {type(error).__name__}: {error}") for name in roots]
    names = {module: name for name, module in work.named_modules()}
    groups: list[Group] = []
    skipped: list[Skipped] = []
    settled: set[str] = set(taken)
    for name in roots:
        if name in settled:
            continue
        members: set[str] = {name}
        try:
            group = _read_group(graph, names, name, trace, members)
        except _RefusedError as reason:
            skipped.append(Skipped(name, str(reason)))
        except Exception as error:
            logger.debug("the group of %s could not be read", name, exc_info=True)
            skipped.append(Skipped(name, f"not understood by the tracer: {type(error).__name__}: {error}"))
        else:
            if group is not None:
                groups.append(group)
        settled |= members
    for name in trace.order:  # parametrized layers are of a type of their own
        module = work.get_submodule(name)
        if name in trace.blocked and isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and name not in roots:
            skipped.append(Skipped(name, trace.blocked[name]))
    return groups, skipped


def _dependency_graph(work: nn.Module, data: CalibrationData, batch: Any) -> torch_pruning.DependencyGraph:
    def forward(model: nn.Module, example: Any) -> Any:
        with AttentionCalls():  # what is inside attention has no nodes to prune, and costs the tracer minutes
            return data.call(model, example)

    # Torch-Pruning's defaults are shared mutable objects, so every dictionary and list is passed anew.
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            work,
            example_inputs=batch,
            forward_fn=forward,
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )


def _read_group(
    graph: torch_pruning.DependencyGraph,
    names: Mapping[nn.Module, str],
    name: str,
    trace: Trace,
    members: set[str],
) -> Group | None:
    """Return the group of one layer's outputs, None for the network's own outputs; note its producers in `members`."""
    layer: Any = next(module for module, label in names.items() if label == name)
    if layer not in graph.module2node:
        raise _RefusedError("not reached by tracing (is its output unused, or detached from the graph?)")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels == 0:
        raise _RefusedError(f"{name!r} has no outputs")
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    found = graph.get_pruning_group(layer, prune, list(range(channels)))
    producers: dict[str, list[tuple[int, int]]] = {}
    carriers: dict[str, list[tuple[int, int]]] = {}
    consumers: dict[str, list[tuple[int, int]]] = {}
    is_output = False
    reasons = []
    for item in found:
        target = item.dep.target.module
        if type(target) is torch_pruning.ops._OutputOp:
            is_output = True
            continue
        if type(target).__module__ == torch_pruning.ops.__name__:
            continue  # a sum, a concatenation, a reshape, ...: it has nothing to cut
        label = names.get(target, type(target).__name__)
        reads = graph.is_in_channel_pruning_fn(item.dep.handler)
        if isinstance(target, CARRIERS):
            if getattr(target, "running_mean", True) is None and not isinstance(
                target, nn.modules.instancenorm._InstanceNorm
            ):
                reasons.append(f"{label} normalises each batch by itself (track_running_stats=False)")
            into = carriers
        elif is_depthwise(target):
            into = carriers
        elif is_refittable(target):
            into = consumers if reads else producers
        else:
            reasons.append(f"coupled with {label} ({type(target).__name__})")
            continue
        if any(root is None for root in item.root_idxs):
            reasons.append(f"{label} reads the nodes in an order that is not understood")
            continue
        into.setdefault(label, []).extend(zip(item.root_idxs, item.idxs, strict=True))
    members.update(producers)
    if not consumers and (is_output or not reasons):
        return None
    reasons += [trace.blocked[label] for label in (*producers, *carriers, *consumers) if label in trace.blocked]
    if is_output:
        reasons.append(f"read by {sorted(consumers)} and also an output of the network")
    if reasons:
        raise _RefusedError("; ".join(dict.fromkeys(reasons)))
    modules = {label: module for module, label in names.items()}
    unit_of = _units(modules, (*producers.items(), *consumers.items()), channels)
    ordered = sorted(consumers, key=trace.order.index)
    return Group(
        name=min(producers, key=trace.order.index),
        width=int(unit_of.max()) + 1,
        producers=tuple(_slice(label, producers[label], unit_of) for label in sorted(producers, key=trace.order.index)),
        carriers=tuple(_slice(label, entries, unit_of) for label, entries in carriers.items()),
        consumers=tuple(_slice(label, consumers[label], unit_of) for label in ordered),
        direct_norm=trace.direct.get(min(producers, key=trace.order.index)),
    )


def _units(
    modules: Mapping[str, nn.Module], members: tuple[tuple[str, list[tuple[int, int]]], ...], channels: int
) -> np.ndarray:
    """Return the unit of every root channel: itself, or what grouped convolutions tie together.

    A grouped convolution must lose equally many channels in each of its blocks, so the channels at the same place of
    every block form one unit.
    """
    parent = list(range(channels))

    def find(channel: int) -> int:
        while parent[channel] != channel:
            channel = parent[channel]
        return channel

    for label, pairs in members:
        module: Any = modules[label]
        count = getattr(module, "groups", 1)
        if count == 1:
            continue
        sizes = {module.in_channels // count, module.out_channels // count}
        if len(sizes) > 1:
            raise _RefusedError(f"{label} has blocks with different numbers of inputs and outputs")
        first: dict[int, int] = {}
        for root, entry in pairs:
            place = entry % sizes.copy().pop()
            one, other = find(first.setdefault(place, root)), find(root)
            parent[max(one, other)] = min(one, other)
    heads = np.array([find(channel) for channel in range(channels)])
    return np.unique(heads, return_inverse=True)[1]


def _slice(label: str, pairs: list[tuple[int, int]], unit_of: np.ndarray) -> Slice:
    width = int(unit_of.max()) + 1
    entries: list[set[int]] = [set() for _ in range(width)]
    for root, entry in pairs:
        entries[unit_of[root]].add(entry)
    sizes = {len(unit) for unit in entries}
    if len(sizes) > 1:
        raise _RefusedError(f"{label} has unequal numbers of entries for the nodes ({sorted(sizes)})")
    if sum(map(len, entries)) != len(set().union(*entries)):
        raise _RefusedError(f"{label} has entries that belong to several nodes")
    return Slice(label, np.array([sorted(unit) for unit in entries]))
