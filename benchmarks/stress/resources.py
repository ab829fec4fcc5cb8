"""Memory, leaks and many processes: what was tried, what failed.

memory: peaks of collecting moments against `collection_ceiling`, each in a forked child, with 10 and with 100 batches;
`prune`, `prune_sweep` and `layer_spectra` too, with 1 MiB for the targets that refits keep.  leaks: calls again and
again, with the tensors, hooks, open files and memory that they leave.  ranks: data-parallel runs that are disturbed,
see ranks.py.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ranks
import torch
from torch import Tensor, nn

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis import layer_spectra
from specprune.compress import (
    collect_moments,
    collection_ceiling,
    load_pruned,
    prune,
    prune_sweep,
    save_pruned,
    targets,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from pruning_quality import where_run

_CONTEXT = multiprocessing.get_context("fork")
_MEGABYTE = 2**20
_MMAP_THRESHOLD = -3  # of mallopt
_KEPT = 64 * _MEGABYTE  # free memory that glibc holds back at most: twice its largest M_MMAP_THRESHOLD, see mallopt(3)
_GROWTH = 2 * _MEGABYTE  # between the peaks of 10 and of 100 batches: pages that the allocator left in pieces
_HELD = 500  # samples that `prune` compares networks on
_LEAK = 1 * _MEGABYTE  # in 100 calls, after the warm-up


class Stream:
    """Batches that are made when they are read, the same on every pass."""

    def __init__(self, count: int, *shape: int) -> None:
        self.count, self.shape = count, shape

    def __iter__(self) -> Iterator[Tensor]:
        for seed in range(self.count):
            yield torch.randn(*self.shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    widths = (784, 1024, 1024, 512)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10)).eval()


def convnet(stride: int = 1) -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, stride, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10)).eval()


COLLECTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "MLP": (mlp, (64, 784), {}),
    "MLP, large batches": (mlp, (8192, 784), {}),
    "channels": (convnet, (16, 3, 32, 32), {}),
    "patches by shifts": (convnet, (16, 3, 32, 32), {"level": "patch"}),
    "patches": (lambda: convnet(2), (16, 3, 32, 32), {"level": "patch"}),
    "drawn patches": (convnet, (16, 3, 32, 32), {"level": "patch", "positions": 32}),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module, Stream], Any]]] = {
    "layer_spectra": (mlp, (32, 784), layer_spectra),
    "prune": (lambda: convnet(2), (8, 3, 16, 16), lambda model, data: prune(model, data, 0.5)),
    "prune_sweep": (lambda: convnet(2), (8, 3, 16, 16), lambda model, data: prune_sweep(model, data, [0.6, 0.4])),
}


def peak(action: Callable[[], Any], warm: Callable[[], Any], keep: bool = False) -> int:
    """Return by how many bytes a forked child grows at most while it does something.

    Args:
        action: what is measured.
        warm: the same with little data, done first in the child: it has to load the pages of libraries once more.
        keep: leave glibc its way of keeping large blocks that are free; else they are given back at once.
    """
    give_back()
    receiver, sender = _CONTEXT.Pipe(duplex=False)

    def measure() -> None:
        torch.set_num_threads(1)
        if not keep:
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
        warm()
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten, see proc(5)
        before = resident()
        action()
        sender.send(highest() - before)

    child = _CONTEXT.Process(target=measure)
    child.start()
    sender.close()
    grown = receiver.recv()
    child.join()
    return int(grown)


def give_back() -> None:
    """Give free memory back to the system, so that the next use of it is seen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def highest() -> int:
    """Return the largest resident size so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def memory(few: int, many: int) -> list[dict[str, Any]]:
    """Return peaks and ceilings in MB, and whether they hold."""
    rows = []
    for name, (make, shape, settings) in COLLECTIONS.items():
        model = make()
        ceiling = collection_ceiling(model, next(iter(Stream(1, *shape))), **settings)
        counts = (few, many) if shape[0] < 1000 else (2, 4)
        small = Stream(1, 2, *shape[1:])
        warm = functools.partial(collect_moments, model, small, **settings)
        collects = [functools.partial(collect_moments, model, Stream(n, *shape), **settings) for n in counts]
        peaks = [peak(collect, warm) for collect in collects]
        rows.append(judged(name, peaks, ceiling.total, peak(collects[-1], warm, keep=True)))
    targets.CACHE_BYTES = _MEGABYTE  # full after few batches
    for name, (make, shape, call) in OTHERS.items():
        model = make()
        warm = functools.partial(call, model, Stream(1, *shape))
        warm()  # what is imported late
        peaks = [peak(functools.partial(call, model, Stream(n, *shape)), warm) for n in (few, many)]
        rows.append(judged(name, peaks, None, growth=_GROWTH + _HELD * 4 * math.prod(shape[1:])))
    return rows


def judged(
    name: str, peaks: list[int], ceiling: int | None, kept: int | None = None, growth: int = _GROWTH
) -> dict[str, Any]:
    said = []
    if ceiling is not None and max(peaks) > ceiling:
        said.append("above the ceiling")
    if ceiling is not None and kept is not None and kept > ceiling + _KEPT:
        said.append("above the ceiling and what the allocator keeps")
    if peaks[1] > peaks[0] + growth:
        said.append("grows with the batches")
    row = {
        "what": name,
        "few_mb": peaks[0] / _MEGABYTE,
        "many_mb": peaks[1] / _MEGABYTE,
        "untuned_mb": None if kept is None else kept / _MEGABYTE,
        "ceiling_mb": None if ceiling is None else ceiling / _MEGABYTE,
        "fault": "; ".join(said) or None,
    }
    print(row, flush=True)
    return row


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(45, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def leaks(times: int, folder: Path) -> list[dict[str, Any]]:
    """Call `prune` so many times, and the others a quarter as often, after a warm-up; return what they left."""
    model, data = small_net(), list(Stream(3, 16, 2, 8, 8))
    pruned = prune(model, data, 0.5)

    def save_and_load() -> None:
        save_pruned(pruned, folder / "pruned.pt")
        load_pruned(folder / "pruned.pt", small_net)

    def fail() -> None:
        broken = [*data[:2], data[2] * float("nan")]
        for call in (lambda: prune(model, broken, 0.5), lambda: layer_spectra(model, broken)):
            try:
                call()
            except ValueError:
                continue
            raise RuntimeError("NaN was not refused")

    calls: dict[str, Callable[[], Any]] = {
        "prune": lambda: prune(model, data, 0.5),
        "prune_sweep": lambda: prune_sweep(model, data, [0.6, 0.4], reconstruction="patch"),
        "layer_spectra": lambda: layer_spectra(model, data),
        "save_pruned, load_pruned": save_and_load,
        "prune and layer_spectra of NaN": fail,
    }
    rows = []
    for name, call in calls.items():
        repeated = times if name == "prune" else max(1, times // 4)
        for _ in range(max(5, repeated // 10)):
            call()
        give_back()
        before = (live_tensors(), len(os.listdir("/proc/self/fd")), resident())
        for _ in range(repeated):
            call()
        give_back()
        after = (live_tensors(), len(os.listdir("/proc/self/fd")), resident())
        tensors, files, grown = (b - a for a, b in zip(before, after, strict=True))
        left = hooks(model)
        bad = [k for k, v in {"tensors": tensors, "files": files, "hooks": left}.items() if v > 0]
        bad += ["memory"] if grown > _LEAK * max(1.0, repeated / 100) else []
        rows.append(
            {
                "what": name,
                "calls": repeated,
                "tensors": tensors,
                "hooks": left,
                "files": files,
                "grown_kb": grown // 1024,
                "fault": ", ".join(bad) or None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("memory", "leaks", "ranks"), default=["memory", "leaks", "ranks"])
    parser.add_argument("--batches", type=int, nargs=2, default=(10, 100), help="of the two peaks (default 10 100)")
    parser.add_argument("--times", type=int, default=200, help="prunes; a quarter as many of the others (default 200)")
    parser.add_argument("--random-kills", type=int, default=12, help="at random times (default 12)")
    parser.add_argument("--kinds", nargs="+", default=(), help="of disturbances of ranks; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/stress"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    record: dict[str, Any] = {**where_run("specprune", "torch", "numpy"), "seed": options.seed}
    with tempfile.TemporaryDirectory() as scratch:
        if "memory" in options.only:
            record["memory"] = memory(*options.batches)
        if "ranks" in options.only:
            rng = random.Random(options.seed)
            record["ranks"] = ranks.campaign(Path(scratch), rng, options.random_kills, options.kinds)
        if "leaks" in options.only:
            record["leaks"] = leaks(options.times, Path(scratch))
    record["seconds"] = time.monotonic() - began
    failed = 0
    for part in options.only:
        print(format_table([{k: v for k, v in row.items() if k != "said"} for row in record[part]], title=part), "\n")
        failed += sum(row["failed"] if "failed" in row else row["fault"] is not None for row in record[part])
    write_text(options.out / "resources.json", to_json(record) + "\n")
    print(f"{failed} failed, {record['seconds']:.0f} s [{options.out / 'resources.json'}]")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
