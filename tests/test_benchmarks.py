import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import neighbours
import pairs
import peers
import pruning_quality

from specprune.compress.batches import CalibrationData
from specprune.compress.groups import find_groups
from specprune.compress.layers import get_layer, weight_matrix
from specprune.testbed import load_dataset
from specprune.testbed.networks import build_network


def labelled(*shape, classes=3, seed=0):
    targets = torch.randint(0, classes, (shape[0],), generator=torch.Generator().manual_seed(seed))
    return list(zip(tensor(*shape, seed=seed).split(8), targets.split(8), strict=True))


@pytest.fixture(scope="module")
def digits():
    dataset = load_dataset("digits")
    model = randomise(build_network("resnet-6-8", dataset), seed=1).eval()
    data = list(zip(dataset.train_inputs[:96].split(32), dataset.train_targets[:96].split(32), strict=True))
    return model, data, data[0][0][:1], find_groups(model, CalibrationData(data))


# Batch norms.


def test_reestimated_statistics_are_the_means_over_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    randomise(model)
    before = snapshot(model)
    batches = [(tensor(6, 3, 5, 5, seed=k) + k, torch.zeros(6)) for k in range(3)]
    result = peers.reestimate_norms(model, batches)
    for inside, images in ((0, [inputs for inputs, _ in batches]),):
        assert torch.allclose(
            result[inside].running_mean, torch.stack([x.mean((0, 2, 3)) for x in images]).mean(0), atol=1e-6
        )
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in images]).mean(0)
        assert torch.allclose(result[inside].running_var, variances, rtol=1e-5)
    assert not result.training
    assert result[0].momentum == 0.1
    assert not torch.allclose(result[2].running_mean, model[2].running_mean, atol=1e-3)
    assert_unchanged(model, before)


def test_reestimation_leaves_a_network_without_norms_alone():
    model = small_mlp().eval()
    result = peers.reestimate_norms(model, labelled(16, 8))
    assert torch.equal(result(tensor(4, 8)), model(tensor(4, 8)))


# Budgets.


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_uniform_widths_meet_the_budget_and_cannot_grow(digits, keep):
    model, _, example, structure = digits
    widths = peers.uniform_widths(model, example, structure.groups, keep)
    full = peers.flops_of(model, example)

    def fraction(chosen):
        kept = {name: np.arange(width) for name, width in chosen.items()}
        return peers.flops_of(peers.remove_nodes(model, structure.groups, kept), example) / full

    assert fraction(widths) <= keep
    shares = [widths[group.name] / group.width for group in structure.groups]
    assert max(shares) - min(shares) <= 1 / 6 + 1e-9 + 1 / 8
    for group in structure.groups:
        assert fraction({**widths, group.name: widths[group.name] + 1}) > keep


def test_a_budget_below_one_node_is_refused(digits):
    model, _, example, structure = digits
    with pytest.raises(ValueError, match="one node in every group"):
        peers.uniform_widths(model, example, structure.groups, 1e-4)


RULES = [(rule, "local") for rule in peers.TORCH_PRUNING_RULES] + [
    pytest.param(rule, "global", marks=[] if rule == "magnitude_l2" else [pytest.mark.slow])
    for rule in peers.TORCH_PRUNING_RULES
    if rule not in peers.LOCAL_ONLY
]


@pytest.mark.parametrize(("rule", "scope"), RULES)
def test_torch_pruning_rules_run_within_the_budget(digits, rule, scope):
    model, data, example, structure = digits
    before = snapshot(model)
    small = peers.torch_pruning_rival(model, example, data, 0.5, rule=rule, scope=scope, structure=structure)
    fraction = peers.flops_of(small, example) / peers.flops_of(model, example)
    widths = peers.uniform_widths(model, example, structure.groups, 0.5)
    assert 0.3 < fraction <= 0.5
    if scope == "local":
        for group in structure.groups:
            for entry in group.producers:
                assert len(get_layer(small, entry.module).weight) == widths[group.name]
    assert small(data[0][0]).shape == (32, 10)
    assert_unchanged(model, before)


@pytest.mark.parametrize("rule", ["taylor", "hessian", "obdc"])
def test_gradient_rules_run_on_layers_with_biases(rule):
    model, data = small_mlp((8, 40, 30, 3)).eval(), labelled(32, 8)
    structure = find_groups(model, CalibrationData(data))
    small = peers.torch_pruning_rival(model, data[0][0][:1], data, 0.5, rule=rule, structure=structure)
    assert small.fc1.out_features < 40


def test_norm_rule_does_not_apply_to_a_network_without_norms():
    model, data = small_mlp().eval(), labelled(32, 8)
    structure = find_groups(model, CalibrationData(data))
    with pytest.raises(peers.NotApplicableError, match="batch norms"):
        peers.torch_pruning_rival(model, data[0][0][:1], data, 0.5, rule="bn_scale", structure=structure)
    with pytest.raises(peers.NotApplicableError, match="fc1"):
        peers.scores(model, "bn_scale", data, structure)


def test_unknown_rules_are_refused(digits):
    model, data, example, structure = digits
    with pytest.raises(ValueError, match="nonsense"):
        peers.torch_pruning_rival(model, example, data, 0.5, rule="nonsense", structure=structure)
    with pytest.raises(ValueError, match="obdc"):
        peers.torch_pruning_rival(model, example, data, 0.5, rule="obdc", scope="global", structure=structure)
    with pytest.raises(ValueError, match="nonsense"):
        peers.scores(model, "nonsense", data, structure)


def test_squared_gradients_are_the_mean_over_single_images():
    model, data = small_mlp().eval(), labelled(10, 8)
    wanted = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for inputs, targets in data:
        for image, label in zip(inputs, targets, strict=True):
            for name, gradient in peers.loss_gradients(model, [(image[None], label[None])]).items():
                wanted[name] += gradient.square() / 10
    for name, value in peers._hessian(model, data, chunk=3).items():
        assert torch.allclose(value, wanted[name], rtol=1e-4, atol=1e-8), name


# ThiNet.


def test_contribution_form_is_the_inner_product_of_what_units_add():
    model = small_convnet().eval()
    group = find_groups(model, CalibrationData([tensor(4, 2, 8, 8)])).groups[-2]  # conv2 into fc1, four pixels each
    (entry, columns), *_ = peers.layer_slices(model, group)
    weight = weight_matrix(get_layer(model, entry.module)).double().numpy()
    rows = tensor(50, weight.shape[1], seed=3, dtype=torch.float64).numpy()
    parts = np.stack([rows[:, own] @ weight[:, own].T for own in columns])
    wanted = np.einsum("cno,dno->cd", parts, parts) / len(rows)
    assert np.allclose(peers.contribution_form(weight, rows.T @ rows / len(rows), columns), wanted)


@pytest.mark.parametrize("seed", range(6))
def test_each_removed_unit_is_the_best_one_by_brute_force(seed):
    basis = np.random.default_rng(seed).standard_normal((8, 9))
    removed = list(peers.least_contributions(basis.T @ basis, 7))
    for count in range(7):
        rest = [unit for unit in range(9) if unit not in removed[:count]]
        costs = [np.square(basis[:, [*removed[:count], unit]].sum(1)).sum() for unit in rest]
        assert removed[count] == rest[int(np.argmin(costs))]


def test_unit_factors_solve_the_least_squares():
    basis = np.random.default_rng(1).standard_normal((40, 6))
    kept = np.array([0, 2, 5])
    wanted = np.linalg.lstsq(basis[:, kept], basis.sum(1), rcond=None)[0]
    assert np.allclose(peers.unit_factors(basis.T @ basis, kept), wanted, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_thinet_meets_the_budget_and_keeps_the_model(digits, centred):
    model, data, example, structure = digits
    before = snapshot(model)
    small = peers.thinet_rival(model, example, data, 0.5, structure=structure, centred=centred)
    assert peers.flops_of(small, example) <= 0.5 * peers.flops_of(model, example)
    assert torch.isfinite(small(data[0][0])).all()
    assert_unchanged(model, before)


def test_thinet_removes_units_that_add_nothing():
    model, data = small_mlp((8, 12, 9, 3)).eval(), labelled(32, 8)
    with torch.no_grad():
        model.fc2.weight[:, ::2] = 0
        model.fc3.weight[:, ::2] = 0
    structure = find_groups(model, CalibrationData(data))
    keep = 0.5
    widths = peers.uniform_widths(model, data[0][0][:1], structure.groups, keep)
    assert widths["fc1"] >= 6
    assert widths["fc2"] >= 4
    small = peers.thinet_rival(model, data[0][0][:1], data, keep, structure=structure)
    assert torch.allclose(small(data[0][0]), model(data[0][0]), atol=1e-4)


# Scores.


def test_scores_sum_over_the_producers(digits):
    model, data, _, structure = digits
    group = next(group for group in structure.groups if len(group.producers) > 1)
    found = peers.scores(model, "magnitude_l2", data, structure)[group.name]
    wanted = sum(model.get_submodule(e.module).weight.detach().square().sum((1, 2, 3)) for e in group.producers)
    assert np.allclose(found, wanted.numpy(), rtol=1e-5)
    scales = peers.scores(model, "bn_scale", data, structure)[group.name]
    norms = [model.get_submodule(structure.direct[e.module]).weight.detach().abs() for e in group.producers]
    assert np.allclose(scales, sum(norms).numpy(), rtol=1e-5)


def test_scores_of_single_layers_against_slow_twins():
    model, data = small_mlp().eval(), labelled(32, 8)
    structure = find_groups(model, CalibrationData(data))
    weight = model.fc1.weight.detach().double()
    found = {
        rule: peers.scores(model, rule, data, structure)["fc1"] for rule in peers.SCORE_RULES if rule != "bn_scale"
    }
    assert np.allclose(found["magnitude_l1"], weight.abs().sum(1))
    assert np.allclose(found["fpgm"], torch.cdist(weight, weight).sum(1), rtol=1e-4)
    inputs, targets = (torch.cat(part) for part in zip(*data, strict=True))
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    assert np.allclose(found["taylor"], (model.fc1.weight * model.fc1.weight.grad).abs().sum(1).detach(), rtol=1e-4)
    squares = weight.square().sum(1)
    lamp = [float(value / squares[squares >= value].sum()) for value in squares]
    assert np.allclose(found["lamp"], lamp)
    assert np.array_equal(np.argsort(found["lamp"]), np.argsort(found["magnitude_l2"]))
    assert np.array_equal(found["random"], peers.scores(model, "random", data, structure)["fc1"])
    assert not np.array_equal(found["random"], peers.scores(model, "random", data, structure, seed=1)["fc1"])


# Pairs and tables.


def test_paired_interval_is_that_of_scipy():
    first, second = np.random.default_rng(0).standard_normal((2, 5))
    mean, half = pairs.paired_interval(first, second)
    result = stats.ttest_rel(first, second)
    low, high = result.confidence_interval(0.95)
    assert mean == pytest.approx((first - second).mean())
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(pairs.paired_interval([1.0], [0.5])[1])
    with pytest.raises(ValueError, match="got 2 and 1"):
        pairs.paired_interval([1.0, 2.0], [1.0])


def record(method, seed, accuracy, norms, **more):
    common = {"part": "oneshot", "task": "vgg", "keep": 0.3, "full_accuracy": 0.9, "flops": 0.3, "params": 0.3}
    scores = {"accuracy": accuracy, "accuracy_norms": norms, "kl": 0.2, "kl_norms": 0.1, "seconds": 1.0}
    return {**common, **scores, "method": method, "seed": seed, **more}


def test_summary_pairs_by_seed_and_favours_the_rivals():
    records = [
        record("ours:calibrated", 1, 0.80, 0.99),
        record("ours:calibrated", 2, 0.82, 0.99),
        record("ours:calibrated", 3, 0.10, 0.10),
        record("tp:lamp:local", 1, 0.10, 0.70),
        record("tp:lamp:local", 2, 0.10, 0.74),
        record("tp:fpgm:local", 1, 0.20, 0.50),
        record("thinet", 1, 0.75, 0.60),
        {**record("tp:bn_scale:local", 1, 0, 0), "skipped": "no norms"},
    ]
    rows = {row["method"]: row for row in pairs.summary(records, "ours:calibrated")}
    assert "tp:bn_scale:local" not in rows
    assert rows["tp:lamp:local"]["accuracy"] == pytest.approx(72)
    assert rows["tp:lamp:local"]["drop"] == pytest.approx(18)
    assert rows["tp:lamp:local"]["ours_minus"] == pytest.approx(9)
    assert rows["tp:lamp:local"]["pairs"] == 2
    assert rows["tp:lamp:local"]["ln_kl"] == pytest.approx(np.log(2))
    assert rows["thinet"]["accuracy"] == pytest.approx(75)
    assert "ours_minus" not in rows["ours:calibrated"]
    best = {row["rival"]: row["method"] for row in pairs.strongest(list(rows.values()))}
    assert best == {"best Torch-Pruning rule": "tp:lamp:local", "ThiNet-like": "thinet"}


def test_best_allocation_is_chosen_by_the_mean():
    records = [
        record("refit:taylor:uniform", 0, 0.5, 0.8),
        record("refit:taylor:uniform", 11, 0.5, 0.6),
        record("refit:taylor:calibrated", 0, 0.9, 0.1),
        record("refit:taylor:calibrated", 11, 0.4, 0.1),
        record("tp:lamp:local", 0, 1.0, 1.0),
    ]
    assert pairs.best_allocations(records) == {"vgg": {"0.3": {"taylor": "uniform"}}}


# Runs.


def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    pruning_quality.append_record(path, {"a": 1})
    with path.open("a") as stream:
        stream.write('{"a": 2, "b"')
    assert pruning_quality.read_records(path) == [{"a": 1}]
    pruning_quality.append_record(path, {"a": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": "nan"}]


def test_method_names_expand():
    assert pruning_quality.expand("tp-local,ours:uniform")[-1] == "ours:uniform"
    assert len(pruning_quality.expand("tp-local")) == len(peers.TORCH_PRUNING_RULES)
    everything = pruning_quality.expand("all")
    assert len(set(everything)) == len(everything)
    assert "thinet:centred" in everything


def test_finished_runs_are_skipped(tmp_path, monkeypatch, digits):
    model, data, example, structure = digits
    logits = [model(inputs).detach() for inputs, _ in data]
    case = pruning_quality.Case("vgg", 1, model, data, example, structure, data, logits)
    made = []
    monkeypatch.setattr(pruning_quality, "load_dataset", lambda name: "data")
    monkeypatch.setattr(pruning_quality, "make_case", lambda *arguments: made.append(arguments) or case)
    options = Namespace(
        part="oneshot", tasks="vgg", seeds="1", keeps="0.5", methods="thinet", calibration=96, tuning_images=False,
        limit=None, device="cpu", networks=tmp_path, results=tmp_path / "runs.jsonl", own=tmp_path / "own.json",
    )  # fmt: skip
    pruning_quality.run_all(options)
    pruning_quality.run_all(options)
    assert len(made) == 1
    found = pruning_quality.read_records(options.results)
    assert [run["method"] for run in found] == ["thinet", "thinet:centred"]
    assert found[0]["flops"] <= 0.5
    assert found[0]["full_accuracy"] == pruning_quality.measure(model, case)[0] == pruning_quality.full_accuracy(case)
    assert found[0]["kl"] > 0


def test_measured_divergence_of_the_network_from_itself_is_zero(digits):
    model, data, example, structure = digits
    case = pruning_quality.Case("vgg", 1, model, data, example, structure, data, [model(x).detach() for x, _ in data])
    accuracy, divergence = pruning_quality.measure(model, case)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    assert accuracy == right / 96
    assert divergence == pytest.approx(0, abs=1e-9)


# Neighbours.


def test_neighbours_are_paired_by_seed():
    def record(method, seed, accuracy, **more):
        fields = {"task": "vgg", "keep": 0.5, "full_accuracy": 0.9, "kl": 0.1, "params": 0.5, "flops": 0.6}
        fields |= {"density": 0.5, "promised": None, "measured": None, "seconds": 1.0, "tune": False}
        return {**fields, "method": method, "seed": seed, "accuracy": accuracy, **more}

    records = [record("hybrid", seed, 0.8 + 0.01 * seed) for seed in (1, 2, 3)]
    records += [record("alds", 1, 0.7), record("alds", 3, 0.76), record("alds", 2, 0.7, refused="no")]
    records += [record("alds", 1, 0.7, tune=True, tuned_accuracy=0.85)]
    ours, rival = sorted(neighbours.summary(records, "hybrid"), key=lambda row: row["method"] != "hybrid")
    assert (ours["method"], ours["seeds"], rival["method"], rival["seeds"]) == ("hybrid", 3, "alds", 2)
    assert ours["accuracy"] == pytest.approx(82)
    assert ours["drop"] == pytest.approx(8)
    assert "ours_minus" not in ours
    differences = np.array([11.0, 7.0])
    assert rival["ours_minus"] == pytest.approx(differences.mean())
    half = stats.t.ppf(0.975, 1) * differences.std(ddof=1) / np.sqrt(2)
    assert rival["half_width"] == pytest.approx(half)
    assert (rival["tuned_accuracy"], rival["tuned_seeds"]) == (pytest.approx(85), 1)
    assert "tuned_ours_minus" not in rival  # ours was not tuned
