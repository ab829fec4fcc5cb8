"""Networks of many widths trained at once, pruned to one width, and retrained."""

import copy
import json

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specprune.analysis.network_descent import COLUMNS, _network, network_descent, train_together


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


def test_refusals():
    train, test = data(20, 1), data(20, 2)
    for widths, seeds in (((), (0,)), ((3,), (0,)), ((5,), ())):
        with pytest.raises(ValueError, match="widths above 3"):
            network_descent(*train, *test, keep=3, widths=widths, seeds=seeds)
    broken = train[0].clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="train inputs and targets must be finite"):
        network_descent(broken, train[1], *test, keep=3, widths=(5,))
    with pytest.raises(ValueError, match="test inputs and targets must be finite, of shapes"):
        network_descent(*train, test[0], test[1][:5], keep=3, widths=(5,))
    with pytest.raises(ValueError, match="share"):
        train_together([nn.Linear(6, 3)], *train, steps=1, share=0.0)
