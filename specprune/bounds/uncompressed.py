"""Bounds on the ORIGINAL network through its compressed version: one that can be compressed well generalises well.

Theorem D.  Whatever the two networks are, an error of f is an error of g or a disagreement:

    P(error of f) <= P(error of g) + P(argmax f != argmax g).

The first part is any bound on g; the second needs no labels (`disagreement_bound`), or, where both networks can be
written down, no further data either (`coded_disagreement_bound`).

Theorem E.  Let l be the ramp loss at margin gamma (in [0, 1], sqrt(2)/gamma-Lipschitz in the logits), a hat the mean
over the n examples, and d = l(f) - l(g).  With a sup-norm cover of each class, N_F and N_G centres that move the
losses by at most a_F and a_G, and Lambda = ln N_F + ln N_G + ln(2/delta), with probability at least 1 - delta

    E l(f) <= hat l(f) + [E l(g) - hat l(g)] + (||d||_n + a_F + a_G) sqrt(2 Lambda / (n-1)) + 14 Lambda / (3(n-1))
              + 2 (a_F + a_G).

Proof.  Maurer and Pontil 2009, Theorem 4: for i.i.d. X_i in [0, 1] with sample variance V (divisor n - 1),
E X <= hat X + sqrt(2 V ln(2/delta)/n) + 7 ln(2/delta)/(3(n-1)) with probability 1 - delta.  A difference of losses
lies in [-1, 1], a range of 2, so its last term is 14 ln(2/delta)/(3(n-1)).  Use it with delta/(N_F N_G) for d' of each
pair of centres; V <= n/(n-1) ||d'||_n^2.  From the pair to its centres the mean and the expectation of d move by
a_F + a_G each, and ||d'||_n <= ||d||_n + a_F + a_G.  Finally l(f) = l(g) + d.  (For losses in [0, B] that are
1-Lipschitz and covers at epsilon, these are the constants 14 B/3, 2 epsilon and 4 epsilon.)

So what compression changed, ||d||_n <= sqrt(2)/gamma ||f - g||_n, is paid only at the fast rate 1/sqrt(n) times
itself; but the cover of the big class enters over n, so the bound says something only where ln N_F is well below n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specprune.bounds.bound import ORIGINAL, Bound, Hypothesis, Record, check_count, check_number
from specprune.bounds.chain_cover import LayerSize, log_cover, radius_hypothesis
from specprune.bounds.covering import ramp_losses
from specprune.bounds.held_out import binomial_upper_limit
from specprune.bounds.occam import integer_code_length, invert_binary_kl, power_of_two_below

SOURCE = "form after Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274), constants derived here"


def _check_compressed(compressed: Bound, delta: float) -> tuple[float, float]:
    """Return the total delta and what the compressed network's bound leaves of it."""
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if not (compressed.loss == "0-1" or compressed.loss.startswith("ramp")):
        raise ValueError(f"compressed must bound the 0-1 or the ramp loss, got a bound on {compressed.loss!r}")
    if compressed.covers == ORIGINAL:
        raise ValueError(
            f"compressed must be a bound on the compressed network, but {compressed.name!r} covers the {ORIGINAL} "
            "already; use it as it is"
        )
    left = delta - (0.0 if compressed.confidence is None else 1 - compressed.confidence)
    # A rest of rounding size is no rest: 1 - 0.95 differs from 0.05 in the last digits.
    if left <= 1e-12:
        raise ValueError(
            f"delta = {delta:g} is used up by the bound on the compressed network, which has confidence "
            f"{compressed.confidence}; compute that one at delta/2"
        )
    return delta, left


def disagreement_bound(
    compressed: Bound, disagreements: int, unlabelled: int, delta: float, *, candidates: int = 1
) -> Bound:
    """Bound the original network's error: that of the compressed one, and how often they differ on fresh inputs.

    value = compressed.value + Clopper-Pearson upper limit of P(argmax f != argmax g) at
    (delta - compressed delta) / candidates.  No labels are needed, and no property of the original network.

    Args:
        compressed: a bound on the 0-1 or ramp loss of g, the very network that is compared (quantised, if the bound is
            on the quantised one; with weights drawn anew for each input, if it is on a stochastic network).
        disagreements: number of unlabelled inputs on which the two networks predict different classes.
        unlabelled: number of i.i.d. inputs that played no part in either network.
        delta: TOTAL allowed probability of failure; `compressed` uses up 1 - its confidence, the rest goes here.
        candidates: number of compressed networks among which g was chosen with these inputs at hand (a union bound).
            The bound on g must hold for all of them at once, as code-length bounds do.

    Returns:
        A `Bound` on the original network's 0-1 error: the terms of `compressed`, the share of disagreements added to
        bias, the rest of the limit added to confidence.

    Raises:
        ValueError: if `compressed` bounds another loss or leaves nothing of delta, or a number is out of range.

    Source: the inequality is elementary; derived here, after the idea of Suzuki, Abe and Nishimura 2020
        (arXiv:1909.11274).
    """
    delta, left = _check_compressed(compressed, delta)
    limit = binomial_upper_limit(disagreements, unlabelled, left / check_count("candidates", candidates))
    share = disagreements / unlabelled
    fresh = Hypothesis(f"the {unlabelled} unlabelled inputs are i.i.d. and played no part in training", None, True)
    return _with_disagreement(
        compressed, limit, {"bias": share, "confidence": limit - share}, delta, fresh, "disagreement on unlabelled data"
    )


def coded_disagreement_bound(compressed: Bound, disagreements: int, n: int, code_length: float, delta: float) -> Bound:
    """Bound the original network's error without held-out data: both networks have a code, f's is usually long.

    The pair (f, g) is one element of a countable set with a prefix code of C nats, and "argmax f != argmax g" is a 0-1
    loss of that pair.  So the Occam theorem, uniformly over pairs and hence after training:
    kl(share of disagreements || P(disagree)) <= (C + ln(1/delta')) / n, delta' = delta - compressed delta.

    The long code enters at the fast rate: with no disagreement on the sample it costs about C/n, not sqrt(C/(2n)).  It
    beats Occam's bound on f itself only where f errs on the sample and C is below n; it says nothing where C >> n,
    as for float32 networks with more parameters than examples.

    Args:
        compressed: a bound on the 0-1 or ramp loss of g.
        disagreements: number of the n examples on which the two networks predict different classes.
        n: number of i.i.d. examples; the training set may be used.
        code_length: C in nats of the PAIR, such as 32 ln 2 nats for each float32 parameter of f plus the code of g.
            If g is a rule fixed in advance applied to f alone, the code of f and of the rule's choices is enough.
        delta: TOTAL allowed probability of failure; `compressed` uses up 1 - its confidence.

    Returns:
        A `Bound` on the original network's 0-1 error: the terms of `compressed`, the share of disagreements added to
        bias, the rest of the kl limit added to variance.

    Raises:
        ValueError: if `compressed` bounds another loss or leaves nothing of delta, or a number is out of range.

    Source: Langford 2005 (Occam's razor, kl form) for the pair; derived here.
    """
    delta, left = _check_compressed(compressed, delta)
    n, disagreements = check_count("n", n), check_count("disagreements", disagreements, low=0)
    if disagreements > n:
        raise ValueError(f"disagreements must be at most n, got {disagreements} of {n}")
    share = disagreements / n
    limit = invert_binary_kl(share, (check_number("code_length", code_length, 0.0) + math.log(1 / left)) / n)
    coded = Hypothesis(f"the pair has a prefix code fixed before the {n} examples were drawn", None, True)
    return _with_disagreement(
        compressed, limit, {"bias": share, "variance": limit - share}, delta, coded, "disagreement of a coded pair"
    )


def _with_disagreement(
    compressed: Bound, limit: float, parts: dict[str, float], delta: float, hypothesis: Hypothesis, theorem: str
) -> Bound:
    terms = dict(compressed.terms)
    for name, part in parts.items():
        terms[name] = terms.get(name, 0.0) + part
    return Bound(
        f"disagreement + {compressed.name}",
        compressed.value + limit,
        terms,
        confidence=1 - delta,
        covers=ORIGINAL,
        loss="0-1",
        hypotheses=(*compressed.hypotheses, hypothesis),
        trivial=1.0,
        theorem=f"error of f <= error of g + {theorem}",
        source=SOURCE,
    )


@dataclass(frozen=True)
class LossPair(Record):
    """What Theorem E measures of the two networks on the n examples, at one margin.

    Attributes:
        n: number of examples.
        gamma: margin width in logit units, a power of two.
        original: mean ramp loss of f, in [0, 1].
        compressed: mean ramp loss of g, in [0, 1].
        loss_distance: ||l(f) - l(g)||_n, the root of the mean square, in [0, 1].
        output_distance: ||f - g||_n in logit units; for comparison with its ceilings, the bound uses the former.
    """

    n: int
    gamma: float
    original: float
    compressed: float
    loss_distance: float
    output_distance: float

    def __post_init__(self) -> None:
        check_count("n", self.n, low=2)
        if 2.0 ** power_of_two_below(self.gamma) != self.gamma:
            raise ValueError(f"gamma must be a power of two, got {self.gamma!r}; `loss_pair` rounds it down")
        for name in ("original", "compressed", "loss_distance"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("output_distance", self.output_distance, 0.0)


def loss_pair(original_logits: ArrayLike, compressed_logits: ArrayLike, labels: ArrayLike, gamma: float) -> LossPair:
    """Measure two networks on the same examples as Theorem E needs it.

    Args:
        original_logits: of f, shape (n, K).
        compressed_logits: of g, shape (n, K).
        labels: true classes, shape (n,).
        gamma: margin width in logit units; rounded DOWN to a power of two first, so that its choice can be priced.

    Returns:
        The losses and distances at the rounded margin.

    Raises:
        ValueError: if shapes or values are invalid.

    Source: definitions.
    """
    first, second = np.asarray(original_logits, dtype=np.float64), np.asarray(compressed_logits, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"both networks need logits of one shape, got {first.shape} and {second.shape}")
    rounded = 2.0 ** power_of_two_below(gamma)
    f, g = ramp_losses(first, labels, rounded), ramp_losses(second, labels, rounded)
    return LossPair(
        len(f),
        rounded,
        float(f.mean()),
        float(g.mean()),
        float(np.sqrt(np.mean((f - g) ** 2))),
        float(np.sqrt(np.mean(np.sum((first - second) ** 2, axis=1)))),
    )


def pair_bound(
    pair: LossPair,
    *,
    log_original: float,
    log_compressed: float,
    delta: float,
    price_original: float = 0.0,
    price_compressed: float = 0.0,
    slack_original: float = 0.0,
    slack_compressed: float = 0.0,
    hypotheses: Sequence[Hypothesis] = (),
    name: str = "uncompressed (pairs)",
) -> Bound:
    """Bound the original network's error by Theorem E, with the sizes of the two covers given as numbers.

    Half of delta goes to the differences of losses (the theorem of this module), half to g alone: by Chernoff for each
    centre of G, kl(hat l(g') || E l(g')) <= (ln N_G + prices + ln(2/delta)) / n, which holds for losses in [0, 1] and
    not only for 0 and 1 (Hoeffding 1963), so E l(g) <= kl^(-1)(hat l(g) + a_G, that) + a_G.  With this

        value = hat l(f) + gap(g) + (||d||_n + a) sqrt(2 Lambda/(n-1)) + 14 Lambda/(3(n-1)) + 2a,   a = a_F + a_G,

    Lambda = ln N_F + ln N_G + prices + ln(4/delta).  For finite classes the slacks are 0 and the logs those of the
    numbers of members; for coded networks the logs are code lengths in nats.

    Args:
        pair: the measured losses.
        log_original: ln N_F, or nats of the code of f.
        log_compressed: ln N_G, or nats of the code of g.
        delta: allowed probability of failure.
        price_original: nats for choices of the class F with the data in view (norms, ranks).
        price_compressed: nats for such choices of G, and of gamma if it was not fixed in advance.
        slack_original: a_F, how far the loss of f is from that of its centre at most, on every example.
        slack_compressed: a_G.
        hypotheses: conditions to be carried along.
        name: short label for tables.

    Returns:
        A `Bound` on the ramp loss of the original network, so on its error, with terms empirical (of f), bias (the fast
        term's ||d||_n sqrt(...); 0 at f = g), variance (covers and slacks) and confidence (what delta and prices add).

    Raises:
        ValueError: if an input is out of range.

    Source: Maurer and Pontil 2009, Theorem 4; form after Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274),
        Theorem 1, whose constant is unknown; derived here.
    """
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    log_f, log_g = check_number("log_original", log_original, 0.0), check_number("log_compressed", log_compressed, 0.0)
    price_f = check_number("price_original", price_original, 0.0)
    price_g = check_number("price_compressed", price_compressed, 0.0)
    slack_g = check_number("slack_compressed", slack_compressed, 0.0)
    slack = check_number("slack_original", slack_original, 0.0) + slack_g
    n = pair.n

    def compressed_gap(nats: float) -> float:
        return invert_binary_kl(min(1.0, pair.compressed + slack_g), nats / n) + slack_g - pair.compressed

    def fast(nats: float) -> float:
        return slack * math.sqrt(2 * nats / (n - 1)) + 14 * nats / (3 * (n - 1)) + 2 * slack

    nats_g = log_g + price_g + math.log(2 / delta)
    nats = log_f + log_g + price_f + price_g + math.log(4 / delta)
    variance = compressed_gap(log_g) + fast(log_f + log_g)
    return Bound.from_terms(
        name,
        {
            "empirical": pair.original,
            "bias": pair.loss_distance * math.sqrt(2 * nats / (n - 1)),
            "variance": variance,
            "confidence": compressed_gap(nats_g) + fast(nats) - variance,
        },
        confidence=1 - delta,
        covers=ORIGINAL,
        loss=f"ramp({pair.gamma:g})",
        hypotheses=hypotheses,
        trivial=1.0,
        theorem="compression bound for the original network, empirical Bernstein over pairs",
        source=SOURCE,
    )


def uncompressed_bound(
    original: Sequence[LayerSize],
    compressed: Sequence[LayerSize] | float,
    pair: LossPair,
    *,
    input_radius: float,
    delta: float,
    original_widths: Sequence[int] = (),
    measured_radius: float | None = None,
) -> Bound:
    """Bound the original network's error by Theorem E: covers of both networks' classes at gamma/(sqrt(2) n).

    At this scale each loss is within a = 1/n of its centre's.  Norms of both networks are rounded up to powers of two
    and paid for, like gamma and the widths of g; for a compressed network that was written down (quantised), the nats
    of its code replace its cover, and its slack is 0.

    Args:
        original: the layers of f, input side first.
        compressed: the layers of g, or the nats of its code from `network_code_length`.
        pair: the two networks measured on the n training examples.
        input_radius: D_x with ||x|| <= D_x for every possible input.
        delta: allowed probability of failure.
        original_widths: original width m_l of each layer that could be pruned (ln m_l each); leave out where
            `compressed` is a code length that counts them.
        measured_radius: largest ||x|| seen, to check D_x; None if not measured.

    Returns:
        A `Bound` with terms empirical, bias, variance and confidence (see `pair_bound`).

    Raises:
        ValueError: if an input is out of range.

    Source: form after Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274), Theorem 1; derived here.
    """
    hypotheses = (radius_hypothesis(input_radius, measured_radius),)
    log_epsilon = math.log(pair.gamma) - math.log(math.sqrt(2) * pair.n)
    log_f, price_f = log_cover(original, log_epsilon, input_radius)
    log_g, price_g, slack_g = (
        (*log_cover(compressed, log_epsilon, input_radius), 1 / pair.n)
        if isinstance(compressed, Sequence)
        else (check_number("compressed, as a code length,", compressed, 0.0), 0.0, 0.0)
    )
    widths = math.fsum(math.log(check_count("width", width)) for width in original_widths)
    return pair_bound(
        pair,
        log_original=log_f,
        log_compressed=log_g,
        delta=delta,
        price_original=price_f,
        price_compressed=price_g + widths + integer_code_length(power_of_two_below(pair.gamma)),
        slack_original=1 / pair.n,
        slack_compressed=slack_g,
        hypotheses=hypotheses,
        name="uncompressed (pairs)" if slack_g else "uncompressed (coded pairs)",
    )
