"""Networks of many widths trained at once, pruned to one width, and retrained."""

import copy
import importlib
import json

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specprune.analysis.network_descent import (
    _PRUNING,
    COLUMNS,
    _network,
    _pruned,
    network_descent,
    train_together,
)

module = importlib.import_module("specprune.analysis.network_descent")


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    targets = (inputs[:, :2].sum(1) > 0).long() + (inputs[:, 2] > 0.5).long()
    return inputs, targets


def trained_alone(network, inputs, targets, steps):
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(inputs) - F.one_hot(targets, 3)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network


def test_training_together_is_training_alone():
    inputs, targets = data(40, 0)
    inputs = inputs.double()
    networks = [_network(6, 5, 3, seed).double() for seed in range(3)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    together = train_together(networks, inputs, targets, steps=50)
    for network, state, found in zip(networks, before, together, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name])
        alone = trained_alone(network, inputs, targets, 50)
        for one, other in zip(found.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_sweep():
    train, test = data(80, 1), data(200, 2)
    state = torch.get_rng_state()
    found = network_descent(*train, *test, keep=3, widths=(12, 30), seeds=(0, 1), steps=150)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.widths == (3, 12, 30)
    assert set(found.test_errors) == set(found.test_losses) == set(COLUMNS)
    # Nothing is pruned from the smallest ones.
    assert found.test_errors["spectral"][0] == found.test_errors["unpruned"][0]
    # The refit, without labels, keeps what cutting by size loses.
    for row in (1, 2):
        assert sum(found.test_losses["spectral"][row]) < sum(found.test_losses["magnitude"][row])
        assert sum(found.test_losses["magnitude_retrained"][row]) < sum(found.test_losses["magnitude"][row])
    assert found.train_errors[2][0] < found.train_errors[0][0]
    records = found.to_records()
    assert len(records) == 6
    assert json.loads(found.to_json())["networks"] == records
    assert "pruned to 3 hidden nodes" in str(found)
    for loss in (False, True):
        ax = found.plot(loss=loss)
        assert len(ax.get_legend().get_texts()) == len(COLUMNS) + 1
        assert found.plot(ax, loss=loss) is ax
        plt.close(ax.figure)


def test_magnitude_leaves_the_kept_nodes_as_they_are():
    inputs, _ = data(60, 3)
    network = _network(6, 8, 3, 0)
    kept = {name: _pruned(network, inputs, 3, 8, settings) for name, settings in _PRUNING.items()}
    columns = network[2].weight.T
    for name, pruned in kept.items():
        same = [any(torch.equal(column, old) for old in columns) for column in pruned[2].weight.T]
        assert all(same) == (name == "magnitude")


def test_retraining_is_slower(monkeypatch):
    shares = []
    real = module.train_together

    def watched(networks, inputs, targets, *, steps, share=1.0):
        shares.append(share)
        return real(networks, inputs, targets, steps=steps, share=share)

    monkeypatch.setattr(module, "train_together", watched)
    network_descent(*data(20, 1), *data(20, 2), keep=2, widths=(4,), seeds=(0,), steps=2)
    assert shares == [1.0, 1.0, module._RETRAINING, module._RETRAINING]
    assert module._RETRAINING < 0.5


def test_refusals():
    train, test = data(20, 1), data(20, 2)
    with pytest.raises(ValueError, match="finite, of shapes"):
        network_descent(*train, test[0][:, :4], test[1], keep=3, widths=(5,))
    for widths, seeds in (((), (0,)), ((3,), (0,)), ((5,), ())):
        with pytest.raises(ValueError, match="widths above 3"):
            network_descent(*train, *test, keep=3, widths=widths, seeds=seeds)
    broken = train[0].clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="train inputs and targets must be finite"):
        network_descent(broken, train[1], *test, keep=3, widths=(5,))
    with pytest.raises(ValueError, match="test inputs and targets must be finite, of shapes"):
        network_descent(*train, test[0], test[1][:5], keep=3, widths=(5,))
    with pytest.raises(ValueError, match="not empty"):
        network_descent(*train, test[0][:0], test[1][:0], keep=3, widths=(5,))
    with pytest.raises(ValueError, match="int64 class numbers"):
        network_descent(*train, test[0], test[1] - 1, keep=3, widths=(5,))
    with pytest.raises(ValueError, match="different seeds"):
        network_descent(*train, *test, keep=3, widths=(5,), seeds=(1, 1))
    with pytest.raises(ValueError, match="share"):
        train_together([nn.Linear(6, 3)], *train, steps=1, share=0.0)
