"""Which rank every layer gets: the smallest common level of a score that fits a budget of parameters.

Each layer has options (a folding and a number of slices k), each with a score that falls with the rank.  All rules
minimise the layers' largest score under the budget, and differ in the score:

    error:   max_i sigma_{i,j+1} / ||W||, the layer's error, 1 to 1 / sqrt(k) times the exact one
    energy:  lost share of the sum of squared singular values (equal retained energy)
    size:    removed share of the layer's weights (equal ratio)

The problem separates: for a level e, every layer takes its cheapest choice of score at most e, and the total falls as e
grows.  So a bisection over the finitely many scores solves it exactly, over ranks, slices and foldings at once.
`alternating_cuts` is the published search for the same problem, which fixes slices and ranks in turn from 15 starts.

Source: Liebenwein et al. 2021 (arXiv:2107.11442), problem (8) and Algorithm 1; the exact solution is derived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specprune.compress.low_rank_layers import LayerSpectra

SCORES = ("error", "energy", "size")
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
        unit: weights that one rank costs.
        scores: (n,) scores of the ranks 1..n, not rising; only the ranks that make the layer smaller.
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
    """The choices of a layer that no other one beats in cost and score; the last is the layer as it is.

    Args:
        costs: (n,) numbers of weights, rising.
        scores: (n,) scores, falling to 0.
        cuts: n choices; None is the layer as it is.
    """

    costs: np.ndarray
    scores: np.ndarray
    cuts: tuple[Cut | None, ...]

    @classmethod
    def of(cls, options: Iterable[Option], dense: int) -> Frontier:
        """Return the frontier of some options and of the layer as it is, with its `dense` weights and score 0."""
        choices: list[tuple[int, float, Cut | None]] = [(dense, 0.0, None)]
        for option in options:
            choices += [
                (rank * option.unit, float(score), option.cut(rank))
                for rank, score in enumerate(option.scores, start=1)
            ]
        best: list[tuple[int, float, Cut | None]] = []
        for choice in sorted(choices, key=lambda choice: choice[:2]):  # equal ones keep the order of the options
            if not best or choice[1] < best[-1][1]:
                best.append(choice)
        costs, scores, cuts = zip(*best, strict=True)
        return cls(np.array(costs), np.array(scores), cuts)

    def cheapest(self, level: float) -> int:
        """Return the index of the cheapest choice with a score of at most `level`."""
        return int(np.searchsorted(-self.scores, -level))


def layer_options(spectra: LayerSpectra, score: str, *, foldings: Iterable[int], slices: Iterable[int]) -> list[Option]:
    """Return a layer's options with their scores.

    Args:
        spectra: of the layer.
        score: "error", "energy" or "size".
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
            unit = spectra.rank_parameters(folding, k)
            ranks = (spectra.dense_parameters - 1) // unit  # always below full rank, which costs more than the layer
            if ranks:
                found.append(Option(folding, k, unit, _scores(spectra, score, folding, k, ranks)))
    return found


def _scores(spectra: LayerSpectra, score: str, folding: int, slices: int, ranks: int) -> np.ndarray:
    if score == "size":
        unit = spectra.rank_parameters(folding, slices)
        return 1.0 - np.arange(1, ranks + 1) * unit / spectra.dense_parameters
    values, norm = spectra.values(folding, slices), spectra.norm(folding)
    if norm == 0:
        return np.zeros(ranks)
    if score == "error":
        tail = values.amax(0) / norm
    else:
        energy = values.square().sum(0)
        tail = torch.flip(torch.cumsum(torch.flip(energy, (0,)), 0), (0,)) / energy.sum()
    found: np.ndarray = tail[1 : ranks + 1].cpu().numpy()
    return found


def level_cuts(frontiers: Sequence[Frontier], budget: int) -> list[Cut | None]:
    """Return the choices whose largest score is the smallest that the budget allows, the rest of it spent greedily.

    Bisection of the common level over all scores, then steps along the frontiers: as long as something fits, the layer
    with the largest score goes to its next choice.  No step raises a score.

    Args:
        frontiers: one a layer.
        budget: number of weights that all layers together may have.

    Returns:
        One choice a layer; None is the layer as it is.

    Raises:
        ValueError: the smallest choices together exceed the budget.
    """
    smallest = sum(int(frontier.costs[0]) for frontier in frontiers)
    if smallest > budget:
        raise ValueError(f"budget={budget}: the smallest choices have {smallest} weights together; allow at least that")

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
        dense: weights of each layer as it is.
        budget: number of weights that all layers together may have.
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
