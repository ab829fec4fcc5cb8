"""Numbers that are too large or too small for float64, kept as their natural logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def log_of(value: float) -> float:
    """Return ln(value), -inf for 0."""
    return math.log(value) if value > 0 else -math.inf


def exp_of(log_value: float) -> float:
    """Return exp(log_value), +inf where it overflows."""
    return math.exp(log_value) if log_value < 709 else math.inf


def log_product(values: Sequence[float]) -> float:
    """Return the logarithm of a product that may be too large for a number, -inf if a factor is 0."""
    return math.fsum(map(math.log, values)) if all(value > 0 for value in values) else -math.inf


def log1p_exp(log_value: float) -> float:
    """Return ln(1 + exp(log_value)) without overflow."""
    return float(np.logaddexp(0.0, log_value))
