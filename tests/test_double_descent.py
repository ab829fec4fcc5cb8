"""Double descent as records and a picture; train small or large; the isotropic case by algebra."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import sympy as sp
from test_overparameterized import spiked

from specprune.analysis.double_descent import double_descent, usual_sizes
from specprune.analysis.linear_simulation import simulate_risks
from specprune.analysis.small_or_large import PRACTICAL, small_or_large
from specprune.bounds.correlated_features import CorrelatedProblem, ReluFeatures
from specprune.bounds.overparameterized import LinearProblem
from specprune.bounds.pruned_risks import pruned_risks
from specprune.bounds.symbolic_overparameterized import isotropic_formulas, isotropic_problem, large_beats_small

PROBLEM = LinearProblem(np.ones(200), np.full(200, 0.1), 0.5, 50)


def test_records_and_picture():
    found = double_descent(PROBLEM, 20, simulated=(30, 100), draws=5)
    records = found.to_records()
    assert [record["size"] for record in records] == sorted({*usual_sizes(PROBLEM, 20).tolist(), 30, 100})
    assert 50 not in usual_sizes(PROBLEM, 20)
    simulated = [record for record in records if "simulated_unpruned" in record]
    assert [record["size"] for record in simulated] == [30, 100]
    assert json.loads(found.to_json())["n"] == 50
    assert "kept to 20 of 200 features" in str(found)
    ax = found.plot(methods=("unpruned", "hessian"))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["not pruned", "Hessian"]
    assert found.plot(ax) is ax
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="methods \\['other'\\]"):
        found.plot(methods=("other",))


def test_pruning_large_beats_training_small():
    answer = small_or_large(spiked(), 100)
    assert answer.size == 4000
    assert answer.method == "hessian"
    assert answer.small_risk == pytest.approx(0.5612, abs=1e-4)
    assert answer.large_risk == pytest.approx(0.4492, abs=1e-4)
    assert answer.gain == pytest.approx(0.112, abs=1e-3)
    assert answer.error == 0
    assert str(answer).startswith("Better: train on 4000 features and prune to 100 (Hessian)")
    assert json.loads(answer.to_json())["gain"] == pytest.approx(answer.gain)


def test_training_small_wins_where_the_signal_is_in_few_features():
    answer = small_or_large(isotropic_problem(200, 100, 4000, 0.1, 0.8, 0.2), 100)
    assert answer.gain < 0
    assert str(answer).startswith("Better: train on the right 100 features")
    risks = pruned_risks(isotropic_problem(200, 100, 4000, 0.1, 0.8, 0.2), [answer.size], 100)
    assert answer.large_risk == min(getattr(risks, method)[0] for method in PRACTICAL)


def test_correlated_features_are_simulated_where_there_is_no_formula():
    generator = np.random.default_rng(6)
    weights, target = generator.standard_normal((300, 20)) / np.sqrt(20), generator.standard_normal(20)
    problem = ReluFeatures(weights, target / np.linalg.norm(target), 0.1, 100).equivalent()
    answer = small_or_large(problem, 40, [200, 300], draws=40)
    assert answer.method in ("magnitude_refit", "hessian_refit")
    assert answer.size == 300
    simulated = simulate_risks(problem, 40, draws=40).risks[answer.method]
    assert (answer.large_risk, answer.error) == (simulated.value, simulated.error)


def test_training_small_knows_the_right_features_whatever_the_sizes():
    beta = np.zeros(40)
    beta[20:25] = 1.0
    problem = LinearProblem(np.ones(40), beta, 0.1, 12)
    expected = 0.1 / (1 - 5 / 12)
    for sizes in ([10], [10, 40], None):
        assert small_or_large(problem, 5, sizes).small_risk == pytest.approx(expected)
    correlated = CorrelatedProblem(np.eye(40), beta, 0.1, 12)
    assert small_or_large(correlated, 5, [10], draws=3).small_risk == pytest.approx(expected)


def test_usual_sizes_are_denser_around_the_peak():
    sizes = usual_sizes(PROBLEM, 20)
    assert {40, 45, 49, 51, 55, 60} <= set(sizes.tolist())


def test_bars_are_two_standard_errors():
    found = double_descent(PROBLEM, 20, [30, 100], simulated=(30,), draws=5)
    ax = found.plot(methods=("unpruned",))
    (bars,) = [one for one in ax.containers if one.has_yerr]
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(4 * found.simulated[0].risks["unpruned"].error)
    plt.close(ax.figure)


def test_each_simulated_size_has_its_own_seed():
    found = double_descent(PROBLEM, 20, [30, 100], simulated=(30, 100), draws=5, seed=3)
    for number, each in enumerate(found.simulated):
        assert each == simulate_risks(PROBLEM, 20, size=each.size, draws=5, seed=3 + number)


def test_refusals():
    correlated = CorrelatedProblem(np.eye(12), np.ones(12), 0.1, 5)
    for keep in (12, 13):
        with pytest.raises(ValueError, match=f"keep = {keep} of 12 features"):
            small_or_large(correlated, keep)
    with pytest.raises(TypeError, match=r"problem.equivalent\(\)"):
        small_or_large(ReluFeatures(np.ones((3, 2)), np.ones(2), 0.0, 5), 1)
    with pytest.raises(TypeError, match="keep must be an integer"):
        double_descent(PROBLEM, [5, 6])
    with pytest.raises(ValueError, match="simulated must be one or more whole numbers"):
        double_descent(PROBLEM, 5, simulated=[30.9])
    with pytest.raises(ValueError, match="sizes holds 50"):
        small_or_large(PROBLEM, 20, [50, 100])
    with pytest.raises(ValueError, match="no size above it"):
        small_or_large(PROBLEM, 20, [20])
    with pytest.raises(ValueError, match="keep = 300 of 200 features"):
        usual_sizes(PROBLEM, 300)


@pytest.mark.parametrize(("noise", "energy", "rest"), [(0.1, 0.8, 0.2), (0.0, 1.0, 1.0), (2.0, 0.5, 0.0)])
def test_algebra_agrees_with_the_solver(noise, energy, rest):
    n, keep, features = 60, 20, 500
    problem = isotropic_problem(n, keep, features, noise, energy, rest)
    formulas = isotropic_formulas()
    symbols = sp.symbols("k n s P sigma2 e r", positive=True)
    for size in (30, 59, 61, 100, 500):
        values = dict(zip(symbols, (size, n, keep, features, noise, energy, rest), strict=True))
        found = pruned_risks(problem, size, keep)
        side = "under" if size < n else "over"
        for name in ("unpruned", "oracle"):
            formula = getattr(formulas, f"{name}_{side}").subs(values)
            assert float(formula) == pytest.approx(getattr(found, name)[0], rel=1e-9)
        if rest or noise:
            assert float(formulas.small.subs(values)) == pytest.approx(found.oracle_refit[0], rel=1e-9)


def test_peak_and_best_size():
    formulas = isotropic_formulas()
    n, noise, energy = sp.symbols("n sigma2 e", positive=True)
    assert formulas.peak == n
    assert sp.simplify(formulas.best_risk - 2 * sp.sqrt(noise * energy)) == 0
    values = {n: 100, noise: 0.04, energy: 1.0}
    best = float(formulas.best_size.subs(values))
    sizes = np.arange(101, 1000)
    problem = isotropic_problem(100, 20, 1000, 0.04, 1.0, 0.0)
    risks = pruned_risks(problem, sizes, 20).unpruned
    assert abs(sizes[risks.argmin()] - best) <= 1
    assert risks.min() == pytest.approx(float(formulas.best_risk.subs(values)), rel=1e-3)


@pytest.mark.parametrize(
    "setting", [(200, 150, 2000, 0.1, 0.8, 0.2), (200, 100, 2000, 0.1, 0.8, 0.2), (60, 55, 300, 0.0, 0.3, 0.7)]
)
def test_where_large_beats_small(setting):
    n, keep, features, *_ = setting
    intervals = large_beats_small(*setting)
    sizes = np.unique(np.geomspace(n + 1, features, 200).round().astype(int))
    risks = pruned_risks(isotropic_problem(*setting), sizes, keep)
    ahead = risks.oracle < risks.oracle_refit
    inside = np.zeros(len(sizes), dtype=bool)
    for low, high in intervals:
        inside |= (sizes > low) & (sizes < high)
    inside[-1] = ahead[-1] if intervals and intervals[-1][1] == features else inside[-1]
    np.testing.assert_array_equal(inside, ahead)


def test_bad_isotropic_problems():
    with pytest.raises(ValueError, match="keep = 10 of 10 features"):
        isotropic_problem(5, 10, 10, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="expected keep < n < features"):
        large_beats_small(5, 10, 20, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="energy"):
        isotropic_problem(5, 3, 10, 0.1, -1.0, 1.0)
