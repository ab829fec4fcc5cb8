"""Chains: batch norms folded exactly, what is refused, and Lipschitz constants that nothing exceeds."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from specprune.analysis import trace_chain
from specprune.compress import CalibrationData
from specprune.testbed import mlp, vgg


def shake(model, seed=0):
    """Give a network random weights and batch norm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.1 + 2 * torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def without_bias(norm):
    """A batch norm as `bias=False` makes it, in a torch that does not know that argument yet, too."""
    norm.bias = None
    return norm


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model, layers, x):
    """Run a Sequential in float64 with the chain's weights for its layers, and without its batch norms."""
    rest = {layer.name: layer for layer in layers}
    x = x.double()
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            x = x @ torch.from_numpy(rest[name].weight[:, :, 0]).T + torch.from_numpy(rest[name].bias)
        elif isinstance(module, nn.Conv2d):
            weight = torch.from_numpy(rest[name].weight).reshape(module.weight.shape)
            bias = torch.from_numpy(rest[name].bias)
            assert rest[name].positions_in == x.shape[2] * x.shape[3]
            x = functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)
            assert rest[name].positions_out == x.shape[2] * x.shape[3]
        elif not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            x = module(x)
    return x


NETWORKS = {
    "mlp": (mlp((12, 7, 5, 3)), (5, 12)),
    "mlp with batch norm": (
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2), nn.BatchNorm1d(2)),
        (4, 6),
    ),
    "norms without gain": (
        nn.Sequential(
            nn.Linear(6, 5),
            nn.BatchNorm1d(5, affine=False),
            without_bias(nn.BatchNorm1d(5)),
            nn.ReLU(),
            nn.Linear(5, 2),
        ),
        (4, 6),
    ),
    "vgg": (vgg((3, 4, 5), classes=4, in_channels=2), (3, 2, 8, 8)),
    "convolutions and flatten": (
        nn.Sequential(
            nn.Conv2d(1, 3, (3, 2), stride=(2, 1), padding=1),
            nn.BatchNorm2d(3),
            nn.LeakyReLU(0.3),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(3, 4, 2, dilation=2, padding="same", bias=False),
            nn.ELU(2.0),
            nn.AvgPool2d(2, stride=1),
            nn.Conv2d(4, 3, 1, stride=2),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d((2, 1)),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(6, 4),
            nn.Hardtanh(-1, 2),
            nn.Linear(4, 3),
        ),
        (3, 1, 12, 11),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norms_are_folded_exactly(name):
    model, shape = NETWORKS[name]
    shake(model)
    x = inputs(*shape)
    layers = trace_chain(model, CalibrationData([x]))
    assert [layer.name for layer in layers] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        found, wanted = by_hand(model, layers, x), model.double()(x.double())
    model.float()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_functions_and_methods_are_traced():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.last = nn.Conv2d(1, 2, 3), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = torch.flatten(functional.relu(self.conv(x)), 1)
            return self.last(functional.dropout(torch.tanh(self.first(x)).relu(), 0.5, self.training))

    layers = trace_chain(shake(Net()).train(), CalibrationData([inputs(2, 1, 4, 4)]))
    assert [(layer.name, layer.elementwise, layer.lipschitz) for layer in layers] == [
        ("conv", True, 1.0),
        ("first", True, 1.0),
        ("last", True, 1.0),
    ]


def test_the_model_stays_as_it_is():
    model = shake(NETWORKS["vgg"][0]).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace_chain(model, CalibrationData([inputs(3, 2, 8, 8)]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(module.training for module in model.modules())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class TwoInputs(Residual):
    def forward(self, x, y=None):
        return self.second(self.first(x)) if y is None else self.first(y)


class Branches(Residual):
    def forward(self, x):
        return self.first(x) if x.sum() > 0 else self.second(x)


class AlwaysDrops(Residual):
    def forward(self, x):
        return self.second(functional.dropout(self.first(x), 0.0))


class Pair(Residual):
    def forward(self, x):
        return self.first(x), x


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Residual(), (3, 4), "not a chain: 'add'"),
        (TwoInputs(), (3, 4), "several inputs"),
        (Branches(), (3, 4), "cannot trace Branches"),
        (AlwaysDrops(), (3, 4), "'dropout'"),
        (Pair(), (3, 4), "the model's own output"),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), (3, 4), "GELU"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), (3, 4), "Sigmoid"),
        (nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(0.5, 1), nn.Linear(3, 2)), (3, 4), "Hardtanh"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), (3, 4), "BatchNorm1d"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (3, 4), "BatchNorm1d"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
            (3, 4),
            "no running statistics",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), (3, 1, 4, 4), "'circular'"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), (3, 2, 4, 4), "Conv2d"),
        (nn.Sequential(nn.Linear(4, 3)), (3, 5, 4), "expected (samples, features)"),
        (nn.Sequential(nn.LeakyReLU(2.0), nn.Linear(4, 3)), (3, 4), "enlarge the inputs"),
        (nn.Sequential(nn.ReLU()), (3, 4), "no Linear or Conv2d layer"),
    ],
)
def test_refusals_name_the_reason(model, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trace_chain(model.eval(), CalibrationData([inputs(*shape)]))


def test_a_forward_that_changes_the_outputs_is_refused():
    model = shake(mlp((4, 3, 2)))
    with pytest.raises(ValueError, match="own output"):
        trace_chain(model, CalibrationData([inputs(3, 4)], lambda net, batch: 2 * net(batch)))
    assert len(trace_chain(model, CalibrationData([inputs(3, 4)], lambda net, batch: net(2 * batch)))) == 2


def between(operation, channels=2):
    """Trace a network with the operation between two layers that keep images of 9x9 pixels; return its first layer."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 1), operation, nn.Conv2d(channels, channels, 1))
    return trace_chain(model, CalibrationData([inputs(2, channels, 9, 9)]))[0]


OPERATIONS = [
    (nn.ReLU(), 1.0, True),
    (nn.Tanh(), 1.0, True),
    (nn.LeakyReLU(0.3), 1.0, True),
    (nn.LeakyReLU(3.0), 3.0, True),
    (nn.LeakyReLU(-2.0), 2.0, False),
    (nn.ELU(2.0), 2.0, True),
    (nn.ELU(-3.0), 3.0, False),
    (nn.Hardtanh(-1.0, 2.0), 1.0, True),
    (nn.MaxPool2d(2), 1.0, False),
    (nn.MaxPool2d(3, stride=2), 2.0, False),
    (nn.MaxPool2d((3, 2), stride=1, padding=1), math.sqrt(6), False),
    (nn.MaxPool2d(3, stride=2, dilation=2, padding=1), 3.0, False),
    (nn.AvgPool2d(3), 1 / 3, False),
    (nn.AvgPool2d(2), 1 / 2, False),
    (nn.AvgPool2d(3, stride=1, padding=1), 1.0, False),
    (nn.AvgPool2d(3, stride=3, padding=1, count_include_pad=False), 1 / 2, False),
    (nn.AvgPool2d(2, ceil_mode=True), 1.0, False),
    (nn.AvgPool2d(3, divisor_override=2), 3 / 2, False),
    (nn.AdaptiveAvgPool2d(1), 1 / 9, False),
    (nn.AdaptiveAvgPool2d((3, 1)), 1 / math.sqrt(27), False),
    (nn.AdaptiveAvgPool2d(4), None, False),
]


@pytest.mark.parametrize(("operation", "constant", "elementwise"), OPERATIONS, ids=lambda value: str(value)[:60])
def test_lipschitz_constants_hold_and_are_nearly_attained(operation, constant, elementwise):
    layer = between(operation)
    assert layer.elementwise == elementwise
    if constant is not None:
        assert layer.lipschitz == pytest.approx(constant, rel=1e-12)
    # Random pairs, spikes at every pixel of a flat map, and what a power iteration on the Jacobian makes of them.
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    starts = [torch.zeros(81, 2, 9, 9, dtype=torch.float64), torch.full((81, 2, 9, 9), -5.0, dtype=torch.float64)]
    starts += [torch.randn(81, 2, 9, 9, generator=generator, dtype=torch.float64) * size for size in (0.1, 5)]
    spikes = torch.eye(81, dtype=torch.float64).reshape(81, 1, 9, 9).expand(-1, 2, -1, -1)
    for start in starts:
        for step in (spikes, -spikes, torch.randn(start.shape, generator=generator, dtype=torch.float64)):
            for size in (1e-3, 1.0):
                direction = step * size
                for _ in range(5):
                    moved = start + direction
                    moved.requires_grad_()
                    change = operation(moved) - operation(start)
                    norms = direction.flatten(1).norm(dim=1)
                    largest = max(largest, float((change.detach().flatten(1).norm(dim=1) / norms).max()))
                    (gradient,) = torch.autograd.grad(change.square().sum(), moved)
                    lengths = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
                    direction = gradient * (norms / lengths)[:, None, None, None] + 1e-6 * size * step
    assert largest <= layer.lipschitz * (1 + 1e-9)
    assert largest >= (0.88 if constant is not None else 0.75) * layer.lipschitz  # Schur's test is not always sharp


def dense_matrix(convolution, shape):
    """Return the (outputs, inputs) matrix of a convolution without bias on maps of a shape, column by column."""
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        return convolution.double()(basis).flatten(1).T.numpy()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (2, 2, 0, 1),
        (3, 2, 0, 2),
        (3, 2, 0, 3),
        (3, 3, 2, 2),
        (4, 3, 1, 1),
        ((3, 1), (1, 2), 0, (2, 1)),
    ],
)
def test_overlap_is_the_most_patches_that_a_pixel_is_in(kernel, stride, padding, dilation):
    model = nn.Sequential(nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False))
    (layer,) = trace_chain(model, CalibrationData([inputs(2, 1, 13, 13)]))
    nn.init.ones_(model[0].weight)
    # Row i of the matrix is patch i of the padded image, so a column counts the patches that its pixel is in.
    assert layer.overlap == int(dense_matrix(model[0], (1, 13, 13)).sum(axis=0).max())
    assert layer.slots == model[0].weight[0, 0].numel()
    assert np.shape(layer.bias) == (1,)
