"""Prune small networks with hostile numbers in every way, and judge each result by a slow dense twin in float64.

A case is a network, a construction (see `hostile`), a dtype, and how it is pruned.  It is

- refused: a ValueError or TypeError that names a layer, a tensor or an argument;
- right: no warning, finite weights and report, and outputs within a tolerance of those of the dense twin (see
  `dense_twin`) for the same kept nodes, and no further from the original's outputs than these;
- failed: anything else; and a refusal where the numbers can be handled, or none where they cannot.

Methods other than spectral pruning have no twin here: their networks must be finite, and no layer may err by more than
its report says.  Neither have the tables of bounds: nothing in them may be NaN or negative.  All selection rules meet
all reconstructions on the chain in float32 and float64; elsewhere they take turns.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense_twin import reconstruct
from hostile import CONSTRUCTIONS, Net, build
from torch import Tensor

from specprune import prune
from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.analysis import bound_table, tradeoff
from specprune.analysis.evaluation import NonFiniteOutputs
from specprune.compress.choice import SELECTIONS
from specprune.compress.reconstruction import RECONSTRUCTIONS
from specprune.compress.settings import METHODS

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
KINDS = ("mlp", "convnet", "residual")
TABLES = {
    "bound_table": lambda net, train, widths: bound_table(net, train, prune(net, train, widths=widths), train),
    "tradeoff": lambda net, train, widths: tradeoff(net, train, train, widths=[widths]),
}
ALLOCATIONS = ("calibrated", "sensitivity", "uniform", "dof", "dof at lam", "theory")
RIDGE = 1e-6
#: Largest difference to the twin's outputs, and largest excess of the error over the twin's; both relative to the
#: largest output of the original.
OUTPUTS = {"float16": 0.03, "bfloat16": 0.2, "float32": 2e-3, "float64": 5e-6}
EXCESS = {"float16": 5e-3, "bfloat16": 0.02, "float32": 1e-4, "float64": 1e-9}
# Where a network has nothing to prune, or nothing that can be said of it.
MAY_BE_REFUSED = ("all dead", "rank 0, no constants", "width 1", "norm variance 0, eps 0", "subnormal nodes")
TABLES_MAY_REFUSE = ("one sample", "n < m", "rank 0", "empty layer")


@dataclass(frozen=True)
class Case:
    """One way of pruning one network."""

    network: str
    construction: str
    dtype: str
    selection: str
    reconstruction: str
    how: str = "spectral"


@dataclass(frozen=True)
class Outcome:
    """What came of it: "refused", "right" or "failed", why, and the two figures of the judge."""

    verdict: str
    why: str = ""
    difference: float = 0.0
    excess: float = 0.0


def cases() -> Iterator[Case]:
    """Yield every case of the matrix."""
    for index, construction in enumerate(CONSTRUCTIONS):
        for kind, dtype in itertools.product(KINDS, DTYPES):
            if kind == "mlp" and dtype in ("float32", "float64"):
                pairs = list(itertools.product(SELECTIONS, RECONSTRUCTIONS))
            else:
                pairs = [(SELECTIONS[(index + k) % len(SELECTIONS)], r) for k, r in enumerate(RECONSTRUCTIONS)]
            for selection, reconstruction in pairs:
                yield Case(kind, construction, dtype, selection, reconstruction)
        for allocation in ALLOCATIONS:
            yield Case("mlp", construction, "float32", "backward", "sequential", f"allocation {allocation}")
        for dtype in ("float16", "float32"):
            yield Case("mlp", construction, dtype, "backward", "sequential", "distilled")
        for method in METHODS[1:]:
            yield Case("mlp", construction, "float32", "-", "-", method)
        for (kind, dtype), how in itertools.product((("mlp", "float32"), ("convnet", "float64")), TABLES):
            yield Case(kind, construction, dtype, "greedy", "channel", how)


def options(case: Case, net: Net) -> dict[str, Any]:
    """Return the arguments of `prune` for a case."""
    if case.how in METHODS[1:]:
        return {"keep": 0.6, "method": case.how, "measure": "params" if case.how == "sipp" else "flops"}
    found: dict[str, Any] = {"selection": case.selection, "reconstruction": case.reconstruction, "positions": None}
    if case.selection == "scores":
        widths = {name: len(net.model.get_submodule(name).weight) for name in net.producers}
        found["scores"] = {name: np.arange(width)[::-1].astype(float) for name, width in widths.items() if width}
    if case.how == "allocation theory":
        return {**found, "allocation": "theory", "lam": 0.1}
    if case.how == "allocation dof at lam":
        return {**found, "allocation": "dof", "lam": 1e-3}
    if case.how.startswith("allocation"):
        return {**found, "allocation": case.how.split()[1], "keep": 0.6}
    if case.how == "distilled":
        return {**found, "widths": net.widths, "distill_steps": 3}
    return {**found, "widths": net.widths}


def labelled(net: Net) -> list[tuple[Tensor, Tensor]]:
    """Return the data with classes, in batches of at most ten."""
    classes = torch.arange(len(net.data)) % 3
    return list(zip(net.data.split(10), classes.split(10), strict=True))


def must_refuse(net: Net) -> bool:
    """Return whether a network or its data hold NaN or Inf."""
    tensors = [*net.model.state_dict().values(), net.data]
    return not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def names_a_place(message: str, net: Net) -> bool:
    """Return whether a message names a layer or tensor or, of the network as a whole, the argument to change."""
    places = [name for name, _ in net.model.named_modules() if name]
    arguments = ("keep", "method=", "distill_steps", "the budget is", "the training set has", "inputs of the network")
    return any(f"'{name}" in message or f"{name}:" in message for name in places) or any(
        argument in message for argument in arguments
    )


def run(case: Case, seed: int = 0) -> Outcome:
    """Prune as the case says, and judge."""
    net = build(case.network, case.construction, DTYPES[case.dtype], seed)
    batches = [net.data[:10], net.data[10:]]
    before = copy.deepcopy(net.model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=r"`torch\.jit")  # torch, of its own parts
        try:
            if case.how in TABLES:
                found = TABLES[case.how](net.model, labelled(net), net.widths)
            else:
                found = prune(net.model, batches, ridge=RIDGE, seed=seed, **options(case, net))
        except Exception as error:
            return _judge_refusal(case, net, error)
    if caught:
        return Outcome("failed", f"warning: {caught[0].message}")
    for name, tensor in net.model.state_dict().items():
        if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
            return Outcome("failed", f"the caller's {name} changed")
    return _judge_table(net, found) if case.how in TABLES else _judge(case, net, found)


def _judge_refusal(case: Case, net: Net, error: Exception) -> Outcome:
    kind = type(error).__name__
    if type(error) not in (ValueError, TypeError, NonFiniteOutputs):
        return Outcome("failed", f"{kind}: {error}")
    if not names_a_place(str(error), net):
        return Outcome("failed", f"{kind} names no place: {error}")
    free = case.construction in MAY_BE_REFUSED or case.dtype in ("float16", "bfloat16")
    # Adam's steps are of one size for all weights; what a method makes of sizes that differ by 60 orders may overflow.
    free = free or (case.how in TABLES and case.construction in TABLES_MAY_REFUSE)
    free = free or case.how == "distilled" or (case.how in METHODS[1:] and case.construction.startswith("mixed"))
    if not free and not must_refuse(net):
        return Outcome("failed", f"needless {kind}: {error}")
    return Outcome("refused", str(error))


@torch.no_grad()
def _judge(case: Case, net: Net, pruned) -> Outcome:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in pruned.model.state_dict().values()):
        return Outcome("failed", "weights that are not finite")
    for record in pruned.report.to_records():
        for key, value in record.items():
            if isinstance(value, float) and not np.isfinite(value):
                return Outcome("failed", f"the report has {key} = {value}")
    other = case.how in METHODS[1:]
    if must_refuse(net) and not other:
        return Outcome("failed", "NaN or Inf was not noticed")
    rows = torch.isfinite(net.data.flatten(1)).all(1)  # methods that read only the weights do not mind the others
    given = net.data[rows]
    own = pruned.model(given)
    wide = copy.deepcopy(pruned.model).double()(given.double())
    if not bool(torch.isfinite(own).all()) or not bool(torch.isfinite(wide).all()):
        return Outcome("failed", "outputs that are not finite")
    if other:
        return _judge_layers(pruned)
    if case.how == "distilled":
        return Outcome("right")
    twin, original = reconstruct(net, pruned, case.reconstruction, RIDGE)[1:]
    scale = float(original.abs().max()) or 1.0
    difference = float((wide - twin).abs().max()) / scale
    losses = [float((found - original).square().mean()) ** 0.5 / scale for found in (wide, twin)]
    coarse = torch.finfo(DTYPES[case.dtype]).smallest_normal * torch.finfo(DTYPES[case.dtype]).eps / scale * 100
    fine = difference <= OUTPUTS[case.dtype] + coarse and losses[0] - losses[1] <= EXCESS[case.dtype] + coarse
    why = "" if fine else f"{difference:.2g} from the twin, error {losses[0]:.3g} against {losses[1]:.3g}"
    return Outcome("right" if fine else "failed", why, difference, max(0.0, losses[0] - losses[1]))


def _judge_table(net: Net, table) -> Outcome:
    if must_refuse(net):
        return Outcome("failed", "NaN or Inf was not noticed")
    for record in table.to_records():
        for key, value in record.items():
            if isinstance(value, float) and not value >= 0:
                return Outcome("failed", f"the table has {key} = {value}")
    return Outcome("right")


def _judge_layers(pruned) -> Outcome:
    for entry in pruned.report.layers:
        record = asdict(entry)
        if "error_exact" in record and record["error_exact"] > record["error_theorem"] * (1 + 1e-6) + 1e-9:
            return Outcome("failed", f"{record['layer']} errs by {record['error_exact']}: more than it promises")
    return Outcome("right")


def count(found: list[tuple[Case, Outcome]], key: str) -> list[dict[str, Any]]:
    """Return tried, refused, right and failed for each value of a column, with the largest figures of the judge."""
    rows = []
    for value in dict.fromkeys(getattr(case, key) for case, _ in found):
        own = [outcome for case, outcome in found if getattr(case, key) == value]
        verdicts = Counter(outcome.verdict for outcome in own)
        rows.append(
            {
                key: value,
                "tried": len(own),
                **{verdict: verdicts[verdict] for verdict in ("refused", "right", "failed")},
                "difference": max(outcome.difference for outcome in own),
                "excess": max(outcome.excess for outcome in own),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the networks and the random rules")
    parser.add_argument("--only", choices=list(CONSTRUCTIONS), help="one construction")
    parser.add_argument("--out", type=Path, help="folder for numerics.json")
    args = parser.parse_args()
    start = time.perf_counter()
    found = [(case, run(case, args.seed)) for case in cases() if args.only in (None, case.construction)]
    seconds = time.perf_counter() - start
    keys = ("construction", "network", "dtype", "selection", "reconstruction", "how")
    tables = {key: count(found, key) for key in keys}
    for key in keys:
        print(format_table(tables[key], title=f"\nby {key}"))
    totals = Counter(outcome.verdict for _, outcome in found)
    print(f"\n{len(found)} cases in {seconds:.0f} s: {dict(totals)}")
    failures = [{**asdict(case), "why": outcome.why} for case, outcome in found if outcome.verdict == "failed"]
    for failure in failures:
        print(" | ".join(str(value) for value in failure.values()))
    if args.out is not None:
        payload = {
            "tables": tables,
            "failures": failures,
            "refusals": dict(Counter(outcome.why for _, outcome in found if outcome.verdict == "refused")),
            "tolerances": {"outputs": OUTPUTS, "excess": EXCESS},
            "seed": args.seed,
            "seconds": seconds,
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "scipy", "torch")}},
            "device": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        }
        path = args.out / "numerics.json"
        write_text(path, to_json(payload) + "\n")
        print(f"wrote {path}")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
