"""The pipeline: always a valid network on disk, runs that go on after an interruption, and clear refusals."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from test_code_training import halves

from specprune._files import load_arrays, save_arrays
from specprune.analysis import certify as module
from specprune.analysis.certificate import certificate_of, load_network
from specprune.analysis.certified import contradictory_labels
from specprune.analysis.certify import certify
from specprune.analysis.code_design import Design
from specprune.compress.vocabulary import LayerSpec
from specprune.testbed import Dataset

DESIGN = Design(
    1,
    2,
    False,
    (LayerSpec("conv", 3, 3, 1, 1, 2), LayerSpec("conv", 3, 3, 2, 1, 2), LayerSpec("conv", 2, 2, 1, 0, 2, relu=False)),
)
MINUTES = 0.06


def dataset(n=800, **changes):
    parts = {}
    for part, (pixels, targets) in {"train": halves(n), "test": halves(100, 1)}.items():
        parts |= {f"{part}_inputs": pixels.float() / 255, f"{part}_targets": targets}
    return Dataset(**({"name": "halves", "classes": 2} | parts | changes))


@pytest.mark.parametrize("start", ["pruned", pytest.param("scratch", marks=pytest.mark.slow)])
def test_a_short_run_finds_a_valid_certificate(tmp_path, start):
    data = dataset()
    state = torch.get_rng_state()
    found = certify(data, minutes=MINUTES, seed=1, out=tmp_path, start=start, design=DESIGN)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.certificate == certificate_of(load_network(tmp_path / "best.spnw"), data)
    assert found.certificate.value < 0.6
    values = [step.value for step in found.history]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(found.certificate.value)
    assert found.certificate.value < values[0]
    assert (found.start, found.seed, found.contradictory) == (start, 1, 0)
    records = found.to_records()
    assert len(records) == len(values)
    json.dumps(records)
    assert f"halves, {start} start, seed 1" in str(found)
    assert found.seconds < 60 * MINUTES + 10


def test_nothing_but_the_training_set_decides(tmp_path, monkeypatch):
    data = dataset()
    other = dataclasses.replace(data, test_targets=1 - data.test_targets)
    networks = []
    for number, each in enumerate((data, other)):
        steps = iter(range(10_000))
        monkeypatch.setattr(module.time, "monotonic", lambda steps=steps: 0.1 * next(steps))
        found = certify(each, minutes=0.05, out=tmp_path / str(number), start="scratch", design=DESIGN)
        networks.append(found.network)
        monkeypatch.undo()
    assert networks[0] == networks[1]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    data = dataset()
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)

    class Stop(Exception):
        pass

    ticks = iter(range(1000))
    real = module._Run._tick

    def tick(self, state=None):
        real(self, state)
        if next(ticks) == 3:
            raise Stop
        return False

    monkeypatch.setattr(module._Run, "_tick", tick)
    with pytest.raises(Stop):
        certify(data, minutes=1, out=tmp_path, start="scratch", design=DESIGN)
    before = certificate_of(load_network(tmp_path / "best.spnw"), data).value
    monkeypatch.setattr(module._Run, "_tick", real)
    kept = certify(data, minutes=0, out=tmp_path, start="scratch", design=DESIGN)
    assert kept.certificate.value == before
    seen = []
    train = module.train_epochs

    def watched(design, images, state, epochs, **settings):
        seen.append((state.epoch, epochs))
        return train(design, images, state, min(epochs, state.epoch + 2), **settings)

    monkeypatch.setattr(module, "train_epochs", watched)
    after = certify(data, minutes=kept.seconds / 60 + 0.02, out=tmp_path, start="scratch", design=DESIGN)
    assert seen[0][0] == 4
    assert seen[0][1] > 4
    assert after.certificate.value <= before
    assert after.history[: len(kept.history)] == kept.history
    assert after.seconds > kept.seconds


def test_a_run_that_is_stopped_while_it_trains_the_large_network_goes_on(tmp_path, monkeypatch):
    data = dataset()

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Run, "_pruned_weights", stopped)
    with pytest.raises(KeyboardInterrupt):
        certify(data, minutes=1, out=tmp_path, start="pruned", design=DESIGN)
    kept = certify(data, minutes=0, out=tmp_path, start="pruned", design=DESIGN)
    assert [step.phase for step in kept.history] == ["random weights"]
    monkeypatch.undo()
    after = certify(data, minutes=kept.seconds / 60 + MINUTES, out=tmp_path, start="pruned", design=DESIGN)
    assert after.certificate.value < kept.certificate.value


def test_refusals(tmp_path):
    data = dataset()
    with pytest.raises(ValueError, match="a budget of 0 minutes leaves no time to search"):
        certify(data, minutes=0, out=tmp_path, design=DESIGN)
    with pytest.raises(ValueError, match="start 'large': expected one of pruned, scratch"):
        certify(data, minutes=1, out=tmp_path, design=DESIGN, start="large")
    with pytest.raises(ValueError, match="no training image of class 2"):
        certify(dataset(classes=3), minutes=1, out=tmp_path, design=DESIGN)
    with pytest.raises(ValueError, match="40 training images are too few"):
        certify(dataset(40), minutes=1, out=tmp_path, design=DESIGN)
    filters = (LayerSpec("filters", 1, 3, 1, 1), *DESIGN.layers)
    with pytest.raises(ValueError, match="cannot be pruned to"):
        certify(data, minutes=1, out=tmp_path, design=dataclasses.replace(DESIGN, layers=filters), start="pruned")
    for minutes in (-1, math.nan):
        with pytest.raises(ValueError, match="minutes"):
            certify(data, minutes=minutes, out=tmp_path, design=DESIGN)
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_run(tmp_path):
    data = dataset()
    certify(data, minutes=MINUTES / 4, out=tmp_path, start="scratch", design=DESIGN)
    with pytest.raises(ValueError, match="choose another folder"):
        certify(data, minutes=1, seed=5, out=tmp_path, start="scratch", design=DESIGN)
    (tmp_path / "state.npz").unlink()
    with pytest.raises(ValueError, match="holds a network but no state"):
        certify(data, minutes=1, out=tmp_path, start="scratch", design=DESIGN)


def test_a_stop_between_the_first_state_and_the_first_network_is_no_end(tmp_path):
    data, settings = dataset(), {"out": tmp_path, "start": "scratch", "design": DESIGN}
    certify(data, minutes=MINUTES / 4, **settings)
    (tmp_path / "best.spnw").unlink()
    before = (tmp_path / "state.npz").read_bytes()
    with pytest.raises(ValueError, match=r"holds the state of a run but not its best\.spnw; put that back"):
        certify(data, minutes=MINUTES / 4, **settings)
    assert (tmp_path / "state.npz").read_bytes() == before
    header = load_arrays(tmp_path / "state.npz", "certify state")[1]
    save_arrays(tmp_path / "state.npz", {}, {**header, "history": []})  # as before the first network
    found = certify(data, minutes=MINUTES / 4, **settings)
    assert found.history[0].phase == "random weights"
    assert (tmp_path / "best.spnw").exists()


def test_contradictory_labels_are_counted_and_reported(tmp_path, caplog):
    pixels = torch.tensor([0, 0, 0, 9, 9, 5], dtype=torch.uint8)[:, None, None, None]
    assert contradictory_labels(pixels, torch.tensor([0, 1, 1, 0, 2, 1])) == 2
    assert contradictory_labels(pixels, torch.tensor([1, 1, 1, 2, 2, 1])) == 0
    data = dataset()
    inputs = data.train_inputs.clone()
    first = (data.train_targets == 0).nonzero()[0, 0]
    second = (data.train_targets == 1).nonzero()[0, 0]
    inputs[first] = inputs[second]
    with caplog.at_level(logging.WARNING):
        found = certify(
            dataclasses.replace(data, train_inputs=inputs),
            minutes=MINUTES / 4,
            out=tmp_path,
            start="scratch",
            design=DESIGN,
        )
    assert found.contradictory == 1
    assert "at least 1 errors" in caplog.text
    assert "at least 1 errors" in str(found)
