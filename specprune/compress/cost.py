"""What a network costs, in FLOPs, parameters or nodes, as a function of the widths of its groups.

FLOPs are those of `torch.utils.flop_counter`: two for every multiply-add of a matrix product or convolution, nothing
for activations, batch norms, pooling and biases; for one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from specprune.compress.batches import CalibrationData, batch_size
from specprune.compress.groups import Group, find_groups

MEASURES = ("flops", "params", "nodes")


@dataclass(frozen=True)
class CostTerm:
    """A part of the cost that grows with the kept fraction of the input group, of the output group, or of both."""

    cost: float
    source: str | None
    target: str | None


@dataclass(frozen=True)
class CostModel:
    """Cost as a function of widths: the sum over terms of cost * (kept fraction in) * (kept fraction out).

    Args:
        full: group name to its full width.
        terms: parts of the cost.
    """

    full: dict[str, int]
    terms: tuple[CostTerm, ...]

    def total(self, widths: Mapping[str, int] | None = None) -> float:
        """Return the cost at these widths (one for every group), or of the full network."""
        kept = dict(self.full) if widths is None else widths

        def fraction(group: str | None) -> float:
            return 1.0 if group is None else kept[group] / self.full[group]

        return sum(term.cost * fraction(term.source) * fraction(term.target) for term in self.terms)


def cost_model(model: nn.Module, data: CalibrationData, groups: Sequence[Group], measure: str) -> CostModel:
    """Return the cost of a chain network as a function of its groups' widths.

    Args:
        model: the network; left as it is.
        data: calibration data; one sample is run to count FLOPs.
        groups: from `find_groups`.
        measure: "flops", "params" or "nodes" (nodes of the groups).

    Raises:
        ValueError: an unknown measure, or layers whose FLOPs the counter does not see.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: expected one of {MEASURES}")
    full = {group.name: group.width for group in groups}
    if measure == "nodes":
        return CostModel(full, tuple(CostTerm(float(group.width), None, group.name) for group in groups))
    feeds = {group.consumer: group.name for group in groups}
    owns = {name: group.name for group in groups for name in (group.name, *group.norms)}
    if measure == "flops":
        counts = module_flops(model, data)
        missing = [group.name for group in groups if group.name not in counts]
        if missing:
            raise ValueError(f"the FLOPs of the layers {missing} could not be counted; use measure='params' or 'nodes'")
        terms = [CostTerm(float(flops), feeds.get(name), owns.get(name)) for name, flops in counts.items()]
        return CostModel(full, tuple(terms))
    terms = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            source = feeds.get(name) if parameter.dim() > 1 else None
            terms.append(CostTerm(float(parameter.numel()), source, owns.get(name)))
    return CostModel(full, tuple(terms))


def smallest_fraction(model: nn.Module, data: CalibrationData) -> float:
    """Return which fraction of a chain's FLOPs is left with one node in every group: no budget below it can be met."""
    cost = cost_model(model, data, find_groups(model, data), "flops")
    return cost.total(dict.fromkeys(cost.full, 1)) / cost.total()


class _Call(nn.Module):
    """A root for the FLOP counter, which knows only modules below the one whose forward runs first."""

    def __init__(self, model: nn.Module, data: CalibrationData) -> None:
        super().__init__()
        self.model = model
        self.data = data

    def forward(self, batch: Any) -> Any:
        return self.data.call(self.model, batch)


@torch.no_grad()
def module_flops(model: nn.Module, data: CalibrationData) -> dict[str, int]:
    """Return the FLOPs of one sample by the module that does them; the empty name is what no submodule does."""
    call = _Call(copy.deepcopy(model).eval(), data)
    batch = data.first()
    counter = FlopCounterMode(display=False)
    with counter:
        call(batch)
    counts = {path: sum(by_operation.values()) for path, by_operation in counter.get_flop_counts().items()}
    names = {f"_Call.model.{name}": name for name, _ in call.model.named_modules() if name}
    own = {name: counts.get(path, 0) for path, name in names.items()}
    for path, name in names.items():  # what a module's children do is theirs
        parent = name.rpartition(".")[0]
        if parent and own[parent]:
            own[parent] -= counts.get(path, 0)
    own[""] = counter.get_total_flops() - sum(own.values())
    return {name: flops // batch_size(batch) for name, flops in own.items() if flops}


def count_flops(model: nn.Module, data: CalibrationData) -> int:
    """Return the FLOPs of one sample (two a multiply-add; matrix products and convolutions only)."""
    return sum(module_flops(model, data).values())


def group_params(model: nn.Module, group: Group) -> int:
    """Return the number of parameters of a group's own layer and its batch norms."""
    return sum(count_params(model.get_submodule(name)) for name in (group.name, *group.norms))


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; buffers such as batch norm statistics are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())
