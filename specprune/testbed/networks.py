"""The networks of the experiments: plain PyTorch modules, whose layers have names and come in forward order."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_FORMS = (
    '"mlp-300-1000-300", "vgg", "vgg-24-24-48-48", "resnet" or "resnet-16-32-64", with widths of your choice; or '
    '"vgg16", "resnet20", "resnet56"'
)
_VGG_CHANNELS = (24, 24, 48, 48, 96, 96)
_RESNET_WIDTHS = (16, 32, 64)
_VGG16_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_VGG16_POOLS = (2, 4, 7, 10)
_RESNET_BLOCKS = {"resnet20": 3, "resnet56": 9}  # depth 6 n + 2


class ImageTask(Protocol):
    """Anything that says what a network takes and gives: a `Dataset`, or a `TaskShape`."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""

    @property
    def classes(self) -> int:
        """Number of classes."""


@dataclass(frozen=True)
class TaskShape:
    """The sizes of an image classification task, without its data.

    Attributes:
        input_shape: (channels, height, width) of an image.
        classes: number of classes.
    """

    input_shape: tuple[int, int, int]
    classes: int


def _check_sizes(label: str, sizes: Sequence[int], least: int) -> None:
    if len(sizes) < least or any(size < 1 for size in sizes):
        raise ValueError(f"{label} {tuple(sizes)}: expected at least {least} numbers, each at least 1")


def mlp(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a fully connected network: flatten, then linear layers with an activation between them.

    Args:
        widths: input size, hidden widths, number of classes; (784, 300, 1000, 300, 10) has four linear layers.
        activation: the class of the activation, made without arguments.

    Returns:
        Children flatten, fc1, relu1, fc2, ... (after the activation's name); from (n, ...) to (n, widths[-1]).

    Raises:
        ValueError: fewer than two widths, or one below 1.
    """
    _check_sizes("widths", widths, 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    last = len(widths) - 1
    for k in range(1, last + 1):
        layers[f"fc{k}"] = nn.Linear(widths[k - 1], widths[k])
        if k < last:
            layers[f"{activation.__name__.lower()}{k}"] = activation()
    return nn.Sequential(layers)


def vgg(
    channels: Sequence[int] = _VGG_CHANNELS,
    classes: int = 10,
    in_channels: int = 1,
    pools: Sequence[int] | None = None,
) -> nn.Sequential:
    """Return a plain convolutional network in the manner of VGG, with batch normalization.

    Every 3x3 convolution is followed by normalization and ReLU; after every second one, but not after the last,
    2x2 max-pooling halves the image. The mean over the remaining pixels goes to one linear layer.

    Args:
        channels: output channels of the convolutions in turn.
        classes: number of outputs.
        in_channels: channels of the images.
        pools: the convolutions, counted from 1, that pooling follows; every second one but the last by default.

    Returns:
        Children conv1, norm1, relu1, conv2, ..., pool1, ..., average, flatten, fc1; from (n, in_channels, h, w)
        to (n, classes), for any h and w of at least 2 to the number of poolings.

    Raises:
        ValueError: there are no channels, or a size is below 1.

    Source:
        K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
    """
    _check_sizes("channels", channels, 1)
    _check_sizes("classes and in_channels", (classes, in_channels), 2)
    places = list(range(2, len(channels), 2) if pools is None else pools)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    for k, width in enumerate(channels, start=1):
        layers[f"conv{k}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
        layers[f"norm{k}"] = nn.BatchNorm2d(width)
        layers[f"relu{k}"] = nn.ReLU()
        if k in places:
            layers[f"pool{places.index(k) + 1}"] = nn.MaxPool2d(2)
        before = width
    layers.update(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc1=nn.Linear(before, classes))
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two normalized 3x3 convolutions around which the input is added, then ReLU.

    Where the shape changes, the input passes a 1x1 convolution and normalization first.

    Args:
        before: input channels.
        width: output channels.
        stride: of the first convolution; 2 halves the image.

    Source:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016, figure 2.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(before, width, 1, stride=stride, bias=False), norm=nn.BatchNorm2d(width))
            )
        self.relu2 = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride), rounded up."""
        inner = self.relu1(self.norm1(self.conv1(inputs)))
        return self.relu2(self.norm2(self.conv2(inner)) + self.shortcut(inputs))


def resnet(
    widths: Sequence[int] = _RESNET_WIDTHS, blocks: int = 2, classes: int = 10, in_channels: int = 1
) -> nn.Sequential:
    """Return a small residual network for small images: stages of basic blocks, each stage at half the resolution.

    Args:
        widths: channels of the stages.
        blocks: basic blocks a stage.
        classes: number of outputs.
        in_channels: channels of the images.

    Returns:
        Children conv1, norm1, relu1, block1_1, block1_2, ..., average, flatten, fc1; from (n, in_channels, h, w) to
        (n, classes).

    Raises:
        ValueError: there are no widths, or a size is below 1.

    Source:
        K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2,
        with convolutional shortcuts (option B) where the shape changes.
    """
    _check_sizes("widths", widths, 1)
    _check_sizes("blocks, classes and in_channels", (blocks, classes, in_channels), 3)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(widths[0]),
        relu1=nn.ReLU(),
    )
    before = widths[0]
    for stage, width in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            layers[f"block{stage}_{block}"] = BasicBlock(before, width, 2 if block == 1 and stage > 1 else 1)
            before = width
    layers.update(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc1=nn.Linear(before, classes))
    return nn.Sequential(layers)


def build_network(name: str, dataset: ImageTask, seed: int = 0) -> nn.Sequential:
    """Return a new network by name, with input and output sizes from the data; the global random state is kept.

    Args:
        name: "mlp-300-1000-300", "vgg", "vgg-24-24-48-48", "resnet" or "resnet-16-32-64", with any widths; or "vgg16"
            (with batch normalization and one linear layer), "resnet20", "resnet56" (He et al., section 4.2).
        dataset: a `Dataset`, or a `TaskShape`.
        seed: of the initial weights.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        ValueError: the name has another form, or the images are too small for the network's poolings.
    """
    family, *numbers = name.split("-")
    channels, height, width = dataset.input_shape
    if name in ("vgg16", *_RESNET_BLOCKS):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if name == "vgg16":
                return vgg(_VGG16_CHANNELS, dataset.classes, channels, _VGG16_POOLS)
            return resnet(_RESNET_WIDTHS, _RESNET_BLOCKS[name], dataset.classes, channels)
    if family not in ("mlp", "vgg", "resnet") or not all(n.isascii() and n.isdigit() for n in numbers):
        raise ValueError(f"unknown network {name!r}; expected {_FORMS}")
    widths = tuple(int(number) for number in numbers)
    if (family == "mlp" and not widths) or 0 in widths:
        raise ValueError(f"network {name!r} needs widths of at least 1; expected {_FORMS}")
    # `torch.manual_seed` would also reseed every accelerator; the weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if family == "mlp":
            return mlp((math.prod(dataset.input_shape), *widths, dataset.classes))
        if family == "resnet":
            return resnet(widths or _RESNET_WIDTHS, classes=dataset.classes, in_channels=channels)
        used = widths or _VGG_CHANNELS
        poolings = (len(used) - 1) // 2
        if min(height, width) < 2**poolings:
            raise ValueError(
                f"network {name!r} halves the image {poolings} times, too often for {height}x{width} pixels; "
                f"give it fewer convolutions"
            )
        return vgg(used, dataset.classes, channels)
