"""Which nodes to keep: exact greedy minimisation of the information losses, and the rules it is compared with.

For a kept set J with regulariser I_tau, Res(J) = Sigma - Sigma_FJ (Sigma_JJ + I_tau)^-1 Sigma_JF, and

    input loss   L_A(J) = Tr Res(J)            (how well the kept nodes tell all nodes)
    output loss  L_B(J) = Tr Z Res(J) Z^T      (how well they tell the consumer's outputs, Z its weights)

(Suzuki et al. 2020, arXiv:1808.08558, section 3).  Here both are divided by their value at the empty set, so that
theta weighs numbers between 0 and 1.  The objective is monotone but not submodular: no (1 - 1/e) guarantee holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import blas, lapack

from specprune.bounds.degrees_of_freedom import eigenvalues, leverage_scores
from specprune.bounds.nodes import WeightedNodes, residual_covariance

BLOCK = 128
_STRIP = 256  # columns of a triangle that are formed at a time
_RANK_TOLERANCE = 1e-13


@dataclass(frozen=True)
class NodeStatistics:
    """What the selection rules know about one group of nodes.

    Args:
        covariance: (m, m) noncentred covariance Sigma of the nodes as their consumer receives them.
        consumer_gram: (m, m) Z^T Z of the consumer's weights Z (summed over kernel offsets or pixels).
        magnitudes: (m,) Euclidean norms of the nodes' own incoming weights.
    """

    covariance: np.ndarray
    consumer_gram: np.ndarray
    magnitudes: np.ndarray

    @property
    def width(self) -> int:
        """Number of nodes m."""
        return len(self.covariance)

    @cached_property
    def spectrum(self) -> np.ndarray:
        """The (m,) eigenvalues of the covariance, falling; computed once."""
        return eigenvalues(self.covariance)

    def leverage(self, lam: float) -> np.ndarray:
        """Return the (m,) leverage scores at lambda, in units of the covariance; computed once for each lambda."""
        if lam not in self._leverage:
            self._leverage[lam] = leverage_scores(self.covariance, lam)
        return self._leverage[lam]

    @cached_property
    def _leverage(self) -> dict[float, np.ndarray]:
        return {}


def information_losses(statistics: NodeStatistics, nodes: WeightedNodes, lam: float) -> tuple[float, float]:
    """Return how much of the nodes, and of the consumer's outputs, the kept nodes do not tell.

    Args:
        statistics: of the group.
        nodes: the kept nodes J with their weights omega; tau = lam / omega.
        lam: lambda > 0, in units of the covariance.

    Returns:
        L_A(J) / Tr Sigma and L_B(J) / Tr(Z Sigma Z^T), both in [0, 1]; 0 where the denominator is 0.
    """
    residual = residual_covariance(statistics.covariance, nodes, lam)
    total_input = float(np.trace(statistics.covariance))
    total_output = float(np.sum(statistics.covariance * statistics.consumer_gram))
    output = float(np.sum(residual * statistics.consumer_gram))
    return (
        max(0.0, float(np.trace(residual))) / total_input if total_input > 0 else 0.0,
        max(0.0, output) / total_output if total_output > 0 else 0.0,
    )


def greedy_nodes(
    covariance: np.ndarray, consumer_gram: np.ndarray, size: int, *, tau: np.ndarray | float, theta: float
) -> np.ndarray:
    """Pick nodes one by one, each the one that lowers the combined information loss most.

    The gain of node j is (theta ||R_j||^2 / Tr Sigma + (1 - theta) ||Z R_j||^2 / Tr Z Sigma Z^T) / (R_jj + tau_j) with
    R the current residual.  The residuals K = R + I_tau and G = R M R (M the metric of the two losses) are kept
    explicitly and updated by matrix products once a block; inside a block only the pivots' columns are formed, so that
    the cost is that of a blocked pivoted Cholesky factorisation of two matrices.

    Args:
        covariance: (m, m) Sigma.
        consumer_gram: (m, m) Z^T Z.
        size: how many nodes, 1..m.
        tau: (m,) or scalar regulariser, in units of the covariance, not negative.
        theta: weight of the input loss, 0..1.

    Returns:
        (size,) indices in the order in which they were picked.

    Raises:
        ValueError: a size or theta out of range, or a negative tau.
    """
    covariance = np.asarray(covariance, dtype=np.float64, order="C")
    m = len(covariance)
    if not 1 <= size <= m:
        raise ValueError(f"size={size}: there are {m} nodes, keep between 1 and {m}")
    if not 0.0 <= theta <= 1.0:
        raise ValueError(f"theta={theta}: expected a number between 0 (output loss) and 1 (input loss)")
    regulariser = np.broadcast_to(np.asarray(tau, dtype=np.float64), (m,))
    if np.any(regulariser < 0) or not np.all(np.isfinite(regulariser)):
        raise ValueError("tau must be finite and not negative")
    residual = covariance + np.diag(regulariser)
    gains = _initial_gains(covariance, consumer_gram, theta)
    floor = _RANK_TOLERANCE * max(float(residual.diagonal().max()), np.finfo(np.float64).tiny)
    active = np.arange(m)
    chosen: list[int] = []
    while True:
        block = min(BLOCK, size - len(chosen))
        local, v, z = _greedy_block(residual, gains, block, floor)
        chosen.extend(active[local].tolist())
        if len(chosen) >= size:
            return np.array(chosen)
        stay = np.setdiff1d(np.arange(len(active)), local)
        v, z = v.take(stay, 1), z.take(stay, 1)
        residual, gains = _compact(residual, stay), _compact(gains, stay)
        # transposed, C order is the Fortran order of BLAS, which then updates in place: here the lower triangles
        blas.dsyrk(-1.0, v.T, beta=1.0, c=residual.T, overwrite_c=1)
        blas.dsyr2k(-1.0, z.T, v.T, beta=1.0, c=gains.T, overwrite_c=1)
        active = active[stay]


def _compact(matrix: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """Return the lower triangle of the rows and columns `stay`, moved to the front of the matrix's own memory."""
    flat, size = matrix.reshape(-1), len(stay)
    for k, row in enumerate(stay):  # no row is overwritten before it is read, as stay[k] >= k
        flat[k * size : k * size + k + 1] = matrix[row].take(stay[: k + 1])
    return flat[: size * size].reshape(size, size)


def _initial_gains(covariance: np.ndarray, consumer_gram: np.ndarray, theta: float) -> np.ndarray:
    """Return Sigma M Sigma, or its lower triangle, M = theta / Tr Sigma I + (1 - theta) / Tr(Z Sigma Z^T) Z^T Z."""
    input_total = float(np.trace(covariance))
    output_total = float(np.sum(covariance * consumer_gram))
    input_weight = theta / input_total if input_total > 0 else 0.0
    output_weight = (1 - theta) / output_total if output_total > 0 else 0.0
    if output_weight == 0:
        return input_weight * (covariance.T @ covariance)  # A^T A: NumPy calls syrk, half the work
    metric = output_weight * consumer_gram
    metric[np.diag_indices_from(metric)] += input_weight
    factor, info = lapack.dpotrf(metric.T, lower=1, clean=1)
    if info == 0:  # L^T Sigma and its square take 2/3 of the work of two products
        half = blas.dtrmm(1.0, factor, np.asfortranarray(covariance), lower=1, trans_a=1)
        return half.T @ half
    right = metric @ covariance
    gains = np.zeros_like(covariance)
    for start in range(0, len(gains), _STRIP):
        gains[start:, start : start + _STRIP] = covariance[start:] @ right[:, start : start + _STRIP]
    return gains


def _greedy_block(
    residual: np.ndarray, gains: np.ndarray, block: int, floor: float
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Pick `block` nodes; return them and the factors V, Z with K -= V^T V and G -= Z^T V + V^T Z.

    Only the lower triangles of K and G are read.  After pivot p, with v = K_p / sqrt(K_pp), g = G_p / sqrt(K_pp) and
    n = g_p / sqrt(K_pp), K loses v v^T and G loses g v^T + v g^T - n v v^T.
    """
    m = len(residual)
    v_all, z_all, curvature = np.zeros((block, m)), np.zeros((block, m)), np.zeros(block)
    diagonal, scores = residual.diagonal().copy(), gains.diagonal().copy()
    free = np.ones(m, dtype=bool)
    local: list[int] = []
    for t in range(block):
        usable = free & (diagonal > floor)
        ratio = np.where(usable, scores / np.where(usable, diagonal, 1.0), np.where(free, -1.0, -np.inf))
        p = int(ratio.argmax())
        local.append(p)
        free[p] = False
        if not usable[p]:  # only nodes without any energy left: they change nothing
            continue
        v_p = v_all[:t, p].copy()
        z_p = z_all[:t, p] - curvature[:t] * v_p
        v = np.concatenate([residual[p, :p], residual[p:, p]]) - v_p @ v_all[:t]
        z = np.concatenate([gains[p, :p], gains[p:, p]]) - v_p @ z_all[:t] - z_p @ v_all[:t]
        root = np.sqrt(v[p])
        v /= root
        z /= root
        n = z[p] / root
        v_all[t], z_all[t], curvature[t] = v, z, n
        diagonal -= v * v
        scores -= v * (2 * z - n * v)
    return local, v_all, z_all - 0.5 * curvature[:, None] * v_all


def pivoted_cholesky_nodes(covariance: np.ndarray, size: int) -> np.ndarray:
    """Pick the nodes that LAPACK's pivoted Cholesky factorisation (dpstrf) takes first: largest residual variance.

    Args:
        covariance: (m, m) Sigma.
        size: how many nodes, 1..m.

    Returns:
        (size,) indices in pivot order.
    """
    _, pivots, _, info = lapack.dpstrf(np.asfortranarray(covariance, dtype=np.float64), lower=1, tol=-1.0)
    if info < 0:
        raise ValueError(f"LAPACK dpstrf refused its argument {-info}")
    return pivots[:size] - 1


def leverage_nodes(scores: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Draw nodes in proportion to their leverage scores until `size` different ones are found.

    Where fewer nodes than that have a positive score, the others (which carry nothing) fill up the set in their order.

    Args:
        scores: (m,) probabilities q.
        size: how many different nodes.
        generator: source of randomness.

    Returns:
        (size,) indices in the order of their first appearance.
    """
    positive = int(np.count_nonzero(scores))
    drawn = generator.choice(len(scores), size=min(size, positive), replace=False, p=scores)
    return np.concatenate([drawn, np.flatnonzero(np.asarray(scores) == 0)[: size - len(drawn)]])


Rule = Callable[[NodeStatistics, int, float, float, np.random.Generator], np.ndarray]


def _greedy(statistics: NodeStatistics, size: int, lam: float, theta: float, _: np.random.Generator) -> np.ndarray:
    tau = lam * size * statistics.leverage(lam)
    return greedy_nodes(statistics.covariance, statistics.consumer_gram, size, tau=tau, theta=theta)


def _leverage(statistics: NodeStatistics, size: int, lam: float, _: float, rng: np.random.Generator) -> np.ndarray:
    return leverage_nodes(statistics.leverage(lam), size, rng)


def _cholesky(statistics: NodeStatistics, size: int, *_: object) -> np.ndarray:
    return pivoted_cholesky_nodes(statistics.covariance, size)


def _magnitude(statistics: NodeStatistics, size: int, *_: object) -> np.ndarray:
    return np.argsort(-statistics.magnitudes, kind="stable")[:size]


def _random(statistics: NodeStatistics, size: int, _: float, __: float, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(statistics.width)[:size]


RULES: dict[str, Rule] = {
    "greedy": _greedy,
    "leverage": _leverage,
    "cholesky": _cholesky,
    "magnitude": _magnitude,
    "random": _random,
}


def select_nodes(
    rule: str,
    statistics: NodeStatistics,
    size: int,
    *,
    lam: float,
    theta: float = 0.0,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Pick nodes by one of the rules "greedy", "leverage", "cholesky", "magnitude", "random".

    Args:
        rule: the rule's name.
        statistics: of the group.
        size: how many nodes, 1..m.
        lam: lambda > 0 in units of the covariance (greedy: tau_j = lam size q_j; leverage: the scores).
        theta: weight of the input loss in the greedy rule.
        generator: for the random rules; seed 0 if left out.

    Returns:
        (size,) different indices, in the order of preference.

    Raises:
        ValueError: an unknown rule, or a size out of range.
    """
    if rule not in RULES:
        raise ValueError(f"selection={rule!r}: expected one of {sorted(RULES)}")
    if not 1 <= size <= statistics.width:
        raise ValueError(f"size={size}: the group has {statistics.width} nodes, keep between 1 and {statistics.width}")
    return RULES[rule](statistics, size, lam, theta, generator or np.random.default_rng(0))
