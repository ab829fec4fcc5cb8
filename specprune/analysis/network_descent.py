"""Double descent of pruned networks: train networks of many widths, prune all of them to one width, retrain, measure.

All networks of one width are trained at once, one for each seed, as a batch of parameters (torch.func); after pruning,
all of them have the same shape, and are retrained in one batch whatever their width was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.analysis.double_descent import METHOD_MARKERS, METHOD_STYLES, size_axis
from specprune.bounds.bound import check_count, check_number
from specprune.compress.pruning import prune

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Columns of the results, with their label and the style of the linear model's counterpart.
COLUMNS = {
    name: (label, {**METHOD_STYLES[linear], "marker": METHOD_MARKERS[linear], "markersize": 3.5})
    for name, label, linear in (
        ("unpruned", "not pruned", "unpruned"),
        ("magnitude", "magnitude", "magnitude"),
        ("spectral", "spectral", "hessian"),
        ("magnitude_retrained", "magnitude, retrained", "magnitude_refit"),
        ("spectral_retrained", "spectral, retrained", "hessian_refit"),
    )
}
_PRUNING = {
    "magnitude": {"selection": "magnitude", "reconstruction": "none"},
    "spectral": {"selection": "backward", "reconstruction": "sequential"},
}
_Measure = tuple[float, float]
_LEARNING_RATE = 0.01
_RETRAINING = 0.3  # of the learning rate
_HIDDEN = "0"


@dataclass(frozen=True)
class NetworkDescent:
    """Test errors of networks of several widths, as trained, pruned to one width, and retrained.

    Attributes:
        n: training examples.
        keep: hidden nodes that are left after pruning.
        widths: hidden nodes of the trained networks; the first is `keep`, which is trained small.
        seeds: of the initial weights.
        train_errors: of the networks as trained, (widths, seeds).
        test_errors: for each of `COLUMNS`, (widths, seeds).
        test_losses: likewise, mean squared errors of the one-hot targets, which training minimises.
    """

    n: int
    keep: int
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    train_errors: tuple[tuple[float, ...], ...]
    test_errors: dict[str, tuple[tuple[float, ...], ...]]
    test_losses: dict[str, tuple[tuple[float, ...], ...]]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record for each width and seed."""
        return [
            {"width": width, "seed": seed, "train": self.train_errors[i][j]}
            | {name: values[i][j] for name, values in self.test_errors.items()}
            | {f"{name}_loss": values[i][j] for name, values in self.test_losses.items()}
            for i, width in enumerate(self.widths)
            for j, seed in enumerate(self.seeds)
        ]

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json({"n": self.n, "keep": self.keep, "networks": self.to_records()})

    def __str__(self) -> str:
        rows = [
            {"width": width, "train": f"{np.mean(self.train_errors[i]):.1%}"}
            | {name: f"{np.mean(values[i]):.1%}" for name, values in self.test_errors.items()}
            for i, width in enumerate(self.widths)
        ]
        title = f"mean test error, {self.n} training examples, pruned to {self.keep} hidden nodes"
        return format_table(rows, title=title)

    def plot(self, ax: Axes | None = None, *, loss: bool = False) -> Axes:
        """Draw mean test errors against the trained width, with two standard errors.

        Args:
            ax: where to draw; new axes if None.
            loss: squared errors instead of shares of wrong answers.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt  # draws; the numbers do without

            _, ax = plt.subplots()
        scale, measured = (1, self.test_losses) if loss else (100, self.test_errors)
        trained_small = scale * float(np.mean(measured["unpruned"][0]))
        for name, (label, style) in COLUMNS.items():
            values = scale * np.array(measured[name])
            error = 2 * values.std(1, ddof=1) / math.sqrt(len(self.seeds)) if len(self.seeds) > 1 else None
            ax.errorbar(self.widths, values.mean(1), error, label=label, elinewidth=0.8, **style)
        ax.axhline(trained_small, label="trained small", **METHOD_STYLES["oracle_refit"])
        size_axis(ax)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("hidden nodes trained")
        ax.set_ylabel("test loss (squared error)" if loss else "test error [%]")
        ax.legend(frameon=False, fontsize="small")
        return ax


def network_descent(
    train_inputs: Tensor,
    train_targets: Tensor,
    test_inputs: Tensor,
    test_targets: Tensor,
    *,
    keep: int,
    widths: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    steps: int = 1500,
    device: torch.device | str = "cpu",
) -> NetworkDescent:
    """Train networks with one hidden layer at several widths, prune each to `keep` hidden nodes, and retrain.

    Training is full-batch Adam on squared errors of one-hot targets, with a half-cosine learning rate.  "magnitude"
    keeps the hidden nodes with the largest weights, as they are; "spectral" selects by the covariance of the hidden
    nodes and refits the output layer, without labels.  Retraining takes as many steps again, with labels.

    Args:
        train_inputs: shape (n, d), finite.
        train_targets: int64 labels, (n,); noisy ones make the peak high.
        test_inputs: shape (m, d).
        test_targets: int64 labels, (m,).
        keep: hidden nodes that are left: the parameter budget is keep (d + 1 + classes) + classes.
        widths: hidden nodes that are trained, each above `keep`; `keep` itself is added.
        seeds: of the initial weights, one network each.
        steps: of each training.
        device: where to train.

    Returns:
        All test errors.

    Raises:
        ValueError: widths not above `keep`, no seed, shapes that do not fit, values that are not finite.

    Source: the experiment of Chang et al. 2021 (arXiv:2012.08749), with node pruning; settings are ours.
    """
    keep, steps = check_count("keep", keep), check_count("steps", steps)
    grid = sorted({check_count("width", width) for width in widths})
    seeds = [check_count("seed", seed, low=0) for seed in seeds]
    if not grid or grid[0] <= keep or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"widths {grid} and seeds {seeds}: expected some of each, widths above {keep}, different seeds"
        )
    _check(train_inputs, train_targets, train_inputs, "train")
    _check(test_inputs, test_targets, train_inputs, "test")
    train = train_inputs.float().to(device), train_targets.to(device)
    test = test_inputs.float().to(device), test_targets.to(device)
    classes = int(torch.cat([train_targets, test_targets]).max()) + 1
    grid = [keep, *grid]
    train_errors = []
    measured: dict[str, list[tuple[_Measure, ...]]] = {name: [] for name in COLUMNS}
    pruned: dict[str, list[nn.Module]] = {name: [] for name in _PRUNING}
    for width in tqdm(grid, disable=None, desc="widths", leave=False):
        fresh = [_network(train_inputs.shape[1], width, classes, seed).to(device) for seed in seeds]
        networks = train_together(fresh, *train, steps=steps)
        train_errors.append(tuple(error for error, _ in _measures(networks, *train)))
        measured["unpruned"].append(_measures(networks, *test))
        for name, settings in _PRUNING.items():
            small = [_pruned(network, train[0], keep, width, settings) for network in networks]
            pruned[name] += small
            measured[name].append(_measures(small, *test))
    for name, small in pruned.items():
        again = _measures(train_together(small, *train, steps=steps, share=_RETRAINING), *test)
        measured[f"{name}_retrained"] = [again[i : i + len(seeds)] for i in range(0, len(again), len(seeds))]
    errors, losses = (
        {name: tuple(tuple(one[part] for one in row) for row in rows) for name, rows in measured.items()}
        for part in (0, 1)
    )
    return NetworkDescent(len(train_targets), keep, tuple(grid), tuple(seeds), tuple(train_errors), errors, losses)


def _check(inputs: Tensor, targets: Tensor, like: Tensor, name: str) -> None:
    fits = inputs.ndim == 2 and inputs.shape[1:] == like.shape[1:] and targets.shape == inputs.shape[:1]
    if not fits or not len(inputs) or not torch.isfinite(inputs).all():
        raise ValueError(
            f"{name} inputs and targets must be finite, of shapes (n, d) and (n,) with one d, and not empty; got "
            f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64 or targets.min() < 0:
        raise ValueError(f"{name} targets must be int64 class numbers from 0; got {targets.dtype} from {targets.min()}")


def _network(inputs: int, width: int, classes: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPUs' states as well
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def _pruned(network: nn.Module, inputs: Tensor, keep: int, width: int, settings: dict[str, str]) -> nn.Module:
    if keep == width:
        return network
    return prune(network, [inputs], widths={_HIDDEN: keep}, **settings).model  # type: ignore[arg-type]


def train_together(
    networks: Sequence[nn.Module], inputs: Tensor, targets: Tensor, *, steps: int, share: float = 1.0
) -> list[nn.Module]:
    """Train networks of one shape at once, as if each were trained for itself.

    Args:
        networks: modules of the same structure; not changed.
        inputs: shape (n, d).
        targets: int64 labels, (n,).
        steps: of full-batch Adam.
        share: of the usual learning rate, above 0.

    Returns:
        The trained networks.
    """
    share = check_number("share", share, 0.0, open_low=True)
    states, _ = stack_module_state(list(networks))
    states = {name: state.detach().clone().requires_grad_() for name, state in states.items()}
    shape = networks[0]

    def scores(state: dict[str, Tensor]) -> Tensor:
        return functional_call(shape, state, (inputs,))

    classes = scores({name: state[0] for name, state in states.items()}).shape[1]
    wanted = F.one_hot(targets, classes).to(inputs.dtype)
    optimizer = torch.optim.Adam(states.values(), lr=share * _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        # A sum over networks: no gradient crosses from one to another, and Adam works number by number.
        (vmap(scores)(states) - wanted).square().mean((1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    trained = []
    for number, network in enumerate(networks):
        trained.append(copy.deepcopy(network))
        trained[-1].load_state_dict({name: state[number].detach() for name, state in states.items()})
    return trained


@torch.no_grad()
def _measures(networks: Sequence[nn.Module], inputs: Tensor, targets: Tensor) -> tuple[_Measure, ...]:
    """Return share of wrong answers and mean squared error of each network."""
    found = []
    for network in networks:
        scores = network(inputs).double()
        wanted = F.one_hot(targets, scores.shape[1])
        error, loss = (scores.argmax(1) != targets).double().mean(), (scores - wanted).square().mean()
        found.append((float(error), float(loss)))
    return tuple(found)
