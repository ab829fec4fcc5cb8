"""Pruned networks on disk: weights and structure in one file, without pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune._files import MOST_NAME, load_arrays, save_arrays
from specprune._records import shortened
from specprune.compress.attention import HeadAttention, replace_attention
from specprune.compress.heads import EMBEDDING_WIDTHS, HEAD_COUNTS, INNER_WIDTHS
from specprune.compress.low_rank_checkpoint import (
    check_foldings,
    foldings_of,
    is_part,
    misfit,
    outermost,
    place_low_rank,
)
from specprune.compress.low_rank_parts import SlicedLinear
from specprune.compress.recurrent import recurrent_fault
from specprune.compress.report import Pruned
from specprune.compress.surgery import CARRIERS, RECURRENT

FILE_KIND = "pruned network"
VERSION = 3
_READABLE = (1, 2, 3)
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_parameters"),
    *("hidden_size", "input_size", "num_heads", "head_dim", "slices"),
)
# What pruning changes, and what tells it from others.
_NUMBERS = frozenset((*_SIZES, *HEAD_COUNTS, *INNER_WIDTHS, *EMBEDDING_WIDTHS))
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def save_pruned(pruned: Pruned | nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a pruned network: its tensors, which module has which sizes, and which are low-rank layers.

    A low-rank layer is known as such as long as it is the two modules that it was made of, whatever their weights are
    by then.

    Args:
        pruned: the result of `prune`, or its `model` (for example after fine-tuning).
        path: the file to write, whole or not at all.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    groups = pruned.groups if isinstance(pruned, Pruned) else ()
    changed = {(attribute.module, attribute.name) for group in groups for attribute in group.attributes}
    arrays, dtypes = {}, {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__} in the state; only tensors can be saved")
        arrays[f"tensor:{name}"], dtypes[name] = _to_array(tensor)
    structure = {}
    for name, module in model.named_modules():
        sizes = {
            key: value
            for key, value in vars(module).items()
            if type(value) is int and value >= 1 and (key in _NUMBERS or (name, key) in changed)
        }
        if sizes:
            structure[name] = {"type": type(module).__name__, "sizes": sizes}
    header = {
        "kind": FILE_KIND,
        "version": VERSION,
        "dtypes": dtypes,
        "structure": structure,
        "low_rank": foldings_of(model),
    }
    save_arrays(path, arrays, header)


def load_pruned(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """Load a pruned network into the architecture that `factory` builds.

    Where the file has `HeadAttention` and the factory's network `nn.MultiheadAttention`, the latter is replaced first;
    then layers are replaced where the file has low-rank ones, unless the factory makes those itself.

    Args:
        path: what `save_pruned` wrote, by this version or an earlier one.
        factory: returns a new, unpruned network; only its structure is used.

    Returns:
        The pruned network, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a pruned network, is damaged, or does not fit what the factory builds.
        TypeError: the factory returned something else than a module.
    """
    arrays, header = load_arrays(path, FILE_KIND)
    if header.get("version") not in _READABLE:
        raise ValueError(
            f"{path}: format version {shortened(repr(header.get('version')))}, this program reads the versions "
            f"{_READABLE}"
        )
    structure, dtypes = header.get("structure"), header.get("dtypes")
    if not isinstance(structure, dict) or not isinstance(dtypes, dict):
        raise ValueError(f"{path}: the header has no structure; the file is damaged")
    label = os.fspath(path)
    for name, entry in structure.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sizes"), dict):
            found = shortened(repr(entry))
            raise ValueError(
                f"{label}: the structure says {found} of module {shortened(repr(name))}; the file is damaged"
            )
    foldings = check_foldings(header, label)
    # Each of these layers has tensors of its own, and what follows looks at every part of every name.
    if len(foldings) > len(arrays) or any(len(name) > MOST_NAME for name in (*structure, *foldings)):
        raise ValueError(
            f"{label}: {len(foldings)} low-rank layers for {len(arrays)} tensors, or the name of a module has more "
            f"than {MOST_NAME} characters; the file is damaged"
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory() returned {type(model).__name__}, expected a torch.nn.Module")
    if _misfits(model, structure, foldings, label):
        model = replace_attention(model)
    for reason in _misfits(model, structure, foldings, label):
        raise ValueError(reason)
    if foldings:
        model = place_low_rank(model, foldings, structure, label)
    for reason in _other_types(model, structure, label):
        raise ValueError(reason)
    # All is checked before anything is changed.
    modules = dict(model.named_modules())
    sizes = {name: _checked_sizes(modules[name], name, entry, label) for name, entry in structure.items()}
    tensors = _checked_tensors(model, sizes, arrays, dtypes, label)
    for name, numbers in sizes.items():
        for key, value in numbers.items():
            setattr(modules[name], key, value)
    _assign(model, tensors)
    return model.eval()


def _misfits(model: nn.Module, structure: Mapping[str, Any], foldings: Mapping[str, int], label: str) -> list[str]:
    """Return what to say of every module in the file that the network, still without low-rank layers, does not fit."""
    outside = {name: entry for name, entry in structure.items() if not is_part(name, foldings)}
    reasons = (misfit(model, name, foldings[name], label) for name in outermost(foldings))
    return [*_other_types(model, outside, label), *(reason for reason in reasons if reason)]


def _other_types(model: nn.Module, structure: Mapping[str, Any], label: str) -> list[str]:
    """Return what to say of every module in the file that the network lacks, or has as another type."""
    modules = dict(model.named_modules())
    reasons = []
    for name, entry in structure.items():
        found = type(modules[name]).__name__ if name in modules else "nothing"
        if found != entry.get("type"):
            stated = shortened(ascii(str(entry.get("type")))[1:-1])
            reasons.append(f"{label}: module {name!r} is a {stated}, the factory's network has {found}")
    return reasons


def _checked_sizes(module: nn.Module, name: str, entry: Mapping[str, Any], label: str) -> dict[str, int]:
    """Return a module's sizes in the file, each an integer that the module has, and at most as large as there."""
    for key, value in entry["sizes"].items():
        full = vars(module).get(key)
        if type(full) is not int or type(value) is not int or not 1 <= value <= full:
            raise ValueError(
                f"{label}: module {name!r} has the size {shortened(key)}={shortened(repr(value))}, expected a whole "
                f"number from 1 to the {shortened(key)}={full!r} of the factory's {type(module).__name__}"
            )
    sizes = {key: value for key, value in vars(module).items() if type(value) is int} | entry["sizes"]
    if isinstance(module, SlicedLinear):
        ends, blocks = (sizes["in_features"], sizes["out_features"]), sizes["slices"]
    elif isinstance(module, nn.modules.conv._ConvNd):
        ends, blocks = (sizes["in_channels"], sizes["out_channels"]), sizes["groups"]
    else:
        return dict(entry["sizes"])
    if any(end % blocks for end in ends):
        raise ValueError(f"{label}: module {name!r} has sizes that do not fit together: {entry['sizes']}")
    return dict(entry["sizes"])


def _shapes(module: nn.Module, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a layer that pruning can cut, at these sizes; all others stay as they are."""
    size: dict[str, Any] = {**vars(module), **sizes}
    if isinstance(module, RECURRENT):
        if recurrent_fault(module):
            return {}
        rows = len(module.get_parameter("weight_hh_l0")) // module.hidden_size * size["hidden_size"]
        return {
            "weight_ih_l0": (rows, size["input_size"]),
            "weight_hh_l0": (rows, size["hidden_size"]),
            "bias_ih_l0": (rows,),
            "bias_hh_l0": (rows,),
        }
    if isinstance(module, SlicedLinear):
        slices = size["slices"]
        return {"weight": (slices, size["in_features"] // slices, size["out_features"] // slices)}
    if isinstance(module, nn.Linear):
        return {"weight": (size["out_features"], size["in_features"]), "bias": (size["out_features"],)}
    if isinstance(module, nn.modules.conv._ConvNd):
        outputs, inputs, blocks = size["out_channels"], size["in_channels"], size["groups"]
        ends = (inputs, outputs // blocks) if isinstance(module, _TRANSPOSED) else (outputs, inputs // blocks)
        return {"weight": (*ends, *module.kernel_size), "bias": (outputs,)}
    if isinstance(module, CARRIERS):
        width = size["num_parameters" if isinstance(module, nn.PReLU) else "num_features"]
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    return {}


def _checked_tensors(
    model: nn.Module,
    sizes: Mapping[str, Mapping[str, int]],
    arrays: Mapping[str, np.ndarray],
    dtypes: Mapping[str, Any],
    label: str,
) -> dict[str, Tensor]:
    """Return the file's tensors, which are those of the network, in the shapes that the sizes say."""
    state = model.state_dict()
    names = {key.removeprefix("tensor:") for key in arrays}
    if names != set(state) or set(dtypes) != names:
        missing, extra = sorted(set(state) - names), sorted((names | set(dtypes)) - set(state))
        raise ValueError(f"{label}: does not fit the factory's network (missing {missing[:3]}, unknown {extra[:3]})")
    tensors = {}
    shapes = {name: _shapes(module, sizes.get(name, {})) for name, module in model.named_modules()}
    for name, old in state.items():
        owner, _, key = name.rpartition(".")
        shape = shapes.get(owner, {}).get(key, tuple(old.shape))
        array = arrays[f"tensor:{name}"]
        if array.shape != shape:
            raise ValueError(
                f"{label}: {name!r} has shape {array.shape}, expected {shape} (it is {tuple(old.shape)} in the "
                "factory's network)"
            )
        tensors[name] = _to_tensor(array, dtypes[name], f"{label}: {name!r}")
    for name, module in model.named_modules():
        if isinstance(module, HeadAttention):
            numbers = {"num_heads": module.num_heads, "head_dim": module.head_dim, **sizes.get(name, {})}
            queries = f"{name}.q_proj." if name else "q_proj."
            weights = [key for key in tensors if key.startswith(queries) and key.endswith("weight")]
            inner = tensors[weights[-1]].shape[0]  # the queries' layer may be a low-rank one, whose last part counts
            if inner != numbers["num_heads"] * numbers["head_dim"]:
                raise ValueError(
                    f"{label}: {name!r} has {numbers['num_heads']} heads of {numbers['head_dim']} nodes and queries of "
                    f"{inner} nodes"
                )
    return tensors


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors in place; parameters that modules of the network share stay shared."""
    modules = dict(model.named_modules())
    made: dict[int, nn.Parameter] = {}
    for name, old in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        module, tensor = modules[owner], tensors[name]
        if key not in module._parameters:
            module._buffers[key] = tensor
            continue
        new = made.get(id(old))
        if new is None or not torch.equal(new, tensor):
            new = made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        module._parameters[key] = new
    for module in modules.values():
        if isinstance(module, RECURRENT):
            module._init_flat_weights()


def _to_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Return an array NumPy can store (bfloat16 as its bits) and the dtype's name."""
    flat = tensor.detach().cpu().contiguous()
    name = str(flat.dtype).removeprefix("torch.")
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), name


def _to_tensor(array: np.ndarray, dtype: Any, label: str) -> Tensor:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{label} has the dtype {shortened(repr(dtype))}, which torch does not know")
    tensor = torch.from_numpy(array)
    if kind == torch.bfloat16 and tensor.dtype == torch.int16:
        return tensor.view(torch.bfloat16)
    if tensor.dtype != kind:
        raise ValueError(f"{label} is stored as {tensor.dtype}, the header says {dtype}")
    return tensor
