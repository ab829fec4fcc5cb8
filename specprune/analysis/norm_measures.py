"""Measures made of norms, distances, margins and counts: those of the large studies of generalization measures.

With v the quantity that a bound's square holds, a measure is sqrt(v / m), so that it is on the scale of a gap; where v
is a product over layers, it is (ln v - ln m) / 2, which orders networks the same way and cannot overflow.  Batch norms
are folded into their layers first, and a convolution is the matrix of its kernels, outputs x (channels, offsets),
unless the name ends in "_fft": then ||W_i||_2 is the norm of the map of whole images.

Source: Jiang et al. 2019 (arXiv:1912.02178) and Dziugaite et al. 2020 (arXiv:2010.11924); which quantity carries which
name is as recalled in the project's theory notes, part D.11; formulas are restated here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch

from specprune.analysis.measured_network import Measure, MeasuredNetwork, as_measure, measures_in
from specprune.bounds.bound import FloatArray

JIANG = "Jiang et al. 2019, arXiv:1912.02178"
_NEYSHABUR = "Neyshabur et al. 2015, arXiv:1503.00036, without constants and logarithms"


def root(value: float, samples: int) -> float:
    """Return sqrt(v / m)."""
    return math.sqrt(value / samples)


def log_root(log_value: float, samples: int) -> float:
    """Return ln sqrt(v / m) from ln v."""
    return (log_value - math.log(samples)) / 2


def _spectral(matrices: Sequence[FloatArray]) -> list[float]:
    return [float(np.linalg.norm(matrix, 2)) for matrix in matrices]


def _frobenius(matrices: Sequence[FloatArray]) -> list[float]:
    return [float(np.linalg.norm(matrix)) for matrix in matrices]


def _moved(net: MeasuredNetwork) -> list[FloatArray]:
    return [now - before for now, before in zip(net.matrices, net.start_matrices, strict=True)]


def _log_product(norms: Sequence[float]) -> float:
    """Return the logarithm of the product of the squares."""
    return 2 * math.fsum(math.log(norm) for norm in norms)


def _log_margin(net: MeasuredNetwork) -> float:
    """Return ln gamma^2."""
    return 2 * math.log(net.margin)


def _ratios(above: Sequence[float], below: Sequence[float]) -> float:
    return math.fsum((a / b) ** 2 for a, b in zip(above, below, strict=True))


def _log_main(net: MeasuredNetwork, norms: Sequence[float], lengths: Sequence[float]) -> float:
    """Return ln of the spectral bound's main term; a network that has not moved from its start has -inf."""
    ratios = _ratios(lengths, norms)
    if ratios == 0:
        raise ValueError("the network is where it started: the logarithm of its distance does not exist")
    return _log_product(norms) - _log_margin(net) + math.log(ratios)


def _log_sum(log_product: float, depth: int) -> float:
    """Return ln of d (product)^(1/d)."""
    return math.log(depth) + log_product / depth


@as_measure(r"\sqrt{\omega / m}", JIANG)
def params(net: MeasuredNetwork) -> float:
    """Number of weights and biases."""
    return root(net.vector.size, net.samples)


@as_measure(r"\sqrt{\|w\| / m}", JIANG)
def l2(net: MeasuredNetwork) -> float:
    """Length of all weights and biases."""
    return root(float(np.linalg.norm(net.vector)), net.samples)


@as_measure(r"\sqrt{\|w - w_0\| / m}", JIANG, needs="start")
def l2_dist(net: MeasuredNetwork) -> float:
    """Distance that all weights and biases went in training."""
    return root(float(np.linalg.norm(net.vector - net.start_vector)), net.samples)


@as_measure(r"\sqrt{1 / (\gamma^2 m)}", JIANG, cost="pass")
def inverse_margin(net: MeasuredNetwork) -> float:
    """One over the margin that nine tenths of the training set exceed."""
    return root(net.margin**-2, net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 / m)", JIANG)
def log_prod_of_spec(net: MeasuredNetwork) -> float:
    """Product of the layers' operator norms."""
    return log_root(_log_product(_spectral(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 / (\gamma^2 m))", JIANG, cost="pass")
def log_prod_of_spec_over_margin(net: MeasuredNetwork) -> float:
    """Product of the layers' operator norms over the margin."""
    return log_root(_log_product(_spectral(net.matrices)) - _log_margin(net), net.samples)


@as_measure(
    r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 \sum_i \|W_i - W_i^0\|_F^2 / \|W_i\|_2^2 / (\gamma^2 m))",
    JIANG,
    cost="pass",
    needs="start",
)
def log_spec_init_main(net: MeasuredNetwork) -> float:
    """Main term of the spectral bound with distances from the start."""
    return log_root(_log_main(net, _spectral(net.matrices), _frobenius(_moved(net))), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 \sum_i \|W_i\|_F^2 / \|W_i\|_2^2 / (\gamma^2 m))", JIANG, cost="pass")
def log_spec_orig_main(net: MeasuredNetwork) -> float:
    """Main term of the spectral bound with distances from zero."""
    return log_root(_log_main(net, _spectral(net.matrices), _frobenius(net.matrices)), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i\|_F^2 / \|W_i\|_2^2 / m}", JIANG)
def fro_over_spec(net: MeasuredNetwork) -> float:
    """Sum of the layers' stable ranks."""
    return root(_ratios(_frobenius(net.matrices), _spectral(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_2^2)^{1/d} / m)", JIANG)
def log_sum_of_spec(net: MeasuredNetwork) -> float:
    """Geometric mean of the layers' operator norms, times the depth."""
    return log_root(_log_sum(_log_product(_spectral(net.matrices)), len(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_2^2 / \gamma^2)^{1/d} / m)", JIANG, cost="pass")
def log_sum_of_spec_over_margin(net: MeasuredNetwork) -> float:
    """Geometric mean of the layers' operator norms over the margin, times the depth."""
    return log_root(_log_sum(_log_product(_spectral(net.matrices)) - _log_margin(net), len(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_F^2 / m)", JIANG)
def log_prod_of_fro(net: MeasuredNetwork) -> float:
    """Product of the layers' Frobenius norms."""
    return log_root(_log_product(_frobenius(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_F^2 / (\gamma^2 m))", JIANG, cost="pass")
def log_prod_of_fro_over_margin(net: MeasuredNetwork) -> float:
    """Product of the layers' Frobenius norms over the margin."""
    return log_root(_log_product(_frobenius(net.matrices)) - _log_margin(net), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_F^2)^{1/d} / m)", JIANG)
def log_sum_of_fro(net: MeasuredNetwork) -> float:
    """Geometric mean of the layers' Frobenius norms, times the depth."""
    return log_root(_log_sum(_log_product(_frobenius(net.matrices)), len(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_F^2 / \gamma^2)^{1/d} / m)", JIANG, cost="pass")
def log_sum_of_fro_over_margin(net: MeasuredNetwork) -> float:
    """Geometric mean of the layers' Frobenius norms over the margin, times the depth."""
    return log_root(_log_sum(_log_product(_frobenius(net.matrices)) - _log_margin(net), len(net.matrices)), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i - W_i^0\|_F^2 / m}", JIANG, needs="start")
def fro_dist(net: MeasuredNetwork) -> float:
    """Distance that the layers' weights went in training."""
    return root(sum(length**2 for length in _frobenius(_moved(net))), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i - W_i^0\|_2^2 / m}", JIANG, needs="start")
def dist_spec_init(net: MeasuredNetwork) -> float:
    """Operator norms of what training added to the layers."""
    return root(sum(norm**2 for norm in _spectral(_moved(net))), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i\|_F^2 / m}", JIANG)
def param_norm(net: MeasuredNetwork) -> float:
    """Length of the layers' weights."""
    return root(sum(length**2 for length in _frobenius(net.matrices)), net.samples)


@torch.no_grad()
def _path(net: MeasuredNetwork) -> float:
    """Return the sum of the outputs for an input of ones when all weights and biases are squared, in float64."""
    work = copy.deepcopy(net.folded).double()
    for parameter in work.parameters():
        parameter.square_()
    return float(work(torch.ones_like(net.inputs[:1], dtype=torch.float64)).sum())


@as_measure(r"\tfrac12 \ln(\sum_k f_{w^2}(1)_k / m)", JIANG)
def log_path_norm(net: MeasuredNetwork) -> float:
    """Sum over all paths from input to output of the product of squared weights."""
    return log_root(math.log(_path(net)), net.samples)


@as_measure(r"\tfrac12 \ln(\sum_k f_{w^2}(1)_k / (\gamma^2 m))", JIANG, cost="pass")
def log_path_norm_over_margin(net: MeasuredNetwork) -> float:
    """Sum over all paths of the product of squared weights, over the margin."""
    return log_root(math.log(_path(net)) - _log_margin(net), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 / m)", JIANG)
def log_prod_of_spec_fft(net: MeasuredNetwork) -> float:
    """Product of the operator norms of the layers as maps of images."""
    return log_root(_log_product(net.map_norms), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 / (\gamma^2 m))", JIANG, cost="pass")
def log_prod_of_spec_over_margin_fft(net: MeasuredNetwork) -> float:
    """Product of the operator norms of the layers as maps of images, over the margin."""
    return log_root(_log_product(net.map_norms) - _log_margin(net), net.samples)


@as_measure(
    r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 \sum_i \|W_i - W_i^0\|_F^2 / \|W_i\|_2^2 / (\gamma^2 m))",
    JIANG,
    cost="pass",
    needs="start",
)
def log_spec_init_main_fft(net: MeasuredNetwork) -> float:
    """Main term of the spectral bound for maps of images, with distances from the start."""
    return log_root(_log_main(net, net.map_norms, _frobenius(_moved(net))), net.samples)


@as_measure(r"\tfrac12 \ln(\prod_i \|W_i\|_2^2 \sum_i \|W_i\|_F^2 / \|W_i\|_2^2 / (\gamma^2 m))", JIANG, cost="pass")
def log_spec_orig_main_fft(net: MeasuredNetwork) -> float:
    """Main term of the spectral bound for maps of images, with distances from zero."""
    return log_root(_log_main(net, net.map_norms, _frobenius(net.matrices)), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i\|_F^2 / \|W_i\|_2^2 / m}", JIANG)
def fro_over_spec_fft(net: MeasuredNetwork) -> float:
    """Sum of squared Frobenius norms of the kernels over the operator norms of the maps of images."""
    return root(_ratios(_frobenius(net.matrices), net.map_norms), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_2^2)^{1/d} / m)", JIANG)
def log_sum_of_spec_fft(net: MeasuredNetwork) -> float:
    """Geometric mean of the operator norms of the layers as maps of images, times the depth."""
    return log_root(_log_sum(_log_product(net.map_norms), len(net.matrices)), net.samples)


@as_measure(r"\tfrac12 \ln(d (\prod_i \|W_i\|_2^2 / \gamma^2)^{1/d} / m)", JIANG, cost="pass")
def log_sum_of_spec_over_margin_fft(net: MeasuredNetwork) -> float:
    """Geometric mean of the operator norms of the layers as maps of images over the margin, times the depth."""
    return log_root(_log_sum(_log_product(net.map_norms) - _log_margin(net), len(net.matrices)), net.samples)


@as_measure(r"\sqrt{\sum_i \|W_i - W_i^0\|_2^2 / m}", JIANG, needs="start")
def dist_spec_init_fft(net: MeasuredNetwork) -> float:
    """Operator norms, as maps of images, of what training added to the layers."""
    return root(sum(norm**2 for norm in net.map_norms_moved), net.samples)


def _log_alpha(net: MeasuredNetwork) -> float:
    """Return ln sqrt(d + ln inputs)."""
    return math.log(len(net.matrices) + math.log(net.inputs[0].numel())) / 2


@as_measure(r"\ln(\sqrt{d + \ln n_{in}} \prod_i \|W_i\|_{1,\infty} / (\gamma \sqrt m))", _NEYSHABUR, cost="pass")
def log_l1_inf_norms(net: MeasuredNetwork) -> float:
    """Product of the layers' largest sums of absolute weights into one node, over the margin."""
    norms = [float(np.abs(matrix).sum(axis=1).max()) for matrix in net.matrices]
    return _log_alpha(net) + (_log_product(norms) - _log_margin(net) - math.log(net.samples)) / 2


@as_measure(r"\ln(\sqrt{d + \ln n_{in}} \prod_i \|W_i\|_F / (\gamma \sqrt m))", _NEYSHABUR, cost="pass")
def log_frobenius_norms(net: MeasuredNetwork) -> float:
    """Product of the layers' Frobenius norms over the margin, with its factor for the depth."""
    return _log_alpha(net) + (_log_product(_frobenius(net.matrices)) - _log_margin(net) - math.log(net.samples)) / 2


@as_measure(r"\ln(\sqrt{d + \ln n_{in}} \prod_i \|W_i\|_{3,3/2} / (\gamma m^{1/3}))", _NEYSHABUR, cost="pass")
def log_l3_norms(net: MeasuredNetwork) -> float:
    """Product of the layers' (3, 3/2) group norms over the margin."""
    cubes = [(np.abs(matrix) ** 3).sum(axis=1) for matrix in net.matrices]  # ||row||_3^3
    norms = [float(np.sqrt(rows).sum()) ** (2 / 3) for rows in cubes]
    return _log_alpha(net) + (_log_product(norms) - _log_margin(net)) / 2 - math.log(net.samples) / 3


@as_measure(
    r"\ln(\prod_i \|W_i\|_2 (\sum_i (\|W_i - W_i^0\|_{2,1} / \|W_i\|_2)^{2/3})^{3/2} / (\gamma \sqrt m))",
    "Bartlett, Foster and Telgarsky 2017, arXiv:1706.08498, without constants and logarithms",
    cost="pass",
    needs="start",
)
def log_bartlett(net: MeasuredNetwork) -> float:
    """Bartlett's spectral complexity over the margin: rows' distances from the start."""
    norms = _spectral(net.matrices)
    rows = [float(np.linalg.norm(matrix, axis=1).sum()) for matrix in _moved(net)]
    total = math.fsum((row / norm) ** (2 / 3) for row, norm in zip(rows, norms, strict=True))
    if total == 0:
        raise ValueError("the network is where it started: the logarithm of its distance does not exist")
    return (_log_product(norms) - _log_margin(net) + 3 * math.log(total) - math.log(net.samples)) / 2


@as_measure(
    r"\ln(d \prod_i \|W_i\|_2 (\sum_i h_i \|W_i - W_i^0\|_F^2 / \|W_i\|_2^2)^{1/2} / (\gamma \sqrt m))",
    "Neyshabur, Bhojanapalli and Srebro 2018, arXiv:1707.09564, without constants and logarithms",
    cost="pass",
    needs="start",
)
def log_neyshabur(net: MeasuredNetwork) -> float:
    """Neyshabur's spectral complexity over the margin: widths times distances from the start."""
    norms = _spectral(net.matrices)
    widths = [math.sqrt(len(matrix)) for matrix in net.matrices]
    moved = [width * length for width, length in zip(widths, _frobenius(_moved(net)), strict=True)]
    main = _log_main(net, norms, moved)
    return math.log(len(norms)) + log_root(main, net.samples)


NORM_MEASURES: tuple[Measure, ...] = measures_in(globals())
