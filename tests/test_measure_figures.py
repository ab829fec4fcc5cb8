"""Figures of rankings and scatter plots: what they show, and that they leave the global state alone."""

import matplotlib as mpl
import numpy as np
import pytest

from specprune.analysis.measure_ranking import rank_measures
from specprune.analysis.measure_table import MeasureTable
from specprune.figures.measures import draw_ranking, draw_scatter


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
