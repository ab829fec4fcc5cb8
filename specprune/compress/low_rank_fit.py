"""Low-rank layers fitted on data: each slice of the inputs keeps its principal outputs, least squares joins the slices.

For rows x that a layer reads, with second moment G, and targets y with cross moment C = E x y^T, both about the mean
where the layer has a constant, let W = C^T G^-1 be the best affine map.  With the input channels in k slices,

    V_i   the first j rows of U_i^T W_i,  U_i the eigenvectors of W_i G_ii W_i^T: the principal components of what
          slice i alone gives,
    V     the V_i block-diagonally, (k j, columns),
    U     C^T V^T (V G V^T)^-1, the least squares fit of the targets on V x,

and U V is the new layer.  With one slice this is reduced-rank regression, the best map of rank j; more slices cost less
a rank.  The rows of rank j are the first ones of rank j + 1, so that one Cholesky factorisation of V G V^T gives the
residuals of all ranks.

Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model" (one slice); the slices are those of
Liebenwein et al. 2021 (arXiv:2107.11442), fitting them jointly is derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specprune.compress.blocks import definite_factor
from specprune.compress.low_rank_allocation import Option, affordable_ranks
from specprune.compress.low_rank_cost import LayerCost
from specprune.compress.low_rank_layers import assemble
from specprune.compress.low_rank_parts import Factorable, FactoredLayer
from specprune.compress.reconstruction import Problem, least_squares, shift_constant
from specprune.compress.targets import norm_gain

_DEAD = 1e-14  # relative variance of a row that is rounding noise; it is left out


@dataclass(frozen=True, eq=False)
class Fit:
    """A low-rank layer for given data.

    Args:
        inner: (k, j, columns / k) the V_i, float64.
        outer: (k, o, j) the U_i, float64.
        residual: what is left of the targets' variance, each output weighed as the batch norm after it weighs it.
    """

    inner: Tensor
    outer: Tensor
    residual: float


class FitProblem:
    """The fits of one layer, of all slices and ranks.

    Args:
        problem: moments of the layer's inputs and targets.
        gain: (o,) what each output is multiplied with right after the layer, for the weighing of the outputs.
        ridge: relative ridge of the least squares.
    """

    def __init__(self, problem: Problem, gain: Tensor, ridge: float) -> None:
        self.problem, self.gain, self.ridge = problem, gain, ridge
        self.total = float((problem.energy * gain.square()).sum())
        self._best = least_squares(problem.gram, problem.cross, ridge)

    def floor(self) -> float:
        """Return the residual of the best affine map of full rank."""
        if self.total <= 0:
            return 0.0
        explained = (self._best.T * self.problem.cross).sum(0)
        return max(1.0 - float((explained * self.gain.square()).sum()) / self.total, 0.0)

    def residuals(self, slices: int, ranks: int) -> np.ndarray:
        """Return the (ranks,) residuals of the ranks 1..ranks."""
        return self._residuals(self.rows(slices)[:ranks])

    def fit(self, slices: int, rank: int) -> Fit:
        """Return the fit of rank j a slice."""
        rows = self.rows(slices)[:rank]
        own = rows.transpose(0, 1)  # (k, j, columns)
        outer = self._solve(own.flatten(0, 1), half=False).T.unflatten(1, (slices, rank)).transpose(0, 1)
        size = own.shape[2] // slices
        inner = torch.stack([part[:, i * size : (i + 1) * size] for i, part in enumerate(own)])
        return Fit(inner, outer, float(self._residuals(rows)[-1]))

    def rows(self, slices: int) -> Tensor:
        """Return the (r, k, columns) rows of all ranks and slices, of variance one, zero outside their slices."""
        gram = self.problem.gram
        weight = (self._best * self.gain[:, None]).unflatten(1, (slices, -1)).transpose(0, 1)  # (k, o, columns / k)
        size = weight.shape[2]
        own = torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(slices)])
        inner = _principal_rows(weight, own)
        variance = (inner @ own * inner).sum(2)
        scale = torch.where(variance > _DEAD * variance.max(), variance.rsqrt(), 0.0)
        padded = [
            functional.pad(part * one[:, None], (i * size, (slices - 1 - i) * size))
            for i, (part, one) in enumerate(zip(inner, scale, strict=True))
        ]
        return torch.stack(padded, 1)

    def _residuals(self, rows: Tensor) -> np.ndarray:
        """Return the residuals of all ranks from the (ranks, k, columns) rows: each rank's are the first ones."""
        ranks, slices = rows.shape[:2]
        if self.total <= 0:
            return np.zeros(ranks)
        solved = self._solve(rows.flatten(0, 1), half=True) * self.gain
        explained = solved.square().sum(1).cumsum(0)[slices - 1 :: slices]
        found: np.ndarray = (1.0 - explained / self.total).clamp(0.0, 1.0).cpu().numpy()
        return found

    def _solve(self, rows: Tensor, *, half: bool) -> Tensor:
        """Return L^-1 V C, or (V G V^T)^-1 V C, where L L^T = V G V^T + ridge."""
        gram = rows @ self.problem.gram @ rows.T
        damping = max(self.ridge, torch.finfo(gram.dtype).eps * len(gram))
        factor = definite_factor(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        crossed = rows @ self.problem.cross
        if half:
            return torch.linalg.solve_triangular(factor, crossed, upper=False)
        return torch.cholesky_solve(crossed, factor)


def _principal_rows(weight: Tensor, gram: Tensor) -> Tensor:
    """Return (k, r, d) rows U^T W, U the eigenvectors of W G W^T by falling eigenvalue, up to a factor for each row.

    Args:
        weight: (k, o, d) weights W of the slices.
        gram: (k, d, d) second moments G of their inputs.
    """
    outputs, columns = weight.shape[1:]
    if outputs <= columns:
        _, vectors = torch.linalg.eigh(weight @ gram @ weight.mT)
        return vectors.flip(2).mT @ weight
    # The eigenvectors are W L v, with L L^T = G and v those of the smaller matrix L^T W^T W L.
    values, axes = torch.linalg.eigh(gram)
    root = axes * values.clamp_min(0).sqrt()[:, None]
    inside = root.mT @ weight.mT @ weight
    _, vectors = torch.linalg.eigh(inside @ root)
    return vectors.flip(2).mT @ inside


def fit_problem(model: nn.Module, problem: Problem, norm: str | None, ridge: float) -> FitProblem:
    """Return the fits of one layer of a network.

    Args:
        model: the network.
        problem: of the layer.
        norm: the batch norm that reads the layer's outputs directly, if there is one.
        ridge: relative ridge.
    """
    gain = torch.ones_like(problem.energy) if norm is None else norm_gain(model, norm)
    return FitProblem(problem, gain, ridge)


def fit_options(fits: FitProblem, cost: LayerCost) -> list[Option]:
    """Return a layer's options, scored by the residual beyond what no rank can lower.

    Args:
        fits: of the layer.
        cost: of the layer.
    """
    found, floor = [], fits.floor()
    for slices in cost.spectra.slice_counts():
        ranks = affordable_ranks(cost, 0, slices)
        if ranks:
            scores = np.minimum.accumulate(np.maximum(fits.residuals(slices, ranks) - floor, 0.0))
            found.append(Option(0, slices, cost.rank_cost(0, slices), scores))
    return found


@torch.no_grad()
def place_fit(work: nn.Module, problem: Problem, fit: Fit, norm: str | None, before: nn.Module) -> FactoredLayer:
    """Return the low-rank layer of a fit; its constant goes into its bias, or into the batch norm after it, in place.

    Args:
        work: the network; only the running mean of the batch norm is changed.
        problem: that was fitted.
        fit: the fit.
        norm: the batch norm that reads the layer's outputs directly, if there is one.
        before: the network whose running mean the constant starts from.
    """
    layer: Factorable = work.get_submodule(problem.layer)  # type: ignore[assignment]
    parts = assemble(layer, 0, fit.outer, fit.inner)
    matrix = torch.cat([outer @ inner for outer, inner in zip(fit.outer, fit.inner, strict=True)], 1)
    width = len(problem.gram)
    shift = problem.mean[width:] - matrix @ problem.mean[:width]
    shift_constant(work, problem, shift, parts[1].bias, norm, before)  # type: ignore[arg-type]
    return parts
