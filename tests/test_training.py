"""Training, evaluation and checkpoints."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from specprune._files import load_arrays, save_arrays
from specprune.testbed import (
    Recipe,
    default_recipe,
    evaluate,
    initial_network,
    load_checkpoint,
    load_dataset,
    randomize_labels,
    save_checkpoint,
    train,
)
from specprune.testbed.training import _rate_factor

SHORT = Recipe("digits", "vgg-4-4", epochs=2, learning_rate=0.05, optimizer="sgd")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return train(digits, SHORT)


def test_default_mlp_reads_digits(digits):
    result = train(digits, default_recipe("digits", "mlp-128-128-128"))
    assert result.test_error <= 0.03
    assert result.train_error <= 0.005
    assert [record["epoch"] for record in result.history] == list(range(1, result.recipe.epochs + 1))
    assert result.history[-1]["loss"] < 0.1 * result.history[0]["loss"]
    assert result.test_error == evaluate(result.model, digits.test_batches(100))[0]


@pytest.mark.parametrize("net", ["vgg-8-8-16-16", "resnet-8-16"])
def test_convolutional_networks_learn(digits, net):
    result = train(digits, dataclasses.replace(default_recipe("digits", net), epochs=5))
    assert result.test_error <= 0.05


def test_training_is_repeatable_and_keeps_the_random_state(digits, trained):
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    state = torch.get_rng_state().clone()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    again = train(digits, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert again.history == trained.history
    weights, expected = again.model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_seed_matters(digits, trained):
    other = train(digits, dataclasses.replace(SHORT, seed=1))
    assert other.history != trained.history


def test_training_leaves_the_data_alone(digits):
    before = digits.train_inputs.clone(), digits.train_targets.clone()
    train(digits, dataclasses.replace(SHORT, epochs=1, random_labels=1.0))
    assert torch.equal(digits.train_inputs, before[0])
    assert torch.equal(digits.train_targets, before[1])


@pytest.mark.slow
def test_random_labels_are_what_is_fitted(digits):
    recipe = Recipe("digits", "mlp-256-256", 60, batch_size=50, random_labels=1.0, label_seed=7)
    result = train(digits, recipe)
    noisy = randomize_labels(digits, 1.0, seed=7)
    assert result.train_error < 0.2
    assert evaluate(result.model, noisy.train_batches())[0] == result.train_error
    assert result.test_error > 0.6


def test_a_diverging_loss_stops_with_advice(digits):
    with pytest.raises(ValueError, match=r"epoch 1 of 3: lower the learning rate .*1e\+30"):
        train(digits, Recipe("digits", "mlp-16", 3, learning_rate=1e30, optimizer="sgd"))


def test_wrong_data_and_batch_size_are_refused(digits):
    with pytest.raises(ValueError, match="'mnist', got 'digits'"):
        train(digits, dataclasses.replace(SHORT, data="mnist"))
    with pytest.raises(ValueError, match="1401 exceeds the 1400"):
        train(digits, dataclasses.replace(SHORT, batch_size=1401))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -1.0},
        {"optimizer": "adagrad"},
        {"random_labels": 1.1},
    ],
)
def test_recipe_refuses_bad_values(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        dataclasses.replace(SHORT, **change)


def test_default_recipes_name_what_they_are_for():
    for data in ("digits", "mnist", "fashion-mnist", "cifar10"):
        for net in ("mlp-10", "vgg", "resnet"):
            recipe = default_recipe(data, net, seed=4)
            assert (recipe.data, recipe.net, recipe.seed) == (data, net, 4)
    assert default_recipe("fashion-mnist", "vgg").epochs == 4


def test_learning_rate_rises_then_falls():
    factors = [_rate_factor(step, 100) for step in range(100)]
    assert factors.index(max(factors)) == 19
    assert max(factors) == 1.0
    assert 0 < factors[0] < 0.1
    assert 0 < factors[-1] < 0.01
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert _rate_factor(0, 1) == 1.0


def test_evaluate_agrees_with_hand_count():
    class Fixed(nn.Module):
        def forward(self, inputs):
            return inputs.flatten(1)

    # Two right answers and one wrong; cross-entropies log(1 + e^-2), log 2 and log(1 + e).
    inputs = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]).reshape(3, 2, 1, 1)
    targets = torch.tensor([0, 0, 1])
    expected = (math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.e)) / 3
    error, loss = evaluate(Fixed(), [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    assert error == pytest.approx(1 / 3)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_evaluate_uses_and_restores_modes(digits):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    model[2].eval()  # a frozen part stays frozen
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    first = evaluate(model, digits.test_batches())
    assert first == evaluate(model, digits.test_batches())
    assert set(seen) == {(False, False)}
    assert [model.training, *(part.training for part in model)] == [True, True, True, False, True]
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))])
    assert model.training
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [])


def test_checkpoint_round_trip(trained, digits, tmp_path):
    path = tmp_path / "net.npz"
    save_checkpoint(path, trained)
    loaded = load_checkpoint(path)
    assert not loaded.model.training
    for field in ("recipe", "history", "train_error", "test_error", "input_shape", "classes"):
        assert getattr(loaded, field) == getattr(trained, field)
    inputs = digits.test_inputs
    assert torch.equal(loaded.model(inputs), trained.model(inputs))
    assert [child.name for child in tmp_path.iterdir()] == ["net.npz"]


def test_checkpoint_refuses_a_changed_network(trained, tmp_path):
    other = dataclasses.replace(trained, recipe=dataclasses.replace(SHORT, net="vgg-4-3"))
    with pytest.raises(ValueError, match=r"conv2\.weight"):
        save_checkpoint(tmp_path / "net.npz", other)
    wide = dataclasses.replace(trained, model=copy.deepcopy(trained.model).double())
    with pytest.raises(ValueError, match="its weights in float32"):
        save_checkpoint(tmp_path / "net.npz", wide)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_checkpoints_are_refused(trained, tmp_path):
    path = tmp_path / "net.npz"
    save_checkpoint(path, trained)
    whole = path.read_bytes()
    arrays, header = load_arrays(path, "trained network")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        load_checkpoint(tmp_path / "absent.npz")
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04 something else"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.npz"):
            load_checkpoint(path)
    lacking = {name: array for name, array in arrays.items() if name != "conv1.weight"}
    for changed_arrays, changed_header in (
        (lacking, header),
        (arrays, header | {"recipe": {"data": "digits"}}),
        (arrays, header | {"recipe": header["recipe"] | {"net": "mlp-4"}}),
        (arrays, {name: value for name, value in header.items() if name != "classes"}),
        (arrays, header | {"input_shape": [1, 8]}),
    ):
        save_arrays(path, changed_arrays, changed_header)
        with pytest.raises(ValueError, match=r"net\.npz: not a usable trained network"):
            load_checkpoint(path)
    save_arrays(path, arrays, header | {"kind": "bound"})
    with pytest.raises(ValueError, match="'bound', expected a specprune trained network"):
        load_checkpoint(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_training_on_an_accelerator(digits, tmp_path):
    state = torch.cuda.get_rng_state()
    result = train(digits, default_recipe("digits", "vgg-8-8-16-16"), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert result.test_error <= 0.05
    assert next(result.model.parameters()).is_cuda
    save_checkpoint(tmp_path / "net.npz", result)
    assert evaluate(load_checkpoint(tmp_path / "net.npz").model, digits.test_batches())[0] <= 0.05


def test_the_initial_network_is_where_training_started():
    dataset = load_dataset("digits")
    recipe = Recipe("digits", "mlp-8", epochs=1, batch_size=64, learning_rate=1e-12, weight_decay=0.0)
    trained = train(dataset, recipe)
    for name, value in initial_network(trained).state_dict().items():
        torch.testing.assert_close(value, trained.model.state_dict()[name], rtol=0, atol=1e-6)
