"""Rules that choose units: against brute force, and what the best of several proposals promises."""

import numpy as np
import pytest
import torch
from helpers import randomise, small_convnet, small_mlp, tensor
from torch import nn

from specprune.compress import CalibrationData, collect_moments, find_groups, latency, prune
from specprune.compress.choice import thinet_units
from specprune.compress.divergence import output_divergence
from specprune.compress.latency import measure_latency
from specprune.compress.reconstruction import problem_from_moments
from specprune.compress.statistics import contribution_gram, producer_norms

FLAT, IMAGES = [tensor(40, 8), tensor(20, 8, seed=1)], [tensor(20, 2, 8, 8)]
NETWORKS = {"mlp": (small_mlp, FLAT), "convnet": (small_convnet, IMAGES)}


@pytest.mark.parametrize("seed", range(5))
def test_thinet_drops_what_adds_least_together(seed):
    generator = np.random.default_rng(seed)
    parts = generator.standard_normal((12, 60)) + generator.standard_normal(60)  # contributions on 60 samples
    gram = parts @ parts.T / 60
    dropped = []
    for _ in range(9):
        left = [unit for unit in range(12) if unit not in dropped]
        dropped.append(min(left, key=lambda unit: np.square(parts[[*dropped, unit]].sum(0)).mean()))
        kept = sorted(set(range(12)) - set(dropped))
        assert thinet_units(gram, len(kept)).tolist() == kept
    assert thinet_units(gram, 12).tolist() == list(range(12))


@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_are_those_of_the_layer_itself(name):
    make, data = NETWORKS[name]
    model, batch = make().double().eval(), data[0].double()
    calibration = CalibrationData([batch])
    for group in find_groups(model, calibration).groups:
        layer = model.get_submodule(group.consumer)
        moments = collect_moments(model, calibration, [group.consumer], level="patch")[group.consumer]
        problem = problem_from_moments(model, group.consumer, moments, intercept=False)
        found = contribution_gram(model, group, {group.consumer: problem})
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(batch)
        hook.remove()
        parts = []
        for unit in range(group.width):
            alone = torch.zeros_like(seen[0])
            index = torch.as_tensor(group.consumers[0].index[unit])
            alone[:, index] = seen[0][:, index]
            with torch.no_grad():
                outputs = layer(alone) - (layer(torch.zeros_like(alone)))
            parts.append(outputs.transpose(0, 1).flatten())
        parts = torch.stack(parts).numpy()
        expected = parts @ parts.T
        total = np.square(parts.sum(0)).sum()
        np.testing.assert_allclose(found, expected / total, rtol=1e-8, atol=1e-12)


def test_magnitudes_are_sums_over_the_weights_that_make_a_node():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    model = randomise(Sum())
    (group,) = find_groups(model, CalibrationData(FLAT)).groups
    weights = torch.cat([model.a.weight, model.b.weight], 1).detach().double().numpy()
    np.testing.assert_allclose(producer_norms(model, group, 1), np.abs(weights).sum(1), rtol=1e-12)
    np.testing.assert_allclose(producer_norms(model, group, 2), np.square(weights).sum(1), rtol=1e-12)
    for rule, sizes in (("magnitude_l1", np.abs(weights).sum(1)), ("magnitude", np.square(weights).sum(1))):
        pruned = prune(model, FLAT, widths={group.name: 3}, selection=rule)
        assert pruned.nodes[group.name].indices.tolist() == sorted(np.argsort(-sizes)[:3].tolist())


@torch.no_grad()
def divergence(model, pruned, data):
    parts = [(len(batch), output_divergence(model(batch), pruned.eval()(batch))) for batch in data]
    return float(sum(count * value for count, value in parts) / sum(count for count, _ in parts))


@pytest.mark.parametrize("reconstruction", ["sequential", "patch"])
@pytest.mark.parametrize("seed", range(6))
def test_thorough_is_never_worse_on_its_own_data(reconstruction, seed):
    model = small_mlp((8, 16, 4), seed).double().eval()
    data = [batch.double() for batch in FLAT]
    found = {
        rule: divergence(
            model, prune(model, data, widths={"fc1": 6}, selection=rule, reconstruction=reconstruction).model, data
        )
        for rule in ("thorough", "backward", "greedy", "magnitude")
    }
    assert found["thorough"] <= min(found.values()) * (1 + 1e-9)
    assert found["thorough"] > 0


def test_distillation_comes_nearer_without_labels():
    model = small_mlp((8, 24, 20, 4)).eval()
    data = [tensor(200, 8, seed=seed) for seed in range(3)]
    fresh = [tensor(300, 8, seed=9)]
    plain = prune(model, data, 0.3).model
    state = torch.get_rng_state()
    tuned = prune(model, data, 0.3, distill_steps=300).model
    assert torch.equal(torch.get_rng_state(), state)
    assert divergence(model, tuned, data) < 0.85 * divergence(model, plain, data)
    assert divergence(model, tuned, fresh) < divergence(model, plain, fresh)
    labelled = prune(model, [(batch, torch.zeros(200)) for batch in data], 0.3, distill_steps=300).model
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), labelled.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tuned.parameters())
    other = prune(model, data, 0.3, distill_steps=300, seed=1).model
    assert not all(torch.equal(a, b) for a, b in zip(tuned.parameters(), other.parameters(), strict=True))


def test_distillation_keeps_the_statistics_of_batch_norms():
    model = small_convnet().train()
    plain, tuned = (prune(model, IMAGES, 0.5, distill_steps=steps).model for steps in (0, 5))
    for name, value in plain.named_buffers():
        assert torch.equal(value, dict(tuned.named_buffers())[name]), name
    assert not torch.equal(plain.conv1.weight, tuned.conv1.weight)
    assert tuned.training


def test_times_are_measured():
    small, large = small_mlp((8, 12, 3)), small_mlp((8, 2000, 2000, 3)).train()
    found = measure_latency(large, small, CalibrationData(FLAT), (1, 64))
    assert [entry.batch for entry in found] == [1, 64]
    assert all(0 < entry.after_ms < entry.before_ms for entry in found)
    assert all(entry.speed_up == entry.before_ms / entry.after_ms for entry in found)
    assert large.training


def test_a_budget_of_time_gives_a_network(monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 0.03)
    model = small_mlp((8, 800, 800, 3), 1).eval()
    options = {"allocation": "uniform", "selection": "magnitude", "reconstruction": "none"}
    pruned = prune(model, FLAT, 0.6, measure="latency", latency=True, **options)
    assert all(row.width_after < row.width_before for row in pruned.report.groups)
    assert [entry.batch for entry in pruned.report.latencies] == [1, 64]
    assert "latency, batch of 64" in str(pruned.report)
    with pytest.raises(ValueError, match=r"keep=1e-09 of the latency: the fastest network tried takes"):
        prune(model, FLAT, 1e-9, measure="latency", **options)
