"""A table of trained networks, and the pairs of them that were trained alike but for one hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specprune.bounds.bound import FloatArray, check_count, check_vector

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MeasureTable:
    """Trained networks: how each was trained, what was measured on it, and how well it generalizes.

    Networks with equal hyperparameters are repeats, so the random seed is not one of the hyperparameters.  Settings
    are equal if they are the same number or text exactly.

    Args:
        hyperparameters: name to settings, numbers or texts, one a network.
        measures: name to values, one a network; a higher value should mean a larger gap.
        gap: generalization gaps, test error minus training error, one a network.
        n_test: size of the test set, from which the noise of the gaps follows; None if they have none.

    Raises:
        ValueError: fewer than two networks; no hyperparameter or no measure; a column of another length, with NaN or
            infinite entries, or neither numbers nor texts; with n_test, a gap outside [-1, 1].
    """

    hyperparameters: Mapping[str, NDArray[np.generic]]
    measures: Mapping[str, FloatArray]
    gap: FloatArray
    n_test: int | None = None

    def __post_init__(self) -> None:
        gap = check_vector("gap", self.gap, low=-np.inf)
        if len(gap) < 2:
            raise ValueError(f"gap has {len(gap)} entry; expected at least two networks")
        if not self.hyperparameters or not self.measures:
            raise ValueError("a table needs at least one hyperparameter and one measure")
        measures = {name: check_vector(f"measure {name!r}", v, low=-np.inf) for name, v in self.measures.items()}
        settings = {name: _settings(name, v) for name, v in self.hyperparameters.items()}
        for kind, columns in (("measure", measures), ("hyperparameter", settings)):
            for name, values in columns.items():
                if len(values) != len(gap):
                    raise ValueError(f"{kind} {name!r} has {len(values)} entries for {len(gap)} networks")
        if self.n_test is not None:
            check_count("n_test", self.n_test)
            if np.abs(gap).max() > 1:
                raise ValueError(f"gap {float(gap[np.abs(gap).argmax()])!r}: n_test needs gaps of errors, in [-1, 1]")
        for name, value in (("hyperparameters", settings), ("measures", measures), ("gap", gap)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.gap)

    def codes(self) -> IntArray:
        """Return the settings as numbers 0, 1, ... by column, of shape (networks, hyperparameters)."""
        columns = [np.unique(values, return_inverse=True)[1] for values in self.hyperparameters.values()]
        return np.stack(columns, axis=1).astype(np.int64)

    def column(self, measure: str) -> FloatArray:
        """Return the values of a measure.

        Args:
            measure: its name.

        Raises:
            ValueError: no such measure.
        """
        if measure not in self.measures:
            raise ValueError(f"no measure {measure!r}; the table has {', '.join(self.measures)}")
        return self.measures[measure]


def _settings(name: str, values: ArrayLike) -> NDArray[np.generic]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biufU":
        raise ValueError(f"hyperparameter {name!r}: expected a one-dimensional array of numbers or texts")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"hyperparameter {name!r} holds NaN or infinite entries; remove or repair them first")
    return array


@dataclass(frozen=True, eq=False)
class Changes:
    """All pairs of networks whose settings differ in exactly one hyperparameter.

    Attributes:
        first: index of one network of each pair, of shape (pairs,).
        second: index of the other.
        cell: which hyperparameter changes and what the others are, as a number 0, 1, ...
        cell_hyperparameter: index of the hyperparameter that changes, of shape (cells,).
        environment: the cell, and between which two settings the hyperparameter changes, as a number 0, 1, ...
            Of pooled environments: the hyperparameter and the two settings, whatever the others are.
        environment_hyperparameter: index of the hyperparameter that changes, of shape (environments,).
        noise_weight: how sure it is which of the two gaps is larger: (w - 1/2)_+, or 1 without noise.
    """

    first: IntArray
    second: IntArray
    cell: IntArray
    cell_hyperparameter: IntArray
    environment: IntArray
    environment_hyperparameter: IntArray
    noise_weight: FloatArray


def noise_weight(difference: ArrayLike, n_test: int) -> FloatArray:
    """Return how sure it is that two networks' gaps differ in the direction that their test errors say.

    w = max(0, 1 - 2 exp(-2 n (|difference| / 2)^2))^2: with at least this probability, both independent averages
    over n test samples are within |difference| / 2 of their means (Hoeffding).

    Args:
        difference: of the gaps, any shape.
        n_test: n.

    Source: Dziugaite et al. 2020 (arXiv:2010.11924).
    """
    half = np.abs(np.asarray(difference, dtype=np.float64)) / 2
    weight: FloatArray = np.maximum(0, 1 - 2 * np.exp(-2 * check_count("n_test", n_test) * half**2)) ** 2
    return weight


def single_changes(table: MeasureTable, *, pooled: bool = False) -> Changes:
    """Find all pairs of networks that were trained alike but for one hyperparameter.

    Args:
        table: the networks.
        pooled: whether an environment takes all settings of the other hyperparameters together.

    Returns:
        Each unordered pair once.

    Raises:
        ValueError: there is no such pair.
    """
    codes = table.codes()
    found = []
    for number in range(codes.shape[1]):
        others = codes.copy()
        others[:, number] = 0
        cell = np.unique(others, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.argsort(cell)
        for shift in range(1, int(np.bincount(cell).max())):
            a, b = order[:-shift], order[shift:]
            keep = (cell[a] == cell[b]) & (codes[a, number] != codes[b, number])
            a, b = a[keep], b[keep]
            found.append(np.stack([np.full(len(a), number), a, b, cell[a]]))
    pairs = np.concatenate(found, axis=1) if found else np.empty((4, 0), dtype=np.int64)
    which, first, second, cell = pairs
    if not len(first):
        raise ValueError("no two networks differ in exactly one hyperparameter; is the seed among the hyperparameters?")
    one, other = codes[first, which], codes[second, which]
    size = len(table)  # more than any code
    settings = np.minimum(one, other) * size + np.maximum(one, other)
    held = which * size if pooled else which * size + cell
    _, cell_first, cell_number = np.unique(which * size + cell, return_index=True, return_inverse=True)
    _, place_first, place = np.unique(held * size**2 + settings, return_index=True, return_inverse=True)
    difference = table.gap[first] - table.gap[second]
    weight = (
        np.ones(len(first)) if table.n_test is None else np.maximum(noise_weight(difference, table.n_test) - 0.5, 0)
    )
    return Changes(first, second, cell_number, which[cell_first], place, which[place_first], weight)
