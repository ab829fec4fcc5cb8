"""Kept nodes with weights, and what they leave unexplained: the objects that spectral pruning's theorems speak of.

Notation of every function: S is the (m, m) noncentered covariance of a layer's node outputs, lambda the
regularisation, q the leverage scores, J the kept nodes.

One simplification runs through the module.  The theory draws a multiset J of size M from q and gives every draw of
node j the penalty tau_j = lambda * M * q_j.  If node j was drawn t_j times, the t_j copies act exactly like ONE node
of weight omega_j = t_j / (q_j M) and penalty tau_j = lambda / omega_j.  So kept nodes are distinct indices with
weights omega, and the pruned layer carries the norm |||v|||^2 = sum_{j in J} omega_j v_j^2.  (The merge is derived
here; tau and q are those of Suzuki et al. 2018/2020, arXiv:1808.08558.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from specprune.bounds.bound import FloatArray, Record, check_count, check_number, check_vector
from specprune.bounds.degrees_of_freedom import check_covariance, clip_eigenvalues

IndexArray = NDArray[np.int64]

#: lambda_max(residual) <= 4 lambda is what the sampling theorem delivers (Bach 2017, Prop. 1).
MAX_DISTORTION = 4.0
#: sum(omega) <= 5/3 m: Markov's inequality leaves probability 2/5 for it (as recalled, Suzuki et al. ask the same).
MAX_MASS = 5.0 / 3.0
_ROUNDING = 1e-6  # of the largest eigenvalue: what float32 data may leave below zero, as in `eigenvalues`


@dataclass(frozen=True)
class WeightedNodes:
    """Kept nodes of one layer: distinct indices with positive weights.

    Attributes:
        indices: kept nodes, shape (k,), distinct, int64.
        weights: omega, shape (k,), positive pure numbers; all ones where nothing was pruned.
    """

    indices: IndexArray
    weights: FloatArray

    def __post_init__(self) -> None:
        indices = check_indices(self.indices)
        weights = check_vector("weights", self.weights)
        if len(np.unique(indices)) != len(indices):
            raise ValueError("indices must be distinct; merge repeated draws with weighted_nodes()")
        if weights.shape != indices.shape or float(weights.min()) <= 0:
            raise ValueError(f"weights must be {len(indices)} positive numbers, one an index, got {weights}")
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True)
class Feasibility(Record):
    """The two measurable conditions of the approximation theorem.

    Attributes:
        c: lambda_max(residual) / lambda, rounded up by the size of float64 rounding.
        s: sum(omega) / m.
        holds: c <= 4 and s <= 5/3.
    """

    c: float
    s: float
    holds: bool


def check_indices(indices: ArrayLike) -> IndexArray:
    """Return node indices as a non-empty int64 vector.

    Args:
        indices: whole numbers of at least 0, shape (k,).

    Returns:
        The same as int64.

    Raises:
        ValueError: if the vector is empty, not one-dimensional, not whole or negative.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer) or int(array.min()) < 0:
        raise ValueError(f"indices must be a non-empty vector of integers >= 0, got {indices!r}")
    return array.astype(np.int64)


def check_nodes(size: int, nodes: WeightedNodes) -> None:
    """Refuse nodes that a layer of `size` nodes does not have.

    Args:
        size: number of nodes m.
        nodes: the kept nodes.

    Raises:
        ValueError: if an index is m or more.
    """
    if int(nodes.indices.max()) >= size:
        raise ValueError(f"nodes hold index {int(nodes.indices.max())}, but the layer has {size} nodes (0..{size - 1})")


def weighted_nodes(indices: ArrayLike, scores: ArrayLike) -> WeightedNodes:
    """Merge repeated draws into distinct nodes: omega_j = t_j / (q_j M) for a node drawn t_j times out of M.

    Args:
        indices: the draws, shape (M,), repetitions allowed (a greedy choice has none).
        scores: leverage scores q, shape (m,), non-negative, summing to 1.

    Returns:
        Distinct nodes in ascending order with their weights.  Keeping all m nodes with q = 1/m gives omega = 1.

    Raises:
        ValueError: if a drawn node has score zero or does not exist, or the scores do not sum to 1.

    Source: the merge is derived here; weights as in Suzuki et al. 2018/2020 (arXiv:1808.08558), tau = lambda M q.
    """
    draws = check_indices(indices)
    q = check_scores(scores)
    if int(draws.max()) >= len(q):
        raise ValueError(f"indices hold {int(draws.max())}, but scores has {len(q)} entries (0..{len(q) - 1})")
    nodes, copies = np.unique(draws, return_counts=True)
    if np.any(q[nodes] == 0):
        bad = nodes[q[nodes] == 0].tolist()
        raise ValueError(f"nodes {bad} have leverage score 0, so their weight is infinite; leave them out")
    return WeightedNodes(nodes, copies / (q[nodes] * len(draws)))


def check_scores(scores: ArrayLike) -> FloatArray:
    """Return leverage scores as a probability vector.

    Args:
        scores: q, shape (m,).

    Returns:
        q in float64.

    Raises:
        ValueError: if an entry is negative or the sum is not 1 (to 1e-6).
    """
    q = check_vector("scores", scores)
    if abs(float(q.sum()) - 1) > 1e-6:
        raise ValueError(f"scores must sum to 1, got {float(q.sum()):g}; divide them by their sum")
    return q


def sample_nodes(scores: ArrayLike, size: int, generator: np.random.Generator) -> IndexArray:
    """Draw nodes independently with probabilities q; the same node may come more than once.

    Args:
        scores: q, shape (m,), summing to 1.
        size: number of draws M.
        generator: NumPy generator; the only source of randomness.

    Returns:
        The multiset J, shape (M,), int64.

    Raises:
        ValueError: if the scores are no probability vector or size < 1.
    """
    q = check_scores(scores)
    return generator.choice(len(q), size=check_count("size", size), p=q / q.sum()).astype(np.int64)


def _factor(matrix: FloatArray, nodes: WeightedNodes, lam: float) -> tuple[FloatArray, FloatArray]:
    """Return the lower Cholesky factor of S_JJ + lambda diag(1/omega), and S_FJ.

    Where rounding of the data left S_JJ so indefinite that lambda does not make up for it, just enough is added to the
    diagonal.  More regularisation never makes the residual smaller.
    """
    check_nodes(len(matrix), nodes)
    own = matrix[np.ix_(nodes.indices, nodes.indices)]
    block = own + np.diag(lam / nodes.weights)
    try:
        return scipy.linalg.cholesky(block, lower=True), matrix[:, nodes.indices]
    except scipy.linalg.LinAlgError:
        values = scipy.linalg.eigvalsh(own)
        clip_eigenvalues(values, _ROUNDING)  # refuses what is no covariance
        shift = 2 * abs(min(float(values[0]), 0.0)) + 4 * len(own) * float(np.finfo(np.float64).eps) * float(values[-1])
        return scipy.linalg.cholesky(block + shift * np.eye(len(own)), lower=True), matrix[:, nodes.indices]


def residual_covariance(covariance: ArrayLike, nodes: WeightedNodes, lam: float) -> FloatArray:
    """Return the variance that the kept nodes cannot explain: zero if they carry everything.

    Res = S - S_FJ (S_JJ + lambda diag(1/omega))^(-1) S_JF.  For every z, by ridge duality,
    z' Res z = min_alpha E(z'phi - alpha'phi_J)^2 + lambda sum_j alpha_j^2 / omega_j.

    Args:
        covariance: S, shape (m, m).
        nodes: kept nodes with weights.
        lam: regularisation, positive, in the units of S.

    Returns:
        Res, shape (m, m), symmetric positive semidefinite up to rounding, in the units of S.

    Raises:
        ValueError: if S is no covariance, lam is not positive or a node does not exist.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), input information loss (its trace).
    """
    matrix = check_covariance(covariance)
    factor, cross = _factor(matrix, nodes, check_number("lam", lam, 0.0, open_low=True))
    half = scipy.linalg.solve_triangular(factor, cross.T, lower=True)
    residual = matrix - half.T @ half
    return (residual + residual.T) / 2


def reconstruction_matrix(covariance: ArrayLike, nodes: WeightedNodes, lam: float) -> FloatArray:
    """Return the linear map that rebuilds all nodes from the kept ones: phi ~ A phi_J.

    A_J = S_FJ (S_JJ + lambda diag(1/omega))^(-1).

    Args:
        covariance: S, shape (m, m).
        nodes: kept nodes with weights, k of them.
        lam: regularisation, positive, in the units of S.

    Returns:
        A_J, shape (m, k), pure numbers; the pruned consumer has the weight W A_J.

    Raises:
        ValueError: as `residual_covariance`.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), minimiser of the information losses.
    """
    matrix = check_covariance(covariance)
    factor, cross = _factor(matrix, nodes, check_number("lam", lam, 0.0, open_low=True))
    return scipy.linalg.cho_solve((factor, True), cross.T).T


def feasibility(covariance: ArrayLike, nodes: WeightedNodes, lam: float) -> Feasibility:
    """Measure the two conditions of the approximation theorem on a concrete choice of nodes.

    c = lambda_max(Res) / lambda and s = sum(omega) / m; the theorem asks for c <= 4 and s <= 5/3.

    Args:
        covariance: S, shape (m, m).
        nodes: kept nodes with weights.
        lam: regularisation, positive, in the units of S.

    Returns:
        c (rounded up by 4 m eps ||S|| / lambda, the size of rounding in Res), s, and whether both conditions hold.

    Raises:
        ValueError: as `residual_covariance`.

    Source: Bach 2017, Prop. 1 (the 4); both re-derived here, after Suzuki et al. 2018/2020 (arXiv:1808.08558).
    """
    residual = residual_covariance(covariance, nodes, lam)
    size = len(residual)
    largest = float(scipy.linalg.eigvalsh(residual, subset_by_index=[size - 1, size - 1])[0])
    matrix = np.asarray(covariance, np.float64)
    scale = float(np.abs(matrix).max()) or 1.0  # so that no square overflows or vanishes
    rounding = 4 * size * float(np.finfo(np.float64).eps) * float(np.linalg.norm(matrix / scale)) * scale
    c = (max(largest, 0.0) + rounding) / lam
    s = float(nodes.weights.sum()) / size
    return Feasibility(c, s, bool(c <= MAX_DISTORTION and s <= MAX_MASS * (1 + 1e-12)))
