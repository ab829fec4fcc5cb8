"""A chain run one layer at a time, and how strongly each later layer answers to an earlier one.

x^i is the output of layer i, phi what lies between two layers, and J^{i,j} the Jacobian of the map from x^i to x^j, at
x^i.  Small Jacobians are computed whole, large ones probed with random signs, whose error is estimated.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from specprune.analysis.chain import ChainLayer

#: Jacobians with at most so many rows are computed whole; larger ones are probed with random signs.
EXACT_OUTPUTS = 1000
PROBES = 256


class Steps:
    """A traced chain in float64 that can be run from any layer's output to the next one's.

    Args:
        folded: the network, batch norms folded into its layers; left as it is.
        layers: its layers, from `trace_chain`.

    Raises:
        ValueError: if a layer runs twice.
    """

    def __init__(self, folded: nn.Module, layers: tuple[ChainLayer, ...]) -> None:
        work = copy.deepcopy(folded).eval().cpu().double().requires_grad_(False)
        self._modules = dict(work.named_modules())
        nodes = [node for node in fx.symbolic_trace(work).graph.nodes if node.op not in ("placeholder", "output")]
        names = {layer.name for layer in layers}
        if len(names) != len(layers):
            raise ValueError("a layer that runs twice has no cushion of its own; give each layer its own module")
        starts = [index for index, node in enumerate(nodes) if str(node.target) in names]
        self._before = nodes[: starts[0]]
        self._affine = [nodes[start] for start in starts]
        self._maps = [nodes[start + 1 : stop] for start, stop in zip(starts, [*starts[1:], len(nodes)], strict=True)]

    def _run(self, nodes: Iterable[fx.Node], x: Tensor) -> Tensor:
        for node in nodes:
            # Of a chain, every node has the one before it as its only input.
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: x)  # noqa: B023
            if node.op == "call_module":
                x = self._modules[str(node.target)](*args, **kwargs)
            elif node.op == "call_method":
                x = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                x = node.target(*args, **kwargs)  # type: ignore[operator]
        return x

    def between(self, index: int, x: Tensor) -> Tensor:
        """Return phi(x^i), the input of layer i + 1; of index -1, what the first layer gets for the network's input."""
        # A copy, for activations may work in place and would overwrite x^i.
        return self._run(self._before if index < 0 else self._maps[index], x.clone())

    def affine(self, index: int, x: Tensor) -> Tensor:
        """Return x^i of what enters layer i."""
        return self._run([self._affine[index]], x)

    def advance(self, index: int, x: Tensor) -> Tensor:
        """Return x^{i+1} of x^i."""
        return self.affine(index + 1, self.between(index, x))


def jacobian_energies(
    chain: Steps, states: list[Tensor], generator: torch.Generator
) -> tuple[dict[tuple[int, int], Tensor], dict[int, float]]:
    """Return sum over outputs of the squared entries of J^{i,j}, shape (samples, *x^i), and relative errors by j.

    Rows of the identity, or random signs z with E ||J^T z||^2 = ||J||_F^2, are pulled back through one layer at a time.

    Args:
        chain: the network.
        states: x^i of the samples, for every layer.
        generator: draws the signs.
    """
    energies = {(i, j): torch.zeros_like(states[i]) for j in range(len(states)) for i in range(j)}
    errors = dict.fromkeys(range(len(states)), 0.0)
    for j in range(1, len(states)):
        shape, outputs = states[j].shape[1:], states[j][0].numel()
        exact = outputs <= EXACT_OUTPUTS
        for sample in range(len(states[j])):
            if exact:
                rows = torch.eye(outputs, dtype=torch.float64)
            else:
                rows = torch.randint(0, 2, (PROBES, outputs), generator=generator).double().mul_(2).sub_(1)
            pulled = rows.reshape(len(rows), 1, *shape)
            for i in range(j - 1, -1, -1):
                pulled = _pull_back(chain, i, states[i][sample : sample + 1], pulled)
                squares = pulled[:, 0].square()
                energies[i, j][sample] = squares.sum(0) if exact else squares.mean(0)
                if not exact:
                    parts = squares.flatten(1).sum(1)
                    # Half, for the norm is the root of the sum of squares.
                    deviation = float(parts.std() / math.sqrt(PROBES) / parts.mean().clamp_min(1e-300)) / 2
                    errors[j] = max(errors[j], deviation)
    return energies, errors


def _pull_back(chain: Steps, index: int, x: Tensor, rows: Tensor) -> Tensor:
    pull = torch.func.vjp(functools.partial(chain.advance, index), x)[1]
    return torch.func.vmap(lambda row: pull(row)[0])(rows)
