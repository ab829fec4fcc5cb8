"""The norms that norm-based bounds are made of, with biases as a constant coordinate that every layer carries on.

A layer is the dense matrix A that acts on the whole feature map; between layers stand maps with a known Lipschitz
constant that send 0 to 0.  Biases would break this form, so a network with biases is read in homogeneous coordinates:

    x' = (x, c),   A' = [[A, b/c], [0, 1]]   (last layer: [A, b/c]),   maps (sigma, identity),

which computes the same function without biases, for any constant c > 0.  Here c = 2^k, and k is paid for like every
other exponent, so it may be chosen after seeing the data.  The theorems then speak of the norms of A' and x'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import Hypothesis, check_count, check_number, check_vector
from specprune.bounds.logs import exp_of
from specprune.bounds.occam import integer_code_length, power_of_two_above


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer as a dense matrix A (with biases: A'), and what is known of the map behind it.

    Attributes:
        operator_norm: at least ||A||_2, the largest factor by which the layer lengthens a vector.
        frobenius: ||A||_F.
        two_one: sum over outputs j of the Euclidean norm of row j, ||A^T||_{2,1}.
        one_inf: largest l1 norm of a row.
        frobenius_distance: ||A - M||_F to a reference M fixed before the data.  M carries the constant coordinate on,
            so the row (0, 1) counts in the norms above but not here; without biases and for M = 0 this is `frobenius`.
        two_one_distance: ||A^T - M^T||_{2,1}, likewise.
        rows: outputs of A, the constant coordinate included.
        columns: inputs of A, the constant coordinate included.
        lipschitz: Lipschitz constant of everything between this layer and the next, in the Euclidean norm.
        elementwise: whether all of that acts on single numbers and never decreases (ReLU, not pooling).
        homogeneous: whether it is positively homogeneous, sigma(t z) = t sigma(z) for t > 0 (ReLU, pooling; not tanh).
    """

    operator_norm: float
    frobenius: float
    two_one: float
    one_inf: float
    frobenius_distance: float
    two_one_distance: float
    rows: int
    columns: int
    lipschitz: float = 1.0
    elementwise: bool = True
    homogeneous: bool = True

    def __post_init__(self) -> None:
        for name in ("operator_norm", "frobenius", "two_one", "one_inf", "frobenius_distance", "two_one_distance"):
            check_number(name, getattr(self, name), 0.0)
        check_number("lipschitz", self.lipschitz, 0.0)
        check_count("rows", self.rows)
        check_count("columns", self.columns)


@dataclass(frozen=True)
class InputNorms:
    """Norms of the n training inputs X (one row an example), and the constant coordinate that they get.

    Attributes:
        samples: n.
        frobenius: ||X||_F = sqrt(sum_i ||x_i||^2), without the constant coordinate, as the next two.
        largest: max_i ||x_i||.
        coordinate: max_j sqrt(sum_i x_ij^2), the longest column of X.
        constant_exponent: k of the constant coordinate c = 2^k; None for a network without biases.
    """

    samples: int
    frobenius: float
    largest: float
    coordinate: float
    constant_exponent: int | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        for name in ("frobenius", "largest", "coordinate"):
            check_number(name, getattr(self, name), 0.0)
        if self.constant_exponent is not None:
            check_count("constant_exponent", self.constant_exponent, low=-1000)
            check_number("constant_exponent", self.constant_exponent, high=1000)

    @property
    def constant(self) -> float:
        """The constant coordinate c, 0 where there is none."""
        return 0.0 if self.constant_exponent is None else 2.0**self.constant_exponent

    @property
    def price(self) -> float:
        """Nats that the choice of c costs: the integer code leaves a quarter of its mass, which "none" takes."""
        return math.log(4) if self.constant_exponent is None else integer_code_length(self.constant_exponent)

    @property
    def extended_frobenius(self) -> float:
        """||X'||_F = sqrt(||X||_F^2 + n c^2)."""
        return math.hypot(self.frobenius, math.sqrt(self.samples) * self.constant)

    @property
    def extended_coordinate(self) -> float:
        """The longest column of X', of which the constant coordinate is one."""
        return max(self.coordinate, math.sqrt(self.samples) * self.constant)

    @classmethod
    def of(cls, inputs: ArrayLike, constant_exponent: int | None = None) -> InputNorms:
        """Return the norms of an (n, features) array."""
        rows = np.asarray(inputs, dtype=np.float64)
        if rows.ndim != 2 or rows.size == 0 or not np.all(np.isfinite(rows)):
            raise ValueError(f"inputs must be a finite array of shape (n, features), got shape {rows.shape}")
        squares = np.square(rows)
        return cls(
            len(rows),
            math.sqrt(float(squares.sum())),
            math.sqrt(float(squares.sum(axis=1).max())),
            math.sqrt(float(squares.sum(axis=0).max())),
            constant_exponent,
        )


def layer_norms(
    operator_norm: float,
    row_norms: ArrayLike,
    row_sums: ArrayLike,
    columns: int,
    *,
    bias: ArrayLike | None = None,
    distances: ArrayLike | None = None,
    bias_distances: ArrayLike | None = None,
    constant: float = 0.0,
    last: bool = False,
    lipschitz: float = 1.0,
    elementwise: bool = True,
    homogeneous: bool = True,
) -> LayerNorms:
    """Return a layer's norms from those of its rows, in homogeneous coordinates where there is a constant coordinate.

    With a_j = ||A[j, :]|| and beta_j = b_j / c the rows of A' have norms sqrt(a_j^2 + beta_j^2), and the row (0, 1)
    has norm 1.  ||A'||_2 <= || [[||A||, ||beta||], [0, 1]] ||_2, because the norm of a block matrix is at most the norm
    of the matrix of its blocks' norms.  The identity on the constant coordinate makes the following map
    max(1, lipschitz)-Lipschitz.

    Args:
        operator_norm: at least ||A||_2.
        row_norms: (rows,) Euclidean norms of the rows of A.
        row_sums: (rows,) l1 norms of the rows of A.
        columns: inputs of A.
        bias: (rows,) bias of every output of the whole map; None for none.
        distances: (rows,) Euclidean norms of the rows of A - M; None for M = 0.
        bias_distances: (rows,) bias minus the reference's bias; None if the reference has none.
        constant: c > 0; 0 for a network without biases.
        last: whether this is the last layer, which does not carry the constant coordinate on.
        lipschitz: of the map behind the layer.
        elementwise: see `LayerNorms`.
        homogeneous: see `LayerNorms`.

    Returns:
        The norms of A, or with c > 0 of A'.

    Raises:
        ValueError: if an input is out of range, or there is a bias but no constant coordinate.

    Source: derived here.
    """
    norms, sums = check_vector("row_norms", row_norms), check_vector("row_sums", row_sums)
    moved = norms if distances is None else check_vector("distances", distances)
    constant = check_number("constant", constant, 0.0)
    shift = np.zeros_like(norms) if bias is None else check_vector("bias", bias, low=-math.inf)
    shift_moved = shift if bias_distances is None else check_vector("bias_distances", bias_distances, low=-math.inf)
    if not norms.shape == sums.shape == moved.shape == shift.shape == shift_moved.shape:
        raise ValueError(
            f"row_norms, row_sums, bias and distances must all have one entry for each row, got shapes {norms.shape}, "
            f"{sums.shape}, {shift.shape}, {moved.shape} and {shift_moved.shape}"
        )
    operator = check_number("operator_norm", operator_norm, 0.0)
    rows, inputs = len(norms), check_count("columns", columns)
    extra = 0.0
    if constant > 0:
        shift, shift_moved = shift / constant, shift_moved / constant
        norms, sums, moved = np.hypot(norms, shift), sums + np.abs(shift), np.hypot(moved, shift_moved)
        length = float(np.linalg.norm(shift))
        inputs += 1
        if last:
            operator = math.hypot(operator, length)
        else:
            operator = float(np.linalg.norm([[operator, length], [0.0, 1.0]], ord=2)) * (1 + 1e-14)
            rows, extra, lipschitz = rows + 1, 1.0, max(1.0, lipschitz)
    elif np.any(shift) or np.any(shift_moved):
        raise ValueError(
            "a layer with a bias needs a constant coordinate: give constant > 0, such as 1.0, to all layers"
        )
    return LayerNorms(
        operator_norm=operator,
        frobenius=math.hypot(float(np.linalg.norm(norms)), extra),
        two_one=float(norms.sum()) + extra,
        one_inf=max(float(sums.max()), extra),
        frobenius_distance=float(np.linalg.norm(moved)),
        two_one_distance=float(moved.sum()),
        rows=rows,
        columns=inputs,
        lipschitz=lipschitz,
        elementwise=elementwise,
        homogeneous=homogeneous,
    )


def dense_norms(
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    reference: ArrayLike | None = None,
    reference_bias: ArrayLike | None = None,
    constant: float = 0.0,
    last: bool = False,
    lipschitz: float = 1.0,
    elementwise: bool = True,
    homogeneous: bool = True,
) -> LayerNorms:
    """Return the norms of a layer given as a matrix, see `layer_norms`.

    Args:
        weight: A, shape (outputs, inputs).
        bias: b, shape (outputs,); None for none.
        reference: M, of the shape of A, fixed before the data; None for 0.
        reference_bias: the reference's bias; None for 0.
        constant: c, see `layer_norms`.
        last: whether this is the last layer.
        lipschitz: of the map behind the layer.
        elementwise: see `LayerNorms`.
        homogeneous: see `LayerNorms`.

    Returns:
        The norms of A, or with c > 0 of A'.

    Raises:
        ValueError: if shapes or values are invalid.
    """
    matrix = np.asarray(weight, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.all(np.isfinite(matrix)):
        raise ValueError(f"weight must be a finite matrix of shape (outputs, inputs), got shape {matrix.shape}")
    zero = np.zeros_like(matrix) if reference is None else np.asarray(reference, dtype=np.float64)
    if zero.shape != matrix.shape:
        raise ValueError(f"reference has shape {zero.shape}, the weight {matrix.shape}; they must agree")
    shift = None if bias is None else np.asarray(bias, dtype=np.float64)
    moved = None
    if reference_bias is not None:
        moved = (np.zeros(len(matrix)) if shift is None else shift) - np.asarray(reference_bias, dtype=np.float64)
    # Rounding errors of a singular value are at most a few eps * sqrt(rows * columns) of the largest.
    slack = 1 + 8 * np.finfo(np.float64).eps * math.sqrt(matrix.size)
    return layer_norms(
        float(np.linalg.norm(matrix, ord=2)) * slack,
        np.linalg.norm(matrix, axis=1),
        np.abs(matrix).sum(axis=1),
        matrix.shape[1],
        bias=shift,
        distances=np.linalg.norm(matrix - zero, axis=1),
        bias_distances=moved,
        constant=constant,
        last=last,
        lipschitz=lipschitz,
        elementwise=elementwise,
        homogeneous=homogeneous,
    )


def unit_product(incoming: ArrayLike, outgoing: ArrayLike) -> float:
    """Return sum_j ||u_j|| ||v_j||: how large the hidden units of a two-layer network are, each by itself.

    Scaling u_j up and v_j down leaves both the network and this sum as they are.  It is at most ||U||_F ||V||_F.

    Args:
        incoming: (units,) norms ||u_j|| of the rows of the first matrix U.
        outgoing: (units,) norms ||v_j|| of the columns of the second matrix V.

    Returns:
        The sum.

    Raises:
        ValueError: if shapes or values are invalid.
    """
    first, second = check_vector("incoming", incoming), check_vector("outgoing", outgoing)
    if first.shape != second.shape:
        raise ValueError(f"incoming has {len(first)} units and outgoing {len(second)}; they must agree")
    return float(first @ second)


def product_exponent(values: Sequence[float]) -> int:
    """Return the smallest k with product <= 2^k (up to rounding), also where the product would overflow.

    Args:
        values: factors, each at least 0 and finite.

    Returns:
        k, as `power_of_two_above` gives it.

    Raises:
        ValueError: if a factor is negative or not finite.
    """
    mantissa, exponent = 1.0, 0
    for value in values:
        mantissa, carry = math.frexp(mantissa * math.frexp(check_number("factor", value, 0.0))[0])
        exponent += carry + math.frexp(value)[1]
    return power_of_two_above(mantissa) + (exponent if mantissa > 0 else 0)


def entropy_rademacher(log_radius: float, n: int) -> float:
    """Return how well a class fits random signs if its entropy is (R / epsilon)^2: about 3.84 (R/n) ln(n/R).

    For losses in [0, 1] on n examples and proper covers with ln N(epsilon) <= (R / epsilon)^2 in the Euclidean norm of
    R^n:  Rademacher complexity <= exp(-m)/2 + sqrt(2) e R m / n for every m = 1, 2, ...

    Proof.  Scales epsilon_j = sqrt(n)/2 exp(-j), V_j the cover at epsilon_j, V_0 = {(1/2, ..., 1/2)}, which is within
    epsilon_0 of all.  Go from f to its nearest v_m in V_m, from v_j to the member of V_{j-1} nearest to v_j (covers
    are proper, so it is within epsilon_{j-1}).  The first step costs epsilon_m sqrt(n), and step j, of at most N_j
    different vectors of length epsilon_{j-1}, costs epsilon_{j-1} sqrt(2 ln N_j) <= sqrt(2) e R (Massart).

    The best m is used, but m = 0 (the trivial 1/2) is not, so that the value still tells large classes apart.

    Args:
        log_radius: ln R.
        n: number of examples.

    Returns:
        The bound; it may be above 1, where it says nothing.

    Source: chaining as in Dudley's integral (12/n int sqrt(ln N), Bartlett, Foster and Telgarsky 2017, Lemma A.5, would
        give 12 (R/n) ln(n/R)); ratio e and nested covers derived here.
    """
    log_step = 0.5 * math.log(2) + 1 + log_radius - math.log(check_count("n", n))
    best = math.log((1 - math.exp(-1)) / 2) - log_step if log_step > -math.inf else math.inf
    # A class of radius 0 has one member; 40 levels leave exp(-40)/2.
    levels = min(40, max(1, math.ceil(min(best, 40.0))))
    return math.exp(-levels) / 2 + exp_of(log_step) * levels


def shape_hypotheses(layers: Sequence[LayerNorms], *, elementwise: bool) -> tuple[Hypothesis, ...]:
    """Return what a theorem asks of the maps between layers, with the number of layers that break it.

    Args:
        layers: the network.
        elementwise: whether pooling is excluded.

    Returns:
        Positive homogeneity, and where asked for elementwise action.
    """
    curved = sum(not layer.homogeneous for layer in layers)
    found = [
        Hypothesis("every map between layers is positively homogeneous (layers that break it)", curved, curved == 0)
    ]
    if elementwise:
        mixed = sum(not layer.elementwise for layer in layers)
        found.append(
            Hypothesis("every map between layers acts on single numbers (layers that break it)", mixed, mixed == 0)
        )
    return tuple(found)
