"""Nodes or ranks: the search against enumeration, its costs against real networks, the result against both."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, small_mlp, snapshot, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import NETWORKS, network
from torch import nn

from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress import CalibrationData, count_flops, count_params, find_groups, prune
from specprune.compress.cost import CostModel, CostTerm, cost_model, layer_shares, module_flops
from specprune.compress.divergence import Reference
from specprune.compress.fitted_network import FittedNetworks, Start, kept_rows
from specprune.compress.hybrid import HybridNetworks, RankChoices, hybrid_widths
from specprune.compress.low_rank_allocation import Cut
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.low_rank_network import replace_layer
from specprune.compress.settings import Settings
from specprune.compress.surgery import remove_nodes
from specprune.testbed import Recipe, load_dataset, train


def random_setting(generator):
    """Two groups of four nodes between three layers, with falling random losses."""
    full = {"a": 4, "b": 4}
    sizes = {"one": float(generator.integers(8, 40)), "two": float(generator.integers(8, 40)), "three": 12.0}
    ends = {"one": ((), (("a", 1.0),)), "two": ((("a", 1.0),), (("b", 1.0),)), "three": ((("b", 1.0),), ())}
    cost = CostModel(full, tuple(CostTerm(sizes[name], *ends[name]) for name in sizes))

    def falling(count):
        return np.append(np.sort(generator.random(count) ** 3)[::-1], 0.0)

    losses = {name: np.concatenate([[math.inf], falling(3)]) for name in full}
    choices = {}
    for name in ("one", "two"):
        shares = np.array([0.2, 0.5, 0.8])
        inner = sizes[name] * shares * 0.5
        choices[name] = RankChoices(np.append(inner, 0.0), np.append(inner, 0.0), sizes[name], falling(3), *ends[name])
    return cost, losses, choices


def everything(cost, losses, choices):
    """Yield (cost, loss, widths) of every combination of widths and ranks."""
    for widths in itertools.product(*(range(1, full + 1) for full in cost.full.values())):
        now = dict(zip(cost.full, widths, strict=True))
        left = {name: now[name] / full for name, full in cost.full.items()}
        tables = [entry.at(left) for entry in choices.values()]
        for places in itertools.product(*(range(len(entry.losses)) for entry in choices.values())):
            spent = cost.total(now) + sum(saved[p] for (saved, _), p in zip(tables, places, strict=True))
            lost = sum(losses[name][k] for name, k in now.items())
            yield spent, lost + sum(loss[p] for (_, loss), p in zip(tables, places, strict=True)), now


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.95))
def test_the_search_is_near_the_best_of_all(seed, share):
    cost, losses, choices = random_setting(np.random.default_rng(seed))
    budget = share * cost.total()
    options = list(everything(cost, losses, choices))
    least = min((lost for spent, lost, _ in options if spent <= budget + 1e-9), default=None)
    if least is None:
        with pytest.raises(ValueError, match="ask for more"):
            hybrid_widths(cost, losses, choices, budget)
        return
    widths = hybrid_widths(cost, losses, choices, budget)
    found = min(lost for spent, lost, now in options if now == widths and spent <= budget + 1e-9)
    # Greedy steps overshoot on such coarse grids; they must not lose more than the next coarser budget would.
    tighter = min((lost for spent, lost, _ in options if spent <= 0.5 * budget), default=math.inf)
    assert least <= found <= max(tighter, least)


def test_what_costs_no_loss_goes_first():
    cost, losses, choices = random_setting(np.random.default_rng(1))
    free = {name: np.where(np.arange(5) >= 2, 0.0, 1.0) for name in losses}
    assert hybrid_widths(cost, free, choices, 0.5 * cost.total()) == {"a": 2, "b": 2}
    dear = {name: np.where(np.arange(5) >= 4, 0.0, 10.0) for name in losses}
    assert hybrid_widths(cost, dear, choices, 0.6 * cost.total()) == {"a": 4, "b": 4}
    assert hybrid_widths(cost, losses, choices, cost.total()) == {"a": 4, "b": 4}
    with pytest.raises(ValueError, match="one node in every group and rank 1"):
        hybrid_widths(cost, losses, choices, 0.01)


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_costs_are_those_of_real_networks(measure):
    """A network that has lost nodes, and then a layer its rank, costs what the search believes."""
    model, data, _ = network("basic residual")
    data = CalibrationData(data)
    structure = find_groups(model, data)
    original = structure.prepared(model)
    hybrids = HybridNetworks(model, data, Settings(keep=0.5, measure=measure, method="hybrid"))
    group = structure.groups[0]
    kept = {one.name: np.arange(one.width) for one in structure.groups}
    kept[group.name] = np.arange(group.width // 2)
    small = remove_nodes(original, structure.groups, kept)
    left = {one.name: len(kept[one.name]) / one.width for one in structure.groups}
    cost = cost_model(original, data, structure.groups, measure)
    name = group.consumer
    entry = hybrids.choices[name]
    place = next(p for p, cut in enumerate(hybrids.fitted.frontiers[name].cuts) if cut == Cut(0, 1, 1))
    saved, loss = entry.at(left)
    made = replace_layer(small, name, LayerSpectra(name, small.get_submodule(name)).build(0, 1, 1))
    count = count_params if measure == "params" else lambda net: count_flops(net, data)
    believed = cost.total({one.name: len(kept[one.name]) for one in structure.groups}) + saved[place]
    assert believed == pytest.approx(count(made), rel=1e-9)
    assert loss[place] == entry.losses[place]
    assert layer_shares(original, structure.groups)[0][name] == entry.inputs


def test_a_rank_that_saves_nothing_loses_nothing():
    entry = RankChoices(np.array([3.0, 0.0]), np.array([3.0, 0.0]), 10.0, np.array([0.7, 0.0]), (("a", 1.0),), ())
    saved, loss = entry.at({"a": 1.0})
    assert (saved.tolist(), loss.tolist()) == ([-4.0, 0.0], [0.7, 0.0])
    saved, loss = entry.at({"a": 0.25})  # dense: 2.5, low rank: .75 + 3
    assert (saved.tolist(), loss.tolist()) == ([0.0, 0.0], [0.0, 0.0])


@pytest.fixture(scope="module")
def digits():
    dataset = load_dataset("digits")
    model = train(dataset, Recipe("digits", "mlp-200-200-200", epochs=12, batch_size=64, learning_rate=5e-3)).model
    return model, CalibrationData(dataset.train_batches(limit=800)), CalibrationData(dataset.test_batches())


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["params", "flops"])
def test_it_never_loses_more_than_its_parents(digits, measure):
    model, data, test = digits
    before = snapshot(model)
    reference = Reference(model, data, 800)
    for keep in (0.3, 0.07):
        losses = {}
        for method in ("spectral", "fitted", "hybrid"):
            result = prune(model, data, keep, method=method, measure=measure)
            losses[method] = reference.divergence(result.model.eval())
            count = result.report.params_after if measure == "params" else result.report.flops_after
            whole = result.report.params_before if measure == "params" else result.report.flops_before
            assert 0.85 * keep * whole < count <= keep * whole
        assert losses["hybrid"] <= min(losses["spectral"], losses["fitted"]) * (1 + 1e-6)
    assert losses["hybrid"] < 0.8 * min(losses["spectral"], losses["fitted"])  # at the smaller size
    assert error_rate(*collect_logits(result.model, test)) < 0.1
    assert_unchanged(model, before)


def test_the_report_tells_of_nodes_and_ranks(digits):
    model, data, _ = digits
    result = prune(model, data, 0.15, method="hybrid")
    widths = {row.group: row.width_after for row in result.report.groups}
    assert {name: len(nodes.indices) for name, nodes in result.nodes.items()} == widths
    ranked = {row.layer: row for row in result.report.layers}
    assert set(ranked) == {"fc1", "fc2", "fc3", "fc4"}
    assert any(row.rank is not None for row in ranked.values())
    assert any(row.width_after < row.width_before for row in result.report.groups)
    assert len(result.report.to_records()) == len(result.report.groups) + len(result.report.layers)
    lines = str(result.report).splitlines()
    assert lines[1].startswith("group")
    assert any(line.startswith("layer ") for line in lines)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "bottleneck" or "norm" in name else [])
        for name in NETWORKS
        if name not in ("1d", "3d")
    ],
)
def test_networks_of_many_kinds(kind):
    model, data, fresh = network(kind)
    result = prune(model, data, 0.6, method="hybrid")
    assert result.report.flops_after <= 0.6 * result.report.flops_before
    with torch.no_grad():
        assert result.model(fresh).shape == model(fresh).shape


def test_the_candidate_that_diverges_least_is_taken(digits, monkeypatch):
    model, data, _ = digits
    hybrids = HybridNetworks(model, data, Settings(keep=0.3, method="hybrid"))
    made = {name: getattr(hybrids, name)(0.3) for name in ("_both", "_nodes", "_ranks")}
    for best in made:
        losses = {id(one.model): 1.0 - (name == best) for name, one in made.items()}
        for name, one in made.items():
            monkeypatch.setattr(hybrids, name, lambda keep, one=one: one)
        monkeypatch.setattr(hybrids.reference, "divergence", lambda net, losses=losses: losses[id(net)])
        assert hybrids.make(0.3) is made[best]
    assert (made["_nodes"].layers, made["_ranks"].groups, made["_ranks"].nodes) == ((), (), {})


def test_reports_are_of_the_network_that_came_out(digits):
    model, data, _ = digits
    hybrids = HybridNetworks(model, data, Settings(keep=0.15, method="hybrid"))
    made = hybrids._both(0.15)
    flops = module_flops(made.model, data)
    for row in made.groups:
        layer = made.model.get_submodule(row.group)
        assert row.params_after == count_params(layer)
        own = sum(value for name, value in flops.items() if name.split(".")[0] == row.group)
        assert row.flops_after == own
    assert any(len(list(made.model.get_submodule(row.group).children())) == 2 for row in made.groups)
    # A layer whose inputs have lost nodes has a residual, whether its rank fell or not.
    assert all(row.residual > 0 for row in made.layers[1:])


def test_ranks_alone_name_no_groups(digits, monkeypatch):
    model, data, _ = digits
    for name in ("_both", "_nodes"):
        monkeypatch.setattr(HybridNetworks, name, lambda *_: (_ for _ in ()).throw(ValueError("no")))
    result = prune(model, data, 0.3, method="hybrid")
    assert (result.groups, result.nodes, result.report.groups) == ((), {}, ())
    assert result.report.layers


def test_the_constant_of_a_norm_starts_from_the_originals():
    """After nodes went, the running mean that a fit moves is the original's, not the one that pruning moved before."""
    model, data, _ = network("basic residual")
    data = CalibrationData(data)
    hybrids = HybridNetworks(model, data, Settings(keep=0.6, method="hybrid"))
    widths = {group.name: max(1, group.width // 2) for group in hybrids.groups}
    small, nodes, _ = hybrids._without_nodes(widths)
    original = hybrids.context.original
    kept = {name: chosen.indices for name, chosen in nodes.items()}
    unfitted = remove_nodes(original, hybrids.groups, kept)
    start = Start(small, original, unfitted, kept_rows(original, hybrids.groups, kept))
    networks = FittedNetworks(start, data, "flops", None, 1e-6, 0)
    made, _ = networks.make(0.8)
    name = next(
        n for n, cut in ((n, made.get_submodule(n)) for n in networks.frontiers) if isinstance(cut, nn.Sequential)
    )
    norm = networks.norms[name]
    inputs: list[torch.Tensor] = []
    made.get_submodule(norm).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    targets: list[torch.Tensor] = []
    original.get_submodule(norm).register_forward_pre_hook(lambda _, args: targets.append(args[0]))
    with torch.no_grad():
        for batch in data.head():
            made(batch), original(batch)
    rows = networks.start.rows.get(name, slice(None))
    old = torch.cat([t.transpose(0, 1).flatten(1) for t in targets], 1)[rows].mean(1)
    old = old - original.get_submodule(norm).running_mean[rows]
    new = torch.cat([t.transpose(0, 1).flatten(1) for t in inputs], 1).mean(1) - made.get_submodule(norm).running_mean
    torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)


def test_without_nodes_to_remove_the_way_out_is_named():
    with pytest.raises(ValueError, match="method='fitted' removes no nodes"):
        prune(torch.nn.Linear(12, 8), [tensor(40, 12)], 0.5, method="hybrid")


def test_keeping_all_and_too_little():
    model, data = small_mlp((8, 12, 9, 3)), [tensor(60, 8)]
    whole = prune(model, data, 1.0, method="hybrid")
    with torch.no_grad():
        torch.testing.assert_close(whole.model(data[0]), model(data[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="ask for more"):
        prune(model, data, 0.001, method="hybrid")
