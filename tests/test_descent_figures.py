"""The figures of over-parameterisation: their data, what they show, and their files."""

import json

import numpy as np
import pytest
from helpers import assert_series_differ_in_grey

from specprune.cli import main
from specprune.figures import FIGURES, figures_of, make_figures
from specprune.figures.double_descent import draw_panels, linear_problem
from specprune.figures.registry import OVERPARAMETERISED


@pytest.mark.parametrize("name", figures_of(OVERPARAMETERISED))
def test_each_figure_is_drawn_from_its_data(tmp_path, name, capsys):
    assert main(["double-descent", name, "--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.{kind}") for kind in ("json", "pdf", "png")]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["figure"] == name
    assert record["provenance"]["quick"] is True
    figure = FIGURES[name].draw(record["data"])
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_legend().get_texts()
        assert_series_differ_in_grey(ax)
    assert figure.axes[0].get_ylabel()
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_lines_do_not_cross_the_peak():
    panel = {"title": "a", "n": 10, "ceiling": 2.0, "sizes": [{"size": k, "unpruned": 1.0} for k in (5, 8, 12, 20)]}
    (ax,) = draw_panels({"panels": [panel], "methods": ["unpruned"]}, "title").axes
    curves = [np.array(line.get_xdata()) for line in ax.get_lines() if line.get_linestyle() == "-"]
    assert sorted(map(tuple, curves)) == [(5, 8), (12, 20)]


def test_linear_models_have_signal_one():
    for kind in ("identity", "spiked", "power law"):
        problem = linear_problem(kind)
        assert problem.null_risk - problem.noise == pytest.approx(1)
    with pytest.raises(ValueError, match="kind 'other'"):
        linear_problem("other")


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="unknown figure 'other'"):
        make_figures(None, tmp_path, ["other"])
    with pytest.raises(SystemExit):
        main(["double-descent", "other"])
    assert "'other': expected one of" in capsys.readouterr().err
