"""How far a pruned network is from the original: measured, certified from moments, and promised by the theorem."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.propagation import carried_error
from specprune.bounds.bound import Bound
from specprune.bounds.nodes import Feasibility
from specprune.bounds.spectral import approximation_a_priori
from specprune.compress import CalibrationData, LayerMoments, Moments, Pruned, collect_moments
from specprune.compress.batches import Forward, batch_size


@dataclass(frozen=True)
class Approximation:
    """The distance ||f - f#||_n = sqrt(mean over samples of ||f(x) - f#(x)||^2), three times.

    Args:
        measured: what it is on the data.
        output_norm: ||f||_n on the data.
        certificate: upper bound from the moments of the original network's layers and the pruned weights.
        a_priori: the theorem's bound with c <= 4, s <= 5/3; None unless the net was made in the theorem's way.
        a_priori_measured: the same with the measured c and s, valid for every J; None likewise.
        samples: number of samples n.
    """

    measured: float
    output_norm: float
    certificate: Bound
    a_priori: Bound | None
    a_priori_measured: Bound | None
    samples: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a quantity: its value, relative to ||f||_n, and whether its hypotheses hold."""
        rows: list[tuple[str, float, bool]] = [
            ("measured", self.measured, True),
            ("certificate", self.certificate.value, self.certificate.valid),
        ]
        if self.a_priori_measured is not None:
            rows.append(("a priori, measured c and s", self.a_priori_measured.value, self.a_priori_measured.valid))
        if self.a_priori is not None:
            rows.append(("a priori", self.a_priori.value, self.a_priori.valid))
        return [
            {"quantity": name, "value": value, "relative": value / self.output_norm, "hypotheses_hold": valid}
            for name, value, valid in rows
        ]

    def to_json(self) -> str:
        """Return the records as JSON."""
        return to_json({"samples": self.samples, "records": self.to_records()})

    def __str__(self) -> str:
        return format_table(self.to_records(), title=f"approximation error over {self.samples} samples")


def approximation(
    model: nn.Module,
    pruned: Pruned,
    batches: Iterable[Any] | CalibrationData,
    *,
    moments: Moments | None = None,
    forward: Forward | None = None,
) -> Approximation:
    """Return measured distance, certificate and a-priori bound of a pruned chain network.

    The certificate holds for any weights of the pruned network, however they were found.  It sums over the consumers
    the error that each makes on the ORIGINAL inputs (exact from their second moments), carried to the output by
    `carried_error`.

    Args:
        model: the original network.
        pruned: what `prune` made of it.
        batches: the samples that ||.||_n is over.
        moments: patch-level moments of the model's layers over the same samples and all positions; collected if None.
        forward: optional `forward(model, batch)`.

    Raises:
        ValueError: a network that is not a chain of known Lipschitz maps, or moments of other samples.

    Source:
        Suzuki et al. 2020, arXiv:1808.08558, Theorem 1, with constants derived here; the certificate is ours.
    """
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    before, after = trace_chain(model, data), trace_chain(pruned.model, data)
    if moments is None:
        moments = collect_moments(model, data, [layer.name for layer in before], level="patch")
    measured, output_norm, samples = output_distance(model, pruned.model, data)
    if moments.level != "patch" or moments.samples != samples:
        raise ValueError(
            f"the moments are of {moments.level} level over {moments.samples} samples; expected patch level over the "
            f"same {samples} samples"
        )
    certificate = _certificate(before, after, pruned, moments, output_norm)
    theory = measured_constants = None
    if pruned.report.settings["reconstruction"] == "channel":
        theory = _a_priori(before, pruned, output_norm, "theory")
        measured_constants = _a_priori(before, pruned, output_norm, "measured")
    return Approximation(measured, output_norm, certificate, theory, measured_constants, samples)


@torch.no_grad()
def output_distance(model: nn.Module, other: nn.Module, data: CalibrationData) -> tuple[float, float, int]:
    """Return ||f - g||_n, ||f||_n and n, in float64 over all samples.

    Args:
        model: f.
        other: g, with outputs of the same shape.
        data: the samples.
    """
    first, second = copy.deepcopy(model).eval(), copy.deepcopy(other).eval()
    difference = norm = 0.0
    samples = 0
    for batch in data.passes(first, "comparing outputs"):
        ours = data.call(first, batch).to(torch.float64)
        theirs = data.call(second, batch).to(torch.float64)
        difference += float((ours - theirs).square().sum())
        norm += float(ours.square().sum())
        samples += batch_size(batch)
    return math.sqrt(difference / samples), math.sqrt(norm / samples), samples


def _certificate(
    before: tuple[ChainLayer, ...], after: tuple[ChainLayer, ...], pruned: Pruned, moments: Moments, output_norm: float
) -> Bound:
    groups = {group.consumer: group for group in pruned.groups}
    terms: dict[str, float] = {}
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.name not in groups:  # reads the network's inputs: computed exactly
            continue
        group = groups[old.name]
        rows = pruned.nodes[old.name].indices if old.name in pruned.nodes else np.arange(len(old.bias))
        kept = pruned.nodes[group.name].indices
        difference = old.weight[rows].reshape(len(rows), group.width, -1).copy()
        difference[:, kept] -= new.weight.reshape(len(rows), len(kept), -1)
        error = _error_moment(difference.reshape(len(rows), -1), old.bias[rows] - new.bias, moments[old.name])
        # The theory's own norm weights are tried as well, which keeps the certificate below the a-priori bound.
        theory = [pruned.nodes[layer.name].weights for layer in after[index:-1]]
        terms[old.name] = carried_error(old.positions_out * error, after[index:], theory)
    return Bound.from_terms(
        "approximation certificate",
        terms,
        confidence=None,
        covers="pruned net",
        loss="L2(P_n) output error",
        trivial=output_norm,
        theorem="exact local errors, carried to the output through the pruned layers",
        source="Suzuki et al. 2020 (arXiv:1808.08558), section 4 of the proof of Theorem 1; certificate derived here",
    )


def _error_moment(difference: np.ndarray, shift: np.ndarray, moments: LayerMoments) -> np.ndarray:
    """Return E (Delta phi + shift)(Delta phi + shift)^T over the rows phi, from their first and second moments."""
    cross = np.outer(difference @ moments.mean(), shift)
    moment = difference @ moments.covariance() @ difference.T + cross + cross.T + np.outer(shift, shift)
    return (moment + moment.T) / 2


def _a_priori(before: tuple[ChainLayer, ...], pruned: Pruned, output_norm: float, constants: str) -> Bound:
    reports = {entry.consumer: entry for entry in pruned.report.groups}
    groups = {group.consumer: group for group in pruned.groups}
    lams, norms, checks, scales, spreads = [], [], [], [], []
    for layer in before:
        if layer.name not in reports:
            continue
        entry, group = reports[layer.name], groups[layer.name]
        whole = entry.width_after == entry.width_before  # then nothing is approximated: A = I, c = s = 1
        flat = layer.weight.reshape(len(layer.weight), -1)
        row_norms = np.linalg.norm(flat, axis=1)
        last = layer is before[-1]
        norms.append(float(np.linalg.norm(flat)) if last else math.sqrt(len(flat)) * float(row_norms.max()))
        lams.append(0.0 if whole else entry.lam)
        checks.append(
            Feasibility(1.0, 1.0, True) if whole else Feasibility(entry.c, entry.s, entry.c <= 4 and entry.s <= 5 / 3)
        )
        scales.append(math.sqrt(layer.positions_in * group.slots))
        spreads.append(layer.slots * group.slots * layer.lipschitz**2)
    return approximation_a_priori(
        lams,
        norms,
        feasibilities=checks,
        constants=constants,  # type: ignore[arg-type]
        scales=scales,
        spreads=spreads,
        output_norm=output_norm,
    )
