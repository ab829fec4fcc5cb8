"""Linear and convolutional layers as matrices: the rows they read, the columns they weigh, positions drawn at random.

A layer is an affine map of one row for every output position.  A convolution's columns run over (channel, kernel
offset); a transposed convolution is the ordinary one over its inputs spread by the stride; a grouped one is several
independent maps, its blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | Convolution | Transposed
LEVELS = ("channel", "patch")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_layer(module: nn.Module) -> bool:
    """Return whether the module is one that the theorems speak of: Linear, or Conv2d with groups=1."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether the module is a convolution that treats every channel by itself, one output a channel."""
    if not isinstance(module, _CONVOLUTIONS) or type(module) not in _CONVOLUTIONS:
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def is_refittable(module: nn.Module) -> bool:
    """Return whether a consumer of this kind can be refitted: Linear, a convolution, a transposed one with groups=1."""
    if isinstance(module, _TRANSPOSED):
        return type(module) in _TRANSPOSED and module.groups == 1
    return type(module) is nn.Linear or (type(module) in _CONVOLUTIONS and not is_depthwise(module))


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of all layers that `get_layer` knows, in the order of `named_modules`."""
    return [name for name, module in model.named_modules() if is_refittable(module)]


def get_layer(model: nn.Module, name: str) -> Layer:
    """Return the layer called `name`.

    Raises:
        ValueError: there is no such module, or it is no Linear and no (not depthwise) convolution.
    """
    modules = dict(model.named_modules())
    if name not in modules or not is_refittable(modules[name]):
        raise ValueError(f"no Linear or convolution layer called {name!r}; the model has {layer_names(model)}")
    return modules[name]


def weight_matrix(layer: Layer) -> Tensor:
    """Return the weights as an (outputs, columns) matrix; columns run over (channel, kernel offset).

    The columns of a grouped convolution are those of one block, see `blocks`.
    """
    if isinstance(layer, _TRANSPOSED):
        spatial = tuple(range(2, layer.weight.dim()))
        return layer.weight.detach().transpose(0, 1).flip(spatial).flatten(1)
    return layer.weight.detach().flatten(1)


def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write an (outputs, columns) matrix, as `weight_matrix` returns it, into the layer."""
    weight = layer.weight
    with torch.no_grad():
        if isinstance(layer, _TRANSPOSED):
            shape = (weight.shape[1], weight.shape[0], *weight.shape[2:])
            weight.copy_(matrix.reshape(shape).flip(tuple(range(2, weight.dim()))).transpose(0, 1))
        else:
            weight.copy_(matrix.reshape(weight.shape))


def blocks(layer: Layer) -> list[tuple[slice, slice]]:
    """Return the independent parts of a layer as (outputs, columns of `patch_rows`); one, but for grouped ones."""
    count = 1 if isinstance(layer, nn.Linear) else layer.groups
    outputs, columns = weight_matrix(layer).shape
    size = outputs // count
    return [(slice(g * size, (g + 1) * size), slice(g * columns, (g + 1) * columns)) for g in range(count)]


def input_width(layer: Layer) -> int:
    """Return the number of the layer's input features or channels."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def kernel_columns(layer: Layer) -> int:
    """Return how many columns belong to one input feature or channel."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


@dataclass(frozen=True)
class Positions:
    """Output positions of a convolution: which ones each image contributes.

    Args:
        index: (images, positions) indices into the flattened output map, or None for all of them.
    """

    index: Tensor | None

    @classmethod
    def draw(cls, layer: Layer, inputs: Tensor, count: int | None, generator: torch.Generator) -> Positions:
        """Draw `count` positions an image with replacement; all of them if `count` is None or covers the map."""
        if isinstance(layer, nn.Linear) or count is None:
            return cls(None)
        total = math.prod(output_size(layer, inputs))
        if total <= count:
            return cls(None)
        index = torch.randint(0, total, (len(inputs), count), generator=generator)
        return cls(index.to(inputs.device))

    def rows(self, layer: Layer, outputs: Tensor) -> Tensor:
        """Return a tensor of the layer's output shape as one row for each of these positions: (rows, outputs)."""
        if isinstance(layer, nn.Linear):
            return _flat(outputs)
        flat = outputs.flatten(2)
        if self.index is not None:
            flat = torch.gather(flat, 2, self.index[:, None, :].expand(-1, flat.shape[1], -1))
        return flat.transpose(1, 2).reshape(-1, flat.shape[1])


def output_size(layer: Convolution | Transposed, inputs: Tensor) -> tuple[int, ...]:
    """Return the spatial size of the layer's output for inputs of shape (n, channels, *spatial)."""
    sizes = []
    for axis in range(inputs.dim() - 2):
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        length = inputs.shape[2 + axis]
        if isinstance(layer, _TRANSPOSED):
            bare = (length - 1) * layer.stride[axis] + extent
            sizes.append(bare - 2 * int(layer.padding[axis]) + layer.output_padding[axis])
        else:
            before, after = _paddings(layer)[axis]
            sizes.append((length + before + after - extent) // layer.stride[axis] + 1)
    return tuple(sizes)


def patch_rows(layer: Layer, inputs: Tensor, positions: Positions) -> Tensor:
    """Return what the layer multiplies its weight matrix with, one row for every output position.

    Args:
        layer: Linear or a convolution.
        inputs: what the layer receives: (..., features) or (n, channels, *spatial).
        positions: which output positions to keep.

    Returns:
        (rows, columns), so that `rows @ weight_matrix(layer).T + bias` are the layer's outputs there (block by block
        for a grouped convolution).
    """
    if isinstance(layer, nn.Linear):
        return _flat(inputs)
    padded, stride = _spread(layer, inputs) if isinstance(layer, _TRANSPOSED) else _padded(layer, inputs)
    spatial = len(stride)
    count, channels = padded.shape[:2]
    if positions.index is None:
        patches = padded
        for axis in range(spatial):
            extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            patches = patches.unfold(2 + axis, extent, stride[axis])
        for axis in range(spatial):  # keep every dilation-th entry of each window
            window = torch.arange(layer.kernel_size[axis], device=inputs.device) * layer.dilation[axis]
            if layer.dilation[axis] > 1:
                patches = patches.index_select(2 + spatial + axis, window)
        # (n, c, *out, *kernel) -> (n, *out, c, *kernel)
        order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        return patches.permute(order).reshape(-1, channels * kernel_columns(layer))
    size = output_size(layer, inputs)
    corner = torch.zeros_like(positions.index)
    offsets = torch.zeros((), dtype=torch.int64, device=inputs.device)
    rest = positions.index
    step = 1
    places = []
    for axis in reversed(range(spatial)):
        places.append((axis, rest % size[axis], step))
        rest = rest // size[axis]
        step *= padded.shape[2 + axis]
    for axis, place, step in places:
        corner = corner + place * stride[axis] * step
        window = torch.arange(layer.kernel_size[axis], device=inputs.device) * layer.dilation[axis] * step
        offsets = window.reshape(-1, *[1] * offsets.dim()) + offsets
    pixels = (corner[:, :, None] + offsets.flatten()).reshape(count, 1, -1).expand(-1, channels, -1)
    picked = torch.gather(padded.flatten(2), 2, pixels).reshape(count, channels, -1, offsets.numel())
    return picked.transpose(1, 2).reshape(-1, channels * offsets.numel())


def channel_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the layer's input nodes, one row for every sample (and pixel): (rows, channels or features)."""
    if isinstance(layer, nn.Linear):
        return _flat(inputs)
    return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])


def _flat(tensor: Tensor) -> Tensor:
    """Return the tensor as (rows, features); where there are no features, -1 would not tell the number of rows."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _paddings(layer: Convolution) -> list[tuple[int, int]]:
    pad = layer._reversed_padding_repeated_twice
    axes = len(layer.kernel_size)
    return [(pad[2 * (axes - 1 - axis)], pad[2 * (axes - 1 - axis) + 1]) for axis in range(axes)]


def _padded(layer: Convolution, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode), layer.stride


def _spread(layer: Transposed, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the inputs with stride - 1 zeros between pixels, padded so that an ordinary convolution follows."""
    spatial = inputs.dim() - 2
    sizes = [(inputs.shape[2 + axis] - 1) * layer.stride[axis] + 1 for axis in range(spatial)]
    spread = inputs.new_zeros((*inputs.shape[:2], *sizes))
    spread[(slice(None), slice(None), *(slice(None, None, layer.stride[axis]) for axis in range(spatial)))] = inputs
    pad: list[int] = []
    for axis in reversed(range(spatial)):
        before = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - int(layer.padding[axis])
        pad += [before, before + layer.output_padding[axis]]
    return functional.pad(spread, pad), (1,) * spatial
