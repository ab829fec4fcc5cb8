"""Time the collection of moments against the plain forward pass over the same batches.

extra = (seconds of `collect_moments` - seconds of the forward pass) / seconds of the forward pass.  Both run in turns,
so that a busy machine slows both; the medians are reported, and the spread of the repeats.  On the CPU the seconds
are those of the processor, summed over threads: others on the machine do not count.  Inputs are random: only
the shapes matter.  The share of the calibration check (the checksum `CalibrationData` takes of every batch) is measured
apart, for it is no part of the moments.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.compress import CalibrationData, collect_moments
from specprune.testbed import mlp, resnet, vgg

BATCH = 250


@dataclass(frozen=True)
class Case:
    """A network, the shape of its samples, and which moments of which layers (None: all) to collect from batches."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    level: str = "channel"
    layers: tuple[str, ...] | None = None
    batches: int = 4


CASES = {
    "vgg channel": Case(vgg, (1, 28, 28)),
    "vgg patch": Case(vgg, (1, 28, 28), "patch"),
    "resnet channel": Case(resnet, (1, 28, 28)),
    "resnet patch": Case(resnet, (1, 28, 28), "patch"),
    "mlp-300-1000-300": Case(partial(mlp, (784, 300, 1000, 300, 10)), (784,), batches=20),
    "mlp hidden layers": Case(
        partial(mlp, (784, 300, 1000, 300, 10)), (784,), layers=("fc2", "fc3", "fc4"), batches=20
    ),
    "3x2048": Case(partial(mlp, (2048,) * 4), (2048,), batches=20),
}


@torch.no_grad()
def forward_pass(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def timed(function: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, repeats: int, seed: int, device: str) -> dict[str, str | float]:
    """Return the median seconds of both, and of the check of the data, and the extra over the forward pass."""
    case = CASES[name]
    torch.manual_seed(seed)
    model = case.build().eval().to(device)
    batches = [torch.randn(BATCH, *case.shape, device=device) for _ in range(case.batches)]
    programs: dict[str, Callable[[], object]] = {
        "forward": lambda: forward_pass(model, batches),
        "collect": lambda: collect_moments(model, batches, case.layers, level=case.level),
        "check": lambda: list(CalibrationData(batches).passes(model, "check")),
    }
    for run in programs.values():
        timed(run, device)  # warm caches
    seconds: dict[str, list[float]] = {key: [] for key in programs}
    for _ in range(repeats):
        for key, run in programs.items():
            seconds[key].append(timed(run, device))
    medians = {key: float(np.median(values)) for key, values in seconds.items()}
    extras = [c / f - 1 for c, f in zip(seconds["collect"], seconds["forward"], strict=True)]
    added = medians["collect"] - medians["forward"]
    return {
        "case": name,
        "batches": case.batches,
        **{f"{key}_s": value for key, value in medians.items()},
        "extra": added / medians["forward"],
        "extra_low": min(extras),
        "extra_high": max(extras),
        "check_share": medians["check"] / added if added > 0 else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder for collection_speed.json")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("expected at least 1 repeat")
    rows = [measure(name, args.repeats, args.seed, args.device) for name in args.cases]
    print(
        format_table(rows, title="median seconds; extra = collect / forward - 1, check_share of what collecting adds")
    )
    if args.out is not None:
        payload = {
            "rows": rows,
            "batch": BATCH,
            "repeats": args.repeats,
            "seed": args.seed,
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "scipy", "torch")}},
            "device": {
                "name": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "thread_variables": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
            },
        }
        path = args.out / "collection_speed.json"
        write_text(path, to_json(payload) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
