"""What measuring and pruning take and leave: memory, tensors, hooks, open files; what is said when memory runs out."""

import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import small_convnet, small_mlp, tensor
from torch import Tensor, nn

from specprune.analysis import layer_spectra
from specprune.compress import collect_moments, collection_ceiling, load_pruned, prune, save_pruned
from specprune.compress import moments as moments_module
from specprune.compress import reconstruction as reconstruction_module
from specprune.compress.gram import GramSum

STRESS = Path(__file__).parents[1] / "benchmarks" / "stress" / "resources.py"
IMAGES = [tensor(12, 2, 8, 8, seed=k) for k in range(2)]


# --- the ceiling


def test_ceiling_of_a_linear_layer_in_full():
    model = nn.Sequential(nn.Linear(200, 6)).double()
    found = collection_ceiling(model, tensor(1000, 200, dtype=torch.float64))
    assert found.model == 8 * 1206
    assert found.moments == 8 * 200 * 201  # of a float64 model, no sums in float32
    assert found.batches == 2 * 8 * 200_000 + 8 * 200_000 + 24 * 200
    assert found.forward == 8 * 6000
    assert found.rows == 2 * 8 * 200_000 + 8 * 1000 + 8 * 1024 * 200
    assert found.finish == 24 * 200**2
    assert found.total == found.model + found.moments + found.batches + found.forward + found.rows
    assert found.layer == "0"
    single = collection_ceiling(model.float(), tensor(1000, 200))
    assert single.moments == 8 * 200 * 201 + 4 * 200**2
    assert str(found.total) in str(found)
    assert json.loads(found.to_json())["total"] == found.to_records()[-1]["bytes"] == found.total


def test_ceiling_of_drawn_patches_in_full():
    model = nn.Sequential(nn.Conv2d(5, 3, 3, stride=2))
    found = collection_ceiling(model, tensor(100, 5, 9, 9), level="patch", positions=7)
    assert found.rows == 2 * 4 * 700 * 45 + 8 * 700 * 9 + 12 * 2 * 45**2  # 700 rows: two products of 256
    assert found.forward == 4 * 100 * 3 * 16
    everything = collection_ceiling(model, tensor(100, 5, 9, 9), level="patch")
    assert everything.rows == 2 * 4 * 1600 * 45 + 8 * 1600 * 9 + 12 * 6 * 45**2


def test_ceiling_of_layers_without_inputs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of them
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    assert collection_ceiling(model, tensor(10, 4)).rows == collection_ceiling(model[:1], tensor(10, 4)).rows
    collect_moments(model, [tensor(10, 4)])


def test_ceiling_does_not_change_the_model_and_refuses_nonsense():
    model = small_convnet().train()
    collection_ceiling(model, IMAGES[0])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="the batch has no samples"):
        collection_ceiling(model, IMAGES[0][:0])
    with pytest.raises(ValueError, match="level='pixel'"):
        collection_ceiling(model, IMAGES[0], level="pixel")
    assert collection_ceiling(model, IMAGES[0], ["fc2"]).moments == 8 * 7 * 8


def test_products_of_wide_rows_take_no_more_than_the_rows(monkeypatch):
    # As on an accelerator, where triangles are not used: all products at once took d / 256 times what the rows take.
    sums = GramSum(512, torch.device("cpu"))
    sums._half = False
    sizes = []
    real = torch.bmm

    def noting(*args):
        found = real(*args)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch, "bmm", noting)
    rows = tensor(2048 + 100, 512)
    sums.add(rows)
    assert len(sizes) > 1
    assert max(sizes) <= rows.numel()
    exact = rows.double().T @ rows.double()
    assert float((sums.finish() - exact).abs().max()) < 1e-6 * float(exact.diagonal().max())
    torch.testing.assert_close(sums.total, rows.double().sum(0), rtol=1e-4, atol=1e-4)
    assert sums.rows == len(rows)


@pytest.fixture(scope="module")
def stressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stress")
    command = [sys.executable, str(STRESS), "--only", "memory", "leaks", "--batches", "10", "60", "--times", "100"]
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, timeout=300)
    assert (folder / "resources.json").exists(), done.stderr[-2000:]
    return json.loads((folder / "resources.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_peaks_are_below_the_ceiling_and_do_not_grow(stressed):
    for row in stressed["memory"]:
        assert row["fault"] is None, row
        if row["ceiling_mb"] is not None:
            assert row["few_mb"] > 0.2 * row["ceiling_mb"], row  # the ceiling says something


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_calls_leave_nothing(stressed):
    for row in stressed["leaks"]:
        assert row["fault"] is None, row


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"level": "patch"}, {"level": "patch", "positions": 32}])
def test_the_ceiling_holds_on_an_accelerator(settings):
    model = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 3, stride=2)).cuda()
    batches = [tensor(32, 64, 32, 32, seed=k).cuda() for k in range(3)]
    ceiling = collection_ceiling(model, batches[0], **settings)
    collect_moments(model, batches[:1], **settings)  # cuBLAS takes its workspace once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    collect_moments(model, batches, **settings)
    assert torch.cuda.max_memory_allocated() - before <= ceiling.total


# --- what is left behind


def held():
    gc.collect()
    found = gc.get_objects()
    return sum(issubclass(type(one), Tensor) for one in found)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_nothing_is_left_behind(tmp_path):
    model = small_convnet()
    broken = [*IMAGES, IMAGES[0] * float("nan")]

    def everything():
        save_pruned(prune(model, IMAGES, 0.5), tmp_path / "pruned.pt")
        load_pruned(tmp_path / "pruned.pt", small_convnet)
        layer_spectra(model, IMAGES)
        for call in (lambda: prune(model, broken, 0.5), lambda: layer_spectra(model, broken)):
            with pytest.raises(ValueError, match="NaN or Inf"):
                call()

    everything()
    tensors, files = held(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        everything()
    assert held() == tensors
    assert len(os.listdir("/proc/self/fd")) == files
    assert hooks(model) == 0


# --- memory runs out


def refusing(real, largest, error):
    """A function whose results may have `largest` numbers; beyond that it does what a failed allocation does."""

    def function(*args, **keywords):
        found = real(*args, **keywords)
        if found.numel() > largest:
            raise error
        return found

    return function


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("Unable to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "CPU", "numpy"])
def test_running_out_of_memory_names_the_layer_and_what_to_lower(monkeypatch, error):
    # 12 images: 12 * 64 * 18 numbers of conv1's patches, 12 * 16 * 54 of conv2's
    model = small_convnet()
    monkeypatch.setattr(moments_module, "patch_rows", refusing(moments_module.patch_rows, 12_000, error))
    reason = "out of memory while collecting the moments of layer 'conv1': give smaller batches, or fewer layers="
    with pytest.raises(torch.OutOfMemoryError, match=reason) as caught:
        collect_moments(model, IMAGES, level="patch")
    assert str(caught.value).count("out of memory while") == 1
    assert str(error) in str(caught.value)
    smaller = [part for batch in IMAGES for part in batch.split(6)]  # what the message asks for
    found = collect_moments(model, smaller, level="patch")
    monkeypatch.undo()
    wanted = collect_moments(model, IMAGES, level="patch")
    for name, entry in wanted.items():
        torch.testing.assert_close(found[name].gram, entry.gram, rtol=1e-5, atol=1e-5)


def test_running_out_of_memory_elsewhere(monkeypatch):
    model, batches = small_mlp((8, 200, 9, 3)), [tensor(50, 8)]
    error = ERRORS[0]
    with monkeypatch.context() as patch:
        patch.setattr(GramSum, "finish", lambda self: (_ for _ in ()).throw(error))
        with pytest.raises(torch.OutOfMemoryError, match="adding up the moments of layer 'fc1': ask for fewer layers="):
            collect_moments(model, batches)
    with monkeypatch.context() as patch:
        patch.setattr(GramSum, "_widen", refusing(GramSum._widen, 5000, error))
        with pytest.raises(torch.OutOfMemoryError, match="collecting the moments of layer 'fc2'"):
            collect_moments(model, batches)
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction_module, "patch_rows", refusing(reconstruction_module.patch_rows, 5000, error))
        with pytest.raises(torch.OutOfMemoryError, match="refitting layer 'fc2': give smaller batches or fewer pos"):
            prune(model, batches, 0.5)
    with pytest.raises(torch.OutOfMemoryError, match="running the model on a batch: give smaller batches"):
        collect_moments(model, batches, forward=lambda net, batch: refusing(net, 100, error)(batch))


def test_other_errors_of_the_model_stay_what_they_are():
    def forward(net, batch):
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match=r"^no such operator$") as caught:
        collect_moments(small_mlp(), [tensor(5, 8)], forward=forward)
    assert type(caught.value) is RuntimeError
