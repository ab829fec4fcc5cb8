"""Errors carried to the output: above everything that search finds, exact where nothing is lost, and monotone."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from specprune.analysis import ChainLayer, carried_error, trace_chain
from specprune.analysis.propagation import layer_gain
from specprune.compress import CalibrationData

SLOPES = {
    "relu": (functional.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "leaky": (lambda x: functional.leaky_relu(x, 0.3), 1.0),
    "steep": (lambda x: functional.elu(x, 2.0), 2.0),
}


def dense(weight, bias=None, lipschitz=1.0, name="fc"):
    """A fully connected chain layer from an (outputs, inputs) matrix."""
    weight = np.asarray(weight, dtype=np.float64)
    return ChainLayer(
        name, weight[:, :, None], np.zeros(len(weight)) if bias is None else bias, 1, 1, 1, lipschitz, True
    )


def random_chain(generator, widths, lipschitz=1.0):
    layers = [
        dense(generator.normal(size=(after, before)) / math.sqrt(before), generator.normal(size=after), lipschitz)
        for before, after in zip([1, *widths], widths, strict=False)
    ]
    return [*layers[:-1], dense(layers[-1].weight[:, :, 0], layers[-1].bias)]


def run(layers, activation, u):
    """Run the layers behind the first from its pre-activation, which has samples as rows."""
    for layer in layers[1:]:
        u = activation(u) @ torch.from_numpy(layer.weight[:, :, 0]).T + torch.from_numpy(layer.bias)
    return u


def worst_found(layers, activation, root, generator, rounds=150):
    """Search pre-activations and errors with second moment root root^T for the largest root mean square output error.

    Ascends the gradient over the base points and over an orthogonal matrix Q, with errors u = sqrt(n) Q root^T.
    """
    width = root.shape[0]
    samples = 3 * width
    free = torch.from_numpy(generator.normal(size=(samples, width))).requires_grad_()
    base = torch.from_numpy(generator.normal(size=(samples, width)) * 2).requires_grad_()
    optimiser = torch.optim.Adam([free, base], lr=0.05)
    largest = 0.0
    for _ in range(rounds):
        errors = math.sqrt(samples) * torch.linalg.qr(free)[0] @ root.T
        moment = errors.T @ errors / samples
        assert torch.allclose(moment, root @ root.T, atol=1e-10)
        difference = run(layers, activation, base + errors) - run(layers, activation, base)
        value = difference.square().sum(dim=1).mean().sqrt()
        largest = max(largest, float(value.detach()))
        optimiser.zero_grad()
        (-value).backward()
        optimiser.step()
    return largest


@pytest.mark.parametrize("kind", SLOPES)
@pytest.mark.parametrize("widths", [(4, 1), (5, 4, 3), (3, 6, 5, 2)])
def test_no_error_with_that_moment_goes_further(kind, widths):
    activation, lipschitz = SLOPES[kind]
    ratios = []
    for seed in range(2):
        generator = np.random.default_rng([seed, len(widths)])
        layers = random_chain(generator, widths, lipschitz)
        root = torch.from_numpy(generator.normal(size=(widths[0], widths[0])) * 10 ** generator.uniform(-1, 1))
        bound = carried_error((root @ root.T).numpy(), layers)
        ratios.append(worst_found(layers, activation, root, generator) / bound)
    assert max(ratios) <= 1
    # The search is no straw man, and the bound is not far above it: a factor for every activation in between.
    assert max(ratios) > 0.75 / 3 ** (len(widths) - 1)


def test_the_search_meets_the_bound_where_it_is_sharp():
    """One node, ReLU on its linear side: the error passes whole, and the bound says just that."""
    layers = [dense([[1.0]]), dense([[3.0]])]
    root = torch.tensor([[2.0]], dtype=torch.float64)
    bound = carried_error(np.array([[4.0]]), layers)
    assert bound == pytest.approx(6.0, rel=1e-11)
    assert worst_found(layers, functional.relu, root, np.random.default_rng(0)) == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("lipschitz", [1.0, 0.25, 3.0])
def test_exact_behind_the_last_layer(lipschitz):
    root = np.random.default_rng(0).normal(size=(4, 6))
    layer = dense(np.ones((4, 2)), lipschitz=lipschitz)
    assert carried_error(root @ root.T, [layer]) == pytest.approx(lipschitz * np.linalg.norm(root), rel=1e-11)
    assert carried_error(root @ root.T, [layer]) >= lipschitz * np.linalg.norm(root)


def test_what_follows_the_last_layer_counts():
    generator = np.random.default_rng(0)
    layers = random_chain(generator, (4, 3))
    steep = [layers[0], dense(layers[1].weight[:, :, 0], lipschitz=7.0)]
    assert carried_error(np.eye(4), steep) == pytest.approx(7 * carried_error(np.eye(4), layers), rel=1e-12)


def test_linear_between_two_extremes():
    """The bound lies between what the identity map does exactly and what operator norms alone would say."""
    generator = np.random.default_rng(3)
    layers = random_chain(generator, (6, 5, 4))
    root = generator.normal(size=(6, 6))
    first, second = (layer.weight[:, :, 0] for layer in layers[1:])
    through = np.linalg.norm(second @ first @ root)
    norms = np.linalg.norm(first, 2) * np.linalg.norm(second, 2) * np.linalg.norm(root)
    assert through <= carried_error(root @ root.T, layers) < norms


def test_scaling():
    generator = np.random.default_rng(1)
    layers = random_chain(generator, (5, 4, 3))
    moment = np.cov(generator.normal(size=(5, 20)))
    value = carried_error(moment, layers)
    assert carried_error(1e6 * moment, layers) == pytest.approx(1e3 * value, rel=1e-9)
    assert carried_error(1e-30 * moment, layers) == pytest.approx(1e-15 * value, rel=1e-9)
    doubled = [layers[0], dense(2 * layers[1].weight[:, :, 0]), layers[2]]
    assert carried_error(moment, doubled) == pytest.approx(2 * value, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_moment_gives_a_larger_bound(seed):
    generator = np.random.default_rng(seed)
    layers = random_chain(generator, (5, 6, 3))
    moment = np.cov(generator.normal(size=(5, 20)))
    vector = generator.normal(size=5)
    larger = moment + np.outer(vector, vector)
    # Before any optimising, and with it: the steps differ, so the latter is compared with some room.
    theory = [generator.uniform(0.1, 10, size=5), generator.uniform(0.1, 10, size=6)]
    assert carried_error(moment, layers) < carried_error(larger, layers) * (1 + 1e-3)
    assert carried_error(moment, layers, theory) < carried_error(larger, layers, theory) * (1 + 1e-3)


def test_theory_weights_only_lower_the_bound():
    generator = np.random.default_rng(5)
    better = 0
    for _ in range(10):
        layers = random_chain(generator, (4, 5, 3))
        # A node that is scaled by 1e6 and back: uniform norms see a huge layer, the right weights do not.
        scale = np.array([1e6, 1, 1, 1, 1])
        scaled = [
            layers[0],
            dense(scale[:, None] * layers[1].weight[:, :, 0]),
            dense(layers[2].weight[:, :, 0] / scale),
        ]
        theory = [np.ones(4), 1 / scale**2]
        plain, helped = carried_error(np.eye(4), scaled), carried_error(np.eye(4), scaled, theory)
        assert helped <= plain
        better += helped < 0.99 * plain
    assert better == 10


def test_nothing_comes_of_no_error_and_of_dead_layers():
    layers = random_chain(np.random.default_rng(0), (4, 5, 3, 2))
    assert carried_error(np.zeros((4, 4)), layers) == 0
    for dead in (1, 2, 3):
        killed = [dense(0 * x.weight[:, :, 0]) if k == dead else x for k, x in enumerate(layers)]
        assert carried_error(np.eye(4), killed) < 1e-140
    half = layers[1].weight[:, :, 0].copy()
    half[:, 0] = 0
    only_dead_node = np.diag([1.0, 0, 0, 0])
    assert carried_error(only_dead_node, [layers[0], dense(half), layers[2]]) >= 0


def convolution_layers(kernel, stride, padding, dilation, seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, kernel, stride, padding, dilation, bias=False)
    ).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(model[2].weight.shape, generator=generator))
        layers = trace_chain(model, CalibrationData([torch.zeros(2, 1, size, size, dtype=torch.float64)]))
        basis = torch.eye(3 * size * size, dtype=torch.float64).reshape(-1, 3, size, size)
        matrix = model[2](basis).flatten(1).T.numpy()
    return layers, matrix


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 2, 2, 2), (3, 1, 0, 2), ((1, 3), (2, 1), (0, 1), 1)],
)
@pytest.mark.parametrize("seed", [0, 1])
def testlayer_gain_of_convolutions(kernel, stride, padding, dilation, seed):
    layers, matrix = convolution_layers(kernel, stride, padding, dilation, seed)
    generator = np.random.default_rng(seed)
    pixels = layers[1].positions_in, layers[1].positions_out
    for spread in (0.0, 2.0):
        columns, rows = (np.exp(spread * generator.normal(size=size)) for size in (3, 2))
        weighted = np.sqrt(rows).repeat(pixels[1])[:, None] * matrix / np.sqrt(columns).repeat(pixels[0])
        bound = float(
            layer_gain(torch.from_numpy(layers[1].weight), torch.from_numpy(rows), torch.from_numpy(columns), layers[1])
        )
        exact = np.linalg.norm(weighted, 2)
        assert exact <= bound * (1 + 1e-12)
        assert bound <= 3.5 * exact
    # Kernels that do not overlap are known exactly.
    if layers[1].overlap == 1 and padding == 0:
        assert bound == pytest.approx(exact, rel=1e-10)


def test_flattened_maps_share_their_node_weight():
    """Columns of a flattened map come node by node: pixel k of node j is column j * pixels + k."""
    generator = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    layers = trace_chain(model, CalibrationData([torch.zeros(2, 1, 3, 3, dtype=torch.float64)]))
    columns = np.array([1e-6, 1.0, 1e6])
    weight = torch.from_numpy(generator.normal(size=(4, 12, 1)))
    found = layer_gain(weight, torch.ones(4, dtype=torch.float64), torch.from_numpy(columns), layers[1])
    by_node = weight[:, :, 0].numpy().reshape(4, 3, 4) / np.sqrt(columns)[None, :, None]
    assert float(found) == pytest.approx(np.linalg.norm(by_node.reshape(4, 12), 2), rel=1e-12)


def test_kernels_on_maps_of_one_pixel():
    """Of a 3x3 kernel on one padded pixel only the centre acts, so its first offset must not be taken for all of it."""
    model = nn.Sequential(nn.Conv2d(2, 1, 5), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1, bias=False)).double()
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[2].weight[0, 0, 1, 1] = 3.0
    layers = trace_chain(model, CalibrationData([torch.zeros(2, 2, 5, 5, dtype=torch.float64)]))
    # ReLU far from its kink lets everything pass.
    assert carried_error(np.array([[4.0]]), layers) >= 6.0


@pytest.mark.parametrize(
    "pooling", [nn.MaxPool2d(3, stride=2), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)], ids=str
)
def test_maps_with_pooling(pooling):
    """Errors on whole feature maps, found by gradient ascent, stay below the bound."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.LeakyReLU(0.3), pooling, nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten()
    ).double()
    size = model(torch.zeros(1, 1, 7, 7, dtype=torch.float64)).shape[1]
    model.append(nn.Linear(size, 3).double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layers = trace_chain(model, CalibrationData([torch.zeros(2, 1, 7, 7, dtype=torch.float64)]))
    behind = model[1:]
    base = torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64).requires_grad_()
    error = (0.1 * torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    optimiser = torch.optim.Adam([base, error], lr=0.05)
    for step in range(60):
        difference = behind(base + error) - behind(base)
        rows = error.transpose(0, 1).flatten(1)
        # Only the direction matters: the ratio to the bound on this error's own moment.
        if step % 20 == 0 or step == 59:
            moment = (rows @ rows.T / 16).detach().numpy()
            reached = float(difference.detach().square().sum().div(16).sqrt())
            assert reached <= carried_error(moment, layers)
        value = difference.square().sum() / error.square().sum()
        optimiser.zero_grad()
        (-value).backward()
        optimiser.step()


def test_gains_of_zero_behind_an_error_are_no_trouble():
    """With maps given up for norms, two zero layers make the value underflow to 0, which has no logarithm."""

    def pooled(weight):
        return ChainLayer("pooled", weight, np.zeros(len(weight)), 4, 4, 1, 1.0, False)

    dead = np.zeros((4, 4, 1))
    chain = [pooled(np.ones((4, 3, 1))), pooled(dead), pooled(dead), pooled(np.ones((3, 4, 1)))]
    assert 0 <= carried_error(np.eye(4), chain) < 1e-100
