"""Spectra: against direct NumPy, limits of the degrees of freedom, and the reports."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune import layer_spectra
from specprune.analysis import LayerSpectrum, Spectra
from specprune.analysis.spectra import LAMBDAS
from specprune.compress import collect_moments
from specprune.testbed import mlp


@pytest.fixture(scope="module")
def problem():
    """A convolution and two linear layers with random weights, batches, and what each layer receives."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    )
    batches = [torch.rand(6, 2, 8, 8), torch.rand(3, 2, 8, 8)]
    x = torch.cat(batches)
    with torch.no_grad():
        received = {"0": x, "2": model[:2](x), "5": model[:5](x)}
    rows = {
        name: values.movedim(1, -1).reshape(-1, values.shape[1]).double().numpy() for name, values in received.items()
    }
    return model, batches, rows


def test_against_numpy(problem):
    model, batches, rows = problem
    spectra = layer_spectra(model, batches)
    assert list(spectra) == ["0", "2", "5"]
    assert len(spectra) == 3
    for name, matrix in rows.items():
        spectrum = spectra[name]
        covariance = matrix.T @ matrix / len(matrix)
        values = np.linalg.eigvalsh(covariance)[::-1]
        assert spectrum.layer == name
        assert spectrum.samples == len(matrix)
        assert spectrum.width == matrix.shape[1]
        np.testing.assert_allclose(spectrum.covariance, covariance, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=1e-5, atol=1e-7 * values[0])
        assert spectrum.trace == pytest.approx(np.square(matrix).sum() / len(matrix), rel=1e-6)
        shares = values.clip(1e-300) / values.sum()
        assert spectrum.effective_rank == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-4)
        for lam in (1e-1, 1e-3):
            scaled = lam * spectrum.trace
            hat = covariance @ np.linalg.inv(covariance + scaled * np.eye(len(covariance)))
            assert spectrum.degrees_of_freedom(lam) == pytest.approx(np.trace(hat), rel=1e-5)
            np.testing.assert_allclose(spectrum.leverage(lam), np.diag(hat) / np.trace(hat), rtol=1e-4, atol=1e-8)


def test_limits_of_the_degrees_of_freedom():
    """Two twin features among five: the rank is four, and lambda counts from none of it to all of it."""
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)
    spectrum = layer_spectra(nn.Linear(5, 2).double(), [x])[""]
    assert spectrum.degrees_of_freedom(1e-12) == pytest.approx(4, abs=1e-3)
    assert spectrum.degrees_of_freedom(1e9) == pytest.approx(0, abs=1e-8)
    counts = [spectrum.degrees_of_freedom(lam) for lam in np.logspace(-10, 4, 40)]
    assert all(first > second for first, second in itertools.pairwise(counts))
    for lam in (1e-6, 1e-2, 10.0):
        scores = spectrum.leverage(lam)
        assert scores.sum() == pytest.approx(1, rel=1e-12)
        assert scores.min() > 0
        assert scores[0] == pytest.approx(scores[4], rel=1e-9)


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9])
def test_power_law_of_a_synthetic_spectrum(beta):
    width = 40
    values = 3.0 * np.arange(1, width + 1) ** (-1 / beta)
    x = torch.from_numpy(
        np.sqrt(width * values)[:, None] * np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    )
    spectrum = layer_spectra(nn.Linear(width, 2).double(), [x])[""]
    fit = spectrum.power_law()
    assert fit.beta == pytest.approx(beta, rel=1e-6)
    assert fit.r_squared == pytest.approx(1, abs=1e-9)


def test_power_law_leaves_zeros_out():
    values = np.concatenate([np.arange(1, 11) ** -2.0, np.zeros(5)])
    fit = LayerSpectrum("fc", np.diag(values), values, 10).power_law()
    assert fit.beta == pytest.approx(0.5, rel=1e-9)


def test_a_dead_layer_is_named():
    torch.manual_seed(0)
    model = mlp((4, 5, 3))
    with torch.no_grad():
        model.fc1.bias.fill_(-100)
    with pytest.raises(ValueError, match="'fc2' are zero on all data"):
        layer_spectra(model, [torch.rand(6, 4)])


def test_chosen_layers_and_given_moments(problem):
    model, batches, _ = problem
    assert list(layer_spectra(model, batches, ["5", "2"])) == ["5", "2"]
    moments = collect_moments(model, batches)
    given = layer_spectra(model, [], moments=moments)  # the batches are not read
    np.testing.assert_array_equal(given["2"].eigenvalues, layer_spectra(model, batches)["2"].eigenvalues)
    assert list(layer_spectra(model, [], ["5"], moments=moments)) == ["5"]
    with pytest.raises(ValueError, match=r"with \['9'\]"):
        layer_spectra(model, [], ["9"], moments=moments)
    with pytest.raises(ValueError, match="patch level"):
        layer_spectra(model, [], moments=collect_moments(model, batches, level="patch"))
    with pytest.raises(ValueError, match="'9'"):
        layer_spectra(model, batches, ["9"])


def test_another_way_to_call_the_model(problem):
    model, batches, _ = problem
    named = [{"pixels": batch} for batch in batches]
    found = layer_spectra(model, named, forward=lambda net, batch: net(batch["pixels"]))
    np.testing.assert_array_equal(found["5"].covariance, layer_spectra(model, batches)["5"].covariance)


def test_the_model_stays_as_it_is(problem):
    model, batches, _ = problem
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_spectra(model, batches)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_records_json_and_text(problem):
    model, batches, _ = problem
    spectra = layer_spectra(model, batches)
    records = spectra.to_records()
    assert [record["layer"] for record in records] == ["0", "2", "5"]
    assert [record["width"] for record in records] == [2, 5, 12]
    for record, spectrum in zip(records, spectra.values(), strict=True):
        assert [record[f"N({lam:.0e} Tr)"] for lam in LAMBDAS] == [spectrum.degrees_of_freedom(lam) for lam in LAMBDAS]
        assert record["effective_rank"] == spectrum.effective_rank
    assert records[0]["beta"] is None  # two eigenvalues are no power law
    assert records[1]["beta"] == spectra["2"].power_law().beta
    loaded = json.loads(spectra.to_json(), parse_constant=pytest.fail)
    assert loaded["layers"] == records
    assert loaded["eigenvalues"]["5"] == spectra["5"].eigenvalues.tolist()
    lines = str(spectra).splitlines()
    assert lines[0].startswith("degrees of freedom")
    assert len(lines) == 3 + len(records)
    assert isinstance(spectra, Spectra)
