"""The interactive report: its numbers, its structure, names that try to break out of it, its script, its file."""

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from helpers import small_convnet, small_mlp, tensor

import specprune
from specprune._records import format_value
from specprune.analysis import LayerSpectrum, Spectra
from specprune.bounds.bound import Hypothesis
from specprune.bounds.spectral import paper_width
from specprune.cli import build_parser, main
from specprune.compress.cost import CostTerm
from specprune.figures import ReportData, network_facts, prunable_nodes, write_report
from specprune.figures.report_charts import _DASHES, _MARKER, Axis, Chart, Curve
from specprune.figures.report_columns import BOUNDS, GROUPS, LAYERS, NODES, TRADEOFF
from specprune.figures.report_data import LAMBDAS, START, NodeGroup
from specprune.figures.report_page import embed, report_html
from specprune.figures.style import COLOURS, LINE_STYLES, MARKERS
from specprune.testbed import build_network, default_recipe, load_dataset, save_checkpoint, train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NODE = shutil.which("node")
SCRIPT = resources.files("specprune.figures") / "report" / "report.js"
VOID = {"meta", "input", "br", "img", "link", "hr", "rect", "line", "path", "polyline"}
TAGS = set(
    """html head meta title style body a header h1 h2 dl div dt dd nav ul li main noscript p section sub code b label
    input figure figcaption svg path line span desc clippath rect text g polyline table caption thead tr th tbody td
    small details summary em footer script""".split()  # noqa: SIM905
)
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--<script>",
    "$script ${style} $$",
    "&lt;b&gt; & <b>bold</b>",
    "]]>\u2028\u2029\x07\u202e",
    "a" * 300,
)


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and the text inside those that matter."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"twice the same attribute in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        for _, index in self.open:
            self.texts[index] = self.texts.get(index, "") + data

    def all(self, tag, **attributes):
        return [
            (own, self.texts.get(index, ""))
            for index, (name, own) in enumerate(self.elements)
            if name == tag and all(own.get(key) == value for key, value in attributes.items())
        ]

    def one(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return found

    def by_id(self, name):
        (index,) = [k for k, (_, own) in enumerate(self.elements) if own.get("id") == name]
        return self.elements[index][1], self.texts.get(index, "")

    def rows(self, name):
        """The body of a table as texts."""
        start = next(k for k, (_, own) in enumerate(self.elements) if own.get("id") == name)
        rows = []
        for index in range(start + 1, len(self.elements)):
            tag, own = self.elements[index]
            if tag == "table":
                break
            if tag == "tr":
                rows.append([])
            elif tag == "td" or (tag == "th" and own.get("scope") == "row"):
                rows[-1].append(self.texts.get(index, ""))
        return [row for row in rows if row]


def columns_of(page, name, columns, keys):
    places = [[column.key for column in columns].index(key) for key in keys]
    return [[row[place] for place in places] for row in page.rows(name)]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(digits, dataclasses.replace(default_recipe("digits", "mlp-48-40"), epochs=8))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(digits, trained):
    model, batches, test = trained.model, digits.train_batches(), digits.test_batches()
    pruned = specprune.prune(model, batches, keep=0.1)
    return ReportData(
        title="digits, mlp-48-40",
        facts={**network_facts(model, batches), "test error": "3.00%", "seed": 0},
        spectra=specprune.layer_spectra(model, batches),
        nodes=prunable_nodes(model, batches),
        tradeoff=specprune.tradeoff(model, batches, test, keep=(0.1, 0.5, 1.0)),
        bounds=specprune.bound_table(model, batches, pruned, test, input_radius=digits.input_radius),
        prune=pruned.report,
        notes=("No picture: there is none",),
    )


@pytest.fixture(scope="module")
def page(data):
    return Page(report_html(data))


def spectrum(name, values):
    values = np.sort(np.asarray(values, dtype=float))[::-1]
    return LayerSpectrum(name, np.diag(values), values, 100)


@pytest.fixture(scope="module")
def hostile(data):
    layers = [spectrum(name, np.arange(1.0, 5.0)) for name in HOSTILE]
    assert data.nodes is not None
    groups = tuple(NodeGroup(name, (name, name), np.arange(4.0, 0.0, -1)) for name in HOSTILE)
    full = dict.fromkeys(HOSTILE, 4)
    costs = dataclasses.replace(data.nodes.flops, full=full, terms=(CostTerm(1.0, (), ((HOSTILE[0], 1.0),)),))
    reports = tuple(dataclasses.replace(data.prune.groups[0], group=name, consumer=name) for name in HOSTILE)
    points = tuple(dataclasses.replace(point, widths={HOSTILE[0]: 3}) for point in data.tradeoff.points)
    bounds = tuple((name, bound) for name, (_, bound) in zip(HOSTILE, data.bounds.bounds, strict=False))
    return ReportData(
        title=HOSTILE[0],
        facts=dict(zip(HOSTILE, HOSTILE, strict=True)),
        spectra=Spectra({entry.layer: entry for entry in layers}),
        nodes=dataclasses.replace(data.nodes, groups=groups, flops=costs, params=costs),
        tradeoff=dataclasses.replace(data.tradeoff, points=points),
        bounds=dataclasses.replace(data.bounds, bounds=bounds, notes=HOSTILE),
        prune=dataclasses.replace(data.prune, groups=reports, settings={"method": HOSTILE[0]}),
        notes=HOSTILE,
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [1e-2, 1e-3, LAMBDAS[START]])
@pytest.mark.parametrize("make", [small_mlp, small_convnet, "resnet-4-8"])
def test_widths_and_costs_are_those_of_prune(make, lam, digits):
    if isinstance(make, str):
        model, batches = build_network(make, digits).eval(), digits.train_batches(200, 200)
    else:
        model, batches = make(), [tensor(200, 8) if make is small_mlp else tensor(60, 2, 8, 8)]
    nodes = prunable_nodes(model, batches)
    pruned = specprune.prune(
        model, batches, allocation="dof", lam=lam, selection="greedy", reconstruction="channel"
    ).report
    assert [(row["group"], row["kept"]) for row in nodes.at(lam)] == [(e.group, e.width_after) for e in pruned.groups]
    assert [(row["lam"], row["dof"]) for row in nodes.at(lam)] == [(e.lam, e.dof) for e in pruned.groups]
    costs = nodes.costs(lam)
    assert costs["flops"] == pytest.approx(pruned.flops_after, rel=1e-12)
    assert costs["params"] == pytest.approx(pruned.params_after, rel=1e-12)
    assert costs["flops_kept"] == pytest.approx(pruned.flops_after / pruned.flops_before, rel=1e-12)
    assert costs["params_kept"] == pytest.approx(pruned.params_after / pruned.params_before, rel=1e-12)


def test_the_theorem_is_silent_above_the_largest_eigenvalue(data):
    for lam in LAMBDAS:
        for group, row in zip(data.nodes.groups, data.nodes.at(lam), strict=True):
            if lam * group.trace > group.eigenvalues[0]:
                assert row["theorem"] is None
            else:
                assert row["theorem"] == paper_width(row["dof"])
    assert {row["theorem"] is None for row in data.nodes.at(1.0)} == {True}


def test_network_facts():
    facts = network_facts(small_mlp((8, 12, 9, 3)), [tensor(5, 8)])
    assert facts["layers"] == "Sequential: 3 Linear, 2 ReLU"
    assert facts["parameters"] == 8 * 12 + 12 + 12 * 9 + 9 + 9 * 3 + 3
    assert facts["FLOPs for one sample"] == 2 * (8 * 12 + 12 * 9 + 9 * 3)


def test_the_tables_show_the_results(data, page):
    lam = LAMBDAS[START]
    expected = [
        [
            name,
            format_value(entry.width),
            format_value(entry.effective_rank),
            format_value(entry.degrees_of_freedom(lam)),
        ]
        for name, entry in data.spectra.items()
    ]
    assert columns_of(page, "layers", LAYERS, ("layer", "width", "effective_rank", "dof")) == expected
    for name, columns, records in (
        ("nodes", NODES, data.nodes.at(lam)),
        ("groups", GROUPS, data.prune.to_records()),
    ):
        assert page.rows(name) == [[format_value(record[column.key]) for column in columns] for record in records]
    rows = columns_of(page, "points", TRADEOFF, ("flops_kept", "bias", "test_error", "widths"))
    assert rows == [
        [
            *(format_value(value) for value in (p.flops_kept, p.bias, p.test_error)),
            " ".join(map(str, p.widths.values())),
        ]
        for p in data.tradeoff.points
    ]
    shown = columns_of(page, "bound-table", BOUNDS, ("bound", "net", "test_error", "dominant"))
    assert shown == [
        [format_value(record[key]) for key in ("bound", "net", "test_error", "dominant")]
        for record in data.bounds.to_records()
    ]
    facts = {text for _, text in page.all("dd")}
    assert {format_value(value) for value in data.facts.values()} <= facts


def test_lists_of_widths_may_break_into_lines(page):
    kinds = {text: own["class"] for own, text in page.all("th", scope="col")}
    assert (kinds["widths"], kinds["bound"], kinds["variance"]) == ("text", "text", "number")


def test_all_columns_exist_in_the_results(data):
    assert {c.key for c in LAYERS if not c.moves} <= set(data.spectra.to_records()[0])
    assert {c.key for c in NODES} == set(data.nodes.at(0.1)[0])
    assert {c.key for c in GROUPS} == set(data.prune.to_records()[0])
    assert {c.key for c in BOUNDS} <= set(data.bounds.to_records()[0])
    assert {c.key for c in TRADEOFF} <= set(data.tradeoff.to_records()[0])


def test_vacuous_bounds_are_marked_and_no_others(data, page):
    values = columns_of(page, "bound-table", BOUNDS, ("value",))
    records = data.bounds.to_records()
    assert {record["vacuous"] for record in records} == {True, False}
    for (text,), record in zip(values, records, strict=True):
        assert text.endswith(" vacuous") == record["vacuous"]
        number = text.removesuffix(" vacuous")
        if number.startswith("1 − "):  # a bound that rounds to 1 must not read as if it were 1
            assert record["value"] < 1
            assert 1 - float(number[4:]) == pytest.approx(record["value"], abs=0.5e-4)
        else:
            assert number == format_value(record["value"])
            assert record["vacuous"] or number != "1"
    points = columns_of(page, "points", TRADEOFF, ("bound", "margin_bound"))
    for (bound, margin), point in zip(points, data.tradeoff.points, strict=True):
        assert bound.endswith("vacuous") == (point.bound >= 1)
        assert margin.endswith("vacuous") == (point.margin_bound >= 1)
    assert any(margin.endswith("vacuous") for _, margin in points)


def test_a_bound_just_below_1_does_not_read_as_1(data):
    name, bound = data.bounds.bounds[0]
    near = dataclasses.replace(bound, value=1 - 2e-6, terms={"empirical": 1.0}, trivial=1.0)
    at = dataclasses.replace(near, value=1.0)
    table = dataclasses.replace(data.bounds, bounds=((name, near), (name, at)))
    shown = Page(report_html(dataclasses.replace(data, bounds=table)))
    assert columns_of(shown, "bound-table", BOUNDS, ("value",)) == [["1 − 2e-06"], ["1 vacuous"]]


def test_broken_hypotheses_are_said(data):
    name, bound = data.bounds.bounds[0]
    broken = dataclasses.replace(bound, hypotheses=(Hypothesis("c <= 4", 5.0, False),))
    table = dataclasses.replace(data.bounds, bounds=((name, broken), *data.bounds.bounds[1:]))
    told = report_html(dataclasses.replace(data, bounds=table))
    assert " 1 rest on a condition that is broken or unproved" in told
    assert f"<li>{bound.name} [{name}]: c &lt;= 4</li>" in told
    assert "Conditions that are broken" not in report_html(data)
    assert "no" in [text for (text,) in columns_of(Page(told), "bound-table", BOUNDS, ("hypotheses_hold",))]


def test_parts_that_are_missing_leave_no_trace(data):
    bare = Page(report_html(ReportData("bare", {}, data.spectra)))
    assert [own["id"] for own, _ in bare.all("section")] == ["spectra"]
    assert [own["id"] for own, _ in bare.all("table")] == ["layers"]
    assert embedded(bare)["groups"] == []
    assert embedded(bare)["flops"] is None
    with pytest.raises(ValueError, match="no layer"):
        ReportData("empty", {}, Spectra({}))


def test_other_methods_have_a_table_of_layers(data, digits, trained):
    low_rank = specprune.prune(trained.model, digits.train_batches(), keep=0.5, method="alds").report
    shown = Page(report_html(dataclasses.replace(data, prune=low_rank)))
    expected = [[format_value(value) for value in record.values()] for record in low_rank.to_records()]
    assert shown.rows("ranks") == expected


# --- structure -------------------------------------------------------------------------------------------------------


def embedded(page):
    return json.loads(page.one("script", type="application/json")[1])


def test_what_is_referred_to_exists_once(page):
    names = [own["id"] for _, own in page.elements if "id" in own]
    assert len(names) == len(set(names))
    asked = set()
    for tag, own in page.elements:
        for key in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            asked |= set(own.get(key, "").split())
        if tag == "a":
            assert own["href"].startswith("#")
            asked.add(own["href"][1:])
        asked |= set(re.findall(r"url\(#(.+?)\)", own.get("clip-path", "")))
    assert len(asked) > 10
    assert asked <= set(names)
    wanted = set(re.findall(r'(?:getElementById|write|fill)\("([\w-]+)"', SCRIPT.read_text(encoding="utf-8")))
    assert {"data", "lambda", "now-widths", "layers", "nodes"} <= wanted
    assert wanted <= set(names)


def test_every_part_has_a_name_for_screen_readers(page):
    labels = {own["for"] for own, _ in page.all("label")}
    assert {own["id"] for own, _ in page.all("input")} == labels == {"lambda"}
    assert len(page.all("table")) == len(page.all("caption")) == 5
    for own, _ in page.all("th"):
        assert own["scope"] in ("col", "row")
    drawings = [own for own, _ in page.all("svg") if "aria-hidden" not in own]
    assert len(drawings) == 5
    for own in drawings:
        assert own["role"] == "img"
        for name in (own["aria-labelledby"], own["aria-describedby"]):
            assert page.by_id(name)[1].strip()
    for own, _ in page.all("div", **{"class": "scroll"}):
        assert (own["role"], own["tabindex"]) == ("region", "0")
        assert page.by_id(own["aria-labelledby"])[1].strip()
    assert page.by_id("said")[0]["aria-live"] == "polite"
    assert page.one("html")[0]["lang"] == "en"
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 5
    first = next(own for tag, own in page.elements if tag in ("a", "input", "button", "summary"))
    assert (first["class"], first["href"]) == ("skip", "#main")
    assert not [own for _, own in page.elements if int(own.get("tabindex", 0)) > 0]


def test_the_page_asks_no_network_and_runs_only_its_own_script(page):
    assert {tag for tag, _ in page.elements} <= TAGS
    for _, own in page.elements:
        assert not {"src", "srcset", "action", "style", "data", "xlink:href"} & set(own)
        assert not [name for name in own if name.startswith("on")]
        assert not [value for value in own.values() if value and re.search(r"https?:|javascript:|//", value)]
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    scripts = [text for own, text in page.all("script") if own.get("type") != "application/json"]
    for rule, texts in (("script-src", scripts), ("style-src", [text for _, text in page.all("style")])):
        (text,) = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "@import" not in page.one("style")[1]
    assert "url(" not in page.one("style")[1]
    assert not re.search(r"fetch|XMLHttp|WebSocket|eval|innerHTML|import\(", scripts[0])
    assert scripts[0] == SCRIPT.read_text(encoding="utf-8")


def test_colours_and_dashes_are_those_of_the_figures(page):
    style = page.one("style")[1]
    first = style.split("}")[0]
    assert re.findall(r"--c\d: (#\w+)", first) == list(COLOURS)
    assert len(_DASHES) == len(LINE_STYLES)
    assert set(MARKERS) <= set(_MARKER)
    for needed in ("prefers-color-scheme: dark", "@media print", ":focus-visible"):
        assert needed in style


def test_the_page_computes_with_the_numbers_of_the_results(data, page):
    found = embedded(page)
    assert found["lambdas"] == list(LAMBDAS)
    assert found["lambdas"][found["start"]] == 1e-4
    for entry, layer in zip(found["layers"], data.spectra.values(), strict=True):
        assert (entry["name"], entry["trace"]) == (layer.layer, layer.trace)
        assert entry["eigenvalues"] == layer.eigenvalues.tolist()
    for entry, group in zip(found["groups"], data.nodes.groups, strict=True):
        assert entry["eigenvalues"] == group.eigenvalues.tolist()
    own = page.by_id("lambda")[0]
    assert (own["min"], own["max"], own["value"]) == ("0", str(len(LAMBDAS) - 1), str(START))


def test_results_as_json_and_text(data):
    record = json.loads(data.to_json())
    assert record["nodes"][0]["kept"] == data.nodes.at(LAMBDAS[START])[0]["kept"]
    assert [len(record[name]) for name in ("tradeoff", "prune")] == [3, len(data.prune.groups)]
    assert len(record["bounds"]) == len(data.bounds.bounds)
    for words in ("degrees of freedom", "nodes at lambda", "trade-off over", "bounds on the error", "No picture"):
        assert words in str(data)


def test_infinite_and_missing_numbers_can_be_shown(data):
    points = tuple(
        dataclasses.replace(p, test_error=None, rounded_test_error=None, refit_test_error=None, margin_bound=math.inf)
        for p in data.tradeoff.points
    )
    curve = dataclasses.replace(data.tradeoff, points=points, base_test_error=None)
    shown = Page(report_html(dataclasses.replace(data, tradeoff=curve)))
    assert columns_of(shown, "points", TRADEOFF, ("test_error", "margin_bound")) == [["-", "inf vacuous"]] * 3


# --- hostile names ---------------------------------------------------------------------------------------------------


def test_hostile_names_stay_text(hostile, data, page):
    told = report_html(hostile)
    shown = Page(told)
    assert {tag for tag, _ in shown.elements} <= {tag for tag, _ in page.elements}
    assert len(shown.all("script")) == 2
    scripts = [text for own, text in shown.all("script") if "type" not in own]
    assert scripts == [text for own, text in page.all("script") if "type" not in own]
    attributes = {(tag, name) for tag, own in shown.elements for name in own}
    assert attributes <= {(tag, name) for tag, own in page.elements for name in own}
    assert [row[0] for row in shown.rows("layers")] == list(HOSTILE)
    assert [row[0] for row in shown.rows("nodes")] == list(HOSTILE)
    assert [row[:2] for row in shown.rows("groups")] == [[name, name] for name in HOSTILE]
    assert [layer["name"] for layer in embedded(shown)["layers"]] == list(HOSTILE)
    assert shown.one("h1")[1] == HOSTILE[0]
    assert [text for _, text in shown.all("dt")][: len(HOSTILE)] == list(HOSTILE)
    assert "<!--" not in told


def test_names_that_are_no_text_are_written_all_the_same(data, tmp_path):
    broken = dataclasses.replace(data, title="folder \udcff")
    write_report(broken, tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).one("h1")[1] == "folder ?"


def test_embedded_json_holds_no_markup():
    text = embed({"<&>": list(HOSTILE)})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"<&>": list(HOSTILE)}
    with pytest.raises(ValueError):
        embed({"nan": math.nan})


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_whole_or_absent(data, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(data, path)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    write_report(data, path)
    assert path.read_bytes() == report_html(data).encode()


def test_the_same_results_give_the_same_page(data):
    assert report_html(data) == report_html(data)


def test_the_page_of_the_digits_network_is_small(data, digits):
    model = build_network("mlp-128-128-128", digits)
    batches = digits.train_batches()
    curve = dataclasses.replace(data.tradeoff, points=data.tradeoff.points * 3)
    large = dataclasses.replace(
        data, spectra=specprune.layer_spectra(model, batches), nodes=prunable_nodes(model, batches), tradeoff=curve
    )
    assert 50_000 < len(report_html(large).encode()) < 500_000


def test_wide_layers_do_not_fill_the_page_with_points():
    values = np.exp(-np.linspace(0, 10, 4096))
    narrow, wide = (
        len(report_html(ReportData("x", {}, Spectra({"a": spectrum("a", entry)})))) - 21 * len(entry)
        for entry in (values[::16], values)
    )
    assert wide < narrow + 10_000


# --- charts ----------------------------------------------------------------------------------------------------------


def test_axes_place_values_and_ticks():
    log = Axis(1e-8, 1, "x", log=True)
    assert [log.place(value) for value in (1e-8, 1e-4, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [log.text(tick) for tick in log.ticks()] == ["10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1"]
    assert [Axis(0, 1.08, "y").text(tick) for tick in Axis(0, 1.08, "y").ticks()] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
    ]
    kept = Axis(0.15, 1.25, "kept", log=True, percent=True)
    assert [kept.text(tick) for tick in kept.ticks()] == ["20", "50", "100"]
    for low, high, is_log in ((0, 1, True), (1, 1, False), (0, math.inf, False), (2, 1, False)):
        with pytest.raises(ValueError, match="axis 'x'"):
            Axis(low, high, "x", log=is_log)


def test_curves_leave_out_what_cannot_be_drawn():
    curve = Curve("c", [1, 10, 100, 1000], [0.1, None, 0.0, math.inf], 0, "o")
    drawn = Page(Chart("n", "t", "d", Axis(1, 1000, "x", log=True), Axis(0.01, 1, "y", log=True), (curve,)).to_html())
    (line,) = [own["points"] for own, _ in drawn.all("polyline")]
    assert line == "58,133"  # x at the left end, y half way down: log 0.1 lies midway between 0.01 and 1


# --- the script ------------------------------------------------------------------------------------------------------


def run_node(program, payload):
    if NODE is None:
        pytest.skip("node is not installed")
    text = f"const r = require({json.dumps(str(SCRIPT))});const d = JSON.parse(require('fs').readFileSync(0));"
    done = subprocess.run([NODE, "-e", text + program], input=json.dumps(payload), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_computes_what_the_package_computes(data):
    found = run_node("console.log(JSON.stringify(d.lambdas.map((lam) => r.atLambda(d, lam))))", data.embedded())
    for lam, now in zip(LAMBDAS, found, strict=True):
        dofs = [entry.degrees_of_freedom(lam) for entry in data.spectra.values()]
        assert [row["dof"] for row in now["layers"]] == pytest.approx(dofs, rel=1e-13)
        shares = [dof / entry.width for dof, entry in zip(dofs, data.spectra.values(), strict=True)]
        assert [row["share"] for row in now["layers"]] == pytest.approx(shares, rel=1e-13)
        for row, mine in zip(now["groups"], data.nodes.at(lam), strict=True):
            assert (row["kept"], row["theorem"], row["lam"]) == (mine["kept"], mine["theorem"], mine["lam"])
            assert (row["dof"], row["share"]) == pytest.approx((mine["dof"], mine["share"]), rel=1e-13)
        costs = data.nodes.costs(lam)
        assert now["flopsKept"] == pytest.approx(costs["flops_kept"], rel=1e-12)
        assert now["paramsKept"] == pytest.approx(costs["params_kept"], rel=1e-12)


def test_the_script_on_awkward_spectra():
    generator = np.random.default_rng(0)
    spectra = [[1.0], [0.0, 0.0, 2.0], *(10.0 ** generator.uniform(-20, 20, 50) for _ in range(3))]
    groups = [np.sort(np.asarray(values))[::-1] for values in spectra]
    payload = [
        {"name": str(k), "trace": float(values.sum()), "eigenvalues": values.tolist()}
        for k, values in enumerate(groups)
    ]
    payload = {"lambdas": LAMBDAS, "layers": payload, "groups": payload, "flops": None, "params": None}
    found = run_node("console.log(JSON.stringify(d.lambdas.map((lam) => r.atLambda(d, lam))))", payload)
    for lam, now in zip(LAMBDAS, found, strict=True):
        assert now["flopsKept"] is None
        for values, row in zip(groups, now["groups"], strict=True):
            level = lam * float(values.sum())
            dof = sum(mu / (mu + level) for mu in values.tolist() if mu > 0)
            assert row["dof"] == pytest.approx(dof, rel=1e-12)
            assert row["kept"] == min(len(values), max(1, math.ceil(row["dof"])))
            assert row["theorem"] == (None if level > values[0] else paper_width(row["dof"]))


def test_the_script_writes_numbers_as_the_tables_do():
    generator = np.random.default_rng(1)
    numbers = (10.0 ** generator.uniform(-12, 12, 3000)).tolist()
    numbers += [
        0.0,
        1.0,
        4.6,
        5.833,
        100.0,
        9999.0,
        9999.6,
        12345.6,
        99995.0,
        1e-4,
        9.9999e-5,
        0.00010001,
        1e-8,
        0.12,
        3.0,
    ]
    shown = run_node("console.log(JSON.stringify(d.map(r.fourDigits)))", [*numbers, None])
    assert shown == [format_value(number) for number in [*numbers, None]]


# --- a browser -------------------------------------------------------------------------------------------------------


def in_the_browser(path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert unquote(path.as_uri()).endswith(path.name)
    return Page(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("start", [START, 25, 140])
def test_in_a_browser_the_script_moves_the_tables(data, tmp_path, start):
    told = report_html(data)
    moved = told.replace(f'step="1" value="{START}"', f'step="1" value="{start}"')
    assert (moved == told) == (start == START)
    path = tmp_path / "report.html"
    path.write_text(moved, encoding="utf-8")
    shown, lam = in_the_browser(path), LAMBDAS[start]
    assert "hidden" not in shown.by_id("control")[0]  # the script ran: the policy let it
    records = data.nodes.at(lam)
    assert shown.rows("nodes") == [[format_value(record[column.key]) for column in NODES] for record in records]
    dofs = [entry.degrees_of_freedom(lam) for entry in data.spectra.values()]
    assert columns_of(shown, "layers", LAYERS, ("dof",)) == [[format_value(dof)] for dof in dofs]
    costs = data.nodes.costs(lam)
    widths = " ".join(str(record["kept"]) for record in records)
    assert shown.by_id("now")[1] == (
        f"λ = {format_value(lam)} keeps {widths} nodes: {format_value(100 * costs['flops_kept'])} % of the FLOPs, "
        f"{format_value(100 * costs['params_kept'])} % of the parameters."
    )
    marks = {own["data-moves"]: own for own, _ in shown.all("line") if "data-moves" in own}
    share = (math.log10(lam) + 8) / 8
    assert float(marks["x"]["x1"]) == pytest.approx(58 + share * (400 - 12 - 58), abs=0.01)
    assert float(marks["y"]["y1"]) == pytest.approx(254 - share * (254 - 12), abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser_hostile_names_stay_text(hostile, tmp_path):
    path = tmp_path / "report.html"
    write_report(hostile, path)
    shown = in_the_browser(path)
    assert "hidden" not in shown.by_id("control")[0]
    assert len(shown.all("script")) == 2
    assert not shown.all("img")
    assert [row[0] for row in shown.rows("layers")] == list(HOSTILE)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_json(trained, tmp_path, capsys):
    weights = tmp_path / "digits.npz"
    save_checkpoint(weights, trained)
    out = tmp_path / "out"
    arguments = ["report", "--weights", str(weights), "--keep", "0.2", "--no-tradeoff", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "No trade-off curve: left out with --no-tradeoff" in printed
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json"}
    shown = Page((out / "report.html").read_text(encoding="utf-8"))
    assert [own["id"] for own, _ in shown.all("section")] == ["spectra", "bounds", "pruning", "missing"]
    names, values = ([text for _, text in shown.all(tag)] for tag in ("dt", "dd"))
    facts = dict(zip(names[:12], values[:12], strict=True))  # then come the columns' meanings
    assert (facts["data"], facts["training samples"], facts["test samples"]) == ("digits", "1400", "397")
    assert facts["test error"] == f"{trained.test_error:.2%}"
    assert facts["training error"] == f"{trained.train_error:.2%}"
    assert (facts["parameters"], facts["seed"]) == (str(64 * 48 + 48 + 48 * 40 + 40 + 40 * 10 + 10), "0")
    record = json.loads((out / "report.json").read_text())
    assert record["options"]["keep"] == 0.2
    assert record["result"]["embedded"] == embedded(shown)


OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))

def one_layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3))

def inputs():
    return ([torch.randn(300, 5, generator=torch.Generator().manual_seed(1))],)
"""


def test_without_labels_the_rest_is_there_with_the_reasons(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_report.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["report", "--data", "own_report:inputs", "--out", str(tmp_path / "out"), "--json", "--model"]
    for model, sections in (("net", ["spectra", "pruning", "missing"]), ("one_layer", ["spectra", "missing"])):
        assert main([*common, f"own_report:{model}"]) == 0
        notes = json.loads(capsys.readouterr().out)["result"]["notes"]
        shown = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
        assert [own["id"] for own, _ in shown.all("section")] == sections
        listed = {text for _, text in shown.all("li")}
        assert set(notes) <= listed
        starts = {note.split(":")[0] for note in notes}
        expected = {"No bounds", "No trade-off curve"}
        assert starts == (expected if model == "net" else expected | {"No nodes to prune", "No pruning"})


def test_the_command_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["report", "--help"])
    example = capsys.readouterr().out.split("example:\n  specprune ")[1].split()
    assert build_parser().parse_args(example).command == "report"
