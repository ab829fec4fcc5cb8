"""What changes of a few weights do to the margins of some examples: to first order at once, and exactly side by side.

The inputs and sums of every layer are stored.  A change of one weight changes one channel of its layer, and the next
layer's sums by that channel's share; only what follows is computed whole, for many changes in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specprune.analysis.code_design import Design, filter_kernels
from specprune.analysis.code_training import TrainingImages
from specprune.compress.vocabulary import CONV, FILTERS, LINEAR, LayerSpec

#: Changes that are computed in one batch.
AT_ONCE = 16


@dataclass(frozen=True)
class Change:
    """Weights that get new values.

    Attributes:
        owner: which array of weights each is in.
        place: its index in the flattened array.
        value: its new value.
    """

    owner: tuple[int, ...]
    place: tuple[int, ...]
    value: tuple[int, ...]


def margins_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the score of each example's class minus the largest other one, shape (n,).

    Args:
        scores: (n, classes).
        targets: int64 labels, (n,).
    """
    own = scores.gather(1, targets[:, None])[:, 0]
    others = scores.scatter(1, targets[:, None], -torch.inf).amax(1)
    return own - others


class NearBoundary:
    """Some examples with the inputs and sums of every layer: what changes of a few weights do to their margins.

    Args:
        design: of the network.
        images: the training set.
        rows: which examples.
        weights: as for `refresh`.

    Attributes:
        targets: (m,) labels.
        errors: wrong answers among them.
        margins: (m,).
    """

    def __init__(self, design: Design, images: TrainingImages, rows: Tensor, weights: Sequence[Tensor]) -> None:
        self.layers = design.layers
        self.targets = images.targets[rows]
        views = [view[rows].contiguous(memory_format=torch.channels_last) for view in images.maps]
        self.inputs: list[list[Tensor]] = [[view] for view in views]
        self.sums: list[list[Tensor]] = [[] for _ in views]
        self.owner_of, self.first_use = _owners(self.layers)
        self.refresh(weights, 0)

    @torch.no_grad()
    def refresh(self, weights: Sequence[Tensor], owner: int) -> None:
        """Compute everything anew from an owner's first layer on.

        Args:
            weights: the present ones, times their gains, one tensor for each layer that owns weights.
            owner: the first of them that has changed.
        """
        self.kernels = [
            filter_kernels(layer.out_channels, weights[0]) if layer.kind == FILTERS else weights[self.owner_of[number]]
            for number, layer in enumerate(self.layers)
        ]
        begin = self.first_use[owner]
        for inputs, sums in zip(self.inputs, self.sums, strict=True):
            del inputs[begin + 1 :], sums[begin:]
            for number in range(begin, len(self.layers)):
                sums.append(self._sums(number, inputs[number], self.kernels[number]))
                inputs.append(self._act(number, sums[number]))
        self.scores = sum((inputs[-1].sum((2, 3)) for inputs in self.inputs[1:]), self.inputs[0][-1].sum((2, 3)))
        self.margins = margins_of(self.scores, self.targets)
        self.errors = int((self.scores.argmax(1) != self.targets).sum())

    def _sums(self, number: int, values: Tensor, kernel: Tensor) -> Tensor:
        layer = self.layers[number]
        if layer.kind == LINEAR:
            values = values.sum((2, 3), keepdim=True)
        groups = 1 if layer.kind in (CONV, LINEAR) else len(kernel)
        return F.conv2d(values, kernel, None, layer.stride, layer.padding, 1, groups)

    def _act(self, number: int, sums: Tensor) -> Tensor:
        return sums.relu() if self.layers[number].relu else sums

    def slopes(self) -> Tensor:
        """Return the derivative of every margin by every weight times its gain, shape (weights, m)."""
        owned = [self.kernels[number] for number in self.first_use]
        found = [self.scores.new_zeros(kernel.numel(), len(self.targets)) for kernel in owned]
        for inputs in self.inputs:
            leaves = []
            values = inputs[0]
            with torch.enable_grad():
                for number, kernel in enumerate(self.kernels):
                    sums = self._sums(number, values, kernel)
                    if not sums.requires_grad:
                        sums.requires_grad_()
                    leaves.append(sums)
                    values = self._act(number, sums)
                scores = values.sum((2, 3))
                # The derivative of this view's share, at the runner-up of all views together.
                other = self.scores.scatter(1, self.targets[:, None], -torch.inf).argmax(1)
                own = scores.gather(1, self.targets[:, None]) - scores.gather(1, other[:, None])
                slopes = torch.autograd.grad(own.sum(), leaves)
            for number, (layer, slope) in enumerate(zip(self.layers, slopes, strict=True)):
                if layer.kind != FILTERS:
                    found[self.owner_of[number]] += self._weight_slopes(number, inputs[number], slope)
        return torch.cat(found)

    def _weight_slopes(self, number: int, values: Tensor, slope: Tensor) -> Tensor:
        """Return the derivatives by one layer's weights from those by its sums: (weights, m)."""
        layer = self.layers[number]
        if layer.kind == LINEAR:
            values = values.sum((2, 3), keepdim=True)
        parts = []
        for some, its in zip(values.split(1000), slope.split(1000), strict=True):
            patches = F.unfold(some, layer.kernel, 1, layer.padding, layer.stride)
            its = its.flatten(2)
            if layer.kind in (CONV, LINEAR):
                parts.append(torch.bmm(its, patches.transpose(1, 2)).flatten(1).T)
            else:
                patches = patches.unflatten(1, (layer.out_channels, -1))
                parts.append(torch.einsum("ncp,nckp->nck", its, patches).flatten(1).T)
        return torch.cat(parts, 1)

    @torch.no_grad()
    def errors_after(self, changes: Sequence[Change]) -> list[int]:
        """Return how many of these examples would be wrong after each change.

        Args:
            changes: each tried for itself.
        """
        found = [0] * len(changes)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, change in enumerate(changes):
            groups.setdefault(tuple(sorted(set(change.owner))), []).append(number)
        for signature, members in groups.items():
            for start in range(0, len(members), AT_ONCE):
                part = members[start : start + AT_ONCE]
                for number, wrong in zip(part, self._group(signature, [changes[i] for i in part]), strict=True):
                    found[number] = wrong
        return found

    def _group(self, owners: tuple[int, ...], changes: Sequence[Change]) -> list[int]:
        """Return the errors after changes that concern the same arrays, computed side by side."""
        count = len(changes)
        begin = min(self.first_use[owner] for owner in owners)
        kernels = [self._changed(number, changes) for number in range(len(self.layers))]
        scores = self.scores.new_zeros(count, *self.scores.shape)
        for inputs, sums in zip(self.inputs, self.sums, strict=True):
            values, number = self._first(begin, inputs, sums, kernels, changes)
            for later in range(number, len(self.layers)):
                values = self._side_by_side(later, values, kernels[later], count)
            scores += values.sum((3, 4)).transpose(0, 1)
        return (scores.argmax(2) != self.targets).sum(1).tolist()

    def _changed(self, number: int, changes: Sequence[Change]) -> list[Tensor]:
        """Return a layer's kernels, one for all changes or one for each."""
        kernel = self.kernels[number]
        owner = self.owner_of[number]
        if self.layers[number].kind == FILTERS or not any(owner in change.owner for change in changes):
            return [kernel]
        gain = self._gain(number)
        found = []
        for change in changes:
            new = kernel.clone()
            for one, place, value in zip(change.owner, change.place, change.value, strict=True):
                if one == owner:
                    new.reshape(-1)[place] = value * gain  # contiguous, so a view
            found.append(new)
        return found

    def _gain(self, number: int) -> float:
        """Return what whole-number weights of a layer are multiplied by."""
        return 1 / float(np.sqrt(self.kernels[number][0].numel()))

    def _first(
        self,
        begin: int,
        inputs: Sequence[Tensor],
        sums: Sequence[Tensor],
        kernels: Sequence[list[Tensor]],
        changes: Sequence[Change],
    ) -> tuple[Tensor, int]:
        """Return the values (m, changes, channels, height, width) behind the first changed layer, and what is next."""
        layer = self.layers[begin]
        channels = [change.place[0] // self.kernels[begin][0].numel() for change in changes]
        one_channel = all(len(change.place) == 1 for change in changes) and layer.kind in (CONV, LINEAR)
        if not one_channel:
            found = [self._act(begin, self._sums(begin, inputs[begin], kernel)) for kernel in kernels[begin]]
            return torch.stack(found, 1), begin + 1
        # One channel of this layer changes, and with it the next layer's sums by that channel's share.
        some = torch.stack([kernel[channel] for kernel, channel in zip(kernels[begin], channels, strict=True)])
        new = self._act(begin, self._sums(begin, inputs[begin], some))
        old = inputs[begin + 1][:, channels]
        follower = self.layers[begin + 1] if begin + 1 < len(self.layers) else None
        untouched = follower is not None and len(kernels[begin + 1]) == 1
        if follower is None or follower.kind not in (CONV, LINEAR) or not untouched:
            whole = inputs[begin + 1][:, None].repeat(1, len(changes), 1, 1, 1)
            whole[:, range(len(changes)), channels] = new
            return whole, begin + 1
        difference = (new - old)[:, :, None]
        result = new.new_empty(len(new), len(changes), *sums[begin + 1].shape[1:])
        for channel in sorted(set(channels)):
            members = [i for i, one in enumerate(channels) if one == channel]
            share = self.kernels[begin + 1][:, channel : channel + 1]
            part = self._sums(begin + 1, difference[:, members].flatten(0, 1), share)
            result[:, members] = part.unflatten(0, (len(new), len(members)))
        result += sums[begin + 1][:, None]
        return self._act(begin + 1, result), begin + 2

    def _side_by_side(self, number: int, values: Tensor, kernels: Sequence[Tensor], count: int) -> Tensor:
        """Apply a layer to the values of every change: (m, changes, channels, height, width)."""
        if len(kernels) == 1:
            joint = self._act(number, self._sums(number, values.flatten(0, 1), kernels[0]))
            return joint.unflatten(0, (len(values), count))
        found = [self._act(number, self._sums(number, values[:, i], kernel)) for i, kernel in enumerate(kernels)]
        return torch.stack(found, 1)


def _owners(layers: Sequence[LayerSpec]) -> tuple[list[int], list[int]]:
    """Return which array each layer uses (-1: fixed), and the first layer that uses each array."""
    owner_of: list[int] = []
    first_use: list[int] = []
    for number, layer in enumerate(layers):
        if layer.owns_weights:
            first_use.append(number)
        owner_of.append(-1 if layer.kind == FILTERS else len(first_use) - 1)
    return owner_of, first_use
