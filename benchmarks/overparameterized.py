"""Pruned least squares: limit theory against simulation, over many settings, and how long a curve takes.

Relative errors |simulation - theory| / theory of all risks; "beyond" counts those above 3 standard errors + 2 %.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis.linear_simulation import simulate_risks
from specprune.bounds.correlated_features import Estimate, ReluFeatures, correlated_risks
from specprune.bounds.overparameterized import LinearProblem
from specprune.bounds.pruned_risks import METHODS, pruned_risks


def problem(kind: str, n: int, keep: int, noise: float, features: int) -> LinearProblem:
    """Return a linear model with signal 1."""
    index = np.arange(features)
    variances, beta = np.ones(features), np.ones(features)
    if kind == "identity":
        beta = np.exp(-index / 60)
    elif kind == "spiked":
        variances[:keep] = 25
    else:
        variances = (1.0 + index) ** -0.7
    return LinearProblem(variances, beta / np.sqrt((variances * beta**2).sum()), noise, n)


def compared(case: LinearProblem, size: int, keep: int, draws: int, device: str, **labels: Any) -> dict[str, Any]:
    """Return theory, simulation and relative errors of all methods."""
    theory = pruned_risks(case, size, keep)
    simulated = simulate_risks(case, keep, size=size, draws=draws, device=device)
    record: dict[str, Any] = {**labels, "n": case.n, "size": size, "keep": keep, "noise": case.noise, "draws": draws}
    for name in METHODS:
        value, found = float(getattr(theory, name)[0]), simulated.risks[name]
        record[name] = {"theory": value, "simulated": found.value, "error": found.error}
    return record


def relative(record: dict[str, Any], name: str) -> float:
    """Return a record's relative error of one method."""
    return abs(record[name]["simulated"] / record[name]["theory"] - 1)


def beyond(record: dict[str, Any], name: str) -> bool:
    """Return whether a difference is above 3 standard errors + 2 %."""
    one = record[name]
    return bool(abs(one["simulated"] - one["theory"]) > 3 * one["error"] + 0.02 * one["theory"])


def summary(title: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return one row a method."""
    rows = []
    for name in METHODS:
        if name in records[0]:
            errors = [100 * relative(record, name) for record in records]
            noise = float(np.mean([100 * record[name]["error"] / record[name]["theory"] for record in records]))
            rows.append(
                {
                    "risk": name,
                    "settings": len(records),
                    "mean [%]": float(np.mean(errors)),
                    "largest [%]": max(errors),
                    "mean standard error [%]": noise,
                    "beyond": sum(beyond(record, name) for record in records),
                }
            )
    print(format_table(rows, title=title), flush=True)
    return rows


def random_features(device: str, draws: int) -> list[dict[str, Any]]:
    """Compare the law of random ReLU features at d = 120 and n = 600 with simulations."""
    generator = np.random.default_rng(4)
    weights, target = generator.standard_normal((1800, 120)) / np.sqrt(120), generator.standard_normal(120)
    records = []
    for size in (300, 750, 1200, 1800):
        features = ReluFeatures(weights[:size], target / np.linalg.norm(target), 0.1, 600)
        law = correlated_risks(features.equivalent(), 180, draws=10 * draws, fresh_draws=4)
        found = simulate_risks(features, 180, draws=draws, device=device).risks
        record: dict[str, Any] = {"kind": "relu", "n": 600, "size": size, "keep": 180, "draws": draws}
        for name in ("unpruned", "magnitude", "hessian", "oracle_refit"):
            value = getattr(law, name)
            mean, own = (value.value, value.error) if isinstance(value, Estimate) else (value, 0.0)
            error = float(np.hypot(own, found[name].error))
            record[name] = {"theory": mean, "simulated": found[name].value, "error": error}
        records.append(record)
    return records


def main() -> None:
    """Run everything, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200, help="training sets a setting at n = 200")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    began = time.perf_counter()
    grid = [
        compared(problem(kind, n, keep, noise, 5 * n), int(share * n), keep, draws, options.device, kind=kind)
        for n, keep, draws, noises in ((200, 40, options.draws, (0.0, 0.3)), (400, 60, options.draws // 3, (0.3,)))
        for kind in ("identity", "spiked", "power law")
        for share in (0.6, 1.3, 2, 4)
        for noise in noises
    ]
    rows = {"grid": summary("n = 200 and 400", grid)}
    large = [
        compared(problem(kind, 800, 160, 0.3, 1600), 1600, 160, 2 * options.draws, options.device, kind=kind)
        for kind in ("identity", "spiked", "power law")
    ]
    rows["n = 800"] = summary("n = 800, size 1600", large)
    relu = random_features(options.device, options.draws)
    rows["random features"] = summary("random ReLU features, d = 120, n = 600", relu)
    sizes = np.unique(np.geomspace(101, 4000, 203).astype(int))
    sizes = sizes[sizes != 200]
    start = time.perf_counter()
    pruned_risks(problem("spiked", 200, 100, 0.0, 4000), sizes, 100)
    seconds = time.perf_counter() - start
    print(
        f"all risks at {len(sizes)} sizes of p = 4000: {seconds:.1f} s; everything {time.perf_counter() - began:.0f} s"
    )
    record = {
        "versions": {name: version(name) for name in ("specprune", "torch", "numpy", "scipy")},
        "device": f"{options.device}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "curve": {"sizes": len(sizes), "features": 4000, "seconds": seconds},
        "summary": rows,
        "records": grid + large + relu,
    }
    write_text(options.out / "overparameterized.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
