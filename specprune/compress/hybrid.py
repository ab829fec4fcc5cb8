"""Nodes or ranks: the widths that leave least predicted loss when the layers may become low-rank ones as well.

Both ways lower the same cost and add to the same loss: the divergence of the network's outputs, predicted for each
group of nodes and for each layer by two measurements.  Step by step, what adds least loss for the cost that it saves is
done: some nodes of a group leave, or a layer gets a lower rank.  With fractions a of its inputs and b of its outputs, a
layer costs a b times what it did, but with k slices of rank j only j (a columns + b k rows) times its runs: nodes
shrink both, and where they have shrunk it enough, a low-rank layer goes back to what it was.

Predictions are not certain, so that the network made in this way is measured against those that lose nodes alone or
ranks alone at the same cost, and the one whose outputs diverge least is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from specprune.bounds.nodes import WeightedNodes
from specprune.compress.allocation import Allocation, loss_allocation, width_grid
from specprune.compress.batches import CalibrationData
from specprune.compress.context import make_context
from specprune.compress.cost import CostModel, Shares, cost_model, layer_shares
from specprune.compress.divergence import Reference
from specprune.compress.fitted_network import FittedLayer, FittedNetworks, Start, kept_rows
from specprune.compress.groups import find_groups
from specprune.compress.low_rank_allocation import Frontier
from specprune.compress.low_rank_cost import LayerCost
from specprune.compress.planning import predicted_curves
from specprune.compress.report import GroupReport
from specprune.compress.settings import Settings
from specprune.compress.spectral import cut_network, group_reports, prune_groups
from specprune.compress.surgery import Group, Skipped, remove_nodes

_LOOK_AHEAD = 8  # grid steps of a group
_SAMPLES = 500  # on which the candidates are compared


@dataclass(frozen=True, eq=False)
class RankChoices:
    """What low rank offers for one layer of the whole network.

    Args:
        inner: (n,) cost of the first part of each choice, which reads the inputs; the last is the layer as it is.
        outer: (n,) cost of the second part, which makes the outputs.
        dense: cost of the layer as it is.
        losses: (n,) predicted divergences, falling to 0.
        inputs: groups that the layer reads, with their shares of its inputs.
        outputs: groups that it makes, with their shares of its outputs.
    """

    inner: np.ndarray
    outer: np.ndarray
    dense: float
    losses: np.ndarray
    inputs: Shares
    outputs: Shares

    @classmethod
    def of(
        cls, cost: LayerCost, frontier: Frontier, losses: np.ndarray, inputs: Shares, outputs: Shares
    ) -> RankChoices:
        """Return the choices on a layer's frontier."""
        inner, outer = np.zeros(len(losses)), np.zeros(len(losses))
        rows, _ = cost.spectra.folded_shape(0)
        for place, cut in enumerate(frontier.cuts):
            if cut is not None:
                outer[place] = cut.rank * cut.slices * rows * (cost.runs or 1)
                inner[place] = float(frontier.costs[place]) - outer[place]
        return cls(inner, outer, float(cost.dense), losses, inputs, outputs)

    def at(self, left: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return the choices' costs beyond the layer as it is, and their losses, both 0 where that is no cheaper.

        Args:
            left: group name to the fraction of its nodes that is left.
        """
        a = 1.0 - sum(share * (1.0 - left[name]) for name, share in self.inputs)
        b = 1.0 - sum(share * (1.0 - left[name]) for name, share in self.outputs)
        saved = self.inner * a + self.outer * b - self.dense * a * b
        saved[-1] = 0.0
        return np.minimum(saved, 0.0), np.where(saved < 0, self.losses, 0.0)


def hybrid_widths(
    cost: CostModel, losses: Mapping[str, np.ndarray], choices: Mapping[str, RankChoices], budget: float
) -> dict[str, int]:
    """Return how many nodes each group keeps when ranks may fall, too.

    Args:
        cost: of the network as a function of its widths.
        losses: group name to the (width + 1,) predicted loss with k nodes kept, not rising with k; entry 0 is unused.
        choices: layer name to what low rank offers.
        budget: what the network may cost.

    Raises:
        ValueError: with one node in every group and rank 1 everywhere the network still costs more.
    """
    grids = {name: width_grid(full) for name, full in cost.full.items()}
    places = {name: len(grid) - 1 for name, grid in grids.items()}
    ranks = {name: len(entry.losses) - 1 for name, entry in choices.items()}

    def widths(changed: str | None = None, place: int = 0) -> dict[str, int]:
        return {name: grid[place if name == changed else places[name]] for name, grid in grids.items()}

    def total(now: Mapping[str, int]) -> tuple[float, float]:
        """Return the cost and the loss at these widths and the ranks of the moment."""
        left = {name: now[name] / full for name, full in cost.full.items()}
        spent, lost = cost.total(now), sum(float(losses[name][now[name]]) for name in grids)
        for name, entry in choices.items():
            saved, loss = entry.at(left)
            spent += float(saved[ranks[name]])
            lost += float(loss[ranks[name]])
        return spent, lost

    spent, lost = total(widths())
    while spent > budget:
        steps: list[tuple[float, str, int, bool]] = []
        for name in grids:
            for place in range(places[name] - 1, max(-1, places[name] - 1 - _LOOK_AHEAD), -1):
                cheaper, more = total(widths(name, place))
                if cheaper < spent:
                    steps.append(((more - lost) / (spent - cheaper), name, place, True))
        left = {name: now / cost.full[name] for name, now in widths().items()}
        for name, entry in choices.items():
            saved, loss = entry.at(left)
            gain = saved[ranks[name]] - saved
            ratios = np.where(gain > 0, loss - loss[ranks[name]], np.inf) / np.where(gain > 0, gain, 1.0)
            best = int(np.argmin(ratios))
            if np.isfinite(ratios[best]):
                steps.append((float(ratios[best]), name, best, False))
        if not steps:
            raise ValueError(
                f"the budget is {budget:.0f}, but {spent:.0f} are left with one node in every group and rank 1 "
                "everywhere: ask for more"
            )
        _, name, place, is_group = min(steps)
        (places if is_group else ranks)[name] = place
        spent, lost = total(widths())
    return widths()


@dataclass(frozen=True)
class Hybrid:
    """A network that has lost nodes and ranks.

    Args:
        model: the network, in evaluation mode.
        groups: what happened to each group.
        layers: what happened to each layer of what was left.
        nodes: group name to the kept nodes.
    """

    model: nn.Module
    groups: tuple[GroupReport, ...]
    layers: tuple[FittedLayer, ...]
    nodes: dict[str, WeightedNodes]


class HybridNetworks:
    """The hybrids of one network, which is measured once.

    Args:
        model: the network; left as it is.
        data: calibration data.
        settings: the choices of the run.

    Raises:
        ValueError: nothing can be pruned, or what `prune` refuses.
    """

    def __init__(self, model: nn.Module, data: CalibrationData, settings: Settings) -> None:
        self.data = data
        self.settings = replace(settings, method="spectral")
        try:
            structure = find_groups(model, data)
        except ValueError as reason:
            raise ValueError(f"{reason}; method='fitted' removes no nodes") from reason
        self.context = make_context(model, data, structure, self.settings, None, None)
        self.curves = predicted_curves(self.context)
        original, groups = self.context.original, self.context.structure.groups
        self.reference = Reference(original, data, _SAMPLES)
        self.cost = cost_model(original, data, groups, settings.measure)
        self.fitted = self._fitted(Start.whole(original))
        inputs, outputs = layer_shares(original, groups)
        self.choices = {
            name: RankChoices.of(
                self.fitted.costs[name], frontier, self.fitted.losses[name], inputs.get(name, ()), outputs.get(name, ())
            )
            for name, frontier in self.fitted.frontiers.items()
        }

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may lose nodes."""
        return self.context.structure.groups

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What neither loses nodes nor ranks, and why."""
        return (*self.context.structure.skipped, *self.fitted.skipped)

    def make(self, keep: float) -> Hybrid:
        """Return the network at a budget: nodes and ranks together, or one of both alone, whichever diverges least.

        Args:
            keep: fraction of the cost to keep.

        Raises:
            ValueError: the budget cannot be met.
        """
        made: list[tuple[float, Hybrid]] = []
        refused: list[ValueError] = []
        for candidate in (self._both, self._nodes, self._ranks):
            try:
                network = candidate(keep)
            except ValueError as reason:
                refused.append(reason)
                continue
            made.append((self.reference.divergence(network.model), network))
        if not made:
            raise refused[0]
        return min(made, key=lambda pair: pair[0])[1]

    def _both(self, keep: float) -> Hybrid:
        widths = hybrid_widths(self.cost, self.curves, self.choices, keep * self.fitted.whole)
        small, nodes, report = self._without_nodes(widths)
        original = self.context.original
        kept = {name: chosen.indices for name, chosen in nodes.items()}
        unfitted = remove_nodes(original, self.groups, kept)
        start = Start(small, original, unfitted, kept_rows(original, self.groups, kept))
        made, layers = self._fitted(start).make(keep, self.fitted.whole)
        return Hybrid(made, report(made), layers, nodes)

    def _nodes(self, keep: float) -> Hybrid:
        widths = loss_allocation(self.cost, keep, self.curves, self._lams()).widths
        small, nodes, report = self._without_nodes(widths)
        return Hybrid(small, report(small), (), nodes)

    def _ranks(self, keep: float) -> Hybrid:
        made, layers = self.fitted.make(keep)
        return Hybrid(made, (), layers, {})

    def _lams(self) -> dict[str, float]:
        statistics = self.context.statistics
        return {name: self.settings.lam * float(np.trace(entry.covariance)) for name, entry in statistics.items()}

    def _without_nodes(
        self, widths: dict[str, int]
    ) -> tuple[nn.Module, dict[str, WeightedNodes], Callable[[nn.Module], tuple[GroupReport, ...]]]:
        """Return the network at some widths, its nodes, and what reports on the groups once the ranks are settled."""
        generator = np.random.default_rng(self.settings.seed)
        settings = replace(self.settings, keep=None, widths=widths)
        context = replace(self.context, settings=settings, generator=generator)
        plan = Allocation(widths, self._lams())
        work, nodes, seconds, conditions = prune_groups(context, plan)
        small = cut_network(context, work, nodes)
        return small, nodes, lambda made: group_reports(context, plan, nodes, made, seconds, conditions)

    def _fitted(self, start: Start) -> FittedNetworks:
        settings = self.settings
        return FittedNetworks(start, self.data, settings.measure, settings.positions, settings.ridge, settings.seed)
