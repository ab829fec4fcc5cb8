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
    with pytest.raises(ValueError, match="no layer can become low-rank:\n  0: it is a Conv1d"):
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


def test_data_of_low_rank_leave_budgets_and_costs_true():
    """Then cheaper layers lose nothing at all, which must not hide what the layers cost as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5))
    inputs = tensor(300, 6).abs() @ tensor(6, 64, seed=1).abs()
    networks = fitted(model, [inputs])
    _, layers = networks.make(1.0)
    assert all(layer.rank is None for layer in layers)
    assert [layer.cost_before for layer in layers] == [64 * 48, 48 * 48, 48 * 5]
    for keep in (0.6, 0.3, 0.2):
        made, layers = networks.make(keep)
        assert 0.9 * keep < count_params(made) / count_params(model) <= keep
    one = fitted(model, [inputs[:1]])
    assert count_params(one.make(0.5)[0]) <= 0.5 * count_params(model)


def uneven_norm_net(seed=0):
    """Two convolutions whose batch norms weigh their channels a hundredfold differently."""
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 16, 4),
        ),
        seed=seed,
    ).eval()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.copy_(
                torch.logspace(-1.5, 0.5, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
            )
            norm.running_var.copy_(torch.linspace(0.5, 2.0, 12))
            norm.running_mean.copy_(torch.linspace(-1, 1, 12))
    return model, [tensor(120, 3, 6, 6)]


def test_outputs_are_weighed_as_the_norm_after_them_weighs_them(monkeypatch):
    model, data = uneven_norm_net()
    reference = Reference(model, CalibrationData(data), 120)
    weighed = reference.divergence(fitted(model, data, positions=None).make(0.45)[0])
    plain = lambda *_: torch.ones(12, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr("specprune.compress.low_rank_fit.norm_gain", plain)
    assert weighed < 0.9 * reference.divergence(fitted(model, data, positions=None).make(0.45)[0])


def test_a_layer_before_a_shortcut_aims_at_the_sum():
    """What an earlier layer did to the shortcut is made up for by the one whose outputs are added to it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(24, 20), nn.Linear(20, 20), nn.Linear(20, 4)

        def forward(self, x):
            shortcut = torch.relu(self.first(x))
            return self.last(torch.relu(self.inner(shortcut) + shortcut))

    model = randomise(Net(), seed=4).eval()
    inputs = tensor(500, 24) @ torch.diag(torch.linspace(0.2, 3, 24))
    networks = fitted(model, [inputs])
    made, layers = networks.make(0.65)
    assert layers[0].rank is not None
    with torch.no_grad():
        shortcut, now = torch.relu(model.first(inputs)).double(), torch.relu(made.first(inputs)).double()
        target = model.inner(shortcut.float()).double() + shortcut - now  # the original sum minus the shortcut as it is
        x, y = now - now.mean(0), target - target.mean(0)
        best = y - x @ torch.linalg.lstsq(x, y).solution
        floor = float(best.square().sum() / y.square().sum())
    assert layers[1].residual >= floor * 0.999
    if layers[1].rank is None:
        assert layers[1].residual == pytest.approx(floor, rel=1e-2)


def test_positions_and_seed_decide_what_is_drawn():
    model, data = small_convnet(), [tensor(40, 2, 8, 8)]

    def weights(**options):
        return torch.cat([p.detach().flatten() for p in fitted(model, data, **options).make(0.7)[0].parameters()])

    few = weights(positions=3)
    assert torch.equal(few, weights(positions=3))
    for other in (weights(positions=3, seed=1), weights(positions=None)):
        assert few.shape != other.shape or not torch.allclose(few, other, rtol=1e-4)


def test_a_budget_does_not_depend_on_those_before(monkeypatch):
    monkeypatch.setattr("specprune.compress.targets.CACHE_BYTES", 100)  # nothing fits
    model, data = small_convnet(), [tensor(40, 2, 8, 8), tensor(40, 2, 8, 8, seed=2)]
    networks = fitted(model, data, positions=4)
    networks.make(0.85)
    for a, b in zip(
        networks.make(0.7)[0].state_dict().values(),
        fitted(model, data, positions=4).make(0.7)[0].state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_blank_batches_of_several_sizes():
    model = small_mlp((16, 24, 20, 4))
    made, _ = fitted(model, [tensor(40, 16), torch.zeros(4, 16), torch.zeros(6, 16)]).make(0.6)
    assert count_params(made) <= 0.6 * count_params(model)


def test_a_norm_over_tokens_is_not_one_over_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 10), nn.Linear(10, 3)

        def forward(self, x):
            return self.c(torch.relu(self.b(self.norm(self.a(x))))).mean(1)

    model = randomise(Net()).eval()
    networks = fitted(model, [tensor(60, 9, 6)])  # as many tokens as outputs
    assert networks.norms == {}
    made, _ = networks.make(0.8)
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)


def test_layers_of_which_the_network_reads_more_stay_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)).to(self.b.weight.dtype))))

    model, data = randomise(Net()), [tensor(60, 12)]
    networks = fitted(model, data)
    assert [entry.name for entry in networks.skipped] == ["b"]
    assert "reads more of it" in networks.skipped[0].reason
    assert count_params(networks.make(0.8)[0]) <= 0.8 * count_params(model)
    assert [entry.name for entry in low_rank(model, data, 0.8).skipped] == ["b"]


def test_bad_data_are_named():
    model = small_mlp()
    inputs = tensor(20, 8)
    inputs[3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fitted(model, [inputs])
    with pytest.raises(ValueError, match="rank 1 everywhere: use keep >= "):
        fitted(model, [tensor(20, 8)]).make(0.05)
