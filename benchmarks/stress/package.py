"""Build the source distribution and the wheel, look at what is in them, and run the demo from the wheel alone.

The wheel is installed into a fresh environment that has nothing but the pinned libraries, and runs in an empty folder
without the repository.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from specprune._files import write_text
from specprune._records import format_table, to_json

sys.path.insert(0, str(Path(__file__).parents[1]))

from pruning_quality import where_run

ROOT = Path(__file__).parents[2]
_MOST = 1 << 20  # bytes of either file
_SUFFIXES = (".py", ".typed", ".mplstyle", ".html", ".css", ".js", ".md", ".csv", ".gz", ".spnw", ".npz", ".json")
_BESIDE = {"PKG-INFO", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg"}
_RESULTS = ("spectra.json", "prune.json", "tradeoff.json", "bounds.json", "digits-pruned.npz", "bias_variance.png")


def build(folder: Path) -> tuple[Path, Path]:
    """Build both from the committed files alone; return the source distribution and the wheel."""
    source = folder / "source"
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(source, filter="data")
    for kind in ("sdist", "wheel"):
        code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, check=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def tracked() -> set[str]:
    """Return the files of the package that git knows."""
    listed = subprocess.run(["git", "ls-files", "specprune"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def faults_of_names(names: set[str], kind: str) -> list[str]:
    """Return what is missing, and what does not belong."""
    inside = {name for name in names if name.startswith("specprune/")}
    found = [f"{kind} lacks {name}" for name in sorted(tracked() - inside)]
    found += [f"{kind} has {name}" for name in sorted(inside - tracked())]
    found += [f"{kind} has {name}" for name in sorted(inside) if not name.endswith(_SUFFIXES)]
    others = {name for name in names - inside if "-info/" not in name and name not in _BESIDE}
    return found + [f"{kind} has {name}" for name in sorted(others)]


def members(path: Path) -> set[str]:
    """Return the names of the files in an archive, without the top folder of a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        names = (member.name.partition("/")[2] for member in archive if member.isfile())
        return {name.replace("specprune.egg-info/", "egg-info/") for name in names}


def demo_from(wheel: Path, folder: Path) -> tuple[list[str], float]:
    """Install the wheel into a bare environment and run the demo there; return faults and seconds of the demo."""
    bare, place = folder / "bare", folder / "place"
    place.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    python = bare / "bin" / "python"
    limits = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *limits, str(wheel)], check=True)
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SPECPRUNE_DATA")}
    own["OMP_NUM_THREADS"] = "1"  # as `make demo` has it
    began = time.monotonic()
    words = [str(bare / "bin" / "specprune"), "demo", "--out", "demo"]
    done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return [f"the demo ended with {done.returncode}: {done.stderr[-300:]}"], seconds
    return [f"the demo left no {name}" for name in _RESULTS if not (place / "demo" / name).is_file()], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/stress"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch))
        for path, kind in zip(built, ("source distribution", "wheel"), strict=True):
            names, size = members(path), path.stat().st_size
            found = faults_of_names(names, kind)
            if size > _MOST:
                found.append(f"{kind} has {size} bytes, more than {_MOST}")
            rows.append({"what": kind, "files": len(names), "bytes": size, "seconds": None, "faults": len(found)})
            faults += found
        found, seconds = demo_from(built[1], Path(scratch))
        rows.append({"what": "demo from the wheel", "files": len(_RESULTS), "seconds": seconds, "faults": len(found)})
        faults += found
    print(format_table(rows))
    for fault in faults:
        print(f"   {fault}")
    write_text(
        options.out / "package.json",
        to_json({**where_run("specprune", "torch", "numpy"), "rows": rows, "faults": faults}) + "\n",
    )
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
