"""The curve of the theory on a small digits network: what rises, what falls, and what is below what."""

import dataclasses
import itertools
import json
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from specprune import tradeoff
from specprune.analysis.evaluation import collect_logits, error_rate, root_mean_square
from specprune.analysis.tradeoff import KEEP_GRID
from specprune.compress import CalibrationData, collect_moments, prune
from specprune.compress.cost import smallest_fraction
from specprune.testbed import Recipe, load_dataset, train

mpl.use("agg")
KEEP = (0.1, 0.3, 0.6, 1.0)


@pytest.fixture(scope="module")
def problem():
    dataset = load_dataset("digits")
    model = train(dataset, Recipe("digits", "mlp-24-16", epochs=8, batch_size=64, learning_rate=5e-3)).model
    return model, dataset.train_batches(size=256), dataset.test_batches()


@pytest.fixture(scope="module")
def curve(problem):
    model, batches, test = problem
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = tradeoff(model, batches, test, keep=KEEP[::-1])
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    return found


def test_bias_falls_and_variance_rises(curve):
    points = curve.points
    assert len(points) == len(KEEP)
    assert [point.params for point in points] == sorted({point.params for point in points})
    assert points[0].bias > points[-1].bias
    assert points[0].measured > points[-1].measured
    assert points[0].train_error > points[-1].train_error
    for smaller, larger in itertools.pairwise(points):
        assert smaller.variance < larger.variance
        assert smaller.margin_variance < larger.margin_variance
        assert smaller.flops_kept < larger.flops_kept
        assert all(larger.widths[name] >= width for name, width in smaller.widths.items())


def test_every_point_keeps_its_order(curve, problem):
    for point in curve.points:
        assert point.measured <= point.certificate
        assert point.bound <= point.bias + point.variance + 1e-12
        assert point.bound >= point.bias
        assert point.bits == curve.points[0].bits
        if point.a_priori_holds:
            assert point.certificate <= point.a_priori * (1 + 1e-9)
        assert point.a_priori_holds == (point.c_max <= 4 and point.s_max <= 5 / 3)
        assert point.margin_bound >= point.margin_bias + point.margin_variance
        assert point.flops_kept <= 1
        # A network may not be much worse than its bound by accident: the test set is from the same source.
        assert point.test_error < point.bound + 0.1
    best = min(curve.points, key=lambda point: point.bound)
    assert curve.best is best


def test_keeping_everything_is_the_original(curve, problem):
    model, batches, _ = problem
    last = curve.points[-1]
    assert last.flops_kept == 1
    assert last.measured == last.certificate == 0
    assert last.a_priori == 0
    assert last.margin_bias == 0
    assert last.params == sum(parameter.numel() for parameter in model.parameters())
    assert last.widths == {"fc1": 24, "fc2": 16}
    logits, targets = collect_logits(model, CalibrationData(batches))
    assert last.train_error == last.refit_train_error == curve.base_train_error == error_rate(logits, targets)
    assert last.test_error == last.refit_test_error == curve.base_test_error
    assert curve.output_norm == root_mean_square(logits)
    assert curve.samples == len(targets)


def test_numbers_of_one_point_by_hand(curve, problem):
    """A network of the curve, pruned again: its errors, distance, widths, and Theorem A's variance."""
    model, batches, test = problem
    data = CalibrationData(batches)
    point = curve.points[1]
    pruned = prune(model, data, KEEP[1], allocation="dof", selection="greedy", reconstruction="channel")
    logits, targets = collect_logits(model, data)
    own, _ = collect_logits(pruned.model, data)
    assert point.measured == pytest.approx(root_mean_square(own - logits), rel=1e-5)
    assert point.train_error == error_rate(own, targets)
    assert point.test_error == error_rate(*collect_logits(pruned.model, CalibrationData(test)))
    assert point.widths == {entry.group: entry.width_after for entry in pruned.report.groups}
    assert point.lams == pytest.approx({entry.group: entry.lam for entry in pruned.report.groups}, rel=1e-9)
    refit = prune(model, data, KEEP[1], allocation="dof", selection="greedy", reconstruction="sequential")
    assert point.refit_train_error == error_rate(*collect_logits(refit.model, data))
    # The weights cost bits * ln 2 nats each, the rest (exponents, bits, widths, delta) a little more.
    nats = 2 * len(targets) * point.variance**2
    least = point.bits * point.params * math.log(2) + math.log(24 * 16) + math.log(20)
    assert least < nats < least + 60


def test_grid_of_lambdas(problem):
    model, batches, _ = problem
    lambdas = (1e-1, 1e-3)
    found = tradeoff(model, batches, lambdas=lambdas)
    moments = collect_moments(model, batches)
    for point, lam in zip(found.points, lambdas, strict=True):
        for group, layer in (("fc1", "fc2"), ("fc2", "fc3")):
            covariance = moments[layer].covariance()
            scaled = lam * np.trace(covariance)
            dof = np.trace(covariance @ np.linalg.inv(covariance + scaled * np.eye(len(covariance))))
            assert point.lams[group] == pytest.approx(scaled)
            assert point.dof[group] == pytest.approx(dof)
            assert point.widths[group] == math.ceil(dof)
    assert found.base_test_error is None
    assert all(point.test_error is None and point.refit_test_error is None for point in found.points)
    assert "test error" not in str(found).splitlines()[0]


def test_grid_of_widths(problem):
    model, batches, _ = problem
    found = tradeoff(
        model, batches, widths=[{"fc1": 9}, {"fc1": 3, "fc2": 4}], reconstruction="patch", selection="leverage"
    )
    assert [point.widths for point in found.points] == [{"fc1": 3, "fc2": 4}, {"fc1": 9, "fc2": 16}]
    assert all(point.a_priori is None and point.a_priori_holds is None for point in found.points)
    assert all(point.measured <= point.certificate for point in found.points)
    assert found.settings["reconstruction"] == "patch"


def test_wrong_grids(problem):
    model, batches, _ = problem
    with pytest.raises(ValueError, match="one of keep, lambdas and widths"):
        tradeoff(model, batches, keep=[0.5], lambdas=[1e-3])
    with pytest.raises(ValueError, match="one of keep, lambdas and widths"):
        tradeoff(model, batches, lambdas=[1e-3], widths=[{"fc1": 3}])
    for empty in ("keep", "lambdas", "widths"):
        with pytest.raises(ValueError, match="grid is empty"):
            tradeoff(model, batches, **{empty: []})


def test_unlabelled_batches(problem):
    model, batches, _ = problem
    with pytest.raises(TypeError, match="without targets"):
        tradeoff(model, [batch for batch, _ in batches], keep=[0.5])


def test_weights_that_are_not_finite_are_named(problem):
    _, batches, _ = problem
    broken = train(load_dataset("digits"), Recipe("digits", "mlp-4", epochs=1)).model
    with torch.no_grad():
        broken.fc1.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'fc1\.weight'"):
        tradeoff(broken, batches, keep=[0.5])


def test_calibration_on_a_part(problem):
    """A part of the training set is for the least squares only: the theorem's network is about all of it."""
    model, batches, test = problem
    part = [batch for batch, _ in batches[:2]]
    keep = [0.1]
    (whole,) = tradeoff(model, batches, test, keep=keep).points
    (point,) = tradeoff(model, batches, test, keep=keep, calibration=part).points
    assert dataclasses.replace(point, refit_train_error=0, refit_test_error=0) == dataclasses.replace(
        whole, refit_train_error=0, refit_test_error=0
    )
    assert point.a_priori_holds is True
    moments = collect_moments(model, batches)
    refit = prune(model, part, keep[0], allocation="dof", selection="greedy", moments=moments)
    assert point.refit_train_error == error_rate(*collect_logits(refit.model, CalibrationData(batches)))
    (fitted,) = tradeoff(model, batches, test, keep=keep, calibration=part, reconstruction="sequential").points
    assert fitted.train_error == point.refit_train_error
    assert fitted.measured <= fitted.certificate
    assert fitted.a_priori is None


def test_json_round_trip(curve):
    def refuse(constant):
        raise AssertionError(constant)

    loaded = json.loads(curve.to_json(), parse_constant=refuse)
    assert loaded["points"] == json.loads(json.dumps(curve.to_records()))
    assert loaded["samples"] == curve.samples
    assert loaded["base_test_error"] == curve.base_test_error
    assert loaded["settings"]["reconstruction"] == "channel"


def test_text(curve):
    lines = str(curve).splitlines()
    assert f"n = {curve.samples}" in lines[0]
    assert f"smallest bound {curve.best.bound:.4f}" in lines[0]
    assert len(lines) == 3 + len(curve.points)


def test_plot(curve):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = dict(mpl.rcParams)
    figure, axes = plt.subplots()
    open_figures = plt.get_fignums()
    assert curve.plot(axes) is axes
    assert plt.get_fignums() == open_figures
    drawn = {line.get_label(): line for line in axes.get_lines()}
    params = [point.params for point in curve.points]
    for label, values in (
        ("bound (95 %)", [point.bound for point in curve.points]),
        ("bias: training error", [point.bias for point in curve.points]),
        ("variance: description length", [point.variance for point in curve.points]),
        ("test error", [point.rounded_test_error for point in curve.points]),
    ):
        np.testing.assert_array_equal(drawn[label].get_xdata(), params)
        np.testing.assert_array_equal(drawn[label].get_ydata(), values)
    assert list(drawn["smallest bound"].get_ydata()) == [curve.best.bound]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    own = curve.plot()
    assert own is not axes
    plt.close(figure)
    plt.close(own.figure)
    assert dict(mpl.rcParams) == before


def test_the_default_grid_leaves_out_what_no_network_meets(problem):
    model, batches = problem[0], problem[1]
    least = smallest_fraction(model, CalibrationData(batches))
    assert least > min(KEEP_GRID)
    curve = tradeoff(model, batches)
    assert len(curve.points) == sum(keep > least for keep in KEEP_GRID)
    with pytest.raises(ValueError, match="smallest widths"):
        tradeoff(model, batches, keep=[least / 2])
