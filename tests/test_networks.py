"""The networks: shapes, names, sizes, and seeding that keeps the global random state."""

import pytest
import torch
from torch import nn

from specprune.testbed import TaskShape, build_network, load_dataset, mlp, resnet, vgg

GREY_28 = TaskShape((1, 28, 28), 10)


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_mlp_layers_and_names():
    model = mlp((784, 300, 1000, 300, 10))
    assert list(dict(model.named_children())) == ["flatten", "fc1", "relu1", "fc2", "relu2", "fc3", "relu3", "fc4"]
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [
        (300, 784),
        (1000, 300),
        (300, 1000),
        (10, 300),
    ]
    assert model(torch.zeros(5, 1, 28, 28)).shape == (5, 10)
    assert isinstance(mlp((3, 4, 2), nn.Tanh).tanh1, nn.Tanh)


def test_vgg_layers_and_names():
    model = vgg((4, 4, 8, 8), classes=7, in_channels=3)
    names = "conv1 norm1 relu1 conv2 norm2 relu2 pool1 conv3 norm3 relu3 conv4 norm4 relu4 average flatten fc1"
    assert list(dict(model.named_children())) == names.split()
    convolutions = 9 * (3 * 4 + 4 * 4 + 4 * 8 + 8 * 8)
    assert parameter_count(model) == convolutions + 2 * (4 + 4 + 8 + 8) + 8 * 7 + 7
    model.eval()
    assert model[:7](torch.zeros(1, 3, 28, 28)).shape == (1, 4, 14, 14)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["mlp-20-30", "vgg", "vgg-4-4-6", "resnet", "resnet-4-8"])
def test_every_network_fits_every_data_set(name, shape):
    model = build_network(name, TaskShape(shape, 7))
    outputs = model(torch.rand(3, *shape))
    assert outputs.shape == (3, 7)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_build_network_takes_a_data_set():
    assert build_network("mlp-5", load_dataset("digits")).fc1.weight.shape == (5, 64)
    assert build_network("vgg-24-24-48-48", GREY_28).conv4.weight.shape == (48, 24 * 2, 3, 3)


def test_resnet_shapes():
    model = resnet((4, 8, 16), blocks=2, classes=5, in_channels=3).eval()
    images = torch.rand(2, 3, 32, 32)
    sizes = {}
    for name, child in model.named_children():
        images = child(images)
        sizes[name] = tuple(images.shape[1:])
    assert sizes["block1_2"] == (4, 32, 32)
    assert sizes["block2_1"] == (8, 16, 16)
    assert sizes["block3_2"] == (16, 8, 8)
    assert sizes["fc1"] == (5,)
    assert isinstance(model.block1_1.shortcut, nn.Identity)
    assert model.block2_1.shortcut.conv.weight.shape == (8, 4, 1, 1)
    assert isinstance(model.block2_2.shortcut, nn.Identity)


def test_basic_block_adds_its_input():
    block = resnet((4,), blocks=1).block1_1.eval()
    nn.init.zeros_(block.conv2.weight)
    inputs = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(inputs), inputs.clamp(min=0))


@pytest.mark.parametrize("name", ["mlp-6", "vgg-4-4", "resnet-4"])
def test_seed_fixes_the_weights_and_nothing_else(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_network(name, GREY_28, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_network(name, GREY_28, seed=1).state_dict()
    other = build_network(name, GREY_28, seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["", "cnn", "mlp", "mlp-", "mlp-0", "mlp-3-x", "mlp--3", "vgg-24-", "vgg-²", "MLP-3"])
def test_other_names_are_refused_with_the_forms(name):
    with pytest.raises(ValueError, match=r"mlp-300-1000-300.*vgg-24-24-48-48.*resnet") as caught:
        build_network(name, GREY_28)
    assert repr(name) in str(caught.value)


def test_too_many_poolings_are_refused():
    small = TaskShape((1, 8, 8), 10)
    assert build_network("vgg-2-2-2-2-2-2-2-2", small)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="4 times, too often for 8x8"):
        build_network("vgg-2-2-2-2-2-2-2-2-2", small)


@pytest.mark.parametrize("make", [lambda: mlp((3,)), lambda: mlp((3, 0, 2)), lambda: vgg(()), lambda: resnet((4,), 0)])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="each at least 1"):
        make()
