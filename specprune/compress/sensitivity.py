"""How much the network's outputs suffer when one group is pruned to k units: predicted and measured loss curves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn
from tqdm import tqdm

from specprune.compress.divergence import Reference
from specprune.compress.layers import get_layer, input_width
from specprune.compress.reconstruction import Problem, refit
from specprune.compress.surgery import Group

CALIBRATION_WIDTHS = (0.2, 0.5)
SENSITIVITY_WIDTHS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
MIN_POWER, MAX_POWER = 0.3, 3.0  # of the fitted law; two noisy points must not bend the curve beyond use
_FLOOR = 1e-12

Choice = Callable[[Group, int], np.ndarray]


def measured_loss(
    original: nn.Module,
    problems: Mapping[str, Problem],
    norms: Mapping[str, str],
    group: Group,
    kept: np.ndarray,
    reference: Reference,
    ridge: float,
) -> float:
    """Return the divergence of the outputs when only this group is pruned, its consumers refitted on original inputs.

    Args:
        original: the network before pruning.
        problems: consumer to its problem on original inputs.
        norms: layer to the batch norm that reads it directly.
        group: the group.
        kept: its units that stay.
        reference: the original network's outputs.
        ridge: relative ridge of the refit.
    """
    work = copy.deepcopy(original)
    gone = np.setdiff1d(np.arange(group.width), kept)
    for entry in group.consumers:
        if entry.module in problems:
            problem = problems[entry.module]
            left = np.setdiff1d(np.arange(input_width(get_layer(work, entry.module))), entry.index[gone].ravel())
            refit(work, problem, left, norms.get(entry.module), ridge, original)
    return reference.divergence(work)


def calibrated_curves(
    groups: Sequence[Group],
    curves: Mapping[str, np.ndarray],
    choose: Choice,
    measure: Callable[[Group, np.ndarray], float],
) -> dict[str, np.ndarray]:
    """Return predicted divergences c f(k)^a, with f the residual curve and (c, a) from two measurements a group.

    Args:
        groups: the groups.
        curves: group name to the (width + 1,) residual of the consumers' refit with k units kept; entry 0 is unused.
        choose: which units a group keeps at a width.
        measure: the divergence with these units kept.

    Returns:
        Group name to (width + 1,) divergences, not rising with k.
    """
    found = {}
    for group in tqdm(groups, desc="calibrating widths", leave=False, disable=None):
        widths = sorted({min(group.width, max(1, round(share * group.width))) for share in CALIBRATION_WIDTHS})
        residual = curves[group.name]
        points = [(float(residual[k]), measure(group, choose(group, k))) for k in widths]
        found[group.name] = _falling(power_law(points)(residual), group.width)
    return found


def power_law(points: Sequence[tuple[float, float]]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the law c f^a, with 0.3 <= a <= 3, through (residual f, divergence) at one or two points.

    Args:
        points: what was measured; the law is f itself where nothing was.
    """
    logs = [(math.log(max(f, _FLOOR)), math.log(max(kl, _FLOOR))) for f, kl in points]
    power = 1.0
    if len(logs) > 1 and abs(logs[0][0] - logs[1][0]) > 1e-3:
        power = (logs[0][1] - logs[1][1]) / (logs[0][0] - logs[1][0])
    power = min(MAX_POWER, max(MIN_POWER, power))
    shift = sum(y - power * x for x, y in logs) / max(len(logs), 1)

    def law(residuals: np.ndarray) -> np.ndarray:
        predicted: np.ndarray = np.exp(shift + power * np.log(np.maximum(residuals, _FLOOR)))
        return predicted

    return law


def measured_curves(
    groups: Sequence[Group], choose: Choice, measure: Callable[[Group, np.ndarray], float]
) -> dict[str, np.ndarray]:
    """Return divergences measured at seven widths a group and interpolated between them, linearly in the logarithm."""
    found = {}
    for group in tqdm(groups, desc="measuring sensitivities", leave=False, disable=None):
        widths = sorted({min(group.width, max(1, round(share * group.width))) for share in SENSITIVITY_WIDTHS})
        losses = [math.log(max(measure(group, choose(group, k)), _FLOOR)) for k in widths]
        if widths[-1] < group.width:
            widths, losses = [*widths, group.width], [*losses, min(losses) - math.log(10)]
        curve = np.exp(np.interp(np.arange(group.width + 1), widths, losses))
        if len(widths) > 1 and widths[0] > 1:  # below the first point: along its tangent
            slope = (losses[1] - losses[0]) / (widths[1] - widths[0])
            below = np.arange(1, widths[0])
            curve[below] = np.exp(losses[0] + slope * (below - widths[0]))
        found[group.name] = _falling(curve, group.width)
    return found


def _falling(curve: np.ndarray, width: int) -> np.ndarray:
    """Return the curve made monotone: more units never lose more; nothing is lost at the full width."""
    curve = curve.copy()
    curve[width] = 0.0
    curve[1:] = np.maximum.accumulate(curve[1:][::-1])[::-1]
    curve[0] = math.inf
    return curve
