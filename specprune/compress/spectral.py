"""Spectral pruning of a network: measure, allocate, select, cut, reconstruct, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from specprune.bounds.degrees_of_freedom import degrees_of_freedom
from specprune.bounds.nodes import WeightedNodes, feasibility, reconstruction_matrix, sample_nodes, weighted_nodes
from specprune.bounds.spectral import paper_width
from specprune.compress.allocation import Allocation
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.context import Context, make_context, propose_units
from specprune.compress.cost import count_params, group_params, module_flops
from specprune.compress.distillation import distill
from specprune.compress.distributed import check_same_weights, decided_by_first, first_of, share_weights
from specprune.compress.groups import agreement_error, check_batches, find_groups
from specprune.compress.latency import Latency, measure_latency
from specprune.compress.moments import Moments, check_finite_weights
from specprune.compress.planning import make_plan, predicted_curves
from specprune.compress.reconstruction import Problem, collect_problems, fold_nodes, refit
from specprune.compress.recurrent_refit import refit_recurrent, refit_recurrent_inputs
from specprune.compress.report import GroupReport, Pruned, PruneReport
from specprune.compress.selection import NodeStatistics, information_losses
from specprune.compress.settings import Settings
from specprune.compress.statistics import kept_inputs
from specprune.compress.surgery import RECURRENT, Group, mask_nodes, remove_nodes

_DRAWS = 10  # a draw is good with probability at least 1/5, so that ten fail with probability 0.8^10 = 0.11 at most
_DEAD_WEIGHT = 1e-12
_AGREEMENT = 1e3  # times what rounding explains; the check is for networks that compute something else


def prune(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keep: float | None = None,
    *,
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

    In each group (nodes that must go together: outputs of a layer, channels along shortcuts, attention heads, hidden
    nodes of a recurrent layer) a set J of units is kept, the others are removed, and the layers that read them are
    refitted on what is left.  What cannot be pruned stays whole, with the reason in the report.

    Args:
        model: any network with one output tensor; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device.
        keep: fraction of `measure` to keep, in (0, 1]; left out with `widths`, and where `lam` gives the widths.
        widths: group name to number of units, instead of `keep`; groups that are not named stay whole.
        moments: channel-level moments of this model over these batches, from `collect_moments`; collected if None.
        measure: "flops" (`torch.utils.flop_counter`, two a multiply-add), "params", "nodes" or "latency" (measured on a
            batch of 64; widths are found by bisection of the FLOPs).
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
        backward elimination inside the sequential least squares, and the calibrated widths, are ours.
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
    )
    return _prune_to(model, batches, [keep], settings, moments, scores, forward, latency)[0]


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
    return _prune_to(model, batches, list(keeps), checked[0], moments, scores, forward, latency)


@torch.inference_mode(False)
def _prune_to(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keeps: Sequence[float | None],
    settings: Settings,
    moments: Moments | None,
    scores: Mapping[str, np.ndarray] | None,
    forward: Forward | None,
    latency: bool,
) -> list[Pruned]:
    start = time.perf_counter()
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments is a {type(moments).__name__}, expected Moments from collect_moments")
    check_finite_weights(model)
    check_same_weights(model)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    common = make_context(model, data, find_groups(model, data), settings, moments, scores)
    curves = predicted_curves(common) if any(keep != 1.0 for keep in keeps) else {}
    modes = {name: module.training for name, module in model.named_modules()}
    results = []
    for keep in keeps:
        generator = np.random.default_rng(settings.seed)
        context = replace(common, settings=replace(settings, keep=keep), generator=generator)
        plan = first_of(make_plan(context, curves))
        work, chosen, seconds = _prune_groups(context, plan)
        small = _cut(context, work, chosen)
        if settings.distill_steps:
            distill(small, context.original, data, settings.distill_steps, settings.seed)
        share_weights(small)
        check_finite_weights(small)
        times = decided_by_first(partial(measure_latency, context.original, small, data)) if latency else ()
        report = _report(context, plan, chosen, small, times, seconds, time.perf_counter() - start)
        for name, module in small.named_modules():
            module.training = modes.get(name, model.training)
        results.append(Pruned(small, report, context.structure.groups, chosen))
        start = time.perf_counter()
    return results


def _prune_groups(context: Context, plan: Allocation) -> tuple[nn.Module, dict[str, WeightedNodes], dict[str, float]]:
    """Settle the groups and refit their consumers, in the order in which the consumers run.

    Returns the network of the old size with zeroed columns, the kept units, and each group's seconds.
    """
    settings, groups, original = context.settings, context.structure.groups, context.original
    work = copy.deepcopy(original)
    chosen: dict[str, WeightedNodes] = {}
    kept: dict[str, np.ndarray] = {}
    seconds = dict.fromkeys((group.name for group in groups), 0.0)
    sequential = settings.reconstruction == "sequential"
    changed = False
    for name in context.steps:
        begin = time.perf_counter()
        readers = [group for group in groups if any(entry.module == name for entry in group.consumers)]
        new = [g for g in groups if g.name not in kept and (g in readers or (g.kind == "hidden" and g.name == name))]
        drawn = settings.allocation == "theory" and settings.selection == "leverage"  # the draw decides the width
        cut = [group for group in new if drawn or plan.widths[group.name] < group.width]
        stale = sequential and changed and not cut  # earlier cuts changed the inputs
        problems: dict[str, Problem] = context.problems
        if sequential and (stale or cut or any(len(kept[g.name]) < g.width for g in readers if g.name in kept)):
            wanted = {name, *(entry.module for group in cut for entry in group.consumers)}
            names = [one for one in context.consumers if one in wanted]
            problems = collect_problems(context.targets, work, context.data, names)
        for group in new:
            # One process decides: the same sums may round differently on the way to a choice.
            chosen[group.name] = first_of(_choose(context, plan, group, problems, work, kept))
            kept[group.name] = chosen[group.name].indices
            mask_nodes(work, [group], kept)
            if sequential and group in cut:
                # Until their turn comes, later consumers are refitted on what they read now: a branch that closes on a
                # shortcut layer that runs after it must not make up for columns that are merely cut.
                for entry in group.consumers:
                    if entry.module in problems and entry.module != name:
                        there, _ = kept_inputs(original, entry.module, groups, kept)
                        norm = context.norms.get(entry.module)
                        refit(work, problems[entry.module], there, norm, settings.ridge, original)
        left, whole = kept_inputs(original, name, groups, kept)
        untouched = whole and not (changed and sequential)
        changed = changed or not whole
        if isinstance(work.get_submodule(name), RECURRENT):
            _refit_recurrent(context, work, name, kept, None if untouched else left)
            changed = changed or (name in kept and len(kept[name]) < context.statistics[name].width)
            continue
        # Nothing is refitted whose inputs are those of the original network.
        if settings.reconstruction != "none" and not untouched:
            if settings.reconstruction == "channel":
                for group in readers:
                    nodes, lam = chosen[group.name], plan.lams[group.name]
                    mix = reconstruction_matrix(context.statistics[group.name].covariance, nodes, lam)
                    fold_nodes(original, work, group, name, nodes.indices, mix)
            else:
                refit(work, problems[name], left, context.norms.get(name), settings.ridge, original)
        for group in readers:
            seconds[group.name] += (time.perf_counter() - begin) / len(readers)
    return work, chosen, seconds


def _refit_recurrent(
    context: Context, work: nn.Module, name: str, kept: Mapping[str, np.ndarray], inputs: np.ndarray | None
) -> None:
    """Refit what a recurrent layer reads: its inputs (None: they are as they were), and its own hidden nodes."""
    settings = context.settings
    if settings.reconstruction == "none":
        return
    sequential = settings.reconstruction == "sequential"
    if inputs is not None:
        refit_recurrent_inputs(
            context.original, work, name, inputs, context.data, ridge=settings.ridge, sequential=sequential
        )
    if name in kept and (inputs is not None or len(kept[name]) < context.statistics[name].width):
        refit_recurrent(
            context.original, work, name, kept[name], context.data, ridge=settings.ridge, sequential=sequential
        )


def _cut(context: Context, work: nn.Module, chosen: Mapping[str, WeightedNodes]) -> nn.Module:
    """Take the nodes out of the prepared network, and check that this changes nothing.

    Raises:
        RuntimeError: the smaller network computes something else.
    """
    small = remove_nodes(work, context.structure.groups, {name: nodes.indices for name, nodes in chosen.items()})
    batches = check_batches(work, context.data, context.data.first())
    error = max(agreement_error(small, work, context.data, batch) for batch in batches)
    if not error <= 1:
        raise RuntimeError(
            f"the cut network and the prepared one disagree ({error:.3g} times what rounding explains); please report "
            "this network, and leave out the groups that cause it with widths={...}"
        )
    return small


def _choose(
    context: Context,
    plan: Allocation,
    group: Group,
    problems: Mapping[str, Problem],
    work: nn.Module,
    kept: Mapping[str, np.ndarray],
) -> WeightedNodes:
    """Return the kept units of one group with their weights, in ascending order."""
    settings, statistics = context.settings, context.statistics[group.name]
    width, lam = plan.widths[group.name], plan.lams[group.name]
    scores = statistics.leverage(lam)
    whole = WeightedNodes(np.arange(group.width), np.ones(group.width))
    if settings.allocation == "theory" and settings.selection == "leverage":
        # The theorem's own draw: M independent nodes, repeated ones merged; drawn anew until it is a good one.
        size = paper_width(float(degrees_of_freedom(statistics.spectrum, lam)))
        for _ in range(_DRAWS):
            drawn = weighted_nodes(sample_nodes(scores, size, context.generator), scores)
            if feasibility(statistics.covariance, drawn, lam).holds:
                break
        return whole if len(drawn.indices) == group.width else drawn
    if width == group.width:
        return whole
    indices = propose_units(context, group, width, lam, problems, work, kept)
    # A rule may choose a node that carries nothing; it has no leverage, and a tiny weight keeps it out of s.
    floor = np.finfo(np.float64).eps / len(scores)
    nodes = weighted_nodes(np.sort(indices), np.maximum(scores, floor))
    return WeightedNodes(nodes.indices, np.where(scores[nodes.indices] <= floor, _DEAD_WEIGHT, nodes.weights))


def _report(
    context: Context,
    plan: Allocation,
    chosen: Mapping[str, WeightedNodes],
    small: nn.Module,
    times: tuple[Latency, ...],
    seconds: Mapping[str, float],
    total_seconds: float,
) -> PruneReport:
    original = context.original
    flops = module_flops(original, context.data), module_flops(small, context.data)
    rows = []
    for group in context.structure.groups:
        own = [sum(counts.get(part.module, 0) for part in group.producers) for counts in flops]
        rows.append(
            _group_report(
                group,
                context.statistics[group.name],
                chosen[group.name],
                plan.lams[group.name],
                flops=(own[0], own[1]),
                params=(group_params(original, group), group_params(small, group)),
                seconds=seconds[group.name],
            )
        )
    return PruneReport(
        tuple(rows),
        context.structure.skipped,
        asdict(context.settings),
        sum(flops[0].values()),
        sum(flops[1].values()),
        count_params(original),
        count_params(small),
        times,
        context.samples,
        total_seconds,
    )


def _group_report(
    group: Group,
    statistics: NodeStatistics,
    nodes: WeightedNodes,
    lam: float,
    *,
    flops: tuple[int, int],
    params: tuple[int, int],
    seconds: float,
) -> GroupReport:
    spectrum = statistics.spectrum
    if len(nodes.indices) == group.width:  # in closed form: the difference of matrices would be rounding noise
        c, s = float(spectrum[0] / (spectrum[0] + lam)), 1.0
    else:
        check = feasibility(statistics.covariance, nodes, lam)
        c, s = check.c, check.s
    input_loss, output_loss = information_losses(statistics, nodes, lam)
    return GroupReport(
        group=group.name,
        consumer=", ".join(entry.module for entry in group.consumers),
        width_before=group.width,
        width_after=len(nodes.indices),
        lam=lam,
        dof=float(degrees_of_freedom(spectrum, lam)),
        leverage_kept=float(statistics.leverage(lam)[nodes.indices].sum()),
        c=c,
        s=s,
        input_loss=input_loss,
        output_loss=output_loss,
        flops_before=flops[0],
        flops_after=flops[1],
        params_before=params[0],
        params_after=params[1],
        seconds=seconds,
    )
