"""What a theorem is as a formula: a SymPy inequality with its symbols, assumptions, source and provenance."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

from specprune._records import escape_latex

#: Where a statement's constants come from.
DERIVED = "form after the source, constants derived here"
STANDARD = "standard result, stated as in the source"
RECALLED = "form recalled, not checked against the source's text; its constant is unknown, so it gives no number"
_GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "kappa", "lambda", "mu", "rho", "sigma", "theta")
_LETTERS = "|".join(_GREEK)
_SYMBOL = re.compile(rf"\b(?P<base>{_LETTERS}|[A-Za-z](?=_))(?:_(?P<index>[A-Za-z0-9]+))?(?![A-Za-z0-9_])")


@dataclass(frozen=True)
class Statement:
    """One theorem as a formula.

    Attributes:
        name: key in `STATEMENTS`.
        title: one line in words.
        expression: the inequality, quantity on the left or (for a sample size) bounded below on the right.
        symbols: the formula's inputs, in the order that `lambdify` takes them.
        assumptions: conditions in words.
        source: publication and theorem.
        provenance: where the form and the constants come from.
        numeric: False where an unknown constant forbids numbers.
        conclusion: in words, where the formula is no conclusion but a last condition that suffices.
    """

    name: str
    title: str
    expression: sp.Rel
    symbols: tuple[sp.Symbol, ...]
    assumptions: tuple[str, ...]
    source: str
    provenance: str
    numeric: bool = True
    conclusion: str = ""

    def latex(self) -> str:
        """Return the inequality as LaTeX, without dollar signs."""
        return sp.latex(self.expression)

    def slide(self) -> str:
        """Return a LaTeX block for slides or notes: title, formula, assumptions, source and provenance.

        It needs no package but amsmath.
        """
        assumptions = "\n".join(rf"  \item {words_to_latex(item)}" for item in self.assumptions)
        conclusion = f"Then {words_to_latex(self.conclusion)}.\n\n" if self.conclusion else ""
        return (
            f"\\paragraph{{{words_to_latex(self.title)}}}\n\\[\n{self.latex()}\n\\]\n"
            f"\\begin{{itemize}}\n{assumptions}\n\\end{{itemize}}\n{conclusion}"
            f"Source: {words_to_latex(self.source)} ({words_to_latex(self.provenance)}).\n"
        )

    def theorem(self) -> str:
        r"""Return a LaTeX theorem: title, assumptions, formula, and below it source and provenance.

        It needs an environment `theorem`, such as `\newtheorem{theorem}{Theorem}` makes, and the packages amsmath and
        graphicx: a formula wider than the page is scaled down to it.
        """
        assumptions = "\n".join(rf"  \item{{}} {words_to_latex(item)}" for item in self.assumptions)
        joint = "and" if self.conclusion else "Then"
        conclusion = f"Then {words_to_latex(self.conclusion)}.\n" if self.conclusion else ""
        return (
            f"\\begin{{theorem}}[{{{words_to_latex(self.title)}}}]\\label{{thm:{self.name}}}\n"
            f"Suppose that\n\\begin{{itemize}}\n{assumptions}\n\\end{{itemize}}\n{joint}\n"
            f"\\[\n\\setbox0=\\hbox{{$\\displaystyle {self.latex()}$}}%\n"
            "\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\box0}\\else\\box0\\fi\n\\]\n"
            f"{conclusion}\\end{{theorem}}\n"
            f"\\noindent{{\\footnotesize Source: {words_to_latex(self.source)} ({words_to_latex(self.provenance)}).}}\n"
        )

    def lambdify(self) -> Callable[..., float]:
        """Return the right-hand side as a function of `symbols`, in NumPy.

        Raises:
            ValueError: if the statement has an unknown universal constant.
        """
        if not self.numeric:
            raise ValueError(f"{self.name} has an unknown constant ({self.provenance}); use it for display only")
        return sp.lambdify(self.symbols, self.expression.rhs, modules="numpy")


def positive(names: str) -> tuple[sp.Symbol, ...]:
    """Return positive symbols for names separated by spaces."""
    return tuple(sp.symbols(names, positive=True, seq=True))


def words_to_latex(text: str) -> str:
    """Return a statement's words as LaTeX: Greek letters that are spelled out, and symbols with an index, as formulas.

    Args:
        text: such as "mu_j <= mu_0 for all j".
    """
    parts, at = [], 0
    for found in _SYMBOL.finditer(text):
        base, index = found.group("base"), found.group("index")
        symbol, below = (f"\\{name}" if name in _GREEK else name for name in (base, index))
        parts += [escape_latex(text[at : found.start()]), f"${symbol}{'' if index is None else f'_{{{below}}}'}$"]
        at = found.end()
    return "".join([*parts, escape_latex(text[at:])])
