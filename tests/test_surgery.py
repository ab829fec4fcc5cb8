"""Cutting modules: what is cut computes what is masked, for every kind of module."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, snapshot, tensor
from torch import nn

from specprune.compress.surgery import (
    Attribute,
    Group,
    Slice,
    dropped_units,
    input_columns,
    mask_nodes,
    remove_nodes,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
WIDTH = 6


def single(units=WIDTH):
    return np.arange(units)[:, None]


def chain(*between, first, last):
    """first -> between -> last, and the group of the outputs of the first."""
    model = nn.Sequential(first, *between, last)
    carriers = tuple(
        Slice(str(k + 1), single())
        for k, module in enumerate(between)
        if list(module.parameters()) or hasattr(module, "running_mean")
    )
    name = str(len(between) + 1)
    return model, Group("0", WIDTH, (Slice("0", single()),), carriers, (Slice(name, single()),))


def cases():
    found = {
        "linear": (*chain(nn.ReLU(), first=nn.Linear(4, WIDTH), last=nn.Linear(WIDTH, 3)), (5, 4)),
        "linear without bias": (
            *chain(nn.BatchNorm1d(WIDTH), first=nn.Linear(4, WIDTH, bias=False), last=nn.Linear(WIDTH, 3)),
            (5, 4),
        ),
        "prelu": (*chain(nn.PReLU(WIDTH), first=nn.Linear(4, WIDTH), last=nn.Linear(WIDTH, 3)), (5, 4)),
        "no gain": (
            *chain(nn.BatchNorm1d(WIDTH, affine=False), first=nn.Linear(4, WIDTH), last=nn.Linear(WIDTH, 3)),
            (5, 4),
        ),
    }
    for axes in (1, 2, 3):
        conv, deconv, norm, instance = (kind[axes - 1] for kind in (CONVOLUTIONS, TRANSPOSED, NORMS, INSTANCE))
        shape = (2, 4, *[5] * axes)
        found |= {
            f"conv{axes}d": (*chain(norm(WIDTH), nn.ReLU(), first=conv(4, WIDTH, 3), last=conv(WIDTH, 3, 2)), shape),
            f"transposed{axes}d": (
                *chain(instance(WIDTH, affine=True), first=deconv(4, WIDTH, 3), last=deconv(WIDTH, 3, 2, stride=2)),
                shape,
            ),
            f"depthwise{axes}d": (
                *chain(conv(WIDTH, WIDTH, 3, groups=WIDTH), first=conv(4, WIDTH, 1), last=conv(WIDTH, 3, 1)),
                shape,
            ),
        }
    return found


CASES = cases()


def assert_masked_is_removed(model, groups, shape, keep):
    model = randomise(model).double().eval()
    before = snapshot(model)
    small = remove_nodes(model, groups, keep)
    masked = copy.deepcopy(model)
    mask_nodes(masked, groups, keep)
    assert_unchanged(model, before)
    inputs = tensor(*shape, dtype=torch.float64)
    with torch.no_grad():
        expected = masked(inputs)
        torch.testing.assert_close(small(inputs), expected, rtol=1e-11, atol=1e-12)
        assert not torch.allclose(expected, model(inputs))  # something was masked
    assert [type(a) for a in small.modules()] == [type(a) for a in model.modules()]
    return small


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", [[0, 2, 5], [1], [4, 3, 0, 1]])
def test_removing_is_masking(name, kept):
    model, group, shape = CASES[name]
    small = assert_masked_is_removed(copy.deepcopy(model), [group], shape, {"0": kept})
    wanted = sorted(kept)
    assert torch.equal(weight_by_output(small[0]), weight_by_output(randomised(model)[0])[wanted])
    for entry in group.carriers:
        module, old = small.get_submodule(entry.module), randomised(model).get_submodule(entry.module)
        for key, value in module.state_dict().items():
            if value.dim():
                assert torch.equal(value, old.state_dict()[key][wanted]), key
        for size in ("num_features", "num_parameters", "out_channels", "in_channels", "groups"):
            if hasattr(module, size):
                assert getattr(module, size) == len(kept), size


def randomised(model):
    return randomise(copy.deepcopy(model)).double().eval()


def weight_by_output(layer):
    return layer.weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else layer.weight


def test_flattened_maps_and_grouped_convolutions():
    flat = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    group = Group("0", 4, (Slice("0", single(4)),), (), (Slice("3", np.arange(36).reshape(4, 9)),))
    small = assert_masked_is_removed(flat, [group], (2, 2, 5, 5), {"0": [1, 3]})
    assert (small[3].in_features, group.slots) == (18, 9)

    grouped = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 3, 1))
    pairs = np.array([[0, 3], [1, 4], [2, 5]])
    groups = [
        Group("0", 3, (Slice("0", pairs),), (), (Slice("1", pairs),)),
        Group("1", 3, (Slice("1", pairs),), (), (Slice("2", pairs),)),
    ]
    small = assert_masked_is_removed(grouped, groups, (2, 2, 6, 6), {"0": [0, 2], "1": [1]})
    assert (small[1].in_channels, small[1].out_channels, small[1].groups) == (4, 2, 2)
    assert small[1].weight.shape == (2, 2, 3, 3)
    unequal = Group("0", 6, (Slice("0", single()),), (), (Slice("1", single()),))
    with pytest.raises(ValueError, match="the blocks of a grouped convolution would get unequal shapes"):
        remove_nodes(grouped, [unequal], {"0": [0, 1, 2, 3]})


class Sum(nn.Module):
    """Two producers of one sum, two readers, one of which reads it after other features."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(4, 2)
        self.d, self.e = nn.Linear(WIDTH, 3), nn.Linear(2 + WIDTH, 3)

    def forward(self, x):
        h = torch.relu(self.a(x) + self.b(x))
        return self.d(h) + self.e(torch.cat([self.c(x), h], 1))


def test_several_producers_and_consumers():
    group = Group(
        "a", WIDTH, (Slice("a", single()), Slice("b", single())), (), (Slice("d", single()), Slice("e", single() + 2))
    )
    other = Group("c", 2, (Slice("c", single(2)),), (), (Slice("e", single(2)),))
    small = assert_masked_is_removed(Sum(), [group, other], (5, 4), {"a": [5, 1], "c": [1]})
    assert small.e.weight.shape == (3, 3)
    assert small.d.in_features == small.a.out_features == small.b.out_features == 2


def test_sizes_that_a_module_keeps_are_updated():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.out, self.heads = nn.Linear(4, 6), nn.Linear(6, 3), 3

        def forward(self, x):
            h = self.values(x).unflatten(-1, (self.heads, 2))
            return self.out(torch.tanh(h).flatten(-2))

    units = np.arange(6).reshape(3, 2)
    group = Group(
        "values", 3, (Slice("values", units),), (), (Slice("out", units),), None, "nodes", (Attribute("", "heads", 1),)
    )
    small = assert_masked_is_removed(Heads(), [group], (5, 4), {"values": [0, 2]})
    assert small.heads == 2


@pytest.mark.parametrize("kept", [[], [0, 0], [-1, 2], [6]])
def test_bad_units_are_refused(kept):
    model, group, _ = CASES["linear"]
    with pytest.raises(ValueError, match=r"group '0' has nodes 0\.\.5; got the nodes to keep"):
        remove_nodes(model, [group], {"0": kept})
    with pytest.raises(ValueError, match=r"group '0' has nodes 0\.\.5; got the nodes to keep"):
        dropped_units(group, kept)


def test_other_modules_are_refused():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    group = Group("0", WIDTH, (Slice("0", single()),), (Slice("1", single()),), (Slice("2", single()),))
    with pytest.raises(TypeError, match="a LayerNorm cannot be cut"):
        remove_nodes(model, [group], {"0": [1]})


def test_what_nothing_is_taken_from_is_copied_bit_for_bit():
    model, group, _ = CASES["conv2d"]
    small = remove_nodes(model, [group], {"0": range(WIDTH)})
    assert small is not model
    for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_gradient_flags_and_dtypes_stay():
    model, group, _ = CASES["conv2d"]
    model = copy.deepcopy(model).bfloat16()
    model[0].bias.requires_grad_(False)
    small = remove_nodes(model, [group], {"0": [0, 1]})
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(parameter.is_leaf and parameter.is_contiguous() for parameter in small.parameters())


def test_columns_of_the_units():
    model, _, _ = CASES["conv2d"]
    assert input_columns(model[3], np.array([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
