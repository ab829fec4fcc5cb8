"""How far the outputs of a recurrent layer can move when hidden nodes are taken out of it.

The layer is h_t = sigma(W_h h_{t-1} + W_i x_t + b), h_0 = 0, with the readout f_t = W_o h_t + b_o; pruned, it keeps the
rows and nodes J with W_h# = (W_h)_J A_J and W_o# = W_o A_J.  S is the time-mean second moment of h_t, t = 1..T.
"""

from __future__ import annotations

import math

import numpy as np

from specprune.bounds.bound import PRUNED, Bound, check_count, check_number
from specprune.bounds.nodes import Feasibility
from specprune.bounds.spectral import PrunedLayer


def recurrent_certificate(
    readout: PrunedLayer, recurrence: PrunedLayer, steps: int, output_norm: float | None = None
) -> Bound:
    """Bound the output error of a pruned recurrent layer: the readout's own, and what the recurrence adds up over time.

    sqrt(D_o) + gamma_o sqrt(D_h) sum_{k=0}^{T-2} gamma_h^k bounds the root mean square of ||f_t - f#_t|| over the n
    sequences and the T steps.  With e_t the error of the kept nodes, e_1 = 0 and e_{t+1} <= d_t + gamma_h e_t for a
    1-Lipschitz elementwise sigma; Young's convolution inequality sums it up in the mean square over time.  It holds for
    nets that read out at every step; a readout at the last step alone may err by sqrt(T) times as much.

    Args:
        readout: sqrt(D_o) and gamma_o, from `prune_dense_layer(W_o, S, nodes, lam)`.
        recurrence: sqrt(D_h) and gamma_h, from `prune_dense_layer(W_h, S, nodes, lam, next_nodes=nodes)`.
        steps: length T of the sequences.
        output_norm: root mean square of ||f_t||, the error of answering zero, as the trivial value; None if unknown.

    Returns:
        A deterministic `Bound` with the terms `readout` and `recurrence`; inf where the geometric sum overflows.

    Raises:
        ValueError: if a number is negative or not finite, or there is no step.

    Source: derived here, in the setting of arXiv:2105.10832 (spectral pruning for recurrent networks).
    """
    own = check_number("readout.local_error", readout.local_error, 0.0)
    gain = check_number("readout.gain", readout.gain, 0.0)
    loss = check_number("recurrence.local_error", recurrence.local_error, 0.0)
    growth = check_number("recurrence.gain", recurrence.gain, 0.0)
    steps = check_count("steps", steps)
    with np.errstate(over="ignore"):
        total = float(np.sum(np.float64(growth) ** np.arange(steps - 1)))
    factor = gain * loss
    return Bound.from_terms(
        "recurrent approximation certificate",
        {"readout": own, "recurrence": 0.0 if factor == 0 else math.inf if total == math.inf else factor * total},
        confidence=None,
        covers=PRUNED,
        loss="L2(P_n) output error",
        trivial=output_norm,
        theorem="error propagation through time with measured errors and gains",
        source="setting of arXiv:2105.10832; derived here",
    )


def recurrent_a_priori(
    lam: float,
    feasibility: Feasibility,
    readout_norm: float,
    row_norm: float,
    steps: int,
    output_norm: float | None = None,
) -> Bound:
    """Bound the output error of a pruned recurrent layer from lambda and norms alone.

    sqrt(c lambda) R_o sum_{k=0}^{T-1} Rbar^k with Rbar = sqrt(c s) R.  For a row w, the nodes' residual is at most
    c lambda ||w||^2 and the reconstruction has weighted norm sqrt(c) ||w||; rows of W_h count with weights whose sum is
    at most s m.  Hence the certificate's sqrt(D_o) <= sqrt(c lambda) R_o, gamma_o <= sqrt(c) R_o,
    sqrt(D_h) <= sqrt(lambda) Rbar and gamma_h <= Rbar, and its sum is the one above.

    Args:
        lam: regularisation lambda of the nodes, in units of the covariance.
        feasibility: measured c and s of the kept nodes.
        readout_norm: R_o = ||W_o||_F.
        row_norm: R = sqrt(m) max_j ||W_h[j, :]||, m hidden nodes.
        steps: length T of the sequences.
        output_norm: as in `recurrent_certificate`.

    Returns:
        A deterministic `Bound`; inf where the geometric sum overflows, which it does for long sequences if Rbar > 1.

    Raises:
        ValueError: if a number is negative or not finite, or there is no step.

    Source: derived here, in the setting of arXiv:2105.10832 (spectral pruning for recurrent networks).
    """
    lam = check_number("lam", lam, 0.0)
    own = check_number("readout_norm", readout_norm, 0.0)
    rows = check_number("row_norm", row_norm, 0.0)
    steps = check_count("steps", steps)
    growth = math.sqrt(feasibility.c * feasibility.s) * rows
    first = math.sqrt(feasibility.c * lam) * own
    with np.errstate(over="ignore"):
        total = float(np.sum(np.float64(growth) ** np.arange(1, steps)))
    return Bound.from_terms(
        "recurrent approximation, a priori",
        {"readout": first, "recurrence": 0.0 if first == 0 else first * total},
        confidence=None,
        covers=PRUNED,
        loss="L2(P_n) output error",
        trivial=output_norm,
        theorem="error propagation through time with c, s, lambda and norms",
        source="setting of arXiv:2105.10832; derived here",
    )
