"""Figure: bounds for the original network, by way of ever larger compressed ones: what is added, and what it costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis.chain import trace_chain
from specprune.analysis.coded import occam_results
from specprune.analysis.evaluation import collect_logits_of, error_rate
from specprune.analysis.margin_bounds import coded_pair_bound, input_norm
from specprune.bounds.uncompressed import disagreement_bound
from specprune.compress import CalibrationData, prune
from specprune.figures.setting import FigureSetting, Parts
from specprune.figures.style import REFERENCE, ROLES, figure_style, finish_figure, kept_axis, new_figure, numbers

_DELTA = 0.05


def compute(setting: FigureSetting, parts: Parts) -> dict[str, Any]:
    """Return Theorems D and E for the original network through its pruned, rounded versions.

    Theorem D: P(f errs) <= r_c + U, where r_c bounds the error of the compressed network (Theorem A at delta/2) and U
    is the Clopper-Pearson limit of how often the two disagree, from unlabelled test inputs, delta/2 shared among all
    points.  Theorem E: the training set alone, from covers of the class and the distance of the two networks' losses.
    So the whole curve of each theorem holds at once.

    Args:
        setting: network and data; the network is a chain.
        parts: each pruned network is one.

    Returns:
        "label", "delta", "samples", "test_error" of the original, and "points", one a pruned network: FLOPs kept,
        "compressed" r_c, "disagreement" U, "measured_disagreement", "theorem_d" r_c + U, and of Theorem E "pairs" with
        its terms "pairs_empirical" (ramp loss), "pairs_bias" (what the distance costs) and "pairs_variance".

    Source:
        Suzuki, Abe and Nishimura 2020 (arXiv:1909.11274) for the form; `specprune.bounds.uncompressed`.
    """
    train = CalibrationData(setting.dataset.train_batches())
    test = CalibrationData(setting.dataset.test_batches())
    points = [parts.get(f"{keep:g}", partial(_point, setting, keep, train, test)) for keep in setting.budgets]
    (logits,), targets = collect_logits_of([setting.model], test)
    samples = len(setting.dataset.train_inputs)
    head = {"label": setting.label, "delta": _DELTA, "samples": samples, "test_error": error_rate(logits, targets)}
    return {**head, "points": points}


def _point(setting: FigureSetting, keep: float, train: CalibrationData, test: CalibrationData) -> dict[str, Any]:
    pruned = prune(setting.model, setting.calibration_batches, keep, seed=setting.seed)
    widths = [group.width for group in pruned.groups]
    results = occam_results(pruned.model, train, widths, delta=_DELTA / 2)
    best = min(results.values(), key=lambda result: result.bound.value)
    length = best.network.code_length(widths)
    both = [setting.model, best.network.model]
    (ours, theirs), _ = collect_logits_of(both, test)
    differing = int(np.sum(ours.argmax(axis=1) != theirs.argmax(axis=1)))
    # Bounds on codes hold for all networks at once; with this union the limits on disagreement do so, too.
    theorem_d = disagreement_bound(best.bound, differing, len(ours), _DELTA, candidates=len(setting.budgets))
    (original, coded), targets = collect_logits_of(both, train)
    pairs = coded_pair_bound(
        trace_chain(setting.model, train),
        length,
        original,
        coded,
        targets,
        input_radius=setting.dataset.input_radius,
        measured_radius=input_norm(train, setting.model),
        delta=_DELTA,
    )
    report = pruned.report
    return jsonable(
        {
            "flops_kept": report.flops_after / report.flops_before,
            "compressed": best.bound.value,
            "disagreement": theorem_d.value - best.bound.value,
            "measured_disagreement": differing / len(ours),
            "theorem_d": theorem_d.value,
            "pairs": pairs.value,
            **{f"pairs_{name}": pairs.terms[name] for name in ("empirical", "bias", "variance")},
        }
    )


def draw(data: dict[str, Any]) -> Figure:
    """Draw two panels against the FLOPs kept: Theorem D, whose two terms trade off, and Theorem E, logarithmic.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, (left, right) = new_figure(columns=2, panels=2)
        points = data["points"]
        kept = numbers(point["flops_kept"] for point in points)
        for ax, lines in (
            (
                left,
                (
                    ("theorem_d", "Theorem D: sum of both", "bound"),
                    ("disagreement", "disagreement $U$", "bias"),
                    ("compressed", "compressed network $r_c$", "variance"),
                ),
            ),
            (
                right,
                (
                    ("pairs", "Theorem E: sum of all", "bound"),
                    ("pairs_bias", "distance of the losses", "bias"),
                    ("pairs_variance", "description length", "variance"),
                ),
            ),
        ):
            for name, label, role in lines:
                # One term is nearly all of Theorem E: a larger marker lets the sum be seen behind it.
                style = {**ROLES[role], "markersize": 6.5 if role == "bound" else 4}
                ax.plot(kept, numbers(point[name] for point in points), label=label, **style)
            style = {**ROLES["test"], "marker": "none"}
            ax.axhline(data["test_error"], label="test error of the original", **style)
            ax.axhline(1.0, label="vacuous above", **REFERENCE)
            kept_axis(ax, kept)
        left.set_ylabel("error rate (Theorem D)")
        right.set_ylabel("error rate (Theorem E)")
        left.set_ylim(bottom=0.0)
        right.set_yscale("log")
        title = f"{data['label']}: n = {data['samples']}, each curve with probability {1 - data['delta']:g}"
        finish_figure(figure, title)
    return figure
