"""The gallery: all figures in one registry, computed once for the same inputs, whole files or none."""

import dataclasses
import json
import re

import matplotlib
import numpy as np
import pytest
import torch
from helpers import assert_series_differ_in_grey
from matplotlib.figure import Figure
from torch import nn

import specprune
from specprune.analysis.certificate_path import CertificatePath, PathPoint
from specprune.cli import main
from specprune.figures import FIGURES, GROUPS, Conditions, FigureSetting, GalleryFigure, Parts, figures_of, make_figures
from specprune.figures import certificate_path as path_figure
from specprune.figures.data_files import read_record, write_record
from specprune.figures.style import figure_style
from specprune.testbed import Dataset, load_dataset


def draw_line(data):
    with figure_style():
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(data["numbers"])
    return figure


@pytest.fixture
def counted(monkeypatch):
    """Two figures that count how often they are computed, one of a network and one of nothing, in two parts."""
    calls = []

    def of_network(setting):
        calls.append("portrait")
        return {"numbers": [1.0, 2.0, float(setting.seed)]}

    def of_nothing(conditions, parts):
        def part(name):
            calls.append(name)
            return [1.0, float("inf")]

        return {"numbers": parts.get("one", lambda: part("one")) + parts.get("two", lambda: part("two"))[:1]}

    for entry in (
        GalleryFigure("portrait", "tightness", "a portrait", of_network, draw_line),
        GalleryFigure(
            "sketch", "tightness", "a sketch", of_nothing, lambda _: draw_line({"numbers": [1]}), "nothing", True
        ),
    ):
        monkeypatch.setitem(FIGURES, entry.name, entry)
    return calls


def small_setting(**changes):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.rand(20, 1, 2, 2, generator=generator), torch.arange(20) % 2
    dataset = Dataset("small", inputs, targets, inputs[:10], targets[:10], 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    return FigureSetting(**{"model": model, "dataset": dataset, "label": "small net", **changes})


def test_the_registry_is_complete():
    assert len(FIGURES) >= 18
    for name, figure in FIGURES.items():
        assert figure.name == name
        assert re.fullmatch(r"[a-z_]+", name)
        assert figure.group in GROUPS
        assert figure.needs in ("network", "nothing")
        assert figure.title
        assert "\n" not in figure.title
        assert callable(figure.compute)
        assert callable(figure.draw)
    assert sorted(name for group in GROUPS for name in figures_of(group)) == sorted(FIGURES)
    for group in GROUPS:
        assert figures_of(group)
    with pytest.raises(ValueError, match="unknown group 'portraits': expected one of spectral pruning"):
        figures_of("portraits")


def test_the_list(capsys):
    assert main(["figures"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name, figure in FIGURES.items():
        (line,) = [line for line in lines if re.search(rf"\b{name}\b", line)]
        assert figure.group in line
        assert figure.title in line
    assert len(lines) == len(FIGURES) + 3
    assert main(["figures", "--json"]) == 0
    assert [record["figure"] for record in json.loads(capsys.readouterr().out)] == list(FIGURES)


def test_the_same_inputs_are_computed_once(counted, tmp_path):
    setting = small_setting()
    make_figures(setting, tmp_path, ["portrait"])
    first = (tmp_path / "portrait.json").read_bytes()
    (tmp_path / "portrait.png").unlink()
    assert [path.name for path in make_figures(small_setting(), tmp_path, ["portrait"])] == [
        "portrait.json",
        "portrait.pdf",
        "portrait.png",
    ]
    assert counted == ["portrait"]
    assert (tmp_path / "portrait.json").read_bytes() == first
    assert (tmp_path / "portrait.png").exists()


def other_weights(setting):
    with torch.no_grad():
        setting.model[1].bias[0] += 1e-6
    return setting


def other_pixel(setting):
    data = setting.dataset
    inputs = data.train_inputs.clone()
    inputs[3, 0, 0, 0] *= 0.9999
    return dataclasses.replace(setting, dataset=dataclasses.replace(data, train_inputs=inputs))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: dataclasses.replace(s, seed=1),
        lambda s: dataclasses.replace(s, quick=True),
        lambda s: dataclasses.replace(s, calibration=7),
        lambda s: dataclasses.replace(s, keep=(0.5,)),
        lambda s: dataclasses.replace(s, label="other"),
        lambda s: dataclasses.replace(s, model=nn.Sequential(*s.model, nn.ReLU())),
        other_weights,
        other_pixel,
    ],
)
def test_other_inputs_are_computed_anew(counted, tmp_path, change):
    make_figures(small_setting(), tmp_path, ["portrait"], formats=["png"])
    make_figures(change(small_setting()), tmp_path, ["portrait"], formats=["png"])
    assert counted == ["portrait"] * 2


def test_another_version_and_damaged_data_are_computed_anew(counted, tmp_path, monkeypatch):
    make_figures(small_setting(), tmp_path, ["portrait"], formats=["png"])
    monkeypatch.setattr("specprune.figures.gallery.__version__", "0.0.0")
    make_figures(small_setting(), tmp_path, ["portrait"], formats=["png"])
    assert len(counted) == 2
    path = tmp_path / "portrait.json"
    path.write_text(path.read_text()[:100])
    make_figures(small_setting(), tmp_path, ["portrait"], formats=["png"])
    assert len(counted) == 3


def test_figures_without_a_network_depend_on_seed_and_quickness(counted, tmp_path):
    for conditions in (Conditions(), Conditions(), Conditions(seed=1), Conditions(seed=1, quick=True)):
        make_figures(None, tmp_path, ["sketch"], conditions=conditions, formats=["png"])
    assert counted == ["one", "two"] * 3
    with pytest.raises(ValueError, match="figure 'portrait' needs a trained network"):
        make_figures(None, tmp_path, ["sketch", "portrait"])


def test_an_interrupted_figure_goes_on_with_its_parts(counted, tmp_path, monkeypatch):
    get = Parts.get

    def interrupted(self, name, compute):
        if name == "two":
            raise KeyboardInterrupt
        return get(self, name, compute)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_figures(None, tmp_path, ["sketch"])
    assert not (tmp_path / "sketch.json").exists()
    make_figures(None, tmp_path, ["sketch"])
    assert counted == ["one", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sketch.json", "sketch.pdf", "sketch.png"]
    assert read_record(tmp_path / "sketch.json")["data"]["numbers"] == [1.0, "inf", 1.0]


@pytest.mark.parametrize("place", ["compute", "draw", "savefig"])
def test_a_failure_leaves_whole_files_only(counted, tmp_path, monkeypatch, place):
    def fail(*args, **kwargs):
        if place == "savefig":
            args[1].write(b"half a picture")
        raise RuntimeError("no ink")

    if place == "savefig":
        monkeypatch.setattr(Figure, place, fail)
    else:
        monkeypatch.setitem(FIGURES, "portrait", dataclasses.replace(FIGURES["portrait"], **{place: fail}))
    with pytest.raises(RuntimeError, match="no ink"):
        make_figures(small_setting(), tmp_path, ["portrait"])
    assert [path.name for path in tmp_path.iterdir()] == ([] if place == "compute" else ["portrait.json"])


def test_provenance(counted, tmp_path):
    make_figures(small_setting(seed=5), tmp_path, ["portrait"], command="specprune figures portrait --seed 5")
    record = json.loads((tmp_path / "portrait.json").read_text())
    made_by = record["provenance"]
    assert made_by["command"] == "specprune figures portrait --seed 5"
    assert (made_by["label"], made_by["seed"], made_by["quick"]) == ("small net", 5, False)
    assert made_by["device"].startswith("cpu")
    for module in (specprune, torch, np, matplotlib):
        assert made_by[module.__name__] == module.__version__
    assert record["inputs"]["samples"] == [20, 10]
    assert record["title"] == "a portrait"
    assert re.fullmatch("[0-9a-f]{64}", record["digest"])


def test_formats(counted, tmp_path):
    made = make_figures(small_setting(), tmp_path, ["portrait"], formats=["pdf"])
    assert [path.name for path in made] == ["portrait.json", "portrait.pdf"]
    assert (tmp_path / "portrait.pdf").read_bytes().startswith(b"%PDF")
    for formats in (["svg"], []):
        with pytest.raises(ValueError, match="expected some of pdf, png"):
            make_figures(small_setting(), tmp_path, ["portrait"], formats=formats)


def test_the_command(counted, tmp_path, capsys):
    arguments = ["figures", "sketch", "--quick", "--format", "png", "--seed", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("sketch.json", "sketch.png")]
    made_by = read_record(tmp_path / "sketch.json")["provenance"]
    assert made_by["command"] == f"specprune {' '.join(arguments)}"
    assert (made_by["seed"], made_by["quick"]) == (2, True)
    assert main(arguments) == 0
    assert counted == ["one", "two"]
    for bad in (["figures", "portraits"], ["figures", "all", "--format", "pdf,gif"]):
        with pytest.raises(SystemExit):
            main(bad)


def test_a_quick_figure_of_the_digits(tmp_path, capsys):
    arguments = ["figures", "eigenvalue_decay", "--quick", "--format", "png", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = read_record(tmp_path / "eigenvalue_decay.json")
    assert record["inputs"]["label"] == "digits, mlp-64-64"
    assert record["inputs"]["samples"] == [len(load_dataset("digits").train_inputs), 397]
    capsys.readouterr()


def test_long_lists_lie_in_an_npz_file(tmp_path):
    path = tmp_path / "a.json"
    numbers = np.random.default_rng(0).standard_normal(600).tolist()
    data = {
        "long": [numbers, list(range(500))],
        "short": numbers[:499],
        "words": ["a"] * 600,
        "odd": [1.0, "inf"] * 300,
    }
    write_record(path, {"figure": "a", "digest": "x", "data": data})
    assert (tmp_path / "a.npz").exists()
    assert len(path.read_text()) < 40_000
    assert read_record(path)["data"] == data
    other = tmp_path / "b"
    write_record(other / "a.json", {"figure": "a", "digest": "y", "data": data})
    (other / "a.npz").replace(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="not written together with"):
        read_record(path)
    write_record(path, {"figure": "a", "digest": "z", "data": {"short": [1.0]}})
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["a.json"]


def test_bounds_move_in_a_quick_figure(tmp_path, monkeypatch):
    plan = {"base_samples": 200, "samples": (), "widths": (8,), "depths": (), "noises": (), "keeps": (), "steps": 20}
    monkeypatch.setattr("specprune.figures.bound_trends._QUICK", {**plan, "base_width": 16})
    make_figures(None, tmp_path, ["bound_trends"], conditions=Conditions(quick=True), formats=["png"])
    record = read_record(tmp_path / "bound_trends.json")
    assert record["data"]["label"] == "digits, mlp-16-16"
    (widths,) = [axis["settings"] for axis in record["data"]["axes"] if axis["axis"] == "width"]
    assert widths == [8, 16]
    for ax in FIGURES["bound_trends"].draw(record["data"]).axes:
        assert_series_differ_in_grey(ax)


def test_the_certificate_figure_searches_in_its_parts(tmp_path, monkeypatch):
    points = tuple(PathPoint(f, (2,), 100, int(200 * f), 0.2 / f, 0.25, 0.4) for f in (0.5, 1.0))
    asked = {}

    def search(dataset, **arguments):
        asked.update(arguments, data=dataset.name)
        return CertificatePath("digits", "pixels", 1400, 0.05, points)

    monkeypatch.setattr(path_figure, "certificate_path", search)
    make_figures(None, tmp_path, ["certificate_path"], conditions=Conditions(seed=3, quick=True), formats=["png"])
    assert (asked["data"], asked["seed"], asked["baselines"]) == ("digits", 3, False)
    assert asked["out"].parent == tmp_path
    (ax,) = path_figure.draw(read_record(tmp_path / "certificate_path.json")["data"]).axes
    assert_series_differ_in_grey(ax)
