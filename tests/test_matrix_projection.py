"""Matrix projection: the coder against a slow twin, what it returns is what was paid for, and its bound covers."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, small_convnet, small_mlp, snapshot, tensor
from scipy.linalg import hadamard
from torch import nn

from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.matrix_projection import SignMatrices, hadamard_transform, matrix_projection
from specprune.bounds.bound import QUANTISED
from specprune.bounds.occam import occam_bound, quantise
from specprune.bounds.projection_code import level_count, level_size, projection_code_length
from specprune.compress import CalibrationData


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_transform_is_the_hadamard_matrix(size):
    vector = np.random.default_rng(0).normal(size=size)
    np.testing.assert_allclose(hadamard_transform(vector), hadamard(size) @ vector, atol=1e-12)
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(vector)), size * vector, atol=1e-11)


@pytest.mark.parametrize(("weights", "k"), [(1, 1), (5, 1), (12, 7), (12, 16), (16, 16), (50, 20)])
def test_coder_against_the_definition(weights, k):
    """A^ = (1/k) sum_l <A, M_l> M_l with the matrices written out; their entries are signs, all different."""
    tensor_values = np.random.default_rng(1).normal(size=weights)
    signs = SignMatrices(weights, seed=3, index=2)
    matrices = np.array([signs.matrix(number) for number in range(k)])
    assert set(np.unique(matrices)) <= {-1.0, 1.0}
    assert len(np.unique(signs.rows)) == signs.size
    np.testing.assert_allclose(signs.encode(tensor_values)[:k] * math.sqrt(signs.size), matrices @ tensor_values)
    wanted = matrices.T @ (matrices @ tensor_values) / k
    np.testing.assert_allclose(signs.decode(signs.encode(tensor_values)[:k]), wanted, atol=1e-12)


def test_all_coefficients_give_the_matrix_back():
    tensor_values = np.random.default_rng(1).normal(size=(9, 13))
    signs = SignMatrices(117, seed=0, index=0)
    np.testing.assert_allclose(signs.decode(signs.encode(tensor_values)), tensor_values.ravel(), atol=1e-13)


def test_signs_are_right_on_average_and_differ():
    tensor_values = np.random.default_rng(4).normal(size=11)
    drawn = []
    for seed in range(4000):
        signs = SignMatrices(11, seed, 0)
        drawn.append(signs.decode(signs.encode(tensor_values)[:5]))
    error = np.std(drawn, axis=0) / math.sqrt(4000)
    assert np.all(np.abs(np.mean(drawn, axis=0) - tensor_values) < 5 * error)
    assert np.any(np.abs(np.mean(drawn[:20], axis=0) - tensor_values) > 0.05)
    one, two, three = SignMatrices(64, 0, 0), SignMatrices(64, 0, 1), SignMatrices(64, 1, 0)
    assert not np.array_equal(one.signs, two.signs)
    assert not np.array_equal(one.signs, three.signs)
    assert not np.array_equal(one.rows, two.rows)


def test_signs_never_change():
    """The code is fixed for good: these values come from Philox 4x64-10, key (7, 1), read word by word."""
    words = np.random.Philox(key=np.array([7, 1], dtype=np.uint64)).random_raw(16)
    signs = SignMatrices(8, seed=7, index=1)
    assert signs.signs.tolist() == [-1.0 if int(word) >= 2**63 else 1.0 for word in words[:8]]
    assert signs.rows.tolist() == sorted(range(8), key=lambda row: int(words[8 + row]))


def blobs(count=600, seed=0, features=8):
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(3, features, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 3, (count,), generator=generator)
    return centres[labels] + torch.randn(count, features, generator=generator), labels


def trained(batch_norm=False):
    x, y = blobs()
    model = small_mlp((8, 12, 3), seed=1)
    if batch_norm:
        model = nn.Sequential(model.fc1, nn.BatchNorm1d(12), nn.ReLU(), model.fc2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), [(x[:100], y[:100]), (x[100:350], y[100:350]), (x[350:], y[350:])]


def check_grid(values, exponent, bits):
    levels = values / 2.0 ** (exponent + 1 - bits)
    np.testing.assert_array_equal(levels, np.round(levels))
    assert -(2 ** (bits - 1)) <= levels.min() <= levels.max() < 2 ** (bits - 1)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_is_what_was_paid_for(batch_norm):
    model, batches = trained(batch_norm)
    before = snapshot(model)
    found = matrix_projection(model, batches, original_widths=[40], seed=2, delta=0.1)
    assert_unchanged(model, before)
    # Decode what was written, and nothing else: grid values within the exponent's range give the network's matrices.
    parameters = {name: p.detach().numpy() for name, p in found.model.named_parameters()}
    exponents = []
    for index, matrix in enumerate(found.matrices):
        check_grid(matrix.written, matrix.exponent, found.bits)
        assert len(matrix.written) == matrix.coefficients == level_size(matrix.weights, matrix.level)
        decoded = SignMatrices(matrix.weights, 2, index).decode(matrix.written).astype(np.float32)
        np.testing.assert_array_equal(decoded, parameters[matrix.name].ravel())
        exponents.append(matrix.exponent)
    biases = [value for value in parameters.values() if value.ndim == 1]
    for bias, exponent in zip(biases, found.bias_exponents, strict=True):
        check_grid(bias, exponent, found.bits)
        exponents.append(exponent)
    weights, levels = [m.weights for m in found.matrices], [m.level for m in found.matrices]
    length = projection_code_length(weights, levels, [b.size for b in biases], exponents, found.bits, 2, [40])
    assert found.code_length == pytest.approx(length, rel=1e-14)
    assert found.train_error == error_rate(*collect_logits(found.model, CalibrationData(batches)))
    assert found.bound.value == occam_bound(found.train_error, 600, found.code_length, 0.1).value
    assert found.bound.covers == QUANTISED
    assert found.samples == 600
    assert found.weights == 8 * 12 + 12 * 3
    assert found.coefficients == sum(level_size(w, level) for w, level in zip(weights, levels, strict=True))


def test_the_bound_says_something_where_data_abound():
    """Few weights and many examples: the bound is informative, and above the error on fresh data."""
    model, _ = trained()
    x, y = blobs(20_000, seed=5)
    found = matrix_projection(model, [(x, y)])
    fresh, labels = blobs(20_000, seed=6)
    with torch.no_grad():
        test = float((found.model(fresh).argmax(1) != labels).double().mean())
    assert test < found.bound.value < 0.25
    assert found.train_error < found.original_error + 0.12
    assert not found.bound.vacuous


def test_search_looks_at_part_of_the_data_only():
    model, _ = trained()
    x, y = blobs(3000, seed=5)
    batches = [(x[k : k + 50], y[k : k + 50]) for k in range(0, 3000, 50)]
    seen = []

    def forward(net, batch):
        seen.append(len(batch[0]))
        return net(batch[0])

    part = matrix_projection(model, batches, search_samples=200, forward=forward)
    few, part_calls = sum(seen), len(seen)
    seen.clear()
    whole = matrix_projection(model, batches, search_samples=3000, forward=forward)
    assert few < sum(seen) / 3
    assert part_calls > 0
    assert whole.samples == part.samples == 3000
    assert whole.train_error == error_rate(*collect_logits(whole.model, CalibrationData(batches)))


def test_convolutions_and_report():
    x = tensor(40, 2, 8, 8)
    y = torch.arange(40) % 3
    found = matrix_projection(small_convnet(), [(x, y)], delta=0.2)
    assert found.bound.value > 0.9  # 40 examples: hopeless
    payload = json.loads(found.to_json())
    assert [row["name"] for row in payload["matrices"]] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert payload["bound"]["name"] == "matrix projection (Occam kl)"
    assert "coefficients of" in str(found)
    assert payload["matrices"][0]["relative_error"] >= 0


def coverage_failures(charge, delta=0.1, draws=2000):
    """Share of data sets on which some network that the coder can write breaks its bound; all risks are known.

    Inputs are uniform on {-1, 1}^4, labels a fixed half-space flipped with probability 0.2; the networks are linear
    2 x 4 matrices, projected with every level, twelve seeds and 1 or 2 bits: a choice after the data is one of them.
    """
    generator = np.random.default_rng(12)
    inputs = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    clean = (inputs @ np.array([1.0, 0.7, -0.4, 0.2]) > 0).astype(int)
    wrong, lengths = [], []
    for seed, level, bits in itertools.product(range(12), range(level_count(8)), (1, 2)):
        matrix = generator.normal(size=8)
        signs = SignMatrices(8, seed, 0)
        rounded = quantise(signs.encode(matrix)[: level_size(8, level)], bits)
        logits = inputs @ signs.decode(rounded.values).reshape(2, 4).T
        wrong.append(logits.argmax(axis=1) != clean)
        lengths.append(projection_code_length([8], [level], [], [rounded.k], bits, seed) if charge else 0.0)
    wrong = np.array(wrong)
    risks = np.mean(np.where(wrong, 0.8, 0.2), axis=1)
    n = 300
    cells = np.full(32, 1 / 32) * np.tile([1.6, 0.4], 16)  # (input, label right or flipped)
    counts = generator.multinomial(n, cells, size=draws).reshape(draws, 16, 2)
    errors = np.einsum("dx,hx->dh", counts[:, :, 0], wrong) + np.einsum("dx,hx->dh", counts[:, :, 1], ~wrong)
    broken = np.zeros(draws, dtype=bool)
    informative = False
    for h, (risk, length) in enumerate(zip(risks, lengths, strict=True)):
        # The bound grows with the error: find by bisection the first error count at which it reaches the risk.
        low, high = -1, n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if occam_bound(middle / n, n, length, delta).value < risk else (low, middle)
        broken |= errors[:, h] <= low
        informative |= occam_bound(errors[:, h].min() / n, n, length, delta).value < 0.5
    return float(np.mean(broken)), informative


def test_bound_covers_whatever_was_chosen():
    failures, informative = coverage_failures(charge=True)
    assert failures <= 0.1
    assert informative
    # Without the price of the choice the bound breaks: the test can fail.
    assert coverage_failures(charge=False)[0] > 0.1


def test_refusals():
    model, batches = trained()
    with pytest.raises(ValueError, match="delta"):
        matrix_projection(model, batches, delta=0.0)
    with pytest.raises(ValueError, match="search_samples"):
        matrix_projection(model, batches, search_samples=0)
    with pytest.raises(ValueError, match="seed"):
        matrix_projection(model, batches, seed=-1)
    with pytest.raises(ValueError, match="below 2\\^64"):
        SignMatrices(4, 2**64, 0)
    with pytest.raises(TypeError, match="labelled"):
        matrix_projection(model, [batches[0][0]])
    with pytest.raises(ValueError, match="no matrix"):
        matrix_projection(nn.Flatten(), [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))])
    with_buffer = small_mlp((8, 12, 3))
    with_buffer.register_buffer("free", torch.zeros(3))
    with pytest.raises(ValueError, match="buffers"):
        matrix_projection(with_buffer, batches)
