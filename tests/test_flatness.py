"""Flatness: sigma against closed forms and a slow twin, ends of the bracket, folded batch norms, the formulas."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import nn

from specprune.analysis.flatness import (
    ALWAYS_DROPS,
    FOUND,
    NEVER_DROPS,
    _count_wrong,
    flat_sigma,
    flatness_measure,
    magnitude_pacbayes_measure,
    pacbayes_measure,
)
from specprune.bounds.gaussian_posterior import gaussian_kl

N = 1500


def separate_examples(seed, size=2.0, n=N):
    """A linear net of two classes; example i is `size` times the unit vector i, so that examples flip independently."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(n, 2, bias=False)
    with torch.no_grad():
        model.weight[0] = 0.3 + torch.rand(n, generator=generator)
        model.weight[1] = -0.5 * torch.rand(n, generator=generator)
    return model, size * torch.eye(n), torch.zeros(n, dtype=torch.int64)


def expected_sigma(model, deviation, drop=0.1):
    """Solve mean_i Phi(-(a_i - b_i) / deviation_i(sigma)) = drop; the input's length cancels."""
    a, b = model.weight.detach().double().numpy()
    return brentq(lambda sigma: ndtr(-(a - b) / deviation(a, b, sigma)).mean() - drop, 1e-3, 10)


@pytest.mark.parametrize("drop", [0.1, 0.03])
def test_noise_of_one_size_closed_form(drop):
    model, inputs, targets = separate_examples(0)
    expected = expected_sigma(model, lambda a, b, sigma: math.sqrt(2) * sigma, drop)
    found = flat_sigma(model, inputs, targets, drop=drop, tolerance=0.0, bracket=(0.1, 2.0))
    assert found.outcome == FOUND
    assert found.sigma == pytest.approx(expected, rel=0.04)  # three standard errors of ten draws, and the bracket
    assert abs(expected - expected**2) > 0.1  # the variance in place of the deviation would not pass
    assert found.sigma < found.broken <= 1.01 * found.sigma
    assert (found.accuracy, found.parameters, found.draws, found.epsilon) == (1.0, 2 * N, 10, None)


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_noise_aware_of_magnitudes_closed_form(epsilon):
    model, inputs, targets = separate_examples(1)
    expected = expected_sigma(model, lambda a, b, s: np.sqrt(s**2 * (a**2 + b**2) + 2 * epsilon**2))
    found = flat_sigma(model, inputs, targets, magnitude_aware=True, epsilon=epsilon, tolerance=0.0)
    assert found.sigma == pytest.approx(expected, rel=0.04)
    assert found.epsilon == epsilon
    without = expected_sigma(model, lambda a, b, s: s * np.sqrt(a**2 + b**2))
    if epsilon:
        assert abs(expected - without) > 0.1 * without


def test_one_example():
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.5, -0.2, 0.3], [0.2, -0.4, 0.1, 0.0]]))
    example = torch.tensor([[1.0, -0.5, 2.0, 1.5]], dtype=torch.float64)
    logits = model(example)[0].detach()
    margin, length = float(logits.max() - logits.min()), float(example.norm())
    expected = margin / (1.2815515655446004 * math.sqrt(2) * length)  # Phi(-1.28...) = 0.1
    bracket = (expected / 2, expected * 2)
    found = flat_sigma(model, example, logits.argmax()[None], draws=800, tolerance=0.0, bracket=bracket)
    assert found.sigma == pytest.approx(expected, rel=0.1)


def small_net(seed=0, n=60):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)).double()
        inputs = torch.randn(n, 5, dtype=torch.float64)
    return model, inputs, copy.deepcopy(model).eval()(inputs).argmax(1)


def slow_drop(model, inputs, targets, sigma, seed, draws, epsilon=None):
    """Drop of the accuracy, one draw, one tensor and one example at a time, from the documented noise."""
    model = copy.deepcopy(model).eval()
    originals = [parameter.detach().clone() for parameter in model.parameters()]
    count = sum(parameter.numel() for parameter in originals)
    noise = np.random.default_rng(seed).standard_normal((draws, count), dtype=np.float32).tolist()

    def right():
        with torch.no_grad():
            return sum(int(model(x[None])[0].argmax()) == int(y) for x, y in zip(inputs, targets, strict=True))

    clean, noisy = right(), 0
    for row in noise:
        values = iter(row)
        for parameter, original in zip(model.parameters(), originals, strict=True):
            moved = [
                w + (sigma if epsilon is None else math.hypot(sigma * w, epsilon)) * next(values)
                for w in original.flatten().tolist()
            ]
            parameter.data = torch.tensor(moved, dtype=original.dtype).view(original.shape)
        noisy += right()
    return (clean - noisy / draws) / len(inputs)


@pytest.mark.parametrize("magnitude_aware", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.05])
def test_agrees_with_the_slow_twin(magnitude_aware, tolerance):
    model, inputs, targets = small_net()
    targets = torch.where(torch.arange(60) < 6, (targets + 1) % 3, targets)  # some answers are wrong without noise
    epsilon = 0.02 if magnitude_aware else None
    arguments = {"magnitude_aware": True, "epsilon": 0.02} if magnitude_aware else {}
    found = flat_sigma(model, inputs, targets, tolerance=tolerance, draws=8, seed=5, **arguments)
    assert found.outcome == FOUND
    assert found.accuracy == pytest.approx(0.9)
    assert found.drop == pytest.approx(slow_drop(model, inputs, targets, found.sigma, 5, 8, epsilon), abs=1e-12)
    assert found.drop <= 0.1
    assert slow_drop(model, inputs, targets, found.broken, 5, 8, epsilon) > 0.1
    assert found.drop >= 0.1 - tolerance or found.broken <= 1.01 * found.sigma
    assert tolerance != 0.05 or found.broken > 1.01 * found.sigma  # a wide tolerance ends the search early


def test_accuracy_that_never_drops():
    model, inputs, _ = small_net()
    with torch.no_grad():
        model[3].bias[1] = 1e4
    found = flat_sigma(model, inputs, torch.ones(60, dtype=torch.int64))
    assert (found.outcome, found.sigma, found.broken, found.drop) == (NEVER_DROPS, 2.0, None, 0.0)
    found = flat_sigma(model, inputs, torch.zeros(60, dtype=torch.int64), bracket=(0.1, 0.5))  # always wrong
    assert (found.outcome, found.sigma, found.accuracy) == (NEVER_DROPS, 0.5, 0.0)


def test_accuracy_that_drops_at_any_noise():
    model = nn.Linear(N, 2, bias=False)
    with torch.no_grad():
        model.weight[0], model.weight[1] = 1e-9, 0
    found = flat_sigma(model, torch.eye(N), torch.zeros(N, dtype=torch.int64))
    assert (found.outcome, found.sigma) == (ALWAYS_DROPS, 1e-5)
    assert found.drop == pytest.approx(0.5, abs=0.02)  # of all draws, though two would have been enough to tell
    assert found.broken <= 1.01e-5
    model, inputs, targets = separate_examples(2)
    found = flat_sigma(model, inputs, targets, magnitude_aware=True, epsilon=3.0)
    assert found.outcome == ALWAYS_DROPS


def test_answer_at_the_lower_end_that_holds():
    model, inputs, targets = separate_examples(0)
    exact = flat_sigma(model, inputs, targets, tolerance=0.0)
    found = flat_sigma(model, inputs, targets, tolerance=0.0, bracket=(exact.sigma, exact.sigma * 1.009))
    assert found.outcome in (FOUND, NEVER_DROPS)
    assert found.drop == exact.drop or found.outcome == NEVER_DROPS
    found = flat_sigma(model, inputs, targets, tolerance=0.0, bracket=(exact.sigma, 2 * exact.sigma))
    assert (found.outcome, found.drop <= 0.1) == (FOUND, True)


def test_batch_norms_are_folded():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        inputs = torch.randn(600, 1, 6, 6)
        plain(3 * inputs + 1)
        nn.init.uniform_(plain[1].weight, 0.5, 2.0)
        nn.init.normal_(plain[1].bias)
    plain.eval()
    targets = plain(inputs).argmax(1)
    norm = plain[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        conv.weight.copy_(plain[0].weight * factor[:, None, None, None])
        conv.bias.copy_((plain[0].bias - norm.running_mean) * factor + norm.bias)
    folded = nn.Sequential(conv, *plain[2:])
    before = copy.deepcopy(plain.state_dict())
    plain.train()
    for aware in (False, True):
        one = flat_sigma(plain, inputs, targets, magnitude_aware=aware, tolerance=0.0)
        other = flat_sigma(folded, inputs, targets, magnitude_aware=aware, tolerance=0.0)
        assert one.parameters == other.parameters == 40 + 195
        assert one.sigma == pytest.approx(other.sigma, rel=0.011)
        assert one.drop == pytest.approx(other.drop, abs=2e-3)
    assert plain.training
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 3.0))
def test_order_of_examples_scale_and_allowed_drop(seed, factor):
    model, inputs, targets = small_net(seed % 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    one = flat_sigma(model, inputs, targets, seed=seed)
    assert one == flat_sigma(model, inputs[order], targets[order], seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    model, inputs, targets = separate_examples(seed, n=300)
    one = flat_sigma(model, inputs, targets, tolerance=0.0, bracket=(1e-5, 10.0))
    with torch.no_grad():
        model.weight.mul_(factor)
    other = flat_sigma(model, inputs, targets, tolerance=0.0, bracket=(1e-5, 10.0))
    assert other.sigma == pytest.approx(factor * one.sigma, rel=0.021)
    stricter = flat_sigma(model, inputs, targets, drop=0.05, tolerance=0.0, bracket=(1e-5, 10.0))
    assert stricter.sigma < other.sigma


def test_outputs_that_overflow_are_wrong():
    class Huge(nn.Module):
        def forward(self, inputs):
            return torch.stack([inputs[:, 0] * math.inf, inputs[:, 0], torch.full_like(inputs[:, 0], math.nan)], 1)

    assert _count_wrong(Huge(), torch.ones(4, 1), torch.tensor([0, 1, 2, 0])) == 4


def test_pacbayes_measure_against_kl():
    generator = np.random.default_rng(0)
    w, start = generator.standard_normal(30), generator.standard_normal(30)
    sigma, m = 0.07, 500
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(w, start, strict=True)))
    kl = gaussian_kl(w, np.full(30, sigma), start, sigma)
    assert pacbayes_measure(distance, sigma, m) == pytest.approx(kl / 2 + math.log(m) - math.log(sigma) + 10, rel=1e-12)
    assert pacbayes_measure(0.0, 1.0, 1) == 10
    assert pacbayes_measure(2.0, 0.5, 4) == pytest.approx(4 + math.log(8) + 10)


def test_magnitude_measure_against_a_loop():
    generator = np.random.default_rng(1)
    w, start = generator.standard_normal(40), generator.standard_normal(40)
    sigma, m, epsilon = 0.3, 700, 0.01
    moves = w - start
    for vector in (moves, w):
        total = 0.0
        square = sum(float(v) ** 2 for v in vector)
        for move in moves:
            top = epsilon**2 + (sigma**2 + 1) * square / 40
            total += 0.25 * math.log(top / (epsilon**2 + sigma**2 * float(move) ** 2))
        expected = total + math.log(m / sigma) + 10
        found = magnitude_pacbayes_measure(math.sqrt(square), moves, sigma, m, epsilon=epsilon)
        assert found == pytest.approx(expected, rel=1e-12)
    same = magnitude_pacbayes_measure(math.sqrt(40) * 0.5, [0.5, -0.5] * 20, 2.0, 1, epsilon=1e-9)
    assert same == pytest.approx(10 * math.log(5 / 4) - math.log(2) + 10)
    still = magnitude_pacbayes_measure(0.0, np.zeros(3), 0.5, 1)  # nothing moved: all that is left is epsilon
    assert still == pytest.approx(math.log(2) + 10)
    assert flatness_measure(0.25) == 16.0


def test_results_show_themselves():
    found = flat_sigma(*small_net())
    assert json.loads(found.to_json())["sigma"] == found.sigma
    assert "outcome" in str(found)
    assert found == flat_sigma(*small_net())
    assert found != flat_sigma(*small_net(), seed=1)


def test_refusals():
    model, inputs, targets = small_net()
    for arguments, message in [
        ({"drop": 0.0}, "drop must be"),
        ({"tolerance": -0.1}, "tolerance must be"),
        ({"magnitude_aware": True, "epsilon": -1.0}, "epsilon must be"),
        ({"draws": 0}, "draws must be"),
        ({"bracket": (1.0, 0.5)}, "smaller sigma first"),
        ({"bracket": (0.0, 0.5)}, "bracket must be"),
        ({"seed": -1}, "seed must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            flat_sigma(model, inputs, targets, **arguments)
    with pytest.raises(ValueError, match="int64 of shape"):
        flat_sigma(model, inputs, targets.float())
    with pytest.raises(TypeError, match="inputs is a ndarray"):
        flat_sigma(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), inputs.numpy(), targets)
    with pytest.raises(ValueError, match="devices"):
        flat_sigma(model, inputs, targets.to("meta"))
    with pytest.raises(ValueError, match="at least two classes"):
        flat_sigma(nn.Linear(5, 1).double(), inputs, 0 * targets)
    with pytest.raises(ValueError, match="no parameters"):
        flat_sigma(nn.Flatten(), inputs, targets)
    with pytest.raises(ValueError, match="cannot be folded"):
        flat_sigma(nn.Sequential(nn.BatchNorm1d(5), *model).double(), inputs, targets)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf entries"):
        flat_sigma(model, inputs, targets)
    for call in (
        lambda: pacbayes_measure(1.0, 0.0, 5),
        lambda: pacbayes_measure(-1.0, 0.1, 5),
        lambda: pacbayes_measure(1.0, 0.1, 0),
        lambda: magnitude_pacbayes_measure(1.0, [], 0.1, 5),
        lambda: magnitude_pacbayes_measure(1.0, [1.0], 0.1, 5, epsilon=0.0),
        lambda: flatness_measure(0.0),
    ):
        with pytest.raises(ValueError):
            call()
