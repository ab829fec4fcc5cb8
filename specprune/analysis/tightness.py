"""Every generalization bound on one network: values, terms, hypotheses, and whether they say anything."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from specprune._records import format_table, to_json
from specprune.analysis.approximation import output_distance
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.bounds.bound import Bound, Hypothesis
from specprune.bounds.covering import LayerSize, covering_bound, dudley_bound, ramp_loss
from specprune.bounds.occam import occam_bound, occam_bound_relaxed
from specprune.compress import CalibrationData, Pruned
from specprune.compress.batches import Forward, StopForward
from specprune.compress.coding import QuantisedNetwork, fold_batch_norms, quantise_network

BITS = (2, 3, 4, 5, 6, 8)
MARGIN_EXPONENTS = tuple(range(-2, 11))


@dataclass(frozen=True)
class OccamResult:
    """Theorem A on one network rounded to some number of bits.

    Args:
        bound: on the 0-1 error of `network` (kl form).
        complexity: sqrt((code length + ln(1/delta)) / (2n)); the bound is at most train_error + complexity.
        network: the rounded network.
        train_error: its error rate on the training set.
    """

    bound: Bound
    complexity: float
    network: QuantisedNetwork
    train_error: float


@dataclass(frozen=True)
class BoundTable:
    """All bounds of one network, the smallest first.

    Args:
        bounds: label of the network and bound; Theorem A's networks are those rounded to some bits a weight.
        train_errors: network label to measured training error.
        test_errors: network label to measured test error, where a test set was given.
        samples: size n of the training set.
        delta: the bounds hold each with probability at least 1 - delta over the draw of the training set.
        notes: which bounds are missing, and why.
    """

    bounds: tuple[tuple[str, Bound], ...]
    train_errors: dict[str, float]
    test_errors: dict[str, float]
    samples: int
    delta: float
    notes: tuple[str, ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a bound, sorted by value."""
        records = []
        for label, bound in sorted(self.bounds, key=lambda pair: pair[1].value):
            dominant = max(bound.terms, key=lambda name: bound.terms[name])
            test = self.test_errors.get(label)
            records.append(
                {
                    "net": label,
                    "bound": bound.name,
                    "value": bound.value,
                    "vacuous": bound.vacuous,
                    "hypotheses_hold": bound.valid,
                    **{name: bound.terms.get(name) for name in ("empirical", "bias", "variance", "confidence")},
                    "dominant": dominant,
                    "covers": bound.covers,
                    "loss": bound.loss,
                    "train_error": self.train_errors[label],
                    "test_error": test,
                    "theorem": bound.theorem,
                }
            )
        return records

    def to_json(self) -> str:
        """Return the table and every bound with its terms and hypotheses as JSON."""
        return to_json(
            {
                "samples": self.samples,
                "delta": self.delta,
                "notes": self.notes,
                "records": self.to_records(),
                "bounds": [{"net": label, **bound.to_records()[0]} for label, bound in self.bounds],
                "hypotheses": [
                    {"net": label, "bound": bound.name, "statement": h.statement, "value": h.value, "holds": h.holds}
                    for label, bound in self.bounds
                    for h in bound.hypotheses
                ],
            }
        )

    def __str__(self) -> str:
        columns = ["net", "bound", "value", "vacuous", "hypotheses_hold", "empirical", "bias", "variance"]
        columns += ["confidence", "test_error"]
        title = f"bounds on the error rate, n = {self.samples}, each with probability {1 - self.delta:g}"
        return "\n".join([format_table(self.to_records(), columns, title), *self.notes])


def occam_results(
    model: nn.Module, train: CalibrationData, original_widths: Iterable[int], *, delta: float = 0.05
) -> dict[int, OccamResult]:
    """Return Theorem A's bound on a network rounded to 2, 3, ... bits a weight, by the number of bits.

    The number of bits is part of the description whose length is paid for, so it may be chosen after the fact, and all
    bounds hold at once with probability at least 1 - delta.

    Args:
        model: a classifier whose batch norms can be folded.
        train: the labelled training set that the model was trained on.
        original_widths: width of each prunable group before pruning (each costs its logarithm).
        delta: allowed probability of failure.
    """
    folded = fold_batch_norms(model, train)
    widths = list(original_widths)
    results = {}
    for bits in BITS:
        network = quantise_network(folded, bits)
        logits, targets = collect_logits(network.model, train, f"evaluating at {bits} bits")
        error, length = error_rate(logits, targets), network.code_length(widths)
        relaxed = occam_bound_relaxed(error, len(targets), length, delta)
        results[bits] = OccamResult(
            occam_bound(error, len(targets), length, delta), relaxed.value - error, network, error
        )
    return results


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
        best.append(min(candidates, key=lambda bound: bound.value))
    if input_radius is None:
        unproved = Hypothesis(f"||x|| <= D_x = {measured_radius:g} for every input (unproved)", measured_radius, False)
        best = [replace(bound, hypotheses=(unproved,)) for bound in best]
    return best[0], best[1]


def input_norm(data: CalibrationData, model: nn.Module) -> float:
    """Return the largest Euclidean norm of an input that the network is given for the data.

    Raises:
        TypeError: the network is called by keyword or with several inputs, which have no single norm.
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
    return max(norms)


def bound_table(
    model: nn.Module,
    train: Iterable[Any],
    pruned: Pruned | None = None,
    test: Iterable[Any] | None = None,
    *,
    delta: float = 0.05,
    input_radius: float | None = None,
    forward: Forward | None = None,
) -> BoundTable:
    """Return every bound on one trained classifier, and on its pruned version, side by side.

    Theorem A (Occam, kl) is about the network rounded to a few bits and is the number to quote; Theorems B (single
    cover) and C (Dudley) are complexity measures that are nearly always vacuous, and then marked so.

    Args:
        model: a chain classifier.
        train: the labelled training set that the model was trained on, all of it.
        pruned: what `prune` made of the model.
        test: a labelled test set to compare with.
        delta: each bound fails with at most this probability.
        input_radius: bound on ||x|| over all possible inputs (for pixels in [0, 1]^d: sqrt(d)); if None, the largest
            norm in the training set is taken and reported as an unproved hypothesis, which does not hold.
        forward: optional `forward(model, batch)`.

    Returns:
        The table.  Where the network is not a chain of maps with known Lipschitz constants, or is not called with one
        tensor, Theorems B and C are left out and a note says why.

    Raises:
        ValueError: batch norms or buffers that cannot be folded, or unsuitable data.
        TypeError: unlabelled batches.
    """
    data = CalibrationData(train, forward)
    held_out = None if test is None else CalibrationData(test, forward)
    logits, targets = collect_logits(model, data)
    notes: list[str] = []
    try:
        trace_chain(model, data)
        measured_radius = input_norm(data, model)
    except (ValueError, TypeError) as reason:  # Theorem A needs neither the chain nor its norms
        notes.append(f"no covering bounds: {reason}")
    nets: list[tuple[str, nn.Module]] = [("original", model)]
    if pruned is not None:
        nets.append(("pruned", pruned.model))
    widths = [] if pruned is None else [group.width for group in pruned.groups]
    rows: list[tuple[str, Bound]] = []
    train_errors, test_errors = {}, {}
    for label, net in nets:
        train_errors[label] = error_rate(*collect_logits(net, data))
        distance = 0.0 if net is model else output_distance(model, net, data)[0]
        if held_out is not None:
            test_errors[label] = error_rate(*collect_logits(net, held_out))
        cost = widths if label == "pruned" else []
        occam = min(occam_results(net, data, cost, delta=delta).values(), key=lambda result: result.bound.value)
        rounded = f"{label}, {occam.network.bits} bits"
        rows.append((rounded, occam.bound))
        train_errors[rounded] = occam.train_error
        if held_out is not None:
            test_errors[rounded] = error_rate(*collect_logits(occam.network.model, held_out))
        if notes:
            continue
        for bound in covering_bounds(
            trace_chain(net, data),
            logits,
            targets,
            distance,
            input_radius=input_radius,
            measured_radius=measured_radius,
            original_widths=cost,
            delta=delta,
        ):
            rows.append((label, bound))
    ordered = tuple(sorted(rows, key=lambda pair: pair[1].value))
    return BoundTable(ordered, train_errors, test_errors, len(targets), delta, tuple(notes))
