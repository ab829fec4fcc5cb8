"""Sums of outer products by triangles, chunks and shifts against the plain sum over explicit rows in float64."""

import numpy as np
import pytest
import torch
from helpers import tensor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.compress import gram
from specprune.compress.gram import CHUNK, GramSum, full_precision, is_shiftable
from specprune.compress.layers import Positions, output_size, patch_rows

CPU = torch.device("cpu")


def relative_error(found, rows):
    """The largest |G_ij - exact| / sqrt(G_ii G_jj)."""
    rows = rows.double()
    exact = rows.T @ rows
    scale = exact.diagonal().sqrt()
    return float(((found - exact).abs() / torch.outer(scale, scale)).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [1, 5, 127, 128, 300, 700])
def test_rows_in_batches_of_any_size(columns, dtype):
    torch.manual_seed(columns)
    sizes = [1, 250, 250, 700, 30, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 3]
    rows = (torch.randn(sum(sizes), columns, dtype=dtype) + 0.5).relu()
    sums = GramSum(columns, CPU)
    for part in rows.split(sizes):
        sums.add(part)
    assert sums.rows == len(rows)
    found = sums.finish()
    assert found.dtype == sums.total.dtype == torch.float64
    assert torch.equal(found, found.T) or columns < 128
    bound = 1e-13 if dtype == torch.float64 else 5e-7
    assert relative_error(found, rows) < bound
    assert float((sums.total / rows.double().sum(0) - 1).abs().max()) < bound


@pytest.mark.parametrize("columns", [16, 160])
def test_the_error_does_not_grow_with_the_rows(columns):
    # equal positive numbers are the worst case for a sum in single precision: every rounding may have one sign
    for value in (0.1, 0.7):
        sums = GramSum(columns, CPU)
        part = torch.full((250, columns), value)
        for _ in range(400):
            sums.add(part)
        exact = 1e5 * float(part[0, 0]) ** 2
        assert np.abs(sums.finish().numpy() / exact - 1).max() < 2e-6
        plain = torch.zeros(())
        for _ in range(100_000):
            plain = plain + part[0, 0] ** 2
        assert abs(float(plain) / exact - 1) > 1e-4  # what the chunks avoid
    torch.manual_seed(0)
    rows = torch.rand(100_000, columns)
    sums = GramSum(columns, CPU)
    for part in rows.split(250):
        sums.add(part)
    assert relative_error(sums.finish(), rows) < 2e-7


@pytest.mark.parametrize("columns", [8, 200])
def test_rows_of_any_layout(columns):
    wide = tensor(columns, 3000, dtype=torch.float64)
    for rows in (wide.T, wide.T[::2], tensor(900, 2 * columns, dtype=torch.float64)[:, ::2]):
        sums = GramSum(columns, CPU)
        sums.add(rows)
        assert relative_error(sums.finish(), rows) < 1e-13


def test_numbers_that_are_not_finite_stay_visible():
    for columns in (4, 200):
        rows = tensor(10, columns)
        rows[3, 1] = float("nan")
        sums = GramSum(columns, CPU)
        sums.add(rows)
        for _ in range(5):
            sums.add(tensor(CHUNK, columns))
        found = sums.finish()
        assert torch.isnan(found.diagonal()).nonzero().flatten().tolist() == [1]


def shifted(layer, parts):
    sums = GramSum(layer.in_channels * layer.weight[0, 0].numel(), CPU)
    for part in parts:
        sums.add_patches(layer, part)
    return sums


axis = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 3), st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(
    vertical=axis,
    horizontal=axis,
    plane=st.booleans(),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]),
    images=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 1024]),
)
def test_shifts_are_the_explicit_patches(vertical, horizontal, plane, mode, images, chunk):
    (kernel, dilation, padding, size) = zip(*((vertical, horizontal) if plane else (horizontal,)), strict=True)
    limit = {"reflect": 1, "circular": 0}.get(mode)
    assume(limit is None or all(p <= n - limit for p, n in zip(padding, size, strict=True)))
    kind = nn.Conv2d if plane else nn.Conv1d
    layer = kind(2, 1, kernel, dilation=dilation, padding=padding, padding_mode=mode).double()
    inputs = tensor(images, 2, *size, dtype=torch.float64, seed=images) + 0.3
    assume(all(outputs > 0 for outputs in output_size(layer, inputs)))
    rows = patch_rows(layer, inputs, Positions(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "LINE", chunk)
        sums = shifted(layer, [inputs])
    assert sums.rows == len(rows)
    torch.testing.assert_close(sums.total, rows.sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums.finish(), rows.T @ rows, rtol=1e-10, atol=1e-10)


def test_shifts_of_maps_of_several_sizes_and_batches():
    layer = nn.Conv2d(8, 4, (3, 5), padding="same", groups=2).double()
    parts = [tensor(n, 8, h, w, dtype=torch.float64, seed=n) for n, h, w in [(3, 8, 11), (130, 12, 20), (1, 6, 10)]]
    rows = torch.cat([patch_rows(layer, part, Positions(None)) for part in parts])
    sums = shifted(layer, parts)
    torch.testing.assert_close(sums.finish(), rows.T @ rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums.total, rows.sum(0), rtol=1e-10, atol=1e-10)


def test_shifts_and_explicit_rows_in_one_sum():
    layer = nn.Conv2d(16, 4, 3).double()
    small, large = tensor(3, 16, 5, 5, dtype=torch.float64), tensor(3, 16, 9, 9, dtype=torch.float64)
    assert is_shiftable(layer, large)
    assert not is_shiftable(layer, small)
    sums = GramSum(144, CPU)
    sums.add(patch_rows(layer, small, Positions(None)))
    sums.add_patches(layer, large)
    rows = torch.cat([patch_rows(layer, part, Positions(None)) for part in (small, large)])
    assert sums.rows == len(rows)
    torch.testing.assert_close(sums.finish(), rows.T @ rows, rtol=1e-10, atol=1e-10)


def test_shifts_in_single_precision():
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 4, 3, padding=1)
    inputs = torch.rand(300, 12, 14, 14)
    assert relative_error(shifted(layer, inputs.split(100)).finish(), patch_rows(layer, inputs, Positions(None))) < 5e-7


def test_which_convolutions_are_shifted():
    inputs = torch.zeros(1, 8, 9, 9)
    assert is_shiftable(nn.Conv2d(8, 1, 3), inputs)
    assert is_shiftable(nn.Conv2d(8, 1, 3, dilation=2, padding=2), inputs)
    assert is_shiftable(nn.Conv1d(8, 1, 3), inputs[0])
    for other in (
        nn.Conv2d(8, 1, 1),
        nn.Conv2d(8, 1, 3, stride=(1, 2)),
        nn.Conv2d(8, 1, 7),
        nn.ConvTranspose2d(8, 1, 3),
        nn.Conv2d(1, 1, 3),
        nn.Linear(9, 1),
    ):
        assert not is_shiftable(other, inputs)
    assert not is_shiftable(nn.Conv3d(8, 1, 2), torch.zeros(1, 8, 5, 5, 5))


SWITCHES = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # one for each backend, since torch 2.9


@pytest.mark.skipif(SWITCHES, reason="this torch has a switch for each backend")
def test_products_under_reduced_precision_of_an_older_torch():
    rows = torch.rand(500, 40)
    torch.set_float32_matmul_precision("medium")
    try:
        sums = GramSum(40, CPU)
        sums.add(rows)
        with full_precision(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(sums.finish(), rows) < 5e-7


@pytest.mark.skipif(not SWITCHES, reason="this torch has one switch for all backends")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["function", "backend"])
def test_products_under_autocast_and_reduced_precision(how, autocast):
    rows = torch.rand(500, 40)
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        if how == "function":
            torch.set_float32_matmul_precision("medium")
        else:
            backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            sums = GramSum(40, CPU)
            sums.add(rows)
            with full_precision(CPU):
                assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
                assert (rows @ rows.T).dtype == torch.float32
            assert (rows @ rows.T).dtype == (torch.bfloat16 if autocast else torch.float32)
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
        if how == "function":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if how == "function":
            torch.set_float32_matmul_precision("highest")
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting
    assert relative_error(sums.finish(), rows) < 5e-7
