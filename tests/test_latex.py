"""LaTeX: tables in the manner of booktabs, theorems, and the document that inputs all of them."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import specprune
from specprune._latex import write_latex
from specprune._records import escape_latex, to_latex_table
from specprune.analysis.comparison import compare
from specprune.bounds.statement import words_to_latex
from specprune.bounds.symbolic import STATEMENTS
from specprune.cli import main


def check(text):
    """Braces and environments are balanced, and all rows of a tabular have as many cells as it has columns."""
    bare = re.sub(r"\\[\\{}&%$#_]", " ", text.replace("\\\\\n", "ROW\n"))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    assert bare.count("$") % 2 == 0
    for places, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 2
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(places)}
        assert re.findall(r"\\(\w+rule)", body) == ["toprule", "midrule", "bottomrule"]


def test_the_check_can_fail():
    good = to_latex_table([{"a": 1, "b": 2}])
    check(good)
    for bad in (good + "{", good.replace("1 & 2", "1"), good.replace(r"\end{tabular}", ""), good + "$"):
        with pytest.raises(AssertionError):
            check(bad)


def test_a_table_by_hand():
    records = [
        {"name": "a_1 & <b>", "value": 1.5, "size": 12345.678, "kept": None, "widths": [3, 4], "ok": True},
        {"name": "[c] 5 %", "value": -0.25, "size": float("inf"), "kept": -2, "widths": [], "ok": np.bool_(False)},
    ]
    text = to_latex_table(records, {"name": "the {name}", "value": "value", "size": "size", "kept": "kept", "ok": "ok"})
    assert text == (
        "\\begin{tabular}{lrrrr}\n\\toprule\nthe \\{name\\} & value & size & kept & ok \\\\\n\\midrule\n"
        "a\\_1 \\& $<$b$>$ & 1.5 & $1.235 \\cdot 10^{4}$ & - & yes \\\\\n"
        "{}[c] 5 \\% & $-0.25$ & $\\infty$ & $-2$ & no \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
    check(text)
    floating = to_latex_table(records, ["name", "widths"], "Widths, 5 %")
    assert floating.startswith("\\begin{table}\n\\centering\n\\caption{Widths, 5 \\%}\n\\begin{tabular}{lr}")
    assert "3 4" in floating
    check(floating)
    marked = to_latex_table(records, ["value"], mark=lambda record, name, cell: f"\\textbf{{{cell}}}{name[0]}")
    assert r"\textbf{1.5}v \\" in marked
    for nothing in ([], [{}]):
        with pytest.raises(ValueError, match="at least one of each"):
            to_latex_table(nothing)


def test_words():
    assert escape_latex("||x|| <= a\\b ~ 2^3") == (
        r"$\|$x$\|$ $\leq$ a\textbackslash{}b \textasciitilde{} 2\textasciicircum{}3"
    )
    assert (
        words_to_latex("mu_j <= 2 mu_0 and delta, r_gamma")
        == r"$\mu_{j}$ $\leq$ 2 $\mu_{0}$ and $\delta$, $r_{\gamma}$"
    )
    assert words_to_latex("a_long_name, deltas, e^C_F") == r"a\_long\_name, deltas, e\textasciicircum{}$C_{F}$"


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_is_a_theorem(name):
    statement = STATEMENTS[name]
    text = statement.theorem()
    check(text)
    assert text.startswith(r"\begin{theorem}[{")
    assert f"\\label{{thm:{name}}}" in text
    assert statement.latex() in text
    assert text.count(r"\item") == len(statement.assumptions)
    # A condition that suffices stands before "Then", the conclusion behind it.
    before, _, behind = text.partition("Then")
    assert (statement.latex() in before) == bool(statement.conclusion)
    assert words_to_latex(statement.conclusion) in behind
    sufficient = {"samples_explicit", "samples_bach", "matrix_projection_size", "noise_stable_accuracy"}
    assert (name in sufficient) == bool(statement.conclusion)
    below = text.partition(r"\end{theorem}")[2]
    assert words_to_latex(statement.source) in below
    assert words_to_latex(statement.provenance) in below


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
    inputs = torch.randn(300, 5)
    return model, [(inputs, (inputs[:, 0] > 0).long())]


def test_results_have_tables(network):
    model, batches = network
    for method in ("spectral", "alds", "pfp"):
        report = specprune.prune(model, batches, 0.6, method=method).report
        text = report.to_latex()
        check(text)
        assert text.count(r"\\") == 1 + len(report.to_records())
    both = specprune.prune(model, batches, 0.6, method="hybrid").report.to_latex()
    check(both)
    spectra = specprune.layer_spectra(model, batches)
    check(spectra.to_latex())
    assert spectra.to_latex().count(r"\\") == 1 + len(spectra)
    found = compare(model, batches, batches, keeps=(0.6,), methods=("spectral", "ALDS"), latency=False)
    check(found.to_latex())
    assert found.to_latex().count(r"\\") == 1 + len(found.points)


def test_files(tmp_path):
    table = to_latex_table([{"a": 1}])
    paths = write_latex(tmp_path, {"mine": table})
    assert paths[-1] == tmp_path / "main.tex"
    names = {path.relative_to(tmp_path).as_posix() for path in paths}
    assert names == {
        *(f"statements/{name}.tex" for name in STATEMENTS),
        "tables/mine.tex",
        "tables/rates.tex",
        "main.tex",
    }
    main_text = paths[-1].read_text()
    check(main_text)
    inputs = re.findall(r"\\input\{([\w/]+)\}", main_text)
    assert {f"{name}.tex" for name in inputs} == names - {"main.tex"}
    for path in paths:
        check(path.read_text())
    with pytest.raises(ValueError, match="called 'rates'"):
        write_latex(tmp_path, {"rates": table})


def test_the_command_without_a_network(tmp_path, capsys):
    assert main(["latex", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "main.tex")
    assert (tmp_path / "tables" / "rates.tex").exists()
    assert not (tmp_path / "tables" / "bounds.tex").exists()


@pytest.mark.slow
def test_the_command_with_a_network_and_pdflatex(tmp_path, capsys):
    assert main(["train", "--data", "digits", "--net", "mlp-24", "--epochs", "3", "--out", str(tmp_path)]) == 0
    weights = str(tmp_path / "digits-mlp-24-0.npz")
    assert main(["latex", "--weights", weights, "--keep", "0.3", "--out", str(tmp_path / "tex")]) == 0
    for name in ("spectra", "prune", "comparison", "bounds", "rates"):
        check((tmp_path / "tex" / "tables" / f"{name}.tex").read_text())
    capsys.readouterr()
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed: the files' structure was checked, nothing was compiled")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path / "tex", capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (tmp_path / "tex" / "main.pdf").stat().st_size > 10_000
