"""The theorems as formulas: SymPy statements for slides and papers, and the rates derived from them by machine.

Every statement is an inequality `quantity <= formula`.  `latex()` prints it; `lambdify()` turns the formula into a
numeric function, which the tests compare with the code that the other modules run.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from specprune.bounds import symbolic_noise_stability, symbolic_norms, symbolic_pac_bayes, symbolic_uncompressed
from specprune.bounds.bound import check_count
from specprune.bounds.statement import DERIVED, RECALLED, STANDARD, Statement, positive


def _power_law() -> Statement:
    mu0, beta, lam = positive("mu_0 beta lambda")
    count = sp.Function("N")(lam)
    return Statement(
        "power_law_degrees_of_freedom",
        "Degrees of freedom of a power-law spectrum",
        sp.Le(count, sp.pi * beta / sp.sin(sp.pi * beta) * (mu0 / lam) ** beta),
        (mu0, beta, lam),
        ("mu_j <= mu_0 j^(-1/beta) for all j >= 1", "0 < beta < 1"),
        "Suzuki et al. 2018/2020 (arXiv:1808.08558) for the rate",
        DERIVED,
    )


def _sampling() -> list[Statement]:
    count, samples, delta, ratio, c = positive("N M delta rho c")
    tropp = "Tropp 2015, Theorem 7.7.1; Bach 2017 (JMLR 18), Prop. 1"
    common = ("J drawn independently from the leverage scores", "rho = lambda / mu_1")
    enough = "c <= 4 with probability at least 1 - delta"
    failure = sp.Function("P")(sp.Gt(c, 4, evaluate=False))
    return [
        Statement(
            "samples_explicit",
            "Draws that make c <= 4 with probability 1 - delta, explicit constants",
            sp.Ge(samples, sp.Rational(32, 9) * (count + sp.Rational(1, 4)) * sp.log(4 * count * (1 + ratio) / delta)),
            (count, delta, ratio),
            common,
            tropp,
            DERIVED,
            conclusion=enough,
        ),
        Statement(
            "samples_bach",
            "Draws that make c <= 4 with probability 1 - delta, Bach's form",
            sp.Ge(samples, 5 * count * sp.log(16 * count / delta)),
            (count, delta),
            (*common, "rho <= 1", "delta >= 2e-4 (for the proof given here)"),
            tropp,
            DERIVED,
            conclusion=enough,
        ),
        Statement(
            "sampling_failure",
            "Probability that M draws fail",
            sp.Le(
                failure, 4 * count * (1 + ratio) * sp.exp(-sp.Rational(9, 32) * samples / (count + sp.Rational(1, 4)))
            ),
            (count, samples, ratio),
            common,
            tropp,
            DERIVED,
        ),
    ]


def approximation(depth: int = 3) -> Statement:
    """Return the approximation theorem for `depth` layers with one norm R for all of them.

    Args:
        depth: L, layers of the network, at least 2; layers 2..L are pruned.

    Returns:
        ||f - f#||_n <= sum_{l=2}^L 2 R (sqrt(20/3) R)^(L-l) sqrt(lambda_l), inputs (R, lambda_2, ..., lambda_L).

    Raises:
        ValueError: if depth < 2.

    Source: Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 1, with an unnamed constant there; derived here.
    """
    check_count("depth", depth, low=2)
    (norm,) = positive("R")
    lams = positive(" ".join(f"lambda_{layer}" for layer in range(2, depth + 1)))
    total = sum(
        2 * norm * (sp.sqrt(sp.Rational(20, 3)) * norm) ** (depth - layer) * sp.sqrt(lam)
        for layer, lam in enumerate(lams, start=2)
    )
    (error,) = positive("e")
    return Statement(
        "approximation",
        f"Output error of the pruned network, {depth} layers",
        sp.Le(error, total),
        (norm, *lams),
        (
            "every layer: c <= 4 and s <= 5/3",
            "sqrt(rows) * largest row norm <= R; last layer: Frobenius norm <= R",
            "1-Lipschitz elementwise activations",
            "e = ||f - f#||_n",
        ),
        "Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 1",
        DERIVED,
    )


def _occam() -> Statement:
    error, code, n, delta, risk = positive("r_n C n delta r")
    return Statement(
        "occam_relaxed",
        "Error of a network that can be written in C nats",
        sp.Le(risk, error + sp.sqrt((code + sp.log(1 / delta)) / (2 * n))),
        (error, code, n, delta),
        (
            "n i.i.d. examples",
            "code fixed before the data, Kraft sum <= 1",
            "probability 1 - delta, all networks at once",
        ),
        "Langford 2005, Occam's razor bound",
        STANDARD,
    )


def _layer_symbols(depth: int) -> tuple[sp.Symbol, ...]:
    return positive(" ".join(f"{kind}_{layer}" for layer in range(1, depth + 1) for kind in ("W", "b", "s", "B")))


def covering(depth: int = 2) -> Statement:
    """Return the single-scale covering bound for `depth` layers.

    Args:
        depth: number of layers L.

    Returns:
        The statement; inputs (r_n, e, gamma, n, delta, C, D_x, then W_l, b_l, s_l, B_l a layer), where C is the total
        price in nats and gamma, s_l, B_l are already powers of two.

    Raises:
        ValueError: if depth < 1.

    Source: derived here, after Suzuki et al. 2018/2020 (arXiv:1808.08558).
    """
    check_count("depth", depth)
    ramp, error, gamma, n, delta, price, radius, risk = positive("r_n e gamma n delta C D_x r")
    symbols = _layer_symbols(depth)
    layers = [symbols[4 * k : 4 * k + 4] for k in range(depth)]
    epsilon = gamma / (sp.sqrt(2) * n)
    cover, at = sp.Integer(0), radius
    for k, (weights, biases, s, b) in enumerate(layers):
        later = sp.prod(layer[2] for layer in layers[k + 1 :])
        cover += weights * sp.log(1 + 4 * depth * s * at * later / epsilon)
        cover += biases * sp.log(1 + 4 * depth * b * later / epsilon)
        at = s * at + b
    value = ramp + sp.sqrt(2) / gamma * error + 2 / n + sp.sqrt((cover + price + sp.log(1 / delta)) / (2 * n))
    return Statement(
        "covering",
        f"Error of the pruned network by one finite cover, {depth} layers",
        sp.Le(risk, value),
        (ramp, error, gamma, n, delta, price, radius, *symbols),
        ("||x|| <= D_x for every input", "||W_l|| <= s_l, ||b_l|| <= B_l", "activations 1-Lipschitz with value 0 at 0"),
        "Suzuki et al. 2018/2020 (arXiv:1808.08558)",
        DERIVED,
    )


def dudley(depth: int = 2) -> Statement:
    """Return the entropy-integral bound for `depth` layers with biases.

    Args:
        depth: number of layers L.

    Returns:
        The statement; inputs (r_n, e, gamma, n, delta, C, D_x, P, s, B), where C is the total price in nats, P the
        number of parameters, and gamma, s, B are already powers of two.

    Raises:
        ValueError: if depth < 1.

    Source: Bartlett, Foster and Telgarsky 2017, Lemma A.5, for the chaining; the rest derived here.
    """
    check_count("depth", depth)
    ramp, error, gamma, n, delta, price, radius, count, s, b, risk = positive("r_n e gamma n delta C D_x P s B r")
    reach, at = sp.Integer(0), radius
    for layer in range(1, depth + 1):
        reach += s ** (depth - layer) * (at + 1)
        at = s * at + b
    k = 2 * sp.Max(s, b) * reach * sp.sqrt(2) / gamma
    variance = 6 * sp.sqrt(count / n * (1 + sp.log(1 + 4 * k)))
    value = ramp + sp.sqrt(2) / gamma * error + variance + sp.sqrt((price + sp.log(1 / delta)) / (2 * n))
    return Statement(
        "dudley",
        f"Error of the pruned network by Dudley's integral, {depth} layers",
        sp.Le(risk, value),
        (ramp, error, gamma, n, delta, price, radius, count, s, b),
        ("||x|| <= D_x for every input", "||W_l|| <= s, ||b_l|| <= B", "activations 1-Lipschitz with value 0 at 0"),
        "Bartlett, Foster and Telgarsky 2017, Lemma A.5; Suzuki et al. 2018/2020",
        DERIVED,
    )


def recurrent(steps: int = 3) -> list[Statement]:
    """Return the two bounds on a pruned recurrent layer's output error for sequences of `steps` steps.

    Args:
        steps: length T of the sequences.

    Raises:
        ValueError: if steps < 1.

    Source: setting of arXiv:2105.10832; derived here.
    """
    check_count("steps", steps)
    error, own, gain, loss, growth = positive("e D_o gamma_o D_h gamma_h")
    lam, c, s, readout, rows = positive("lambda c s R_o R")
    sums = [
        sum((base**k for k in range(last)), sp.Integer(0))
        for base, last in ((growth, steps - 1), (sp.sqrt(c * s) * rows, steps))
    ]
    common = ("time-mean second moment of the hidden states", "sigma 1-Lipschitz, elementwise", f"T = {steps} steps")
    return [
        Statement(
            "recurrent_certificate",
            "Output error of a pruned recurrent layer, from measured errors and gains",
            sp.Le(error, sp.sqrt(own) + gain * sp.sqrt(loss) * sums[0]),
            (own, gain, loss, growth),
            (*common, "D, gamma: local errors and gains of readout and recurrence"),
            "setting of arXiv:2105.10832",
            DERIVED,
        ),
        Statement(
            "recurrent_a_priori",
            "Output error of a pruned recurrent layer, from lambda and norms",
            sp.Le(error, sp.sqrt(c * lam) * readout * sums[1]),
            (lam, c, s, readout, rows),
            (*common, "c, s: feasibility of the kept nodes", "R = sqrt(m) max_j ||W_h[j]||, R_o = ||W_o||_F"),
            "setting of arXiv:2105.10832",
            DERIVED,
        ),
    ]


def _published() -> Statement:
    risk, ramp, d1, d2, constant, reach, tail = positive("Psi Psi_n delta_1 delta_2 C_1 R_max R_nt")
    return Statement(
        "theorem_2_published",
        "Shape of the published generalization bound: bias delta_1 and variance delta_2",
        sp.Le(risk, ramp + d1 + constant * reach * (d2 + d2**2 + sp.sqrt(tail))),
        (ramp, d1, d2, constant, reach, tail),
        ("C_1 is an unspecified universal constant", "delta_1: approximation error", "delta_2^2 ~ parameters / n"),
        "Suzuki et al. 2018/2020 (arXiv:1808.08558), Theorem 2",
        RECALLED,
        numeric=False,
    )


#: All statements by name: spectral pruning, uncompressed networks, norms, noise stability, PAC-Bayes.
STATEMENTS: dict[str, Statement] = {
    item.name: item
    for item in [
        *(_power_law(), *_sampling(), approximation(), _occam(), covering(), dudley(), *recurrent(), _published()),
        *symbolic_uncompressed.statements(),
        *symbolic_norms.statements(),
        *symbolic_noise_stability.statements(),
        *symbolic_pac_bayes.statements(),
    ]
}


@dataclass(frozen=True)
class PolynomialRate:
    """Bias-variance balance for a power-law spectrum, as derived by SymPy.

    Attributes:
        objective: a m^(-1/(2 beta)) + b m / sqrt(n).
        width: m*, the stationary point.
        value: the objective at m*.
        width_exponent: d log m* / d log n.
        rate_exponent: d log value / d log n.
        symbols: (a, b, beta, n, m).
    """

    objective: sp.Expr
    width: sp.Expr
    value: sp.Expr
    width_exponent: sp.Expr
    rate_exponent: sp.Expr
    symbols: tuple[sp.Symbol, ...]


def polynomial_rate() -> PolynomialRate:
    """Derive the best width and the rate when eigenvalues fall like j^(-1/beta).

    The bias a m^(-1/(2 beta)) falls with the width m, the variance b m / sqrt(n) rises; SymPy solves
    d/dm = 0 in log m (where the equation is linear) and reads off the exponents of n.

    Returns:
        m* ~ n^(beta / (1 + 2 beta)) and value ~ n^(-1 / (2 (1 + 2 beta))), with their derivation.

    Source: rate of Suzuki et al. 2018/2020 (arXiv:1808.08558) up to logarithms; derived here.
    """
    a, b, beta, n, m = positive("a b beta n m")
    bias, variance = a * m ** (-1 / (2 * beta)), b * m / sp.sqrt(n)
    log_m = sp.Symbol("v", real=True)
    falling = sp.expand_log(sp.log(-sp.diff(bias, m)).subs(m, sp.exp(log_m)), force=True)
    rising = sp.expand_log(sp.log(sp.diff(variance, m)), force=True)
    (solution,) = sp.solve(sp.Eq(falling, rising), log_m)
    width = sp.simplify(sp.exp(solution))
    value = bias.subs(m, width) + variance.subs(m, width)
    log_n = sp.Symbol("t", real=True)

    def exponent(expression: sp.Expr) -> sp.Expr:
        logarithm = sp.expand_log(sp.log(expression.subs(n, sp.exp(log_n))), force=True)
        return sp.factor(sp.simplify(sp.diff(logarithm, log_n)))

    # Bias and variance have the same exponent at the optimum, so either one gives the rate; the tests check both.
    return PolynomialRate(
        bias + variance,
        width,
        value,
        exponent(width),
        exponent(variance.subs(m, width)),
        (a, b, beta, n, m),
    )


def power_law_constant() -> sp.Expr:
    """Derive pi beta / sin(pi beta), the constant of the power-law degrees of freedom, by symbolic integration.

    With x = (mu_0/lambda)^beta u^beta the integral of 1 / (1 + (lambda/mu_0) x^(1/beta)) over x > 0 becomes
    (mu_0/lambda)^beta times beta * integral_0^inf u^(beta - 1) / (1 + u) du; SymPy evaluates the latter.

    Returns:
        The constant as a function of beta in (0, 1).

    Source: derived here.
    """
    beta, u = positive("beta u")
    return sp.simplify(sp.integrate(beta * u ** (beta - 1) / (1 + u), (u, 0, sp.oo), conds="none"))
