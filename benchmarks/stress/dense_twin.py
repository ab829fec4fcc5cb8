"""A slow judge: the stated reconstruction by float64 least squares on whole activation matrices."""

from __future__ import annotations

import copy

import numpy as np
import torch
from hostile import Net
from torch import Tensor, nn
from torch.nn import functional


def patches(layer: nn.Module, inputs: Tensor) -> np.ndarray:
    """Return the (rows, columns) matrix that the layer's weight matrix is multiplied with."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).numpy()
    unfolded = functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1]).numpy()


def flat_outputs(outputs: Tensor) -> np.ndarray:
    """Return (rows, outputs) in the order of `patches`."""
    if outputs.dim() == 2:
        return outputs.numpy()
    return outputs.flatten(2).transpose(1, 2).reshape(-1, outputs.shape[1]).numpy()


def watch(model: nn.Module, data: Tensor) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
    """Return what every module receives and gives."""
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args, out.clone())))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    return seen


def ridge_fit(design: np.ndarray, targets: np.ndarray, ridge: float, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (outputs, columns) weights and (outputs,) constants that minimise the mean square error plus the ridge.

    The ridge is `ridge` times the mean of the columns' (centred) second moments.
    """
    mean, goal = np.zeros(design.shape[1]), np.zeros(targets.shape[1])
    if intercept:
        mean, goal = design.mean(0), targets.mean(0)
    x, y = design - mean, targets - goal
    scale = np.abs(x).max(initial=0.0)
    # What cannot be squared in float64, or is the rounding of a constant, counts as zero.
    if scale < 1e-150 or scale <= 1e-15 * np.abs(design).max():
        return np.zeros((targets.shape[1], design.shape[1])), goal
    x = x / scale
    if ridge > 0:
        damping = ridge * np.square(x).sum() / x.shape[1]
        x = np.vstack([x, np.sqrt(damping) * np.eye(x.shape[1])])
        y = np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
        weights = np.linalg.lstsq(x, y, rcond=None)[0].T / scale
    else:
        weights = (np.linalg.pinv(x, rcond=np.sqrt(x.shape[1] * np.finfo(float).eps)) @ y).T / scale
    return weights, goal - weights @ mean


def mix(rows: np.ndarray, kept: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Return A (nodes, kept) that minimises the mean of |phi - A phi_J|^2 + |A diag(tau)^(1/2)|^2, by lstsq."""
    design = np.vstack([rows[:, kept], np.diag(np.sqrt(tau * len(rows)))])
    return np.linalg.lstsq(design, np.vstack([rows, np.zeros((len(kept), rows.shape[1]))]), rcond=None)[0].T


@torch.no_grad()
def reconstruct(net: Net, pruned, reconstruction: str, ridge: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the twin's network of the old size, its float64 outputs, and the original's.

    Args:
        net: the original network and its data.
        pruned: what the package made of it; only its groups, kept units and lambdas are used.
        reconstruction: one of the package's four.
        ridge: relative ridge.
    """
    original, data = copy.deepcopy(net.model).double(), net.data.double()
    work = copy.deepcopy(original)
    before = watch(original, data)
    changed = False
    lams = {entry.group: entry.lam for entry in pruned.report.groups}
    for name, (norm, closer) in net.consumers.items():
        layer = work.get_submodule(name)
        if layer.weight.numel() == 0:
            continue
        matrix = layer.weight.flatten(1)
        size = matrix.shape[1] // layer.weight.shape[1]
        present = np.ones(layer.weight.shape[1], dtype=bool)
        for group in pruned.groups:
            for entry in group.consumers:
                if entry.module == name:
                    gone = np.setdiff1d(np.arange(group.width), pruned.nodes[group.name].indices)
                    present[entry.index[gone].ravel()] = False
        whole = bool(present.all())
        touched = not whole or (changed and reconstruction == "sequential")
        changed = changed or not whole
        columns = np.flatnonzero(np.repeat(present, size))
        old = matrix.clone()
        if not touched:
            continue
        matrix[:, ~np.repeat(present, size)] = 0
        if reconstruction == "channel":
            for group in pruned.groups:
                for entry in group.consumers:
                    if entry.module != name:
                        continue
                    nodes = pruned.nodes[group.name]
                    inputs = [
                        before[e.module][0][0].movedim(1, -1).reshape(-1, before[e.module][0][0].shape[1])
                        for e in group.consumers
                    ]
                    # the mean over consumers and slots of the second moments: rows stacked, weighed by their numbers
                    stacked = [
                        part.numpy()[:, slot] / np.sqrt(len(part) * e.index.shape[1] * len(inputs))
                        for part, e in zip(inputs, group.consumers, strict=True)
                        for slot in e.index.T
                    ]
                    rows = np.vstack(stacked) * np.sqrt(sum(len(s) for s in stacked))
                    a = mix(rows, nodes.indices, lams[group.name] / nodes.weights)
                    for slot in entry.index.T:
                        place = (slot[:, None] * size + np.arange(size)).reshape(group.width, size)
                        for k in range(size):
                            matrix[:, place[nodes.indices, k]] = old[:, place[:, k]] @ torch.from_numpy(a)
        elif reconstruction in ("patch", "sequential"):
            now = watch(work, data) if reconstruction == "sequential" else before
            design = patches(layer, now[name][0][0])[:, columns]
            targets = flat_outputs(before[name][1])
            if closer is not None and reconstruction == "sequential":
                gain = torch.ones(targets.shape[1], dtype=torch.float64)
                if norm is not None:
                    own = original.get_submodule(norm)
                    gain = own.weight / (own.running_var + own.eps).sqrt()
                alive = gain.abs() > 1e-6 * gain.abs().max()
                shift = flat_outputs(before[closer][0][0]) - flat_outputs(now[closer][0][0])
                targets = targets + shift * torch.where(alive, 1 / torch.where(alive, gain, 1.0), 0.0).numpy()
            intercept = layer.bias is not None or norm is not None
            weights, constants = ridge_fit(design, targets, ridge, intercept)
            matrix.zero_()
            matrix[:, columns] = torch.from_numpy(weights)
            if layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(constants))
            elif norm is not None:
                mean = original.get_submodule(norm).running_mean
                work.get_submodule(norm).running_mean.copy_(mean - torch.from_numpy(constants))
    outputs = work(data)
    return work, outputs, original(data)
