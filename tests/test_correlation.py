"""Correlation of measures with the gap: hand-worked cases, slow twins, invariances, confounding, coverage."""

import dataclasses
import itertools
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from specprune.analysis.correlation import (
    conditional_mutual_information,
    environment_errors,
    environments,
    granulated,
    granulated_by_hyperparameter,
    kendall_tau,
    sign_error,
)
from specprune.analysis.measure_ranking import Estimate, rank_measures
from specprune.analysis.measure_table import MeasureTable, noise_weight, single_changes


def grid(sizes, repeats):
    """Settings of all combinations, one row a network."""
    rows = list(itertools.product(*(range(size) for size in sizes)))
    return np.repeat(np.array(rows), repeats, axis=0)


def random_table(seed, sizes=(2, 3, 2), repeats=2, n_test=None, coarse=True, drop=4):
    """An incomplete grid with ties in measures and gaps."""
    generator = np.random.default_rng(seed)
    rows = generator.permutation(grid(sizes, repeats))[drop:]
    gap = 0.1 * rows[:, 0] + 0.05 * rows[:, -1] + generator.normal(0, 0.05, len(rows))
    good, noise = gap + generator.normal(0, 0.05, len(rows)), generator.normal(size=len(rows))
    if coarse:
        gap, good, noise = (np.round(values, 1) for values in (gap, good, noise))
    names = ("width", "depth", "rate", "decay")[: len(sizes)]
    return MeasureTable(dict(zip(names, rows.T, strict=True)), {"good": good, "noise": noise}, gap, n_test)


def take(table, rows):
    return MeasureTable(
        {name: values[rows] for name, values in table.hyperparameters.items()},
        {name: values[rows] for name, values in table.measures.items()},
        table.gap[rows],
        table.n_test,
    )


def with_measure(table, values):
    return dataclasses.replace(table, measures={"good": values})


# Slow twins: dictionaries and loops over all pairs of networks.


def slow_tau(mu, gap):
    right, tied_mu, tied_gap = 0, 0, 0
    for a, b in itertools.combinations(range(len(gap)), 2):
        right += np.sign(mu[a] - mu[b]) * np.sign(gap[a] - gap[b])
        tied_mu += mu[a] == mu[b]
        tied_gap += gap[a] == gap[b]
    pairs = math.comb(len(gap), 2)
    scale = math.sqrt((pairs - tied_mu) * (pairs - tied_gap))
    return right / scale if scale else 0.0


def slow_changes(table):
    """(a, b, index of the one hyperparameter that differs) of all unordered pairs."""
    columns = list(table.hyperparameters.values())
    for a, b in itertools.combinations(range(len(table)), 2):
        differ = [i for i, column in enumerate(columns) if column[a] != column[b]]
        if len(differ) == 1:
            yield a, b, differ[0]


def slow_psi(table, mu):
    names, columns = list(table.hyperparameters), list(table.hyperparameters.values())
    cells = {}
    for a, b, i in slow_changes(table):
        key = i, tuple(str(column[a]) for j, column in enumerate(columns) if j != i)
        cells.setdefault(key, []).append(np.sign(mu[a] - mu[b]) * np.sign(table.gap[a] - table.gap[b]))
    by_name = {}
    for (i, _), values in cells.items():
        by_name.setdefault(names[i], []).append(np.mean(values))
    by_name = {name: float(np.mean(values)) for name, values in by_name.items()}
    return float(np.mean(list(by_name.values()) or math.nan)), by_name


def slow_sign_errors(table, mu, pooled, least):
    columns = list(table.hyperparameters.values())
    places = {}
    for a, b, i in slow_changes(table):
        others = None if pooled else tuple(str(column[a]) for j, column in enumerate(columns) if j != i)
        key = i, others, frozenset((str(columns[i][a]), str(columns[i][b])))
        weight = 1.0
        if table.n_test is not None:
            delta = abs(table.gap[a] - table.gap[b])
            weight = max(0.0, 1 - 2 * math.exp(-2 * table.n_test * (delta / 2) ** 2)) ** 2
            weight = max(weight - 0.5, 0.0)
        error = (1 - np.sign(mu[a] - mu[b]) * np.sign(table.gap[a] - table.gap[b])) / 2
        places.setdefault(key, []).append((weight, error))
    errors = []
    for pairs in places.values():
        weights, values = np.array(pairs).T
        if (weights**2).sum() > 0 and weights.sum() ** 2 / (weights**2).sum() >= least - 1e-9:
            errors.append(float(weights @ values / weights.sum()))
    return sorted(errors)


def slow_information(table, mu):
    columns, gap = [values.astype(str) for values in table.hyperparameters.values()], table.gap
    best = math.inf
    for size in range(3):
        for chosen in itertools.combinations(range(len(columns)), size):
            cells = {}
            for a, b in itertools.permutations(range(len(gap)), 2):
                if gap[a] != gap[b]:
                    key = tuple((columns[i][a], columns[i][b]) for i in chosen)
                    signs = np.sign(mu[a] - mu[b]), np.sign(gap[a] - gap[b])
                    cell = cells.setdefault(key, {})
                    cell[signs] = cell.get(signs, 0) + 1
            information = entropy = 0.0
            for cell in cells.values():
                total = sum(cell.values())
                left, right = {}, {}
                for (v, g), count in cell.items():
                    left[v], right[g] = left.get(v, 0) + count, right.get(g, 0) + count
                information += sum(n * math.log(n * total / (left[v] * right[g])) for (v, g), n in cell.items())
                entropy -= sum(n * math.log(n / total) for n in right.values())
            if entropy > 1e-9:
                best = min(best, information / entropy)
    return best if math.isfinite(best) else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipys_and_the_twins(seed):
    generator = np.random.default_rng(seed)
    mu, gap = generator.integers(0, 6, 30), generator.integers(0, 6, 30) + generator.integers(0, 2) * 0.5
    assert kendall_tau(mu, gap) == pytest.approx(kendalltau(mu, gap).statistic, rel=1e-12)
    assert kendall_tau(mu, gap) == pytest.approx(slow_tau(mu, gap), rel=1e-12)
    smooth = generator.normal(size=(2, 30))
    assert kendall_tau(*smooth) == pytest.approx(slow_tau(*smooth), rel=1e-12)


def test_tau_by_hand():
    # Pairs: (1,2) right, (1,3) right, (2,3) tied in the measure: (2 - 0) / sqrt(2 * 3).
    assert kendall_tau([1, 2, 2], [0.1, 0.2, 0.3]) == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau([1, 1, 1], [0.1, 0.2, 0.3]) == 0
    assert kendall_tau([1, 2, 3], [0.1, 0.1, 0.1]) == 0
    for mu, gap in (([1, 2], [1]), ([1], [1]), ([1, math.nan], [1, 2])):
        with pytest.raises(ValueError):
            kendall_tau(mu, gap)


def hand_table():
    """Depth 1, 2, 3 at width 8; depth 1, 2 at width 16; a repeat of the first."""
    return MeasureTable(
        {"depth": [1, 2, 3, 1, 2, 1], "width": [8, 8, 8, 16, 16, 8]},
        {"m": [1.0, 2.0, 1.5, 5.0, 4.0, 3.0]},
        [0.10, 0.20, 0.30, 0.15, 0.25, 0.40],
    )


def test_psi_by_hand():
    # Depth, width 8, networks 0, 1, 2 and 5 (a repeat of 0), pairs of different depth:
    #   (0,1) +  (0,2) +  (1,2) -  (1,5): measure 2 < 3, gap .2 < .4: +  (2,5): 1.5 < 3, .3 < .4: +   mean 3/5.
    # Depth, width 16: (3,4): measure falls, gap grows: -1.   psi_depth = (3/5 - 1) / 2 = -1/5.
    # Width, depth 1: (0,3): 1 < 5, .10 < .15: +;  (5,3): 3 < 5, .40 > .15: -.   mean 0.
    # Width, depth 2: (1,4): 2 < 4, .20 < .25: +1.  Depth 3: one network, no cell.   psi_width = 1/2.
    result = granulated(hand_table(), "m")
    assert result.by_hyperparameter == pytest.approx({"depth": -0.2, "width": 0.5})
    assert result.psi == pytest.approx(0.15)


def test_sign_errors_by_hand():
    # The pairs above by environment.  Width 8: depth 1-2: (0,1) 0, (1,5) 0; 1-3: (0,2) 0, (2,5) 0; 2-3: (1,2) 1.
    # Width 16: depth 1-2: 1.  Width, depth 1: 0 and 1, mean 1/2; depth 2: 0.
    result = sign_error(hand_table(), "m", effective_pairs=1)
    named = sorted(zip(result.hyperparameters, result.errors, result.effective_pairs, strict=True))
    assert named == [
        ("depth", 0, 2), ("depth", 0, 2), ("depth", 1, 1), ("depth", 1, 1), ("width", 0, 1), ("width", 0.5, 2)
    ]  # fmt: skip
    assert result.mean == pytest.approx(2.5 / 6)
    assert result.percentile_90 == pytest.approx(1)  # of 0 0 0 .5 1 1, at 4.5 of 0..5
    assert result.maximum == 1
    # Two pairs at least: one environment of depth 1-2, one of 1-3 and one of width.
    assert sorted(sign_error(hand_table(), "m", effective_pairs=2).errors) == [0, 0, 0.5]
    # Pooled: depth 1-2: errors 0, 0, 1; depth 1-3: 0, 0; depth 2-3: 1; width: 0, 1, 0.
    pooled = sign_error(hand_table(), "m", pooled=True, effective_pairs=1)
    assert sorted(pooled.errors) == pytest.approx([0, 1 / 3, 1 / 3, 1])


def test_noise_weights_by_hand():
    # n = 200, difference 0.2: phi = 2 exp(-2 * 200 * 0.01) = 2 e^-4 = 0.036631; (1 - phi)^2 = 0.928080.
    assert noise_weight([0.2, -0.2, 0.05, 0], 200) == pytest.approx([0.928080, 0.928080, 0, 0], abs=1e-6)
    # Difference 0.1: phi = 2 e^-1 = 0.735759, w = 0.069823 < 1/2: such a pair has no say.
    table = MeasureTable({"a": [0, 0, 1]}, {"m": [1.0, 3.0, 2.0]}, [0.0, 0.3, 0.2], 200)
    result = sign_error(table, "m", effective_pairs=1)
    # (0,2) right with weight 0.428, (1,2) right, but not significant.
    assert (result.errors[0], result.effective_pairs[0]) == (0, pytest.approx(1))
    wrong = sign_error(with_measure(table, np.array([1.0, 0.0, 2.0])), "good", effective_pairs=1)
    assert wrong.errors[0] == 0
    # n = 1000: difference 0.1 has phi = 2 e^-5 = 0.013476, w = 0.973230; 0.2 has w = 1 - 8.2e-9.
    mixed = with_measure(dataclasses.replace(table, n_test=1000), np.array([1.0, 0.0, 2.0]))
    result = sign_error(mixed, "good", effective_pairs=1)
    assert result.errors[0] == pytest.approx(0.473230 / 0.973230, rel=1e-5)
    assert result.effective_pairs[0] == pytest.approx(0.973230**2 / (0.473230**2 + 0.25), rel=1e-5)


def test_information_by_hand():
    table = MeasureTable({"h": ["x", "x", "y", "y"]}, {"swap": [1, 2, 4, 3], "h": [0, 0, 1, 1]}, [0.1, 0.2, 0.3, 0.4])
    # 12 ordered pairs, 2 of them (the last two networks) wrong: I / H = 1 - H_2(1/6), in bits 0.349978.
    # Given h: pairs within x and within y have one bit each, and the sign tells it (right in x, wrong in y, known
    # from h); pairs across have H = 0: I / H = 1.
    result = conditional_mutual_information(table, "swap")
    assert (result.value, result.given) == (pytest.approx(0.349978, abs=1e-6), ())
    # The measure is h: 8 pairs across are told, 4 within are not: I / H = 2/3 given nothing, 0 given h.
    result = conditional_mutual_information(table, "h")
    assert (result.value, result.given) == (pytest.approx(0, abs=1e-12), ("h",))
    # Without network 0: across 2 * 2 pairs told, the 2 within y are not; given h nothing is told.
    assert result.without == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert conditional_mutual_information(dataclasses.replace(table, gap=[0.1] * 4), "swap").value == 0


@pytest.mark.parametrize("n_test", [None, 400])
@pytest.mark.parametrize("seed", range(4))
def test_slow_twins_agree(seed, n_test):
    table = random_table(seed, n_test=n_test)
    for name, mu in table.measures.items():
        psi = granulated(table, name)
        slow, by_name = slow_psi(table, mu)
        assert psi.psi == pytest.approx(slow, abs=1e-12)
        assert psi.by_hyperparameter == pytest.approx(by_name, abs=1e-12)
        for pooled, least in ((False, 1), (False, 3.5), (True, 1), (True, 8)):
            try:
                fast = sorted(sign_error(table, name, pooled=pooled, effective_pairs=least).errors)
            except ValueError:
                fast = []
            assert fast == pytest.approx(slow_sign_errors(table, mu, pooled, least), abs=1e-12)
        assert conditional_mutual_information(table, name).value == pytest.approx(
            slow_information(table, mu), abs=1e-12
        )


@pytest.mark.parametrize("n_test", [None, 400])
def test_resampled_networks_count_as_often_as_they_are_drawn(n_test):
    """Multiplicities give what the resampled table itself gives; what lost all its pairs is missing from both."""
    table = random_table(5, sizes=(3, 2), repeats=2, n_test=n_test, drop=2)
    changes = single_changes(table)
    kept, _ = environments(changes, 1)
    counts = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)), size=40)
    psis = granulated_by_hyperparameter(table, "good", changes, counts)
    errors = np.concatenate(list(environment_errors(table, "good", changes, kept, counts)))
    for count, psi, error in zip(counts, psis, errors, strict=True):
        drawn = take(table, np.repeat(np.arange(len(table)), count))
        _, by_name = slow_psi(drawn, drawn.measures["good"])
        assert [by_name.get(name, math.nan) for name in table.hyperparameters] == pytest.approx(psi, nan_ok=True)
        slow = slow_sign_errors(drawn, drawn.measures["good"], False, 1)
        assert np.sort(error[np.isfinite(error)]) == pytest.approx(slow)
    assert np.isnan(errors).any()


def test_information_without_each_network_is_that_of_the_smaller_table():
    table = random_table(7, sizes=(2, 3), repeats=3, drop=2)
    for name in table.measures:
        without = conditional_mutual_information(table, name).without
        smaller = [take(table, np.arange(len(table)) != a) for a in range(len(table))]
        assert without == pytest.approx([slow_information(each, each.measures[name]) for each in smaller], abs=1e-12)


def everything(table):
    errors = sign_error(table, "good", pooled=True, effective_pairs=2)
    psi = granulated(table, "good")
    information = conditional_mutual_information(table, "good")
    return np.array(
        [kendall_tau(table.measures["good"], table.gap), psi.psi, errors.mean, errors.percentile_90, errors.maximum,
         information.value]
    )  # fmt: skip


@given(st.integers(0, 10**6), st.sampled_from((None, 500)), st.floats(0.1, 5), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_invariances(seed, n_test, scale, shift):
    table = random_table(seed, n_test=n_test)
    mu, values = table.measures["good"], everything(random_table(seed, n_test=n_test))
    monotone = with_measure(table, np.expm1(scale * mu) + shift)
    assert everything(monotone) == pytest.approx(values, abs=1e-12)
    order = np.random.default_rng(seed).permutation(len(table))
    assert everything(take(table, order)) == pytest.approx(values, abs=1e-12)
    # Other names for the settings change nothing, nor does a hyperparameter that is always the same.
    named = {name: np.array([f"v{-v}" for v in column]) for name, column in table.hyperparameters.items()}
    named["data"] = np.full(len(table), 3.5)
    assert everything(dataclasses.replace(table, hyperparameters=named)) == pytest.approx(values, abs=1e-12)
    negative = everything(with_measure(table, -mu))
    assert negative[[0, 1]] == pytest.approx(-values[[0, 1]], abs=1e-12)
    assert negative[2] == pytest.approx(1 - values[2], abs=1e-12)
    assert negative[5] == pytest.approx(values[5], abs=1e-12)
    errors, other = (
        sign_error(with_measure(table, sign * mu), "good", pooled=True, effective_pairs=2).errors for sign in (1, -1)
    )
    assert other == pytest.approx(1 - errors, abs=1e-12)


def test_the_gap_itself_is_perfect_and_a_constant_says_nothing():
    table = random_table(0, coarse=False)
    perfect, constant = with_measure(table, table.gap), with_measure(table, np.ones(len(table)))
    assert everything(perfect) == pytest.approx([1, 1, 0, 0, 0, 1], abs=1e-12)
    assert everything(constant) == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0], abs=1e-12)


def confounded(seed=0):
    """Depth moves the gap most, width a little; `confounded` knows depth, and has width the wrong way round."""
    rows = grid((8, 2), 4)
    generator = np.random.default_rng(seed)
    depth, width = rows.T
    gap = 0.1 * depth + 0.03 * width + generator.normal(0, 0.002, len(rows))
    noise = generator.normal(0, 0.01, (2, len(rows)))
    measures = {"confounded": depth - 0.1 * width + noise[0], "causal": gap + noise[1]}
    return MeasureTable({"depth": depth, "width": width}, measures, gap, 10_000)


def test_confounded_measures_are_found_out():
    table = confounded()
    ranking = rank_measures(table, resamples=50)
    causal, false = ranking.scores
    assert (causal.measure, false.measure) == ("causal", "confounded")
    assert false.tau.value > 0.7
    assert causal.tau.value > 0.9
    assert false.worst == "width"
    assert false.maximum.value == 1
    assert false.psi_by_hyperparameter["width"] < -0.9 < 0.9 < false.psi_by_hyperparameter["depth"]
    assert causal.maximum.value < 0.2
    assert (ranking.networks, ranking.environments) == (64, 8 * 1 + 2 * 28)


def test_a_measure_of_depth_alone_has_no_information_given_depth():
    table = confounded()
    depth = conditional_mutual_information(with_measure(table, table.hyperparameters["depth"] * 1.0), "good")
    assert depth.value == pytest.approx(0, abs=1e-12)
    assert "depth" in depth.given
    assert kendall_tau(table.hyperparameters["depth"], table.gap) > 0.8


def test_ranking_shows_itself_and_is_seeded():
    table = confounded()
    ranking = rank_measures(table, resamples=20, seed=3)
    assert ranking == rank_measures(table, resamples=20, seed=np.random.default_rng(3))
    assert ranking != rank_measures(table, resamples=20, seed=4)
    noisy = random_table(1, sizes=(3, 3), coarse=False)
    errors = sign_error(noisy, "noise", pooled=True, effective_pairs=3)
    record = rank_measures(noisy, pooled=True, effective_pairs=3, resamples=2).to_records()[1]
    assert record["measure"] == "noise"
    assert record["tau"] == kendall_tau(noisy.measures["noise"], noisy.gap)
    assert record["psi"] == pytest.approx(granulated(noisy, "noise").psi)
    found = [record[name] for name in ("mean_error", "percentile_90", "maximum")]
    assert found == pytest.approx([errors.mean, errors.percentile_90, errors.maximum])
    assert len(set(found)) == 3
    record = ranking.to_records()[1]
    for name in ("tau", "psi", "information", "mean_error", "percentile_90", "maximum"):
        assert record[f"{name}_low"] <= record[name] <= record[f"{name}_high"]
    loaded = json.loads(ranking.to_json())
    assert loaded["environments"] == 64
    assert loaded["scores"][1]["psi_width"] == record["psi_width"]
    lines = str(ranking).splitlines()
    assert lines[0] == "64 networks, 64 environments, 95 % intervals"
    assert lines[3].startswith("causal")
    assert len(lines) == 3 + 2
    wide = rank_measures(table, resamples=20, seed=3, level=0.99).scores[0].tau
    narrow = ranking.scores[0].tau
    # Normal quantiles at 0.995 and 0.975: 2.5758 / 1.9600.
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(1.31422, rel=1e-4)


def test_intervals_cover():
    """Zoos drawn from one distribution: 90 % intervals hold the value of a large zoo about as often as they say."""
    names = ("tau", "psi", "information", "mean_error")

    def draw(generator, n):
        rows = generator.integers(0, 2, (n, 2))
        gap = 0.5 * rows[:, 0] + generator.normal(0, 1, n)
        return MeasureTable(
            {"depth": rows[:, 0], "width": rows[:, 1]}, {"m": gap + rows[:, 1] + generator.normal(0, 1, n)}, gap
        )

    large = rank_measures(draw(np.random.default_rng(1), 3000), resamples=2).scores[0]
    generator = np.random.default_rng(2)
    hits = dict.fromkeys(names, 0)
    for _ in range(100):
        score = rank_measures(draw(generator, 80), resamples=40, level=0.9, seed=generator).scores[0]
        for name in names:
            estimate = getattr(score, name)
            hits[name] += estimate.low <= getattr(large, name).value <= estimate.high
    # 100 trials at 90 %: 90 +- 3; the large zoo has an error of its own.
    assert all(80 <= count <= 99 for count in hits.values()), hits


def test_thousands_of_networks():
    """All pairs of 3000 networks that differ in one of two hyperparameters: 2.2 million pairs, in seconds."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 2, (3000, 2))
    gap = generator.normal(size=3000)
    table = MeasureTable(dict(zip("ab", rows.T, strict=True)), {"m": generator.normal(size=3000)}, gap)
    sizes = np.bincount(rows[:, 0] * 2 + rows[:, 1])
    changes = single_changes(table)
    assert len(changes.first) == sizes[0] * (sizes[1] + sizes[2]) + sizes[3] * (sizes[1] + sizes[2])
    assert sign_error(table, "m").errors == pytest.approx([0.5] * 4, abs=0.03)


def test_bad_tables_are_named():
    good = {"hyperparameters": {"depth": [1, 2]}, "measures": {"m": [1.0, 2.0]}, "gap": [0.1, 0.2]}
    assert len(MeasureTable(**good)) == 2
    for change, message in (
        ({"gap": [0.1]}, "two networks"),
        ({"gap": [0.1, math.nan]}, "gap"),
        ({"gap": [[0.1, 0.2]]}, "gap"),
        ({"measures": {}}, "one measure"),
        ({"hyperparameters": {}}, "one hyperparameter"),
        ({"measures": {"norm": [1.0]}}, "'norm' has 1 entries for 2"),
        ({"measures": {"norm": [1.0, math.inf]}}, "'norm'"),
        ({"hyperparameters": {"rate": [0.1, math.nan]}}, "'rate'"),
        ({"hyperparameters": {"rate": [0.1, None]}}, "'rate'"),
        ({"hyperparameters": {"rate": [0.1]}}, "'rate' has 1 entries for 2"),
        ({"hyperparameters": {"rate": [[0.1, 0.2]]}}, "'rate'"),
        ({"n_test": 0}, "n_test"),
        ({"n_test": 100, "gap": [0.1, 1.2]}, "1.2"),
    ):
        with pytest.raises(ValueError, match=message):
            MeasureTable(**(good | change))


def test_questions_without_an_answer_are_refused():
    table = MeasureTable({"a": [0, 1], "b": [0, 1]}, {"m": [1.0, 2.0]}, [0.1, 0.2])
    for ask in (granulated, sign_error):
        with pytest.raises(ValueError, match="exactly one hyperparameter"):
            ask(table, "m")
    with pytest.raises(ValueError, match="no measure 'x'; the table has m"):
        granulated(hand_table(), "x")
    with pytest.raises(ValueError, match=r"no environment has 12 effective pairs, the largest has 2:"):
        sign_error(hand_table(), "m")
    with pytest.raises(ValueError, match="effective_pairs"):
        sign_error(hand_table(), "m", effective_pairs=0.5)
    for bad in ({"resamples": 1}, {"level": 1.0}):
        with pytest.raises(ValueError):
            rank_measures(hand_table(), effective_pairs=1, **bad)
    # One pair of networks: at most one of two resamples has it, and no standard error is known.
    pair = MeasureTable({"a": [0, 1]}, {"m": [1.0, 2.0]}, [0.1, 0.2])
    seed = next(s for s in range(99) if (np.random.default_rng(s).multinomial(2, [0.5, 0.5], 2) == 1).all(1).sum() == 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = rank_measures(pair, effective_pairs=1, resamples=2, seed=seed).scores[0]
    assert score.psi == Estimate(1.0, -1.0, 1.0)
    assert score.maximum == Estimate(0.0, 0.0, 1.0)
