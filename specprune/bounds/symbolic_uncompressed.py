"""Bounds for the original network as formulas, and the published rates of the field side by side.

The rates compare how bounds of many authors depend on width, depth, norms and spectra.  Constants are unknown or
dropped: in every rate they are SET TO 1, so a value orders and extrapolates, and promises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp

from specprune.bounds.bound import check_count, check_number
from specprune.bounds.statement import DERIVED, RECALLED, STANDARD, Statement, positive

_PAPER = "Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274)"
_TABLE = f"Table 1 of {_PAPER}, read through secondary notes; constants and logarithms dropped"


def statements() -> list[Statement]:
    """Return all statements on the original network.

    Returns:
        Theorem D, Theorem E with its transfer part, the low-rank cover and truncation error, and the published
        Theorems 1, 2 and 4 (display only).

    Source: see each statement.
    """
    return [*_disagreement(), _transfer(), *_low_rank(), low_rank_distance(), *_published()]


def _disagreement() -> list[Statement]:
    risk, compressed, limit, count, delta = positive("r r_c U n_u delta")
    common = ("n_u fresh unlabelled inputs, i.i.d.", "r_c bounds the compressed network's error with 1 - delta'")
    share, code, n = positive("q C n")
    return [
        Statement(
            "disagreement",
            "Error of the original network: that of the compressed one, and how often they differ",
            sp.Le(risk, compressed + limit),
            (compressed, limit),
            (*common, "U: Clopper-Pearson upper limit of P(argmax f != argmax g)"),
            f"idea of {_PAPER}; elementary",
            DERIVED,
        ),
        Statement(
            "disagreement_none",
            "The same when no unlabelled input tells the two networks apart",
            sp.Le(risk, compressed + 1 - delta ** (1 / count)),
            (compressed, count, delta),
            (*common, "no disagreement among the n_u inputs", "probability 1 - delta' - delta"),
            "Clopper and Pearson 1934",
            STANDARD,
        ),
        Statement(
            "disagreement_coded",
            "The same from the training set alone, for a pair of networks that can be written in C nats",
            sp.Le(risk, compressed + share + sp.sqrt((code + sp.log(1 / delta)) / (2 * n))),
            (compressed, share, code, n, delta),
            ("q: share of disagreements on the n examples", "code of the pair fixed before the data",
             "probability 1 - delta' - delta", "the code inverts kl, which is never worse"),
            "Langford 2005, for the pair",
            DERIVED,
        ),
    ]  # fmt: skip


def _transfer() -> Statement:
    risk, ramp, gap, d, a, log_f, log_g, price, n, delta = positive("r r_n Delta_g d a C_F C_G C n delta")
    nats = log_f + log_g + price + sp.log(4 / delta)
    fast = (d + a) * sp.sqrt(2 * nats / (n - 1)) + sp.Rational(14, 3) * nats / (n - 1) + 2 * a
    return Statement(
        "uncompressed",
        "Error of the original network: the compressed one's gap, and the difference of losses at the fast rate",
        sp.Le(risk, ramp + gap + fast),
        (ramp, gap, d, a, log_f, log_g, price, n, delta),
        (
            "losses in [0, 1]",
            "d = ||l(f) - l(g)||_n <= sqrt(2)/gamma ||f - g||_n",
            "e^C_F and e^C_G centres move the losses by a_F and a_G at most, a = a_F + a_G; C: price of the classes",
            "Delta_g bounds E l(g) - mean of l(g) with probability 1 - delta/2",
        ),
        f"Maurer and Pontil 2009, Theorem 4; form after {_PAPER}, Theorem 1",
        DERIVED,
    )


def _low_rank() -> list[Statement]:
    nats, rank, rows, columns, radius, epsilon = positive("H s p m R epsilon")
    return [
        Statement(
            "low_rank_cover",
            "Nats of a cover of p x m matrices of rank s and operator norm R, in operator norm",
            sp.Le(nats, rank * (rows + columns) * sp.log(1 + 4 * radius / epsilon)),
            (rank, rows, columns, radius, epsilon),
            ("epsilon > 0", "centres are matrices of the same set"),
            "Candes and Plan 2011, Lemma 3.1, has (9R/epsilon)^(s(m+p+1)) in Frobenius norm",
            DERIVED,
        )
    ]


def low_rank_distance(depth: int = 3) -> Statement:
    """Return the ceiling r_hat on the distance of a network from its truncation to ranks s_1, ..., s_L.

    Args:
        depth: L, number of layers.

    Returns:
        ||f - g|| <= V_0 R_2^(L-1) B_x sum_l s_l^(-alpha), inputs (V_0, R_2, B_x, alpha, s_1, ..., s_L).

    Raises:
        ValueError: if depth < 1.

    Source: Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274), Theorem 2; proved in `truncation_error`.
    """
    check_count("depth", depth)
    error, scale, norm, radius, alpha = positive("e V_0 R_2 B_x alpha")
    ranks = positive(" ".join(f"s_{layer}" for layer in range(1, depth + 1)))
    return Statement(
        "low_rank_distance",
        f"Distance of a network from its truncation to low rank, {depth} layers",
        sp.Le(error, scale * norm ** (depth - 1) * radius * sum(rank**-alpha for rank in ranks)),
        (scale, norm, radius, alpha, *ranks),
        ("singular values sigma_j <= V_0 j^(-alpha)", "||W_l|| <= R_2, no biases", "||x|| <= B_x",
         "activations 1-Lipschitz with value 0 at 0"),
        f"{_PAPER}, Theorem 2",
        DERIVED,
    )  # fmt: skip


def _published() -> list[Statement]:
    risk, ramp, constant, t, n, m_inf = positive("Psi Psi_n C t n M")
    main, local, r_dot = positive("Rbar_n Rdot rdot")
    fast = local * sp.log(n) ** sp.Rational(3, 2) + r_dot * sp.sqrt(t / n) + (1 + t * m_inf) / n
    unknown = "C is an unspecified constant"
    distance, alpha, a1, a2 = positive("rhat alpha A_1 A_2")
    exponent = (2 * alpha - 1) / (2 * alpha + 1)
    low_rank = (
        m_inf * a1
        + m_inf**exponent * a2 ** (2 * alpha / (1 + 2 * alpha))
        + sp.sqrt(distance ** (2 * (1 - 1 / (2 * alpha))) * a2)
        + (distance + m_inf) * sp.sqrt(a1)
        + (1 + t * m_inf) / n
    )
    both = next(rate for rate in RATES if rate.name == "suzuki2020_theorem4")
    return [
        Statement(
            "original_theorem_1_published",
            "Published shape: main term of the compressed class, fast term of the Minkowski difference",
            sp.Le(risk, ramp + 2 * main + m_inf * sp.sqrt(2 * t / n) + constant * fast),
            (ramp, main, local, r_dot, constant, t, n, m_inf),
            (unknown, "t >= 1, probability 1 - 3 e^(-t)", "rdot = sqrt(2 (rhat^2 + r_*^2)), ||f - g||_n <= rhat",
             "Rbar_n: Rademacher complexity of G; Rdot: local one of F - G at radius rdot"),
            f"{_PAPER}, Theorem 1",
            RECALLED,
            numeric=False,
        ),
        Statement(
            "original_theorem_2_published",
            "Published shape for near-low-rank weights",
            sp.Le(risk, ramp + constant * low_rank),
            (ramp, constant, m_inf, a1, a2, distance, alpha, t, n),
            (unknown, "sigma_j <= V_0 j^(-alpha), alpha > 1/2", "A_1 = L sum s_l (m_l + m_(l+1)) log(n) / n",
             "A_2 = L sum m_l (2 L V_0 R_2^(L-1) B_x)^(1/alpha) / n", "probability 1 - 3 e^(-t)",
             "exponent of rhat 2 (1 - 1/(2 alpha)): as Dudley's integral gives it, the notes print another"),
            f"{_PAPER}, Theorem 2",
            RECALLED,
            numeric=False,
        ),
        Statement(
            "original_theorem_4_published",
            "Published rate for near-low-rank weights and covariances",
            sp.Le(risk, ramp + constant * both.expression),
            (ramp, constant, *both.symbols),
            (unknown, "sigma_j <= V_0 j^(-alpha)", "covariance eigenvalues mu_j <= U_0 j^(-beta)",
             "only the rate of Table 1 is known, not the statement"),
            f"{_PAPER}, Theorem 4",
            RECALLED,
            numeric=False,
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """One row of the comparison: how a published bound grows, constants set to 1.

    Attributes:
        name: short key.
        authors: who, and when.
        expression: the rate.
        symbols: what it depends on, sorted by name.
        kind: what the bound rests on: norms, VC dimension, compression, low rank.
        original: whether it speaks of the original network, not of a compressed one.
        provenance: where the form comes from.
    """

    name: str
    authors: str
    expression: sp.Expr
    symbols: tuple[sp.Symbol, ...]
    kind: str
    original: bool
    provenance: str

    def latex(self) -> str:
        """Return the rate as LaTeX, without dollar signs."""
        return sp.latex(self.expression)


def _rates() -> tuple[Rate, ...]:
    n, depth, m, frobenius, operator = positive("n L m R_F R_2")
    r21, r11, kappa, distance, alpha, beta = positive("R_21 R_11 kappa rhat alpha beta")
    largest, cushions, widths, local, compressed = positive("f_max S_mu S_m Rdot Rbar_n")
    third = sp.Rational(1, 3)
    bulk = alpha * 4 / (2 * alpha - 1) + beta
    tail = (4 / beta) / (4 / beta + 2 * (1 - 1 / (2 * alpha)))
    table: list[tuple[str, str, sp.Expr, str, bool]] = [
        ("neyshabur2015", "Neyshabur et al. 2015", (2 * frobenius) ** depth / sp.sqrt(n), "norm", True),
        (
            "bartlett2017",
            "Bartlett et al. 2017",
            operator**depth / sp.sqrt(n) * (depth * (r21 / operator) ** (2 * third)) ** sp.Rational(3, 2),
            "norm",
            True,
        ),
        (
            "wei2019",
            "Wei and Ma 2019",
            (1 + depth * kappa ** (4 * third) * r21 ** (2 * third) + depth * kappa ** (2 * third) * r11 ** (2 * third))
            ** sp.Rational(3, 2)
            / sp.sqrt(n),
            "norm",
            True,
        ),
        (
            "neyshabur2018",
            "Neyshabur et al. 2018",
            operator**depth / sp.sqrt(n) * sp.sqrt(depth**3 * m * frobenius**2 / operator**2),
            "norm",
            True,
        ),
        (
            "golowich2018",
            "Golowich et al. 2018",
            frobenius**depth * sp.Min(n ** -sp.Rational(1, 4), sp.sqrt(depth / n)),
            "norm",
            True,
        ),
        (
            "li2018",
            "Li et al. 2018; Harvey et al. 2017",
            operator**depth * sp.sqrt(depth**2 * m**2 / n),
            "VC dimension",
            True,
        ),
        (
            "arora2018",
            "Arora et al. 2018",
            distance + sp.sqrt(depth**2 * largest**2 * cushions / (n * distance**2)),
            "compression",
            False,
        ),
        ("suzuki2018", "Suzuki et al. 2018", distance + sp.sqrt(widths / n), "compression", False),
        ("suzuki2020_theorem1", "Suzuki et al. 2020, Theorem 1", distance / sp.sqrt(n) + local + compressed,
         "compression", True),
        ("suzuki2020_corollary1", "Suzuki et al. 2020, Corollary 1",
         sp.sqrt(depth * (depth * kappa**2) ** (1 / alpha) * depth * m / n), "low-rank weights", True),
        ("suzuki2020_theorem4", "Suzuki et al. 2020, Theorem 4",
         sp.sqrt(depth ** (1 + beta / bulk) * (depth * m) ** tail / n), "low-rank weights and covariances", True),
    ]  # fmt: skip
    return tuple(
        Rate(name, authors, rate, tuple(sorted(rate.free_symbols, key=str)), kind, original, _TABLE)
        for name, authors, rate, kind, original in table
    )


#: The comparison table.  Symbols: n examples, L layers, m largest width, R_F, R_2, R_21, R_11 the largest Frobenius,
#: operator, (2,1) and (1,1) norm of a layer, kappa interlayer Lipschitz constant, rhat distance of the compressed
#: network, f_max largest |f(x_i)|, S_mu = sum_l 1/(mu_l mu_l->)^2 (cushions), S_m = sum_l m#_l m#_(l+1) (kept widths),
#: Rdot, Rbar_n local Rademacher complexity and that of the compressed class, alpha, beta decay exponents (a larger one
#: is a faster decay).
RATES: tuple[Rate, ...] = _rates()


def rates_records() -> list[dict[str, Any]]:
    """Return the comparison table as records, for a data frame, Markdown or CSV.

    Returns:
        One record a rate: name, authors, rate (as text), latex, kind, original, provenance.
    """
    return [
        {
            "name": rate.name,
            "authors": rate.authors,
            "rate": str(rate.expression),
            "latex": rate.latex(),
            "kind": rate.kind,
            "original": rate.original,
            "provenance": rate.provenance,
        }
        for rate in RATES
    ]


def rates_latex() -> str:
    """Return the comparison table as a LaTeX tabular, which needs the package booktabs."""
    rows = [
        f"{rate.authors} & ${rate.latex()}$ & {rate.kind} & {'yes' if rate.original else 'no'} \\\\" for rate in RATES
    ]
    head = [r"\begin{tabular}{llll}", r"\toprule", r"Authors & Rate & Type & Original network \\", r"\midrule"]
    return "\n".join([*head, *rows, r"\bottomrule", r"\end{tabular}"])


def evaluate_rates(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return every rate at given numbers, all constants and logarithmic factors set to 1: an order, not a bound.

    Args:
        values: symbol name (see `RATES`) to positive number; n, L and m, norms, alpha, beta, whatever is known.

    Returns:
        One record a rate: name, authors, log10 of the rate, the rate itself (+inf where float64 overflows), kind,
        original, missing (symbols without a value, and alpha if it is not above 1/2, as these rates assume; log10 and
        rate are then None), note.

    Raises:
        ValueError: if a name is not a symbol of any rate, or a number is not positive.
        TypeError: if the values are no mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of symbols to numbers, got {values!r}")
    known = {str(symbol) for rate in RATES for symbol in rate.symbols}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"no rate depends on {unknown}; the symbols are {sorted(known)}")
    numbers = {name: check_number(name, value, 0.0, open_low=True) for name, value in values.items()}
    if numbers.get("alpha", 1.0) <= 0.5:
        del numbers["alpha"]
    records = []
    for rate in RATES:
        missing = [str(symbol) for symbol in rate.symbols if str(symbol) not in numbers]
        record: dict[str, Any] = {"name": rate.name, "authors": rate.authors, "log10": None, "rate": None}
        if not missing:
            # SymPy's floats have exponents without limit: products of norms may leave the range of float64.
            value = sp.N(rate.expression.subs({symbol: sp.Float(numbers[str(symbol)], 30) for symbol in rate.symbols}))
            record["log10"], record["rate"] = float(sp.log(value, 10)), float(value)
        record.update({"kind": rate.kind, "original": rate.original, "missing": missing, "note": "constants set to 1"})
        records.append(record)
    return records
