"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

METHODS = ("hybrid", "refit", "alds")
README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_lines_of_python_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "degrees" in printed or "dof" in printed
    assert "Occam (kl)" in printed
    assert names["result"].report.flops_after <= 0.3 * names["result"].report.flops_before


def test_numbers_at_the_top_are_those_of_the_pages():
    """Every number of the first table that has a page stands on that page too."""
    docs = Path(__file__).parents[1] / "docs"
    certificates, bounds = ((docs / name).read_text() for name in ("certificates.md", "bounds.md"))
    assert re.search(r"certified from the training set alone: MNIST \| \*\*7\.04 %\*\* \| 11\.6 %", README)
    assert "| `mnist` | **7.04 %** | 11.6 % |" in certificates
    assert re.search(r"Fashion-MNIST \| \*\*22\.38 %\*\* \| 32\.8 %", README)
    assert "| `fashion-mnist` | **22.38 %** | 32.8 % |" in certificates
    assert "1.4 times the measured distance" in bounds
    assert "**78.7 %**" in bounds
    assert "78.7 % at best" in README
    pruning, ranks = ((docs / name).read_text() for name in ("pruning.md", "low-rank.md"))
    drop, lead = re.search(r"VGG-like, .*?\n\| 30 %.*?\n\| 20 % \| ([\d.]+) \| ([\d.]+) ", pruning, re.DOTALL).groups()
    assert (drop, lead) == ("2.34", "1.86")
    assert "| **2.3** | 4.2 (the best score with our refit), 29 (ThiNet-like)" in README
    rows = {
        name: float(re.search(rf"^\| `{name}` \| [^|]+ \| [^|]+ \| ([\d.]+) \|", ranks, re.MULTILINE)[1])
        for name in METHODS
    }
    assert (round(rows["hybrid"], 1), rows["refit"], rows["alds"]) == (0.9, 3.5, 77)
    assert "| **0.9** | 3.5 (ALDS with our refit), 77 (ALDS)" in README
