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

from specprune.compress import CalibrationData, find_groups, remove_nodes
from specprune.testbed import resnet, vgg

FLAT = tensor(4, 8)
IMAGES = tensor(4, 2, 8, 8)


def structure_of(model, batch=FLAT, **options):
    return find_groups(model, CalibrationData([batch], **options))


def groups_of(model, batch=FLAT, **options):
    return structure_of(model, batch, **options).groups


def outline(groups):
    """Name, width, carriers, direct norm, first consumer and its inputs a unit."""
    return tuple((g.name, g.width, g.norms, g.direct_norm, g.consumer, g.slots) for g in groups)


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
    assert outline(groups_of(small_mlp())) == (
        ("fc1", 12, (), None, "fc2", 1),
        ("fc2", 9, (), None, "fc3", 1),
    )


def test_the_groups_of_a_convolutional_network():
    assert outline(groups_of(small_convnet(), IMAGES)) == (
        ("conv1", 6, ("norm1",), "norm1", "conv2", 1),
        ("conv2", 5, ("norm2",), "norm2", "fc1", 4),
        ("fc1", 7, (), None, "fc2", 1),
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
    assert outline(groups_of(Custom(pooled_chain, **layers), IMAGES)) == (("a", 6, (), None, "b", 1),)


def test_dropout_tokens_embeddings_and_channels_last():
    dropout = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.ELU(), nn.Linear(6, 3))
    assert outline(groups_of(dropout)) == (("0", 6, (), None, "3", 1),)
    tokens = tensor(4, 5, 8)
    assert outline(groups_of(dropout, tokens)) == (("0", 6, (), None, "3", 1),)
    words = nn.Sequential(nn.Embedding(10, 8), *dropout)
    assert outline(groups_of(words, torch.arange(4))) == (("1", 6, (), None, "4", 1),)
    last = Custom(lambda net, x: net.b(net.a(x).permute(0, 2, 3, 1)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(6, 3))
    assert outline(groups_of(last, IMAGES)) == (("a", 6, (), None, "b", 1),)


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
    "input in front": (  # the tracer does not see that the input shifts the nodes' columns
        lambda: dense(lambda n, x: n.b(torch.cat([x, n.a(x)], 1)), reads=14),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "layer norm": (lambda: between(nn.LayerNorm(6)), FLAT, "0: coupled with 1 .LayerNorm"),
    "group norm": (lambda: between_maps(nn.GroupNorm(2, 6)), IMAGES, "0: coupled with 1 .GroupNorm"),
    "batch statistics": (
        lambda: between(nn.BatchNorm1d(6, track_running_stats=False)),
        FLAT,
        "1 normalises each batch by itself",
    ),
    "softmax": (
        lambda: between(nn.Softmax(1)),
        FLAT,
        "0: removing nodes of '0' and zeroing the columns of '[12]' .* mixes nodes",
    ),
    "response norm": (
        lambda: between_maps(nn.LocalResponseNorm(3)),
        IMAGES,
        "0: removing nodes of '0' and zeroing the columns of '[12]' .* mixes nodes",
    ),
    "mean over nodes": (
        lambda: dense(lambda n, x: n.b((h := n.a(x)) - h.mean(1, keepdim=True))),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "cumulative sum": (
        lambda: dense(lambda n, x: n.b(n.a(x).cumsum(1))),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "reversal, even": (
        lambda: dense(lambda n, x: n.b(n.a(x).flip(1))),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "reversal, odd": (
        lambda: dense(lambda n, x: n.b(n.a(x).flip(1)), 7, 7),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "rotation": (
        lambda: dense(lambda n, x: n.b(n.a(x).roll(2, 1))),
        FLAT,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "pixels first": (
        lambda: Custom(
            lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(216, 3)
        ),
        IMAGES,
        "a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "chosen nodes": (
        lambda: dense(lambda n, x: n.b(n.a(x)[:, [1, 0, 2, 3, 4, 5]])),
        FLAT,
        "does not run after removing",
    ),
    "channel shuffle": (
        lambda: maps(channel_shuffle),
        IMAGES,
        r"does not run after|a: removing nodes of 'a' and zeroing the columns of 'b' .* mixes nodes",
    ),
    "hard-coded view": (
        lambda: Custom(lambda n, x: n.b(n.a(x).view(-1, 216)), a=nn.Conv2d(2, 6, 3), b=nn.Linear(216, 3)),
        IMAGES,
        "a: the network does not run after removing nodes of 'a'",
    ),
    "gated linear unit": (lambda: between(nn.GLU(), reads=3), FLAT, "0: the network does not run after removing"),
    "padded nodes": (
        lambda: dense(lambda n, x: n.b(functional.pad(n.a(x), (1, 1))), reads=8),
        FLAT,
        "a: removing nodes of .* mixes nodes",
    ),
    "pixel shuffle": (
        lambda: between_maps(nn.PixelShuffle(2), width=8, reads=2),
        IMAGES,
        "0: the network does not run after removing",
    ),
    "maxout": (
        lambda: dense(lambda n, x: n.b(n.a(x).view(-1, 6, 2).amax(-1)), inner=12),
        FLAT,
        "a: b has entries that belong to several nodes",
    ),
    "tied weights": (tied, FLAT, r"'fc1\.weight' and 'fc2\.weight' share one tensor"),
    "tied biases": (lambda: tied("bias", "bias"), FLAT, r"'fc1\.bias' and 'fc2\.bias' share one tensor"),
    "tied by use": (
        lambda: dense(lambda n, x: functional.linear(n.b(n.a(x)), n.b.weight.T) @ n.a.weight),
        FLAT,
        "a tensor of 'a' is used more than once in a forward pass .tied weights",
    ),
    "shared layer": (shared_layer, FLAT, "share one tensor"),
    "layer used twice": (
        lambda: Custom(looped, a=nn.Linear(8, 8), b=nn.Linear(8, 3)),
        FLAT,
        "a: 'a' runs more than once",
    ),
    "called by keyword": (lambda: dense(lambda n, x: n.b(input=n.a(x))), FLAT, "a: 'b' is called by keyword"),
    "frozen": (frozen, FLAT, r"fc1: 'fc2\.bias' is frozen .*fc2: 'fc2\.bias' is frozen"),
    "no gradients": (lambda: dense(without_gradients), FLAT, "a: not reached by tracing"),
    "detached": (lambda: dense(lambda n, x: n.b(n.a(x).detach())), FLAT, "a: not reached by tracing"),
    "one layer": (lambda: nn.Linear(8, 3), FLAT, "nothing can be pruned in Linear .*no layer feeds another one"),
    "no layer": (nn.ReLU, FLAT, r"nothing can be pruned in ReLU \(layers that ran: none\)"),
    "own scale": (
        lambda: dense(lambda n, x: n.b(n.a(x) * n.scale), scale=nn.Parameter(torch.ones(6))),
        FLAT,
        "a: coupled with Parameter",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 3)),
        FLAT,
        "0: module '0' has a parametrization",
    ),
    "old weight norm": (old_weight_norm, FLAT, "Sequential cannot be copied: .*weight_norm"),
    "reshaped to maps": (
        lambda: nn.Sequential(nn.Linear(8, 24), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 3, 1)),
        FLAT,
        "0: 2 has entries that belong to several nodes",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "batch", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_couplings_are_refused_with_the_reason(make, batch, reason):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        groups_of(make(), batch)


def members(group):
    return tuple(tuple(entry.module for entry in part) for part in (group.producers, group.carriers, group.consumers))


COUPLED = {
    "residual": (
        lambda: resnet((4, 8), 1, 3, 2),
        IMAGES,
        {
            "conv1": (
                4,
                ("conv1", "block1_1.conv2"),
                ("norm1", "block1_1.norm2"),
                ("block1_1.conv1", "block2_1.conv1", "block2_1.shortcut.conv"),
            ),
            "block1_1.conv1": (4, ("block1_1.conv1",), ("block1_1.norm1",), ("block1_1.conv2",)),
            "block2_1.conv1": (8, ("block2_1.conv1",), ("block2_1.norm1",), ("block2_1.conv2",)),
            "block2_1.conv2": (
                8,
                ("block2_1.conv2", "block2_1.shortcut.conv"),
                ("block2_1.norm2", "block2_1.shortcut.norm"),
                ("fc1",),
            ),
        },
    ),
    "concat": (
        lambda: dense(lambda n, x: n.b(torch.cat([n.a(x), x], 1)), reads=14),
        FLAT,
        {"a": (6, ("a",), (), ("b",))},
    ),
    "two chains": (
        lambda: dense(lambda n, x: n.b(n.a(x)) + n.c(torch.relu(n.a2(x))), a2=nn.Linear(8, 6), c=nn.Linear(6, 3)),
        FLAT,
        {"a": (6, ("a",), (), ("b",)), "a2": (6, ("a2",), (), ("c",))},
    ),
    "read twice": (
        lambda: dense(lambda n, x: n.b(h := n.a(x)) + n.c(h), c=nn.Linear(6, 3)),
        FLAT,
        {"a": (6, ("a",), (), ("b", "c"))},
    ),
    "gate": (
        lambda: dense(lambda n, x: n.b(n.a(x) * torch.sigmoid(n.g(x))), g=nn.Linear(8, 6)),
        FLAT,
        {"a": (6, ("a", "g"), (), ("b",))},
    ),
    "grouped": (
        lambda: between_maps(nn.Conv2d(6, 6, 3, groups=2)),
        IMAGES,
        {"0": (3, ("0",), (), ("1",)), "1": (3, ("1",), (), ("2",))},
    ),
    "depthwise": (lambda: between_maps(nn.Conv2d(6, 6, 3, groups=6)), IMAGES, {"0": (6, ("0",), ("1",), ("2",))}),
    "prelu": (lambda: between(nn.PReLU(6)), FLAT, {"0": (6, ("0",), ("1",), ("2",))}),
    "transposed": (
        lambda: between_maps(nn.ConvTranspose2d(6, 6, 3)),
        IMAGES,
        {"0": (6, ("0",), (), ("1",)), "1": (6, ("1",), (), ("2",))},
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1)),
        tensor(4, 2, 9),
        {"0": (6, ("0",), (), ("2",))},
    ),
    "instance norm": (
        lambda: between_maps(nn.InstanceNorm2d(6, affine=True)),
        IMAGES,
        {"0": (6, ("0",), ("1",), ("2",))},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_nodes_are_one_group(name):
    make, batch, expected = COUPLED[name]
    structure = structure_of(make(), batch)
    assert {group.name: (group.width, *members(group)) for group in structure.groups} == expected
    assert structure.skipped == ()


def test_the_entries_of_a_unit_are_those_that_go_together():
    run, c = lambda n, x: n.b(torch.cat([n.c(x), n.a(x)], 1)), nn.Linear(8, 4)
    first, second = sorted(groups_of(dense(run, reads=10, c=c)), key=lambda group: group.width)
    assert (first.name, first.consumers[0].index.tolist()) == ("c", [[k] for k in range(4)])
    assert (second.name, second.consumers[0].index.tolist()) == ("a", [[4 + k] for k in range(6)])
    grouped, _ = groups_of(between_maps(nn.Conv2d(6, 6, 3, groups=2)), IMAGES)
    assert grouped.producers[0].index.tolist() == [[0, 3], [1, 4], [2, 5]]  # every block loses equally many
    flat = groups_of(small_convnet(), IMAGES)[1]
    assert flat.consumers[0].index.tolist() == [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(5)]


def test_what_is_skipped_is_named_next_to_what_is_pruned():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    structure = structure_of(net)
    assert [group.name for group in structure.groups] == ["0"]
    (skipped,) = structure.skipped
    assert (skipped.name, skipped.reason) == ("2", "coupled with 3 (LayerNorm)")
    before_lstm = dense(lambda n, x: n.b(n.r(n.a(x))[0]), r=nn.LSTM(6, 6))
    structure = structure_of(before_lstm)
    assert [(group.name, group.kind) for group in structure.groups] == [("r", "hidden")]
    assert [(entry.name, entry.reason) for entry in structure.skipped] == [("a", "coupled with r (LSTM)")]


def test_a_norm_of_batch_statistics_gives_no_gain():
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    structure = structure_of(net)
    assert [group.name for group in structure.groups] == ["0"]
    assert "normalises each batch by itself" in structure.skipped[0].reason
    assert structure.direct == {}


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
    groups = find_groups(model, data).groups
    small = remove_nodes(model, groups, {"conv1": [0, 3], "conv2": [1], "fc1": [2, 4, 5]})
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
    groups = find_groups(model, data).groups
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
    small = remove_nodes(model, groups, keep)
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
        remove_nodes(model, find_groups(model, data).groups, {"fc1": keep, "fc2": [0]})
