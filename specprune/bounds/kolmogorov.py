"""How well n fixed functions can stand in for all neurons: Kolmogorov widths of two-layer networks from eigenvalues.

The class is sigma(w . x), w of the unit sphere; x has the law rho, w the law pi.  With mu_1 >= mu_2 >= ... the
eigenvalues on L2(rho) of k(x, x') = E_w sigma(w . x) sigma(w . x'), and Lambda(n) = sum_{j > n} mu_j,

    (1)  min over n-dimensional V of E_w dist^2(sigma(w .), V) = Lambda(n),
    (2)  Lambda(n) <= (n-width of the class)^2,
    (3)  for x and w uniform on the sphere S^(d-1), (2) is an equality where n counts whole degrees of spherical
         harmonics, those with the largest eigenvalues,
    (4)  all two-layer networks sum_j a_j sigma(w_j . x) with sum_j |a_j| <= 1 have the widths of the single neurons.

RECALLED (from the abstracts of Long and Wu 2021, arXiv:2108.04964; the text was not read): the linear approximability
of a neuron, measured by the Kolmogorov width, is controlled by the eigenvalue decay of that kernel, and the same holds
for two-layer networks.  No constant or rate here is quoted from the paper.

DERIVED (here and in the project's theory notes, C.5).  (1) The neurons, as a map from L2(pi) to L2(rho), are a
Hilbert-Schmidt operator with squared singular values mu_j; the best rank-n approximation leaves Lambda(n)
(Eckart-Young-Mirsky).  (2) The worst w is no better than the average one.  (3) Funk-Hecke: with tau the uniform law
and Y any spherical harmonic of degree k, E_x sigma(w . x) Y(x) = a_k Y(w), so k has the eigenvalue mu_k = a_k^2 with
multiplicity N(d, k).  By the addition theorem the harmonics of degree k hold N(d, k) mu_k of the energy of *every*
neuron: the distance to whole degrees is the same for all w, and worst and average case agree.  (4) The distance to V
is convex and even, so its supremum over the symmetric convex hull of the neurons is that over the neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from specprune._records import format_table, to_json
from specprune.bounds.bound import FloatArray, Record, check_count
from specprune.bounds.degrees_of_freedom import check_covariance, clip_eigenvalues, eigenvalues

Activation = Callable[[FloatArray], FloatArray]

_NODES = 32  # of the Gauss rule on one panel
_MOST_PANELS = 256
_NOISE = 1e-13  # of the integrals, relative to the root mean square of the activation
_TOLERANCE = 1e-12  # a smaller share of the trace is rounding


@dataclass(frozen=True, eq=False)
class SphereSpectrum(Record):
    """The largest eigenvalues of a neuron kernel on the sphere, one entry a degree of spherical harmonics.

    Attributes:
        dimension: d of the sphere S^(d-1).
        degrees: k, by falling eigenvalue, shape (s,); a degree that is not listed has none of the largest eigenvalues.
        eigenvalues: mu_k, shape (s,).
        multiplicities: N(d, k), exact up to 2^53, shape (s,).
        trace: E sigma(w . x)^2, the sum of all eigenvalues.
        remainder: the sum of the eigenvalues that are not listed; 0 where it is below 1e-12 of the trace.
    """

    dimension: int
    degrees: NDArray[np.int64]
    eigenvalues: FloatArray
    multiplicities: FloatArray
    trace: float
    remainder: float

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a degree: eigenvalue, multiplicity, and energy, the product of the two."""
        return [
            {"degree": int(k), "eigenvalue": float(mu), "multiplicity": float(count), "energy": float(mu * count)}
            for k, mu, count in zip(self.degrees, self.eigenvalues, self.multiplicities, strict=True)
        ]

    def to_json(self) -> str:
        """Return all fields as JSON."""
        return to_json(vars(self))

    def __str__(self) -> str:
        return format_table(self.to_records(), title=f"neurons on the sphere, d = {self.dimension}")


@dataclass(frozen=True, eq=False)
class Widths(Record):
    """What the best n-dimensional linear space leaves of a class of neurons, for several n.

    Attributes:
        n: dimensions, shape (s,).
        tail: Lambda(n), the smallest mean squared distance of a neuron to an n-dimensional space, shape (s,).
        floor: sqrt(Lambda(n)): no n-dimensional space is closer than this to every neuron, shape (s,).
        ceiling: some n-dimensional space is this close to every neuron, shape (s,).
    """

    n: NDArray[np.int64]
    tail: FloatArray
    floor: FloatArray
    ceiling: FloatArray

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a dimension."""
        columns = (self.n.tolist(), self.tail.tolist(), self.floor.tolist(), self.ceiling.tolist())
        return [
            {"n": n, "tail": tail, "floor": floor, "ceiling": ceiling}
            for n, tail, floor, ceiling in zip(*columns, strict=True)
        ]

    def to_json(self) -> str:
        """Return one list a field as JSON."""
        return to_json(vars(self))

    def __str__(self) -> str:
        return format_table(self.to_records(), title="Kolmogorov widths")


def harmonic_counts(dimension: int, max_degree: int) -> FloatArray:
    """Return how many independent spherical harmonics there are of each degree.

    N(d, 0) = 1, N(d, k) = (2k + d - 2) / k * binom(k + d - 3, d - 2).

    Args:
        dimension: d of the sphere S^(d-1), at least 2.
        max_degree: last degree, at least 0.

    Returns:
        N(d, 0), ..., N(d, max_degree) of shape (max_degree + 1,), exact up to 2^53.

    Raises:
        ValueError: if an argument is too small, or a count is beyond float64.

    Source: the classical count of harmonic polynomials.
    """
    d, last = check_count("dimension", dimension, low=2), check_count("max_degree", max_degree, low=0)
    # Whole numbers of any length, rounded once: a product of float64 factors would drift.
    counts = [1] + [(2 * k + d - 2) * math.comb(k + d - 3, d - 2) // k for k in range(1, last + 1)]
    try:
        return np.array([float(count) for count in counts])
    except OverflowError as error:
        raise ValueError(
            f"dimension {d} has more than 1e308 harmonics of degree {last}; take a smaller max_degree"
        ) from error


def relu_spectrum(dimension: int, max_degree: int = 60) -> SphereSpectrum:
    """Return the eigenvalues of the ReLU neuron kernel on the sphere, in closed form.

    mu_1 = 1 / (4 d^2), mu_k = (Gamma(d/2) |Gamma((k-1)/2)| / (4 pi Gamma((k+d+1)/2)))^2 for even k, and 0 for odd
    k >= 3, as logarithms of gamma functions; trace 1 / (2d).  Derived: by Rodrigues' formula the Gegenbauer integral
    of t_+ is, after two integrations by parts, a derivative of (1 - t^2)^(k + (d-3)/2) at 0.

    Args:
        dimension: d of the sphere S^(d-1), at least 2.
        max_degree: last degree, at least 1.

    Returns:
        The spectrum: every eigenvalue of a degree beyond the last is smaller than those listed.

    Raises:
        ValueError: as `harmonic_counts`.

    Source: Funk-Hecke formula; kernel of Cho and Saul 2009; setting of Long and Wu 2021 (arXiv:2108.04964).
    """
    counts = harmonic_counts(dimension, check_count("max_degree", max_degree))
    mu = np.zeros_like(counts)
    mu[::2] = _relu_even(dimension, np.arange(0, len(mu), 2))
    mu[1] = 1 / (4 * dimension**2)
    next_even = len(mu) + len(mu) % 2
    return _largest(dimension, mu, counts, 1 / (2 * dimension), float(_relu_even(dimension, next_even)))


def _relu_even(dimension: int, degree: int | NDArray[np.int64]) -> Any:
    """Return mu_k for even degrees; gammaln gives log |Gamma|, also at -1/2."""
    d, k = dimension, np.asarray(degree)
    log_root = gammaln(d / 2) + gammaln((k - 1) / 2) - gammaln((k + d + 1) / 2) - math.log(4 * math.pi)
    return np.exp(2 * log_root)


def sphere_spectrum(activation: Activation, dimension: int, max_degree: int = 60) -> SphereSpectrum:
    """Return the eigenvalues of the neuron kernel of any activation on the sphere, by quadrature.

    mu_k = a_k^2, a_k = c int_{-1}^{1} sigma(t) P_{k,d}(t) (1 - t^2)^((d-3)/2) dt, with P_{k,d}(1) = 1 and c such that
    the weight integrates to 1 (Funk-Hecke).  Computed with the orthonormal p_k = sqrt(N(d, k)) P_{k,d} and t = sin phi,
    whose weight cos^(d-2) phi is smooth, by Gauss rules on panels that are halved until nothing changes.

    Args:
        activation: sigma, takes an array of arguments in (-1, 1) and returns their values; smooth but at 0, where it
            may have a kink or a jump.  Weights of norm r are sigma(r t).
        dimension: d of the sphere S^(d-1), at least 2.
        max_degree: last degree, at least 0.

    Returns:
        The spectrum.  A coefficient sqrt(N mu_k) is right to 1e-13 sqrt(trace); below that it counts as 0.
        Listed are eigenvalues that no degree beyond `max_degree` can exceed: there N mu_k <= remainder.

    Raises:
        ValueError: as `harmonic_counts`; if the activation returns another shape, or values that are not finite, is
            zero everywhere, or is too rough for the quadrature.

    Source: Funk-Hecke formula; setting of Long and Wu 2021 (arXiv:2108.04964).
    """
    counts = harmonic_counts(dimension, check_count("max_degree", max_degree, low=0) + 1)
    coefficients, trace = _converged(activation, dimension, max_degree)
    size = math.sqrt(trace)
    coefficients[np.abs(coefficients) <= _NOISE * size] = 0.0
    energies = np.square(coefficients)
    left = _left(trace, energies)
    return _largest(dimension, energies / counts[:-1], counts[:-1], trace, left / float(counts[-1]))


def _converged(activation: Activation, dimension: int, max_degree: int) -> tuple[FloatArray, float]:
    panels = 4
    coarse, trace = _coefficients(activation, dimension, max_degree, panels)
    while panels < _MOST_PANELS:
        panels *= 2
        fine, fine_trace = _coefficients(activation, dimension, max_degree, panels)
        if fine_trace == 0:
            raise ValueError("activation is zero everywhere on (-1, 1): it has no eigenvalues to list")
        change = float(np.max(np.abs(fine - coarse))) / math.sqrt(fine_trace)
        if max(change, abs(fine_trace - trace) / fine_trace) <= _NOISE:
            return fine, fine_trace
        coarse, trace = fine, fine_trace
    raise ValueError(
        f"activation is too rough: its integrals still change by {change:.1e} at {2 * panels * _NODES} points; "
        "it must be smooth on (-1, 1) but for a kink or a jump at 0"
    )


def _coefficients(activation: Activation, dimension: int, max_degree: int, panels: int) -> tuple[FloatArray, float]:
    """Return E sigma(t) p_k(t) for k = 0, ..., max_degree, and E sigma(t)^2, for t = w . x."""
    d = dimension
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = math.pi / (4 * panels)
    angle = (half * (2 * np.arange(-panels, panels)[:, np.newaxis] + 1 + nodes)).ravel()  # 0 is an end of panels
    log_density = gammaln(d / 2) - gammaln((d - 1) / 2) - math.log(math.pi) / 2 + (d - 2) * np.log(np.cos(angle))
    mass = half * np.tile(weights, 2 * panels) * np.exp(log_density)
    t = np.sin(angle)
    values = np.asarray(activation(t), dtype=np.float64)
    if values.shape != t.shape or not np.all(np.isfinite(values)):
        raise ValueError(f"activation must return finite values of the shape of its argument, {t.shape}")
    result = np.empty(max_degree + 1)
    before, now, back = np.zeros_like(t), np.ones_like(t), 0.0
    for k in range(max_degree + 1):
        result[k] = np.sum(mass * values * now)
        # t p_k = b_(k+1) p_(k+1) + b_k p_(k-1); b_1 is the limit that holds at d = 2 as well.
        ahead = math.sqrt(1 / d if k == 0 else (k + 1) * (k + d - 2) / ((2 * k + d) * (2 * k + d - 2)))
        before, now, back = now, (t * now - back * before) / ahead, ahead
    return result, float(np.sum(mass * values**2))


def _left(trace: float, energies: FloatArray) -> float:
    """Return trace - sum of energies, or 0 where the difference is rounding: down is the safe side of a floor."""
    left = trace - math.fsum(energies)
    return left if left > _TOLERANCE * trace else 0.0


def _largest(dimension: int, mu: FloatArray, counts: FloatArray, trace: float, unseen: float) -> SphereSpectrum:
    """Return the eigenvalues, sorted, that are at least `unseen`, the largest that a further degree can have."""
    order = np.argsort(-mu, kind="stable")
    kept = order[(mu[order] >= unseen) & (mu[order] > 0)]
    dropped = np.setdiff1d(order, kept)
    remainder = _left(trace, mu * counts) + float(np.sum(mu[dropped] * counts[dropped]))
    return SphereSpectrum(dimension, kept, mu[kept], counts[kept], trace, remainder)


def widths(spectrum: SphereSpectrum, n: ArrayLike) -> Widths:
    """Return how close an n-dimensional linear space can come to all neurons on the sphere.

    tail = Lambda(n) = sum_{j > n} mu_j.  The n-width of the neurons, and of two-layer networks with sum |a_j| <= 1,
    lies between floor = sqrt(Lambda(n)) and ceiling = sqrt(Lambda(m)), m <= n the last number that whole degrees add
    up to; at n = m both are the width.  Derived: see the module.

    Args:
        spectrum: of `relu_spectrum` or `sphere_spectrum`.
        n: dimensions, whole numbers of at least 0, shape (s,).

    Returns:
        Tails, floors and ceilings of shape (s,), with rounding of about 1e-12 of the trace where the spectrum has a
        remainder.

    Raises:
        ValueError: if n is no such vector, or reaches beyond the listed eigenvalues.

    Source: setting of Long and Wu 2021 (arXiv:2108.04964).
    """
    counts = _check_dimensions(n)
    ends = np.cumsum(spectrum.multiplicities)
    listed = float(spectrum.multiplicities.sum())
    if spectrum.remainder > 0 and counts.size and counts.max() > listed:
        raise ValueError(f"n = {counts.max()} is beyond the {listed:.0f} eigenvalues listed; raise max_degree")
    after = _tails(spectrum.eigenvalues * spectrum.multiplicities) + spectrum.remainder  # after 0, 1, ... whole degrees
    whole = np.searchsorted(ends, counts, side="right")
    # The degree that n is inside of keeps ends - n eigenvalues; behind the last degree there is none to be inside of.
    kept = np.maximum(np.append(ends, 0.0)[whole] - counts, 0.0) * np.append(spectrum.eigenvalues, 0.0)[whole]
    tail = np.minimum(after[whole], kept + np.append(after, after[-1])[whole + 1])
    return Widths(counts, tail, np.sqrt(tail), np.sqrt(after[whole]))


def relu_kernel(points: ArrayLike) -> FloatArray:
    """Return the ReLU neuron kernel of given inputs: the average over w on the sphere of two neurons' product.

    k(x, x') = |x| |x'| (sin u + (pi - u) cos u) / (2 pi d), u the angle between x and x'.

    Args:
        points: inputs, one a row, shape (m, d), d at least 1.

    Returns:
        The kernel matrix, shape (m, m), symmetric.

    Raises:
        ValueError: if the points are not a finite, non-empty matrix.

    Source: Cho and Saul 2009 (arc-cosine kernel of degree 1), weights on the sphere in place of Gaussian ones.
    """
    rows = np.asarray(points, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.all(np.isfinite(rows)):
        raise ValueError(f"points must be a finite, non-empty matrix of shape (m, d), got shape {rows.shape}")
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, np.newaxis]
    cosine = np.clip(unit @ unit.T, -1.0, 1.0)
    shape = np.sqrt(1 - cosine**2) + (np.pi - np.arccos(cosine)) * cosine
    result: FloatArray = np.outer(norms, norms) * shape / (2 * np.pi * rows.shape[1])
    return result


def empirical_tail(kernel: ArrayLike, n: ArrayLike) -> FloatArray:
    """Return the part of the neurons' energy on given inputs that n functions cannot hold.

    Lambda(n) = sum_{j > n} mu_j, mu_j the eigenvalues of K / m.  It is (1) of the module for rho the inputs themselves.
    As an estimate for the law they are drawn from it is low on average (derived: a fixed V has an unbiased error, and
    the best V for the sample errs no more), the more so the less m exceeds n.

    Args:
        kernel: K with K_ij = k(x_i, x_j), such as `relu_kernel`, or A A^T / width for activations A, shape (m, m).
        n: dimensions, whole numbers of at least 0, shape (s,).

    Returns:
        Lambda(n) of shape (s,); 0 from n = m on.

    Raises:
        ValueError: if K is not symmetric positive semidefinite, or n is no such vector.

    Source: kernel of Long and Wu 2021 (arXiv:2108.04964); derived here.
    """
    matrix = check_covariance(kernel, "kernel")
    return _tails(eigenvalues(matrix) / len(matrix))[np.minimum(_check_dimensions(n), len(matrix))]


def neuron_widths(covariance: ArrayLike, n: ArrayLike) -> Widths:
    """Return how close an n-dimensional linear space can come to the neurons of one given layer, on its data.

    tail = sum_{j > n} mu_j / m, mu_j the eigenvalues of S = A^T A / samples and A the activations: the squared singular
    values of A over (samples * m).  The n-width of the m neurons, and of all networks sum_j a_j sigma_j with
    sum |a_j| <= 1, lies between floor = sqrt(tail) and ceiling = sqrt(max_i sum_{j > n} mu_j v_ij^2), the distance of
    the worst neuron to the first n principal directions (v_j the eigenvectors).  Derived: (1), (2), (4) of the module.

    Args:
        covariance: S, noncentered second moments of the m neurons, shape (m, m).
        n: dimensions, whole numbers of at least 0, shape (s,).

    Returns:
        Tails, floors and ceilings of shape (s,); 0 from n = m on.

    Raises:
        ValueError: if S is not symmetric positive semidefinite, or n is no such vector.

    Source: setting of Long and Wu 2021 (arXiv:2108.04964); derived here.
    """
    counts = _check_dimensions(n)
    values, vectors = scipy.linalg.eigh(check_covariance(covariance))
    values = clip_eigenvalues(values, 1e-6)[::-1]  # float32 moments have eigenvalues a little below 0
    left = np.array([_tails(row) for row in values * np.square(vectors[:, ::-1])])
    index = np.minimum(counts, len(values))
    tail = _tails(values / len(values))[index]
    return Widths(counts, tail, np.sqrt(tail), np.sqrt(left.max(axis=0))[index])


def _tails(values: FloatArray) -> FloatArray:
    """Return the sums of what is left after the first 0, 1, ..., len(values) entries."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _check_dimensions(n: ArrayLike) -> NDArray[np.int64]:
    counts = np.asarray(n)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise ValueError(f"n must be a vector of whole numbers of at least 0, got {n!r}")
    return counts.astype(np.int64)
