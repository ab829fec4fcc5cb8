"""Cover complexity and smoothness: dense twins, invariances, exactness at duplicates, memory, refusals."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from specprune.analysis.cover_complexity import (
    class_distances,
    cover_complexity,
    cover_from_distances,
    smoothness,
)
from specprune.testbed.datasets import load_dataset

module = sys.modules[class_distances.__module__]  # the package exports its function by the same name


def clusters(count, seed, classes=3, dimension=5, spread=0.2):
    """Points of the unit cube around one corner a class, and their labels, every class present."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(classes, size=count - classes)])
    corners = np.random.default_rng(99).random((classes, dimension))
    points = np.clip(corners[labels] + spread * generator.standard_normal((count, dimension)), 0, 1)
    return torch.from_numpy(points), torch.from_numpy(labels)


def dense_twin(train, train_labels, test, test_labels):
    """The paper's covers by numerical integration of h, one pair of classes at a time."""
    train, test = train.numpy().astype(float), test.numpy().astype(float)
    dimension = train.shape[1]
    radii = np.linspace(0, 1, 20001)

    def cover(points, covered):
        apart = np.sqrt(((covered[:, None] - points[None]) ** 2).sum(axis=2)).min(axis=1)
        share = (apart[:, None] <= math.sqrt(dimension) * radii).mean(axis=0)
        return trapezoid(share, radii)

    classes = sorted(set(train_labels.tolist()))
    pairs = np.array([[cover(train[train_labels == i], test[test_labels == j]) for j in classes] for i in classes])
    count = len(classes)
    total, own = cover(train, test), np.trace(pairs) / count
    other = (pairs.sum() - np.trace(pairs)) / (count * (count - 1))
    return total, own, other, (1 - total) / (own - other)


def test_agrees_with_covers_integrated_over_the_radius():
    data = (*clusters(40, 0), *clusters(30, 1))
    found = cover_complexity(*data)
    total, own, other, expected = dense_twin(*data)
    assert found.unit_box
    assert found.total_cover == pytest.approx(total, abs=1e-4)
    assert found.self_cover == pytest.approx(own, abs=1e-4)
    assert found.mutual_cover == pytest.approx(other, abs=1e-4)
    assert found.cover_difference == pytest.approx(own - other, abs=1e-4)
    assert found.cover_complexity == pytest.approx(expected, rel=2e-3)


def test_a_case_by_hand():
    train, test = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.25], [1.0, 0.5], [0.5, 0.0]])
    found = cover_complexity(train, torch.tensor([4, 7]), test, torch.tensor([4, 7, 7]))
    root = math.sqrt(1.0625)
    expected = [[0.25, (math.sqrt(1.25) + 0.5) / 2], [root, 0.5]]  # row: whose training point; column: whose test point
    np.testing.assert_allclose(found.distances, expected, rtol=1e-15)
    np.testing.assert_allclose(found.nearest, [0.25, 0.5, 0.5], rtol=1e-15)
    assert found.classes.tolist() == [4, 7]
    mutual = (expected[0][1] + root) / 2
    assert found.cover_complexity == pytest.approx((1.25 / 3) / (mutual - 0.375), rel=1e-14)
    assert found.total_cover == pytest.approx(1 - 1.25 / 3 / math.sqrt(2))
    assert [found.uncovered(radius) for radius in (0.2, 0.25, 0.4, 0.6)] == pytest.approx([1, 1, 2 / 3, 0])


@pytest.mark.parametrize("block", [1, 7, 32, 1024])
def test_blocks_do_not_change_the_distances(block, monkeypatch):
    data = (*clusters(45, 2, dimension=6), *clusters(38, 3, dimension=6))
    whole = cover_complexity(*data)
    monkeypatch.setattr(module, "_BLOCK", block)
    found = cover_complexity(*data)
    assert torch.equal(found.nearest, whole.nearest)
    assert torch.equal(found.distances, whole.distances)
    apart = (data[2][:, None] - data[0][None]).square().sum(2).sqrt()
    np.testing.assert_allclose(found.nearest, apart.min(1).values, rtol=1e-14)


def test_distances_of_nested_training_sets_and_of_fewer_classes_are_at_hand_after_one_pass():
    (train, labels), (test, test_labels) = clusters(60, 23, classes=4), clusters(41, 24, classes=4)
    classes = torch.arange(4)
    apart = (test[:, None] - train[None]).norm(dim=2)
    nearest = torch.full((41, 4), math.inf, dtype=torch.float64)
    for start, stop in ((0, 7), (7, 30), (30, 60)):
        part = class_distances(train[start:stop], labels[start:stop], test, classes)
        nearest = torch.minimum(nearest, part)
        dense = torch.stack([apart[:, :stop].where(labels[:stop] == k, math.inf).amin(1) for k in range(4)], dim=1)
        np.testing.assert_allclose(nearest, dense, rtol=1e-13)
        whole = cover_complexity(train[:stop], labels[:stop], test, test_labels)
        found = cover_from_distances(nearest, test_labels, classes, stop, 5, unit_box=True)
        assert json.loads(found.to_json()) == json.loads(whole.to_json())
        assert torch.equal(found.nearest, whole.nearest)
    few, few_test = labels < 2, test_labels < 2
    whole = cover_complexity(train[few], labels[few], test[few_test], test_labels[few_test])
    found = cover_from_distances(
        nearest[few_test][:, :2], test_labels[few_test], classes[:2], int(few.sum()), 5, unit_box=True
    )
    # Another centre of the products may round a distance differently, no more.
    np.testing.assert_allclose(found.distances, whole.distances, rtol=1e-14)
    assert found.cover_complexity == pytest.approx(whole.cover_complexity, rel=1e-13)


def test_distances_that_do_not_fit_are_refused():
    (train, labels), (test, test_labels) = clusters(20, 25), clusters(10, 26)
    classes = torch.arange(3)
    missing = class_distances(train[labels < 2], labels[labels < 2], test, classes)
    assert torch.all(missing[:, 2] == math.inf)
    assert torch.all(missing[:, :2].isfinite())
    whole = class_distances(train, labels, test, classes)
    for found, targets, message in (
        (missing, test_labels, "expected a finite number for each test point and class"),
        (whole[1:], test_labels, "for 10 test points and 3 classes"),
        (whole, test_labels.clamp(max=1), r"labels \[0, 1\]; expected all of \[0, 1, 2\]"),
        (0 * whole, test_labels, "one and the same point"),
    ):
        with pytest.raises(ValueError, match=message):
            cover_from_distances(found, targets, classes, 20, 5, unit_box=True)
    with pytest.raises(ValueError, match="at least two classes"):
        cover_from_distances(whole[:, :1], 0 * test_labels, classes[:1], 20, 5, unit_box=True)
    with pytest.raises(ValueError, match="same inner shape"):
        class_distances(train[:, :4], labels, test, classes)
    with pytest.raises(ValueError, match="test inputs: got"):
        class_distances(train, labels, test[:0], classes)


def test_order_scale_rotation_shift_and_label_names_do_not_matter():
    train, train_labels, test, test_labels = (*clusters(50, 4), *clusters(40, 5))
    found = cover_complexity(train, train_labels, test, test_labels).cover_complexity
    one, two = torch.randperm(50, generator=torch.Generator().manual_seed(0)), torch.arange(39, -1, -1)
    again = cover_complexity(train[one], train_labels[one], test[two], test_labels[two])
    assert again.cover_complexity == pytest.approx(found, rel=1e-13)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0])
    for change in (lambda x: 255 * x, lambda x: x @ turn, lambda x: x - 3, lambda x: x.reshape(-1, 5, 1)):
        changed = cover_complexity(change(train), train_labels, change(test), test_labels)
        assert changed.cover_complexity == pytest.approx(found, rel=1e-9)
    names = torch.tensor([30, -2, 11])
    renamed = cover_complexity(train, names[train_labels], test, names[test_labels])
    assert renamed.cover_complexity == pytest.approx(found)


def test_outside_the_unit_box_there_are_distances_but_no_covers():
    train, train_labels = clusters(30, 6)
    found = cover_complexity(2 * train, train_labels, 2 * train[:20] + 0.1, train_labels[:20])
    assert not found.unit_box
    assert found.total_cover is found.self_cover is found.mutual_cover is found.cover_difference is None
    assert 0 < found.cover_complexity < math.inf
    assert "total_cover" in str(found)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distances_of_equal_and_almost_equal_points_are_exact(offset):
    """A matrix product alone would return about 1e-4 or 1e-8 for both, far from the origin even noise."""
    generator = torch.Generator().manual_seed(7)
    train = torch.rand(200, 60, generator=generator, dtype=torch.float64) + offset
    train = torch.cat([train, train[:100], train[:50]])
    test = train[:100].clone()
    test[50:, 0] += 2.0**-30
    labels = torch.arange(350) % 2
    found = cover_complexity(train, labels, test, torch.arange(100) % 2)
    assert torch.all(found.nearest[:50] == 0)
    assert torch.all(found.nearest[50:] == (test[50:, 0] - train[50:100, 0]).abs())
    assert 0 < float(found.nearest[50]) < 1e-8


def test_the_nearest_of_points_that_the_product_cannot_tell_apart_is_found():
    """Distances of 1e-7 and more at norms of 1e4: rounding in the product is a million times their squares."""
    generator = torch.Generator().manual_seed(22)
    base = 1e3 * torch.randn(20, 50, generator=generator, dtype=torch.float64)
    apart = 1e-7 * (1 + torch.rand(20, 30, 1, generator=generator, dtype=torch.float64))
    step = torch.randn(20, 30, 50, generator=generator, dtype=torch.float64)
    train = (base[:, None] + apart * step / step.norm(dim=2, keepdim=True)).flatten(0, 1)
    found = cover_complexity(train, torch.arange(600) % 2, base, torch.arange(20) % 2)
    np.testing.assert_allclose(found.nearest, (base[:, None] - train[None]).norm(dim=2).min(1).values, rtol=1e-12)


def test_duplicates_and_single_points_of_a_class_are_fine():
    train, train_labels, test, test_labels = (*clusters(30, 8), *clusters(25, 9))
    found = cover_complexity(train, train_labels, test, test_labels)
    twice = cover_complexity(train.repeat(2, 1), train_labels.repeat(2), test, test_labels)
    assert torch.equal(found.distances, twice.distances)
    single = cover_complexity(train[:3], train_labels[:3], test[:3], test_labels[:3])
    assert 0 < single.cover_complexity < math.inf


def test_classes_that_no_distance_tells_apart_are_infinitely_hard():
    points, _ = clusters(40, 10)
    train, test = points[:20], points[20:]
    mixed = torch.arange(20) % 2
    # Each class has the same training points, so own and other class are equally near.
    found = cover_complexity(train.repeat(2, 1), torch.arange(40) // 20, test, mixed)
    assert found.self_distance == pytest.approx(found.mutual_distance)
    swapped = cover_complexity(train, mixed, train, 1 - mixed)
    assert swapped.cover_complexity == math.inf
    assert json.loads(swapped.to_json())["cover_complexity"] == "inf"
    memorised = cover_complexity(train, mixed, train, mixed)
    assert memorised.cover_complexity == 0


def test_harder_digits_have_a_higher_cover_complexity():
    digits = load_dataset("digits")
    labels = digits.train_targets, digits.test_targets

    def value(share, noise):
        generator = torch.Generator().manual_seed(0)
        count = int(share * len(labels[0]))
        inputs = [
            x + noise * torch.randn(x.shape, generator=generator) for x in (digits.train_inputs, digits.test_inputs)
        ]
        return cover_complexity(inputs[0][:count], labels[0][:count], inputs[1], labels[1]).cover_complexity

    plain = value(1, 0)
    assert 0.5 < plain < 3
    assert plain < value(0.2, 0) < math.inf
    assert plain < value(1, 0.3) < value(1, 1.0)


def test_share_of_uncovered_points_is_below_its_average_distance():
    found = cover_complexity(*clusters(60, 11), *clusters(50, 12))
    for radius in (0.01, 0.1, 0.2, 0.4, 1.0):
        assert found.uncovered(radius) <= found.total_distance / radius
    assert found.uncovered(float(found.nearest.max()) * 1.001) == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            # A view shares the bytes of its base.
            if isinstance(item, torch.Tensor) and not item._is_view():
                self.largest = max(self.largest, item.numel() * item.element_size())
        return result


@pytest.mark.parametrize("offset", [0.0, 1e6])  # far from the origin all pairs would be candidates, but for centring
def test_no_tensor_grows_with_the_product_of_the_sizes(offset, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 32)
    (train, train_labels), (test, test_labels) = clusters(350, 13, dimension=40), clusters(300, 14, dimension=40)
    data = train + offset, train_labels, test + offset, test_labels
    with LargestTensor() as seen:
        cover_complexity(*data)
    assert 8 * 32 * 32 <= seen.largest <= 8 * max(32 * 40, 300 * 3)
    answers = data[0][:, :3].contiguous()
    with LargestTensor() as seen:
        smoothness(lambda x: answers[: len(x)] if len(x) == 350 else x[:, :3], data[0])
    # Whole inputs are gathered by block only; indices of candidates take 16 bytes a pair.
    assert seen.largest <= 16 * 32 * 40


def test_what_cannot_be_measured_is_refused():
    train, labels = clusters(20, 15)
    for inputs, targets, message in (
        (train[:, 0], labels, "train inputs: got"),
        (train[:0], labels[:0], "train inputs: got"),
        (train.to(torch.complex128), labels, "train inputs: got"),
        (train, labels[1:], "a label for each input"),
        (train, labels.double(), "train targets: got torch.float64"),
        (train[:, :4], labels, "same inner shape"),
        (train.where(train > 0.5, math.nan), labels, "NaN, infinite or huge"),
        (train * 1e200, labels, "NaN, infinite or huge"),
        (train, labels % 2, r"without training points: \[2\], without test points: \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cover_complexity(inputs, targets, train, labels)
    with pytest.raises(ValueError, match=r"without training points: \[\], without test points: \[2\]"):
        cover_complexity(train, labels, train, labels % 2)
    with pytest.raises(ValueError, match="all labels are 0"):
        cover_complexity(train, 0 * labels, train, 0 * labels)
    with pytest.raises(ValueError, match="one and the same point"):
        cover_complexity(0 * train, labels, 0 * train, labels)
    with pytest.raises(ValueError, match="radius must be"):
        cover_complexity(train, labels, train, labels).uncovered(0.0)


def test_result_shows_itself():
    found = cover_complexity(*clusters(20, 16), *clusters(20, 17))
    record = json.loads(found.to_json())
    assert record["cover_complexity"] == found.cover_complexity == found.to_records()[0]["cover_complexity"]
    assert np.shape(record["class_distances"]) == (3, 3)
    assert "cover_complexity" in str(found)


def test_smoothness_of_a_linear_function_along_its_gradient_is_exact():
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.9, 0.0]], dtype=torch.float64)
    found = smoothness(lambda x: 2 * x[:, :1], inputs, 0.5)
    assert found.pair_distance == pytest.approx(0.9)
    assert found.distance == pytest.approx(0.25, rel=1e-6)  # epsilon over the Lipschitz constant
    assert smoothness(lambda x: 2 * x[:, :1], inputs, 1.9).distance == math.inf
    assert json.loads(found.to_json())["inputs"] == 3
    assert "distance" in str(found)


def test_smoothness_agrees_with_a_dense_twin_and_stays_above_the_lipschitz_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 3)).double().eval()
    inputs = torch.rand(80, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        answers = net(inputs)
    apart = torch.cdist(inputs.flatten(1), inputs.flatten(1))
    differ = (answers[:, None] - answers[None]).abs().amax(2) >= 0.3
    found = smoothness(net, inputs, 0.3)
    assert found.pair_distance == pytest.approx(float(apart[differ].min()), rel=1e-9)
    slopes = [torch.linalg.matrix_norm(layer.weight.detach(), 2) for layer in (net[1], net[3])]
    assert 0.3 / float(slopes[0] * slopes[1]) <= found.distance < found.pair_distance
    # The nearest change on the segments to the nearest partners, on a fine grid.
    partner = apart.masked_fill(~differ, math.inf).min(1)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    finest = math.inf
    for row in torch.isfinite(partner.values).nonzero()[:, 0]:
        way = inputs[row] + grid[:, None, None] * (inputs[partner.indices[row]] - inputs[row])
        with torch.no_grad():
            changed = (net(way) - answers[row]).abs().amax(1) >= 0.3
        finest = min(finest, float(partner.values[row] * grid[changed][0]))
    assert found.distance == pytest.approx(finest, rel=2e-3)


def test_smoothness_does_not_depend_on_blocks_and_grows_with_the_scale(monkeypatch):
    inputs, _ = clusters(50, 18)

    def predict(x):
        return torch.sigmoid(4 * x[:, :2] / scale)

    scale = 1.0
    whole = smoothness(predict, inputs, 0.2)
    monkeypatch.setattr(module, "_BLOCK", 8)
    assert smoothness(predict, inputs, 0.2) == whole
    scale = 3.0
    assert smoothness(predict, 3 * inputs, 0.2).distance == pytest.approx(3 * whole.distance, rel=1e-6)


def test_smoothness_refuses_what_it_cannot_measure():
    inputs, _ = clusters(10, 19)
    with pytest.raises(ValueError, match="floating point numbers"):
        smoothness(lambda x: x, (255 * inputs).to(torch.uint8))
    with pytest.raises(ValueError, match="m >= 2"):
        smoothness(lambda x: x, inputs[:1])
    with pytest.raises(ValueError, match="NaN, infinite or huge"):
        smoothness(lambda x: x, inputs / 0)
    with pytest.raises(ValueError, match="predict must return"):
        smoothness(lambda x: x[:, 0], inputs)
    with pytest.raises(ValueError, match="predict must return"):
        smoothness(lambda x: x / 0, inputs)
    with pytest.raises(ValueError, match="epsilon must be"):
        smoothness(lambda x: x, inputs, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_gives_the_same():
    data = (*clusters(3000, 20, dimension=50), *clusters(1500, 21, dimension=50))
    here, there = cover_complexity(*data), cover_complexity(*(item.cuda() for item in data))
    np.testing.assert_allclose(there.nearest, here.nearest, rtol=1e-13)
    np.testing.assert_allclose(there.distances, here.distances, rtol=1e-13)
    for inputs in (data[0], data[0].cuda()):
        assert smoothness(lambda x: x[:, :3], inputs).distance == pytest.approx(
            smoothness(lambda x: x[:, :3], data[0]).distance, rel=1e-6
        )
