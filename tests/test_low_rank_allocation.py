"""Allocation of ranks against enumeration, the published search against it, and whole networks at a budget."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.compress.cost import count_params
from specprune.compress.low_rank_allocation import (
    Cut,
    Frontier,
    Option,
    alternating_cuts,
    layer_options,
    level_cuts,
    sum_cuts,
)
from specprune.compress.low_rank_cost import LayerCost
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.low_rank_network import METHODS, low_rank

MLP = (24, 36, 30, 10)


def random_options(generator, layers=3):
    """Options with falling random scores, some equal, and the sizes of the layers as they are."""
    options, dense = [], []
    for _ in range(layers):
        size = int(generator.integers(5, 40))
        layer = []
        for slices in range(1, int(generator.integers(2, 4))):
            unit = int(generator.integers(2, 12))
            ranks = (size - 1) // unit
            if ranks:
                scores = np.sort(generator.integers(0, 12, ranks) / 8)[::-1]
                layer.append(Option(0, slices, unit, scores))
        options.append(layer)
        dense.append(size)
    return options, dense


def choices(layer, size):
    """Every (cost, score, cut) of a layer."""
    found = [(size, 0.0, None)]
    for option in layer:
        found += [(r * option.unit, option.scores[r - 1], option.cut(r)) for r in range(1, len(option.scores) + 1)]
    return found


def value_of(options, dense, cuts):
    """Total cost and largest score of a choice."""
    picked = [
        next(choice for choice in choices(layer, size) if choice[2] == cut)
        for layer, size, cut in zip(options, dense, cuts, strict=True)
    ]
    return sum(choice[0] for choice in picked), max(choice[1] for choice in picked)


def best_by_enumeration(options, dense, budget):
    """The smallest largest score among all combinations that fit."""
    everything = itertools.product(*(choices(layer, size) for layer, size in zip(options, dense, strict=True)))
    return min((max(c[1] for c in combo) for combo in everything if sum(c[0] for c in combo) <= budget), default=None)


def frontiers_of(options, dense):
    return [Frontier.of(layer, size) for layer, size in zip(options, dense, strict=True)]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
def test_the_common_level_is_optimal(seed, share):
    options, dense = random_options(np.random.default_rng(seed))
    budget = int(share * sum(dense))
    best = best_by_enumeration(options, dense, budget)
    if best is None:
        with pytest.raises(ValueError, match="smallest choices cost"):
            level_cuts(frontiers_of(options, dense), budget)
        with pytest.raises(ValueError, match="smallest choices cost"):
            alternating_cuts(options, dense, budget, seed=0)
        return
    cuts = level_cuts(frontiers_of(options, dense), budget)
    cost, worst = value_of(options, dense, cuts)
    assert cost <= budget
    assert worst == best
    search_cost, search_worst = value_of(options, dense, alternating_cuts(options, dense, budget, seed=seed))
    assert search_cost <= budget
    assert search_worst >= best


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.3, 1))
def test_the_common_level_is_optimal_at_fixed_slices(seed, share):
    """The published global step is `level_cuts` with one option a layer."""
    options, dense = random_options(np.random.default_rng(seed))
    options = [layer[-1:] for layer in options]
    budget = int(share * sum(dense))
    best = best_by_enumeration(options, dense, budget)
    if best is not None:
        assert value_of(options, dense, level_cuts(frontiers_of(options, dense), budget))[1] == best


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.3, 1))
def test_nothing_that_helps_fits_in_what_is_left(seed, share):
    options, dense = random_options(np.random.default_rng(seed))
    budget = int(share * sum(dense))
    frontiers = frontiers_of(options, dense)
    if sum(f.costs[0] for f in frontiers) > budget:
        return
    cuts = level_cuts(frontiers, budget)
    left = budget - value_of(options, dense, cuts)[0]
    for frontier, cut in zip(frontiers, cuts, strict=True):
        place = frontier.cuts.index(cut)
        assert place == len(frontier.cuts) - 1 or frontier.costs[place + 1] - frontier.costs[place] > left


def test_what_is_left_goes_to_the_worst_layer_that_it_helps():
    options = [[Option(0, 1, 5, np.array([score]))] for score in (0.4, 0.5, 0.9)]
    cuts = level_cuts(frontiers_of(options, [10, 10, 100]), 20)
    assert cuts == [Cut(0, 1, 1), None, Cut(0, 1, 1)]


def least_sum(options, dense, budget):
    everything = itertools.product(*(choices(layer, size) for layer, size in zip(options, dense, strict=True)))
    return min((sum(c[1] for c in combo) for combo in everything if sum(c[0] for c in combo) <= budget), default=None)


def summed(frontiers, cuts):
    places = [frontier.cuts.index(cut) for frontier, cut in zip(frontiers, cuts, strict=True)]
    cost = sum(int(frontier.costs[place]) for frontier, place in zip(frontiers, places, strict=True))
    return cost, sum(float(frontier.scores[place]) for frontier, place in zip(frontiers, places, strict=True))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), price=st.floats(-4, 1))
def test_the_sum_is_least_where_one_price_of_cost_decides(seed, price):
    """At a price every layer takes what is best for itself; at the budget that this spends it is the optimum."""
    options, dense = random_options(np.random.default_rng(seed))
    frontiers = frontiers_of(options, dense)
    picked = [int(np.argmin(f.scores + 10.0**price * f.costs)) for f in frontiers]
    budget = sum(int(f.costs[place]) for f, place in zip(frontiers, picked, strict=True))
    cost, score = summed(frontiers, sum_cuts(frontiers, budget))
    assert cost <= budget
    assert score == pytest.approx(least_sum(options, dense, budget), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
def test_between_such_budgets_the_sum_is_a_step_off_at_most(seed, share):
    options, dense = random_options(np.random.default_rng(seed))
    frontiers, budget = frontiers_of(options, dense), int(share * sum(dense))
    best = least_sum(options, dense, budget)
    if best is None:
        with pytest.raises(ValueError, match="smallest choices cost"):
            sum_cuts(frontiers, budget)
        return
    cost, score = summed(frontiers, sum_cuts(frontiers, budget))
    assert cost <= budget
    assert best - 1e-12 <= score <= best + max(float(f.scores[0]) for f in frontiers)
    for frontier, cut in zip(frontiers, sum_cuts(frontiers, budget), strict=True):  # nothing that helps fits
        place = frontier.cuts.index(cut)
        assert frontier.scores[place] == 0 or frontier.costs[place + 1] - frontier.costs[place] > budget - cost


def test_lrank_minimises_the_sum_of_squared_distances():
    model = small_mlp(MLP)
    result = low_rank(model, keep=0.5, method="lrank")
    left = 0.0
    for row in result.layers:
        if row.rank is not None:
            values = torch.linalg.svdvals(model.get_submodule(row.layer).weight.detach().double())
            left += float(values[row.rank :].square().sum())
            wanted = model.get_submodule(row.layer).weight.detach().double()
            first, second = (part.weight.detach().double() for part in result.model.get_submodule(row.layer))
            distance = float((second @ first - wanted).square().sum())
            assert distance == pytest.approx(float(values[row.rank :].square().sum()), rel=1e-4)
    options = [
        layer_options(
            LayerCost(LayerSpectra(row.layer, model.get_submodule(row.layer))), "distance", foldings=(0,), slices=(1,)
        )
        for row in result.layers
    ]
    dense = [model.get_submodule(row.layer).weight.numel() for row in result.layers]
    budget = int(0.5 * count_params(model)) - (count_params(model) - sum(dense))
    best = least_sum(options, dense, budget)
    assert best * (1 - 1e-9) <= left <= 1.1 * best


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_frontier_holds_what_nothing_beats(seed):
    options, dense = random_options(np.random.default_rng(seed), layers=1)
    frontier = Frontier.of(options[0], dense[0])
    assert np.all(np.diff(frontier.costs) > 0)
    assert np.all(np.diff(frontier.scores[:-1]) < 0)
    assert (frontier.costs[-1], frontier.scores[-1], frontier.cuts[-1]) == (dense[0], 0.0, None)
    assert frontier.scores[-1] == 0
    for cost, score, _ in choices(options[0], dense[0]):
        assert np.any((frontier.costs <= cost) & (frontier.scores <= score))
    for level in (0.0, 0.3, 0.75, 2.0):
        cheapest = min(cost for cost, score, _ in choices(options[0], dense[0]) if score <= level)
        assert frontier.costs[frontier.cheapest(level)] == cheapest


def test_the_search_moves_between_options():
    """From any start, the local step finds the option that the layer's own size makes best."""
    layer = [Option(0, k, 4, np.array([0.9, 0.8])) for k in (1, 3)] + [Option(0, 2, 5, np.array([0.1]))]
    cuts = alternating_cuts([layer] * 8, [30] * 8, 64, seed=0)  # no start has slices 2 in all layers
    assert set(cuts) == {Cut(0, 2, 1)}
    rng = np.random.default_rng(5)
    gaps = []
    for _ in range(60):
        options, dense = random_options(rng)
        budget = int(0.6 * sum(dense))
        best = best_by_enumeration(options, dense, budget)
        if best:
            gaps.append(value_of(options, dense, alternating_cuts(options, dense, budget, seed=1))[1] / best)
    assert len(gaps) > 20
    assert np.median(gaps) == 1


def test_scores_are_the_errors_energies_and_sizes():
    layer = randomise(nn.Linear(24, 36))
    spectra = LayerSpectra("a", layer)
    values = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    ranks = np.arange(1, (24 * 36 - 1) // 60 + 1)
    (error,) = layer_options(LayerCost(spectra), "error", foldings=(0,), slices=(1,))
    np.testing.assert_allclose(error.scores, values[ranks] / values[0])
    (energy,) = layer_options(LayerCost(spectra), "energy", foldings=(0,), slices=(1,))
    np.testing.assert_allclose(energy.scores, [np.sum(values[r:] ** 2) / np.sum(values**2) for r in ranks])
    (size,) = layer_options(LayerCost(spectra), "size", foldings=(0,), slices=(1,))
    np.testing.assert_allclose(size.scores, 1 - ranks * 60 / (24 * 36))
    for option in layer_options(LayerCost(spectra), "error", foldings=(0,), slices=spectra.slice_counts()):
        assert option.unit * len(option.scores) < 24 * 36 <= option.unit * (len(option.scores) + 1)
        for rank in range(1, len(option.scores) + 1):
            largest = spectra.decomposition(0, option.slices).errors(rank).largest
            assert option.scores[rank - 1] == pytest.approx(largest, rel=1e-9)
    with pytest.raises(ValueError, match="score='norm'"):
        layer_options(LayerCost(spectra), "norm", foldings=(0,), slices=(1,))


def test_a_network_gets_the_optimum_of_its_own_spectra():
    """Enumerated over all slices and ranks of a two-layer network, on singular values from NumPy."""
    model = small_mlp((6, 8, 4))
    result = low_rank(model, keep=0.7)
    total, tables = count_params(model), []
    for name in ("fc1", "fc2"):
        weight = model.get_submodule(name).weight.detach().double().numpy()
        f, c = weight.shape
        norm, table = np.linalg.norm(weight, 2), [(f * c, 0.0)]
        for k in (k for k in range(1, c + 1) if c % k == 0):
            values = np.max([np.linalg.svd(part, compute_uv=False) for part in np.split(weight, k, axis=1)], axis=0)
            table += [(j * (k * f + c), values[j] / norm) for j in range(1, len(values)) if j * (k * f + c) < f * c]
        tables.append(table)
    budget = int(0.7 * total) - 12  # biases
    best = min(max(a[1], b[1]) for a, b in itertools.product(*tables) if a[0] + b[0] <= budget)
    assert max(layer.error_largest for layer in result.layers) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.45])
def test_the_budget_is_met_and_counts_are_true(method, keep):
    model = small_mlp(MLP)
    before = snapshot(model)
    result = low_rank(model, [tensor(64, 24)], keep, method=method)
    assert_unchanged(model, before)
    total = count_params(model)
    assert result.params_before == total
    assert result.params_after == count_params(result.model)
    assert result.params_after <= keep * total
    steps = [
        (layer.slices or 1) * fan_out + fan_in
        for layer, (fan_in, fan_out) in zip(result.layers, itertools.pairwise(MLP), strict=True)
    ]
    assert keep * total - result.params_after < 2 * max(steps)  # a few per cent: ranks of so small a network are coarse
    for layer in result.layers:
        assert layer.params_after == count_params(result.model.get_submodule(layer.layer))
        assert layer.params_before == count_params(model.get_submodule(layer.layer))
        assert layer.error_largest <= layer.error_exact * (1 + 1e-9)
        assert layer.error_exact <= layer.error_theorem * (1 + 1e-9)
    assert torch.isfinite(result.model(tensor(5, 24))).all()


@pytest.mark.parametrize("method", ["alds", "alternating", "constant", "energy"])
def test_a_wider_network_meets_its_budget_within_half_a_per_cent_of_the_network(method):
    model = small_mlp((120, 200, 160, 10))
    result = low_rank(model, keep=0.4, method=method)
    assert 0.395 <= result.params_after / result.params_before <= 0.4


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_pay_what_is_reported(method):
    model = small_convnet().eval()
    data = [tensor(8, 2, 8, 8)]
    result = low_rank(model, data, 0.8, method=method)
    assert result.params_after == count_params(result.model) <= 0.8 * count_params(model)
    assert result.model(data[0]).shape == (8, 3)
    assert not result.model.training
    assert {layer.layer for layer in result.layers} == {"conv1", "conv2", "fc1", "fc2"}


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_nothing(method):
    model = small_mlp(MLP)
    result = low_rank(model, [tensor(64, 24)], 1.0, method=method)
    assert all(layer.rank is None for layer in result.layers)
    x = tensor(5, 24)
    assert torch.equal(result.model(x), model(x))


def test_ratio_and_energy_are_equal_where_asked():
    model = small_mlp((120, 200, 160, 10))
    by_size = low_rank(model, keep=0.4, method="constant")
    ratios = [layer.params_after / layer.params_before for layer in by_size.layers[:2]]
    assert abs(ratios[0] - ratios[1]) < 0.02
    with torch.no_grad():  # the second layer's energy lies in fewer directions
        model.fc2.weight.mul_(torch.arange(1.0, 201) ** -0.5)
    by_energy = low_rank(model, keep=0.4, method="energy")
    lost = []
    for layer in by_energy.layers[:2]:
        values = torch.linalg.svdvals(model.get_submodule(layer.layer).weight.detach().double())
        lost.append(float(values[layer.rank :].square().sum() / values.square().sum()))
    assert abs(lost[0] - lost[1]) < 0.02


def test_more_foldings_are_never_worse_and_sometimes_used():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False))
    randomise(model)
    with torch.no_grad():  # the first kernel is a product of a column and a row: rank 1 a channel in folding 1
        model[0].weight.copy_(tensor(6, 1, 3, 1) * tensor(1, 6, 1, 3, seed=1))
    plain, more = (low_rank(model, keep=0.5, method=method) for method in ("alds", "alds+"))
    worst = [max(layer.error_largest for layer in result.layers) for result in (plain, more)]
    assert worst[1] <= worst[0]
    with torch.no_grad():  # 3 spatial ranks 1 of separate channel mixes: folding 1 has rank 3, folding 0 rank 6
        model[0].weight.copy_(sum(tensor(6, 1, 3, 1, seed=s) * tensor(1, 6, 1, 3, seed=9 + s) for s in range(3)))
        model[2].weight.copy_(sum(tensor(6, 1, 1, 3, seed=s) * tensor(1, 6, 3, 1, seed=9 + s) for s in range(3)))
    more = low_rank(model, keep=(2 * 3 * 36) / (2 * 324), method="alds+")
    assert [layer.folding for layer in more.layers] == [1, 2]
    x = tensor(2, 6, 9, 9)
    torch.testing.assert_close(more.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert max(layer.error_largest for layer in low_rank(model, keep=1 / 3).layers) > 0.1


def test_data_beats_plain_on_correlated_inputs():
    model = small_mlp((24, 36, 30, 10))
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=generator) * torch.arange(1.0, 25) ** -1.5
    train, test = (torch.randn(500, 24, generator=generator) @ mix.T for _ in range(2))

    def loss(method):
        result = low_rank(model, [train], 0.5, method=method)
        return float((result.model(test) - model(test)).norm() / model(test).norm())

    with torch.no_grad():
        data, plain = loss("data"), [loss(method) for method in ("alds", "constant", "energy")]
    assert data < 0.7 * min(plain)


@pytest.mark.parametrize("model", [small_mlp(MLP), small_convnet().eval()], ids=["mlp", "convnet"])
def test_a_refit_is_the_least_squares_fit_of_each_layer(model):
    """A layer alone on its own inputs: the refitted second part is NumPy's least-squares solution."""
    inputs = tensor(400, 24) if isinstance(model[0], nn.Linear) else tensor(40, 2, 8, 8)
    plain, refitted = (low_rank(model, [inputs], 0.7, method=method) for method in ("alds", "refit"))
    assert plain.layers == refitted.layers
    assert any((layer.slices or 1) > 1 for layer in refitted.layers)
    with torch.no_grad():
        x = inputs
        for (name, module), layer in zip(refitted.model.named_children(), model, strict=True):
            if isinstance(module, nn.Sequential):
                hidden = module[0](x).movedim(1, -1).flatten(0, -2).double().numpy()
                bias = 0 if layer.bias is None else layer.bias.numpy()
                wanted = layer(x).movedim(1, -1).flatten(0, -2).double().numpy() - bias
                best = np.linalg.lstsq(hidden, wanted, rcond=None)[0]
                np.testing.assert_allclose(module[1].weight.flatten(1).T.numpy(), best, atol=2e-4)
                own = plain.model.get_submodule(name)
                assert (module(x) - layer(x)).norm() < 0.999 * (own(x) - layer(x)).norm()
            x = layer(x)


def test_compressing_twice_works():
    model = small_mlp(MLP)
    first = low_rank(model, keep=0.7, method="energy")
    second = low_rank(first.model, keep=0.8, method="energy")
    assert second.params_after <= 0.8 * first.params_after
    assert torch.isfinite(second.model(tensor(3, 24))).all()


def test_what_cannot_be_replaced_stays_and_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
            self.conv = nn.Conv2d(8, 20, 3, padding=1)
            self.one = nn.Linear(20, 20)
            self.same = self.one
            self.tied = nn.Linear(20, 20)
            self.tie = nn.Linear(20, 20)
            self.tie.weight = self.tied.weight
            self.hooked = nn.Linear(20, 20)
            self.hooked.register_forward_hook(lambda *_: None)
            self.encoder = nn.TransformerEncoderLayer(20, 2, 30, batch_first=True)
            self.idle = nn.Linear(30, 30)

        def forward(self, x):
            x = self.conv(self.grouped(x)).mean((2, 3))
            x = self.hooked(self.tie(self.tied(self.same(self.one(x)))))
            return self.encoder(x[:, None])[:, 0]

    model = Net().eval()
    data = [tensor(16, 4, 5, 5)]
    result = low_rank(model, data, 0.95, method="data")
    assert [layer.layer for layer in result.layers] == ["conv"]
    reasons = {entry.name: entry.reason for entry in result.skipped}
    assert "groups=2" in reasons["grouped"]
    assert "hooks" in reasons["hooked"]
    for name in ("one", "same", "tied", "tie"):
        assert "also used elsewhere" in reasons[name]
    assert "reads its weights" in reasons["encoder.linear1"]
    assert "NonDynamicallyQuantizableLinear" in reasons["encoder.self_attn.out_proj"]
    assert "did not run" in reasons["idle"]
    with torch.no_grad():
        assert torch.isfinite(result.model(data[0])).all()
    assert "left whole: grouped" in str(result)
    assert {layer.layer for layer in low_rank(model, keep=0.95).layers} == {"conv", "idle"}


def test_a_model_that_is_one_layer():
    layer = randomise(nn.Linear(30, 30))
    result = low_rank(layer, keep=0.5)
    assert isinstance(result.model, nn.Sequential)
    assert result.params_after == count_params(result.model)
    assert layer.weight.shape == (30, 30)


def test_the_same_call_gives_the_same_network_and_no_random_state_is_touched():
    model = small_mlp(MLP)
    for method in ("alternating", "data"):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        first, second = (low_rank(model, [tensor(64, 24)], 0.5, method=method, seed=4) for _ in range(2))
        assert torch.equal(state, torch.get_rng_state())
        assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
        assert first.layers == second.layers
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_result_shows_itself():
    result = low_rank(small_mlp(MLP), keep=0.5)
    records = result.to_records()
    assert [record["layer"] for record in records] == ["fc1", "fc2", "fc3"]
    assert set(records[0]) >= {"folding", "slices", "rank", "params_before", "params_after", "error_exact"}
    fields = json.loads(result.to_json())
    assert fields["settings"] == {"keep": 0.5, "method": "alds", "measure": "params", "seed": 0}
    assert fields["params_after"] == result.params_after
    assert fields["layers"] == records
    assert "model" not in fields
    assert "fc2" in str(result)
    assert "method alds" in str(result)


def test_bad_input_is_refused_with_a_reason():
    model = small_mlp(MLP)
    with pytest.raises(TypeError, match="expected a torch"):
        low_rank("model")
    with pytest.raises(ValueError, match="method='svd'"):
        low_rank(model, method="svd")
    for keep in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="keep"):
            low_rank(model, keep=keep)
    for method in ("pca", "data", "refit"):
        with pytest.raises(ValueError, match="needs batches"):
            low_rank(model, method=method)
    with pytest.raises(ValueError, match="batches is empty"):
        low_rank(model, [], method="data")
    with pytest.raises(TypeError, match="one-pass"):
        low_rank(model, iter([tensor(4, 24)]), method="data")
    with torch.no_grad():
        model.fc2.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="'fc2' has NaN or Inf"):
        low_rank(model)


@pytest.mark.parametrize("method", ["alds", "alds+", "constant"])
def test_too_small_a_budget_says_what_is_possible(method):
    model = small_mlp(MLP)
    with pytest.raises(ValueError, match="use keep >= ") as caught:
        low_rank(model, keep=0.01, method=method)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    result = low_rank(model, keep=least + 1e-6, method=method)
    assert all(layer.rank == 1 for layer in result.layers)
    with pytest.raises(ValueError, match="use keep >= "):
        low_rank(model, keep=least - 1e-3, method=method)


def test_a_model_without_layers_to_replace():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    assert low_rank(model, keep=1.0).layers == ()
    with pytest.raises(ValueError, match="no layer can become low-rank:\n  0: it is a Conv1d"):
        low_rank(model, keep=0.5)
