"""A whole network with a PAC-Bayes certificate: a Gaussian over all weights, trained against its own bound.

The posterior draws every weight anew, independently, from N(mean, deviation^2); the prior is N(w0, v I), with w0 fixed
before the training examples were seen (the random initialisation) and v chosen after the fact from a priced grid.
Training minimises a PAC-Bayes bound on a bounded cross-entropy by gradients through one draw a step.  Whatever training
did, the certificate holds: it is computed from the finished posterior alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

from specprune.bounds.bound import Bound, FloatArray, check_count
from specprune.bounds.gaussian_posterior import (
    PRIOR_PRECISION,
    PRIOR_SCALE,
    dziugaite_roy_bound,
    gaussian_kl,
    prior_price,
    prior_variance,
)
from specprune.compress.batches import CalibrationData, Forward, batch_size, batch_targets
from specprune.compress.surgery import NORMS
from specprune.compress.tracing import map_tensors

BATCH = 128
#: Examples that one drawn network is tried on; drawing costs about as much as trying so many.
SHARE = 100
LEAST_PROBABILITY = 1e-4
#: Nats of cross-entropy that count as one error; measured: the smaller, the fewer errors and the larger KL.
NATS_AN_ERROR = 2.0
LEARNING_RATE = 3e-3
DEVIATION_RATE = 1e-2
#: Start of the deviations in units of the weights' root mean square; wide posteriors narrow where they must.
START = 2.0


@dataclass(frozen=True, eq=False)
class Posterior:
    """Independent Gaussians over all weights of a network, and the prior that they are measured against.

    Attributes:
        model: the network with every weight at its mean, in evaluation mode.
        deviations: standard deviation of every weight, by parameter name; in weight units, like all that follows.
        prior_means: w0, by parameter name.
        prior_index: j; the prior's variance is `prior_variance(j)`.
        kl: KL(posterior || prior) in nats, without the price of j.
    """

    model: nn.Module
    deviations: dict[str, Tensor]
    prior_means: dict[str, Tensor]
    prior_index: int
    kl: float

    @property
    def means(self) -> dict[str, Tensor]:
        """Return the mean of every weight, by parameter name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def prior_deviation(self) -> float:
        """Return the prior's standard deviation, the same for all weights."""
        return math.sqrt(prior_variance(self.prior_index))


class _Caller(nn.Module):
    """The network as a function of one batch of any kind, so that `functional_call` can exchange its weights."""

    def __init__(self, model: nn.Module, data: CalibrationData) -> None:
        super().__init__()
        self.model, self.data = model, data

    def forward(self, batch: Any) -> Tensor:
        return self.data.call(self.model, batch)

    def with_weights(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the outputs of the network with these weights."""
        return functional_call(self, {f"model.{name}": value for name, value in weights.items()}, (batch,))


def train_posterior(
    model: nn.Module,
    train: Iterable[Any] | CalibrationData,
    *,
    prior: nn.Module | None = None,
    steps: int = 5000,
    seed: int = 0,
    forward: Forward | None = None,
) -> Posterior:
    """Return a Gaussian posterior around a classifier, trained to make its own PAC-Bayes bound small.

    Means start at the model's weights, deviations at twice their root mean square (at most 0.31).  Adam with a
    half-cosine rate minimises (sqrt(loss + k) + sqrt(k))^2, k = (KL + ln(2 sqrt(n)/0.025)) / (2n), see
    `quadratic_bound`.  The loss is the cross-entropy, bounded at ln(1e4), of one draw of all d weights on 128 examples.
    KL is that to the prior of the best variance v = mean((m - w0)^2 + s^2), at most 0.099: d/2 ln v - sum ln s.  In the
    end v is rounded to the grid.

    Args:
        model: a classifier without batch norms (fold them), trained for a few hundred steps; left as it is.
        train: labelled batches, the same on every pass.
        prior: a network of the same form, whose weights were fixed WITHOUT these examples: the initialisation that the
            training of `model` started from.  This cannot be checked; the trained network itself here would make the
            certificate void.  None centres the prior at zero, which is always honest, but far from most networks.
        steps: optimizer steps.
        seed: of the draws and of the order of the examples.
        forward: optional `forward(model, batch)`.

    Returns:
        The posterior, on the model's device.

    Raises:
        ValueError: batch norms, no weights, a prior of another form, or weights or a loss that are not finite.
        TypeError: batches without targets.

    Source: Dziugaite and Roy 2017 (arXiv:1703.11008) for prior and certificate; Perez-Ortiz et al. 2021 for objective
        and bounded cross-entropy.
    """
    data = train if isinstance(train, CalibrationData) else CalibrationData(train, forward)
    steps = check_count("steps", steps)
    work = copy.deepcopy(model).eval().requires_grad_(False)
    _refuse(work)
    centre = _prior_means(work, prior)
    n = sum(batch_size(batch) for batch in data.passes(work, "counting examples"))
    means = {name: value.detach().clone().requires_grad_() for name, value in work.named_parameters()}
    start = math.log(min(START * _root_mean_square(means.values()), math.sqrt(prior_variance(1))))
    logs = {name: torch.full_like(value, start, requires_grad=True) for name, value in means.items()}
    groups = [
        {"params": list(means.values()), "lr": LEARNING_RATE},
        {"params": list(logs.values()), "lr": DEVIATION_RATE},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = _generator(work, seed)
    caller, batches = _Caller(work, data), _endless(data, torch.Generator().manual_seed(seed))
    nats = math.log(2 * math.sqrt(n) / 0.025)
    objective = torch.zeros(())
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc="training the posterior", leave=False, disable=None):
            batch = next(batches)
            weights = _draw(means, {name: value.exp() for name, value in logs.items()}, generator)
            loss = _bounded_cross_entropy(caller.with_weights(weights, batch), batch_targets(batch))
            k = (_divergence(means, logs, centre) + nats) / (2 * n)
            objective = ((loss + k).sqrt() + k.sqrt()).square()
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            optimizer.step()
            schedule.step()
    if not math.isfinite(objective.item()):
        raise ValueError(f"the objective became {objective.item()}; check the weights and the data for large numbers")
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            parameter.copy_(means[name])
        deviations = {name: value.exp().detach() for name, value in logs.items()}
    index, kl = _best_prior(means, deviations, centre)
    return Posterior(work, deviations, centre, index, kl)


@torch.no_grad()
def posterior_certificate(
    posterior: Posterior,
    train: Iterable[Any] | CalibrationData,
    *,
    draws: int = 6000,
    delta: float = 0.025,
    delta_draws: float = 0.01,
    seed: int = 1,
    forward: Forward | None = None,
) -> Bound:
    """Return a bound on the 0-1 error of the stochastic network, valid with probability 1 - delta - delta_draws.

    Networks are drawn anew for every 100 examples or fewer, in whole passes over the data, until there are enough.

    Args:
        posterior: from `train_posterior`.
        train: the n labelled examples; these, or others than the prior has seen.
        draws: how many independent networks at least; more make the certificate smaller, as 1/sqrt(draws).
        delta: allowed probability of failure over the examples.
        delta_draws: allowed probability of failure over the draws.
        seed: of the draws; must not be the best of several.
        forward: optional `forward(model, batch)`.

    Returns:
        A `Bound`, see `dziugaite_roy_bound`.

    Raises:
        ValueError: fewer than 8 examples, outputs that are not finite logits, or numbers out of range.
        TypeError: batches without targets.

    Source: Dziugaite and Roy 2017; the count of draws for unequal shares is derived in `monte_carlo_error`.
    """
    data = train if isinstance(train, CalibrationData) else CalibrationData(train, forward)
    draws = check_count("draws", draws)
    means, generator = posterior.means, _generator(posterior.model, seed)
    caller = _Caller(posterior.model, data)
    wrong = examples = largest = n = 0
    while largest == 0 or examples // largest < draws:
        n = 0
        for batch in data.passes(posterior.model, "drawing networks"):
            count = batch_size(batch)
            for rows in torch.arange(count).tensor_split(math.ceil(count / SHARE)):
                part = _part(batch, rows, count)
                outputs = caller.with_weights(_draw(means, posterior.deviations, generator), part)
                wrong += _count_wrong(outputs, batch_targets(part))
                largest = max(largest, len(rows))
            n += count
        examples += n
    return dziugaite_roy_bound(
        wrong / examples,
        posterior.kl,
        n,
        delta,
        index=posterior.prior_index,
        draws=examples // largest,
        delta_draws=delta_draws,
    )


def _refuse(model: nn.Module) -> None:
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    if norms:
        raise ValueError(
            f"the batch norms {norms} hold statistics of the data, which no prior over weights pays for; fold them "
            "first with specprune.compress.coding.fold_batch_norms"
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("the network has no weights to put a posterior on")
    for name, value in parameters.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must hold finite real numbers, got NaN, Inf or dtype {value.dtype}")


def _prior_means(model: nn.Module, prior: nn.Module | None) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    if prior is None:
        return {name: torch.zeros_like(value) for name, value in own.items()}
    given = dict(prior.named_parameters())
    differing = sorted(
        name
        for name in own.keys() | given.keys()
        if name not in own or name not in given or own[name].shape != given[name].shape
    )
    if differing:
        raise ValueError(
            f"the prior differs from the model in {', '.join(differing)}; give a network of the same form, such as the "
            "initialisation that the training started from, or None"
        )
    centre = {name: given[name].detach().to(value).clone() for name, value in own.items()}
    if not all(bool(torch.isfinite(value).all()) for value in centre.values()):
        raise ValueError("the prior's weights hold NaN or Inf")
    return centre


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Return the root mean square of all entries, at least 1e-3 (so that it has a logarithm)."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    return max(math.sqrt(float(flat.square().mean())), 1e-3)


def _generator(model: nn.Module, seed: int) -> torch.Generator:
    return torch.Generator(next(model.parameters()).device).manual_seed(seed)


def _draw(means: dict[str, Tensor], deviations: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return one draw of all weights."""
    weights = {}
    for name, mean in means.items():
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        weights[name] = torch.addcmul(mean, deviations[name], noise)
    return weights


def _bounded_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -ln(least + (1 - least) p), p the probability of the true class, in units of one error."""
    probabilities = (-functional.cross_entropy(outputs, targets, reduction="none")).exp()
    bounded = LEAST_PROBABILITY + (1 - LEAST_PROBABILITY) * probabilities
    return -bounded.log().mean() / NATS_AN_ERROR


def _divergence(means: dict[str, Tensor], logs: dict[str, Tensor], centre: dict[str, Tensor]) -> Tensor:
    """Return KL to the isotropic prior around the centre with the best variance that the grid has, differentiable."""
    count = sum(value.numel() for value in means.values())
    square = torch.stack([((means[name] - centre[name]).square() + (2 * logs[name]).exp()).sum() for name in means])
    # Large sums of nearly equal size cancel: they are taken in float64.
    second_moment = square.double().sum() / count
    variance = second_moment.clamp_max(prior_variance(1))
    log_sum = torch.stack([value.sum(dtype=torch.float64) for value in logs.values()]).sum()
    kl = count / 2 * (variance.log() + second_moment / variance - 1) - log_sum
    return kl.clamp_min(0).to(square.dtype)


def _flat(tensors: dict[str, Tensor]) -> FloatArray:
    return np.concatenate([value.detach().cpu().double().flatten().numpy() for value in tensors.values()])


def _best_prior(
    means: dict[str, Tensor], deviations: dict[str, Tensor], centre: dict[str, Tensor]
) -> tuple[int, float]:
    """Return the place of the prior's variance on the grid with the smallest KL and price, and that KL."""
    m, s, w = _flat(means), _flat(deviations), _flat(centre)
    best = PRIOR_PRECISION * math.log(PRIOR_SCALE / float(np.mean((m - w) ** 2 + s**2)))
    # KL is convex in j and the price moves its minimum by less than one place for more than a few hundred weights.
    places = {max(1, math.floor(best) + step) for step in (-1, 0, 1)}
    kls = {j: gaussian_kl(m, s, w, math.sqrt(prior_variance(j))) for j in sorted(places)}
    index = min(kls, key=lambda j: kls[j] + prior_price(j))
    return index, kls[index]


def _count_wrong(outputs: Tensor, targets: Tensor) -> int:
    if outputs.dim() != 2 or outputs.shape[1] < 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)}, targets of shape {tuple(targets.shape)} and {targets.dtype}: "
            "expected a classifier's (n, classes) logits and (n,) class numbers"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("a drawn network's outputs have NaN or Inf: check the data, or train the posterior for longer")
    return int((outputs.argmax(dim=1) != targets.to(outputs.device)).sum())


def _endless(data: CalibrationData, generator: torch.Generator) -> Iterator[Any]:
    """Yield parts of batches for ever, in random order within each batch."""
    while True:
        for batch in data.head():
            count = batch_size(batch)
            for rows in torch.randperm(count, generator=generator).split(BATCH):
                yield _part(batch, rows, count)


def _part(batch: Any, rows: Tensor, count: int) -> Any:
    """Return some samples of a batch of any kind."""
    return map_tensors(batch, partial(_rows, rows=rows, count=count))


def _rows(tensor: Tensor, rows: Tensor, count: int) -> Tensor:
    return tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor
