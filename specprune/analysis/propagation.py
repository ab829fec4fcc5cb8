"""How far an error inside a pruned network can reach: carried to the output by norms, halved at each activation.

Let u be the error at the pre-activation of one layer, with known second moment E = E_n[u u^T].  An elementwise
activation with slopes in [0, L] turns it into delta = s * u with unknown s in [0, L], that is
delta = (L/2) u + (L/2) r * u with |r| <= 1.  The next layer W gives W delta = (L/2) W u + (L/2) W (r * u): the first
part has the known second moment (L/2)^2 W E W^T, the second is bounded by the operator norm.  Keep u = p + q with p
known exactly and ||q|| <= rho, in weighted norms ||v||^2 = sum_j omega_j v_j^2 with operator norms Gamma between them:

    p' = (L/2) W p,      rho' = L Gamma (rho + ||p|| / 2).

At the output (omega = 1) the error is at most ||p|| + rho.  This holds for every positive omega, so omega is chosen to
make it small.  Where more than an elementwise map that never decreases lies between two layers, or maps have several
pixels or kernels several offsets, p is given up: rho' = L Gamma (rho + ||p||).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specprune.analysis.chain import ChainLayer

STEPS = 40
RATE = 0.1
_SMALLEST = 1e-150
ROUNDING = 1e-12  # relative; above that of eigenvalues and products in float64 for widths of some thousands
_TINY = torch.finfo(torch.float64).tiny  # the square root has no derivative at 0


def carried_error(
    moment: np.ndarray, layers: Sequence[ChainLayer], theory_weights: Sequence[np.ndarray] | None = None
) -> float:
    """Return a bound on the root mean square output error that an error at one layer's pre-activation causes.

    Args:
        moment: (outputs, outputs) second moment E of the error, summed over the pixels of the map.
        layers: the pruned network's layers from the erring one (of which only what follows it is used) to the last.
        theory_weights: for every layer but the last, (outputs,) norm weights omega to try besides the optimised ones.

    Returns:
        The smallest value found over the norm weights, rounded up; each candidate is valid.
    """
    error = torch.from_numpy(np.ascontiguousarray(moment, dtype=np.float64))
    if not bool(error.any()):
        return 0.0
    steps = [(torch.from_numpy(np.ascontiguousarray(new.weight)), old, new) for old, new in itertools.pairwise(layers)]
    behind = (1 + ROUNDING) * layers[-1].lipschitz
    if not steps:
        return behind * math.sqrt(max(0.0, float(torch.trace(error))))
    ones = [torch.zeros(len(layer.bias), dtype=torch.float64) for layer in layers[:-1]]
    with torch.no_grad():
        best = float(_bound(error, steps, ones))
        if theory_weights is not None:
            logs = [torch.from_numpy(np.log(weights)) for weights in theory_weights]
            best = min(best, float(_bound(error, steps, logs)))
    with torch.enable_grad():
        logs = [tensor.clone().requires_grad_() for tensor in ones]
        optimiser = torch.optim.Adam(logs, lr=RATE)
        for _ in range(STEPS):
            optimiser.zero_grad()
            value = _bound(error, steps, logs)
            if not (_SMALLEST < float(value.detach()) < math.inf):  # nothing to gain, and log would make NaN weights
                break
            best = min(best, float(value.detach()))
            value.log().backward()  # relative, so that the units of the error do not matter
            optimiser.step()
    return behind * best


def _bound(error: Tensor, steps: Sequence[tuple[Tensor, ChainLayer, ChainLayer]], logs: Sequence[Tensor]) -> Tensor:
    """Return ||p|| + rho at the output for the norm weights exp(logs)."""
    exact: Tensor | None = error
    known = (logs[0].exp() * error.diagonal()).sum().clamp_min(_TINY).sqrt()
    rest = torch.zeros((), dtype=torch.float64)
    for k, (weight, old, new) in enumerate(steps):
        rows = logs[k + 1].exp() if k + 1 < len(logs) else torch.ones(len(weight), dtype=torch.float64)
        gain = old.lipschitz * layer_gain(weight, rows, logs[k].exp(), new)
        if exact is None or not old.elementwise or old.positions_out > 1 or new.slots > 1:
            rest, known, exact = gain * (rest + known), torch.zeros((), dtype=torch.float64), None
            continue
        rest = gain * (rest + known / 2)
        matrix = weight[:, :, 0]
        exact = (old.lipschitz / 2) ** 2 * (matrix @ exact @ matrix.T)
        known = (rows * exact.diagonal()).sum().clamp_min(_TINY).sqrt()
    return known + rest


def layer_gain(weight: Tensor, rows: Tensor, columns: Tensor, layer: ChainLayer) -> Tensor:
    """Return a bound on the norm of an affine layer's linear part between whole feature maps, in weighted norms.

    A convolution is at most sqrt(overlap) ||[W_1 ... W_s]||, since an input pixel is in `overlap` patches, and at most
    the sum of its offsets' norms, since each offset only shifts.
    """
    per_node = weight.shape[1] // len(columns)  # a flattened map's pixels share their node's weight
    scaled = weight * rows.sqrt()[:, None, None] / columns.sqrt().repeat_interleave(per_node)[None, :, None]
    flat = math.sqrt(layer.overlap) * _largest_singular_value(scaled.flatten(1))
    if layer.overlap == 1:
        return flat
    return torch.minimum(flat, sum(_largest_singular_value(scaled[:, :, k]) for k in range(weight.shape[2])))  # type: ignore[arg-type]


def _largest_singular_value(matrix: Tensor) -> Tensor:
    """Return the operator norm; by the smaller Gram matrix, whose eigenvalues differentiate well."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(_TINY).sqrt()
