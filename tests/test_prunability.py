"""Prunability: closed forms, an exhaustive twin, nets with free weights and free nodes, invariances, refusals."""

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from specprune.analysis.prunability import _boundary, _search, prunability, spectral_prunability
from specprune.compress.pruning import prune


def fitted_mlp(seed, widths=(6, 8, 3), n=40, steps=60):
    """A small double-precision network trained on random labels, and its data."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, widths[0], generator=generator, dtype=torch.float64)
    targets = torch.randint(widths[-1], (n,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, inputs, targets


def pruned_loss(model, inputs, targets, kept):
    """Loss with the `kept` largest weights of the Linear and Conv2d layers left, by plain NumPy sorting."""
    work = copy.deepcopy(model).eval()
    layers = [m for m in work.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    sizes = np.concatenate([layer.weight.detach().abs().numpy().ravel() for layer in layers])
    threshold = np.sort(sizes)[::-1][kept - 1]
    with torch.no_grad():
        for layer in layers:
            layer.weight[layer.weight.abs() < threshold] = 0
        outputs = work(inputs)
        shifted = outputs - outputs.logsumexp(1, keepdim=True)
        return -float(shifted[torch.arange(len(targets)), targets].mean())


def sum_classifier(weights):
    """Two classes, one example of ones: the first logit is the sum of the weights that are left, the second 0."""
    model = nn.Linear(len(weights), 2, bias=False).double()
    with torch.no_grad():
        model.weight[0] = torch.tensor(weights, dtype=torch.float64)
        model.weight[1] = 0
    return model, torch.ones(3, len(weights), dtype=torch.float64), torch.zeros(3, dtype=torch.int64)


def softplus(value):
    return math.log1p(math.exp(value))


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 10.0])
def test_magnitude_closed_form(beta):
    weights = np.random.default_rng(3).exponential(0.08, size=50)
    found = prunability(*sum_classifier(weights), absolute=(beta,), relative=(beta,), resolution=0.0)
    whole = softplus(-weights.sum())
    sums = np.cumsum(np.sort(weights)[::-1])
    assert found.loss == pytest.approx(whole, rel=1e-12)
    for kind, limit in (("absolute", whole + beta), ("relative", (1 + beta) * whole)):
        holding = [k for k in range(1, 101) if softplus(-sums[min(k, 50) - 1]) <= limit]
        assert found.fraction(kind, beta) == min(holding) / 100


def test_random_closed_form():
    weights = np.random.default_rng(4).exponential(0.1, size=40)
    found = prunability(*sum_classifier(weights), "random", masks=7, seed=11, resolution=0.0)
    generator = np.random.default_rng(11)
    orders = [generator.permutation(80) for _ in range(7)]
    padded = np.concatenate([weights, np.zeros(40)])
    curve = {k: np.mean([softplus(-padded[order[:k]].sum()) for order in orders]) for k in range(1, 81)}
    for fraction, loss in zip(found.fractions, found.losses, strict=True):
        assert loss == pytest.approx(curve[round(80 * fraction)], rel=1e-12)
    for kind, limit in (("absolute", curve[80] + 0.1), ("relative", 1.1 * curve[80])):
        assert found.fraction(kind) == min(k for k in curve if curve[k] <= limit) / 80
    assert prunability(*sum_classifier(weights), "random", seed=12).losses != found.losses


def test_weights_into_blank_inputs_are_free_where_they_are_small():
    model = nn.Linear(10, 2).double()
    inputs = torch.zeros(30, 10, dtype=torch.float64)
    inputs[:, :3] = torch.rand(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        model.weight[:, :3] = torch.tensor([[3.0, 2.0, 1.0], [-2.5, -1.5, -1.2]])  # all speak for class 0
        model.weight[:, 3:] = 0.01 * torch.arange(1, 15).reshape(2, 7)
    data = inputs, torch.zeros(30, dtype=torch.int64)
    found = prunability(model, *data, absolute=(1e-6,), relative=(1e-6,), resolution=0)
    assert [(entry.fraction, entry.broken) for entry in found.tolerances] == [(6 / 20, 5 / 20)] * 2
    with torch.no_grad():
        model.weight[:, 3:] *= 1000  # now they are the largest, and the live ones go first
    found = prunability(model, *data, absolute=(1e-6,), relative=(1e-6,))
    assert [(entry.fraction, entry.broken) for entry in found.tolerances] == [(1.0, 19 / 20)] * 2


def test_agrees_with_the_exhaustive_twin():
    exact = 0
    for seed in range(6):
        model, inputs, targets = fitted_mlp(seed)
        count = 6 * 8 + 8 * 3
        losses = {k: pruned_loss(model, inputs, targets, k) for k in range(1, count + 1)}
        found = prunability(model, inputs, targets, absolute=(0.1, 0.02), resolution=0.0)
        for fraction, loss in zip(found.fractions, found.losses, strict=True):
            assert loss == pytest.approx(losses[round(fraction * count)], rel=1e-10)
        for entry in found.tolerances:
            kept, broken = round(entry.fraction * count), round(entry.broken * count)
            limit = losses[count] + entry.beta if entry.kind == "absolute" else (1 + entry.beta) * losses[count]
            assert entry.limit == pytest.approx(limit, rel=1e-10)
            assert (losses[kept] <= limit, losses[broken] > limit, broken) == (True, True, kept - 1)
            definition = min(k for k in losses if all(losses[j] <= limit for j in range(k, count + 1)))
            assert kept <= definition  # it can only miss a rise between measured fractions
            exact += kept == definition
    assert exact >= 15  # of 18


def test_convolutions_with_frozen_batch_norms():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3)
        )
        inputs, targets = torch.randn(700, 1, 6, 6), torch.randint(3, (700,))
        model(inputs)  # moves the statistics
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = prunability(model, inputs, targets, absolute=(0.02, 0.2))
    prunability(model, inputs, targets, "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    count = 36 + 192
    for fraction, loss in zip(found.fractions[:12], found.losses, strict=False):
        assert fraction * count == pytest.approx(round(fraction * count))
        assert loss == pytest.approx(pruned_loss(model, inputs, targets, round(fraction * count)), rel=1e-5)


def test_a_shared_weight_counts_once():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, last = nn.Linear(5, 5), nn.Linear(5, 5)
        last.weight = first.weight
        inputs, targets = torch.randn(20, 5), torch.randint(5, (20,))
    found = prunability(nn.Sequential(first, nn.ReLU(), last), inputs, targets, absolute=(1e3,), relative=())
    assert (found.fraction("absolute", 1e3), found.tolerances[0].broken) == (1 / 25, None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=200), st.floats(0, 0.5), st.floats(0, 0.5))
def test_search_meets_the_definition_at_all_measured_sizes(losses, beta, gamma):
    limits = [("absolute", beta), ("relative", gamma)]
    curve = _search(lambda kept: losses[kept - 1], len(losses), limits, 0.0)
    assert all(loss == losses[kept - 1] for kept, loss in curve.items())
    for limit in (losses[-1] + beta, (1 + gamma) * losses[-1]):
        held, broken = _boundary(curve, limit)
        assert all(loss <= limit for kept, loss in curve.items() if kept >= held)
        if broken is None:
            assert held == 1
        else:
            assert broken == held - 1
            assert losses[broken - 1] > limit


def test_resolution_is_kept():
    model, inputs, targets = fitted_mlp(3, (20, 30, 4), 60)
    for resolution in (0.01, 0.2):
        found = prunability(model, inputs, targets, absolute=(0.1, 1.0), resolution=resolution)
        for entry in found.tolerances:
            share = max(1 / 720, resolution * min(entry.fraction, 1 - entry.broken))
            assert 0 < entry.fraction - entry.broken <= share + 1e-12


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["magnitude", "random"]))
def test_order_of_examples_and_tolerances(seed, rule):
    model, inputs, targets = fitted_mlp(seed % 5)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    betas = (0.01, 0.1, 0.4)
    one = prunability(model, inputs, targets, rule, absolute=betas, seed=3)
    other = prunability(model, inputs[order], targets[order], rule, absolute=betas, seed=3)
    assert one.fractions == other.fractions
    assert [t.fraction for t in one.tolerances] == [t.fraction for t in other.tolerances]
    answers = [one.fraction("absolute", beta) for beta in betas]
    assert answers == sorted(answers, reverse=True)
    assert all(0 < entry.fraction <= 1 for entry in one.tolerances)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_nodes(seed):
    model, inputs, targets = fitted_mlp(seed % 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight.copy_(model[0].weight[order])
        moved[0].bias.copy_(model[0].bias[order])
        moved[2].weight.copy_(model[2].weight[:, order])
    one, other = (prunability(net, inputs, targets, resolution=0.0) for net in (model, moved))
    assert one.fractions == other.fractions
    assert one.losses == pytest.approx(other.losses, rel=1e-9)


def duplicated(distinct, copies, seed=0):
    """A network whose hidden nodes come in identical copies, with data that it answers right."""
    generator = torch.Generator().manual_seed(seed)
    first, second = nn.Linear(6, distinct * copies), nn.Linear(distinct * copies, 3)
    with torch.no_grad():
        rows = torch.randn(distinct, 6, generator=generator)
        first.weight.copy_(rows.repeat(copies, 1))
        first.bias.copy_((0.3 * torch.randn(distinct, generator=generator)).repeat(copies))
        second.weight.copy_(torch.randn(3, distinct * copies, generator=generator) * 2)
        second.bias.zero_()
    model = nn.Sequential(first, nn.ReLU(), second)
    inputs = torch.randn(200, 6, generator=generator)
    return model, inputs, model(inputs).argmax(1)


@pytest.mark.parametrize("measure", ["nodes", "flops"])
def test_copies_of_nodes_are_free(measure):
    found = spectral_prunability(*duplicated(5, 2), measure=measure, absolute=(1e-3,), relative=(0.01,))
    for entry in found.tolerances:
        assert entry.fraction == pytest.approx(0.5)
        assert entry.broken == pytest.approx(0.4)
    single = spectral_prunability(*duplicated(5, 1), measure=measure, absolute=(1e-3,), relative=(0.01,))
    assert [entry.fraction for entry in single.tolerances] == [1.0, 1.0]
    assert [entry.broken for entry in single.tolerances] == pytest.approx([0.8, 0.8])


def test_a_network_of_one_node_reaches_the_smallest_network():
    found = spectral_prunability(*duplicated(1, 64), measure="nodes")
    assert [(entry.fraction, entry.broken) for entry in found.tolerances] == [(1 / 64, None)] * 2


@pytest.mark.parametrize("measure", ["nodes", "flops", "params"])
def test_spectral_curve_is_that_of_prune(measure):
    model, inputs, targets = fitted_mlp(1, (6, 12, 10, 3), 60)
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = spectral_prunability(model, inputs, targets, calibration=inputs[:40], measure=measure)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.fractions[0] == 1.0
    small = prune(model, [inputs[:40]], 0.6, measure=measure).model.eval()
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(small(inputs), targets))
    widths = [small[k].out_features for k in (0, 2)]
    sizes = {
        "nodes": sum(widths) / 22,
        "flops": (6 * widths[0] + widths[0] * widths[1] + 3 * widths[1]) / (72 + 120 + 30),
        "params": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
    }
    place = np.argmin(np.abs(np.array(found.fractions) - sizes[measure]))
    assert found.fractions[place] == pytest.approx(sizes[measure])
    assert found.losses[place] == pytest.approx(loss, rel=1e-9)
    for entry in found.tolerances:
        held = [loss <= entry.limit for loss in found.losses]
        first = held.index(False) if False in held else len(held)
        assert entry.fraction == found.fractions[first - 1]
        assert entry.broken == (found.fractions[first] if first < len(held) else None)


def test_results_show_themselves():
    found = prunability(*fitted_mlp(0))
    assert json.loads(found.to_json())["fractions"] == list(found.fractions)
    assert [record["kind"] for record in found.to_records()] == ["absolute", "relative"]
    assert "magnitude" in str(found)
    with pytest.raises(ValueError, match="no tolerance"):
        found.fraction("absolute", 0.3)


def test_refusals():
    model, inputs, targets = fitted_mlp(0)
    cases = [
        ({"rule": "largest"}, ValueError, "rule='largest'"),
        ({"absolute": (), "relative": ()}, ValueError, "both empty"),
        ({"absolute": (-0.1,)}, ValueError, "absolute must be"),
        ({"relative": 0.1}, TypeError, "sequence of tolerances"),
        ({"resolution": 1.0}, ValueError, "resolution"),
        ({"rule": "random", "masks": 0}, ValueError, "masks"),
        ({"rule": "random", "seed": -1}, ValueError, "seed"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            prunability(model, inputs, targets, **arguments)
    for bad_inputs, bad_targets, error, message in [
        (inputs.numpy(), targets, TypeError, "inputs is a ndarray"),
        (inputs, targets[:-1], ValueError, "int64 of shape"),
        (inputs, targets.double(), ValueError, "int64 of shape"),
        (inputs, targets + 3, ValueError, "expected integers from 0 to"),
        (inputs * math.nan, targets, ValueError, "NaN or Inf"),
        (inputs[:0], targets[:0], ValueError, "n at least 1"),
    ]:
        for function in (prunability, spectral_prunability):
            with pytest.raises(error, match=message):
                function(model, bad_inputs, bad_targets)
    with pytest.raises(ValueError, match="measure='weights'"):
        spectral_prunability(model, inputs, targets, measure="weights")
    with pytest.raises(ValueError, match="no Linear or convolution"):
        prunability(nn.Flatten(), inputs, targets)
    with pytest.raises(ValueError, match="computed from other parameters"):
        prunability(parametrizations.weight_norm(nn.Linear(6, 3).double()), inputs, targets)
    with pytest.raises(ValueError, match="no running statistics"):
        prunability(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), *model).double(), inputs, targets)
    with pytest.raises(ValueError):
        spectral_prunability(nn.Linear(6, 3).double(), inputs, targets)
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or Inf entries"):
        prunability(model, inputs, targets)
