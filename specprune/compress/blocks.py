"""Choosing units, which may be blocks of columns, by the exact loss of the least squares that follows.

For regressors with second moment K (ridge included) and cross moment P with the targets, the outputs that a set J of
columns explains are Tr P_J^T K_JJ^-1 P_J.  Backward elimination removes the unit whose loss is least, forward greedy
adds the unit whose gain is most; both follow the same recursion, with (A, B) = (K^-1, K^-1 P) and (K, P):

    value(u) = Tr B_u^T A_uu^-1 B_u,    then    A -= A_:u A_uu^-1 A_u:    and    B -= A_:u A_uu^-1 B_u .

A is updated by matrix products once every few units; until then only the columns of the chosen units and the diagonal
blocks are formed, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PENDING = 256  # columns whose update of A waits for one matrix product
PRODUCT_ERROR = 1e-6  # of float32 products, relative to the norm; added to the diagonal where it made it indefinite
MIN_RIDGE = 1e-9  # of the mean diagonal; selection inverts K, so that exact collinearity needs some


@dataclass(frozen=True, eq=False)
class Item:
    """The least squares problem of one consumer, as selection sees it.

    Args:
        gram: (d, d) second moment of the regressors, float64.
        cross: (d, o) cross moment with the targets, scaled so that the items' losses can be added.
        columns: (units, g) columns of each unit; columns of no unit always stay.
    """

    gram: Tensor
    cross: Tensor
    columns: np.ndarray


@dataclass(frozen=True)
class UnitPath:
    """The order in which units leave (backward) or enter (greedy), and what each step costs or gains.

    Args:
        order: unit indices in that order.
        values: loss or gain of each step, in units of the items' losses.
    """

    order: np.ndarray
    values: np.ndarray


def backward_path(items: Sequence[Item], size: int, ridge: float) -> UnitPath:
    """Eliminate units one by one, each the one whose loss hurts the refitted outputs least, until `size` are left.

    Args:
        items: the consumers' problems; all have the same units.
        size: units that stay, 1..units.
        ridge: added to each Gram's diagonal, relative to its mean; at least `MIN_RIDGE` is taken.
    """
    states = []
    for item in items:
        inverse = torch.cholesky_inverse(definite_factor(_damped(item, ridge)))
        states.append(_State(inverse, inverse @ item.cross, item.columns))
    return _follow(states, len(items[0].columns) - size, smallest=True)


def greedy_path(items: Sequence[Item], size: int, ridge: float) -> UnitPath:
    """Add units one by one, each the one that explains most of the outputs that are not yet explained.

    Args:
        items: the consumers' problems; all have the same units.
        size: how many units are chosen, 1..units.
        ridge: added to each Gram's diagonal, relative to its mean; at least `MIN_RIDGE` is taken.
    """
    states = []
    for item in items:
        gram, cross = _damped(item, ridge), item.cross.clone()
        free = np.setdiff1d(np.arange(len(gram)), item.columns.ravel())
        if len(free):  # columns of no unit are always there: they explain first
            fixed = torch.as_tensor(free, device=gram.device)
            solved = torch.linalg.solve(gram[fixed][:, fixed], torch.cat([gram[fixed], cross[fixed]], 1))
            gram, cross = (
                gram - gram[:, fixed] @ solved[:, : len(gram)],
                cross - gram[:, fixed] @ solved[:, len(gram) :],
            )
        states.append(_State(gram, cross, item.columns))
    return _follow(states, size, smallest=False)


def kept_units(path: UnitPath, units: int, size: int) -> np.ndarray:
    """Return the (size,) units that a backward path leaves when it stops at `size`, ascending."""
    return np.setdiff1d(np.arange(units), path.order[: units - size])


def loss_curve(path: UnitPath, units: int) -> np.ndarray:
    """Return the (units + 1,) loss with k units kept according to a backward path down to one; entry 0 is NaN."""
    curve = np.full(units + 1, np.nan)
    curve[units] = 0.0
    curve[units - np.arange(1, len(path.values) + 1)] = np.cumsum(path.values)
    return curve


def _damped(item: Item, ridge: float) -> Tensor:
    diagonal = item.gram.diagonal()
    mean = float(diagonal.mean())
    damping = max(ridge, MIN_RIDGE) * (mean if mean > 0 else 1.0)
    return item.gram + damping * torch.eye(len(diagonal), dtype=item.gram.dtype, device=item.gram.device)


def definite_factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a moment matrix with its ridge, which float32 products may have made indefinite.

    Then `PRODUCT_ERROR` times the norm is added to the diagonal, and if that is not enough (centring cancels most of
    large means), twice the most negative eigenvalue.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    noise = PRODUCT_ERROR * float(matrix.norm())
    factor, info = torch.linalg.cholesky_ex(matrix + noise * identity)
    if int(info) == 0:
        return factor
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    return torch.linalg.cholesky(matrix + (noise + 2 * abs(min(lowest, 0.0))) * identity)


class _State:
    """A and B of one item, with the updates of A that are still pending."""

    def __init__(self, matrix: Tensor, cross: Tensor, columns: np.ndarray) -> None:
        self.matrix = matrix.clone()
        self.cross = cross.clone()
        self.columns = torch.as_tensor(columns, device=matrix.device)
        self.diagonal = self.matrix[self.columns[:, :, None], self.columns[:, None, :]]
        self.pending: list[Tensor] = []

    def values(self, active: Tensor) -> Tensor:
        """Return Tr B_u^T A_uu^-1 B_u of the active units."""
        factor, info = torch.linalg.cholesky_ex(self.diagonal[active])
        rows = self.cross[self.columns[active]]
        if rows.shape[1] == 1:
            found = rows.square().sum((1, 2)) / self.diagonal[active][:, 0, 0]
        else:
            found = torch.linalg.solve_triangular(factor, rows, upper=False).square().sum((1, 2))
        # A block that rounding made singular has nothing left to explain.
        return torch.where(info == 0, found, torch.zeros_like(found)).nan_to_num(0.0)

    def take(self, unit: int) -> None:
        """Update A and B for the unit that was chosen."""
        own = self.columns[unit]
        strip = self.matrix[:, own]
        if self.pending:
            waiting = torch.cat(self.pending, 1)
            strip = strip - waiting @ waiting[own].T
        factor, info = torch.linalg.cholesky_ex(self.diagonal[unit])
        if int(info) != 0:
            return
        update = torch.linalg.solve_triangular(factor, strip.T, upper=False).T
        self.cross -= update @ torch.linalg.solve_triangular(factor, self.cross[own], upper=False)
        by_unit = update[self.columns]
        self.diagonal -= by_unit @ by_unit.transpose(1, 2)
        self.pending.append(update)
        if sum(part.shape[1] for part in self.pending) >= PENDING:
            waiting = torch.cat(self.pending, 1)
            self.matrix -= waiting @ waiting.T
            self.pending = []


def _follow(states: Sequence[_State], steps: int, *, smallest: bool) -> UnitPath:
    units = len(states[0].columns)
    active = torch.arange(units, device=states[0].matrix.device)
    order, values = [], []
    for _ in range(steps):
        total = sum((state.values(active) for state in states[1:]), states[0].values(active))
        place = int(total.argmin() if smallest else total.argmax())
        unit = int(active[place])
        order.append(unit)
        values.append(max(0.0, float(total[place])))
        for state in states:
            state.take(unit)
        active = torch.cat([active[:place], active[place + 1 :]])
    return UnitPath(np.array(order, dtype=np.int64), np.array(values))
