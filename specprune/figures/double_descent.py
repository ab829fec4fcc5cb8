"""Figures of over-parameterisation and pruning: linear models, retraining, random features, networks.

Each has a `compute`, which returns data for JSON, and a `draw`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from specprune import __version__
from specprune._files import write_text
from specprune._records import jsonable, to_json
from specprune.analysis.double_descent import double_descent, draw_risks
from specprune.analysis.linear_simulation import simulate_risks
from specprune.analysis.network_descent import COLUMNS, NetworkDescent, network_descent
from specprune.bounds.correlated_features import Estimate, ReluFeatures, correlated_risks
from specprune.bounds.overparameterized import LinearProblem
from specprune.figures.gallery import save_figure
from specprune.figures.style import figure_style, finish_figure, new_figure
from specprune.testbed import load_dataset

logger = logging.getLogger(__name__)

_PRUNED = ("unpruned", "magnitude", "hessian", "oracle", "oracle_refit")
_RETRAINED = ("magnitude", "magnitude_refit", "hessian", "hessian_refit", "oracle_refit")


def linear_problem(kind: str, n: int = 200, features: int = 4000, keep: int = 100) -> LinearProblem:
    """Return one of the figure's linear models.

    Args:
        kind: "identity" (equal variances, signal falling over some 60 features, noise 0.1), "spiked" (variance 100 on
            the first `keep` features, equal coefficients, no noise) or "power law" (variance i^-0.7, equal
            coefficients, noise 0.05); each with signal 1.
        n: training examples.
        features: P.
        keep: s.

    Raises:
        ValueError: another kind.
    """
    index = np.arange(features)
    variances, beta = np.ones(features), np.ones(features)
    if kind == "identity":
        beta, noise = np.exp(-index / 60.0), 0.1
    elif kind == "spiked":
        variances[:keep], noise = 100.0, 0.0
    elif kind == "power law":
        variances, noise = np.power(1.0 + index, -0.7), 0.05
    else:
        raise ValueError(f"kind {kind!r}: expected identity, spiked or power law")
    return LinearProblem(variances, beta / np.sqrt((variances * beta**2).sum()), noise, n)


def _linear_panel(kind: str, quick: bool, seed: int, device: torch.device | str) -> dict[str, Any]:
    n, features, keep = (60, 600, 30) if quick else (200, 4000, 100)
    simulated = [int(n * share) for share in (0.6, 0.8, 1.3, 2, 4, 10)]
    draws = 10 if quick else 40
    problem = linear_problem(kind, n, features, keep)
    found = double_descent(problem, keep, simulated=simulated, draws=draws, seed=seed, device=device)
    ceiling = 2.5 * problem.null_risk
    return {"title": f"{kind}, n = {n}, s = {keep}", "ceiling": ceiling, **json.loads(found.to_json())}


def compute_linear(quick: bool = False, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return risks of pruned least squares against size, for three covariances, with simulations."""
    kinds = ("identity", "spiked", "power law")
    return {"panels": [_linear_panel(kind, quick, seed, device) for kind in kinds], "methods": _PRUNED}


def _relu_panel(quick: bool, seed: int, device: torch.device | str) -> dict[str, Any]:
    """Return risks on random ReLU features of several numbers: by law where there is one, and simulated."""
    inputs, n, keep, most = (20, 80, 24, 320) if quick else (120, 600, 180, 2400)
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((most, inputs)) / np.sqrt(inputs)
    target = generator.standard_normal(inputs)
    target /= np.linalg.norm(target)
    records = []
    for share in (0.5, 0.75, 1.25, 1.5, 2, 3, 4):
        size = int(share * n)
        features = ReluFeatures(weights[:size], target, 0.1, n)
        law = correlated_risks(features.equivalent(), keep, draws=50 if quick else 200, fresh_draws=2, seed=seed)
        simulated = simulate_risks(features, keep, draws=8 if quick else 60, seed=seed, device=device)
        record: dict[str, Any] = {"size": size}
        for name, value in vars(law).items():
            record[name] = value.value if isinstance(value, Estimate) else value
        extra = {k: v for k, v in simulated.to_record().items() if k not in ("size", "keep", "draws")}
        records.append(record | {f"simulated_{name}": value for name, value in extra.items()})
    title = f"random features, d = {inputs}, n = {n}, s = {keep}"
    return {"title": title, "n": n, "ceiling": 1.5, "sizes": records}


def compute_retraining(quick: bool = False, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return risks before and after a refit, on independent and on correlated features."""
    panels = [_linear_panel("spiked", quick, seed, device), _relu_panel(quick, seed, device)]
    return {"panels": panels, "methods": _RETRAINED}


def compute_random_features(quick: bool = False, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return risks on random ReLU features, of the Gaussian law and simulated."""
    return {
        "panels": [_relu_panel(quick, seed, device)],
        "methods": ("unpruned", "magnitude", "hessian", "oracle_refit"),
    }


def draw_panels(data: Mapping[str, Any], title: str) -> Figure:
    """Draw risks against size, one panel a problem.

    Args:
        data: panels, each with title, n, ceiling and sizes; and the methods to draw.
        title: above all.
    """
    panels: Sequence[Mapping[str, Any]] = data["panels"]
    with figure_style():
        figure, axes = new_figure(columns=min(2, len(panels)), panels=len(panels), height=2.6)
        for ax, panel in zip(axes, panels, strict=True):
            draw_risks(ax, panel["n"], panel["sizes"], data["methods"], panel["ceiling"])
            ax.set_xlabel(f"features trained on\n({panel['title']})")
            if ax is not axes[0]:
                ax.set_ylabel("")
        finish_figure(figure, title)
    return figure


def compute_networks(quick: bool = False, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return test errors and losses of networks of many widths on noisy digits, pruned to one width, and retrained."""
    dataset = load_dataset("digits")
    n, share = 300, 0.3
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(dataset.train_targets), generator=generator)[:n]
    targets = dataset.train_targets[rows].clone()
    wrong = torch.rand(n, generator=generator) < share
    targets[wrong] = torch.randint(dataset.classes, (int(wrong.sum()),), generator=generator)
    found = network_descent(
        dataset.train_inputs[rows].flatten(1),
        targets,
        dataset.test_inputs.flatten(1),
        dataset.test_targets,
        keep=10,
        widths=(20, 40) if quick else (14, 20, 28, 40, 56, 80, 112, 160, 320),
        seeds=(seed, seed + 1) if quick else tuple(range(seed, seed + 5)),
        steps=200 if quick else 3000,
        device=device,
    )
    return jsonable(vars(found))


def draw_networks(data: Mapping[str, Any], title: str) -> Figure:
    """Draw test errors and test losses of networks against the width that was trained.

    Args:
        data: what `compute_networks` returned.
        title: above all.
    """
    found = NetworkDescent(
        data["n"],
        data["keep"],
        tuple(data["widths"]),
        tuple(data["seeds"]),
        tuple(map(tuple, data["train_errors"])),
        *({name: tuple(map(tuple, data[part][name])) for name in COLUMNS} for part in ("test_errors", "test_losses")),
    )
    with figure_style():
        figure, axes = new_figure(columns=2, panels=2, height=2.6)
        for ax, loss in zip(axes, (False, True), strict=True):
            found.plot(ax, loss=loss)
        finish_figure(figure, title)
    return figure


def make_descent_figures(
    out: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    quick: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Compute and draw figures, and write each as `<name>.json`, `<name>.pdf` and `<name>.png`.

    Args:
        out: the folder; made if it is not there.
        names: keys of `DESCENT_FIGURES`; all of them if None.
        quick: small problems and few draws.
        seed: of all draws.
        device: where to simulate and train.

    Returns:
        The files, in the order in which they were written.

    Raises:
        ValueError: an unknown name.
    """
    chosen = list(DESCENT_FIGURES) if names is None else list(names)
    unknown = [name for name in chosen if name not in DESCENT_FIGURES]
    if unknown:
        raise ValueError(f"unknown figures {unknown}: expected some of {', '.join(DESCENT_FIGURES)}")
    folder, paths = Path(out), []
    for name in chosen:
        figure = DESCENT_FIGURES[name]
        logger.info("figure %s: computing", name)
        data = figure.compute(quick, seed, device)
        made_by = {
            "quick": quick,
            "seed": seed,
            "device": str(device),
            "specprune": __version__,
            "torch": torch.__version__,
        }
        path = folder / f"{name}.json"
        write_text(path, to_json({"figure": name, "provenance": made_by, "data": data}) + "\n")
        paths += [path, *save_figure(figure.draw(data, figure.title), folder / name)]
    return paths


class DescentFigure(NamedTuple):
    """A figure that needs no trained network.

    Attributes:
        title: above it.
        compute: takes quick, seed and device; returns data for JSON.
        draw: takes the data and the title.
    """

    title: str
    compute: Callable[..., dict[str, Any]]
    draw: Callable[[Mapping[str, Any], str], Figure]


DESCENT_FIGURES = {
    "double_descent": DescentFigure("Pruned least squares: double descent", compute_linear, draw_panels),
    "retraining": DescentFigure("When a refit helps", compute_retraining, draw_panels),
    "random_features": DescentFigure("Random features", compute_random_features, draw_panels),
    "network_descent": DescentFigure("Networks on noisy digits, pruned to 10 nodes", compute_networks, draw_networks),
}
