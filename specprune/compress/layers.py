"""Linear and Conv2d layers as matrices: the rows they read, the columns they weigh, positions drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Linear | nn.Conv2d
LEVELS = ("channel", "patch")


def is_layer(module: nn.Module) -> bool:
    """Return whether the module is one that is read as a matrix here: Linear, or Conv2d with groups=1."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of all Linear and (ungrouped) Conv2d layers in the order of `named_modules`."""
    return [name for name, module in model.named_modules() if is_layer(module)]


def get_layer(model: nn.Module, name: str) -> Layer:
    """Return the layer called `name`.

    Raises:
        ValueError: there is no such module, or it is no Linear and no ungrouped Conv2d.
    """
    modules = dict(model.named_modules())
    if name not in modules or not is_layer(modules[name]):
        raise ValueError(f"no Linear or ungrouped Conv2d layer called {name!r}; the model has {layer_names(model)}")
    return modules[name]


def weight_matrix(layer: Layer) -> Tensor:
    """Return the weights as an (outputs, columns) matrix; columns run over (channel, kernel row, kernel column)."""
    return layer.weight.detach().flatten(1)


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
        height, width = output_size(layer, inputs)
        if height * width <= count:
            return cls(None)
        index = torch.randint(0, height * width, (len(inputs), count), generator=generator)
        return cls(index.to(inputs.device))


def output_size(layer: nn.Conv2d, inputs: Tensor) -> tuple[int, int]:
    """Return the height and width of the layer's output map for inputs of shape (n, channels, height, width)."""
    pad = layer._reversed_padding_repeated_twice
    sizes = []
    for axis in (0, 1):
        before, after = pad[2 * (1 - axis)], pad[2 * (1 - axis) + 1]
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        sizes.append((inputs.shape[2 + axis] + before + after - extent) // layer.stride[axis] + 1)
    return sizes[0], sizes[1]


def patch_rows(layer: Layer, inputs: Tensor, positions: Positions) -> Tensor:
    """Return what the layer multiplies its weight matrix with, one row for every output position.

    Args:
        layer: Linear or Conv2d.
        inputs: what the layer receives: (..., features) or (n, channels, height, width).
        positions: which output positions to keep.

    Returns:
        (rows, columns), so that `rows @ weight_matrix(layer).T + bias` are the layer's outputs there.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    if positions.index is None:
        patches = functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    count, channels, _, width = padded.shape
    column_count = output_size(layer, inputs)[1]
    top = positions.index // column_count * layer.stride[0]
    left = positions.index % column_count * layer.stride[1]
    down = torch.arange(layer.kernel_size[0], device=inputs.device) * layer.dilation[0]
    right = torch.arange(layer.kernel_size[1], device=inputs.device) * layer.dilation[1]
    offsets = (down[:, None] * width + right[None, :]).flatten()
    pixels = ((top * width + left)[:, :, None] + offsets).reshape(count, 1, -1).expand(-1, channels, -1)
    picked = torch.gather(padded.flatten(2), 2, pixels).reshape(count, channels, -1, len(offsets))
    return picked.transpose(1, 2).reshape(-1, channels * len(offsets))


def channel_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the layer's input nodes, one row for every sample (and pixel): (rows, channels or features)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
