"""Small networks and what is done to their numbers: every construction returns a network and the data for it.

Networks and data are built in float64 and rounded to the dtype at the end, so that one construction is the same
network in every dtype.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """Addition as a module, so that its inputs can be seen."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Residual(nn.Module):
    """A linear network with one shortcut; a batch norm closes the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lin1, self.lin2 = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 8, bias=False)
        self.norm, self.sum, self.relu, self.head = nn.BatchNorm1d(8), Sum(), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        return self.head(self.relu(self.sum(x, self.norm(self.lin2(self.relu(self.lin1(x)))))))


@dataclass(frozen=True)
class Net:
    """A network, its data, and what the twin must know of its structure.

    Args:
        model: the network, in evaluation mode.
        data: one tensor of inputs.
        producers: layer that makes each group, in order, to the batch norm behind it.
        consumers: layer to (batch norm that reads it directly, sum that closes a shortcut on it), in running order.
        widths: what to prune to.
    """

    model: nn.Module
    data: Tensor
    producers: dict[str, str | None]
    consumers: dict[str, tuple[str | None, str | None]]
    widths: dict[str, int]


def _randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator, dtype=torch.float64) + 0.5)
                module.running_mean.copy_(
                    torch.randn(module.weight.shape, generator=generator, dtype=torch.float64) * 0.3
                )
                module.running_var.copy_(
                    torch.rand(module.weight.shape, generator=generator, dtype=torch.float64) + 0.5
                )
            elif isinstance(module, nn.Linear | nn.Conv2d):
                fan = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.copy_(noise / fan**0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model.eval()


def make(kind: str, seed: int = 0, samples: int = 24) -> Net:
    """Return a float64 network of one kind with standard normal data: "mlp", "convnet" or "residual"."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            fc1=nn.Linear(6, 8), relu1=nn.ReLU(), fc2=nn.Linear(8, 7), relu2=nn.ReLU(), fc3=nn.Linear(7, 3)
        )
        model = _randomise(nn.Sequential(layers).double(), generator)
        data = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
        producers: dict[str, str | None] = {"fc1": None, "fc2": None}
        return Net(model, data, producers, {"fc2": (None, None), "fc3": (None, None)}, {"fc1": 4, "fc2": 4})
    if kind == "convnet":
        layers = OrderedDict(
            conv1=nn.Conv2d(2, 6, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(6),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 5, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(5),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(20, 3),
        )
        model = _randomise(nn.Sequential(layers).double(), generator)
        data = torch.randn(samples, 2, 4, 4, generator=generator, dtype=torch.float64)
        consumers: dict[str, tuple[str | None, str | None]] = {"conv2": ("norm2", None), "fc": (None, None)}
        return Net(model, data, {"conv1": "norm1", "conv2": "norm2"}, consumers, {"conv1": 3, "conv2": 3})
    model = _randomise(Residual().double(), generator)
    data = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return Net(
        model,
        data,
        {"stem": None, "lin1": None},
        {"lin1": (None, None), "lin2": ("norm", "sum"), "head": (None, None)},
        {"stem": 4, "lin1": 4},
    )


def _rows(net: Net, producer: str, gain: Callable[[int], float], shift: Callable[[int], float] | None = None) -> None:
    """Multiply the nodes of a producer, and set their constants if `shift` is given (through the batch norm)."""
    layer, norm = net.model.get_submodule(producer), net.producers[producer]
    weight = layer.weight if norm is None else net.model.get_submodule(norm).weight
    bias = layer.bias if norm is None else net.model.get_submodule(norm).bias
    for k in range(len(weight)):
        weight[k] *= gain(k)
        bias[k] = bias[k] * gain(k) if shift is None else shift(k)


def _columns(net: Net, producer: str, gain: Callable[[int], float]) -> None:
    """Multiply the weights that read the nodes of a chain's producer."""
    order = [*net.producers]
    reader = net.model.get_submodule([*net.consumers][order.index(producer)])
    slots = reader.weight.shape[1] // len(net.model.get_submodule(producer).weight)
    for k in range(reader.weight.shape[1]):
        reader.weight[:, k] *= gain(k // slots)


def _some(net: Net, gain: float, shift: Callable[[int], float]) -> Net:
    """Change the first three nodes of every group's producer."""
    for name in net.producers:
        layer, norm = net.model.get_submodule(name), net.producers[name]
        own = layer if norm is None else net.model.get_submodule(norm)
        for k in range(3):
            own.weight[k] *= gain
            own.bias[k] = shift(k)
    return net


def plain(net: Net) -> Net:
    return net


def dead(net: Net) -> Net:
    return _some(net, 0.0, lambda k: -1.0)


def all_dead(net: Net) -> Net:
    _rows(net, next(iter(net.producers)), lambda k: 0.0, lambda k: -1.0)
    return net


def constant(net: Net) -> Net:
    return _some(net, 0.0, lambda k: k + 1.0)


def all_constant(net: Net) -> Net:
    for name in net.producers:
        _rows(net, name, lambda k: 0.0, lambda k: k + 1.0)
    return net


def _copied(net: Net, factor: float) -> Net:
    for name, norm in net.producers.items():
        parts = [net.model.get_submodule(name)] + ([] if norm is None else [net.model.get_submodule(norm)])
        for part in parts:
            for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
                if tensor.dim():
                    scaled = norm is None or (part is parts[1] and key in ("weight", "bias"))
                    tensor[2:4] = tensor[:2] * (factor if scaled else 1.0)
    return net


def duplicate(net: Net) -> Net:
    return _copied(net, 1.0)


def collinear(net: Net) -> Net:
    return _copied(net, 2.0)


def one_sample(net: Net) -> Net:
    return Net(net.model, net.data[:1], net.producers, net.consumers, net.widths)


def few_samples(net: Net) -> Net:
    return Net(net.model, net.data[:3], net.producers, net.consumers, net.widths)


def _with_data(net: Net, data: Tensor) -> Net:
    return Net(net.model, data, net.producers, net.consumers, net.widths)


def rank_0(net: Net) -> Net:
    return _with_data(net, torch.zeros_like(net.data))


def rank_0_no_bias(net: Net) -> Net:
    for module in net.model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        if hasattr(module, "running_mean"):
            module.running_mean.zero_()
    return rank_0(net)


def rank_1(net: Net) -> Net:
    flat = net.data.flatten(1)
    return _with_data(net, (flat[:, :1] * flat[:1]).reshape(net.data.shape))


def decay(net: Net) -> Net:
    """Inputs whose spectrum falls over 12 orders, and nodes whose gains fall over 6."""
    flat = net.data.flatten(1)
    net = _with_data(net, (flat * torch.logspace(0, -6, flat.shape[1], dtype=torch.float64)).reshape(net.data.shape))
    first = next(iter(net.producers))
    _rows(net, first, lambda k: 10.0**-k)
    return net


def offset(net: Net) -> Net:
    """Nodes with a mean 10^4 times their spread: centring cancels most of what was summed."""
    for name in net.producers:
        _rows(net, name, lambda k: 1.0, lambda k: 1e4)
    return net


def scaled(factor: float) -> Callable[[Net], Net]:
    """Return a construction that scales all nodes of every group, and the weights that read them inversely."""

    def change(net: Net) -> Net:
        names = [*net.producers]
        if "sum" in dict(net.model.named_modules()):  # the shortcut: everything up to the head
            _rows(net, "stem", lambda k: factor)
            net.model.norm.weight.mul_(factor)
            net.model.norm.bias.mul_(factor)
            net.model.lin1.bias.mul_(1.0)
            net.model.lin1.weight.mul_(1 / factor)
            net.model.head.weight.mul_(1 / factor)
            return net
        for name in names:
            _rows(net, name, lambda k: factor)
            _columns(net, name, lambda k: 1 / factor)
        return net

    return change


def everything_scaled(factor: float) -> Callable[[Net], Net]:
    """Return a construction that scales the data and all constants, so that the outputs scale too."""

    def change(net: Net) -> Net:
        for module in net.model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.mul_(factor)
            if hasattr(module, "running_mean"):
                module.running_mean.mul_(factor)
        return _with_data(net, net.data * factor)

    return change


def mixed(orders: float) -> Callable[[Net], Net]:
    """Return a construction whose nodes range over 10^-orders .. 10^orders, read with inverse weights."""

    def change(net: Net) -> Net:
        name = next(iter(net.producers))
        width = len(net.model.get_submodule(name).weight)

        def gain(k: int) -> float:
            return 10.0 ** (orders * (2 * k / (width - 1) - 1))

        _rows(net, name, gain)
        if "sum" not in dict(net.model.named_modules()):
            _columns(net, name, lambda k: 1 / gain(k))
        else:
            for k in range(width):
                net.model.lin1.weight[:, k] /= gain(k)
                net.model.head.weight[:, k] /= gain(k)
                net.model.norm.weight[k] *= gain(k)
                net.model.norm.bias[k] *= gain(k)
        return net

    return change


def width_1(net: Net) -> Net:
    """Return a chain whose hidden layers have one node each; nothing can go."""
    if "fc1" in net.producers:
        layers = OrderedDict(fc1=nn.Linear(6, 1), relu1=nn.ReLU(), fc2=nn.Linear(1, 1), relu2=nn.ReLU())
        model = nn.Sequential(layers)
        model.add_module("fc3", nn.Linear(1, 3))
        model = model.double().eval()
        for p in model.parameters():
            p.fill_(0.5)
        return Net(model, net.data, net.producers, net.consumers, {"fc1": 1, "fc2": 1})
    name = next(iter(net.producers))
    return Net(net.model, net.data, net.producers, net.consumers, {**net.widths, name: 1})


def empty_layer(net: Net) -> Net:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of layers without elements
        layers = OrderedDict(fc1=nn.Linear(6, 0), relu1=nn.ReLU(), fc2=nn.Linear(0, 7), relu2=nn.ReLU())
        model = nn.Sequential(layers)
        model.add_module("fc3", nn.Linear(7, 3))
    model.fc2.bias.copy_(torch.arange(7.0) - 2)
    flat = net.data.flatten(1)[:, :6]
    consumers: dict[str, tuple[str | None, str | None]] = {"fc2": (None, None), "fc3": (None, None)}
    return Net(model.double().eval(), flat, {"fc1": None, "fc2": None}, consumers, {"fc2": 4})


def zero_outputs(net: Net) -> Net:
    """The last layer gives nothing but zeros."""
    last = net.model.get_submodule([*net.consumers][-1])
    last.weight.zero_()
    last.bias.zero_()
    return net


def _norms(net: Net) -> list[nn.Module]:
    return [m for m in net.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def zero_variance(net: Net) -> Net:
    """Batch norms whose running variance is 0 for two nodes: the gain is 1 / sqrt(eps)."""
    for norm in _norms(net):
        norm.running_var[:2] = 0
    return net


def zero_variance_no_eps(net: Net) -> Net:
    for norm in _norms(net):
        norm.running_var[:2] = 0
        norm.eps = 0.0
    return net


def mute_norm(net: Net) -> Net:
    """Batch norms whose gain is 0 for all nodes."""
    for norm in _norms(net):
        norm.weight.zero_()
    return net


def _spoiled_weight(value: float) -> Callable[[Net], Net]:
    def change(net: Net) -> Net:
        net.model.get_submodule(next(iter(net.consumers))).weight.flatten()[3] = value
        return net

    return change


def _spoiled_data(value: float) -> Callable[[Net], Net]:
    def change(net: Net) -> Net:
        net.data.flatten()[-1] = value
        return net

    return change


def negative_zero(net: Net) -> Net:
    """Zeros with a sign: in the data, in the weights, in a whole node."""
    net.data.flatten()[::3] = -0.0
    for name in net.producers:
        net.model.get_submodule(name).weight[0] = -0.0
    for name in net.consumers:
        net.model.get_submodule(name).weight.flatten(1)[:, 1] = -0.0
    return net


def subnormal(dtype: torch.dtype) -> Callable[[Net], Net]:
    """Return a construction whose first nodes are subnormal numbers of the dtype; nothing makes up for it."""

    def change(net: Net) -> Net:
        _rows(net, next(iter(net.producers)), lambda k: torch.finfo(dtype).tiny / 8 if k < 4 else 1.0)
        return net

    return change


CONSTRUCTIONS: dict[str, Callable[[Net], Net]] = {
    "plain": plain,
    "dead nodes": dead,
    "all dead": all_dead,
    "duplicate nodes": duplicate,
    "collinear nodes": collinear,
    "constant nodes": constant,
    "all constant": all_constant,
    "one sample": one_sample,
    "n < m": few_samples,
    "rank 0": rank_0,
    "rank 0, no constants": rank_0_no_bias,
    "rank 1": rank_1,
    "decay of 12 orders": decay,
    "offset 1e4": offset,
    **{f"nodes at {s:g}": scaled(s) for s in (1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e30)},
    **{f"all at {s:g}": everything_scaled(s) for s in (1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e30)},
    **{f"mixed 1e-{n}..1e{n}": mixed(n) for n in (3, 10, 30)},
    "width 1": width_1,
    "empty layer": empty_layer,
    "zero outputs": zero_outputs,
    "norm variance 0": zero_variance,
    "norm variance 0, eps 0": zero_variance_no_eps,
    "mute norms": mute_norm,
    "NaN weight": _spoiled_weight(float("nan")),
    "Inf weight": _spoiled_weight(float("inf")),
    "NaN data": _spoiled_data(float("nan")),
    "Inf data": _spoiled_data(float("inf")),
    "negative zeros": negative_zero,
    "subnormal nodes": plain,  # depends on the dtype, see `build`
}


@torch.no_grad()
def build(kind: str, construction: str, dtype: torch.dtype, seed: int = 0) -> Net:
    """Return a network of one kind with one construction, rounded to a dtype."""
    change = subnormal(dtype) if construction == "subnormal nodes" else CONSTRUCTIONS[construction]
    net = change(make(kind, seed))
    model = copy.deepcopy(net.model).to(dtype).eval()
    return Net(model, net.data.to(dtype), net.producers, net.consumers, net.widths)
