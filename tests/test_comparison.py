"""Methods side by side: each point is what that method gives alone."""

import copy
import json

import pytest
import torch
from helpers import assert_unchanged, small_mlp, snapshot, tensor
from test_architectures import network
from torch.nn import functional

from specprune.analysis.comparison import METHODS, compare
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress import CalibrationData, prune
from specprune.compress.settings import METHODS as COMPRESSIONS
from specprune.testbed import Recipe, load_dataset, train

KEEPS = (0.5, 0.25)


@pytest.fixture(scope="module")
def problem():
    dataset = load_dataset("digits")
    model = train(dataset, Recipe("digits", "mlp-32-24", epochs=8, batch_size=64, learning_rate=5e-3)).model
    return model, dataset.train_batches(limit=600), dataset.test_batches()


@pytest.fixture(scope="module")
def found(problem):
    before = snapshot(problem[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specprune.compress.latency._SECONDS", 0.0)  # few runs are enough for a ratio of any kind
        result = compare(*problem, keeps=KEEPS, seed=1)
    assert_unchanged(problem[0], before)
    return result


def test_every_method_at_every_budget(found):
    assert [(point.method, point.keep) for point in found.points] == [(name, k) for name in METHODS for k in KEEPS]
    assert found.refused == ()
    for point in found.points:
        if point.method == "SiPP":
            assert (point.flops_kept, point.params_kept) == (1.0, 1.0)
            assert 0.5 * point.keep < point.nonzero <= point.keep + 0.05  # biases stay
        else:
            assert 0.5 * point.keep < point.flops_kept <= point.keep * (1.25 if "PFP, " in point.method else 1)
            assert 0 < point.params_kept < 1
            assert point.nonzero == pytest.approx(point.params_kept, abs=0.05)
        assert 0.01 < point.latency_1 < 100
        assert 0.01 < point.latency_64 < 100
        assert point.seconds > 0


def test_promises_hold_where_there_are_any(found):
    for point in found.points:
        if point.method in ("fitted low rank", "magnitude, no refit"):
            assert point.promised is None
            assert point.local_error is None
        else:
            assert 0 < point.local_error <= point.promised * (1 + 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_points_are_those_of_prune(name, found, problem):
    model, batches, test = problem
    point = next(point for point in found.points if point.method == name and point.keep == 0.25)
    pruned = prune(model, batches, 0.25, seed=1, **METHODS[name])  # the defaults count FLOPs, too
    logits, targets = collect_logits(pruned.model, CalibrationData(test))
    assert point.error == error_rate(logits, targets)
    old = torch.log_softmax(torch.as_tensor(collect_logits(model, CalibrationData(test))[0]), 1)
    kl = functional.kl_div(torch.log_softmax(torch.as_tensor(logits), 1), old, log_target=True, reduction="none")
    assert point.divergence == pytest.approx(float(kl.sum(1).mean()), rel=1e-5)
    assert point.flops_kept == pruned.report.flops_after / pruned.report.flops_before
    assert point.params_kept == pruned.report.params_after / pruned.report.params_before


def test_the_original_is_the_reference(found, problem):
    model, _, test = problem
    assert found.base_error == error_rate(*collect_logits(model, CalibrationData(test)))
    least = {point.method: point for point in found.points if point.keep == 0.25}
    assert least["spectral"].divergence < least["magnitude + refit"].divergence
    assert least["magnitude + refit"].divergence < least["magnitude, no refit"].divergence


def test_methods_differ_in_what_their_names_say():
    assert METHODS["spectral"] == {}
    refits = {name for name, settings in METHODS.items() if settings.get("reconstruction", "sequential") != "none"}
    assert set(METHODS) - refits == {"magnitude, no refit"}
    spectral = {name: settings for name, settings in METHODS.items() if "method" not in settings}
    assert all(name == "spectral" or settings["allocation"] == "uniform" for name, settings in spectral.items())
    assert {settings.get("method", "spectral") for settings in METHODS.values()} == set(COMPRESSIONS)


def test_what_cannot_be_met_is_told_beside_what_can(problem):
    model, batches, test = problem
    result = compare(model, batches, test, keeps=[0.5, 0.05], methods=["ALDS", "spectral"], latency=False)
    assert [(point.method, point.keep) for point in result.points] == [
        ("ALDS", 0.5),
        ("spectral", 0.5),
        ("spectral", 0.05),
    ]
    (refusal,) = result.refused
    assert (refusal.method, refusal.keep) == ("ALDS", 0.05)
    assert "rank 1 everywhere" in refusal.reason
    assert str(result).splitlines()[-1] == f"ALDS, keep 0.05: {refusal.reason}"
    with pytest.raises(ValueError, match="rank 1 everywhere"):
        compare(model, batches, keeps=[0.05], methods=["ALDS"])


def test_equal_parameters(problem):
    model, batches, test = problem
    result = compare(model, batches, test, keeps=[0.4], methods=["hybrid", "PFP"], measure="params", latency=False)
    assert all(0.3 < point.params_kept <= 0.4 for point in result.points)
    assert "equal parameters" in str(result)


def test_without_labels_or_latency():
    model, data, inputs = network("lstm")  # gives (n, tokens, 3): no classifier of whole samples
    methods = ["spectral", "magnitude, no refit", "fitted low rank"]
    result = compare(model, data, [inputs], keeps=[0.6], methods=methods, latency=False)
    assert result.base_error is None
    assert result.measured_on == "test"
    assert all(point.error is None and point.latency_1 is None and point.latency_64 is None for point in result.points)
    assert all(point.divergence > 0 for point in result.points)
    assert "no labels" in str(result).splitlines()[0]


def test_without_a_test_set_the_calibration_data_are_measured(problem):
    model, batches, _ = problem
    result = compare(model, batches, keeps=[0.5], methods=["spectral"], latency=False)
    assert result.measured_on == "calibration"
    assert result.base_error == error_rate(*collect_logits(model, CalibrationData(batches)))


def test_text_and_json(found):
    lines = str(found).splitlines()
    assert f"original: error {found.base_error:.4f}" in lines[0]
    assert lines[1].split()[:4] == ["method", "keep", "flops_kept", "params_kept"]
    assert len(lines) == 3 + len(found.points)
    loaded = json.loads(found.to_json())
    assert loaded["points"] == json.loads(json.dumps(found.to_records()))
    assert (loaded["keeps"], loaded["seed"]) == (list(KEEPS), 1)


def test_bad_input_is_refused():
    model, data = small_mlp(), [tensor(20, 8)]
    with pytest.raises(ValueError, match="keeps is empty"):
        compare(model, data, keeps=[])
    with pytest.raises(ValueError, match=r"methods=\['alds'\]"):
        compare(model, data, methods=["alds"])
    with pytest.raises(ValueError, match="measure='nodes'"):
        compare(model, data, measure="nodes")
    with pytest.raises(ValueError, match=r"keep=1\.5"):
        compare(model, data, keeps=[1.5])
    with pytest.raises(TypeError, match="one-pass iterator"):
        compare(model, iter(data))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc1"):
        compare(broken, data)
