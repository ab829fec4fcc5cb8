"""Which rank every layer gets: the smallest largest score, or the smallest sum of scores, that fits a budget.

Each layer has options (a folding and a number of slices k), each with a score that falls with the rank:

    error:     max_i sigma_{i,j+1} / ||W||, the layer's error, 1 to 1 / sqrt(k) times the exact one
    energy:    lost share of the sum of squared singular values (equal retained energy)
    distance:  the lost sum itself, the squared Frobenius distance, which adds up over layers
    size:      removed share of the layer's cost (equal ratio)

The largest score separates: for a level e, every layer takes its cheapest choice of score at most e, and the total
falls as e grows.  So a bisection over the finitely many scores solves it exactly, over ranks, slices and foldings at
once (`level_cuts`).  `alternating_cuts` is the published search for the same problem, which fixes slices and ranks in
turn from 15 starts.  The sum is a knapsack, for which `sum_cuts` walks the layers' lower convex hulls.

Source: Liebenwein et al. 2021 (arXiv:2107.11442), problem (8) and Algorithm 1; the exact solution is derived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specprune.compress.low_rank_cost import LayerCost

SCORES = ("error", "energy", "distance", "size")
FIXED_STARTS = (3, 5, 7, 9)  # slices that the published search starts with, and how many random starts follow
RANDOM_STARTS = 11
ITERATIONS = 4


@dataclass(frozen=True)
class Cut:
    """How a layer is cut: folding, number of slices, rank of each slice."""

    folding: int
    slices: int
    rank: int


@dataclass(frozen=True)
class Option:
    """One folding and number of slices of a layer.

    Args:
        folding: 0..3.
        slices: number of slices k.
        unit: what one rank costs.
        scores: (n,) scores of the ranks 1..n, not rising; only the ranks that make the layer cheaper.
    """

    folding: int
    slices: int
    unit: int
    scores: np.ndarray

    def cut(self, rank: int) -> Cut:
        """Return the cut of this rank."""
        return Cut(self.folding, self.slices, rank)


@dataclass(frozen=True)
class Frontier:
    """The choices of a layer that no other one beats in cost and score; the last is always the layer as it is.

    Args:
        costs: (n,) costs, rising.
        scores: (n,) scores, falling to 0; the one before the last may be 0, too.
        cuts: n choices; None is the layer as it is.
    """

    costs: np.ndarray
    scores: np.ndarray
    cuts: tuple[Cut | None, ...]

    @classmethod
    def of(cls, options: Iterable[Option], dense: int) -> Frontier:
        """Return the frontier of some options and of the layer as it is, with its `dense` cost and score 0."""
        choices: list[tuple[int, float, Cut | None]] = []
        for option in options:
            choices += [
                (rank * option.unit, float(score), option.cut(rank))
                for rank, score in enumerate(option.scores, start=1)
            ]
        best: list[tuple[int, float, Cut | None]] = []
        for choice in sorted(choices, key=lambda choice: choice[:2]):  # equal ones keep the order of the options
            if not best or choice[1] < best[-1][1]:
                best.append(choice)
        best.append((dense, 0.0, None))
        costs, scores, cuts = zip(*best, strict=True)
        return cls(np.array(costs), np.array(scores), cuts)

    def cheapest(self, level: float) -> int:
        """Return the index of the cheapest choice with a score of at most `level`."""
        return int(np.searchsorted(-self.scores, -level))


def layer_options(cost: LayerCost, score: str, *, foldings: Iterable[int], slices: Iterable[int]) -> list[Option]:
    """Return a layer's options with their scores.

    Args:
        cost: of the layer.
        score: "error", "energy", "distance" or "size".
        foldings: the foldings to offer.
        slices: the numbers of slices to offer.

    Returns:
        The options in which at least rank 1 makes the layer smaller.

    Raises:
        ValueError: an unknown score, folding or number of slices.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r}: expected one of {SCORES}")
    counts, found = tuple(slices), []
    for folding in foldings:
        for k in counts:
            ranks = affordable_ranks(cost, folding, k)
            if ranks:
                scores = _scores(cost, score, folding, k, ranks)
                found.append(Option(folding, k, cost.rank_cost(folding, k), scores))
    return found


def affordable_ranks(cost: LayerCost, folding: int, slices: int) -> int:
    """Return the highest rank that costs less than the layer; it is below full rank, which has more weights."""
    rows, columns = cost.spectra.folded_shape(folding)
    return min((cost.dense - 1) // cost.rank_cost(folding, slices), rows, columns // slices)


def _scores(cost: LayerCost, score: str, folding: int, slices: int, ranks: int) -> np.ndarray:
    if score == "size":
        return 1.0 - np.arange(1, ranks + 1) * cost.rank_cost(folding, slices) / cost.dense
    values, norm = cost.spectra.values(folding, slices), cost.spectra.norm(folding)
    if norm == 0:
        return np.zeros(ranks)
    if score == "error":
        tail = values.amax(0) / norm
    else:
        energy = values.square().sum(0)
        tail = torch.flip(torch.cumsum(torch.flip(energy, (0,)), 0), (0,))
        if score == "energy":
            tail = tail / energy.sum()
    # The rank above the last singular value, which only counts where FLOPs are cheap, loses nothing.
    found: np.ndarray = torch.cat([tail, tail.new_zeros(1)])[1 : ranks + 1].cpu().numpy()
    return found


def level_cuts(frontiers: Sequence[Frontier], budget: int) -> list[Cut | None]:
    """Return the choices whose largest score is the smallest that the budget allows, the rest of it spent greedily.

    Bisection of the common level over all scores, then steps along the frontiers: as long as something fits, the layer
    with the largest score goes to its next choice.  No step raises a score.

    Args:
        frontiers: one a layer.
        budget: what all layers together may cost.

    Returns:
        One choice a layer; None is the layer as it is.

    Raises:
        ValueError: the smallest choices together exceed the budget.
    """
    _check_budget(frontiers, budget)

    def chosen(level: float) -> list[int]:
        return [frontier.cheapest(level) for frontier in frontiers]

    levels = np.unique(np.concatenate([frontier.scores for frontier in frontiers])) if frontiers else np.zeros(1)
    low, high = 0, len(levels) - 1  # the highest level always fits
    while low < high:
        middle = (low + high) // 2
        if _cost(frontiers, chosen(levels[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    places = chosen(levels[high])
    _fill(frontiers, places, budget)
    return [frontier.cuts[place] for frontier, place in zip(frontiers, places, strict=True)]


def sum_cuts(frontiers: Sequence[Frontier], budget: int) -> list[Cut | None]:
    """Return choices of nearly the smallest sum of scores that the budget allows.

    From the layers as they are, the choice that adds least score for each unit of cost that it saves is made again and
    again, until the budget is met: these are the vertices of the lower convex hulls, where the sum is optimal.  What
    the last step leaves of the budget goes where it lowers the sum most.

    Args:
        frontiers: one a layer, with scores that may be added.
        budget: what all layers together may cost.

    Returns:
        One choice a layer; None is the layer as it is.

    Raises:
        ValueError: the smallest choices together exceed the budget.
    """
    _check_budget(frontiers, budget)
    places = [len(frontier.costs) - 1 for frontier in frontiers]
    spent = _cost(frontiers, places)
    while spent > budget:
        steps = [
            (*_cheapest_step(frontier, place), layer)
            for layer, (frontier, place) in enumerate(zip(frontiers, places, strict=True))
            if place
        ]
        _, place, layer = min(steps)
        spent -= int(frontiers[layer].costs[places[layer]] - frontiers[layer].costs[place])
        places[layer] = place
    while True:
        gains = []
        for layer, (frontier, place) in enumerate(zip(frontiers, places, strict=True)):
            best = int(np.searchsorted(frontier.costs, frontier.costs[place] + budget - spent, side="right")) - 1
            gains.append((float(frontier.scores[place] - frontier.scores[best]), layer, best))
        gain, layer, place = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return [frontier.cuts[place] for frontier, place in zip(frontiers, places, strict=True)]
        spent += int(frontiers[layer].costs[place] - frontiers[layer].costs[places[layer]])
        places[layer] = place


def _cheapest_step(frontier: Frontier, place: int) -> tuple[float, int]:
    """Return the least score that is added per unit of cost saved, and the choice that does so."""
    ratios = (frontier.scores[:place] - frontier.scores[place]) / (frontier.costs[place] - frontier.costs[:place])
    best = int(np.argmin(ratios))
    return float(ratios[best]), best


def _check_budget(frontiers: Sequence[Frontier], budget: int) -> None:
    smallest = sum(int(frontier.costs[0]) for frontier in frontiers)
    if smallest > budget:
        raise ValueError(f"budget={budget}: the smallest choices cost {smallest} together; allow at least that")


def _cost(frontiers: Sequence[Frontier], places: Sequence[int]) -> int:
    return sum(int(frontier.costs[place]) for frontier, place in zip(frontiers, places, strict=True))


def _fill(frontiers: Sequence[Frontier], places: list[int], budget: int) -> None:
    """Move `places` along the frontiers, the worst layer first, until nothing fits."""
    left = budget - _cost(frontiers, places)

    def fitting(layer: int) -> bool:
        costs, place = frontiers[layer].costs, places[layer]
        return place + 1 < len(costs) and int(costs[place + 1] - costs[place]) <= left

    while layers := [layer for layer in range(len(frontiers)) if fitting(layer)]:
        worst = max(layers, key=lambda layer: float(frontiers[layer].scores[places[layer]]))
        left -= int(frontiers[worst].costs[places[worst] + 1] - frontiers[worst].costs[places[worst]])
        places[worst] += 1


def alternating_cuts(
    options: Sequence[Sequence[Option]], dense: Sequence[int], budget: int, *, seed: int
) -> list[Cut | None]:
    """Return the choices that the published search finds: ranks at fixed slices, slices at fixed sizes, in turn.

    Each of 15 starts fixes an option for every layer (slices nearest to 3, 5, 7, 9, and 11 at random; where even rank 1
    does not fit, the layers go to their cheaper options).  Then, four times: `level_cuts` with these options; and each
    layer goes to the option of the lowest score among those that fit the weights it then has.  The start with the
    lowest largest score wins.  Unlike in the source, a layer's weights are never rounded up, so that no step makes the
    largest score worse.

    Args:
        options: the options of each layer; without any, a layer stays as it is.
        dense: cost of each layer as it is.
        budget: what all layers together may cost.
        seed: of the random starts.

    Returns:
        One choice a layer; None is the layer as it is.

    Raises:
        ValueError: the smallest choices together exceed the budget.

    Source: Liebenwein et al. 2021 (arXiv:2107.11442), Algorithm 1 and the authors' settings.
    """
    generator = np.random.default_rng(seed)
    rising = [sorted(layer, key=lambda option: option.unit) for layer in options]
    starts = [
        [min(range(len(layer)), key=lambda i: abs(layer[i].slices - target), default=0) for layer in rising]
        for target in FIXED_STARTS
    ]
    starts += [[int(generator.integers(max(len(layer), 1))) for layer in rising] for _ in range(RANDOM_STARTS)]
    found = []
    for places in starts:
        while any(places) and _cost(_fixed(rising, dense, places), [0] * len(places)) > budget:
            places = [max(place - 1, 0) for place in places]
        for _ in range(ITERATIONS):
            cuts = level_cuts(_fixed(rising, dense, places), budget)
            places = [
                place if cut is None else _best_option(layer, place, cut.rank)
                for layer, place, cut in zip(rising, places, cuts, strict=True)
            ]
        cuts = level_cuts(_fixed(rising, dense, places), budget)
        worst = max(
            0.0 if cut is None else float(layer[place].scores[cut.rank - 1])
            for layer, place, cut in zip(rising, places, cuts, strict=True)
        )
        found.append((worst, cuts))
    return min(found, key=lambda pair: pair[0])[1]


def _fixed(options: Sequence[Sequence[Option]], dense: Sequence[int], places: Sequence[int]) -> list[Frontier]:
    """Return the frontiers of the layers with one option each."""
    return [
        Frontier.of(layer[place : place + 1], size) for layer, place, size in zip(options, places, dense, strict=True)
    ]


def _best_option(layer: Sequence[Option], place: int, rank: int) -> int:
    """Return the option of the lowest score with no more weights than option `place` has at this rank."""
    weights, best, lowest = rank * layer[place].unit, place, float(layer[place].scores[rank - 1])
    for index, option in enumerate(layer):
        fits = min(weights // option.unit, len(option.scores))
        if fits and option.scores[fits - 1] < lowest:
            best, lowest = index, float(option.scores[fits - 1])
    return best
