"""Code-length (Occam) bounds: a network that can be written down in few bits cannot overfit by much.

Theorem.  Fix, before seeing the data, a prefix-free code for networks; let C(h) be the length of h in nats, so that
sum_h exp(-C(h)) <= 1 (Kraft).  With probability at least 1 - delta over n i.i.d. examples, for ALL h at once:

    kl(empirical error(h) || true error(h)) <= (C(h) + ln(1/delta)) / n.

Proof.  For one h, Chernoff gives P(kl > epsilon, true > empirical) <= exp(-n epsilon); use delta * exp(-C(h)) as its
share of delta and sum over h.  Because it holds for all h at once, kept nodes, regularisation, bits and widths may be
chosen with the data; only the network that was written down (quantised) is spoken of.
Source: Langford 2005, "Tutorial on practical prediction theory for classification" (Occam's razor bound); the code
below is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import QUANTISED, Bound, FloatArray, check_count, check_number

#: Exponent given to a norm that is exactly zero; any larger power of two would be a valid bound too.
ZERO_NORM_EXPONENT = -20


def integer_code_length(k: int) -> float:
    """Return the nats for any integer k, negative ones included: ln(2 (|k| + 1) (|k| + 2)).

    Kraft: sum over all k of 1 / (2 (|k| + 1)(|k| + 2)) = 3/4 <= 1.

    Args:
        k: an integer, such as the exponent of a power of two.

    Returns:
        The length in nats, at least ln 4.

    Raises:
        TypeError: if k is no integer.

    Source: derived here (telescoping sum).
    """
    size = abs(check_count("k", k, low=-(2**62)))
    return math.log(2 * (size + 1) * (size + 2))


def power_of_two_above(value: float) -> int:
    """Return the smallest integer k with value <= 2^k.

    Args:
        value: a norm, at least 0.

    Returns:
        k; `ZERO_NORM_EXPONENT` for a norm of zero.

    Raises:
        ValueError: if the value is negative or not finite.
    """
    value = check_number("value", value, 0.0)
    if value == 0:
        return ZERO_NORM_EXPONENT
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent exactly, 1/2 <= mantissa < 1
    return exponent - 1 if mantissa == 0.5 else exponent


def power_of_two_below(value: float) -> int:
    """Return the largest integer k with 2^k <= value.

    Args:
        value: a margin, positive.

    Returns:
        k.

    Raises:
        ValueError: if the value is not positive and finite.
    """
    return math.frexp(check_number("value", value, 0.0, open_low=True))[1] - 1


def tensor_code_length(count: int, bits: int, k: int) -> float:
    """Return the nats that one tensor costs on a grid of 2^bits values in [-2^k, 2^k).

    bits * count * ln 2 + ln(2 (|k| + 1)(|k| + 2)).

    Args:
        count: number of entries.
        bits: bits an entry, the same for all tensors (priced once, in `network_code_length`).
        k: the tensor's exponent.

    Returns:
        The length in nats.

    Raises:
        TypeError: if an input is no integer.
        ValueError: if count or bits is below 1.

    Source: derived here.
    """
    return check_count("bits", bits) * check_count("count", count) * math.log(2) + integer_code_length(k)


def network_code_length(
    counts: Sequence[int], exponents: Sequence[int], bits: int, widths: Sequence[int] = ()
) -> float:
    """Return the nats that a whole pruned and quantised network costs.

    sum over tensors of `tensor_code_length` + ln(bits (bits + 1)) + sum_l ln m_l.  The last sum says which width
    1..m_l each pruned layer has; which nodes were kept need not be said, for the small network runs without knowing.

    Args:
        counts: entries of each tensor of the PRUNED network (weights and biases).
        exponents: k of each tensor.
        bits: bits an entry.
        widths: ORIGINAL width m_l of each layer that could be pruned.

    Returns:
        C(h) in nats; sum over networks of exp(-C) is at most 1.

    Raises:
        TypeError: if an input is no integer.
        ValueError: if lengths differ, there is no tensor, or a number is below 1.

    Source: derived here (a product of Kraft-valid codes; Kraft of bits: sum 1/(b(b+1)) = 1, of a width: m * 1/m = 1).
    """
    if len(counts) != len(exponents) or not counts:
        raise ValueError(f"counts and exponents need one entry a tensor, got {len(counts)} and {len(exponents)}")
    tensors = math.fsum(tensor_code_length(count, bits, k) for count, k in zip(counts, exponents, strict=True))
    return tensors + math.log(bits * (bits + 1)) + math.fsum(math.log(check_count("width", m)) for m in widths)


@dataclass(frozen=True)
class Quantised:
    """A tensor on the grid that `tensor_code_length` pays for.

    Attributes:
        values: the rounded tensor, the input's shape, multiples of 2^(k + 1 - bits) in [-2^k, 2^k).
        k: the exponent.
        bits: bits an entry.
    """

    values: FloatArray
    k: int
    bits: int


def quantise(tensor: ArrayLike, bits: int, exponent: int | None = None) -> Quantised:
    """Round a tensor to 2^bits equally spaced values in [-2^k, 2^k), by default the smallest k that clips nothing.

    Args:
        tensor: finite numbers of any shape.
        bits: bits an entry, at least 1.
        exponent: k; a smaller one than the default clips the largest entries and rounds the others more finely.

    Returns:
        The rounded tensor with its exponent; no entry moves by more than half a grid step, except that entries
        within half a step of the upper end 2^k move by up to one step.

    Raises:
        ValueError: if an entry is NaN or infinite, the tensor is empty, or bits is outside 1..53.

    Source: derived here (uniform quantiser).
    """
    array = np.asarray(tensor, dtype=np.float64)
    bits = check_count("bits", bits)
    if bits > 53:
        raise ValueError(f"bits must be at most 53, the digits of a float64, got {bits}")
    if array.size == 0 or not np.all(np.isfinite(array)):
        raise ValueError(f"tensor must be non-empty and finite, got shape {array.shape}")
    largest = float(np.max(np.abs(array)))
    # Tensors below 2^-900 get the exponent -900, so that the step stays a normal float.
    k = max(power_of_two_above(largest), -900) if largest > 0 else 0
    if exponent is not None:
        k = max(int(exponent), -900)
    step = 2.0 ** (k + 1 - bits)
    levels = np.clip(np.round(array / step), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return Quantised(levels * step, k, bits)


def binary_kl(q: float, p: float) -> float:
    """Return the Kullback-Leibler divergence of two coins: q ln(q/p) + (1-q) ln((1-q)/(1-p)).

    Args:
        q: probability of the first coin, in [0, 1].
        p: probability of the second coin, in [0, 1].

    Returns:
        The divergence in nats; +inf where the second coin excludes what the first allows.

    Raises:
        ValueError: if a probability is outside [0, 1].

    Source: definition.
    """
    q, p = check_number("q", q, 0.0, 1.0), check_number("p", p, 0.0, 1.0)
    if (q > 0 and p == 0) or (q < 1 and p == 1):
        return math.inf
    return max(_relative_entropy_part(q, p) + _relative_entropy_part(1 - q, 1 - p), 0.0)


def _relative_entropy_part(a: float, b: float) -> float:
    """Return a ln(a/b) without losing digits where a and b are close, or overflowing where they are far apart."""
    if a == 0:
        return 0.0
    return -a * math.log1p((b - a) / a) if abs(b - a) < a / 2 else a * (math.log(a) - math.log(b))


def invert_binary_kl(q: float, budget: float) -> float:
    """Return the largest true error that the divergence budget allows, rounded up.

    sup {p >= q : kl(q || p) <= budget} by bisection; the upper end of the last bracket is returned, so
    kl(q || result) >= budget, or result = 1.

    Args:
        q: empirical error, in [0, 1].
        budget: nats an example, non-negative.

    Returns:
        p in [q, 1].

    Raises:
        ValueError: if q is outside [0, 1], or the budget negative or NaN.

    Source: Langford 2005, inversion of the kl bound.
    """
    q = check_number("q", q, 0.0, 1.0)
    if math.isnan(budget) or budget < 0:
        raise ValueError(f"budget must be at least 0 nats, got {budget!r}")
    low, high = q, 1.0
    while True:
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        if binary_kl(q, middle) < budget:
            low = middle
        else:
            high = middle
    # Bracket ends are neighbouring floats now; q itself is the answer only for an empty budget.
    return q if budget == 0 else high


def _check_occam(empirical_error: float, n: int, code_length: float, delta: float) -> tuple[float, float]:
    """Return the checked empirical error and the budget (C + ln(1/delta)) / n."""
    empirical_error = check_number("empirical_error", empirical_error, 0.0, 1.0)
    n = check_count("n", n)
    code_length = check_number("code_length", code_length, 0.0)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return empirical_error, (code_length + math.log(1 / delta)) / n


def occam_bound(empirical_error: float, n: int, code_length: float, delta: float) -> Bound:
    """Bound the true error of the network that was written down, by its training error and its code length.

    value = sup {p : kl(empirical_error || p) <= (code_length + ln(1/delta)) / n}.

    Args:
        empirical_error: 0-1 error of the QUANTISED pruned network on the n training examples, in [0, 1].
        n: number of i.i.d. examples.
        code_length: C(h) in nats, from `network_code_length`.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical and variance (= value - empirical); never above `occam_bound_relaxed`.

    Raises:
        ValueError: if an input is out of range.

    Source: Langford 2005 (Occam's razor bound in kl form); the code is derived here.
    """
    empirical_error, budget = _check_occam(empirical_error, n, code_length, delta)
    value = invert_binary_kl(empirical_error, budget)
    return Bound(
        "Occam (kl)",
        value,
        {"empirical": empirical_error, "variance": value - empirical_error},
        confidence=1 - delta,
        covers=QUANTISED,
        loss="0-1",
        trivial=1.0,
        theorem="Occam's razor bound, kl form",
        source="Langford 2005; prior over tensors, exponents, bits and widths derived here",
    )


def occam_bound_relaxed(empirical_error: float, n: int, code_length: float, delta: float) -> Bound:
    """Bound the true error by the square-root form: empirical + sqrt((C + ln(1/delta)) / (2 n)).

    Args:
        empirical_error: as in `occam_bound`.
        n: number of i.i.d. examples.
        code_length: C(h) in nats.
        delta: allowed probability of failure.

    Returns:
        A `Bound` with terms empirical, variance (the code length's share) and confidence (what delta adds).

    Raises:
        ValueError: if an input is out of range.

    Source: Langford 2005; follows from `occam_bound` by Pinsker's inequality kl(q || p) >= 2 (p - q)^2.
    """
    empirical_error, budget = _check_occam(empirical_error, n, code_length, delta)
    variance = math.sqrt(code_length / (2 * n))
    return Bound.from_terms(
        "Occam (relaxed)",
        {"empirical": empirical_error, "variance": variance, "confidence": math.sqrt(budget / 2) - variance},
        confidence=1 - delta,
        covers=QUANTISED,
        loss="0-1",
        trivial=1.0,
        theorem="Occam's razor bound, square-root form",
        source="Langford 2005; prior over tensors, exponents, bits and widths derived here",
    )
