"""A network of low-rank layers fitted on data, each to what the layer gave in the original network.

1. Every layer's fits are scored by their residual on the inputs that it has now (`low_rank_fit`).
2. Two measurements a layer turn residuals into the divergence of the network's outputs.
3. `sum_cuts` spends the budget where it lowers the sum of these divergences most.
4. In the order in which they run, layers are replaced and fitted on the inputs that the network gives by then; layers
   that stay as they are get a refit, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from specprune.compress.batches import CalibrationData
from specprune.compress.capture import capture
from specprune.compress.cost import count_params, module_flops
from specprune.compress.divergence import Reference
from specprune.compress.layers import get_layer, input_width, is_refittable, weight_matrix
from specprune.compress.low_rank_allocation import Cut, Frontier, sum_cuts
from specprune.compress.low_rank_cost import layer_costs
from specprune.compress.low_rank_fit import fit_options, fit_problem, place_fit
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.low_rank_network import rank_budget, replace_layer, replaceable_layers
from specprune.compress.low_rank_parts import Factorable
from specprune.compress.reconstruction import Problem, collect_problems, refit
from specprune.compress.sensitivity import power_law
from specprune.compress.surgery import Group, Skipped
from specprune.compress.targets import Targets
from specprune.compress.tracing import small_batch, trace

CALIBRATION_COSTS = (0.15, 0.4)  # of a layer's own: where its divergence is measured
_SAMPLES = 500  # on which divergences are measured


@dataclass(frozen=True)
class FittedLayer:
    """What happened to one layer.

    Args:
        layer: its name.
        slices: number of slices k of the input channels; None where the layer stays as it is.
        rank: rank j of each slice; None likewise.
        cost_before: cost of the layer, in the measure of the budget.
        cost_after: the same, after.
        divergence: predicted divergence of the network's outputs from this layer alone (nats).
        residual: what its refit leaves of the variance of its targets, on the inputs that it has in the end.
    """

    layer: str
    slices: int | None
    rank: int | None
    cost_before: int
    cost_after: int
    divergence: float
    residual: float


@dataclass(frozen=True, eq=False)
class Start:
    """A network whose layers are to be replaced, and what they are to give.

    Args:
        model: the network as it is, in evaluation mode: the original, or one that has lost nodes.
        original: the network whose outputs are the targets, in evaluation mode.
        unfitted: the original with the same nodes removed and nothing refitted; the original itself if none are.
        rows: layer to the original outputs that it still has, where it has lost some.
    """

    model: nn.Module
    original: nn.Module
    unfitted: nn.Module
    rows: Mapping[str, torch.Tensor]

    @classmethod
    def whole(cls, model: nn.Module) -> Start:
        """Return the start from a network that has all its nodes."""
        original = copy.deepcopy(model).eval()
        return cls(original, original, original, {})


class FittedNetworks:
    """The low-rank versions of one network, which is measured once.

    Args:
        start: the network.
        data: calibration data.
        measure: "params" or "flops".
        positions: output positions per image that the least squares of a convolution sees; None takes all.
        ridge: relative ridge of the least squares.
        seed: of the positions.

    Raises:
        ValueError: NaN or Inf in the inputs of a layer, which is named.
    """

    @torch.no_grad()
    def __init__(
        self, start: Start, data: CalibrationData, measure: str, positions: int | None, ridge: float, seed: int
    ) -> None:
        self.start, self.data, self.ridge, self.measure = start, data, ridge, measure
        batch = small_batch(data.first())
        seen = trace(start.model, data, batch)
        free = [n for n in seen.order if is_refittable(start.model.get_submodule(n)) and n not in seen.blocked]
        self.norms = {
            layer: norm
            for layer, norm in seen.direct.items()
            if getattr(start.model.get_submodule(norm), "running_var", None) is not None and norm not in seen.blocked
        }
        shown = capture(start.original, free, data, batch, norms=self.norms, to_the_end=True) if free else {}
        self.targets = Targets(
            start.original,
            data,
            free,
            self.norms,
            [name for name in free if shown[name].shortcut is not None],
            positions=positions,
            seed=seed,
            rows=start.rows,
        )
        self.order = tuple(free)
        replaceable, skipped = replaceable_layers(start.model, set(seen.order), data)
        self.skipped = (*skipped, *(Skipped(n, seen.blocked[n]) for n in replaceable if n in seen.blocked))
        spectra = [
            LayerSpectra(name, cast(Factorable, start.model.get_submodule(name)))
            for name in free
            if name in replaceable
        ]
        flops = module_flops(start.model, data) if measure == "flops" else None
        self.whole = count_params(start.model) if flops is None else sum(flops.values())
        self.problems = collect_problems(self.targets, start.model, data, free)
        self.costs = {cost.spectra.name: cost for cost in layer_costs(start.model, spectra, flops, data)}
        self.frontiers: dict[str, Frontier] = {}
        for name, cost in self.costs.items():
            fits = fit_problem(start.model, self.problems[name], self.norms.get(name), ridge)
            self.frontiers[name] = Frontier.of(fit_options(fits, cost), cost.dense)
        self.losses = self._calibrated()

    def _calibrated(self) -> dict[str, np.ndarray]:
        """Return each layer's predicted divergences, one for each choice of its frontier."""
        reference = Reference(self.start.model, self.data, _SAMPLES)
        found = {}
        for name, frontier in tqdm(self.frontiers.items(), desc="calibrating ranks", leave=False, disable=None):
            places = [
                int(np.searchsorted(frontier.costs[:-1], share * frontier.costs[-1], side="right")) - 1
                for share in CALIBRATION_COSTS
            ]
            points = []
            for place in sorted({max(place, 0) for place in places} if len(frontier.costs) > 1 else ()):
                work = copy.deepcopy(self.start.model)
                work, _ = self._replaced(work, name, self.problems[name], cast(Cut, frontier.cuts[place]))
                points.append((float(frontier.scores[place]), reference.divergence(work)))
            losses = power_law(points)(frontier.scores)
            losses[-1] = 0.0
            found[name] = np.maximum.accumulate(losses[::-1])[::-1]
        return found

    def _replaced(self, work: nn.Module, name: str, problem: Problem, cut: Cut) -> tuple[nn.Module, float]:
        """Return the network with one layer replaced, and the residual of its fit."""
        norm = self.norms.get(name)
        fit = fit_problem(work, problem, norm, self.ridge).fit(cut.slices, cut.rank)
        return replace_layer(work, name, place_fit(work, problem, fit, norm, self.start.unfitted)), fit.residual

    @torch.no_grad()
    def make(self, keep: float, whole: int | None = None) -> tuple[nn.Module, tuple[FittedLayer, ...]]:
        """Return the network at a budget, in evaluation mode, with what happened to each layer.

        Args:
            keep: fraction of the cost to keep.
            whole: the cost that this is a fraction of; that of the start if None.

        Raises:
            ValueError: the budget cannot be met.
        """
        names = list(self.frontiers)
        own = list(self.frontiers.values())
        share = keep if whole is None else min(1.0, keep * whole / self.whole)
        budget = rank_budget(own, share, self.whole, f"{self.measure}, low rank", self.skipped)
        predicted = [replace(self.frontiers[name], scores=self.losses[name]) for name in names]
        cuts = dict(zip(names, sum_cuts(predicted, budget), strict=True))
        work, changed, rows = copy.deepcopy(self.start.model), False, []
        for name in self.order:
            cut = cuts.get(name)
            residual = 0.0
            if cut is not None or changed:
                problem = collect_problems(self.targets, work, self.data, [name])[name] if changed else None
                problem = problem or self.problems[name]
                if cut is not None:
                    work, residual = self._replaced(work, name, problem, cut)
                    changed = True
                else:
                    kept = np.arange(input_width(get_layer(work, name)))
                    refit(work, problem, kept, self.norms.get(name), self.ridge, self.start.unfitted)
                    residual = fit_problem(work, problem, self.norms.get(name), self.ridge).floor()
            elif self.start.rows:
                residual = fit_problem(work, self.problems[name], self.norms.get(name), self.ridge).floor()
            if name in self.frontiers:
                place = self.frontiers[name].cuts.index(cut)
                costs = self.frontiers[name].costs
                rows.append(
                    FittedLayer(
                        name,
                        None if cut is None else cut.slices,
                        None if cut is None else cut.rank,
                        int(costs[-1]),
                        int(costs[place]),
                        float(self.losses[name][place]),
                        residual,
                    )
                )
        return work, tuple(rows)


def kept_rows(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return which of its outputs each layer still has after nodes were removed.

    Args:
        model: the network before that.
        groups: of its nodes.
        kept: group name to the units that are left.
    """
    gone: dict[str, list[np.ndarray]] = {}
    for group in groups:
        drop = np.setdiff1d(np.arange(group.width), kept[group.name])
        for entry in group.producers:
            gone.setdefault(entry.module, []).append(entry.index[drop].ravel())
    rows = {}
    for name, parts in gone.items():
        if is_refittable(model.get_submodule(name)):
            outputs = len(weight_matrix(get_layer(model, name)))
            rows[name] = torch.as_tensor(np.setdiff1d(np.arange(outputs), np.concatenate(parts)))
    return rows
