"""Does pruning help a certificate? Pruned starts against random ones: same data, design, time and seed; paired.

Each run leaves its network and history in a folder and finished ones are not repeated, so that a stopped benchmark goes
on where it was.  A run's value after some minutes is read from its history: a random start keeps the time that the
other spends on training and pruning a larger network.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pairs import paired_interval

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis.certify import STARTS, certify
from specprune.testbed import load_dataset


def measure(data: str, seed: int, start: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Return one run's certificate, errors and bits."""
    found = certify(load_dataset(data), minutes=minutes, seed=seed, start=start, out=folder)
    certificate = found.certificate
    return {
        "data": data,
        "seed": seed,
        "start": start,
        "minutes": minutes,
        "certificate": certificate.value,
        "train_error": certificate.train_error,
        "test_error": certificate.test_errors / certificate.test_n,
        "bits": certificate.bits,
        "improvements": len(found.history),
    }


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a data set: means, and the paired difference (random minus pruned) with its 95 % t interval."""
    rows = []
    for data in sorted({record["data"] for record in records}):
        own = {start: {r["seed"]: r for r in records if (r["data"], r["start"]) == (data, start)} for start in STARTS}
        seeds = sorted(set(own["pruned"]) & set(own["scratch"]))
        if not seeds:
            continue
        values = {start: [100 * own[start][seed]["certificate"] for seed in seeds] for start in STARTS}
        ahead, half = paired_interval(values["scratch"], values["pruned"])
        rows.append(
            {
                "data": data,
                "seeds": len(seeds),
                "minutes": own["pruned"][seeds[0]]["minutes"],
                "pruned [%]": sum(values["pruned"]) / len(seeds),
                "scratch [%]": sum(values["scratch"]) / len(seeds),
                "lowest [%]": min(min(own_values) for own_values in values.values()),
                "pruned ahead by": ahead,
                "+-": half,
            }
        )
    return rows


def main() -> None:
    """Run what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--minutes", type=float, default=5.0, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    records = []
    for seed in options.seeds:
        for data in options.data:
            for start in STARTS:
                folder = options.out / "certificates" / f"{data}-{start}-{seed}-{options.minutes:g}min"
                records.append(measure(data, seed, start, options.minutes, folder))
                print(format_table(records[-1:]), flush=True)
    rows = compared(records)
    print(format_table(rows, title="certified error"))
    record = {
        "versions": {name: version(name) for name in ("specprune", "torch", "numpy")},
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "rows": rows,
        "records": records,
    }
    write_text(options.out / "certificates.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
