"""What a network costs, in FLOPs, parameters or nodes, as a function of the widths of its groups.

FLOPs are those of `torch.utils.flop_counter`: two for every multiply-add of a matrix product or convolution, nothing
for activations, batch norms, pooling and biases; for one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.groups import find_groups
from specprune.compress.layers import input_width, layer_names
from specprune.compress.surgery import RECURRENT, Group
from specprune.compress.tracing import small_batch

MEASURES = ("flops", "params", "nodes")
Shares = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class CostTerm:
    """A part of the cost that grows with what is left of a module's inputs, of its outputs, or of both.

    Args:
        cost: of the full network.
        inputs: groups that the inputs belong to, each with the share of the inputs that it makes up.
        outputs: the same for the outputs.
    """

    cost: float
    inputs: Shares = ()
    outputs: Shares = ()


@dataclass(frozen=True)
class CostModel:
    """Cost as a function of widths: the sum over terms of cost * (kept share of inputs) * (kept share of outputs).

    Args:
        full: group name to its full width.
        terms: parts of the cost.
    """

    full: dict[str, int]
    terms: tuple[CostTerm, ...]

    def total(self, widths: Mapping[str, int] | None = None) -> float:
        """Return the cost at these widths (one for every group), or of the full network."""
        if widths is None:
            return float(self._arrays[0].sum())
        cost, inputs, outputs = self._arrays
        gone = self._gone(widths)
        return float((cost * (1.0 - inputs @ gone) * (1.0 - outputs @ gone)).sum())

    def changes(self, widths: Mapping[str, int]) -> dict[str, tuple[float, float]]:
        """Return how the cost changes with each group alone, exactly.

        With a further fraction t of group g gone, the cost falls by first * t - second * t^2.

        Args:
            widths: the widths to start from.

        Returns:
            Group name to (first, second).
        """
        cost, inputs, outputs = self._arrays
        gone = self._gone(widths)
        first = inputs.T @ (cost * (1.0 - outputs @ gone)) + outputs.T @ (cost * (1.0 - inputs @ gone))
        second = (inputs * outputs).T @ cost
        return {name: (float(a), float(b)) for name, a, b in zip(self.full, first, second, strict=True)}

    def _gone(self, widths: Mapping[str, int]) -> np.ndarray:
        return np.array([1.0 - widths[name] / full for name, full in self.full.items()])

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The terms as arrays: (terms,) costs and two (terms, groups) matrices of shares."""
        place = {name: index for index, name in enumerate(self.full)}
        inputs, outputs = np.zeros((len(self.terms), len(place))), np.zeros((len(self.terms), len(place)))
        for row, term in enumerate(self.terms):
            for matrix, shares in ((inputs, term.inputs), (outputs, term.outputs)):
                for group, share in shares:
                    matrix[row, place[group]] += share
        return np.array([term.cost for term in self.terms]), inputs, outputs


def cost_model(model: nn.Module, data: CalibrationData, groups: Sequence[Group], measure: str) -> CostModel:
    """Return the cost of a network as a function of its groups' widths.

    Args:
        model: the network; left as it is.
        data: calibration data; one sample is run to count FLOPs.
        groups: from `find_groups`.
        measure: "flops", "params" or "nodes" (units of the groups).

    Raises:
        ValueError: an unknown measure, or layers whose FLOPs the counter does not see.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: expected one of {MEASURES}")
    full = {group.name: group.width for group in groups}
    if measure == "nodes":
        return CostModel(full, tuple(CostTerm(float(group.width), (), ((group.name, 1.0),)) for group in groups))
    inputs, outputs = layer_shares(model, groups)
    terms: list[CostTerm] = []
    if measure == "flops":
        counts = module_flops(model, data)
        counts |= {name: 0 for name in layer_names(model) if name not in counts and _is_empty(model, name)}
        missing = [group.name for group in groups if not any(part.module in counts for part in group.producers)]
        if missing:
            raise ValueError(f"the FLOPs of the layers {missing} could not be counted; use measure='params' or 'nodes'")
        for name, flops in counts.items():
            terms += _module_terms(model.get_submodule(name), float(flops), inputs.get(name, ()), outputs.get(name, ()))
        return CostModel(full, tuple(terms))
    counted: set[int] = set()  # tied tensors count once, as in `count_params`
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            size, own = float(parameter.numel()), outputs.get(name, ())
            if parameter.dim() == 1:
                terms.append(CostTerm(size, (), own))
            else:
                terms.append(CostTerm(size, own if "_hh_" in key else inputs.get(name, ()), own))
    return CostModel(full, tuple(terms))


def _is_empty(model: nn.Module, name: str) -> bool:
    return model.get_submodule(name).get_parameter("weight").numel() == 0


def layer_shares(model: nn.Module, groups: Sequence[Group]) -> tuple[dict[str, Shares], dict[str, Shares]]:
    """Return which groups make up which share of each module's inputs and of its outputs."""
    inputs: dict[str, Shares] = {}
    outputs: dict[str, Shares] = {}
    owners: dict[str, list[str]] = {}
    for group in groups:
        for entry in group.consumers:
            module = model.get_submodule(entry.module)
            width = module.input_size if isinstance(module, RECURRENT) else input_width(module)  # type: ignore[arg-type]
            inputs[entry.module] = (*inputs.get(entry.module, ()), (group.name, entry.index.size / width))
        for entry in (*group.producers, *group.carriers):
            share = entry.index.size / _output_width(model.get_submodule(entry.module))
            outputs[entry.module] = (*outputs.get(entry.module, ()), (group.name, share))
        if group.kind == "heads":  # the attention itself, counted where the projections are
            owners.setdefault(group.producers[0].module.rpartition(".")[0], []).append(group.name)
    for owner, names in owners.items():
        outputs.setdefault(owner, tuple((name, 1.0 / len(names)) for name in names))
    return inputs, outputs


def _output_width(module: nn.Module) -> int:
    for name in ("out_features", "out_channels", "num_features", "num_parameters", "hidden_size"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise TypeError(f"a {type(module).__name__} has no known width")


def _module_terms(module: nn.Module, flops: float, inputs: Shares, outputs: Shares) -> list[CostTerm]:
    if not isinstance(module, RECURRENT):
        return [CostTerm(flops, inputs, outputs)]
    share = module.input_size / (module.input_size + module.hidden_size)
    return [CostTerm(flops * share, inputs, outputs), CostTerm(flops * (1 - share), outputs, outputs)]


def smallest_fraction(model: nn.Module, data: CalibrationData, measure: str = "flops") -> float:
    """Return which fraction of the cost is left with one unit in every group: no budget below it can be met."""
    structure = find_groups(model, data)
    cost = cost_model(structure.prepared(model), data, structure.groups, measure)
    return cost.total(dict.fromkeys(cost.full, 1)) / cost.total()


class _Call(nn.Module):
    """A root for the FLOP counter, which knows only modules below the one whose forward runs first."""

    def __init__(self, model: nn.Module, data: CalibrationData) -> None:
        super().__init__()
        self.model = model
        self.data = data

    def forward(self, batch: Any) -> Any:
        return self.data.call(self.model, batch)


def module_flops(model: nn.Module, data: CalibrationData) -> dict[str, int]:
    """Return the FLOPs of one sample by the module that does them; the empty name is what no submodule does."""
    call = _Call(copy.deepcopy(model).eval(), data)
    batch = small_batch(data.first())
    counter = FlopCounterMode(display=False)
    recurrent: dict[str, int] = {}
    for name, module in call.model.named_modules():
        if isinstance(module, RECURRENT):
            module.register_forward_pre_hook(_recurrent_counter(name, recurrent))
    # Without gradients transformers take a path that the counter does not see, nor does it see attention in one kernel.
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        call(batch)
    counts = {path: sum(by_operation.values()) for path, by_operation in counter.get_flop_counts().items()}
    names = {f"_Call.model.{name}": name for name, _ in call.model.named_modules() if name}
    own = {name: counts.get(path, 0) for path, name in names.items()}
    for path, name in names.items():  # what a module's children do is theirs
        parent = name.rpartition(".")[0]
        if parent and own[parent]:
            own[parent] -= counts.get(path, 0)
    own[""] = counter.get_total_flops() - sum(own.values())
    own.update(recurrent)
    return {name: flops // batch_size(batch) for name, flops in own.items() if flops}


def _recurrent_counter(name: str, into: dict[str, int]) -> Any:
    """Return a hook that counts a recurrent layer's matrix products, which its fused kernels hide from the counter."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
            into[name] = into.get(name, 0) + 2 * weights * (args[0].numel() // args[0].shape[-1])

    return before


def count_flops(model: nn.Module, data: CalibrationData) -> int:
    """Return the FLOPs of one sample (two a multiply-add; matrix products and convolutions only)."""
    return sum(module_flops(model, data).values())


def group_params(model: nn.Module, group: Group) -> int:
    """Return the number of parameters of the layers that make a group's units and of what carries them."""
    return sum(count_params(model.get_submodule(entry.module)) for entry in (*group.producers, *group.carriers))


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; buffers such as batch norm statistics are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())
