"""Layers as matrices: rows times weights must be what PyTorch's own layers compute."""

import numpy as np
import pytest
import torch
from helpers import tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.compress.layers import (
    Positions,
    blocks,
    channel_rows,
    get_layer,
    input_width,
    is_depthwise,
    is_refittable,
    kernel_columns,
    layer_names,
    output_size,
    patch_rows,
    set_weight_matrix,
    weight_matrix,
)
from specprune.compress.surgery import input_columns

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def computed(layer, inputs, positions):
    """The layer's outputs as rows, from `patch_rows` and `weight_matrix` alone."""
    rows = patch_rows(layer, inputs, positions)
    weight = weight_matrix(layer)
    parts = [rows[:, columns] @ weight[outputs].T for outputs, columns in blocks(layer)]
    outputs = torch.cat(parts, 1)
    return outputs if layer.bias is None else outputs + layer.bias


def assert_reproduced(layer, inputs, seed=0):
    expected = layer(inputs)
    assert output_size(layer, inputs) == tuple(expected.shape[2:])
    flat = expected.flatten(2).transpose(1, 2).reshape(-1, expected.shape[1])
    torch.testing.assert_close(computed(layer, inputs, Positions(None)), flat, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(Positions(None).rows(layer, expected), flat, rtol=0, atol=0)
    drawn = Positions.draw(layer, inputs, 3, torch.Generator().manual_seed(seed))
    total = expected[0, 0].numel()
    if total <= 3:
        assert drawn.index is None
        return
    assert drawn.index.shape == (len(inputs), 3)
    assert 0 <= int(drawn.index.min()) <= int(drawn.index.max()) < total
    picked = torch.stack(
        [expected[n].flatten(1)[:, place] for n in range(len(inputs)) for place in drawn.index[n].tolist()]
    )
    torch.testing.assert_close(drawn.rows(layer, expected), picked, rtol=0, atol=0)
    torch.testing.assert_close(computed(layer, inputs, drawn), picked, rtol=1e-10, atol=1e-11)


@st.composite
def convolutions(draw, transposed):
    axes = draw(st.integers(1, 3))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    options = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "bias": draw(st.booleans())}
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if transposed:
        padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options |= {"padding": padding, "output_padding": extra}
        layer = TRANSPOSED[axes - 1](inputs, outputs, **options)
    else:
        count = draw(st.integers(1, 3))
        same = draw(st.booleans())
        if same:
            options |= {"padding": "same", "stride": 1}
        else:
            options["padding"] = numbers(0, 2)
        # Circular padding may not exceed the map, reflection must stay below it; the maps are at least 5 wide.
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        layer = CONVOLUTIONS[axes - 1](inputs * count, outputs * count, groups=count, **options)
    shape = (draw(st.integers(1, 3)), layer.in_channels, *(draw(st.integers(5, 7)) for _ in range(axes)))
    return layer.double(), tensor(*shape, seed=draw(st.integers(0, 100)), dtype=torch.float64)


@settings(max_examples=120, deadline=None)
@given(case=convolutions(transposed=False), seed=st.integers(0, 9))
@torch.no_grad()
def test_convolutions_are_reproduced(case, seed):
    assert_reproduced(*case, seed)


@settings(max_examples=80, deadline=None)
@given(case=convolutions(transposed=True), seed=st.integers(0, 9))
@torch.no_grad()
def test_transposed_convolutions_are_reproduced(case, seed):
    layer, inputs = case
    try:
        layer(inputs)
    except RuntimeError:  # an output of no pixels, or an output padding that PyTorch refuses
        return
    assert_reproduced(layer, inputs, seed)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_reproduced_on_vectors_and_tokens(bias):
    layer = nn.Linear(5, 3, bias=bias).double()
    for inputs in (tensor(4, 5, dtype=torch.float64), tensor(2, 6, 5, dtype=torch.float64)):
        expected = layer(inputs)
        assert Positions.draw(layer, inputs, 2, torch.Generator()).index is None
        torch.testing.assert_close(computed(layer, inputs, Positions(None)), expected.reshape(-1, 3))
        assert torch.equal(Positions(None).rows(layer, expected), expected.reshape(-1, 3))
        assert torch.equal(channel_rows(layer, inputs), inputs.reshape(-1, 5))


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2)),
    "grouped": lambda: nn.Conv2d(6, 4, (3, 2), groups=2),
    "conv3d": lambda: nn.Conv3d(6, 4, (3, 2, 1)),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2),
    "transposed2d": lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=(1, 2)),
    "transposed3d": lambda: nn.ConvTranspose3d(6, 4, (1, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_are_written_as_they_are_read(name):
    layer = LAYERS[name]()
    matrix = torch.arange(weight_matrix(layer).numel(), dtype=torch.float32).reshape(weight_matrix(layer).shape)
    before = layer.weight
    set_weight_matrix(layer, matrix)
    assert layer.weight is before
    assert torch.equal(weight_matrix(layer), matrix)
    assert sorted(layer.weight.detach().flatten().tolist()) == list(range(matrix.numel()))


@pytest.mark.parametrize("name", LAYERS)
def test_the_columns_of_an_input_are_the_ones_it_fills(name):
    layer = LAYERS[name]()
    axes = layer.weight.dim() - 2
    shape = (2, 6) if axes == 0 else (2, 6, *[5] * axes)
    assert input_width(layer) == 6
    for channel in range(6):
        inputs = torch.zeros(shape)
        inputs[:, channel] = 1.0
        filled = patch_rows(layer, inputs, Positions(None)).any(0).nonzero().flatten()
        columns = input_columns(layer, np.array([channel]))
        assert columns.tolist() == filled.tolist()
        assert len(columns) == kernel_columns(layer)
        assert channel_rows(layer, inputs).sum(0).nonzero().flatten().tolist() == [channel]


def test_which_modules_are_layers():
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert is_depthwise(depthwise)
    assert not is_depthwise(nn.Conv2d(1, 1, 3))
    assert not is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
    assert not is_depthwise(nn.Linear(4, 4))
    assert all(is_refittable(make()) for make in LAYERS.values())
    assert not is_refittable(depthwise)
    assert not is_refittable(nn.ConvTranspose2d(4, 4, 3, groups=2))
    assert not is_refittable(nn.Bilinear(2, 2, 2))
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), depthwise, nn.Conv2d(4, 2, 1))
    assert layer_names(net) == ["0", "3"]
    assert get_layer(net, "3") is net[3]
    for name in ("2", "1", "9"):
        with pytest.raises(ValueError, match=rf"no Linear or convolution layer called '{name}'; the model has"):
            get_layer(net, name)


def test_positions_are_drawn_evenly_and_by_the_generator():
    layer, inputs = nn.Conv2d(1, 1, 2), torch.zeros(400, 1, 4, 3)
    drawn = Positions.draw(layer, inputs, 5, torch.Generator().manual_seed(1)).index
    again = Positions.draw(layer, inputs, 5, torch.Generator().manual_seed(1)).index
    assert torch.equal(drawn, again)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert len(counts) == 6
    assert float(((counts - 2000 / 6) ** 2 / (2000 / 6)).sum()) < 20.5  # chi-square, 5 degrees: beyond it 0.1 %
    assert Positions.draw(layer, inputs, 6, torch.Generator()).index is None
    assert Positions.draw(layer, inputs, None, torch.Generator()).index is None
