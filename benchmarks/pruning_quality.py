"""Accuracy at equal FLOPs: specprune against Torch-Pruning, a ThiNet-like rule and other scores with the same refit.

Runs are appended to a file, one JSON line each, and finished ones are skipped, so that a stopped run goes on where it
was.  At the end the file is summed up: means, and paired differences over training seeds with 95 % t intervals.

Methods: ours:ALLOCATION; refit:RULE:ALLOCATION (scores with specprune's refit; ALLOCATION "own" is the best one on the
tuning networks); tp:RULE:local, tp:RULE:global; thinet, thinet:centred.  Short for many: ours, refit, tp-local,
tp-global, thinet, all.

Parts: oneshot; finetune (one epoch with labels); distill (label-free distillation in `specprune.prune`); tune (refit
rules at each allocation on the tuning networks and the last 10,000 training images, to choose "own").
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
import traceback
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from networks import REPORT_SEEDS, TASKS, TUNING_SEEDS, train_images, trained_network
from pairs import best_allocations, strongest, summary
from peers import (
    LOCAL_ONLY,
    SCORE_RULES,
    TORCH_PRUNING_RULES,
    NotApplicableError,
    flops_of,
    reestimate_norms,
    scores,
    thinet_rival,
    torch_pruning_rival,
)
from torch import Tensor, nn
from torch.nn import functional

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.compress.batches import CalibrationData
from specprune.compress.cost import count_params
from specprune.compress.groups import Structure, find_groups
from specprune.testbed import load_dataset
from specprune.testbed.datasets import Dataset

ALLOCATIONS = ("uniform", "calibrated", "sensitivity")
REFIT_RULES = tuple(rule for rule in SCORE_RULES if rule != "lamp")  # within a group LAMP ranks as magnitude L2 does
GROUPS = {
    "ours": [f"ours:{allocation}" for allocation in ("uniform", "calibrated")],
    "refit": [f"refit:{rule}:{allocation}" for rule in REFIT_RULES for allocation in ("uniform", "own")],
    "refit-all": [f"refit:{rule}:{allocation}" for rule in REFIT_RULES for allocation in ALLOCATIONS],
    "tp-local": [f"tp:{rule}:local" for rule in TORCH_PRUNING_RULES],
    "tp-global": [f"tp:{rule}:global" for rule in TORCH_PRUNING_RULES if rule not in LOCAL_ONLY],
    "thinet": ["thinet", "thinet:centred"],
}
DISTILL_STEPS = 300
_BATCH = 250
_MEASURE_BATCH = 50  # small batches stay in the cache
_TUNE_BATCH = 128
_TUNE_RATE = {"mlp": 0.01}  # 0.02 for the convolutional networks
_COLUMNS = ("task", "keep", "method", "seeds", "accuracy", "drop", "ours_minus", "half_width", "flops")


@dataclass(frozen=True)
class Case:
    """One trained network with everything a method may use.

    Args:
        task: "vgg", "resnet" or "mlp".
        seed: of the training, and of the calibration images and the rules.
        model: the network in evaluation mode.
        calibration: batches of training images; only rules on gradients read the labels.
        example: one image.
        structure: the groups of the network.
        images: what the accuracy is measured on, with labels.
        logits: the full network's outputs on them.
        swept: networks that one sweep over the budgets has given already.
    """

    task: str
    seed: int
    model: nn.Module
    calibration: list[tuple[Tensor, Tensor]]
    example: Tensor
    structure: Structure
    images: list[tuple[Tensor, Tensor]]
    logits: list[Tensor]
    swept: dict[Any, nn.Module] = field(default_factory=dict)


def make_case(
    folder: Path,
    dataset: Dataset,
    task: str,
    seed: int,
    calibration: int,
    tuning: bool,
    limit: int | None,
    device: str = "cpu",
) -> Case:
    model = trained_network(folder, task, seed, str(device)).model.eval().to(device)
    dataset, held = dataset.to(device), train_images(dataset)
    drawn = torch.randperm(held, generator=torch.Generator().manual_seed(seed))[:calibration]
    batches = [(dataset.train_inputs[part], dataset.train_targets[part]) for part in drawn.split(_BATCH)]
    if tuning:
        inputs, targets = dataset.train_inputs[held:], dataset.train_targets[held:]
    else:
        inputs, targets = dataset.test_inputs, dataset.test_targets
    images = list(zip(inputs[:limit].split(_MEASURE_BATCH), targets[:limit].split(_MEASURE_BATCH), strict=True))
    with torch.no_grad():
        logits = [model(part) for part, _ in images]
    structure = find_groups(model, CalibrationData(batches))
    return Case(task, seed, model, batches, batches[0][0][:1], structure, images, logits)


@torch.no_grad()
def measure(model: nn.Module, case: Case) -> tuple[float, float]:
    """Return the accuracy, and the mean KL divergence (nats) of the outputs from the full network's."""
    work = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # faster on CPUs
    right, divergence, count = 0, 0.0, 0
    for (inputs, targets), logits in zip(case.images, case.logits, strict=True):
        outputs = work(inputs)
        right += int((outputs.argmax(1) == targets).sum())
        old, new = logits.double().log_softmax(1), outputs.double().log_softmax(1)
        divergence += float((old.exp() * (old - new)).sum())
        count += len(targets)
    return right / count, divergence / count


def full_accuracy(case: Case) -> float:
    """Return the accuracy of the full network on the same images."""
    right = sum(int((kept.argmax(1) == y).sum()) for (_, y), kept in zip(case.images, case.logits, strict=True))
    return right / sum(len(targets) for _, targets in case.images)


def prune_with(
    method: str, case: Case, keep: float, keeps: list[float], distill_steps: int, own: dict[str, Any]
) -> nn.Module:
    """Return the network pruned by a method at a fraction of its FLOPs."""
    kind, *rest = method.split(":")
    common = {"structure": case.structure, "seed": case.seed}
    if kind == "tp":
        rule, scope = rest
        return torch_pruning_rival(case.model, case.example, case.calibration, keep, rule=rule, scope=scope, **common)
    if kind == "thinet":
        return thinet_rival(case.model, case.example, case.calibration, keep, centred=rest == ["centred"], **common)

    import specprune  # here, so that the rivals run without it

    if kind == "ours":
        selection, allocation = "backward", rest[0]
    elif kind == "refit":
        selection, allocation = "scores", rest[1]
    else:
        raise ValueError(f"method {method!r}: expected ours, refit, tp or thinet before the colon")
    if allocation == "own":
        allocation = own[case.task][f"{keep:g}"][rest[0]]
    key = (kind, rest[0] if kind == "refit" else "", allocation, distill_steps)
    if (key, keep) not in case.swept:  # all budgets at once: the network is measured once
        fast = copy.deepcopy(case.model).to(memory_format=torch.channels_last)  # faster on CPUs
        unlabelled = [
            inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
            for inputs, _ in case.calibration
        ]
        options: dict[str, Any] = {"seed": case.seed, "distill_steps": distill_steps}
        if kind == "refit":
            options["scores"] = scores(case.model, rest[0], case.calibration, case.structure, case.seed)
        found = specprune.prune_sweep(fast, unlabelled, keeps, selection=selection, allocation=allocation, **options)
        for one, pruned in zip(keeps, found, strict=True):
            case.swept[key, one] = pruned.model.to(memory_format=torch.contiguous_format)
    return case.swept[key, keep]


def fine_tune(model: nn.Module, dataset: Dataset, count: int, rate: float, seed: int) -> nn.Module:
    """Return the network after one epoch of SGD with labels on `count` training images."""
    work = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    order = torch.randperm(train_images(dataset), generator=torch.Generator().manual_seed(1000 + seed))[:count]
    batches = order[: count // _TUNE_BATCH * _TUNE_BATCH].split(_TUNE_BATCH)
    optimizer = torch.optim.SGD(work.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for chosen in batches:
        inputs, targets = dataset.train_inputs[chosen].to(device), dataset.train_targets[chosen].to(device)
        loss = functional.cross_entropy(work(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return work.eval()


def run_one(method: str, case: Case, keep: float, options: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Return the record of one run."""
    start = time.perf_counter(), time.process_time()
    own = json.loads(options.own.read_text()) if options.own.exists() else {}
    keeps = [float(one) for one in options.keeps.split(",")]
    small = prune_with(method, case, keep, keeps, DISTILL_STEPS if options.part == "distill" else 0, own)
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    accuracy, divergence = measure(small, case)
    # A refit has aimed at the original pre-activations already; re-estimating the norms after it only loses.
    refitted = method.startswith(("ours", "refit"))
    renormed = small if refitted else reestimate_norms(small, case.calibration)
    accuracy_norms, divergence_norms = (accuracy, divergence) if refitted else measure(renormed, case)
    record: dict[str, Any] = {
        "full_accuracy": full_accuracy(case),
        "accuracy": accuracy,
        "accuracy_norms": accuracy_norms,
        "kl": divergence,
        "kl_norms": divergence_norms,
        "flops": flops_of(small, case.example) / flops_of(case.model, case.example),
        "params": count_params(small) / count_params(case.model),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }
    if options.part == "finetune":
        ours = method.startswith("ours")
        begun = small if ours or _loss(small, case) <= _loss(renormed, case) else renormed
        rate = _TUNE_RATE.get(case.task, 0.02)
        start = time.perf_counter(), time.process_time()
        tuned = fine_tune(begun, dataset, options.tune_images, rate, case.seed)
        record["tune_seconds"] = time.perf_counter() - start[0]
        record["tuned_accuracy"], record["tuned_kl"] = measure(tuned, case)
    return record


@torch.no_grad()
def _loss(model: nn.Module, case: Case) -> float:
    """Return the cross-entropy on the calibration images, whose labels fine-tuning may use."""
    return sum(
        float(functional.cross_entropy(model(inputs), targets, reduction="sum")) for inputs, targets in case.calibration
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file; a last line that was cut off by a crash is not one."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line in one write, after removing what a crash may have left of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    line = json.dumps(json.loads(to_json(record))) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a run."""
    return tuple(record[name] for name in ("part", "task", "seed", "keep", "method"))


def expand(methods: str) -> list[str]:
    """Return the methods of a comma-separated list with short names."""
    if methods == "all":
        return [method for name, group in GROUPS.items() if name != "refit-all" for method in group]
    return [method for name in methods.split(",") for method in GROUPS.get(name, [name])]


def run_all(options: argparse.Namespace) -> None:
    done = {key_of(record) for record in read_records(options.results)}
    methods = expand(options.methods)
    for task in options.tasks.split(","):
        dataset = None
        for seed in map(int, options.seeds.split(",")):
            case = None
            for keep in map(float, options.keeps.split(",")):
                for method in methods:
                    key = {"part": options.part, "task": task, "seed": seed, "keep": keep, "method": method}
                    if key_of(key) in done:
                        continue
                    dataset = dataset or load_dataset(TASKS[task][0])
                    case = case or make_case(
                        options.networks,
                        dataset,
                        task,
                        seed,
                        options.calibration,
                        options.part == "tune" or options.tuning_images,
                        options.limit,
                        options.device,
                    )
                    try:
                        record = {**key, **run_one(method, case, keep, options, dataset)}
                        shown = f"{record['accuracy']:.2%} / norms {record['accuracy_norms']:.2%}"
                        shown += f", {record['seconds']:.1f} s (CPU {record['cpu_seconds']:.1f})"
                    except NotApplicableError as reason:
                        record, shown = {**key, "skipped": str(reason)}, f"skipped: {reason}"
                    except Exception:  # one failing method must not stop a night's run; it is tried again next time
                        print(
                            f"{task} seed {seed} keep {keep:g} {method}: FAILED\n{traceback.format_exc()}", flush=True
                        )
                        continue
                    append_record(options.results, {**record, "calibration": options.calibration})
                    print(f"{task} seed {seed} keep {keep:g} {method}: {shown}", flush=True)


def where_run(*packages: str) -> dict[str, Any]:
    """Return the versions of some packages and the device, for the records."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
    }


def conclude(options: argparse.Namespace) -> None:
    records = [record for path in [options.results, *options.add] for record in read_records(path)]
    records = list({key_of(record): record for record in records if record["part"] == options.part}.values())
    payload: dict[str, Any] = {
        "part": options.part,
        **where_run("specprune", "torch", "torch-pruning", "numpy", "scipy"),
        "seeds": sorted({record["seed"] for record in records}),
        "calibration": options.calibration,
    }
    if options.part == "tune":
        payload["own"] = best_allocations(records)
        write_text(options.own, to_json(payload["own"]) + "\n")
        print(f"wrote {options.own}")
    payload["rows"] = summary(records, options.ours)
    payload["strongest"] = strongest(payload["rows"])
    columns = list(_COLUMNS)
    print(format_table(payload["rows"], columns, f"{options.part}; ours_minus: {options.ours} minus the row, points"))
    print(format_table(payload["strongest"], ["rival", *columns], "the strongest rival of each kind"))
    path = options.out / f"pruning_quality_{options.part}.json"
    write_text(path, to_json(payload) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="vgg,resnet,mlp")
    parser.add_argument("--seeds", help="training seeds; by default the report's, or the tuning ones for --part tune")
    parser.add_argument("--keeps", default="0.5,0.3,0.2", help="fractions of the full FLOPs")
    parser.add_argument("--calibration", type=int, default=1500, help="training images that every method gets")
    parser.add_argument("--methods", help="comma-separated, see above; by default all, or refit-all for --part tune")
    parser.add_argument("--part", choices=("oneshot", "finetune", "distill", "tune"), default="oneshot")
    parser.add_argument("--folder", type=Path, default=Path("results/quality"), help="of networks and runs")
    parser.add_argument("--file", help="name of the file of runs; by default PART.jsonl")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="further files of runs for the tables")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the summary")
    parser.add_argument("--ours", default="ours:calibrated", help="the method that others are compared with")
    parser.add_argument("--tune-images", type=int, default=20_000, help="training images of --part finetune")
    parser.add_argument("--tuning-images", action="store_true", help="measure on the last 10,000 training images")
    parser.add_argument("--limit", type=int, help="measure on this many images only")
    parser.add_argument("--device", default="cpu", help="cuda for the CIFAR-10 networks")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    tuning = options.part == "tune"
    options.seeds = options.seeds or ",".join(map(str, TUNING_SEEDS if tuning else REPORT_SEEDS))
    options.methods = options.methods or ("refit-all" if tuning else "all")
    options.networks = options.folder / "networks"
    options.results = options.folder / (options.file or f"{options.part}.jsonl")
    options.own = options.folder / "own_allocations.json"
    torch.set_num_threads(1)
    if not options.tables_only:
        run_all(options)
    conclude(options)


if __name__ == "__main__":
    main()
