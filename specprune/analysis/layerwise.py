"""The certificate layer by layer: each pruned layer's own error measured, what becomes of it behind that layer bounded.

Let phi_l be the original network's activations, phi#_l the pruned one's and delta_l = phi#_l - phi_l on the kept nodes.
With the map F_l behind layer l (activation, pooling), which is L-Lipschitz,

    delta_{l+1} = [F_l(W# phi#_l + b#) - F_l(W# phi_l + b#)] + eps_l,     eps_l = F_l(W# phi_l + b#) - phi_{l+1}.

The local error eps_l is that of ONE pruned layer on the original network's own activations, and can be measured for all
layers in one pass.  The bracket is not measured: split delta_l = p_l + q_l with p_l known for every sample.  An
elementwise F_l with slopes in [0, L] makes the bracket (L/2) W# delta_l + (L/2) r * (W# delta_l) with |r| <= 1, so

    p_{l+1} = (L/2) W# p_l + eps_l,     ||q_{l+1}|| <= L Gamma ||q_l|| + (L/2) ||W# p_l||;
    else p_{l+1} = eps_l,               ||q_{l+1}|| <= L Gamma ||q_l|| + L ||W# p_l||

(where nothing follows layer l: p_{l+1} = W# p_l + eps_l, ||q_{l+1}|| <= Gamma ||q_l||), in weighted norms
sum_j omega_j E v_j^2 with operator norms Gamma of W# between them.  At the output (omega = 1) the distance is at most
||p|| + ||q||, for every positive omega; omega is chosen to make that small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.evaluation import double_batch, double_copy
from specprune.analysis.propagation import RATE, ROUNDING, STEPS, layer_gain
from specprune.bounds.bound import PRUNED, Bound
from specprune.compress import CalibrationData
from specprune.compress.batches import batch_size
from specprune.compress.layers import get_layer

_TINY = torch.finfo(torch.float64).tiny  # the square root has no derivative at 0


@torch.no_grad()
def layerwise_certificate(
    model: nn.Module,
    pruned: nn.Module,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    data: CalibrationData,
    output_norm: float,
) -> Bound:
    """Return a bound on the distance ||f - f#||_n of two chains, from measured errors of single layers.

    Args:
        model: f, the original chain.
        pruned: f#, a chain with the same layers, of which some have fewer nodes.
        kept: layer name to the nodes of its input that the pruned network has; other layers have all of them.
        data: the samples.
        output_norm: ||f||_n, from which on the bound says nothing.

    Returns:
        A deterministic `Bound`; term "local" is what is known exactly at the output, "carried" is bounded.

    Raises:
        ValueError: a network that is not a chain of known Lipschitz maps.

    Source:
        Suzuki et al. 2020 (arXiv:1808.08558) bounds the same sum of local errors a priori; this form is derived here.
    """
    before, after = trace_chain(model, data), trace_chain(pruned, data)
    first, second = double_copy(model), double_copy(pruned)
    errors = _LocalErrors(second, first, after, kept)
    for batch in data.passes(model, "measuring layers"):
        errors.add(data, double_batch(batch))
    samples = errors.samples
    carried = [torch.from_numpy(total / samples) for total in errors.carried]
    inputs = [total / samples for total in errors.inputs]
    slack = [
        torch.from_numpy(_rounding(old, size, len(new.bias)) + _rounding(new, size, len(new.bias)))
        for old, new, size in zip(before, after, inputs, strict=True)
    ]
    exact = math.sqrt(errors.output / samples)
    bounded = _carry(after, carried, slack)
    return Bound.from_terms(
        "layer-by-layer certificate",
        {"local": exact * (1 + ROUNDING), "carried": bounded * (1 + ROUNDING)},
        confidence=None,
        covers=PRUNED,
        loss="L2(P_n) output error",
        trivial=output_norm,
        theorem="measured errors of single layers, carried to the output through the pruned layers",
        source="Suzuki et al. 2020 (arXiv:1808.08558), proof of Theorem 1, for the sum over layers; derived here",
    )


class _LocalErrors:
    """Runs each pruned layer on the original's activations, batch by batch, and sums what the certificate needs.

    Attributes:
        carried: for every layer, (outputs,) sums over samples and pixels of (W# p)^2.
        inputs: for every layer, the sum over samples of the squared norm of the original's inputs.
        output: sum over samples of ||p||^2 at the output.
        samples: how many.
    """

    def __init__(
        self,
        pruned: nn.Module,
        original: nn.Module,
        layers: Sequence[ChainLayer],
        kept: Mapping[str, Sequence[int] | np.ndarray],
    ) -> None:
        self._pruned, self._original, self._layers = pruned, original, layers
        self.carried = [np.zeros(len(layer.bias)) for layer in layers]
        self.inputs = [0.0 for _ in layers]
        self.output, self.samples = 0.0, 0
        device = next(pruned.parameters()).device
        self._weights = {layer.name: torch.from_numpy(layer.weight).to(device) for layer in layers}
        self._kept = {name: torch.as_tensor(np.asarray(nodes), device=device) for name, nodes in kept.items()}
        self._widths = {layer.name: _nodes(get_layer(original, layer.name), layer, kept) for layer in layers}
        self._norms: dict[str, float] = {}
        self._theirs: dict[str, Tensor] = {}  # the original's inputs of each layer, on the kept nodes
        self._reached: dict[str, Tensor] = {}  # what the pruned layer before makes of them
        for layer in layers:
            get_layer(original, layer.name).register_forward_pre_hook(self._remember(layer.name))
            get_layer(pruned, layer.name).register_forward_pre_hook(self._exchange(layer.name))

    def _remember(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            self._norms[name] = float(x.double().square().sum())
            if name in self._kept:
                blocks = x.unflatten(1, (self._widths[name], -1))
                x = blocks.index_select(1, self._kept[name]).flatten(1, 2)
            self._theirs[name] = x.double()

        return hook

    def _exchange(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (self._reached[name],) = args
            return (self._theirs[name],)

        return hook

    def add(self, data: CalibrationData, batch: Any) -> None:
        """Add one float64 batch."""
        final = data.call(self._original, batch).double()
        reached = data.call(self._pruned, batch).double()
        known = [self._reached[layer.name].double() - self._theirs[layer.name] for layer in self._layers]
        known.append(reached - final)
        p = known[0]
        for index, layer in enumerate(self._layers):
            moved = _linear(get_layer(self._pruned, layer.name), self._weights[layer.name], p)
            self.carried[index] += moved.square().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
            self.inputs[index] += self._norms[layer.name]
            p = known[index + 1]
            if layer.identity or layer.elementwise:
                p = p + (1.0 if layer.identity else layer.lipschitz / 2) * moved.reshape(p.shape)
        self.output += float(p.square().sum())
        self.samples += batch_size(batch)


def _nodes(original: nn.Module, layer: ChainLayer, kept: Mapping[str, Any]) -> int:
    """Return how many nodes the original layer reads; a flattened map has several columns a node."""
    columns = int(original.get_parameter("weight").shape[1])
    if layer.name not in kept:
        return columns
    return columns * len(kept[layer.name]) // layer.weight.shape[1]


def _linear(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Return the layer's linear part, with the batch norm behind it folded in, applied to x."""
    if isinstance(layer, nn.Conv2d):
        kernel = weight.unflatten(2, layer.kernel_size)
        return functional.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, weight[:, :, 0])


def _rounding(layer: ChainLayer, size: float, outputs: int) -> np.ndarray:
    """Return (outputs,) squared bounds on what rounding does to a layer's outputs, per output, summed over pixels.

    A sum of t products errs by at most t eps |w| |phi|; an input is in at most `overlap` patches.
    """
    eps = 4 * float(np.finfo(np.float64).eps)
    flat = layer.weight.reshape(len(layer.weight), -1)
    terms = flat.shape[1] + 2
    worst = layer.overlap * size * np.square(flat).sum(1) + layer.positions_out * np.square(layer.bias)
    worst = worst if len(worst) == outputs else np.full(outputs, worst.max())
    return (layer.lipschitz * eps * terms) ** 2 * worst


def _carry(layers: Sequence[ChainLayer], carried: Sequence[Tensor], slack: Sequence[Tensor]) -> float:
    """Return the smallest ||q|| at the output that the search over norm weights finds."""
    weights = [torch.from_numpy(np.ascontiguousarray(layer.weight)) for layer in layers]
    logs = [torch.zeros(len(layer.bias), dtype=torch.float64, requires_grad=True) for layer in layers[:-1]]
    best = math.inf
    with torch.enable_grad():
        optimiser = torch.optim.Adam(logs, lr=RATE) if logs else None
        for _ in range(STEPS if logs else 1):
            value = _remainder(layers, weights, carried, slack, logs)
            best = min(best, float(value.detach()))
            if optimiser is None or not math.isfinite(best):
                break
            optimiser.zero_grad()
            value.log().backward()  # relative, so that the units of the error do not matter
            optimiser.step()
    return best


def _remainder(
    layers: Sequence[ChainLayer],
    weights: Sequence[Tensor],
    carried: Sequence[Tensor],
    slack: Sequence[Tensor],
    logs: Sequence[Tensor],
) -> Tensor:
    """Return the bound on ||q|| at the output for the norm weights exp(logs)."""
    q = torch.zeros((), dtype=torch.float64)
    for index, layer in enumerate(layers):
        rows = logs[index].exp() if index < len(logs) else torch.ones(len(layer.bias), dtype=torch.float64)
        if index > 0:  # the first layer reads the same inputs in both networks
            q = layer.lipschitz * layer_gain(weights[index], rows, logs[index - 1].exp(), layer) * q
        if not layer.identity:
            share = layer.lipschitz / 2 if layer.elementwise else layer.lipschitz
            q = q + share * (rows * carried[index]).sum().clamp_min(_TINY).sqrt()
        q = q + (rows * slack[index]).sum().clamp_min(_TINY).sqrt()
    return q
