"""Networks of fitted low-rank layers: budgets, targets, order, and what is left whole."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from test_architectures import NETWORKS, network
from torch import nn

from specprune.compress import CalibrationData, count_flops, count_params, low_rank
from specprune.compress.divergence import Reference
from specprune.compress.fitted_network import FittedNetworks, Start, kept_rows
from specprune.compress.groups import find_groups
from specprune.compress.surgery import remove_nodes
from specprune.testbed import Recipe, load_dataset, train


def fitted(model, data, measure="params", **options):
    settings = {"positions": 32, "ridge": 1e-6, "seed": 0, **options}
    data = data if isinstance(data, CalibrationData) else CalibrationData(data)
    return FittedNetworks(Start.whole(model), data, measure, settings["positions"], settings["ridge"], settings["seed"])


@pytest.fixture(scope="module")
def digits():
    dataset = load_dataset("digits")
    model = train(dataset, Recipe("digits", "mlp-64-48-32", epochs=15, batch_size=64, learning_rate=5e-3)).model
    return model, CalibrationData(dataset.train_batches(limit=800))


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_budgets_are_met_and_costs_are_true(digits, measure, keep):
    model, data = digits
    networks = fitted(model, data, measure)
    made, layers = networks.make(keep)
    count = count_params if measure == "params" else lambda net: count_flops(net, data)
    assert keep - 0.06 < count(made) / count(model) <= keep
    fixed = count(model) - sum(layer.cost_before for layer in layers)
    assert count(made) == fixed + sum(layer.cost_after for layer in layers)
    assert [layer.layer for layer in layers] == ["fc1", "fc2", "fc3", "fc4"]


def test_convolutions_pay_what_is_reported():
    model, data = small_convnet(), CalibrationData([tensor(40, 2, 8, 8)])
    networks = fitted(model, data, "flops")
    made, layers = networks.make(0.6)
    assert count_flops(made, data) <= 0.6 * count_flops(model, data)
    fixed = count_flops(model, data) - sum(layer.cost_before for layer in layers)
    assert count_flops(made, data) == fixed + sum(layer.cost_after for layer in layers)


def test_keeping_all_changes_nothing(digits):
    model, data = digits
    made, layers = fitted(model, data).make(1.0)
    assert all(layer.rank is None for layer in layers)
    assert_unchanged(made, snapshot(copy.deepcopy(model).eval()))


def test_nothing_of_the_callers_changes_and_calls_repeat(digits):
    model, data = digits
    before, state = snapshot(model), torch.get_rng_state()
    one, two = (fitted(model, data).make(0.3)[0] for _ in range(2))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_fits_lose_less_than_decompositions(digits):
    model, data = digits
    reference = Reference(model, data, 800)
    # At half the size the least largest error where the inputs are ("data") loses as little as the fits on this net.
    for keep, methods in ((0.5, ("alds", "refit", "pca")), (0.3, ("alds", "refit", "pca", "data"))):
        ours = reference.divergence(fitted(model, data).make(keep)[0])
        for method in methods:
            assert ours < 0.8 * reference.divergence(low_rank(model, data, keep, method=method).model.eval())


def test_later_layers_make_up_for_earlier_ones():
    """A second layer fitted on what the first gives must do better than one fitted on original inputs."""
    model = randomise(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)), seed=3)
    inputs = tensor(400, 20) @ torch.diag(torch.linspace(1, 3, 20))
    networks = fitted(model, [inputs])
    made, layers = networks.make(0.6)
    assert layers[0].rank is not None
    with torch.no_grad():
        hidden, target = torch.relu(made[0](inputs)).double(), model(inputs).double()
        x, y = hidden - hidden.mean(0), target - target.mean(0)
        best = y - x @ torch.linalg.lstsq(x, y).solution
        error = made(inputs).double() - target
    assert layers[1].rank is None
    assert float(error.square().sum()) == pytest.approx(float(best.square().sum()), rel=1e-3)
    assert layers[1].residual == pytest.approx(float(best.square().sum() / y.square().sum()), rel=1e-2)


@pytest.mark.parametrize("kind", [name for name in NETWORKS if name != "1d"])
def test_networks_of_many_kinds(kind):
    model, data, _ = network(kind)
    networks = fitted(model, data)
    with pytest.raises(ValueError, match="use keep >= ") as caught:
        networks.make(1e-3)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    for keep in (least + 1e-5, (1 + least) / 2):
        made, layers = networks.make(keep)
        assert count_params(made) <= keep * count_params(model)
        assert any(layer.rank is not None for layer in layers)


def test_a_network_without_such_layers():
    model, data, _ = network("1d")
    networks = fitted(model, data)
    assert not networks.frontiers
    assert {entry.reason[:7] for entry in networks.skipped} == {"it is a"}
    with pytest.raises(ValueError, match="rank 1 everywhere"):
        networks.make(0.9)


def test_what_cannot_be_changed_stays_and_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(12, 12)
            self.twice = nn.Linear(12, 12)
            self.free = nn.Linear(12, 30)
            self.last = nn.Linear(30, 4)
            self.idle = nn.Linear(3, 3)
            for parameter in self.frozen.parameters():
                parameter.requires_grad_(False)

        def forward(self, x):
            return self.last(torch.relu(self.free(torch.relu(self.twice(torch.relu(self.twice(self.frozen(x))))))))

    model = randomise(Net())
    networks = fitted(model, [tensor(60, 12)])
    made, layers = networks.make(0.85)
    assert {layer.layer for layer in layers} == {"free", "last"}
    reasons = {entry.name: entry.reason for entry in networks.skipped}
    assert set(reasons) == {"frozen", "twice", "idle"}
    assert "frozen" in reasons["frozen"]
    assert "more than once" in reasons["twice"]
    assert "did not run" in reasons["idle"]
    for name in reasons:
        assert torch.equal(made.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_batch_norm_takes_the_constant_and_a_shortcut_is_made_up_for():
    model, data, _ = network("basic residual")
    reference = Reference(copy.deepcopy(model).eval(), CalibrationData(data), 200)
    losses = [reference.divergence(fitted(model, data).make(keep)[0]) for keep in (0.9, 0.6, 0.4)]
    plain = reference.divergence(low_rank(model, data, 0.6, method="refit").model.eval())
    assert losses[0] < losses[1] < losses[2]
    assert losses[1] < plain


def test_targets_are_those_of_the_original_after_nodes_went():
    model, data = small_mlp((8, 16, 12, 3), seed=2), CalibrationData([tensor(200, 8)])
    structure = find_groups(model, data)
    original = structure.prepared(model)
    kept = {group.name: np.arange(0, group.width, 2) for group in structure.groups}
    rows = kept_rows(original, structure.groups, kept)
    assert {name: index.tolist() for name, index in rows.items()} == {
        "fc1": list(range(0, 16, 2)),
        "fc2": list(range(0, 12, 2)),
    }
    small = remove_nodes(original, structure.groups, kept)
    networks = FittedNetworks(Start(small, original, small, rows), data, "params", None, 0.0, 0)
    problem = networks.problems["fc2"]
    inputs = data.first()
    with torch.no_grad():
        wanted = original.fc2(torch.relu(original.fc1(inputs)))[:, ::2].double()
    torch.testing.assert_close(problem.mean[8:], wanted.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(problem.energy, (wanted - wanted.mean(0)).square().mean(0), rtol=1e-4, atol=1e-6)


def test_bad_data_are_named():
    model = small_mlp()
    inputs = tensor(20, 8)
    inputs[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fitted(model, [inputs])
    with pytest.raises(ValueError, match="rank 1 everywhere: use keep >= "):
        fitted(model, [tensor(20, 8)]).make(0.05)
