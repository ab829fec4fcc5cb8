"""Channels and weights by sensitivity: the slow twin, coverage of the promises, budgets, invariance, bad input."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from torch import nn

import specprune
from specprune.bounds.sensitivity_sampling import epsilon_for_sensitivity
from specprune.compress import CalibrationData, find_groups
from specprune.compress.cost import cost_model, count_params
from specprune.compress.layers import get_layer, weight_matrix
from specprune.compress.sampling import measured_errors, prune_by_sampling, scale_units, unit_sensitivities
from specprune.compress.shares import VARIANTS, Sensitivities, choose_inputs, planned_width
from specprune.compress.sparsify import sparsify_by_sampling, weight_sensitivities

DELTA = 0.05


def images(count=3, size=6, seed=0, dtype=torch.float64):
    return [tensor(size, 2, 8, 8, seed=seed + k, dtype=dtype) for k in range(count)]


def convnet():
    return small_convnet().double().eval()


def prepared(model, data):
    calibration = CalibrationData(data)
    structure = find_groups(model, calibration)
    return structure.prepared(model), list(structure.groups), calibration


def slow_shares(weight, rows, owner):
    """Return each unit's largest share, by loops; `owner` says whose column each is."""
    best = [0.0] * (max(owner) + 1)
    for row, own in itertools.product(rows.tolist(), weight.tolist()):
        for sign in (1, -1):
            parts = [0.0] * len(best)
            for value, factor, unit in zip(row, own, owner, strict=True):
                parts[unit] += max(sign * value * factor, 0.0)
            if sum(parts) > 0:
                best = [max(old, part / sum(parts)) for old, part in zip(best, parts, strict=True)]
    return best


def rows_of(model, data, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    layer = model.get_submodule(name)
    inputs = torch.cat(seen)
    if isinstance(layer, nn.Linear):
        return inputs
    return nn.functional.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT.flatten(0, 1)


def test_sensitivities_equal_their_slow_twin():
    model, data = convnet(), images(2, 2)
    work, groups, calibration = prepared(model, data)
    found = unit_sensitivities(work, groups, calibration)
    for name, consumer, slots in (("conv1", "conv2", 9), ("conv2", "fc1", 4), ("fc1", "fc2", 1)):
        weight, rows = weight_matrix(get_layer(work, consumer)), rows_of(model, data, consumer)
        owner = [column // slots for column in range(weight.shape[1])]
        np.testing.assert_allclose(found[name].values, slow_shares(weight, rows, owner), rtol=1e-12)
        assert found[name].outputs == len(rows) * len(weight)
    assert found["conv1"].total > 1


def test_weight_sensitivities_equal_their_slow_twin_on_signed_inputs():
    model, data = convnet(), images(2, 1)
    found = weight_sensitivities(model, ["conv1", "fc2"], CalibrationData(data))
    for name in found:
        weight, rows = weight_matrix(get_layer(model, name)), rows_of(model, data, name)
        for row, entry in zip(weight, found[name], strict=True):
            np.testing.assert_allclose(
                entry.values, slow_shares(row[None], rows, list(range(len(row)))), rtol=1e-12, atol=1e-15
            )
            assert entry.outputs == len(rows) * len(weight)


def test_a_unit_that_never_contributes_has_none():
    model = convnet()
    with torch.no_grad():
        model.norm1.bias.fill_(1.0)
        model.norm1.bias[2] = -100.0  # dead behind its ReLU
    work, groups, calibration = prepared(model, images())
    values = unit_sensitivities(work, groups, calibration)["conv1"].values
    assert values[2] == 0
    assert np.all(np.delete(values, 2) > 0)
    for variant in VARIANTS:
        assert 2 not in prune_by_sampling(model, images(), 0.8, variant=variant).kept["conv1"]


def test_batches_in_any_split_give_the_same():
    model, data = convnet(), images(2, 6)
    work, groups, _ = prepared(model, data)
    one = unit_sensitivities(work, groups, CalibrationData([torch.cat(data)]))
    many = unit_sensitivities(work, groups, CalibrationData(list(torch.cat(data).split(5))))
    for name in one:
        np.testing.assert_allclose(one[name].values, many[name].values, rtol=1e-12)
        assert one[name].outputs == many[name].outputs


def test_neither_inputs_nor_weights_have_a_scale():
    model, data = small_mlp().double().eval(), [tensor(30, 8, dtype=torch.float64)]
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.bias.zero_()
    work, groups, _ = prepared(model, data)
    before = unit_sensitivities(work, groups, CalibrationData(data))
    larger = unit_sensitivities(work, groups, CalibrationData([1000 * data[0]]))
    with torch.no_grad():  # rows of a consumer have a scale each
        work.fc2.weight.mul_(torch.linspace(0.01, 100, 9, dtype=torch.float64)[:, None])
    scaled = unit_sensitivities(work, groups[:1], CalibrationData(data))
    for name in before:
        np.testing.assert_allclose(larger[name].values, before[name].values, rtol=1e-10)
    np.testing.assert_allclose(scaled["fc1"].values, before["fc1"].values, rtol=1e-10)


@pytest.mark.parametrize("variant", ["random", "hybrid"])
def test_the_promise_for_channels_holds_on_the_calibration_data(variant):
    """2000 draws of the channels of a convolution's inputs, at all outputs, positions and images at once."""
    model, data = convnet(), images(1, 2)
    with torch.no_grad():
        model.norm1.bias.fill_(1.0)
        model.conv2.weight[:, 3:] *= 0.03  # three channels of large and three of small sensitivity
    work, groups, calibration = prepared(model, data)
    group = groups[0]
    entry = unit_sensitivities(work, [group], calibration)["conv1"]
    samples = 60 if variant == "random" else 12
    weight, rows = weight_matrix(work.conv2), rows_of(model, data, "conv2")
    terms = torch.einsum("rjk,ijk->rij", rows.reshape(len(rows), 6, 9), weight.reshape(5, 6, 9)).numpy()
    zeta = (rows.abs() @ weight.abs().T).numpy()
    generator = np.random.default_rng(3)
    errors = np.empty(2000)
    for draw in range(2000):
        chosen = choose_inputs(entry, samples, variant, DELTA, generator)
        factors = np.zeros(6)
        factors[chosen.indices] = chosen.factors
        errors[draw] = (np.abs(terms @ (factors - 1)) / zeta).max()
    assert chosen.epsilon > 0
    assert np.mean(errors > chosen.epsilon) <= DELTA + 5 * math.sqrt(DELTA * (1 - DELTA) / 2000)
    # A handful of draws from three channels that matter little: "hybrid" cannot come near a promise for 160 sums.
    assert np.quantile(errors, 1 - DELTA) > (0.2 if variant == "random" else 0.02) * chosen.epsilon
    scale_units(work, [group], {"conv1": (chosen.indices, chosen.factors)})
    measured = measured_errors(model, work, [group], calibration)["conv1"]
    assert measured == pytest.approx(errors[-1], rel=1e-9)


def test_random_weights_keep_their_promise():
    generator = np.random.default_rng(4)
    model, data = convnet(), images(1, 4)
    (entry, *_) = weight_sensitivities(model, ["fc1"], CalibrationData(data))["fc1"]
    rows, weight = rows_of(model, data, "fc1").numpy(), model.fc1.weight.detach().numpy()[0]
    terms = rows * weight
    exceeded = []
    for _ in range(2000):
        chosen = choose_inputs(entry, 100, "random", DELTA, generator)
        factors = np.zeros(20)
        factors[chosen.indices] = chosen.factors
        exceeded.append((np.abs(terms @ (factors - 1)) / np.abs(terms).sum(1)).max() / chosen.epsilon)
    assert np.mean(np.array(exceeded) > 1) <= DELTA + 5 * math.sqrt(DELTA / 2000)
    assert np.quantile(exceeded, 1 - DELTA) > 0.2


@pytest.mark.parametrize("variant", ["random", "hybrid"])
def test_factors_are_one_on_average(variant):
    entry = Sensitivities(np.array([0.9, 0.5, 0.2, 0.1, 0.05, 0.0]), 10)
    generator = np.random.default_rng(5)
    factors = np.zeros((20_000, 6))
    for row in factors:
        chosen = choose_inputs(entry, 5, variant, DELTA, generator)
        row[chosen.indices] = chosen.factors
    slack = 5 * factors.std(0) / math.sqrt(20_000)
    assert np.all(np.abs(factors.mean(0) - [1, 1, 1, 1, 1, 0]) <= slack)
    if variant == "hybrid":
        assert np.all(factors[:, :2] == 1)


def test_hybrid_never_promises_less_than_random():
    generator = np.random.default_rng(6)
    for _ in range(100):
        entry = Sensitivities(generator.exponential(size=12) ** 3, 50)
        for samples in (1, 3, 10, 40, 10**6):
            hybrid, random = (
                choose_inputs(entry, samples, variant, DELTA, generator).epsilon for variant in ("hybrid", "random")
            )
            assert hybrid <= random * (1 + 1e-12)
            assert random == pytest.approx(epsilon_for_sensitivity(entry.total, samples, DELTA, 50))


@pytest.mark.parametrize("variant", ["random", "hybrid"])
def test_the_planned_width_is_what_the_draws_give(variant):
    entry = Sensitivities(np.random.default_rng(7).exponential(size=15), 50)
    generator = np.random.default_rng(8)
    for samples in (2, 8, 30):
        found = [len(choose_inputs(entry, samples, variant, DELTA, generator).indices) for _ in range(4000)]
        slack = 5 * np.std(found) / math.sqrt(4000) + 1e-9
        planned = planned_width(entry.values, samples, variant)
        assert np.mean(found) - slack <= planned <= np.mean(found) + 1 + slack


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_budget_is_met_within_one_channel(variant, keep):
    model, data = convnet(), images()
    result = prune_by_sampling(model, data, keep, variant=variant)
    full = count_params(model)
    assert result.cost_planned <= keep * full
    assert result.params_after == count_params(result.model)
    assert result.params_before == full
    if variant == "deterministic":
        assert result.params_after == result.cost_planned
    if variant != "hybrid":
        work, groups, calibration = prepared(model, data)
        cost = cost_model(work, calibration, groups, "params")
        found = unit_sensitivities(work, groups, calibration)
        widths = {row.group: planned_width(found[row.group].values, row.samples, variant) for row in result.groups}
        assert round(cost.total(widths)) == result.cost_planned
        larger = [cost.total({**widths, name: width + 1}) for name, width in widths.items() if width < cost.full[name]]
        assert max(larger) > keep * full


def test_deterministic_is_the_plain_cut_by_these_scores():
    model, data = convnet(), images()
    result = prune_by_sampling(model, data, 0.5)
    widths = {row.group: row.width_after for row in result.groups}
    settings = {"widths": widths, "selection": "scores", "scores": result.sensitivities}
    same = specprune.prune(model, data, **settings, reconstruction="none")
    for one, other in zip(result.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for row in result.groups:
        assert 0 < row.epsilon_measured <= row.epsilon_promised <= 1


@pytest.mark.parametrize("variant", ["random", "hybrid"])
def test_the_drawn_network_computes_the_reweighted_sums(variant):
    model, data = convnet(), images()
    result = prune_by_sampling(model, data, 0.7, variant=variant, seed=2)
    twin = copy.deepcopy(model)
    small = result.model
    for name, consumer, slots in (("conv1", "conv2", 1), ("conv2", "fc1", 4), ("fc1", "fc2", 1)):
        kept = np.repeat(result.kept[name] * slots, slots) + np.tile(np.arange(slots), len(result.kept[name]))
        gone = np.setdiff1d(np.arange(twin.get_submodule(consumer).weight.shape[1]), kept)
        with torch.no_grad():
            old = twin.get_submodule(consumer).weight
            rows = result.kept.get(consumer, np.arange(len(old)))
            ratio = small.get_submodule(consumer).weight / old[rows][:, kept]
            flat = ratio.transpose(0, 1).reshape(len(result.kept[name]), -1)
            torch.testing.assert_close(flat, flat[:, :1].expand_as(flat))
            shape = (1, -1, *[1] * (old.dim() - 2))
            old[:, kept] *= flat[:, 0].repeat_interleave(slots).reshape(shape)
            old[:, gone] = 0
    torch.testing.assert_close(small(data[0]), twin(data[0]))


def test_all_is_kept_where_the_budget_allows_it():
    model, data = convnet(), images()
    for variant in ("deterministic", "hybrid"):
        result = prune_by_sampling(model, data, 1.0, variant=variant)
        torch.testing.assert_close(result.model(data[0]), model(data[0]))
        assert all(row.epsilon_promised == row.epsilon_measured == 0 for row in result.groups)


def test_the_caller_keeps_everything():
    model, data = small_convnet().train(), images(dtype=torch.float32)
    before, state = snapshot(model), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    for function, variant in itertools.product((prune_by_sampling, sparsify_by_sampling), VARIANTS):
        one = function(model, data, 0.5, variant=variant, seed=3)
        two = function(model, data, 0.5, variant=variant, seed=3)
        for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert one.model.training
        assert one.model.norm1.training
        assert "epsilon_promised" in str(one)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


class Shortcut(nn.Module):
    """Two layers that write to the same channels, read by a grouped convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)
        self.side = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        h = torch.relu(h + self.inner(h))
        return self.head(h.mean((2, 3))) + self.side(torch.relu(self.grouped(h)).mean((2, 3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_readers_and_blocks(variant):
    model, data = randomise(Shortcut()).double().eval(), images()
    result = prune_by_sampling(model, data, 0.8, variant=variant)
    assert result.model(data[0]).shape == (6, 3)
    assert all(row.epsilon_measured <= row.epsilon_promised for row in result.groups)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sparsity_meets_its_budget_and_promise(variant, keep):
    model, data = convnet(), images()
    result = sparsify_by_sampling(model, data, keep, variant=variant)
    total = sum(row.weights_before for row in result.layers)
    assert total == sum(layer.weight.numel() for layer in (model.conv1, model.conv2, model.fc1, model.fc2))
    assert result.density <= keep + (0 if variant == "deterministic" else 0.1)
    assert result.density >= keep - (1 / total if variant == "deterministic" else 0.1)
    for row in result.layers:
        layer, old = result.model.get_submodule(row.layer), model.get_submodule(row.layer)
        assert layer.weight.shape == old.weight.shape
        assert int((layer.weight != 0).sum()) == row.weights_after
        assert torch.equal(layer.bias, old.bias) if old.bias is not None else layer.bias is None
        assert row.epsilon_measured <= row.epsilon_promised + 1e-12


def test_deterministic_sparsity_keeps_the_largest_of_all_layers():
    model, data = convnet(), images()
    names = ["conv1", "conv2", "fc1", "fc2"]
    found = weight_sensitivities(model, names, CalibrationData(data))
    result = sparsify_by_sampling(model, data, 0.4)
    kept, gone = [], []
    for name in names:
        values = np.stack([entry.values for entry in found[name]])
        there = weight_matrix(get_layer(result.model, name)).numpy() != 0
        kept.append(values[there])
        gone.append(values[~there])
        same = weight_matrix(get_layer(model, name)).numpy()
        assert np.array_equal(weight_matrix(get_layer(result.model, name)).numpy()[there], same[there])
    assert np.concatenate(kept).min() >= np.concatenate(gone).max()


def test_hybrid_sparsity_promises_no_more_error_than_either():
    model, data = convnet(), images()
    promised = {v: sparsify_by_sampling(model, data, 0.9, variant=v).layers for v in ("random", "hybrid")}
    for hybrid, random in zip(promised["hybrid"], promised["random"], strict=True):
        assert hybrid.epsilon_promised <= min(1.0, random.epsilon_promised)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(torch.relu(self.shared(x)))


def test_all_runs_of_a_layer_count_and_idle_layers_do_not():
    model, x = randomise(Twice()).double(), tensor(9, 4, dtype=torch.float64)
    found = weight_sensitivities(model, ["shared", "idle"], CalibrationData([x]))
    assert list(found) == ["shared"]
    rows = torch.cat([x, torch.relu(model.shared(x)).detach()])
    for weight, entry in zip(model.shared.weight.detach(), found["shared"], strict=True):
        np.testing.assert_allclose(entry.values, slow_shares(weight[None], rows, list(range(4))), rtol=1e-12)
        assert entry.outputs == 18 * 4


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x):
        return self.one(x) + self.two(x.relu_())


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(6, 3)
        self.three = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.one(x))
        return self.two(h) + self.three(h) if x.min() > -90 else self.two(h)


def test_readers_count_in_the_batches_in_which_they_run():
    model, x = randomise(Sometimes()).double(), tensor(9, 4, dtype=torch.float64)
    later = torch.full((5, 4), -100.0, dtype=torch.float64)
    work, groups, _ = prepared(model, [x])
    entry = unit_sensitivities(work, groups, CalibrationData([x, later]))["one"]
    assert entry.outputs == 9 * 6 + 5 * 3
    assert prune_by_sampling(model, [x, later], 0.6).groups[0].consumer == "two, three"


def test_what_is_changed_in_place_later_does_not_count():
    model, x = randomise(InPlace()).double(), tensor(9, 4, dtype=torch.float64)
    data = CalibrationData([x], lambda net, batch: net(batch.clone()))
    for name, rows in (("one", x), ("two", torch.relu(x))):
        (entry, *_) = weight_sensitivities(model, ["one", "two"], data)[name]
        weight = model.get_submodule(name).weight.detach()[:1]
        np.testing.assert_allclose(entry.values, slow_shares(weight, rows, list(range(4))), rtol=1e-12)


class Recurrent(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.rnn = nn.RNN(6, 7, batch_first=True)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.rnn(torch.relu(self.embed(x)))[0][:, -1])


def test_what_recurrent_layers_read_stays_whole():
    model = Recurrent(nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 2)))
    result = prune_by_sampling(model, [tensor(5, 4, 3)], 0.9)
    assert [row.group for row in result.groups] == ["tail.0"]
    assert {"embed", "rnn"} <= {entry.name for entry in result.skipped}
    assert "left whole: rnn" in str(result)
    with pytest.raises(ValueError, match="no group is read by"):
        prune_by_sampling(Recurrent(nn.Linear(7, 2)), [tensor(5, 4, 3)], 0.9)


@pytest.mark.parametrize("function", [prune_by_sampling, sparsify_by_sampling])
def test_parallel_runs_are_refused(function, monkeypatch):
    monkeypatch.setattr("specprune.compress.shares.is_parallel", lambda: True)
    with pytest.raises(ValueError, match="one process"):
        function(small_convnet(), images(dtype=torch.float32), 0.5)


@pytest.mark.parametrize("function", [prune_by_sampling, sparsify_by_sampling])
def test_bad_input_is_named(function):
    model, data = small_convnet(), images(dtype=torch.float32)
    for keep in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="keep"):
            function(model, data, keep)
    with pytest.raises(ValueError, match="delta"):
        function(model, data, 0.5, delta=0.0)
    with pytest.raises(ValueError, match=r"variant='best'.*deterministic"):
        function(model, data, 0.5, variant="best")
    if function is prune_by_sampling:
        with pytest.raises(ValueError, match="ask for more"):
            function(model, data, 0.01)
    broken = images(dtype=torch.float32)
    broken[2][0, 0, 0, 0] = math.nan  # not in the first batch, which is traced
    with pytest.raises(ValueError, match="NaN or Inf in the inputs of layer 'conv"):
        function(model, broken, 0.5)
    with torch.no_grad():
        model.conv2.weight[0] = math.inf
    with pytest.raises(ValueError, match=r"conv2\.weight"):
        function(model, data, 0.5)


def test_what_has_no_such_layer_is_refused():
    with pytest.raises(ValueError, match="nothing to sparsify"):
        sparsify_by_sampling(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), [tensor(2, 4, 5, 5)], 0.5)
