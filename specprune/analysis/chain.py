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

# Operations on single numbers that never decrease, map 0 to 0 and have Lipschitz constant 1.
_PLAIN = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Tanh, nn.Flatten)
_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.relu, functional.relu, torch.tanh, torch.flatten)
_METHODS = ("relu", "tanh", "flatten")
_AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


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
        identity: whether all of that only reshapes.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    positions_in: int
    positions_out: int
    overlap: int
    lipschitz: float
    elementwise: bool
    identity: bool = False

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
        factor, elementwise = _lipschitz(node, module, shapes)
        if layers:
            layers[-1] = replace(
                layers[-1],
                lipschitz=layers[-1].lipschitz * factor,
                elementwise=layers[-1].elementwise and elementwise,
                identity=layers[-1].identity and _reshapes(node, module),
            )
        elif factor > 1:
            raise ValueError(f"{node.name!r} may enlarge the inputs before the first layer, which is not covered")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer")
    return tuple(layers)


def _shapes(work: nn.Module, data: CalibrationData) -> dict[str, tuple[torch.Size, torch.Size]]:
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    outputs: list[Any] = []
    hooks = [work.register_forward_hook(lambda _, __, output: outputs.append(output))]
    for name, module in work.named_modules():
        if isinstance(module, _AVERAGES) or is_layer(module):

            def record(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                shapes[name] = (args[0].shape, output.shape)

            hooks.append(module.register_forward_hook(record))
    result = data.call(work, data.first())
    for hook in hooks:
        hook.remove()
    if len(outputs) != 1 or not all(isinstance(o, Tensor) for o in (result, *outputs)) or not result.equal(outputs[0]):
        raise ValueError("forward(model, batch) must return the model's own output, which is what the bounds are about")
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
            overlap *= _overlap(module.kernel_size[axis], module.stride[axis], module.dilation[axis])
        matrix = weight.flatten(2).numpy()
        return ChainLayer(name, matrix, shift, inputs[2] * inputs[3], outputs[2] * outputs[3], overlap, 1.0, True, True)
    if len(inputs) != 2:
        raise ValueError(f"layer {name!r} reads inputs of shape {tuple(inputs)}; expected (samples, features)")
    return ChainLayer(name, weight.numpy()[:, :, None], shift, 1, 1, 1, 1.0, True, True)


def _fold(layer: ChainLayer, norm: nn.Module) -> ChainLayer:
    """Return the layer with a batch norm in evaluation mode multiplied in."""

    def read(key: str, default: float) -> np.ndarray:
        value = getattr(norm, key)
        return np.full(len(layer.bias), default) if value is None else value.detach().to(torch.float64).cpu().numpy()

    if norm.running_mean is None:
        raise ValueError(f"the batch norm behind {layer.name!r} has no running statistics, so it is not an affine map")
    mean, variance = read("running_mean", 0.0), read("running_var", 1.0)
    scale = read("weight", 1.0) / np.sqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    offset = read("bias", 0.0)
    weight = layer.weight * scale[:, None, None]
    bias = (layer.bias - mean) * scale + offset
    return replace(layer, weight=weight, bias=bias)


def _lipschitz(
    node: fx.Node, module: nn.Module | None, shapes: Mapping[str, tuple[torch.Size, torch.Size]]
) -> tuple[float, bool]:
    """Return the Lipschitz constant of one operation, and whether it acts on single numbers and never decreases.

    Distances are Euclidean over the whole feature map; every operation that is covered maps 0 to 0.
    """
    kind = type(module)
    if kind in _PLAIN:
        return 1.0, True
    if isinstance(module, nn.Hardtanh) and module.min_val <= 0 <= module.max_val:
        return 1.0, True
    if isinstance(module, nn.LeakyReLU | nn.ELU):
        slope = float(module.negative_slope if isinstance(module, nn.LeakyReLU) else module.alpha)
        return max(1.0, abs(slope)), slope >= 0
    if isinstance(module, nn.MaxPool2d):
        return _max_pool_constant(module), False
    if isinstance(module, _AVERAGES):
        return _average_constant(module, shapes[str(node.target)][0]), False
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return 1.0, True
    if node.target is functional.dropout and not (node.args[2:3] or (node.kwargs.get("training", True),))[0]:
        return 1.0, True
    if node.op == "call_method" and node.target in _METHODS:
        return 1.0, True
    raise ValueError(
        f"the Lipschitz constant of {node.name!r} ({kind.__name__ if module is not None else node.target}) is not "
        f"known here; the theory covers {sorted(plain.__name__ for plain in _PLAIN)}, LeakyReLU, ELU, Hardtanh around "
        "0, max and average pooling, and batch norm right behind a layer"
    )


def _reshapes(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether an operation that is covered leaves every number as it is, in evaluation mode."""
    if module is not None:
        return isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.Flatten)
    return node.target in (torch.flatten, functional.dropout, "flatten")


def _overlap(size: int, stride: int, dilation: int) -> int:
    """Return how many windows a pixel is in, at most, along one axis."""
    # Offset j of the window meets a given pixel only if j * dilation has the right remainder modulo the stride.
    return math.ceil(size * math.gcd(stride, dilation) / stride)


def _max_pool_constant(module: nn.MaxPool2d) -> float:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    stride = module.kernel_size if module.stride is None else module.stride
    axes = zip(pair(module.kernel_size), pair(stride), pair(module.dilation), strict=True)
    return math.sqrt(math.prod(_overlap(*axis) for axis in axes))


def _average_constant(module: nn.Module, shape: torch.Size) -> float:
    """Return sqrt(largest row sum * largest column sum), which bounds a linear map's operator norm (Schur's test)."""
    with torch.enable_grad():
        ones = torch.ones(1, 1, *shape[2:], dtype=torch.float64, requires_grad=True)
        averages = module(ones)
        (columns,) = torch.autograd.grad(averages.sum(), ones)
    return math.sqrt(float(averages.detach().abs().max()) * float(columns.abs().max()))
