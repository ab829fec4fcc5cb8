"""Figure: the paper's pruning under its three settings: accuracy against lambda, theta and the width."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress import CalibrationData, collect_moments, prune
from specprune.figures.setting import FigureSetting, Parts
from specprune.figures.style import REFERENCE, figure_style, new_figure, numbers, series_style, shared_legend

_PAPER: dict[str, Any] = {"selection": "greedy", "reconstruction": "channel", "allocation": "uniform"}
_LAMBDA, _THETA = 1e-6, 0.5  # the paper's, where the other one is varied
_LAMBDAS = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_THETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_COMPARED = (0.1, 0.2, 0.4)
_STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 10,
    "markeredgecolor": "black",
    "markeredgewidth": 0.5,
    "linestyle": "none",
    "zorder": 3,
}
_QUICK = {"lambda": (1e-8, 1e-5, 1e-2), "theta": (0.0, 0.5, 1.0), "nodes": (0.1, 0.3, 1.0)}


def compute(setting: FigureSetting, parts: Parts) -> dict[str, Any]:
    """Return the test accuracy of the paper's pruning (greedy rule, channel mix, the same share of nodes everywhere).

    Args:
        setting: network and data.
        parts: each curve is one.

    Returns:
        "label", "base_accuracy" of the unpruned network, "lambda" and "theta" used where the other is varied, and
        "panels" by name, "lambda" (relative), "theta" and "nodes" (share kept): curves with "name", "settings" and
        "accuracies".
    """
    data = CalibrationData(setting.calibration_batches)
    test = CalibrationData(setting.dataset.test_batches())
    moments = collect_moments(setting.model, data)

    def accuracy(share: float, lam: float, theta: float) -> float:
        choices = {"measure": "nodes", "lam": lam, "theta": theta, "seed": setting.seed, **_PAPER}
        pruned = prune(setting.model, data, share, moments=moments, **choices)
        return 1.0 - error_rate(*collect_logits(pruned.model, test))

    def along(varied: str, values: tuple[float, ...], **fixed: float) -> list[float]:
        return [accuracy(**{**fixed, varied: value}) for value in values]

    def curve(panel: str, name: str, values: tuple[float, ...], **fixed: float) -> dict[str, Any]:
        varied = {"lambda": "lam", "theta": "theta", "nodes": "share"}[panel]
        accuracies = parts.get(f"{panel}-{name}", lambda: along(varied, values, **fixed))
        return {"name": name, "settings": list(values), "accuracies": accuracies}

    lambdas, thetas, shares = _QUICK.values() if setting.quick else (_LAMBDAS, _THETAS, _SHARES)
    compared = {f"{100 * share:g} % of the nodes": share for share in (_COMPARED[1:2] if setting.quick else _COMPARED)}
    weights = {f"theta = {theta:g}": theta for theta in ((0.0, 1.0) if setting.quick else (0.0, 0.5, 1.0))}
    panels = {
        "lambda": [curve("lambda", name, lambdas, share=share, theta=_THETA) for name, share in compared.items()],
        "theta": [curve("theta", name, thetas, share=share, lam=_LAMBDA) for name, share in compared.items()],
        "nodes": [curve("nodes", name, shares, lam=_LAMBDA, theta=theta) for name, theta in weights.items()],
    }
    base = 1.0 - error_rate(*collect_logits(setting.model, test))
    return {"label": setting.label, "base_accuracy": base, "lambda": _LAMBDA, "theta": _THETA, "panels": panels}


def draw(data: dict[str, Any]) -> Figure:
    """Draw one panel a setting, with one scale of accuracies, and a star at the best lambda and theta of each curve.

    Args:
        data: what `compute` returned.
    """
    with figure_style():
        figure, axes = new_figure(columns=2, panels=3, height=2.2, sharey=True)
        for ax, (panel, curves) in zip(axes, data["panels"].items(), strict=True):
            for k, curve in enumerate(curves):
                # The third panel's curves are of other things than those of the first two.
                style = series_style(k + (3 if panel == "nodes" else 0))
                settings, accuracies = numbers(curve["settings"]), numbers(curve["accuracies"])
                ax.plot(settings, accuracies, label=curve["name"].replace("theta", r"$\theta$"), **style)
                if panel != "nodes":
                    best = int(accuracies.argmax())
                    star = {**_STAR, "color": style["color"]}
                    ax.plot(settings[best], accuracies[best], **star)
            ax.axhline(data["base_accuracy"], label="unpruned network", **REFERENCE)
        left, middle, right = axes
        left.set_xscale("log")
        left.set_xlabel(rf"relative $\lambda$ ($\theta$ = {data['theta']:g})")
        middle.set_xlabel(rf"$\theta$, weight of the input loss ($\lambda$ = {_power(data['lambda'])})")
        right.set_xlabel(rf"share of nodes kept ($\lambda$ = {_power(data['lambda'])})")
        left.set_ylabel("test accuracy")
        shared_legend(figure, [left, right], data["label"])
    return figure


def _power(number: float) -> str:
    mantissa, exponent = f"{number:.0e}".split("e")
    return rf"$10^{{{int(exponent)}}}$" if mantissa == "1" else f"{number:g}"
