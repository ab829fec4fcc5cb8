"""The tests under several Pythons and versions of the libraries: the oldest that are promised, the pinned, the newest.

Every environment is made from scratch in a folder of its own and kept for the next time.  A Python that this machine
does not have is reported, not skipped in silence.  On a machine where the index offers builds of torch with CUDA only,
an environment takes five gigabytes.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specprune._files import write_text
from specprune._records import format_table, to_json

ROOT = Path(__file__).parents[2]
_LIBRARIES = ("torch", "numpy", "scipy", "matplotlib", "sympy", "torch-pruning")
#: The oldest versions that pyproject.toml admits; later packages that these cannot work with are held back too.
_OLDEST = ("torch==2.6.0", "numpy==1.26.4", "scipy==1.15.0", "matplotlib==3.8.4", "sympy==1.13.1", "pyparsing<3.3")


@dataclass(frozen=True)
class Environment:
    """A Python and what is installed in it.

    Attributes:
        python: its version, such as "3.11".
        libraries: "oldest", "pinned" (constraints.txt) or "newest".
    """

    python: str
    libraries: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.python}-{self.libraries}"


MATRIX = (
    Environment("3.11", "oldest"),
    Environment("3.11", "pinned"),
    Environment("3.12", "pinned"),
    Environment("3.13", "newest"),
    Environment("3.14", "newest"),
)


def interpreter(version: str) -> str | None:
    """Return the command of a Python that works; None if this machine has none."""
    command = shutil.which(f"python{version}")
    if command is None:
        return None
    works = subprocess.run([command, "-c", "import venv"], capture_output=True, check=False)
    return command if works.returncode == 0 else None


def prepare(environment: Environment, folder: Path, command: str) -> Path:
    """Make an environment, or bring it up to date; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([command, "-m", "venv", str(folder)], check=True)
    words = [str(python), "-m", "pip", "install", "--quiet"]
    if environment.libraries == "pinned":
        words += ["--constraint", str(ROOT / "constraints.txt")]
    if environment.libraries == "newest":
        words += ["--upgrade", "--upgrade-strategy", "eager"]
    libraries = _OLDEST if environment.libraries == "oldest" else ()
    subprocess.run([*words, *libraries, "--editable", f"{ROOT}[test]"], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the libraries in an environment."""
    code = f"import importlib.metadata as m; print(*[m.version(name) for name in {_LIBRARIES!r}])"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(_LIBRARIES, found, strict=True))


def tested(python: Path, words: list[str]) -> dict[str, Any]:
    """Run pytest in an environment; return what it counted."""
    began = time.monotonic()
    command = [str(python), "-m", "pytest", "-o", "addopts=", "-m", "not slow and not gpu", "-n", "2", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "exit": done.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [environment.name for environment in MATRIX]
    parser.add_argument("--only", nargs="+", choices=names, help="by default all")
    parser.add_argument("--tests", nargs="+", default=["--dist", "loadfile"], help="words for pytest")
    parser.add_argument("--folder", type=Path, default=Path(".matrix"), help="of the environments")
    parser.add_argument("--out", type=Path, default=Path("results/stress"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for environment in MATRIX:
        if options.only and environment.name not in options.only:
            continue
        command = interpreter(environment.python)
        if command is None:
            rows.append({"environment": environment.name, "outcome": "this machine has no such Python"})
            continue
        try:
            python = prepare(environment, options.folder.resolve() / environment.name, command)
        except subprocess.CalledProcessError:
            rows.append({"environment": environment.name, "outcome": "the package index has not all that it takes"})
            continue
        found = tested(python, options.tests)
        outcome = "right" if found["exit"] == 0 else "FAILED"
        rows.append({"environment": environment.name, "outcome": outcome, **found, **versions(python)})
    print(format_table(rows))
    record = {"machine": platform.machine(), "python": platform.python_version(), "environments": rows}
    write_text(options.out / "versions.json", to_json(record) + "\n")
    print(f"[{options.out / 'versions.json'}]")
    if any(row["outcome"] == "FAILED" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
