"""`specprune measures`: a network, a zoo, the registry; what is measured once is not measured again."""

import json

import pytest
import torch

from specprune import _measures
from specprune._files import read_lines
from specprune._measures import law_gap, measured_networks
from specprune.analysis.measures import MEASURES
from specprune.cli import main
from specprune.testbed import Recipe, load_dataset, randomize_labels, save_checkpoint, train
from specprune.testbed.zoo import zoo_grid, zoo_training_set
from specprune.testbed.zoo_store import load_zoo, train_zoo

NAMES = ["params", "inverse_margin", "dof_1e-3", "log_bartlett"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """24 networks of a few digits, trained to a cross-entropy of 0.1."""
    folder = tmp_path_factory.mktemp("zoo")
    settings = zoo_grid(
        data="digits",
        family="mlp",
        width=(16, 32),
        depth=1,
        n=(30, 200),
        learning_rate=0.1,
        batch_size=20,
        label_noise=(0.0, 0.3),
        seed=(0, 1, 2),
    )
    return train_zoo(load_dataset("digits"), settings, folder, target_loss=0.1, max_epochs=300).folder


def test_zoo_is_ranked_and_drawn(zoo, tmp_path, capsys):
    assert main(["measures", *NAMES, "--zoo", str(zoo), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "measures.json").read_text())["result"]
    converged = [network for network in load_zoo(zoo).networks if network.converged]
    assert len(converged) >= 20
    assert result["ranking"]["networks"] == len(converged)
    assert {score["measure"] for score in result["ranking"]["scores"]} == set(NAMES)
    assert result["hyperparameters"] == ["width", "n", "label_noise"]
    assert all(name in shown for name in NAMES)
    own = MEASURES["params"]
    for index, network in enumerate(converged):
        assert result["networks"]["gap"][index] == pytest.approx(law_gap(network, 10))
        weights = sum(parameter.numel() for parameter in network.model().parameters())
        assert result["networks"][own.name][index] == pytest.approx((weights / network.setting.n) ** 0.5)
    for name in ("measure_ranking", "measure_scatter"):
        assert (tmp_path / f"{name}.pdf").stat().st_size > 1000
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_what_is_measured_is_not_measured_again(zoo, tmp_path, monkeypatch):
    networks, dataset, path = load_zoo(zoo).networks[:4], load_dataset("digits"), tmp_path / "measured.jsonl"
    calls = []
    real = _measures._measured

    def counted(network, dataset, names, seed):
        calls.append((network.setting.digest, tuple(names)))
        return real(network, dataset, names, seed)

    monkeypatch.setattr(_measures, "_measured", counted)
    first = measured_networks(networks, dataset, path, NAMES[:2])
    assert len(calls) == 4
    assert measured_networks(networks, dataset, path, NAMES[:2]) == first
    assert len(calls) == 4
    path.write_bytes(path.read_bytes()[:-20])  # a kill while the last line was written
    assert measured_networks(networks, dataset, path, NAMES[:2]) == first
    assert len(calls) == 5
    more = measured_networks(networks, dataset, path, NAMES)
    assert [names for _, names in calls[5:]] == [tuple(NAMES[2:])] * 4
    for old, new in zip(first, more, strict=True):
        assert {name: new["values"][name] for name in NAMES[:2]} == old["values"]
    assert len(read_lines(path)) == 8


def test_gap_is_of_the_law_that_labels_come_from(zoo):
    network = next(n for n in load_zoo(zoo).networks if n.setting.label_noise)
    dataset = load_dataset("digits")
    model = network.model()
    wrong = []
    for seed in range(400):  # draw the noisy law: test images with labels drawn anew like those in training
        noisy = randomize_labels(load_dataset_as_train(dataset), network.setting.label_noise, seed)
        with torch.no_grad():
            wrong.append(float((model(noisy.train_inputs).argmax(1) != noisy.train_targets).double().mean()))
    mean = sum(wrong) / len(wrong)
    own = zoo_training_set(dataset, network.setting)
    with torch.no_grad():
        train_error = float((model(own.train_inputs).argmax(1) != own.train_targets).double().mean())
    assert law_gap(network, 10) == pytest.approx(mean - train_error, abs=0.003)


def load_dataset_as_train(dataset):
    from dataclasses import replace

    return replace(dataset, train_inputs=dataset.test_inputs, train_targets=dataset.test_targets)


def test_one_network_and_the_registry(tmp_path, capsys):
    trained = train(load_dataset("digits"), Recipe("digits", "mlp-16", 3, 64, 5e-3), "cpu")
    save_checkpoint(tmp_path / "net.npz", trained)
    arguments = ["measures", *NAMES, "l2_dist", "--weights", str(tmp_path / "net.npz"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "l2_dist" in shown
    records = json.loads((tmp_path / "measures.json").read_text())["result"]
    values = {record["measure"]: record["value"] for record in records}
    assert values["params"] == pytest.approx(((64 * 16 + 16 + 160 + 10) / 1400) ** 0.5)
    assert main(["measures", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in listed] == list(MEASURES)


def test_mistakes_are_one_line(zoo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["measures", "no_such_measure"])
    assert "expected one of params" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["measures", "--zoo", str(zoo), "--weights", "x.npz"])
    assert "leave out --weights" in capsys.readouterr().err
    assert main(["measures", "--zoo", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err


def test_networks_or_measures_that_are_not_defined_are_left_out(zoo, tmp_path, monkeypatch):
    real = _measures._measured
    lacking = {
        "params": 1,
        "inverse_margin": 9,
    }  # of 20 to 24 networks: 1 is a rare case with the limit below, 9 is not
    count = dict.fromkeys(lacking, 0)

    def some(network, dataset, names, seed):
        record = real(network, dataset, names, seed)
        for name, most in lacking.items():
            if count[name] < most:
                count[name] += 1
                record["refused"][name] = "infinite"
                del record["values"][name]
        return record

    monkeypatch.setattr(_measures, "_measured", some)
    monkeypatch.setattr(_measures, "_RARE", 0.06)
    found = _measures.measured_zoo(zoo, None, None, tmp_path / "m.jsonl", NAMES, resamples=5)
    converged = sum(network.converged for network in load_zoo(zoo).networks)
    assert found.odd == 1
    assert len(found.table) == converged - 1
    assert set(found.dropped) == {"inverse_margin"}
    assert set(found.table.measures) == set(NAMES) - {"inverse_margin"}
    assert "1 networks are left out because" in str(found)
