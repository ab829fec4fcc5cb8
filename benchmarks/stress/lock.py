"""Write requirements.lock: the versions of constraints.txt with the SHA-256 of every file that an index has of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from specprune._files import write_text

ROOT = Path(__file__).parents[2]
_HEAD = """\
# Every package that the tests need but torch, with the SHA-256 of all its files; made by `make lock`.
# torch and what a CUDA build of it brings have constraints.txt alone: which build is right depends on the machine.
"""
_ENTRY = re.compile(r"^(\S[^\n]*==[^\n]*\n(?:    --hash[^\n]*\n)+)", re.MULTILINE)
_OWN_WAY = ("torch==", "cuda-", "nvidia-", "triton==")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.lock"
        silent = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        kinds = ["--generate-hashes", "--strip-extras", "--allow-unsafe", "--extra", "test", "--extra", "dev"]
        limits = [
            "--constraint",
            str(ROOT / "constraints.txt"),
            "--output-file",
            str(raw),
            str(ROOT / "pyproject.toml"),
        ]
        subprocess.run([sys.executable, "-m", "piptools", "compile", *silent, *kinds, *limits], check=True)
        entries = _ENTRY.findall(raw.read_text(encoding="utf-8"))
    kept = [entry for entry in entries if not entry.startswith(_OWN_WAY)]
    write_text(ROOT / "requirements.lock", _HEAD + "".join(kept))


if __name__ == "__main__":
    main()
