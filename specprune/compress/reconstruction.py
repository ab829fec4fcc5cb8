"""Refitting each consumer on the nodes that are left, so that it gives the outputs it gave before.

- "channel": fold the node mix A_J = Sigma_FJ (Sigma_JJ + I_tau)^-1 into the consumer, W# = W A_J (the paper's way).
- "patch": least squares of the original pre-activation on the kept columns of the original inputs.
- "sequential": the same on the inputs that the already pruned layers before it really give (the default).  A layer
  whose outputs are added to a shortcut aims at the original sum minus the shortcut as it is now.
- "none": only cut the columns.

All of them act on a network of the old size in which the removed nodes' columns are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor, nn

from specprune.bounds.nodes import WeightedNodes
from specprune.compress.batches import CalibrationData
from specprune.compress.blocks import Item, definite_factor
from specprune.compress.capture import capture
from specprune.compress.layers import Layer, blocks, get_layer, patch_rows, set_weight_matrix, weight_matrix
from specprune.compress.moments import LayerMoments, over_processes
from specprune.compress.out_of_memory import telling_what_to_lower
from specprune.compress.surgery import Group, input_columns
from specprune.compress.targets import Targets, inverse_gain, norm_gain

RECONSTRUCTIONS = ("sequential", "patch", "channel", "none")


@dataclass(frozen=True, eq=False)
class Problem:
    """The least squares problem of one consumer: its inputs in one network, its targets from the original one.

    Args:
        layer: the consumer's name.
        mean: (d + o,) means of the rows [X | Y].
        gram: (d, d) second moment of the inputs' columns about the mean (about zero if there is no intercept).
        cross: (d, o) the same with the targets.
        energy: (o,) the same of the targets with themselves.
        intercept: whether the layer, or the batch norm that reads it, can take up a constant.
    """

    layer: str
    mean: Tensor
    gram: Tensor
    cross: Tensor
    energy: Tensor
    intercept: bool


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


def least_squares(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return the ridge regression from second moments: W = C^T (K + ridge (Tr K / d) I)^-1; see `solve`."""
    return solve(gram, cross, ridge)[0]


def solve(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the ridge regression W = C^T (K + ridge (Tr K / d) I)^-1, and how well its system is conditioned.

    Args:
        gram: (d, d) second moment K of the regressors.
        cross: (d, o) cross moment C with the targets.
        ridge: relative ridge, >= 0.

    Returns:
        (o, d) float64 weights, of least norm where the regressors are collinear and there is no ridge; and the
        condition number of the system: with a ridge LAPACK's estimate in the 1-norm (dpocon, from the Cholesky factor),
        else the ratio of the largest eigenvalue to the smallest that is kept; 1 if all inputs are zero.
    """
    size = len(gram)
    if size == 0:  # a layer without inputs
        return cross.T, 1.0
    damping = ridge * max(float(gram.trace()) / size, 0.0)
    system = gram + damping * torch.eye(size, dtype=gram.dtype, device=gram.device)
    if damping > 0:
        factor = definite_factor(system)
        return torch.cholesky_solve(cross, factor).T, condition_number(system, factor)
    values, vectors = torch.linalg.eigh(system)
    kept = values > size * torch.finfo(gram.dtype).eps * values[-1].clamp_min(0)  # none, if all inputs are zero
    used = values[kept]
    condition = float(used[-1] / used[0]) if len(used) else 1.0
    return ((vectors[:, kept] / used) @ (vectors[:, kept].T @ cross)).T, condition


def condition_number(matrix: Tensor, factor: Tensor) -> float:
    """Return LAPACK's estimate (dpocon) of a matrix's condition number in the 1-norm, from its Cholesky factor."""
    norm = float(torch.linalg.matrix_norm(matrix, 1))
    reciprocal, info = lapack.dpocon(factor.T.cpu().numpy(), norm, uplo="U")
    if info != 0:
        raise ValueError(f"LAPACK dpocon refused its argument {-info}")
    return 1.0 / reciprocal if reciprocal > 0 else math.inf


def problem_from_moments(model: nn.Module, name: str, moments: LayerMoments, *, intercept: bool) -> Problem:
    """Return a consumer's problem on its original inputs, where the targets are the layer's own outputs.

    Args:
        model: the original network.
        name: the consumer.
        moments: patch-level moments of its inputs.
        intercept: whether the constant is free.
    """
    layer = get_layer(model, name)
    weight = weight_matrix(layer).to(torch.float64)
    mean = moments.total / moments.rows
    gram = moments.about_mean() if intercept else moments.gram / moments.rows
    parts = blocks(layer)
    cross = torch.cat([gram[:, columns] @ weight[outputs].T for outputs, columns in parts], 1)
    energy = torch.cat([((weight[o] @ gram[c][:, c]) * weight[o]).sum(1) for o, c in parts])
    means = torch.cat([weight[o] @ mean[c] for o, c in parts])
    if layer.bias is not None:
        means = means + layer.bias.detach().to(torch.float64)
    return Problem(name, torch.cat([mean, means]), gram, cross, energy, intercept)


@torch.no_grad()
def collect_problems(
    targets: Targets, work: nn.Module, data: CalibrationData, names: Sequence[str]
) -> dict[str, Problem]:
    """Return the problems of several consumers: inputs from the network as it is now, targets from the original one.

    Args:
        targets: what the consumers gave in the original network.
        work: the network of the old size with zeroed columns, all earlier consumers already refitted.
        data: calibration data.
        names: the consumers.

    Raises:
        ValueError: NaN or Inf in a layer's inputs; the layer is named.
    """
    if not names:
        return {}
    norms = {name: targets.norms[name] for name in names if name in targets.norms}
    closing = [name for name in names if name in targets.closers]
    sums: dict[str, LayerMoments] = {}
    for batch in data.passes(work, f"refitting {', '.join(names)}"):
        wanted = targets.of(batch, names)
        now = capture(work, names, data, batch, norms=norms, closers=closing)
        for name in names:
            layer = get_layer(work, name)
            drawn, target = wanted[name]
            shortcut = now[name].shortcut
            with telling_what_to_lower(f"refitting layer {name!r}", "give smaller batches or fewer positions="):
                if name in closing and shortcut is not None:
                    target = target - drawn.rows(layer, shortcut) * inverse_gain(work, norms.get(name), target)
                rows = torch.cat([patch_rows(layer, now[name].inputs, drawn), target], 1)
                moments = LayerMoments.of(rows)
                sums[name] = sums[name] + moments if name in sums else moments
    problems = {}
    for name in names:
        layer = get_layer(work, name)
        moments = over_processes(sums.get(name), sum(_sizes(layer)), layer.weight.device)
        if not bool(torch.isfinite(moments.gram.diagonal()).all()):
            raise ValueError(f"NaN or Inf in the inputs of layer {name!r} while refitting it")
        intercept = layer.bias is not None or name in norms
        mean = moments.total / moments.rows
        joint = moments.about_mean() if intercept else moments.gram / moments.rows
        columns, _ = _sizes(layer)
        problems[name] = Problem(
            name, mean, joint[:columns, :columns], joint[:columns, columns:], joint.diagonal()[columns:], intercept
        )
    return problems


def _sizes(layer: Layer) -> tuple[int, int]:
    """Return the number of columns of the layer's `patch_rows` and of its outputs."""
    outputs, columns = blocks(layer)[-1]
    return columns.stop, outputs.stop


def selection_items(
    model: nn.Module, problem: Problem, group: Group, norm: str | None, present: np.ndarray
) -> list[Item]:
    """Return a consumer's problem as selection sees it, one item for each block of a grouped convolution.

    The outputs are weighed as the batch norm after the layer weighs them, and divided by their total variance.

    Args:
        model: the network.
        problem: of one consumer of the group.
        group: whose units are chosen.
        norm: the batch norm that reads the consumer's outputs directly, if there is one.
        present: input features or channels that are still there; nodes of other groups may be gone.
    """
    layer = get_layer(model, problem.layer)
    (entry,) = [part for part in group.consumers if part.module == problem.layer]
    columns = input_columns(layer, entry.index).reshape(group.width, -1)
    gain = torch.ones_like(problem.energy) if norm is None else norm_gain(model, norm)
    total = float((problem.energy * gain.square()).sum())
    if total <= 0:
        return []
    weights = gain / total**0.5
    here = np.sort(input_columns(layer, present))
    items = []
    for outputs, part in blocks(layer):
        own = here[(here >= part.start) & (here < part.stop)]
        place = {column: index for index, column in enumerate(own.tolist())}
        inside = np.array([[place[c] for c in unit if c in place] for unit in columns.tolist()])
        rows = torch.as_tensor(own, device=problem.gram.device)
        items.append(Item(problem.gram[rows][:, rows], problem.cross[rows][:, outputs] * weights[outputs], inside))
    return items


@torch.no_grad()
def refit(
    work: nn.Module, problem: Problem, kept_inputs: np.ndarray, norm: str | None, ridge: float, before: nn.Module
) -> float:
    """Solve a consumer's problem on the kept inputs and write the solution into the network, in place.

    The intercept goes into the layer's bias, or into the running mean of the batch norm that follows it directly; where
    there is neither, none is fitted.

    Args:
        work: the network of the old size.
        problem: of the consumer.
        kept_inputs: input features or channels that are left.
        norm: the batch norm that reads the consumer's outputs directly, if there is one.
        ridge: relative ridge.
        before: the original network, whose bias or running mean the intercept starts from.

    Returns:
        The condition number of the least squares system, see `solve`; the largest of those of a grouped convolution.

    Raises:
        ValueError: the solution leaves the range of the network's dtype.
    """
    layer = get_layer(work, problem.layer)
    matrix = torch.zeros_like(weight_matrix(layer), dtype=torch.float64)
    width = problem.gram.shape[0]
    kept = np.sort(input_columns(layer, kept_inputs))
    shift = problem.mean[width:].clone()
    condition = 1.0
    for outputs, part in blocks(layer):
        inside = torch.as_tensor(kept[(kept >= part.start) & (kept < part.stop)], device=problem.gram.device)
        gram, cross = problem.gram[inside][:, inside], problem.cross[inside][:, outputs]
        solution, own = solve(gram, cross, ridge)
        condition = max(condition, own)
        shift[outputs] -= solution @ problem.mean[inside]
        matrix[outputs.start : outputs.stop, inside - part.start] = solution.to(matrix.device)
    _check_range(problem.layer, layer, matrix, shift)
    set_weight_matrix(layer, matrix.to(layer.weight.dtype))
    shift_constant(work, problem, shift, layer.bias, norm, before)
    return condition


def _check_range(name: str, layer: Layer, *found: Tensor) -> None:
    """Refuse weights and constants that the layer's dtype cannot hold."""
    if not all(bool(torch.isfinite(part.to(layer.weight.dtype)).all()) for part in found):
        raise ValueError(
            f"the refitted weights of layer {name!r} leave the range of {layer.weight.dtype}: the nodes that it keeps "
            "are too small, or its outputs too large; leave out its group with widths={...}, rescale the nodes, or "
            "prune in float64"
        )


@torch.no_grad()
def shift_constant(
    work: nn.Module, problem: Problem, shift: Tensor, bias: Tensor | None, norm: str | None, before: nn.Module
) -> None:
    """Put the constant of a fit into the layer's bias, or into the batch norm that follows it directly, in place.

    Args:
        work: the network.
        problem: that was solved; nothing happens where it has no intercept.
        shift: (o,) the constant.
        bias: of the layer, or None.
        norm: the batch norm that reads the layer's outputs directly, if there is one.
        before: the network whose running mean the constant starts from.
    """
    if not problem.intercept:
        return
    if bias is not None:
        bias.copy_(shift.to(bias.dtype))
    elif norm is not None:
        mean = work.get_submodule(norm).get_buffer("running_mean")
        mean.copy_((before.get_submodule(norm).get_buffer("running_mean") - shift.to(mean.device)).to(mean.dtype))


def mix_condition(covariance: np.ndarray, nodes: WeightedNodes, lam: float) -> float:
    """Return the condition number of S_JJ + I_tau, which the node mix is solved from, as `condition_number` has it."""
    block = torch.from_numpy(covariance[np.ix_(nodes.indices, nodes.indices)] + np.diag(lam / nodes.weights))
    return condition_number(block, definite_factor(block))


@torch.no_grad()
def fold_nodes(
    original: nn.Module, work: nn.Module, group: Group, name: str, kept: np.ndarray, mix: np.ndarray
) -> None:
    """Fold the node mix of one group into a consumer, W# = W A_J, in place (the paper's one-pass reconstruction).

    Args:
        original: the network before pruning.
        work: the network of the old size.
        group: the group.
        name: one of its consumers.
        kept: the group's kept units.
        mix: (units, kept) reconstruction matrix A_J.
    """
    (entry,) = [part for part in group.consumers if part.module == name]
    before, after = get_layer(original, name), get_layer(work, name)
    columns = input_columns(before, entry.index).reshape(group.width, -1)
    old, new = weight_matrix(before), weight_matrix(after).clone()
    for outputs, part in blocks(before):
        inside = np.array([[c - part.start for c in unit if part.start <= c < part.stop] for unit in columns])
        place = torch.as_tensor(inside, device=old.device)
        new[outputs.start : outputs.stop, place.flatten()] = 0
        new[outputs.start : outputs.stop, place[torch.as_tensor(kept)].flatten()] = fold_node_mix(
            old[outputs][:, place], mix
        ).flatten(1)
    _check_range(name, after, new)
    set_weight_matrix(after, new)
