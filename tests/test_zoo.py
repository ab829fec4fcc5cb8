"""Zoos: many networks trained at once are the networks trained alone, and the store loses and doubles nothing."""

import dataclasses
import json
import math
import multiprocessing
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import specprune
from specprune._files import load_arrays, save_arrays
from specprune.analysis import trace_chain
from specprune.cli import main
from specprune.compress import CalibrationData
from specprune.testbed import (
    ZOO_GRIDS,
    Dataset,
    ZooSetting,
    evaluate,
    load_dataset,
    load_zoo,
    mlp,
    train_zoo,
    vgg,
    zoo_grid,
    zoo_network,
    zoo_training_set,
)
from specprune.testbed.ensemble import (
    draw_keys,
    dropout_masks,
    ensemble_outputs,
    is_check,
    random_words,
    train_together,
)
from specprune.testbed.zoo import zoo_examples
from specprune.testbed.zoo_files import MANIFEST

WORD, LONG = 2**32 - 1, 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def tiny(train=40, test=30, shape=(1, 4, 4), classes=3, seed=0):
    """Return images of which a linear rule knows the class."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(train + test, *shape, generator=generator)
    rule = torch.randn(math.prod(shape), classes, generator=generator)
    targets = ((inputs - 0.5).flatten(1) @ rule).argmax(1)
    return Dataset("tiny", inputs[:train], targets[:train], inputs[train:], targets[train:], classes)


TINY = tiny()
BASE = {"data": "tiny", "width": 6, "depth": 2, "n": 24, "learning_rate": 0.1, "batch_size": 5}
MIXED = (
    {},
    {"seed": 1},
    {"learning_rate": 0.03, "weight_decay": 1e-2},
    {"n": 37, "label_noise": 0.3, "learning_rate": 0.03},
    {"n": 10, "seed": 2, "weight_decay": 1e-3},
)


def mixed(family="mlp", **changes):
    return [ZooSetting(**{**BASE, "family": family, **change, **changes}) for change in MIXED]


# --- the slow twin: one network, torch's own optimizer, and the random numbers in Python's integers


def mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & LONG
    return x ^ (x >> 31)


def keys(seed, purpose, counter):
    start = mix64(mix64((seed + GOLDEN) & LONG) ^ purpose)
    word = mix64((start + (counter + 1) * GOLDEN) & LONG)
    return word & WORD, word >> 32


def words(pair, count):
    found = []
    for i in range(count):
        x = (i + pair[0]) & WORD
        x = ((x ^ (x >> 16)) * 0x7FEB352D + pair[1]) & WORD
        x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
        x ^= x >> 16
        found.append(x if x < 2**31 else x - 2**32)
    return found


class Drop(nn.Module):
    """Dropout whose masks are those of the counters."""

    def __init__(self, share, seed):
        super().__init__()
        self.share, self.seed, self.counter = share, seed, 0

    def forward(self, x):
        if not self.training:
            return x
        drawn = np.array(words(keys(self.seed, 0x64726F70, self.counter), x.numel())).reshape(x.shape)
        kept = torch.from_numpy((drawn + 2**31) / 2**32 >= round(self.share * 2**32) / 2**32)
        return torch.where(kept, x / (1 - self.share), torch.zeros_like(x))


def alone(dataset, setting, target_loss, max_epochs):
    """Train one ordinary network in float64 and return it with what is measured."""
    data = zoo_training_set(dataset, setting)
    inputs, targets = data.train_inputs.double(), data.train_targets
    model = zoo_network(setting, data).double()
    drops = [name for name, module in model.named_children() if isinstance(module, nn.Dropout)]
    for name in drops:
        setattr(model, name, Drop(setting.dropout, setting.seed))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.learning_rate, momentum=0.9, weight_decay=setting.weight_decay
    )
    check, step = 1, 0
    for epoch in range(1, max_epochs + 1):
        drawn = words(keys(setting.seed, 0x6F72646572, epoch - 1), setting.n)
        order = sorted(range(setting.n), key=drawn.__getitem__)
        model.train()
        for start in range(0, setting.n - setting.batch_size + 1, setting.batch_size):
            chosen = order[start : start + setting.batch_size]
            for k, name in enumerate(drops):
                getattr(model, name).counter = step * len(drops) + k
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            step += 1
        if epoch in (check, max_epochs):
            check += max(1, check // 20)
            train_error, train_loss = evaluate(model, [(inputs, targets)])
            if train_loss <= target_loss or epoch == max_epochs:
                break
    test_error, test_loss = evaluate(model, [(data.test_inputs.double(), data.test_targets)])
    return model, (epoch, train_loss, train_error, test_loss, test_error)


def compare(run, twin, tolerance):
    model, (epochs, *numbers) = twin
    assert run.epochs == epochs
    found = (run.train_loss, run.train_error, run.test_loss, run.test_error)
    assert found == pytest.approx(numbers, abs=tolerance)
    state = model.state_dict()
    for name, tensor in run.weights.items():
        assert torch.allclose(tensor.double(), state[name].double(), atol=tolerance, rtol=0), name


@pytest.mark.parametrize(
    ("family", "dropout", "target", "most"),
    [("mlp", 0.0, 0.1, 45), ("mlp", 0.25, 0.5, 20), ("conv", 0.0, 0.7, 10), ("conv", 0.25, 0.8, 4)],
)
def test_together_is_alone(family, dropout, target, most):
    settings = mixed(family, dropout=dropout)
    runs = train_together(zoo_examples(TINY, 37), settings, target_loss=target, max_epochs=most, dtype=torch.float64)
    assert [run.setting for run in runs] == settings
    for run in runs:
        compare(run, alone(TINY, run.setting, target, most), 1e-9)
    if dropout == 0:  # stopping at different times was put to the test
        assert len({run.epochs for run in runs}) >= 3
        assert any(run.converged for run in runs)


def test_in_single_precision_only_rounding_differs():
    for family in ("mlp", "conv"):
        for run in train_together(zoo_examples(TINY, 37), mixed(family), max_epochs=3):
            compare(run, alone(TINY, run.setting, 0.01, 3), 1e-4)
            assert all(tensor.dtype == torch.float32 for tensor in run.weights.values())


def test_company_changes_nothing():
    wanted = mixed(dropout=0.2)[0]
    others = zoo_grid(**{**BASE, "family": "mlp", "dropout": [0.1, 0.2], "learning_rate": [0.05, 10.0], "seed": [3, 4]})
    companies = [(wanted,), (*others, wanted), (others[0], wanted, *mixed(dropout=0.2)[1:])]
    found = []
    for company in companies:
        examples = zoo_examples(TINY, max(setting.n for setting in company))
        runs = train_together(examples, company, target_loss=0.1, max_epochs=60, dtype=torch.float64)
        found.append(runs[company.index(wanted)])
    for run in found[1:]:
        assert run.epochs == found[0].epochs
        for name, tensor in run.weights.items():
            assert torch.allclose(tensor, found[0].weights[name], atol=1e-11, rtol=0)


def test_a_diverging_network_is_recorded_and_harms_nobody():
    good, bad = mixed()[0], mixed(learning_rate=1e8)[0]
    for family in ("mlp", "conv"):
        pair = [dataclasses.replace(s, family=family) for s in (good, bad)]
        pair[1] = dataclasses.replace(pair[1], weight_decay=1e8)
        fine, broken = train_together(zoo_examples(TINY, 24), pair, max_epochs=30, dtype=torch.float64)
        assert broken.diverged
        assert not broken.converged
        assert broken.weights is None
        assert not math.isfinite(broken.train_loss)
        assert broken.epochs < 30
        compare(fine, alone(TINY, pair[0], 0.01, 30), 1e-9)


def test_training_starts_from_the_initial_network():
    for family in ("mlp", "conv"):
        for setting in mixed(family, learning_rate=1e-30, weight_decay=0.0):
            (run,) = train_together(zoo_examples(TINY, setting.n), [setting], max_epochs=1)
            start = zoo_network(setting, TINY).state_dict()
            for name, tensor in run.weights.items():
                if "running" not in name:
                    assert torch.allclose(tensor, start[name], atol=1e-25, rtol=0)
    one, other = (zoo_network(ZooSetting(**BASE, family="mlp", seed=k), TINY).state_dict() for k in (0, 1))
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize("family", ["mlp", "conv"])
def test_initial_weights_are_those_of_the_constructors(family):
    for dropout, seed in ((0.0, 3), (0.2, 2**32 - 1)):
        setting = ZooSetting(**BASE, family=family, dropout=dropout, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            plain = mlp((16, 6, 6, 3)) if family == "mlp" else vgg([6, 6], 3, 1, pools=(1,))
        state = plain.state_dict()
        found = zoo_network(setting, TINY).state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_threads_do_not_share_random_numbers():
    settings = [ZooSetting(**{**BASE, "width": 200}, family="mlp", seed=seed) for seed in range(4)] * 30
    alone = [zoo_network(setting, TINY).state_dict() for setting in settings[:4]]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda setting: zoo_network(setting, TINY).state_dict(), settings)
        for setting, state in zip(settings, found, strict=True):
            assert all(torch.equal(tensor, alone[setting.seed][name]) for name, tensor in state.items())


def test_global_random_state_and_the_data_are_left_alone():
    torch.manual_seed(5)
    state, inputs = torch.get_rng_state(), TINY.train_inputs.clone()
    train_together(zoo_examples(TINY, 37), mixed(dropout=0.2), max_epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(TINY.train_inputs, inputs)


def test_random_words_are_those_of_the_twin():
    seeds, counters = [0, 1, 2**32 - 1], [0, 1, 7, 10**6]
    drawn = draw_keys(seeds, 0x6F72646572, counters)
    for row, seed in enumerate(seeds):
        for column, counter in enumerate(counters):
            pair = keys(seed, 0x6F72646572, counter)
            assert drawn[row, column].view(np.uint32).tolist() == list(pair)
            found = random_words(torch.from_numpy(drawn[row, column : column + 1]), 50)
            assert found.tolist() == [words(pair, 50)]


def test_random_words_look_random():
    drawn = random_words(torch.from_numpy(draw_keys(range(40), 1, range(5)).reshape(-1, 2)), 1000).numpy()
    assert all(len(np.unique(row)) == 1000 for row in drawn)
    uniform = (drawn.astype(np.float64) + 2**31) / 2**32
    assert abs(uniform.mean() - 0.5) < 4 / math.sqrt(12 * uniform.size)
    bits = (drawn.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert abs(bits.mean((0, 1)) - 0.5).max() < 5 * 0.5 / math.sqrt(uniform.size)
    between = np.corrcoef(uniform)[np.triu_indices(200, 1)]  # of streams
    assert abs(between).max() < 6 / math.sqrt(1000)
    assert between.std() == pytest.approx(1 / math.sqrt(1000), rel=0.05)
    neighbours = np.corrcoef(uniform[:, 1:].ravel(), uniform[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(uniform.size)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    drawn = torch.from_numpy(draw_keys([0, 1, 2], 2, [0]))[:, 0]
    share = torch.tensor([0.0, 0.2, 0.9], dtype=torch.float64)
    masks = dropout_masks(drawn, share, (100, 20, 10))
    assert masks.shape == (3, 100, 20, 10)
    for mask, left_out in zip(masks, share.tolist(), strict=True):
        assert sorted({round(value, 12) for value in mask.unique().tolist()} - {0.0}) == [round(1 / (1 - left_out), 12)]
        deviation = math.sqrt(left_out * (1 - left_out) / mask.numel())
        assert abs((mask == 0).double().mean() - left_out) <= 5 * deviation


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 1, 1)])
@pytest.mark.parametrize("family", ["mlp", "conv"])
def test_an_ensemble_answers_as_its_networks(family, shape):
    data = tiny(shape=shape, train=12)
    settings = zoo_grid(
        data="tiny", family=family, width=5, depth=3, n=12, learning_rate=0.1, batch_size=4, seed=range(3)
    )
    networks = [zoo_network(setting, data).double() for setting in settings]
    generator = torch.Generator().manual_seed(0)
    for network in networks:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    states = [network.state_dict() for network in networks]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    inputs = torch.rand(3, 4, *shape, generator=generator, dtype=torch.float64)
    found = ensemble_outputs(networks[0], stacked, inputs)
    for network, x, outputs in zip(networks, inputs, found, strict=True):
        assert torch.allclose(network.eval()(x), outputs, atol=1e-12)
    with pytest.raises(TypeError, match="is a Tanh"):
        ensemble_outputs(nn.Sequential(nn.Tanh()), stacked, inputs)


def test_checks_are_dense_at_first():
    checks = [epoch for epoch in range(1, 101) if is_check(epoch, 99)]
    assert checks == [*range(1, 41), *range(42, 61, 2), *range(63, 81, 3), 81, 85, 89, 93, 97, 99]


def test_checks_follow_the_rule():
    check, wanted = 1, []
    while check <= 500:
        wanted.append(check)
        check += max(1, check // 20)
    assert [epoch for epoch in range(1, 501) if is_check(epoch, 10**6)] == wanted


# --- settings and data


def test_the_analysis_and_pruning_take_the_networks():
    data = load_dataset("digits")
    for family in ("mlp", "conv"):
        setting = ZooSetting("digits", family, 8, 2, 100, 0.05, 20, dropout=0.2)
        network = zoo_network(setting, data).eval()
        calibration = data.train_batches(limit=200)
        chain = trace_chain(network, CalibrationData(calibration))
        assert len(chain) == 3
        pruned = specprune.prune(network, calibration, keep=0.5)
        assert pruned.report.params_after < pruned.report.params_before


def test_training_sets_are_nested_and_noise_is_exact():
    small, large = (zoo_training_set(TINY, ZooSetting(**{**BASE, "n": n}, family="mlp")) for n in (10, 30))
    assert torch.equal(small.train_inputs, large.train_inputs[:10])
    assert torch.equal(small.train_targets, large.train_targets[:10])
    assert torch.equal(small.test_inputs, TINY.test_inputs)
    rows = {tuple(image.flatten().tolist()) for image in TINY.train_inputs}
    assert len({tuple(image.flatten().tolist()) for image in large.train_inputs} & rows) == 30
    wide = tiny(train=1000, classes=50)
    noisy = [
        zoo_training_set(wide, ZooSetting("tiny", "mlp", width, 1, 1000, rate, 5, label_noise=0.3, seed=seed))
        for width, rate, seed in ((4, 0.1, 0), (9, 0.2, 3))
    ]
    clean = zoo_examples(wide, 1000)
    assert torch.equal(noisy[0].train_targets, noisy[1].train_targets)
    changed = (noisy[0].train_targets != clean.train_targets).sum()
    assert 300 * (1 - 5 / 50) <= changed <= 300
    assert torch.equal(noisy[0].train_inputs, clean.train_inputs)


def test_grids_are_products():
    grid = zoo_grid(**{**BASE, "family": "mlp", "width": (4, 8), "seed": range(3)})
    assert [(s.width, s.seed) for s in grid] == [(4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2)]
    assert len({s.digest for s in grid}) == 6
    assert grid[0] == ZooSetting(**{**BASE, "family": "mlp", "width": 4, "dropout": 0, "label_noise": 0})
    assert zoo_grid(**{**BASE, "family": "mlp", "dropout": 0})[0].digest == zoo_grid(**BASE, family="mlp")[0].digest
    for axes in ZOO_GRIDS.values():
        settings = zoo_grid(data="digits", **axes)
        assert len(set(settings)) == len(settings)
        assert max(s.n for s in settings) <= 1400
        assert len({s.seed for s in settings}) >= 2
    assert len(zoo_grid(data="digits", **ZOO_GRIDS["default"])) >= 300


def test_bad_settings_are_refused():
    for change, error, words_ in (
        ({"family": "rnn"}, ValueError, "family 'rnn': expected one of mlp, conv"),
        ({"width": 0}, ValueError, "width 0: expected a whole number from 1"),
        ({"depth": 1.5}, TypeError, "depth 1.5: expected a whole number"),
        ({"seed": -1}, ValueError, "seed -1"),
        ({"n": True}, TypeError, "n True"),
        ({"batch_size": 25}, ValueError, "batch_size 25 exceeds the n = 24"),
        ({"learning_rate": 0}, ValueError, "learning_rate 0.0"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay nan"),
        ({"dropout": 1}, ValueError, "dropout 1.0"),
        ({"label_noise": 1.1}, ValueError, "label_noise 1.1"),
    ):
        with pytest.raises(error, match=words_):
            ZooSetting(**{**BASE, "family": "mlp", **change})
    with pytest.raises(ValueError, match=r"axis width=.4, 4.: expected at least one value, and none twice"):
        zoo_grid(**{**BASE, "width": [4, 4]}, family="mlp")
    with pytest.raises(ValueError, match=r"axis seed=.."):
        zoo_grid(**BASE, seed=[], family="mlp")
    with pytest.raises(TypeError, match="breadth"):
        zoo_grid(**BASE, family="mlp", breadth=3)
    with pytest.raises(ValueError, match="for data 'tiny', got 'other'"):
        zoo_training_set(dataclasses.replace(TINY, name="other"), mixed()[0])
    with pytest.raises(ValueError, match="n = 41 exceeds the 40 training examples"):
        zoo_training_set(TINY, ZooSetting(**{**BASE, "n": 41}, family="mlp"))
    with pytest.raises(ValueError, match="expected one group"):
        train_together(TINY, [*mixed(), *mixed(width=7)])
    for limits in ({"target_loss": 0.0}, {"max_epochs": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(limits))} 0"):
            train_together(TINY, mixed(), **limits)


# --- the store

QUICK = {"target_loss": 0.7, "max_epochs": 10}
GRID = zoo_grid(**{**BASE, "family": ("mlp", "conv"), "width": (4, 6), "dropout": (0, 0.2), "seed": range(2)})


def shards(folder):
    return sorted(folder.glob("*.npz"))


def check_store(folder, settings):
    """Check that a store has every setting once, in order; return the zoo."""
    zoo = load_zoo(folder)
    assert [network.setting for network in zoo.networks] == list(settings)
    assert zoo.missing == ()
    held = [r["setting"] for path in shards(folder) for r in load_arrays(path, "zoo shard", [])[1]["networks"]]
    assert sorted(ZooSetting(**record).digest for record in held) == sorted(s.digest for s in settings)
    return zoo


def same_zoo(one, other):
    for a, b in zip(one.networks, other.networks, strict=True):
        first, second = a.to_record(), b.to_record()
        assert first == pytest.approx(second, abs=1e-4), (first, second)
        state = b.model().state_dict()
        for name, tensor in a.model().state_dict().items():
            assert torch.allclose(tensor, state[name], atol=1e-4), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    return train_zoo(TINY, GRID, folder, together=2, **QUICK)


def test_the_store_gives_back_what_was_trained(undisturbed):
    zoo = check_store(undisturbed.folder, GRID)
    for network in zoo.networks:
        (run,) = train_together(zoo_examples(TINY, 24), [network.setting], **QUICK)
        model = network.model()
        assert not model.training
        for name, tensor in run.weights.items():
            assert torch.allclose(model.state_dict()[name], tensor, atol=1e-4)
        data = zoo_training_set(TINY, network.setting)
        train_error, train_loss = evaluate(model, data.train_batches())
        test_error, test_loss = evaluate(model, data.test_batches())
        assert (network.train_error, network.test_error) == (train_error, test_error)
        assert network.gap == test_error - train_error
        assert (network.train_loss, network.test_loss) == pytest.approx((train_loss, test_loss), rel=1e-4)
        assert network.converged == (train_loss <= 0.7)
        assert network.converged or network.epochs == 10
        start = zoo_network(network.setting, TINY).state_dict()
        assert not network.initial().training
        assert all(torch.equal(tensor, start[name]) for name, tensor in network.initial().state_dict().items())
        counters = {int(t) for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}
        assert counters in (set(), {network.epochs * 4})
    assert 0 < sum(network.converged for network in zoo.networks) < len(GRID)


def test_nothing_is_pickled(undisturbed):
    for path in shards(undisturbed.folder):
        with np.load(path, allow_pickle=False) as archive:
            assert all(archive[name].dtype in (np.float32, np.uint8) for name in archive.files)


def test_a_zoo_prints_and_exports(undisturbed):
    text = str(undisturbed)
    for word in ("networks", "converged", "per_second", "median", "gap", "dropout", "0.2"):
        assert word in text
    record = json.loads(undisturbed.to_json())
    assert len(record["networks"]) == len(GRID) == record["summary"]["networks"]
    assert record["networks"] == json.loads(json.dumps(undisturbed.to_records()))
    gaps = [network.gap for network in undisturbed.networks if network.converged]
    row = next(row for row in undisturbed.quantiles() if row["quantity"] == "gap")
    assert (row["least"], row["median"], row["largest"]) == (min(gaps), np.median(gaps), max(gaps))
    wide = [n for n in undisturbed.networks if n.setting.width == 6]
    found = next(row for row in undisturbed.by_axis() if (row["axis"], row["value"]) == ("width", 6))
    assert found["networks"] == 8
    assert found["converged"] == sum(n.converged for n in wide)
    assert found["gap"] == pytest.approx(np.mean([n.gap for n in wide if n.converged]))


def test_a_rerun_trains_only_what_is_missing(tmp_path, undisturbed):
    train_zoo(TINY, GRID[:10], tmp_path, together=3, **QUICK)
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    zoo = load_zoo(tmp_path)
    assert zoo.summary()["networks"] == 10
    again = train_zoo(TINY, GRID[4:], tmp_path, together=5, **QUICK)  # fewer of the old ones, and new ones
    assert {path: path.stat().st_mtime_ns for path in shards(tmp_path) if path in before} == before
    assert len(shards(tmp_path)) > len(before)
    same_zoo(again, undisturbed)
    check_store(tmp_path, GRID)
    count = len(shards(tmp_path))
    train_zoo(TINY, GRID, tmp_path, **QUICK)
    assert len(shards(tmp_path)) == count


def test_the_order_is_that_of_the_settings(tmp_path):
    mixed_up = random.Random(0).sample(GRID[:6], 6)
    train_zoo(TINY, mixed_up, tmp_path, **QUICK)
    check_store(tmp_path, mixed_up)


def test_an_unfinished_zoo_can_be_read(tmp_path):
    train_zoo(TINY, GRID, tmp_path, together=2, **QUICK)
    gone = shards(tmp_path)[3]
    lost = load_arrays(gone, "zoo shard")[1]["networks"]
    gone.unlink()
    zoo = load_zoo(tmp_path)
    assert {s.digest for s in zoo.missing} == {ZooSetting(**record["setting"]).digest for record in lost}
    assert [network.setting for network in zoo.networks] == [s for s in GRID if s not in zoo.missing]
    assert f"{len(GRID) - len(lost)}" in str(zoo)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "foreign"])
def test_damaged_shards_are_reported_and_trained_again(tmp_path, damage, undisturbed, caplog):
    train_zoo(TINY, GRID, tmp_path, together=4, **QUICK)
    broken = shards(tmp_path)[2]
    content = bytearray(broken.read_bytes())
    if damage == "changed":  # in the middle of the weights: only reading them shows it
        content[len(content) // 3] ^= 0xFF
    broken.write_bytes({"truncated": content[:-100], "changed": content, "empty": b"", "foreign": b"x" * 999}[damage])
    if damage == "changed":
        with pytest.raises(ValueError, match="not a readable specprune zoo shard"):
            [network.model() for network in load_zoo(tmp_path).networks]
    else:
        with pytest.raises(ValueError, match=f"{broken.name}: not a readable .* trains it again"):
            load_zoo(tmp_path)
    zoo = train_zoo(TINY, GRID, tmp_path, together=4, **QUICK)
    assert broken.name in caplog.text
    assert "trained again" in caplog.text
    assert (tmp_path / f"{broken.name}.damaged").read_bytes() == (
        {"truncated": content[:-100], "changed": content, "empty": b"", "foreign": b"x" * 999}[damage]
    )
    check_store(tmp_path, GRID)
    same_zoo(zoo, undisturbed)


def test_shards_with_other_layers_or_settings_than_the_manifest(tmp_path, undisturbed, caplog):
    train_zoo(TINY, GRID, tmp_path, together=4, **QUICK)
    broken = shards(tmp_path)[1]
    arrays, header = load_arrays(broken, "zoo shard")
    save_arrays(broken, arrays, {**header, "parameters": header["parameters"][:-1]})
    with pytest.raises(ValueError, match="holds other layers than"):
        load_zoo(tmp_path)
    same_zoo(train_zoo(TINY, GRID, tmp_path, together=4, **QUICK), undisturbed)
    assert "holds other layers than" in caplog.text
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["settings"] = manifest["settings"][:2]  # the shards have more
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    zoo = train_zoo(TINY, GRID[:2], tmp_path, together=4, **QUICK)
    assert {network.setting for network in zoo.networks} == set(GRID)


def test_another_plan_is_refused(tmp_path):
    train_zoo(TINY, GRID[:1], tmp_path, **QUICK)
    manifest = (tmp_path / MANIFEST).read_bytes()
    for dataset, changes, words_ in (
        (TINY, {"target_loss": 0.1}, "target_loss 0.7, asked for 0.1: give the same again, or another folder"),
        (TINY, {"max_epochs": 11}, "max_epochs 10, asked for 11"),
        (tiny(seed=1), {}, "data_sha256"),
    ):
        with pytest.raises(ValueError, match=words_):
            train_zoo(dataset, GRID, tmp_path, **{**QUICK, **changes})
    assert (tmp_path / MANIFEST).read_bytes() == manifest
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="not a readable manifest"):
        train_zoo(TINY, GRID, tmp_path, **QUICK)
    with pytest.raises(FileNotFoundError, match="expected the folder of a zoo"):
        load_zoo(tmp_path / "nowhere")


def test_bad_calls_are_refused(tmp_path):
    other = dataclasses.replace(GRID[0], data="digits")
    for settings, changes, words_ in (
        ([], {}, "at least one setting"),
        ([GRID[0], GRID[1], GRID[0]], {}, "is given twice"),
        ([other], {}, "is for data 'digits', got 'tiny'"),
        ([dataclasses.replace(GRID[0], n=41)], {}, "n exceeds the 40"),
        ([dataclasses.replace(GRID[0], depth=1000)], {}, "expected fewer than 1000 layers"),
        (GRID, {"together": 0}, "together 0"),
        (GRID, {"target_loss": -1}, "target_loss -1"),
    ):
        with pytest.raises(ValueError, match=words_):
            train_zoo(TINY, settings, tmp_path / "new", **{**QUICK, **changes})
    assert not (tmp_path / "new").exists()


def test_diverged_networks_are_kept_in_the_books(tmp_path):
    wild = [dataclasses.replace(GRID[0], learning_rate=1e20, weight_decay=1e20, seed=k) for k in range(2)]
    zoo = train_zoo(TINY, [wild[0], GRID[0], wild[1]], tmp_path, **QUICK)
    assert [network.diverged for network in zoo.networks] == [True, False, True]
    assert zoo.summary()["diverged"] == 2
    assert isinstance(zoo.networks[0].train_loss, float)
    with pytest.raises(ValueError, match="training diverged, so no weights were kept"):
        zoo.networks[0].model()
    zoo.networks[0].initial()
    zoo.networks[1].model()
    only = train_zoo(TINY, wild[:1], tmp_path / "only", **QUICK)  # a shard without any weights
    assert only.quantiles() == []
    assert "(empty)" in str(only)
    assert train_zoo(TINY, wild[:1], tmp_path / "only", **QUICK).networks[0].diverged


@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_the_backend_can_be_switched(tmp_path, backend, undisturbed):
    threads = torch.get_num_threads()
    with joblib.parallel_config(backend=backend, n_jobs=2):
        zoo = train_zoo(TINY, GRID, tmp_path, together=4, **QUICK)
    assert torch.get_num_threads() == threads
    check_store(tmp_path, GRID)
    same_zoo(zoo, undisturbed)


@pytest.mark.slow
def test_dask_is_a_backend(tmp_path, undisturbed):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        zoo = train_zoo(TINY, GRID, tmp_path, together=4, **QUICK)
    check_store(tmp_path, GRID)
    same_zoo(zoo, undisturbed)


def test_a_worker_uses_one_thread(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "specprune.testbed.zoo_store.train_together",
        lambda *args, **kwargs: seen.append(torch.get_num_threads()) or train_together(*args, **kwargs),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_zoo(TINY, GRID[:2], tmp_path, **QUICK)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def train_quickly(folder):
    from pathlib import Path

    train_zoo(TINY, GRID, Path(folder), together=2, **QUICK)


@pytest.mark.slow
def test_kills_lose_nothing_and_double_nothing(tmp_path, undisturbed):
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not after every kill
    context.set_forkserver_preload(["specprune.cli", "test_zoo"])
    rng, kills, most, counts = random.Random(0), 0, 0, []
    while True:
        child = context.Process(target=train_quickly, args=(str(tmp_path),))
        child.start()
        deadline = time.monotonic() + 60
        while child.is_alive() and kills < 8 and time.monotonic() < deadline:
            if len(shards(tmp_path)) > most:  # it got on; now at any moment
                time.sleep(rng.random() * 0.1)
                child.kill()  # SIGKILL
                kills += 1
                break
            time.sleep(0.002)
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        zoo = load_zoo(tmp_path)
        assert len(zoo.networks) + len(zoo.missing) == len(GRID)
        assert len(zoo.networks) >= most
        most = len(shards(tmp_path))
        counts.append(len(zoo.networks))
    assert len(counts) >= 3
    assert counts == sorted(counts)
    assert list(tmp_path.glob(".*")) == []
    same_zoo(check_store(tmp_path, GRID), undisturbed)


# --- the command


def test_the_command_trains_prints_and_resumes(tmp_path, capsys):
    words_ = ["zoo", "--data", "digits", "--width", "8,12", "--depth", "1", "--n", "60", "--learning-rate", "0.1"]
    words_ += ["--batch-size", "20", "--weight-decay", "0", "--dropout", "0", "--label-noise", "0", "--seeds", "0,1"]
    words_ += ["--target-loss", "0.1", "--max-epochs", "60", "--out", str(tmp_path)]
    assert main(words_) == 0
    printed = capsys.readouterr().out
    assert "per_second" in printed
    assert "gap" in printed
    assert len(load_zoo(tmp_path).networks) == 4
    assert main([*words_, "--json", "--jobs", "1", "--together", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["result"]["summary"]["networks"] == 4
    assert record["result"]["summary"]["converged"] == 4
    assert (tmp_path / "zoo-summary.json").is_file()
    assert main([*words_, "--max-epochs", "61"]) == 1
    assert "max_epochs 60, asked for 61" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words_, "--width", "8,x"])
    assert "'x'" in capsys.readouterr().err
