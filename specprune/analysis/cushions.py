"""How a trained network damps noise: layer cushions, interlayer cushions, contraction and smoothness, measured.

Write x^i = A^i phi(x^{i-1}) + b^i for the output of layer i of a chain (batch norms folded into A^i, b^i), phi for what
lies between two layers, J^{i,j} for the Jacobian of the map M^{i,j} from x^i to x^j, at x^i.  Measured are

    layer cushion        mu_i     = ||x^i|| / (||A^i||_F ||phi(x^{i-1})||),
    interlayer cushion   mu_{i,j} = ||x^j|| / (||J^{i,j}||_F ||x^i||),  mu_{i->} = min(1/sqrt(h_i), min_j mu_{i,j}),
    contraction          c        = L_i ||x^i|| / ||phi(x^i)||,  L_i the Lipschitz constant of phi,
    smoothness           rho      = ||z|| ||x^j|| / (||x^i|| ||M^{i,j}(x^i + z) - x^j - J^{i,j} z||),  z Gaussian,
    beta                 = sqrt(pixels) * largest share of one pixel of x^i in ||J^{i,j}||_F  (1: evenly spread).

Large cushions mean that signals pass better than noise, and that few numbers describe the network
(`specprune.bounds.noise_stability`).  For ReLU networks without biases J^{i,j} x^i = x^j and these are the source's
definitions; with biases they are what the compression lemma needs.  Cushions do not change when layers without biases
are rescaled by positive factors (homogeneous activations), nor when nodes are renumbered.
Source: Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296); the form of beta is recalled from there.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from specprune._records import format_table, to_json
from specprune.analysis.chain import trace_chain
from specprune.analysis.evaluation import double_batch
from specprune.analysis.jacobians import Steps, jacobian_energies
from specprune.bounds.bound import check_count, check_number
from specprune.bounds.noise_stability import StableLayer
from specprune.compress import CalibrationData
from specprune.compress.batches import Forward
from specprune.compress.coding import fold_batch_norms

_SMOOTHNESS_BATCH = 256


@dataclass(frozen=True)
class LayerCushions:
    """What was measured on one layer; minima are over samples, and quantiles are reported beside them.

    Args:
        layer: name.
        outputs: h_i, numbers in the layer's output.
        weights: number of weights.
        overlap: in how many patches an input pixel is, at most.
        cushion: mu_i, smallest over all samples.
        cushion_quantile: its quantile over all samples.
        interlayer: later layer to mu_{i,j}, smallest over the Jacobian samples.
        interlayer_quantile: later layer to the quantile of mu_{i,j}.
        contraction: c of the map behind the layer, largest over all samples; 0 behind the last layer.
        contraction_quantile: its upper quantile.
        smoothness: rho_delta, a value that noise undercuts with at most the stated probability (None: too few draws).
        smoothness_min: smallest rho seen.
        beta: well-distributedness of the Jacobians to later layers, largest over them and the samples.
        jacobian_error: largest relative standard error of ||J||_F from random probes; 0 where all were exact.
    """

    layer: str
    outputs: int
    weights: int
    overlap: int
    cushion: float
    cushion_quantile: float
    interlayer: dict[str, float]
    interlayer_quantile: dict[str, float]
    contraction: float
    contraction_quantile: float
    smoothness: float | None
    smoothness_min: float
    beta: float
    jacobian_error: float

    @property
    def forward_cushion(self) -> float:
        """mu_{i->} = min(1/sqrt(h_i), min_{j>i} mu_{i,j})."""
        return min(1 / math.sqrt(self.outputs), *self.interlayer.values(), math.inf)

    @property
    def forward_cushion_quantile(self) -> float:
        """mu_{i->} with the quantiles of mu_{i,j} in the place of the minima."""
        return min(1 / math.sqrt(self.outputs), *self.interlayer_quantile.values(), math.inf)


@dataclass(frozen=True)
class Cushions:
    """The noise stability of a network on a data set.

    Args:
        layers: one entry a layer, input side first.
        samples: number of samples behind cushions, contraction and output norm: all of them.
        jacobian_samples: number of samples behind interlayer cushions, beta and smoothness: a random subset.
        quantile: share of samples below the reported quantiles (above, for the contraction).
        output_norm: largest ||f(x)||, in logit units.
        noise: ||z|| / ||x^i|| of the noise behind the smoothness, root mean square.
        draws: number of pairs of a sample and a noise behind the smoothness of each layer.
        smoothness_delta: probability with which noise may undercut the reported smoothness.
        confidence: Clopper-Pearson confidence of that statement, for each layer.
    """

    layers: tuple[LayerCushions, ...]
    samples: int
    jacobian_samples: int
    quantile: float
    output_norm: float
    noise: float
    draws: int
    smoothness_delta: float
    confidence: float

    @property
    def contraction(self) -> float:
        """c, the largest over the layers."""
        return max(layer.contraction for layer in self.layers)

    @property
    def smoothness(self) -> float:
        """rho_delta, the smallest over the layers; 0 where there were too few draws to state one."""
        return min(0.0 if layer.smoothness is None else layer.smoothness for layer in self.layers)

    def stable_layers(self) -> tuple[StableLayer, ...]:
        """Return the layers as `specprune.bounds.noise_stability` takes them, with minima over the samples."""
        return tuple(
            StableLayer(
                layer.weights,
                layer.outputs,
                layer.cushion,
                min(layer.interlayer.values(), default=math.inf),
                layer.overlap,
            )
            for layer in self.layers
        )

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer."""
        return [
            {
                "layer": layer.layer,
                "outputs": layer.outputs,
                "weights": layer.weights,
                "overlap": layer.overlap,
                "mu": layer.cushion,
                "mu_quantile": layer.cushion_quantile,
                "mu_forward": layer.forward_cushion,
                "mu_forward_quantile": layer.forward_cushion_quantile,
                "c": layer.contraction,
                "c_quantile": layer.contraction_quantile,
                "rho": layer.smoothness,
                "rho_min": layer.smoothness_min,
                "beta": layer.beta,
                "jacobian_error": layer.jacobian_error,
            }
            for layer in self.layers
        ]

    def to_json(self) -> str:
        """Return records, every interlayer cushion and the setting as strict JSON text."""
        setting = {key: value for key, value in vars(self).items() if key != "layers"}
        rows = [
            {**record, "interlayer": layer.interlayer, "interlayer_quantile": layer.interlayer_quantile}
            for record, layer in zip(self.to_records(), self.layers, strict=True)
        ]
        return to_json({**setting, "layers": rows})

    def __str__(self) -> str:
        title = f"cushions: minima over {self.samples} samples (Jacobians: {self.jacobian_samples}), quantile "
        title += f"{self.quantile:g}, max ||f|| = {self.output_norm:.4g}"
        note = f"rho: undercut with probability <= {self.smoothness_delta:g} (confidence {self.confidence:g}, "
        note += f"{self.draws} draws a layer, ||z|| = {self.noise:g} ||x||); '-' where the draws are too few"
        return "\n".join([format_table(self.to_records(), title=title), note])


@torch.no_grad()
def cushions(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    *,
    samples: int = 64,
    quantile: float = 0.05,
    noise: float = 0.1,
    draws: int = 1024,
    smoothness_delta: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    forward: Forward | None = None,
) -> Cushions:
    """Return the noise stability of a trained chain network, layer by layer, in float64.

    Cushions, contraction and output norm are taken over all samples; Jacobians, and noise, over a random subset.  The
    compression lemma uses minima over the whole training set, so a subset gives optimistic interlayer cushions.

    Args:
        model: a chain of Linear and Conv2d layers (see `trace_chain`) that ends in one of them; left as it is.
        batches: re-iterable of `(inputs, targets)` or of inputs.
        samples: number of samples for Jacobians and noise.
        quantile: which quantile to report beside the minima, in (0, 1).
        noise: root mean square of ||z||/||x^i|| for the smoothness, positive.
        draws: pairs of a random sample and a noise, for each layer.
        smoothness_delta: probability with which noise may undercut rho.
        confidence: of the statement on rho, for each layer.
        seed: of subset, probes and noise.
        forward: optional `forward(model, batch)`.

    Returns:
        A `Cushions`.

    Raises:
        ValueError: no chain (the message says why), an operation behind the last layer, or a number out of range.
        TypeError: the network is not called with one tensor.

    Source:
        Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296), definitions of the cushions; see the module.
    """
    samples, draws = check_count("samples", samples), check_count("draws", draws)
    quantile = check_number("quantile", quantile, 0.0, 1.0, open_low=True, open_high=True)
    noise = check_number("noise", noise, 0.0, open_low=True)
    smoothness_delta = check_number("smoothness_delta", smoothness_delta, 0.0, 1.0, open_low=True, open_high=True)
    confidence = check_number("confidence", confidence, 0.0, 1.0, open_low=True, open_high=True)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    folded = fold_batch_norms(model, data)
    layers = trace_chain(folded, data)
    chain = Steps(folded, layers)
    generator = torch.Generator().manual_seed(seed)
    lipschitz = [layer.lipschitz for layer in layers]
    frobenius = [float(np.linalg.norm(layer.weight)) for layer in layers]
    kept, keys = torch.empty(0), torch.empty(0)
    mu: list[list[Tensor]] = [[] for _ in layers]
    contraction: list[list[Tensor]] = [[] for _ in layers]
    largest, count = 0.0, 0
    for inputs, outputs in _inputs(folded, data):
        x = inputs
        for index in range(len(layers)):
            entering = chain.between(index - 1, x)
            if index:
                contraction[index - 1].append(_ratio(lipschitz[index - 1] * _norm(x), _norm(entering)))
            x = chain.affine(index, entering)
            mu[index].append(_ratio(_norm(x), frobenius[index] * _norm(entering)))
        if x.numel() != outputs.numel() or not torch.allclose(x.flatten(1), outputs.flatten(1).double(), 1e-3, 1e-3):
            raise ValueError(
                "the network goes on behind its last layer; the cushions need a chain that ends in a layer"
            )
        largest, count = max(largest, float(_norm(x).max())), count + len(x)
        # The samples with the smallest random keys are a uniformly random subset, in one pass.
        drawn = torch.rand(len(inputs), generator=generator, dtype=torch.float64)
        pool, all_keys = (inputs, drawn) if not len(keys) else (torch.cat([kept, inputs]), torch.cat([keys, drawn]))
        chosen = all_keys.argsort()[:samples]
        kept, keys = pool[chosen], all_keys[chosen]
    states = [chain.advance(-1, kept)]
    for index in range(len(layers) - 1):
        states.append(chain.advance(index, states[-1]))
    energies, errors = jacobian_energies(chain, states, generator)
    ratios = [_smoothness(chain, states, index, noise, draws, generator) for index in range(len(layers))]
    order = _order_statistic(draws, smoothness_delta, confidence)
    found = []
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        later = range(i + 1, len(layers))
        between = {
            j: _ratio(_norm(states[j]), energies[i, j].flatten(1).sum(1).sqrt() * _norm(states[i])) for j in later
        }
        bent = ratios[i].sort().values
        found.append(
            LayerCushions(
                layer=layer.name,
                outputs=states[i][0].numel(),
                weights=layer.weight.size,
                overlap=layer.overlap,
                cushion=float(torch.cat(mu[i]).min()),
                cushion_quantile=_quantile(torch.cat(mu[i]), quantile),
                interlayer={layers[j].name: float(between[j].min()) for j in later},
                interlayer_quantile={layers[j].name: _quantile(between[j], quantile) for j in later},
                contraction=0.0 if last else float(torch.cat(contraction[i]).max()),
                contraction_quantile=0.0 if last else -_quantile(-torch.cat(contraction[i]), quantile),
                smoothness=None if order == 0 and not last else float(bent[max(order, 1) - 1]),
                smoothness_min=float(bent[0]),
                beta=max((_beta(energies[i, j]) for j in later), default=1.0),
                jacobian_error=max((errors[j] for j in later), default=0.0),
            )
        )
    return Cushions(tuple(found), count, len(kept), quantile, largest, noise, draws, smoothness_delta, confidence)


def _inputs(folded: nn.Module, data: CalibrationData) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield what the network is given, in float64, and what it answers."""
    work = copy.deepcopy(folded)
    caught: list[tuple[Any, ...]] = []
    work.register_forward_pre_hook(lambda _, args: caught.append(args))
    for batch in data.passes(folded, "measuring cushions"):
        caught.clear()
        outputs = data.call(work, batch)
        if len(caught) != 1 or len(caught[0]) != 1 or not isinstance(caught[0][0], Tensor):
            raise TypeError("cushions need a network that is called with one tensor, model(inputs)")
        yield double_batch(caught[0][0].detach().cpu()), outputs.detach().cpu()


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, +inf where nothing is below: the inequalities above >= mu * below hold for any mu there."""
    return torch.where(below > 0, above / below, torch.full_like(above, math.inf))


def _quantile(values: Tensor, share: float) -> float:
    """Return an order statistic with at most the share of values below it: no interpolation, for infinities occur."""
    return float(values.sort().values[int(share * len(values))])


def _beta(energy: Tensor) -> float:
    """Return sqrt(pixels) times the largest share of one pixel in the Jacobian's Frobenius norm."""
    per_pixel = energy.flatten(2).sum(1) if energy.dim() > 2 else energy.sum(1, keepdim=True)
    shares = per_pixel.amax(1) * per_pixel.shape[1] / per_pixel.sum(1).clamp_min(torch.finfo(energy.dtype).tiny)
    return max(1.0, float(shares.max().sqrt()))


def _smoothness(
    chain: Steps, states: list[Tensor], index: int, noise: float, draws: int, generator: torch.Generator
) -> Tensor:
    """Return rho of each draw of a sample and a noise: the smallest over all later layers."""
    found = []
    for start in range(0, draws, _SMOOTHNESS_BATCH):
        size = min(_SMOOTHNESS_BATCH, draws - start)
        chosen = torch.randint(0, len(states[index]), (size,), generator=generator)
        x = states[index][chosen]
        scale = (noise * _norm(x) / math.sqrt(x[0].numel())).reshape(-1, *[1] * (x.dim() - 1))
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale
        strength, moved, tangent = _ratio(_norm(z), _norm(x)), x + z, z
        worst = torch.full((size,), math.inf, dtype=torch.float64)
        for k in range(index, len(states) - 1):
            x, tangent = torch.func.jvp(functools.partial(chain.advance, k), (x,), (tangent,))[:2]
            moved = chain.advance(k, moved)
            rest = _norm(moved - x - tangent)
            # Differences below rounding are none: a linear map has no curvature.
            rest = torch.where(rest > 1e-12 * _norm(x), rest, torch.zeros_like(rest))
            worst = torch.minimum(worst, _ratio(strength * _norm(x), rest))
        found.append(worst)
    return torch.cat(found)


def _order_statistic(draws: int, delta: float, confidence: float) -> int:
    """Return the largest k such that the k-th smallest of the draws is, with the confidence, below the delta-quantile.

    The k-th smallest exceeds the quantile only if fewer than k draws fall below it: P(Bin(draws, delta) <= k - 1) must
    be at most 1 - confidence (Clopper-Pearson); 0 if there is no such k.
    """
    k = int(binom.ppf(1 - confidence, draws, delta))
    # ppf gives the smallest m with P(Bin <= m) >= 1 - confidence, so P(Bin <= m - 1) < 1 - confidence.
    return k
