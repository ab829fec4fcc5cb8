"""The error of a layer whose slices of input channels are cut to low rank."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import PRUNED, Bound, check_number, check_vector


def layer_error_bound(next_values: ArrayLike, norm: float) -> Bound:
    """Bound how far a layer moves when each of its k slices of columns is cut to its best rank j.

    ||W - W^|| / ||W|| <= sqrt(k) max_i sigma_{j+1}(W_i) / ||W||, in operator norms.

    Proof.  The difference is R = [R_1 ... R_k] with ||R_i|| = sigma_{j+1}(W_i) (Eckart-Young).  For x in slices x_i,
    ||R x|| <= sum_i ||R_i|| ||x_i|| <= max_i ||R_i|| sum_i ||x_i|| <= max_i ||R_i|| sqrt(k) ||x|| (Cauchy-Schwarz).

    Args:
        next_values: sigma_{j+1}(W_i) of every slice, shape (k,); 0 where the rank is full.
        norm: ||W|| of the whole matrix, in the same units, positive.

    Returns:
        A deterministic `Bound`; the trivial value 1 is the error of a layer set to zero.

    Raises:
        ValueError: if a value is negative or not finite, the norm is not positive, or a value exceeds the norm, which
            no slice of a matrix can.

    Source: Liebenwein et al. 2021 (arXiv:2107.11442), Theorem 1.
    """
    values = check_vector("next_values", next_values)
    norm = check_number("norm", norm, 0.0, open_low=True)
    largest = float(np.max(values))
    if largest > norm * (1 + 1e-9):
        raise ValueError(
            f"next_values has {largest:g} above norm={norm:g}: a slice's singular values are at most the norm of the "
            "whole matrix; give both in the same units"
        )
    return Bound.from_terms(
        "low-rank layer error",
        {"slices": math.sqrt(len(values)) * largest / norm},
        confidence=None,
        covers=PRUNED,
        loss="relative operator norm of the layer's change",
        trivial=1.0,
        theorem="Theorem 1 (error of a channel-sliced low-rank layer)",
        source="Liebenwein et al. 2021 (arXiv:2107.11442)",
    )
