"""The compression lemma of noise-stable networks as formulas: what is proved, and what is only remembered."""

from __future__ import annotations

import sympy as sp

from specprune.bounds.bound import check_count
from specprune.bounds.statement import DERIVED, RECALLED, Statement, positive

_SOURCE = "Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296)"
_SIGNS = "A^ = (1/k) sum_l <A, M_l> M_l, the M_l independent matrices of independent random signs"


def _projection() -> list[Statement]:
    epsilon, k, eta, failure = positive("epsilon k eta p")
    excess = epsilon - sp.log(1 + epsilon)
    meaning = "p = P(|u^T (A^ - A) v| > epsilon ||A||_F ||u|| ||v||), u and v fixed"
    return [
        Statement(
            "matrix_projection_failure",
            "Probability that k random sign matrices miss one number u^T A v",
            sp.Le(failure, 2 * sp.exp(-k / 2 * excess)),
            (epsilon, k),
            (_SIGNS, meaning),
            _SOURCE + ", matrix projection lemma",
            DERIVED,
        ),
        Statement(
            "matrix_projection_size",
            "Random sign matrices that keep one number u^T A v with probability 1 - eta",
            sp.Ge(k, 2 * sp.log(2 / eta) / excess),
            (epsilon, eta),
            (_SIGNS, meaning),
            _SOURCE + ", matrix projection lemma",
            DERIVED,
            conclusion="p <= eta",
        ),
    ]


def _accuracy() -> Statement:
    part, epsilon, depth, layer, forward, contraction, overlap = positive("epsilon_i epsilon d mu_i mu_i^+ c o_i")
    return Statement(
        "noise_stable_accuracy",
        "How accurately a layer must be kept for outputs within epsilon ||f(x)||",
        sp.Le(part, epsilon * layer * forward / (3 * depth * sp.sqrt(overlap) * (1 + contraction * epsilon))),
        (epsilon, depth, layer, forward, contraction, overlap),
        (
            "mu_i the layer cushion, mu_i^+ = mu_{i->} the interlayer cushion, minima over the samples",
            "c the activation contraction",
            "interlayer smoothness rho >= 3d for the perturbations of the compression",
            "o_i: in how many patches an input pixel is (1 for dense layers)",
        ),
        _SOURCE + ", compression lemma",
        DERIVED,
        conclusion="the outputs of the compressed network are within epsilon ||f(x)|| on the samples",
    )


def compressed_size_formula(depth: int = 3) -> Statement:
    """Return the number of coefficients of the compression lemma for `depth` layers, before rounding up.

    Args:
        depth: d, at least 1.

    Returns:
        q <= sum_i (1 + 2 ln(2N/delta) / (epsilon_i - ln(1 + epsilon_i))), inputs (N, delta, epsilon_1, ..,
        epsilon_d).  N = n sum_j j h_j counts the numbers that must be right at once.

    Raises:
        ValueError: if depth < 1.

    Source: after Arora et al. 2018 (arXiv:1802.05296); constants derived in `specprune.bounds.noise_stability`.
    """
    check_count("depth", depth)
    total, events, delta = positive("q N delta")
    parts = positive(" ".join(f"epsilon_{layer}" for layer in range(1, depth + 1)))
    size = sum(1 + 2 * sp.log(2 * events / delta) / (part - sp.log(1 + part)) for part in parts)
    return Statement(
        "noise_stable_size",
        f"Complexity measure: numbers that keep the outputs of {depth} layers within epsilon ||f(x)|| (real, not bits)",
        sp.Le(total, size),
        (events, delta, *parts),
        (
            _SIGNS,
            "epsilon_i as in noise_stable_accuracy",
            "N = n sum_j j h_j: samples times watched outputs",
            "no bound on an error: real coefficients are counted, and rho is measured under another noise",
        ),
        _SOURCE + ", compressed size",
        DERIVED,
    )


def _recalled() -> list[Statement]:
    risk, margin_risk, constant, contraction, depth, norm, gamma, n = positive("r r_gamma C_1 c d F gamma n")
    layer, forward, total, width, delta, epsilon = positive("mu mu^+ q h delta epsilon")
    cushions = depth / (layer * forward) ** 2  # equal cushions; in general a sum over the layers
    return [
        Statement(
            "noise_stability_published",
            "Error of the compressed network, O-tilde form; all layers with equal cushions",
            sp.Le(
                risk,
                margin_risk + constant * sp.sqrt(contraction**2 * depth**2 * norm**2 * cushions / (gamma**2 * n)),
            ),
            (margin_risk, constant, contraction, depth, norm, layer, forward, gamma, n),
            (
                "r is the error of the COMPRESSED network, r_gamma the margin error of the original one",
                "F = max ||f(x)|| on the samples",
                "C_1 hides an unknown constant and logarithms",
            ),
            _SOURCE + ", main theorem",
            RECALLED,
            numeric=False,
        ),
        Statement(
            "noise_stability_size_published",
            "Compressed size, form of the source; all layers with equal cushions",
            sp.Le(
                total,
                constant * contraction**2 * depth**2 * sp.log(n * depth * width / delta) / epsilon**2 * cushions,
            ),
            (constant, contraction, depth, n, width, delta, epsilon, layer, forward),
            (
                "the source's constant is remembered as 72 and not checked",
                "its matrix projection with ln(1/eta)/epsilon^2 sign matrices fails more often than eta",
            ),
            _SOURCE + ", compressed size",
            RECALLED,
            numeric=False,
        ),
    ]


def statements() -> list[Statement]:
    """Return the statements about noise stability, the compressed size for three layers."""
    return [*_projection(), _accuracy(), compressed_size_formula(), *_recalled()]
