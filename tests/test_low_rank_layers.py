"""Low-rank layers: exact at full rank in every geometry, counts, errors against dense algebra, data, bad input."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.bounds.low_rank_error import layer_error_bound
from specprune.compress.layers import weight_matrix
from specprune.compress.low_rank_layers import LayerSpectra, parameters_after
from specprune.compress.low_rank_parts import FactoredLayer, SlicedLinear
from specprune.compress.moments import collect_moments

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": (0, 2), "stride": (2, 1)},
    {"kernel_size": (5, 2), "padding": (2, 1), "dilation": (1, 2)},
    {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": (2, 3), "padding": "valid", "stride": (1, 3)},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": (1, 3), "padding": (1, 1), "stride": 2},
    {"kernel_size": (3, 1), "padding": (2, 0), "dilation": 2},
]
MODES = ("zeros", "reflect", "replicate", "circular")


def filled(layer, seed=0):
    """The layer with weights of a seed."""
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(tensor(*parameter.shape, seed=seed + index, dtype=torch.float64))
    return layer


def conv(inputs=6, outputs=8, seed=0, **geometry):
    return filled(nn.Conv2d(inputs, outputs, **{"kernel_size": 3, **geometry}).double(), seed)


def linear(inputs=12, outputs=9, seed=0, **keywords):
    return filled(nn.Linear(inputs, outputs, **keywords).double(), seed)


def every_split(spectra):
    """All foldings and numbers of slices of a layer, with the full rank."""
    for folding, slices in itertools.product(spectra.foldings(), spectra.slice_counts()):
        yield folding, slices, spectra.values(folding, slices).shape[1]


def relative(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


def folded(layer, folding):
    """The folded matrix by NumPy, written out from the definition: rows by columns."""
    weight = layer.weight.detach().double().numpy()
    if weight.ndim == 2:
        weight = weight[:, :, None, None]
    f, c, a, b = weight.shape
    order, shape = {
        0: ((0, 1, 2, 3), (f, c * a * b)),
        1: ((0, 2, 1, 3), (f * a, c * b)),
        2: ((0, 3, 1, 2), (f * b, c * a)),
        3: ((0, 2, 3, 1), (f * a * b, c)),
    }[folding]
    return weight.transpose(order).reshape(shape)


def cut_by_numpy(matrix, slices, rank):
    """The matrix with every slice of columns replaced by its best approximation of that rank."""
    parts = []
    for part in np.split(matrix, slices, axis=1):
        u, s, vt = np.linalg.svd(part, full_matrices=False)
        parts.append(u[:, :rank] * s[:rank] @ vt[:rank])
    return np.hstack(parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_full_rank_reproduces_a_convolution(geometry, mode):
    inputs = tensor(2, 6, 11, 10, dtype=torch.float64)
    for bias in (True, False):
        layer = conv(**geometry, padding_mode=mode, bias=bias)
        spectra = LayerSpectra("conv", layer)
        for folding, slices, rank in every_split(spectra):
            built = spectra.build(folding, slices, rank)
            assert relative(built(inputs), layer(inputs)) < 1e-12, (folding, slices)
            assert all(type(part) is nn.Conv2d for part in built)
            assert built[0].bias is None
            assert (built[1].bias is not None) == bias


def test_single_precision_is_kept_and_exact_to_its_rounding():
    layer = conv().float()
    spectra = LayerSpectra("conv", layer)
    inputs = tensor(2, 6, 9, 9)
    for folding, slices, rank in every_split(spectra):
        built = spectra.build(folding, slices, rank)
        assert {p.dtype for p in built.parameters()} == {torch.float32}
        assert relative(built(inputs), layer(inputs)) < 1e-5


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_reproduces_a_linear_layer(shape, bias):
    layer = linear(bias=bias)
    spectra = LayerSpectra("linear", layer)
    assert spectra.foldings() == (0,)
    assert spectra.slice_counts() == (1, 2, 3, 4, 6, 12)
    inputs = tensor(*shape, dtype=torch.float64)
    for _, slices, rank in every_split(spectra):
        assert relative(spectra.build(0, slices, rank)(inputs), layer(inputs)) < 1e-12


@pytest.mark.parametrize("layer", [conv(), conv(kernel_size=(1, 3), bias=False), linear(), linear(7, 5)], ids=repr)
def test_parameter_counts_are_those_of_the_modules(layer):
    spectra = LayerSpectra("layer", layer)
    for folding, slices, full in every_split(spectra):
        for rank in {1, (full + 1) // 2, full}:
            built = spectra.build(folding, slices, rank)
            count = sum(p.numel() for p in built.parameters())
            assert count == parameters_after(spectra, folding, slices, rank)
            assert count - sum(p.numel() for p in layer.parameters()) > 0 or rank < full  # full rank always grows


def test_axes_of_size_one_make_foldings_equal():
    assert LayerSpectra("a", conv(kernel_size=3)).foldings() == (0, 1, 2, 3)
    assert LayerSpectra("a", conv(kernel_size=(1, 3))).foldings() == (0, 2)
    assert LayerSpectra("a", conv(kernel_size=(3, 1))).foldings() == (0, 1)
    assert LayerSpectra("a", conv(kernel_size=1)).foldings() == (0,)


@pytest.mark.parametrize("layer", [conv(), linear()], ids=repr)
def test_lower_ranks_are_the_best_approximations_of_the_slices(layer):
    """The new layer, read off from its answers to unit impulses, has the weights that NumPy's SVD gives."""
    spectra = LayerSpectra("layer", layer)
    for folding, slices, full in every_split(spectra):
        rank = max(1, full // 2)
        built = spectra.build(folding, slices, rank)
        bias = 0 if layer.bias is None else layer.bias
        with torch.no_grad():
            if isinstance(layer, nn.Linear):
                weight = (built(torch.eye(12, dtype=torch.float64)) - bias).T
            else:
                impulses = torch.eye(54, dtype=torch.float64).reshape(54, 6, 3, 3)
                weight = (built(impulses)[:, :, 0, 0] - bias).T.reshape(layer.weight.shape)
        found = type(layer).__new__(type(layer))
        nn.Module.__init__(found)
        found.weight = nn.Parameter(weight)
        np.testing.assert_allclose(
            folded(found, folding), cut_by_numpy(folded(layer, folding), slices, rank), atol=1e-12
        )


@pytest.mark.parametrize("layer", [conv(), conv(3, 20, kernel_size=(3, 2)), linear(12, 30)], ids=repr)
def test_errors_are_those_of_dense_algebra(layer):
    spectra = LayerSpectra("layer", layer)
    for folding, slices, full in every_split(spectra):
        matrix = folded(layer, folding)
        norm = np.linalg.norm(matrix, 2)
        for rank in {1, full // 2, full - 1} & set(range(1, full)):
            errors = spectra.decomposition(folding, slices).errors(rank)
            values = [np.linalg.svd(part, compute_uv=False)[rank] for part in np.split(matrix, slices, axis=1)]
            exact = np.linalg.norm(matrix - cut_by_numpy(matrix, slices, rank), 2) / norm
            assert errors.exact == pytest.approx(exact, rel=1e-10)
            assert errors.largest == pytest.approx(max(values) / norm, rel=1e-10)
            assert errors.theorem == pytest.approx(math.sqrt(slices) * max(values) / norm, rel=1e-10)
        assert spectra.decomposition(folding, slices).errors(full).exact == 0


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 9),
    inputs=st.sampled_from([1, 2, 4, 6, 12]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 1)]),
    decay=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_the_exact_error_lies_between_the_other_two(outputs, inputs, kernel, decay, seed):
    layer = conv(inputs, outputs, seed=seed, kernel_size=kernel)
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, inputs + 1)[None, :, None, None] ** -decay)
    spectra = LayerSpectra("conv", layer)
    for folding, slices, full in every_split(spectra):
        previous = math.inf
        for rank in range(1, full + 1):
            errors = spectra.decomposition(folding, slices).errors(rank)
            assert errors.largest <= errors.exact * (1 + 1e-9) + 1e-14
            assert errors.exact <= errors.theorem * (1 + 1e-9) + 1e-14
            assert errors.largest <= previous
            previous = errors.largest


def test_both_ends_of_the_interval_are_reached():
    """Slices with one common column space add up to sqrt(k); slices with orthogonal ones do not add up."""
    column, other = torch.eye(4, dtype=torch.float64)[:2]
    layer = linear(4, 4, bias=False)
    big = 10 * torch.eye(4, dtype=torch.float64)[2]
    with torch.no_grad():
        layer.weight.copy_(torch.stack([big, column, big, column], 1))
    errors = LayerSpectra("a", layer).decomposition(0, 2).errors(1)
    assert errors.exact == pytest.approx(errors.theorem)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([big, column, big, other], 1))
    errors = LayerSpectra("a", layer).decomposition(0, 2).errors(1)
    assert errors.exact == pytest.approx(errors.largest)


def test_theorem_1_as_a_bound():
    bound = layer_error_bound([1.0, 3.0, 2.0, 0.0], 4.0)
    assert bound.value == pytest.approx(2 * 3 / 4)
    assert bound.valid
    assert bound.vacuous
    assert bound.confidence is None
    assert layer_error_bound([0.5], 2.0).value == 0.25
    assert not layer_error_bound([0.5], 2.0).vacuous
    with pytest.raises(ValueError, match="same units"):
        layer_error_bound([3.0], 2.0)
    with pytest.raises(ValueError, match="norm"):
        layer_error_bound([0.0], 0.0)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (5, 1), (2, 3)])
def test_tiny_widths(inputs, outputs):
    for layer in (linear(inputs, outputs), conv(inputs, outputs)):
        spectra = LayerSpectra("tiny", layer)
        x = tensor(2, inputs, *([5, 5] if isinstance(layer, nn.Conv2d) else []), dtype=torch.float64)
        for folding, slices, rank in every_split(spectra):
            assert relative(spectra.build(folding, slices, rank)(x), layer(x)) < 1e-12


def test_rank_deficient_and_zero_weights():
    layer = linear(12, 9, bias=False)
    with torch.no_grad():
        layer.weight.copy_(tensor(9, 2, dtype=torch.float64) @ tensor(2, 12, seed=1, dtype=torch.float64))
    spectra = LayerSpectra("a", layer)
    x = tensor(4, 12, dtype=torch.float64)
    assert relative(spectra.build(0, 1, 2)(x), layer(x)) < 1e-12
    assert spectra.decomposition().errors(2).exact < 1e-12
    nn.init.zeros_(layer.weight)
    spectra = LayerSpectra("zero", layer)
    assert torch.equal(spectra.build(0, 3, 1)(x), torch.zeros(4, 9, dtype=torch.float64))
    assert spectra.decomposition(0, 3).errors(1).theorem == 0


def test_decomposing_a_part_again_changes_nothing():
    layer = linear()
    x = tensor(4, 12, dtype=torch.float64)
    once = LayerSpectra("a", layer).build(0, 1, 4)
    twice = LayerSpectra("b", once[1]).build(0, 1, 4)
    assert relative(twice(once[0](x)), once(x)) < 1e-12


def test_each_decomposition_is_computed_once(monkeypatch):
    calls = []
    for name in ("svd", "svdvals"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, original=original, **keys: calls.append(1) or original(*args, **keys)
        )
    spectra = LayerSpectra("a", conv())
    for _ in range(3):
        spectra.values(1, 2)
        spectra.decomposition(1, 2).errors(1)
        spectra.build(1, 2, 3)
    assert len(calls) == 3  # values, decomposition, and the norm of the whole matrix


def test_modes_gradients_and_random_state_are_those_of_the_layer():
    layer = conv().eval()
    layer.weight.requires_grad_(False)
    state = torch.get_rng_state()
    built = LayerSpectra("a", layer).build(0, 2, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert not built.training
    assert not built[1].training
    assert [p.requires_grad for p in built.parameters()] == [False, False, True]
    layer.train()
    assert LayerSpectra("a", layer).build(0, 2, 2)[0].training


def test_a_sliced_linear_layer_scripts_and_keeps_its_state():
    built = LayerSpectra("a", linear()).build(0, 3, 2)
    assert type(built[0]) is SlicedLinear
    assert "slices=3, in_features=12, out_features=6" in repr(built)
    x = tensor(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(built)(x), built(x))
    other = LayerSpectra("b", linear(seed=7)).build(0, 3, 2)
    other.load_state_dict(built.state_dict())
    assert torch.equal(other(x), built(x))
    built(x).sum().backward()
    assert built[0].weight.grad.abs().sum() > 0


def test_a_low_rank_layer_is_an_ordinary_sequence_of_two():
    x = tensor(2, 6, 9, 9, dtype=torch.float64)
    built = LayerSpectra("a", conv(bias=False)).build(2, 3, 2).eval()
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built)), copy.copy(built)):
        assert type(twin) is FactoredLayer
        assert twin.folding == 2
        assert torch.equal(twin(x), built(x))
    assert isinstance(built, nn.Sequential)
    assert list(built.state_dict()) == ["0.weight", "1.weight"]
    torch.testing.assert_close(torch.jit.script(built)(x), built(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(built)(x), built(x))
    assert torch.equal(built[1:](built[:1](x)), built(x))
    assert built[:1].folding is None  # no part of it is the whole


def correlated(count, columns, seed=0):
    """Inputs whose energy lies mostly in a few directions."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((columns, columns)))[0]
    rows = generator.standard_normal((count, columns)) * np.arange(1, columns + 1) ** -1.5 @ basis
    return torch.from_numpy(rows)


def with_moment(layer, inputs):
    moments = collect_moments(nn.Sequential(layer), [inputs], level="patch")["0"]
    return LayerSpectra("a", layer, moments.gram / moments.rows)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_with_data_a_linear_layer_loses_what_theory_says(rank):
    """E||(W - W^) x||^2 is the sum of the tail's squared values: the least that any matrix of this rank reaches."""
    layer, inputs = linear(bias=False), correlated(400, 12)
    spectra = with_moment(layer, inputs)
    lost = (spectra.build(0, 1, rank)(inputs) - layer(inputs)).detach().square().sum(1).mean()
    values = spectra.values(0, 1)[0]
    assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)
    outputs = np.linalg.svd(layer(inputs).detach().numpy() / math.sqrt(400), compute_uv=False)
    np.testing.assert_allclose(values.numpy(), outputs, rtol=1e-7, atol=1e-9)
    plain = (LayerSpectra("a", layer).build(0, 1, rank)(inputs) - layer(inputs)).detach().square().sum(1).mean()
    assert float(lost) < 0.5 * float(plain)


def test_with_data_a_convolution_beats_the_plain_one():
    layer = conv(4, 10, padding=1)
    with torch.no_grad():
        inputs = nn.functional.avg_pool2d(tensor(20, 4, 16, 16, dtype=torch.float64), 3, 1)  # neighbours correlate
    data, plain = with_moment(layer, inputs), LayerSpectra("a", layer)
    for rank in (1, 3, 6):
        errors = [relative(spectra.build(0, 1, rank)(inputs), layer(inputs)) for spectra in (data, plain)]
        assert errors[0] < 0.9 * errors[1]
        matrix = weight_matrix(layer).numpy() @ np.linalg.cholesky(data.moment.numpy())
        difference = matrix - cut_by_numpy(matrix, 1, rank)
        exact = np.linalg.norm(difference, 2) / np.linalg.norm(matrix, 2)
        assert data.decomposition().errors(rank).exact == pytest.approx(exact, rel=1e-6)


def test_with_data_directions_without_data_do_no_harm():
    layer = linear(12, 30, bias=False)
    inputs = correlated(50, 12)
    inputs[:, 5:] = 0
    spectra = with_moment(layer, inputs)
    assert relative(spectra.build(0, 1, 5)(inputs), layer(inputs)) < 1e-6
    assert all(bool(torch.isfinite(p).all()) for p in spectra.build(0, 1, 3).parameters())


def test_bad_input_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"layer 'c': it has groups=2"):
        LayerSpectra("c", nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match=r"layer 'c': it is a Conv1d"):
        LayerSpectra("c", nn.Conv1d(4, 4, 3))
    broken = linear()
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer 'broken' has NaN"):
        LayerSpectra("broken", broken)
    with pytest.raises(ValueError, match="12 columns"):
        LayerSpectra("a", linear(), torch.eye(11))
    spectra = LayerSpectra("a", linear())
    with pytest.raises(ValueError, match=r"slices=5 .* \(1, 2, 3, 4, 6, 12\)"):
        spectra.values(0, 5)
    with pytest.raises(ValueError, match="folding=4"):
        spectra.build(4, 1, 1)
    for rank in (0, 10):
        with pytest.raises(ValueError, match="between 1 and 9"):
            spectra.build(0, 1, rank)
        with pytest.raises(ValueError, match="between 1 and 9"):
            spectra.decomposition().errors(rank)
    with pytest.raises(ValueError, match="where a moment is given"):
        LayerSpectra("a", linear(), torch.eye(12)).values(0, 2)
