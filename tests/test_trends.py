"""Bounds along axes: the numbers against the bound table, the correlations by hand, the networks, the figure."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune import bound_table, prune
from specprune._trends import DEPTH, DIGITS, KEEP, LARGER, NOISE, SAMPLES, WIDTH, TrendPlan, default_plan, trend_points
from specprune.analysis import margin_bounds
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.trends import TrendPoint, TrendRow, Trends, bound_trends
from specprune.bounds.bound import ORIGINAL, PRUNED, QUANTISED, Bound
from specprune.bounds.occam import occam_bound
from specprune.cli import main
from specprune.compress import CalibrationData
from specprune.figures import bound_trends as trend_figure
from specprune.testbed import default_recipe, initial_network, load_dataset, train

TINY = TrendPlan(
    base_samples=256,
    base_width=12,
    base_depth=2,
    samples=(64, 128),
    widths=(6,),
    depths=(1,),
    noises=(0.5, 1.0),
    keeps=(0.5,),
    steps=24,
    batch_size=32,
    learning_rate=3e-3,
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return train(digits, dataclasses.replace(default_recipe("digits", "mlp-16-12"), epochs=4))


@pytest.fixture(scope="module")
def tiny(digits):
    return list(trend_points(digits, TINY, seed=3))


@pytest.fixture(scope="module")
def trends(tiny):
    return bound_trends(tiny)


def row(axis, setting, value, train_error, test_error, name="a bound", covers=ORIGINAL, test_samples=400):
    bound = Bound(name, value, {"empirical": value}, 0.95, covers, "0-1", trivial=1.0)
    return TrendRow(axis, setting, bound, 1000, train_error, test_error, test_samples)


def test_the_numbers_are_those_of_the_bound_table(digits, trained, monkeypatch):
    """Every row against the table, whose grid of margins is cut to the one margin."""
    model, batches, test = trained.model, digits.train_batches(), digits.test_batches()
    pruned = prune(model, batches, 0.4)
    reference = initial_network(trained)
    widths = tuple(group.width for group in pruned.groups)
    shared = {"train": batches, "test": test, "input_radius": digits.input_radius}
    points = [
        TrendPoint({"keep": 1.0}, model, reference=reference, **shared),
        TrendPoint({"keep": 0.4}, pruned.model, original=model, original_widths=widths, **shared),
    ]
    found = bound_trends(points, gamma=2.0, delta=0.1)
    monkeypatch.setattr(margin_bounds, "MARGIN_EXPONENTS", (1,))
    table = bound_table(model, batches, pruned, test, reference=reference, input_radius=digits.input_radius, delta=0.1)
    wanted = {(label.split(",")[0], bound.name): (label, bound) for label, bound in table.bounds}
    compared = [line for line in found.rows if line.bound.name != "Occam (relaxed)"]
    assert len(compared) == 30
    for line in compared:
        label, bound = wanted["original" if line.setting == 1 else "pruned", line.bound.name]
        assert line.bound == bound
        assert line.train_error == table.train_errors[label]
        assert line.test_error == table.test_errors[label]
        assert line.samples == table.samples
    covers = {line.bound.name: line.bound.covers for line in found.rows if line.setting < 1}
    assert covers["Occam (relaxed)"] == QUANTISED
    assert covers["Bartlett 2017 (union)"] == PRUNED
    assert all(line.bound.confidence == 0.9 for line in found.rows)


def test_all_bounds_fall_with_more_of_the_same_data(digits, trained):
    """The training set repeated four times: no measured quantity but n and ||X||_F changes."""
    batches, test = digits.train_batches(), digits.test_batches()
    points = [TrendPoint({"n": count}, trained.model, batches * count, test, input_radius=8.0) for count in (1, 4)]
    found = bound_trends(points).along("n")
    assert len(found) == 16
    for name, (once, more) in found.items():
        assert (more.samples, more.train_error) == (4 * once.samples, once.train_error), name
        assert more.bound.value < once.bound.value or once.bound.value > 1 - 1e-9, name
        least = {"PAC-Bayes (quadratic)": 0.24, "PAC-Bayes (lambda)": 0.24}.get(name, 0.48)
        assert more.bound.value >= least * once.bound.value, name


def test_a_factor_on_a_layer_moves_norms_and_not_the_code(digits):
    """The first layer doubled and the last one halved: the same function, for which homogeneous bounds pay the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9, bias=False), nn.ReLU(), nn.Linear(9, 10, bias=False))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[1].weight *= 8
        scaled[3].weight /= 8
    batches, test = digits.train_batches(), digits.test_batches()
    points = [TrendPoint({"scaled": place}, net, batches, test) for place, net in enumerate((model, scaled))]
    found = bound_trends(points).along("scaled")
    same = ("Golowich 2018 (frobenius)", "Golowich 2018 (l1)", "Neyshabur 2015", "Neyshabur 2018 (product)")
    for name in (*same, "Neyshabur 2019"):
        assert found[name][0].bound.value == pytest.approx(found[name][1].bound.value, rel=1e-6), name
    for name, rows in found.items():
        if rows[0].bound.covers == QUANTISED:
            # The exponents of the grids move by 3: some nats of the code.
            assert rows[0].bound.value == pytest.approx(rows[1].bound.value, rel=1e-2), name
            assert rows[0].test_error == rows[1].test_error
    covering = found["covering (single scale)"][0].bound
    assert not covering.valid  # the radius is not known
    assert "unproved" in covering.hypotheses[0].statement


def test_order_of_axes_and_settings(trends):
    assert trends.axes == (SAMPLES, WIDTH, DEPTH, NOISE, KEEP)
    wanted = {SAMPLES: [64, 128, 256], WIDTH: [6, 12], DEPTH: [1, 2], NOISE: [0, 0.5, 1], KEEP: [0.5, 1]}
    for axis, settings in wanted.items():
        lines = trends.along(axis)
        assert len(lines) == (17 if axis == DEPTH else 16)
        for name, rows in lines.items():
            assert [line.setting for line in rows] == ([1] if name == "Neyshabur 2019" else settings)
    base = [line.bound for line in trends.rows if (line.axis, line.setting) == (WIDTH, 12)]
    assert base == [line.bound for line in trends.rows if (line.axis, line.setting) == (NOISE, 0)]


def test_points_are_taken_one_by_one(digits, trained):
    seen = []

    class Watched(list):
        def __iter__(self):
            seen.append(len(self))
            return super().__iter__()

    def points():
        for count in (1, 2, 3):
            assert set(seen) == set(range(1, count))
            yield TrendPoint({"x": count}, trained.model, Watched(digits.train_batches()[:1] * count), batches)

    batches = digits.test_batches()
    assert [line.samples for line in bound_trends(points()).along("x")["Occam (kl)"]] == [500, 1000, 1500]


def test_correlations_by_hand():
    rows = (
        *(row("x", x, value, 0.0, error) for x, value, error in ((1, 1.0, 0.1), (2, 3.0, 0.5), (3, 2.0, 0.3))),
        *(row("x", x, value, 0.2, error, "flat") for x, value, error in ((1, 2.0, 0.31), (2, 2.0, 0.30))),
        *(row("x", x, 1 - 1e-12 * x, 0.0, 0.1 * x, "one, but for rounding") for x in (1, 2, 3)),
        *(row("x", x, value, 0.4 - error, error, "mixed") for x, value, error in ((1, 5.0, 0.1), (2, 4.0, 0.3))),
        row("x", 1, math.inf, 0.0, 0.1, "infinite"),
        row("x", 2, 7.0, 0.0, 0.2, "infinite"),
        row("y", 1, 7.0, 0.0, 0.2, "once"),
    )
    found = {(record["axis"], record["bound"]): record for record in Trends(rows, 1.0, 0.05).correlations()}
    # Of three pairs two go up with x and one goes down; value, gap and error agree in all three.
    first = found["x", "a bound"]
    assert (first["points"], first["ratio"]) == (3, 2.0)
    assert first["with_setting"] == pytest.approx(1 / 3)
    assert first["with_gap"] == first["with_test_error"] == pytest.approx(1)
    assert first["gap_resolved"]
    flat = found["x", "flat"]
    assert flat["with_setting"] is flat["with_gap"] is None
    assert not flat["gap_resolved"]  # 0.01 of 400 samples
    assert found["x", "one, but for rounding"]["with_setting"] is None
    mixed = found["x", "mixed"]
    assert (mixed["with_setting"], mixed["with_gap"], mixed["with_test_error"]) == (-1, -1, -1)
    assert (found["x", "infinite"]["ratio"], found["x", "infinite"]["with_setting"]) == (None, -1)
    assert (found["y", "once"]["points"], found["y", "once"]["with_setting"]) == (1, None)


def test_gap_is_resolved_at_three_standard_errors():
    """Errors e and e + d among m test samples: resolved if d > 3 sqrt(e(1-e)/m + (e+d)(1-e-d)/m)."""
    for samples, resolved in ((420, False), (430, True)):
        rows = (row("x", 1, 1.0, 0.0, 0.1, test_samples=samples), row("x", 2, 2.0, 0.0, 0.17, test_samples=samples))
        threshold = 9 * (0.1 * 0.9 + 0.17 * 0.83) / 0.07**2
        assert (samples > threshold) is resolved
        assert Trends(rows, 1.0, 0.05).correlations()[0]["gap_resolved"] is resolved


def test_records_and_json(trends):
    def refuse(constant):
        raise AssertionError(constant)

    loaded = json.loads(trends.to_json(), parse_constant=refuse)
    assert len(loaded["records"]) == len(trends.rows) == 16 * 12 + 1
    assert (loaded["gamma"], loaded["delta"]) == (1.0, 0.05)
    assert {line.bound.loss for line in trends.rows} == {"0-1", "ramp(1)", "margin(1)"}
    for record, line in zip(loaded["records"], trends.rows, strict=True):
        assert record["value"] == line.bound.value
        assert record["gap"] == pytest.approx(record["test_error"] - record["train_error"])
        assert record["value"] <= sum(record[name] or 0.0 for name in line.bound.terms) + 1e-9 * record["value"]
    assert {(r["axis"], r["bound"]) for r in loaded["correlations"]} == {(r.axis, r.bound.name) for r in trends.rows}


def test_text_has_a_table_an_axis(trends):
    text = str(trends)
    for axis in trends.axes:
        assert f"\n{axis}" in text
    table = text.split(f"\n{KEEP}")[1].splitlines()
    own = next(line for line in trends.rows if (line.axis, line.setting) == (KEEP, 0.5) and line.bound.covers == PRUNED)
    assert table[3].split()[:4] == ["measured:", "training", "error", f"{own.train_error:.4g}"]
    assert table[4].split()[3] == f"{own.test_error:.4g}"


def test_unsuitable_input(digits, trained):
    batches = digits.train_batches()
    point = TrendPoint({"x": 1}, trained.model, batches, digits.test_batches())
    with pytest.raises(ValueError, match=r"power of two.*3\.0"):
        bound_trends([point], gamma=3)
    with pytest.raises(ValueError, match="gamma"):
        bound_trends([point], gamma=0)
    with pytest.raises(ValueError, match="no network"):
        bound_trends([])
    for settings in ({}, {"x": math.nan}):
        with pytest.raises(ValueError, match="settings"):
            TrendPoint(settings, trained.model, batches, batches)
    gelu = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.GELU(), nn.Linear(10, 10))
    with pytest.raises(ValueError, match="GELU"):
        bound_trends([dataclasses.replace(point, model=gelu)])
    with pytest.raises(TypeError, match="without targets"):
        bound_trends([dataclasses.replace(point, test=[digits.test_inputs])])


def test_the_networks_differ_from_the_base_in_one_thing(digits, tiny):
    assert [dict(point.settings) for point in tiny] == [
        {SAMPLES: 256, WIDTH: 12, DEPTH: 2, NOISE: 0.0},
        *({SAMPLES: 64}, {SAMPLES: 128}, {WIDTH: 6}, {DEPTH: 1}, {NOISE: 0.5}, {NOISE: 1.0}, {KEEP: 1.0}, {KEEP: 0.5}),
    ]

    def shape(point):
        return [tuple(parameter.shape) for parameter in point.model.parameters() if parameter.dim() == 2]

    base = [(12, 64), (12, 12), (10, 12)]
    others = {3: [(6, 64), (6, 6), (10, 6)], 4: [(12, 64), (10, 12)]}
    for place, point in enumerate(tiny[:8]):
        assert shape(point) == others.get(place, base)
    assert shape(tiny[8]) != base
    for point, count in zip(tiny, (256, 64, 128, *[256] * 6), strict=True):
        inputs = torch.cat([batch for batch, _ in point.train])
        assert torch.equal(inputs, digits.train_inputs[:count])  # nested
        assert torch.equal(torch.cat([batch for batch, _ in point.test]), digits.test_inputs)
        assert point.input_radius == 8.0
    assert tiny[7].model is tiny[0].model
    assert (tiny[7].reference, tiny[7].original) == (None, None)
    assert tiny[8].original is tiny[0].model
    assert tiny[8].original_widths == (12, 12)
    first = tiny[0].reference.state_dict()
    assert all(torch.equal(value, first[name]) for name, value in tiny[6].reference.state_dict().items())
    assert not torch.equal(first["fc1.weight"], tiny[0].model.fc1.weight)


def test_noise_is_in_training_and_test_labels(digits, tiny):
    for point, share in ((tiny[0], 0.0), (tiny[5], 0.5), (tiny[6], 1.0)):
        for batches, clean in ((point.train, digits.train_targets[:256]), (point.test, digits.test_targets)):
            changed = float((torch.cat([targets for _, targets in batches]) != clean).float().mean())
            assert changed == pytest.approx(0.9 * share, abs=4.5 * math.sqrt(0.09 / len(clean)))
    again = list(trend_points(digits, dataclasses.replace(TINY, samples=(64,), keeps=(), widths=(), depths=()), seed=3))
    assert torch.equal(again[-2].train[0][1], tiny[6].train[0][1])
    assert error_rate(*collect_logits(again[-2].model, CalibrationData(tiny[6].train))) == error_rate(
        *collect_logits(tiny[6].model, CalibrationData(tiny[6].train))
    )


def test_too_few_images(digits):
    with pytest.raises(ValueError, match="1400 training images, the plan needs 40000"):
        next(trend_points(digits, LARGER))
    assert default_plan("digits") is DIGITS
    assert default_plan("mnist") is LARGER


def test_the_code_bound_covers_labels_of_which_a_fixed_share_is_random():
    """Not i.i.d. coins but n/2 of each of two kinds: the bound with the mean of both fails no more often than delta."""
    samples, delta, generator = 40, 0.1, np.random.default_rng(0)
    for one, other in ((0.02, 0.9), (0.3, 0.5), (0.0, 0.9)):
        wrong = generator.binomial(samples // 2, one, 20000) + generator.binomial(samples // 2, other, 20000)
        bounds = np.array([occam_bound(count / samples, samples, 0.0, delta).value for count in range(samples + 1)])
        assert np.mean(bounds[wrong] < (one + other) / 2) <= delta
    # At equal coins, the worst case, the same experiment sees failures.
    wrong = generator.binomial(samples, 0.45, 20000)
    assert 0.01 < np.mean(bounds[wrong] < 0.45) <= delta


def test_the_figure_shows_what_was_measured(trends):
    data = json.loads(json.dumps(trend_figure.from_trends(trends, "tiny"), allow_nan=False))
    data["axes"][0]["test_error"][1] = 0.0
    figure = trend_figure.draw(data)
    figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_xlabel() for ax in panels] == list(trends.axes)
    (legend,) = [ax.get_legend() for ax in figure.axes if ax.get_legend() is not None]
    names = [text.get_text() for text in legend.get_texts()]
    for place, ax in enumerate(panels):
        assert ax.get_yscale() == "log"
        assert ax.get_ylim() == panels[0].get_ylim()
        drawn = {line.get_label(): line for line in ax.get_lines()}
        assert list(drawn) == names
        for name, rows in trends.along(ax.get_xlabel()).items():
            if name in drawn:
                assert list(drawn[name].get_xdata()) == [line.setting for line in rows]
                assert list(drawn[name].get_ydata()) == [line.bound.value for line in rows]
        assert list(drawn["vacuous above"].get_ydata()) == [1.0, 1.0]
        own = trends.along(ax.get_xlabel())["Bartlett 2017 (union)"]
        errors = [line.test_error for k, line in enumerate(own) if (place, k) != (0, 1)]
        assert list(drawn["test error (measured)"].get_ydata()) == errors
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panels[0].get_lines()}
    assert len(looks) == len(names) == 9
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in panels)
    assert figure.get_size_inches()[0] == 7.0


def test_the_command(tmp_path, capsys, monkeypatch):
    plan = dataclasses.replace(TINY, samples=(), depths=(), noises=(), keeps=())
    monkeypatch.setattr("specprune.cli.default_plan", lambda _: plan)
    assert main(["tightness", "--out", str(tmp_path), "--seed", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "tightness.json").read_text())
    assert (record["command"], record["options"]["data"], record["plan"]["steps"]) == ("tightness", "digits", 24)
    assert {row["axis"] for row in record["result"]["records"]} == {SAMPLES, WIDTH, DEPTH, NOISE, KEEP}
    assert {path.name for path in tmp_path.iterdir()} == {f"tightness.{kind}" for kind in ("json", "pdf", "png")}


def test_help_of_the_command_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["tightness", "--help"])
    assert "example:\n  specprune tightness" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["tightness", "--data", "nowhere"])
    assert stop.value.code == 2
