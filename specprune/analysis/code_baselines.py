"""What the certificates of small whole-number networks are compared with: random subspaces, and 32 bits a weight.

Both are certificates by the same theorem and count errors on the same training set.  The network's random start and the
random subspace are fixed by a seed before the data are seen, so that neither costs bits (Lotfi et al. 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specprune.analysis.code_design import Design, gains
from specprune.analysis.code_training import (
    Latent,
    Recipe,
    TrainingImages,
    batch_scores,
    count_float_errors,
    random_start,
    rate_gradient,
    rounded,
    train_epochs,
    unit_scores,
)
from specprune.bounds.bound import check_count, check_number
from specprune.bounds.code_length import code_length_limit
from specprune.bounds.occam import integer_code_length
from specprune.compress.language import counts_bits, value_counts

FLOAT_BITS = 32
#: Coefficients are whole numbers from -7 to 7 times one of these steps, which is written with 3 bits.
STEPS = tuple(2.0**-k for k in range(8))
_COEFFICIENT_LEVELS = 7
_FLOAT_RECIPE = Recipe(0.1, 0.0, 0.0)
_RATE = 0.05
_LAST = 0.02


@dataclass(frozen=True)
class Baseline:
    """A certificate of another kind of network.

    Attributes:
        method: "random subspace" or "32-bit weights".
        weights: of the network.
        dimension: numbers that are written.
        bits: length of the code.
        errors: on the training set, counted in floating point.
        n: training images.
        value: the certified error.
    """

    method: str
    weights: int
    dimension: int
    bits: float
    errors: int
    n: int
    value: float

    @property
    def train_error(self) -> float:
        """Share of wrong answers on the training set."""
        return self.errors / self.n

    def to_records(self) -> list[dict[str, Any]]:
        """Return one flat record."""
        return [vars(self) | {"train_error": self.train_error}]


def float_baseline(
    design: Design, images: TrainingImages, *, epochs: int, seed: int = 0, delta: float = 0.05, batch: int = 100
) -> Baseline:
    """Train a network in real numbers and charge 32 bits for each weight (Occam's razor at its plainest).

    Args:
        design: of the network; its levels do not matter.
        images: the training set behind the front end.
        epochs: of training.
        seed: of start and order.
        delta: allowed probability of failure, in (0, 1).
        batch: examples a step.
    """
    latent = train_epochs(
        design, images, random_start(design, seed), epochs, seed=seed, recipe=_FLOAT_RECIPE, batch=batch, whole=False
    )
    weights = [weight.detach() for weight in latent.weights]
    count = sum(weight.numel() for weight in weights)
    errors = count_float_errors(images, weights, design)
    bits = float(FLOAT_BITS * count)
    value = code_length_limit(errors, images.n, bits, delta)
    return Baseline("32-bit weights", count, count, bits, errors, images.n, value)


def subspace_baseline(
    design: Design,
    images: TrainingImages,
    dimension: int,
    *,
    epochs: int,
    seed: int = 0,
    delta: float = 0.05,
    batch: int = 100,
) -> Baseline:
    """Train whole-number coefficients of a random subspace through a random start, and charge their code.

    The weights are w0 + step P c with c in {-7, ..., 7}^d, P of random signs over sqrt(d).  The code is adaptive, as in
    the language; d, of any size, and the step are written too.  All steps are tried, each for its share of the epochs.

    Args:
        design: of the network; its levels do not matter.
        images: the training set behind the front end.
        dimension: d.
        epochs: of training, all steps together.
        seed: of start, subspace and order, fixed before the data are seen.
        delta: allowed probability of failure, in (0, 1).
        batch: examples a step.

    Raises:
        ValueError: a number is out of range.

    Source: Li et al. 2018 (intrinsic dimension); Lotfi et al. 2022 for the certificate, with an arithmetic code.
    """
    dimension, epochs = check_count("dimension", dimension), check_count("epochs", epochs)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    start = random_start(design, seed)
    origin = torch.cat([weight.flatten() for weight in start.weights])
    generator = torch.Generator().manual_seed(seed + 1)
    signs = torch.randint(2, (len(origin), dimension), generator=generator).float() * 2 - 1
    best: Baseline | None = None
    for step in STEPS:
        basis = signs * step
        found = _train_coefficients(design, images, start, origin, basis, max(1, epochs // len(STEPS)), seed, batch)
        weights = _split(origin + basis @ found, design)
        errors = count_float_errors(images, weights, design)
        table = value_counts(found.long().numpy(), _COEFFICIENT_LEVELS, torch.zeros(dimension).long().numpy())
        bits = counts_bits(table) + math.log2(len(STEPS)) + integer_code_length(dimension) / math.log(2)
        value = code_length_limit(errors, images.n, bits, delta)
        if best is None or value < best.value:
            best = Baseline("random subspace", len(origin), dimension, bits, errors, images.n, value)
    assert best is not None
    return best


def _split(flat: Tensor, design: Design) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in design.shapes])
    return [part.reshape(shape) for part, shape in zip(parts, design.shapes, strict=True)]


def _train_coefficients(
    design: Design,
    images: TrainingImages,
    start: Latent,
    origin: Tensor,
    basis: Tensor,
    epochs: int,
    seed: int,
    batch: int,
) -> Tensor:
    """Return whole-number coefficients, trained with straight-through gradients and their bits in the loss."""
    latent = torch.zeros(basis.shape[1], requires_grad=True)
    temperature = start.temperature.clone().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [latent]}, {"params": [temperature], "lr": 3e-3}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    order = torch.Generator().manual_seed(seed)
    steps, factors = max(1, images.n // batch), gains(design)
    for number in range(epochs * steps):
        if number % steps == 0:
            shuffled = torch.randperm(images.n, generator=order)
        done = number / (epochs * steps)
        optimizer.param_groups[0]["lr"] = _RATE * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * done)))
        rows = shuffled[number % steps * batch :][:batch]
        whole = latent + (rounded(latent, _COEFFICIENT_LEVELS) - latent).detach()
        kernels = [
            weight * factor for weight, factor in zip(_split(origin + basis @ whole, design), factors, strict=True)
        ]
        values = unit_scores(batch_scores(images, rows, kernels, design)) * temperature.exp()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(values, images.targets[rows]).backward()
        assert latent.grad is not None
        latent.grad += rate_gradient(latent.detach(), _COEFFICIENT_LEVELS) / images.n
        optimizer.step()
        with torch.no_grad():
            latent.clamp_(-_COEFFICIENT_LEVELS - 0.49, _COEFFICIENT_LEVELS + 0.49)
    return rounded(latent.detach(), _COEFFICIENT_LEVELS)
