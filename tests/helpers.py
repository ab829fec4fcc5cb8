"""Small networks and comparisons that several test files share."""

from collections import OrderedDict

import numpy as np
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from torch import nn


def tensor(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers from a seed of their own; the global random state stays as it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomise(model, seed=0):
    """Fill parameters and batch norm statistics with numbers of a seed, so that no entry is special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1 / max(1.0, parameter[0].numel() if parameter.dim() > 1 else 1.0) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def small_mlp(widths=(8, 12, 9, 3), seed=0):
    layers = OrderedDict()
    for k in range(1, len(widths)):
        layers[f"fc{k}"] = nn.Linear(widths[k - 1], widths[k])
        if k < len(widths) - 1:
            layers[f"relu{k}"] = nn.ReLU()
    return randomise(nn.Sequential(layers), seed)


def small_convnet(seed=0):
    """conv+BN, strided conv+BN, pooling, flatten with 4 pixels a channel, two linear layers; reads (n, 2, 8, 8)."""
    layers = OrderedDict(
        conv1=nn.Conv2d(2, 6, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(6),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False),
        norm2=nn.BatchNorm2d(5),
        relu2=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(20, 7),
        relu3=nn.ReLU(),
        fc2=nn.Linear(7, 3),
    )
    return randomise(nn.Sequential(layers), seed)


def snapshot(model):
    """Everything that may not change: tensors, gradients flags, modes, hooks."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, value in before[0].items():
        assert value.dtype == after[0][name].dtype
        assert torch.equal(value, after[0][name]), name


def random_covariance(size, seed=0, rank=None, decay=1.0):
    """A covariance with a power-law spectrum and no ties, of full rank unless asked otherwise."""
    generator = np.random.default_rng(seed)
    count = size if rank is None else rank
    basis = np.linalg.qr(generator.standard_normal((size, size)))[0][:, :count]
    return (basis * np.arange(1, count + 1) ** -decay) @ basis.T


def assert_series_differ_in_grey(ax):
    """No two labelled curves of an axes have the same line and the same marker, however they are coloured."""
    looks = {}
    for line, name in zip(*ax.get_legend_handles_labels(), strict=True):
        line = line[0] if isinstance(line, ErrorbarContainer) else line
        if isinstance(line, Line2D):
            dashes = line._unscaled_dash_pattern  # the dashes themselves: all tuples are called "--"
            face = line.get_markerfacecolor() if line.get_markerfacecolor() in ("white", "none") else "full"
            look = (line.get_linestyle() == "None", str(dashes), str(line.get_marker()), face)
            assert look not in looks, (name, looks[look])
            looks[look] = name
