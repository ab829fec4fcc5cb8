"""Hidden nodes of recurrent layers: taking them out, and what the others tell of them.

A hidden node of an RNN, GRU or LSTM is read by the layer itself one step later, in the columns of weight_hh, and by the
layers behind it.  Where all of these read zero weights, the node (its gates and its cell) can be cut out.

For h_t = sigma(W_h h_{t-1} + W_i x_t + b), f_t = W_o h_t, with S the time-mean second moment of h_t and kept nodes J,

    input loss      Tr Res(J)              output loss   Tr W_o Res(J) W_o^T
    recurrent loss  Tr W_h Res(J) W_h^T    W_h# = (W_h)_J A_J,   W_o# = W_o A_J,   A_J = S_FJ (S_JJ + I_tau)^-1

(the setting of arXiv:2105.10832).  Gated layers are treated in the same way, with the rows of all gates in W_h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune.bounds.nodes import WeightedNodes, residual_covariance
from specprune.compress.batches import CalibrationData
from specprune.compress.blocks import Item
from specprune.compress.capture import capture
from specprune.compress.moments import LayerMoments, over_processes
from specprune.compress.surgery import RECURRENT


def recurrent_fault(module: nn.Module) -> str:
    """Return why hidden nodes of a recurrent layer cannot be cut, or "" if they can."""
    if not isinstance(module, RECURRENT):
        return f"a {type(module).__name__} is no nn.RNN, nn.GRU or nn.LSTM"
    if module.num_layers > 1:
        return f"it has {module.num_layers} layers in one module; only single-layer modules are pruned, stack those"
    if module.bidirectional:
        return "it is bidirectional; only one direction is pruned"
    if module.proj_size:
        return f"it projects its hidden states (proj_size={module.proj_size})"
    return ""


@torch.no_grad()
def slice_recurrent(module: Any, rows: np.ndarray, columns: np.ndarray) -> None:
    """Take hidden nodes and input features out of a recurrent layer, in place.

    Args:
        module: a single-layer nn.RNN, nn.GRU or nn.LSTM, one direction, no projection.
        rows: hidden nodes to drop; each is one row of every gate, and one column of weight_hh.
        columns: input features to drop.

    Raises:
        ValueError: another kind of module, indices out of range, or nothing would be left.
    """
    fault = recurrent_fault(module)
    if fault:
        raise ValueError(f"cannot take nodes out of this {type(module).__name__}: {fault}")
    hidden, inputs = int(module.hidden_size), int(module.input_size)
    nodes, features = _left(hidden, rows, "hidden nodes"), _left(inputs, columns, "input features")
    gates = gate_rows(module, nodes)
    for name in list(module._flat_weights_names):
        tensor: Tensor = getattr(module, name)
        cut = tensor.detach().index_select(0, gates.to(tensor.device))
        if name.startswith("weight"):
            cut = cut.index_select(1, (nodes if name.startswith("weight_hh") else features).to(tensor.device))
        # Assigning keeps `_flat_weights`, which is what the layer computes with, in step.
        setattr(module, name, nn.Parameter(cut.contiguous(), requires_grad=tensor.requires_grad))
    module.hidden_size, module.input_size = len(nodes), len(features)
    module._init_flat_weights()


@torch.no_grad()
def zero_hidden(module: Any, nodes: np.ndarray) -> None:
    """Set to zero, in place, the weights with which a recurrent layer reads its own hidden nodes."""
    module.weight_hh_l0[:, torch.as_tensor(nodes)] = 0


def _left(size: int, drop: np.ndarray, what: str) -> Tensor:
    dropped = np.unique(np.asarray(drop, dtype=np.int64))
    if len(dropped) and (dropped[0] < 0 or dropped[-1] >= size or len(dropped) == size):
        raise ValueError(f"there are {size} {what}, 0..{size - 1}, of which one must stay; got to drop {list(drop)}")
    return torch.as_tensor(np.setdiff1d(np.arange(size), dropped))


def gate_rows(module: Any, nodes: Tensor) -> Tensor:
    """Return the rows of all gates that belong to some hidden nodes: gate by gate, as the layer stores them."""
    hidden = int(module.hidden_size)
    count = len(module.weight_hh_l0) // hidden
    return (torch.arange(count)[:, None] * hidden + nodes.cpu()).ravel()


@torch.no_grad()
def hidden_moments(model: nn.Module, name: str, data: CalibrationData) -> LayerMoments:
    """Return the moments of a recurrent layer's hidden states h_t over all samples and steps t = 1..T.

    Their `covariance()` is the time-mean second moment of the theory.  It also serves for the recurrence, which reads
    h_0 = 0, h_1, ..., h_{T-1}: that mean is never larger.

    Args:
        model: the network, in evaluation mode.
        name: of the recurrent layer.
        data: calibration data.

    Raises:
        ValueError: NaN or Inf in the hidden states.
    """
    total: LayerMoments | None = None
    for batch in data.passes(model, f"hidden states of {name}"):
        states = capture(model, [name], data, batch)[name].outputs[0]
        moments = LayerMoments.of(states.reshape(-1, states.shape[-1]))
        total = moments if total is None else total + moments
    layer: Any = model.get_submodule(name)
    total = over_processes(total, int(layer.hidden_size), layer.weight_hh_l0.device)
    if not bool(torch.isfinite(total.gram.diagonal()).all()):
        raise ValueError(f"NaN or Inf in the hidden states of {name!r}: check the data and the layers before it")
    return total


def recurrent_losses(
    covariance: np.ndarray, output_weight: np.ndarray, recurrent_weight: np.ndarray, nodes: WeightedNodes, lam: float
) -> tuple[float, float, float]:
    """Return what the kept nodes do not tell: of all nodes, of the readers' outputs, of the layer's own next step.

    All rows of the recurrent weight are counted, also those of nodes that go, since selection does not know them yet.

    Args:
        covariance: (m, m) time-mean second moment S of the hidden states.
        output_weight: (p, m) weights of the layers that read them, stacked.
        recurrent_weight: (g m, m) weight_hh, the rows of all gates.
        nodes: the kept nodes J with their weights omega; tau = lam / omega.
        lam: lambda > 0, in units of the covariance.

    Returns:
        The input, output and recurrent loss, each divided by its value where nothing is kept; 0 where that is 0.

    Raises:
        ValueError: shapes that do not match, or as `residual_covariance`.

    Source: arXiv:2105.10832 (spectral pruning for recurrent networks), normalised here.
    """
    gram, own = _checked(covariance, output_weight), _checked(covariance, recurrent_weight)
    residual = residual_covariance(covariance, nodes, lam)
    found = []
    for metric in (np.eye(len(residual)), gram, own):
        whole = float(np.sum(covariance * metric))
        found.append(max(0.0, float(np.sum(residual * metric))) / whole if whole > 0 else 0.0)
    return found[0], found[1], found[2]


def consumer_gram(covariance: np.ndarray, output_weight: np.ndarray, recurrent_weight: np.ndarray) -> np.ndarray:
    """Return the (m, m) matrix Z^T Z of both readers, each divided by the energy it reads, for `greedy_nodes`.

    Tr(Z Res Z^T) is then the sum of the normalised output and recurrent losses: both count the same.

    Args:
        covariance: (m, m) time-mean second moment of the hidden states.
        output_weight: (p, m) weights of the layers that read them, stacked.
        recurrent_weight: (g m, m) weight_hh, the rows of all gates.

    Raises:
        ValueError: shapes that do not match.
    """
    total = np.zeros_like(covariance, dtype=np.float64)
    for weight in (output_weight, recurrent_weight):
        gram = _checked(covariance, weight)
        energy = float(np.sum(covariance * gram))
        if energy > 0:
            total += gram / energy
    return total


def _checked(covariance: np.ndarray, weight: np.ndarray) -> np.ndarray:
    matrix = np.asarray(weight, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != len(covariance):
        raise ValueError(f"weights of shape {matrix.shape} cannot read {len(covariance)} nodes; expected (rows, nodes)")
    return matrix.T @ matrix


def recurrent_item(weight: Tensor, moments: LayerMoments, *, intercept: bool) -> Item:
    """Return how a recurrent layer reads hidden nodes, its own or another's, as selection sees it.

    Args:
        weight: (gate rows, nodes) weight_hh of the layer itself, or the columns of a reader's weight_ih.
        moments: of the nodes.
        intercept: whether the layer has a bias, so that constants are free.
    """
    gram = moments.about_mean() if intercept else moments.gram / moments.rows
    cross = gram @ weight.detach().to(gram).T
    energy = float((weight.detach().to(gram).T * cross).sum())
    return Item(gram, cross / energy**0.5 if energy > 0 else cross, np.arange(len(gram))[:, None])
