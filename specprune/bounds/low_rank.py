"""Near-low-rank weights: a network whose singular values decay fast may be bounded through its truncation to rank s.

Cover of low-rank matrices.  The m' x m matrices of rank at most s and operator norm at most R have, for every
epsilon > 0, an epsilon-cover in operator norm by matrices of the same set with

    ln N(epsilon) <= s (m + m') ln(1 + 4R/epsilon).

Proof.  X = A B with A = U S^(1/2), B = S^(1/2) V^T from the singular value decomposition, so ||A||, ||B|| <= sqrt(R).
A and B lie in operator-norm balls of m's and s m dimensions; a maximal set of points at distance above e sqrt(R) is an
e sqrt(R)-cover by points of the ball with at most (1 + 2/e)^dim points (volumes).  ||AB - A'B'|| <= ||A - A'|| ||B|| +
||A'|| ||B - B'|| <= 2 e R, so e = epsilon/(2R).  As 1 + 4R/epsilon <= 9R/epsilon for epsilon <= 3R, this implies the
usual (9R/epsilon)^(s(m+m'+1)) (Candes and Plan 2011, Lemma 3.1, in Frobenius norm).

The two classes.  G: chains with ||W_l|| <= s_l and rank W_l <= r_l.  F: chains with ||W_l|| <= s_l whose (t_l + 1)-th
singular value is at most tau_l; cutting at rank t_l moves such a network by at most sum_l Pi_l D_l tau_l in sup-norm
(exchange one layer at a time; cutting raises no norm), after which the cover of rank-t chains applies.  A power law
sigma_j <= V_0 j^(-alpha) is the special case tau_l = V_0 (t_l + 1)^(-alpha); the measured tails are never worse, so the
bound uses them, and the fitted law serves for the ceiling r_hat and for the rates.  Theorem E (`uncompressed`) with
these covers bounds the ORIGINAL network; ranks, tails and norms are chosen with the data and paid for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from specprune.bounds.bound import Bound, FloatArray, Hypothesis, Record, check_count, check_number, check_vector
from specprune.bounds.chain_cover import Geometry, chain_geometry, radius_hypothesis
from specprune.bounds.degrees_of_freedom import fit_power_law
from specprune.bounds.logs import exp_of, log1p_exp
from specprune.bounds.occam import integer_code_length, power_of_two_above, power_of_two_below
from specprune.bounds.uncompressed import LossPair, pair_bound

#: Exponents of the tail levels that F's ranks are tried at: a loss slack of 2^-1 down to 2^-40, and no truncation.
TAIL_LEVELS = range(1, 41)


@dataclass(frozen=True)
class DecayFit(Record):
    """A fitted decay x_j ~ x_0 j^(-exponent) of singular values (alpha, V_0) or eigenvalues (beta, U_0).

    A LARGE exponent is a fast decay, the convention of the theorems for the original network; `PowerLaw.beta` is its
    inverse.

    Attributes:
        exponent: alpha or beta, positive.
        standard_error: of the exponent, by least squares as if the residuals were independent; None for two points.
        scale: V_0 or U_0, the smallest constant with x_j <= scale * j^(-exponent) for ALL j, in units of x.
        r_squared: share of the variance of ln x_j explained.
        first: first index of the fit, counting from 1.
        last: last index of the fit.
    """

    exponent: float
    standard_error: float | None
    scale: float
    r_squared: float
    first: int
    last: int


def fit_decay(values: ArrayLike, first: int = 1, last: int | None = None) -> DecayFit:
    """Fit x_j = c j^(-exponent) by least squares of ln x_j on ln j, with the constant that makes it a ceiling.

    Args:
        values: singular values or eigenvalues, shape (m,), non-negative; sorted here in descending order.
        first: first index used, counting from 1.
        last: last index used; by default, and at most, the last positive value.

    Returns:
        The fit; standard error = sqrt(RSS / (k - 2) / sum (ln j - mean)^2) for k points.

    Raises:
        ValueError: if fewer than two positive values remain, or they do not decay.

    Source: ordinary least squares, as `fit_power_law`.
    """
    law = fit_power_law(values, first, last)
    y = np.log(np.sort(check_vector("values", values))[::-1][law.first - 1 : law.last])
    x = np.log(np.arange(law.first, law.last + 1, dtype=np.float64))
    error = None
    if len(x) > 2:
        residuals = (y - y.mean()) + (x - x.mean()) / law.beta
        error = float(np.sqrt(np.sum(residuals**2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2)))
    return DecayFit(1 / law.beta, error, law.envelope, law.r_squared, law.first, law.last)


@dataclass(frozen=True)
class SpectralLayer:
    """One layer as the low-rank theorems see it.

    Attributes:
        outputs: rows m' of the weight matrix.
        inputs: columns m (of a convolution: channels * kernel offsets).
        biases: number of biases, 0 if there are none.
        singular_values: of the matrix, shape (min(m', m),), times the Lipschitz constant of what follows (and of a
            convolution: times the square root of how many patches a pixel is in).
        bias_norm: as in `LayerSize`; ignored without biases.
    """

    outputs: int
    inputs: int
    biases: int
    singular_values: FloatArray
    bias_norm: float

    def __post_init__(self) -> None:
        check_count("outputs", self.outputs)
        check_count("inputs", self.inputs)
        check_count("biases", self.biases, low=0)
        check_number("bias_norm", self.bias_norm, 0.0)
        values = np.sort(check_vector("singular_values", self.singular_values))[::-1]
        if len(values) != self.full_rank:
            raise ValueError(
                f"a {self.outputs} x {self.inputs} matrix has {self.full_rank} singular values, got {len(values)}"
            )
        object.__setattr__(self, "singular_values", values)

    @property
    def full_rank(self) -> int:
        """The largest possible rank min(m', m)."""
        return min(self.outputs, self.inputs)

    def tail(self, rank: int) -> float:
        """Return the first singular value that a cut at `rank` drops: the operator norm of what is lost."""
        return float(self.singular_values[rank]) if rank < self.full_rank else 0.0


def truncate(matrix: ArrayLike, rank: int) -> tuple[FloatArray, float]:
    """Return the best approximation of a matrix by one of rank at most `rank`, and its error in operator norm.

    Args:
        matrix: shape (m', m).
        rank: at least 1; at or above min(m', m) the matrix is returned as it is.

    Returns:
        The truncated matrix and sigma_(rank + 1), 0 if nothing was cut.

    Raises:
        ValueError: if the matrix is not two-dimensional, or not finite, or rank < 1.

    Source: Eckart and Young 1936.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.all(np.isfinite(array)):
        raise ValueError(f"matrix must be finite with shape (m', m), got shape {array.shape}")
    if check_count("rank", rank) >= min(array.shape):
        return array.copy(), 0.0
    left, values, right = scipy.linalg.svd(array, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank], float(values[rank])


def low_rank_cover(rank: int, outputs: int, inputs: int, log_ratio: float) -> float:
    """Return ln N of the operator-norm cover of matrices of limited rank: s (m + m') ln(1 + 4R/epsilon) nats.

    The cover of all matrices, m m' ln(1 + 2R/epsilon), is taken where it is smaller.

    Args:
        rank: s.
        outputs: m'.
        inputs: m.
        log_ratio: ln(R/epsilon), R the radius in operator norm.

    Returns:
        Nats.

    Raises:
        ValueError: if rank exceeds min(m', m), or a count is below 1.

    Source: derived in this module; Candes and Plan 2011, Lemma 3.1, has (9R/epsilon)^(s(m+m'+1)) in Frobenius norm.
    """
    rank, outputs, inputs = check_count("rank", rank), check_count("outputs", outputs), check_count("inputs", inputs)
    if rank > min(outputs, inputs):
        raise ValueError(f"rank must be at most min({outputs}, {inputs}), got {rank}")
    factors = rank * (outputs + inputs) * log1p_exp(math.log(4) + log_ratio)
    return min(factors, outputs * inputs * log1p_exp(math.log(2) + log_ratio))


def _check_ranks(layers: Sequence[SpectralLayer], ranks: Sequence[int]) -> list[int]:
    if len(ranks) != len(layers):
        raise ValueError(f"ranks need one entry for each of the {len(layers)} layers, got {len(ranks)}")
    for layer, rank in zip(layers, ranks, strict=True):
        if check_count("rank", rank) > layer.full_rank:
            raise ValueError(f"rank must be at most min({layer.outputs}, {layer.inputs}), got {rank}")
    return [int(rank) for rank in ranks]


def _geometry(layers: Sequence[SpectralLayer], radius: float) -> Geometry:
    shifts = [layer.bias_norm if layer.biases else None for layer in layers]
    return chain_geometry([float(layer.singular_values[0]) for layer in layers], shifts, radius)


def rank_profile(layers: Sequence[SpectralLayer], level: float) -> tuple[int, ...]:
    """Return for every layer the smallest rank whose first dropped singular value is at most `level` * the largest.

    Args:
        layers: input side first.
        level: relative size of what may be dropped, in [0, 1).

    Returns:
        Ranks between 1 and min(m', m).

    Raises:
        ValueError: if the level is out of range.

    Source: derived here; any rule will do, since the ranks are paid for.
    """
    level = check_number("level", level, 0.0, 1.0, open_high=True)
    return tuple(
        max(1, int(np.count_nonzero(layer.singular_values > level * layer.singular_values[0]))) for layer in layers
    )


@dataclass(frozen=True)
class TruncationError(Record):
    """Ceilings on sup_x ||f(x) - g(x)|| for the truncation g of f to given ranks, in logit units.

    Attributes:
        power_law: r_hat = sum_l Pi_l D_l V_l s_l^(-alpha_l), from the fitted decay alone; V_0 R_2^(L-1) B_x
            sum_l s_l^(-alpha) for layers with equal constants and no biases.
        tails: the same with the singular values sigma_(s_l + 1) themselves, never larger.
    """

    power_law: float
    tails: float


def truncation_error(
    layers: Sequence[SpectralLayer], ranks: Sequence[int], fits: Sequence[DecayFit], input_radius: float
) -> TruncationError:
    """Return how far truncation to the given ranks can move the output, by the power laws and by the true tails.

    Exchanging one layer at a time moves the output by at most sum_l Pi_l D_l ||W_l - cut(W_l)||, where D_l bounds the
    layer's input and Pi_l = prod_{k>l} ||W_k||; cutting raises no norm.  Uncut layers (full rank) count 0.

    Args:
        layers: input side first.
        ranks: s_l, one a layer.
        fits: of each layer's singular values, from `fit_decay`.
        input_radius: bound on ||x||.

    Returns:
        Both ceilings; +inf where the product of norms overflows.

    Raises:
        ValueError: if lengths differ, or a number is out of range.

    Source: r_hat after Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274), Theorem 2; with one constant a layer and
        biases derived here.
    """
    kept = _check_ranks(layers, ranks)
    if len(fits) != len(layers):
        raise ValueError(f"fits need one entry for each of the {len(layers)} layers, got {len(fits)}")
    log_norms = [float(np.log(max(layer.singular_values[0], np.finfo(np.float64).tiny))) for layer in layers]
    log_d = math.log(check_number("input_radius", input_radius, 0.0, open_low=True))
    laws, tails = [], []
    for index, (layer, rank, fit) in enumerate(zip(layers, kept, fits, strict=True)):
        reach = log_d + math.fsum(log_norms[index + 1 :])
        if rank < layer.full_rank:
            if fit.scale > 0:
                laws.append(reach + math.log(fit.scale) - fit.exponent * math.log(rank))
            if layer.tail(rank) > 0:
                tails.append(reach + math.log(layer.tail(rank)))
        shift = math.log(layer.bias_norm) if layer.biases and layer.bias_norm > 0 else -math.inf
        log_d = float(np.logaddexp(log_d + log_norms[index], shift))
    return TruncationError(_sum_of_exponentials(laws), _sum_of_exponentials(tails))


def _sum_of_exponentials(logs: Sequence[float]) -> float:
    return exp_of(float(np.logaddexp.reduce(np.asarray(logs)))) if logs else 0.0


def _chain_cover(
    layers: Sequence[SpectralLayer], ranks: Sequence[int], geometry: Geometry, log_epsilon: float
) -> float:
    """Return ln N of rank-limited chains, epsilon/(2L) for each weight and bias block as in `log_cover`."""
    common, nats = math.log(2 * len(layers)) - log_epsilon, 0.0
    for index, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        later = common + geometry.log_later[index]
        ratio = later + geometry.log_norms[index] + geometry.log_inputs[index]
        nats += low_rank_cover(rank, layer.outputs, layer.inputs, ratio)
        if layer.biases:
            nats += layer.biases * log1p_exp(math.log(2) + later + geometry.log_biases[index])
    return nats


def _rank_price(layers: Sequence[SpectralLayer]) -> float:
    return math.fsum(math.log(layer.full_rank) for layer in layers)


def _cuts(
    layers: Sequence[SpectralLayer], geometry: Geometry, gamma: float
) -> Iterable[tuple[list[int], float, float]]:
    """Yield choices of F's ranks t_l, with the loss slack of their tails and the nats that ranks and tails cost."""
    yield [layer.full_rank for layer in layers], 0.0, _rank_price(layers)
    log_lipschitz = math.log(math.sqrt(2) / gamma)
    tails = [[power_of_two_above(float(value)) for value in layer.singular_values[1:]] for layer in layers]
    for level in TAIL_LEVELS:
        ranks, slack, price = [], 0.0, _rank_price(layers)
        for index, (layer, exponents) in enumerate(zip(layers, tails, strict=True)):
            reach = log_lipschitz + geometry.log_inputs[index] + geometry.log_later[index]
            # In logarithms, as the product of norms may overflow; a tail is rounded up to a power of two before use.
            ceiling = (-level * math.log(2) - math.log(len(layers)) - reach) / math.log(2)
            rank = 1 + next((j for j, k in enumerate(exponents) if k <= ceiling), len(exponents))
            ranks.append(rank)
            if rank < layer.full_rank:
                slack += math.exp(reach + exponents[rank - 1] * math.log(2))
                price += integer_code_length(exponents[rank - 1])
        yield ranks, slack, price


def low_rank_bound(
    layers: Sequence[SpectralLayer],
    candidates: Sequence[tuple[Sequence[int], LossPair]],
    *,
    input_radius: float,
    delta: float,
    fits: Sequence[DecayFit] | None = None,
    measured_radius: float | None = None,
) -> Bound:
    """Bound the original network's error through its truncations to low rank, the best of several.

    Theorem E with G the chains of rank r_l and F the chains with small tails behind rank t_l (see the module): covers
    at epsilon = gamma/(sqrt(2) n), a_G = 1/n, a_F = 1/n + sqrt(2)/gamma sum_l Pi_l D_l tau_l.  Prices: norms and tails
    rounded up to powers of two, gamma rounded down, ln min(m', m) for each r_l and each t_l.  All of it is in the union
    bound, so the minimum over candidates (ranks and margins) and over t is still a bound.

    Args:
        layers: the ORIGINAL network's layers, input side first.
        candidates: (ranks r_l, both networks measured on the n training examples); the measured distance replaces the
            ceiling r_hat, which is reported with it.
        input_radius: D_x with ||x|| <= D_x for every possible input.
        delta: allowed probability of failure.
        fits: of the singular values, for r_hat; fitted here by default (exponent 0 for a layer without decay).
        measured_radius: largest ||x|| seen, to check D_x; None if not measured.

    Returns:
        The smallest `Bound` with terms empirical, bias, variance and confidence (see `pair_bound`).  Its hypotheses
        show ||f - g||_n against r_hat and against the ceiling by measured tails; were one broken, then the layers or
        the radius would not be those of the network measured.

    Raises:
        ValueError: if there is no candidate, or an input is out of range.

    Source: form after Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274), Theorem 2, whose constant is unknown; derived
        here.
    """
    if not candidates:
        raise ValueError("candidates must hold at least one pair (ranks, LossPair)")
    laws = [_law(layer) for layer in layers] if fits is None else list(fits)
    geometry = _geometry(layers, input_radius)
    found: list[Bound] = []
    for given, pair in candidates:
        ranks = _check_ranks(layers, given)
        log_epsilon = math.log(pair.gamma) - math.log(math.sqrt(2) * pair.n)
        price = integer_code_length(power_of_two_below(pair.gamma)) + geometry.price + _rank_price(layers)
        ceilings = truncation_error(layers, ranks, laws, input_radius)
        hypotheses = (
            radius_hypothesis(input_radius, measured_radius),
            _below(pair.output_distance, "r_hat", ceilings.power_law, ranks),
            _below(pair.output_distance, "the tails' ceiling", ceilings.tails, ranks),
        )
        log_g = _chain_cover(layers, ranks, geometry, log_epsilon)
        found += [
            pair_bound(
                pair,
                log_original=_chain_cover(layers, cut, geometry, log_epsilon),
                log_compressed=log_g,
                delta=delta,
                price_original=cut_price,
                price_compressed=price,
                slack_original=1 / pair.n + slack,
                slack_compressed=1 / pair.n,
                hypotheses=hypotheses,
                name="low rank (original net)",
            )
            for cut, slack, cut_price in _cuts(layers, geometry, pair.gamma)
        ]
    return min(found, key=lambda bound: bound.value)


def _law(layer: SpectralLayer) -> DecayFit:
    """Return the fitted law; exponent 0 where the singular values do not decay, or there is but one."""
    try:
        return fit_decay(layer.singular_values)
    except ValueError:
        return DecayFit(0.0, None, float(layer.singular_values[0]), 0.0, 1, 1)


def _below(distance: float, name: str, ceiling: float, ranks: Sequence[int]) -> Hypothesis:
    # A relative 1e-9 for the rounding of the forward passes; at full rank both sides are rounding.
    holds = distance <= ceiling * (1 + 1e-9) + 1e-9
    shown = ", ".join(str(rank) for rank in ranks)
    return Hypothesis(f"||f - g||_n <= {name} = {ceiling:.4g} at ranks ({shown})", distance, holds)
