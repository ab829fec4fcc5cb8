"""What a review found by trying to break pruning: each once gave a wrong network, a wrong cost or a bare error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from specprune import load_pruned, prune, prune_sweep, save_pruned
from specprune.compress import CalibrationData, count_flops, count_params, find_groups
from specprune.compress.cost import cost_model


class Normalised(nn.Module):
    """Normalising the hidden nodes mixes them, and does nothing to samples that are blank."""

    def __init__(self, normalise):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 3, bias=False)
        self.normalise = normalise

    def forward(self, x):
        return self.b(self.normalise(torch.relu(self.a(x))))


@pytest.mark.parametrize("normalise", [functional.normalize, lambda h: functional.layer_norm(h, h.shape[1:])])
def test_blank_samples_do_not_blind_the_check(normalise):
    torch.manual_seed(0)
    x = torch.cat([torch.zeros(2, 8), torch.randn(50, 8), torch.zeros(2, 8)])
    with pytest.raises(ValueError, match="nothing can be pruned"):
        find_groups(Normalised(normalise), CalibrationData([x]))


def test_a_hook_that_changes_a_reader_is_seen_and_one_that_looks_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    x, seen = torch.randn(64, 6), []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert len(prune(model, [x], 0.5).groups) == 2
    model[4].register_forward_hook(lambda module, args, output: 3 * output)
    structure = find_groups(model, CalibrationData([x]))
    assert [group.name for group in structure.groups] == ["0"]
    assert "forward hook of '4' changes its outputs" in structure.skipped[0].reason


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(1, 6, 3, 2, 1), nn.ConvTranspose2d(6, 2, 3, 2, 1)

    def forward(self, x):
        return self.up(torch.relu(self.a(x)), output_size=x.shape[2:])


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.m, self.b = nn.Linear(6, 8), nn.Linear(8, 5, dtype=torch.cfloat), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(self.m(torch.relu(self.a(x)).cfloat()).abs())


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [(Upsampling(), (4, 1, 8, 8), "called with more than its input"), (Complex(), (20, 6), "is complex")],
)
def test_what_cannot_be_refitted_is_left_whole(model, shape, reason):
    with pytest.raises(ValueError, match=reason):
        find_groups(model, CalibrationData([torch.randn(shape)]))


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.a2, self.b, self.b2 = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(6, 12), nn.Linear(12, 8)
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        first = self.norm(self.a2(torch.relu(self.a(x))))
        return self.out(torch.relu(first) + torch.relu(self.norm(self.b2(torch.relu(self.b(x))))))


def test_a_batch_norm_behind_two_layers_stays_as_it_is():
    torch.manual_seed(0)
    model, x = SharedNorm().eval(), torch.randn(200, 6)
    pruned = prune(model, [x], 0.6)
    assert {group.name for group in pruned.groups} == {"a", "b"}
    torch.testing.assert_close(pruned.model.norm.running_mean, model.norm.running_mean, rtol=0, atol=0)
    with torch.no_grad():
        assert (pruned.model(x) - model(x)).square().mean() < 0.1 * model(x).var()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", [Recurrent(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))])
def test_gradient_modes_of_the_caller(model, mode):
    x = torch.randn(20, 5, 4) if isinstance(model, Recurrent) else torch.randn(20, 4)
    wanted = prune(copy.deepcopy(model), [x], 0.6, seed=1).model
    with mode():
        found = prune(copy.deepcopy(model), [x], 0.6, seed=1).model
    torch.testing.assert_close(dict(found.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)
    found(x).sum().backward()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_attention_is_counted_and_draws_nothing():
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(3, 64, 8)
    products = 2 * 2 * 64 * 64 * 8
    layers = 2 * 64 * (4 * 8 * 8 + 8 * 2)
    assert count_flops(model, CalibrationData([x])) == products + layers
    state = torch.get_rng_state()
    pruned = prune(model, [x], 0.6)
    assert torch.equal(torch.get_rng_state(), state)
    assert pruned.report.flops_after <= 0.6 * (products + layers)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(self.embed(x)))))


def test_tied_tensors_cost_once():
    model, data = Tied(), CalibrationData([torch.randint(0, 40, (30,))])
    structure = find_groups(model, data)
    assert cost_model(model, data, structure.groups, "params").total() == count_params(model)


def test_frozen_parameters_come_back_frozen_and_other_state_is_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.c.weight.requires_grad_(False)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    pruned = prune(Net(), [torch.randn(30, 4)], 0.7)
    save_pruned(pruned, tmp_path / "net.npz")
    assert not load_pruned(tmp_path / "net.npz", Net).c.weight.requires_grad
    Net.get_extra_state = lambda self: {"note": 1}
    Net.set_extra_state = lambda self, state: None
    with pytest.raises(ValueError, match="only tensors can be saved"):
        save_pruned(prune(Net(), [torch.randn(30, 4)], 0.7), tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "0.5"}, "keep='0.5'"),
        ({"keep": True}, "keep=True"),
        ({"keep": 0.5, "lam": "a"}, "lam='a'"),
        ({"keep": 0.5, "seed": None}, "seed=None"),
        ({"keep": 0.5, "seed": -1}, "seed=-1"),
        ({"keep": 0.5, "positions": 2.5}, "positions=2.5"),
        ({"widths": [3]}, r"widths=\[3\]"),
        ({"widths": {"0": True}}, "True"),
        ({"keep": 0.5, "moments": 3}, "moments is a int"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(options, message):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises((TypeError, ValueError), match=message):
        prune(model, [torch.randn(20, 4)], **options)


def test_budgets_of_a_sweep_are_a_list():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 4)
    with pytest.raises(TypeError, match=r"keeps=0\.5"):
        prune_sweep(model, [x], 0.5)
    with pytest.raises(TypeError, match="takes its budgets from keeps"):
        prune_sweep(model, [x], [0.5], keep=0.3)


def test_compiled_networks_are_refused_with_what_to_do():
    model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), backend="eager")
    with pytest.raises(ValueError, match="_orig_mod"):
        prune(model, [torch.randn(20, 4)], 0.5)
