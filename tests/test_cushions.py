"""Cushions against explicit Jacobians, their invariances, and the coverage of the smoothness statement."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import randomise, tensor
from scipy.stats import binom
from torch import nn

from specprune.analysis import jacobians
from specprune.analysis.cushions import _order_statistic, cushions
from specprune.bounds.noise_stability import compressed_size


def dense(bias=True, seed=0, activation=nn.ReLU):
    layers = [nn.Linear(5, 7, bias=bias), activation(), nn.Linear(7, 6, bias=bias), activation()]
    return randomise(nn.Sequential(*layers, nn.Linear(6, 3, bias=bias)), seed).double()


def convolutional(seed=0):
    layers = [nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return randomise(nn.Sequential(*layers), seed).eval().double()


def stages(model):
    """The network as maps from one layer's output to the next one's, written down by hand."""
    if isinstance(model[0], nn.Linear):
        return [model[0], nn.Sequential(*model[1:3]), nn.Sequential(*model[3:5])], [model[0], model[2], model[4]]
    return [model[:2], nn.Sequential(*model[2:5]), nn.Sequential(*model[5:])], [model[0], model[4], model[7]]


def slow_twin(model, x):
    """Cushions of one sample by autograd's dense Jacobians; the weights of layer 0 with its batch norm folded in."""
    maps, layers = stages(model)
    weights = [layer.weight.detach().clone() for layer in layers]
    if isinstance(model[1], nn.BatchNorm2d):
        norm = model[1]
        weights[0] *= (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    states = []
    for stage in maps:
        states.append(stage(x if not states else states[-1]).detach())
    entering = [x, nn.Sequential(*list(maps[1])[:-1])(states[0]), nn.Sequential(*list(maps[2])[:-1])(states[1])]
    mu = [s.norm() / (w.norm() * e.norm()) for s, w, e in zip(states, weights, entering, strict=True)]
    between, beta = {}, {}
    for i in range(3):
        for j in range(i + 1, 3):
            jacobian = torch.autograd.functional.jacobian(nn.Sequential(*maps[i + 1 : j + 1]), states[i])
            between[i, j] = float(states[j].norm() / (jacobian.norm() * states[i].norm()))
            grid = jacobian.reshape(states[j].numel(), states[i].shape[1], -1)
            shares = grid.square().sum((0, 1)) / grid.square().sum()
            beta[i, j] = math.sqrt(float(shares.max()) * grid.shape[2])
            if states[i].dim() == 2:
                beta[i, j] = 1.0
    contraction = [float(s.norm() / e.norm()) for s, e in zip(states, entering[1:], strict=False)]
    return [float(m) for m in mu], between, beta, contraction, float(states[-1].norm())


@pytest.mark.parametrize("model", [dense(), dense(False), dense(activation=nn.Tanh), convolutional()])
def test_slow_twin(model):
    shape = (5,) if isinstance(model[0], nn.Linear) else (2, 6, 6)
    x = tensor(12, *shape, dtype=torch.float64)
    found = cushions(model, [x[:5], x[5:]], samples=50, quantile=0.3, draws=8)
    twins = [slow_twin(model, x[k : k + 1]) for k in range(12)]
    assert (found.samples, found.jacobian_samples) == (12, 12)
    assert found.output_norm == pytest.approx(max(twin[4] for twin in twins), rel=1e-10)
    for i, layer in enumerate(found.layers):
        values = sorted(twin[0][i] for twin in twins)
        assert layer.cushion == pytest.approx(values[0], rel=1e-10)
        assert layer.cushion_quantile == pytest.approx(values[3], rel=1e-10)  # 3 of 12 are below, at most 30 %
        assert layer.jacobian_error == 0
        for j in range(i + 1, 3):
            values = sorted(twin[1][i, j] for twin in twins)
            name = found.layers[j].layer
            assert layer.interlayer[name] == pytest.approx(values[0], rel=1e-10)
            assert layer.interlayer_quantile[name] == pytest.approx(values[3], rel=1e-10)
        if i < 2:
            assert layer.beta == pytest.approx(max(t[2][i, j] for t in twins for j in range(i + 1, 3)), rel=1e-10)
            # Max pooling of disjoint windows and the activations have Lipschitz constant 1.
            assert layer.contraction == pytest.approx(max(twin[3][i] for twin in twins), rel=1e-10)
    assert found.contraction == max(layer.contraction for layer in found.layers)


def test_definition_of_the_source_without_biases():
    """For ReLU and no biases J x^i = x^j, so the cushions are those of the source."""
    model = dense(False)
    x = tensor(1, 5, dtype=torch.float64)
    maps, _ = stages(model)
    first = maps[0](x).detach()
    jacobian = torch.autograd.functional.jacobian(nn.Sequential(*maps[1:]), first).reshape(3, 7)
    value = (jacobian @ first[0]).norm() / (jacobian.norm() * first.norm())
    assert cushions(model, [x], draws=4).layers[0].interlayer["4"] == pytest.approx(float(value), rel=1e-10)


def test_rescaling_changes_nothing():
    model, x = dense(False), tensor(20, 5, dtype=torch.float64)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer, factor in zip((scaled[0], scaled[2], scaled[4]), (100.0, 0.003, 7.0), strict=True):
            layer.weight.mul_(factor)
    before, after = cushions(model, [x]), cushions(scaled, [x])
    for one, two in zip(before.layers, after.layers, strict=True):
        for name in ("cushion", "forward_cushion", "contraction", "smoothness", "smoothness_min", "beta"):
            assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-8), name
    assert after.output_norm == pytest.approx(2.1 * before.output_norm, rel=1e-10)
    with_bias = copy.deepcopy(scaled)
    with_bias[2].bias = nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64))
    assert cushions(with_bias, [x]).layers[1].cushion != pytest.approx(before.layers[1].cushion, rel=1e-3)


def test_renumbering_nodes_changes_nothing():
    model, x = dense(), tensor(20, 5, dtype=torch.float64)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        permuted[0].weight.copy_(model[0].weight[order])
        permuted[0].bias.copy_(model[0].bias[order])
        permuted[2].weight.copy_(model[2].weight[:, order])
    before, after = cushions(model, [x], draws=16), cushions(permuted, [x], draws=16)
    for one, two in zip(before.layers, after.layers, strict=True):
        assert one.cushion == pytest.approx(two.cushion, rel=1e-10)
        assert one.interlayer == pytest.approx(two.interlayer, rel=1e-10)
        assert one.contraction == pytest.approx(two.contraction, rel=1e-10)


def test_linear_networks_are_smooth_and_known():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(2 * torch.eye(4))
    found = cushions(model, [tensor(9, 4, dtype=torch.float64)])
    assert [layer.cushion for layer in found.layers] == pytest.approx([0.5, 0.5])
    assert found.layers[0].interlayer == pytest.approx({"1": 0.5})
    assert found.contraction == pytest.approx(1)
    assert found.smoothness == math.inf
    assert "inf" in found.to_json()


def test_probed_jacobians_agree_within_the_stated_error(monkeypatch):
    model, x = convolutional(), tensor(6, 2, 6, 6, dtype=torch.float64)
    exact = cushions(model, [x], draws=4)
    monkeypatch.setattr(jacobians, "EXACT_OUTPUTS", 2)
    monkeypatch.setattr(jacobians, "PROBES", 4096)
    probed = cushions(model, [x], draws=4)
    for one, two in zip(exact.layers[:2], probed.layers[:2], strict=True):
        assert 0 < two.jacobian_error < 0.05
        for name, value in one.interlayer.items():
            assert two.interlayer[name] == pytest.approx(value, rel=4 * two.jacobian_error)
            assert two.interlayer[name] != value


def test_smoothness_by_hand():
    """One hidden number and |z| known: ReLU seen from its kink side has the remainder that geometry gives."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    x = torch.tensor([[1.0]], dtype=torch.float64)
    found = cushions(model, [x], noise=2.0, draws=4000, smoothness_delta=0.2)
    # x = 1, z ~ N(0, 4): the remainder is |1 + z| where z < -1, so rho = |z| / |1 + z| there and +inf elsewhere.
    z = torch.distributions.Normal(0.0, 2.0).icdf(torch.tensor(0.2)).item()
    assert found.layers[0].smoothness == pytest.approx(abs(z) / abs(1 + z), rel=0.1)
    assert found.layers[0].smoothness_min >= 1
    assert found.smoothness <= abs(z) / abs(1 + z)


@pytest.mark.parametrize(("draws", "delta", "confidence"), [(100, 0.05, 0.95), (1024, 0.01, 0.9), (20, 0.3, 0.5)])
def test_order_statistic_covers(draws, delta, confidence):
    k = _order_statistic(draws, delta, confidence)
    assert binom.cdf(k - 1, draws, delta) <= 1 - confidence < binom.cdf(k, draws, delta)
    uniform = np.sort(np.random.default_rng(1).random((4000, draws)), axis=1)
    misses = np.mean(uniform[:, k - 1] > delta)
    assert misses <= 1 - confidence + 3 * math.sqrt(confidence * (1 - confidence) / 4000)
    # One further up breaks the promise: the choice is the best there is.
    assert np.mean(uniform[:, k] > delta) > 1 - confidence - 3 * math.sqrt(confidence * (1 - confidence) / 4000)


def test_too_few_draws_state_nothing():
    found = cushions(dense(), [tensor(9, 5, dtype=torch.float64)], draws=10)
    assert found.layers[0].smoothness is None
    assert found.smoothness == 0
    assert "'-' where the draws are too few" in str(found)
    assert _order_statistic(10, 0.05, 0.95) == 0


def test_subset_is_random_and_reported():
    model, x = dense(), tensor(300, 5, dtype=torch.float64)
    small, again = (cushions(model, [x[:100], x[100:]], samples=10, draws=4) for _ in range(2))
    other = cushions(model, [x[:100], x[100:]], samples=10, draws=4, seed=1)
    assert small == again
    assert small.jacobian_samples == 10
    assert small.samples == 300
    assert small.layers[0].cushion == other.layers[0].cushion
    assert small.layers[0].interlayer != other.layers[0].interlayer
    assert small.layers[0].interlayer["2"] >= cushions(model, [x], samples=300, draws=4).layers[0].interlayer["2"]


def test_report_and_use():
    found = cushions(dense().float(), [tensor(30, 5)], draws=200)
    payload = json.loads(found.to_json())
    assert payload["jacobian_samples"] == 30
    assert set(payload["layers"][0]["interlayer"]) == {"2", "4"}
    assert "minima over 30 samples" in str(found)
    layers = found.stable_layers()
    for layer, measured in zip(layers, found.layers, strict=True):
        assert layer.forward_cushion == measured.forward_cushion
    result = compressed_size(
        layers, contraction=found.contraction, smoothness=found.smoothness, n=30, epsilon=0.3, delta=0.1
    )
    assert result.total > result.useful == sum(layer.weights for layer in layers)


def test_activations_that_overwrite_their_input():
    model, x = dense(), tensor(20, 5, dtype=torch.float64)
    overwriting = copy.deepcopy(model)
    overwriting[1], overwriting[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    kept = x.clone()
    assert cushions(overwriting, [x], draws=16) == cushions(model, [x], draws=16)
    assert torch.equal(x, kept)


def test_dead_inputs_give_no_finite_contraction():
    model = dense(False)
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.abs())
    found = cushions(model, [tensor(8, 5, dtype=torch.float64).abs()], draws=70)
    assert found.layers[0].contraction == math.inf
    assert found.contraction == math.inf


def test_refusals():
    x = tensor(8, 5)
    with pytest.raises(ValueError, match="behind its last layer"):
        cushions(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), [x])
    with pytest.raises(ValueError, match="GELU"):
        cushions(nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 2)), [x])
    shared = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="runs twice"):
        cushions(nn.Sequential(shared, nn.ReLU(), shared), [x])
    for wrong in ({"samples": 0}, {"quantile": 0.0}, {"noise": 0.0}, {"draws": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError):
            cushions(dense().float(), [x], **wrong)
