"""Pruned networks on disk."""

import copy
import os

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from test_architectures import NETWORKS as ARCHITECTURES
from test_architectures import network
from torch import nn
from torch.nn import functional

from specprune._files import load_arrays, save_arrays
from specprune.compress import load_pruned, prune, remove_nodes, save_pruned
from specprune.compress.attention import HeadAttention, replace_attention
from specprune.compress.batches import CalibrationData
from specprune.compress.groups import find_groups
from specprune.testbed import vgg

FLAT, IMAGES = tensor(20, 8), tensor(20, 2, 8, 8)
NETWORKS = {
    "mlp": (small_mlp, FLAT),
    "convnet": (small_convnet, IMAGES),
    "vgg": (lambda: randomise(vgg((6, 5, 7), 3, 2)), IMAGES),
    "bfloat16": (lambda: small_mlp().bfloat16(), FLAT.bfloat16()),
    "bfloat16 convnet": (lambda: small_convnet().bfloat16(), IMAGES.bfloat16()),
    "prelu": (lambda: nn.Sequential(nn.Linear(8, 12), nn.PReLU(12), nn.Linear(12, 3)), FLAT),
    "float64": (lambda: small_convnet().double(), IMAGES.double()),
}


def pruned_network(name="mlp", **options):
    make, data = NETWORKS[name]
    return prune(make(), [data], 0.5, **options)


def fresh(name):
    """Another network of the same kind: its weights are not those of the saved one, and are overwritten."""
    make = NETWORKS[name][0] if name in NETWORKS else ARCHITECTURES[name][0]
    torch.manual_seed(99)
    return make()


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
    loaded = load_pruned(tmp_path / "net.npz", make)
    assert_same(loaded, pruned.model)
    assert not loaded.training
    assert torch.equal(loaded(data), pruned.model.eval()(data))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert repr(loaded) == repr(pruned.model)  # the sizes that modules state are the new ones


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back(name, tmp_path):
    model, data, inputs = network(name)
    pruned = prune(model, data, 0.5, allocation="uniform", selection="magnitude", reconstruction="none")
    save_pruned(pruned, tmp_path / "net.npz")
    loaded = load_pruned(tmp_path / "net.npz", lambda: fresh(name))
    assert_same(loaded, pruned.model)
    assert repr(loaded) == repr(pruned.model)
    for module in loaded.modules():
        if isinstance(module, nn.RNNBase):
            assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    expected = pruned.model.eval()(inputs)
    assert torch.equal(loaded(inputs), expected)
    loaded.train()
    loaded(inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_heads_go_into_replaced_networks_too(tmp_path):
    model, data, inputs = network("pre-norm encoder")
    pruned = prune(model, data, 0.5, allocation="uniform", reconstruction="none")
    save_pruned(pruned.model, tmp_path / "net.npz")
    loaded = load_pruned(tmp_path / "net.npz", lambda: replace_attention(fresh("pre-norm encoder")))
    attention = loaded.layers[0].self_attn
    assert isinstance(attention, HeadAttention)
    assert attention.num_heads < 4
    assert torch.equal(loaded(inputs), pruned.model.eval()(inputs))


class Attention(nn.Module):
    """Attention whose own code counts heads, as networks in the wild do."""

    def __init__(self, heads=4, dim=16):
        super().__init__()
        self.num_heads, self.head_size, self.calls = heads, dim // heads, 0
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3)

    def forward(self, x):
        self.calls += 1
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("tuned", [False, True])
def test_integers_of_the_networks_own_code_come_back(tuned, tmp_path):
    torch.manual_seed(0)
    model, data = Attention(), [tensor(20, 6, 16)]
    pruned = prune(model, data, 0.6)
    assert pruned.groups[0].attributes
    assert pruned.model.num_heads < 4
    save_pruned(pruned.model if tuned else pruned, tmp_path / "net.npz")
    loaded = load_pruned(tmp_path / "net.npz", Attention)
    assert (loaded.num_heads, loaded.head_size) == (pruned.model.num_heads, 4)
    assert torch.equal(loaded(data[0]), pruned.model.eval()(data[0]))
    with pytest.raises(ValueError, match="has the size num_heads="):
        load_pruned(tmp_path / "net.npz", lambda: Attention(heads=1))


def test_transposed_linear_layers_come_back_as_linear_ones(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_inner": 24, "vocab_size": 11, "n_positions": 8}

    def factory():
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, use_cache=False))

    torch.manual_seed(0)
    tokens = torch.arange(60).reshape(10, 6) % 11
    data = CalibrationData([tokens], lambda model, batch: model(batch).logits)
    model = factory().eval()
    groups = find_groups(model, data).groups
    assert {group.kind for group in groups} == {"heads", "nodes"}
    small = remove_nodes(model, groups, {group.name: range(group.width // 2) for group in groups}).eval()
    save_pruned(small, tmp_path / "net.npz")
    loaded = load_pruned(tmp_path / "net.npz", factory)
    assert_same(loaded, small)
    assert torch.equal(loaded(tokens).logits, small(tokens).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight  # tied in the factory's network


def test_files_of_version_1_are_read(tmp_path):
    """The file as the first version of the format wrote it, made by hand."""
    generator = np.random.default_rng(0)
    shapes = {"fc1.weight": (5, 8), "fc1.bias": (5,), "fc2.weight": (9, 5), "fc2.bias": (9,)}
    shapes |= {"fc3.weight": (3, 9), "fc3.bias": (3,)}
    arrays = {f"tensor:{name}": generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    widths = {"fc1": (8, 5), "fc2": (5, 9), "fc3": (9, 3)}
    header = {
        "kind": "pruned network",
        "version": 1,
        "dtypes": dict.fromkeys(shapes, "float32"),
        "structure": {
            name: {"type": "Linear", "sizes": {"in_features": a, "out_features": b}} for name, (a, b) in widths.items()
        },
    }
    save_arrays(tmp_path / "old.npz", arrays, header)
    loaded = load_pruned(tmp_path / "old.npz", small_mlp)
    assert (loaded.fc1.out_features, loaded.fc2.in_features) == (5, 5)
    hidden = FLAT.numpy()
    for name in widths:
        hidden = hidden @ arrays[f"tensor:{name}.weight"].T + arrays[f"tensor:{name}.bias"]
        hidden = np.maximum(hidden, 0) if name != "fc3" else hidden
    np.testing.assert_allclose(loaded(FLAT).detach().numpy(), hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module", "sizes", "message"),
    [
        ("depthwise separable", "2.0", {"groups": 2}, r"'2\.0\.weight' has shape"),
        ("depthwise separable", "2.0", {"groups": 99}, "the size groups=99, expected a whole number from 1 to the gr"),
        ("grouped", "2.two.0", {"groups": 2, "in_channels": 3}, "sizes that do not fit together"),
        ("lstm", "rnn", {"hidden_size": 1}, r"'rnn\.weight_ih_l0' has shape"),
        ("lstm", "rnn", {"input_size": 6}, "the size input_size=6, expected a whole number from 1 to the input_size=5"),
        ("gru", "rnn", {"num_layers": 1.0}, r"the size num_layers=1\.0"),
        ("pre-norm encoder", "layers.0.self_attn", {"num_heads": 1}, "has 1 heads of 4 nodes and queries of 8 nodes"),
        ("pre-norm encoder", "layers.0.self_attn", {"training": 1}, "the size training=1"),
        ("prelu", "1", {"num_parameters": 2}, r"'1\.weight' has shape \(6,\), expected \(2,\)"),
    ],
)
def test_sizes_that_contradict_are_refused_before_anything_changes(name, module, sizes, message, tmp_path):
    if name in NETWORKS:
        pruned = pruned_network(name, allocation="uniform")
    else:
        model, data, _ = network(name)
        pruned = prune(model, data, 0.5, measure="nodes", allocation="uniform", reconstruction="none")
    save_pruned(pruned, tmp_path / "net.npz")
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    header["structure"][module]["sizes"].update(sizes)
    save_arrays(tmp_path / "net.npz", arrays, header)
    made = fresh(name)
    before = snapshot(made), repr(made)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "net.npz", lambda: made)
    assert_unchanged(made, before[0])
    assert repr(made) == before[1]


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
        (
            lambda: small_mlp((8, 2, 2, 3)),
            "'fc1' has the size out_features=8, expected a whole number from 1 to the out_features=2",
        ),
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
        (
            lambda arrays, header: header.update(version=4),
            r"format version 4, this program reads the versions \(1, 2, 3\)",
        ),
        (lambda arrays, header: header.pop("structure"), "the header has no structure"),
        (lambda arrays, header: header["structure"]["fc1"]["sizes"].update(forward=3), "has the size forward=3"),
        (lambda arrays, header: header["structure"].update(fc1=[3]), "the structure says .* of module 'fc1'"),
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
    ids=["version", "structure", "unknown size", "no mapping", "size 0", "dtype", "no dtype", "missing", "dimensions"],
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
