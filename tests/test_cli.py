"""The command line: what it prints and writes, its exit codes, and one line instead of a traceback."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import specprune
from specprune.analysis.comparison import METHODS
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.cli import build_parser, main
from specprune.compress import CalibrationData
from specprune.testbed import Recipe, default_recipe, load_checkpoint, load_dataset, save_checkpoint, train

COMMANDS = ("demo", "data", "train", "spectra", "prune", "compare", "bounds", "tradeoff", "figures")
OWN_CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))

def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 5, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    return [(inputs[:300], targets[:300])], [(inputs[300:], targets[300:])]

def inputs():
    return ([inputs for inputs, _ in data()[0]],)

def frozen():
    model = net()
    model[0].requires_grad_(False)
    return model

def broken():
    raise KeyError("no such thing")

class Surprise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.layer(inputs).no_such_thing

def surprise():
    return Surprise()

def nothing():
    return 3
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    dataset = load_dataset("digits")
    recipe = default_recipe("digits", "mlp-32-32")
    path = tmp_path_factory.mktemp("cli") / "digits.npz"
    save_checkpoint(path, train(dataset, recipe))
    return str(path)


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def fails(capsys, arguments, *words):
    assert main(arguments) == 1
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert "Traceback" not in printed
    assert printed.startswith(f"specprune {arguments[0]}: ")
    for word in words:
        assert word in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  specprune {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_parse(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    example = capsys.readouterr().out.split("example:\n  specprune ")[1].split()
    assert build_parser().parse_args(example).command == command


def test_python_dash_m(weights, tmp_path):
    command = [sys.executable, "-m", "specprune", "spectra", "--weights", weights, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "effective_rank" in done.stdout
    assert done.stderr == ""  # no progress bars in a pipe


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert specprune.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["prune", "--keep", "0"],
        ["prune", "--keep", "2"],
        ["prune", "--keep", "half"],
        ["prune", "--theta", "1.5"],
        ["prune", "--selection", "best"],
        ["prune", "--method", "svd"],
        ["compare", "--method", "svd"],
        ["prune", "--selection", "scores"],
        ["prune", "--allocation", "theory"],
        ["prune", "--round-to", "0"],
        ["prune", "--distill-steps", "-1"],
        ["compare", "--keeps", "0.5,2"],
        ["compare", "--keeps", "0.5,"],
        ["compare"],
        ["bounds", "--delta", "0"],
        ["tradeoff", "--keep", "0.1", "--lambdas", "0.1"],
        ["tradeoff", "--lambdas", "-1"],
        ["spectra", "--calibration", "0"],
        ["train", "--data", "digits"],
        ["train", "--data", "nowhere", "--net", "vgg"],
        ["prune"],
        ["prune", "--model", "package.module:net"],
        ["prune", "--model", "package", "--data", "digits"],
        ["prune", "--weights", "net.npz", "--data", "nowhere"],
        ["spectra", "--weights", "net.npz", "--seed", "-1"],
        ["spectra", "--weights", "net.npz", "--calibration", "inf"],
        ["data", "imagenet"],
        ["figures", "portrait"],
        ["figures", "--data", "mnist"],
    ],
)
def test_bad_arguments_give_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_train_then_prune(tmp_path, capsys):
    out = str(tmp_path)
    assert main(["train", "--data", "digits", "--net", "mlp-24", "--epochs", "3", "--out", out]) == 0
    assert "test error" in capsys.readouterr().out
    path = tmp_path / "digits-mlp-24-0.npz"
    assert main(["prune", "--weights", str(path), "--keep", "0.5", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "after" in printed
    assert json.loads((tmp_path / "prune.json").read_text())["result"]["groups"][0]["width_after"] == 12

    def factory():
        return specprune.testbed.load_checkpoint(path).model

    small = specprune.load_pruned(tmp_path / "pruned.npz", factory)
    assert small(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_json_is_one_document_and_is_kept(weights, tmp_path, capsys):
    for command, extra in (("spectra", []), ("prune", []), ("bounds", ["--keep", "0.3"])):
        assert main([command, "--weights", weights, "--out", str(tmp_path), "--json", *extra]) == 0
        printed = capsys.readouterr().out
        assert json.loads(printed) == json.loads((tmp_path / f"{command}.json").read_text())


def test_results_say_what_made_them(weights, tmp_path, capsys):
    assert main(["prune", "--weights", weights, "--keep", "0.15", "--seed", "3", "--out", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["command"], record["options"]["keep"], record["options"]["seed"]) == ("prune", 0.15, 3)
    assert record["options"]["weights"] == weights
    assert record["versions"]["torch"] == torch.__version__
    test = CalibrationData(load_dataset("digits").test_batches())
    before, after = (
        error_rate(*collect_logits(net, test))
        for net in (
            load_checkpoint(weights).model,
            specprune.load_pruned(tmp_path / "pruned.npz", lambda: load_checkpoint(weights).model),
        )
    )
    assert before != after
    assert (record["test_error_before"], record["test_error_after"]) == (before, after)
    assert record["file"] == str(tmp_path / "pruned.npz")


def test_random_labels_of_the_recipe_are_used_again(tmp_path, capsys):
    recipe = Recipe("digits", "mlp-64", epochs=30, random_labels=1.0, learning_rate=5e-3)
    trained = train(load_dataset("digits"), recipe)
    path = tmp_path / "random.npz"
    save_checkpoint(path, trained)
    assert main(["bounds", "--weights", str(path), "--keep", "0.9", "--out", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["result"]["records"]
    (found,) = {row["train_error"] for row in rows if row["net"] == "original"}
    assert found == pytest.approx(trained.train_error)


def test_tradeoff_writes_table_and_figure(weights, tmp_path, capsys):
    assert main(["tradeoff", "--weights", weights, "--keep", "0.2", "0.6", "--out", str(tmp_path)]) == 0
    assert "smallest bound" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"tradeoff.json", "tradeoff.pdf", "tradeoff.png"}


def test_own_network_and_data(own, tmp_path, capsys):
    arguments = ["--model", f"{own}:net", "--data", f"{own}:data", "--out", str(tmp_path / "out")]
    for command in ("spectra", "prune", "bounds"):
        assert main([command, *arguments]) == 0
    state = tmp_path / "state.pt"
    torch.save(__import__(own).net().state_dict(), state)
    assert main(["prune", *arguments, "--weights", str(state)]) == 0
    capsys.readouterr()


def test_failed_jobs_give_1_and_one_line(own, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SPECPRUNE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    net, data = f"{own}:net", f"{own}:data"
    fails(capsys, ["prune", "--weights", "nowhere.npz"], "nowhere.npz", "no such file")
    fails(capsys, ["prune", "--weights", weights, "--data", "mnist"], "mnist", "specprune data mnist")
    fails(capsys, ["prune", "--model", f"{own}:missing", "--data", data], "cannot import")
    fails(capsys, ["prune", "--model", f"{own}:broken", "--data", data], "KeyError")
    fails(capsys, ["prune", "--model", f"{own}:nothing", "--data", data], "returned int")
    fails(capsys, ["prune", "--model", net, "--data", f"{own}:nothing"], "returned int", "(train, test)")
    fails(capsys, ["prune", "--model", net, "--data", data, "--weights", weights], "state_dict")
    fails(capsys, ["prune", "--model", f"{own}:surprise", "--data", data], "AttributeError", "no_such_thing")
    fails(capsys, ["prune", "--weights", weights, "--data", "mnist", "--data-dir", str(tmp_path)], "mnist")
    fails(capsys, ["prune", "--weights", weights, "--device", "abacus"], "abacus")
    fails(capsys, ["train", "--data", "digits", "--net", "transformer"], "transformer", "mlp-")
    corrupt = tmp_path / "corrupt.npz"
    corrupt.write_bytes(b"PK\x03\x04 not really")
    fails(capsys, ["spectra", "--weights", str(corrupt)], "corrupt.npz")


def test_residual_networks_are_pruned(tmp_path, capsys):
    assert main(["train", "--data", "digits", "--net", "resnet-4-8", "--epochs", "1", "--out", str(tmp_path)]) == 0
    path = tmp_path / "digits-resnet-4-8-0.npz"
    capsys.readouterr()
    assert main(["prune", "--weights", str(path), "--keep", "0.6", "--round-to", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "latency, batch of 1: " in printed
    assert "latency, batch of 64: " in printed
    result = json.loads((tmp_path / "prune.json").read_text())["result"]
    assert all(group["width_after"] % 2 == 0 for group in result["groups"])
    small = specprune.load_pruned(tmp_path / "pruned.npz", lambda: load_checkpoint(path).model)
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_defaults_are_those_of_prune():
    options = vars(build_parser().parse_args(["prune", "--weights", "net.npz"]))
    own = {name: entry.default for name, entry in inspect.signature(specprune.prune).parameters.items()}
    shared = ("measure", "allocation", "selection", "theta", "reconstruction", "round_to", "distill_steps", "seed")
    assert {name: options[name] for name in shared} == {name: own[name] for name in shared}


@pytest.mark.slow
def test_every_choice_of_prune_reaches_it(weights, tmp_path, capsys):
    words = ["--measure", "latency", "--keep", "0.99", "--allocation", "uniform", "--selection", "thinet"]
    words += ["--theta", "0.5", "--reconstruction", "patch", "--distill-steps", "2"]
    arguments = ["prune", "--weights", weights, *words, "--out", str(tmp_path), "--json"]
    code = main(arguments)  # the clock of a busy machine may find no network that is fast enough
    printed = capsys.readouterr()
    if code:
        assert "of the latency" in printed.err
        return
    settings = json.loads(printed.out)["result"]["settings"]
    assert (settings["measure"], settings["allocation"], settings["selection"]) == ("latency", "uniform", "thinet")
    assert (settings["theta"], settings["reconstruction"], settings["distill_steps"]) == (0.5, "patch", 2)


def test_what_is_left_whole_is_printed_with_its_reason(own, tmp_path, capsys):
    arguments = ["--model", f"{own}:frozen", "--data", f"{own}:inputs", "--keep", "0.9", "--out", str(tmp_path)]
    assert main(["prune", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "left whole: 0: " in printed
    assert "frozen" in printed
    assert "test error" not in printed  # there are no labels


def test_prune_by_another_method(own, tmp_path, capsys):
    arguments = ["prune", "--model", f"{own}:net", "--data", f"{own}:data", "--out", str(tmp_path), "--keep", "0.6"]
    assert main([*arguments, "--method", "hybrid"]) == 0
    assert "FLOPs " in capsys.readouterr().out
    report = json.loads((tmp_path / "prune.json").read_text())["result"]
    assert report["settings"]["method"] == "hybrid"
    assert report["flops_after"] <= 0.6 * report["flops_before"]
    fails(capsys, [*arguments, "--method", "alds", "--theta", "0.5"], "theta=0.5")


def test_compare_writes_table_and_figure(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specprune.compress.latency._SECONDS", 0.0)  # few runs are enough for a ratio of any kind
    out = tmp_path / "out"
    network = ["--model", f"{own}:net", "--out", str(out), "--keeps", "0.6,0.4"]
    assert main(["compare", *network, "--data", f"{own}:data"]) == 0
    assert "greedy (paper)" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.pdf", "compare.png"}
    record = json.loads((out / "compare.json").read_text())
    made = {(point["method"], point["keep"]) for point in record["result"]["points"]}
    refused = {(entry["method"], entry["keep"]) for entry in record["result"]["refused"]}
    assert made | refused == {(name, keep) for name in METHODS for keep in (0.6, 0.4)}
    assert not made & refused
    assert len(made) > 30
    assert record["result"]["measured_on"] == "test"
    few = ["--method", "SiPP", "--method", "spectral", "--measure", "params"]
    assert main(["compare", *network, "--data", f"{own}:inputs", "--json", *few]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [point["method"] for point in result["points"]] == ["SiPP"] * 2 + ["spectral"] * 2
    assert result["measure"] == "params"
    assert (result["base_error"], result["measured_on"]) == (None, "calibration")


def test_an_unwritable_folder_is_a_failed_job(weights, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    fails(capsys, ["spectra", "--weights", weights, "--out", str(blocked / "sub")], "file")
