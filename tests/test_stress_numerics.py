"""Hostile numbers: the fast part of benchmarks/stress/numerics.py, what it once found, and invariances."""

import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_convnet, small_mlp, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "stress"))

import numerics
from dense_twin import reconstruct, ridge_fit
from hostile import CONSTRUCTIONS, build
from numerics import Case, run

from specprune.analysis import approximation, bound_table, layer_spectra, tradeoff
from specprune.analysis.evaluation import NonFiniteOutputs, collect_logits
from specprune.bounds import (
    WeightedNodes,
    approximation_a_priori,
    degrees_of_freedom,
    effective_rank,
    eigenvalues,
    evaluate_rates,
    feasibility,
    inverse_degrees_of_freedom,
    large_beats_small,
    leverage_scores,
    power_law_degrees_of_freedom,
    rank_one_risks,
    reconstruction_matrix,
    residual_covariance,
    samples_needed,
)
from specprune.compress import CalibrationData, LayerMoments, prune
from specprune.compress.divergence import output_divergence
from specprune.compress.gram import GramSum
from specprune.compress.reconstruction import condition_number, solve
from specprune.compress.shares import largest_shares

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# The matrix, thinned.


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_part_of_the_matrix(construction):
    index = list(CONSTRUCTIONS).index(construction)
    picked = [("mlp", "float32", "sequential"), ("mlp", "float64", "channel"), ("mlp", "bfloat16", "sequential")]
    picked += [("convnet", "float32", "patch"), ("residual", "float64", "sequential")]
    for k, (network, dtype, reconstruction) in list(enumerate(picked))[index % 3 :: 3]:
        selection = numerics.SELECTIONS[(index + 3 * k) % len(numerics.SELECTIONS)]
        outcome = run(Case(network, construction, dtype, selection, reconstruction))
        assert outcome.verdict != "failed", (network, dtype, selection, reconstruction, outcome.why)


@pytest.mark.parametrize(("spoil", "message"), [("NaN weight", "has 1 NaN or Inf"), ("Inf data", "'fc2' or in their")])
def test_what_is_not_finite_is_named(spoil, message):
    outcome = run(Case("mlp", spoil, "float32", "backward", "sequential"))
    assert outcome.verdict == "refused"
    assert message in outcome.why


def test_the_judge_can_fail(monkeypatch):
    monkeypatch.setattr(numerics, "reconstruct", lambda net, p, kind, ridge: reconstruct(net, p, "none", ridge))
    assert run(Case("mlp", "plain", "float64", "backward", "sequential")).verdict == "failed"


def test_the_twin_solves_the_ridge_problem():
    x, y = tensor(30, 5, seed=1, dtype=torch.float64).numpy(), tensor(30, 2, seed=2, dtype=torch.float64).numpy()
    weights, constants = ridge_fit(x, y, 0.1, True)
    centred, goal = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred / 30
    expected = np.linalg.solve(gram + 0.1 * np.trace(gram) / 5 * np.eye(5), centred.T @ goal / 30).T
    np.testing.assert_allclose(weights, expected, atol=1e-13)
    np.testing.assert_allclose(constants, y.mean(0) - expected @ x.mean(0), atol=1e-13)


# What was found, one test each.


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e18, 1e30])
@pytest.mark.parametrize("columns", [6, 130])
def test_squares_outside_float32_are_formed_in_float64(scale, columns):
    rows = (tensor(300, columns) * scale).to(torch.float32)
    wanted = rows.double().T @ rows.double()
    sums = GramSum(columns, rows.device)
    sums.add(rows)
    torch.testing.assert_close(sums.finish(), wanted, rtol=1e-12, atol=1e-12 * float(wanted.max()))
    convolution = nn.Conv2d(4, 2, 3, padding=1, bias=False)
    images = (tensor(5, 4, 8, 8) * scale).to(torch.float32)
    found = GramSum(36, images.device)
    found.add_patches(convolution, images)
    patches = nn.functional.unfold(images.double(), 3, padding=1).transpose(1, 2).reshape(-1, 36)
    gram = patches.T @ patches
    torch.testing.assert_close(found.finish(), gram, rtol=1e-12, atol=1e-12 * float(gram.max()))


def test_nodes_whose_squares_vanish_in_float32_are_not_called_dead():
    net = build("mlp", "all at 1e-30", torch.float32)
    assert prune(net.model, [net.data], widths=net.widths).report.groups[0].dof > 1


def test_a_mean_much_larger_than_the_spread_is_not_lost_in_float32():
    net = build("mlp", "offset 1e4", torch.float32)
    pruned = prune(net.model, [net.data], widths=net.widths, reconstruction="patch", positions=None)
    _, twin, original = reconstruct(net, pruned, "patch", 1e-6)
    with torch.no_grad():
        found = pruned.model.double()(net.data.double())
    spread = float((original - original.mean(0)).square().mean())
    excess = float((found - original).square().mean()) - float((twin - original).square().mean())
    assert excess < 0.05 * spread  # it was more than the spread itself


def test_a_constant_has_no_spread():
    rows = torch.cat([torch.full((50, 1), 0.1), tensor(50, 1), torch.full((50, 1), 1e9)], 1)
    spread = LayerMoments.of(rows).about_mean()
    assert not bool(spread[[0, 2]].any())
    assert float(spread[1, 1]) == pytest.approx(float(rows[:, 1].double().var(correction=0)), rel=1e-12)
    net = build("convnet", "rank 0", torch.float64)
    pruned = prune(net.model, [net.data], widths=net.widths, reconstruction="patch", positions=None)
    assert not bool(pruned.model.fc.weight.any())  # only the constant is known; weights were fitted to rounding
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(net.data), net.model(net.data), rtol=1e-12, atol=1e-12)


def test_a_refit_that_overflows_is_refused_by_name():
    model = small_mlp((6, 8, 3))
    with torch.no_grad():
        model.fc1.weight.mul_(1e-44)
        model.fc1.bias.mul_(1e-44)
        model.fc2.weight.fill_(3e38)  # two nodes would have to weigh what eight did
    with pytest.raises(ValueError, match=r"the refitted weights of layer 'fc2' leave the range of torch\.float32"):
        prune(model, [tensor(40, 6)], widths={"fc1": 2})


def test_lambda_below_the_rounding_of_float32_data():
    rows = tensor(3, 8, seed=1)
    covariance = (rows.T @ rows / 3).double().numpy()
    covariance = (covariance + covariance.T) / 2
    lam = 1e-12 * float(np.trace(covariance))
    nodes = WeightedNodes(np.arange(6), np.full(6, 100.0))
    residual = residual_covariance(covariance, nodes, lam)
    assert np.linalg.eigvalsh(residual)[0] > -1e-5
    assert np.all(np.isfinite(reconstruction_matrix(covariance, nodes, lam)))
    net = build("mlp", "n < m", torch.float32)
    prune(net.model, [net.data], 0.6, allocation="dof")  # a bare LinAlgError it was
    with pytest.raises(ValueError, match="positive semidefinite"):
        residual_covariance(np.diag([1.0, -0.5]), WeightedNodes(np.arange(2), np.ones(2)), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_distilled(dtype):
    net = build("mlp", "plain", dtype)
    cut = prune(net.model, [net.data], widths=net.widths, reconstruction="none")
    better = prune(net.model, [net.data], widths=net.widths, reconstruction="none", distill_steps=60)
    wanted = outputs(net.model, net.data).double()
    losses = [float(output_divergence(wanted, outputs(p.model, net.data).double())) for p in (cut, better)]
    assert {p.dtype for p in better.model.parameters()} == {dtype}
    assert losses[1] < 0.9 * losses[0]


def test_distillation_of_half_precision_says_what_forward_must_cast_to():
    net = build("mlp", "plain", torch.bfloat16)

    def forward(model, batch):
        return model(batch.to(torch.bfloat16))

    settings = {"widths": net.widths, "forward": forward, "distill_steps": 2}
    with pytest.raises(ValueError, match=r"cast them there to next\(model\.parameters\(\)\)\.dtype"):
        prune(net.model, [net.data], **settings)
    settings["forward"] = lambda model, batch: model(batch.to(next(model.parameters()).dtype))
    prune(net.model, [net.data], **settings)


def test_distillation_that_ruins_the_network_is_refused():
    net = build("mlp", "nodes at 1e+18", torch.float32)
    with pytest.raises(ValueError, match="distillation raised the divergence of the outputs"):
        prune(net.model, [net.data], widths=net.widths, distill_steps=3)


def test_one_output_is_measured_on_its_own_scale():
    a, b = tensor(20, 1, dtype=torch.float64), tensor(20, 1, seed=1, dtype=torch.float64)
    for scale in (1e-30, 1e-18, 1e18):
        assert float(output_divergence(a * scale, b * scale)) == pytest.approx(float(output_divergence(a, b)))
    assert float(output_divergence(a * 0, b)) == pytest.approx(float(b.square().mean()))


@pytest.mark.parametrize("how", numerics.TABLES)
@pytest.mark.parametrize(
    ("construction", "message"),
    [
        ("NaN data", r"NaN or Inf in the inputs of layer 'fc[12]'"),
        ("empty layer", r"'fc1\.weight' has no entries"),
    ],
)
def test_tables_of_bounds_name_the_layer(construction, message, how):
    outcome = run(Case("mlp", construction, "float64", "greedy", "channel", how))
    assert outcome.verdict == "refused"
    assert re.search(message, outcome.why)


def test_outputs_that_overflow_are_refused_by_name():
    model = small_mlp((6, 8, 3))
    with torch.no_grad():
        model.fc2.weight.mul_(1e38)
    data = CalibrationData([(1e3 * tensor(20, 6), torch.arange(20) % 3)])
    with pytest.raises(NonFiniteOutputs, match=r"NaN or Inf in the outputs of layer 'fc2': check the data"):
        collect_logits(model, data)


def test_tables_of_bounds_refuse_what_has_no_size():
    net = build("mlp", "rank 0", torch.float64)
    data = numerics.labelled(net)
    with pytest.raises(ValueError, match="all inputs of the network are zero"):
        tradeoff(net.model, data, widths=[net.widths])
    notes = bound_table(net.model, data).notes
    assert any("no bounds from margins: all inputs of the network are zero" in note for note in notes)
    few = build("mlp", "n < m", torch.float64)
    with pytest.raises(ValueError, match="the training set has 3 samples: PAC-Bayes bounds need at least 8"):
        bound_table(few.model, numerics.labelled(few))


def test_sign_matrices_that_overflow_leave_the_other_bounds():
    outcome = run(Case("mlp", "mixed 1e-30..1e30", "float32", "greedy", "channel", "bound_table"))
    assert outcome.verdict == "right", outcome.why


def test_an_a_priori_bound_may_be_infinite():
    bound = approximation_a_priori([1e300] * 3, [1e300] * 3)
    assert bound.value == math.inf
    assert approximation_a_priori([1e300], [1e-150]).value == pytest.approx(2.0)


def test_rates_are_asked_for_by_name():
    with pytest.raises(TypeError, match=r"values must be a mapping of symbols to numbers, got \[\]"):
        evaluate_rates([])


def test_methods_refuse_networks_that_overflow():
    outcome = run(Case("mlp", "mixed 1e-30..1e30", "float32", "-", "-", "alds"))
    assert outcome.verdict == "refused"
    assert "gives NaN or Inf where the original does not" in outcome.why


def test_shares_of_subnormal_sums():
    rows = torch.full((2, 3), 1e-310, dtype=torch.float64)
    shares = largest_shares(rows, torch.ones(1, 3, dtype=torch.float64), np.arange(3)[:, None])
    torch.testing.assert_close(shares, torch.full((3, 1), 1 / 3, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", ["allocation calibrated", "hybrid", "fitted", "alds", "pca", "pfp", "sipp"])
def test_layers_without_weights(how):
    selection = "backward" if how.startswith("allocation") else "-"
    reconstruction = "sequential" if how.startswith("allocation") else "-"
    outcome = run(Case("mlp", "empty layer", "float32", selection, reconstruction, how))
    assert outcome.verdict == "right", outcome.why


# Condition numbers.


def test_condition_numbers_are_reported():
    net = build("mlp", "plain", torch.float64)
    pruned = prune(net.model, [net.data], widths=net.widths, ridge=1e-3)
    for group, inputs in (("fc1", 2), ("fc2", 4)):
        with torch.no_grad():
            rows = pruned.model[:inputs](net.data).numpy()
        rows = rows - rows.mean(0)
        gram = rows.T @ rows / len(rows)
        system = gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        (entry,) = [row for row in pruned.report.groups if row.group == group]
        assert entry.condition <= np.linalg.cond(system, 1) * (1 + 1e-9)  # an estimate from below
        assert entry.condition >= np.linalg.cond(system, 1) / 3
    assert "condition" in str(pruned.report)
    cut = prune(net.model, [net.data], widths=net.widths, reconstruction="none")
    assert {row.condition for row in cut.report.groups} == {None}
    channel = prune(net.model, [net.data], widths=net.widths, reconstruction="channel", lam=1e-3)
    for entry in channel.report.groups:
        nodes = channel.nodes[entry.group]
        with torch.no_grad():
            rows = net.model[: {"fc1": 2, "fc2": 4}[entry.group]](net.data).numpy()[:, nodes.indices]
        block = rows.T @ rows / len(rows) + np.diag(entry.lam / nodes.weights)
        assert np.linalg.cond(block, 1) / 3 <= entry.condition <= np.linalg.cond(block, 1) * (1 + 1e-9)


def test_condition_numbers_of_known_matrices():
    diagonal = torch.diag(torch.tensor([4.0, 1.0, 0.01], dtype=torch.float64))
    assert condition_number(diagonal, torch.linalg.cholesky(diagonal)) == pytest.approx(400)
    assert solve(diagonal, torch.ones(3, 1, dtype=torch.float64), 0.0)[1] == pytest.approx(400)
    assert solve(diagonal * 0, torch.ones(3, 1, dtype=torch.float64), 0.0)[1] == 1.0


# Invariances.

RULES = ("backward", "greedy", "thinet", "cholesky", "magnitude")


def outputs(model, data):
    with torch.no_grad():
        return model(data)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    exponents=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
    rule=st.sampled_from(RULES),
    reconstruction=st.sampled_from(["sequential", "patch", "channel"]),
)
def test_rescaling_layers_by_powers_of_two_changes_nothing(exponents, rule, reconstruction):
    plain, scaled = small_mlp((8, 12, 9, 3)).double(), small_mlp((8, 12, 9, 3)).double()
    first, second = (2.0**e for e in exponents)
    with torch.no_grad():
        scaled.fc1.weight.mul_(first)
        scaled.fc1.bias.mul_(first)
        scaled.fc2.weight.mul_(second / first)
        scaled.fc2.bias.mul_(second)
        scaled.fc3.weight.mul_(1 / second)
    data = tensor(40, 8, dtype=torch.float64)
    options = {"widths": {"fc1": 6, "fc2": 5}, "selection": rule, "reconstruction": reconstruction}
    a, b = prune(plain, [data], **options), prune(scaled, [data], **options)
    for name in a.nodes:
        assert a.nodes[name].indices.tolist() == b.nodes[name].indices.tolist()
    torch.testing.assert_close(outputs(b.model, data), outputs(a.model, data), rtol=1e-9, atol=1e-9)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000), rule=st.sampled_from(RULES), reconstruction=st.sampled_from(["sequential", "channel"])
)
def test_relabelled_nodes_give_the_same_function(seed, rule, reconstruction):
    plain, mixed = small_mlp((8, 12, 9, 3)).double(), small_mlp((8, 12, 9, 3)).double()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mixed.fc1.weight.copy_(plain.fc1.weight[order])
        mixed.fc1.bias.copy_(plain.fc1.bias[order])
        mixed.fc2.weight.copy_(plain.fc2.weight[:, order])
    data = tensor(40, 8, dtype=torch.float64)
    options = {"widths": {"fc1": 6, "fc2": 5}, "selection": rule, "reconstruction": reconstruction}
    a, b = prune(plain, [data], **options), prune(mixed, [data], **options)
    assert sorted(order[b.nodes["fc1"].indices].tolist()) == a.nodes["fc1"].indices.tolist()
    assert b.nodes["fc2"].indices.tolist() == a.nodes["fc2"].indices.tolist()
    torch.testing.assert_close(outputs(b.model, data), outputs(a.model, data), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_mlp, small_convnet])
def test_batches_and_threads(make):
    model = make().eval()
    shape = (8,) if make is small_mlp else (2, 8, 8)
    data = tensor(48, *shape)
    whole = prune(model, [data], 0.6, positions=None)
    again = prune(model, [data], 0.6, positions=None)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    split = prune(model, list(data.split(7)), 0.6, positions=None)
    assert {k: v.indices.tolist() for k, v in split.nodes.items()} == {
        k: v.indices.tolist() for k, v in whole.nodes.items()
    }
    torch.testing.assert_close(outputs(split.model, data), outputs(whole.model, data), rtol=1e-4, atol=1e-4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = prune(model, [data], 0.6, positions=None)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(outputs(two.model, data), outputs(whole.model, data), rtol=1e-4, atol=1e-4)


# Certificates and bounds.


@pytest.mark.parametrize(
    "construction",
    ["plain", "duplicate nodes", "one sample", "rank 1", "nodes at 1e-30", "nodes at 1e+30", "offset 1e4"],
)
@pytest.mark.parametrize("reconstruction", ["sequential", "channel"])
def test_certificates_stay_above_the_error(construction, reconstruction):
    net = build("mlp", construction, torch.float64)
    pruned = prune(net.model, [net.data], widths=net.widths, reconstruction=reconstruction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = approximation(net.model, pruned, [net.data])
    assert found.certificate.value >= found.measured
    assert found.layerwise.value >= found.measured
    assert found.a_priori_measured is None or found.a_priori_measured.value >= found.measured
    assert math.isfinite(found.certificate.value)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_spectral_quantities_do_not_know_the_unit(scale):
    rows = tensor(20, 6, dtype=torch.float64).numpy()
    covariance = rows.T @ rows / 20
    nodes = WeightedNodes(np.array([0, 1, 3]), np.full(3, 2.0))
    plain, other = eigenvalues(covariance), eigenvalues(covariance * scale)
    np.testing.assert_allclose(other / scale, plain, rtol=1e-12)
    np.testing.assert_allclose(
        leverage_scores(covariance * scale, 1e-3 * scale), leverage_scores(covariance, 1e-3), rtol=1e-9
    )
    assert degrees_of_freedom(other, 0.01 * scale) == pytest.approx(degrees_of_freedom(plain, 0.01))
    assert inverse_degrees_of_freedom(other, 3.0) / scale == pytest.approx(inverse_degrees_of_freedom(plain, 3.0))
    assert effective_rank(other) == pytest.approx(effective_rank(plain))
    found, wanted = feasibility(covariance * scale, nodes, 0.01 * scale), feasibility(covariance, nodes, 0.01)
    assert (found.c, found.s) == pytest.approx((wanted.c, wanted.s), rel=1e-9)  # the norm over- or underflowed


@pytest.mark.slow
def test_extreme_arguments_of_bounds():
    assert effective_rank([1e300, 1e-300]) == pytest.approx(1.0)  # it was NaN
    assert power_law_degrees_of_freedom(0.3, 1 - 1e-16, 5e-324) == math.inf  # it was an OverflowError
    assert samples_needed(1.0, 5e-324) > samples_needed(1.0, 1e-300)
    with pytest.raises(ValueError, match="exceeds float64; scale them down"):
        rank_one_risks([1e300, 1e300], [0.5, 0.3], 0.3, 100, 1)
    with pytest.raises(ValueError, match="differ by too many orders"):
        large_beats_small(100, 7, 100000, 0.3, 1e300, 0.3)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e300), min_size=1, max_size=6).filter(any),
    lams=st.tuples(st.floats(0, 1e300), st.floats(0, 1e300)),
)
def test_degrees_of_freedom_fall_with_lambda(values, lams):
    low, high = sorted(lams)
    assert 0 <= degrees_of_freedom(values, high) <= degrees_of_freedom(values, low) <= len(values)
    assert 1 - 1e-12 <= effective_rank(values) <= np.count_nonzero(values) + 1e-9


def test_spectra_of_hostile_layers():
    for construction in ("duplicate nodes", "one sample", "all at 1e-30", "all at 1e+30", "rank 1"):
        net = build("mlp", construction, torch.float32)
        for record in layer_spectra(net.model, [net.data]).to_records():
            assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in record.values())
    net = build("mlp", "rank 0", torch.float32)
    with pytest.raises(ValueError, match="the inputs of layer 'fc1' are zero on all data"):
        layer_spectra(net.model, [net.data])
