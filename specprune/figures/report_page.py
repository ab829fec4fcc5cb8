"""The interactive report: one HTML file that needs no network, no server and no other file.

The tables and charts are written here, so that they are there without JavaScript too; `report/report.js` moves what
depends on lambda.  The page's Content-Security-Policy allows only its own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from specprune._files import write_text
from specprune._records import format_value
from specprune.analysis import BoundTable, Spectra, Tradeoff
from specprune.analysis.tradeoff import CURVE_STYLES
from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.compress.report import PruneReport
from specprune.figures.report_charts import Axis, Chart, Curve
from specprune.figures.report_columns import BOUNDS, GROUPS, LAYERS, NODES, TRADEOFF, Column
from specprune.figures.report_data import LAMBDAS, START, ReportData
from specprune.figures.style import COLOURS, LINE_STYLES, MARKERS


def write_report(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML file, whole or not at all.

    Args:
        data: what to show.
        path: the file.
    """
    write_text(path, report_html(data))


def report_html(data: ReportData) -> str:
    """Return the report as the text of one HTML file.

    Args:
        data: what to show.
    """
    style, script = _part("report.css"), _part("report.js")
    chapters = {
        "spectra": ("Spectra and nodes", _spectra_section(data)),
        "tradeoff": ("Trade-off", data.tradeoff and _tradeoff_section(data.tradeoff)),
        "bounds": ("Bounds", data.bounds and _bounds_section(data.bounds)),
        "pruning": ("Pruning", data.prune and _prune_section(data.prune, data.bounds)),
        "missing": ("Left out", data.notes and _list(data.notes)),
    }
    shown = {name: (title, text) for name, (title, text) in chapters.items() if text}
    page = Template(_part("report.html")).substitute(
        policy=_policy(style, script),
        style=style,
        script=script,
        title=_text(data.title),
        facts="".join(
            f"<div><dt>{_text(k)}</dt><dd>{_text(format_value(v))}</dd></div>" for k, v in data.facts.items()
        ),
        contents="".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in shown.items()),
        chapters="".join(
            f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{title}</h2>{text}</section>'
            for name, (title, text) in shown.items()
        ),
        data=embed(data.embedded()),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # file names may hold bytes that are no text


def embed(payload: Any) -> str:
    """Return JSON that can stand inside a script element of a page, whatever its strings hold.

    Args:
        payload: of types that JSON has.
    """
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))  # escapes all that is not ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _part(name: str) -> str:
    return (resources.files("specprune.figures") / "report" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _paragraphs(*lines: str) -> str:
    return "".join(f"<p>{line}</p>" for line in lines)


def table(name: str, caption: str, columns: Sequence[Column], records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table in a box that scrolls by itself, and what its columns mean.

    Args:
        name: its id in the page.
        caption: one line.
        columns: what to show; the first column names the row.
        records: one a row; "vacuous" marks the cells of the columns that can be.
    """
    wraps = str | Mapping  # long ones may break into lines; numbers may not
    kinds = {c.key: "text" if any(isinstance(r.get(c.key), wraps) for r in records) else "number" for c in columns}
    head = "".join(f'<th scope="col" class="{kinds[c.key]}">{_text(c.heading)}</th>' for c in columns)
    rows = []
    for record in records:
        cells = []
        for place, column in enumerate(columns):
            value = record.get(column.key)
            shown = _text(format_value(list(value.values()) if isinstance(value, Mapping) else value))
            if column.vacuous is not None and record[column.vacuous]:
                shown = f'<span class="vacuous">{shown} <small>vacuous</small></span>'
            elif column.vacuous is not None and value is not None and shown == "1":  # rounded up from below
                shown = f"1 − {1 - value:.1g}"
            moves = f' data-cell="{column.key}"' if column.moves else ""
            tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
            cells.append(f'<{tag}{scope} class="{kinds[column.key]}"{moves}>{shown}</{tag}>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    meanings = "".join(
        f"<div><dt>{_text(c.heading)}</dt><dd>{_text(c.meaning)}</dd></div>" for c in columns if c.meaning
    )
    explained = (
        f'<details><summary>What the columns mean<span class="hidden">: {_text(caption)}</span></summary>'
        f'<dl class="meanings">{meanings}</dl></details>'
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption"><table id="{name}">'
        f'<caption id="{name}-caption"><span>{_text(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{explained if meanings else ''}"
    )


def _spectra_section(data: ReportData) -> str:
    lam = LAMBDAS[START]
    records = []
    for record, spectrum in zip(data.spectra.to_records(), data.spectra.values(), strict=True):
        dof = degrees_of_freedom(spectrum.eigenvalues, lam * spectrum.trace)
        records.append({**record, "dof": dof, "share": dof / spectrum.width})
    parts = [
        _paragraphs(
            "Each layer reads nodes; the eigenvalues μ<sub>j</sub> of their covariance Σ (not centred) say how many "
            "directions the nodes really use. The degrees of freedom N(λ) = Σ<sub>j</sub> μ<sub>j</sub> / "
            "(μ<sub>j</sub> + λ) count those that stand above the level λ. Here λ is a share of the trace, "
            "the same for every layer: λ<sub>l</sub> = λ Tr Σ<sub>l</sub>."
        ),
        _slider(data),
        f'<div class="charts">{_eigenvalue_chart(data.spectra)}{_freedom_chart(data.spectra)}</div>',
        table("layers", "Inputs of every layer", LAYERS, records),
    ]
    if data.nodes is not None:
        parts.append(
            _paragraphs(
                "Which nodes can be removed, and how many stay: m<sub>l</sub> = ⌈N<sub>l</sub>(λ<sub>l</sub>)⌉, at "
                "least one. This is the rule of <code>specprune.prune(model, data, allocation=&quot;dof&quot;, "
                "lam=λ)</code>. The theorem asks for more, ⌈5 N ln(80 N)⌉, and where that is more than there are, the "
                "group stays whole; it says nothing where λ<sub>l</sub> exceeds the largest eigenvalue. Nodes that "
                "several layers read, or that are read at several places, have the mean of those covariances, so that "
                "their numbers may differ from those of the layers above."
            )
        )
        parts.append(table("nodes", "Nodes that can be pruned", NODES, data.nodes.at(lam)))
    return "".join(parts)


def _slider(data: ReportData) -> str:
    costs = ""
    if data.nodes is not None:
        now = data.nodes.costs(LAMBDAS[START])
        widths = " ".join(str(width) for width in data.nodes.widths(LAMBDAS[START]).values())
        costs = (
            f' keeps <b id="now-widths">{widths}</b> nodes: <b id="now-flops">{format_value(100 * now["flops_kept"])}'
            f'</b> % of the FLOPs, <b id="now-params">{format_value(100 * now["params_kept"])}</b> % of the parameters'
        )
    return (
        '<div class="slider"><div id="control" hidden><label for="lambda">λ, as a share of the trace</label>'
        f'<input type="range" id="lambda" autocomplete="off" min="0" max="{len(LAMBDAS) - 1}" step="1" value="{START}" '
        f'aria-valuetext="{LAMBDAS[START]:.4g}"></div>'
        f'<p id="now">λ = <b id="now-lambda">{format_value(LAMBDAS[START])}</b>{costs}.</p>'
        '<p id="said" class="hidden" role="status" aria-live="polite"></p></div>'
    )


def _eigenvalue_chart(spectra: Spectra) -> str:
    widest = max(spectrum.width for spectrum in spectra.values())
    curves = []
    for place, spectrum in enumerate(spectra.values()):
        shares = [float(value) for value in spectrum.eigenvalues / spectrum.trace]
        curves.append(_layer_curve(spectrum.layer, place, list(range(1, len(shares) + 1)), shares))
    return Chart(
        "eigenvalues",
        "Eigenvalues of each layer's inputs",
        f"One falling curve for each of {len(curves)} layers: the share of the trace in each eigenvalue, largest "
        f"first, down to {LAMBDAS[0]:g}, on logarithmic axes. A horizontal line shows the slider's lambda.",
        Axis(1, max(widest, 2), "index j of the eigenvalue", log=True),
        Axis(LAMBDAS[0], LAMBDAS[-1], "share of the trace, μ / Tr Σ", log=True),
        tuple(curves),
        mark=("y", LAMBDAS[START]),
    ).to_html()


def _freedom_chart(spectra: Spectra) -> str:
    widest = max(spectrum.width for spectrum in spectra.values())
    curves = []
    for place, spectrum in enumerate(spectra.values()):
        values = [spectrum.degrees_of_freedom(lam) for lam in LAMBDAS]
        curves.append(_layer_curve(spectrum.layer, place, LAMBDAS, values))
    return Chart(
        "freedom",
        "Degrees of freedom of each layer's inputs",
        f"One falling curve for each of {len(curves)} layers: degrees of freedom against lambda as a share of the "
        "trace, on a logarithmic axis. A vertical line shows the slider's lambda.",
        Axis(LAMBDAS[0], LAMBDAS[-1], "λ / Tr Σ", log=True),
        Axis(0, widest, "degrees of freedom N(λ)"),
        tuple(curves),
        mark=("x", LAMBDAS[START]),
    ).to_html()


def _layer_curve(name: str, place: int, x: Sequence[float], y: Sequence[float | None]) -> Curve:
    """Return a layer's curve, in the look that `series_style` gives it in the other figures."""
    return Curve(name, x, y, place % len(COLOURS), MARKERS[place % len(MARKERS)], place % len(LINE_STYLES))


def _role(role: str, label: str, x: Sequence[float], y: Sequence[float | None]) -> Curve:
    """Return a curve in the look that its role has in all figures."""
    style = CURVE_STYLES[role]
    dash = None if style["linestyle"] == "none" else LINE_STYLES.index(style["linestyle"])
    hollow = style.get("markerfacecolor") == "none"
    return Curve(label, x, y, COLOURS.index(style["color"]), style["marker"], dash, hollow)


def _tradeoff_section(curve: Tradeoff) -> str:
    points, best = curve.points, curve.best
    kept = [point.flops_kept for point in points]
    least = min(kept)
    across = Axis(0.8 * least, 1.25, "FLOPs kept (%)", log=True, percent=True)
    theorem_a = Chart(
        "theorem-a",
        "Theorem A: the pruned network, rounded to few bits",
        "Against the FLOPs kept: the bias falls and the variance rises; the bound is at most their sum. It is on the "
        "true error of the same networks, whose measured test error is drawn beside it.",
        across,
        Axis(0, 1.08, "error rate"),
        (
            _role("bound", "bound", kept, [p.bound for p in points]),
            _role("bias", "bias: training error", kept, [p.bias for p in points]),
            _role("variance", "variance: description length", kept, [p.variance for p in points]),
            *_measured("test", "test error", kept, [p.rounded_test_error for p in points]),
            _role("best", "smallest bound", [best.flops_kept], [best.bound]),
        ),
        reference=(1.0, "vacuous from here on"),
    )
    errors = [
        _role("bias", "training error", kept, [p.train_error for p in points]),
        *_measured("test", "test error", kept, [p.test_error for p in points]),
        *_measured("variance", "test error after the refit", kept, [p.refit_test_error for p in points]),
    ]
    original = curve.base_train_error if curve.base_test_error is None else curve.base_test_error
    highest = max(float(y) for entry in errors for y in entry.y if y is not None)
    measured = Chart(
        "measured",
        "Measured errors of the pruned network, not rounded",
        "Against the FLOPs kept: training error and test error of the theorem's network, and test error of the same "
        "nodes after the sequential refit.",
        across,
        Axis(0, max(0.01, 1.05 * highest, 1.05 * original), "error rate"),
        tuple(errors),
        reference=(
            original,
            "original network, " + ("training" if curve.base_test_error is None else "test") + " error",
        ),
    )
    terms = (
        _role("bound", "bound", kept, [p.margin_bound for p in points]),
        _role("bias", "bias: distance over margin", kept, [p.margin_bias for p in points]),
        _role("variance", "variance: covering", kept, [p.margin_variance for p in points]),
    )
    values = [float(y) for entry in terms for y in entry.y if y is not None and y > 0 and math.isfinite(y)]
    theorem_c = Chart(
        "theorem-c",
        "Theorem C: from margins",
        "Against the FLOPs kept, on logarithmic axes: bias, variance and their sum with the other terms, the bound. "
        "A bias of 0 is not drawn.",
        across,
        Axis(min([0.5, *values]) / 2, 2 * max([1.0, *values]), "error rate", log=True),
        terms,
        reference=(1.0, "vacuous from here on"),
    )
    base = "" if curve.base_test_error is None else f", test error {curve.base_test_error:.4f}"
    records = [
        {**record, "bound_vacuous": record["bound"] >= 1, "margin_vacuous": record["margin_bound"] >= 1}
        for record in curve.to_records()
    ]
    return (
        _paragraphs(
            f"n = {curve.samples} training samples; each bound holds with probability {1 - curve.delta:g}. Original "
            f"network: training error {curve.base_train_error:.4f}{base}. Smallest bound {best.bound:.4f} at "
            f"{best.flops_kept:.1%} of the FLOPs, with {best.bits} bits a weight."
        )
        + f'<div class="charts">{theorem_a.to_html()}{measured.to_html()}{theorem_c.to_html()}</div>'
        + table("points", "The trade-off curve, smallest network first", TRADEOFF, records)
    )


def _measured(role: str, label: str, x: Sequence[float], y: Sequence[float | None]) -> list[Curve]:
    """Return the curve, or none where nothing was measured."""
    return [_role(role, label, x, y)] if any(value is not None for value in y) else []


def _bounds_section(bounds: BoundTable) -> str:
    records = bounds.to_records()
    telling = sum(record["hypotheses_hold"] and not record["vacuous"] for record in records)
    broken = sum(not record["hypotheses_hold"] for record in records)
    warning = f" {broken} rest on a condition that is broken or unproved, and promise nothing." if broken else ""
    unmet = [
        f"{bound.name} [{net}]: {item.statement}"
        for net, bound in bounds.bounds
        for item in bound.hypotheses
        if not item.holds
    ]
    return (
        _paragraphs(
            f"n = {bounds.samples} training samples; each bound holds by itself with probability "
            f"{1 - bounds.delta:g} over the draw of the training set, and whoever quotes the smallest of several owes "
            f"a union bound. {telling} of {len(records)} say something; those marked <em>vacuous</em> are at 1 or "
            f"above, which no error rate exceeds.{warning}"
        )
        + table("bound-table", "Bounds on the error rate, smallest first", BOUNDS, records)
        + (f"<p>Conditions that are broken or unproved:</p>{_list(unmet)}" if unmet else "")
        + (_list(bounds.notes) if bounds.notes else "")
    )


def _prune_section(report: PruneReport, bounds: BoundTable | None) -> str:
    flops, params = report.flops_after / report.flops_before, report.params_after / report.params_before
    settings = ", ".join(
        f"{name} {format_value(report.settings[name])}"
        for name in ("method", "allocation", "selection", "reconstruction")
        if name in report.settings
    )
    lines = [
        f"FLOPs {report.flops_before} → {report.flops_after} ({flops:.1%}), parameters {report.params_before} → "
        f"{report.params_after} ({params:.1%}), from {report.samples} calibration samples in {report.seconds:.1f} s "
        f"({_text(settings)})."
    ]
    for name, errors in (("Training", bounds and bounds.train_errors), ("Test", bounds and bounds.test_errors)):
        if errors and {"original", "pruned"} <= set(errors):
            lines.append(f"{name} error {errors['original']:.2%} before, {errors['pruned']:.2%} after.")
    lines += [
        f"Latency, batch of {entry.batch}: {entry.before_ms:.3g} → {entry.after_ms:.3g} ms."
        for entry in report.latencies
    ]
    parts = [_paragraphs(*lines)]
    records = report.to_records()
    if report.groups:
        parts.append(table("groups", "What happened to each group of nodes", GROUPS, records[: len(report.groups)]))
    if report.layers:
        others = records[len(report.groups) :]
        columns = [Column(name, name.replace("_", " ")) for name in others[0]]
        parts.append(table("ranks", "What happened to each layer", columns, others))
    if report.skipped:
        parts.append("<p>Left whole:</p>" + _list([f"{entry.name}: {entry.reason}" for entry in report.skipped]))
    return "".join(parts)
