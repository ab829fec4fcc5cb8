"""Theorem A on networks that are written down: weights rounded to a few bits, the length of the description paid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.bounds.bound import QUANTISED, Bound
from specprune.bounds.occam import occam_bound, occam_bound_relaxed
from specprune.bounds.pac_bayes import (
    catoni_grid_bound,
    langford_seeger_bound,
    maurer_bound,
    mcallester_bound,
    quadratic_bound,
    thiemann_bound,
)
from specprune.compress import CalibrationData
from specprune.compress.coding import QuantisedNetwork, fold_batch_norms, quantise_network

BITS = (2, 3, 4, 5, 6, 8)


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


def coded_pac_bayes_bounds(result: OccamResult, samples: int, code_length: float, delta: float) -> list[Bound]:
    """Return the PAC-Bayes bounds of one written-down network: prior exp(-code length), posterior all on that network.

    The divergence of a point mass from the prior is the code length, so that all forms can be compared on one network;
    Occam's bound, which needs no average over a posterior, is the better one here.

    Args:
        result: the network.
        samples: size n of the training set.
        code_length: of its description, in nats.
        delta: allowed probability of failure of each bound.

    Raises:
        ValueError: fewer than 8 samples.
    """
    if samples < 8:  # Maurer's lemma
        raise ValueError(f"the training set has {samples} samples: PAC-Bayes bounds need at least 8")
    forms = (
        maurer_bound,
        langford_seeger_bound,
        catoni_grid_bound,
        quadratic_bound,
        thiemann_bound,
        mcallester_bound,
    )
    return [replace(form(result.train_error, code_length, samples, delta), covers=QUANTISED) for form in forms]
