"""Which nodes can be removed, which networks are refused and why, and that removing is what it says."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from specprune.compress import CalibrationData, Group, find_groups, remove_nodes
from specprune.testbed import resnet, vgg

FLAT = tensor(4, 8)
IMAGES = tensor(4, 2, 8, 8)


def groups_of(model, batch=FLAT, **options):
    return find_groups(model, CalibrationData([batch], **options))


class Custom(nn.Module):
    """A module from a function and named layers."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        return self.run(self, inputs)


def test_the_groups_of_an_mlp():
    assert groups_of(small_mlp()) == (
        Group("fc1", 12, (), None, "fc2", 1),
        Group("fc2", 9, (), None, "fc3", 1),
    )


def test_the_groups_of_a_convolutional_network():
    assert groups_of(small_convnet(), IMAGES) == (
        Group("conv1", 6, ("norm1",), "norm1", "conv2", 1),
        Group("conv2", 5, ("norm2",), "norm2", "fc1", 4),
        Group("fc1", 7, (), None, "fc2", 1),
    )


def test_the_groups_of_vgg():
    groups = groups_of(vgg((4, 5, 6), classes=3, in_channels=2), IMAGES)
    assert [(g.name, g.width, g.direct_norm, g.consumer, g.slots) for g in groups] == [
        ("conv1", 4, "norm1", "conv2", 1),
        ("conv2", 5, "norm2", "conv3", 1),
        ("conv3", 6, "norm3", "fc1", 1),
    ]


def functional_chain(net, x):
    x = functional.relu(net.a(x))
    x = functional.dropout(functional.max_pool2d(functional.gelu(net.b(x)), 2), 0.5, net.training)
    return net.c(x.view(x.shape[0], -1))


def pooled_chain(net, x):
    return net.b(torch.tanh(net.a(x)).mean((2, 3)))


def test_functional_steps_are_read():
    layers = {"a": nn.Conv2d(2, 6, 3), "b": nn.Conv2d(6, 4, 3), "c": nn.Linear(16, 3)}
    assert [(g.name, g.consumer, g.slots) for g in groups_of(Custom(functional_chain, **layers), IMAGES)] == [
        ("a", "b", 1),
        ("b", "c", 4),
    ]
    layers = {"a": nn.Conv2d(2, 6, 3), "b": nn.Linear(6, 3)}
    assert groups_of(Custom(pooled_chain, **layers), IMAGES) == (Group("a", 6, (), None, "b", 1),)


def test_dropout_tokens_embeddings_and_channels_last():
    dropout = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.ELU(), nn.Linear(6, 3))
    assert groups_of(dropout) == (Group("0", 6, (), None, "3", 1),)
    tokens = tensor(4, 5, 8)
    assert groups_of(dropout, tokens) == (Group("0", 6, (), None, "3", 1),)
    words = nn.Sequential(nn.Embedding(10, 8), *dropout)
    assert groups_of(words, torch.arange(4)) == (Group("1", 6, (), None, "4", 1),)
    last = Custom(lambda net, x: net.b(net.a(x).permute(0, 2, 3, 1)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(6, 3))
    assert groups_of(last, IMAGES) == (Group("a", 6, (), None, "b", 1),)


def test_only_a_norm_that_reads_the_layer_itself_is_direct():
    def net(*between):
        return nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), *between, nn.Conv2d(6, 3, 1))

    for between, norms, direct in (
        ((nn.BatchNorm2d(6), nn.ReLU()), ("1",), "1"),
        ((nn.ReLU(), nn.BatchNorm2d(6)), ("2",), None),
        ((nn.ReLU(inplace=True), nn.BatchNorm2d(6)), ("2",), None),  # the same tensor object, other numbers
        ((nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.BatchNorm2d(6)), ("1", "3"), "1"),
        ((nn.Identity(), nn.BatchNorm2d(6)), ("2",), "2"),
    ):
        (group,) = groups_of(net(*between), IMAGES)
        assert (group.norms, group.direct_norm) == (norms, direct), between


def test_groups_come_in_the_order_of_their_consumers():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.early = nn.Linear(5, 3), nn.Linear(6, 5), nn.Linear(8, 6)

        def forward(self, x):
            return self.last(self.middle(self.early(x)))

    assert [group.name for group in groups_of(Reversed())] == ["early", "middle"]


def tied(first="weight", second="weight"):
    net = small_mlp((8, 8, 8, 3))
    setattr(net.fc2, second, getattr(net.fc1, first))
    return net


def frozen():
    net = small_mlp()
    net.fc2.bias.requires_grad_(False)
    return net


def shared_layer():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3))


def without_gradients(net, x):
    with torch.no_grad():
        return net.b(net.a(x).relu())


def looped(net, x):
    for _ in range(2):
        x = torch.relu(net.a(x))
    return net.b(x)


def channel_shuffle(net, x):
    x = net.a(x)
    return net.b(x.view(-1, 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))


def dense(run, inner=6, reads=6, **more):
    return Custom(run, a=nn.Linear(8, inner), b=nn.Linear(reads, 3), **more)


def maps(run, inner=6, reads=6, **more):
    return Custom(run, a=nn.Conv2d(2, inner, 3), b=nn.Conv2d(reads, 3, 1), **more)


def between(*layers, reads=6):
    return nn.Sequential(nn.Linear(8, 6), *layers, nn.Linear(reads, 3))


def between_maps(*layers, width=6, reads=6):
    return nn.Sequential(nn.Conv2d(2, width, 3), *layers, nn.Conv2d(reads, 3, 1))


REFUSED = {
    "residual": (lambda: resnet((4, 8), 1, 3, 2), IMAGES, r"conv1: coupled with block1_1\.conv2"),
    "concat": (lambda: dense(lambda n, x: n.b(torch.cat([n.a(x), x], 1)), reads=14), FLAT, "coupled with _ConcatOp"),
    "two consumers": (
        lambda: dense(lambda n, x: n.b(n.a(x)) + n.c(torch.relu(n.a2(x))), a2=nn.Linear(8, 6), c=nn.Linear(6, 3)),
        FLAT,
        "b: coupled with c",
    ),
    "read twice": (
        lambda: Custom(
            lambda n, x: torch.stack([n.b(h := n.a(x)).mean(1), n.c(h).mean(1)]),
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 3),
            c=nn.Linear(6, 4),
        ),
        FLAT,
        r"a: read by several layers: \['b', 'c'\]",
    ),
    "gate": (
        lambda: dense(lambda n, x: n.b(n.a(x) * torch.sigmoid(n.g(x))), g=nn.Linear(8, 6)),
        FLAT,
        "a: coupled with g",
    ),
    "grouped": (lambda: between_maps(nn.Conv2d(6, 6, 3, groups=2)), IMAGES, "1: Conv2d .*grouped"),
    "depthwise": (lambda: between_maps(nn.Conv2d(6, 6, 3, groups=6)), IMAGES, "1: Conv2d .*grouped"),
    "layer norm": (lambda: between(nn.LayerNorm(6)), FLAT, "0: coupled with 1 .LayerNorm"),
    "group norm": (lambda: between_maps(nn.GroupNorm(2, 6)), IMAGES, "0: coupled with 1 .GroupNorm"),
    "batch statistics": (
        lambda: between(nn.BatchNorm1d(6, track_running_stats=False)),
        FLAT,
        "1 normalises each batch by itself",
    ),
    "softmax": (lambda: between(nn.Softmax(1)), FLAT, "group '0': .* mixes nodes"),
    "response norm": (lambda: between_maps(nn.LocalResponseNorm(3)), IMAGES, "group '0': .* mixes nodes"),
    "mean over nodes": (
        lambda: dense(lambda n, x: n.b((h := n.a(x)) - h.mean(1, keepdim=True))),
        FLAT,
        "group 'a': .* mixes nodes",
    ),
    "cumulative sum": (lambda: dense(lambda n, x: n.b(n.a(x).cumsum(1))), FLAT, "group 'a': .* mixes nodes"),
    "reversal, even": (lambda: dense(lambda n, x: n.b(n.a(x).flip(1))), FLAT, "group 'a': .* mixes nodes"),
    "reversal, odd": (lambda: dense(lambda n, x: n.b(n.a(x).flip(1)), 7, 7), FLAT, "group 'a': .* mixes nodes"),
    "rotation": (lambda: dense(lambda n, x: n.b(n.a(x).roll(2, 1))), FLAT, "group 'a': .* mixes nodes"),
    "pixels first": (
        lambda: Custom(
            lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(216, 3)
        ),
        IMAGES,
        "group 'a': .* mixes nodes",
    ),
    "chosen nodes": (
        lambda: dense(lambda n, x: n.b(n.a(x)[:, [1, 0, 2, 3, 4, 5]])),
        FLAT,
        "does not run after removing",
    ),
    "channel shuffle": (lambda: maps(channel_shuffle), IMAGES, r"does not run after|group 'a': .* mixes nodes"),
    "hard-coded view": (
        lambda: Custom(lambda n, x: n.b(n.a(x).view(-1, 216)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(216, 3)),
        IMAGES,
        r"does not run after removing nodes of \['a'\]",
    ),
    "gated linear unit": (lambda: between(nn.GLU(), reads=3), FLAT, "2 reads 3 inputs that are not the 6 nodes"),
    "padded nodes": (
        lambda: dense(lambda n, x: n.b(functional.pad(n.a(x), (1, 1))), reads=8),
        FLAT,
        "b reads 8 inputs that are not the 6 nodes",
    ),
    "pixel shuffle": (
        lambda: between_maps(nn.PixelShuffle(2), width=8, reads=2),
        IMAGES,
        "2 reads 2 inputs that are not the 8 nodes",
    ),
    "maxout": (
        lambda: dense(lambda n, x: n.b(n.a(x).view(-1, 6, 2).amax(-1)), inner=12),
        FLAT,
        "a: b reads the nodes in an order that is not understood",
    ),
    "tied weights": (tied, FLAT, r"'fc1\.weight' and 'fc2\.weight' share one tensor"),
    "tied biases": (lambda: tied("bias", "bias"), FLAT, r"'fc1\.bias' and 'fc2\.bias' share one tensor"),
    "tied by use": (
        lambda: dense(lambda n, x: functional.linear(n.b(n.a(x)), n.b.weight.T) @ n.a.weight),
        FLAT,
        r"'(a|b)\.weight' is used more than once in a forward pass; tied",
    ),
    "shared layer": (shared_layer, FLAT, "share one tensor"),
    "layer used twice": (
        lambda: Custom(looped, a=nn.Linear(8, 8), b=nn.Linear(8, 3)),
        FLAT,
        "layer 'a' runs more than once",
    ),
    "called by keyword": (lambda: dense(lambda n, x: n.b(input=n.a(x))), FLAT, "layer 'b' is called by keyword"),
    "frozen": (frozen, FLAT, r"the parameters \['fc2.bias'\] are frozen"),
    "no gradients": (lambda: dense(without_gradients), FLAT, "a: not reached by tracing"),
    "detached": (lambda: dense(lambda n, x: n.b(n.a(x).detach())), FLAT, "a: not reached by tracing"),
    "one layer": (lambda: nn.Linear(8, 3), FLAT, "nothing can be pruned: no Linear or Conv2d layer feeds another"),
    "no layer": (nn.ReLU, FLAT, r"nothing can be pruned: .*ReLU \(layers that ran: none\)"),
    "lstm": (
        lambda: dense(lambda n, x: n.b(n.r(n.a(x))[0]), r=nn.LSTM(6, 6)),
        FLAT,
        "a: coupled with r .LSTM",
    ),
    "attention": (
        lambda: dense(lambda n, x: n.b(n.m(h := n.a(x)[None], h, h)[0]), m=nn.MultiheadAttention(6, 2)),
        FLAT,
        "a: coupled with m .MultiheadAttention",
    ),
    "prelu": (lambda: between(nn.PReLU(6)), FLAT, "0: coupled with 1 .PReLU"),
    "own scale": (
        lambda: dense(lambda n, x: n.b(n.a(x) * n.scale), scale=nn.Parameter(torch.ones(6))),
        FLAT,
        "a: coupled with Parameter",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 3)),
        FLAT,
        "module '0' has a parametrization",
    ),
    "old weight norm": (old_weight_norm, FLAT, "module '0' has a forward pre-hook"),
    "transposed": (lambda: between_maps(nn.ConvTranspose2d(6, 6, 3)), IMAGES, "1: ConvTranspose2d .*transposed"),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1)),
        tensor(4, 2, 9),
        "0: Conv1d .*1d and 3d",
    ),
    "reshaped to maps": (
        lambda: nn.Sequential(nn.Linear(8, 24), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 3, 1)),
        FLAT,
        "2 reads the nodes in an order that is not understood",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "batch", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_couplings_are_refused_with_the_reason(make, batch, reason):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        groups_of(make(), batch)


def test_outputs_must_be_one_tensor():
    with pytest.raises(TypeError, match="the model returned a tuple, expected one tensor"):
        groups_of(dense(lambda n, x: (n.b(n.a(x)), x)))
    with pytest.raises(TypeError, match=r"the model returned a torch\.int64"):
        groups_of(dense(lambda n, x: n.b(n.a(x)).argmax(1)))
    pair = dense(lambda n, x: (n.b(n.a(x)), x))
    assert groups_of(pair, forward=lambda model, batch: model(batch)[0])


def test_bad_data_are_named_before_anything_else():
    with pytest.raises(ValueError, match="NaN or Inf in the inputs of layer 'fc1'"):
        groups_of(small_mlp(), FLAT * float("nan"))
    with pytest.raises(ValueError, match=r"batch 0 has dtype torch\.float64"):
        groups_of(small_mlp(), FLAT.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_read_as_well(dtype):
    model = small_convnet().to(dtype)
    assert [group.name for group in groups_of(model, IMAGES.to(dtype))] == ["conv1", "conv2", "fc1"]


def test_a_model_that_only_runs_in_its_own_precision():
    def run(net, x):
        return net.b(torch.relu(net.a(x)) @ torch.eye(6)[:, : net.b.in_features])

    fixed = Custom(lambda n, x: n.b(torch.relu(n.a(x.float()))), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    assert [group.name for group in groups_of(fixed)] == ["a"]
    with pytest.raises(ValueError, match=r"does not run|mixes nodes"):
        groups_of(Custom(run, a=nn.Linear(8, 6), b=nn.Linear(6, 3)))


def test_the_model_stays_as_it_is():
    model = small_convnet().train()
    model.norm1.eval()
    before = snapshot(model)
    state = torch.get_rng_state()
    data = CalibrationData([IMAGES])
    groups = find_groups(model, data)
    small = remove_nodes(model, data, groups, {"conv1": [0, 3], "conv2": [1], "fc1": [2, 4, 5]})
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training
    assert all(parameter.requires_grad for parameter in small.parameters())


CASES = {
    "mlp": (lambda: small_mlp((8, 6, 5, 3)), FLAT),
    "convnet": (small_convnet, IMAGES),
    "vgg": (lambda: randomise(vgg((4, 5, 6), 3, 2)), IMAGES),
    "functional": (
        lambda: randomise(Custom(functional_chain, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(6, 4, 3), c=nn.Linear(16, 3))),
        IMAGES,
    ),
    "pooled": (lambda: randomise(Custom(pooled_chain, a=nn.Conv2d(2, 6, 3), b=nn.Linear(6, 3))), IMAGES),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None)
@given(choice=st.data())
def test_removing_nodes_is_zeroing_their_columns(name, choice):
    make, batch = CASES[name]
    model = make().double().eval()
    data = CalibrationData([batch.double()])
    groups = find_groups(model, data)
    keep = {
        group.name: choice.draw(st.lists(st.integers(0, group.width - 1), min_size=1, unique=True)) for group in groups
    }
    zeroed = copy.deepcopy(model)
    modules = dict(zeroed.named_modules())
    for group in groups:
        weight = modules[group.consumer].weight.data
        for node in set(range(group.width)) - set(keep[group.name]):
            if weight.dim() == 2:
                weight[:, node * group.slots : (node + 1) * group.slots] = 0
            else:
                weight[:, node] = 0
    small = remove_nodes(model, data, groups, keep)
    assert torch.allclose(small(batch.double()), zeroed(batch.double()), rtol=1e-10, atol=1e-12)
    for group in groups:  # the kept nodes keep their weights and their order
        kept = sorted(keep[group.name])
        before, after = dict(model.named_modules()), dict(small.named_modules())
        own = before[group.name].weight[kept]
        feed = [g for g in groups if g.consumer == group.name]
        if feed:
            columns = np.sort(keep[feed[0].name])
            width = feed[0].width
            own = own.reshape(len(kept), width, -1)[:, columns].reshape(after[group.name].weight.shape)
        assert torch.equal(after[group.name].weight, own)
        for norm in group.norms:
            assert torch.equal(after[norm].running_var, before[norm].running_var[kept])


@pytest.mark.parametrize("keep", [[], [0, 0], [-1, 2], [12], [3, 12]])
def test_bad_indices_are_refused(keep):
    data = CalibrationData([FLAT])
    model = small_mlp()
    with pytest.raises(ValueError, match=r"group 'fc1' has nodes 0\.\.11; got the nodes to keep"):
        remove_nodes(model, data, find_groups(model, data), {"fc1": keep, "fc2": [0]})
