"""Bound: the sum of terms, the verdicts, and what is refused."""

import json
import math

import numpy as np
import pytest

from specprune.bounds.bound import PRUNED, Bound, Hypothesis, check_count, check_number, check_vector


def make(**changes):
    arguments = {"confidence": 0.95, "covers": PRUNED, "loss": "0-1", "trivial": 1.0, "theorem": "T", "source": "S"}
    terms = changes.pop("terms", {"empirical": 0.1, "bias": 0.2})
    return Bound.from_terms("demo", terms, **{**arguments, **changes})


def test_value_is_the_sum_of_the_terms():
    bound = make(terms={"empirical": 0.1, "bias": 0.2, "variance": 0.3})
    assert bound.value == pytest.approx(0.6)
    assert not bound.vacuous
    assert bound.valid


def test_value_may_be_below_but_never_above_its_terms():
    Bound("kl", 0.2, {"empirical": 0.1, "variance": 0.3}, 0.9, PRUNED, "0-1")
    with pytest.raises(ValueError, match="exceeds the sum"):
        Bound("kl", 0.5, {"empirical": 0.1, "variance": 0.3}, 0.9, PRUNED, "0-1")


@pytest.mark.parametrize(
    ("terms", "trivial", "vacuous"),
    [({"a": 1.0}, 1.0, True), ({"a": 0.999}, 1.0, False), ({"a": 50.0}, None, False), ({"a": math.inf}, None, True)],
)
def test_vacuous(terms, trivial, vacuous):
    assert make(terms=terms, trivial=trivial).vacuous is vacuous


def test_broken_hypothesis_is_shown():
    bound = make(hypotheses=[Hypothesis("c_2 <= 4", 5.5, False), Hypothesis("s_2 <= 5/3", 1.0, True)])
    assert not bound.valid
    text = str(bound)
    assert "BROKEN: c_2 <= 4" in text
    assert "NOT VALID" in text
    assert "holds: s_2 <= 5/3" in text


def test_records_and_json():
    bound = make(hypotheses=[Hypothesis("c", None, True)], terms={"empirical": 0.1, "bias": math.inf})
    record = bound.to_records()[0]
    assert record["term_empirical"] == 0.1
    assert record["vacuous"] is True
    payload = json.loads(bound.to_json())
    assert payload["terms"] == {"empirical": 0.1, "bias": "inf"}
    assert payload["hypotheses"] == [{"statement": "c", "value": None, "holds": True}]


def test_terms_are_copied():
    terms = {"empirical": 0.1}
    bound = make(terms=terms)
    terms["empirical"] = 9.0
    assert bound.terms == {"empirical": 0.1}


@pytest.mark.parametrize("terms", [{}, {"a": math.nan}])
def test_refuses_empty_and_nan(terms):
    with pytest.raises(ValueError):
        make(terms=terms)


def test_refuses_impossible_confidence():
    with pytest.raises(ValueError, match="confidence"):
        make(confidence=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.0])
def test_check_number_refuses(value):
    with pytest.raises(ValueError, match="delta must be a finite number in"):
        check_number("delta", value, 0.0, 1.0, open_high=True)


def test_check_number_accepts_numpy_and_refuses_text():
    assert check_number("x", np.float32(0.5)) == 0.5
    for bad in ("1", True, np.ones(2), None):
        with pytest.raises(TypeError, match="x must be one real number"):
            check_number("x", bad)


def test_check_count():
    assert check_count("n", np.int64(3)) == 3
    with pytest.raises(TypeError):
        check_count("n", 3.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_count("n", 0)


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, math.nan], [-1.0]])
def test_check_vector_refuses(values):
    with pytest.raises(ValueError, match="mu"):
        check_vector("mu", values)
