"""The figures: their data, their artists, their files."""

import dataclasses
import io
import json
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import assert_series_differ_in_grey
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import beta

from specprune.analysis.tradeoff import CURVE_STYLES
from specprune.compress import prune
from specprune.figures import FIGURES, FigureSetting, figure_style, make_figures, new_figure, redraw
from specprune.figures.style import COLUMN_WIDTHS, ROLES, finish_figure, numbers, series_style
from specprune.testbed import default_recipe, evaluate, load_dataset, train

NAMES = [name for name, figure in FIGURES.items() if figure.needs == "network"]
WIDE = ("bias_variance", "bound_bars", "spectrum_samples", "accuracy", "uncompressed")
KEEP = (0.001, 0.03, 0.2, 1.0)  # the first is below what one node a group costs


def settings():
    """Matplotlib's settings but for the backend, which matplotlib chooses when it is first looked at."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are computed faster by one thread, many times so where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting():
    digits = load_dataset("digits")
    recipe = dataclasses.replace(default_recipe("digits", "mlp-64-64"), epochs=6)
    model = train(digits, recipe).model
    return FigureSetting(model, digits, "digits, mlp-64-64", calibration=600, keep=KEEP, quick=True)


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    before = settings()
    paths = make_figures(setting, out, NAMES)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in NAMES for kind in ("json", "pdf", "png")]
    assert settings() == before
    return out


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def drawn(folder, name):
    return FIGURES[name].draw(read(folder, name)["data"])


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def shown_axes(figure):
    return [ax for ax in figure.axes if ax.axison]


def texts(figure):
    """All texts that are seen, with their extents."""
    figure.draw_without_rendering()
    found = list(figure.texts) + ([figure._suptitle] if figure._suptitle not in figure.texts else [])
    legends = [legend for ax in figure.axes if (legend := ax.get_legend()) is not None]
    found += [text for legend in (*legends, *figure.legends) for text in legend.get_texts()]
    for ax in shown_axes(figure):
        found += [ax.xaxis.label, ax.yaxis.label, ax.title, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for ticks in (axis.get_major_ticks(), axis.get_minor_ticks()):
                found += [tick.label1 for tick in ticks if tick.label1.get_visible() and low <= tick.get_loc() <= high]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text() and text.get_visible()]


def test_data_are_json_with_provenance(setting, folder):
    for name in NAMES:
        record = read(folder, name)
        assert record["figure"] == name
        assert set(record["provenance"]) >= {"specprune", "torch", "numpy", "seed", "label"}
        assert record["provenance"]["label"] == setting.label
    for name in ("eigenvalue_decay", "degrees_of_freedom", "approximation_error", "bias_variance"):
        data = FIGURES[name].compute(setting)
        assert json.loads(json.dumps(data, allow_nan=False)) == data == read(folder, name)["data"]


def test_budgets_that_no_network_meets_are_left_out(setting):
    assert setting.budgets == KEEP[1:]
    with pytest.raises(ValueError, match="one node a group already costs"):
        _ = dataclasses.replace(setting, keep=(0.001,)).budgets
    with pytest.raises(ValueError, match="calibration=0"):
        dataclasses.replace(setting, calibration=0)


def test_shared_tradeoff_is_computed_once(setting, folder):
    assert setting.curve is setting.curve
    given = dataclasses.replace(setting, tradeoff=setting.curve)
    assert given.curve is setting.curve
    assert read(folder, "approximation_error")["data"]["samples"] == len(setting.dataset.train_inputs)


@pytest.mark.parametrize("name", NAMES)
def test_redrawing_gives_the_same_files(folder, name):
    before = {kind: (folder / f"{name}.{kind}").read_bytes() for kind in ("pdf", "png")}
    pixels = imread(folder / f"{name}.png")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.grid": True}):  # a caller's own taste
        assert redraw(folder / f"{name}.json") == [folder / f"{name}.pdf", folder / f"{name}.png"]
    assert np.array_equal(imread(folder / f"{name}.png"), pixels)
    assert {kind: (folder / f"{name}.{kind}").read_bytes() for kind in before} == before
    assert pixels.shape[1] == round(200 * COLUMN_WIDTHS[2 if name in WIDE else 1])


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_inside_and_apart(folder, name):
    figure = drawn(folder, name)
    extents = texts(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in extents:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for k, (text, box) in enumerate(extents):
        for other, other_box in extents[:k]:
            # A pixel or two of the boxes is empty: they are those of the line, not of the ink.
            overlap = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
            assert overlap <= 1 or min(box.y1, other_box.y1) - max(box.y0, other_box.y0) <= 2, (text, other)
    shared = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in shown_axes(figure):
        assert ax.get_xlabel()
        assert ax.get_ylabel() or any(ax.get_shared_y_axes().joined(ax, other) for other in figure.axes if other != ax)
        assert not any(text.get_window_extent().overlaps(ax.get_window_extent()) for text in shared)
        for text in [] if shared else ax.get_legend().get_texts():
            assert text.get_window_extent().y0 >= ax.get_window_extent().y1, "the legend covers the curves"


def test_eigenvalue_decay(setting, folder):
    (ax,) = drawn(folder, "eigenvalue_decay").axes
    layers = read(folder, "eigenvalue_decay")["data"]["layers"]
    assert len(ax.lines) == 2 * len(layers) == 6
    assert [label.split(":")[0] for label in labels(ax)] == ["fc1", "fc2", "fc3"]
    for spectrum, layer, curve, fit in zip(
        setting.spectra.values(), layers, ax.lines[::2], ax.lines[1::2], strict=True
    ):
        assert sum(layer["shares"]) == pytest.approx(1.0, abs=1e-9)
        assert np.all(np.diff(curve.get_ydata()) <= 0)
        slopes = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata()))
        assert slopes == pytest.approx(np.full(len(slopes), -1 / spectrum.power_law().beta))
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_degrees_of_freedom(setting, folder):
    (ax,) = drawn(folder, "degrees_of_freedom").axes
    data = read(folder, "degrees_of_freedom")["data"]
    for k, (spectrum, layer) in enumerate(zip(setting.spectra.values(), data["layers"], strict=True)):
        counts = ax.lines[k].get_ydata()
        assert np.all(np.diff(counts) < 0)
        assert counts[0] <= layer["width"] == spectrum.width
        assert counts[8] == pytest.approx(spectrum.degrees_of_freedom(1e-7))
        assert spectrum.degrees_of_freedom(layer["effective_rank_lambda"]) == pytest.approx(spectrum.effective_rank)
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    assert len(stars) == 3
    ceilings = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert ceilings == [64]  # all three layers read 64 nodes
    assert labels(ax)[-2:] == ["width of a layer", r"$N = r_\mathrm{eff}$"]


def test_approximation_error(setting, folder):
    (ax,) = drawn(folder, "approximation_error").axes
    lines = {line.get_label(): line for line in ax.lines}
    for name in ("measured", "certificate, layer by layer", "certificate, moments"):
        assert len(lines[name].get_xdata()) == 2  # the unpruned network has no error to show
        assert np.all(np.diff(lines[name].get_ydata()) < 0)
    for name in ("certificate, layer by layer", "certificate, moments"):
        assert np.all(lines["measured"].get_ydata() <= lines[name].get_ydata())
    points = setting.curve.points
    assert lines["measured"].get_ydata()[0] == pytest.approx(points[0].measured / setting.curve.output_norm)
    data = read(folder, "approximation_error")["data"]
    for k, holds in enumerate((True, False, True)):
        data["points"][k]["a_priori_holds"] = holds
    lines = {line.get_label(): line for line in FIGURES["approximation_error"].draw(data).axes[0].lines}
    held, failed = lines[r"a priori, $c \leq 4$, $s \leq 5/3$"], lines["a priori, hypotheses fail"]
    assert held.get_markerfacecolor() == ROLES["variance"]["color"]
    assert failed.get_markerfacecolor() == "white"
    assert (held.get_xdata()[0], failed.get_xdata()[0]) == (points[0].flops_kept, points[1].flops_kept)


def test_bias_falls_and_variance_rises(setting, folder):
    left, right = drawn(folder, "bias_variance").axes
    points = setting.curve.points
    lines = {line.get_label().split(":")[0]: line for line in left.lines}
    assert lines["bias"].get_ydata()[0] > lines["bias"].get_ydata()[-1]
    assert np.all(np.diff(lines["variance"].get_ydata()) > 0)
    bounds = np.array([point.bound for point in points])
    assert lines["bound (95 %)"].get_ydata() == pytest.approx(bounds)
    star = lines["smallest bound"]
    assert star.get_marker() == "*"
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (points[bounds.argmin()].params, bounds.min())
    terms = {line.get_label().split(":")[0]: line for line in right.lines}
    assert np.all(np.diff(terms["bias"].get_ydata()) < 0)
    assert np.all(np.diff(terms["variance"].get_ydata()) > 0)
    assert np.all(terms["bound"].get_ydata() >= terms["variance"].get_ydata())
    assert list(terms["vacuous above"].get_ydata()) == [1.0, 1.0]
    assert right.get_yscale() == "log"


def test_infinite_bounds_and_missing_test_sets_can_be_drawn(setting):
    points = [dataclasses.replace(p, margin_bound=np.inf, a_priori=None, test_error=None) for p in setting.curve.points]
    curve = dataclasses.replace(setting.curve, points=tuple(points), base_test_error=None)
    odd = dataclasses.replace(setting, tradeoff=curve)
    for name in ("approximation_error", "bias_variance"):
        data = json.loads(json.dumps(FIGURES[name].compute(odd), allow_nan=False))
        FIGURES[name].draw(data).savefig(io.BytesIO(), format="png")


def test_selection_rules(setting, folder):
    (ax,) = drawn(folder, "selection_rules").axes
    data = read(folder, "selection_rules")["data"]
    rules = [(curve["rule"], curve["reconstruction"]) for curve in data["curves"]]
    assert rules[:5] == [(name, "sequential") for name in ("greedy", "leverage", "cholesky", "magnitude", "random")]
    assert rules[5:] == [("greedy", "none"), ("magnitude", "none")]
    assert len(ax.lines) == 8
    assert len(ax.collections) == 2  # the bands of the two random rules
    assert [line.get_linestyle() for line in ax.lines] == ["-"] * 5 + ["--"] * 2 + [":"]
    for curve, line in zip(data["curves"], ax.lines, strict=False):
        runs = np.array([point["accuracies"] for point in curve["points"]])
        assert runs.shape == (3, 3 if curve["rule"] in ("leverage", "random") else 1)
        assert line.get_ydata() == pytest.approx(runs.mean(axis=1))
        assert runs[-1] == pytest.approx(data["base_accuracy"], abs=0.01)  # all nodes are kept
    # What the figure is for: at a fifth of the FLOPs the refit, and not the rule, makes the difference.
    means = {rule: line.get_ydata()[1] for rule, line in zip(rules, ax.lines, strict=False)}
    assert means["greedy", "sequential"] > means["greedy", "none"]
    assert means["magnitude", "sequential"] > means["magnitude", "none"]


def test_comparison(folder):
    (ax,) = drawn(folder, "comparison").axes
    data = read(folder, "comparison")["data"]
    assert [curve["method"] for curve in data["curves"]] == labels(ax)[:-1]
    assert labels(ax)[-1] == "original network"
    assert list(ax.lines[-1].get_ydata()) == [data["base_error"]] * 2
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == len(ax.lines) == 10
    for curve, line in zip(data["curves"], ax.lines, strict=False):
        points = {point["kept"]: point["error"] for point in curve["points"]}
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
        assert list(line.get_xdata()) == sorted(points)
        low, high = ax.get_ylim()
        assert all(low <= value <= high for value in points.values())
    assert ax.get_xlabel() == "FLOPs kept (%)"
    by_size = FIGURES["comparison"].draw({**data, "measure": "params"}).axes[0]
    assert by_size.get_xlabel() == "parameters kept (%)"
    # Data without labels show the divergence, whose reference is 0.
    unlabelled = FIGURES["comparison"].draw({**data, "base_error": None}).axes[0]
    assert unlabelled.get_ylabel() == "divergence from the original"
    assert list(unlabelled.lines[-1].get_ydata()) == [0.0, 0.0]
    assert unlabelled.lines[0].get_ydata()[0] == data["curves"][0]["points"][0]["divergence"]


def test_spectrum_samples(setting, folder):
    data = read(folder, "spectrum_samples")["data"]
    assert data["samples"] == [30, 100, 300]
    inputs = setting.dataset.train_inputs.flatten(1).double().numpy()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(setting.seed)).numpy()
    first = data["layers"][0]
    for count, shares in zip(data["samples"], first["shares"], strict=True):
        values = np.linalg.eigvalsh(inputs[order[:count]].T @ inputs[order[:count]])[
            ::-1
        ]  # by hand, at the input layer
        assert len(shares) == min(count, first["width"])
        assert shares == pytest.approx((values / values.sum())[: len(shares)], abs=1e-6)
    axes = shown_axes(drawn(folder, "spectrum_samples"))
    assert len(axes) == len(data["layers"]) == 3
    assert [line.get_label() for line in axes[0].lines] == ["30 images", "100 images", "300 images"]


def test_accuracy(setting, folder):
    data = read(folder, "accuracy")["data"]
    axes = drawn(folder, "accuracy").axes
    test = setting.dataset.test_batches()
    assert data["base_accuracy"] == pytest.approx(1 - evaluate(setting.model, test)[0])
    for panel, lam, theta, share in (("lambda", 1e-2, 0.5, 0.2), ("theta", 1e-6, 1.0, 0.2), ("nodes", 1e-6, 0.0, 0.3)):
        pruned = prune(
            setting.model,
            setting.calibration_batches,
            share,
            measure="nodes",
            allocation="uniform",
            selection="greedy",
            reconstruction="channel",
            lam=lam,
            theta=theta,
        )
        curve = data["panels"][panel][0]
        setting_of = {"lambda": lam, "theta": theta, "nodes": share}[panel]
        found = dict(zip(curve["settings"], curve["accuracies"], strict=True))[setting_of]
        assert found == pytest.approx(1 - evaluate(pruned.model, test)[0])
    stars = [line for line in axes[0].lines if line.get_marker() == "*"]
    assert [line.get_ydata()[0] for line in stars] == [max(data["panels"]["lambda"][0]["accuracies"])]
    assert data["panels"]["nodes"][0]["accuracies"][-1] == pytest.approx(data["base_accuracy"], abs=0.01)


def test_uncompressed(setting, folder):
    data = read(folder, "uncompressed")["data"]
    assert len(data["points"]) == len(setting.budgets)
    tests = len(setting.dataset.test_targets)
    for point in data["points"]:
        assert point["theorem_d"] == pytest.approx(point["compressed"] + point["disagreement"])
        # Clopper-Pearson by the beta distribution, at delta/2 shared among the points.
        differing = round(point["measured_disagreement"] * tests)
        level = 1 - data["delta"] / 2 / len(data["points"])
        assert point["disagreement"] == pytest.approx(beta.ppf(level, differing + 1, tests - differing), rel=1e-9)
        assert point["pairs"] >= sum(point[f"pairs_{name}"] for name in ("empirical", "bias", "variance"))
        assert point["theorem_d"] > data["test_error"]
    left, right = drawn(folder, "uncompressed").axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["Theorem D: sum of both"].get_ydata() == pytest.approx([p["theorem_d"] for p in data["points"]])
    assert right.get_yscale() == "log"


@pytest.mark.parametrize("name", NAMES)
def test_series_differ_in_grey(folder, name):
    for ax in drawn(folder, name).axes:
        assert_series_differ_in_grey(ax)


def test_bound_bars(folder):
    (ax,) = drawn(folder, "bound_bars").axes
    records = read(folder, "bound_bars")["data"]["records"]
    assert len(ax.patches) == len(records) == len(ax.get_yticks())
    assert set(labels(ax)) <= {"holds, below 1", "holds, vacuous", "a hypothesis is broken", "test error"}
    reached = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert reached == pytest.approx([float(record["value"]) for record in records])
    colors = {}
    for patch, record in zip(ax.patches, records, strict=True):
        colors.setdefault((record["vacuous"], record["hypotheses_hold"]), set()).add(patch.get_facecolor())
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == len(labels(ax)) - 1


def test_unknown_names_are_refused_before_anything_is_computed(setting, tmp_path):
    with pytest.raises(ValueError, match=r"unknown figure 'decay': expected one of eigenvalue_decay, spectrum_samples"):
        make_figures(setting, tmp_path / "out", ["eigenvalue_decay", "decay"])
    assert not (tmp_path / "out").exists()


def test_redraw_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        redraw(tmp_path / "absent.json")
    for text in ("{", "[]", '{"figure": "bias_variance"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json: .*a figure's data"):
            redraw(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"figure": "pie", "data": {}}')
    with pytest.raises(ValueError, match="unknown figure 'pie'"):
        redraw(tmp_path / "other.json")


@pytest.mark.parametrize("place", ["draw", "savefig"])
def test_a_failed_drawing_leaves_no_picture(setting, tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    if place == "draw":
        entry = dataclasses.replace(FIGURES["eigenvalue_decay"], draw=fail)
        monkeypatch.setitem(FIGURES, "eigenvalue_decay", entry)
    else:
        monkeypatch.setattr(Figure, place, fail)
    with pytest.raises(RuntimeError, match="no ink"):
        make_figures(setting, tmp_path, ["eigenvalue_decay"])
    # The data stay, so that nothing is computed twice.
    assert [path.name for path in tmp_path.iterdir()] == ["eigenvalue_decay.json"]


@pytest.mark.slow
def test_nothing_global_is_touched(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with matplotlib.rc_context({"lines.linewidth": 2.5}):
        before = settings()
        for name in NAMES:
            redraw(folder / f"{name}.json")
        assert settings() == before
        with pytest.raises(RuntimeError, match="in the middle"):
            interrupted_style()
        assert settings() == before
    assert "matplotlib.pyplot" not in sys.modules  # no windows, no list of figures


def interrupted_style():
    with figure_style():
        assert matplotlib.rcParams["lines.linewidth"] == 1.1
        raise RuntimeError("in the middle")


def test_style_agrees_with_the_tradeoff_plot():
    assert ROLES == CURVE_STYLES
    assert len({(s["color"], str(s["linestyle"])) for s in map(series_style, range(28))}) == 28
    assert numbers(["inf", None, 1]).tolist()[::2] == [np.inf, 1.0]
    assert np.isnan(numbers([None])[0])


def test_figures_have_the_columns_of_a_paper():
    for columns, panels in ((1, 1), (2, 3)):
        figure, axes = new_figure(columns, panels)
        assert figure.get_figwidth() == COLUMN_WIDTHS[columns]
        assert len(axes) == panels
    for arguments in ((3, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected 1 or 2 columns"):
            new_figure(*arguments)


def test_long_labels_get_fewer_columns_and_a_higher_figure():
    with figure_style():
        figure, (ax,) = new_figure()
        height = figure.get_figheight()
        for k in range(4):
            ax.plot([1, 2], [1, 2], label=f"backbone.stage.{k}.block.0.convolution.pointwise")
        finish_figure(figure, "long")
        assert len({round(text.get_window_extent().x0) for text in ax.get_legend().get_texts()}) == 1
        assert figure.get_figheight() > height + 4 * 7 / 72
