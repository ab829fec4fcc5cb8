"""The house has one direction: bounds <- compress <- analysis <- figures <- cli, and testbed stands aside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import specprune

ROOT = Path(specprune.__file__).parent
PRIVATE = {"_files", "_records"}
ALLOWED = {
    "bounds": set(),
    "compress": {"bounds"},
    "analysis": {"bounds", "compress"},
    "testbed": set(),
    "figures": {"bounds", "compress", "analysis", "testbed", "_measures", "_trends"},
}
MODULES = sorted(path for part in ALLOWED for path in (ROOT / part).rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Return every dotted name that a module's text imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def broken_rules(part: str, source: str) -> list[str]:
    """Return the parts of the package that a module of `part` may not import, and does."""
    found = imported_modules(source)
    inside = {name.split(".")[1] for name in found if name.startswith("specprune.")}
    parts = {name for name in inside if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()}
    if "specprune" in found and part != "figures":  # the package itself imports all parts; figures ask its version
        parts.add("specprune")
    return sorted(parts - ALLOWED[part] - {part} - PRIVATE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert broken_rules(path.relative_to(ROOT).parts[0], path.read_text()) == []


def test_the_rule_can_fail():
    assert broken_rules("bounds", "from specprune.compress import prune") == ["compress"]
    assert broken_rules("compress", "def f():\n    import specprune.analysis.tradeoff") == ["analysis"]
    assert broken_rules("testbed", "import specprune") == ["specprune"]


def test_every_module_was_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(ALLOWED)


def test_bounds_need_neither_torch_nor_matplotlib():
    allowed = {"numpy", "scipy", "sympy", "specprune"}
    for path in (ROOT / "bounds").rglob("*.py"):
        tops = {name.split(".")[0] for name in imported_modules(path.read_text())}
        assert tops <= allowed | set(sys.stdlib_module_names), path


def test_import_is_quiet_and_leaves_matplotlib_alone():
    script = "import sys, specprune; print('matplotlib.pyplot' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
    assert done.stderr == ""


def test_the_public_names_of_the_contract_exist():
    for name in ("layer_spectra", "prune", "save_pruned", "load_pruned", "tradeoff", "bound_table"):
        assert callable(getattr(specprune, name))
