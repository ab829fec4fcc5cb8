"""Making a network smaller: one call for every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.moments import Moments
from specprune.compress.neighbours import compress_to
from specprune.compress.report import Pruned
from specprune.compress.settings import Settings
from specprune.compress.spectral import prune_to


def prune(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keep: float | None = None,
    *,
    method: str = "spectral",
    widths: Mapping[str, int] | None = None,
    moments: Moments | None = None,
    measure: str = "flops",
    allocation: str = "calibrated",
    selection: str = "backward",
    scores: Mapping[str, np.ndarray] | None = None,
    theta: float = 0.0,
    reconstruction: str = "sequential",
    lam: float = 1e-6,
    ridge: float = 1e-6,
    positions: int | None = 32,
    round_to: int = 1,
    distill_steps: int = 0,
    latency: bool = False,
    forward: Forward | None = None,
    seed: int = 0,
) -> Pruned:
    """Return a smaller network that computes nearly the same as the given one, from unlabelled data.

    By default, spectral pruning: in each group (nodes that must go together: outputs of a layer, channels along
    shortcuts, attention heads, hidden nodes of a recurrent layer) a set J of units is kept, the others are removed, and
    the layers that read them are refitted on what is left.  What cannot be pruned stays whole, with the reason in the
    report.

    Args:
        model: any network with one output tensor; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device.
        keep: fraction of `measure` to keep, in (0, 1]; left out with `widths`, and where `lam` gives the widths.
        method: "spectral", which takes all that follows; "fitted" (low-rank layers in slices of input channels, fitted
            to the original outputs, ranks by predicted divergence); "hybrid" (nodes or ranks, whichever is predicted to
            lose less for what it saves); or a published one to compare with: "alds", "alds+", "alternating", "refit",
            "data", "constant", "energy", "lrank", "pca" (see `low_rank`), "pfp", "pfp-random", "pfp-hybrid" (see
            `prune_by_sampling`), "sipp" (see `sparsify_by_sampling`).  All but "spectral" take `keep`, `measure`,
            `distill_steps`, `latency`, `forward` and `seed`; "fitted" and "hybrid" also `positions` and `ridge`.
        widths: group name to number of units, instead of `keep`; groups that are not named stay whole.
        moments: channel-level moments of this model over these batches, from `collect_moments`; collected if None.
        measure: "flops" (`torch.utils.flop_counter`, two a multiply-add), "params", and for nodes also "nodes" or
            "latency" (measured on a batch of 64; widths are found by bisection of the FLOPs); "sipp" counts "params".
        allocation: "calibrated" (least predicted divergence of the outputs: each group's residual curve scaled to two
            measurements), "sensitivity" (the same with seven measurements), "uniform" (same fraction everywhere), "dof"
            (degrees of freedom at a common relative lambda: the one that meets `keep`, or `lam` without `keep`), or
            "theory" (5 N log(80 N) nodes at `lam`).
        selection: "backward" (elimination by the exact loss of the refit), "greedy" (the paper's), "thorough" (the best
            of several proposals by measured divergence), "thinet", "magnitude", "magnitude_l1", "scores", "leverage"
            (drawn until there are enough different nodes; with allocation="theory" the theorem's independent draws,
            repeated ones merged), "cholesky" or "random".
        scores: group name to one number a unit, for selection="scores"; the larger stay.
        theta: weight of the input information loss against the output loss in the greedy rule, 0..1.
        reconstruction: "sequential", "patch", "channel" (the paper's) or "none".
        lam: relative lambda, lambda_l = lam * Tr Sigma_l; "dof" with `keep` finds its own.
        ridge: relative ridge of the least squares in "sequential" and "patch", and of the backward rule.
        positions: output positions per image that the least squares of a convolution sees; None takes all.
        round_to: widths are multiples of this where they are cut (8 suits accelerators); attention heads are exempt.
        distill_steps: gradient steps towards the original's outputs at the end, without labels; 300 are a good number.
        latency: whether to measure the time of both networks, for the report.
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the random rules, of the positions and of the distillation's order.

    Returns:
        The new network, the report, the groups and the kept units.

    Raises:
        ValueError: an argument out of range, a network in which nothing can be pruned, non-finite weights, empty or
            mismatched batches, or a budget that cannot be met.
        TypeError: batches that cannot be iterated twice.
        RuntimeError: the cut network does not compute what was prepared; or another process of a parallel run died.

    Source:
        Suzuki et al. 2020, "Spectral Pruning", arXiv:1808.08558 (greedy selection, degrees of freedom, channel mix);
        backward elimination inside the sequential least squares, the calibrated widths, "fitted" and "hybrid" are ours.
    """
    settings = Settings(
        keep,
        dict(widths) if isinstance(widths, Mapping) else widths,
        measure,
        allocation,
        selection,
        theta,
        reconstruction,
        lam,
        ridge,
        positions,
        round_to,
        distill_steps,
        seed,
        method,
    )
    return _run(model, batches, [keep], settings, moments, scores, forward, latency)[0]


def prune_sweep(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keeps: Sequence[float],
    *,
    moments: Moments | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
    latency: bool = False,
    forward: Forward | None = None,
    **settings: Any,
) -> list[Pruned]:
    """Prune a network to several budgets, measuring it only once.

    Every result is what `prune` gives for that budget alone.

    Args:
        model: as in `prune`.
        batches: as in `prune`.
        keeps: the fractions to keep.
        moments: as in `prune`.
        scores: as in `prune`.
        latency: as in `prune`.
        forward: as in `prune`.
        **settings: the other arguments of `prune`, without `keep` and `widths`.

    Raises:
        ValueError: as in `prune`; or no budget is given.
        TypeError: an argument that `prune` does not know.
    """
    if isinstance(keeps, str | bytes) or not isinstance(keeps, Sequence):
        raise TypeError(f"keeps={keeps!r}: expected a list of fractions to keep, for example [0.5, 0.3]")
    if "keep" in settings or "widths" in settings:
        raise TypeError("prune_sweep takes its budgets from keeps; leave out keep and widths, or call prune")
    if not keeps:
        raise ValueError("keeps is empty: give at least one fraction to keep, for example [0.5, 0.3]")
    checked = [Settings(keep=keep, **settings) for keep in keeps]
    return _run(model, batches, list(keeps), checked[0], moments, scores, forward, latency)


def _run(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keeps: Sequence[Any],
    settings: Settings,
    moments: Moments | None,
    scores: Mapping[str, np.ndarray] | None,
    forward: Forward | None,
    latency: bool,
) -> list[Pruned]:
    if settings.method == "spectral":
        return prune_to(model, batches, keeps, settings, moments, scores, forward, latency)
    if moments is not None or scores is not None:
        raise ValueError(f"method={settings.method!r} takes neither moments nor scores: leave them out")
    return compress_to(model, batches, keeps, settings, forward, latency)
