"""Refitting recurrent layers whose hidden nodes or input features were taken out, so that they go on as before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.compress.batches import CalibrationData
from specprune.compress.capture import capture
from specprune.compress.distributed import first_of
from specprune.compress.moments import LayerMoments, over_processes
from specprune.compress.reconstruction import least_squares
from specprune.compress.recurrent import gate_rows, hidden_moments

ROUNDS = 2  # refits of the recurrent weights; each changes the states that the next one regresses on
# The weights of all gates, and their biases where the layer has them.
Affine = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Candidate:
    """A recurrence that was tried.

    Args:
        recurrence: its weights.
        error: what the best linear map from the kept states leaves of the original states, relative to their variance.
        reached: moments of the rows [kept states one step before | what the gates got originally, less what the inputs
            give now], with the states that this recurrence reaches.
        taught: the same with the original states.
    """

    recurrence: Affine
    error: float
    reached: LayerMoments
    taught: LayerMoments


@torch.no_grad()
def refit_recurrent(
    original: nn.Module,
    work: nn.Module,
    name: str,
    kept: np.ndarray,
    data: CalibrationData,
    *,
    ridge: float,
    sequential: bool,
) -> None:
    """Let the kept hidden nodes of a recurrent layer stand in for the others in its own recurrence, in place.

    Without `sequential`, W_h# = W_h A_J with A_J from the time-mean second moment of the original states.  With it,
    what the gates got originally (less what the inputs give now) is regressed, with a constant, on the original kept
    states, and then at most `ROUNDS` times on the states that the layer reaches, since these move with the weights.
    This goes on while the original states can be told better, linearly, from the ones reached: that is what refitted
    readers make of them.  The plain cut stays where nothing is better.

    Args:
        original: the network before pruning, in evaluation mode.
        work: the network of the old size, in evaluation mode; weight_hh and bias_hh of the layer are set, with zero
            columns for the nodes that go.
        name: of the recurrent layer.
        kept: hidden nodes that stay.
        data: calibration data.
        ridge: relative ridge, >= 0.
        sequential: whether to regress on the states of `work`.

    Raises:
        ValueError: NaN or Inf in the original hidden states.
    """
    before, after = _layer(original, name), _layer(work, name)
    nodes = torch.as_tensor(np.sort(kept), device=before.weight_hh_l0.device)
    whole = _recurrence(before)
    if not sequential:
        moments = hidden_moments(original, name, data)
        gram = moments.gram / moments.rows
        mix = least_squares(gram[nodes][:, nodes], gram[nodes], ridge)
        _write(after, _placed(whole, nodes, whole[0] @ mix))
        return
    plain = _placed(whole, nodes, whole[0][:, nodes])
    best = _tried(original, work, name, nodes, plain, data, ridge)
    moments = best.taught
    for _ in range(1 + ROUNDS):
        refitted = _regressed(plain, before, nodes, moments, ridge)
        trial = _tried(original, work, name, nodes, refitted, data, ridge)
        if not first_of(trial.error < best.error):  # processes must leave the loop together
            break
        best, moments = trial, trial.reached
    _write(after, best.recurrence)


@torch.no_grad()
def refit_recurrent_inputs(
    original: nn.Module,
    work: nn.Module,
    name: str,
    kept: np.ndarray,
    data: CalibrationData,
    *,
    ridge: float,
    sequential: bool,
) -> None:
    """Refit how a recurrent layer reads its inputs on the features that are left, in place: weight_ih and bias_ih.

    Args:
        original: the network before pruning, in evaluation mode.
        work: the network of the old size, in evaluation mode.
        name: of the recurrent layer.
        kept: input features that stay; the columns of the others become zero.
        data: calibration data.
        ridge: relative ridge, >= 0.
        sequential: whether to regress on the inputs in `work`, otherwise on the original ones.

    Raises:
        ValueError: NaN or Inf in the layer's inputs.
    """
    before, after = _layer(original, name), _layer(work, name)
    weight, bias = _inputs(before)
    features = torch.as_tensor(np.sort(kept), device=after.weight_ih_l0.device)
    total: LayerMoments | None = None
    for batch in data.passes(work, f"refitting the inputs of {name}"):
        old = capture(original, [name], data, batch)[name].inputs.to(torch.float64).flatten(0, -2)
        new = old
        if sequential:
            new = capture(work, [name], data, batch)[name].inputs.to(torch.float64).flatten(0, -2)
        moments = LayerMoments.of(torch.cat([new[:, features], _affine(old, weight, bias)], 1))
        total = moments if total is None else total + moments
    total = over_processes(total, len(features) + len(weight), features.device)
    if not bool(torch.isfinite(total.gram.diagonal()).all()):
        raise ValueError(f"NaN or Inf in the inputs of layer {name!r} while refitting it")
    solution, shift = _regression(total, len(features), ridge, intercept=bias is not None)
    after.weight_ih_l0.zero_()
    after.weight_ih_l0[:, features] = solution.to(after.weight_ih_l0.dtype)
    if bias is not None:
        after.bias_ih_l0.copy_(shift)


def _tried(
    original: nn.Module,
    work: nn.Module,
    name: str,
    nodes: Tensor,
    recurrence: Affine,
    data: CalibrationData,
    ridge: float,
) -> _Candidate:
    """Put a recurrence into the network, run both networks, and return what came of it."""
    before, after = _layer(original, name), _layer(work, name)
    _write(after, recurrence)
    rows = gate_rows(before, nodes).to(nodes.device)
    sums: dict[str, LayerMoments] = {}
    for batch in data.passes(work, f"refitting the recurrence of {name}"):
        old, new = (capture(model, [name], data, batch)[name] for model in (original, work))
        states, now = old.outputs[0].to(torch.float64), new.outputs[0].to(torch.float64)[..., nodes]
        target = _gate_sums(before, after, old.inputs, new.inputs, _shifted(before, states))[..., rows]
        parts = {
            "told": (now, states),
            "reached": (_shifted(before, now), target),
            "taught": (_shifted(before, states[..., nodes]), target),
        }
        for key, pair in parts.items():
            moments = LayerMoments.of(torch.cat(pair, -1).flatten(0, -2))
            sums[key] = sums[key] + moments if key in sums else moments
    widths = {"told": int(before.hidden_size), "reached": len(rows), "taught": len(rows)}
    total = {key: over_processes(sums.get(key), len(nodes) + width, nodes.device) for key, width in widths.items()}
    return _Candidate(recurrence, _untold(total["told"], len(nodes), ridge), total["reached"], total["taught"])


def _untold(moments: LayerMoments, columns: int, ridge: float) -> float:
    """Return what the best affine map of the first columns leaves of the others, relative to their variance."""
    if not bool(torch.isfinite(moments.gram).all()):  # a recurrence that runs away
        return math.inf
    covariance = torch.as_tensor(moments.covariance(centred=True), device=moments.gram.device)
    gram, cross = covariance[:columns, :columns], covariance[:columns, columns:]
    energy = covariance[columns:, columns:].trace()
    solution = least_squares(gram, cross, ridge)
    left = energy - 2 * (solution * cross.T).sum() + ((solution @ gram) * solution).sum()
    return float(left / energy) if energy > 0 else 0.0


def _gate_sums(before: Any, after: Any, old: Tensor, new: Tensor, states: Tensor) -> Tensor:
    """Return what the gates got in the original layer, less what the present layer's inputs give them."""
    target = _affine(states, *_recurrence(before))
    change = _affine(old.to(torch.float64), *_inputs(before))
    change = change - _affine(new.to(torch.float64), *_inputs(after))
    if isinstance(before, nn.GRU):  # its last gate multiplies the recurrent part before the inputs are added
        change[..., -states.shape[-1] :] = 0
    return target + change


def _shifted(module: Any, states: Tensor) -> Tensor:
    """Return h_{t-1} at every step t: zero, then all states but the last."""
    axis = 1 if module.batch_first and states.dim() == 3 else 0
    length = states.shape[axis]
    return torch.cat([torch.zeros_like(states.narrow(axis, 0, 1)), states.narrow(axis, 0, length - 1)], axis)


def _regressed(plain: Affine, before: Any, nodes: Tensor, moments: LayerMoments, ridge: float) -> Affine:
    """Return the recurrence that gives the kept nodes' gates what they got, as well as an affine map can."""
    weight, bias = plain[0].clone(), plain[1]
    rows = gate_rows(before, nodes).to(nodes.device)
    solution, shift = _regression(moments, len(nodes), ridge, intercept=bias is not None)
    weight[rows[:, None], nodes] = solution
    if bias is not None:
        bias = bias.clone()
        bias[rows] = shift
    return weight, bias


def _regression(moments: LayerMoments, columns: int, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return weights and constants of the rows' last columns on their first ones."""
    mean = moments.total / moments.rows
    joint = moments.about_mean() if intercept else moments.gram / moments.rows
    solution = least_squares(joint[:columns, :columns], joint[:columns, columns:], ridge)
    return solution, mean[columns:] - solution @ mean[:columns]


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _recurrence(module: Any) -> Affine:
    bias = module.bias_hh_l0.detach().to(torch.float64) if module.bias else None
    return module.weight_hh_l0.detach().to(torch.float64), bias


def _inputs(module: Any) -> Affine:
    bias = module.bias_ih_l0.detach().to(torch.float64) if module.bias else None
    return module.weight_ih_l0.detach().to(torch.float64), bias


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.T if bias is None else rows @ weight.T + bias


def _placed(whole: Affine, nodes: Tensor, columns: Tensor) -> Affine:
    """Return a recurrence with the given columns for the kept nodes, zero for the others, and the old constants."""
    weight = torch.zeros_like(whole[0])
    weight[:, nodes] = columns
    return weight, whole[1]


def _write(module: Any, recurrence: Affine) -> None:
    weight, bias = recurrence
    module.weight_hh_l0.copy_(weight)
    if bias is not None:
        module.bias_hh_l0.copy_(bias)
