"""Refitting consumers: against explicit convolutions, NumPy's least squares, and networks that lose nothing."""

import copy

import numpy as np
import pytest
import torch
from helpers import randomise, small_mlp, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from specprune.compress import CalibrationData, collect_moments, find_groups, prune
from specprune.compress.reconstruction import (
    collect_problems,
    fold_node_mix,
    fold_nodes,
    least_squares,
    problem_from_moments,
    refit,
)
from specprune.compress.targets import Targets

REFITS = ("sequential", "patch", "channel")


@pytest.mark.parametrize("seed", range(3))
def test_folding_a_mix_is_mixing_before_the_layer(seed):
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((6, 4))
    kept = tensor(3, 4, 7, 7, seed=seed, dtype=torch.float64)
    mixed = functional.conv2d(kept, torch.as_tensor(mix)[:, :, None, None])
    weight = tensor(5, 6, 3, 2, seed=seed + 10, dtype=torch.float64)
    folded = fold_node_mix(weight, mix)
    assert folded.shape == (5, 4, 3, 2)
    expected = functional.conv2d(mixed, weight, stride=2, padding=1)
    assert torch.allclose(functional.conv2d(kept, folded, stride=2, padding=1), expected, atol=1e-12)
    linear = tensor(5, 6, seed=seed, dtype=torch.float64)
    vectors = tensor(8, 4, seed=seed + 1, dtype=torch.float64)
    expected = functional.linear(vectors @ torch.as_tensor(mix).T, linear)
    assert torch.allclose(functional.linear(vectors, fold_node_mix(linear, mix)), expected, atol=1e-12)


def test_folding_keeps_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        assert fold_node_mix(tensor(5, 6, dtype=dtype), np.ones((6, 4))).dtype == dtype


def regression(rows, columns, targets, seed):
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((rows, columns)) @ generator.standard_normal((columns, columns)) + 2
    outputs = inputs @ generator.standard_normal((columns, targets)) + generator.standard_normal((rows, targets)) - 1
    return inputs, outputs, torch.as_tensor(np.hstack([inputs, outputs]))


def solved(rows, columns, *, ridge, intercept):
    """Weights and shift of the regression of the last columns on the first, from moments."""
    mean = rows.mean(0) if intercept else torch.zeros(rows.shape[1], dtype=rows.dtype)
    joint = (rows - mean).T @ (rows - mean) / len(rows)
    weights = least_squares(joint[:columns, :columns], joint[:columns, columns:], ridge)
    return weights.numpy(), (mean[columns:] - weights @ mean[:columns]).numpy()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), columns=st.integers(1, 6), intercept=st.booleans())
def test_least_squares_without_a_ridge(seed, columns, intercept):
    inputs, outputs, rows = regression(40, columns, 3, seed)
    design = np.hstack([inputs, np.ones((40, 1))]) if intercept else inputs
    expected = np.linalg.lstsq(design, outputs, rcond=None)[0]
    weights, shift = solved(rows, columns, ridge=0.0, intercept=intercept)
    scale = max(1.0, np.linalg.cond(design) ** 2 * 1e-4)
    np.testing.assert_allclose(weights, expected[:columns].T, atol=1e-9 * scale)
    np.testing.assert_allclose(shift, expected[columns] if intercept else np.zeros(3), atol=1e-9 * scale)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), columns=st.integers(1, 6), intercept=st.booleans(), exponent=st.integers(-4, 1))
def test_least_squares_with_a_ridge(seed, columns, intercept, exponent):
    inputs, outputs, rows = regression(40, columns, 3, seed)
    mean_in, mean_out = (inputs.mean(0), outputs.mean(0)) if intercept else (np.zeros(columns), np.zeros(3))
    x, y = inputs - mean_in, outputs - mean_out  # the intercept is not penalised
    ridge = 10.0**exponent
    damping = ridge * np.trace(x.T @ x / 40) / columns
    design = np.vstack([x, np.sqrt(40 * damping) * np.eye(columns)])
    expected = np.linalg.lstsq(design, np.vstack([y, np.zeros((columns, 3))]), rcond=None)[0].T
    weights, shift = solved(rows, columns, ridge=ridge, intercept=intercept)
    np.testing.assert_allclose(weights, expected, atol=1e-8)
    np.testing.assert_allclose(shift, mean_out - expected @ mean_in, atol=1e-7)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 3e-8])
@pytest.mark.parametrize("seed", range(16))
def test_collinear_inputs_without_a_ridge_stay_tame(intercept, noise, seed):
    inputs, outputs, _ = regression(60, 4, 3, seed)
    # A dead column stops the factorisation at once; copies that differ by rounding may let it pass, with wild weights.
    dead = seed % 2
    doubled = np.hstack([inputs, inputs[:, :2], np.zeros((60, dead))])
    doubled[:, 4:6] += noise * np.random.default_rng(seed).standard_normal((60, 2))
    rows = torch.as_tensor(np.hstack([doubled, outputs]))
    weights, shift = solved(rows, 6 + dead, ridge=0.0, intercept=intercept)
    design = np.hstack([inputs, np.ones((60, 1))]) if intercept else inputs
    best = np.linalg.lstsq(design, outputs, rcond=None)[0]
    error, least = outputs - doubled @ weights.T - shift, outputs - design @ best
    assert np.sum(error**2) <= np.sum(least**2) * (1 + 1e-6)
    assert np.abs(weights).max() < 1e3 * np.abs(best).max()
    assert np.all(np.abs(weights[:, 6:]) < 1e-6)


def test_inputs_that_are_all_zero():
    rows = torch.hstack([torch.zeros(5, 2), torch.full((5, 1), 3.0)]).double()
    for ridge in (0.0, 1e-3):
        weights, shift = solved(rows, 2, ridge=ridge, intercept=True)
        assert not weights.any()
        assert shift == pytest.approx([3.0])


# Networks in which some nodes are copies of others: pruning them loses nothing.


def double_nodes(model, layers):
    """Make nodes 0 and 1 of each layer (and its norm) equal to nodes 2 and 3; consumers keep their own weights."""
    with torch.no_grad():
        for layer, norm in layers:
            for tensor_ in (layer.weight, layer.bias, *([] if norm is None else norm.state_dict().values())):
                if tensor_ is not None and tensor_.dim() > 0:
                    tensor_[:2] = tensor_[2:4]
    return model.double().eval()


def doubled_convnet():
    """Two conv+BN groups (one with a bias-free consumer), a flattened one with 4 pixels, a linear one."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2, padding=1, dilation=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    randomise(model, 1)
    return double_nodes(model, [(model[0], model[1]), (model[3], model[4]), (model[8], None)])


def doubled_mlp():
    model = small_mlp((8, 10, 9, 3), seed=2)
    return double_nodes(model, [(model.fc1, None), (model.fc2, None)])


DOUBLED = {
    "mlp": (doubled_mlp, (8,), {"fc1": 8, "fc2": 7}),
    "convnet": (doubled_convnet, (2, 8, 8), {"0": 4, "3": 3, "8": 5}),
}


@pytest.mark.parametrize("name", DOUBLED)
@pytest.mark.parametrize("reconstruction", REFITS)
@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("selection", ["greedy", "backward"])
def test_copies_of_nodes_are_removed_without_loss(name, reconstruction, positions, selection):
    make, shape, widths = DOUBLED[name]
    model = make()
    data = [tensor(80, *shape, seed=3, dtype=torch.float64)]
    fresh = tensor(50, *shape, seed=4, dtype=torch.float64)
    options = {"lam": 1e-12, "ridge": 0.0, "theta": 1.0, "positions": positions, "selection": selection}
    pruned = prune(model, data, widths=widths, reconstruction=reconstruction, **options)
    assert {group: len(nodes.indices) for group, nodes in pruned.nodes.items()} == widths
    with torch.no_grad():
        expected = model(fresh)
        error = (pruned.model(fresh) - expected).abs().max() / expected.abs().max()
        cut = prune(model, data, widths=widths, reconstruction="none", **options)
        loss = (cut.model(fresh) - expected).abs().max() / expected.abs().max()
    # Backward elimination may take a node that is all but dead on the calibration data before it takes a copy.
    assert error < (1e-6 if selection == "greedy" else 1e-5)
    assert loss > 1e-2


# One hidden layer: what is optimal can be said.


def one_hidden(bias=True, seed=5):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4, bias=bias))
    return randomise(model, seed).double()


DATA = [tensor(150, 8, seed=6, dtype=torch.float64) + 0.3]


def mse(a, b, data=DATA):
    with torch.no_grad():
        return float((a(data[0]) - b(data[0])).square().mean())


def test_least_squares_is_never_worse_than_folding_on_the_calibration_data():
    for seed in range(4):
        model = one_hidden(seed=seed)
        losses = {
            kind: mse(prune(model, DATA, widths={"0": 5}, reconstruction=kind, ridge=0.0).model, model)
            for kind in (*REFITS, "none")
        }
        assert losses["sequential"] == pytest.approx(losses["patch"], rel=1e-9)  # the inputs are the same here
        assert losses["patch"] < losses["channel"] < losses["none"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_refitted_layer_is_the_least_squares_solution(bias):
    model = one_hidden(bias)
    pruned = prune(model, DATA, widths={"0": 5}, ridge=0.0)
    hidden = pruned.model[:2](DATA[0]).detach().numpy()
    target = model(DATA[0]).detach().numpy()
    design = np.hstack([hidden, np.ones((150, 1))]) if bias else hidden
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(pruned.model[2].weight.detach().numpy(), solution[:5].T, atol=1e-8)
    if bias:
        np.testing.assert_allclose(pruned.model[2].bias.detach().numpy(), solution[5], atol=1e-8)
    else:
        assert pruned.model[2].bias is None


def test_sequential_refits_on_what_the_pruned_layers_give():
    model = small_mlp((8, 12, 10, 4)).double()
    pruned = prune(model, DATA, widths={"fc1": 5, "fc2": 6}, ridge=0.0).model
    for layers, end in ((2, "fc2"), (4, "fc3")):
        inputs = pruned[:layers](DATA[0]).detach()
        whole = model[: layers + 1](DATA[0]).detach()
        kept = whole if end == "fc3" else None
        if kept is None:  # only the outputs that are left are targets
            nodes = prune(model, DATA, widths={"fc1": 5, "fc2": 6}, ridge=0.0).nodes["fc2"].indices
            kept = whole[:, torch.as_tensor(nodes)]
        error = kept - pruned[layers](inputs).detach()
        assert float((error.T @ inputs).abs().max()) < 1e-8  # normal equations
        assert float(error.sum(0).abs().max()) < 1e-8


def test_a_whole_group_is_refitted_when_its_inputs_changed():
    model = small_mlp((8, 12, 10, 4)).double()
    one = prune(model, DATA, widths={"fc1": 4}, ridge=0.0).model
    patch = prune(model, DATA, widths={"fc1": 4}, ridge=0.0, reconstruction="patch").model
    assert torch.equal(patch.fc3.weight, model.fc3.weight)
    assert not torch.allclose(one.fc3.weight, model.fc3.weight)
    assert mse(one, model) < mse(patch, model)
    late = prune(model, DATA, widths={"fc2": 4}, ridge=0.0)
    assert torch.equal(late.model.fc1.weight, model.fc1.weight)
    assert torch.equal(late.model.fc2.bias, model.fc2.bias[torch.as_tensor(late.nodes["fc2"].indices)])


def conv_with_norm(bias):
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=bias), nn.BatchNorm2d(5), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 16, 3)), 3).double().eval()
    if bias:
        nn.init.zeros_(model[2].bias)
    return model


def test_the_intercept_goes_into_the_running_mean():
    images = [tensor(40, 2, 8, 8, seed=7, dtype=torch.float64) + 0.5]
    with_bias, without = conv_with_norm(True), conv_with_norm(False)
    with_bias.load_state_dict({**without.state_dict(), "2.bias": torch.zeros(5)})
    options = {"widths": {"0": 3}, "ridge": 0.0, "positions": None}
    a, b = prune(with_bias, images, **options).model, prune(without, images, **options).model
    assert float(a[2].bias.detach().abs().min()) > 1e-4
    assert torch.allclose(b[3].running_mean, without[3].running_mean - a[2].bias, atol=1e-12)
    assert torch.equal(b[3].running_var, without[3].running_var)
    assert torch.allclose(a(images[0]), b(images[0]), atol=1e-10)


def test_an_intercept_is_not_put_behind_a_nonlinearity():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(80, 3),
    )
    randomise(model, 3).double().eval()
    images = [tensor(40, 2, 8, 8, seed=7, dtype=torch.float64) + 0.5]
    pruned = prune(model, images, widths={"0": 3}, ridge=0.0, positions=None).model
    assert torch.equal(pruned[4].running_mean, model[4].running_mean)
    hidden = functional.unfold(pruned[:2](images[0]), 3).transpose(1, 2).reshape(-1, 27).detach().numpy()
    target = model[:3](images[0]).flatten(2).transpose(1, 2).reshape(-1, 5).detach().numpy()
    solution = np.linalg.lstsq(hidden, target, rcond=None)[0].T  # no intercept anywhere
    np.testing.assert_allclose(pruned[2].weight.detach().flatten(1).numpy(), solution, atol=1e-8)


def problem_of(model, work, data, name="fc2", **options):
    options = {"positions": None, "seed": 0, "norms": {}, "closers": (), **options}
    data = CalibrationData(data)
    return collect_problems(Targets(model, data, [name], **options), work, data, [name])[name]


def test_bad_numbers_are_named_while_refitting():
    model = small_mlp().double().eval()
    work = copy.deepcopy(model)
    with torch.no_grad():
        work.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf in the inputs of layer 'fc2' while refitting"):
        problem_of(model, work, DATA)


LAYERS = {
    "linear": (nn.Sequential(nn.Tanh(), nn.Linear(8, 5)), (8,)),
    "no bias": (nn.Sequential(nn.Tanh(), nn.Linear(8, 5, bias=False)), (8,)),
    "grouped": (nn.Sequential(nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2)), (6, 5, 5)),
    "transposed": (nn.Sequential(nn.Tanh(), nn.ConvTranspose2d(6, 4, 3, stride=2)), (6, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_problems_from_moments_are_those_of_the_original_network(name):
    model, shape = LAYERS[name]
    model = randomise(copy.deepcopy(model)).double().eval()
    data = [tensor(20, *shape, seed=1, dtype=torch.float64) + 0.5]
    rows = collect_moments(model, CalibrationData(data), ["1"], level="patch")["1"]
    one = problem_of(model, model, data, "1")
    two = problem_from_moments(model, "1", rows, intercept=model[1].bias is not None)
    assert one.intercept == two.intercept == (model[1].bias is not None)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.gram, two.gram, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.cross, two.cross, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.energy, two.energy, rtol=1e-9, atol=1e-11)
    work = copy.deepcopy(model)
    with torch.no_grad():
        work[1].weight.zero_()
    refit(work, two, np.arange(shape[0]), None, 0.0, model)  # on everything: the layer comes back
    with torch.no_grad():
        torch.testing.assert_close(work(data[0]), model(data[0]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_refitting_solves_the_normal_equations_of_the_real_outputs(name):
    """The residual of the layer's outputs, computed by the layer itself, falls with no change of the kept weights."""
    model, shape = LAYERS[name]
    model = randomise(copy.deepcopy(model)).double().eval()
    data = [tensor(30, *shape, seed=1, dtype=torch.float64) + 0.5]
    work = copy.deepcopy(model)
    kept = np.array([0, 2, 3, 5])
    refit(work, problem_of(model, work, data, "1"), kept, None, 0.0, model)
    layer = work[1]
    inputs, wanted = model[0](data[0]), model(data[0]).detach()
    gone = np.setdiff1d(np.arange(shape[0]), kept)
    blank = inputs.clone()
    blank[:, gone] = 0
    assert torch.allclose(layer(blank), layer(inputs))  # dropped inputs are not read
    (layer(blank) - wanted).square().sum().backward()
    scale = float(wanted.square().sum())
    sparse = layer.weight.grad.clone()
    if name == "linear" or name == "no bias":
        sparse[:, gone] = 0
    elif name == "grouped":  # blocks read inputs 0..2 and 3..5
        sparse[:2, [1]] = 0
        sparse[2:, [1]] = 0
    else:
        sparse[gone] = 0
    assert float(sparse.abs().max()) < 1e-8 * scale
    if layer.bias is not None:
        assert float(layer.bias.grad.abs().max()) < 1e-8 * scale


def test_a_shortcut_moves_the_target():
    """Where the outputs are added to a shortcut, the sum is refitted, not the branch alone."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid, self.branch = nn.Linear(8, 6), nn.Linear(6, 10), nn.Linear(10, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.branch(torch.tanh(self.mid(x))))

    model = randomise(Residual()).double().eval()
    work = copy.deepcopy(model)
    with torch.no_grad():
        work.stem.weight += 0.1 * tensor(6, 8, dtype=torch.float64)
    problem = problem_of(model, work, DATA, "branch", closers=["branch"])
    refit(work, problem, np.arange(4), None, 0.0, model)
    with torch.no_grad():
        stem = work.stem(DATA[0])
        hidden = torch.tanh(work.mid(stem))[:, :4].numpy()
        old = model.stem(DATA[0])
        target = (old + model.branch(torch.tanh(model.mid(old))) - stem).numpy()
    solution = np.linalg.lstsq(np.hstack([hidden, np.ones((150, 1))]), target, rcond=None)[0]
    np.testing.assert_allclose(work.branch.weight.detach()[:, :4].numpy(), solution[:4].T, atol=1e-8)
    np.testing.assert_allclose(work.branch.bias.detach().numpy(), solution[4], atol=1e-8)
    assert not work.branch.weight[:, 4:].any()


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_folding_nodes_is_multiplying_by_the_mix(name):
    make, shape, _ = DOUBLED[name]
    model = make()
    data = CalibrationData([tensor(6, *shape, dtype=torch.float64)])
    for group in find_groups(model, data).groups:
        work = copy.deepcopy(model)
        kept = np.array([0, 2, 4])
        mix = np.random.default_rng(0).standard_normal((group.width, 3))
        fold_nodes(model, work, group, group.consumer, kept, mix)
        before, after = model.get_submodule(group.consumer).weight, work.get_submodule(group.consumer).weight
        spread = np.zeros((group.width, group.width))
        spread[:, kept] = mix
        split = before.reshape(len(before), group.width, -1)
        expected = torch.einsum("okp,kj->ojp", split, torch.as_tensor(spread)).reshape(before.shape)
        torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
