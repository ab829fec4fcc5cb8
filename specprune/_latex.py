"""LaTeX files to input: a theorem each, a table each, and a document that inputs all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from specprune._files import write_text
from specprune._problem import Problem
from specprune.analysis import bound_table, layer_spectra
from specprune.analysis.comparison import compare
from specprune.bounds.symbolic import STATEMENTS
from specprune.bounds.symbolic_uncompressed import rates_latex
from specprune.compress import Pruned

_PREAMBLE = r"""% Compile with pdflatex main.tex.  The other files can be input by any document with these packages.
\documentclass{article}
\usepackage[a4paper, margin=20mm]{geometry}
\usepackage{amsmath, amsthm, booktabs, graphicx, xcolor}
\newtheorem{theorem}{Theorem}
% A table wider than the page is scaled down to it.
\newcommand{\fitted}[1]{\setbox0=\hbox{#1}\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\box0}\else\box0\fi}
\begin{document}
"""


def write_latex(out: str | os.PathLike[str], tables: Mapping[str, str] | None = None) -> list[Path]:
    r"""Write every statement and every table as a file to `\input`, and `main.tex`, which inputs all of them.

    Args:
        out: the folder; statements go to its folder `statements`, tables to `tables`.
        tables: name to LaTeX of one or more tabulars; the published rates are added to them.

    Returns:
        The files, main.tex last.

    Raises:
        ValueError: a table of that name is there already.
    """
    folder = Path(out)
    if "rates" in (tables or {}):
        raise ValueError("a table may not be called 'rates': that is the one of the published rates")
    texts = {f"statements/{name}.tex": statement.theorem() for name, statement in STATEMENTS.items()}
    texts |= {f"tables/{name}.tex": text for name, text in {**(tables or {}), "rates": rates_latex() + "\n"}.items()}
    lines = [_PREAMBLE]
    for name in texts:
        stem = name.removesuffix(".tex")
        wide = name.startswith("tables/")
        lines.append(f"\\section*{{{stem.partition('/')[2].replace('_', ' ')}}}\n" if wide else "")
        lines.append(f"\\noindent\\fitted{{\\input{{{stem}}}}}\n\n" if wide else f"\\input{{{stem}}}\n\\bigskip\n\n")
    texts["main.tex"] = "".join([*lines, "\\end{document}\n"])
    paths = [folder / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def paper_tables(
    problem: Problem,
    pruned: Pruned,
    *,
    calibration: int,
    keep: float,
    delta: float,
    input_radius: float | None,
    seed: int,
) -> dict[str, str]:
    """Return the tables about a network: spectra, its pruning, all methods at equal size, and every bound.

    Args:
        problem: network and data.
        pruned: the pruned network.
        calibration: number of training samples to measure and prune on.
        keep: fraction of the FLOPs at which methods are compared.
        delta: failure probability of each bound.
        input_radius: bound on the norm of every possible input, where it is known.
        seed: of random choices.

    Returns:
        Name to LaTeX.
    """
    batches = problem.calibration(calibration)
    bounds = bound_table(
        problem.model,
        problem.train,
        pruned,
        problem.test,
        reference=problem.initial,
        delta=delta,
        input_radius=input_radius,
        seed=seed,
    )
    return {
        "spectra": layer_spectra(problem.model, batches).to_latex(),
        "prune": pruned.report.to_latex(),
        "comparison": compare(problem.model, batches, problem.test, keeps=(keep,), latency=False).to_latex(),
        "bounds": bounds.to_latex(),
    }
