"""Networks in few bits: folding changes nothing, rounding keeps to the grid that is paid for, every tensor is paid."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune.bounds.occam import network_code_length
from specprune.compress import CalibrationData
from specprune.compress.coding import fold_batch_norms, quantise_network
from specprune.testbed import mlp, resnet, vgg


def with_statistics(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.running_mean, module.weight, module.bias):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator))
                module.running_var.copy_(0.1 + 2 * torch.rand(module.running_var.shape, generator=generator))
    return model.double()


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), (6, 5)),
    "no gain": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)), (6, 5)),
    "vgg": (lambda: vgg((3, 4, 5), classes=4, in_channels=2), (3, 2, 8, 8)),
    "resnet": (lambda: resnet((3, 4), blocks=1, classes=4, in_channels=2), (3, 2, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_is_exact(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = with_statistics(make()).train(), torch.randn(*shape, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model, CalibrationData([x]))
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in folded.modules())
    assert not list(folded.buffers())
    assert model.training
    assert not folded.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-12, atol=1e-12)


class AlsoElsewhere(nn.Module):
    """Its layer is read by the batch norm and by a sum."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), r"\['2'\] do not read"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), r"\['0'\] do not read"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), "'1' has no running statistics"),
        (with_statistics(AlsoElsewhere()).float(), "read elsewhere"),
    ],
)
def test_what_cannot_be_folded_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        fold_batch_norms(model, CalibrationData([torch.randn(5, 4)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_values_lie_on_the_grid_that_is_paid_for(bits, dtype):
    torch.manual_seed(0)
    model = mlp((200, 30, 20, 3)).to(dtype)
    with torch.no_grad():
        model.fc2.weight *= 1000
        model.fc3.bias.zero_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = quantise_network(model, bits)
    parameters = dict(network.model.named_parameters())
    assert network.counts == tuple(parameter.numel() for parameter in model.parameters())
    assert sum(network.counts) == 200 * 30 + 30 + 30 * 20 + 20 + 20 * 3 + 3
    for (name, parameter), k in zip(parameters.items(), network.exponents, strict=True):
        levels = parameter.detach().double().numpy() / 2.0 ** (k + 1 - bits)
        assert np.all(levels == np.round(levels)), name
        assert levels.min() >= -(2 ** (bits - 1))
        assert levels.max() <= 2 ** (bits - 1) - 1
        assert parameter.dtype == dtype
    used = {float(level) for level in parameters["fc1.weight"].detach().flatten()}
    assert len(used) == 2**bits or (bits == 8 and 2**7 < len(used) <= 2**8)
    assert torch.equal(parameters["fc3.bias"], torch.zeros(3, dtype=dtype)) or bits == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_more_bits_round_less():
    torch.manual_seed(0)
    model, x = mlp((20, 30, 3)), torch.randn(50, 20)
    errors, distances = [], []
    for bits in (2, 4, 6, 8, 12):
        rounded = quantise_network(model, bits).model
        pairs = zip(rounded.parameters(), model.parameters(), strict=True)
        errors.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
        with torch.no_grad():
            distances.append(float((rounded(x) - model(x)).norm()))
    assert all(later < earlier / 4 for earlier, later in itertools.pairwise(errors))
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))


def test_one_outlier_is_clipped():
    """A grid for all entries but one is finer; no grid ends more than two powers of two below the largest entry."""
    layer = nn.Linear(100, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.2, 0.2, 100))
        layer.weight[0, 0] = 0.9
    (exponent,) = quantise_network(layer, 2).exponents
    assert exponent in (-1, -2)
    with torch.no_grad():
        layer.weight.copy_(torch.full((1, 100), 1e-3))
        layer.weight[0, 0] = 0.9
    assert quantise_network(layer, 2).exponents[0] >= -2


def test_code_length_by_hand():
    torch.manual_seed(0)
    network = quantise_network(mlp((4, 5, 3)), 3)
    nats = 3 * (20 + 5 + 15 + 3) * math.log(2) + math.log(3 * 4) + math.log(7)
    nats += sum(math.log(2 * (abs(k) + 1) * (abs(k) + 2)) for k in network.exponents)
    assert network.code_length([7]) == pytest.approx(nats, rel=1e-13)
    assert network.code_length([7]) == network_code_length(network.counts, network.exponents, 3, [7])


def test_folded_norms_are_paid_as_biases():
    """A convolution without bias gets one from its norm, and that is described too."""
    torch.manual_seed(0)
    model, x = with_statistics(vgg((3, 4), classes=2)), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    network = quantise_network(fold_batch_norms(model, CalibrationData([x])), 4)
    assert sorted(network.counts) == sorted([27, 3, 9 * 12, 4, 8, 2])
    assert sum(network.counts) == sum(parameter.numel() for parameter in network.model.parameters())


def test_folded_networks_can_still_be_pruned_and_trained():
    net = with_statistics(vgg((4, 4), 3, 1))
    folded = fold_batch_norms(net, CalibrationData([torch.rand(4, 1, 8, 8, dtype=torch.float64)]))
    assert all(parameter.requires_grad for parameter in folded.parameters())
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    frozen = fold_batch_norms(net, CalibrationData([torch.rand(4, 1, 8, 8, dtype=torch.float64)]))
    assert not any(parameter.requires_grad for name, parameter in frozen.named_parameters() if "conv" in name)
