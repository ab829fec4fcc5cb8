"""Pruned networks on disk."""

import copy
import os

import numpy as np
import pytest
import torch
from helpers import randomise, small_convnet, small_mlp, tensor
from torch import nn

from specprune._files import load_arrays, save_arrays
from specprune.compress import load_pruned, prune, save_pruned
from specprune.testbed import vgg

FLAT, IMAGES = tensor(20, 8), tensor(20, 2, 8, 8)
NETWORKS = {
    "mlp": (small_mlp, FLAT),
    "convnet": (small_convnet, IMAGES),
    "vgg": (lambda: randomise(vgg((6, 5, 7), 3, 2)), IMAGES),
    "bfloat16": (lambda: small_mlp().bfloat16(), FLAT.bfloat16()),
    "bfloat16 convnet": (lambda: small_convnet().bfloat16(), IMAGES.bfloat16()),
    "float64": (lambda: small_convnet().double(), IMAGES.double()),
}


def pruned_network(name="mlp", **options):
    make, data = NETWORKS[name]
    return prune(make(), [data], 0.5, **options)


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def pruned():
    return pruned_network()


@pytest.fixture
def saved(pruned, tmp_path):
    path = tmp_path / "net.npz"
    save_pruned(pruned, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_comes_back_bit_for_bit(name, tmp_path):
    make, data = NETWORKS[name]
    pruned = pruned_network(name)
    save_pruned(pruned, tmp_path / "net.npz")
    fresh = make()
    loaded = load_pruned(tmp_path / "net.npz", lambda: fresh)
    assert_same(loaded, pruned.model)
    assert not loaded.training
    assert torch.equal(loaded(data), pruned.model.eval()(data))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert repr(loaded) == repr(pruned.model)  # the sizes that modules state are the new ones


def test_fine_tuned_networks_can_be_saved(tmp_path, pruned):
    model = copy.deepcopy(pruned.model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(FLAT).square().sum().backward()
    optimizer.step()
    save_pruned(model, tmp_path / "tuned.npz")
    loaded = load_pruned(tmp_path / "tuned.npz", small_mlp)
    assert_same(loaded, model)
    assert not torch.equal(loaded.fc1.weight, pruned.model.fc1.weight)
    loaded(FLAT).sum().backward()
    assert loaded.fc1.weight.grad is not None


def test_saving_leaves_the_network_alone(tmp_path):
    pruned = pruned_network("convnet")
    before = copy.deepcopy(pruned.model.state_dict())
    mode = pruned.model.training
    save_pruned(pruned, tmp_path / "net.npz")
    assert pruned.model.training == mode
    assert all(torch.equal(before[name], value) for name, value in pruned.model.state_dict().items())


def renamed():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


def other_kind():
    model = small_mlp()
    model.fc2 = nn.Conv2d(12, 9, 1)
    return model


def without_bias():
    model = small_mlp()
    model.fc2 = nn.Linear(12, 9, bias=False)
    return model


def with_more():
    model = small_mlp()
    model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (renamed, "module 'fc1' is a Linear, the factory's network has nothing"),
        (other_kind, "module 'fc2' is a Linear, the factory's network has Conv2d"),
        (without_bias, r"does not fit the factory's network \(missing \[\], unknown \['fc2\.bias'\]"),
        (with_more, r"does not fit the factory's network \(missing \['extra\.bias', 'extra\.weight'\]"),
        (lambda: small_mlp((8, 2, 2, 3)), r"'fc1\.weight' has shape .* more than the full \(2, 8\)"),
    ],
)
def test_another_architecture_is_refused(saved, factory, message):
    with pytest.raises(ValueError, match=message):
        load_pruned(saved, factory)


def test_a_factory_makes_modules(saved):
    with pytest.raises(TypeError, match=r"factory\(\) returned dict, expected a torch\.nn\.Module"):
        load_pruned(saved, dict)


def test_truncated_files_are_refused(saved):
    content = saved.read_bytes()
    for length in [*range(0, len(content), 61), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a readable specprune pruned network file"):
            load_pruned(saved, small_mlp)


def test_damaged_files_are_refused_or_read_the_same(saved, pruned):
    content = saved.read_bytes()
    refused = 0
    for k in range(0, len(content), 2):
        saved.write_bytes(content[:k] + bytes([content[k] ^ (1 << k // 2 % 8)]) + content[k + 1 :])
        try:
            loaded = load_pruned(saved, small_mlp)
        except ValueError:
            refused += 1
        else:
            assert_same(loaded, pruned.model)
    assert refused > len(content) / 4


def test_other_files_are_refused(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no such file .*specprune pruned network"):
        load_pruned(tmp_path / "absent.npz", small_mlp)
    (tmp_path / "text.npz").write_text("hello")
    torch.save(small_mlp().state_dict(), tmp_path / "torch.pt")
    np.savez(tmp_path / "plain.npz", a=np.zeros(3))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    for name in ("text.npz", "torch.pt", "plain.npz", "plain.npy"):
        with pytest.raises(ValueError, match="not a readable specprune pruned network file"):
            load_pruned(tmp_path / name, small_mlp)
    save_arrays(tmp_path / "moments.npz", {}, {"kind": "moments"})
    with pytest.raises(ValueError, match="holds 'moments', expected a specprune pruned network file"):
        load_pruned(tmp_path / "moments.npz", small_mlp)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_ever_unpickled(tmp_path, saved):
    with np.load(saved) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["tensor:fc1.bias"] = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(saved, **arrays)
    with pytest.raises(ValueError, match="not a readable"):
        load_pruned(saved, small_mlp)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, header: header.update(version=2), "format version 2, this program reads version 1"),
        (lambda arrays, header: header.pop("structure"), "the header has no structure"),
        (lambda arrays, header: header["structure"]["fc1"]["sizes"].update(forward=3), "has the size forward=3"),
        (
            lambda arrays, header: header["structure"]["fc1"]["sizes"].update(in_features=0),
            "has the size in_features=0",
        ),
        (lambda arrays, header: header["dtypes"].update({"fc1.bias": "float64"}), "is stored as torch.float32"),
        (lambda arrays, header: header["dtypes"].update({"fc1.bias": "Tensor"}), "has the dtype 'Tensor'"),
        (lambda arrays, header: arrays.pop("tensor:fc1.bias"), r"missing \['fc1.bias'\]"),
        (
            lambda arrays, header: arrays.update({"tensor:fc1.bias": np.zeros((2, 2), np.float32)}),
            "'fc1.bias' has shape",
        ),
    ],
    ids=["version", "structure", "unknown size", "size 0", "dtype", "no dtype", "missing", "dimensions"],
)
def test_headers_that_contradict_are_refused(saved, change, message):
    arrays, header = load_arrays(saved, "pruned network")
    change(arrays, header)
    save_arrays(saved, arrays, header)
    with pytest.raises(ValueError, match=message):
        load_pruned(saved, small_mlp)


def test_a_failing_disk_leaves_the_old_file(monkeypatch, saved, pruned):
    before = saved.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(pruned_network("float64"), saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert_same(load_pruned(saved, small_mlp), pruned.model)
