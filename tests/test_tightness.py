"""The bound table on a digits network, and Theorem A end to end: it fails no more often than it says."""

import copy
import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specprune import bound_table
from specprune.analysis import BoundTable, occam_results, trace_chain
from specprune.analysis.coded import BITS
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.margin_bounds import covering_bounds, input_norm, layer_sizes
from specprune.analysis.posterior import train_posterior
from specprune.bounds import clopper_pearson_bound, occam_bound, ramp_loss
from specprune.compress import CalibrationData, prune
from specprune.compress.coding import fold_batch_norms, quantise_network
from specprune.testbed import Recipe, initial_network, load_dataset, mlp, train

BOTH = {
    "test set (Clopper-Pearson)",
    "Occam (kl)",
    "PAC-Bayes (Maurer)",
    "PAC-Bayes (Langford-Seeger)",
    "PAC-Bayes (Catoni, grid)",
    "PAC-Bayes (McAllester)",
    "PAC-Bayes (quadratic)",
    "PAC-Bayes (lambda)",
    "matrix projection (Occam kl)",
    "covering (single scale)",
    "covering (Dudley)",
    "Bartlett 2017 (union)",
    "Golowich 2018 (frobenius)",
    "Golowich 2018 (l1)",
    "Neyshabur 2015",
    "Neyshabur 2018 (product)",
    "Neyshabur 2018 (layers)",
}
ORIGINAL_ONLY = {"disagreement + Occam (kl)", "uncompressed (coded pairs)", "low rank (original net)"}
ROWS = 2 * len(BOTH) + len(ORIGINAL_ONLY)
UNCHAINED = {name for name in BOTH if name.startswith(("test", "Occam", "PAC", "matrix"))}


@pytest.fixture(scope="module")
def problem():
    """A digits classifier, what is left of it after pruning, and the data."""
    dataset = load_dataset("digits")
    model = train(dataset, Recipe("digits", "mlp-32-24", epochs=8, batch_size=64, learning_rate=5e-3)).model
    batches = dataset.train_batches()
    return model, prune(model, batches, 0.15), batches, dataset.test_batches(), dataset


@pytest.fixture(scope="module")
def table(problem):
    model, pruned, batches, test, _ = problem
    return bound_table(model, batches, pruned, test)


def test_every_bound_of_every_network_is_there_and_sorted(table, problem):
    records = table.to_records()
    found = {(row["net"].split(",")[0], row["bound"]) for row in records}
    assert found == {(net, name) for net in ("original", "pruned") for name in BOTH} | {
        ("original", name) for name in ORIGINAL_ONLY
    }
    assert len(records) == len(found) == ROWS
    values = [row["value"] for row in records]
    assert values == sorted(values)
    assert table.samples == len(problem[4].train_targets)
    assert table.delta == 0.05


def test_the_test_error_is_below_every_bound_that_says_something(table):
    informative = [row for row in table.to_records() if not row["vacuous"]]
    assert {(row["net"].split(",")[0], row["bound"]) for row in informative} >= {("pruned", "Occam (kl)")}
    for row in informative:
        assert row["value"] < 1
        assert row["test_error"] < row["value"]
    for row in table.to_records():
        assert row["vacuous"] == (row["value"] >= 1)
        assert row["dominant"] in ("empirical", "bias", "variance", "confidence")
    assert any(row["vacuous"] for row in table.to_records())


def test_errors_are_those_of_the_networks(table, problem):
    model, pruned, batches, test, _ = problem
    for label, net in (("original", model), ("pruned", pruned.model)):
        assert table.train_errors[label] == error_rate(*collect_logits(net, CalibrationData(batches)))
        assert table.test_errors[label] == error_rate(*collect_logits(net, CalibrationData(test)))


def test_theorem_a_stands_beside_the_errors_of_the_rounded_network(table, problem):
    _, pruned, batches, test, _ = problem
    (label,) = {label for label, bound in table.bounds if label.startswith("pruned,") and bound.name == "Occam (kl)"}
    bits = int(label.split()[1])
    rounded = quantise_network(fold_batch_norms(pruned.model, CalibrationData(batches)), bits).model
    assert table.train_errors[label] == error_rate(*collect_logits(rounded, CalibrationData(batches)))
    assert table.test_errors[label] == error_rate(*collect_logits(rounded, CalibrationData(test)))
    for other, bound in table.bounds:
        if other == label:
            assert bound.terms["empirical"] == table.train_errors[label]
            assert bound.covers == "quantised pruned net"


def test_a_loader_that_shuffles_gives_the_same_table(table, problem):
    model, pruned, _, test, dataset = problem
    torch.manual_seed(0)
    pairs = TensorDataset(dataset.train_inputs, dataset.train_targets)
    shuffled = bound_table(model, DataLoader(pairs, batch_size=200, shuffle=True), pruned, test)
    values = [{(label, bound.name): bound.value for label, bound in one.bounds} for one in (table, shuffled)]
    for key, value in values[0].items():
        if key[1] != "matrix projection (Occam kl)":  # which looks for its sizes on the first samples
            assert value == pytest.approx(values[1][key], rel=1e-6), key
            assert shuffled.train_errors[key[0]] == pytest.approx(table.train_errors[key[0]])


def test_theorem_a_stands_alone_where_a_lipschitz_constant_is_unknown(problem):
    _, _, batches, test, _ = problem
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 10))
    found = bound_table(model, batches, prune(model, batches, 0.5), test)
    assert {bound.name for _, bound in found.bounds} == UNCHAINED | {"disagreement + Occam (kl)"}
    assert "GELU" in found.notes[0]
    assert "GELU" in str(found).splitlines()[-1]


def test_buffers_are_not_free(problem):
    model, _, batches, _, _ = problem
    hoarder = copy.deepcopy(model)
    hoarder.register_buffer("answers", torch.arange(1000))
    with pytest.raises(ValueError, match="answers"):
        occam_results(hoarder, CalibrationData(batches), [])


def test_the_pruned_network_alone_pays_bias_and_widths(table, problem):
    bounds = {(label.split(",")[0], bound.name): bound for label, bound in table.bounds}
    for name in ("covering (single scale)", "covering (Dudley)"):
        assert bounds["original", name].terms["bias"] == 0
        assert bounds["pruned", name].terms["bias"] > 0
        assert bounds["pruned", name].terms["variance"] < bounds["original", name].terms["variance"]
    _, pruned, batches, _, _ = problem
    data = CalibrationData(batches)
    with_widths = occam_results(pruned.model, data, [32, 24])[4]
    without = occam_results(pruned.model, data, [])[4]
    assert with_widths.network.code_length([32, 24]) == pytest.approx(
        without.network.code_length([]) + math.log(32 * 24), rel=1e-12
    )
    assert with_widths.bound.value > without.bound.value
    assert bounds["pruned", "Occam (kl)"].value == min(
        result.bound.value for result in occam_results(pruned.model, data, [32, 24]).values()
    )


@pytest.mark.parametrize(
    ("radius", "holds", "words"), [(None, False, "unproved"), (8.0, True, "D_x = 8"), (0.5, False, "= 0.5")]
)
def test_hypothesis_on_the_radius(problem, radius, holds, words):
    model, _, batches, _, _ = problem
    table = bound_table(model, batches, input_radius=radius)
    for _, bound in table.bounds:
        if bound.name.startswith("covering"):
            (hypothesis,) = bound.hypotheses
            assert hypothesis.holds is holds
            assert words in hypothesis.statement
            assert hypothesis.value == input_norm(CalibrationData(batches), model)
            assert bound.valid is holds
        elif bound.name.startswith(("Occam", "matrix", "Bartlett")):
            assert bound.valid
    assert table.test_errors == {}
    assert all(row["test_error"] is None for row in table.to_records())


def test_json_is_strict_and_text_is_a_table(table):
    def refuse(constant):
        raise AssertionError(constant)

    loaded = json.loads(table.to_json(), parse_constant=refuse)
    assert len(loaded["records"]) == len(loaded["bounds"]) == ROWS
    assert loaded["samples"] == table.samples
    assert {row["net"] for row in loaded["measures"]} >= {"original", "pruned"}
    assert {row["quantity"] for row in loaded["measures"]} >= {"operator norm", "layer cushion"}
    assert loaded["records"][0]["value"] == table.bounds[0][1].value
    lines = str(table).splitlines()
    assert f"n = {table.samples}" in lines[0]
    assert len(lines) == 3 + ROWS
    assert isinstance(table, BoundTable)


def test_occam_results_by_hand(problem):
    _, pruned, batches, _, _ = problem
    data = CalibrationData(batches)
    results = occam_results(pruned.model, data, [32, 24], delta=0.1)
    assert tuple(results) == BITS
    for bits, result in results.items():
        assert result.network.bits == bits
        logits, targets = collect_logits(result.network.model, data)
        assert result.train_error == error_rate(logits, targets)
        length = result.network.code_length([32, 24])
        assert result.bound == occam_bound(result.train_error, len(targets), length, 0.1)
        assert result.complexity == pytest.approx(math.sqrt((length + math.log(10)) / (2 * len(targets))), rel=1e-12)
        assert result.bound.value <= result.train_error + result.complexity + 1e-12
    assert results[8].train_error <= results[2].train_error


def test_layer_sizes_bound_the_layers_as_maps():
    """Norms against dense matrices: of a strided, a dilated and a dense layer, with what follows each."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.LeakyReLU(2.0),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(3, 2, 2, dilation=2, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 4),
    ).double()
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    sizes = layer_sizes(trace_chain(model, CalibrationData([x])))
    with torch.no_grad():
        for size, module, shape, factor in zip(
            sizes, (model[0], model[3], model[6]), ((1, 8, 8), (3, 3, 3), (2,)), (4.0, 0.5, 1.0), strict=True
        ):
            offset = module(torch.zeros(1, *shape, dtype=torch.float64))
            width = math.prod(shape)
            matrix = (module(torch.eye(width, dtype=torch.float64).reshape(width, *shape)) - offset).flatten(1)
            assert size.operator_norm >= factor * np.linalg.norm(matrix.numpy(), 2) * (1 - 1e-12)
            assert size.operator_norm <= factor * 3 * np.linalg.norm(matrix.numpy(), 2)
            assert size.bias_norm == pytest.approx(factor * float(offset.norm()), rel=1e-12)
            assert (size.weights, size.biases) == (module.weight.numel(), len(module.bias))


def test_layer_sizes_bound_outputs():
    """D_1 = ||x||, D_{l+1} = s_l D_l + B_l bounds what the network can give, whatever the input."""
    generator = np.random.default_rng(0)
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ELU(2.0),
            nn.MaxPool2d(3, stride=2),
            nn.Flatten(),
            nn.Linear(27, 5),
            nn.Tanh(),
            nn.Linear(5, 2),
        ).double()
        x = torch.from_numpy(
            generator.normal(size=(200, 1, 8, 8)) * 10 ** generator.uniform(-2, 2, size=(200, 1, 1, 1))
        )
        bound = x.flatten(1).norm(dim=1)
        for size in layer_sizes(trace_chain(model, CalibrationData([x]))):
            bound = size.operator_norm * bound + size.bias_norm
        assert bool((model(x).norm(dim=1) <= bound).all())


def test_covering_bounds_take_the_best_margin(problem):
    model, _, batches, _, _ = problem
    data = CalibrationData(batches)
    logits, targets = collect_logits(model, data)
    bounds = covering_bounds(
        trace_chain(model, data),
        logits,
        targets,
        0.25,
        input_radius=8.0,
        measured_radius=6.0,
        original_widths=[32, 24],
        delta=0.05,
    )
    for bound in bounds:
        gamma = float(bound.loss.removeprefix("ramp(").removesuffix(")"))
        assert bound.terms["empirical"] == ramp_loss(logits, targets, gamma)
        assert bound.terms["bias"] == pytest.approx(math.sqrt(2) / gamma * 0.25)


def test_input_norm_is_of_what_the_network_reads():
    model, x = mlp((4, 3, 2)), torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0]])
    assert input_norm(CalibrationData([x[:1], x[1:]]), model) == pytest.approx(5)
    assert input_norm(CalibrationData([x], lambda net, batch: net(10 * batch)), model) == pytest.approx(50)
    assert input_norm(CalibrationData([{"a": x}], lambda net, batch: net(batch["a"])), model) == pytest.approx(5)
    with pytest.raises(TypeError, match="one tensor"):
        input_norm(CalibrationData([{"input": x}]), mlp((4, 3, 2)))


@pytest.mark.parametrize("method", ["hybrid", "alds", "pfp"])
def test_choices_that_no_bound_pays_for_are_refused(problem, method):
    model, _, batches, *_ = problem
    small = prune(model, batches, 0.7, method=method)
    with pytest.raises(ValueError, match=f"method='{method}'"):
        bound_table(model, batches, small)


def test_data_that_is_unsuitable():
    model, x = mlp((4, 3, 2)), torch.rand(6, 4)
    with pytest.raises(TypeError, match="without targets"):
        bound_table(model, [x])
    with pytest.raises(ValueError, match="from 0 to 1"):
        bound_table(model, [(x, torch.full((6,), 2))])


def coverage(draws, samples, fit, seed=0):
    """Draw training sets, fit and round a network to each; return how often the bound fails, and all bounds.

    The problem: x in {0, ..., 7} as one-hot vectors, class 1 with probability p(x). So every risk is known exactly.
    """
    generator = np.random.default_rng(seed)
    chances = np.array([0.05, 0.9, 0.2, 0.8, 0.35, 0.65, 0.1, 0.5])
    points = torch.eye(8)
    failures, values, risks = 0, [], []
    for _ in range(draws):
        chosen = generator.integers(8, size=samples)
        targets = torch.from_numpy((generator.random(samples) < chances[chosen]).astype(np.int64))
        model = fit(points[chosen], targets, generator)
        results = occam_results(model, CalibrationData([(points[chosen], targets)]), [], delta=0.1)
        for result in results.values():  # all bits at once are covered by one delta
            with torch.no_grad():
                says_one = (result.network.model(points).argmax(dim=1) == 1).numpy()
            risk = float(np.where(says_one, 1 - chances, chances).mean())
            values.append(result.bound.value)
            risks.append(risk - result.bound.value)
        failures += max(risks[-len(results) :]) > 0
    return failures / draws, np.array(values)


def memorise(inputs, targets, generator):
    """The classifier that fits the training set best: the majority vote of each point, as a linear network."""
    votes = inputs.T @ (2.0 * targets.float() - 1) + 0.01
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([-votes, votes]))
    return model


def test_theorem_a_covers():
    failed, values = coverage(150, 60, memorise)
    assert failed <= 0.1
    assert values.min() < 1  # some say something
    failed, values = coverage(30, 2000, memorise)
    assert failed <= 0.1
    assert np.median(values) < 0.4  # and with more data all do; the best risk is 0.2


def test_without_its_price_theorem_a_would_not_cover():
    """The same experiment catches a bound that forgets to pay for the choice: training error and delta alone."""
    generator = np.random.default_rng(0)
    chances, failures = np.full(8, 0.5), 0
    for _ in range(100):
        chosen = generator.integers(8, size=24)
        targets = (generator.random(24) < chances[chosen]).astype(np.int64)
        model = memorise(torch.eye(8)[chosen], torch.from_numpy(targets), generator)
        with torch.no_grad():
            wrong = (model(torch.eye(8)[chosen]).argmax(dim=1).numpy() != targets).mean()
        failures += occam_bound(float(wrong), 24, 0.0, 0.1).value < 0.5
    assert failures > 30


def test_looseness_is_how_many_gaps_a_bound_is_above_the_training_error(table):
    for row in table.to_records():
        gap = row["test_error"] - row["train_error"]
        assert gap > 0
        assert row["looseness"] * gap == pytest.approx(row["value"] - row["train_error"])
        assert row["source"]


def test_widths_of_the_pruned_network_are_paid_for(problem, table):
    """Its norm bounds hold for all widths at once, and cost more than for a network that always had that width."""
    _, pruned, batches, _, _ = problem
    alone = {bound.name: bound for label, bound in bound_table(pruned.model, batches).bounds if label == "original"}
    paid = {bound.name: bound for label, bound in table.bounds if label == "pruned"}
    for name in ("Bartlett 2017 (union)", "Golowich 2018 (frobenius)", "Neyshabur 2015"):
        assert paid[name].terms["confidence"] > alone[name].terms["confidence"]
        assert paid[name].confidence == alone[name].confidence == 0.95
        assert paid[name].covers == "pruned net"


def test_the_original_through_the_code_is_the_sum_of_two_bounds(problem, table):
    model, pruned, batches, test, _ = problem
    (bound,) = [bound for _, bound in table.bounds if bound.name.startswith("disagreement")]
    (label,) = {label for label, one in table.bounds if label.startswith("pruned,") and one.name == "Occam (kl)"}
    coded = occam_results(pruned.model, CalibrationData(batches), [32, 24])[int(label.split()[1])]
    half = occam_bound(coded.train_error, table.samples, coded.network.code_length([32, 24]), 0.025)
    held_out = CalibrationData(test)
    ours, theirs = (collect_logits(net, held_out)[0].argmax(1) for net in (model, coded.network.model))
    limit = clopper_pearson_bound(int(np.sum(ours != theirs)), len(ours), 0.025, covers="original net")
    assert bound.value == pytest.approx(half.value + limit.value, rel=1e-9)


def test_distances_from_the_initialisation_are_shorter(problem):
    _, _, batches, _, dataset = problem
    trained = train(dataset, Recipe("digits", "mlp-32-24", epochs=2, batch_size=64))
    from_zero, from_start = (
        {bound.name: bound.value for _, bound in bound_table(trained.model, batches, reference=start).bounds}
        for start in (None, initial_network(trained))
    )
    assert from_start["Bartlett 2017 (union)"] != from_zero["Bartlett 2017 (union)"]
    assert from_start["Golowich 2018 (frobenius)"] == from_zero["Golowich 2018 (frobenius)"]


def test_latex_has_a_row_a_bound(table):
    text = table.to_latex()
    assert text.count(r"\\") == ROWS + 1
    assert text.count("{") == text.count("}")
    assert r"\textcolor{gray}" in text
    assert text.startswith(r"\begin{tabular}{llrrrrrr}")
    daggers = sum(not row["hypotheses_hold"] for row in table.to_records())
    assert text.count(r"^\dagger") == daggers > 0


def test_plot_draws_a_bar_a_bound_and_leaves_global_settings_alone(table):
    before = dict(matplotlib.rcParams)
    figure = Figure()
    ax = table.plot(figure.subplots())
    assert len(ax.patches) == ROWS
    assert ax.get_xscale() == "log"
    widths = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert widths == pytest.approx([row["value"] for row in table.to_records()])
    assert dict(matplotlib.rcParams) == before


def test_a_posterior_gets_a_row(problem):
    _, _, batches, _, dataset = problem
    trained = train(dataset, Recipe("digits", "mlp-32-24", epochs=2, batch_size=64))
    posterior = train_posterior(trained.model, batches, prior=initial_network(trained), steps=20)
    found = bound_table(trained.model, batches, posterior=posterior)
    (row,) = [row for row in found.to_records() if row["net"] == "posterior"]
    assert row["covers"] == "stochastic net"
    assert row["test_error"] is None
