"""Spectral pruning's theorems: how many nodes to draw, and how far the pruned network's output can move.

Notation of every function: S is the (m, m) noncentered covariance of a layer's node outputs, lambda the
regularisation, N = N(lambda) its degrees of freedom, J the kept nodes with their weights omega (module `nodes`).
The theorems follow Suzuki et al. 2018/2020 (arXiv:1808.08558), which has unnamed universal constants; every constant
here is derived.  Theorem numbers of that paper are as recalled, not re-checked against its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import (
    PRUNED,
    Bound,
    FloatArray,
    Hypothesis,
    Record,
    check_count,
    check_number,
    check_vector,
)
from specprune.bounds.degrees_of_freedom import check_covariance
from specprune.bounds.nodes import (
    MAX_DISTORTION,
    MAX_MASS,
    Feasibility,
    WeightedNodes,
    check_nodes,
    feasibility,
    reconstruction_matrix,
    residual_covariance,
    sample_nodes,
    weighted_nodes,
)

__all__ = [
    "Feasibility",
    "PrunedLayer",
    "WeightedNodes",
    "approximation_a_priori",
    "approximation_certificate",
    "feasibility",
    "margin_transfer",
    "paper_width",
    "prune_dense_layer",
    "reconstruction_matrix",
    "residual_covariance",
    "row_norm_bound",
    "sample_nodes",
    "samples_needed",
    "sampling_failure_probability",
    "weighted_nodes",
]


@dataclass(frozen=True)
class PrunedLayer(Record):
    """What one consumer of a pruned layer does to the output error, as two numbers.

    Attributes:
        local_error: sqrt of the mean of |||W_J' phi - W# phi_J|||^2 in the NEXT layer's weighted norm.
        gain: factor by which the layer (with the Lipschitz maps behind it) enlarges an error at its input, between
            the weighted norms.
    """

    local_error: float
    gain: float


def _check_dof(dof: float, ratio: float) -> tuple[float, float]:
    """Return N and lambda/mu_1, refusing pairs that no covariance has: N >= mu_1 / (mu_1 + lambda)."""
    ratio = check_number("ratio", ratio, 0.0)
    dof = check_number("dof", dof, 0.0, open_low=True)
    if dof * (1 + ratio) < 1 - 1e-9:
        raise ValueError(
            f"dof={dof:g} is below 1/(1 + lam/mu1) = {1 / (1 + ratio):g}, which no covariance allows; "
            f"pass ratio = lam / (largest eigenvalue), got {ratio:g}"
        )
    return dof, ratio


def samples_needed(dof: float, delta: float, form: Literal["bach", "explicit"] = "explicit", ratio: float = 1.0) -> int:
    """Return how many leverage-score draws make the kept nodes good (c <= 4) with probability 1 - delta.

    explicit: M >= 32/9 (N + 1/4) ln(4 N (1 + lambda/mu_1) / delta), any lambda.
    bach:     M >= 5 N ln(16 N / delta), shown here to imply the explicit form if lambda <= mu_1 and delta >= 2e-4.

    Args:
        dof: N(lambda), positive.
        delta: allowed probability of failure, in (0, 1).
        form: which of the two sufficient conditions.
        ratio: lambda / mu_1, lambda over the largest eigenvalue; 1.0 covers every lambda <= mu_1.

    Returns:
        M, the number of draws (with repetition), at least 1.

    Raises:
        ValueError: if an input is out of range, or "bach" is asked for outside lambda <= mu_1, delta >= 2e-4.

    Source: Bach 2017 (JMLR 18), Prop. 1, for the form 5 N ln(16 N / delta); the explicit constants are derived here
        from the intrinsic-dimension matrix Bernstein inequality, Tropp 2015, Theorem 7.7.1.
    """
    dof, ratio = _check_dof(dof, ratio)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if form == "bach":
        if ratio > 1 or delta < 2e-4:
            raise ValueError(
                f"form='bach' is proved here for ratio = lam/mu1 <= 1 and delta >= 2e-4, got ratio={ratio:g}, "
                f"delta={delta:g}; use form='explicit'"
            )
        return max(1, math.ceil(5 * dof * math.log(16 * dof / delta)))
    if form != "explicit":
        raise ValueError(f"form must be 'bach' or 'explicit', got {form!r}")
    return max(1, math.ceil(32 / 9 * (dof + 0.25) * (math.log(4 * dof * (1 + ratio)) - math.log(delta))))


def paper_width(dof: float) -> int:
    """Return the width that the approximation theorem asks for: ceil(5 N ln(80 N)).

    It is `samples_needed` in the form "bach" at delta = 1/5: then c <= 4 fails with probability at most 1/5 and
    s <= 5/3 with probability at most 3/5 (Markov), so a choice with both exists.

    Args:
        dof: N(lambda), positive, at some lambda <= mu_1.

    Returns:
        The width, at least 1; it often exceeds the layer's own width.

    Raises:
        ValueError: if dof < 1/2, which lambda <= mu_1 excludes.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 1; the explanation of the 80 is derived here.
    """
    return samples_needed(dof, 0.2, form="bach", ratio=1.0)


def sampling_failure_probability(dof: float, samples: int, ratio: float = 1.0) -> float:
    """Return a ceiling on the probability that M leverage-score draws fail (c > 4).

    P(c > 4) <= min(1, 4 N (1 + lambda/mu_1) exp(-(9/32) M / (N + 1/4))).

    Args:
        dof: N(lambda), positive.
        samples: number of draws M.
        ratio: lambda / mu_1; 1.0 covers every lambda <= mu_1.

    Returns:
        A probability.

    Raises:
        ValueError: if an input is out of range.

    Source: derived here from Tropp 2015, Theorem 7.7.1, following the proof of Bach 2017, Prop. 1.  (The side
        condition t >= sqrt(v) + L/3 of that theorem fails only where this formula already gives 1.)
    """
    dof, ratio = _check_dof(dof, ratio)
    samples = check_count("samples", samples)
    log_probability = math.log(4 * dof * (1 + ratio)) - 9 / 32 * samples / (dof + 0.25)
    return min(1.0, math.exp(min(log_probability, 0.0)))


def margin_transfer(gamma: float) -> float:
    """Return how much the ramp loss can change per unit of output error: sqrt(2) / gamma.

    A margin is a difference of two logits (one a maximum), so it moves by at most sqrt(2) times the Euclidean norm.

    Args:
        gamma: margin width, positive, in logit units.

    Returns:
        The Lipschitz constant, in 1 / logit units.

    Raises:
        ValueError: if gamma is not positive.

    Source: elementary; derived here.
    """
    return math.sqrt(2) / check_number("gamma", gamma, 0.0, open_low=True)


def row_norm_bound(weight: ArrayLike, last: bool = False) -> float:
    """Return a consumer's norm R in the approximation theorem.

    R = sqrt(rows) * max_j ||W_j|| for a hidden layer, the Frobenius norm for the last one.

    Args:
        weight: W, shape (rows, m).
        last: whether these are the network's outputs.

    Returns:
        R, at least the Frobenius norm.

    Raises:
        ValueError: if W is not a finite matrix.

    Source: norm class of Suzuki et al. 2018/2020 (arXiv:1808.08558), one R a layer as derived here.
    """
    matrix = _check_weight(weight)
    rows = np.linalg.norm(matrix, axis=1)
    return float(np.linalg.norm(rows)) if last else math.sqrt(len(rows)) * float(rows.max())


def _check_weight(weight: ArrayLike) -> FloatArray:
    matrix = np.asarray(weight, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.all(np.isfinite(matrix)):
        raise ValueError(f"weight must be a finite matrix of shape (rows, m), got shape {matrix.shape}")
    return matrix


def prune_dense_layer(
    weight: ArrayLike, covariance: ArrayLike, nodes: WeightedNodes, lam: float, next_nodes: WeightedNodes | None = None
) -> PrunedLayer:
    """Return the local error and the gain of a dense consumer refitted on the kept nodes, W# = W_J' A_J.

    With Z = diag(sqrt(omega')) W_J',: local_error^2 = tr(E S E'), E = Z - (Z A_J placed in the kept columns), and
    gain = ||Z A_J diag(1/sqrt(omega))||_op; a 1-Lipschitz elementwise activation behind it changes nothing.

    Args:
        weight: W of the consumer, shape (rows, m).
        covariance: S of its inputs, shape (m, m).
        nodes: kept inputs.
        lam: regularisation of the refit, positive.
        next_nodes: kept outputs with their weights; None for the network's outputs (all kept, weight 1).

    Returns:
        The layer as two numbers, for `approximation_certificate`.

    Raises:
        ValueError: if shapes do not match or an input is invalid.

    Source: derived here (error propagation of Suzuki et al. 2018/2020, Theorem 1, with measured quantities).
    """
    matrix, second_moments = _check_weight(weight), check_covariance(covariance)
    if matrix.shape[1] != len(second_moments):
        raise ValueError(f"weight has {matrix.shape[1]} columns, but the covariance is of {len(second_moments)} nodes")
    if next_nodes is not None:
        check_nodes(len(matrix), next_nodes)
        matrix = np.sqrt(next_nodes.weights)[:, np.newaxis] * matrix[next_nodes.indices]
    refit = matrix @ reconstruction_matrix(second_moments, nodes, lam)
    error = matrix.copy()
    error[:, nodes.indices] -= refit
    squared = max(float(np.sum((error @ second_moments) * error)), 0.0)
    gain = float(np.linalg.norm(refit / np.sqrt(nodes.weights), ord=2))
    return PrunedLayer(math.sqrt(squared), gain)


def approximation_certificate(
    local_errors: Sequence[float], gains: Sequence[float], output_norm: float | None = None
) -> Bound:
    """Bound the pruned network's output error by adding up what each layer loses and later layers enlarge.

    e = 0 before the first pruned layer; e <- local_error_l + gain_l * e.  The final e bounds ||f - f#||_n, the root
    mean square output difference over the n inputs that gave the covariances.

    Args:
        local_errors: one a consumer of a pruned layer, from the input side to the output, in units of its output.
        gains: as many; the first one multiplies an error of zero.
        output_norm: ||f||_n, the error of answering zero, taken as the trivial value; None if unknown.

    Returns:
        A deterministic `Bound`; term `layer_l` is local_error_l times the later gains.

    Raises:
        ValueError: if the lengths differ, are zero, or a number is negative or not finite.

    Source: derived here, by the induction of Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 1, with measured
        errors and gains in place of worst-case ones.
    """
    errors, factors = check_vector("local_errors", local_errors), check_vector("gains", gains)
    if errors.shape != factors.shape:
        raise ValueError(f"local_errors and gains must have one entry a layer, got {len(errors)} and {len(factors)}")
    return Bound.from_terms(
        "approximation certificate",
        _propagate(errors, factors),
        confidence=None,
        covers=PRUNED,
        loss="L2(P_n) output error",
        trivial=output_norm,
        theorem="error propagation with measured local errors and gains",
        source="Suzuki et al. 2018/2020, Theorem 1; certificate derived here",
    )


def _propagate(errors: FloatArray, gains: FloatArray) -> dict[str, float]:
    """Return each layer's local error times the gains of the layers behind it."""
    terms: dict[str, float] = {}
    for k, error in enumerate(errors):
        # Products in log space: a chain of large gains must become inf at most, never inf * 0 = NaN.
        later = gains[k + 1 :]
        if error == 0 or np.any(later == 0):
            terms[f"layer_{k + 1}"] = 0.0
            continue
        log_term = math.log(error) + float(np.sum(np.log(later)))
        terms[f"layer_{k + 1}"] = math.exp(log_term) if log_term < 709 else math.inf
    return terms


def approximation_a_priori(
    lams: Sequence[float],
    norms: Sequence[float],
    *,
    feasibilities: Sequence[Feasibility] | None = None,
    constants: Literal["theory", "measured"] = "theory",
    scales: Sequence[float] | None = None,
    spreads: Sequence[float] | None = None,
    output_norm: float | None = None,
) -> Bound:
    """Bound the pruned network's output error from lambda and norms alone: the approximation theorem.

    ||f - f#||_n <= sum_l (prod_{k >= l} Rbar_k) sqrt(lambda_l) * scale_l,  Rbar_l = sqrt(c_l s_{l+1} spread_l) R_l,
    where l runs over the pruned layers (each with its consumer), and s = 1 behind the last one.  With the theorem's
    constants c = 4, s = 5/3 this is Rbar_l = sqrt(20/3) R_l, and 2 R_L for the last layer.

    Args:
        lams: lambda_l, one a pruned layer from the input side to the output, positive.
        norms: R_l of each pruned layer's consumer (`row_norm_bound`; the last one Frobenius).
        feasibilities: c and s of each pruned layer's kept nodes, as measured by `feasibility`.
        constants: "theory" uses 4 and 5/3, valid where c <= 4 and s <= 5/3 hold; "measured" uses the measured c, s,
            valid for any choice of nodes.
        scales: factor on sqrt(lambda_l), for convolutions the square root of the number of positions; default 1.
        spreads: factor on R_l^2, for convolutions kernel height times width; default 1.
        output_norm: ||f||_n, the error of answering zero, taken as the trivial value; None if unknown.

    Returns:
        A deterministic `Bound` with one term a pruned layer.  Under "theory" without feasibilities the hypotheses
        are unmeasured and count as not holding.

    Raises:
        ValueError: if lengths differ, a number is out of range, or "measured" comes without feasibilities.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 1 (an unnamed universal constant there); the constant
        20/3 and the per-layer form are derived here.
    """
    lam, norm = check_vector("lams", lams), check_vector("norms", norms)
    size = len(lam)
    scale = np.ones(size) if scales is None else check_vector("scales", scales)
    spread = np.ones(size) if spreads is None else check_vector("spreads", spreads)
    if any(len(array) != size for array in (norm, scale, spread)) or (
        feasibilities is not None and len(feasibilities) != size
    ):
        raise ValueError(f"lams, norms, feasibilities, scales and spreads must have one entry a layer ({size})")
    if constants not in ("theory", "measured"):
        raise ValueError(f"constants must be 'theory' or 'measured', got {constants!r}")
    c, s = np.full(size, MAX_DISTORTION), np.full(size, MAX_MASS)
    hypotheses: list[Hypothesis] = []
    if constants == "measured":
        if feasibilities is None:
            raise ValueError("constants='measured' needs feasibilities, one a pruned layer; see feasibility()")
        c = check_vector("c", [item.c for item in feasibilities])
        s = check_vector("s", [item.s for item in feasibilities])
        hypotheses += [Hypothesis(f"c_{k + 1} as measured", float(c[k]), True) for k in range(size)]
        hypotheses += [Hypothesis(f"s_{k + 1} as measured", float(s[k]), True) for k in range(size)]
    else:
        for k in range(size):
            item = None if feasibilities is None else feasibilities[k]
            missing = " (not measured)" if item is None else ""
            c_holds, s_holds = item is not None and item.c <= 4, item is not None and item.s <= MAX_MASS * (1 + 1e-12)
            hypotheses.append(Hypothesis(f"c_{k + 1} <= 4{missing}", None if item is None else item.c, c_holds))
            hypotheses.append(Hypothesis(f"s_{k + 1} <= 5/3{missing}", None if item is None else item.s, s_holds))
    # The outputs of the network are all kept with weight 1, hence s = 1 behind the last consumer.
    with np.errstate(over="ignore"):  # an infinite bound is one, too
        gains = np.sqrt(c * np.append(s[1:], 1.0) * spread) * norm
        terms = _propagate(gains * np.sqrt(lam) * scale, gains)
    return Bound.from_terms(
        f"approximation a priori ({constants} constants)",
        terms,
        confidence=None,
        covers=PRUNED,
        loss="L2(P_n) output error",
        hypotheses=hypotheses,
        trivial=output_norm,
        theorem="Theorem 1 (approximation error)",
        source="Suzuki et al. 2018/2020 (arXiv:1808.08558); constant 20/3 derived here",
    )
