"""Certificates along the pruning path: widths, baselines, what is drawn, and the commands."""

import dataclasses
import json

import pytest
from matplotlib.figure import Figure
from test_certify import DESIGN, MINUTES, dataset

from specprune.analysis.certificate import certificate_of, load_network
from specprune.analysis.certificate_path import CertificatePath, PathPoint, certificate_path
from specprune.analysis.code_design import Design, scaled_design
from specprune.cli import main
from specprune.compress.vocabulary import LayerSpec
from specprune.figures import certificate_path as path_figure

POINTS = (
    PathPoint(0.5, (2, 2), 100, 200, 0.2, 0.25, 0.4),
    PathPoint(1.0, (4, 4), 300, 500, 0.05, 0.06, 0.3),
    PathPoint(2.0, (8, 8), 900, 1400, 0.01, 0.05, 0.45),
)
PATH = CertificatePath("mnist", "pixels", 60000, 0.05, POINTS, published=0.116)


def widths(design):
    return [layer.out_channels for layer in design.layers]


def test_widths_are_scaled_and_the_classes_stay():
    assert widths(scaled_design(DESIGN, 1)) == [3, 3, 2]
    assert widths(scaled_design(DESIGN, 2.5)) == [8, 8, 2]
    assert widths(scaled_design(DESIGN, 0.01)) == [1, 1, 2]
    assert widths(scaled_design(DESIGN, 1000)) == [64, 64, 2]
    for factor in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="factor"):
            scaled_design(DESIGN, factor)


def test_fixed_filters_have_as_many_channels_as_the_layer_before():
    layers = (
        LayerSpec("conv", 8, 1, 1, 0, 2, relu=False),
        LayerSpec("filters", 8, 3, 2, 1),
        LayerSpec("conv", 10, 1, 1, 0, 2, relu=False),
    )
    assert widths(scaled_design(Design(1, 1, False, layers), 1.5)) == [12, 12, 10]


@pytest.mark.slow
def test_a_path_is_made_of_certificates(tmp_path):
    data = dataset()
    path = certificate_path(data, minutes=MINUTES, out=tmp_path, factors=(2, 1), design=DESIGN, seed=3)
    assert [point.factor for point in path.points] == [1, 2]
    for point in path.points:
        found = certificate_of(load_network(tmp_path / f"width-{point.factor:g}" / "best.spnw"), data)
        assert (point.certificate, point.bits) == (found.value, found.bits)
        assert point.widths == tuple(int(3 * point.factor) for _ in range(2))
    assert path.best.certificate == min(point.certificate for point in path.points)
    subspace, real = path.baselines
    assert real.value > max(point.certificate for point in path.points)
    assert subspace.bits < real.bits
    assert path.published is None
    text = str(path)
    assert "random subspace" in text
    assert f"{path.best.certificate:.2%}" in text
    assert json.loads(path.to_json())["points"] == json.loads(json.dumps(path.to_records()))
    with pytest.raises(ValueError, match="factors: got none"):
        certificate_path(data, minutes=1, out=tmp_path, factors=(), design=DESIGN)
    with pytest.raises(ValueError, match="minutes"):
        certificate_path(data, minutes=0, out=tmp_path, design=DESIGN)


def test_the_figure_shows_certificate_errors_and_the_published_value():
    data = json.loads(json.dumps(path_figure.from_path(PATH)))
    figure = path_figure.draw(data)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["certificate"].get_xdata()) == [200, 500, 1400]
    assert list(lines["certificate"].get_ydata()) == pytest.approx([40, 30, 45])
    price = lines["price of the bits (variance)"].get_ydata()
    assert list(price) == pytest.approx([20, 25, 44])
    assert list(lines["published"].get_ydata()) == pytest.approx([11.6, 11.6])
    assert ax.get_xlabel() == "length of the word [bits]"
    ax = Figure().subplots()
    assert PATH.plot(ax) is ax
    without = dataclasses.replace(PATH, published=None)
    assert "published" not in [line.get_label() for line in without.plot(Figure().subplots()).get_lines()]


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["certify", "--budget", "0.1", "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    value = record["result"]["certificate"]["certificate"]
    assert record["command"] == "certify"
    assert main(["verify", str(out / "best.spnw"), "--data", "digits", "--out", str(tmp_path), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["result"]["certificate"] == value
    assert main(["certify", "--budget", "0", "--out", str(out)]) == 0  # what is there already
    assert "best.spnw" in capsys.readouterr().out
    assert main(["certify", "--budget", "0", "--out", str(tmp_path / "empty")]) == 1
    assert "leaves no time" in capsys.readouterr().err


def test_the_path_command_draws(tmp_path, capsys, monkeypatch):
    import specprune.cli as cli

    asked = {}

    def stand_in(dataset, **settings):
        asked.update(settings, data=dataset.name)
        return PATH

    monkeypatch.setattr(cli, "certificate_path", stand_in)
    assert main(["certify", "--path", "--budget", "8", "--out", str(tmp_path)]) == 0
    assert asked["minutes"] == 1.0
    assert asked["data"] == "digits"
    assert (tmp_path / "certificate_path.png").stat().st_size > 1000
    assert "pruned to 4-4" in capsys.readouterr().out
