"""The teaching examples run, are built as they should be, and their numbers bear out what their text says."""

import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from specprune.figures.style import figure_style

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = (
    "1_degrees_of_freedom",
    "2_prune_by_hand",
    "3_bounds_that_say_something",
    "4_double_descent_and_pruning",
    "5_low_rank_or_nodes",
    "6_certify_your_own",
)


def cells(name):
    """The cells of a script in percent format: ("markdown" or "code", text)."""
    parts = re.split(r"^# %%(.*)\n", (EXAMPLES / f"{name}.py").read_text(), flags=re.MULTILINE)
    assert not parts[0].strip()
    found = []
    for kind, text in zip(parts[1::2], parts[2::2], strict=True):
        assert kind in ("", " [markdown]")
        if kind:
            assert all(line == "#" or line.startswith("# ") for line in text.strip().splitlines())
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append(("markdown" if kind else "code", text.strip()))
    return found


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example in an empty folder; return its names and what it printed."""

    def run_one(name, figures):
        matplotlib.use("Agg")
        plt.close("all")
        home, temporary = tmp_path / "home", tmp_path / "tmp"
        home.mkdir()
        temporary.mkdir()
        monkeypatch.chdir(home)
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        before = dict(matplotlib.rcParams)
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        assert dict(matplotlib.rcParams) == before
        assert len(plt.get_fignums()) == figures
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")
        assert not list(home.iterdir())
        assert not list(temporary.glob("tmp*"))  # torch may leave an empty folder of its own
        return names, capsys.readouterr().out

    return run_one


def test_all_examples_are_listed():
    assert tuple(sorted(path.stem for path in EXAMPLES.glob("*.py"))) == NAMES
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_structure(name):
    found = cells(name)
    kinds = [kind for kind, _ in found[:2]]
    assert kinds == ["markdown", "code"]
    assert re.match(rf"# {name[0]}\. \w", found[0][1])
    assert "plt.subplots" in found[1][1]
    whole = "\n\n".join(text for kind, text in found if kind == "markdown")
    assert "What do you expect" in whole
    assert "plt.show" not in "".join(text for kind, text in found if kind == "code")
    _, answers = whole.split("## Exercises")
    count = len(re.findall(r"^\d\. ", answers.split("**Answer 1.**")[0], flags=re.MULTILINE))
    assert count >= 3
    assert re.findall(r"\*\*Answer (\d)\.\*\*", answers) == [str(k) for k in range(1, count + 1)]
    for place, (_, text) in enumerate(found):
        if text.startswith("**Answer"):
            assert found[place + 1][0] == "code"
            assert "assert " in found[place + 1][1]
        if "$" in text and found[place][0] == "markdown":
            assert text.count("$") % 2 == 0


def test_a_notebook_shows_every_figure():
    before = dict(matplotlib.rcParams)
    try:
        with figure_style():
            matplotlib.interactive(True)  # what a notebook's backend does when it opens the first figure
        assert matplotlib.is_interactive()
    finally:
        matplotlib.interactive(before["interactive"])
    assert dict(matplotlib.rcParams) == before


def test_degrees_of_freedom(run):
    names, out = run("1_degrees_of_freedom", 4)
    assert names["by_hand"] == pytest.approx(names["by_package"], rel=1e-12)
    assert np.trace(names["hat"]) == pytest.approx(names["by_hand"], rel=1e-9)
    for layer in names["spectra"].values():
        counts = [layer.degrees_of_freedom(lam) for lam in names["relative"]]
        assert all(np.diff(counts) < 0)
        assert counts[0] <= layer.width
    assert names["spectra"]["fc2"].degrees_of_freedom(1e-2) == pytest.approx(10, abs=3)  # "about ten of 128"
    assert names["q"].sum() == pytest.approx(1)
    assert abs(names["q"] - names["hidden"].leverage(1e-2)).max() < 1e-12
    assert names["once"] == pytest.approx(names["doubled"], rel=1e-8)
    assert names["energy"][1] > names["energy"][0]  # the ten leading directions of the last layer
    assert re.search(r"by hand 1\.\d+   package 1\.\d+", out)


def test_prune_by_hand(run):
    names, out = run("2_prune_by_hand", 2)
    assert names["same_nodes"]
    assert names["relative"] < 1e-6
    assert names["report"].output_loss == pytest.approx(names["output_loss"](names["kept"]), rel=1e-6)
    errors = names["errors"]
    for size in (1, 2, 3):  # 8, 16 and 32 nodes: the refit helps more than the choice
        refits = [errors[rule][size] for rule in ("random, refit", "greedy, refit")]
        cuts = [errors[rule][size] for rule in ("random, cut", "large weights, cut")]
        assert max(refits) < min(cuts)
        assert min(cuts) - max(refits) > abs(refits[0] - refits[1])
    assert names["output_loss"](names["chosen"]) < names["output_loss"](names["first"]) < 0.1
    assert all(np.diff(names["path"]) < 0)
    distance = names["distance"]
    assert distance(names["refitted"]) < distance(names["pruned"].model)  # "the same nodes come nearer"
    assert names["error_small"] < 0.1
    assert "same nodes: True" in out


@pytest.mark.slow
def test_bounds(run):
    names, out = run("3_bounds_that_say_something", 3)
    values = names["values"]
    informative = {label for label, value in values.items() if value < 1}
    assert informative == {"held-out test set (397)", "short word (below)", "code length, pruned"}
    assert next(iter(values)) == "Bartlett 2017"
    assert values["covering numbers, pruned"] < values["covering numbers"]
    assert names["product"] == pytest.approx(names["bound"].terms["variance"], rel=1e-9)
    assert max(names["factors"], key=names["factors"].get) == "product of ||W||_F"
    assert names["stretch"] <= names["spectral"] < 2 * names["stretch"]  # "nearly honest"
    assert names["frobenius"] > 5 * names["spectral"]
    assert names["most_bits"] / names["n"] == pytest.approx(1, abs=0.01)  # "about one bit an image"
    marks = names["marks"]
    assert marks["all weights"][2] > 0.999 > 0.95 > marks["pruned"][2] > 1 / 3 > marks["short word"][2]
    assert names["tail"] == pytest.approx(names["budget"], abs=1e-3)
    assert names["short_word"].test_error < names["short_word"].value
    points = names["curve"].points
    assert names["best_point"] not in (points[0], points[-1])  # "somewhere in between"
    assert names["model"](names["data"].test_inputs).argmax(1).ne(names["data"].test_targets).float().mean() < 0.03
    assert "the package's term" in out


@pytest.mark.slow
def test_double_descent(run):
    names, out = run("4_double_descent_and_pruning", 3)
    widths, large = names["widths"], names["large"]
    assert widths[int(np.argmax(large))] in (200, 220, 260)
    assert min(large) == large[-1]  # "to its lowest at the far right"
    assert large[0] == pytest.approx(0.17, abs=0.02)
    norms = names["norms"]
    assert norms[220] > 5 * max(norms[50], norms[800])
    pruned = names["pruned"]
    assert min(pruned["largest weights"]) > 0.7
    assert max(pruned["spectral, other images"]) > 3 * large[0] > 6 * pruned["spectral, other images"][-1]
    assert max(pruned["spectral, same images"]) < large[0]
    assert pruned["spectral, same images"][-1] > 1.5 * pruned["spectral, other images"][-1]
    assert names["apart"] < 1e-6
    theory = {record["size"]: record["unpruned"] for record in names["theory"].to_records()}
    for size, (mean, error) in names["dots"].items():
        near = min(theory, key=lambda other: abs(other - size))
        law = names["least_squares_law"](names["problem"], np.array([size])).gamma[0]
        assert abs(mean - law) < 4 * error + 0.03 * law
        assert theory[near] == pytest.approx(law, rel=0.2)
    assert names["small_or_large"](names["problem"], keep=25).gain > 0
    assert names["answer"].gain < 0
    assert names["fewer"][25] > names["fewer"][100] > names["fewer"][400]
    assert "Better: train on 1000 features" in out


@pytest.mark.slow
def test_low_rank_or_nodes(run):
    names, out = run("5_low_rank_or_nodes", 3)
    needed = names["needed"]
    assert needed["outputs"] < 16 < 32 < needed["weights"]
    for rank in (5, 10, 20, 40):
        by_outputs = names["output_loss"](names["cut_outputs"](rank))
        assert by_outputs < names["output_loss"](names["cut_weights"](rank))
        assert by_outputs == pytest.approx(names["left"](names["of_outputs"])[rank], rel=1e-6)
    nodes = [(size, loss) for kind, size, loss in names["rows"] if kind == "nodes"]
    ranks = [(size, loss) for kind, size, loss in names["rows"] if kind == "rank"]
    assert all(np.diff([loss for _, loss in nodes]) < 0)
    assert min(size for size, _ in ranks) > 8192 > nodes[0][0]
    found = {(point.method, point.keep): point.error for point in names["comparison"].points}
    assert all(found[method, 0.5] < 0.05 for method in names["methods"])  # "at half everything works"
    assert max(found[method, 0.1] for method in ("spectral", "hybrid")) < 0.06
    assert min(found[method, 0.1] for method in ("ALDS", "fitted low rank")) > 0.1
    assert names["difference"] < 1e-10
    assert "break even at rank 42.7" in out


@pytest.mark.slow
def test_certify_your_own(run):
    names, out = run("6_certify_your_own", 2)
    first, longer = names["first"], names["longer"]
    assert first.test_error < first.value < 1
    assert longer.value <= first.value
    assert longer.test_error < longer.value
    assert names["tail"] == pytest.approx(names["budget"], abs=1e-3)
    assert names["checked"].value == first.value
    assert names["fewer_bits"] < names["fewer_errors"] < names["shipped"]
    assert names["shipped"] == pytest.approx(0.32097, abs=1e-5)
    assert names["own"].certificate.test_error < names["own"].certificate.value
    assert names["errors_turned"] / len(names["turned"]) > first.value
    assert names["yours"].bound.value < 1
    assert "checksum" in out
