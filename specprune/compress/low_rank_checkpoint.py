"""Low-rank layers in the files of pruned networks: which layers of a network are such, and making room for them again.

A file names them with their foldings; their sizes are those of the two modules that each consists of, which it has like
those of any other module.  A part may be a low-rank layer, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from specprune._records import shortened
from specprune.compress.layers import input_width
from specprune.compress.low_rank_network import replace_layer
from specprune.compress.low_rank_parts import FIRST_AXES, FactoredLayer, PartSizes, SlicedLinear, empty_layer, refusal

_PARTS = (nn.Linear, nn.Conv2d, SlicedLinear, FactoredLayer)


def foldings_of(model: nn.Module) -> dict[str, int]:
    """Return the folding of every low-rank layer of a network that still is the two modules it was made of."""
    return {
        name: module.folding
        for name, module in model.named_modules()
        if isinstance(module, FactoredLayer)
        and module.folding is not None
        and len(module) == 2
        and all(type(part) in _PARTS for part in module)
    }


def check_foldings(header: Mapping[str, Any], label: str) -> dict[str, int]:
    """Return the foldings of the low-rank layers in a file's header; files without any may lack the entry.

    Raises:
        ValueError: they are no foldings.
    """
    found = header.get("low_rank", {})
    if not isinstance(found, dict) or not all(type(value) is int and value in FIRST_AXES for value in found.values()):
        raise ValueError(
            f"{label}: the header says {shortened(repr(found))} of its low-rank layers, expected one of the foldings "
            f"{tuple(FIRST_AXES)} for each; the file is damaged"
        )
    return found


def outermost(foldings: Mapping[str, int]) -> list[str]:
    """Return the low-rank layers that are no parts of others."""
    return [name for name in foldings if not is_part(name, foldings)]


def is_part(name: str, foldings: Mapping[str, int]) -> bool:
    """Return whether a module is inside a low-rank layer."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        if outer in foldings:
            return True
    return False


def misfit(model: nn.Module, name: str, folding: int, label: str) -> str | None:
    """Return why a network has no room for a low-rank layer, or None if it has.

    It has room where its module can be replaced, and where there are two parts already.
    """
    module = dict(model.named_modules()).get(name)
    reason = "there is no such module" if module is None else refusal(module)
    if isinstance(module, nn.Sequential) and len(module) == 2:
        if not isinstance(module, FactoredLayer) or module.folding in (folding, None):
            return None
        reason = f"it is one in folding {module.folding}, expected {folding}"
    if reason is None:
        return None
    return f"{label}: module {name!r} is a low-rank layer, for which the factory's network has no room: {reason}"


def place_low_rank(
    model: nn.Module, foldings: Mapping[str, int], structure: Mapping[str, Any], label: str
) -> nn.Module:
    """Return a copy of a network with low-rank layers of a file's sizes where it has them; they hold no memory yet.

    Args:
        model: the network of the factory.
        foldings: name to folding of the low-rank layers.
        structure: module name to its entry in the file, with "sizes".
        label: what messages call the file.

    Raises:
        ValueError: a layer is missing, or of another kind or too small.
    """
    work = copy.deepcopy(model)
    for name in sorted(foldings):  # a layer comes before its parts
        reason = misfit(work, name, foldings[name], label)
        if reason:
            raise ValueError(reason)
        layer = work.get_submodule(name)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            sizes = _checked_sizes(layer, name, foldings, structure, label)
            work = replace_layer(work, name, empty_layer(layer, foldings[name], sizes, "meta"))
    return work


def _checked_sizes(
    layer: nn.Linear | nn.Conv2d,
    name: str,
    foldings: Mapping[str, int],
    structure: Mapping[str, Any],
    label: str,
) -> PartSizes:
    """Return the sizes of a low-rank layer in the file, which fit together and are at most those of the layer."""
    inputs, slices, width = _ends(_part(name, 0), foldings, structure)
    again, _, outputs = _ends(_part(name, 1), foldings, structure)
    largest = {"inputs": input_width(layer), "width": layer.weight.numel(), "outputs": len(layer.weight)}
    found = {"inputs": inputs, "slices": slices, "width": width, "outputs": outputs}
    if (
        width != again
        or not all(type(value) is int and value >= 1 for value in found.values())
        or any(found[key] > most for key, most in largest.items())
        or inputs % slices
        or width % slices
    ):
        raise ValueError(
            f"{label}: module {name!r} is a low-rank layer of {inputs!r} inputs in {slices!r} slices, {width!r} nodes "
            f"that are made and {again!r} that are read between its parts, and {outputs!r} outputs; these do not fit "
            f"together, or not into the factory's {layer}"
        )
    return PartSizes(**found)


def _ends(name: str, foldings: Mapping[str, int], structure: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return what the file says of a part's inputs, slices and outputs."""
    if name in foldings:
        inputs, _, _ = _ends(_part(name, 0), foldings, structure)
        _, _, outputs = _ends(_part(name, 1), foldings, structure)
        return inputs, 1, outputs
    sizes = structure[name]["sizes"] if name in structure else {}
    inputs = sizes.get("in_features", sizes.get("in_channels"))
    outputs = sizes.get("out_features", sizes.get("out_channels"))
    return inputs, sizes.get("slices", sizes.get("groups", 1)), outputs


def _part(name: str, index: int) -> str:
    return f"{name}.{index}" if name else str(index)
