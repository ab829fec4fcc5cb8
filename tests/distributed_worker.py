"""What every process of the tests' data-parallel runs does: `torchrun distributed_worker.py TASK FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import small_convnet, small_mlp, tensor
from torch import nn

from specprune.compress import CalibrationData, collect_moments, prune
from specprune.compress.distillation import distill
from specprune.compress.distributed import decided_by_first, first_of


def recurrent():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.rnn, self.head = nn.Linear(4, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(self.inner(x).relu())[0])

    return Reader()


MODELS = {
    "mlp": (lambda: small_mlp((8, 24, 18, 4)), tensor(70, 8, dtype=torch.float64)),
    "conv": (small_convnet, tensor(70, 2, 8, 8, dtype=torch.float64)),
    "rnn": (recurrent, tensor(70, 5, 4, dtype=torch.float64)),
}
# Rank to batches, as rows of the data: 41 and 29 samples, the last process has none.
SHARDS = (((0, 16), (16, 32), (32, 41)), ((41, 61), (61, 61), (61, 70)), ())
LEVELS = ("channel", "patch")
PRUNED = {
    "mlp": {"keep": 0.4},
    "conv": {"keep": 0.4},
    "rnn": {"keep": 0.5},
    "distilled": {"keep": 0.4, "distill_steps": 5},
    "thorough": {"keep": 0.4, "selection": "thorough", "allocation": "sensitivity"},
    "one pass": {"keep": 0.4, "reconstruction": "patch"},
}


def model_and_batches(name, rank=None):
    """A float64 model with the data of one process; of all in one list without a rank."""
    make, data = MODELS.get(name, MODELS["conv"])
    shards = SHARDS if rank is None else (SHARDS[rank],)
    return make().double(), [data[start:stop] for shard in shards for start, stop in shard]


def distilled(batches):
    """A few steps of one network towards another, without the exchange of weights that ends `prune`."""
    pupil, teacher = small_convnet(seed=1).double(), small_convnet().double()
    distill(pupil, teacher, CalibrationData(batches), 5, seed=0)
    return pupil.state_dict()


def merged_batches():
    """What all processes together see in each of five steps of distillation."""
    parts = [[batch for batch in model_and_batches("conv", rank)[1] if len(batch)] for rank in (0, 1)]
    return [torch.cat([own[step % len(own)] for own in parts]) for step in range(5)]


def results(rank=None):
    found = {"steps": distilled(merged_batches() if rank is None else model_and_batches("conv", rank)[1])}
    for level in LEVELS:
        moments = collect_moments(*model_and_batches("conv", rank), level=level)
        layers = {name: (entry.rows, entry.total, entry.gram) for name, entry in moments.items()}
        found[level] = (moments.samples, layers)
    for name, settings in PRUNED.items():
        pruned = prune(*model_and_batches(name, rank), positions=None, **settings)
        kept = {group: nodes.indices.tolist() for group, nodes in pruned.nodes.items()}
        found[name] = (pruned.report.samples, kept, pruned.model.state_dict())
    return found


def shared(rank):
    """What the small building blocks give."""
    big = tensor(1000, 3)
    batch = {"x": big[rank : rank + 2], "n": torch.tensor(rank), "b": torch.zeros(0, 2).bfloat16(), "label": str(rank)}
    sent = CalibrationData([batch] if rank else []).first()

    def refuse():
        raise ValueError(f"refused by {rank}")

    try:
        decided_by_first(refuse)
        message = ""
    except ValueError as error:
        message = str(error)
    return sent, first_of(None), decided_by_first(lambda: rank), message


# What one process does otherwise: arguments of `collect_moments` or `prune`, or the model.
ODD_ARGUMENTS = {
    "level": ("collect", {"level": "patch"}),
    "layers": ("collect", {"layers": ["fc2"]}),
    "positions": ("collect", {"positions": 3}),
    "keep": ("prune", {"keep": 0.3}),
    "allocation": ("prune", {"allocation": "uniform"}),
    "reconstruction": ("prune", {"reconstruction": "patch"}),
    "latency": ("prune", {"latency": True}),
    "call": ("either", {}),
    "activation": ("collect", {}),
    "width": ("collect", {}),
    "dtype": ("collect", {}),
    "weights": ("collect", {}),
}


def refusal(odd, rank):
    """What a process says when process 1 makes another call, or makes it with another model; "" if it ends well."""
    task, settings = ODD_ARGUMENTS[odd]
    model, batches = model_and_batches("mlp", rank)
    if rank == 1 and odd == "activation":
        model.relu1 = nn.Tanh()
    elif rank == 1 and odd == "width":
        model = small_mlp((8, 24, 19, 4)).double()
    elif rank == 1 and odd == "dtype":
        model, batches = model.float(), [batch.float() for batch in batches]
    elif rank == 1 and odd == "weights":
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1e-9
    collects = task == "collect" or (task == "either" and rank != 1)
    try:
        if collects:
            collect_moments(model, batches, **(settings if rank == 1 else {}))
        else:
            prune(model, batches, **{"keep": 0.5, **(settings if rank == 1 else {})})
    except ValueError as error:
        return str(error)
    return ""


class Leaving:
    """Batches of a process that ends in the middle of its third reading."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.batches:
            if self.passes == 3:
                os._exit(0)  # without a word, and as if all were well
            yield batch


def main(task, folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if task == "results":
        found = {**results(rank), "shared": shared(rank)}
        try:
            collect_moments(model_and_batches("mlp")[0], [])
        except ValueError as error:
            found["empty"] = str(error)
        model, batches = model_and_batches("mlp", rank)
        with torch.no_grad():
            model.fc2.bias[0] += rank == 1
        try:
            prune(model, batches, 0.5)
        except ValueError as error:
            found["unequal"] = str(error)
        found["refused"] = {odd: refusal(odd, rank) for odd in ODD_ARGUMENTS}
        torch.save(found, Path(folder) / f"{rank}.pt")
    elif task == "leave":
        model, batches = model_and_batches("mlp", rank)
        prune(model, Leaving(batches) if rank == 1 else batches, 0.5)
    elif task == "refuse":
        model, batches = model_and_batches("mlp", rank)
        collect_moments(model, [batch.float() for batch in batches] if rank == 1 else batches)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A thread of gloo that frees a tensor while the interpreter ends aborts the process (PyTorch pull request 179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
