"""A chain network as the theory sees it: affine layers, and Lipschitz maps between them.

The trace (torch.fx) gives the order of operations; batch norms that follow a layer directly are folded into it
exactly.  Errors between layers are measured in the Euclidean norm of the whole feature map, so that every operation
between two layers has a known Lipschitz constant: elementwise activations, max pooling, average pooling, flattening.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from specprune.compress.batches import CalibrationData
from specprune.compress.layers import is_layer

# Lipschitz constants of elementwise activations that never decrease and map 0 to 0, as the theory asks.
_ACTIVATIONS: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Identity: 1.0,
    nn.Dropout: 1.0,
    nn.Dropout2d: 1.0,
    nn.Tanh: 1.0,
    nn.Hardtanh: 1.0,
    nn.Flatten: 1.0,
}
_FUNCTIONS: dict[Callable[..., Any], float] = {
    torch.relu: 1.0,
    functional.relu: 1.0,
    torch.tanh: 1.0,
    torch.flatten: 1.0,
    functional.dropout: 1.0,
}
_METHODS = {"relu": 1.0, "tanh": 1.0, "flatten": 1.0}


@dataclass(frozen=True)
class ChainLayer:
    """One affine layer of a chain, with what follows it up to the next one.

    Args:
        name: the layer's name in the model.
        weight: (outputs, nodes, slots) float64; slots are kernel offsets, or pixels of a flattened map.
        bias: (outputs,) float64.
        positions_in: pixels a node has where it enters the layer (1 for vectors and flattened maps: see `slots`).
        positions_out: pixels of the output map.
        overlap: how many patches an input pixel is in, at most.
        lipschitz: of everything between this layer and the next.
        elementwise: whether all of that acts on single numbers and never decreases (ReLU and the like).
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    positions_in: int
    positions_out: int
    overlap: int
    lipschitz: float
    elementwise: bool

    @property
    def slots(self) -> int:
        """Columns per node."""
        return self.weight.shape[2]


@torch.no_grad()
def trace_chain(model: nn.Module, data: CalibrationData) -> tuple[ChainLayer, ...]:
    """Return a model's affine layers in order, with batch norms folded in.

    Args:
        model: a chain of Linear, Conv2d, BatchNorm, activations, pooling, dropout and flattening; left as it is.
        data: calibration data; the first batch gives the sizes of the feature maps.

    Raises:
        ValueError: the model cannot be traced, branches, or has an operation whose Lipschitz constant is not known;
            the message names it.
    """
    work = copy.deepcopy(model).eval()
    shapes = _shapes(work, data)
    try:
        graph = fx.symbolic_trace(work).graph
    except Exception as error:  # torch.fx raises many kinds of exceptions for what it cannot trace
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}, so it is not known to be a chain: {error}"
        ) from error
    modules = dict(work.named_modules())
    layers: list[ChainLayer] = []
    previous: fx.Node | None = None
    foldable = False
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                raise ValueError("the network takes several inputs; only chains with one input are covered")
            previous = node
            continue
        tensors = [argument for argument in node.all_input_nodes if argument.op != "get_attr"]
        if tensors != [previous] or node.op == "get_attr":
            raise ValueError(f"the network is not a chain: {node.name!r} does not read just the operation before it")
        previous = node
        if node.op == "output":
            break
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_layer(module):
            layers.append(_layer(str(node.target), module, *shapes[str(node.target)]))
            foldable = True
            continue
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and layers and foldable:
            layers[-1] = _fold(layers[-1], module)
            continue
        foldable = False
        factor = _lipschitz(node, module, shapes)
        if layers:
            pooled = isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d)
            layers[-1] = replace(
                layers[-1],
                lipschitz=layers[-1].lipschitz * factor,
                elementwise=layers[-1].elementwise and not pooled,
            )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer")
    return tuple(layers)


def _shapes(work: nn.Module, data: CalibrationData) -> dict[str, tuple[torch.Size, torch.Size]]:
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    hooks = []
    for name, module in work.named_modules():
        if isinstance(module, nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.MaxPool2d) or is_layer(module):

            def record(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                shapes[name] = (args[0].shape, output.shape)

            hooks.append(module.register_forward_hook(record))
    data.call(work, data.first())
    for hook in hooks:
        hook.remove()
    return shapes


def _layer(name: str, module: nn.Module, inputs: torch.Size, outputs: torch.Size) -> ChainLayer:
    weight = module.get_parameter("weight").detach().to(torch.float64).cpu()
    bias = module.bias
    shift = bias.detach().to(torch.float64).cpu().numpy() if isinstance(bias, Tensor) else np.zeros(len(weight))
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ValueError(f"layer {name!r} pads with {module.padding_mode!r}; only zero padding is covered")
        overlap = 1
        for axis in (0, 1):
            size, stride = module.kernel_size[axis], module.stride[axis]
            overlap *= size if module.dilation[axis] > 1 else math.ceil(size / stride)
        matrix = weight.flatten(2).numpy()
        return ChainLayer(name, matrix, shift, inputs[2] * inputs[3], outputs[2] * outputs[3], overlap, 1.0, True)
    if len(inputs) != 2:
        raise ValueError(f"layer {name!r} reads inputs of shape {tuple(inputs)}; expected (samples, features)")
    return ChainLayer(name, weight.numpy()[:, :, None], shift, 1, 1, 1, 1.0, True)


def _fold(layer: ChainLayer, norm: nn.Module) -> ChainLayer:
    """Return the layer with a batch norm in evaluation mode multiplied in."""
    mean, variance = (norm.get_buffer(key).to(torch.float64).cpu().numpy() for key in ("running_mean", "running_var"))
    scale = 1.0 / np.sqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    offset = np.zeros_like(scale)
    if norm.weight is not None:
        scale = scale * norm.get_parameter("weight").detach().to(torch.float64).cpu().numpy()
        offset = norm.get_parameter("bias").detach().to(torch.float64).cpu().numpy()
    weight = layer.weight * scale[:, None, None]
    bias = (layer.bias - mean) * scale + offset
    return replace(layer, weight=weight, bias=bias)


def _lipschitz(node: fx.Node, module: nn.Module | None, shapes: Mapping[str, tuple[torch.Size, torch.Size]]) -> float:
    """Return the Lipschitz constant of one operation between feature maps, in the Euclidean norm of the whole map."""
    if module is not None:
        if type(module) in _ACTIVATIONS:
            return _ACTIVATIONS[type(module)]
        if isinstance(module, nn.LeakyReLU):
            return max(1.0, abs(module.negative_slope))
        if isinstance(module, nn.ELU):
            return max(1.0, module.alpha)
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            return _pool_constant(module)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            before, after = shapes[str(node.target)]
            windows = [before[axis] / after[axis] for axis in (2, 3)]
            if all(float(window).is_integer() for window in windows):
                return 1.0 / math.sqrt(windows[0] * windows[1])
            raise ValueError(f"{node.target!r}: adaptive pooling with unequal windows is not covered")
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target]
    elif node.op == "call_method" and node.target in _METHODS:
        return _METHODS[str(node.target)]
    what = type(module).__name__ if module is not None else str(node.target)
    raise ValueError(
        f"the Lipschitz constant of {node.name!r} ({what}) is not known here; the theory covers "
        f"{sorted(kind.__name__ for kind in _ACTIVATIONS)}, LeakyReLU, ELU, max and average pooling, and batch norm "
        "right behind a layer"
    )


def _pool_constant(module: nn.MaxPool2d | nn.AvgPool2d) -> float:
    def pair(value: Any) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    kernel, stride = pair(module.kernel_size), pair(module.stride if module.stride is not None else module.kernel_size)
    overlap = math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))
    if isinstance(module, nn.MaxPool2d):
        return math.sqrt(overlap)
    return math.sqrt(overlap / math.prod(kernel))
