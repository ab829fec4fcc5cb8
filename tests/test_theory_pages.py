"""The theory pages of the documentation: formulas are those of the code, names and tests exist, examples run."""

import ast
import functools
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import specprune
import specprune.bounds
from specprune.bounds import STATEMENTS
from specprune.bounds.statement import DERIVED, RECALLED, STANDARD

ROOT = Path(specprune.__file__).parent.parent
DOCS = ROOT / "docs"
THEORY = sorted((DOCS / "theory").glob("*.md"))
PAGES = [*THEORY, DOCS / "choosing-a-bound.md"]
THEOREMS = [page for page in THEORY if page.name != "index.md"]
SECTIONS = ["Statement", "Proof sketch", "In the code", "How it is tested", "What it does not say", "Source"]
TAGS = {DERIVED: "derived here", STANDARD: "the paper's", RECALLED: "as recalled"}
BLOCK = re.compile(r"<!-- statement: (\w+) -->\n\n\$\$\n(.*?)\n\$\$\n\n\((.*?): `STATEMENTS\[\"(\w+)\"\]`\)", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
each_theorem = pytest.mark.parametrize("page", THEOREMS, ids=lambda page: page.stem)


def statement_faults(text: str) -> list[str]:
    """Return what is wrong with the formulas of a page."""
    blocks = BLOCK.findall(text)
    whole = len(blocks) == text.count("<!-- statement:") == text.count("`STATEMENTS[")
    faults = [] if whole else ["a block is malformed"]
    for name, formula, tag, again in blocks:
        if name not in STATEMENTS:
            faults.append(f"{name}: no such statement")
        elif "".join(formula.split()) != "".join(STATEMENTS[name].latex().split()):
            faults.append(f"{name}: the formula is not {STATEMENTS[name].latex()}")
        elif tag != TAGS[STATEMENTS[name].provenance] or again != name:
            faults.append(f'{name}: expected ({TAGS[STATEMENTS[name].provenance]}: `STATEMENTS["{name}"]`) below it')
    return faults


def unresolved(text: str) -> list[str]:
    """Return the dotted names of the package in a text that do not exist."""
    return [name for name in sorted(set(re.findall(r"\bspecprune(?:\.[A-Za-z_]\w*)+", text))) if not resolves(name)]


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@functools.cache
def functions_of(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def missing_tests(text: str) -> list[str]:
    """Return the tests named in a text that do not exist."""
    named = set(re.findall(r"(tests/\w+\.py)(?:::(\w+))?", text))
    return [f"{file}::{name}" for file, name in sorted(named) if name not in functions_of(ROOT / file)]


def broken_links(text: str, page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if not (page.parent / target).exists()]


def blocks_of(text: str) -> str:
    return "\n".join(PYTHON.findall(text))


@each_page
def test_formulas_are_those_of_the_package(page):
    assert statement_faults(page.read_text()) == []


def test_every_statement_is_on_exactly_one_page():
    counts = Counter(name for page in PAGES for name, *_ in BLOCK.findall(page.read_text()))
    assert counts == dict.fromkeys(STATEMENTS, 1)


def test_every_name_of_the_bounds_is_on_a_page():
    code = " ".join(part for page in PAGES for part in re.findall(r"`([^`\n]+)`", page.read_text()))
    assert [name for name in specprune.bounds.__all__ if not re.search(rf"\b{name}\b", code)] == []


@each_page
def test_names_resolve(page):
    assert unresolved(page.read_text()) == []


@each_page
def test_named_tests_exist(page):
    assert missing_tests(page.read_text()) == []


@each_page
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(), page) == []


@each_page
def test_no_line_is_lost(page):
    assert [line for line in page.read_text().splitlines() if line.lstrip().startswith("%")] == []  # a comment in MyST


@each_page
def test_examples_run(page, capsys):
    source = blocks_of(page.read_text())
    assert source
    exec(compile(source, str(page), "exec"), {"__name__": "page"})  # assertions in the examples are part of the test


@each_theorem
def test_pages_have_all_parts(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    proof = text.split("## Proof sketch")[1].split("## In the code")[0]
    tests = text.split("## How it is tested")[1].split("## What it does not say")[0]
    assert len(proof.splitlines()) >= 8
    assert tests.count("tests/") >= 3


def test_every_page_is_on_the_map_and_in_the_contents():
    text = (DOCS / "theory" / "index.md").read_text()
    contents = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)).split()
    rows = re.findall(r"^\| \[[^]]+\]\(([\w-]+)\.md\) \|", text, re.MULTILINE)
    names = sorted(page.stem for page in THEOREMS)
    assert sorted(name for name in contents if not name.startswith(":") and name in names) == names
    assert sorted(rows) == names


def test_numbers_of_the_guide_are_the_measured_ones():
    """Rows of the guide that have a twin in the measured table have its numbers."""
    measured, guide = ((DOCS / name).read_text() for name in ("bounds.md", "choosing-a-bound.md"))
    for name, twin in [
        ("Clopper-Pearson", "test set, Clopper-Pearson (reference line)"),
        ("Gaussian posterior", "trained Gaussian posterior, PAC-Bayes"),
        ("Theorem A", "Theorem A: Occam (kl), 3 and 2 bits a weight"),
        ("Matrix projection, coded", "Arora's matrix projection, coded (Occam kl)"),
        ("Theorem D", "Theorem D: disagreement + Theorem A"),
        ("Theorems B, C", "Theorem B, C: one cover, Dudley"),
        ("Theorem E", "Theorem E; weights cut to low rank"),
        ("Neyshabur 2015; Golowich 2018", "Neyshabur 2015; Golowich 2018"),
        ("Neyshabur 2018", "Neyshabur 2018; Bartlett 2017"),
    ]:
        here = re.search(rf"^\| \[{re.escape(name)}\].*$", guide, re.MULTILINE)
        there = re.search(rf"^\| {re.escape(twin)} \|.*$", measured, re.MULTILINE)
        assert here, name
        assert there, twin
        assert here[0].split("|")[-3:] == there[0].split("|")[-3:]


def test_the_checks_can_fail():
    good = (
        '<!-- statement: disagreement -->\n\n$$\nr \\leq U + r_{c}\n$$\n\n(derived here: `STATEMENTS["disagreement"]`)'
    )
    assert statement_faults(good) == []
    for old, new in [
        ("U + r", "2 U + r"),
        ("derived here", "as recalled"),
        ("$$\n\n(", "$$\n("),
        ("ent -->", "ents -->"),
    ]:
        assert statement_faults(good.replace(old, new)) != []
    assert unresolved("`specprune.bounds.occam_bound` and `specprune.bounds.occam_bond`") == [
        "specprune.bounds.occam_bond"
    ]
    assert unresolved("`specprune.bounds.code_length.nothing`") == ["specprune.bounds.code_length.nothing"]
    assert missing_tests("`tests/test_occam.py::test_kraft_of_integers_and_bits`") == []
    assert missing_tests("`tests/test_occam.py::test_nothing` tests/test_none.py") != []
    assert broken_links("[a](occam.md) [b](nowhere.md) [c](https://example.org)", THEOREMS[0]) == ["nowhere.md"]
