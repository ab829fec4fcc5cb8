"""How far a pruned network is from the original: measured, certified from moments, and promised by the theorem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.evaluation import DoubleBatches, double_batch, double_copy
from specprune.analysis.layerwise import layerwise_certificate
from specprune.analysis.propagation import carried_error
from specprune.bounds.bound import Bound, Hypothesis
from specprune.bounds.degrees_of_freedom import degrees_of_freedom, eigenvalues
from specprune.bounds.nodes import Feasibility
from specprune.bounds.spectral import approximation_a_priori, row_norm_bound
from specprune.compress import CalibrationData, LayerMoments, Moments, Pruned, collect_moments
from specprune.compress.batches import Forward, batch_size
from specprune.compress.layers import get_layer

_SPLIT = 1e-9  # t of `_error_moment`, which enlarges the certificate by half of it
_SAME_DATA = 16  # roundings of the network's dtype that its covariances may differ by


@dataclass(frozen=True)
class Approximation:
    """The distance ||f - f#||_n = sqrt(mean over samples of ||f(x) - f#(x)||^2), three times.

    Args:
        measured: what it is on the data.
        output_norm: ||f||_n on the data.
        certificate: upper bound from the moments of the original network's layers and the pruned weights.
        layerwise: upper bound from the error that each pruned layer alone makes on the original network's activations,
            measured; usually the tighter one.
        a_priori: the theorem's bound with c <= 4, s <= 5/3; None unless the net was made in the theorem's way.  One of
            its hypotheses is that the net was pruned on these very samples, which lambda, c and s are about.
        a_priori_measured: the same with the measured c and s, valid for every J; None likewise.
        samples: number of samples n.
    """

    measured: float
    output_norm: float
    certificate: Bound
    layerwise: Bound
    a_priori: Bound | None
    a_priori_measured: Bound | None
    samples: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a quantity: its value, relative to ||f||_n, and whether its hypotheses hold."""
        rows: list[tuple[str, float, bool]] = [
            ("measured", self.measured, True),
            ("layer-by-layer certificate", self.layerwise.value, self.layerwise.valid),
            ("certificate from moments", self.certificate.value, self.certificate.valid),
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

    Both certificates hold for any weights of the pruned network, however they were found.  The one from moments sums
    over the layers the error that each makes on the ORIGINAL inputs (exact from their second moments), carried to the
    output by `carried_error`.  Networks are run in float64 and the certificates are rounded up, so that they hold to
    the last digit where the error is as small as the rounding of float32.

    Args:
        model: the original network.
        pruned: what `prune` made of it.
        batches: the samples that ||.||_n is over.
        moments: what `patch_moments` gives for the model over the same samples; collected if None.
        forward: optional `forward(model, batch)`.

    Raises:
        ValueError: a network that is not a chain of known Lipschitz maps, or moments of other samples.

    Source:
        Suzuki et al. 2020, arXiv:1808.08558, Theorem 1, with constants derived here; the certificate is ours.
    """
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    before, after = trace_chain(model, data), trace_chain(pruned.model, data)
    if moments is None:
        moments = patch_moments(model, data, [layer.name for layer in before])
    measured, output_norm, samples = output_distance(model, pruned.model, data)
    _check_moments(moments, before, samples)
    certificate = _certificate(before, after, pruned, moments, output_norm)
    kept = {group.consumer: pruned.nodes[group.name].indices for group in pruned.groups}
    layerwise = layerwise_certificate(model, pruned.model, kept, data, output_norm)
    theory = measured_constants = None
    if pruned.report.settings["reconstruction"] == "channel":
        same = _same_data(pruned, moments)
        theory = _a_priori(before, pruned, output_norm, "theory", same)
        measured_constants = _a_priori(before, pruned, output_norm, "measured", same)
    return Approximation(measured, output_norm, certificate, layerwise, theory, measured_constants, samples)


def patch_moments(model: nn.Module, data: CalibrationData, layers: Sequence[str]) -> Moments:
    """Return the patch-level moments of layers over all positions, with the network run in float64.

    Args:
        model: the network; left as it is.
        data: the samples.
        layers: names of the layers.
    """
    wide = CalibrationData(DoubleBatches(data, model), data.call)
    return collect_moments(double_copy(model), wide, layers, level="patch")


def _check_moments(moments: Moments, chain: tuple[ChainLayer, ...], samples: int) -> None:
    if moments.level != "patch" or moments.samples != samples:
        raise ValueError(
            f"the moments are of {moments.level} level over {moments.samples} samples; expected patch level over the "
            f"same {samples} samples"
        )
    for layer in chain:
        if layer.name not in moments or moments[layer.name].rows != samples * layer.positions_out:
            raise ValueError(
                f"the moments are not over all {layer.positions_out} output positions of layer {layer.name!r} in each "
                f"of the {samples} samples; take them from patch_moments, with images of one size"
            )


@torch.no_grad()
def output_distance(model: nn.Module, other: nn.Module, data: CalibrationData) -> tuple[float, float, int]:
    """Return ||f - g||_n, ||f||_n and n over all samples, with both networks run in float64.

    Args:
        model: f.
        other: g, with outputs of the same shape.
        data: the samples.
    """
    first, second = double_copy(model), double_copy(other)
    difference = norm = 0.0
    samples = 0
    for batch in data.passes(model, "comparing outputs"):
        wide = double_batch(batch)
        ours = data.call(first, wide).to(torch.float64)
        theirs = data.call(second, wide).to(torch.float64)
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
        rows = pruned.nodes[old.name].indices if old.name in pruned.nodes else np.arange(len(old.bias))
        width = groups[old.name].width if old.name in groups else old.weight.shape[1]
        kept = pruned.nodes[groups[old.name].name].indices if old.name in groups else np.arange(width)
        difference = old.weight[rows].reshape(len(rows), width, -1).copy()
        difference[:, kept] -= new.weight.reshape(len(rows), len(kept), -1)
        shift = old.bias[rows] - new.bias
        if not difference.any() and not shift.any():
            if old.name in groups:
                terms[old.name] = 0.0
            continue  # the first layer makes no error, unless it was trained further
        error = _error_moment(old, rows, difference.reshape(len(rows), -1), shift, moments[old.name])
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


def _error_moment(
    layer: ChainLayer, rows: np.ndarray, difference: np.ndarray, shift: np.ndarray, moments: LayerMoments
) -> np.ndarray:
    """Return E (Delta phi + shift)(Delta phi + shift)^T over the rows phi, from their first and second moments.

    It is rounded up in the Loewner order, for the rounding of two computations in float64.  Here, entry ij is a sum of
    products of size at most b_i b_j, so it errs by some eps b_i b_j (sums of n terms err like sqrt(n)).  In the
    networks, output i errs by some eps a_i, where a_i is the size of the products that it sums; with the error u that
    gives E (u + v)(u + v)^T <= (1 + t) E u u^T + (1 + 1/t) E v v^T for every t > 0.  Both matrices of rounding are at
    most the diagonal matrices of their absolute row sums (Gershgorin).
    """
    covariance = moments.covariance()
    cross = np.outer(difference @ moments.mean(), shift)
    moment = difference @ covariance @ difference.T + cross + cross.T + np.outer(shift, shift)
    norms = np.sqrt(covariance.diagonal().clip(0))
    flat = layer.weight.reshape(len(layer.weight), -1)[rows]
    here = np.abs(difference) @ norms + np.abs(shift)
    there = 2 * (np.abs(flat) @ norms + np.abs(layer.bias[rows])) + here
    terms, eps = difference.shape[1] + 2, float(np.finfo(np.float64).eps)
    slack = 2 * eps * (terms + math.sqrt(moments.rows)) * here * here.sum()
    slack += (1 + 1 / _SPLIT) * (eps * terms) ** 2 * there * there.sum()
    return (1 + _SPLIT) * (moment + moment.T) / 2 + np.diag(slack)


def _same_data(pruned: Pruned, moments: Moments) -> Hypothesis:
    """Compare the data that a network was pruned on with the moments: numbers of samples, and spectra where known."""
    same = pruned.report.samples == moments.samples
    rounding = _SAME_DATA * max(torch.finfo(parameter.dtype).eps for parameter in pruned.model.parameters())
    for entry, group in zip(pruned.report.groups, pruned.groups, strict=True):
        if isinstance(get_layer(pruned.model, group.consumer), nn.Linear):  # a convolution's patches are no pixels
            spectrum = eigenvalues(moments[group.consumer].node_covariance(group.width))
            dof = float(degrees_of_freedom(spectrum, entry.lam))
            # What a relative change of the covariance by `rounding` can make of N, to first order.
            slope = float(np.sum(entry.lam / np.square(spectrum + entry.lam)) * spectrum.sum())
            same = same and abs(dof - entry.dof) <= rounding * (slope + dof)
    return Hypothesis("pruned on the samples that ||.||_n is over", float(pruned.report.samples), same)


def _a_priori(
    before: tuple[ChainLayer, ...], pruned: Pruned, output_norm: float, constants: str, same: Hypothesis
) -> Bound:
    reports = {entry.consumer: entry for entry in pruned.report.groups}
    groups = {group.consumer: group for group in pruned.groups}
    lams, norms, checks, scales, spreads = [], [], [], [], []
    for layer in before:
        if layer.name not in reports:
            continue
        entry, group = reports[layer.name], groups[layer.name]
        whole = entry.width_after == entry.width_before  # then nothing is approximated: A = I, c = s = 1
        flat = layer.weight.reshape(len(layer.weight), -1)
        norms.append(row_norm_bound(flat, last=layer is before[-1]))
        lams.append(0.0 if whole else entry.lam)
        checks.append(
            Feasibility(1.0, 1.0, True) if whole else Feasibility(entry.c, entry.s, entry.c <= 4 and entry.s <= 5 / 3)
        )
        scales.append(math.sqrt(layer.positions_in * group.slots))
        spreads.append(layer.slots * group.slots * layer.lipschitz**2)
    bound = approximation_a_priori(
        lams,
        norms,
        feasibilities=checks,
        constants=constants,  # type: ignore[arg-type]
        scales=scales,
        spreads=spreads,
        output_norm=output_norm,
    )
    return replace(bound, hypotheses=(*bound.hypotheses, same))
