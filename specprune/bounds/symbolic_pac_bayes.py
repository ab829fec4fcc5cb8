"""PAC-Bayes and test set bounds as formulas; where a divergence is inverted, its budget is the formula."""

from __future__ import annotations

import sympy as sp

from specprune.bounds.statement import DERIVED, STANDARD, Statement, positive

_GIBBS = (
    "P is fixed before the n i.i.d. examples are seen, Q may depend on them",
    "loss in [0, 1]; q and p are the mean over Q of the empirical and the true error",
)


def statements() -> list[Statement]:
    """Return the statements of `pac_bayes` and `held_out`, with KL, C and ln in nats."""
    return [*_divergences(), *_relaxed(), *_test_set()]


def _divergences() -> list[Statement]:
    """Return the bounds on kl(q || p), whose inversion gives the number."""
    kl, n, delta, j, bits = positive("KL n delta j l")
    q, p = positive("q p")
    divergence = sp.Function("kl")(q, p)
    maurer, older = "Maurer 2004, arXiv:cs/0411099", "Langford and Seeger 2001"
    return [
        Statement(
            "pac_bayes_maurer",
            "Divergence of empirical and true Gibbs error",
            sp.Le(divergence, (kl + sp.log(2 * sp.sqrt(n) / delta)) / n),
            (kl, n, delta),
            (*_GIBBS, "n >= 8"),
            maurer,
            STANDARD,
        ),
        Statement(
            "pac_bayes_langford_seeger",
            "Divergence of empirical and true Gibbs error, older form",
            sp.Le(divergence, (kl + sp.log(n / delta)) / (n - 1)),
            (kl, n, delta),
            (*_GIBBS, "n >= 8"),
            older,
            STANDARD,
        ),
        Statement(
            "pac_bayes_dziugaite_roy",
            "Divergence of empirical and true Gibbs error, prior variance c exp(-j/b)",
            sp.Le(divergence, (kl + 2 * sp.log(j) + sp.log(sp.pi**2 * n / (6 * delta))) / (n - 1)),
            (kl, n, delta, j),
            (*_GIBBS, "n >= 8", "one prior for every j = 1, 2, ..., chosen after the fact"),
            "Dziugaite and Roy 2017, arXiv:1703.11008",
            STANDARD,
        ),
        Statement(
            "compression",
            "Divergence of empirical and true error of a network decoded from l bits",
            sp.Le(divergence, (bits * sp.log(2) + sp.log(bits * (bits + 1)) + sp.log(1 / delta)) / n),
            (bits, n, delta),
            ("the decoder is fixed before the n i.i.d. examples are seen", "0-1 loss of the decoded network"),
            "Zhou et al. 2019, arXiv:1804.05862",
            DERIVED,
        ),
        Statement(
            "monte_carlo_error",
            "Divergence of the error of n drawn networks and the Gibbs error",
            sp.Le(divergence, sp.log(1 / delta) / n),
            (n, delta),
            (
                "n independent draws, made after Q was fixed",
                "q is their mean, p its expectation; only p > q is bounded",
            ),
            "Hoeffding 1963, Theorem 1; Langford and Caruana 2002",
            STANDARD,
        ),
    ]


def _relaxed() -> list[Statement]:
    """Return the bounds in closed form."""
    q, kl, n, delta, lam = positive("q KL n delta lambda")
    p = sp.Symbol("p", positive=True)
    mean, deviation, prior_mean, prior_deviation = sp.symbols("m s w t", positive=True)
    nats = kl + sp.log(2 * sp.sqrt(n) / delta)
    half = nats / (2 * n)
    return [
        Statement(
            "pac_bayes_mcallester",
            "Gibbs error, square-root form",
            sp.Le(p, q + sp.sqrt(half)),
            (q, kl, n, delta),
            (*_GIBBS, "n >= 8"),
            "McAllester 1999 with the constant of Maurer 2004",
            STANDARD,
        ),
        Statement(
            "pac_bayes_quadratic",
            "Gibbs error, fast rate for small errors",
            sp.Le(p, (sp.sqrt(q + half) + sp.sqrt(half)) ** 2),
            (q, kl, n, delta),
            (*_GIBBS, "n >= 8"),
            "Rivasplata et al. 2019; Perez-Ortiz et al. 2021",
            STANDARD,
        ),
        Statement(
            "pac_bayes_lambda",
            "Gibbs error, linear in q and KL for every slope lambda",
            sp.Le(p, q / (1 - lam / 2) + nats / (n * lam * (1 - lam / 2))),
            (q, kl, n, delta, lam),
            (*_GIBBS, "n >= 8", "0 < lambda < 2, may depend on the data"),
            "Thiemann et al. 2017",
            STANDARD,
        ),
        Statement(
            "pac_bayes_catoni",
            "Gibbs error at a fixed inverse temperature lambda",
            sp.Le(p, (1 - sp.exp(-lam * q / n - (kl + sp.log(1 / delta)) / n)) / (1 - sp.exp(-lam / n))),
            (q, kl, n, delta, lam),
            (*_GIBBS, "lambda > 0 is fixed before the examples are seen"),
            "Catoni 2007, arXiv:0712.0248",
            STANDARD,
        ),
        Statement(
            "gaussian_kl",
            "Divergence of two normal distributions, one coordinate",
            sp.Le(
                kl,
                sp.log(prior_deviation / deviation)
                + (deviation**2 + (mean - prior_mean) ** 2) / (2 * prior_deviation**2)
                - sp.Rational(1, 2),
            ),
            (mean, deviation, prior_mean, prior_deviation),
            ("posterior N(m, s^2), prior N(w, t^2); equality holds; independent coordinates add up",),
            "definition",
            STANDARD,
        ),
    ]


def _test_set() -> list[Statement]:
    """Return the bounds from a test set that have a closed form."""
    q, n, delta, p = positive("q n delta p")
    fixed = ("the network is fixed before the n i.i.d. test examples are seen", "0-1 loss, q is the test error")
    return [
        Statement(
            "test_set_hoeffding",
            "True error from the test error",
            sp.Le(p, q + sp.sqrt(sp.log(1 / delta) / (2 * n))),
            (q, n, delta),
            fixed,
            "Hoeffding 1963, Theorem 1",
            STANDARD,
        ),
        Statement(
            "test_set_chernoff",
            "Divergence of test error and true error",
            sp.Le(sp.Function("kl")(q, p), sp.log(1 / delta) / n),
            (n, delta),
            (*fixed, "only p > q is bounded"),
            "Chernoff 1952; Langford 2005",
            STANDARD,
        ),
    ]
