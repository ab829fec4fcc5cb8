"""The compressed network of the noise-stability theory, written down and paid for: a valid bound, often a large one.

Every matrix is replaced by k of its coefficients against matrices of signs that a seed determines, A^ = (1/k) sum_l
<A, M_l> M_l, and these coefficients and the biases are rounded to a grid of 2^bits values.  The decoder is fixed before
the data: it reads sizes, seed, bits, exponents and grid values, and returns the network.  So the network it returns has
a code length C (`projection_code_length`, Kraft sum at most 1), and Occam's bound holds for it with probability
1 - delta, however seed, k and bits were chosen:  kl(training error || true error) <= (C + ln(1/delta)) / n.

The signs.  Independent signs would need k times as many numbers as there are weights.  Any fixed decoder is as valid,
so the M_l here are different rows of a Hadamard matrix of size P (a power of two), in an order and with signs of the
columns that a counter-based generator draws: coefficients and matrices come from one fast Walsh-Hadamard transform,
O(P log P), and nothing is stored.  Every M_l has entries of +1 and -1; as the rows are orthogonal, all P coefficients
give A back exactly.  The concentration lemma of `specprune.bounds.noise_stability` is about independent signs; the
bound here does not use it, for it measures the error of the network that came out.

Ordinary networks need k of the order of the number of weights, and the bound is then near 1 and says nothing.
Source: Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296) for compression by sign matrices; coder and bound derived
here, with Langford 2005 for Occam's razor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.analysis.evaluation import NonFiniteOutputs, collect_logits, error_rate
from specprune.bounds.bound import Bound, check_count, check_number
from specprune.bounds.occam import Quantised, occam_bound, occam_bound_relaxed, quantise
from specprune.bounds.projection_code import level_count, level_size, padded_size, projection_code_length
from specprune.compress import CalibrationData
from specprune.compress.batches import Forward, batch_size
from specprune.compress.coding import fold_batch_norms

BITS = (2, 3, 4, 5, 6, 8)
#: By how much the training error may grow through projection; each is tried, and the smallest bound kept.
TOLERANCES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class ProjectedMatrix:
    """One matrix as it was written down.

    Args:
        name: the parameter's name in the network with folded batch norms.
        weights: entries of the matrix.
        level: position on the priced grid of sizes.
        coefficients: k, how many numbers stand for it.
        exponent: the coefficients' grid covers [-2^exponent, 2^exponent).
        relative_error: ||A^ - A||_F / ||A||_F, rounding included.
        written: (k,) the coefficients themselves, on their grid; `SignMatrices.decode` makes the matrix of them.
    """

    name: str
    weights: int
    level: int
    coefficients: int
    exponent: int
    relative_error: float
    written: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class MatrixProjection:
    """A network written as coefficients of sign matrices, and the bound on its error.

    Args:
        model: the network that the decoder returns; evaluation mode, batch norms folded.
        matrices: what was kept of each matrix.
        bias_exponents: grid exponent of each bias vector, in the order of the network's parameters.
        bits: bits a coefficient or bias.
        seed: of the signs; its price is in the code length.
        code_length: C in nats.
        samples: n.
        original_error: training error of the network before compression.
        train_error: training error of `model`.
        bound: on the 0-1 error of `model`.
    """

    model: nn.Module
    matrices: tuple[ProjectedMatrix, ...]
    bias_exponents: tuple[int, ...]
    bits: int
    seed: int
    code_length: float
    samples: int
    original_error: float
    train_error: float
    bound: Bound

    @property
    def coefficients(self) -> int:
        """Numbers that stand for all matrices."""
        return sum(matrix.coefficients for matrix in self.matrices)

    @property
    def weights(self) -> int:
        """Entries of all matrices."""
        return sum(matrix.weights for matrix in self.matrices)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a matrix."""
        return [
            {
                **{key: value for key, value in vars(matrix).items() if key != "written"},
                "coefficients/weights": matrix.coefficients / matrix.weights,
            }
            for matrix in self.matrices
        ]

    def to_json(self) -> str:
        """Return matrices, totals and the bound as strict JSON text."""
        keys = ("bits", "seed", "code_length", "samples", "original_error", "train_error", "coefficients", "weights")
        return to_json(
            {
                **{key: getattr(self, key) for key in keys},
                "bound": self.bound.to_records()[0],
                "matrices": self.to_records(),
            }
        )

    def __str__(self) -> str:
        title = f"{self.coefficients} coefficients of {self.bits} bits for {self.weights} weights: C = "
        title += f"{self.code_length:.4g} nats for {self.samples} samples, training error {self.train_error:.4g} "
        title += f"(before: {self.original_error:.4g})"
        return "\n".join([format_table(self.to_records(), title=title), str(self.bound)])


class SignMatrices:
    """Sign matrices of one shape that a seed determines, as a pair of transforms.

    Args:
        weights: entries p of the matrix.
        seed: at least 0, below 2^64.
        index: number of the matrix in the network.

    Raises:
        ValueError: the seed is out of range, or there is no weight.
    """

    def __init__(self, weights: int, seed: int, index: int) -> None:
        if check_count("seed", seed, low=0) >= 2**64:
            raise ValueError(f"seed must be below 2^64, the range of the generator's key, got {seed}")
        self.weights, self.size = weights, padded_size(weights)
        # Raw words of a counter-based generator: their meaning never changes, unlike that of NumPy's distributions.
        key = np.array([seed, index], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(2 * self.size)
        self.signs = 1.0 - 2.0 * (words[: self.size] >> np.uint64(63)).astype(np.float64)
        self.rows = np.argsort(words[self.size :], kind="stable")

    def matrix(self, number: int) -> np.ndarray:
        """Return the entries (p,) of one sign matrix, for tests and pictures."""
        chosen = np.zeros(self.size)
        chosen[self.rows[number]] = 1.0
        return (self.signs * hadamard_transform(chosen))[: self.weights]

    def encode(self, tensor: np.ndarray) -> np.ndarray:
        """Return <A, M_l> / sqrt(P) for all l = 1..P."""
        padded = np.zeros(self.size)
        padded[: self.weights] = np.ravel(tensor)
        return hadamard_transform(self.signs * padded)[self.rows] / math.sqrt(self.size)

    def decode(self, coefficients: np.ndarray) -> np.ndarray:
        """Return (1/k) sum_l <A, M_l> M_l, shape (p,), of the first k entries of `encode`."""
        spread = np.zeros(self.size)
        spread[self.rows[: len(coefficients)]] = coefficients
        factor = math.sqrt(self.size) / len(coefficients)
        return factor * (self.signs * hadamard_transform(spread))[: self.weights]


def hadamard_transform(vector: np.ndarray) -> np.ndarray:
    """Return H v for the Hadamard matrix H of signs (Sylvester's order), in O(P log P).

    Args:
        vector: (P,) float64, P a power of two.

    Returns:
        (P,) float64; applying it twice gives P times the vector.
    """
    result, half = np.array(vector, dtype=np.float64), 1
    while half < len(result):
        pairs = result.reshape(-1, 2, half)
        result = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return result


def matrix_projection(
    model: nn.Module,
    train: Iterable[Any] | CalibrationData,
    *,
    original_widths: Sequence[int] = (),
    seed: int = 0,
    delta: float = 0.05,
    search_samples: int = 4000,
    forward: Forward | None = None,
) -> MatrixProjection:
    """Return a network written as few coefficients of sign matrices, and Occam's bound on its error.

    For each tolerance, every matrix alone gets the smallest k on the priced grid that keeps the error near the
    original's; then all together grow until the error is within the tolerance.  Of all tolerances and bits, the one
    with the smallest bound is kept.  The search looks at part of the data only, which costs nothing: the bound holds
    for every network that can be written down, and the training error in it is measured on all data.

    Args:
        model: a classifier whose batch norms can be folded; left as it is.
        train: the labelled training set that the model was trained on, all of it.
        original_widths: width of each prunable group before pruning, if the model was pruned.
        seed: of the signs.
        delta: allowed probability of failure.
        search_samples: about how many samples the search looks at.
        forward: optional `forward(model, batch)`.

    Returns:
        A `MatrixProjection`; its bound covers the network in it.

    Raises:
        ValueError: batch norms or buffers that cannot be folded, no matrix, unsuitable data, or weights of such
            different sizes that the written network leaves the range of its numbers.
        TypeError: unlabelled batches.

    Source:
        Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296) for the compression; coder and bound derived here.
    """
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    check_count("search_samples", search_samples)
    data = train if isinstance(train, CalibrationData) else CalibrationData(train, forward)
    writer = _Writer(fold_batch_norms(model, data), seed, original_widths)
    logits, targets = collect_logits(writer.folded, data)
    original = error_rate(logits, targets)
    part = _part(data, search_samples, len(targets))
    search = _Search(writer, CalibrationData(part, forward))
    start = search.error([None] * len(writer.names), None)
    found: list[tuple[tuple[float, float], list[int], int]] = []
    for tolerance in TOLERANCES:
        levels = search.levels(start, tolerance)
        for bits in BITS:
            error = search.error(levels, bits)
            setting = error, len(targets), writer.code_length(levels, bits), delta
            # Where the bound is stuck near 1, its relaxed form goes on growing and still tells more from less.
            value = occam_bound(*setting).value, occam_bound_relaxed(*setting).value
            found.append((value, levels, bits))
    _, levels, bits = min(found, key=lambda choice: choice[0])
    matrices, bias_exponents = writer.write(levels, bits)
    logits, targets = collect_logits(writer.work, data)
    train_error, length = error_rate(logits, targets), writer.code_length(levels, bits)
    bound = replace(
        occam_bound(train_error, len(targets), length, delta),
        name="matrix projection (Occam kl)",
        theorem="Occam's razor bound for a network written in sign matrices",
        source="Langford 2005; compression after Arora et al. 2018 (arXiv:1802.05296); code derived here",
    )
    return MatrixProjection(
        writer.work, matrices, bias_exponents, bits, seed, length, len(targets), original, train_error, bound
    )


def _part(data: CalibrationData, wanted: int, samples: int) -> list[Any]:
    """Return batches spread evenly over the data with about the wanted number of samples, at least one."""
    stride, taken, seen = max(1, samples // wanted), 0, 0
    part: list[Any] = []
    for batch in data.head():
        if taken * stride <= seen:  # behind the even share
            part.append(batch)
            taken += batch_size(batch)
        seen += batch_size(batch)
    return part


class _Writer:
    """Writes a network with given levels and bits into `work`, and knows the length of what it wrote."""

    def __init__(self, folded: nn.Module, seed: int, widths: Sequence[int]) -> None:
        buffers = [name for name, _ in folded.named_buffers()]
        if buffers:
            raise ValueError(f"the buffers {buffers[:3]} are no part of what is paid for; fold or remove them")
        self.folded, self.work = folded, copy.deepcopy(folded).eval()
        self.seed, self.widths = seed, list(widths)
        tensors = {name: p.detach().to(torch.float64).cpu().numpy() for name, p in folded.named_parameters()}
        self.matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim > 1}
        self.biases = {name: tensor for name, tensor in tensors.items() if tensor.ndim <= 1}
        if not self.matrices:
            raise ValueError(f"{type(folded).__name__} has no matrix to project")
        self.names = list(self.matrices)
        self.signs = [SignMatrices(tensor.size, seed, index) for index, tensor in enumerate(self.matrices.values())]
        self.coefficients = [
            signs.encode(tensor) for signs, tensor in zip(self.signs, self.matrices.values(), strict=True)
        ]

    def code_length(self, levels: Sequence[int], bits: int) -> float:
        """Return C; the exponents are those that `write` chooses."""
        rounded = [_best_grid(self._kept(index, level), bits) for index, level in enumerate(levels)]
        rounded += [_best_grid(bias, bits) for bias in self.biases.values()]
        return projection_code_length(
            [tensor.size for tensor in self.matrices.values()],
            levels,
            [bias.size for bias in self.biases.values()],
            [item.k for item in rounded],
            bits,
            self.seed,
            self.widths,
        )

    def _kept(self, index: int, level: int) -> np.ndarray:
        return self.coefficients[index][: level_size(self.signs[index].weights, level)]

    @torch.no_grad()
    def put(self, index: int, level: int | None, bits: int | None) -> None:
        """Write one matrix into `work`: as it is (level None), projected, or projected and rounded."""
        name = self.names[index]
        if level is None:
            values = self.matrices[name]
        else:
            kept = self._kept(index, level)
            values = self.signs[index].decode(kept if bits is None else _best_grid(kept, bits).values)
        parameter = self.work.get_parameter(name)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values).reshape(parameter.shape)))

    @torch.no_grad()
    def put_biases(self, bits: int | None) -> None:
        """Write all biases into `work`, rounded if bits are given."""
        for name, bias in self.biases.items():
            values = bias if bits is None else _best_grid(bias, bits).values
            self.work.get_parameter(name).copy_(torch.from_numpy(values))

    def write(self, levels: Sequence[int], bits: int) -> tuple[tuple[ProjectedMatrix, ...], tuple[int, ...]]:
        """Write the whole network; describe its matrices, and say the exponents of its biases."""
        self.put_biases(bits)
        found = []
        for index, (name, level) in enumerate(zip(self.names, levels, strict=True)):
            self.put(index, level, bits)
            tensor, rounded = self.matrices[name], _best_grid(self._kept(index, level), bits)
            result = self.work.get_parameter(name).detach().to(torch.float64).cpu().numpy()
            size = float(np.linalg.norm(tensor))
            error = float(np.linalg.norm(result - tensor)) / size if size > 0 else 0.0
            found.append(
                ProjectedMatrix(name, tensor.size, level, rounded.values.size, rounded.k, error, rounded.values)
            )
        return tuple(found), tuple(_best_grid(bias, bits).k for bias in self.biases.values())


class _Search:
    """Errors of half-written networks on part of the data; every one is measured once."""

    def __init__(self, writer: _Writer, data: CalibrationData) -> None:
        self._writer, self._data = writer, data
        self._alone: dict[tuple[int, int], float] = {}

    def error(self, levels: Sequence[int | None], bits: int | None) -> float:
        """Return the error with these levels (None: matrix as it is) and bits (None: no rounding)."""
        self._writer.put_biases(bits)
        for index, level in enumerate(levels):
            self._writer.put(index, level, bits)
        try:
            return error_rate(*collect_logits(self._writer.work, self._data))
        except NonFiniteOutputs:  # sums of weights of very different sizes: no answer is a wrong answer
            return 1.0

    def levels(self, start: float, tolerance: float) -> list[int]:
        """Return a level for each matrix with which the error is at most start + tolerance, rounding aside."""
        count = len(self._writer.names)
        levels = [self._alone_level(index, start + tolerance / count) for index in range(count)]
        while self.error(levels, None) > start + tolerance and any(levels):
            levels = [max(level - 1, 0) for level in levels]
        return levels

    def _alone_level(self, index: int, limit: float) -> int:
        """Return by bisection a level at which this matrix alone keeps the error within the limit."""
        low, high = 0, level_count(self._writer.signs[index].weights)
        while high - low > 1:
            middle = (low + high) // 2
            if (index, middle) not in self._alone:
                levels: list[int | None] = [None] * len(self._writer.names)
                levels[index] = middle
                self._alone[index, middle] = self.error(levels, None)
            low, high = (middle, high) if self._alone[index, middle] <= limit else (low, middle)
        return low


def _best_grid(array: np.ndarray, bits: int) -> Quantised:
    """Round with the exponent that errs least in mean square: none clipped, or the one or two powers below."""
    whole = quantise(array, bits)
    candidates = [whole, *(quantise(array, bits, whole.k - shift) for shift in (1, 2))]
    return min(candidates, key=lambda rounded: float(np.square(rounded.values - array).sum()))
