"""One call for every method: what comes back, what is refused, and that nothing of the caller's changes."""

import json

import pytest
import torch
from helpers import assert_unchanged, small_convnet, small_mlp, snapshot, tensor
from torch import nn

import specprune
from specprune.compress import count_flops, count_params
from specprune.compress.batches import CalibrationData
from specprune.compress.low_rank_network import low_rank
from specprune.compress.sampling import prune_by_sampling
from specprune.compress.settings import METHODS, SAMPLING_METHODS
from specprune.compress.sparsify import sparsify_by_sampling

OTHERS = tuple(method for method in METHODS if method != "spectral")


@pytest.fixture(scope="module")
def problem():
    return small_mlp((16, 24, 20, 4), seed=1), [tensor(40, 16, seed=seed).abs() for seed in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_smaller_network_and_its_report(problem, method):
    model, data = problem
    model.train()
    model.fc2.eval()
    before, state = snapshot(model), torch.get_rng_state()
    result = specprune.prune(model, data, 0.6, method=method, measure="params", seed=3)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    report = result.report
    assert report.settings["method"] == method
    assert (report.params_before, report.params_after) == (count_params(model), count_params(result.model))
    calibration = CalibrationData(data)
    assert (report.flops_before, report.flops_after) == tuple(
        count_flops(m, calibration) for m in (model, result.model)
    )
    assert report.samples == 120
    scatter = 1.3 if method in ("pfp-random", "pfp-hybrid") else 1.0
    assert method == "sipp" or 0.3 < report.params_after / report.params_before <= 0.6 * scatter
    assert (result.model.training, result.model.fc1.training, result.model.fc2.training) == (True, True, False)
    assert all(part.training for part in result.model.fc1.modules())
    for error in report.local_errors():
        assert error.measured <= error.promised * (1 + 1e-9)
    assert bool(report.local_errors()) == (method != "fitted")
    fields = json.loads(report.to_json())
    assert len(fields["layers"]) == len(report.layers)
    assert str(report).startswith("FLOPs ")


@pytest.mark.parametrize("method", OTHERS)
def test_a_sweep_gives_what_single_calls_give(problem, method):
    model, data = problem
    for result, keep in zip(
        specprune.prune_sweep(model, data, [0.8, 0.6], method=method, measure="params"), (0.8, 0.6), strict=True
    ):
        alone = specprune.prune(model, data, keep, method=method, measure="params")
        assert result.report.settings == alone.report.settings
        for a, b in zip(result.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_methods_are_the_functions_of_their_names(problem):
    model, data = problem
    for method in ("alds", "data", "pca", "lrank"):
        wanted = low_rank(model, data, 0.6, method=method, measure="flops")
        got = specprune.prune(model, data, 0.6, method=method)
        assert got.report.layers == wanted.layers
    for method, variant in SAMPLING_METHODS.items():
        wanted = prune_by_sampling(model, data, 0.6, variant=variant, measure="flops", seed=2)
        assert specprune.prune(model, data, 0.6, method=method, seed=2).report.layers == wanted.groups
    wanted = sparsify_by_sampling(model, data, 0.6)
    assert specprune.prune(model, data, 0.6, method="sipp", measure="params").report.layers == wanted.layers


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("method", [m for m in OTHERS if not m.startswith(("pfp-", "sipp"))])
def test_convolutions_meet_their_budget(method, measure):
    model, data = small_convnet(), [tensor(12, 2, 8, 8).abs()]
    result = specprune.prune(model, data, 0.75, method=method, measure=measure)
    report = result.report
    kept = (
        report.params_after / report.params_before if measure == "params" else report.flops_after / report.flops_before
    )
    assert kept <= 0.75


def test_strided_convolutions_in_other_foldings_pay_their_flops():
    model = nn.Sequential(nn.Conv2d(8, 10, 5, stride=(1, 2), padding=2), nn.ReLU(), nn.Conv2d(10, 8, 3, stride=(2, 1)))
    with torch.no_grad():  # kernels that are products along the axes, for which foldings 1 and 2 are made
        for layer in (model[0], model[2]):
            rows, columns = tensor(len(layer.weight), 1, layer.kernel_size[0], 1), tensor(layer.kernel_size[1], seed=2)
            mix = tensor(1, layer.in_channels, 1, 1, seed=3)
            layer.weight.copy_(rows * columns * mix)
    data = [tensor(6, 8, 17, 19)]
    result = specprune.prune(model, data, 0.3, method="alds+")
    assert result.report.flops_after <= 0.3 * result.report.flops_before
    assert any(row.folding for row in result.report.layers)
    with torch.no_grad():
        torch.testing.assert_close(result.model(data[0]), model(data[0]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["fitted", "hybrid", "alds"])
def test_distillation_comes_last(problem, method):
    model, data = problem
    plain = specprune.prune(model, data, 0.5, method=method)
    taught = specprune.prune(model, data, 0.5, method=method, distill_steps=30)
    inputs = torch.cat(data)
    with torch.no_grad():
        wanted = model.eval()(inputs).softmax(1)
        losses = [
            float((wanted * (wanted.log() - net.model.eval()(inputs).log_softmax(1))).sum()) for net in (plain, taught)
        ]
    assert losses[1] < losses[0]


def test_the_seed_of_the_distillation_is_the_callers(problem):
    model, data = problem[0], [tensor(300, 16)]  # a batch that is split
    one, again, two = (
        specprune.prune(model, data, 0.5, method="alds", distill_steps=5, seed=seed).model.fc3 for seed in (0, 0, 1)
    )
    weights = [next(layer.parameters()) for layer in (one, again, two)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_models_that_are_called_in_another_way_and_latency(monkeypatch):
    monkeypatch.setattr("specprune.compress.latency._SECONDS", 0.0)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_mlp((16, 24, 20, 4))

        def forward(self, *, pixels, scale):
            return {"out": self.inner(pixels) * scale}

    model, data = Named(), [tensor(40, 16)]

    def forward(net, batch):
        return net(pixels=batch, scale=2.0)["out"]

    for method in ("fitted", "hybrid", "alds", "pfp", "sipp"):
        result = specprune.prune(model, data, 0.7, method=method, measure="params", forward=forward, latency=True)
        assert [entry.batch for entry in result.report.latencies] == [1, 64]
        assert forward(result.model, data[0]).shape == (40, 4)


def test_cuts_without_reconstruction_promise_nothing(problem):
    model, data = problem
    bare = specprune.prune(model, data, 0.5, selection="random", allocation="uniform", reconstruction="none")
    assert bare.report.local_errors() == ()
    assert specprune.prune(model, data, 0.5, reconstruction="channel").report.local_errors()


def test_a_layer_that_runs_at_several_sizes_pays_for_all_of_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 24, 5)

        def forward(self, x):
            return sum(self.conv(part).mean((2, 3)) for part in (x[..., :6, :6], x[..., :7, :7], x))

    model, data = Net(), [tensor(6, 8, 9, 9)]
    with torch.no_grad():
        model.conv.weight.copy_(tensor(24, 1, 5, 1) * tensor(1, 8, 1, 5, seed=2) + 0.01 * tensor(24, 8, 5, 5, seed=3))
    for keep in (0.7, 0.5, 0.3):
        report = specprune.prune(model, data, keep, method="alds+").report
        assert report.flops_after <= keep * report.flops_before


@pytest.mark.parametrize("method", ["alds", "constant", "energy", "lrank"])
def test_a_layer_of_zeros_leaves_budgets_true(method):
    model = small_mlp((16, 24, 20, 24, 4), seed=1)
    with torch.no_grad():
        model.fc3.weight.zero_()
    full = low_rank(model, keep=1.0, method=method)
    assert full.params_after == full.params_before
    for keep in (0.5, 0.3):
        result = low_rank(model, keep=keep, method=method)
        assert 0.85 * keep < result.params_after / result.params_before <= keep


@pytest.mark.parametrize(
    ("method", "argument", "value"),
    [
        *(("alds", name, value) for name, value in (("theta", 0.5), ("allocation", "uniform"), ("positions", 8))),
        *(("hybrid", name, value) for name, value in (("selection", "greedy"), ("round_to", 8), ("lam", 1e-3))),
        *(("pfp", name, value) for name, value in (("ridge", 0.1), ("reconstruction", "none"))),
        ("sipp", "distill_steps", 5),
        ("fitted", "widths", {"fc1": 3}),
    ],
)
def test_arguments_without_a_meaning_are_refused(problem, method, argument, value):
    extra = {"measure": "params", argument: value}
    with pytest.raises(ValueError, match=argument):
        specprune.prune(*problem, 0.5, method=method, **extra)


def test_bad_input_is_refused(problem, monkeypatch):
    model, data = problem
    with pytest.raises(ValueError, match="method='svd'"):
        specprune.prune(model, data, 0.5, method="svd")
    with pytest.raises(ValueError, match="needs keep"):
        specprune.prune(model, data, method="alds")
    with pytest.raises(ValueError, match="measure='latency'"):
        specprune.prune(model, data, 0.5, method="alds", measure="latency")
    with pytest.raises(ValueError, match="no FLOPs are saved"):
        specprune.prune(model, data, 0.5, method="sipp")
    with pytest.raises(ValueError, match="neither moments nor scores"):
        specprune.prune(model, data, 0.5, method="alds", moments=specprune.collect_moments(model, data))
    with pytest.raises(TypeError, match="one-pass iterator"):
        specprune.prune(model, iter(data), 0.5, method="fitted")
    monkeypatch.setattr("specprune.compress.neighbours.is_parallel", lambda: True)
    with pytest.raises(ValueError, match="runs in one process"):
        specprune.prune(model, data, 0.5, method="alds")


@pytest.mark.parametrize("method", OTHERS)
def test_bad_numbers_are_named(method):
    model, data = small_mlp((16, 24, 20, 4), seed=1), [tensor(40, 16)]
    if method not in ("alds", "alds+", "alternating", "constant", "energy", "lrank"):  # which do not read the data
        data[0][2, 3] = float("inf")
        with pytest.raises(ValueError, match="NaN or Inf"):
            specprune.prune(model, data, 0.6, method=method, measure="params")
    with torch.no_grad():
        model.fc2.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc2"):
        specprune.prune(model, [tensor(40, 16)], 0.6, method=method, measure="params")
