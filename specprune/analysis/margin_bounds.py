"""Bounds from margins and norms, each at the margin of a priced grid that suits it best."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from specprune.analysis.chain import ChainLayer
from specprune.analysis.decay import spectral_layers, truncate_weights
from specprune.analysis.evaluation import DoubleBatches, collect_logits_of, double_copy
from specprune.analysis.layer_norms import NetworkNorms
from specprune.bounds.bound import Bound, Hypothesis
from specprune.bounds.covering import LayerSize, covering_bound, dudley_bound, ramp_loss
from specprune.bounds.low_rank import low_rank_bound, rank_profile
from specprune.bounds.norms_pac_bayes import margin_error, neyshabur_2018_bound
from specprune.bounds.norms_rademacher import (
    bartlett_bound,
    golowich_bound,
    neyshabur_2015_bound,
    neyshabur_2019_bound,
)
from specprune.bounds.uncompressed import loss_pair, uncompressed_bound
from specprune.compress import CalibrationData
from specprune.compress.batches import StopForward

MARGIN_EXPONENTS = tuple(range(-2, 11))
_MODERATE = 0.5  # a margin loss above it says little of the network, and a wide margin makes every bound small
_RANK_LEVELS = (0.3, 0.1, 0.05)


def best_margin(candidates: Sequence[Bound]) -> Bound:
    """Return the smallest of one theorem's bounds over the grid of margins, which each of them has paid for.

    Where all are vacuous, the smallest is one with so wide a margin that it hardly looks at the network; then the
    smallest among those whose margin loss is at most 1/2 is shown, or if there is none, that of the narrowest margin.

    Args:
        candidates: by growing margin.
    """
    best = min(candidates, key=lambda bound: bound.value)
    if not best.vacuous:
        return best
    moderate = [bound for bound in candidates if bound.terms["empirical"] <= _MODERATE]
    return min(moderate or candidates[:1], key=lambda bound: bound.value)


def layer_sizes(layers: Iterable[ChainLayer]) -> list[LayerSize]:
    """Return the layers of a chain as the covering bounds see them: counts and norms with the maps behind folded in.

    A convolution's norm is sqrt(overlap) ||[W_1 ... W_s]||_op, a norm of its weights that bounds its operator norm.
    """
    return [
        LayerSize(
            weights=layer.weight.size,
            biases=len(layer.bias),
            operator_norm=layer.lipschitz
            * math.sqrt(layer.overlap)
            * float(np.linalg.norm(layer.weight.reshape(len(layer.weight), -1), ord=2)),
            bias_norm=layer.lipschitz * math.sqrt(layer.positions_out) * float(np.linalg.norm(layer.bias)),
        )
        for layer in layers
    ]


def covering_bounds(
    layers: Iterable[ChainLayer],
    logits: np.ndarray,
    targets: np.ndarray,
    approximation_error: float,
    *,
    input_radius: float | None,
    measured_radius: float,
    original_widths: Iterable[int],
    delta: float,
) -> tuple[Bound, Bound]:
    """Return Theorems B and C for a pruned network, at the margin on the priced grid that makes each smallest.

    Args:
        layers: of the pruned network.
        logits: (n, classes) of the ORIGINAL network on the training set.
        targets: (n,) true classes.
        approximation_error: ||f - f#||_n on the training set; 0 for the original network itself.
        input_radius: bound on ||x|| over all possible inputs; if None, `measured_radius` stands in, and the hypothesis
            on it counts as not holding, for other inputs may be longer.
        measured_radius: the largest ||x|| in the training set.
        original_widths: width of each prunable group before pruning.
        delta: allowed probability of failure.
    """
    sizes, widths = layer_sizes(layers), list(original_widths)
    best: list[Bound] = []
    for theorem in (covering_bound, dudley_bound):
        candidates = [
            theorem(
                sizes,
                input_radius=measured_radius if input_radius is None else input_radius,
                n=len(targets),
                gamma=2.0**exponent,
                delta=delta,
                empirical_ramp=ramp_loss(logits, targets, 2.0**exponent),
                approximation_error=approximation_error,
                original_widths=widths,
                measured_radius=measured_radius,
            )
            for exponent in MARGIN_EXPONENTS
        ]
        best.append(best_margin(candidates))
    first, second = (with_radius(bound, input_radius, measured_radius) for bound in best)
    return first, second


def with_radius(bound: Bound, input_radius: float | None, measured_radius: float) -> Bound:
    """Return a bound that took `measured_radius` for a radius that is not known, with that hypothesis not holding."""
    if input_radius is not None:
        return bound
    unproved = Hypothesis(f"||x|| <= D_x = {measured_radius:g} for every input (unproved)", measured_radius, False)
    return replace(bound, hypotheses=(unproved,))


def norm_bounds(
    norms: NetworkNorms,
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    input_radius: float | None,
    delta: float,
    covers: str,
) -> list[Bound]:
    """Return the bounds of Bartlett, Neyshabur and Golowich on one network.

    Args:
        norms: of the network, from `measure_norms`.
        logits: (n, classes) of the network on the training set.
        targets: (n,) true classes.
        input_radius: bound on ||x|| over all possible inputs; None if it is not known.
        delta: allowed probability of failure of each bound.
        covers: which network this is.
    """
    shared: dict[str, Any] = {"delta": delta, "covers": covers}
    theorems: list[Callable[[float, float, float], Bound]] = [
        lambda g, r, _: bartlett_bound(norms.layers, norms.inputs, gamma=g, empirical_ramp=r, **shared),
        lambda g, r, _: golowich_bound(norms.layers, norms.inputs, gamma=g, empirical_ramp=r, **shared),
        lambda g, r, _: golowich_bound(norms.layers, norms.inputs, gamma=g, empirical_ramp=r, version="l1", **shared),
        lambda g, r, _: neyshabur_2015_bound(norms.layers, norms.inputs, gamma=g, empirical_ramp=r, **shared),
        *(
            lambda g, _, e, version=version: neyshabur_2018_bound(
                norms.layers,
                norms.inputs,
                gamma=g,
                empirical_margin_error=e,
                input_radius=input_radius,
                version=version,
                **shared,
            )
            for version in ("product", "layers")
        ),
    ]
    if norms.units is not None:
        units = norms.units
        theorems.append(
            lambda g, r, _: neyshabur_2019_bound(norms.layers, units, norms.inputs, gamma=g, empirical_ramp=r, **shared)
        )
    margins = [2.0**exponent for exponent in MARGIN_EXPONENTS]
    losses = [(g, ramp_loss(logits, targets, g), margin_error(logits, targets, g)) for g in margins]
    return [best_margin([theorem(*loss) for loss in losses]) for theorem in theorems]


def low_rank_bounds(
    model: nn.Module,
    chain: Sequence[ChainLayer],
    data: CalibrationData,
    *,
    input_radius: float | None,
    measured_radius: float,
    delta: float,
) -> list[Bound]:
    """Return the bound on a network through its weights cut to low rank, the best over priced ranks and margins.

    Args:
        model: a chain without batch norms, such as `fold_batch_norms` gives.
        chain: its layers.
        data: the labelled training set.
        input_radius: bound on ||x|| over all possible inputs; None if it is not known.
        measured_radius: the largest norm in the training set.
        delta: allowed probability of failure.
    """
    wide = CalibrationData(DoubleBatches(data, model), data.call)
    layers = spectral_layers(chain)
    profiles = [rank_profile(layers, level) for level in _RANK_LEVELS]
    names = [layer.name for layer in chain]
    cuts = [truncate_weights(model, dict(zip(names, ranks, strict=True))) for ranks in profiles]
    (original, *lower), targets = collect_logits_of([double_copy(model), *cuts], wide, "evaluating at low rank")
    candidates = []
    for ranks, logits in zip(profiles, lower, strict=True):
        pairs = [loss_pair(original, logits, targets, 2.0**exponent) for exponent in MARGIN_EXPONENTS]
        candidates += [(ranks, pair) for pair in pairs if pair.original <= _MODERATE] or [(ranks, pairs[0])]
    radius = measured_radius if input_radius is None else input_radius
    bound = low_rank_bound(layers, candidates, input_radius=radius, delta=delta, measured_radius=measured_radius)
    return [with_radius(bound, input_radius, measured_radius)]


def coded_pair_bound(
    chain: Sequence[ChainLayer],
    code_length: float,
    original: np.ndarray,
    coded: np.ndarray,
    targets: np.ndarray,
    *,
    input_radius: float | None,
    measured_radius: float,
    delta: float,
) -> Bound:
    """Return Theorem E: the original network's error through that of a network which was written down.

    Args:
        chain: layers of the original network.
        code_length: of the written-down network, in nats.
        original: (n, classes) logits of the original network on the training set.
        coded: those of the written-down network.
        targets: (n,) true classes.
        input_radius: bound on ||x|| over all possible inputs; None if it is not known.
        measured_radius: the largest norm in the training set.
        delta: allowed probability of failure.
    """
    sizes = layer_sizes(chain)
    candidates = [
        uncompressed_bound(
            sizes,
            code_length,
            loss_pair(original, coded, targets, 2.0**exponent),
            input_radius=measured_radius if input_radius is None else input_radius,
            measured_radius=measured_radius,
            delta=delta,
        )
        for exponent in MARGIN_EXPONENTS
    ]
    return with_radius(best_margin(candidates), input_radius, measured_radius)


def input_norm(data: CalibrationData, model: nn.Module) -> float:
    """Return the largest Euclidean norm of an input that the network is given for the data.

    Raises:
        TypeError: the network is called by keyword or with several inputs, which have no single norm.
        ValueError: all inputs are zero.
    """
    work = copy.deepcopy(model).eval()
    norms: list[float] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            raise TypeError("the covering bounds need a network that is called with one tensor, model(inputs)")
        norms.append(float(args[0].detach().flatten(1).double().norm(dim=1).max()))
        raise StopForward

    work.register_forward_pre_hook(stop)
    for batch in data.passes(model, "measuring inputs"):
        with contextlib.suppress(StopForward):
            data.call(work, batch)
    if not max(norms):
        raise ValueError("all inputs of the network are zero: the bounds need inputs of some size, check the data")
    return max(norms)
