"""What layers see in a forward pass, and the shortcuts that are added to their outputs."""

import pytest
import torch
from helpers import tensor
from torch import nn

from specprune.compress import CalibrationData
from specprune.compress.capture import capture

X = tensor(5, 6)


class Block(nn.Module):
    """layer -> (norm) -> (activation) -> sum with a shortcut, in a way that `add` says."""

    def __init__(self, add, norm=False, between=None):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else nn.Identity()
        self.between, self.last = between or nn.Identity(), nn.Linear(6, 2)
        self.add = add

    def forward(self, x):
        return self.last(self.add(self.between(self.norm(self.layer(x))), torch.tanh(x)))


def in_place(a, b):
    a += b
    return a


def seen_of(model, layers=("layer",), **options):
    with torch.no_grad():
        return capture(model.eval(), list(layers), CalibrationData([X]), X, **options)


SUMS = {
    "left": lambda a, b: a + b,
    "right": lambda a, b: b + a,
    "function": lambda a, b: torch.add(a, b),
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
    "in place": in_place,
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("norm", [False, True])
def test_the_shortcut_is_what_is_added(name, norm):
    model = Block(SUMS[name], norm)
    norms = {"layer": "norm"} if norm else {}
    for options in ({"to_the_end": True}, {"closers": ["layer"]}):
        (entry,) = seen_of(model, norms=norms, **options).values()
        assert torch.equal(entry.inputs, X)
        assert torch.equal(entry.outputs, model.layer(X))  # as they were, whatever came after in place
        assert torch.equal(entry.shortcut, torch.tanh(X))


@pytest.mark.parametrize(
    "model",
    [
        Block(lambda a, b: a * b),
        Block(lambda a, b: a + 1.0),
        Block(lambda a, b: a + b[:1, :1]),
        Block(SUMS["left"], between=nn.ReLU()),
        Block(SUMS["left"], between=nn.ReLU(inplace=True)),  # the same tensor object, with other numbers
    ],
    ids=["product", "number", "other shape", "activation", "activation in place"],
)
def test_other_operations_are_no_shortcuts(model):
    (entry,) = seen_of(model, to_the_end=True).values()
    assert entry.shortcut is None
    assert torch.equal(entry.outputs, model.layer(X))


def test_the_run_ends_when_all_is_known_and_leaves_nothing():
    model = Block(SUMS["left"])
    ran = []
    model.last.register_forward_hook(lambda *_: ran.append(1))
    assert seen_of(model).keys() == {"layer"}
    seen_of(model, closers=["layer"])
    assert not ran
    seen_of(model, to_the_end=True)
    assert len(ran) == 1
    assert all(not module._forward_hooks for name, module in model.named_modules() if name != "last")
    both = seen_of(model, ["layer", "last"])
    with torch.no_grad():
        assert torch.equal(both["last"].inputs, model.layer(X) + torch.tanh(X))


def test_layers_that_do_not_run_are_named():
    model = Block(SUMS["left"])
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the layers \['unused'\] did not run on this batch"):
        seen_of(model, ["layer", "unused"])
    assert not model.unused._forward_hooks
