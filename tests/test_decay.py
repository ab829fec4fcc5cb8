"""Decay of weights and covariances: planted power laws come back, for dense and convolutional layers."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune.analysis.approximation import output_distance
from specprune.analysis.chain import trace_chain
from specprune.analysis.decay import NetworkDecay, measure_decay, spectral_layers, truncate_weights
from specprune.analysis.evaluation import double_copy
from specprune.analysis.margin_bounds import layer_sizes
from specprune.bounds.low_rank import fit_decay, truncation_error
from specprune.compress import CalibrationData, collect_moments


def planted(outputs, inputs, alpha, seed):
    """A matrix with singular values j^-alpha."""
    generator = np.random.default_rng(seed)
    rank = min(outputs, inputs)
    left, _ = np.linalg.qr(generator.standard_normal((outputs, rank)))
    right, _ = np.linalg.qr(generator.standard_normal((inputs, rank)))
    return torch.from_numpy(left * np.arange(1.0, rank + 1) ** -alpha @ right.T)


def inputs_with_spectrum(size, beta, seed):
    """Rows whose second moments have eigenvalues 3 j^-beta exactly."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    scale = np.sqrt(3 * size * np.arange(1.0, size + 1) ** -beta)
    return torch.from_numpy(scale[:, None] * basis.T)


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6)).double()
    with torch.no_grad():
        model[0].weight.copy_(planted(20, 12, 0.7, 1))
        model[2].weight.copy_(planted(6, 20, 1.9, 2))
    return model


def test_planted_exponents_are_measured(network):
    before = copy.deepcopy(network.state_dict())
    decay = measure_decay(network, [inputs_with_spectrum(12, 1.3, 3)])
    first, second = decay.layers
    assert (first.layer, first.outputs, first.inputs) == ("0", 20, 12)
    assert first.weight.exponent == pytest.approx(0.7, rel=1e-9)
    assert first.weight.scale == pytest.approx(1, rel=1e-9)
    assert second.weight.exponent == pytest.approx(1.9, rel=1e-9)
    # The paper's convention: mu_j ~ j^-beta, a large beta decays fast.
    assert first.covariance.exponent == pytest.approx(1.3, rel=1e-6)
    assert first.covariance.scale == pytest.approx(3, rel=1e-6)
    assert first.covariance.standard_error < 1e-6
    assert second.covariance.exponent > 0
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_convolution_is_outputs_by_channels_times_offsets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)).double()
    x = torch.randn(50, 3, 4, 4, dtype=torch.float64)
    conv = measure_decay(model, [x]).layers[0]
    assert (conv.outputs, conv.inputs, len(conv.eigenvalues)) == (5, 27, 3)
    values = np.linalg.svd(model[0].weight.detach().numpy().reshape(5, 27), compute_uv=False)
    assert conv.singular_values == pytest.approx(values)
    assert conv.weight == fit_decay(conv.singular_values)
    # Channels, every pixel that the layer reads counted: the same covariance as that of the spectra.
    covariance = np.einsum("ncij,ndij->cd", x.numpy(), x.numpy()) / (50 * 16)
    assert conv.eigenvalues == pytest.approx(np.linalg.eigvalsh(covariance)[::-1], rel=1e-6)


def test_moments_layers_and_forward_are_passed_on(network):
    x = inputs_with_spectrum(12, 1.3, 3)
    one = measure_decay(network, [x], ["2"])
    two = measure_decay(network, [], ["2"], moments=collect_moments(network, [x]))
    three = measure_decay(network, [{"a": x}], ["2"], forward=lambda net, batch: net(batch["a"]))
    for decay in (one, two, three):
        assert [item.layer for item in decay.layers] == ["2"]
        assert decay.layers[0].covariance == one.layers[0].covariance
    with pytest.raises(ValueError, match="nothing"):
        measure_decay(network, [x], ["nothing"])


def test_what_does_not_decay_has_no_exponent():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    decay = measure_decay(model, [torch.eye(4, dtype=torch.float64)])
    assert [item.weight for item in decay.layers] == [None, None]
    assert decay.layers[0].covariance is None
    records = decay.to_records()
    assert records[0]["alpha"] is None
    assert records[1]["beta_r2"] is None
    assert "-" in str(decay)


def test_rounding_of_float32_is_not_fitted():
    """A float32 matrix of rank 3: what rounding left behind its third singular value is no decay."""
    weight = planted(30, 20, 1.0, 5).numpy()
    low = np.linalg.svd(weight, full_matrices=False)
    weight = (low[0][:, :3] * low[1][:3]) @ low[2][:3]
    model = nn.Sequential(nn.Linear(20, 30))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(weight))
    fit = measure_decay(model, [torch.randn(60, 20)]).layers[0].weight
    assert fit.last == 3
    assert fit.exponent == pytest.approx(1, rel=1e-5)


def test_records_json_and_table(network):
    decay = measure_decay(network, [inputs_with_spectrum(12, 1.3, 3)])
    assert isinstance(decay, NetworkDecay)
    record = decay.to_records()[0]
    assert list(record) == ["layer", "outputs", "inputs", "alpha", "alpha_error", "V_0", "alpha_r2", "beta",
                            "beta_error", "U_0", "beta_r2"]  # fmt: skip
    loaded = json.loads(decay.to_json())
    assert loaded["layers"][0]["alpha"] == record["alpha"]
    assert len(loaded["singular_values"]["2"]) == 6
    assert len(loaded["eigenvalues"]["2"]) == 20
    assert str(decay).splitlines()[0].startswith("decay")
    assert len(str(decay).splitlines()) == 3 + 2


def test_spectral_layers_have_the_norms_of_the_covering_bounds():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(2.0), nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(27, 5)
    ).double()
    chain = trace_chain(model, CalibrationData([torch.randn(2, 1, 4, 4, dtype=torch.float64)]))
    for layer, size in zip(spectral_layers(chain), layer_sizes(chain), strict=True):
        assert layer.singular_values[0] == pytest.approx(size.operator_norm, rel=1e-12)
        assert (layer.outputs * layer.inputs, layer.biases) == (size.weights, size.biases)
        assert layer.bias_norm == pytest.approx(size.bias_norm, rel=1e-12)


def test_truncated_networks_stay_below_r_hat():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3))
    x = torch.randn(100, 1, 4, 4)
    data = CalibrationData([x])
    chain = trace_chain(model, data)
    layers = spectral_layers(chain)
    fits = [fit_decay(layer.singular_values) for layer in layers]
    ranks = {"0": 2, "3": 3, "5": 1}
    cut = truncate_weights(model, ranks)
    for name, rank in ranks.items():
        weight = cut.get_submodule(name).weight.detach().flatten(1).numpy()
        assert np.linalg.matrix_rank(weight) == rank
        assert weight.dtype == np.float64
    assert model[0].weight.dtype == torch.float32
    distance, _, _ = output_distance(model, cut, data)
    ceilings = truncation_error(layers, list(ranks.values()), fits, float(x.flatten(1).norm(dim=1).max()))
    assert 0 < distance <= ceilings.tails <= ceilings.power_law
    whole = truncate_weights(model, {"0": 99})
    with torch.no_grad():
        assert torch.equal(whole(x.double()), double_copy(model)(x.double()))
    with pytest.raises(ValueError, match="no Linear or convolution"):
        truncate_weights(model, {"1": 2})
    with pytest.raises(ValueError, match="rank"):
        truncate_weights(model, {"0": 0})
    assert math.isfinite(ceilings.power_law)
