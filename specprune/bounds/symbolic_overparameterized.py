"""The isotropic case of over-parameterised pruning in closed form: where the peak is, and when large beats small.

All P features have variance 1.  The s right ones carry the energy e of the signal; the rest, r, is spread evenly over
the other P - s.  Training on the first k features (the right ones first) leaves

    sigma_k^2 = sigma^2 + r (P - k) / (P - s)

as noise, and c = k / n - 1, t = n / k for k > n.  Everything else follows by algebra, here by SymPy.

Source: the isotropic case of Chang et al. 2021 (arXiv:2012.08749), as in `overparameterized`; the unpruned risk is that
of Hastie et al. 2022 (arXiv:1903.08560); the comparison with training small is derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import sympy as sp
from sympy.polys.polytools import NoConvergence

from specprune.bounds.bound import check_count, check_number
from specprune.bounds.overparameterized import LinearProblem
from specprune.bounds.statement import positive

_IMAGINARY = 1e-9


@dataclass(frozen=True)
class IsotropicFormulas:
    """Risks in closed form, in the symbols k, n, s, P, sigma2 (noise), e (energy of the right features) and r (rest).

    Attributes:
        unpruned_under: least squares on k < n features.
        unpruned_over: least norm on k > n features.
        oracle_under: kept to the s right features, k < n.
        oracle_over: kept to the s right features, k > n.
        small: least squares on the s right features alone.
        peak: the size where the unpruned risk has its pole.
        best_size: the size above n where the unpruned risk is lowest, for r = 0 and sigma2 < e (for more noise the risk
            falls with every feature).
        best_risk: the risk there.
    """

    unpruned_under: sp.Expr
    unpruned_over: sp.Expr
    oracle_under: sp.Expr
    oracle_over: sp.Expr
    small: sp.Expr
    peak: sp.Expr
    best_size: sp.Expr
    best_risk: sp.Expr


@cache
def isotropic_formulas() -> IsotropicFormulas:
    """Return the isotropic risks in closed form, and what follows from them.

    Source: see the module.
    """
    k, n, s, features, noise, energy, rest = positive("k n s P sigma2 e r")
    unexplained = noise + rest * (features - k) / (features - s)
    used = energy + rest * (k - s) / (features - s)
    t = n / k
    under = unexplained / (1 - k / n)
    over = (unexplained + (1 - t) ** 2 * used) / (1 - k * t**2 / n)
    # No tail: the risk is sigma2 / (1 - t) + (1 - t) e, lowest where (1 - t)^2 e = sigma2.
    plain = sp.simplify(over.subs(rest, 0))
    # The other stationary points are at k <= 0 or below n.
    (best,) = (root for root in sp.solve(sp.diff(plain, k), k) if (root / n).subs({noise: 1, energy: 4, n: 1}) > 1)
    return IsotropicFormulas(
        unpruned_under=sp.simplify(under),
        unpruned_over=sp.simplify(over),
        oracle_under=sp.simplify(noise + rest + s * under / n),
        oracle_over=sp.simplify(noise + rest + (1 - t) ** 2 * energy + s * t**2 * over / n),
        small=(noise + rest) / (1 - s / n),
        peak=sp.solve(sp.denom(sp.together(over)) / k, k)[0],
        best_size=_in_roots(best, energy, noise),
        best_risk=_in_roots(plain.subs(k, best), energy, noise),
    )


def _in_roots(expression: sp.Expr, *squares: sp.Symbol) -> sp.Expr:
    """Simplify in terms of the square roots of some symbols."""
    roots = sp.symbols(f"root:{len(squares)}", positive=True)
    simple = sp.simplify(expression.subs({square: root**2 for square, root in zip(squares, roots, strict=True)}))
    return simple.subs({root: sp.sqrt(square) for square, root in zip(squares, roots, strict=True)})


def isotropic_problem(n: int, keep: int, features: int, noise: float, energy: float, rest: float) -> LinearProblem:
    """Return the isotropic problem with `energy` on the first `keep` features, and `rest` on the others, evenly.

    Args:
        n: training examples.
        keep: s, number of right features.
        features: P, above s.
        noise: sigma^2.
        energy: e, sum of the squared coefficients of the right features.
        rest: r, that of the others.

    Raises:
        ValueError: numbers out of range.
    """
    keep, features = check_count("keep", keep), check_count("features", features, low=2)
    if keep >= features:
        raise ValueError(f"keep = {keep} of {features} features; expected fewer")
    energy, rest = check_number("energy", energy, 0.0), check_number("rest", rest, 0.0)
    beta = np.full(features, np.sqrt(rest / (features - keep)))
    beta[:keep] = np.sqrt(energy / keep)
    return LinearProblem(np.ones(features), beta, noise, n)


def large_beats_small(
    n: int, keep: int, features: int, noise: float, energy: float, rest: float
) -> list[tuple[float, float]]:
    """Return the intervals of sizes k > n where training large and keeping the right features beats training small.

    The difference of the two risks is a rational function of k; its numerator's roots in (n, P] bound the intervals.

    Args:
        n: training examples, above s.
        keep: s, number of right features.
        features: P, above n.
        noise: sigma^2.
        energy: e, energy of the right features.
        rest: r, energy of the others.

    Returns:
        Intervals in k, empty if training small is always better.

    Raises:
        ValueError: s >= n, P <= n, or numbers out of range.

    Source: derived here.
    """
    problem = isotropic_problem(n, keep, features, noise, energy, rest)
    if not keep < problem.n < features:
        raise ValueError(f"expected keep < n < features, got {keep}, {problem.n} and {features}")
    formulas = isotropic_formulas()
    symbols = positive("k n s P sigma2 e r")
    values = (problem.n, keep, features, problem.noise, float(energy), float(rest))
    known = {symbol: sp.nsimplify(value, rational=True) for symbol, value in zip(symbols[1:], values, strict=True)}
    gain = sp.together((formulas.small - formulas.oracle_over).subs(known))
    size = symbols[0]
    ahead = sp.lambdify(size, gain)
    try:
        roots = [complex(root) for root in sp.Poly(sp.numer(gain), size).nroots(n=30, maxsteps=200)]
        inside = sorted(root.real for root in roots if abs(root.imag) < _IMAGINARY and n < root.real < features)
        ends = [float(n), *inside, float(features)]
        return [(low, high) for low, high in pairwise(ends) if ahead((low + high) / 2) > 0]
    except (OverflowError, NoConvergence) as error:
        raise ValueError(
            f"noise={noise:g}, energy={energy:g} and rest={rest:g} differ by too many orders for the roots to be "
            "found; scale them closer together"
        ) from error
