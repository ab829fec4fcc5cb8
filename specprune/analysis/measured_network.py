"""A trained classifier with what measures of generalization need to know of it, and what a measure is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from specprune.analysis.coded import occam_results
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.flatness import FOUND, flat_sigma
from specprune.analysis.layer_norms import LayerMatrix
from specprune.analysis.prunability import Prunability, prunability, spectral_prunability
from specprune.analysis.spectra import Spectra, layer_spectra
from specprune.bounds.bound import FloatArray
from specprune.bounds.covering import margins
from specprune.compress.batches import CalibrationData
from specprune.compress.coding import fold_batch_norms
from specprune.compress.cost import count_flops, smallest_fraction
from specprune.compress.layers import is_layer
from specprune.compress.pruning import prune_sweep

MARGIN_PERCENTILE = 10
CALIBRATION = 300  # training inputs that spectral pruning sees where it is only to be measured
PRUNED_TO = (0.5, 0.3, 0.2, 0.1, 0.05)  # of the FLOPs, where the network can become so small
Cost = Literal["weights", "pass", "noise", "pruning"]
Needs = Literal["", "start", "population"]


@dataclass(frozen=True)
class CodedNetwork:
    """A network, perhaps pruned first, rounded to the number of bits with the smallest Occam bound.

    Attributes:
        bits: length of its description.
        bound: Occam's bound on its error, kl form, with probability 95 %.
        complexity: sqrt((bits ln 2 + ln 20) / (2 m)).
        train_error: its error rate on the training set.
    """

    bits: float
    bound: float
    complexity: float
    train_error: float


@dataclass(frozen=True, eq=False)
class MeasuredNetwork:
    """A trained classifier, its training set, and where it came from; what several measures need is computed once.

    Args:
        model: the classifier; left as it is, run in evaluation mode.
        inputs: all its training inputs, shape (m, ...), on the model's device.
        targets: int64 labels that it was trained on, shape (m,).
        start: the network before the first step of training, of the same shape; None if it is not known.
        population: inputs and labels that stand for the law of the data, such as a test set, for the measures of the
            data; None if there are none.
        seed: of the random choices of measures that make some.

    Raises:
        ValueError: inputs and targets that do not fit each other.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    start: nn.Module | None = None
    population: tuple[Tensor, Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        pairs = [(self.inputs, self.targets), *([] if self.population is None else [self.population])]
        for inputs, targets in pairs:
            if len(inputs) < 2 or targets.shape != (len(inputs),) or targets.dtype != torch.int64:
                raise ValueError(
                    f"inputs of shape {tuple(inputs.shape)} and {targets.dtype} targets of shape "
                    f"{tuple(targets.shape)}: expected (m, ...) and int64 labels (m,), m at least 2"
                )

    @property
    def samples(self) -> int:
        """Size m of the training set."""
        return len(self.inputs)

    @cached_property
    def data(self) -> CalibrationData:
        """The training set as labelled batches."""
        return CalibrationData(list(zip(self.inputs.split(1000), self.targets.split(1000), strict=True)))

    @cached_property
    def folded(self) -> nn.Module:
        """The network with its batch norms folded into their layers."""
        return fold_batch_norms(self.model, self.data)

    @cached_property
    def folded_start(self) -> nn.Module:
        """The network before training, with its batch norms folded.

        Raises:
            ValueError: it is not known, or has layers of other shapes.
        """
        if self.start is None:
            raise ValueError("this measures a distance from the network before training: give start=")
        folded = fold_batch_norms(self.start, self.data)
        own, other = ([p.shape for p in network.parameters()] for network in (self.folded, folded))
        if own != other:
            raise ValueError(f"start has parameters of shapes {other}, the network {own}: expected the same")
        return folded

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The Linear and Conv2d layers of the folded network by name.

        Raises:
            ValueError: there is none, or one has nothing but zeros or a weight that is not finite.
        """
        found = {name: module for name, module in self.folded.named_modules() if is_layer(module)}
        if not found:
            raise ValueError(f"{type(self.model).__name__} has no Linear or Conv2d layer to measure")
        for name, layer in found.items():
            largest = float(layer.get_parameter("weight").detach().abs().max())
            if largest == 0 or not math.isfinite(largest):
                raise ValueError(f"layer {name!r} has only zero weights, or some that are not finite: no measure of it")
        return found

    @cached_property
    def matrices(self) -> list[FloatArray]:
        """The layers' weights as float64 matrices W_i, outputs x (inputs, kernel offsets)."""
        return [_matrix(layer) for layer in self.layers.values()]

    @cached_property
    def start_matrices(self) -> list[FloatArray]:
        """The matrices W_i^0 before training."""
        return [_matrix(self.folded_start.get_submodule(name)) for name in self.layers]

    @cached_property
    def vector(self) -> FloatArray:
        """All weights and biases of the folded network, w."""
        return _vector(self.folded)

    @cached_property
    def start_vector(self) -> FloatArray:
        """All weights and biases before training, w_0."""
        return _vector(self.folded_start)

    @cached_property
    def map_norms(self) -> list[float]:
        """Operator norms of the layers as maps of whole images (from the kernels' Fourier transforms)."""
        return self._map_norms(self.matrices)

    @cached_property
    def map_norms_moved(self) -> list[float]:
        """Operator norms, as maps of whole images, of the differences W_i - W_i^0."""
        pairs = zip(self.matrices, self.start_matrices, strict=True)
        return self._map_norms([now - before for now, before in pairs])

    def _map_norms(self, matrices: list[FloatArray]) -> list[float]:
        layers = list(self.layers.values())
        found = []
        for matrix, layer, shape in zip(matrices, layers, self._input_shapes, strict=True):
            found.append(LayerMatrix(matrix, layer, shape).operator_norm())
        return found

    @cached_property
    def _input_shapes(self) -> list[tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, args: tuple[Tensor, ...]) -> None:
            shapes.setdefault(name, tuple(args[0].shape[1:]))

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
            for name, layer in self.layers.items()
        ]
        try:
            with torch.no_grad():
                self.folded(self.inputs[:2])
        finally:
            for hook in hooks:
                hook.remove()
        return [shapes[name] for name in self.layers]

    @cached_property
    def logits(self) -> FloatArray:
        """Outputs on the training set, (m, classes)."""
        return collect_logits(self.folded, self.data)[0]

    @property
    def train_error(self) -> float:
        """Share of wrong answers on the training set."""
        return error_rate(self.logits, self.targets.cpu().numpy())

    @cached_property
    def margin(self) -> float:
        """gamma, the 10th percentile of the margins (true class's output minus the largest other) in training.

        Raises:
            ValueError: it is not positive, so that there is nothing to divide by.
        """
        gamma = float(np.percentile(margins(self.logits, self.targets.cpu().numpy()), MARGIN_PERCENTILE))
        if gamma <= 0:
            raise ValueError(
                f"the 10th percentile of the training margins is {gamma:.4g}: measures over the margin need networks "
                "that are right on at least 90 % of their training set"
            )
        return gamma

    @cached_property
    def spectra(self) -> Spectra:
        """Spectra of what each layer reads; the first layer reads the data."""
        return layer_spectra(self.folded, self.data)

    @cached_property
    def code(self) -> CodedNetwork:
        """The network itself, rounded."""
        return self._coded(self.folded, [])

    @cached_property
    def pruned_code(self) -> CodedNetwork:
        """The one with the smallest bound among the network itself and what spectral pruning makes of it, rounded."""
        least = smallest_fraction(self.folded, self.data)
        keeps = [keep for keep in PRUNED_TO if keep > least]
        smaller = prune_sweep(self.folded, [self.inputs[:CALIBRATION]], keeps, seed=self.seed) if keeps else []
        coded = [self._coded(pruned.model, [group.width for group in pruned.groups]) for pruned in smaller]
        return min([self.code, *coded], key=lambda code: code.bound)

    def _coded(self, network: nn.Module, widths: list[int]) -> CodedNetwork:
        results = occam_results(network, self.data, widths)
        best = min(results.values(), key=lambda result: result.bound.value)
        bits = best.network.code_length(widths) / math.log(2)
        return CodedNetwork(bits, best.bound.value, best.complexity, best.train_error)

    @cached_property
    def sigma(self) -> float:
        """The largest noise on all weights that costs at most a tenth of the training accuracy."""
        return self._sigma(magnitude_aware=False)

    @cached_property
    def relative_sigma(self) -> float:
        """The largest noise in proportion to the weights that costs at most a tenth of the training accuracy."""
        return self._sigma(magnitude_aware=True)

    def _sigma(self, *, magnitude_aware: bool) -> float:
        found = flat_sigma(self.folded, self.inputs, self.targets, magnitude_aware=magnitude_aware, seed=self.seed)
        if found.outcome != FOUND:
            raise ValueError(
                f"the training accuracy {found.outcome} by a tenth within the noise that is tried: {found}"
            )
        return found.sigma

    @cached_property
    def magnitude_prunability(self) -> Prunability:
        """How few weights magnitude pruning may keep."""
        return prunability(self.folded, self.inputs, self.targets, "magnitude")

    @cached_property
    def random_prunability(self) -> Prunability:
        """How few weights random pruning may keep."""
        return prunability(self.folded, self.inputs, self.targets, "random", seed=self.seed)

    @cached_property
    def spectral_prunability(self) -> Prunability:
        """How few FLOPs spectral pruning may keep."""
        few = self.inputs[:CALIBRATION]
        return spectral_prunability(
            self.folded, self.inputs, self.targets, calibration=few, relative=(), seed=self.seed
        )

    @cached_property
    def flops(self) -> int:
        """FLOPs for one sample, two a multiply-add."""
        return count_flops(self.folded, self.data)


def _matrix(layer: nn.Module) -> FloatArray:
    matrix: FloatArray = layer.get_parameter("weight").detach().to(torch.float64).flatten(1).cpu().numpy()
    return matrix


def _vector(network: nn.Module) -> FloatArray:
    parts = [parameter.detach().to(torch.float64).flatten().cpu().numpy() for parameter in network.parameters()]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Measure:
    """A number of a trained network that may predict how well it generalizes.

    Attributes:
        name: as in tables.
        meaning: one line.
        formula: LaTeX, with m training samples, omega parameters, d layers, margin gamma, weights W_i, before W_i^0.
        higher_is_worse: whether a larger value predicts a larger gap; if not, a smaller one does.
        cost: "weights" (reads weights only), "pass" (some passes over the training set), "noise" (hundreds of passes),
            "pruning" (prunes and runs many networks).
        needs: "start" (the network before training), "population" (a sample of the law of the data), or "".
        source: paper, or "here".
        function: network to value; it raises ValueError where the measure is not defined.
    """

    name: str
    meaning: str
    formula: str
    higher_is_worse: bool
    cost: Cost
    needs: Needs
    source: str
    function: Callable[[MeasuredNetwork], float]

    def __call__(self, network: MeasuredNetwork) -> float:
        """Return the measure's value.

        Args:
            network: what to measure.

        Raises:
            ValueError: it is not defined for this network, or not finite.
        """
        value = float(self.function(network))
        if not math.isfinite(value):
            raise ValueError(f"measure {self.name!r} is {value} for this network, not a finite number")
        return value


def as_measure(
    formula: str, source: str, *, cost: Cost = "weights", needs: Needs = "", higher_is_worse: bool = True
) -> Callable[[Callable[[MeasuredNetwork], float]], Measure]:
    """Make a measure of a function; its name is the function's, its meaning the first line of the docstring.

    Args:
        formula: as for `Measure`.
        source: as for `Measure`.
        cost: as for `Measure`.
        needs: as for `Measure`.
        higher_is_worse: as for `Measure`.
    """

    def wrap(function: Callable[[MeasuredNetwork], float]) -> Measure:
        meaning = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        return Measure(function.__name__, meaning, formula, higher_is_worse, cost, needs, source, function)

    return wrap


def measures_in(namespace: Mapping[str, object]) -> tuple[Measure, ...]:
    """Return the measures that a module defines, in its order.

    Args:
        namespace: the module's globals().
    """
    return tuple(value for value in namespace.values() if isinstance(value, Measure))
