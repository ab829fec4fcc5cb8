"""Figures of over-parameterisation and pruning: linear models, retraining, random features, networks.

Each has a `compute`, which returns data for JSON, and a `draw`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from specprune._records import jsonable
from specprune.analysis.double_descent import double_descent, draw_risks
from specprune.analysis.linear_simulation import simulate_risks
from specprune.analysis.network_descent import COLUMNS, NetworkDescent, network_descent
from specprune.bounds.correlated_features import Estimate, ReluFeatures, correlated_risks
from specprune.bounds.overparameterized import LinearProblem
from specprune.figures.setting import Conditions, Parts
from specprune.figures.style import figure_style, finish_figure, new_figure
from specprune.testbed import load_dataset

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


def _linear_panel(kind: str, conditions: Conditions) -> dict[str, Any]:
    quick, seed, device = conditions.quick, conditions.seed, conditions.device
    n, features, keep = (60, 600, 30) if quick else (200, 4000, 100)
    simulated = [int(n * share) for share in (0.6, 0.8, 1.3, 2, 4, 10)]
    draws = 10 if quick else 40
    problem = linear_problem(kind, n, features, keep)
    found = double_descent(problem, keep, simulated=simulated, draws=draws, seed=seed, device=device)
    ceiling = 2.5 * problem.null_risk
    return {"title": f"{kind}, n = {n}, s = {keep}", "ceiling": ceiling, **json.loads(found.to_json())}


def compute_linear(conditions: Conditions, parts: Parts) -> dict[str, Any]:
    """Return risks of pruned least squares against size, for three covariances, with simulations.

    Args:
        conditions: sizes, seed, device.
        parts: each panel is one.
    """
    kinds = ("identity", "spiked", "power law")
    panels = [parts.get(kind, partial(_linear_panel, kind, conditions)) for kind in kinds]
    return {"panels": panels, "methods": list(_PRUNED)}


def _relu_panel(conditions: Conditions) -> dict[str, Any]:
    """Return risks on random ReLU features of several numbers: by law where there is one, and simulated."""
    quick, seed, device = conditions.quick, conditions.seed, conditions.device
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


def compute_retraining(conditions: Conditions, parts: Parts) -> dict[str, Any]:
    """Return risks before and after a refit, on independent and on correlated features.

    Args:
        conditions: sizes, seed, device.
        parts: each panel is one.
    """
    spiked = parts.get("spiked", lambda: _linear_panel("spiked", conditions))
    relu = parts.get("relu", lambda: _relu_panel(conditions))
    return {"panels": [spiked, relu], "methods": list(_RETRAINED)}


def compute_random_features(conditions: Conditions) -> dict[str, Any]:
    """Return risks on random ReLU features, of the Gaussian law and simulated.

    Args:
        conditions: sizes, seed, device.
    """
    return {
        "panels": [_relu_panel(conditions)],
        "methods": ["unpruned", "magnitude", "hessian", "oracle_refit"],
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


def compute_networks(conditions: Conditions) -> dict[str, Any]:
    """Return test errors and losses of networks of many widths on noisy digits, pruned to one width, and retrained.

    Args:
        conditions: widths and steps, seed, device.
    """
    quick, seed, device = conditions.quick, conditions.seed, conditions.device
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
