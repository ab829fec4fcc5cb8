"""Pruning end to end on small networks of many kinds: it runs, keeps its promises, and refuses what it cannot do."""

import pytest
import torch
from helpers import assert_unchanged, snapshot, tensor
from torch import nn
from torch.nn import functional

from specprune.compress import CalibrationData, count_flops, find_groups, prune
from specprune.compress.divergence import output_divergence
from specprune.compress.surgery import mask_nodes

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")


class Net(nn.Module):
    """A module from a function and named layers."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        return self.run(self, inputs)


def conv(inputs, outputs, size=3, stride=1, groups=1):
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.one, self.two = conv(inputs, outputs, 3, stride), conv(outputs, outputs)
        self.down = conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        return torch.relu(self.two(torch.relu(self.one(x))) + self.down(x))


class Bottleneck(nn.Module):
    def __init__(self, inputs, inner, outputs, stride, groups=1):
        super().__init__()
        self.one, self.two, self.three = (
            conv(inputs, inner, 1),
            conv(inner, inner, 3, stride, groups),
            conv(inner, outputs, 1),
        )
        self.down = conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        inner = torch.relu(self.two(torch.relu(self.one(x))))
        return torch.relu(self.three(inner).add_(self.down(x)))


class PreActivation(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))


class Dense(nn.Module):
    """Every layer reads the concatenation of all outputs before it."""

    def __init__(self, inputs, growth, count):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + k * growth), nn.ReLU(), nn.Conv2d(inputs + k * growth, growth, 3, padding=1)
            )
            for k in range(count)
        )

    def forward(self, x):
        for part in self.parts:
            x = torch.cat([x, part(x)], 1)
        return x


class Excite(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(2, 8), conv(8, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.last, self.out = conv(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        one = torch.relu(self.one(x))
        two = torch.relu(self.two(functional.max_pool2d(one, 2)))
        return self.out(torch.relu(self.last(torch.cat([one, self.up(two)], 1))))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.one, self.two = kind(5, 12, batch_first=True), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.two(torch.relu(self.one(self.rnn(x)[0])))


class Encoder(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.stem = nn.Linear(5, 16)
        options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, **options) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def stem(*blocks, width, classes=5):
    """Blocks between a first convolution, adaptive pooling and a linear layer."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(conv(2, 8), nn.ReLU(), *blocks, *head)


def read_twice(net, x):
    h = torch.relu(net.a(x))
    return net.b(h) + net.d(torch.tanh(net.c(h)))


IMAGES, VECTORS, TOKENS = (2, 8, 8), (6,), (7, 5)
NETWORKS = {
    "basic residual": (lambda: stem(Basic(8, 8, 1), Basic(8, 12, 2), width=12), IMAGES),
    "bottleneck": (lambda: stem(Bottleneck(8, 6, 16, 1), Bottleneck(16, 6, 16, 2), width=16), IMAGES),
    "pre-activation": (lambda: stem(PreActivation(8, 8), PreActivation(8, 10), width=8), IMAGES),
    "concatenation": (lambda: stem(Dense(8, 6, 3), nn.ReLU(), width=26), IMAGES),
    "depthwise separable": (
        lambda: stem(conv(8, 8, 3, 1, 8), nn.ReLU6(), conv(8, 12, 1), nn.ReLU6(), conv(12, 12, 3, 2, 12), width=12),
        IMAGES,
    ),
    "grouped": (lambda: stem(Bottleneck(8, 12, 12, 1, 3), width=12), IMAGES),
    "squeeze and excitation": (lambda: stem(conv(8, 12), Excite(12, 6), nn.ReLU(), conv(12, 8), width=8), IMAGES),
    "several consumers": (
        lambda: Net(read_twice, a=nn.Linear(6, 16), b=nn.Linear(16, 4), c=nn.Linear(16, 12), d=nn.Linear(12, 4)),
        VECTORS,
    ),
    "flattened": (
        lambda: nn.Sequential(
            conv(2, 8), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 12), nn.GELU(), nn.Linear(12, 5)
        ),
        IMAGES,
    ),
    "1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 10, 3),
            nn.BatchNorm1d(10),
            nn.ReLU(),
            nn.Conv1d(10, 8, 3, dilation=2),
            nn.ReLU(),
            nn.Conv1d(8, 3, 1),
        ),
        (2, 16),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 8, 3),
            nn.ReLU(),
            nn.Conv3d(8, 6, 2),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        (2, 5, 5, 5),
    ),
    "autoencoder": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(10, 8, 3, 2, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 2, 3, 2, 1, 1),
        ),
        IMAGES,
    ),
    "post-norm encoder": (lambda: Encoder(False), TOKENS),
    "pre-norm encoder": (lambda: Encoder(True), TOKENS),
    "rnn": (lambda: Recurrent(nn.RNN), TOKENS),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "u-net": (UNet, IMAGES),
}
KINDS = {"post-norm encoder": {"heads", "nodes"}, "pre-norm encoder": {"heads", "nodes"}} | {
    name: {"hidden", "nodes"} for name in ("rnn", "gru", "lstm")
}


def network(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():  # statistics of no special kind
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            generator = torch.Generator().manual_seed(1)
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 0.5 + 0.1)
    return model.eval(), [tensor(48, *shape, seed=seed) for seed in range(4)], tensor(100, *shape, seed=9)


@torch.no_grad()
def divergence(model, pruned, inputs):
    return float(output_divergence(model(inputs).double(), pruned.eval()(inputs).double()))


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_flops(name):
    model, data, fresh = network(name)
    before = snapshot(model)
    pruned = prune(model, data, 0.5)
    assert_unchanged(model, before)
    report = pruned.report
    assert report.flops_before == count_flops(model, CalibrationData(data))
    assert report.flops_after == count_flops(pruned.model, CalibrationData(data))
    assert 0.3 * report.flops_before < report.flops_after <= 0.5 * report.flops_before
    assert report.params_after == sum(parameter.numel() for parameter in pruned.model.parameters())
    assert {group.kind for group in pruned.groups} == KINDS.get(name, {"nodes"})
    widths = {row.group: row.width_after for row in report.groups}
    cut = prune(model, data, widths=widths, reconstruction="none").model
    plain = prune(model, data, widths=widths, reconstruction="none", selection="random").model
    found, unrefitted = divergence(model, pruned.model, fresh), divergence(model, cut, fresh)
    assert found < unrefitted
    assert found < divergence(model, plain, fresh)
    assert pruned.model.training == model.training


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_cut_is_what_is_masked(name):
    """Without a refit the pruned network is the original with masked nodes, on data that nothing was checked on."""
    model, data, fresh = network(name)
    pruned = prune(model, data, 0.6, allocation="uniform", selection="random", reconstruction="none", seed=3)
    structure = find_groups(model, CalibrationData(data))
    masked = structure.prepared(model)
    mask_nodes(masked, structure.groups, {key: nodes.indices for key, nodes in pruned.nodes.items()})
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(fresh), masked(fresh), rtol=1e-4, atol=1e-5)
        assert (masked(fresh) - model(fresh)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_full_widths_are_the_network_itself(name):
    model, data, fresh = network(name)
    groups = find_groups(model, CalibrationData(data)).groups
    pruned = prune(model, data, widths={group.name: group.width for group in groups})
    assert pruned.report.flops_after == pruned.report.flops_before
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(fresh), model(fresh), rtol=1e-5, atol=1e-6)


# Where half of the nodes are copies of the others, half of the nodes are enough.


def copy_halves(model, groups):
    """Make the second half of each group's units copies of the first half."""
    with torch.no_grad():
        for group in groups:
            half = group.width // 2
            for entry in (*group.producers, *group.carriers):
                module = model.get_submodule(entry.module)
                for key, value in module.state_dict().items():
                    if value.dim() == 0:
                        continue
                    rows = (
                        value.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) and key == "weight" else value
                    )
                    rows[entry.index[half : 2 * half].ravel()] = rows[entry.index[:half].ravel()]
    return model


@pytest.mark.parametrize(
    "name",
    [
        "basic residual",
        "bottleneck",
        "pre-activation",
        "depthwise separable",
        "several consumers",
        "flattened",
        "1d",
        "autoencoder",
        "u-net",
        "squeeze and excitation",
        "concatenation",
    ],
)
@pytest.mark.parametrize("reconstruction", ["sequential", "patch"])
def test_copies_are_removed_exactly(name, reconstruction):
    model, data, _ = network(name)
    model, data = model.double(), [batch.double() for batch in data]
    groups = find_groups(model, CalibrationData(data)).groups
    model = copy_halves(model, groups)
    widths = {group.name: group.width - group.width // 2 for group in groups}
    pruned = prune(model, data, widths=widths, reconstruction=reconstruction, ridge=1e-12, positions=None)
    assert {row.group: row.width_after for row in pruned.report.groups} == widths
    with torch.no_grad():  # on the same data: a node that is dead on them is rightly taken before a copy
        expected, fresh = model(data[0]), data[0]
        assert float((pruned.model(fresh) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


# Networks that hide something from the tracer: left whole with a reason, or an error; never another function.


def shuffle(net, x):
    x = torch.relu(net.a(x))
    x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return net.c(torch.relu(net.b(x))).mean((2, 3))


def fixed_view(net, x):
    return net.c(torch.relu(net.b(torch.relu(net.a(x)).view(-1, 512))))


def tied(net, x):
    h = torch.relu(net.a(x))
    return net.c(torch.relu(net.b(h))) + functional.linear(torch.relu(functional.linear(x, net.a.weight)), net.d)


def twice(net, x):
    h = torch.relu(net.a(x))
    return net.c(torch.relu(net.b(net.d(torch.relu(net.d(h))))))


def functional_weights(net, x):
    h = functional.linear(x, net.w)
    return net.c(torch.relu(net.b(torch.relu(net.a(torch.relu(h))))))


def without_gradients(net, x):
    with torch.no_grad():
        x = net.b(torch.relu(net.a(x)))
    return net.c(torch.relu(x))


def frozen():
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    net[2].weight.requires_grad_(False)
    return net


def linears(run, **more):
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3)}
    return Net(run, **{**layers, **more})


HARD = {
    "channel shuffle": (
        lambda: Net(shuffle, a=nn.Conv2d(2, 8, 3), b=nn.Conv2d(8, 6, 3), c=nn.Conv2d(6, 3, 1)),
        IMAGES,
        {"a": "mixes nodes|does not run"},
    ),
    "hard-coded view": (
        lambda: Net(fixed_view, a=nn.Conv2d(2, 8, 3, padding=1), b=nn.Linear(512, 8), c=nn.Linear(8, 3)),
        IMAGES,
        {"a": "does not run after removing"},
    ),
    "tied weights": (
        lambda: linears(tied, d=nn.Parameter(torch.randn(3, 8))),
        VECTORS,
        {"a": "used more than once"},
    ),
    "layer used twice": (
        lambda: linears(twice, d=nn.Linear(8, 8)),
        VECTORS,
        {"a": "'d' runs more than once"},
    ),
    "functional weights": (
        lambda: linears(functional_weights, a=nn.Linear(8, 8), w=nn.Parameter(torch.randn(8, 6))),
        VECTORS,
        {},
    ),
    "frozen": (frozen, VECTORS, {"0": "is frozen", "2": "is frozen"}),
    "no gradients": (lambda: linears(without_gradients), VECTORS, {"a": "not reached by tracing", "b": "not reached"}),
}


@pytest.mark.parametrize("name", HARD)
def test_what_is_hidden_is_left_whole(name):
    make, shape, reasons = HARD[name]
    torch.manual_seed(0)
    model, data, fresh = make().eval(), [tensor(48, *shape, seed=seed) for seed in range(2)], tensor(60, *shape, seed=9)
    try:
        structure = find_groups(model, CalibrationData(data))
    except ValueError as error:
        listed = str(error)
        assert all(f"{layer}: " in listed for layer in reasons)
        assert name == "no gradients"
        return
    skipped = {entry.name: entry.reason for entry in structure.skipped}
    for layer, reason in reasons.items():
        assert layer in skipped, skipped
        assert any(part in skipped[layer] for part in reason.split("|")), skipped[layer]
    assert not reasons.keys() & {entry.module for group in structure.groups for entry in group.producers}
    pruned = prune(model, data, 0.9, measure="nodes", allocation="uniform", reconstruction="none")
    masked = structure.prepared(model)
    mask_nodes(masked, structure.groups, {key: nodes.indices for key, nodes in pruned.nodes.items()})
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(fresh), masked(fresh), rtol=1e-4, atol=1e-5)
    refitted = prune(model, data, 0.9, measure="nodes", allocation="uniform")
    assert divergence(model, refitted.model, fresh) < 0.01
    if name == "frozen":
        assert torch.equal(refitted.model[2].weight, model[2].weight)
