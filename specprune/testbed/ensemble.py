"""Training networks of one shape all at once: one batched operation does a layer of every network.

All randomness is a function of a network's seed, the step and the position alone (a counter-based generator), so that
a network comes out the same in any company and on any device, up to the rounding of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specprune.testbed.datasets import Dataset
from specprune.testbed.zoo import ZooSetting, own_labels, zoo_network

MOMENTUM = 0.9
TARGET_LOSS = 0.01
MAX_EPOCHS = 2000
_CHECKED = 20  # a check after every epoch at first, later after every 1/20 of the epochs so far
_BLOCK = 1 << 22  # numbers in the largest activation of an evaluation
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER = 0x6F72646572  # tells the keys of the orders from those of the dropout
_DROPOUT = 0x64726F70


@dataclass(frozen=True, eq=False)
class ZooRun:
    """How the training of one network went.

    Attributes:
        setting: what it was trained by.
        epochs: passes over its training examples until it stopped.
        converged: whether its training loss reached the target.
        diverged: whether its training loss was no longer finite.
        train_loss: mean cross-entropy (nats) on its own training examples and labels, in evaluation mode.
        train_error: share of wrong answers there.
        test_loss: mean cross-entropy on the test examples.
        test_error: share of wrong answers there.
        weights: floating-point part of the state_dict, on the CPU; None for a diverged network.
    """

    setting: ZooSetting
    epochs: int
    converged: bool
    diverged: bool
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    weights: dict[str, Tensor] | None


def check_limits(target_loss: float, max_epochs: int) -> None:
    """Refuse a target loss or a number of epochs that makes no sense."""
    if not 0 < target_loss < math.inf:
        raise ValueError(f"target_loss {target_loss}: expected a positive number of nats")
    if max_epochs < 1:
        raise ValueError(f"max_epochs {max_epochs}: expected at least 1")


def is_check(epoch: int, max_epochs: int) -> bool:
    """Return whether a network's training loss is measured after this epoch, counted from 1.

    After each of the first 40 epochs, then at gaps of a twentieth of the epochs so far, and after the last one.
    """
    check = 1
    while check < epoch:
        check += max(1, check // _CHECKED)
    return epoch in (check, max_epochs)


def _mix64(words: np.ndarray) -> np.ndarray:
    """Return SplitMix64's bijection of uint64 words (Steele, Lea, Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw_keys(seeds: Sequence[int] | np.ndarray, purpose: int, counters: Sequence[int]) -> np.ndarray:
    """Return two 32-bit keys for every seed and counter, as int32 of shape (seeds, counters, 2).

    Args:
        seeds: of the networks.
        purpose: tells apart the streams of a seed.
        counters: non-negative numbers, one key pair each.
    """
    start = _mix64(np.asarray(seeds, dtype=np.uint64) + _GOLDEN) ^ np.uint64(purpose)
    counts = (np.asarray(counters, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    words = _mix64(_mix64(start)[:, None] + counts[None, :])
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (words >> np.uint64(32)).astype(np.uint32)
    return np.stack([low, high], axis=-1).view(np.int32)


def _shift_xor(words: Tensor, bits: int) -> None:
    words ^= (words >> bits) & ((1 << (32 - bits)) - 1)  # >> repeats the sign bit; the mask removes it


def random_words(keys: Tensor, count: int) -> Tensor:
    """Return `count` pseudo-random int32 words for each row of keys, shape (rows, count), all different in a row.

    word(i) = g(f(i + key0) + key1), with f and g the halves of the 32-bit bijection "lowbias32": the second key keeps
    rows apart whose first keys are near each other.

    Args:
        keys: int32, shape (rows, 2).
        count: words a row.

    Source:
        C. Wellons, "Prospecting for hash functions", 2018 (the constants, as recalled).
    """
    words = torch.arange(count, dtype=torch.int32, device=keys.device) + keys[:, :1]
    _shift_xor(words, 16)
    words *= 0x7FEB352D
    words += keys[:, 1:]
    _shift_xor(words, 15)
    words *= 0x846CA68B - (1 << 32)
    _shift_xor(words, 16)
    return words


def dropout_masks(keys: Tensor, share: Tensor, shape: Sequence[int]) -> Tensor:
    """Return 0 where a unit is left out and 1 / (1 - share) elsewhere, shape (M, *shape), in the type of `share`.

    Args:
        keys: int32, shape (M, 2).
        share: of the units left out, shape (M,); rounded to a multiple of 2**-32.
        shape: of one network's mask.
    """
    words = random_words(keys, math.prod(shape))
    least = (share.double() * 2**32).round() - 2**31  # words are uniform on -2**31, ..., 2**31 - 1
    kept = words >= least.to(torch.int32)[:, None]
    return (kept * (1 / (1 - share))[:, None]).view(-1, *shape)


Tensors = dict[str, Tensor]


def ensemble_outputs(
    template: nn.Sequential,
    tensors: Mapping[str, Tensor],
    inputs: Tensor,
    drop: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return what every network of an ensemble answers to its own inputs.

    Args:
        template: one of the networks; gives the kinds of the layers, none of its weights.
        tensors: the networks' state_dicts without counters, each tensor stacked along a new first axis of size M.
        inputs: images, shape (M, b, channels, height, width).
        drop: what the k-th Dropout (from 0) makes of its input; with it the networks are in training mode and the
            running statistics in `tensors` move, without it they are in evaluation mode.

    Returns:
        The outputs, shape (M, b, classes).

    Raises:
        TypeError: the template has a layer of another kind than those of `zoo_network`.
    """
    x = inputs
    drops = 0
    for name, layer in template.named_children():
        if isinstance(layer, nn.Linear):
            x = torch.baddbmm(tensors[f"{name}.bias"].unsqueeze(1), x, tensors[f"{name}.weight"].transpose(1, 2))
        elif isinstance(layer, nn.Conv2d):
            x = _convolutions(x, tensors[f"{name}.weight"])
        elif isinstance(layer, nn.BatchNorm2d):
            x = _normalized(x, layer, name, tensors, drop is not None)
        elif isinstance(layer, nn.ReLU):
            x = x.relu()
        elif isinstance(layer, nn.MaxPool2d):
            pooled = functional.max_pool2d(x.transpose(1, 2).flatten(0, 1), layer.kernel_size)
            x = pooled.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            x = x.mean((3, 4), keepdim=True)
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(2)
        elif isinstance(layer, nn.Dropout):
            x = x if drop is None else drop(drops, x)
            drops += 1
        else:
            raise TypeError(f"layer {name!r} is a {type(layer).__name__}; expected the layers of zoo_network")
    return x


def _convolutions(inputs: Tensor, weight: Tensor) -> Tensor:
    """Convolve (M, b, c, h, w) with 3x3 kernels (M, out, c, 3, 3), zeros around the image: one product a network.

    Channels come first in memory, so that normalization needs no copies.
    """
    count, batch, channels, height, width = inputs.shape
    padded = functional.pad(inputs.transpose(1, 2), (1, 1, 1, 1))
    shifted = [padded[..., row : row + height, column : column + width] for row in range(3) for column in range(3)]
    columns = torch.stack(shifted, dim=2).view(count, channels * 9, batch * height * width)
    outputs = torch.bmm(weight.flatten(2), columns)
    return outputs.view(count, -1, batch, height, width).transpose(1, 2)


def _normalized(
    inputs: Tensor, layer: nn.BatchNorm2d, name: str, tensors: Mapping[str, Tensor], training: bool
) -> Tensor:
    """Normalize (M, b, c, h, w): the M c channels are those of one batch norm."""
    channels_first = inputs.transpose(1, 2)
    outputs = functional.batch_norm(
        channels_first.reshape(1, -1, channels_first[0, 0].numel()),
        tensors[f"{name}.running_mean"].flatten(),
        tensors[f"{name}.running_var"].flatten(),
        tensors[f"{name}.weight"].flatten(),
        tensors[f"{name}.bias"].flatten(),
        training,
        0.1 if layer.momentum is None else layer.momentum,
        layer.eps,
    )
    return outputs.view(channels_first.shape).transpose(1, 2)


@torch.no_grad()
def ensemble_loss(
    template: nn.Sequential, tensors: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy (nats, summed in float64) and the error rate of every network.

    Args:
        template: one of the networks.
        tensors: the networks' stacked tensors, M of each.
        inputs: images, shape (n, channels, height, width), the same for all networks.
        targets: int64 labels of each network, shape (M, n), or (1, n) for all.

    Returns:
        Two float64 tensors on the CPU, shape (M,).
    """
    count = len(next(iter(tensors.values())))
    widest = max([inputs[0].numel(), *(_activation(layer, inputs) for layer in template)])
    size = max(1, _BLOCK // (count * widest))
    losses = torch.zeros(count, dtype=torch.float64, device=inputs.device)
    wrong = torch.zeros_like(losses)
    for part, labels in zip(inputs.split(size), targets.expand(count, -1).split(size, dim=1), strict=True):
        outputs = ensemble_outputs(template, tensors, part.expand(count, *part.shape)).double()
        losses += functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").sum(1)
        wrong += (outputs.argmax(2) != labels).sum(1)
    return (losses / len(inputs)).cpu(), (wrong / len(inputs)).cpu()


def _activation(layer: nn.Module, inputs: Tensor) -> int:
    """Return how many numbers one image takes at most inside a layer."""
    if isinstance(layer, nn.Conv2d):
        return 9 * max(layer.in_channels, layer.out_channels) * inputs.shape[2] * inputs.shape[3]
    return layer.out_features if isinstance(layer, nn.Linear) else 1


def _stacked(states: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, device: torch.device) -> Tensors:
    return {
        name: torch.stack([state[name] for state in states]).to(device, dtype)
        for name, tensor in states[0].items()
        if tensor.is_floating_point()  # counters of batches are of no use here
    }


class _Ensemble:
    """The networks that are still in training: row k of every tensor belongs to network `rows[k]`."""

    def __init__(self, examples: Dataset, settings: Sequence[ZooSetting], dtype: torch.dtype) -> None:
        device = examples.train_inputs.device
        networks = [zoo_network(setting, examples) for setting in settings]
        self.template = networks[0]
        self.trained = [name for name, _ in self.template.named_parameters()]
        self.tensors = _stacked([network.state_dict() for network in networks], dtype, device)
        self.momenta = {name: torch.zeros_like(self.tensors[name]) for name in self.trained}
        self.batch = settings[0].batch_size
        self.rows = np.arange(len(settings))
        self.sizes = np.array([setting.n for setting in settings])
        self.seeds = np.array([setting.seed for setting in settings], dtype=np.uint64)
        self.inputs = examples.train_inputs[: self.sizes.max()].to(dtype)
        self.targets = torch.zeros(len(settings), len(self.inputs), dtype=torch.int64, device=device)
        for size, noise in {(setting.n, setting.label_noise) for setting in settings}:
            which = [k for k, s in enumerate(settings) if (s.n, s.label_noise) == (size, noise)]
            self.targets[which, :size] = own_labels(examples, settings[which[0]]).train_targets
        self.order = torch.zeros_like(self.targets)
        numbers = [(s.learning_rate, s.weight_decay, s.dropout) for s in settings]
        self.rate, self.decay, self.dropout = torch.tensor(numbers, dtype=dtype, device=device).T.contiguous()
        self.drops = sum(isinstance(layer, nn.Dropout) for layer in self.template)

    def keep(self, chosen: np.ndarray) -> None:
        """Drop the networks that are not chosen (a mask); what they held is freed."""
        index = torch.from_numpy(np.flatnonzero(chosen)).to(self.inputs.device)
        self.tensors = self.some(chosen)
        self.momenta = {name: tensor[index] for name, tensor in self.momenta.items()}
        self.rows, self.sizes, self.seeds = self.rows[chosen], self.sizes[chosen], self.seeds[chosen]
        self.targets, self.order = self.targets[index], self.order[index]
        self.rate, self.decay, self.dropout = self.rate[index], self.decay[index], self.dropout[index]

    def some(self, chosen: np.ndarray) -> Tensors:
        """Return the tensors of the chosen networks (a mask)."""
        index = torch.from_numpy(np.flatnonzero(chosen)).to(self.inputs.device)
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def _keys(self, purpose: int, counters: Sequence[int], rows: np.ndarray | slice = slice(None)) -> Tensor:
        return torch.from_numpy(draw_keys(self.seeds[rows], purpose, counters)).to(self.inputs.device)

    def shuffle(self, steps: int) -> None:
        """Draw the order of the next epoch for the networks that start one after `steps` steps."""
        for size in np.unique(self.sizes):
            epoch, place = divmod(steps, size // self.batch)
            rows = np.flatnonzero(self.sizes == size)
            if place == 0:
                words = random_words(self._keys(_ORDER, [epoch], rows)[:, 0], int(size))
                self.order[torch.from_numpy(rows).to(words.device), :size] = words.argsort(dim=1, stable=True)

    def step(self, steps: int) -> None:
        """Take step number `steps` (from 0) of all networks: v = 0.9 v + g + decay w, then w = w - rate v."""
        device = self.inputs.device
        start = torch.from_numpy(steps % (self.sizes // self.batch) * self.batch).to(device)
        places = start[:, None] + torch.arange(self.batch, device=device)
        chosen = self.order.gather(1, places)
        weights = [self.tensors[name].requires_grad_() for name in self.trained]
        outputs = ensemble_outputs(self.template, self.tensors, self.inputs[chosen], self._dropper(steps))
        targets = self.targets.gather(1, chosen)
        # The sum over networks leaves each its own gradient.
        loss = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / self.batch
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for name, weight, gradient in zip(self.trained, weights, gradients, strict=True):
                shape = (-1,) + (1,) * (weight.ndim - 1)
                momentum = self.momenta[name].mul_(MOMENTUM).add_(gradient)
                momentum.addcmul_(weight, self.decay.view(shape))
                weight.addcmul_(momentum, self.rate.view(shape), value=-1)
        for weight in weights:
            weight.requires_grad_(False)

    def training_loss(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss and the error of the chosen networks (a mask) on their training sets; NaN for the others."""
        found = np.full((2, len(self.rows)), np.nan)
        for size in np.unique(self.sizes[chosen]):
            which = chosen & (self.sizes == size)
            targets = self.targets[torch.from_numpy(which).to(self.targets.device), :size]
            measured = ensemble_loss(self.template, self.some(which), self.inputs[:size], targets)
            found[:, which] = torch.stack(measured).numpy()
        return found[0], found[1]

    def _dropper(self, steps: int) -> Callable[[int, Tensor], Tensor]:
        """Return what leaves out units behind the k-th layer at a step."""
        keys = self._keys(_DROPOUT, range(steps * self.drops, (steps + 1) * self.drops))

        def drop(k: int, x: Tensor) -> Tensor:
            return x * dropout_masks(keys[:, k], self.dropout, x.shape[1:])

        return drop


def train_together(
    examples: Dataset,
    settings: Sequence[ZooSetting],
    *,
    target_loss: float = TARGET_LOSS,
    max_epochs: int = MAX_EPOCHS,
    dtype: torch.dtype = torch.float32,
) -> tuple[ZooRun, ...]:
    """Train networks of one shape at once, by SGD with momentum 0.9 on the cross-entropy.

    Each network stops at its first check (`is_check`) at which its mean cross-entropy on its own training examples and
    labels, in evaluation mode, is at most `target_loss`, or is not finite, and after `max_epochs` at the latest.  What
    becomes of it depends on its setting alone, not on the others, up to rounding; rounding grows as training goes on.

    Args:
        examples: from `zoo_examples`, at least as many as the largest n; training takes place on their device.
        settings: with equal `group`.
        target_loss: in nats, above 0.
        max_epochs: at least 1.
        dtype: of the weights while they are trained; float64 shows what is rounding and what is not.

    Returns:
        The runs in the order of the settings, with weights in `dtype`.

    Raises:
        ValueError: the settings have no common group, or do not fit the examples; a limit is out of range.
    """
    groups = sorted({setting.group for setting in settings})
    if len(groups) != 1:
        raise ValueError(f"settings of groups {groups}: expected one group, for only equal shapes train together")
    check_limits(target_loss, max_epochs)
    ensemble = _Ensemble(examples, settings, dtype)
    test = examples.test_inputs.to(dtype), examples.test_targets[None]
    runs: dict[int, ZooRun] = {}
    steps = 0
    while len(ensemble.rows):
        ensemble.shuffle(steps)
        ensemble.step(steps)
        steps += 1
        epochs, places = np.divmod(steps, ensemble.sizes // ensemble.batch)
        due = [is_check(int(e), max_epochs) and p == 0 for e, p in zip(epochs, places, strict=True)]
        if not any(due):
            continue
        losses, errors = ensemble.training_loss(np.array(due))  # NaN where none is due
        stopped = np.array(due) & (~(losses > target_loss) | ~np.isfinite(losses) | (epochs == max_epochs))
        if not stopped.any():
            continue
        tensors = ensemble.some(stopped)
        tests = [found.tolist() for found in ensemble_loss(ensemble.template, tensors, *test)]
        for k, place in enumerate(np.flatnonzero(stopped)):
            row, loss = int(ensemble.rows[place]), float(losses[place])
            finite = math.isfinite(loss)
            runs[row] = ZooRun(
                settings[row],
                int(epochs[place]),
                converged=loss <= target_loss,
                diverged=not finite,
                train_loss=loss,
                train_error=float(errors[place]),
                test_loss=tests[0][k],
                test_error=tests[1][k],
                weights={name: tensor[k].cpu() for name, tensor in tensors.items()} if finite else None,
            )
        ensemble.keep(~stopped)
    return tuple(runs[k] for k in range(len(settings)))
