"""Groups of nodes, and taking nodes out of a network: pure slicing of tensors, or zeroing what reads the nodes.

A group is a set of nodes that must go together: for each of its units, the rows of the layers that make it, the entries
of the layers that carry it channel by channel, and the columns of the layers that read it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.layers import is_depthwise, kernel_columns

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CARRIERS = (*NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
CUTTABLE = (nn.Linear, nn.modules.conv._ConvNd, *CARRIERS, *RECURRENT)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Slice:
    """Which entries of one module belong to each unit of a group.

    Args:
        module: the module's name.
        index: (units, entries a unit) output rows, input features or channels, or carried channels.
    """

    module: str
    index: np.ndarray


@dataclass(frozen=True)
class Attribute:
    """An integer attribute that says how many units there are, times a factor (a number of heads, say).

    Args:
        module: the name of the module that has it.
        name: the attribute's name.
        per_unit: its value divided by the number of units.
    """

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True, eq=False)
class Group:
    """One prunable set of units: single nodes, or blocks of nodes such as attention heads.

    Args:
        name: the layer that makes the nodes; the first to run, if there are several.
        width: number of units.
        producers: the layers whose output rows the units are.
        carriers: modules between them that treat every channel by itself: batch norms, depthwise convolutions.
        consumers: the layers that read the units, in the order in which they run.
        direct_norm: the batch norm that reads the outputs of the layer `name` directly, if there is one.
        kind: "nodes", "heads" (units are attention heads) or "hidden" (hidden nodes of a recurrent layer).
        attributes: integers that change with the number of units.
    """

    name: str
    width: int
    producers: tuple[Slice, ...]
    carriers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    direct_norm: str | None = None
    kind: str = "nodes"
    attributes: tuple[Attribute, ...] = ()

    @property
    def consumer(self) -> str:
        """The first layer that reads the units."""
        return self.consumers[0].module

    @property
    def slots(self) -> int:
        """Inputs of the first consumer per unit: 1, the pixels of a channel after flattening, or a head's size."""
        return self.consumers[0].index.shape[1]

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the carriers."""
        return tuple(entry.module for entry in self.carriers)


@dataclass(frozen=True)
class Skipped:
    """A set of nodes that is left whole, and why.

    Args:
        name: the layer that makes the nodes.
        reason: why they cannot be pruned.
    """

    name: str
    reason: str


def input_columns(layer: nn.Module, entries: np.ndarray) -> np.ndarray:
    """Return the columns of the layer's `patch_rows` that belong to input features or channels, in their order."""
    size = kernel_columns(layer)  # type: ignore[arg-type]
    flat = np.asarray(entries).ravel()
    return (flat[:, None] * size + np.arange(size)).ravel()


def dropped_units(group: Group, kept: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the units that are not kept, after checking the ones that are.

    Raises:
        ValueError: indices that are empty, repeated or out of range.
    """
    units = np.unique(np.asarray(kept, dtype=np.int64))
    if len(units) == 0 or len(units) != len(kept) or units[0] < 0 or units[-1] >= group.width:
        raise ValueError(f"group {group.name!r} has nodes 0..{group.width - 1}; got the nodes to keep {list(kept)}")
    return np.setdiff1d(np.arange(group.width), units)


def prepare(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """Return a copy of the model in which every module that the groups name exists.

    The fused projections of `nn.MultiheadAttention` cannot lose heads; where heads are units, it is replaced by
    `HeadAttention`, which computes the same.
    """
    modules = dict(model.named_modules())
    named = {part.module for group in groups for part in (*group.producers, *group.carriers, *group.consumers)}
    if all(isinstance(modules.get(name), CUTTABLE) for name in named):
        return copy.deepcopy(model)
    from specprune.compress.attention import replace_attention

    return replace_attention(model)


def remove_nodes(
    model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int] | np.ndarray]
) -> nn.Module:
    """Return a smaller copy of the model in which every group holds only the kept units, in their old order.

    Args:
        model: the network that `groups` was found on; left as it is.
        groups: from `find_groups`.
        keep: group name to the indices of the units that stay.

    Raises:
        ValueError: indices that are empty, repeated or out of range.
    """
    work = prepare(model, groups)
    rows: dict[str, list[np.ndarray]] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for group in groups:
        drop = dropped_units(group, keep[group.name])
        if len(drop) == 0:
            continue
        for entry in (*group.producers, *group.carriers):
            rows.setdefault(entry.module, []).append(entry.index[drop].ravel())
        for entry in group.consumers:
            columns.setdefault(entry.module, []).append(entry.index[drop].ravel())
        for attribute in group.attributes:
            module = work.get_submodule(attribute.module)
            setattr(module, attribute.name, attribute.per_unit * (group.width - len(drop)))
    for name in {*rows, *columns}:
        _slice(work.get_submodule(name), _union(rows.get(name)), _union(columns.get(name)))
    return work


@torch.no_grad()
def mask_nodes(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Set to zero, in place, all weights with which consumers read units that are not kept.

    The network then computes what it computes without these units: what `remove_nodes` must give, at the old size.
    """
    for group in groups:
        drop = dropped_units(group, keep[group.name])
        if group.kind == "hidden":
            from specprune.compress.recurrent import zero_hidden

            zero_hidden(model.get_submodule(group.name), drop)
        for entry in group.consumers:
            zero_inputs(model.get_submodule(entry.module), entry.index[drop].ravel())


@torch.no_grad()
def zero_inputs(module: nn.Module, entries: np.ndarray) -> None:
    """Set to zero, in place, the weights of some input features or channels of a layer."""
    index = torch.as_tensor(entries)
    if isinstance(module, RECURRENT):
        module.get_parameter("weight_ih_l0")[:, index] = 0
    elif isinstance(module, _TRANSPOSED):
        module.weight[index] = 0
    elif isinstance(module, nn.Linear) or getattr(module, "groups", 1) == 1:
        module.get_parameter("weight")[:, index] = 0
    else:
        for outputs, _, local in _by_block(module, entries):
            module.get_parameter("weight")[outputs, torch.as_tensor(local)] = 0


def _by_block(module: nn.Module, entries: np.ndarray) -> list[tuple[slice, slice, np.ndarray]]:
    """Return, for each block of a grouped convolution, its rows, its inputs, and which of its inputs are named."""
    count = int(module.groups)  # type: ignore[arg-type]
    inputs, outputs = int(module.in_channels) // count, int(module.out_channels) // count  # type: ignore[arg-type]
    parts = []
    for block in range(count):
        own = entries[entries // inputs == block] % inputs
        parts.append(
            (slice(block * outputs, (block + 1) * outputs), slice(block * inputs, (block + 1) * inputs), np.sort(own))
        )
    return parts


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Put every module of `target` into the mode that `source` has there, or in the nearest module around it."""
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        module.training = modes[name]


def _union(parts: list[np.ndarray] | None) -> np.ndarray:
    return np.array([], dtype=np.int64) if not parts else np.unique(np.concatenate(parts))


def _rest(size: int, drop: np.ndarray) -> Tensor:
    return torch.as_tensor(np.setdiff1d(np.arange(size), drop))


def _shrink(module: nn.Module, name: str, axis: int, keep: Tensor) -> None:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or tensor.dim() <= axis:
        return
    cut = tensor.detach().index_select(axis, keep.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = nn.Parameter(cut, requires_grad=tensor.requires_grad)
    else:
        module._buffers[name] = cut


def _slice(module: nn.Module, rows: np.ndarray, columns: np.ndarray) -> None:
    """Take output rows (or carried channels) and input columns out of a module, in place."""
    if isinstance(module, RECURRENT):
        from specprune.compress.recurrent import slice_recurrent

        slice_recurrent(module, rows, columns)
    elif isinstance(module, CARRIERS):
        keep = _rest(int(getattr(module, "num_features", 0) or module.num_parameters), rows)  # type: ignore[arg-type]
        for name in ("weight", "bias", "running_mean", "running_var"):
            _shrink(module, name, 0, keep)
        setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", len(keep))
    elif isinstance(module, nn.Linear):
        keep = _rest(module.out_features, rows)
        _shrink(module, "weight", 0, keep)
        _shrink(module, "bias", 0, keep)
        _shrink(module, "weight", 1, _rest(module.in_features, columns))
        module.out_features, module.in_features = module.weight.shape
    elif is_depthwise(module):
        keep = _rest(int(module.out_channels), rows)  # type: ignore[arg-type]
        _shrink(module, "weight", 0, keep)
        _shrink(module, "bias", 0, keep)
        module.in_channels = module.out_channels = module.groups = len(keep)  # type: ignore[assignment]
    elif isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        _slice_grouped(module, rows, columns)
    elif isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        out_axis = 1 if isinstance(module, _TRANSPOSED) else 0
        keep = _rest(module.out_channels, rows)
        _shrink(module, "weight", out_axis, keep)
        _shrink(module, "bias", 0, keep)
        _shrink(module, "weight", 1 - out_axis, _rest(module.in_channels, columns))
        module.out_channels, module.in_channels = module.weight.shape[out_axis], module.weight.shape[1 - out_axis]
    else:
        raise TypeError(f"a {type(module).__name__} cannot be cut")


def _slice_grouped(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, rows: np.ndarray, columns: np.ndarray) -> None:
    size, parts = module.out_channels // module.groups, []
    for block, (outputs, inputs, local) in enumerate(_by_block(module, columns)):
        keep_rows = _rest(size, rows[rows // size == block] % size)
        weight = module.weight.detach()[outputs]
        keep_columns = _rest(inputs.stop - inputs.start, local)
        parts.append(weight[keep_rows.to(weight.device)][:, keep_columns.to(weight.device)])
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"the blocks of a grouped convolution would get unequal shapes {[p.shape for p in parts]}")
    _shrink(module, "bias", 0, _rest(module.out_channels, rows))
    module.weight = nn.Parameter(torch.cat(parts).contiguous(), requires_grad=module.weight.requires_grad)
    module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
