"""Networks per second: trained together against one by one, with the same settings, epochs and checks.

The one-by-one twin is what anyone would write: an ordinary module, torch.optim.SGD, a permutation an epoch, and the
same measurements of the training loss.  All images are on the device for both.  Fewer networks may be timed one by one
(--alone), for its rate does not depend on their number.  The processor's seconds are shown beside those of the clock:
on a busy machine only they compare.  The errors of both are averaged, to show that both train the same thing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from pruning_quality import where_run
from torch.nn import functional

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.testbed import evaluate, load_dataset, zoo_grid, zoo_network
from specprune.testbed.datasets import Dataset
from specprune.testbed.ensemble import MOMENTUM, is_check, train_together
from specprune.testbed.zoo import ZooSetting, own_labels, zoo_examples

NEVER = 1e-12  # a training loss that nobody reaches: all networks train for all epochs


def train_alone(examples: Dataset, setting: ZooSetting, epochs: int) -> float:
    """Train one ordinary network and return its test error."""
    data = own_labels(examples, setting)
    inputs, targets = data.train_inputs, data.train_targets
    model = zoo_network(setting, data).to(inputs.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.learning_rate, momentum=MOMENTUM, weight_decay=setting.weight_decay
    )
    whole = setting.n // setting.batch_size * setting.batch_size
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(setting.n, device=inputs.device)[:whole].split(setting.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
        if is_check(epoch, epochs):
            evaluate(model, [(inputs, targets)])
    return evaluate(model, [(data.test_inputs, data.test_targets)])[0]


def timed(function, device: torch.device):
    """Return what a function returns, and the seconds of the clock and of the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time()
    found = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--family", default="mlp")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--count", default="16,64", help="networks trained together")
    parser.add_argument("--alone", type=int, default=8, help="networks trained one by one (default 8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    counts = [int(count) for count in options.count.split(",")]
    settings = zoo_grid(
        data=options.data,
        family=options.family,
        width=options.width,
        depth=options.depth,
        n=options.n,
        learning_rate=(0.03, 0.05),
        batch_size=options.batch_size,
        dropout=options.dropout,
        seed=range((max(*counts, options.alone) + 1) // 2),
    )
    settings = sorted(settings, key=lambda setting: (setting.seed, setting.learning_rate))  # any number has both rates
    examples = zoo_examples(load_dataset(options.data, options.data_dir), options.n).to(device)

    def one_by_one() -> list[float]:
        return [train_alone(examples, setting, options.epochs) for setting in settings[: options.alone]]

    def together(count: int, epochs: int) -> list[float]:
        runs = train_together(examples, settings[:count], target_loss=NEVER, max_epochs=epochs)
        return [run.test_error for run in runs]

    train_alone(examples, settings[0], 1)  # warm up
    for count in counts:
        together(count, 1)
    jobs = [("one by one", options.alone, one_by_one)]
    jobs += [("together", count, lambda count=count: together(count, options.epochs)) for count in counts]
    rows = []
    for name, count, job in jobs:
        errors, clock, processor = timed(job, device)
        row = {"trained": name, "count": count, "seconds": clock, "processor_seconds": processor}
        row |= {"per_second": count / clock, "per_processor_second": count / processor}
        rows.append({**row, "test_error": sum(errors) / count})
    for row in rows:
        row["times"] = row["per_second"] / rows[0]["per_second"]
        row["processor_times"] = row["per_processor_second"] / rows[0]["per_processor_second"]
    asked = {key: value for key, value in vars(options).items() if key not in ("out", "data_dir")}
    print(format_table(rows, title=", ".join(f"{key} {value}" for key, value in asked.items())))
    path = options.out / f"zoo_speed_{options.family}_{device.type}.json"
    write_text(path, to_json({**where_run("specprune", "torch", "numpy"), "options": asked, "rows": rows}) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
