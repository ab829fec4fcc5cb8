"""Norms of layers as dense matrices: every measure against the matrix written out, and tight operator norms."""

import itertools
import time

import numpy as np
import pytest
import torch
from test_chain import inputs, shake
from torch import nn

from specprune.analysis.layer_norms import LayerMatrix, convolution_norm, measure_norms
from specprune.bounds.norms import dense_norms, unit_product
from specprune.bounds.norms_pac_bayes import neyshabur_2018_bound
from specprune.bounds.norms_rademacher import bartlett_bound, golowich_bound, neyshabur_2019_bound
from specprune.testbed import mlp, vgg

CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3), (2, 6, 7)),
    "padded": (nn.Conv2d(3, 2, 3, padding=1), (3, 6, 5)),
    "rectangle": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 0)), (2, 7, 6)),
    "strided": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 8, 8)),
    "stride above kernel": (nn.Conv2d(3, 4, 1, stride=3), (3, 7, 7)),
    "dilated": (nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 7, 7)),
    "dilated and strided": (nn.Conv2d(2, 3, 2, padding=1, dilation=(3, 2), stride=(2, 3)), (2, 9, 9)),
    "same": (nn.Conv2d(2, 2, (2, 4), padding="same", dilation=(1, 2)), (2, 6, 8)),
    "many outputs": (nn.Conv2d(1, 8, 3, padding=1), (1, 5, 5)),
    "whole map": (nn.Conv2d(2, 5, 4), (2, 4, 4)),
}


def dense(module, shape):
    """Return a layer without bias as a matrix: its answers to all unit vectors."""
    count = int(np.prod(shape))
    unit = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    weight, bias = module.weight.data, module.bias
    module.weight.data, module.bias = weight.double(), None
    with torch.no_grad():
        answers = module(unit)
    module.weight.data, module.bias = weight, bias
    return answers.flatten(1).T.numpy()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_against_the_dense_matrix(name):
    module, shape = CONVOLUTIONS[name]
    shake(module, seed=len(name))
    matrix, found = dense(module, shape), LayerMatrix(module.weight.detach().numpy(), module, shape)
    assert (found.rows, found.columns) == matrix.shape
    assert found.row_squares() == pytest.approx(np.square(matrix).sum(axis=1))
    assert found.row_sums() == pytest.approx(np.abs(matrix).sum(axis=1))
    assert found.column_squares() == pytest.approx(np.square(matrix).sum(axis=0))
    exact = np.linalg.norm(matrix, 2)
    assert exact <= found.operator_norm() <= 1.3 * exact
    below = found.operator_norm_below(iterations=200)
    assert 0.99 * exact <= below <= exact * (1 + 1e-12)
    vector = np.random.default_rng(0).standard_normal(found.rows)
    output = torch.from_numpy(vector).reshape(1, len(module.weight), *found._map)
    assert found.apply_transpose(output).flatten().numpy() == pytest.approx(matrix.T @ vector)


def test_circular_norm_is_exact_on_the_torus():
    """The block norms against the circulant matrix, and with more frequencies than the early stop looks at."""
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((3, 2, 2, 3))
    height, width = 5, 4
    period = height + 1, width + 2
    matrix = np.zeros((3, *period, 2, *period))
    for p, q in itertools.product(range(period[0]), range(period[1])):
        for a, b in itertools.product(range(2), range(3)):
            matrix[:, p, q, :, (p + a) % period[0], (q + b) % period[1]] += weight[:, :, a, b]
    exact = np.linalg.norm(matrix.reshape(3 * period[0] * period[1], -1), 2)
    assert convolution_norm(weight, (1, 1), (1, 1), (height, width)) == pytest.approx(exact, rel=1e-12)
    assert convolution_norm(1e200 * weight, (1, 1), (1, 1), (height, width)) == pytest.approx(1e200 * exact)
    assert convolution_norm(0 * weight, (1, 1), (1, 1), (height, width)) == 0


def test_power_iteration_of_a_zero_layer():
    module = nn.Conv2d(1, 1, 3)
    assert LayerMatrix(np.zeros((1, 1, 9)), module, (1, 5, 5)).operator_norm_below() == 0
    assert LayerMatrix(np.zeros((1, 1, 9)), module, (1, 5, 5)).operator_norm() == 0


@pytest.mark.parametrize("exponent", [None, -1, 3])
def test_multilayer_perceptron(exponent):
    model, start = shake(mlp((12, 7, 5, 3))), shake(mlp((12, 7, 5, 3)), seed=4)
    x = inputs(50, 12)
    batches = [x[:30], x[30:]]
    found = measure_norms(model, batches, reference=start, constant_exponent=exponent)
    rows = x.double().numpy()
    assert found.inputs.samples == 50
    assert found.inputs.frobenius == pytest.approx(np.linalg.norm(rows))
    assert found.inputs.largest == pytest.approx(np.linalg.norm(rows, axis=1).max())
    assert found.inputs.coordinate == pytest.approx(np.linalg.norm(rows, axis=0).max())
    size = np.linalg.norm(rows) / np.sqrt(50) / 4
    if exponent is None:
        assert size / 2 < found.inputs.constant <= size
    else:
        assert found.inputs.constant == 2.0**exponent
    assert found.names == ("fc1", "fc2", "fc3")
    assert found.units is None
    for index, (name, layer) in enumerate(zip(found.names, found.layers, strict=True)):
        module, first = model.get_submodule(name), start.get_submodule(name)
        twin = dense_norms(
            module.weight.detach().double().numpy(),
            module.bias.detach().double().numpy(),
            reference=first.weight.detach().double().numpy(),
            reference_bias=first.bias.detach().double().numpy(),
            constant=found.inputs.constant,
            last=index == 2,
        )
        same(layer, twin)


def same(layer, twin, slack=1e-8):
    for name in ("frobenius", "two_one", "one_inf", "frobenius_distance", "two_one_distance", "lipschitz"):
        assert getattr(layer, name) == pytest.approx(getattr(twin, name)), name
    assert (layer.rows, layer.columns) == (twin.rows, twin.columns)
    assert twin.operator_norm * (1 - 1e-12) <= layer.operator_norm <= twin.operator_norm * (1 + slack)


def test_convolutional_network_with_batch_norms():
    """Every layer against the dense matrix of the folded network, biases on every pixel."""

    def build():
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.LeakyReLU(0.3),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(3, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        )

    model, start = shake(build()), shake(build(), seed=5)
    found = measure_norms(model, [inputs(9, 1, 8, 8)], reference=start)
    shapes = [(1, 8, 8), (3, 3, 3)]
    assert [(layer.elementwise, layer.homogeneous) for layer in found.layers] == [
        (False, True),
        (True, False),
        (True, True),
    ]
    for index, position in enumerate(("0", "4")):
        folded = []
        for net in (model, start):
            module = net.get_submodule(position)
            scale, shift = np.ones(len(module.weight)), np.zeros(len(module.weight))
            if index == 0:
                norm = net.get_submodule("1")
                scale = (norm.weight / torch.sqrt(norm.running_var.double() + norm.eps)).detach().numpy()
                shift = norm.bias.detach().numpy() - norm.running_mean.numpy() * scale
            else:
                shift = module.bias.detach().numpy()
            matrix = dense(module, shapes[index])
            pixels = len(matrix) // len(scale)
            folded.append((np.repeat(scale, pixels)[:, None] * matrix, np.repeat(shift, pixels)))
        (matrix, bias), (first, before) = folded
        twin = dense_norms(
            matrix,
            bias,
            reference=first,
            reference_bias=before,
            constant=found.inputs.constant,
            lipschitz=2.0 if index == 0 else 1.0,
        )
        layer = found.layers[index]
        for name in ("frobenius", "two_one", "one_inf", "frobenius_distance", "two_one_distance", "lipschitz"):
            assert getattr(layer, name) == pytest.approx(getattr(twin, name), rel=1e-5), name
        assert (layer.rows, layer.columns) == (twin.rows, twin.columns)
        assert twin.operator_norm * (1 - 1e-6) <= layer.operator_norm <= 1.3 * twin.operator_norm


def test_networks_without_biases():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    found = measure_norms(shake(model), [inputs(8, 6)])
    assert found.inputs.constant_exponent is None
    for layer, module in zip(found.layers, (model[0], model[2]), strict=True):
        same(layer, dense_norms(module.weight.detach().double().numpy(), last=True))
    first, second = (m.weight.detach().double().numpy() for m in (model[0], model[2]))
    assert found.units == pytest.approx(unit_product(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0)))


@pytest.mark.parametrize("convolutions", [False, True])
def test_units_of_two_layers(convolutions):
    """Units of a two-layer network in homogeneous coordinates, the constant one included."""
    if convolutions:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2, stride=2), nn.Flatten())
        shapes, pixels, x = [(1, 6, 6), (2, 4, 4)], (16, 4), inputs(5, 1, 6, 6)
    else:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        shapes, pixels, x = [(4,), (6,)], (1, 1), inputs(5, 4)
    found = measure_norms(shake(model), [x])
    c = found.inputs.constant
    matrices = [dense(model[k], shape) for k, shape in zip((0, 2), shapes, strict=True)]
    biases = [np.repeat(model[k].bias.detach().double().numpy(), p) for k, p in zip((0, 2), pixels, strict=True)]
    first = np.hstack([matrices[0], biases[0][:, None] / c])
    first = np.vstack([first, [0.0] * matrices[0].shape[1] + [1.0]])
    second = np.hstack([matrices[1], biases[1][:, None] / c])
    wanted = unit_product(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0))
    assert found.units == pytest.approx(wanted)


def test_pooling_before_the_first_layer():
    """Inputs are measured where the first layer reads them: a pooled column may be longer than every input column."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    x = inputs(20, 1, 4, 4)
    found = measure_norms(shake(model), [x])
    read = model[:2](x).double().numpy()
    assert found.inputs.coordinate == pytest.approx(np.linalg.norm(read, axis=0).max())
    assert found.inputs.frobenius == pytest.approx(np.linalg.norm(read))
    assert found.layers[0].columns == 5


def test_which_maps_are_homogeneous():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
            self.limit = nn.Hardtanh(-1, 1)

        def forward(self, x):
            a, b, c, d, e, f = self.layers
            x = torch.relu(a(x))
            x = torch.flatten(torch.tanh(b(x)), 1)
            x = torch.nn.functional.dropout(c(x).relu(), 0.5, self.training)
            return f(e(self.limit(d(x))).tanh())

    found = measure_norms(shake(Net()), [inputs(3, 4)])
    assert [layer.homogeneous for layer in found.layers] == [True, False, True, False, False, True]


def test_permuting_channels_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    shake(model)
    batches = [inputs(6, 1, 7, 7)]
    before = measure_norms(model, batches)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter.copy_(parameter[order].clone())
        model[2].weight.copy_(model[2].weight[:, order].clone())
    after = measure_norms(model, batches)
    for first, second in zip(before.layers, after.layers, strict=True):
        same(first, second)
    assert before.units == pytest.approx(after.units)


def test_bounds_from_measured_norms():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    found = measure_norms(shake(model), [inputs(50, 4)])
    setting = {"gamma": 1.0, "delta": 0.05}
    for bound in (
        bartlett_bound(found.layers, found.inputs, empirical_ramp=0.1, **setting),
        golowich_bound(found.layers, found.inputs, empirical_ramp=0.1, **setting),
        neyshabur_2019_bound(found.layers, found.units, found.inputs, empirical_ramp=0.1, **setting),
        neyshabur_2018_bound(found.layers, found.inputs, empirical_margin_error=0.1, input_radius=9.0, **setting),
    ):
        assert bound.valid
        assert bound.vacuous
    assert not golowich_bound(
        measure_norms(shake(vgg((2, 3), classes=3)), [inputs(3, 1, 4, 4)]).layers,
        found.inputs,
        empirical_ramp=0.1,
        **setting,
    ).valid


def test_a_large_network_takes_seconds():
    model = shake(vgg())
    start = time.perf_counter()
    found = measure_norms(model, [inputs(4, 1, 28, 28)])
    assert time.perf_counter() - start < 8
    assert len(found.layers) == 7
    module = model.conv6
    matrix = LayerMatrix(module.weight.detach().numpy(), module, (96, 7, 7))
    assert matrix.operator_norm_below(30) <= matrix.operator_norm() <= 1.2 * matrix.operator_norm_below(30)


def test_refusals():
    with pytest.raises(ValueError, match="reference's layers"):
        measure_norms(mlp((4, 3, 2)), [inputs(3, 4)], reference=mlp((4, 5, 2)))
    with pytest.raises(ValueError, match="Lipschitz"):
        measure_norms(nn.Sequential(nn.Linear(3, 2), nn.GELU()), [inputs(3, 3)])
