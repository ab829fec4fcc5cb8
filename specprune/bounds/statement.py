"""What a theorem is as a formula: a SymPy inequality with its symbols, assumptions, source and provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

#: Where a statement's constants come from.
DERIVED = "form after the source, constants derived here"
STANDARD = "standard result, stated as in the source"
RECALLED = "form recalled, not checked against the source's text; its constant is unknown, so it gives no number"


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
    """

    name: str
    title: str
    expression: sp.Rel
    symbols: tuple[sp.Symbol, ...]
    assumptions: tuple[str, ...]
    source: str
    provenance: str
    numeric: bool = True

    def latex(self) -> str:
        """Return the inequality as LaTeX, without dollar signs."""
        return sp.latex(self.expression)

    def slide(self) -> str:
        """Return a LaTeX block for slides or notes: title, formula, assumptions, source and provenance.

        It needs no package but amsmath.
        """
        assumptions = "\n".join(rf"  \item {_text(item)}" for item in self.assumptions)
        return (
            f"\\paragraph{{{_text(self.title)}}}\n\\[\n{self.latex()}\n\\]\n"
            f"\\begin{{itemize}}\n{assumptions}\n\\end{{itemize}}\n"
            f"Source: {_text(self.source)} ({_text(self.provenance)}).\n"
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


def _text(words: str) -> str:
    """Return plain words as LaTeX text."""
    for character, name in (("\\", r"\textbackslash "), ("^", r"\textasciicircum "), ("~", r"\textasciitilde ")):
        words = words.replace(character, name)
    for character in "&%$#_{}":
        words = words.replace(character, "\\" + character)
    return words.replace("<=", r"$\leq$").replace(">=", r"$\geq$").replace("<", r"$<$").replace(">", r"$>$")
