"""Data-parallel runs whose processes are killed, stopped, slow, unequal, or do not agree on what to do.

Every process is forked from this one, so that libraries are imported once, and joins a gloo group on the loopback.
Nobody ends the others when one dies, as `torchrun` would: every survivor must end by itself, with the right result or
with a clear reason, before the timeout of the group and ten more seconds have passed since the disturbance.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from specprune.compress import collect_moments, prune, prune_sweep

_CONTEXT = multiprocessing.get_context("fork")
_GRACE = 10.0  # seconds after the timeout of the group until every process must have ended
_SAMPLES = 96
_FORGIVEN = {"collect": 1e-10, "prune": 1e-6, "sweep": 1e-6}  # relative difference to one process: moments, weights
# Reasons that a reader can act on; any other message counts as a failure.
_LOST = r"lost the others while|lost .* while|Timed out|timed out|timeout"
_DIFFER = r"not the same on processes \d+ and \d+"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run and what is to come of it.

    Attributes:
        kind: under which it is counted.
        task: "collect", "prune" or "sweep".
        ranks: number of processes.
        moment: of the disturbance: "init", "before", (pass, batch) or "after"; None for none.
        action: "kill", "stop" or "sleep", done by process `victim` at that moment.
        victim: the disturbed process.
        delay: seconds from the start of the work after which the parent kills the victim; None for never.
        data: how the data are shared: "equal", "unequal", "none" (the victim has none) or "nan".
        change: what the victim does otherwise: arguments, or "weights", "width", "dtype".
        reason: what every survivor's message must match; None where only the right result will do.
        timeout: of the group, in seconds.
    """

    kind: str
    task: str = "collect"
    ranks: int = 2
    moment: Any = None
    action: str = ""
    victim: int = 1
    delay: float | None = None
    data: str = "equal"
    change: tuple[tuple[str, Any], ...] | str = ()
    reason: str | None = None
    timeout: float = 30.0


def network(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 4)).double().eval()


def shares(trial: Trial, rank: int | None) -> list[Tensor]:
    """Return the batches of one process, or of all in one list."""
    data = torch.randn(_SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if rank is None:
        return list(data.split(8))
    if trial.data == "unequal":  # 1 : 2 : 3 : ..., in batches of different sizes
        total = trial.ranks * (trial.ranks + 1) // 2
        ends = [_SAMPLES * k * (k + 1) // 2 // total for k in range(trial.ranks + 1)]
        return list(data[ends[rank] : ends[rank + 1]].split(3 + 4 * rank))
    if trial.data == "none":
        having = [k for k in range(trial.ranks) if k != trial.victim]
        return list(data[having.index(rank) :: len(having)].split(8)) if rank in having else []
    share = data[rank :: trial.ranks].clone()
    if trial.data == "nan" and rank == trial.victim:
        share[len(share) // 2, 0, 0, 0] = float("nan")
    return list(share.split(8))


class Disturbed:
    """Batches of a process to which something happens in the middle of a pass."""

    def __init__(self, batches: list[Tensor], moment: tuple[int, int], action: str) -> None:
        self.batches, self.moment, self.action, self.passes = batches, moment, action, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for index, batch in enumerate(self.batches):
            if (self.passes, index) == self.moment:
                act(self.action)
            yield batch


def act(action: str) -> None:
    if action == "sleep":
        time.sleep(2.0)
    else:
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


def work(trial: Trial, rank: int | None) -> dict[str, Any]:
    """Do the task of one process (None: all data in one process); return numbers to compare."""
    disturbed = rank == trial.victim
    changed = trial.change if disturbed else ()
    batches: Any = shares(trial, rank)
    model = network(14 if changed == "width" else 12)
    if changed == "weights":
        with torch.no_grad():
            model[5].weight[0, 0] += 1e-3
    if changed == "dtype":
        model, batches = model.float(), [batch.float() for batch in batches]
    if disturbed and isinstance(trial.moment, tuple):
        batches = Disturbed(batches, trial.moment, trial.action)
    if disturbed and trial.moment == "before":
        act(trial.action)
    settings: dict[str, Any] = dict(changed) if isinstance(changed, tuple) else {}
    if trial.task == "collect":
        found = collect_moments(model, batches, **{"level": "patch", **settings})
        result = {name: [entry.rows, entry.total.tolist(), entry.gram.tolist()] for name, entry in found.items()}
        result["samples"] = found.samples
    else:
        if trial.task == "prune":
            made = [prune(model, batches, **{"keep": 0.5, "positions": None, **settings})]
        else:
            made = prune_sweep(model, batches, **{"keeps": [0.6, 0.4], "positions": None, **settings})
        result = {f"kept {k}": {g: n.indices.tolist() for g, n in one.nodes.items()} for k, one in enumerate(made)}
        result["samples"] = made[0].report.samples
        result["weights"] = [v.double().tolist() for one in made for v in one.model.state_dict().values()]
    if disturbed and trial.moment == "after":
        act(trial.action)
    return result


def process(trial: Trial, rank: int | None, folder: Path, port: int) -> None:
    """Be one process: leave a file with the result or with the reason."""
    handle = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    try:
        if rank is not None:
            if rank == trial.victim and trial.moment == "init":
                act(trial.action)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            limit, meeting = timedelta(seconds=trial.timeout), f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", meeting, limit, trial.ranks, rank)
        (folder / f"{rank}.ready").touch()
        outcome: dict[str, Any] = {"result": work(trial, rank)}
        if rank is not None:
            dist.destroy_process_group()
    except Exception as error:  # whatever it is, its message is what is judged
        outcome = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{rank}.part").write_text(json.dumps(outcome))
    (folder / f"{rank}.part").rename(folder / f"{rank}.json")
    os._exit(0)  # as the end of a script would; but without the parent's cleanup


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def close(found: Any, wanted: Any, forgiven: float) -> bool:
    """Return whether two results agree: numbers up to rounding relative to the largest one, everything else exactly."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[key], wanted[key], forgiven) for key in wanted)
    if isinstance(wanted, list):
        try:
            one, other = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
        except (TypeError, ValueError):  # a list of tensors of different shapes
            return len(found) == len(wanted) and all(close(*pair, forgiven) for pair in zip(found, wanted, strict=True))
        return one.shape == other.shape and float((one - other).abs().max()) <= forgiven * float(other.abs().max())
    return bool(found == wanted)


def warm_up() -> None:
    """Prune once, so that what is imported late is there before the first fork."""
    prune(network(), shares(Trial(""), None), 0.5)


def alone(trial: Trial, folder: Path) -> Any:
    """Return the result of one process with all data."""
    plain = Trial("alone", trial.task)
    folder.mkdir(parents=True, exist_ok=True)
    child = _CONTEXT.Process(target=process, args=(plain, None, folder, 0))
    child.start()
    child.join()
    outcome = json.loads((folder / "None.json").read_text())
    return outcome["result"]


def run_trial(trial: Trial, folder: Path, wanted: Any) -> tuple[str | None, float]:
    """Run one trial; return what went wrong (None: nothing) and the seconds until the last survivor ended."""
    folder.mkdir(parents=True)
    port = free_port()
    children = [_CONTEXT.Process(target=process, args=(trial, k, folder, port)) for k in range(trial.ranks)]
    for child in children:
        child.start()
    began = time.monotonic()
    if trial.delay is not None:
        while not all((folder / f"{k}.ready").exists() for k in range(trial.ranks)):
            time.sleep(0.01)
        time.sleep(trial.delay)
        children[trial.victim].kill()
        began = time.monotonic()
    gone = trial.action in ("kill", "stop") or trial.delay is not None
    survivors = [k for k in range(trial.ranks) if not (gone and k == trial.victim)]
    limit = began + trial.timeout + _GRACE
    for rank in survivors:
        children[rank].join(max(0.0, limit - time.monotonic()))
    seconds = time.monotonic() - began
    hanging = [rank for rank in survivors if children[rank].is_alive()]
    for child in children:
        child.kill()
        child.join()
    fault = f"process {hanging[0]} still at work after {seconds:.0f} s" if hanging else None
    results = []
    for rank in survivors if fault is None else []:
        path = folder / f"{rank}.json"
        if not path.exists():
            said = (folder / f"{rank}.err").read_text()[-300:]
            fault = f"process {rank} ended with code {children[rank].exitcode} without a reason: {said}"
            break
        outcome = json.loads(path.read_text())
        if "error" in outcome:
            if trial.reason is None or re.search(trial.reason, outcome["error"]) is None:
                fault = f"process {rank}: {outcome['error'][:300]}"
                break
            continue
        results.append(outcome["result"])
        if trial.reason is not None and trial.delay is None and trial.moment != "after":
            fault = f"process {rank} ended as if all were well"
            break
    if fault is None and results:
        if any(result != results[0] for result in results[1:]):
            fault = "the processes have different results"
        elif trial.data != "nan" and not close(results[0], wanted, _FORGIVEN[trial.task]):
            fault = "another result than that of one process"
    shutil.rmtree(folder)
    return fault, seconds


_SETTINGS_OF_COLLECT = (
    (("level", "channel"),),
    (("layers", ["0", "7"]),),
    (("positions", 3),),
    (("seed", 1),),
)
_SETTINGS_OF_PRUNE = (
    (("keep", 0.3),),
    (("selection", "greedy"),),
    (("selection", "thorough"),),
    (("allocation", "uniform"),),
    (("reconstruction", "patch"),),
    (("positions", 5),),
    (("distill_steps", 3),),
    (("latency", True),),
    (("widths", {"0": 5}), ("keep", None)),
)


def all_trials(rng: random.Random, random_kills: int) -> list[Trial]:
    """Return the trials in the order in which they are run."""
    trials = [Trial("undisturbed", task, ranks) for task in ("collect", "prune", "sweep") for ranks in (2, 3, 4)]
    for ranks in (2, 3, 4):
        for victim in {0, ranks - 1}:
            lost = {"action": "kill", "victim": victim, "reason": _LOST}
            trials.append(Trial("killed before", "collect", ranks, "before", **lost))
            trials.append(Trial("killed during", "collect", ranks, (1, 1), **lost))
            trials.append(Trial("killed after", "collect", ranks, "after", **lost))
            trials.append(Trial("killed before", "prune", ranks, "before", **lost))
            passes = (2, 3, 4, 5) if ranks == 2 else (2, 4)
            trials += [Trial("killed during", "prune", ranks, (k, 1), **lost) for k in passes]
            trials.append(Trial("killed after", "prune", ranks, "after", **lost))
    for victim in (0, 1):
        lost = {"action": "kill", "victim": victim, "reason": _LOST, "timeout": 4.0}
        trials.append(Trial("killed before it joins", "collect", 2, "init", **lost))
    for _ in range(random_kills):
        ranks, task = rng.randint(2, 4), rng.choice(("collect", "prune", "sweep"))
        delay = rng.uniform(0, {"collect": 0.1, "prune": 1.0, "sweep": 1.5}[task])
        victim = rng.randrange(ranks)
        trials.append(Trial("killed at random", task, ranks, victim=victim, delay=delay, reason=_LOST))
    for victim in (0, 1, 2):
        stop = {"action": "stop", "victim": victim, "reason": _LOST, "timeout": 4.0}
        trials.append(Trial("stopped", "collect", 3, (1, 1), **stop))
        trials.append(Trial("stopped", "prune", 3, (3, 1), **stop))
    for task in ("collect", "prune"):
        for ranks in (2, 4):
            trials.append(Trial("slow", task, ranks, (1, 1), "sleep"))
            trials += [Trial("unequal data", task, ranks, data="unequal")]
            trials += [Trial("no data", task, ranks, data="none", victim=victim) for victim in (0, ranks - 1)]
            for victim in (0, ranks - 1):
                trials.append(Trial("NaN", task, ranks, data="nan", victim=victim, reason="NaN or Inf in the inputs"))
            for change in ("weights", "width", "dtype"):
                for victim in (0, ranks - 1):
                    other = {"change": change, "victim": victim, "reason": _DIFFER}
                    trials.append(Trial(f"other {'weights' if change == 'weights' else 'model'}", task, ranks, **other))
    for ranks, victim in ((2, 0), (2, 1), (3, 2)):
        other = {"victim": victim, "reason": _DIFFER}
        trials += [Trial("other settings", "collect", ranks, change=c, **other) for c in _SETTINGS_OF_COLLECT]
        trials += [Trial("other settings", "prune", ranks, change=c, **other) for c in _SETTINGS_OF_PRUNE]
        for keeps in ([0.6], [0.6, 0.3], [0.4, 0.6, 0.5]):
            trials.append(Trial("other settings", "sweep", ranks, change=(("keeps", keeps),), **other))
    return trials


def campaign(root: Path, rng: random.Random, random_kills: int, only: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Run all trials; return one record for each kind."""
    warm_up()
    trials = [trial for trial in all_trials(rng, random_kills) if not only or trial.kind in only]
    wanted = {task: alone(Trial("", task), root / f"alone-{task}") for task in {trial.task for trial in trials}}
    counts: dict[str, dict[str, Any]] = {}
    for index, trial in enumerate(trials):
        fault, seconds = run_trial(trial, root / f"trial-{index}", wanted[trial.task])
        row = counts.setdefault(trial.kind, {"kind": trial.kind, "tried": 0, "failed": 0, "slowest": 0.0, "said": []})
        row["tried"] += 1
        row["slowest"] = max(row["slowest"], seconds)
        if fault is not None:
            row["failed"] += 1
            row["said"].append(f"{trial}: {fault}")
            print(f"   {trial}: {fault}", flush=True)
    return list(counts.values())
