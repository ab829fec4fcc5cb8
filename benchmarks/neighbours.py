"""Accuracy at equal parameters: spectral pruning, low rank, sampling, and the hybrid of nodes and ranks.

Every method gets the same trained networks and calibration images, without labels.  One-shot accuracy is measured on
all test images; with --tune, also after one epoch with labels on 20,000 training images.  Runs are appended to a file,
one JSON line each, and finished ones are skipped, so that a stopped run goes on where it was.  At the end the file is
summed up: means, and paired differences over training seeds with 95 % t intervals.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from networks import REPORT_SEEDS, TASKS
from pruning_quality import append_record, fine_tune, full_accuracy, make_case, measure, read_records, where_run
from scipy import stats

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis.comparison import sweep_or_reasons
from specprune.compress.batches import CalibrationData
from specprune.compress.settings import METHODS
from specprune.testbed import load_dataset

# Of fine-tuning; 0.02 for what starts from rubble: the better of the two on tuning seed 0, 4000 test images, keep 0.2.
_SMALL_RATE = ("hybrid", "fitted", "spectral")
_COLUMNS = (
    *(
        "task",
        "keep",
        "method",
        "seeds",
        "accuracy",
        "drop",
        "ours_minus",
        "half_width",
        "tuned_accuracy",
        "tuned_drop",
    ),
    *("tuned_ours_minus", "tuned_half_width", "params", "flops", "density", "promised", "measured", "seconds"),
)


def run_all(options: argparse.Namespace) -> None:
    records = read_records(options.file)
    done = {_key(record) for record in records}
    keeps = [float(keep) for keep in options.keeps.split(",")]
    for seed in map(int, options.seeds.split(",")):
        for task in options.tasks.split(","):
            dataset = case = None
            for method in options.methods.split(","):
                open_keeps = [keep for keep in keeps if (task, seed, keep, method, options.tune) not in done]
                if not open_keeps:
                    continue
                dataset = dataset or load_dataset(TASKS[task][0])
                case = case or make_case(
                    options.networks, dataset, task, seed, options.calibration, False, options.limit, options.device
                )
                fast = copy.deepcopy(case.model).to(memory_format=torch.channels_last)
                inputs = [batch.contiguous(memory_format=_format(batch)) for batch, _ in case.calibration]
                common = {"method": method, "measure": "params", "seed": seed}
                found = sweep_or_reasons(fast, CalibrationData(inputs), open_keeps, **common)
                for keep, made in zip(open_keeps, found, strict=True):
                    record = {"task": task, "seed": seed, "keep": keep, "method": method, "tune": options.tune}
                    if isinstance(made, str):
                        record["refused"] = made
                    else:
                        record |= _record(made, case)
                        if options.tune:
                            rate = options.rate or (0.005 if method in _SMALL_RATE else 0.02)
                            start = time.perf_counter()
                            model = made.model.to(memory_format=torch.contiguous_format)
                            tuned = fine_tune(model, dataset, options.tune_images, rate, seed)
                            record["tuned_accuracy"], _ = measure(tuned, case)
                            record["tune_seconds"] = time.perf_counter() - start
                    append_record(options.file, record)
                    shown = record.get("refused") or f"{record['accuracy']:.2%} {record.get('tuned_accuracy', '')}"
                    print(f"{task} seed {seed} keep {keep:g} {method}: {shown}", flush=True)


def _format(batch: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if batch.dim() == 4 else torch.contiguous_format


def _record(made: Any, case: Any) -> dict[str, Any]:
    report = made.report
    accuracy, divergence = measure(made.model, case)
    errors = report.local_errors()
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in made.model.parameters())
    return {
        "full_accuracy": full_accuracy(case),
        "accuracy": accuracy,
        "kl": divergence,
        "params": report.params_after / report.params_before,
        "flops": report.flops_after / report.flops_before,
        "density": nonzero / report.params_before,
        "promised": max((entry.promised for entry in errors), default=None),
        "measured": max((entry.measured for entry in errors), default=None),
        "seconds": report.seconds,
    }


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("task", "seed", "keep", "method", "tune"))


def summary(records: list[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Return one row a task, budget and method: means in per cent, and paired differences from `ours`."""
    made = [record for record in records if "refused" not in record]
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for record in sorted(made, key=lambda record: record["tune"]):  # a tuned run has the one-shot accuracy as well
        own = groups.setdefault((record["task"], record["keep"], record["method"]), {})
        own[record["seed"]] = own.get(record["seed"], {}) | record
    rows = []
    for (task, keep, method), own in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        best = groups.get((task, keep, ours), {})
        row: dict[str, Any] = {"task": task, "keep": keep, "method": method}
        for field in ("params", "flops", "density", "promised", "measured", "seconds", "kl"):
            values = [record[field] for record in own.values() if record[field] is not None]
            row[field] = mean(values) if values else None
        for prefix in ("", "tuned_"):
            field = f"{prefix}accuracy"
            values = {seed: 100 * record[field] for seed, record in own.items() if field in record}
            if not values:
                continue
            row[field] = mean(values.values())
            row[f"{prefix}seeds"] = len(values)
            row[f"{prefix}drop"] = mean(100 * own[seed]["full_accuracy"] - value for seed, value in values.items())
            pairs = [100 * best[seed][field] - value for seed, value in values.items() if field in best.get(seed, {})]
            if method != ours and len(pairs) > 1:
                row[f"{prefix}ours_minus"] = mean(pairs)
                row[f"{prefix}half_width"] = float(
                    stats.t.ppf(0.975, len(pairs) - 1) * stdev(pairs) / len(pairs) ** 0.5
                )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="vgg,resnet", help=f"which of {', '.join(TASKS)}")
    parser.add_argument("--seeds", default=",".join(map(str, REPORT_SEEDS)))
    parser.add_argument("--keeps", default="0.5,0.3,0.2", help="fractions of the parameters")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tune", action="store_true", help="also train for one epoch with labels")
    parser.add_argument("--tune-images", type=int, default=20_000)
    parser.add_argument("--rate", type=float, help="of fine-tuning; by default what suits the method")
    parser.add_argument("--calibration", type=int, default=1500, help="training images that every method gets")
    parser.add_argument("--folder", type=Path, default=Path("results/quality"), help="of networks and runs")
    parser.add_argument("--name", default="neighbours.jsonl", help="file of runs in the folder")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="further files of runs for the tables")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the summary")
    parser.add_argument("--ours", default="hybrid", help="the method that others are compared with")
    parser.add_argument("--limit", type=int, help="measure on this many images only")
    parser.add_argument("--device", default="cpu", help="cuda for the CIFAR-10 networks")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.networks, options.file = options.folder / "networks", options.folder / options.name
    torch.set_num_threads(1)
    if not options.tables_only:
        run_all(options)
    records = [record for path in (options.file, *options.add) for record in read_records(path)]
    rows = summary(list({_key(record): record for record in records}.values()), options.ours)
    payload = {
        **where_run("specprune", "torch", "numpy", "scipy"),
        "calibration": options.calibration,
        "tune_images": options.tune_images,
        "ours": options.ours,
        "rows": rows,
        "refused": sorted({(r["task"], r["keep"], r["method"], r["refused"]) for r in records if "refused" in r}),
    }
    print(format_table(rows, list(_COLUMNS), f"at equal parameters; ours_minus: {options.ours} minus the row, points"))
    path = options.out / "neighbours.json"
    write_text(path, to_json(payload) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
