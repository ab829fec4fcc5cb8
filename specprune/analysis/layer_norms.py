"""Norms of a traced chain network's layers as dense matrices, without ever writing the matrices down.

A convolution is a large sparse matrix on the whole feature map.  Its row and column norms come exactly from convolving
ones with squared kernels.  For its operator norm the strided convolution is written as a convolution of stride 1 (one
input channel for each phase of the stride), which is a sub-matrix of the circular convolution on a torus that holds
the map and the kernel; that one is block diagonal in the Fourier basis.  The largest block norm is a true upper bound,
as leaving out rows and columns (zero padding, borders) cannot raise a norm.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.bounds.norms import InputNorms, LayerNorms, layer_norms, unit_product
from specprune.bounds.occam import power_of_two_below
from specprune.compress.batches import CalibrationData, Forward, StopForward
from specprune.compress.layers import is_layer

# Maps with sigma(t z) = t sigma(z) for t > 0; a batch norm that `trace_chain` accepts is part of its layer.
_HOMOGENEOUS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d),
)
_HOMOGENEOUS_CALLS = (torch.relu, functional.relu, torch.flatten, functional.dropout, "relu", "flatten")
# Relative; the DFT of a kernel and an eigenvalue of a Gram matrix are off by about 1e-13 of the norm.
_ROUNDING = 1e-9
_CHUNK = 2**22


@dataclass(frozen=True)
class NetworkNorms:
    """What the norm bounds need to know of a network and its training inputs.

    Attributes:
        names: the layers' names, input side first.
        layers: their norms, with biases in homogeneous coordinates.
        inputs: norms of what the first layer reads for the training inputs.
        units: sum_j ||u_j|| ||v_j|| of a network of two layers without pooling between them; None for others.
    """

    names: tuple[str, ...]
    layers: tuple[LayerNorms, ...]
    inputs: InputNorms
    units: float | None


def measure_norms(
    model: nn.Module,
    train: Iterable[Any] | CalibrationData,
    *,
    reference: nn.Module | None = None,
    constant_exponent: int | None = None,
    forward: Forward | None = None,
) -> NetworkNorms:
    """Return the norms of a chain's layers and of its training inputs.

    Args:
        model: a chain network, see `trace_chain`; left as it is.
        train: the training set, all of it.
        reference: a network of the same shape that was fixed before the data, such as the initialisation (with the
            batch norm statistics that it then had); None measures the distances from zero.
        constant_exponent: k of the constant coordinate c = 2^k that biases are multiplied with; every k is valid, as
            the bounds pay for it.  None takes the largest 2^k up to a quarter of the inputs' root mean square norm,
            which lengthens them by 3% at most.  Networks without biases get no constant coordinate.
        forward: optional `forward(model, batch)`.

    Returns:
        The norms, ready for the functions of `specprune.bounds.norms_rademacher` and `norms_pac_bayes`.

    Raises:
        ValueError: the model is no chain with known Lipschitz constants, or the reference has other layers.
    """
    data = train if isinstance(train, CalibrationData) else CalibrationData(train, forward)
    layers = trace_chain(model, data)
    modules, homogeneous = dict(model.named_modules()), _homogeneous(model)
    starts: tuple[ChainLayer | None, ...] = (None,) * len(layers)
    if reference is not None:
        starts = trace_chain(reference, data)
        shapes, others = [layer.weight.shape for layer in layers], [start.weight.shape for start in starts if start]
        if shapes != others:
            raise ValueError(f"the reference's layers have weights of shapes {others}, the network's {shapes}")
    inputs = _input_norms(model, data, layers[0].name)
    biased = any(np.any(layer.bias) for layer in (*layers, *starts) if layer is not None)
    if biased:
        # A training set of zeros has no norm to go by.
        size = inputs.frobenius / math.sqrt(inputs.samples) / 4 or 1.0
        exponent = power_of_two_below(size) if constant_exponent is None else constant_exponent
        inputs = replace(inputs, constant_exponent=exponent)
    maps = _input_maps(model, data)
    found, dense = [], []
    for index, (layer, start) in enumerate(zip(layers, starts, strict=True)):
        matrix = LayerMatrix(layer.weight, modules[layer.name], maps[index])
        dense.append(matrix)
        pixels = matrix.positions_out
        moved = None if start is None else LayerMatrix(layer.weight - start.weight, modules[layer.name], maps[index])
        found.append(
            layer_norms(
                matrix.operator_norm(),
                np.sqrt(matrix.row_squares()),
                matrix.row_sums(),
                matrix.columns,
                bias=np.repeat(layer.bias, pixels),
                distances=None if moved is None else np.sqrt(moved.row_squares()),
                bias_distances=None if start is None else np.repeat(layer.bias - start.bias, pixels),
                constant=inputs.constant,
                last=index == len(layers) - 1,
                lipschitz=layer.lipschitz,
                elementwise=layer.elementwise,
                homogeneous=homogeneous[index],
            )
        )
    units = None
    if len(layers) == 2 and layers[0].elementwise:
        incoming, outgoing = dense[0].row_squares(), dense[1].column_squares()
        if inputs.constant:
            incoming += np.square(np.repeat(layers[0].bias, dense[0].positions_out) / inputs.constant)
            # The constant coordinate is one more unit: it reads itself and is weighed with the last layer's biases.
            last = math.sqrt(dense[1].positions_out) * float(np.linalg.norm(layers[1].bias)) / inputs.constant
            incoming, outgoing = np.append(incoming, 1.0), np.append(outgoing, last**2)
        units = unit_product(np.sqrt(incoming), np.sqrt(outgoing))
    return NetworkNorms(tuple(layer.name for layer in layers), tuple(found), inputs, units)


class LayerMatrix:
    """A Linear or Conv2d layer as the dense matrix that acts on its whole input, known by its kernels.

    Args:
        weight: (outputs, nodes, slots) as in `ChainLayer`, or any array of the module's weight shape.
        module: the layer, for its kernel size, stride, padding and dilation.
        shape: (channels, height, width) of the input of a convolution; ignored for Linear.
    """

    def __init__(self, weight: np.ndarray, module: nn.Module, shape: tuple[int, ...]) -> None:
        self.module, self.shape = module, tuple(shape)
        self.weight = torch.from_numpy(np.array(weight, dtype=np.float64)).reshape(module.get_parameter("weight").shape)
        self._map: tuple[int, int] = (1, 1)
        if isinstance(module, nn.Conv2d):
            height, width = self.apply(torch.ones(1, *self.shape, dtype=torch.float64)).shape[2:]
            self._map = (height, width)

    @property
    def positions_out(self) -> int:
        """Pixels of the output map, 1 for Linear."""
        return math.prod(self._map)

    @property
    def rows(self) -> int:
        """Rows of the dense matrix."""
        return len(self.weight) * self.positions_out

    @property
    def columns(self) -> int:
        """Columns of the dense matrix."""
        return math.prod(self.shape) if isinstance(self.module, nn.Conv2d) else self.weight.shape[1]

    def apply(self, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the layer's output without bias; `weight` replaces its own."""
        weight = self.weight if weight is None else weight
        module = self.module
        if isinstance(module, nn.Conv2d):
            return functional.conv2d(inputs, weight, None, module.stride, module.padding, module.dilation)
        return inputs @ weight.T

    def apply_transpose(self, outputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the transposed matrix times `outputs`; `weight` replaces the layer's own."""
        with torch.enable_grad():
            at = self._ones().requires_grad_()
            (result,) = torch.autograd.grad(self.apply(at, weight), at, outputs)
        return result

    def row_squares(self) -> np.ndarray:
        """Return the squared Euclidean norms of the rows, (rows,): ones convolved with squared kernels."""
        return self.apply(self._ones(), self.weight.square()).flatten().numpy()

    def row_sums(self) -> np.ndarray:
        """Return the l1 norms of the rows, (rows,)."""
        return self.apply(self._ones(), self.weight.abs()).flatten().numpy()

    def column_squares(self) -> np.ndarray:
        """Return the squared Euclidean norms of the columns, (columns,)."""
        ones = torch.ones_like(self.apply(self._ones()))
        return self.apply_transpose(ones, self.weight.square()).flatten().numpy()

    def operator_norm(self) -> float:
        """Return an upper bound on the largest singular value; for Linear layers its value, rounded up.

        Of a convolution the smallest of three: that on the torus (tight on large maps), sqrt(overlap) ||W||_2 with W
        the kernels as rows and overlap the most patches that a pixel is in (tight on maps of one pixel), and ||A||_F.
        """
        bound = float(np.linalg.norm(self.weight.flatten(1).numpy(), ord=2))
        if isinstance(self.module, nn.Conv2d):
            patches = self.apply_transpose(
                torch.ones(1, len(self.weight), *self._map, dtype=torch.float64), torch.ones_like(self.weight)
            )
            bound *= math.sqrt(float(patches.max()) / len(self.weight))
            (down, right), dilation = self.module.stride, self.module.dilation
            torus = convolution_norm(self.weight.numpy(), (down, right), (dilation[0], dilation[1]), self._map)
            bound = min(bound, torus, math.sqrt(float(self.row_squares().sum())))
        return bound * (1 + _ROUNDING)

    def operator_norm_below(self, iterations: int = 50, seed: int = 0) -> float:
        """Return a lower bound on the largest singular value by power iteration, to see how tight the upper one is.

        Args:
            iterations: how often the matrix and its transpose are applied.
            seed: of the random start.
        """
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(self._ones().shape, generator=generator, dtype=torch.float64)
        found = 0.0
        for _ in range(iterations):
            vector = vector / vector.norm()
            image = self.apply(vector)
            found = max(found, float(image.norm()))
            vector = self.apply_transpose(image)
            if not float(vector.norm()):
                break
        return found

    def _ones(self) -> Tensor:
        size = self.shape if isinstance(self.module, nn.Conv2d) else (self.weight.shape[1],)
        return torch.ones(1, *size, dtype=torch.float64)


def convolution_norm(
    weight: np.ndarray, stride: tuple[int, int], dilation: tuple[int, int], output_size: tuple[int, int]
) -> float:
    """Return the operator norm of the circular convolution that a strided convolution with any zero padding is part of.

    Args:
        weight: (outputs, channels, height, width) kernels.
        stride: along both axes.
        dilation: along both axes.
        output_size: (height, width) of the output map.

    Returns:
        max over frequencies of the norm of the (outputs, channels * phases) block, up to rounding.

    Source: Sedghi, Gupta and Long 2019 (arXiv:1805.10408) for circular convolutions; sub-matrix argument derived here.
    """
    outputs, channels = weight.shape[:2]
    extent = [dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
    # Pixel s * q + p of the input is pixel q of phase p, so offset s * a + p of the kernel is offset a of phase p.
    size = [math.ceil(extent[axis] / stride[axis]) for axis in (0, 1)]
    spread = np.zeros((outputs, channels, size[0] * stride[0], size[1] * stride[1]))
    spread[:, :, : extent[0] : dilation[0], : extent[1] : dilation[1]] = weight
    phases = spread.reshape(outputs, channels, size[0], stride[0], size[1], stride[1])
    kernels = phases.transpose(2, 4, 0, 1, 3, 5).reshape(size[0] * size[1], outputs, -1)
    kernels = kernels if outputs <= kernels.shape[2] else kernels.transpose(0, 2, 1)
    if not np.any(kernels):
        return 0.0
    scale = float(np.abs(kernels).max())
    period = [output_size[axis] + size[axis] - 1 for axis in (0, 1)]
    offsets = np.indices(size).reshape(2, -1)
    # The kernels are real, so frequency -f gives the conjugate block: half of the last axis is enough.
    frequencies = np.indices((period[0], period[1] // 2 + 1)).reshape(2, -1)
    angles = (frequencies[0, :, None] * offsets[0]) / period[0] + (frequencies[1, :, None] * offsets[1]) / period[1]
    waves = np.exp(-2j * np.pi * angles)
    flat, best = (kernels / scale).reshape(len(kernels), -1).astype(np.complex128), 0.0
    step = max(1, _CHUNK // flat.shape[1])
    for start in range(0, len(waves), step):
        blocks = (waves[start : start + step] @ flat).reshape(-1, *kernels.shape[1:])
        gram = blocks @ blocks.conj().transpose(0, 2, 1)
        square = gram @ gram
        # lambda_max^4 <= trace(G^4): most frequencies cannot hold the maximum and need no eigenvalues.
        ceilings = np.einsum("fij,fij->f", square, square.conj()).real ** 0.25
        for index in np.argsort(-ceilings):
            if ceilings[index] * (1 + _ROUNDING) < best:
                break
            best = max(best, float(np.linalg.eigvalsh(gram[index])[-1]))
    return scale * math.sqrt(best)


def _homogeneous(model: nn.Module) -> list[bool]:
    """Return for every layer whether all maps between it and the next are positively homogeneous."""
    work = copy.deepcopy(model).eval()
    modules = dict(work.named_modules())
    found: list[bool] = []
    for node in fx.symbolic_trace(work).graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_layer(module):
            found.append(True)
        elif found and node.op in ("call_module", "call_function", "call_method"):
            known = type(module) in _HOMOGENEOUS if module is not None else node.target in _HOMOGENEOUS_CALLS
            found[-1] = found[-1] and known
    return found


def _input_maps(model: nn.Module, data: CalibrationData) -> list[tuple[int, ...]]:
    """Return the shape of what every layer reads, in the order in which they run."""
    work = copy.deepcopy(model).eval()
    shapes: list[tuple[int, ...]] = []
    for module in work.modules():
        if is_layer(module):
            module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[1:])))
    with torch.no_grad():
        data.call(work, data.first())
    return shapes


def _input_norms(model: nn.Module, data: CalibrationData, first: str) -> InputNorms:
    """Return the norms of what the first layer reads; the maps before it are 1-Lipschitz, so ||x|| is no smaller."""
    work = copy.deepcopy(model).eval()
    count, largest, columns = 0, 0.0, torch.zeros(1, dtype=torch.float64)

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal count, largest, columns
        squares = args[0].detach().flatten(1).double().square().cpu()
        count += len(squares)
        largest = max(largest, float(squares.sum(dim=1).max()))
        columns = columns + squares.sum(dim=0)
        raise StopForward

    work.get_submodule(first).register_forward_pre_hook(stop)
    for batch in data.passes(model, "measuring inputs"):
        with contextlib.suppress(StopForward):
            data.call(work, batch)
    total, longest = float(columns.sum()), float(columns.max())
    return InputNorms(count, math.sqrt(total), math.sqrt(largest), math.sqrt(longest))
