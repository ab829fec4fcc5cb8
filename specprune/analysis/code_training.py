"""Training towards short words: whole-number weights by straight-through gradients, with their bits in the loss.

A network without biases and with ReLU is positively homogeneous, so no scale is learnt or sent: the weights live on
the grid -K, ..., K itself.  A latent weight is rounded in the forward pass and takes the gradient as if it were not;
what it would cost in the word, interpolated between whole numbers, is added to the loss.  Scores are divided by their
own root mean square, example by example: that changes no decision, and stands for any normalisation between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specprune.analysis.code_design import Design, front_end, gains, rounded, scores
from specprune.bounds.bound import check_count
from specprune.compress.language import ideal_bits
from specprune.compress.vocabulary import IntegerNetwork

#: Examples a step; at equal epochs 100 gave 9.0 % where 250 gave 9.6 %, more but noisier steps.
BATCH = 100
_TEMPERATURE_RATE = 3e-3
_START_TEMPERATURE = math.e
_WARM_STEPS = 100
#: The price of bits rises to its full height over this share of the steps.
_RATE_RISES = 0.3
_LAST_RATE = 2e-3
_BEYOND = 0.49  # latent weights stay this close to the grid
_TINY = 1e-12


@dataclass(frozen=True)
class Recipe:
    """How fast to train, and towards what.

    Attributes:
        learning_rate: largest step of a latent weight, in units of the grid.
        rate: nats a bit costs, times the number of examples.
        damping: share of its way to the nearest whole number that a latent weight goes in each step at the end of the
            schedule; it rises from 0.
    """

    learning_rate: float
    rate: float
    damping: float


#: A learning rate that crosses the grid in some ten steps is best: most weights end at its ends, which costs little
#: more than a sign (MNIST: .1 gives 12.0 % where .3 gives 10.9 %).  The rate is near the certificate's own exchange
#: rate of bits and errors, at a few nats an error (MNIST: 5 gives 9.0 %, 2.5 gives 8.6 %; Fashion: 24.2 and 23.8 %).
GREY = Recipe(0.3, 2.5, 0.0)
#: Harder images: at .3 58.9 %, at .1 56.9 %.  Without damping, weights jump back and forth across a rounding threshold
#: to the end (Nagel et al. 2022, arXiv:2203.11086), and errors with them: CIFAR-10 58.5 % against 56.9 %.  With the
#: larger steps of `GREY` the jumps search, and the best is kept: MNIST after 4 minutes 7.37 % without, 7.54 % damped.
COLOUR = Recipe(0.1, 6.0, 0.03)


def usual_recipe(design: Design) -> Recipe:
    """Return `COLOUR` for a design that reads three channels, `GREY` for others."""
    return COLOUR if design.channels == 3 else GREY


def unit_scores(values: Tensor) -> Tensor:
    """Return scores minus their mean, divided by their root mean square, example by example: the same decisions.

    Measured on MNIST: 8.5 % with the mean taken off, 9.1 % without.  Two scores keep it: centred ones would be 1 and
    -1, without a gradient.

    Args:
        values: shape (n, classes).
    """
    if values.shape[1] > 2:
        values = values - values.mean(1, keepdim=True)
    return values * torch.rsqrt(values.square().mean(1, keepdim=True) + _TINY)


class _Round(torch.autograd.Function):
    """Rounding with the gradient of the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, levels: int) -> Tensor:
        return rounded(weights, levels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rate_gradient(weights: Tensor, levels: int) -> Tensor:
    """Return the derivative of a layer's bits by its latent weights, interpolated between whole numbers.

    A weight of size a costs -log2 of the present share of that size, and a sign if a > 0.

    Args:
        weights: latent weights of one layer.
        levels: K.

    Returns:
        Bits per unit, in the shape of the weights.
    """
    sizes = rounded(weights, levels).abs().long().flatten()
    counts = torch.bincount(sizes, minlength=levels + 1).to(weights.dtype) + 0.5
    bits = -(counts / counts.sum()).log2()
    bits[1:] += 1
    below = weights.abs().clamp(max=levels - 1e-4).long()
    return (bits[below + 1] - bits[below]) * weights.sign()


@dataclass(eq=False)
class Latent:
    """Where a training stands: everything that is needed to go on.

    Attributes:
        weights: latent weights, one tensor a layer that owns some.
        temperature: logarithm of what unit scores are multiplied by.
        epoch: how many epochs are done.
        moments: Adam's two running means, each a list like `weights` and one for the temperature.
    """

    weights: list[Tensor]
    temperature: Tensor
    epoch: int = 0
    moments: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    def __post_init__(self) -> None:
        if not self.moments[0]:
            zeros = [torch.zeros_like(part) for part in (*self.weights, self.temperature)]
            self.moments = (zeros, [part.clone() for part in zeros])

    def to(self, device: torch.device | str) -> Latent:
        """Return the same state on another device."""
        first, second = ([part.to(device) for part in parts] for parts in self.moments)
        weights = [weight.to(device) for weight in self.weights]
        return Latent(weights, self.temperature.to(device), self.epoch, (first, second))


def random_start(design: Design, seed: int) -> Latent:
    """Return standard normal latent weights.

    Args:
        design: of the network.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    return Latent([torch.randn(shape, generator=generator) for shape in design.shapes], _first_temperature())


def start_from(weights: Sequence[Tensor], design: Design, spread: float = 1.0) -> Latent:
    """Return latent weights proportional, layer by layer, to given ones, with a root mean square of `spread`.

    Args:
        weights: of a trained or pruned network without biases, of shapes `design.shapes`.
        design: of the network.
        spread: in units of the grid.

    Raises:
        ValueError: the shapes are others, or a layer is zero or not finite.
    """
    latent = []
    for given, shape in zip(weights, design.shapes, strict=True):
        size = float(given.detach().double().square().mean().sqrt())
        if tuple(given.shape) != shape or not 0 < size < math.inf:
            raise ValueError(f"weights of shape {tuple(given.shape)}, size {size:g}: expected finite ones of {shape}")
        latent.append(given.detach().float() * (spread / size))
    for part, layer in zip(latent, design.owners, strict=True):
        part.clamp_(-layer.levels - _BEYOND, layer.levels + _BEYOND)
    return Latent(latent, _first_temperature())


def _first_temperature() -> Tensor:
    return torch.tensor(math.log(_START_TEMPERATURE))


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """A training set behind the front end, each image scaled to a root mean square of 1, which changes no decision.

    Attributes:
        maps: float32, shape (views, n, maps, height, width).
        targets: int64 labels, (n,).
    """

    maps: Tensor
    targets: Tensor

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.targets)


def training_images(design: Design, pixels: Tensor, targets: Tensor) -> TrainingImages:
    """Return the maps of a training set, computed once.

    Args:
        design: whose front end.
        pixels: uint8, shape (n, channels, height, width).
        targets: int64 labels, (n,).
    """
    maps = front_end(design, pixels)
    # Both views of an image are scaled alike: the sum of their scores must keep its sign.
    size = maps.square().mean((0, 2, 3, 4)).sqrt().clamp(min=1e-6)
    maps = maps / size[None, :, None, None, None]
    views = [view.contiguous(memory_format=torch.channels_last) for view in maps.unbind()]
    return TrainingImages(torch.stack(views) if len(views) > 1 else views[0][None], targets)


def batch_scores(images: TrainingImages, rows: Tensor | slice, weights: Sequence[Tensor], design: Design) -> Tensor:
    """Return the class scores of some images, summed over views.

    Args:
        images: the training set.
        rows: which of them.
        weights: one tensor for each layer that owns weights.
        design: of the network.
    """
    parts = [scores(view[rows], weights, design.layers) for view in images.maps]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


@torch.no_grad()
def count_float_errors(images: TrainingImages, weights: Sequence[Tensor], design: Design) -> int:
    """Return how many training images get another class than their label, in floating point.

    Fast, and equal to the exact count but for ties that rounding breaks.

    Args:
        images: the training set.
        weights: whole numbers, one tensor for each layer that owns weights.
        design: of the network.
    """
    scaled = [weight * gain for weight, gain in zip(weights, gains(design), strict=True)]
    wrong = 0
    for start in range(0, images.n, 1000):
        rows = slice(start, start + 1000)
        wrong += int((batch_scores(images, rows, scaled, design).argmax(1) != images.targets[rows]).sum())
    return wrong


def train_epochs(
    design: Design,
    images: TrainingImages,
    state: Latent,
    epochs: int,
    *,
    seed: int,
    recipe: Recipe | None = None,
    batch: int = BATCH,
    whole: bool = True,
    after_epoch: Callable[[Latent], bool] | None = None,
) -> Latent:
    """Train latent weights from where they stand to the end of a schedule of so many epochs.

    Minimises cross-entropy of the rounded network's unit scores at a learnt temperature, plus rate/n times the word's
    bits, by Adam with a half-cosine learning rate; a recipe's damping draws weights to whole numbers more and
    more.

    Args:
        design: of the network.
        images: its training set behind the front end.
        state: where to start; changed in place.  Its epoch says how much of the schedule is done.
        epochs: length of the whole schedule.
        seed: of the order of the examples, anew in each epoch.
        recipe: how fast, and what bits cost; `usual_recipe` if None.
        batch: examples a step.
        whole: whether to round; without, the weights stay real, between the ends of the grid, and bits cost nothing.
        after_epoch: called after each epoch; True stops the training.

    Returns:
        The state.

    Raises:
        ValueError: no epochs, or fewer examples than a batch has.
    """
    epochs, batch = check_count("epochs", epochs), check_count("batch", batch)
    recipe = usual_recipe(design) if recipe is None else recipe
    steps = images.n // batch
    if steps < 1:
        raise ValueError(f"{images.n} training images are fewer than a batch of {batch}")
    parameters = [part.requires_grad_() for part in (*state.weights, state.temperature)]
    optimizer = _adam(state, parameters, state.epoch * steps)
    factors, owners = gains(design), design.owners
    while state.epoch < epochs:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + state.epoch)
        order = torch.randperm(images.n, generator=generator)
        views = torch.randint(len(images.maps), (steps,), generator=generator).tolist()
        for number, (rows, view) in enumerate(zip(order[: steps * batch].split(batch), views, strict=True)):
            done = (state.epoch + number / steps) / epochs
            _set_rates(optimizer, done, state.epoch * steps + number, recipe.learning_rate)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                kernels = [
                    (_Round.apply(weight, layer.levels) if whole else weight) * factor
                    for weight, layer, factor in zip(state.weights, owners, factors, strict=True)
                ]
                # One view a step: half the time of both, and the sum of two good scores is a good one.
                values = unit_scores(scores(images.maps[view][rows], kernels, design.layers))
                values = values * state.temperature.exp()
                F.cross_entropy(values, images.targets[rows]).backward()
            with torch.no_grad():
                price = recipe.rate / images.n * min(1.0, done / _RATE_RISES) if whole else 0.0
                for weight, layer in zip(state.weights, owners, strict=True):
                    assert weight.grad is not None
                    weight.grad.add_(rate_gradient(weight, layer.levels), alpha=price)
            optimizer.step()
            with torch.no_grad():
                for weight, layer in zip(state.weights, owners, strict=True):
                    if whole and recipe.damping:
                        weight.lerp_(rounded(weight, layer.levels), recipe.damping * done)
                    weight.clamp_(-layer.levels - _BEYOND, layer.levels + _BEYOND)
        state.epoch += 1
        if after_epoch is not None and after_epoch(state):
            break
    for part in parameters:
        part.requires_grad_(False)
    return state


def _adam(state: Latent, parameters: list[Tensor], step: int) -> torch.optim.Adam:
    groups = [{"params": state.weights}, {"params": [state.temperature]}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    for part, first, second in zip(parameters, *state.moments, strict=True):
        # The state holds the same tensors, so that it is always where the optimizer is.
        optimizer.state[part] = {
            "step": torch.tensor(float(step), device=part.device),
            "exp_avg": first,
            "exp_avg_sq": second,
        }
    return optimizer


def _set_rates(optimizer: torch.optim.Optimizer, done: float, step: int, learning_rate: float) -> None:
    share = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    share *= min(1.0, (step + 1) / _WARM_STEPS)
    for group, rate in zip(optimizer.param_groups, (learning_rate, _TEMPERATURE_RATE), strict=True):
        group["lr"] = rate * share


def word_bits(network: IntegerNetwork) -> float:
    """Return the ideal length of a network's word, at most 2 bits below its real one."""
    return sum(ideal_bits(network))
