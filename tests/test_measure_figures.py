"""Figures of rankings and scatter plots: what they show, and that they leave the global state alone."""

import json

import matplotlib as mpl
import numpy as np
import pytest

from specprune.analysis.measure_ranking import rank_measures
from specprune.analysis.measure_table import MeasureTable
from specprune.figures import Conditions, make_figures, measure_ranking, measure_scatter
from specprune.figures.data_files import read_record
from specprune.figures.measure_ranking import draw_ranking
from specprune.figures.measure_scatter import draw_scatter


def table(seed=0):
    rng = np.random.default_rng(seed)
    width, n = np.repeat([8, 16, 32], 20), np.tile([100, 200], 30)
    gap = 0.3 - 0.0005 * n + 0.001 * width + 0.01 * rng.standard_normal(60)
    measures = {"good": gap + 0.01 * rng.standard_normal(60), "useless": rng.standard_normal(60), "wrong": -gap}
    return MeasureTable({"width": width, "n": n}, measures, gap)


def test_ranking_shows_every_measure_with_its_interval():
    before = dict(mpl.rcParams)
    ranking = rank_measures(table(), pooled=True, resamples=20)
    figure = draw_ranking(ranking.to_records(), "60 networks", ["good"])
    left, right = figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert set(names) == {"good", "useless", "wrong"}
    assert names[0] == "good"
    assert left.get_yticklabels()[0].get_fontweight() == "bold"
    by_name = {record["measure"]: record for record in ranking.to_records()}
    for ax, field in ((left, "psi"), (right, "mean_error")):
        points, bars = ax.containers[0].lines[0], ax.containers[0].lines[2][0]
        assert list(points.get_xdata()) == [by_name[name][field] for name in names]
        segments = [sorted(segment[:, 0]) for segment in bars.get_segments()]
        wanted = [[by_name[name][f"{field}_low"], by_name[name][f"{field}_high"]] for name in names]
        np.testing.assert_allclose(segments, wanted)
    assert dict(mpl.rcParams) == before


def test_scatter_shows_ranks_and_groups():
    own = table()
    figure = draw_scatter(own.measures, own.gap, list(own.hyperparameters["n"]), "n", "60 networks")
    assert [ax.get_title() for ax in figure.axes] == ["good", "useless", "wrong"]
    first = figure.axes[0]
    x = np.concatenate([line.get_xdata() for line in first.lines])
    y = np.concatenate([line.get_ydata() for line in first.lines])
    assert sorted(x) == pytest.approx((np.arange(60) + 0.5) / 60)
    assert np.corrcoef(x, y)[0, 1] > 0.9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["n = 100", "n = 200"]
    with pytest.raises(ValueError, match="one to four"):
        draw_scatter({}, own.gap, list(own.gap), "n", "none")


def test_data_of_figures_survive_a_file():
    own = table()
    ranking = rank_measures(own, pooled=True, resamples=20)
    data = json.loads(json.dumps(measure_ranking.from_ranking(ranking, "digits, 60 networks")))
    figure = measure_ranking.draw(data)
    assert figure.get_suptitle() == "digits, 60 networks, 95 % intervals"
    assert len(figure.axes[0].get_yticklabels()) == 3
    data = json.loads(json.dumps(measure_scatter.from_table(own, ("wrong", "good"), "digits")))
    figure = measure_scatter.draw(data)
    assert [ax.get_title() for ax in figure.axes] == ["wrong", "good"]
    for ax, sign in zip(figure.axes, (-1, 1), strict=True):
        x, y = (np.concatenate([getattr(line, f"get_{axis}data")() for line in ax.lines]) for axis in "xy")
        assert sign * np.corrcoef(x, y)[0, 1] > 0.9
    assert data["group"] == "n"


def test_the_scatter_shows_the_best_and_the_spectral():
    own = table()
    measures = {**own.measures, "dof_1e-3": np.arange(60.0)}
    own = MeasureTable(own.hyperparameters, measures, own.gap)
    names = measure_scatter.best_and_spectral(own, rank_measures(own, pooled=True, resamples=20))
    assert names[0] == "good"
    assert "dof_1e-3" in names[1:]
    assert "wrong" not in names


@pytest.mark.slow
def test_quick_figures_of_a_zoo(tmp_path):
    quick = Conditions(quick=True)
    make_figures(None, tmp_path, ["measure_ranking", "measure_scatter"], conditions=quick, formats=["png"])
    ranked, scattered = (read_record(tmp_path / f"measure_{name}.json")["data"] for name in ("ranking", "scatter"))
    assert len(ranked["measures"]) == 8
    assert len(scattered["gap"]) == 24
    assert {0.0 < gap < 1.0 for gap in scattered["gap"]} == {True}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "measure_ranking.json",
        "measure_ranking.png",
        "measure_scatter.json",
        "measure_scatter.png",
    ]
