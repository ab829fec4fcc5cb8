"""The norm bounds as formulas.  Norm products, limits and gamma are the rounded ones, C is the total price in nats."""

from __future__ import annotations

import sympy as sp

from specprune.bounds.bound import check_count
from specprune.bounds.norms_pac_bayes import FAILURE
from specprune.bounds.statement import DERIVED, Statement, positive

_CLASSES = "n i.i.d. examples, K classes, probability 1 - delta"
_PEELING = ("P >= product of the layers' norms", "elementwise positively homogeneous activations", _CLASSES)


def _frame(rademacher: sp.Expr) -> tuple[sp.Rel, tuple[sp.Symbol, ...]]:
    ramp, n, delta, price, risk = positive("r_n n delta C r")
    confidence = 3 * sp.sqrt((sp.log(2 / delta) + price) / (2 * n))
    return sp.Le(risk, ramp + 2 * rademacher + confidence), (ramp, n, delta, price)


def bartlett(depth: int = 2) -> Statement:
    """Return the spectrally normalised margin bound for `depth` layers with Lipschitz constants 1.

    Args:
        depth: number of layers L.

    Returns:
        The statement; inputs (r_n, n, delta, C, gamma, X, then s_l, a_l, N_l a layer).

    Raises:
        ValueError: if depth < 1.

    Source: Bartlett, Foster and Telgarsky 2017 (arXiv:1706.08498), Theorem 1.1; constants derived here.
    """
    check_count("depth", depth)
    n, gamma, length = positive("n gamma X")
    symbols = positive(" ".join(f"{kind}_{layer}" for layer in range(1, depth + 1) for kind in ("s", "a", "N")))
    layers = [symbols[3 * k : 3 * k + 3] for k in range(depth)]
    total = sum((a * sp.sqrt(sp.log(count)) / s) ** sp.Rational(2, 3) for s, a, count in layers)
    radius = sp.sqrt(2) / gamma * length * sp.prod(s for s, _, _ in layers) * total ** sp.Rational(3, 2)
    step = sp.sqrt(2) * sp.E * radius / n
    levels = sp.Max(1, sp.ceiling(sp.log((1 - sp.exp(-1)) / (2 * step))))
    relation, common = _frame(sp.exp(-levels) / 2 + step * levels)
    return Statement(
        "bartlett_2017",
        f"Spectrally normalised margin bound, {depth} layers",
        relation,
        (*common, gamma, length, *symbols),
        (
            "||A_l|| <= s_l, ||A_l^T - M_l^T||_{2,1} <= a_l, N_l = 2 rows_l columns_l + 1",
            "1-Lipschitz maps with value 0 at 0; X = ||X||_F",
            _CLASSES,
        ),
        "Bartlett, Foster and Telgarsky 2017 (arXiv:1706.08498), Theorem 1.1",
        DERIVED,
    )


def _peeled(name: str, title: str, source: str, factor: sp.Expr, inputs: tuple[sp.Symbol, ...]) -> Statement:
    n, gamma, size = positive("n gamma P")
    relation, common = _frame(2 / (gamma * n) * size * factor)
    return Statement(name, title, relation, (*common, gamma, size, *inputs), _PEELING, source, DERIVED)


def _peelings() -> list[Statement]:
    classes, depth, length, features = positive("K L X d")
    golowich = "Golowich, Rakhlin and Shamir 2018 (arXiv:1712.06541)"
    frobenius = sp.sqrt(classes * ((1 + sp.sqrt(2 * (depth - 1) * sp.log(2))) ** 2 + 1)) * length
    corner = classes * length * sp.sqrt(2 * (depth * sp.log(2) + sp.log(features)))
    return [
        _peeled(
            "golowich_2018",
            "Norm bound with the root of the depth, P = product of Frobenius norms",
            golowich,
            frobenius,
            (classes, depth, length),
        ),
        _peeled(
            "golowich_2018_l1",
            "Norm bound with the root of the depth, P = product of largest row sums, X = longest column of the inputs",
            golowich,
            corner,
            (classes, depth, length, features),
        ),
        _peeled(
            "neyshabur_2015",
            "Norm bound with 2^((L-1)/2), P = product of Frobenius norms",
            "Neyshabur, Tomioka and Srebro 2015 (arXiv:1503.00036)",
            sp.sqrt(classes) * length * 2 ** ((depth - 1) / 2),
            (classes, depth, length),
        ),
        _peeled(
            "neyshabur_2019",
            "Unit-wise bound for two layers, P = sum of the units' norm products",
            "Neyshabur et al. 2019 (arXiv:1805.12076)",
            sp.sqrt(2 * classes) * length,
            (classes, length),
        ),
    ]


def neyshabur_2018(depth: int = 2) -> Statement:
    """Return the PAC-Bayes spectral bound for `depth` layers.

    Args:
        depth: number of layers L.

    Returns:
        The statement; inputs (r_n, n, delta, C, gamma, B, P, then h_l = sqrt(rows) + sqrt(columns) and the ratio q_l =
        ||A_l - M_l||_F / s_l a layer).

    Raises:
        ValueError: if depth < 1.

    Source: Neyshabur, Bhojanapalli and Srebro 2018 (arXiv:1707.09564), Theorem 1; constants derived here.
    """
    check_count("depth", depth)
    error, n, delta, price, gamma, radius, size, risk = positive("r_n n delta C gamma B P r")
    symbols = positive(" ".join(f"{kind}_{layer}" for layer in range(1, depth + 1) for kind in ("h", "q")))
    failure = sp.Rational(str(FAILURE))
    tail = sp.sqrt(2 * sp.log(depth / failure))
    eta = (1 + gamma / (2 * sp.sqrt(2) * radius * size)) ** sp.Rational(1, depth) - 1
    total = sum(((h + tail) * ratio) ** 2 for h, ratio in zip(symbols[::2], symbols[1::2], strict=True))
    entropy = -failure * sp.log(failure) - (1 - failure) * sp.log(1 - failure)
    divergence = (total / (2 * eta**2) + entropy) / (1 - failure)
    return Statement(
        "neyshabur_2018",
        f"PAC-Bayes spectral margin bound, {depth} layers",
        sp.Le(risk, error + sp.sqrt((divergence + sp.log(2 * sp.sqrt(n) / delta) + price) / (2 * n))),
        (error, n, delta, price, gamma, radius, size, *symbols),
        (
            "||x|| <= B for every input; P >= product of operator norms s_l",
            "1-Lipschitz maps with value 0 at 0 (version product: positively homogeneous)",
            "r_n: fraction of examples with margin at most gamma",
            _CLASSES,
        ),
        "Neyshabur, Bhojanapalli and Srebro 2018 (arXiv:1707.09564), Theorem 1",
        DERIVED,
    )


def statements() -> list[Statement]:
    """Return the norm bounds for two layers, or for any number where the formula has the depth as an input."""
    return [bartlett(), *_peelings(), neyshabur_2018()]
