"""What every theorem returns: a number, the terms it is made of, and the conditions under which it holds."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specprune._records import format_table, format_value, to_json

FloatArray = NDArray[np.float64]

ORIGINAL = "original net"
PRUNED = "pruned net"
QUANTISED = "quantised pruned net"
STOCHASTIC = "stochastic net"


def check_number(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return `value` as a float if it is a finite number in the stated interval.

    Args:
        name: the argument's name, for the message.
        value: the number to check.
        low: smallest allowed value.
        high: largest allowed value.
        open_low: refuse `low` itself.
        open_high: refuse `high` itself.

    Returns:
        The value in float64.

    Raises:
        TypeError: if the value is not a real number.
        ValueError: if it is NaN, infinite or outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number | np.ndarray) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be one real number, got {value!r}; pass a plain float or int")
    number = float(value)
    inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
    if not (math.isfinite(number) and inside):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be a finite number in {interval}, got {number!r}")
    return number


def check_count(name: str, value: int, low: int = 1) -> int:
    """Return `value` as an int if it is a whole number of at least `low`.

    Args:
        name: the argument's name, for the message.
        value: the number to check.
        low: smallest allowed value.

    Returns:
        The value as an int.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}; convert it with int() first")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def check_vector(name: str, values: ArrayLike, *, low: float = 0.0, empty: bool = False) -> FloatArray:
    """Return `values` as a finite float64 vector whose entries are at least `low`.

    Args:
        name: the argument's name, for the message.
        values: anything NumPy reads as a one-dimensional array.
        low: smallest allowed entry.
        empty: whether a vector without entries is allowed.

    Returns:
        A float64 array of shape (size,).

    Raises:
        ValueError: if the shape is not (size,), or an entry is NaN, infinite or below `low`.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or (array.size == 0 and not empty):
        raise ValueError(f"{name} must be a non-empty one-dimensional array, got shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} holds NaN or infinite entries; remove or repair them first")
    if array.size and float(array.min()) < low:
        raise ValueError(f"{name} must have entries of at least {low:g}, got {float(array.min()):g}")
    return array


class Record:
    """A result that shows itself: as records, as JSON and as an aligned table.  For frozen dataclasses."""

    def to_records(self) -> list[dict[str, Any]]:
        """Return the fields as a list with one dictionary, ready for a table or a CSV file."""
        return [asdict(self)]  # type: ignore[call-overload]

    def to_json(self) -> str:
        """Return the fields as strict JSON text."""
        return to_json(self.to_records()[0])

    def __str__(self) -> str:
        return format_table(self.to_records(), title=type(self).__name__)


@dataclass(frozen=True)
class Hypothesis:
    """One condition of a theorem, and whether the data meet it.

    Attributes:
        statement: the condition in words or symbols, such as "c_2 <= 4".
        value: the measured quantity; None where it was not or cannot be measured.
        holds: whether the condition is met.
    """

    statement: str
    value: float | None
    holds: bool


@dataclass(frozen=True)
class Bound(Record):
    """An upper bound with its additive terms, its conditions, and the theorem it comes from.

    The value never exceeds the sum of the terms: for most theorems the two are equal (build these with
    `Bound.from_terms`), while a theorem that inverts a divergence may give less than the terms of its relaxed form.
    No rounding direction is promised beyond float64, except where a function inverts an equation: there it rounds up.

    Attributes:
        name: short label for tables.
        value: the bound itself; +inf is allowed and says nothing.
        terms: named additive parts, such as empirical, bias, variance, confidence.
        confidence: probability 1 - delta with which the bound holds; None if it is deterministic.
        covers: the network spoken of: "original net", "pruned net", "quantised pruned net" or "stochastic net" (weights
            drawn anew from the posterior for every example).
        loss: what is bounded: "0-1", "ramp(gamma)", "L2(P_n) output error".
        hypotheses: conditions, each with its measured value.
        trivial: the value from which on the bound says nothing (1 for error rates); None if there is none.
        theorem: the statement's name or number.
        source: publication, and where the constants come from.
    """

    name: str
    value: float
    terms: Mapping[str, float]
    confidence: float | None
    covers: str
    loss: str
    hypotheses: tuple[Hypothesis, ...] = ()
    trivial: float | None = None
    theorem: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        numbers_given = [self.value, *self.terms.values()]
        if any(math.isnan(number) for number in numbers_given):
            raise ValueError(f"bound {self.name!r} has a NaN value or term: value={self.value}, terms={self.terms}")
        if not self.terms:
            raise ValueError(f"bound {self.name!r} needs at least one named term")
        total = sum_terms(self.terms)
        if self.value > total + 1e-12 * max(1.0, abs(total)):
            raise ValueError(f"bound {self.name!r}: value {self.value} exceeds the sum of its terms {total}")
        if self.confidence is not None:
            check_number("confidence", self.confidence, 0.0, 1.0, open_low=True, open_high=True)
        # A private copy: the caller's dictionary may change later, a bound must not.
        object.__setattr__(self, "terms", dict(self.terms))
        object.__setattr__(self, "hypotheses", tuple(self.hypotheses))

    @classmethod
    def from_terms(
        cls,
        name: str,
        terms: Mapping[str, float],
        *,
        confidence: float | None,
        covers: str,
        loss: str,
        hypotheses: Sequence[Hypothesis] = (),
        trivial: float | None = None,
        theorem: str = "",
        source: str = "",
    ) -> Bound:
        """Return the bound whose value is the sum of its terms.

        Args:
            name: short label.
            terms: named additive parts.
            confidence: 1 - delta, or None if deterministic.
            covers: the network spoken of.
            loss: what is bounded.
            hypotheses: conditions with measured values.
            trivial: value from which on the bound says nothing.
            theorem: the statement's name or number.
            source: publication and provenance of the constants.

        Returns:
            A `Bound` with value = sum of terms.

        Raises:
            ValueError: if a term is NaN or there is no term.
        """
        value = sum_terms(terms)
        return cls(name, value, terms, confidence, covers, loss, tuple(hypotheses), trivial, theorem, source)

    @property
    def vacuous(self) -> bool:
        """Whether the value says nothing: at or above `trivial`, or infinite."""
        return math.isinf(self.value) or (self.trivial is not None and self.value >= self.trivial)

    @property
    def valid(self) -> bool:
        """Whether every hypothesis holds; a bound that is not valid promises nothing."""
        return all(hypothesis.holds for hypothesis in self.hypotheses)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one flat record: the summary, then each term as `term_<name>`."""
        record: dict[str, Any] = {
            "name": self.name,
            "value": self.value,
            "vacuous": self.vacuous,
            "valid": self.valid,
            "confidence": self.confidence,
            "covers": self.covers,
            "loss": self.loss,
            "trivial": self.trivial,
            "theorem": self.theorem,
            "source": self.source,
        }
        record.update({f"term_{name}": term for name, term in self.terms.items()})
        return [record]

    def to_json(self) -> str:
        """Return every field, with terms and hypotheses nested, as strict JSON text."""
        return to_json({**asdict(self), "vacuous": self.vacuous, "valid": self.valid})

    def __str__(self) -> str:
        verdict = "vacuous" if self.vacuous else "informative"
        rows = [{"part": "value", "amount": self.value, "note": f"{verdict}; trivial at {format_value(self.trivial)}"}]
        rows += [{"part": f"  {name}", "amount": term, "note": ""} for name, term in self.terms.items()]
        for item in self.hypotheses:
            note = f"{'holds' if item.holds else 'BROKEN'}: {item.statement}"
            rows.append({"part": "hypothesis", "amount": item.value, "note": note})
        sure = "deterministic" if self.confidence is None else f"confidence {format_value(self.confidence)}"
        lines = [f"{self.name} ({self.covers}, {self.loss}, {sure})", format_table(rows)]
        if not self.valid:
            lines.append("NOT VALID: a hypothesis is broken, the value promises nothing")
        if self.theorem or self.source:
            lines.append(
                f"{self.theorem}; {self.source}" if self.theorem and self.source else self.theorem + self.source
            )
        return "\n".join(lines)


def sum_terms(terms: Mapping[str, float]) -> float:
    """Return the sum of the terms, +inf if one is infinite.

    Args:
        terms: named numbers.

    Returns:
        Their correctly rounded sum.
    """
    values = [float(term) for term in terms.values()]
    # fsum raises on overflow of a partial sum; such a bound is infinite for every purpose.
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
