"""What counts as a batch, and the checks that every pass over the data makes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_mlp, tensor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specprune.compress.batches import CalibrationData, batch_inputs, batch_size, batch_targets, call_model

MODEL = small_mlp()
X = tensor(20, 8)
Y = torch.arange(20) % 3


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MODEL

    def forward(self, x, scale):
        return self.net(x * scale[:, None])


def read_all(data, model=MODEL):
    return list(data.passes(model, "test"))


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], (X,)], ids=["tensor", "pair", "list", "single"])
def test_tensors_and_pairs_are_batches(batch):
    data = CalibrationData([batch, batch])
    batches = read_all(data)
    assert len(batches) == 2
    assert batch_size(batches[0]) == 20
    assert torch.equal(batch_inputs(batches[0]), X)
    assert torch.equal(data.call(MODEL, batches[0]), MODEL(X))


def test_mappings_are_keyword_arguments():
    batch = {"x": X, "scale": torch.linspace(1, 2, 20)}
    model = Keywords()
    expected = MODEL(X * batch["scale"][:, None])
    for form in (batch, (batch, Y)):
        data = CalibrationData([form])
        assert batch_size(data.first(model)) == 20
        assert torch.equal(data.call(model, data.first()), expected)
        assert len(read_all(data, model)) == 1


def test_forward_reads_batches_of_any_form():
    data = CalibrationData([(7, X), (9, X)], forward=lambda model, batch: model(batch[1]) * batch[0])
    batches = read_all(data)
    assert torch.equal(data.call(MODEL, batches[1]), MODEL(X) * 9)
    read_all(data)  # the check of the second pass knows such batches as well
    assert call_model(MODEL, (7, X), lambda model, batch: model(batch[1]) + 1).equal(MODEL(X) + 1)


def test_targets_are_found():
    assert batch_targets((X, Y)) is Y
    assert batch_targets({"x": X, "labels": Y}) is Y
    for batch in (X, (X,), {"x": X}, (X, [0, 1])):
        with pytest.raises(TypeError, match="without targets"):
            batch_targets(batch)


@pytest.mark.parametrize("batch", ["text", 3, None, (), (3, 4), [[X]]])
def test_other_batches_are_refused(batch):
    with pytest.raises(TypeError, match=r"a batch is a tensor, a pair .* got"):
        batch_inputs(batch)
    with pytest.raises(TypeError, match=r"a batch is a tensor, a pair .* got"):
        read_all(CalibrationData([batch]))


def test_iterators_are_refused():
    for iterator in (iter([X]), (x for x in [X]), iter(DataLoader([X[0]])), map(str, [])):
        with pytest.raises(TypeError, match=r"one-pass iterator .* cannot be read again"):
            CalibrationData(iterator)


@pytest.mark.parametrize("value", [X, "text", 3, None])
def test_what_is_no_set_of_batches_is_refused(value):
    with pytest.raises(TypeError, match="must be a re-iterable of batches"):
        CalibrationData(value)


def test_empty_data_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        CalibrationData([]).first()
    with pytest.raises(ValueError, match="batches is empty"):
        read_all(CalibrationData([]))
    with pytest.raises(ValueError, match="at least one sample"):
        CalibrationData([X[:0]]).first()
    with pytest.raises(ValueError, match="at least one sample"):
        read_all(CalibrationData([X[:0]]))


def test_batches_without_samples_are_passed_over():
    data = CalibrationData([X[:0], X[:12], X[:0], X[12:]])
    for _ in range(2):
        assert [batch_size(batch) for batch in read_all(data)] == [12, 8]
    assert [batch_size(batch) for batch in data.head()] == [12, 8]
    assert torch.equal(data.first(MODEL), X[:12])


def test_dtype_mismatch_names_batch_and_dtypes():
    data = CalibrationData([X, X.double()])
    with pytest.raises(ValueError, match=r"batch 1 has dtype torch.float64, the model's parameters torch.float32"):
        read_all(data)
    with pytest.raises(ValueError, match=r"batch 0 has dtype torch\.float64"):
        CalibrationData([X.double()]).first(MODEL)
    read_all(CalibrationData([Y]), nn.Embedding(3, 2))  # whole numbers go with any dtype
    read_all(CalibrationData([X.double()]), nn.ReLU())  # a model without parameters has no dtype


def test_device_mismatch_names_batch_and_devices():
    with pytest.raises(ValueError, match=r"batch 1 is on device meta, the model on cpu"):
        read_all(CalibrationData([X, X.to("meta")]))
    with pytest.raises(ValueError, match=r"batch 0 is on device cpu, the model on meta"):
        CalibrationData([X]).first(nn.Linear(8, 2, device="meta"))


class Changing:
    """A loader whose passes are made by a function of the pass number."""

    def __init__(self, make):
        self.make, self.count = make, 0

    def __iter__(self):
        self.count += 1
        return iter(self.make(self.count))


NOISE = tensor(20, 8, seed=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: [X + k * 1e-3 * NOISE],
        lambda k: [X if k == 1 else X.flip(1)],
        lambda k: [X if k == 1 else -X],
        lambda k: [X[: 20 - 5 * (k - 1)]],
        lambda k: [X] * k,
        lambda k: [X if k == 1 else torch.where(torch.arange(20)[:, None] == 7, -X + 1, X)],
    ],
    ids=["noise", "mirrored", "negated", "fewer", "more", "one sample"],
)
def test_other_data_on_the_second_pass_are_reported(make):
    data = CalibrationData(Changing(make))
    read_all(data)
    with pytest.raises(ValueError, match="batches gave other data on this pass"):
        read_all(data)


def test_data_used_up_after_one_pass_are_reported():
    data = CalibrationData(Changing(lambda k: [X] if k == 1 else []))
    read_all(data)
    with pytest.raises(ValueError, match="batches is empty"):
        read_all(data)


def test_shuffled_and_resplit_data_are_the_same_data():
    order = np.random.default_rng(0)
    sizes = (20, 7, 3)
    data = CalibrationData(Changing(lambda k: X[order.permutation(20)].split(sizes[k - 1])))
    for _ in sizes:
        read_all(data)
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    data = CalibrationData(loader)
    for _ in range(3):
        assert sum(batch_size(batch) for batch in read_all(data)) == 20


def test_a_pass_left_early_does_not_count_as_the_first():
    data = CalibrationData([X[:10], X[10:]])
    next(iter(data.passes(MODEL, "test")))
    assert len(read_all(data)) == 2
    assert len(read_all(data)) == 2


def test_logits_are_taken_from_a_record():
    class Net(nn.Module):
        def forward(self, features):
            return SimpleNamespace(logits=features * 2, loss=None)

    assert torch.equal(call_model(Net(), {"features": torch.ones(2), "labels": torch.zeros(2)}), torch.full((2,), 2.0))
