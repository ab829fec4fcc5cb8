"""What the interactive report shows of one network: results that exist already, and the nodes that can be pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from specprune._records import format_table, jsonable, to_json
from specprune.analysis import BoundTable, Spectra, Tradeoff
from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.bounds.spectral import paper_width
from specprune.compress.allocation import lambda_allocation
from specprune.compress.batches import CalibrationData
from specprune.compress.context import make_context
from specprune.compress.cost import CostModel, cost_model, count_flops, count_params
from specprune.compress.groups import find_groups
from specprune.compress.report import PruneReport
from specprune.compress.settings import Settings

# The relative lambdas of the slider, 20 a decade.  The page gets these numbers and computes no powers of its own.
LAMBDAS = tuple(float(10.0 ** (k / 20)) for k in range(-160, 1))
START = LAMBDAS.index(1e-4)


@dataclass(frozen=True)
class NodeGroup:
    """One set of nodes that pruning makes smaller, with its spectrum as pruning sees it.

    Args:
        name: the layer that makes the nodes.
        readers: the layers that read them.
        eigenvalues: (m,) of the nodes' noncentred covariance (the mean over the readers), falling.
    """

    name: str
    readers: tuple[str, ...]
    eigenvalues: np.ndarray

    @property
    def width(self) -> int:
        """Number of nodes m."""
        return len(self.eigenvalues)

    @property
    def trace(self) -> float:
        """Tr Sigma, the mean square norm of the nodes."""
        return float(self.eigenvalues.sum())


@dataclass(frozen=True)
class PrunableNodes:
    """All nodes that can be pruned, and what the network costs when few of them are kept.

    Args:
        groups: the groups, in the order in which they are read.
        flops: FLOPs of one sample as a function of the widths.
        params: number of parameters as a function of the widths.
    """

    groups: tuple[NodeGroup, ...]
    flops: CostModel
    params: CostModel

    def widths(self, lam: float) -> dict[str, int]:
        """Return how many nodes each group keeps: ceil(N(lam Tr Sigma)), as `prune` with allocation="dof" and `lam`.

        Args:
            lam: relative lambda > 0.
        """
        full = {group.name: group.width for group in self.groups}
        spectra = {group.name: group.eigenvalues for group in self.groups}
        return lambda_allocation(full, spectra, lam, theory=False).widths

    def at(self, lam: float) -> list[dict[str, Any]]:
        """Return one record a group: lambda, degrees of freedom, nodes kept, and nodes that the theorem asks for.

        "theorem" is ceil(5 N ln(80 N)), which may be more than there are (the group then stays whole); None where
        lambda exceeds the largest eigenvalue, of which the theorem does not speak.

        Args:
            lam: relative lambda > 0.
        """
        widths = self.widths(lam)
        records = []
        for group in self.groups:
            level = lam * group.trace
            dof = degrees_of_freedom(group.eigenvalues, level)
            records.append(
                {
                    "group": group.name,
                    "readers": ", ".join(group.readers),
                    "width": group.width,
                    "lam": level,
                    "dof": dof,
                    "kept": widths[group.name],
                    "share": widths[group.name] / group.width,
                    "theorem": None if level > group.eigenvalues[0] else paper_width(dof),
                }
            )
        return records

    def costs(self, lam: float) -> dict[str, float]:
        """Return the FLOPs and parameters left at the widths of a relative lambda, as numbers and as fractions."""
        widths = self.widths(lam)
        flops, params = self.flops.total(widths), self.params.total(widths)
        return {
            "flops": flops,
            "flops_kept": flops / self.flops.total(),
            "params": params,
            "params_kept": params / self.params.total(),
        }


def prunable_nodes(model: nn.Module, batches: Iterable[Any] | CalibrationData, seed: int = 0) -> PrunableNodes:
    """Return the groups of nodes of a network with their spectra, exactly as `prune` measures them.

    Args:
        model: the network; left as it is.
        batches: calibration data, re-iterable.
        seed: of random choices.

    Raises:
        ValueError: nothing can be pruned, or nodes that are zero on all data.
    """
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches)
    structure = find_groups(model, data)
    settings = Settings(allocation="dof", selection="greedy", reconstruction="channel", seed=seed)
    context = make_context(model, data, structure, settings, None, None)
    groups = tuple(
        NodeGroup(
            group.name,
            tuple(entry.module for entry in group.consumers),
            context.statistics[group.name].spectrum,
        )
        for group in structure.groups
    )
    flops, params = (cost_model(context.original, data, structure.groups, measure) for measure in ("flops", "params"))
    return PrunableNodes(groups, flops, params)


def network_facts(model: nn.Module, batches: Iterable[Any] | CalibrationData) -> dict[str, Any]:
    """Return what a network is: its class and layers, its number of parameters, and its FLOPs for one sample.

    Args:
        model: the network; left as it is.
        batches: data, of which one sample is run.
    """
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches)
    layers = Counter(type(module).__name__ for module in model.modules() if not list(module.children()))
    listed = ", ".join(f"{count} {name}" for name, count in layers.items())
    return {
        "layers": f"{type(model).__name__}: {listed}",
        "parameters": count_params(model),
        "FLOPs for one sample": count_flops(model, data),
    }


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Args:
        title: what the network is called.
        facts: name to value, for the head of the page: the network, the data, errors, versions, seed.
        spectra: of all layers' inputs.
        nodes: the groups that can be pruned; None where there are none.
        tradeoff: the trade-off curve, if there is one.
        bounds: the table of bounds, if there is one.
        prune: what pruning did, if it was done.
        notes: what is missing, and why.

    Raises:
        ValueError: no layer.
    """

    title: str
    facts: dict[str, Any]
    spectra: Spectra
    nodes: PrunableNodes | None = None
    tradeoff: Tradeoff | None = None
    bounds: BoundTable | None = None
    prune: PruneReport | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not len(self.spectra):
            raise ValueError("spectra has no layer: a report needs at least one; pass the result of layer_spectra")

    def embedded(self) -> dict[str, Any]:
        """Return the numbers that the page computes with, in types that JSON has."""
        nodes = self.nodes
        return jsonable(
            {
                "lambdas": LAMBDAS,
                "start": START,
                "layers": [_spectrum(entry.layer, entry.eigenvalues) for entry in self.spectra.values()],
                "groups": [] if nodes is None else [_spectrum(group.name, group.eigenvalues) for group in nodes.groups],
                "flops": None if nodes is None else _terms(nodes.flops),
                "params": None if nodes is None else _terms(nodes.params),
            }
        )

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer, as `Spectra.to_records` does."""
        return self.spectra.to_records()

    def to_json(self) -> str:
        """Return all results as JSON: records of the tables, and what the page computes with."""
        parts = {"tradeoff": self.tradeoff, "bounds": self.bounds, "prune": self.prune}
        return to_json(
            {
                "title": self.title,
                "facts": self.facts,
                "notes": self.notes,
                "spectra": self.spectra.to_records(),
                "nodes": None if self.nodes is None else self.nodes.at(LAMBDAS[START]),
                **{name: None if part is None else part.to_records() for name, part in parts.items()},
                "embedded": self.embedded(),
            }
        )

    def __str__(self) -> str:
        parts = [format_table([{"what": name, "value": value} for name, value in self.facts.items()], title=self.title)]
        parts.append(str(self.spectra))
        if self.nodes is not None:
            title = f"nodes at lambda = {LAMBDAS[START]:g} of each group's trace"
            parts.append(format_table(self.nodes.at(LAMBDAS[START]), title=title))
        parts += [str(part) for part in (self.prune, self.bounds, self.tradeoff) if part is not None]
        return "\n\n".join([*parts, *self.notes])


def _spectrum(name: str, eigenvalues: np.ndarray) -> dict[str, Any]:
    return {"name": name, "trace": float(eigenvalues.sum()), "eigenvalues": eigenvalues}


def _terms(cost: CostModel) -> list[dict[str, Any]]:
    """Return a cost model's terms with groups by their place, as the page reads them."""
    place = {name: index for index, name in enumerate(cost.full)}
    return [
        {
            "cost": term.cost,
            "inputs": [[place[name], share] for name, share in term.inputs],
            "outputs": [[place[name], share] for name, share in term.outputs],
        }
        for term in cost.terms
    ]
