"""How small a network can be made before its training loss suffers: prunability.

With P_a the network cut to the fraction a and L the mean cross-entropy on the training set,

    prunability = min {a in (0, 1] : L(P_b) <= limit for all b >= a},   limit = L + beta or (1 + beta) L.

Three rules cut: the weights of largest magnitude over all layers stay; random weights stay; or nodes go by spectral
pruning.  A lower prunability should mean a smaller generalization gap.

The loss is measured at a grid of fractions from 1 downwards until it breaks the limit, then between the last fraction
that held and the first that did not.  The answer holds at all measured fractions above it; where the loss rises as the
fraction falls, the true prunability lies between `broken` and the answer.  A rise and fall of the loss between two
measured fractions would go unseen.

Source: Kuhn, Lyle, Gomez, Rothfuss and Gal 2021 (arXiv:2103.06002), whose abstract alone was read; the formula is
derived from the definition there.  Spectral prunability is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.analysis.evaluation import checked_logits, run_in_parts
from specprune.bounds.bound import check_count, check_number
from specprune.compress.batches import CalibrationData
from specprune.compress.cost import MEASURES, smallest_fraction
from specprune.compress.moments import check_finite_weights
from specprune.compress.pruning import prune_sweep
from specprune.compress.report import Pruned
from specprune.compress.surgery import NORMS

RULES = ("magnitude", "random")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_LINEAR_STEP, _RATIO = 0.05, 0.8  # of the grid: steps down to 1/2, then a factor
_KEEPS = ((0.8, 0.6, 0.45, 0.3), (0.2, 0.13, 0.08, 0.05))  # spectral pruning costs more: two sweeps, then one between
_BETWEEN = 3


@dataclass(frozen=True)
class Tolerance:
    """The prunability for one tolerance.

    Attributes:
        kind: "absolute" (limit L + beta) or "relative" (limit (1 + beta) L).
        beta: the tolerance; nats if absolute.
        limit: the largest allowed loss.
        fraction: the prunability, in (0, 1]; the loss holds here and at all larger fractions that were measured.
        broken: the largest measured fraction below it, where the loss exceeds the limit; None if the smallest possible
            fraction still holds.
    """

    kind: str
    beta: float
    limit: float
    fraction: float
    broken: float | None


@dataclass(frozen=True)
class Prunability:
    """How small a network can be made within tolerances of its training loss.

    Attributes:
        rule: "magnitude", "random" or "spectral".
        measure: what fractions are of: "weights", or "flops", "params" or "nodes" for spectral pruning.
        loss: L, mean cross-entropy of the whole network in nats.
        fractions: where the loss was measured, falling from 1.
        losses: the loss there; for the random rule the mean over masks.
        tolerances: one answer each.
    """

    rule: str
    measure: str
    loss: float
    fractions: tuple[float, ...]
    losses: tuple[float, ...]
    tolerances: tuple[Tolerance, ...]

    def fraction(self, kind: str, beta: float = 0.1) -> float:
        """Return the prunability for one tolerance.

        Args:
            kind: "absolute" or "relative".
            beta: the tolerance, one of those asked for.

        Raises:
            ValueError: no such tolerance was asked for.
        """
        for entry in self.tolerances:
            if (entry.kind, entry.beta) == (kind, beta):
                return entry.fraction
        known = [(entry.kind, entry.beta) for entry in self.tolerances]
        raise ValueError(f"no tolerance ({kind!r}, {beta!r}) was asked for; there are {known}")

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a tolerance."""
        head = {"rule": self.rule, "measure": self.measure, "loss": self.loss}
        return [head | vars(entry) for entry in self.tolerances]

    def to_json(self) -> str:
        """Return the records and the curve as JSON."""
        return to_json({"tolerances": self.to_records(), "fractions": self.fractions, "losses": self.losses})

    def __str__(self) -> str:
        return format_table(self.to_records(), title=f"prunability, {len(self.fractions)} fractions measured")


@torch.no_grad()
def prunability(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    rule: str = "magnitude",
    *,
    absolute: Sequence[float] = (0.1,),
    relative: Sequence[float] = (0.1,),
    masks: int = 5,
    resolution: float = 0.01,
    seed: int = 0,
) -> Prunability:
    """Return the smallest fraction of weights that a network needs to keep its training loss.

    The weights of Linear and convolution layers of all layers together are set to zero; biases, batch norms and their
    statistics, and whatever else has parameters stay as they are and are not counted.  A weight that several layers
    share counts once.

    Args:
        model: a classifier; in any mode, evaluated in evaluation mode, left as it is.
        inputs: training inputs, shape (n, ...), on the model's device.
        targets: int64 class numbers, shape (n,).
        rule: "magnitude" keeps the largest; "random" keeps random ones, the loss being the mean over masks.
        absolute: tolerances beta >= 0 of L + beta, in nats.
        relative: tolerances beta >= 0 of (1 + beta) L.
        masks: number of random masks; each is nested, so that what stays at a fraction also stays at larger ones.
        resolution: the search ends where `fraction - broken` is at most this share of the fraction and of 1 - broken,
            or one weight.
        seed: of the random masks.

    Returns:
        One answer a tolerance, all from one curve of losses.

    Raises:
        ValueError: numbers out of range, an unknown rule, data that do not fit, weights or outputs that are not finite,
            no such layer, a layer whose weight is computed from other parameters, or a batch norm without statistics.
        TypeError: arguments of another type.

    Source: Kuhn et al. 2021 (arXiv:2103.06002), from the definition; the tolerances and the search are choices here.
    """
    limits = _check_tolerances(absolute, relative)
    check_number("resolution", resolution, 0.0, open_high=True, high=1.0)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {RULES}; spectral pruning has spectral_prunability")
    work = _evaluation_copy(model)
    weights = _weights(work)
    checked_logits(work, inputs, targets)
    originals = [weight.detach().clone() for weight in weights]
    magnitudes = torch.cat([weight.flatten().double().abs() for weight in originals])
    count = len(magnitudes)
    if rule == "magnitude":
        orders = [magnitudes.argsort(descending=True, stable=True)]
    else:
        generator = np.random.default_rng(check_count("seed", seed, 0))  # not torch's, from which initial weights come
        orders = [torch.from_numpy(generator.permutation(count)) for _ in range(check_count("masks", masks))]
    places = [_places(order.to(inputs.device), originals) for order in orders]

    def loss_at(kept: int) -> float:
        losses = []
        for place in places:
            for weight, original, own in zip(weights, originals, place, strict=True):
                weight.copy_(torch.where(own < kept, original, torch.zeros_like(original)))
            losses.append(_mean_loss(work, inputs, targets))
        return math.fsum(losses) / len(losses)

    curve = _search(loss_at, count, limits, resolution)
    return _result(rule, "weights", {kept / count: loss for kept, loss in curve.items()}, limits)


def spectral_prunability(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    calibration: Tensor | None = None,
    measure: str = "flops",
    absolute: Sequence[float] = (0.1,),
    relative: Sequence[float] = (0.1,),
    seed: int = 0,
) -> Prunability:
    """Return the smallest fraction of FLOPs or nodes to which spectral pruning shrinks a network at its training loss.

    `specprune.prune` runs with its default settings at eight budgets from 0.8 down to 0.05 of the cost, as far as the
    tolerances need, at the smallest network there is, and at three budgets between the last that held and the first
    that did not.  Fractions are those that were reached, not those that were asked for.

    Args:
        model: a classifier that `specprune.prune` can cut; in any mode, left as it is.
        inputs: training inputs, shape (n, ...), on the model's device; the loss is measured on them.
        targets: int64 class numbers, shape (n,).
        calibration: inputs that pruning sees; by default the training inputs, fewer are faster.
        measure: "flops", "nodes" (hidden units in groups that can be cut) or "params".
        absolute: tolerances beta >= 0 of L + beta, in nats.
        relative: tolerances beta >= 0 of (1 + beta) L.
        seed: as in `specprune.prune`.

    Returns:
        One answer a tolerance, all from one curve of losses.  `broken` says how fine the grid is there.

    Raises:
        ValueError: numbers out of range, data that do not fit, weights or outputs that are not finite, a batch norm
            without statistics, or a network in which nothing can be pruned.
        TypeError: arguments of another type.

    Source: the definition of Kuhn et al. 2021 (arXiv:2103.06002) with another pruning; ours.
    """
    limits = _check_tolerances(absolute, relative)
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: expected one of {MEASURES}")
    work = _evaluation_copy(model)
    checked_logits(work, inputs, targets)
    seen = inputs if calibration is None else calibration
    data = CalibrationData(list(seen.split(512)))
    least = smallest_fraction(work, data, measure)
    with torch.no_grad():
        curve = {1.0: _mean_loss(work, inputs, targets)}

    def measure_at(keeps: Sequence[float]) -> None:
        for pruned in prune_sweep(work, data, keeps, measure=measure, seed=seed):
            fraction = _reached(pruned, measure)
            with torch.no_grad():
                loss = _mean_loss(pruned.model.eval(), inputs, targets)
            curve[fraction] = max(loss, curve.get(fraction, -math.inf))  # two networks of one size: both must hold

    first, last = ([keep for keep in keeps if keep > least] for keeps in _KEEPS)
    for keeps in (first, [*last, least]):
        if keeps and any(_boundary(curve, limit)[1] is None for limit in _levels(curve, limits)):
            measure_at(keeps)
    gaps = {_boundary(curve, limit) for limit in _levels(curve, limits)}
    inner = {
        broken + (held - broken) * step / (_BETWEEN + 1)
        for held, broken in gaps
        if broken is not None
        for step in range(1, _BETWEEN + 1)
    }
    between = [keep for keep in sorted(inner, reverse=True) if keep > least]
    if between:
        measure_at(between)
    return _result("spectral", measure, curve, limits)


def _check_tolerances(absolute: Sequence[float], relative: Sequence[float]) -> list[tuple[str, float]]:
    for name, values in (("absolute", absolute), ("relative", relative)):
        if isinstance(values, str | bytes) or not isinstance(values, Sequence):
            raise TypeError(f"{name}={values!r}: expected a sequence of tolerances, for example (0.1,)")
    limits = [("absolute", check_number("absolute", beta, 0.0)) for beta in absolute]
    limits += [("relative", check_number("relative", beta, 0.0)) for beta in relative]
    if not limits:
        raise ValueError("absolute and relative are both empty; give at least one tolerance")
    return limits


def _evaluation_copy(model: nn.Module) -> nn.Module:
    check_finite_weights(model)
    work = copy.deepcopy(model).eval()
    for name, module in work.named_modules():
        if isinstance(module, NORMS) and module.running_mean is None:
            raise ValueError(f"the batch norm {name!r} has no running statistics that could be kept fixed")
    return work


def _weights(work: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all Linear and convolution layers, each tensor once."""
    found: dict[int, nn.Parameter] = {}
    for name, module in work.named_modules():
        if isinstance(module, _LAYERS):
            weight = module._parameters.get("weight")
            if weight is None:
                raise ValueError(
                    f"the weight of {name!r} is computed from other parameters; remove its reparametrization"
                )
            found[id(weight)] = weight
    if not found:
        raise ValueError(f"{type(work).__name__} has no Linear or convolution layer whose weights could be pruned")
    return list(found.values())


def _places(order: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the place of every weight in an order, in the shapes of the tensors."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    parts = place.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _mean_loss(work: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the mean cross-entropy in nats; infinite where the outputs are not finite."""
    loss = float(functional.cross_entropy(run_in_parts(work, inputs).double(), targets))
    return math.inf if math.isnan(loss) else loss


def _reached(pruned: Pruned, measure: str) -> float:
    report = pruned.report
    if measure == "flops":
        return report.flops_after / report.flops_before
    if measure == "params":
        return report.params_after / report.params_before
    kept = sum(len(nodes.indices) for nodes in pruned.nodes.values())
    return kept / sum(group.width for group in pruned.groups)


def _levels(curve: Mapping[Any, float], limits: Sequence[tuple[str, float]]) -> list[float]:
    """Return the largest allowed losses; the curve's largest size is the whole network."""
    whole = curve[max(curve)]
    return [whole + beta if kind == "absolute" else (1 + beta) * whole for kind, beta in limits]


def _boundary(curve: Mapping[Any, float], limit: float) -> tuple[Any, Any | None]:
    """Return the smallest size down to which all measured losses hold, and the next measured one, which does not."""
    held = max(curve)
    for size in sorted(curve, reverse=True):
        if curve[size] > limit:
            return held, size
        held = size
    return held, None


def _grid(count: int) -> list[int]:
    """Return the numbers of weights to try, falling from all to one."""
    steps = round(0.5 / _LINEAR_STEP)
    shares = [1 - _LINEAR_STEP * step for step in range(steps + 1)]
    while shares[-1] * count > 1:
        shares.append(shares[-1] * _RATIO)
    return sorted({max(1, round(share * count)) for share in shares}, reverse=True)


def _search(
    loss_at: Callable[[int], float], count: int, limits: Sequence[tuple[str, float]], resolution: float
) -> dict[int, float]:
    """Measure the loss at fewer and fewer weights, then between the last that held and the first that did not."""
    curve: dict[int, float] = {}
    with tqdm(desc="prunability", leave=False, disable=None) as bar:
        for kept in _grid(count):
            curve[kept] = loss_at(kept)
            bar.update()
            if all(_boundary(curve, limit)[1] is not None for limit in _levels(curve, limits)):
                break
        while True:
            # A loss measured for one tolerance may break another's limit further up, so that all are looked at again.
            gaps = [_boundary(curve, limit) for limit in _levels(curve, limits)]
            wide = [
                (held, broken)
                for held, broken in gaps
                if broken is not None and held - broken > max(1, resolution * min(held, count - broken))
            ]
            if not wide:
                return curve
            middle = sum(wide[0]) // 2
            curve[middle] = loss_at(middle)
            bar.update()


def _result(rule: str, measure: str, curve: Mapping[float, float], limits: Sequence[tuple[str, float]]) -> Prunability:
    sizes = sorted(curve, reverse=True)
    answers = tuple(
        Tolerance(kind, beta, level, *_boundary(curve, level))
        for (kind, beta), level in zip(limits, _levels(curve, limits), strict=True)
    )
    return Prunability(rule, measure, curve[1.0], tuple(sizes), tuple(curve[size] for size in sizes), answers)
