"""The benchmark of cover complexity: nested sets, other ratios, lines, and going on after a stop."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cover_complexity as benchmark

from specprune.analysis.cover_complexity import cover_complexity
from specprune.testbed.datasets import load_dataset


@pytest.fixture(scope="module")
def digits():
    data = benchmark.nested(load_dataset("digits"))
    return replace(data, test_inputs=data.test_inputs[:150], test_targets=data.test_targets[:150])


def test_nested_sets_are_measured_once_and_read_again(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", (100, 300))
    small = replace(digits, train_inputs=digits.train_inputs[:400], train_targets=digits.train_targets[:400])
    found = benchmark.measured_distances(small, tmp_path)
    assert list(found) == [100, 300, 400]
    for size, classes in ((100, 10), (400, 10), (300, 2), (300, 5)):
        part = benchmark.restricted(small, size, classes)
        whole = cover_complexity(part.train_inputs, part.train_targets, part.test_inputs, part.test_targets)
        record = benchmark.measured_record(small, found[size], size, classes)
        assert record["train"] == len(part.train_inputs)
        assert record["cover_complexity"] == pytest.approx(whole.cover_complexity, rel=1e-12)
        apart = (part.test_inputs.flatten(1).double()[:, None] - part.train_inputs.flatten(1).double()[None]).norm(
            dim=2
        )
        wrong = part.train_targets[apart.argmin(1)] != part.test_targets
        assert record["neighbour_error"] == pytest.approx(float(wrong.double().mean()))
    (tmp_path / "digits-300.npz").unlink()  # as after a stop
    monkeypatch.setattr(benchmark, "class_distances", count := Counted(benchmark.class_distances))
    again = benchmark.measured_distances(small, tmp_path)
    assert count.calls == 1
    assert all(torch.equal(again[size], found[size]) for size in found)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_other_ratios_agree_with_loops():
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(12, 3, generator=generator, dtype=torch.float64) + 0.5
    targets = torch.arange(12) % 3
    found[torch.arange(12), targets] -= 0.4
    measured = benchmark.cover_from_distances(found, targets, torch.arange(3), 30, 4, unit_box=True)
    rows = list(zip(found.tolist(), targets.tolist(), strict=True))
    own = np.mean([row[k] for row, k in rows])  # every class has as many points
    image = np.mean([min(row[:k] + row[k + 1 :]) for row, k in rows])
    closest = np.mean(
        [min(np.mean([row[i] for row, k in rows if k == j]) for i in range(3) if i != j) for j in range(3)]
    )
    squares = [(min(row) ** 2, row[k] ** 2, (sum(v * v for v in row) - row[k] ** 2) / 2) for row, k in rows]
    total, own_square, other_square = np.mean(squares, axis=0)
    expected = {
        "closest class": measured.total_distance / (closest - own),
        "closest image": measured.total_distance / (image - own),
        "squares": total / (other_square - own_square),
    }
    assert benchmark.readings(found, targets, measured) == pytest.approx(expected)
    swapped = (targets + 1) % 3
    other = benchmark.cover_from_distances(found, swapped, torch.arange(3), 30, 4, unit_box=True)
    assert benchmark.readings(found, swapped, other)["closest image"] == math.inf


def test_lines_by_hand():
    exact = benchmark.line([1, 2, 4], [3, 6, 12])
    assert [exact[k] for k in ("multiple", "share of multiple", "slope", "intercept", "pearson", "spearman")] == (
        pytest.approx([3, 1, 3, 0, 1, 1], abs=1e-12)
    )
    found = benchmark.line([0, 1, 2], [1, 1, 4])
    assert found["multiple"] == pytest.approx(9 / 5)
    assert found["share of multiple"] == pytest.approx(1 - (1 + 0.64 + 0.16) / 6)
    assert (found["slope"], found["intercept"]) == pytest.approx((1.5, 0.5))
    assert found["pearson"] == pytest.approx(math.sqrt(0.75))


def test_a_stopped_run_goes_on_and_sums_up(digits, tmp_path, monkeypatch):
    small = replace(digits, train_inputs=digits.train_inputs[:300], train_targets=digits.train_targets[:300])
    monkeypatch.setattr(benchmark, "SIZES", (200, 250))
    monkeypatch.setattr(benchmark, "_EPOCHS", {"mlp": 1, "vgg": 1})
    monkeypatch.setattr(benchmark, "load_dataset", lambda name: small)
    monkeypatch.setattr(benchmark, "nested", lambda dataset: dataset)
    arguments = ["", "--data", "digits", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    runs = tmp_path / "work" / "networks.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (2 + 2)
    first = json.loads((tmp_path / "out" / "cover_complexity.json").read_text())
    few = [int((small.train_targets < classes).sum()) for classes in (2, 5)]
    assert [record["train"] for record in first["sets"]] == [200, 250, 300, *few]
    runs.write_text("".join(lines[:-1]) + lines[-1][:20])
    monkeypatch.setattr(benchmark, "train", count := Counted(benchmark.train))
    benchmark.main()
    assert count.calls == 1
    again = json.loads((tmp_path / "out" / "cover_complexity.json").read_text())
    assert [r["test_error"] for r in again["networks"]] == [r["test_error"] for r in first["networks"]]
    assert (tmp_path / "out" / "cover-complexity.png").stat().st_size > 1000
