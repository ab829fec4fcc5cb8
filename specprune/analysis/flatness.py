"""How much noise on its weights a network bears, and the PAC-Bayes measures that follow from it.

With u Gaussian noise on all parameters w, weights and biases, of standard deviation sigma each, or, aware of
magnitudes, sqrt(sigma^2 w_i^2 + epsilon^2),

    sigma* = the largest sigma with a mean drop of the training accuracy, acc(w) - E acc(w + u), of at most 0.1.

Batch norms are folded into the layers before them first, so that networks which compute the same have the same
parameters.  Noise enters with its standard deviation; some public code passes the variance in its place.

Source: Jiang, Neyshabur, Mobahi, Krishnan and Bengio 2019 (arXiv:1912.02178), measures 48, 49, 53, 56, 57 and 61, and
Dziugaite et al. 2020 (arXiv:2010.11924), whose public code gives the constants; formulas as recalled in the project's
theory notes, D.11.  The search and its stopping rule are ours.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from specprune.analysis.evaluation import check_labelled, checked_logits, run_in_parts
from specprune.bounds.bound import Record, check_count, check_number, check_vector
from specprune.compress.batches import CalibrationData
from specprune.compress.coding import fold_batch_norms
from specprune.compress.moments import check_finite_weights
from specprune.compress.surgery import NORMS

EPSILON = 1e-3
FOUND, NEVER_DROPS, ALWAYS_DROPS = "found", "never drops", "always drops"
_SIGMA_STEP = 1.01  # the search ends where the bracket is this narrow


@dataclass(frozen=True)
class FlatSigma(Record):
    """The largest noise that a network's training accuracy bears.

    Attributes:
        outcome: "found"; "never drops": the accuracy holds even at the upper end of the bracket, sigma* may be larger;
            "always drops": it does not hold even at the lower end, sigma* is smaller, or 0.
        sigma: the largest sigma tried that held; an end of the bracket if not found.
        broken: the smallest sigma tried above it, where the accuracy drops by more; None if none was tried.
        drop: mean drop of the accuracy at sigma.
        accuracy: training accuracy without noise.
        epsilon: least standard deviation of the noise aware of magnitudes; None for noise of one size.
        parameters: omega, the number of parameters with noise, after folding.
        draws: number of draws of the noise.
    """

    outcome: str
    sigma: float
    broken: float | None
    drop: float
    accuracy: float
    epsilon: float | None
    parameters: int
    draws: int


@torch.no_grad()
def flat_sigma(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    magnitude_aware: bool = False,
    epsilon: float = EPSILON,
    drop: float = 0.1,
    tolerance: float = 0.01,
    draws: int = 10,
    bracket: tuple[float, float] = (1e-5, 2.0),
    seed: int = 0,
) -> FlatSigma:
    """Return the largest noise on the parameters that lowers the training accuracy by at most a tenth on average.

    Bisection of log sigma, with the same draws of the noise for every sigma.  It ends at a sigma whose drop lies in
    [drop - tolerance, drop], or where the bracket is within 1 %.  The accuracy need not fall steadily with sigma; the
    answer is a place where it crosses.  More draws make the answer depend less on the seed.

    Args:
        model: a classifier; in any mode, evaluated in evaluation mode, left as it is.
        inputs: training inputs, shape (n, ...), on the model's device.
        targets: int64 class numbers, shape (n,).
        magnitude_aware: whether the standard deviation is sqrt(sigma^2 w_i^2 + epsilon^2) in place of sigma.
        epsilon: see there; at least 0.  Not used otherwise.
        drop: allowed mean drop of the accuracy, in (0, 1).
        tolerance: how much less than that ends the search; at least 0.
        draws: number of draws of the noise.
        bracket: smallest and largest sigma, above 0.
        seed: of the draws: row j of `default_rng(seed).standard_normal((draws, omega), float32)` is draw j, in the
            order of the parameters.

    Returns:
        The noise, and what was found: look at `outcome`.

    Raises:
        ValueError: numbers out of range, data that do not fit, weights or outputs that are not finite, a batch norm
            that cannot be folded, or no parameters.
        TypeError: arguments of another type.

    Source: Jiang et al. 2019 (arXiv:1912.02178) and the code of Dziugaite et al. 2020 (15 bisections of [0, 2]; 10
        draws, tolerance 0.01), as recalled; the bisection in log sigma is ours.
    """
    check_number("drop", drop, 0.0, 1.0, open_low=True, open_high=True)
    check_number("tolerance", tolerance, 0.0)
    check_number("epsilon", epsilon, 0.0)
    low, high = (check_number("bracket", end, 0.0, open_low=True) for end in bracket)
    if low >= high:
        raise ValueError(f"bracket={bracket!r}: expected the smaller sigma first")
    generator = np.random.default_rng(check_count("seed", seed, 0))  # not torch's, from which initial weights come
    check_labelled(model, inputs, targets)
    work = _folded(model, inputs)
    if not list(work.parameters()):
        raise ValueError(f"{type(work).__name__} has no parameters to put noise on")
    n = len(targets)
    wrong = int((checked_logits(work, inputs, targets).argmax(1) != targets).sum())
    weights = parameters_to_vector(work.parameters())
    shape = (check_count("draws", draws), len(weights))
    noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(weights)
    allowed = draws * (wrong + drop * n) * (1 + 1e-12)  # wrong answers over all draws; 0.1 is not exact
    enough = allowed - draws * tolerance * n

    def count_wrong(sigma: float, limit: float) -> int:
        scale = (sigma * sigma * weights.square() + epsilon * epsilon).sqrt() if magnitude_aware else sigma
        total = 0
        for draw in noise:
            vector_to_parameters(weights + scale * draw, work.parameters())
            total += _count_wrong(work, inputs, targets)
            if total > limit:  # more draws cannot change the answer
                break
        return total

    def result(outcome: str, sigma: float, broken: float | None, total: int) -> FlatSigma:
        fall, least = (total / draws - wrong) / n, float(epsilon) if magnitude_aware else None
        return FlatSigma(outcome, sigma, broken, fall, 1 - wrong / n, least, len(weights), draws)

    total = count_wrong(high, allowed)
    if total <= allowed:
        return result(NEVER_DROPS, high, None, total)
    held: int | None = None
    with tqdm(desc="flatness", leave=False, disable=None) as bar:
        while high / low > _SIGMA_STEP and (held is None or held < enough):
            middle = math.sqrt(low * high)
            total = count_wrong(middle, allowed)
            if total <= allowed:
                low, held = middle, total
            else:
                high = middle
            bar.update()
    if held is None:
        held = count_wrong(low, math.inf)
    return result(FOUND if held <= allowed else ALWAYS_DROPS, low, high, held)


def pacbayes_measure(norm: float, sigma: float, m: int) -> float:
    """Return the size of a PAC-Bayes bound for Gaussian noise on the parameters: PACBAYES_INIT or PACBAYES_ORIG.

    v = norm^2 / (4 sigma^2) + ln(m / sigma) + 10.  Higher should mean a larger gap; tables show sqrt(v / m).

    Args:
        norm: Euclidean norm of w - w_0 (INIT) or of w (ORIG), over all parameters.
        sigma: the noise, from `flat_sigma`.
        m: number of training examples.

    Raises:
        ValueError: numbers out of range.
        TypeError: arguments of another type.

    Source: Jiang et al. 2019 (arXiv:1912.02178), measures 48 and 49, as recalled.
    """
    norm, sigma = check_number("norm", norm, 0.0), check_number("sigma", sigma, 0.0, open_low=True)
    return norm**2 / (4 * sigma**2) + math.log(check_count("m", m) / sigma) + 10


def magnitude_pacbayes_measure(
    norm: float, moves: ArrayLike, sigma: float, m: int, *, epsilon: float = EPSILON
) -> float:
    """Return the size of a PAC-Bayes bound for noise aware of magnitudes: PACBAYES_MAG_INIT or PACBAYES_MAG_ORIG.

    v = 1/4 sum_i ln [(epsilon^2 + (sigma^2 + 1) norm^2 / omega) / (epsilon^2 + sigma^2 moves_i^2)]
        + ln(m / sigma) + 10.

    Higher should mean a larger gap; tables show sqrt(v / m).  INIT has v > 10 + ln(m / sigma), ORIG need not be
    positive.

    Args:
        norm: Euclidean norm of w - w_0 (INIT) or of w (ORIG), over all parameters.
        moves: w - w_0 in both, shape (omega,).  The formula is of noise in proportion to |w - w_0|, while sigma is
            measured with noise in proportion to |w|; that is so in the source.
        sigma: the noise, from `flat_sigma(..., magnitude_aware=True)`.
        m: number of training examples.
        epsilon: as in `flat_sigma`, above 0.

    Raises:
        ValueError: numbers out of range.
        TypeError: arguments of another type.

    Source: Jiang et al. 2019 (arXiv:1912.02178), measures 56 and 57, as recalled.
    """
    norm, sigma = check_number("norm", norm, 0.0), check_number("sigma", sigma, 0.0, open_low=True)
    square = check_number("epsilon", epsilon, 0.0, open_low=True) ** 2
    each = check_vector("moves", moves, low=-math.inf)
    top = math.log(square + (sigma**2 + 1) * norm**2 / len(each))
    total = float(np.sum(top - np.log(square + sigma**2 * each**2)))
    return total / 4 + math.log(check_count("m", m) / sigma) + 10


def flatness_measure(sigma: float) -> float:
    """Return how sharp a minimum is: PACBAYES_FLATNESS or PACBAYES_MAG_FLATNESS.

    v = 1 / sigma^2.  Higher should mean a larger gap; tables show sqrt(v / m).

    Args:
        sigma: the noise, from `flat_sigma` without or with `magnitude_aware`.

    Raises:
        ValueError: a number that is not positive.
        TypeError: something else.

    Source: Jiang et al. 2019 (arXiv:1912.02178), measures 53 and 61, as recalled.
    """
    return 1 / check_number("sigma", sigma, 0.0, open_low=True) ** 2


def _folded(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy in evaluation mode, without batch norms."""
    check_finite_weights(model)
    if any(isinstance(module, NORMS) for module in model.modules()):
        return fold_batch_norms(model, CalibrationData([inputs]))
    return copy.deepcopy(model).eval()


def _count_wrong(work: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """Count wrong answers; outputs that are not finite are wrong."""
    outputs = run_in_parts(work, inputs)
    return int((~((outputs.argmax(1) == targets) & outputs.isfinite().all(1))).sum())
