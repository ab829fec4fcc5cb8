"""Pruning end to end: what goes in stays, what comes out is smaller, works, and is what the report says."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, small_convnet, small_mlp, snapshot, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.bounds.degrees_of_freedom import leverage_scores
from specprune.compress import CalibrationData, collect_moments, count_flops, find_groups, prune, remove_nodes
from specprune.compress.choice import SELECTIONS
from specprune.compress.reconstruction import RECONSTRUCTIONS
from specprune.compress.statistics import node_statistics
from specprune.testbed import Recipe, evaluate, load_dataset, train

FLAT, IMAGES = [tensor(30, 8), tensor(10, 8, seed=1)], [tensor(20, 2, 8, 8)]
RULES = tuple(rule for rule in SELECTIONS if rule != "scores")  # those that need nothing from the caller
NETWORKS = {"mlp": (small_mlp, FLAT), "convnet": (small_convnet, IMAGES)}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return train(digits, Recipe("digits", "mlp-64-48", epochs=12, batch_size=64, learning_rate=5e-3)).model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("allocation", ["calibrated", "sensitivity", "uniform", "dof"])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_keeping_everything_changes_nothing(name, allocation, reconstruction):
    make, data = NETWORKS[name]
    model = make().eval()
    pruned = prune(model, data, 1.0, allocation=allocation, reconstruction=reconstruction)
    assert torch.equal(pruned.model(data[0]), model(data[0]))
    for row in pruned.report.groups:
        assert (row.width_after, row.s) == (row.width_before, 1.0)
        assert row.leverage_kept == pytest.approx(1)
    assert pruned.report.flops_after == pruned.report.flops_before
    assert all(np.array_equal(nodes.weights, np.ones(len(nodes.weights))) for nodes in pruned.nodes.values())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_the_callers_model_and_the_random_state_stay(name, reconstruction):
    make, data = NETWORKS[name]
    model = make().train()
    next(model.children()).eval()
    before = snapshot(model)
    kept = [batch.clone() for batch in data]
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pruned = prune(model, data, 0.5, reconstruction=reconstruction, selection="leverage", positions=3)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
    assert torch.is_grad_enabled()
    after = snapshot(pruned.model)
    assert after[1:] == before[1:]  # gradient flags, modes of every module, and no hooks left
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in pruned.model.parameters()}


def dense_values(model, group, data, nodes, lam_relative, norm):
    """lam, dof, kept leverage, c, s and the losses, each from its definition."""
    seen = []
    handle = dict(model.named_modules())[group.consumer].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    inputs = torch.cat(seen).double()
    if inputs.dim() == 2 and group.slots > 1:
        inputs = inputs.reshape(len(inputs), group.width, group.slots)
    rows = inputs.movedim(1, -1).reshape(-1, group.width).numpy()
    s = rows.T @ rows / len(rows)
    weight = dict(model.named_modules())[group.consumer].weight.detach().double()
    if norm is not None:
        layer = dict(model.named_modules())[norm]
        gain = (layer.weight / torch.sqrt(layer.running_var + layer.eps)).detach().double()
        weight = weight * gain.reshape(-1, 1, 1, 1)
    z = weight.reshape(len(weight), group.width, -1).permute(2, 0, 1).reshape(-1, group.width).numpy()
    lam = lam_relative * np.trace(s)
    whole = np.linalg.solve((s + lam * np.eye(len(s))).T, s.T).T
    dof = np.trace(whole)
    q = np.diag(whole) / dof
    kept = nodes.indices
    q = np.maximum(q, np.finfo(float).eps / len(q))  # dead nodes: the smallest weight there is
    with np.errstate(divide="ignore"):
        live = 1 / (q[kept] * len(kept))
    # A node that carries nothing has no leverage; its weight is tiny, so that s is about the others.
    omega = np.ones(len(kept)) if len(kept) == group.width else np.where(q[kept] < 1e-15 / len(q), 1e-12, live)
    block = s[np.ix_(kept, kept)] + lam * np.diag(1 / omega)
    residual = s - s[:, kept] @ np.linalg.solve(block, s[kept])
    return {
        "lam": lam,
        "dof": dof,
        "leverage_kept": q[kept].sum(),
        "c": np.linalg.eigvalsh(residual)[-1] / lam,
        "s": omega.sum() / group.width,
        "input_loss": np.trace(residual) / np.trace(s),
        "output_loss": np.trace(z @ residual @ z.T) / np.trace(z @ s @ z.T),
    }


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("selection", RULES)
def test_the_report_says_what_is_so(name, selection):
    make, data = NETWORKS[name]
    model = make().double().eval()
    data = [batch.double() for batch in data]
    pruned = prune(model, data, 0.5, selection=selection, lam=1e-3)
    norms = {group.name: group.direct_norm for group in pruned.groups}
    for row, group in zip(pruned.report.groups, pruned.groups, strict=True):
        expected = dense_values(model, group, data, pruned.nodes[group.name], 1e-3, norms.get(group.consumer))
        for field, value in expected.items():
            assert getattr(row, field) == pytest.approx(value, rel=1e-7, abs=1e-12), (group.name, field)
        assert (row.group, row.consumer, row.width_before) == (group.name, group.consumer, group.width)
        assert row.width_after == len(pruned.nodes[group.name].indices)
        assert np.all(np.diff(pruned.nodes[group.name].indices) > 0)
        for net, params, flops in (
            (model, row.params_before, row.flops_before),
            (pruned.model, row.params_after, row.flops_after),
        ):
            parts = [net.get_submodule(part) for part in (group.name, *group.norms)]
            assert params == sum(p.numel() for part in parts for p in part.parameters())
            layer, pixels = parts[0], []
            hook = layer.register_forward_hook(
                lambda _, __, out, seen=pixels: seen.append(out[0].numel() // len(out[0]))
            )
            net(data[0])
            hook.remove()
            assert flops == 2 * layer.weight.numel() * pixels[0]
    report = pruned.report
    assert report.samples == sum(map(len, data))
    assert report.flops_after == count_flops(pruned.model, CalibrationData(data))
    assert report.params_after == sum(p.numel() for p in pruned.model.parameters())
    assert report.params_before == sum(p.numel() for p in model.parameters())
    assert report.seconds >= sum(row.seconds for row in report.groups) > 0


def test_dead_nodes_that_are_kept_do_not_break_the_hypotheses():
    model = small_mlp((8, 12, 9, 3))
    with torch.no_grad():
        model.fc1.weight[3:9] = 0
        model.fc1.bias[3:9] = -1
    pruned = prune(model, FLAT, widths={"fc1": 8}, lam=1e-3, reconstruction="channel")
    row = pruned.report.groups[0]
    assert np.isin(pruned.nodes["fc1"].indices, np.arange(3, 9)).any()
    assert 0 < row.s < 1
    assert row.c < 2


def test_a_forward_that_leaves_out_the_root_is_counted():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_mlp((8, 12, 9, 3))

    pruned = prune(Wrapped(), FLAT, 0.4, forward=lambda model, batch: model.body(batch))
    assert pruned.report.flops_before == 2 * (8 * 12 + 12 * 9 + 9 * 3)
    assert 0 < pruned.report.flops_after <= 0.4 * pruned.report.flops_before


def test_reports_can_be_read_and_stored():
    report = prune(small_mlp(), FLAT, 0.5).report
    stored = json.loads(report.to_json())
    assert stored["settings"]["keep"] == 0.5
    assert stored["groups"][0]["group"] == "fc1"
    assert report.to_records()[1]["consumer"] == "fc3"
    text = str(report)
    assert f"FLOPs {report.flops_before} -> {report.flops_after}" in text
    assert len(text.splitlines()) == 5


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(NETWORKS)),
    measure=st.sampled_from(["flops", "params", "nodes"]),
    allocation=st.sampled_from(["calibrated", "sensitivity", "uniform", "dof"]),
    keep=st.floats(0.35, 1.0),
)
def test_budgets_hold_for_the_real_network(name, measure, allocation, keep):
    make, data = NETWORKS[name]
    report = prune(make(), data, keep, measure=measure, allocation=allocation, reconstruction="none").report
    before = {
        "flops": report.flops_before,
        "params": report.params_before,
        "nodes": sum(r.width_before for r in report.groups),
    }
    after = {
        "flops": report.flops_after,
        "params": report.params_after,
        "nodes": sum(row.width_after for row in report.groups),
    }
    assert after[measure] <= keep * before[measure] * (1 + 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("selection", RULES)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_every_rule_goes_with_every_reconstruction(name, selection, reconstruction):
    make, data = NETWORKS[name]
    model = make().eval()
    pruned = prune(model, data, 0.4, selection=selection, reconstruction=reconstruction, theta=0.2)
    outputs = pruned.model(data[0])
    assert outputs.shape == model(data[0]).shape
    assert bool(torch.isfinite(outputs).all())
    assert pruned.report.settings["selection"] == selection
    if reconstruction == "none":
        groups = pruned.groups
        kept = {group: nodes.indices for group, nodes in pruned.nodes.items()}
        cut = remove_nodes(model, groups, kept)
        state = pruned.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in cut.state_dict().items())


def test_given_widths_are_the_widths():
    pruned = prune(small_mlp(), FLAT, widths={"fc2": np.int64(4)})
    assert [row.width_after for row in pruned.report.groups] == [12, 4]
    assert tuple(pruned.model.fc2.weight.shape) == (4, 12)
    assert tuple(pruned.model.fc3.weight.shape) == (3, 4)
    assert (pruned.model.fc2.out_features, pruned.model.fc3.in_features) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_precisions(name, dtype):
    make, data = NETWORKS[name]
    pruned = prune(make().to(dtype), [batch.to(dtype) for batch in data], 0.6).model
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert pruned(data[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("selection", RULES)
def test_a_seed_decides_everything(selection):
    def weights(seed, positions):
        options = {"selection": selection, "positions": positions, "seed": seed}
        pruned = prune(small_convnet(), IMAGES, 0.5, **options)
        return {group: nodes.indices.tolist() for group, nodes in pruned.nodes.items()}, pruned.model.state_dict()

    (nodes, first), (again, second) = weights(5, 3), weights(5, 3)
    assert nodes == again
    assert all(torch.equal(first[key], second[key]) for key in first)
    others = [weights(seed, None)[0] for seed in range(3)]  # no positions are drawn: only the rule can be random
    nodes = others.pop()
    assert any(other != nodes for other in others) == (selection in ("leverage", "random"))


def test_the_order_and_split_of_the_data_do_not_matter():
    model = small_mlp().double()
    x = torch.cat(FLAT).double()
    one = prune(model, [x], 0.5)
    two = prune(model, list(x.flip(0).split(7)), 0.5)
    assert all(np.array_equal(one.nodes[key].indices, two.nodes[key].indices) for key in one.nodes)
    assert torch.allclose(one.model(x), two.model(x), rtol=1e-8, atol=1e-10)


def test_moments_can_be_handed_over():
    model = small_mlp()
    moments = collect_moments(model, FLAT)
    plain, given_ = prune(model, FLAT, 0.5), prune(model, FLAT, 0.5, moments=moments)
    assert torch.equal(plain.model(FLAT[0]), given_.model(FLAT[0]))
    with pytest.raises(ValueError, match="expected channel level, with 'fc2'"):
        prune(model, FLAT, 0.5, moments=collect_moments(model, FLAT, level="patch"))
    with pytest.raises(ValueError, match="expected channel level, with 'fc3'"):
        prune(model, FLAT, 0.5, moments=collect_moments(model, FLAT, ["fc2"]))
    other = collect_moments(small_mlp((8, 11, 9, 3)), FLAT)
    with pytest.raises(ValueError, match=r"the moments of 'fc2' have 11 columns, the layer reads 12"):
        prune(model, FLAT, 0.5, moments=other)


def test_the_output_loss_is_measured_behind_the_batch_norm():
    model = small_convnet().eval()
    with torch.no_grad():
        model.norm2.weight[1:] = 1e-6  # only one output of conv2 matters, so only what it reads counts
    data = CalibrationData(IMAGES)
    group = find_groups(model, data).groups[0]
    moments = collect_moments(model, data, ["conv2"])
    found = node_statistics(model, moments, group, {"conv2": "norm2"}).consumer_gram
    gain = float(model.norm2.weight[0].detach() / torch.sqrt(model.norm2.running_var[0] + model.norm2.eps))
    own = model.conv2.weight[0].detach().double().flatten(1).numpy() * gain
    np.testing.assert_allclose(found, own @ own.T, atol=1e-9)


# The result is an ordinary module.


@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_is_an_ordinary_module(name):
    make, data = NETWORKS[name]
    model = make()
    pruned = prune(model, data, 0.5).model.eval()
    expected = pruned(data[0])
    assert [type(m) for m in pruned.modules()] == [type(m) for m in model.modules()]
    twin = copy.deepcopy(pruned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(pruned.state_dict())
    assert torch.equal(twin(data[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(pruned))(data[0]), expected)
    for module in pruned.modules():  # the sizes that modules state are those of their tensors
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape = module.weight.shape
            stated = (
                (module.out_features, module.in_features)
                if isinstance(module, nn.Linear)
                else (module.out_channels, module.in_channels)
            )
            assert stated == (shape[0], shape[1])
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean) == len(module.weight)


def test_the_result_can_be_trained():
    pruned = prune(small_convnet(), IMAGES, 0.5).model.train()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = pruned(IMAGES[0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in pruned.parameters())


def test_the_result_can_be_exported():
    pruned = prune(small_convnet(), IMAGES, 0.5).model.eval()
    program = torch.export.export(pruned, (IMAGES[0],))
    assert torch.allclose(program.module()(IMAGES[0]), pruned(IMAGES[0]), atol=1e-6)


# On a trained network.


def accuracy(model, digits):
    return 1 - evaluate(model, digits.test_batches())[0]


@pytest.mark.parametrize("allocation", ["calibrated", "uniform", "dof"])
def test_three_tenths_of_the_flops_are_nearly_enough(trained, digits, allocation):
    base = accuracy(trained, digits)
    assert base > 0.9
    batches = digits.train_batches()
    scores = {
        kind: accuracy(prune(trained, batches, 0.3, allocation=allocation, reconstruction=kind).model.eval(), digits)
        for kind in ("sequential", "none")
    }
    assert scores["sequential"] >= base - 0.03
    assert scores["none"] < scores["sequential"] - 0.05


def test_labels_are_not_needed(trained, digits):
    with_labels = prune(trained, digits.train_batches(), 0.3).model
    without = prune(trained, [batch[0] for batch in digits.train_batches()], 0.3).model
    for a, b in zip(with_labels.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_draw_of_the_theorem_merges_repeated_nodes(trained, digits):
    batches = digits.train_batches()
    pruned = prune(trained, batches, allocation="theory", selection="leverage", lam=0.05, seed=2)
    merged = False
    generator = np.random.default_rng(2)
    for group, row in zip(pruned.groups, pruned.report.groups, strict=True):
        nodes = pruned.nodes[group.name]
        moments = collect_moments(trained, batches, [group.consumer])
        covariance = moments[group.consumer].node_covariance(group.width)
        q = leverage_scores(covariance, row.lam)
        values = np.linalg.eigvalsh(covariance)
        count = float(np.sum(values / (values + row.lam)))
        size = math.ceil(5 * count * math.log(80 * count))
        draws = generator.choice(group.width, size=size, p=q / q.sum())
        copies = np.bincount(draws, minlength=group.width)
        np.testing.assert_array_equal(nodes.indices, np.flatnonzero(copies))
        np.testing.assert_allclose(nodes.weights, copies[nodes.indices] / (q[nodes.indices] * size), rtol=1e-8)
        merged |= bool((copies > 1).any())
        # The multiset with its penalties lam M q, one a draw, leaves the same residual as the merged nodes.
        block = covariance[np.ix_(draws, draws)] + np.diag(row.lam * size * q[draws])
        residual = covariance - covariance[:, draws] @ np.linalg.solve(block, covariance[draws])
        assert row.input_loss == pytest.approx(np.trace(residual) / np.trace(covariance), rel=1e-6)
        assert row.c == pytest.approx(np.linalg.eigvalsh(residual)[-1] / row.lam, rel=1e-6)
    assert merged


def test_dof_widths_at_a_given_lambda(trained, digits):
    pruned = prune(trained, digits.train_batches(), allocation="dof", lam=1e-3)
    for row in pruned.report.groups:
        assert row.width_after == math.ceil(row.dof) < row.width_before


def test_widths_are_multiples_where_they_are_cut():
    model = small_mlp((8, 24, 23, 3))
    for allocation in ("calibrated", "uniform", "dof"):
        pruned = prune(model, FLAT, 0.5, allocation=allocation, round_to=4)
        widths = [(row.width_after, row.width_before) for row in pruned.report.groups]
        assert all(after % 4 == 0 or after == before for after, before in widths), allocation
        assert any(after < before for after, before in widths)
        assert pruned.report.flops_after <= 0.5 * pruned.report.flops_before


def test_the_callers_scores_decide():
    generator = np.random.default_rng(0)
    scores = {"fc1": generator.permutation(12).astype(float), "fc2": generator.permutation(9).astype(float)}
    pruned = prune(small_mlp(), FLAT, widths={"fc1": 5, "fc2": 4}, selection="scores", scores=scores)
    for name, width in (("fc1", 5), ("fc2", 4)):
        assert pruned.nodes[name].indices.tolist() == sorted(np.argsort(scores[name])[-width:].tolist())


def test_what_is_left_whole_is_reported():
    model = small_mlp()
    model.fc3.bias.requires_grad_(False)
    pruned = prune(model, FLAT, 0.7)
    (skipped,) = pruned.report.skipped
    assert skipped.name == "fc2"
    assert "'fc3.bias' is frozen" in skipped.reason
    assert f"left whole: fc2: {skipped.reason}" in str(pruned.report)
    assert [row.group for row in pruned.report.groups] == ["fc1"]
    assert len(pruned.model.fc2.weight) == 9
    assert torch.equal(pruned.model.fc3.bias, model.fc3.bias)


def test_small_choices_report_larger_losses():
    losses = [
        prune(small_mlp(), FLAT, widths={"fc1": width}, selection="greedy", theta=1.0).report.groups[0].input_loss
        for width in (2, 5, 9)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_gpu_gives_the_network_that_the_cpu_gives():
    model = small_convnet().double()
    data = [tensor(50, 2, 8, 8, seed=seed, dtype=torch.float64) for seed in range(4)]
    ours = prune(model, data, 0.4, positions=None)
    theirs = prune(model.cuda(), [batch.cuda() for batch in data], 0.4, positions=None)
    for name, nodes in ours.nodes.items():
        np.testing.assert_array_equal(nodes.indices, theirs.nodes[name].indices)
    for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-8)
