"""Like for like: certificates from raw pixels alone, without pooling, edges or mirror images.

CIFAR-10 is also searched with sums of 2 x 2 pixels and mirror images, but no edges.  Where pixels are not summed, the
first layer moves in steps of two instead.  All searches read the training set alone, as `certify` does.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis.certificate_path import PUBLISHED
from specprune.analysis.certify import certify
from specprune.analysis.code_design import Design
from specprune.compress.vocabulary import CONV, LayerSpec
from specprune.testbed import load_dataset


def grey() -> Design:
    """Return the default design of 28 x 28 images, but reading single pixels in steps of two, not sums of squares."""
    first = LayerSpec(CONV, 6, 3, 2, 1, 3)
    layers = (first, LayerSpec(CONV, 6, 3, 2, 1, 3), LayerSpec(CONV, 8, 3, 2, 0, 3), last(3, 3))
    return Design(1, 1, False, layers)


def colour(pooling: int, mirror: bool) -> Design:
    """Return a design for 32 x 32 colour images, reading single pixels or sums of squares."""
    first = LayerSpec(CONV, 12, 3, 3 - pooling, 1, 2)
    layers = (first, LayerSpec(CONV, 8, 3, 2, 1, 2), LayerSpec(CONV, 8, 3, 2, 1, 2), last(4, 2))
    return Design(3, pooling, mirror, layers)


def last(side: int, levels: int) -> LayerSpec:
    """Return a layer that reads every position."""
    return LayerSpec(CONV, 10, side, 1, 0, levels, relu=False)


DESIGNS: dict[str, dict[str, Design]] = {
    "mnist": {"raw": grey()},
    "fashion-mnist": {"raw": grey()},
    "cifar10": {"raw": colour(1, False), "pooled, mirror": colour(2, True)},
}


def measure(
    data: str, name: str, design: Design, minutes: float, seed: int, folder: Path, where: str | None
) -> dict[str, Any]:
    """Return one design's certificate."""
    found = certify(load_dataset(data, where), minutes=minutes, seed=seed, design=design, out=folder).certificate
    return {
        "data": data,
        "design": name,
        "front end": found.front_end,
        "minutes": minutes,
        "seed": seed,
        "certificate": found.value,
        "published": PUBLISHED[data],
        "train_error": found.train_error,
        "test_error": found.test_errors / found.test_n,
        "bits": found.bits,
    }


def main() -> None:
    """Run what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--data-dir", help="where to look for the data first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each design")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    records = []
    for data in options.data:
        for name, design in DESIGNS[data].items():
            folder = options.out / "certificates_raw" / f"{data}-{name.replace(', ', '-')}-{options.seed}"
            records.append(measure(data, name, design, options.minutes, options.seed, folder, options.data_dir))
            print(format_table(records[-1:]), flush=True)
    record = {
        "versions": {name: version(name) for name in ("specprune", "torch", "numpy")},
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "records": records,
    }
    write_text(options.out / "certificates_raw.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
