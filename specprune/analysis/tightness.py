"""Every generalization bound of the field on one network: values, terms, hypotheses, and whether they say anything."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from specprune._records import format_table, to_json, to_latex_table
from specprune.analysis.approximation import output_distance
from specprune.analysis.bound_bars import draw_bars
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.coded import OccamResult, coded_pac_bayes_bounds, occam_results
from specprune.analysis.cushions import cushions
from specprune.analysis.decay import measure_decay
from specprune.analysis.evaluation import NonFiniteOutputs, collect_logits, collect_logits_of, error_rate
from specprune.analysis.layer_norms import NetworkNorms, measure_norms
from specprune.analysis.margin_bounds import (
    coded_pair_bound,
    covering_bounds,
    input_norm,
    low_rank_bounds,
    norm_bounds,
)
from specprune.analysis.matrix_projection import matrix_projection
from specprune.analysis.posterior import Posterior, posterior_certificate
from specprune.bounds.bound import ORIGINAL, PRUNED, Bound
from specprune.bounds.held_out import clopper_pearson_bound
from specprune.bounds.occam import occam_bound
from specprune.bounds.uncompressed import disagreement_bound
from specprune.compress import CalibrationData, Pruned
from specprune.compress.batches import Forward
from specprune.compress.coding import fold_batch_norms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_TERMS = ("empirical", "bias", "variance", "confidence")
_TEXT_COLUMNS = (
    *("net", "bound", "value", "vacuous", "hypotheses_hold"),
    *(*_TERMS, "dominant", "looseness", "test_error"),
)
_LATEX_COLUMNS = {
    **{name: name for name in ("net", "bound", "value", *_TERMS)},
    "test_error": "test error",
}


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
        measures: what was measured on the way, one record each: network, quantity, layer (or "all"), value.
    """

    bounds: tuple[tuple[str, Bound], ...]
    train_errors: dict[str, float]
    test_errors: dict[str, float]
    samples: int
    delta: float
    notes: tuple[str, ...] = ()
    measures: tuple[dict[str, Any], ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a bound, sorted by value.

        "looseness" is (bound - training error) / (test error - training error), where that gap is positive.
        """
        records = []
        for label, bound in sorted(self.bounds, key=lambda pair: pair[1].value):
            test, train = self.test_errors.get(label), self.train_errors.get(label)
            gap = None if test is None or train is None or test <= train else test - train
            records.append(
                {
                    "net": label,
                    "bound": bound.name,
                    "value": bound.value,
                    "vacuous": bound.vacuous,
                    "hypotheses_hold": bound.valid,
                    **{name: bound.terms.get(name) for name in _TERMS},
                    "dominant": max(bound.terms, key=lambda name: bound.terms[name]),
                    "looseness": None if gap is None or train is None else (bound.value - train) / gap,
                    "covers": bound.covers,
                    "loss": bound.loss,
                    "train_error": train,
                    "test_error": test,
                    "theorem": bound.theorem,
                    "source": bound.source,
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
                "measures": self.measures,
            }
        )

    def to_latex(self) -> str:
        """Return the table as a LaTeX tabular: values, terms and test errors, vacuous values in grey.

        It needs the packages booktabs and xcolor; bounds with a broken hypothesis carry a dagger.
        """
        return to_latex_table(self.to_records(), _LATEX_COLUMNS, mark=_mark)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the bounds as bars on a logarithmic axis, with the line from which on they are vacuous.

        Args:
            ax: where to draw; a new figure if None.  Nothing is shown and no global setting is changed.

        Returns:
            The Axes.
        """
        return draw_bars(self.to_records(), ax)

    def __str__(self) -> str:
        title = f"bounds on the error rate, n = {self.samples}, each with probability {1 - self.delta:g}"
        return "\n".join([format_table(self.to_records(), list(_TEXT_COLUMNS), title), *self.notes])


def bound_table(
    model: nn.Module,
    train: Iterable[Any],
    pruned: Pruned | None = None,
    test: Iterable[Any] | None = None,
    *,
    reference: nn.Module | None = None,
    posterior: Posterior | None = None,
    delta: float = 0.05,
    input_radius: float | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> BoundTable:
    """Return every bound on one trained classifier, and on its pruned version, side by side.

    - Written down in few bits: Theorem A (Occam, kl; the number to quote) on the rounded networks, the PAC-Bayes forms
      on the same code, and Arora's matrix projection.
    - From margins: Theorems B (one cover) and C (Dudley), Bartlett 2017, Golowich 2018, Neyshabur 2015, 2018 and 2019,
      the original through the coded network (Theorem E) and through its weights cut to low rank.  They are complexity
      measures that are nearly always vacuous, and then marked so.
    - Stochastic: the certificate of a Gaussian posterior, if one is given.
    - With a test set: Clopper-Pearson on its labels, the reference line, and the original through the coded network
      (Theorem D), which reads the test inputs but not their labels.

    Each bound holds by itself with probability 1 - delta; whoever quotes the smallest of several owes a union bound.

    Args:
        model: a classifier; the bounds from margins need a chain.
        train: the labelled training set that the model was trained on, all of it.
        pruned: what `prune` made of the model with method="spectral".
        test: a labelled test set to compare with, not used in training or pruning.
        reference: a network of the same shape that was fixed before the data, such as the initialisation: the point
            from which Bartlett's and Neyshabur's distances are measured; zero if None.
        posterior: from `train_posterior`, on the same training set.
        delta: each bound fails with at most this probability.
        input_radius: bound on ||x|| over all possible inputs (for pixels in [0, 1]^d: sqrt(d)); if None, the largest
            norm in the training set is taken and reported as an unproved hypothesis, which does not hold.
        forward: optional `forward(model, batch)`.
        seed: of the samples that Jacobians are measured on.

    Returns:
        The table.  What cannot be computed for this network is left out, and a note says why.

    Raises:
        ValueError: batch norms or buffers that cannot be folded, unsuitable data, or a network that another method has
            pruned, for whose choices the bounds do not pay.
        TypeError: unlabelled batches.
    """
    data = CalibrationData(train, forward)
    held_out = None if test is None else CalibrationData(test, forward)
    method = "spectral" if pruned is None else pruned.report.settings["method"]
    if method != "spectral":
        raise ValueError(
            f"pruned was made with method={method!r}: the bounds know how to pay for a choice of widths, not of ranks, "
            "slices or sampled channels; give a network of method='spectral', or pruned.model as the model itself if "
            "its structure was fixed before the data"
        )
    work = _Work(data, held_out, delta, input_radius, seed)
    widths = [] if pruned is None else [group.width for group in pruned.groups]
    original = work.net("original", model)
    coded = work.coded(original, [])
    nets: list[tuple[_Net, list[int]]] = [(original, [])]
    if pruned is not None:
        smaller = work.net("pruned", pruned.model)
        coded = work.coded(smaller, widths)
        nets.append((smaller, widths))
    if held_out is not None:
        work.through_the_code(original, coded)
    for net, cost in nets:
        work.from_margins(net, cost, original, reference if net is original else None, coded)
    if posterior is not None:
        work.add("posterior", posterior_certificate(posterior, data, delta=delta / 2, delta_draws=delta / 2))
    ordered = tuple(sorted(work.rows, key=lambda pair: pair[1].value))
    return BoundTable(
        ordered,
        work.train_errors,
        work.test_errors,
        len(original.targets),
        delta,
        tuple(work.notes),
        tuple(work.measures),
    )


def _mark(record: Mapping[str, Any], name: str, cell: str) -> str:
    if name == "bound" and not record["hypotheses_hold"]:
        return cell + r"$^\dagger$"
    if name == "value" and record["vacuous"]:
        return rf"\textcolor{{gray}}{{{cell}}}"
    return cell


@dataclass(frozen=True)
class _Coded:
    """A network rounded to a few bits, with the length of its description in nats."""

    label: str
    result: OccamResult
    length: float


@dataclass(frozen=True)
class _Net:
    """A network with what it answers on the training set."""

    label: str
    model: nn.Module
    logits: np.ndarray
    targets: np.ndarray


class _Work:
    """Collects the rows of the table; what several bounds need is computed once."""

    def __init__(
        self,
        data: CalibrationData,
        held_out: CalibrationData | None,
        delta: float,
        input_radius: float | None,
        seed: int,
    ) -> None:
        self.data, self.held_out, self.delta = data, held_out, delta
        self.input_radius, self.seed = input_radius, seed
        self.rows: list[tuple[str, Bound]] = []
        self.train_errors: dict[str, float] = {}
        self.test_errors: dict[str, float] = {}
        self.notes: list[str] = []
        self.measures: list[dict[str, Any]] = []

    def add(self, label: str, *bounds: Bound) -> None:
        self.rows += [(label, bound) for bound in bounds]

    def measure(self, label: str, quantity: str, value: float | None, layer: str = "all") -> None:
        self.measures.append({"net": label, "quantity": quantity, "layer": layer, "value": value})

    def errors(self, label: str, model: nn.Module, train_error: float) -> tuple[int, int]:
        """Note a network's errors; return how many of the test samples it gets wrong, and of how many."""
        self.train_errors[label] = train_error
        if self.held_out is None:
            return 0, 0
        logits, targets = collect_logits(model, self.held_out)
        self.test_errors[label] = error_rate(logits, targets)
        return int(np.sum(logits.argmax(axis=1) != targets)), len(targets)

    def net(self, label: str, model: nn.Module) -> _Net:
        """Run a network on the training set, and bound its error by the test set."""
        logits, targets = collect_logits(model, self.data)
        wrong, count = self.errors(label, model, error_rate(logits, targets))
        if count:
            covers = ORIGINAL if label == "original" else PRUNED
            self.add(label, clopper_pearson_bound(wrong, count, self.delta, covers=covers))
        return _Net(label, model, logits, targets)

    def coded(self, net: _Net, widths: list[int]) -> _Coded:
        """Add the bounds on the network written down in few bits."""
        results = occam_results(net.model, self.data, widths, delta=self.delta)
        best = min(results.values(), key=lambda result: result.bound.value)
        label = f"{net.label}, {best.network.bits} bits"
        length = best.network.code_length(widths)
        self.add(label, best.bound, *coded_pac_bayes_bounds(best, len(net.targets), length, self.delta))
        self.errors(label, best.network.model, best.train_error)
        self.measure(label, "code length in bits", length / math.log(2))
        label_projected = f"{net.label}, sign matrices"
        try:
            projected = matrix_projection(net.model, self.data, original_widths=widths, delta=self.delta)
            self.errors(label_projected, projected.model, projected.train_error)
            self.add(label_projected, projected.bound)
        except NonFiniteOutputs as reason:
            self.notes.append(f"{net.label}: no matrix projection: {reason}")
        return _Coded(label, best, length)

    def through_the_code(self, original: _Net, coded: _Coded) -> None:
        """Add Theorem D: the original's error is at most the coded network's and how often the two disagree."""
        if self.held_out is None:
            return
        half = occam_bound(coded.result.train_error, len(original.targets), coded.length, self.delta / 2)
        (ours, theirs), _ = collect_logits_of([original.model, coded.result.network.model], self.held_out)
        differing = int(np.sum(ours.argmax(axis=1) != theirs.argmax(axis=1)))
        self.add("original", disagreement_bound(half, differing, len(ours), self.delta))
        self.measure(coded.label, "disagreement with the original on test inputs", differing / len(ours))

    def from_margins(
        self,
        net: _Net,
        widths: list[int],
        original: _Net,
        reference: nn.Module | None,
        coded: _Coded,
    ) -> None:
        """Add what needs a chain: covering, norm and low-rank bounds, and the measures behind them."""
        try:
            chain = trace_chain(net.model, self.data)
            radius = input_norm(self.data, net.model)
            norms = measure_norms(net.model, self.data, reference=reference)
        except (ValueError, TypeError) as reason:  # Theorem A needs neither the chain nor its norms
            self.notes.append(f"{net.label}: no bounds from margins: {reason}")
            return
        distance = 0.0 if net is original else output_distance(original.model, net.model, self.data)[0]
        common: dict[str, Any] = {"input_radius": self.input_radius, "measured_radius": radius}
        self.add(
            net.label,
            *covering_bounds(
                chain,
                original.logits,
                original.targets,
                distance,
                original_widths=widths,
                delta=self.delta,
                **common,
            ),
        )
        self._norm_bounds(net, norms, widths, ORIGINAL if net is original else PRUNED)
        self._measures(net, norms)
        if net is original:
            self._of_the_original(net, chain, coded, common)

    def _norm_bounds(self, net: _Net, norms: NetworkNorms, widths: list[int], covers: str) -> None:
        # The pruned widths were chosen with the data: the bounds hold for all widths 1..m_l at once with these shares.
        share = self.delta * math.exp(-math.fsum(math.log(width) for width in widths))
        if 1 - share == 1:
            self.notes.append(f"{net.label}: no norm bounds: the union over the widths leaves them no share of delta")
            return
        found = norm_bounds(norms, net.logits, net.targets, input_radius=self.input_radius, delta=share, covers=covers)
        self.add(net.label, *(replace(bound, confidence=1 - self.delta) for bound in found))

    def _of_the_original(self, net: _Net, chain: tuple[ChainLayer, ...], coded: _Coded, common: dict[str, Any]) -> None:
        (ours, theirs), targets = collect_logits_of([net.model, coded.result.network.model], self.data)
        self.add(net.label, coded_pair_bound(chain, coded.length, ours, theirs, targets, delta=self.delta, **common))
        try:
            folded = fold_batch_norms(net.model, self.data)
            self.add(net.label, *low_rank_bounds(folded, chain, self.data, delta=self.delta, **common))
        except ValueError as reason:
            self.notes.append(f"{net.label}: no low-rank bound: {reason}")

    def _measures(self, net: _Net, norms: NetworkNorms) -> None:
        for name, layer in zip(norms.names, norms.layers, strict=True):
            self.measure(net.label, "operator norm", layer.operator_norm, name)
            self.measure(net.label, "Frobenius norm", layer.frobenius, name)
        try:
            noise = cushions(net.model, self.data, seed=self.seed)
        except (ValueError, TypeError) as reason:
            self.notes.append(f"{net.label}: no noise stability: {reason}")
            return
        for entry in noise.layers:
            self.measure(net.label, "layer cushion", entry.cushion, entry.layer)
            self.measure(net.label, "interlayer cushion", entry.forward_cushion, entry.layer)
        self.measure(net.label, "activation contraction", noise.contraction)
        self.measure(net.label, "interlayer smoothness", noise.smoothness)
        for decay in measure_decay(net.model, self.data).layers:
            if decay.weight is not None:
                self.measure(net.label, "alpha: decay of singular values", decay.weight.exponent, decay.layer)
            if decay.covariance is not None:
                self.measure(net.label, "beta: decay of covariance eigenvalues", decay.covariance.exponent, decay.layer)
