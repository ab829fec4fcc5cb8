"""PAC-Bayes: a network whose weights are drawn at random generalises if its posterior is close to a prior.

Setting.  The prior P over networks is fixed before the n i.i.d. training examples are seen; the posterior Q may depend
on them.  The Gibbs classifier draws a network from Q for every example; q is its expected error on the training set, p
its expected error on new data, KL = KL(Q || P) in nats.  Losses lie in [0, 1].

Where the theorems come from.  Donsker and Varadhan: for every function F of sample and network,
E_Q F <= KL + ln E_P e^F, and Markov makes ln E_P e^F <= ln(E E_P e^F / delta), with probability 1 - delta over the
sample, for ALL Q at once.  What is left is a bound on E e^F for one fixed network:

* F = n kl(empirical || true):  E e^F <= xi(n) = sum_k C(n,k) (k/n)^k (1-k/n)^(n-k) <= 2 sqrt(n)  (Maurer 2004, n >= 8;
  he also shows that losses in [0, 1] are no worse than 0-1 losses).  kl is jointly convex, so
  kl(q || p) <= E_Q kl <= (KL + ln(2 sqrt(n)/delta)) / n.
* F = -n ln(1 - (1 - e^-C) true) - n C empirical:  E e^F <= 1, for every n  (Catoni 2007).

The other forms are relaxations of the first, so they hold on the SAME event; the smallest of `maurer_bound`,
`langford_seeger_bound`, `quadratic_bound`, `thiemann_bound` and `mcallester_bound` costs no extra delta.  The KL of
Gaussian posteriors, and errors known from draws only, are the subject of `gaussian_posterior`.
"""

from __future__ import annotations

import math

import numpy as np

from specprune.bounds.bound import (
    QUANTISED,
    STOCHASTIC,
    Bound,
    FloatArray,
    Hypothesis,
    check_count,
    check_number,
)
from specprune.bounds.occam import invert_binary_kl

_LEAST_N = 8
_PRIOR = Hypothesis("the prior is fixed before the training examples are seen (assumed)", None, True)


def _check(empirical_error: float, kl: float, n: int, delta: float, least: int = _LEAST_N) -> tuple[float, float, int]:
    """Return the checked error and KL, and n; delta is only checked."""
    error = check_number("empirical_error", empirical_error, 0.0, 1.0)
    check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return error, check_number("kl", kl, 0.0), check_count("n", n, least)


def _confidence_nats(n: int, delta: float) -> float:
    """Return ln(2 sqrt(n) / delta)."""
    return math.log(2 / delta) + math.log(n) / 2


def _bound(
    name: str, empirical: float, variance: float, value: float, delta: float, theorem: str, source: str
) -> Bound:
    """Return the Gibbs bound whose complexity is `variance` without, and the rest with, the price of delta."""
    return Bound(
        name,
        value,
        {"empirical": empirical, "variance": variance, "confidence": value - empirical - variance},
        confidence=1 - delta,
        covers=STOCHASTIC,
        loss="0-1",
        hypotheses=(_PRIOR,),
        trivial=1.0,
        theorem=theorem,
        source=source,
    )


def maurer_bound(empirical_error: float, kl: float, n: int, delta: float) -> Bound:
    """Bound the Gibbs error by the tightest general PAC-Bayes bound: invert the divergence of two coins.

    value = sup {p : kl(empirical || p) <= (KL + ln(2 sqrt(n)/delta)) / n}.

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` on the stochastic net with terms empirical, variance (what KL adds) and confidence (what delta adds).

    Raises:
        ValueError: if an input is out of range.

    Source: Maurer 2004, "A note on the PAC-Bayesian theorem", arXiv:cs/0411099.
    """
    error, kl, n = _check(empirical_error, kl, n, delta)
    variance = invert_binary_kl(error, kl / n) - error
    value = invert_binary_kl(error, (kl + _confidence_nats(n, delta)) / n)
    return _bound(
        "PAC-Bayes (Maurer)", error, variance, value, delta, "PAC-Bayes-kl theorem", "Maurer 2004, arXiv:cs/0411099"
    )


def langford_seeger_bound(empirical_error: float, kl: float, n: int, delta: float) -> Bound:
    """Bound the Gibbs error by the older form of the kl theorem, that of Dziugaite and Roy.

    value = sup {p : kl(empirical || p) <= (KL + ln(n/delta)) / (n - 1)}.

    Proof.  2 sqrt(n) <= n for n >= 4 and 1/n <= 1/(n - 1), so this budget is never below Maurer's (n >= 8).

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical, variance and confidence, never below `maurer_bound`.

    Raises:
        ValueError: if an input is out of range.

    Source: Langford and Seeger 2001; Langford and Caruana 2002; proved here from Maurer 2004.
    """
    error, kl, n = _check(empirical_error, kl, n, delta)
    variance = invert_binary_kl(error, kl / (n - 1)) - error
    value = invert_binary_kl(error, (kl + math.log(n / delta)) / (n - 1))
    return _bound(
        "PAC-Bayes (Langford-Seeger)",
        error,
        variance,
        value,
        delta,
        "PAC-Bayes-kl theorem, older form",
        "Langford and Seeger 2001; follows from Maurer 2004",
    )


def mcallester_bound(empirical_error: float, kl: float, n: int, delta: float) -> Bound:
    """Bound the Gibbs error by the classical square root: empirical + sqrt((KL + ln(2 sqrt(n)/delta)) / (2n)).

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical, variance and confidence, never below `quadratic_bound` where that is below 1/4.

    Raises:
        ValueError: if an input is out of range.

    Source: McAllester 1999 with Maurer's constant; from `maurer_bound` by Pinsker, kl(q || p) >= 2 (p - q)^2.
    """
    error, kl, n = _check(empirical_error, kl, n, delta)
    variance = math.sqrt(kl / (2 * n))
    total = math.sqrt((kl + _confidence_nats(n, delta)) / (2 * n))
    return _bound(
        "PAC-Bayes (McAllester)",
        error,
        variance,
        error + total,
        delta,
        "PAC-Bayes theorem, square-root form",
        "McAllester 1999, constant of Maurer 2004",
    )


def quadratic_bound(empirical_error: float, kl: float, n: int, delta: float) -> Bound:
    """Bound the Gibbs error in closed form, with a fast rate for small errors: (sqrt(q + k) + sqrt(k))^2.

    k = (KL + ln(2 sqrt(n)/delta)) / (2n).

    Proof.  kl(q || p) >= (p - q)^2 / (2p) for q < p; with Maurer, p - q <= 2 sqrt(k p), a quadratic in sqrt(p).

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Rivasplata et al. 2019; Perez-Ortiz et al. 2021 (JMLR 22), objective "quad".
    """
    error, kl, n = _check(empirical_error, kl, n, delta)
    return _bound(
        "PAC-Bayes (quadratic)",
        error,
        _quadratic(error, kl / (2 * n)) - error,
        _quadratic(error, (kl + _confidence_nats(n, delta)) / (2 * n)),
        delta,
        "PAC-Bayes-quadratic bound",
        "Rivasplata et al. 2019; Perez-Ortiz et al. 2021",
    )


def _quadratic(error: float, k: float) -> float:
    """Return (sqrt(q + k) + sqrt(k))^2, multiplied out so that k = 0 gives q exactly."""
    return error + 2 * k + 2 * math.sqrt(k) * math.sqrt(error + k)


def thiemann_bound(empirical_error: float, kl: float, n: int, delta: float) -> Bound:
    """Bound the Gibbs error by a form linear in q and KL, at its best slope lambda.

    value = min over 0 < lambda < 2 of  q / (1 - lambda/2) + b / (n lambda (1 - lambda/2)),
    b = KL + ln(2 sqrt(n)/delta); the minimum is at lambda = 2 / (sqrt(2 n q / b + 1) + 1), and equals
    `quadratic_bound`.

    Proof.  From p - q <= 2 sqrt(k p), k = b / (2n), as for `quadratic_bound`, and 2 sqrt(k p) <= lambda p / 2 +
    2 k / lambda.  This holds for all lambda at once, so the choice is free.

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples, at least 8.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Thiemann, Igel, Wintenberger and Seldin 2017 (ALT).
    """
    error, kl, n = _check(empirical_error, kl, n, delta)
    nats = kl + _confidence_nats(n, delta)
    slope = 2 / (math.sqrt(2 * n * error / nats + 1) + 1)
    value = error / (1 - slope / 2) + nats / (n * slope * (1 - slope / 2))
    variance = _quadratic(error, kl / (2 * n)) - error
    return _bound(
        "PAC-Bayes (lambda)",
        error,
        variance,
        value,
        delta,
        "PAC-Bayes-lambda bound",
        "Thiemann et al. 2017",
    )


def catoni_bound(empirical_error: float, kl: float, n: int, delta: float, lam: float) -> Bound:
    """Bound the Gibbs error at an inverse temperature lambda that was fixed before the data were seen.

    value = (1 - exp(-lambda q / n - (KL + ln(1/delta)) / n)) / (1 - exp(-lambda / n)).

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples.
        delta: allowed probability of failure, in (0, 1).
        lam: lambda, at least 1e-9; chosen WITHOUT the training examples (else use `catoni_grid_bound`).

    Returns:
        A `Bound` with terms empirical, variance and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Catoni 2007, "PAC-Bayesian supervised classification", arXiv:0712.0248.
    """
    error, kl, n = _check(empirical_error, kl, n, delta, least=1)
    rates = np.array([check_number("lam", lam, 1e-9) / n])
    value = float(_catoni(error, (kl + math.log(1 / delta)) / n, rates)[0])
    without = float(_catoni(error, kl / n, rates)[0])
    return _bound(
        "PAC-Bayes (Catoni)", error, without - error, value, delta, "Catoni's bound, lambda fixed", "Catoni 2007"
    )


def _catoni(error: float, budget: FloatArray | float, rates: FloatArray) -> FloatArray:
    """Return (1 - exp(-C q - budget)) / (1 - exp(-C)) for every rate C = lambda / n."""
    return np.expm1(-rates * error - budget) / np.expm1(-rates)


def catoni_grid_bound(empirical_error: float, kl: float, n: int, delta: float, alpha: float = 0.01) -> Bound:
    """Bound the Gibbs error by Catoni's form at the best lambda of a grid, and pay for having chosen it.

    value = min over k >= 0 of Catoni's bound at lambda_k = (1 + alpha)^k with delta / ((k + 1)(k + 2)).

    Proof.  sum_k 1/((k + 1)(k + 2)) = 1, so all grid points hold at once.  The published form, for every real
    lambda >= 1, follows: with lambda_k <= lambda < (1 + alpha) lambda_k the exponent's bracket is at most
    q + (1 + alpha)/lambda (KL + ln(1/delta) + 2 ln(2 + ln lambda / ln(1 + alpha))), and (1 - e^(-C x))/(1 - e^-C) grows
    with C for x < 1 (for x >= 1 it is at least 1).  The minimum over the grid is never above it.

    Args:
        empirical_error: q, expected error of the Gibbs classifier on the n examples, in [0, 1].
        kl: KL(Q || P) in nats, with all prices for choosing P added.
        n: number of i.i.d. examples.
        delta: allowed probability of failure, in (0, 1).
        alpha: the grid's relative step, in (0, 1]; fixed before the data are seen.

    Returns:
        A `Bound` with terms empirical, variance and confidence (what delta and the grid add).

    Raises:
        ValueError: if an input is out of range, or alpha is below 1e-6.

    Source: Catoni 2007; uniform in lambda after Zhou et al. 2019 (arXiv:1804.05862) with alpha = 1e-4, derived here.
    """
    error, kl, n = _check(empirical_error, kl, n, delta, least=1)
    step = math.log1p(check_number("alpha", alpha, 1e-6, 1.0))
    # Beyond lambda = 50 n the denominator is 1 to the last digit, so the bound only grows.
    k = np.arange(math.ceil(math.log(50 * n) / step) + 1, dtype=np.float64)
    rates = np.exp(k * step - math.log(n))
    prices = np.log(k + 1) + np.log(k + 2)
    values = _catoni(error, (kl + math.log(1 / delta) + prices) / n, rates)
    best = int(np.argmin(values))
    without = float(_catoni(error, kl / n, rates)[best])
    return _bound(
        "PAC-Bayes (Catoni, grid)",
        error,
        without - error,
        float(values[best]),
        delta,
        "Catoni's bound, uniform in lambda",
        "Catoni 2007; grid after Zhou et al. 2019, derived here",
    )


def compression_bound(empirical_error: float, bits: int, n: int, delta: float, *, covers: str = QUANTISED) -> Bound:
    """Bound the true error of a network that was compressed to a file, whatever the compressor.

    value = sup {p : kl(empirical || p) <= (bits ln 2 + ln(bits (bits + 1)) + ln(1/delta)) / n}.

    Proof.  The prior gives the files of l bits the mass m(l) = 1/(l (l + 1)) together and shares it equally, so
    KL = l ln 2 - ln m(l) for the point mass on one file; the code need not be prefix-free, but the decoder must be
    fixed before the data are seen.  For point masses Occam's budget (`occam_bound`) is enough, without ln(2 sqrt(n)).

    Args:
        empirical_error: error of the DECODED network on the n examples, in [0, 1].
        bits: length l of the file, at least 1.
        n: number of i.i.d. examples.
        delta: allowed probability of failure, in (0, 1).
        covers: the network spoken of, which must be the decoded one.

    Returns:
        A `Bound` with terms empirical, variance (what the length adds) and confidence.

    Raises:
        ValueError: if an input is out of range.

    Source: Zhou et al. 2019, arXiv:1804.05862, who take m uniform on the lengths up to 2^72 and Catoni's form; this m
        is larger for files below 2^35 bits, and the kl form is below every Catoni bound of the same budget.
    """
    length = check_count("bits", bits)
    nats = length * math.log(2) + math.log(length) + math.log1p(length)
    error, nats, n = _check(empirical_error, nats, n, delta, least=1)
    variance = invert_binary_kl(error, nats / n) - error
    value = invert_binary_kl(error, (nats + math.log(1 / delta)) / n)
    return Bound(
        "compression (Zhou)",
        value,
        {"empirical": error, "variance": variance, "confidence": value - error - variance},
        confidence=1 - delta,
        covers=covers,
        loss="0-1",
        hypotheses=(Hypothesis("the decoder is fixed before the training examples are seen (assumed)", None, True),),
        trivial=1.0,
        theorem="compression bound (point mass under a prior over files)",
        source="Zhou et al. 2019, arXiv:1804.05862; length prior and kl form derived here",
    )
