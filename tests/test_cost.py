"""The cost model against counted FLOPs and parameters of networks that are really pruned."""

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, small_convnet, small_mlp, snapshot, tensor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from specprune.compress import CalibrationData, count_flops, count_params, find_groups, remove_nodes
from specprune.compress.cost import CostModel, CostTerm, cost_model, module_flops
from specprune.testbed import vgg

FLAT, IMAGES = tensor(5, 8), tensor(5, 2, 8, 8)


class Loose(nn.Module):
    """Products outside of modules, nested modules, and a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        self.unused = nn.Linear(100, 100)
        self.register_buffer("table", torch.ones(4, 7))

    def forward(self, x):
        return self.body(x) @ self.table


NETWORKS = {
    "mlp": (small_mlp, FLAT),
    "convnet": (small_convnet, IMAGES),
    "vgg": (lambda: randomise(vgg((4, 6, 5, 7), 3, 2)), IMAGES),
    "loose": (Loose, FLAT),
}


def counted(model, batch):
    """FLOPs of one sample in PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(batch)
    return counter.get_total_flops() / len(batch)


def test_a_multiply_add_is_two_flops():
    linear = nn.Linear(7, 5)
    assert count_flops(linear, CalibrationData([tensor(3, 7)])) == 2 * 7 * 5
    conv = nn.Conv2d(2, 3, (3, 2), stride=2, padding=1)
    height, width = (8 + 2 - 3) // 2 + 1, (8 + 2 - 2) // 2 + 1
    assert count_flops(conv, CalibrationData([IMAGES])) == 2 * (2 * 3 * 2) * 3 * height * width
    free = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2), nn.MaxPool2d(2))
    assert count_flops(free, CalibrationData([IMAGES])) == 0


def test_parameters_by_hand():
    assert count_params(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))) == 7 * 5 + 5 + 2 * 5
    assert count_params(nn.Conv2d(2, 3, (3, 2), bias=False)) == 2 * 3 * 6


def test_flops_are_given_to_the_module_that_does_them():
    model = Loose()
    before = snapshot(model)
    flops = module_flops(model, CalibrationData([FLAT]))
    assert flops == {"": 2 * 4 * 7, "body.0": 2 * 8 * 6, "body.2": 2 * 6 * 4}
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_the_model_of_cost_is_exact_at_every_width(name, seed):
    make, batch = NETWORKS[name]
    model = make()
    data = CalibrationData([batch])
    groups = find_groups(model, data).groups
    generator = np.random.default_rng(seed)
    keep = {g.name: generator.permutation(g.width)[: generator.integers(1, g.width + 1)] for g in groups}
    small = remove_nodes(model, groups, keep)
    widths = {group: len(nodes) for group, nodes in keep.items()}
    truth = {
        "flops": (counted(model, batch), counted(small, batch)),
        "params": (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in small.parameters())),
        "nodes": (sum(g.width for g in groups), sum(widths.values())),
    }
    for measure, (full, pruned) in truth.items():
        cost = cost_model(model, data, groups, measure)
        assert cost.total() == pytest.approx(full, rel=1e-13), measure
        assert cost.total(widths) == pytest.approx(pruned, rel=1e-13), measure
        assert round(cost.total(widths)) == pruned
    assert (count_flops(model, data), count_flops(small, data)) == truth["flops"]
    assert (count_params(model), count_params(small)) == truth["params"]


def test_flops_of_one_sample_do_not_depend_on_the_batch():
    model = small_convnet()
    assert count_flops(model, CalibrationData([IMAGES])) == count_flops(model, CalibrationData([IMAGES[:1]]))


def test_terms_grow_with_both_ends():
    cost = CostModel(
        {"a": 10, "b": 4},
        (
            CostTerm(8.0, (("a", 1.0),), (("b", 1.0),)),
            CostTerm(2.0, (), (("a", 1.0),)),
            CostTerm(3.0, (("b", 1.0),), ()),
            CostTerm(16.0, (("a", 0.25), ("b", 0.5)), (("a", 1.0),)),  # a concatenation: a quarter is not pruned
            CostTerm(1.0),
        ),
    )
    assert cost.total() == 30
    concatenated = 16 * (1 - 0.25 * 0.5 - 0.5 * 0.75) * 0.5
    assert cost.total({"a": 5, "b": 1}) == 8 * 0.5 * 0.25 + 2 * 0.5 + 3 * 0.25 + concatenated + 1


def test_unknown_measures_are_refused():
    data = CalibrationData([FLAT])
    model = small_mlp()
    with pytest.raises(ValueError, match=r"measure='time': expected one of \('flops', 'params', 'nodes'\)"):
        cost_model(model, data, find_groups(model, data).groups, "time")
