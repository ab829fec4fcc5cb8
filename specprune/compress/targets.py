"""What the consumers of a network gave before it was pruned: the targets of every refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData, batch_size, fingerprint
from specprune.compress.capture import Seen, capture
from specprune.compress.layers import Positions, get_layer

CACHE_BYTES = 2**28
_DEAD_GAIN = 1e-6  # of the largest gain: a batch norm that mutes a node passes no correction


def norm_gain(model: nn.Module, name: str) -> Tensor:
    """Return what a batch norm in evaluation mode multiplies each node with, gamma / sqrt(var + eps), in float64."""
    norm = model.get_submodule(name)
    scale = (norm.get_buffer("running_var").to(torch.float64) + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    return scale if norm.weight is None else scale * norm.weight.detach().to(torch.float64)  # type: ignore[operator]


def inverse_gain(model: nn.Module, norm: str | None, like: Tensor) -> Tensor | float:
    """Return one over the gain of the batch norm after a layer, 0 for nodes that it mutes; 1 without a norm."""
    if norm is None:
        return 1.0
    gain = norm_gain(model, norm)
    alive = gain.abs() > _DEAD_GAIN * gain.abs().max()
    return torch.where(alive, 1.0 / torch.where(alive, gain, 1.0), 0.0).to(like.dtype)


class Targets:
    """The original pre-activations at drawn positions, plus the shortcut that is added to them.

    They are kept, up to `CACHE_BYTES` in all, so that the original network need not run again for every consumer; what
    does not fit, or comes in other batches (a loader that shuffles), is computed anew.

    Args:
        original: the network before pruning, in evaluation mode.
        data: calibration data.
        consumers: the layers that may be asked for.
        norms: layer to the batch norm that reads it directly.
        closers: layers whose outputs (or their batch norm's) are added to a shortcut.
        positions: output positions drawn per image in a convolution; None takes all.
        seed: of the positions.
        rows: layer to the outputs that the network to be fitted still has; all, where a layer is not named.
    """

    def __init__(
        self,
        original: nn.Module,
        data: CalibrationData,
        consumers: Sequence[str],
        norms: Mapping[str, str],
        closers: Sequence[str],
        *,
        positions: int | None,
        seed: int,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.original, self.data, self.consumers = original, data, tuple(consumers)
        self.norms, self.closers = dict(norms), tuple(closers)
        self.positions = positions
        self._rows = dict(rows or {})
        self._generators = {
            name: torch.Generator().manual_seed(seed + index) for index, name in enumerate(self.consumers)
        }
        self._kept: dict[tuple[float, int], dict[str, tuple[Positions, Tensor]]] = {}
        # What is drawn once stays, so that a budget does not depend on those that were tried before.
        self._drawn: dict[tuple[float, int, str], Positions] = {}
        self._bytes = 0

    @torch.no_grad()
    def of(self, batch: Any, names: Sequence[str]) -> dict[str, tuple[Positions, Tensor]]:
        """Return the drawn positions and the (rows, outputs) targets of some consumers on a batch."""
        key = fingerprint(batch), batch_size(batch)
        if key in self._kept:
            return self._kept[key]
        found = self._compute(batch, key, self.consumers if self._bytes < CACHE_BYTES else names)
        size = sum(target.numel() * target.element_size() for _, target in found.values())
        if len(found) == len(self.consumers) and self._bytes + size <= CACHE_BYTES:
            self._kept[key] = found
            self._bytes += size
        elif self._bytes < CACHE_BYTES:
            self._bytes = CACHE_BYTES  # full: from now on only what is asked for is computed
        return found

    def _compute(self, batch: Any, key: tuple[float, int], names: Sequence[str]) -> dict[str, tuple[Positions, Tensor]]:
        norms = {name: self.norms[name] for name in names if name in self.norms}
        closing = [name for name in names if name in self.closers]
        seen = capture(self.original, names, self.data, batch, norms=norms, closers=closing)
        return {name: self._target(name, key, seen[name]) for name in names}

    def _target(self, name: str, key: tuple[float, int], seen: Seen) -> tuple[Positions, Tensor]:
        layer = get_layer(self.original, name)
        place = (*key, name)
        if place not in self._drawn:
            self._drawn[place] = Positions.draw(layer, seen.inputs, self.positions, self._generators[name])
        drawn = self._drawn[place]
        target = drawn.rows(layer, seen.outputs)
        if seen.shortcut is not None and name in self.closers:
            gain = inverse_gain(self.original, self.norms.get(name), target)
            target = target + drawn.rows(layer, seen.shortcut) * gain
        if name in self._rows:
            target = target[:, self._rows[name].to(target.device)]
        return drawn, target
