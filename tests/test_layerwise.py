"""The layer-by-layer certificate against a dense twin, where it is exact, and against adversarial gates."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune.analysis import output_distance
from specprune.analysis.layerwise import layerwise_certificate
from specprune.compress import CalibrationData
from specprune.testbed import mlp


def pair(seed, depth=3, width=9, small=5, activation=nn.ReLU):
    """Two random chains of dense layers; the second has some of the nodes of the first, and other weights."""
    torch.manual_seed(seed)
    widths, fewer = [6] + [width] * depth + [4], [6] + [small] * depth + [4]
    nets = []
    for sizes in (widths, fewer):
        layers = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), activation()]
        nets.append(nn.Sequential(*layers[:-1]).double())
    kept = {}
    for index in range(1, depth + 1):
        nodes = torch.randperm(width)[:small].sort().values
        previous = kept.get(str(2 * index - 2), torch.arange(6))
        with torch.no_grad():
            nets[1][2 * index - 2].weight.copy_(nets[0][2 * index - 2].weight[nodes][:, previous])
            nets[1][2 * index - 2].weight.add_(0.1 * torch.randn_like(nets[1][2 * index - 2].weight))
        kept[str(2 * index)] = nodes
    return nets[0], nets[1], {name: nodes.numpy() for name, nodes in kept.items()}, torch.randn(50, 6).double()


def certificate(first, second, kept, x):
    data = CalibrationData([x[:20], x[20:]])
    measured, norm, _ = output_distance(first, second, data)
    return measured, layerwise_certificate(first, second, kept, data, norm)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seed", range(5))
def test_twin_with_plain_norms(seed, activation):
    """The recursion written out with all norm weights 1: the certificate is at most that, and above the distance."""
    first, second, kept, x = pair(seed, activation=activation)
    original, h = [x.numpy()], x
    with torch.no_grad():
        for index in range(0, len(first) - 1, 2):
            h = first[index : index + 2](h)
            original.append(h.numpy())
        final = first(x).numpy()
    act = (lambda z: np.maximum(z, 0)) if activation is nn.ReLU else np.tanh
    weights = [(second[k].weight.detach().numpy(), second[k].bias.detach().numpy()) for k in range(0, len(second), 2)]
    p, rest = np.zeros_like(original[0]), 0.0
    for layer, (weight, bias) in enumerate(weights):
        theirs = original[layer][:, kept[str(2 * layer)]] if layer else original[0]
        moved, reached = p @ weight.T, theirs @ weight.T + bias
        if layer == len(weights) - 1:
            p, rest = moved + reached - final, np.linalg.norm(weight, 2) * rest
        else:
            target = original[layer + 1][:, kept[str(2 * layer + 2)]]
            rest = np.linalg.norm(weight, 2) * rest + math.sqrt(np.mean(np.sum(moved**2, 1))) / 2
            p = moved / 2 + act(reached) - target
    plain = math.sqrt(np.mean(np.sum(p**2, 1)))
    measured, bound = certificate(first, second, kept, x)
    assert measured <= bound.value <= (plain + rest) * (1 + 1e-9)


def test_one_pruned_layer_before_a_linear_output_is_exact():
    """The only local error is then known up to the output, where nothing is bounded."""
    first, second, kept, x = pair(0, depth=1)
    measured, bound = certificate(first, second, kept, x)
    assert bound.value == pytest.approx(measured, rel=1e-9)
    assert bound.value >= measured
    assert bound.confidence is None


def test_equal_networks_cost_only_rounding():
    torch.manual_seed(0)
    model, x = mlp((6, 10, 8, 3)).double(), torch.randn(30, 6).double()
    measured, bound = certificate(model, model, {}, x)
    assert measured == 0
    assert 0 < bound.value < 1e-11 * output_distance(model, model, CalibrationData([x]))[1]


@pytest.mark.slow
def test_worst_gates_stay_below_what_is_carried():
    """Search over inputs for the largest ratio of distance and certificate: it never exceeds 1, and comes close."""
    closest = 0.0
    for seed in range(6):
        first, second, kept, x = pair(seed, depth=2, width=3, small=2)
        x = x[:1].clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.1)
        for _ in range(10):
            measured, bound = certificate(first, second, kept, x.detach())
            assert measured <= bound.value
            closest = max(closest, measured / bound.value)
            hidden = first(x)
            loss = -(hidden - second(x)).square().sum() / (hidden.square().sum() + 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert closest > 0.8


def test_models_are_left_alone():
    first, second, kept, x = pair(1)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    certificate(first, second, kept, x)
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert not any(module._forward_pre_hooks for net in (first, second) for module in net.modules())


def test_a_network_that_is_no_chain_is_refused():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Forked().double()
    with pytest.raises(ValueError, match="not a chain"):
        layerwise_certificate(model, model, {}, CalibrationData([torch.randn(5, 6).double()]), 1.0)
