"""Trained posteriors: reproducible, honest about KL and draws, and certified above the true error."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, small_convnet, small_mlp, snapshot, tensor
from scipy import stats
from torch import nn

from specprune.analysis.posterior import Posterior, posterior_certificate, train_posterior
from specprune.bounds.bound import STOCHASTIC
from specprune.bounds.gaussian_posterior import dziugaite_roy_bound, monte_carlo_error, prior_price, prior_variance
from specprune.compress.batches import CalibrationData
from specprune.compress.coding import fold_batch_norms

NOISE = 0.1


def labelled(count, seed, size=100):
    """Eight standard normal inputs, three classes by the largest of the first three, a tenth of the labels random."""
    inputs = tensor(count, 8, seed=seed)
    targets = inputs[:, :3].argmax(dim=1)
    flip = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)) < NOISE
    random = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed + 2))
    targets = torch.where(flip, random, targets)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


@pytest.fixture(scope="module")
def trained():
    """A small network's initialisation, the network after a short training, its data and its posterior."""
    batches = labelled(4000, seed=0)
    initial = small_mlp((8, 16, 3), seed=1)
    model = small_mlp((8, 16, 3), seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    optimizer.zero_grad()
    return initial, model, batches, train_posterior(model, batches, prior=initial, steps=400)


def dense_kl(posterior):
    """KL by torch.distributions, in float64."""
    total = 0.0
    for name, mean in posterior.means.items():
        own = torch.distributions.Normal(mean.double(), posterior.deviations[name].double())
        centre = posterior.prior_means[name].double()
        prior = torch.distributions.Normal(centre, torch.full_like(centre, posterior.prior_deviation))
        total += float(torch.distributions.kl_divergence(own, prior).sum())
    return total


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.03])
def test_kl_and_place_on_the_grid(trained, scale):
    initial, model, batches, _ = trained
    small = small_mlp((8, 16, 3))
    small.load_state_dict({name: scale * value for name, value in model.state_dict().items()})
    posterior = train_posterior(small, batches, prior=initial if scale == 1 else small, steps=3)
    assert posterior.kl == pytest.approx(dense_kl(posterior), rel=1e-9)
    for name, parameter in (initial if scale == 1 else small).named_parameters():
        assert torch.equal(posterior.prior_means[name], parameter)
    assert posterior.prior_deviation**2 == pytest.approx(prior_variance(posterior.prior_index))
    assert posterior.prior_index == 1 if scale == 1 else posterior.prior_index > 20
    here = posterior.kl + prior_price(posterior.prior_index)
    for step in (-1, 1):
        index = max(posterior.prior_index + step, 1)
        other = Posterior(posterior.model, posterior.deviations, posterior.prior_means, index, 0.0)
        assert here <= dense_kl(other) + prior_price(index) + 1e-9


def test_certificate_lies_above_the_error_on_new_data(trained):
    initial, model, batches, posterior = trained
    bound = posterior_certificate(posterior, batches, draws=2000)
    assert not bound.vacuous
    assert bound.valid
    assert (bound.covers, bound.loss) == (STOCHASTIC, "0-1")
    assert bound.confidence == pytest.approx(1 - 0.035)
    # New data and new draws; the random labels alone make 2/3 of a tenth wrong.
    new = posterior_certificate(posterior, labelled(20_000, seed=50), draws=2000).terms["empirical"]
    assert NOISE * 2 / 3 - 0.01 < new < bound.value < 0.4
    # Training did that: one step leaves a wide posterior, whose certificate is worse.
    start = train_posterior(model, batches, prior=initial, steps=1)
    assert posterior_certificate(start, batches, draws=2000).value > bound.value + 0.05
    # A centre at zero is honest too, and another bound.
    centred = train_posterior(model, batches, steps=100)
    assert all(bool((value == 0).all()) for value in centred.prior_means.values())
    assert centred.kl == pytest.approx(dense_kl(centred), rel=1e-9)


def test_reproducible_and_leaves_everything_alone(trained):
    initial, model, batches, _ = trained
    before, before_prior, state = snapshot(model), snapshot(initial), torch.get_rng_state()
    one, two = (train_posterior(model, batches, prior=initial, steps=5, seed=3) for _ in range(2))
    other = train_posterior(model, batches, prior=initial, steps=5, seed=4)
    first, second = (posterior_certificate(posterior, batches, draws=50, seed=9) for posterior in (one, two))
    assert first == second
    assert one.kl == two.kl != other.kl
    for name, mean in one.means.items():
        assert torch.equal(mean, two.means[name])
        assert torch.equal(one.deviations[name], two.deviations[name])
    assert posterior_certificate(one, batches, draws=50, seed=10).value != first.value
    assert torch.equal(state, torch.get_rng_state())
    assert_unchanged(model, before)
    assert_unchanged(initial, before_prior)
    assert all(parameter.grad is None for parameter in model.parameters())


def single_weight(gap, deviation):
    """A posterior whose drawn networks answer all of the constant inputs rightly, or all wrongly."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [gap]]))
    deviations = {"0.weight": torch.full((2, 1), deviation)}
    return Posterior(model.eval(), deviations, {"0.weight": torch.zeros(2, 1)}, 5, 0.0)


def constant(count, size):
    return list(zip(torch.ones(count, 1).split(size), torch.ones(count, dtype=torch.int64).split(size), strict=True))


@pytest.mark.parametrize(
    ("count", "size", "draws", "expected"),
    [(100, 100, 7, 7), (300, 300, 7, 9), (300, 128, 4, 4), (250, 250, 5, 5), (30, 30, 1, 1)],
)
def test_every_share_of_the_data_meets_a_network_of_its_own(count, size, draws, expected):
    """300 = 3 x 100; 300 = 128 + 128 + 44 = 4 x 64 + 44, which count as 4; 250 = 84 + 83 + 83, 2 a pass."""
    posterior = single_weight(0.3, 0.5)
    bound = posterior_certificate(posterior, constant(count, size), draws=draws)
    sampled = bound.terms["empirical"]
    same = dziugaite_roy_bound(sampled, 0.0, count, 0.025, index=5, draws=expected, delta_draws=0.01)
    assert bound.value == same.value


def test_sampled_error_and_its_coverage_against_the_normal_distribution():
    """The Gibbs error is Phi(-gap / (sqrt(2) deviation)); every draw is right on all examples or on none."""
    gap, deviation, draws, delta = 0.2, 0.5, 5, 0.1
    truth = float(stats.norm.cdf(-gap / (math.sqrt(2) * deviation)))
    posterior, data = single_weight(gap, deviation), CalibrationData(constant(500, 500))
    found = np.array(
        [posterior_certificate(posterior, data, draws=draws, seed=seed).terms["empirical"] for seed in range(1000)]
    )
    assert set(np.round(found * draws, 9)) <= set(range(draws + 1))
    assert found.mean() == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / (1000 * draws)))
    fails = np.mean([truth > monte_carlo_error(q, draws, delta) for q in found])
    assert 0 < fails <= delta  # 100 examples a draw taken for 100 draws would fail far more often
    assert np.mean([truth > monte_carlo_error(q, 100 * draws, delta) for q in found]) > delta


def test_convolutions_and_folded_batch_norms():
    model = small_convnet()
    batches = [(tensor(40, 2, 8, 8, seed=k), torch.arange(40) % 3) for k in range(3)]
    with pytest.raises(ValueError, match="fold"):
        train_posterior(model, batches)
    folded = fold_batch_norms(model, CalibrationData(batches))
    posterior = train_posterior(folded, batches, prior=folded, steps=3)
    assert 0 <= posterior_certificate(posterior, batches, draws=3).terms["empirical"] <= 1


def test_other_calls_and_other_dtypes():
    """The caller's `forward` is used in training and in the certificate, and float64 networks stay float64."""
    model = small_mlp().double()
    batches = [{"x": tensor(50, 8, dtype=torch.float64), "labels": torch.arange(50) % 3}]

    def forward(network, batch):
        return network(batch["x"])

    posterior = train_posterior(model, batches, steps=2, forward=forward)
    assert {value.dtype for value in posterior.means.values()} == {torch.float64}
    assert posterior_certificate(posterior, batches, draws=1, forward=forward).value <= 1


def test_refusals():
    model, batches = small_mlp(), [(tensor(20, 8), torch.arange(20) % 3)]
    with pytest.raises(ValueError, match=r"fc2.weight"):
        train_posterior(model, batches, prior=small_mlp((8, 12, 8, 3)), steps=1)
    with pytest.raises(TypeError, match="targets"):
        train_posterior(model, [tensor(20, 8)], steps=1)
    with pytest.raises(ValueError, match="no weights"):
        train_posterior(nn.Flatten(), batches)
    with pytest.raises(ValueError, match="steps"):
        train_posterior(model, batches, steps=0)
    with pytest.raises(ValueError, match="empty"):
        train_posterior(model, [], steps=1)
    broken = small_mlp()
    broken.fc1.bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"fc1.bias"):
        train_posterior(broken, batches)
    with pytest.raises(ValueError, match="NaN"):
        train_posterior(model, batches, prior=broken)
    with pytest.raises(ValueError, match="objective"):
        train_posterior(model, [(torch.full((20, 8), math.inf), batches[0][1])], steps=1)
    posterior = train_posterior(model, batches, steps=1)
    with pytest.raises(ValueError, match="draws"):
        posterior_certificate(posterior, batches, draws=0)
    with pytest.raises(ValueError, match="at least 8"):
        posterior_certificate(posterior, [(tensor(5, 8), torch.arange(5) % 3)], draws=1)
    with pytest.raises(ValueError, match="class numbers"):
        posterior_certificate(posterior, [(tensor(20, 8), torch.ones(20, 3))], draws=1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        posterior_certificate(posterior, [(torch.full((20, 8), math.inf), batches[0][1])], draws=1)
