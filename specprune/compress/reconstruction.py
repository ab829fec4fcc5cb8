"""Refitting each consumer on the nodes that are left, so that it gives the outputs it gave before.

- "channel": fold the node mix A_J = Sigma_FJ (Sigma_JJ + I_tau)^-1 into the consumer, W# = W A_J (the paper's way).
- "patch": least squares of the original pre-activation on the kept columns of the original inputs.
- "sequential": the same on the inputs that the already pruned layers before it really give (the default).
- "none": only cut the columns.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData, StopForward
from specprune.compress.groups import Group
from specprune.compress.layers import Layer, Positions, get_layer, patch_rows
from specprune.compress.moments import LayerMoments

RECONSTRUCTIONS = ("sequential", "patch", "channel", "none")


def fold_node_mix(weight: Tensor, mix: np.ndarray) -> Tensor:
    """Return the consumer's weights on the kept nodes, W#[o, j, ...] = sum_k W[o, k, ...] A_kj.

    Args:
        weight: (outputs, nodes, ...) original weights; a flattened map's columns must be split as (nodes, pixels).
        mix: (nodes, kept) reconstruction matrix A_J.

    Returns:
        (outputs, kept, ...) weights of the same dtype and device.
    """
    matrix = torch.as_tensor(mix, dtype=torch.float64, device=weight.device)
    folded = torch.einsum("ok...,kj->oj...", weight.to(torch.float64), matrix)
    return folded.to(weight.dtype).contiguous()


def least_squares(
    moments: LayerMoments, columns: int, *, ridge: float, intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ridge regression of targets on regressors from their joint moments.

    Minimises E ||Y - W X - b||^2 + ridge (Tr K / d) ||W||^2 with K the (centred, if there is an intercept) second
    moment of X; the intercept is not penalised.

    Args:
        moments: of the rows [X | Y].
        columns: d, how many of the columns are regressors.
        ridge: relative ridge, >= 0.
        intercept: whether b is fitted; otherwise b = 0.

    Returns:
        W of shape (targets, d) and b of shape (targets,).
    """
    joint = moments.covariance(centred=intercept)
    mean = moments.mean()
    gram, cross = joint[:columns, :columns], joint[:columns, columns:]
    damping = ridge * max(float(np.trace(gram)) / columns, 0.0)
    system = gram + damping * np.eye(columns)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", linalg.LinAlgWarning)
            weights = linalg.solve(system, cross, assume_a="pos").T
    except (linalg.LinAlgError, linalg.LinAlgWarning):  # collinear or dead nodes and no ridge: least norm
        weights = (linalg.pinvh(system) @ cross).T
    shift = mean[columns:] - weights @ mean[:columns] if intercept else np.zeros(len(weights))
    return weights, shift


@torch.no_grad()
def refit_consumer(
    original: nn.Module,
    pruned: nn.Module,
    data: CalibrationData,
    group: Group,
    kept: np.ndarray,
    kept_outputs: np.ndarray | None,
    norm: str | None,
    *,
    sequential: bool,
    ridge: float,
    positions: int | None,
    seed: int,
) -> None:
    """Refit one consumer of the pruned network by least squares, in place.

    Its target is the original pre-activation; its regressors are its inputs in the pruned network (`sequential`) or
    the kept columns of its inputs in the original network.  The intercept goes into the layer's bias, or into the
    running mean of the batch norm that follows it directly; where there is neither, none is fitted.

    Args:
        original: the network before pruning, in evaluation mode.
        pruned: the network after the nodes were removed, with all earlier consumers already refitted.
        data: calibration data.
        group: whose consumer to refit.
        kept: nodes of the group that were kept.
        kept_outputs: the consumer's own outputs that were kept, None for all.
        norm: name of the batch norm that reads the consumer's outputs directly, if there is one.
        sequential: which inputs to regress on.
        ridge: relative ridge.
        positions: output positions drawn per image in a convolution; None takes all.
        seed: of the positions.
    """
    before, after = get_layer(original, group.consumer), get_layer(pruned, group.consumer)
    statistics = None if norm is None else dict(pruned.named_modules())[norm]
    slots = before.weight.flatten(1).shape[1] // group.width
    columns = torch.as_tensor((kept[:, None] * slots + np.arange(slots)).ravel(), device=before.weight.device)
    rows = slice(None) if kept_outputs is None else torch.as_tensor(kept_outputs, device=before.weight.device)
    weight = before.weight.flatten(1)[rows].to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    joint: LayerMoments | None = None
    for batch in data.passes(original, f"refitting {group.consumer}"):
        inputs = _layer_input(original, before, data, batch)
        drawn = Positions.draw(before, inputs, positions, generator)
        patches = patch_rows(before, inputs, drawn).to(torch.float64)
        targets = patches @ weight.T
        if sequential:
            regressors = patch_rows(after, _layer_input(pruned, after, data, batch), drawn).to(torch.float64)
        else:
            regressors = patches[:, columns]
        moments = LayerMoments.of(torch.cat([regressors, targets], 1))
        joint = moments if joint is None else joint + moments
    if joint is None or not bool(torch.isfinite(joint.gram.diagonal()).all()):
        raise ValueError(f"NaN or Inf in the inputs of layer {group.consumer!r} while refitting it")
    intercept = after.bias is not None or statistics is not None
    solution, shift = least_squares(joint, len(columns), ridge=ridge, intercept=intercept)
    after.weight.copy_(torch.as_tensor(solution).reshape(after.weight.shape))
    moved = torch.as_tensor(shift, dtype=torch.float64, device=after.weight.device)
    if after.bias is not None:
        after.bias.add_(moved.to(after.bias.dtype))
    elif statistics is not None:
        mean = statistics.get_buffer("running_mean")
        mean.sub_(moved.to(mean.dtype))


def fold_consumer(
    original: nn.Module, pruned: nn.Module, group: Group, mix: np.ndarray, kept_outputs: np.ndarray | None
) -> None:
    """Set one consumer of the pruned network to W A_J, in place (the paper's one-pass reconstruction)."""
    before, after = get_layer(original, group.consumer), get_layer(pruned, group.consumer)
    weight = before.weight.detach()
    if kept_outputs is not None:
        weight = weight[torch.as_tensor(kept_outputs, device=weight.device)]
    by_node = weight.reshape(weight.shape[0], group.width, -1)
    with torch.no_grad():
        after.weight.copy_(fold_node_mix(by_node, mix).reshape(after.weight.shape))


def _layer_input(model: nn.Module, layer: Layer, data: CalibrationData, batch: Any) -> Tensor:
    """Return what the layer receives for this batch; the rest of the network is not run."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise StopForward

    handle = layer.register_forward_pre_hook(stop)
    try:
        data.call(model, batch)
    except StopForward:
        pass
    finally:
        handle.remove()
    return seen[0]
