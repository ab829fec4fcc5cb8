"""The trained networks of the pruning benchmark, made once and kept: `python benchmarks/networks.py --help`.

The networks are trained without the last 10,000 training images, which can choose defaults without touching the test
set.  bfloat16 autocast and channels-last memory halve the time on CPUs that have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from specprune.testbed import load_dataset
from specprune.testbed.datasets import Dataset
from specprune.testbed.networks import build_network
from specprune.testbed.training import (
    Recipe,
    TrainedNetwork,
    default_recipe,
    evaluate,
    load_checkpoint,
    save_checkpoint,
)

HELD_OUT = 10_000  # training images at the end, for tuning
TUNING_SEEDS = (0, 11)
REPORT_SEEDS = (1, 2, 3, 4, 5)
TASKS = {
    "vgg": ("fashion-mnist", "vgg"),
    "resnet": ("fashion-mnist", "resnet"),
    "mlp": ("mnist", "mlp-300-1000-300"),
    "resnet20": ("cifar10", "resnet20"),  # the last three are for an accelerator
    "resnet56": ("cifar10", "resnet56"),
    "vgg16": ("cifar10", "vgg16"),
}
_CIFAR_EPOCHS = 40


def trained_network(folder: Path, task: str, seed: int, device: str = "cpu") -> TrainedNetwork:
    """Return the trained network of a task and seed, training it if the folder does not have it."""
    path = folder / f"{task}-{seed}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, _train(*TASKS[task], seed, device))
    return load_checkpoint(path)


def _train(data: str, net: str, seed: int, device: str) -> TrainedNetwork:
    recipe: Recipe = default_recipe(data, net, seed)
    if data == "cifar10":
        recipe = dataclasses.replace(recipe, epochs=_CIFAR_EPOCHS)
    dataset = load_dataset(data).to(device)
    count = train_images(dataset)
    model = build_network(net, dataset, seed).to(device, memory_format=torch.channels_last)
    steps = recipe.epochs * (count // recipe.batch_size)
    if recipe.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2)
    order = torch.Generator().manual_seed(seed)
    history = []
    for epoch in range(1, recipe.epochs + 1):
        permutation = torch.randperm(count, generator=order).to(device)
        total = torch.zeros((), device=device)
        batches = permutation[: count // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)
        model.train()
        for chosen in batches:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                inputs = dataset.train_inputs[chosen]
                outputs = model(_images(_augmented(inputs, order) if data == "cifar10" else inputs))
            loss = functional.cross_entropy(outputs.float(), dataset.train_targets[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        history.append({"epoch": epoch, "loss": float(total) / len(batches), "error": float("nan")})
    plain: nn.Module = model.to(memory_format=torch.contiguous_format).eval()
    train_error, _ = evaluate(plain, [(dataset.train_inputs[:10_000], dataset.train_targets[:10_000])])
    test_error, _ = evaluate(plain, dataset.test_batches())
    return TrainedNetwork(
        plain.cpu(), recipe, tuple(history), train_error, test_error, dataset.input_shape, dataset.classes
    )


def train_images(dataset: Dataset) -> int:
    """Return how many training images the networks are trained on."""
    return len(dataset.train_inputs) - HELD_OUT


def _augmented(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images shifted by up to four pixels, half of the batches mirrored."""
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    padded = functional.pad(inputs, (4, 4, 4, 4))[:, :, down : down + inputs.shape[2], right : right + inputs.shape[3]]
    return padded.flip(3) if int(torch.randint(0, 2, (1,), generator=generator)) else padded


def _images(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="vgg,resnet,mlp", help=f"which of {', '.join(TASKS)}")
    parser.add_argument("--seeds", default=",".join(map(str, (*TUNING_SEEDS, *REPORT_SEEDS))))
    parser.add_argument("--folder", type=Path, default=Path("results/quality/networks"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for seed in map(int, options.seeds.split(",")):
        for task in options.tasks.split(","):
            start = time.perf_counter()
            trained = trained_network(options.folder, task, seed, options.device)
            print(f"{task} seed {seed}: test error {trained.test_error:.2%} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
