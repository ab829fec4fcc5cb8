"""Pruned networks on disk: weights and structure in one file, without pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune._files import load_arrays, save_arrays
from specprune.compress.report import Pruned

FILE_KIND = "pruned network"
VERSION = 1
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_features")


def save_pruned(pruned: Pruned | nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a pruned network: its tensors, and which module has which sizes.

    Args:
        pruned: the result of `prune`, or its `model` (for example after fine-tuning).
        path: the file to write, whole or not at all.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    arrays, dtypes = {}, {}
    for name, tensor in model.state_dict().items():
        arrays[f"tensor:{name}"], dtypes[name] = _to_array(tensor)
    structure = {
        name: {"type": type(module).__name__, "sizes": {k: getattr(module, k) for k in _SIZES if hasattr(module, k)}}
        for name, module in model.named_modules()
        if any(hasattr(module, key) for key in _SIZES)
    }
    header = {"kind": FILE_KIND, "version": VERSION, "dtypes": dtypes, "structure": structure}
    save_arrays(path, arrays, header)


def load_pruned(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """Load a pruned network into the architecture that `factory` builds.

    Args:
        path: what `save_pruned` wrote.
        factory: returns a new, unpruned network; only its structure is used.

    Returns:
        The pruned network, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a pruned network, is damaged, or does not fit what the factory builds.
    """
    arrays, header = load_arrays(path, FILE_KIND)
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: format version {header.get('version')!r}, this program reads version {VERSION}")
    structure, dtypes = header.get("structure"), header.get("dtypes")
    if not isinstance(structure, dict) or not isinstance(dtypes, dict):
        raise ValueError(f"{path}: the header has no structure; the file is damaged")
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory() returned {type(model).__name__}, expected a torch.nn.Module")
    modules = dict(model.named_modules())
    for name, entry in structure.items():
        module = modules.get(name)
        if module is None or type(module).__name__ != entry.get("type"):
            found = "nothing" if module is None else type(module).__name__
            raise ValueError(f"{path}: module {name!r} is a {entry.get('type')}, the factory's network has {found}")
        for key, size in entry.get("sizes", {}).items():
            if key not in _SIZES or not isinstance(size, int) or size < 1:
                raise ValueError(f"{path}: module {name!r} has the size {key}={size!r}")
            setattr(module, key, size)
    state = model.state_dict()
    names = {key.removeprefix("tensor:") for key in arrays}
    if names != set(state) or set(dtypes) != names:
        missing, extra = sorted(set(state) - names), sorted(names - set(state))
        raise ValueError(f"{path}: does not fit the factory's network (missing {missing[:3]}, unknown {extra[:3]})")
    for name, old in state.items():
        tensor = _to_tensor(arrays[f"tensor:{name}"], dtypes[name], f"{path}: {name!r}")
        if tensor.dim() != old.dim() or any(new > full for new, full in zip(tensor.shape, old.shape, strict=True)):
            raise ValueError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, more than the full {tuple(old.shape)}")
        _assign(modules, name, tensor)
    return model.eval()


def _assign(modules: dict[str, nn.Module], name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = modules[owner]
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[key] = tensor


def _to_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Return an array NumPy can store (bfloat16 as its bits) and the dtype's name."""
    flat = tensor.detach().cpu().contiguous()
    name = str(flat.dtype).removeprefix("torch.")
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), name


def _to_tensor(array: np.ndarray, dtype: Any, label: str) -> Tensor:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{label} has the dtype {dtype!r}, which torch does not know")
    tensor = torch.from_numpy(array)
    if kind == torch.bfloat16 and tensor.dtype == torch.int16:
        return tensor.view(torch.bfloat16)
    if tensor.dtype != kind:
        raise ValueError(f"{label} is stored as {tensor.dtype}, the header says {dtype}")
    return tensor
