"""Local search on the whole-number weights of a network, with the certificate itself as the objective.

Changing one weight moves every example's margin (the score of its class minus the largest other one).  To first order
it moves by the change times the margin's derivative, so one backward pass predicts the errors of all single changes,
and of pairs of them.  The most promising are tried exactly, many at once, on the examples near the decision boundary:
only the changed channel is computed anew, and what follows starts from stored sums.  What helps there is confirmed on
all examples, so that nothing is ever kept that does not lower the certificate.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specprune.analysis.code_design import Design, gains
from specprune.analysis.code_margins import AT_ONCE, Change, NearBoundary, margins_of
from specprune.analysis.code_training import TrainingImages, batch_scores
from specprune.bounds.code_length import code_length_limit
from specprune.compress.language import context_numbers, counts_bits, header_bits, value_counts
from specprune.compress.vocabulary import IntArray, IntegerNetwork

logger = logging.getLogger(__name__)

#: Examples with the smallest margins on which changes are tried.
NEAR = 6000
#: Changes tried exactly in one round, single ones and pairs each.
TRIES = 256
_PARTNERS = 192
#: A change that did not help is not tried again before so many others were kept.
_PATIENCE = 12
_PAIR_SHARE = 2000


@dataclass(frozen=True, eq=False)
class _Singles:
    """All changes of one weight each, and what they are predicted to do.

    Attributes:
        owner: (m,) which array.
        place: (m,) which weight of it.
        value: (m,) the new value.
        step: (m,) new minus old value, times the layer's gain.
        column: (m,) the column of the derivative that belongs to the weight.
        bits: (m,) how much longer the word becomes.
    """

    owner: IntArray
    place: IntArray
    value: IntArray
    step: np.ndarray
    column: IntArray
    bits: np.ndarray


class CodeSearch:
    """A network under search: its weights, errors and bits, and what is stored of the examples near the boundary.

    Args:
        network: where to start.
        design: its design.
        images: its training set behind the front end.
        delta: allowed probability of failure of the certificate.
        seed: of the choice among equals.
        near: how many examples near the boundary changes are tried on.
    """

    def __init__(
        self,
        network: IntegerNetwork,
        design: Design,
        images: TrainingImages,
        *,
        delta: float = 0.05,
        seed: int = 0,
        near: int = NEAR,
    ) -> None:
        self.design, self.images, self.delta = design, images, delta
        self.generator = np.random.default_rng(seed)
        self.near = min(near, images.n)
        self.arrays = [array.copy() for array in network.weights]
        self.header = header_bits(network)
        self.gains = gains(design)
        self.layer_counts = [
            value_counts(array, layer.levels, context_numbers(array.shape, layer.contexts))
            for array, layer in zip(self.arrays, design.owners, strict=True)
        ]
        self.errors = self._count()
        self.tried = self.kept = 0
        self._seen: dict[Change, int] = {}

    @property
    def bits(self) -> float:
        """Ideal length of the present word."""
        return self.header + sum(counts_bits(counts) for counts in self.layer_counts)

    @property
    def certificate(self) -> float:
        """The certified error of the present network."""
        return code_length_limit(self.errors, self.images.n, self.bits, self.delta)

    def network(self) -> IntegerNetwork:
        """Return the present network."""
        return self.design.network([torch.from_numpy(array) for array in self.arrays])

    def _weights(self) -> list[Tensor]:
        like = self.images.maps
        return [torch.from_numpy(a).to(like) * g for a, g in zip(self.arrays, self.gains, strict=True)]

    @torch.no_grad()
    def _all_scores(self) -> Tensor:
        weights = self._weights()
        parts = [
            batch_scores(self.images, slice(start, start + 1000), weights, self.design)
            for start in range(0, self.images.n, 1000)
        ]
        return torch.cat(parts)

    def _count(self, scores: Tensor | None = None) -> int:
        found = self._all_scores() if scores is None else scores
        return int((found.argmax(1) != self.images.targets).sum())

    def round(self, *, pairs: bool = False, tries: int = TRIES, out_of_time: Callable[[], bool] = lambda: False) -> int:
        """Try the most promising changes, keep those that lower the certificate, and confirm them on all examples.

        Args:
            pairs: whether to try pairs of changes instead of single ones.
            tries: how many.
            out_of_time: asked between batches.

        Returns:
            How many changes were kept.
        """
        scores = self._all_scores()
        margins = margins_of(scores, self.images.targets)
        size = scores.square().mean(1).sqrt().clamp(min=1e-12)
        rows = (margins / size).abs().argsort()[: self.near]
        stored = NearBoundary(self.design, self.images, rows, self._weights())
        # Changes that were tried long ago first, then all that were tried before the last one was kept.
        changes = self._promising(stored, pairs, tries, _PATIENCE) or self._promising(stored, pairs, tries, 1)
        kept = 0
        for start in range(0, len(changes), AT_ONCE):
            if out_of_time():
                break
            before = self.certificate, self.errors, [array.copy() for array in self.arrays]
            found = self._try(stored, changes[start : start + AT_ONCE])
            if not found:
                continue
            self.errors = self._count()
            if self.certificate < before[0]:
                kept += found
                self.kept += found
            else:
                self._restore(before[1], before[2])
                stored.refresh(self._weights(), 0)
        return kept

    def _restore(self, errors: int, arrays: Sequence[IntArray]) -> None:
        self.errors, self.arrays = errors, [array.copy() for array in arrays]
        self.layer_counts = [
            value_counts(array, layer.levels, context_numbers(array.shape, layer.contexts))
            for array, layer in zip(self.arrays, self.design.owners, strict=True)
        ]

    def _try(self, stored: NearBoundary, changes: Sequence[Change]) -> int:
        """Keep the changes of a batch that lower the certificate, best first; each is tried again after another."""
        kept, elsewhere = 0, self.errors - stored.errors
        waiting = list(changes)
        while waiting:
            errors = stored.errors_after(waiting)
            self.tried += len(waiting)
            self._seen |= dict.fromkeys(waiting, self.kept)
            present = code_length_limit(elsewhere + stored.errors, self.images.n, self.bits, self.delta)
            found = [
                code_length_limit(elsewhere + wrong, self.images.n, self.bits + self._extra_bits(change), self.delta)
                for wrong, change in zip(errors, waiting, strict=True)
            ]
            order = np.argsort(found)
            if found[order[0]] >= present:
                return kept
            best = waiting[order[0]]
            self._apply(best)
            stored.refresh(self._weights(), min(best.owner))
            kept += 1
            # Only those that would have helped on their own are worth another look.
            waiting = [waiting[i] for i in order[1:] if found[i] < present and not _overlap(waiting[i], best)]
        return kept

    def _apply(self, change: Change) -> None:
        for owner, place, value in zip(change.owner, change.place, change.value, strict=True):
            self.arrays[owner].ravel()[place] = value
        for owner in set(change.owner):
            layer, array = self.design.owners[owner], self.arrays[owner]
            numbers = context_numbers(array.shape, layer.contexts)
            self.layer_counts[owner] = value_counts(array, layer.levels, numbers)

    def _extra_bits(self, change: Change) -> float:
        extra = 0.0
        for owner in set(change.owner):
            layer, array = self.design.owners[owner], self.arrays[owner].copy()
            for one, place, value in zip(change.owner, change.place, change.value, strict=True):
                if one == owner:
                    array.ravel()[place] = value
            counts = value_counts(array, layer.levels, context_numbers(array.shape, layer.contexts))
            extra += counts_bits(counts) - counts_bits(self.layer_counts[owner])
        return extra

    def _singles(self) -> _Singles:
        """List every change of one weight, with what it costs."""
        parts: list[tuple[np.ndarray, ...]] = []
        first = 0
        for owner, (layer, array, gain) in enumerate(zip(self.design.owners, self.arrays, self.gains, strict=True)):
            flat, numbers = array.ravel(), context_numbers(array.shape, layer.contexts)
            counts, width = self.layer_counts[owner], 2 * layer.levels + 1
            table = np.zeros((len(counts), width, width))
            present = counts_bits(counts)
            for context, old in np.argwhere(counts).tolist():
                for new in range(width):
                    if new != old:
                        counts[context, old] -= 1
                        counts[context, new] += 1
                        table[context, old, new] = counts_bits(counts) - present
                        counts[context, old] += 1
                        counts[context, new] -= 1
            place, column = (a.ravel() for a in np.meshgrid(np.arange(flat.size), np.arange(width), indexing="ij"))
            real = column != flat[place] + layer.levels
            place, column = place[real], column[real]
            value = column - layer.levels
            bits = table[numbers[place], flat[place] + layer.levels, column]
            parts.append((np.full(len(place), owner), place, value, (value - flat[place]) * gain, first + place, bits))
            first += flat.size
        return _Singles(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _promising(self, stored: NearBoundary, pairs: bool, tries: int, patience: int) -> list[Change]:
        """Return the changes with the lowest predicted certificates, best first."""
        singles = self._singles()
        margins, slopes = stored.margins, stored.slopes()
        per_error, per_bit = self._prices()
        base = float((margins < 0).sum())
        predicted = np.empty(len(singles.step))
        for start in range(0, len(predicted), 64):
            part = slice(start, start + 64)
            moved = slopes[singles.column[part]] * torch.from_numpy(singles.step[part]).to(slopes)[:, None]
            predicted[part] = ((margins + moved) < 0).sum(1).double().cpu().numpy() - base
        gain = per_error * predicted + per_bit * singles.bits
        gain += 1e-12 * self.generator.random(len(gain))
        order = np.argsort(gain)
        if not pairs:
            every = (
                Change((int(singles.owner[i]),), (int(singles.place[i]),), (int(singles.value[i]),)) for i in order
            )
            return list(itertools.islice((change for change in every if self._untried(change, patience)), tries))
        chosen = order[:_PARTNERS]
        some = torch.from_numpy(self.generator.permutation(len(margins))[:_PAIR_SHARE])
        moved = slopes[singles.column[chosen]][:, some] * torch.from_numpy(singles.step[chosen]).to(slopes)[:, None]
        left = margins[some] + moved
        scale = len(margins) / len(some)
        table = np.full((len(chosen), len(chosen)), np.inf)
        for i in range(len(chosen) - 1):
            wrong = ((left[i] + moved[i + 1 :]) < 0).sum(1).double().cpu().numpy() - float((margins[some] < 0).sum())
            bits = singles.bits[chosen[i]] + singles.bits[chosen[i + 1 :]]
            same = singles.column[chosen[i]] == singles.column[chosen[i + 1 :]]
            table[i, i + 1 :] = np.where(same, np.inf, per_error * scale * wrong + per_bit * bits)
        found: list[Change] = []
        for i, j in zip(*np.unravel_index(np.argsort(table, axis=None), table.shape), strict=True):
            if len(found) == tries or not np.isfinite(table[i, j]):
                break
            both = sorted(
                (int(singles.owner[c]), int(singles.place[c]), int(singles.value[c]))
                for c in (int(chosen[i]), int(chosen[j]))
            )
            owner, place, value = zip(*both, strict=True)
            if self._untried(Change(owner, place, value), patience):
                found.append(Change(owner, place, value))
        return found

    def _untried(self, change: Change, patience: int) -> bool:
        return self._seen.get(change, -patience) + patience <= self.kept

    def _prices(self) -> tuple[float, float]:
        """Return what one error more and one bit more add to the certificate."""
        n, bits, step = self.images.n, self.bits, max(1, self.images.n // 1000)
        here = self.certificate
        more = min(self.errors + step, n)
        per_error = (code_length_limit(more, n, bits, self.delta) - here) / max(1, more - self.errors)
        return per_error, (code_length_limit(self.errors, n, bits + 32, self.delta) - here) / 32


def _overlap(one: Change, other: Change) -> bool:
    return bool(set(zip(one.owner, one.place, strict=True)) & set(zip(other.owner, other.place, strict=True)))
