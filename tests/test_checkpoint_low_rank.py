"""Networks with low-rank layers on disk: they come back bit for bit into the plain architecture, or not at all."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from test_architectures import network
from test_checkpoint import IMAGES, assert_same, fresh
from test_low_rank_layers import GEOMETRIES, MODES
from torch import nn

from specprune._files import load_arrays, save_arrays
from specprune.compress import load_pruned, low_rank, prune, save_pruned
from specprune.compress.attention import HeadAttention
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.low_rank_parts import FactoredLayer, SlicedLinear


def wide_mlp(seed=0):
    return small_mlp((24, 40, 30, 5), seed)


WIDE = tensor(60, 24)
NETWORKS = {
    "mlp": (wide_mlp, WIDE),
    "convnet": (small_convnet, IMAGES),
}


def resize(model, name, folding, slices, rank):
    """The model with one layer replaced, in place."""
    setattr(model, name, LayerSpectra(name, getattr(model, name)).build(folding, slices, rank))
    return model


def replaced(rank=3):
    """A convolution in folding 1 and both kinds of linear layers, of a network that `small_convnet` makes."""
    model = resize(small_convnet(), "conv2", 1, 2, 2)
    return resize(resize(model, "fc1", 0, 4, rank), "fc2", 0, 1, 2).eval()


def factored(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactoredLayer)}


def round_trip(pruned, path, factory):
    save_pruned(pruned, path)
    loaded = load_pruned(path, factory)
    model = getattr(pruned, "model", pruned)
    assert_same(loaded, model)
    assert repr(loaded) == repr(model)
    assert factored(loaded) == factored(model)
    assert not any(module.training for module in loaded.modules())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    return loaded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_of_every_geometry_come_back(geometry, mode, tmp_path):
    inputs = tensor(2, 6, 11, 10)
    for bias, (folding, slices) in itertools.product((True, False), [(0, 1), (0, 6), (1, 2), (2, 3), (3, 1)]):

        def factory(bias=bias):
            return nn.Conv2d(6, 8, **geometry, padding_mode=mode, bias=bias)

        built = LayerSpectra("conv", randomise(factory())).build(folding, slices, 1).eval()
        # The layer is the whole network, and one module of it.
        for model, make in ((built, factory), (nn.Sequential(built), lambda: nn.Sequential(factory()))):
            loaded = round_trip(model, tmp_path / "net.npz", make)
            assert torch.equal(loaded(inputs), model(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back(dtype, tmp_path):
    round_trip(replaced().to(dtype), tmp_path / "net.npz", small_convnet)


@pytest.mark.parametrize("method", ["fitted", "alds", "alds+", "refit", "data", "lrank"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_comes_back(name, method, tmp_path):
    make, data = NETWORKS[name]
    pruned = prune(make().eval(), [data], 0.7 if name == "convnet" else 0.4, method=method, measure="params")
    assert factored(pruned.model)
    loaded = round_trip(pruned, tmp_path / "net.npz", lambda: make(seed=5))
    assert torch.equal(loaded(data), pruned.model.eval()(data))


@torch.no_grad()
def thin(model):
    """The model with weights that are nearly of rank two, in place: for them low rank pays."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            left, values, right = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
            values[2:] *= 0.02
            module.weight.copy_((left * values @ right).reshape(module.weight.shape))
    return model.eval()


def test_hybrids_of_nodes_and_ranks_come_back(tmp_path):
    model, data, inputs = network("basic residual")
    pruned = prune(thin(model), data, 0.25, method="hybrid", measure="params")
    ranks = {layer.layer for layer in pruned.report.layers if layer.rank is not None}
    assert ranks
    assert any(row.width_after < row.width_before for row in pruned.report.groups)
    for saved in (pruned, pruned.model):
        loaded = round_trip(saved, tmp_path / "net.npz", lambda: fresh("basic residual"))
        assert factored(loaded) == ranks
        assert torch.equal(loaded(inputs), pruned.model.eval()(inputs))


def test_residual_networks_come_back(tmp_path):
    model, data, inputs = network("basic residual")
    pruned = prune(model, data, 0.4, method="fitted")
    loaded = round_trip(pruned, tmp_path / "net.npz", lambda: fresh("basic residual"))
    assert factored(loaded)
    assert torch.equal(loaded(inputs), pruned.model(inputs))


def test_low_rank_layers_in_replaced_attention_come_back(tmp_path):
    model, data, inputs = network("pre-norm encoder")
    small = prune(model, data, 0.6, allocation="uniform", reconstruction="none").model
    model = low_rank(small, keep=0.7).model.eval()
    assert any("q_proj" in name for name in factored(model))
    loaded = round_trip(model, tmp_path / "net.npz", lambda: fresh("pre-norm encoder"))
    assert isinstance(loaded.layers[0].self_attn, HeadAttention)
    assert torch.equal(loaded(inputs), model(inputs))
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    header["structure"]["layers.0.self_attn"]["sizes"]["num_heads"] = 1
    save_arrays(tmp_path / "net.npz", arrays, header)
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn' has 1 heads of 4 nodes and queries of"):
        load_pruned(tmp_path / "net.npz", lambda: fresh("pre-norm encoder"))


def test_other_attention_stays(tmp_path):
    """A file without `HeadAttention` does not ask for it."""
    model = low_rank(network("pre-norm encoder")[0], keep=0.99).model
    assert "stem" in factored(model)
    loaded = round_trip(model.eval(), tmp_path / "net.npz", lambda: fresh("pre-norm encoder"))
    assert not any(isinstance(module, HeadAttention) for module in loaded.modules())


def test_fine_tuned_networks_come_back(tmp_path):
    pruned = prune(wide_mlp(), [WIDE], 0.4, method="fitted")
    model = copy.deepcopy(pruned.model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(WIDE).square().sum().backward()
    optimizer.step()
    loaded = round_trip(model, tmp_path / "net.npz", wide_mlp)
    assert not torch.equal(loaded.state_dict()["fc1.0.weight"], pruned.model.state_dict()["fc1.0.weight"])
    loaded(WIDE).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_networks_pruned_after_low_rank_come_back(tmp_path):
    """Nodes may leave on both sides of a low-rank layer and inside it, so that its rank is above its new sizes."""
    model = low_rank(wide_mlp(), keep=0.8, method="energy").model.eval()
    pruned = prune(model, [WIDE], 0.3, allocation="uniform", reconstruction="none")
    assert pruned.model.fc1[1].out_features < 40
    loaded = round_trip(pruned, tmp_path / "net.npz", wide_mlp)
    assert torch.equal(loaded(WIDE), pruned.model(WIDE))


def test_layers_replaced_twice_come_back(tmp_path):
    model = small_convnet().eval()
    resize(resize(model, "conv2", 1, 1, 6), "fc1", 0, 1, 6)
    once = copy.deepcopy(model)
    for name, part, folding in (("conv2", "0", 0), ("conv2", "1", 2), ("fc1", "1", 0)):
        resize(getattr(model, name), part, folding, 2, 2)
    assert {"conv2", "conv2.0", "conv2.1", "fc1", "fc1.1"} == factored(model)
    for factory in (small_convnet, lambda: copy.deepcopy(once), lambda: copy.deepcopy(model)):
        loaded = round_trip(model, tmp_path / "net.npz", factory)
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def by_hand():
    """The network of `replaced` as a user would write it, without any class of this package but one."""
    model = small_convnet()
    model.conv2 = nn.Sequential(
        nn.Conv2d(6, 4, (1, 3), (1, 2), (0, 1), groups=2, bias=False),
        nn.Conv2d(4, 5, (3, 1), (2, 1), (1, 0), bias=False),
    )
    model.fc1 = nn.Sequential(SlicedLinear(4, 20, 12), nn.Linear(12, 7))
    model.fc2 = nn.Sequential(nn.Linear(7, 2, bias=False), nn.Linear(2, 3))
    return model


def test_factories_may_make_the_layers_themselves(tmp_path):
    model = replaced()
    save_pruned(model, tmp_path / "net.npz")
    for factory in (replaced, by_hand):
        loaded = load_pruned(tmp_path / "net.npz", factory)
        assert_same(loaded, model)
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    # As of all layers, theirs may be larger.
    loaded = load_pruned(tmp_path / "net.npz", lambda: replaced(rank=5))
    assert_same(loaded, model)
    assert repr(loaded) == repr(model)
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    header["structure"]["fc1.0"]["sizes"]["slices"] = 3
    save_arrays(tmp_path / "other.npz", arrays, header)
    with pytest.raises(ValueError, match=r"module 'fc1\.0' has sizes that do not fit together: .*'slices': 3"):
        load_pruned(tmp_path / "other.npz", replaced)
    with pytest.raises(ValueError, match=r"'conv2' is a low-rank layer.*it is one in folding 2, expected 1"):
        load_pruned(tmp_path / "net.npz", lambda: resize(small_convnet(), "conv2", 2, 2, 2))


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_read(version, tmp_path):
    """They have low-rank layers as any other modules, without the sizes of sliced ones: the factory must make them."""
    model = replaced()
    save_pruned(model, tmp_path / "net.npz")
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    del header["low_rank"], header["structure"]["fc1.0"]
    save_arrays(tmp_path / "net.npz", arrays, header | {"version": version})
    assert_same(load_pruned(tmp_path / "net.npz", replaced), model)
    with pytest.raises(ValueError, match=r"module 'conv2\.0' is a Conv2d, the factory's network has nothing"):
        load_pruned(tmp_path / "net.npz", small_convnet)


def frozen():
    model = small_convnet()
    model.conv2.weight.requires_grad_(False)
    model.fc1.bias.requires_grad_(False)
    return model


def test_frozen_parameters_come_back_frozen(tmp_path):
    save_pruned(replaced(), tmp_path / "net.npz")
    flags = {name: p.requires_grad for name, p in load_pruned(tmp_path / "net.npz", frozen).named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {"conv2.0.weight", "conv2.1.weight", "fc1.1.bias"}


def test_neither_saving_nor_loading_changes_anything_else(tmp_path):
    model = replaced().train()
    before = snapshot(model)
    save_pruned(model, tmp_path / "net.npz")
    assert_unchanged(model, before)
    made = small_convnet().train()
    before, text, state = snapshot(made), repr(made), torch.get_rng_state()
    loaded = load_pruned(tmp_path / "net.npz", lambda: made)
    assert torch.equal(state, torch.get_rng_state())
    assert_unchanged(made, before)
    assert repr(made) == text
    assert loaded is not made


@pytest.mark.parametrize("change", ["another module", "one more", "parametrized"])
def test_changed_parts_need_a_factory_that_makes_them(change, tmp_path):
    def factory():
        model = replaced()
        if change == "another module":
            model.fc1[0] = nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 12))
        elif change == "one more":
            model.fc1.append(nn.Linear(7, 7))
        else:
            nn.utils.parametrizations.weight_norm(model.fc1[1])
        return model.eval()

    model = randomise(factory(), 3)
    round_trip(model, tmp_path / "net.npz", factory)
    with pytest.raises(ValueError, match="the factory's network has nothing"):
        load_pruned(tmp_path / "net.npz", small_convnet)


def without_bias():
    model = small_convnet()
    model.fc1 = nn.Linear(20, 7, bias=False)
    return model


def other(**layers):
    def make():
        model = small_convnet()
        for name, layer in layers.items():
            setattr(model, name, layer)
        return model

    return make


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (small_mlp, "'conv1' is a Conv2d, the factory's network has nothing"),
        (
            other(conv2=nn.Conv2d(6, 4, 3, 2, 1, groups=2, bias=False)),
            "'conv2' is a low-rank.*no room: it has groups=2",
        ),
        (other(fc1=nn.Bilinear(20, 20, 7)), "'fc1' is a low-rank.*no room: it is a Bilinear, only Linear and Conv2d"),
        (other(fc1=nn.Conv2d(20, 7, 1)), "'fc1.0' is a SlicedLinear, the factory's network has Conv2d"),
        (other(fc1=nn.Linear(19, 7)), "'fc1' is a low-rank layer of 20 inputs in 4 slices.*in_features=19"),
        (other(fc1=nn.Linear(20, 6)), "'fc1' is a low-rank layer of .* 7 outputs; .*out_features=6"),
        (other(conv2=nn.Conv2d(6, 5, 5, 2, 1, bias=False)), r"'conv2\.0\.weight' has shape \(4, 3, 1, 3\), expected"),
        (without_bias, r"does not fit the factory's network \(missing \[\], unknown \['fc1\.1\.bias'\]"),
        (other(fc3=nn.Linear(2, 2)), r"does not fit the factory's network \(missing \['fc3\.bias'"),
        (other(fc1=nn.Sequential(nn.Linear(20, 7))), "'fc1' is a low-rank.*no room: it is a Sequential"),
    ],
)
def test_another_architecture_is_refused(factory, message, tmp_path):
    save_pruned(replaced(), tmp_path / "net.npz")
    made = factory()
    before, text = snapshot(made), repr(made)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "net.npz", lambda: made)
    assert_unchanged(made, before)
    assert repr(made) == text


def sizes(name, **numbers):
    return lambda arrays, header: header["structure"][name]["sizes"].update(numbers)


DAMAGE = {
    "folding of no kind": (lambda a, h: h["low_rank"].update(conv2=4), "'conv2': 4.* of its low-rank layers, expected"),
    "folding of no type": (lambda a, h: h["low_rank"].update(conv2=True), "of its low-rank layers, expected one of"),
    "no foldings": (lambda a, h: h.update(low_rank=["conv2"]), "of its low-rank layers, expected one of the foldings"),
    "another folding": (lambda a, h: h["low_rank"].update(conv2=2), r"'conv2\.0\.weight' has shape"),
    "forgotten folding": (lambda a, h: h["low_rank"].pop("conv2"), r"'conv2\.0' is a Conv2d, the .* has nothing"),
    "folding of another module": (lambda a, h: h["low_rank"].update(relu1=0), "'relu1' is a low-rank.*it is a ReLU"),
    "folding of a layer": (lambda a, h: h["low_rank"].update(conv1=0), "'conv1' is a low-rank layer of None inputs"),
    "folding of a part": (
        lambda a, h: h["low_rank"].update({"fc1.1": 0}),
        r"12 nodes that are made and None that are read",
    ),
    "folding of nothing": (lambda a, h: h["low_rank"].update(fc9=0), "'fc9' is a low-rank.*there is no such module"),
    "folding of all": (lambda a, h: h["low_rank"].update({"": 0}), "module '' is a low-rank.*it is a Sequential"),
    "more inputs": (sizes("fc1.0", in_features=24), "of 24 inputs in 4 slices.*in_features=20"),
    "more outputs": (sizes("fc1.1", out_features=8), "and 8 outputs; these do not fit together.*out_features=7"),
    "more between": (sizes("fc1.0", out_features=16), "16 nodes that are made and 12 that are read"),
    "wrong slices": (sizes("fc1.0", slices=3), "20 inputs in 3 slices"),
    "other slices": (sizes("fc1.0", slices=2), r"'fc1\.0\.weight' has shape \(4, 5, 3\), expected \(2, 10, 6\)"),
    "one slice": (sizes("fc1.0", slices=1), r"'fc1\.0' is a SlicedLinear, the factory's network has Linear"),
    "slices of another": (sizes("fc2.0", slices=7), "do not fit together"),
    "wrong groups": (sizes("conv2.0", groups=3), "6 inputs in 3 slices, 4 nodes"),
    "missing part": (lambda a, h: h["structure"].pop("conv2.0"), "of None inputs in 1 slices"),
    "part of no type": (lambda a, h: h["structure"].update({"fc1.0": [3]}), r"says \[3\] of module 'fc1\.0'"),
    "unknown type": (lambda a, h: h["structure"]["fc1.0"].update(type="LoRA"), r"'fc1\.0' is a LoRA, the factory"),
    "missing tensor": (lambda a, h: a.pop("tensor:fc1.0.weight"), r"missing \['fc1\.0\.weight'\]"),
    "more tensors": (lambda a, h: a.update({"tensor:fc1.0.bias": np.zeros(12)}), r"unknown \['fc1\.0\.bias'\]"),
    "wrong dtype": (lambda a, h: h["dtypes"].update({"fc1.0.weight": "float64"}), r"'fc1\.0\.weight' is stored as"),
    "unknown dtype": (lambda a, h: h["dtypes"].update({"fc1.0.weight": "nn"}), r"'fc1\.0\.weight' has the dtype 'nn'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_before_anything_changes(name, tmp_path):
    change, message = DAMAGE[name]
    save_pruned(replaced(), tmp_path / "net.npz")
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    change(arrays, header)
    save_arrays(tmp_path / "net.npz", arrays, header)
    content, made = (tmp_path / "net.npz").read_bytes(), small_convnet()
    before, text = snapshot(made), repr(made)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "net.npz", lambda: made)
    assert_unchanged(made, before)
    assert repr(made) == text
    assert (tmp_path / "net.npz").read_bytes() == content


def test_no_number_of_a_header_can_be_replaced(tmp_path):
    """Whatever stands in a number's place is refused; a folding of a linear layer alone says nothing."""
    model = replaced()
    save_pruned(model, tmp_path / "net.npz")
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    places = [(("structure", name, "sizes"), key) for name, e in header["structure"].items() for key in e["sizes"]]
    places += [(("low_rank",), "conv2")]
    for path, key in places:
        for value in (0, -1, 1, 2, 3, 2**31, 10**30, 1.0, True, None, "2", [2], {}):
            changed = copy.deepcopy(header)
            where = changed
            for step in path:
                where = where[step]
            if type(value) is int and value == where[key]:
                continue
            where[key] = value
            save_arrays(tmp_path / "net.npz", arrays, changed)
            with pytest.raises(ValueError, match=r"net\.npz: "):
                load_pruned(tmp_path / "net.npz", small_convnet)


def test_sizes_that_no_memory_holds_are_refused(tmp_path):
    save_pruned(resize(nn.Sequential(nn.Linear(6, 8)), "0", 0, 2, 1), tmp_path / "net.npz")
    arrays, header = load_arrays(tmp_path / "net.npz", "pruned network")
    header["structure"]["0.0"]["sizes"]["out_features"] = header["structure"]["0.1"]["sizes"]["in_features"] = 10**10
    save_arrays(tmp_path / "net.npz", arrays, header)
    with pytest.raises(ValueError, match=r"'0\.0\.weight' has shape \(2, 3, 1\), expected \(2, 3, 5000000000\)"):
        load_pruned(tmp_path / "net.npz", lambda: nn.Sequential(nn.Linear(10**5, 10**5, device="meta")))


def test_a_network_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    save_pruned(replaced(), tmp_path / "net.npz")
    content = (tmp_path / "net.npz").read_bytes()
    model = replaced()
    model.fc1.register_module("2", Noted())
    with pytest.raises(ValueError, match="only tensors can be saved"):
        save_pruned(model, tmp_path / "net.npz")
    assert (tmp_path / "net.npz").read_bytes() == content


class Noted(nn.Identity):
    def get_extra_state(self):
        return {"note": 1}
