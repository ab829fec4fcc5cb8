"""Fitted low-rank layers: against dense least squares, against reduced-rank regression, and on awkward data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.compress.low_rank_cost import LayerCost
from specprune.compress.low_rank_fit import FitProblem, _principal_rows, fit_options, fit_problem, place_fit
from specprune.compress.low_rank_layers import LayerSpectra
from specprune.compress.reconstruction import Problem


def drawn(seed, rows=200, columns=12, outputs=7, *, noise=0.3, intercept=True):
    """Correlated inputs, noisy targets, and their problem."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixing + 1.5
    weight = torch.randn(columns, outputs, generator=generator, dtype=torch.float64)
    targets = inputs @ weight + noise * torch.randn(rows, outputs, generator=generator, dtype=torch.float64) * 5 - 2.0
    return inputs, targets, problem_of(inputs, targets, intercept)


def problem_of(inputs, targets, intercept=True):
    mean = torch.cat([inputs, targets], 1).mean(0)
    width = inputs.shape[1]
    x, y = (inputs - mean[:width], targets - mean[width:]) if intercept else (inputs, targets)
    return Problem("layer", mean, x.T @ x / len(x), x.T @ y / len(x), y.square().mean(0), intercept)


def block_rows(fit):
    """The (k j, columns) matrix V."""
    return torch.block_diag(*fit.inner)


def left_by_lstsq(inputs, targets, gain, rows=None):
    """What dense least squares with a constant leaves of the weighed variance, on V x or on x."""
    x = inputs.numpy() if rows is None else (inputs @ rows.T).numpy()
    y = targets.numpy()
    x, y = x - x.mean(0), y - y.mean(0)
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(((y - x @ solution) ** 2 @ gain**2).sum() / (y**2 @ gain**2).sum())


@pytest.mark.parametrize("slices", [1, 2, 3, 6, 12])
def test_residuals_are_those_of_dense_least_squares(slices):
    inputs, targets, problem = drawn(0)
    gain = torch.linspace(0.2, 3.0, 7, dtype=torch.float64)
    fits = FitProblem(problem, gain, 0.0)
    ranks = min(7, 12 // slices)
    residuals = fits.residuals(slices, ranks)
    for rank in range(1, ranks + 1):
        fit = fits.fit(slices, rank)
        assert fit.inner.shape == (slices, rank, 12 // slices)
        assert fit.outer.shape == (slices, 7, rank)
        expected = left_by_lstsq(inputs, targets, gain.numpy(), block_rows(fit))
        assert residuals[rank - 1] == pytest.approx(expected, rel=1e-8)
        assert fit.residual == pytest.approx(residuals[rank - 1], rel=1e-9)
        # U is the least squares solution itself.
        rows = (inputs @ block_rows(fit).T).numpy()
        solution = np.linalg.lstsq(rows - rows.mean(0), targets.numpy() - targets.numpy().mean(0), rcond=None)[0]
        np.testing.assert_allclose(torch.cat(list(fit.outer), 1).T.numpy(), solution, rtol=1e-6, atol=1e-9)
    assert fits.floor() == pytest.approx(left_by_lstsq(inputs, targets, gain.numpy()), rel=1e-8)
    if slices == 1:
        assert residuals[-1] == pytest.approx(fits.floor(), rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), slices=st.sampled_from([1, 2, 4]), noise=st.floats(0, 3))
def test_more_rank_never_leaves_more(seed, slices, noise):
    fits = FitProblem(drawn(seed, noise=noise)[2], torch.ones(7, dtype=torch.float64), 0.0)
    residuals = fits.residuals(slices, min(7, 12 // slices))
    assert (np.diff(residuals) <= 1e-12).all()
    assert (residuals >= fits.floor() - 1e-7).all()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_one_slice_is_reduced_rank_regression(rank):
    inputs, targets, problem = drawn(3)
    gain = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    fit = FitProblem(problem, gain, 0.0).fit(1, rank)
    # The optimum: the singular values of the weighed least squares fit that are cut off, and what no fit explains.
    x = (inputs - inputs.mean(0)).numpy()
    y = (targets - targets.mean(0)).numpy() * gain.numpy()
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    tail = np.linalg.svd(fitted, compute_uv=False)[rank:]
    best = ((tail**2).sum() + ((y - fitted) ** 2).sum()) / (y**2).sum()
    assert fit.residual == pytest.approx(best, rel=1e-9)


def test_a_gain_is_a_scale_of_the_targets():
    inputs, targets, problem = drawn(5)
    gain = torch.linspace(0.1, 4.0, 7, dtype=torch.float64)
    scaled = FitProblem(problem_of(inputs, targets * gain), torch.ones(7, dtype=torch.float64), 0.0)
    np.testing.assert_allclose(FitProblem(problem, gain, 0.0).residuals(2, 5), scaled.residuals(2, 5), rtol=1e-8)


@pytest.mark.parametrize(("outputs", "columns"), [(9, 4), (4, 9), (5, 5)])
def test_principal_rows_of_either_shape_span_the_same(outputs, columns):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, outputs, columns, generator=generator, dtype=torch.float64)
    root = torch.randn(2, columns, columns, generator=generator, dtype=torch.float64)
    gram = root @ root.mT
    rows = _principal_rows(weight, gram)
    for w, g, found in zip(weight, gram, rows, strict=True):
        _, vectors = np.linalg.eigh((w @ g @ w.T).numpy())
        for rank in range(1, min(outputs, columns) + 1):
            expected = vectors[:, ::-1][:, :rank].T @ w.numpy()
            both = np.concatenate([expected, found[:rank].numpy()])
            assert np.linalg.matrix_rank(both, tol=1e-8 * np.abs(both).max()) == rank


@pytest.mark.parametrize("kind", ["dead", "equal", "constant targets"])
def test_data_without_full_rank_do_no_harm(kind):
    inputs, targets, _ = drawn(2)
    if kind == "dead":
        inputs[:, :6] = 0.0  # a whole slice of two
    elif kind == "equal":
        inputs[:, 1:6] = inputs[:, :1]
    else:
        targets = torch.full_like(targets, 3.0)
    problem = problem_of(inputs, targets)
    fits = FitProblem(problem, torch.ones(7, dtype=torch.float64), 1e-6)
    for slices, rank in ((1, 3), (2, 2), (6, 1)):
        fit = fits.fit(slices, rank)
        assert bool(torch.isfinite(fit.inner).all() and torch.isfinite(fit.outer).all())
        assert 0 <= fit.residual <= 1
        if kind != "constant targets":
            expected = left_by_lstsq(inputs, targets, np.ones(7), block_rows(fit))
            assert fit.residual == pytest.approx(expected, abs=1e-4)
    if kind == "constant targets":
        assert fits.floor() == 0.0


def test_options_leave_out_what_no_rank_can_lower():
    problem = drawn(4, noise=1.0)[2]
    layer = nn.Linear(12, 7).double()
    fits = fit_problem(nn.ModuleDict({"layer": layer}), problem, None, 0.0)
    options = fit_options(fits, LayerCost(LayerSpectra("layer", layer)))
    assert [option.slices for option in options] == [1, 2, 3, 4, 6]  # rank 1 of twelve slices costs more than the layer
    for option in options:
        assert option.unit == option.slices * 7 + 12
        assert len(option.scores) == (12 * 7 - 1) // option.unit
        expected = np.maximum(fits.residuals(option.slices, len(option.scores)) - fits.floor(), 0)
        np.testing.assert_allclose(option.scores, expected, atol=1e-12)
    assert fits.floor() > 0.01


@pytest.mark.parametrize("place", ["bias", "norm", "nowhere"])
def test_the_constant_goes_where_there_is_room(place):
    inputs, targets, problem = drawn(6, intercept=place != "nowhere")
    model = nn.ModuleDict({"layer": nn.Linear(12, 7, bias=place == "bias"), "norm": nn.BatchNorm1d(7)}).double().eval()
    with torch.no_grad():
        model["norm"].running_mean.copy_(torch.arange(7.0))
    before = {"norm": model["norm"].running_mean.clone()}
    norm = "norm" if place == "norm" else None
    fits = fit_problem(model, problem, norm, 1e-9)
    parts = place_fit(model, problem, fits.fit(2, 3), norm, model)
    got = parts(inputs)
    if place == "norm":
        wanted = (targets - before["norm"]).mean(0)
        torch.testing.assert_close((got - model["norm"].running_mean).mean(0), wanted, rtol=1e-9, atol=1e-9)
    else:
        assert torch.equal(model["norm"].running_mean, before["norm"])
        if place == "bias":
            torch.testing.assert_close(got.mean(0), targets.mean(0), rtol=1e-9, atol=1e-9)
        else:
            assert parts[1].bias is None
            x = (inputs @ block_rows(fits.fit(2, 3)).T).numpy()
            expected = x @ np.linalg.lstsq(x, targets.numpy(), rcond=None)[0]
            np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
