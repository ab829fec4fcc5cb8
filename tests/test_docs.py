"""The documentation: every page has its place, and what it shows of paths, commands and names is there."""

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specprune._arguments import build_parser
from specprune.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = {"_build", "_scripts", "api", "commands", "examples", "figures"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in GENERATED)
TEXTS = [ROOT / "README.md", *PAGES]
IDS = [str(path.relative_to(ROOT)) for path in TEXTS]


def toctree_entries(page):
    """The pages, as paths without a suffix, that the toctrees of a page name."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith(":")]
    for line in lines:
        titled = re.fullmatch(r".*<(.*)>", line)
        yield (page.parent / (titled[1] if titled else line.strip())).resolve()


def fenced(text):
    """The blocks of code in a text: (language, code)."""
    return re.findall(r"^```([\w+-]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands_shown(text):
    """The command lines of specprune in blocks of code, without comments and settings of the environment."""
    for language, code in fenced(text):
        if language in ("", "sh", "bash", "shell", "console", "text"):
            for line in code.replace("\\\n", " ").splitlines():
                found = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(specprune .*)", line)
                if found:
                    yield shlex.split(found[1], comments=True)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        found = re.match(r"(?:[A-Z_]+=\S+ )*(specprune .*)", " ".join(span.split()))
        if found:
            yield shlex.split(found[1])


def refusal(words):
    """Why the command line refuses these words; None if it takes them.

    A command that is only named needs no more than its name, and words in capitals stand for what the reader puts in.
    """
    if words[1] not in COMMANDS:
        return f"no command {words[1]!r}"
    if len(words) == 2 or any(re.fullmatch(r"[A-Z]+|\.\.\.|\S*\|\S*", word) for word in words[2:]):
        known = io.StringIO()
        with contextlib.redirect_stdout(known), contextlib.suppress(SystemExit):
            build_parser().parse_args([words[1], "--help"])
        options = {word for word in words[2:] if word.startswith("--")}
        unknown = options - set(re.findall(r"--[\w-]+", known.getvalue()))
        return f"no options {sorted(unknown)}" if unknown else None
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            build_parser().parse_args(words[1:])
    except (SystemExit, argparse.ArgumentError):
        return errors.getvalue().strip().splitlines()[-1]
    return None


def names_shown(text):
    """The dotted names of the package, and what blocks of Python import from it."""
    for name in re.findall(r"(?<![\w/.])specprune(?:\.[A-Za-z_]\w*)+(?![\w/])", text):
        if not name.endswith((".mplstyle", ".css")):
            yield name
    for language, code in fenced(text):
        if language == "python":
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("specprune"):
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)


def resolves(name):
    """Whether a dotted name leads to something: modules first, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = importlib.import_module(".".join(parts[:count]))
            return all((value := getattr(value, part, None)) is not None for part in parts[count:])
    return False


def test_every_page_is_in_a_toctree_and_every_entry_is_a_page():
    entries = {entry for page in PAGES for entry in toctree_entries(page)}
    pages = {page.with_suffix("").resolve() for page in PAGES}
    assert pages - entries == {DOCS / "index"}
    assert {entry for entry in entries - pages if entry.relative_to(DOCS).parts[0] not in GENERATED} == set()


@pytest.mark.parametrize("page", TEXTS, ids=IDS)
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    places = {(page.parent / link).resolve(): link for link in links if not re.match(r"[a-z]+:", link)}
    made = {folder.resolve() for folder in (DOCS / name for name in GENERATED)}
    assert [link for place, link in places.items() if not (place.exists() or made & set(place.parents))] == []


@pytest.mark.parametrize("page", TEXTS, ids=IDS)
def test_commands_are_taken_by_the_command_line(page):
    refused = {" ".join(words): refusal(words) for words in commands_shown(page.read_text())}
    assert {words: reason for words, reason in refused.items() if reason} == {}


@pytest.mark.parametrize("page", TEXTS, ids=IDS)
def test_names_are_there(page):
    assert [name for name in names_shown(page.read_text()) if not resolves(name)] == []


def test_the_checks_can_fail():
    text = (
        "`specprune prone`, `specprune prune --weights FILE --kep 0.3`\n\n"
        "```\nOMP_NUM_THREADS=1 specprune prune --weights a.npz --keep 30  # too large\n```\n\n"
        "`specprune.prunes`, `specprune.bounds.occam_bound`, specprune.bounds.nothing.more\n\n"
        "```python\nfrom specprune.bounds import ocam_bound, occam_bound\n```\n"
    )
    reasons = [refusal(words) for words in commands_shown(text)]
    assert len(reasons) == 3
    assert any("no command 'prone'" in reason for reason in reasons)
    assert any("no options ['--kep']" in reason for reason in reasons)
    assert any("'30': expected a fraction" in reason for reason in reasons)
    wrong = ["specprune.prunes", "specprune.bounds.nothing.more", "specprune.bounds.ocam_bound"]
    assert [name for name in names_shown(text) if not resolves(name)] == wrong


@pytest.fixture
def example_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    pytest.importorskip("sphinx", reason="the documentation's packages come with `make docs` and `make test-all`")
    return importlib.import_module("example_pages")


def test_markdown_is_translated(example_pages):
    markdown = (
        "# Title\n\nAn `x_1`, $a_i$s and **bold $N(\\lambda)$ text** of *J*, |x| and a_.\n[Here](b.md).\n\n"
        "$$\na\n  = b .$$\n\n- one\n- two\n  lines\n\n2. second\n"
    )
    assert example_pages.restructured(markdown) == (
        "Title\n=====\n\n"
        "An ``x_1``, :math:`a_i`\\ s and **bold** :math:`N(\\lambda)` **text** of *J*, \\|x\\| and a\\_.\n"
        "`Here <b.md>`__.\n\n.. math::\n\n   a\n     = b .\n\n- one\n\n- two\n  lines\n\n2. second\n"
    )
    with pytest.raises(ValueError, match="'blockquote_open'"):
        example_pages.restructured("> no\n")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_examples_keep_their_cells(example_pages, tmp_path, path):
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    script = path.read_text()
    cells = example_pages.cells(script)
    notebook = json.loads(example_pages.notebook(script))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells
    source = tmp_path / path.name
    source.write_text(example_pages.translated(script))
    blocks = split_code_and_text_blocks(source)[1]
    assert [block.type for block in blocks] == ["text" if kind == "markdown" else "code" for kind, _ in cells]
    for block, (kind, text) in zip(blocks, cells, strict=True):
        if kind == "code":
            assert block.content.strip() == text
        else:
            shown = re.sub(r"\.\. math::|:math:", "", block.content)
            assert re.sub(r"[\W_]+", "", shown) == re.sub(r"[\W_]+", "", text)


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    """As `make docs` does, in a copy; the examples are run by their own tests."""
    pytest.importorskip("sphinx", reason="the documentation's packages come with `make docs` and `make test-all`")
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", *GENERATED))
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tmp_path)
    command = ["-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-D", "plot_gallery=False"]
    done = subprocess.run(
        [sys.executable, *command, "docs", "html"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in ("index", "api/specprune.bounds", "commands/index", "examples/2_prune_by_hand", "figures/index"):
        assert (tmp_path / "html" / f"{page}.html").exists()
    reference = (tmp_path / "html" / "api" / "specprune.bounds.occam.html").read_text()
    assert 'id="specprune.bounds.occam_bound"' in reference
    assert "specprune double-descent" in (tmp_path / "html" / "commands" / "index.html").read_text()
