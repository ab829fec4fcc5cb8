"""Paired comparisons over training seeds, and the tables of the pruning benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Record = Mapping[str, Any]
FAMILIES = {"tp": "best Torch-Pruning rule", "thinet": "ThiNet-like", "refit": "best score + refit"}


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the mean difference of paired measurements and the half-width of its t interval (NaN for one pair).

    Raises:
        ValueError: no pairs, or unequal numbers.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"pairs need equal, positive numbers of measurements, got {len(first)} and {len(second)}")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    if count == 1:
        return float(differences[0]), math.nan
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * differences.std(ddof=1) / math.sqrt(count)
    return float(differences.mean()), float(half)


def family(method: str) -> str:
    """Return what kind of method it is: "ours", "tp", "thinet" or "refit"."""
    return method.partition(":")[0]


def counted_accuracy(record: Record) -> float:
    """Return the accuracy that counts, in percent: ours as it is, of a rival the better of raw and renormed."""
    if record.get("tuned_accuracy") is not None:  # after one epoch with labels
        return 100 * float(record["tuned_accuracy"])
    if family(record["method"]) == "ours":
        return 100 * float(record["accuracy"])
    return 100 * max(float(record["accuracy"]), float(record["accuracy_norms"]))


def counted_kl(record: Record) -> float:
    """Return the divergence from the full network's outputs of the version that counts for a rival, in nats."""
    if family(record["method"]) == "ours":
        return float(record["kl"])
    return min(float(record["kl"]), float(record["kl_norms"]))


def summary(records: Iterable[Record], ours: str) -> list[dict[str, Any]]:
    """Return one row for every task, budget and method: means, and our paired difference to it.

    Args:
        records: finished runs, one for each (task, seed, keep, method).
        ours: the method that the others are compared with.

    Returns:
        Rows sorted by task, falling budget, falling accuracy; "ours_minus" and "half_width" in points of accuracy and
        "ln_kl" in logarithms of the divergence, each over the seeds that both have.
    """
    cells: dict[tuple[str, float, str], dict[int, Record]] = {}
    for record in records:
        if record.get("skipped"):
            continue
        cells.setdefault((record["task"], record["keep"], record["method"]), {})[record["seed"]] = record
    rows = []
    for (task, keep, method), runs in cells.items():
        own = cells.get((task, keep, ours), {})
        both = sorted(set(runs) & set(own))
        accuracies = [counted_accuracy(run) for run in runs.values()]
        row: dict[str, Any] = {
            "task": task,
            "keep": keep,
            "method": method,
            "seeds": len(runs),
            "accuracy": float(np.mean(accuracies)),
            "drop": float(np.mean([100 * run["full_accuracy"] for run in runs.values()])) - float(np.mean(accuracies)),
            "flops": float(np.mean([run["flops"] for run in runs.values()])),
            "params": float(np.mean([run["params"] for run in runs.values()])),
        }
        if both and method != ours:
            pairs = [(own[seed], runs[seed]) for seed in both]
            row["ours_minus"], row["half_width"] = paired_interval(
                [counted_accuracy(a) for a, _ in pairs], [counted_accuracy(b) for _, b in pairs]
            )
            row["ln_kl"], row["ln_kl_half_width"] = paired_interval(
                [math.log(max(counted_kl(a), 1e-12)) for a, _ in pairs],
                [math.log(max(counted_kl(b), 1e-12)) for _, b in pairs],
            )
            row["pairs"] = len(both)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["task"], -row["keep"], -row["accuracy"]))


def strongest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of the most accurate method of each family of rivals, for every task and budget.

    The choice is made on the reported accuracies themselves, in the rivals' favour.
    """
    best: dict[tuple[str, float, str], Mapping[str, Any]] = {}
    for row in rows:
        kind = family(row["method"])
        key = (row["task"], row["keep"], kind)
        if kind in FAMILIES and (key not in best or row["accuracy"] > best[key]["accuracy"]):
            best[key] = row
    return [{**row, "rival": FAMILIES[kind]} for (_, _, kind), row in best.items()]


def best_allocations(records: Iterable[Record]) -> dict[str, dict[str, dict[str, str]]]:
    """Return task -> budget -> rule -> the allocation that is most accurate on average in runs "refit:RULE:..."."""
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for record in records:
        kind, _, rest = str(record["method"]).partition(":")
        if kind != "refit" or record.get("skipped"):
            continue
        rule, _, allocation = rest.partition(":")
        cell = cells.setdefault((record["task"], f"{record['keep']:g}", rule), {})
        cell.setdefault(allocation, []).append(counted_accuracy(record))
    chosen: dict[str, dict[str, dict[str, str]]] = {}
    for (task, keep, rule), cell in sorted(cells.items()):
        winner = max(cell, key=lambda name: float(np.mean(cell[name])))
        chosen.setdefault(task, {}).setdefault(keep, {})[rule] = winner
    return chosen
