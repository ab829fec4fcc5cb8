"""The choices of a pruning run, checked once."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from specprune.compress.allocation import ALLOCATIONS
from specprune.compress.choice import SELECTIONS
from specprune.compress.cost import MEASURES
from specprune.compress.low_rank_cost import LOW_RANK_MEASURES
from specprune.compress.low_rank_network import METHODS as LOW_RANK_METHODS
from specprune.compress.reconstruction import RECONSTRUCTIONS

MIN_LAMBDA = 1e-14
BUDGETS = (*MEASURES, "latency")
SAMPLING_METHODS = {"pfp": "deterministic", "pfp-random": "random", "pfp-hybrid": "hybrid"}  # and their variants
METHODS = ("spectral", "hybrid", "fitted", *LOW_RANK_METHODS, *SAMPLING_METHODS, "sipp")
# What methods other than "spectral" take, beside `keep`, `measure`, `distill_steps` and `seed`.
BUDGET_OF_OTHERS = {**dict.fromkeys(SAMPLING_METHODS, MEASURES), "sipp": ("params",)}
_TAKEN = {"hybrid": ("positions", "ridge"), "fitted": ("positions", "ridge")}


@dataclass(frozen=True)
class Settings:
    """The arguments of `prune` that say how; see there.

    Raises:
        ValueError: a value out of range, or a combination that has no meaning.
    """

    keep: float | None = None
    widths: Mapping[str, int] | None = None
    measure: str = "flops"
    allocation: str = "calibrated"
    selection: str = "backward"
    theta: float = 0.0
    reconstruction: str = "sequential"
    lam: float = 1e-6
    ridge: float = 1e-6
    positions: int | None = 32
    round_to: int = 1
    distill_steps: int = 0
    seed: int = 0
    method: str = "spectral"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_method()
        for label, value, allowed in (
            ("measure", self.measure, BUDGETS),
            ("allocation", self.allocation, ALLOCATIONS),
            ("selection", self.selection, SELECTIONS),
            ("reconstruction", self.reconstruction, RECONSTRUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{label}={value!r}: expected one of {allowed}")
        by_lambda = self.keep is None and self.widths is None and self.allocation in ("dof", "theory")
        given = by_lambda + (self.keep is not None) + (self.widths is not None)
        if given != 1 or (self.keep is not None and self.allocation == "theory"):
            raise ValueError(
                f"keep={self.keep}, widths={self.widths}, allocation={self.allocation!r}: give keep, or widths, or "
                "neither of them with allocation='dof' or 'theory', which then take the widths from lam"
            )
        if self.keep is not None and not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep}: expected the fraction to keep, above 0 and at most 1 (0.3 keeps 30 %)")
        if not 0.0 <= self.theta <= 1.0:
            raise ValueError(f"theta={self.theta}: expected a number between 0 and 1")
        if not MIN_LAMBDA <= self.lam < 1e6:
            raise ValueError(
                f"lam={self.lam}: expected a positive number, lambda relative to the trace of the covariance, of at "
                f"least {MIN_LAMBDA:g} (the size of rounding)"
            )
        if not 0.0 <= self.ridge < 1e6:
            raise ValueError(
                f"ridge={self.ridge}: expected a number that is not negative, relative to the mean eigenvalue"
            )
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"positions={self.positions}: expected at least 1, or None for all")
        if not isinstance(self.round_to, int | np.integer) or self.round_to < 1:
            raise ValueError(f"round_to={self.round_to}: expected a whole number of at least 1 (8 suits accelerators)")
        if not isinstance(self.distill_steps, int | np.integer) or self.distill_steps < 0:
            raise ValueError(f"distill_steps={self.distill_steps}: expected a number of steps, 0 for none")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0 to 2**63 - 1")

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {METHODS}")
        if self.method == "spectral":
            return
        taken = ("keep", "measure", "distill_steps", "seed", "method", *_TAKEN.get(self.method, ()))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in taken and value != entry.default:
                raise ValueError(
                    f"{entry.name}={value!r} means nothing to method={self.method!r}, which takes {taken}: leave it out"
                )
        if self.keep is None:
            raise ValueError(f"method={self.method!r} needs keep, the fraction to keep, for example 0.3")
        measures = BUDGET_OF_OTHERS.get(self.method, LOW_RANK_MEASURES)
        if self.measure not in measures:
            raise ValueError(
                f"measure={self.measure!r}: method={self.method!r} takes one of {measures}"
                + (" (weights are set to zero, so that no FLOPs are saved)" if self.method == "sipp" else "")
            )
        if self.method == "sipp" and self.distill_steps:
            raise ValueError("distill_steps would fill in the weights that method='sipp' sets to zero: leave it out")

    def _check_types(self) -> None:
        for label, value, kind, what in (
            ("keep", self.keep, numbers.Real, "a fraction such as 0.3"),
            ("theta", self.theta, numbers.Real, "a number between 0 and 1"),
            ("lam", self.lam, numbers.Real, "a positive number"),
            ("ridge", self.ridge, numbers.Real, "a number that is not negative"),
            ("positions", self.positions, numbers.Integral, "a whole number, or None for all"),
            ("seed", self.seed, numbers.Integral, "a whole number"),
        ):
            optional = label in ("keep", "positions") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, kind)):
                raise TypeError(f"{label}={value!r}: expected {what}")
        if self.widths is not None and not isinstance(self.widths, Mapping):
            raise TypeError(f"widths={self.widths!r}: expected a mapping from group names to numbers of units")
        for name, width in (self.widths or {}).items():
            if isinstance(width, bool):
                raise TypeError(f"widths[{name!r}]={width!r}: expected a whole number of units")
