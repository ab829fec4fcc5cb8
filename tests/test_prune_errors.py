"""What `prune` refuses: bad arguments, models and data, each with a message that says what to do."""

import pytest
import torch
from helpers import small_mlp, tensor

from specprune.compress import prune

FLAT, IMAGES = [tensor(30, 8), tensor(10, 8, seed=1)], [tensor(20, 2, 8, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0: expected the fraction to keep"),
        ({"keep": 2}, "keep=2: expected the fraction to keep"),
        ({"keep": -0.5}, r"keep=-0\.5: expected the fraction to keep"),
        ({"keep": float("nan")}, "keep=nan: expected the fraction to keep"),
        ({"keep": 0.5, "widths": {"fc1": 3}}, "give keep, or widths, or neither"),
        ({}, "give keep, or widths, or neither"),
        ({"keep": 0.5, "allocation": "theory"}, "give keep, or widths, or neither"),
        ({"keep": 0.5, "measure": "time"}, "measure='time': expected one of"),
        ({"keep": 0.5, "allocation": "best"}, "allocation='best': expected one of"),
        ({"keep": 0.5, "selection": "best"}, "selection='best': expected one of"),
        ({"keep": 0.5, "reconstruction": "best"}, "reconstruction='best': expected one of"),
        ({"keep": 0.5, "theta": -0.1}, r"theta=-0\.1: expected a number between 0 and 1"),
        ({"keep": 0.5, "theta": 1.1}, r"theta=1\.1: expected a number between 0 and 1"),
        ({"keep": 0.5, "theta": float("nan")}, "theta=nan: expected a number between 0 and 1"),
        ({"keep": 0.5, "lam": 0.0}, r"lam=0\.0: expected a positive number"),
        ({"keep": 0.5, "lam": -1e-3}, r"lam=-0\.001: expected a positive number"),
        ({"keep": 0.5, "lam": float("nan")}, "lam=nan: expected a positive number"),
        ({"keep": 0.5, "lam": float("inf")}, "lam=inf: expected a positive number"),
        ({"keep": 0.5, "lam": 1e-30}, "lam=1e-30: expected a positive number.*rounding"),
        ({"keep": 0.5, "ridge": -1e-9}, "ridge=-1e-09: expected a number that is not negative"),
        ({"keep": 0.5, "ridge": float("nan")}, "ridge=nan: expected a number that is not negative"),
        ({"keep": 0.5, "positions": 0}, "positions=0: expected at least 1"),
        ({"keep": 0.5, "round_to": 0}, "round_to=0: expected a whole number"),
        ({"keep": 0.5, "round_to": 2.5}, r"round_to=2\.5: expected a whole number"),
        ({"keep": 0.1, "round_to": 9}, r"keep=0\.1: with the smallest widths the network still costs"),
        ({"keep": 0.5, "distill_steps": -1}, "distill_steps=-1: expected a number of steps"),
        ({"keep": 0.5, "selection": "scores"}, "selection='scores' needs scores="),
        ({"keep": 0.5, "selection": "scores", "scores": {"fc1": [1.0]}}, r"scores\['fc1'\] has shape \(1,\)"),
        (
            {"keep": 0.5, "selection": "scores", "scores": {"fc1": range(12)}},
            r"scores\['fc2'\] has shape \(0,\): expected \(9,\) finite numbers; the groups are \['fc1', 'fc2'\]",
        ),
        (
            {"keep": 0.5, "selection": "scores", "scores": {"fc1": [float("nan")] * 12, "fc2": range(9)}},
            r"scores\['fc1'\] has shape \(12,\): expected \(12,\) finite numbers",
        ),
        ({"widths": {"fc9": 3}}, r"widths=\{'fc9': 3\}: the groups and their full widths are"),
        ({"widths": {"fc1": 13}}, r"widths=\{'fc1': 13\}: the groups and their full widths are"),
        ({"widths": {"fc1": 0}}, r"widths=\{'fc1': 0\}: the groups and their full widths are"),
        ({"widths": {"fc1": 2.5}}, r"widths=\{'fc1': 2\.5\}: the groups and their full widths are"),
        ({"keep": 0.001}, r"keep=0\.001: with the smallest widths the network still costs"),
        ({"allocation": "theory", "lam": 1.0}, r"lam=1\.0: the theorem needs lambda at most the largest eigenvalue"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        prune(small_mlp(), FLAT, **options)


def changed(change):
    model = small_mlp()
    with torch.no_grad():
        change(model)
    return model


def nan_weight(model):
    model.fc2.weight[0, 0] = float("nan")


def dead_nodes(model):
    model.fc1.weight.zero_()
    model.fc1.bias.fill_(-1.0)


NAN = FLAT[0].clone()
NAN[25, 3] = float("nan")


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (small_mlp(), [], ValueError, "batches is empty"),
        (small_mlp(), [FLAT[0][:0]], ValueError, "at least one batch with at least one sample"),
        (small_mlp(), iter(FLAT), TypeError, "one-pass iterator"),
        (small_mlp(), FLAT[0], TypeError, "must be a re-iterable of batches"),
        (small_mlp(), [NAN], ValueError, "NaN or Inf in the inputs of layer 'fc2'"),
        (small_mlp(), [NAN[25:]], ValueError, "NaN or Inf in the inputs of layer 'fc1'"),
        (small_mlp(), [FLAT[0].double()], ValueError, r"batch 0 has dtype torch\.float64"),
        (small_mlp(), [FLAT[0].to("meta")], ValueError, "batch 0 is on device meta"),
        (changed(nan_weight), FLAT, ValueError, r"the model's 'fc2\.weight' has 1 NaN or Inf"),
        (changed(dead_nodes), FLAT, ValueError, r"the nodes of \['fc1'\] are zero on all calibration data"),
        (
            changed(lambda m: m.fc2.weight.requires_grad_(False)),
            FLAT,
            ValueError,
            r"(?s)nothing can be pruned in Sequential.*fc1: 'fc2\.weight' is frozen.*fc2: 'fc2\.weight' is frozen",
        ),
    ],
    ids=[
        "empty",
        "no samples",
        "iterator",
        "tensor",
        "nan",
        "nan first",
        "dtype",
        "device",
        "nan weight",
        "dead",
        "frozen",
    ],
)
def test_bad_models_and_data_are_named(model, data, error, message):
    with pytest.raises(error, match=message):
        prune(model, data, 0.5)


def test_random_augmentation_is_noticed():
    class Noisy:
        def __iter__(self):
            yield FLAT[0] + torch.rand(1)

    with pytest.raises(ValueError, match="batches gave other data on this pass"):
        prune(small_mlp(), Noisy(), 0.5)


def test_some_dead_nodes_do_no_harm():
    model = small_mlp()
    with torch.no_grad():
        model.fc1.weight[:5] = 0
        model.fc1.bias[:5] = -1
    for selection in ("greedy", "cholesky"):
        pruned = prune(model, FLAT, widths={"fc1": 7}, selection=selection, lam=1e-12, theta=1.0)
        assert pruned.nodes["fc1"].indices.tolist() == list(range(5, 12))
        assert torch.allclose(pruned.model(FLAT[0]), model(FLAT[0]), atol=1e-3)
        whole = prune(model, FLAT, widths={"fc1": 10}, selection=selection)  # dead ones must be taken as well
        assert bool(torch.isfinite(whole.model(FLAT[0])).all())
