"""What selection needs to know about each group: covariance, the consumers' weights and the nodes' own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.layers import blocks, get_layer, input_width, weight_matrix
from specprune.compress.moments import LayerMoments, Moments
from specprune.compress.reconstruction import Problem
from specprune.compress.selection import NodeStatistics
from specprune.compress.surgery import RECURRENT, Group, Slice, input_columns
from specprune.compress.targets import norm_gain


def node_statistics(
    model: nn.Module,
    moments: Moments,
    group: Group,
    norms: Mapping[str, str] | None = None,
    states: LayerMoments | None = None,
) -> NodeStatistics:
    """Return what selection needs to know about a group, from channel-level moments of its consumers' inputs.

    Args:
        model: the network.
        moments: of at least the group's consumers.
        group: from `find_groups`.
        norms: layer to the batch norm that reads its outputs directly; its gain is multiplied into the consumer's
            weights Z, so that the output loss is measured where the activation sees it.
        states: of a recurrent layer's hidden nodes; the layer itself then counts as one more consumer, and the three
            losses of the extension to recurrent nets (arXiv:2105.10832) are summed.

    Returns:
        Covariance (the mean over consumers, and over the inputs that belong to one unit), Z^T Z (summed over kernel
        offsets, pixels and consumers, each divided by its consumer's output energy if there are several) and
        magnitudes of the group's units.
    """
    covariances, grams = [], []
    several = len(group.consumers) > 1 or states is not None
    for entry in group.consumers:
        if entry.module not in moments:
            continue
        covariance = _unit_covariance(moments[entry.module].covariance(), entry.index)
        gram = _consumer_gram(model, entry, (norms or {}).get(entry.module))
        energy = float(np.sum(covariance * gram))
        covariances.append(covariance)
        grams.append(gram / energy if several and energy > 0 else gram)
    if states is not None:
        weight = model.get_submodule(group.name).get_parameter("weight_hh_l0").detach().to(torch.float64).cpu().numpy()
        covariance, gram = states.covariance(), weight.T @ weight
        energy = float(np.sum(covariance * gram))
        covariances.append(covariance)
        grams.append(gram / energy if energy > 0 else gram)
    return NodeStatistics(
        covariance=sum(covariances[1:], covariances[0]) / len(covariances),
        consumer_gram=sum(grams[1:], grams[0]),
        magnitudes=np.sqrt(producer_norms(model, group, 2)),
    )


def producer_norms(model: nn.Module, group: Group, power: int) -> np.ndarray:
    """Return the (units,) sums of |w|^power over the weights that make each unit, over all producers."""
    total = np.zeros(group.width)
    for entry in group.producers:
        module = model.get_submodule(entry.module)
        if isinstance(module, RECURRENT):
            weight = torch.cat([module.get_parameter("weight_ih_l0"), module.get_parameter("weight_hh_l0")], 1)
            rows = weight.reshape(-1, module.hidden_size, weight.shape[1]).transpose(0, 1).flatten(1)
        else:
            rows = weight_matrix(get_layer(model, entry.module))
        sums = rows.detach().to(torch.float64).abs().pow(power).sum(1).cpu().numpy()
        total += sums[entry.index].sum(1)
    return total


def _unit_covariance(moment: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the (units, units) mean over slots s of the moment between the s-th inputs of two units."""
    return sum((moment[np.ix_(slot, slot)] for slot in index.T), np.zeros((len(index),) * 2)) / index.shape[1]


def _consumer_gram(model: nn.Module, entry: Slice, norm: str | None) -> np.ndarray:
    module = model.get_submodule(entry.module)
    if isinstance(module, RECURRENT):
        weight = module.get_parameter("weight_ih_l0").detach().to(torch.float64)
        parts = [weight[:, torch.as_tensor(entry.index)].transpose(1, 2).reshape(-1, len(entry.index))]
    else:
        layer = get_layer(model, entry.module)
        matrix = weight_matrix(layer).to(torch.float64)
        if norm is not None:
            matrix = matrix * norm_gain(model, norm)[:, None]
        columns = input_columns(layer, entry.index).reshape(len(entry.index), -1)
        parts = []
        for outputs, part in blocks(layer):
            inside = np.array([[c - part.start for c in unit if part.start <= c < part.stop] for unit in columns])
            picked: Tensor = matrix[outputs][:, torch.as_tensor(inside)]
            parts.append(picked.transpose(1, 2).reshape(-1, len(entry.index)))
    stacked = torch.cat(parts)
    return (stacked.T @ stacked).cpu().numpy()


def contribution_gram(model: nn.Module, group: Group, problems: Mapping[str, Problem]) -> np.ndarray:
    """Return Q_jk, the mean product of two units' contributions to the consumers' outputs, summed over outputs.

    Args:
        model: the original network.
        group: the group.
        problems: consumer to its problem on original inputs; each consumer is divided by its output energy.

    Returns:
        (units, units) float64.
    """
    total = np.zeros((group.width, group.width))
    for entry in group.consumers:
        if entry.module not in problems:
            continue
        layer, problem = get_layer(model, entry.module), problems[entry.module]
        columns = input_columns(layer, entry.index).reshape(group.width, -1)
        weight = weight_matrix(layer).to(torch.float64)
        energy = max(float(problem.energy.sum()), np.finfo(np.float64).tiny)
        for outputs, part in blocks(layer):
            inside = np.array([[c - part.start for c in unit if part.start <= c < part.stop] for unit in columns])
            flat = torch.as_tensor(inside.ravel(), device=weight.device)
            product = (problem.gram[part, part] * (weight[outputs].T @ weight[outputs]))[flat][:, flat]
            shape = (group.width, inside.shape[1]) * 2
            total += product.reshape(shape).sum((1, 3)).cpu().numpy() / energy
    return total


def kept_inputs(
    model: nn.Module, layer: str, groups: Sequence[Group], kept: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, bool]:
    """Return which input features or channels of a layer are left, and whether that is all of them.

    Args:
        model: the network of the old size.
        layer: the consumer.
        groups: all groups.
        kept: group name to its kept units, for the groups that were settled.
    """
    gone = [
        entry.index[np.setdiff1d(np.arange(group.width), kept[group.name])].ravel()
        for group in groups
        if group.name in kept
        for entry in group.consumers
        if entry.module == layer
    ]
    dropped = np.concatenate([np.array([], dtype=np.int64), *gone])
    module = model.get_submodule(layer)
    width = int(module.input_size) if isinstance(module, RECURRENT) else input_width(get_layer(model, layer))
    return np.setdiff1d(np.arange(width), dropped), len(dropped) == 0
