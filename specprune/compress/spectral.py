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
from specprune.compress.cost import count_flops, count_params, group_params, module_flops
from specprune.compress.distillation import distill
from specprune.compress.distributed import check_same_call, decided_by_first, first_of, share_weights
from specprune.compress.groups import agreement_error, check_batches, find_groups
from specprune.compress.latency import measure_latency
from specprune.compress.moments import Moments, check_finite_weights
from specprune.compress.planning import make_plan, predicted_curves
from specprune.compress.reconstruction import Problem, collect_problems, fold_nodes, mix_condition, refit
from specprune.compress.recurrent_refit import refit_recurrent, refit_recurrent_inputs
from specprune.compress.report import GroupReport, Pruned, PruneReport
from specprune.compress.selection import NodeStatistics, information_losses
from specprune.compress.settings import Settings
from specprune.compress.statistics import kept_inputs
from specprune.compress.surgery import RECURRENT, Group, copy_modes, mask_nodes, remove_nodes

_DRAWS = 10  # a draw is good with probability at least 1/5, so that ten fail with probability 0.8^10 = 0.11 at most
_DEAD_WEIGHT = 1e-12
_AGREEMENT = 1e3  # times what rounding explains; the check is for networks that compute something else


@torch.inference_mode(False)
def prune_to(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keeps: Sequence[float | None],
    settings: Settings,
    moments: Moments | None,
    scores: Mapping[str, np.ndarray] | None,
    forward: Forward | None,
    latency: bool,
) -> list[Pruned]:
    """Prune a network to several budgets; the arguments are those of `prune`, `settings` holds the others."""
    start = time.perf_counter()
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(f"moments is a {type(moments).__name__}, expected Moments from collect_moments")
    check_finite_weights(model)
    check_same_call("prune", _compared(keeps, settings, moments, scores, latency), model)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    common = make_context(model, data, find_groups(model, data), settings, moments, scores)
    curves = predicted_curves(common) if any(keep != 1.0 for keep in keeps) else {}
    results = []
    for keep in keeps:
        generator = np.random.default_rng(settings.seed)
        context = replace(common, settings=replace(settings, keep=keep), generator=generator)
        plan = first_of(make_plan(context, curves))
        work, chosen, seconds, conditions = prune_groups(context, plan)
        small = cut_network(context, work, chosen)
        if settings.distill_steps:
            distill(small, context.original, data, settings.distill_steps, settings.seed)
        share_weights(small)
        check_finite_weights(small)
        times = decided_by_first(partial(measure_latency, context.original, small, data)) if latency else ()
        report = PruneReport(
            groups=group_reports(context, plan, chosen, small, seconds, conditions),
            layers=(),
            skipped=context.structure.skipped,
            settings=asdict(context.settings),
            flops_before=count_flops(context.original, data),
            flops_after=count_flops(small, data),
            params_before=count_params(context.original),
            params_after=count_params(small),
            latencies=times,
            samples=context.samples,
            seconds=time.perf_counter() - start,
        )
        copy_modes(model, small)
        results.append(Pruned(small, report, context.structure.groups, chosen))
        start = time.perf_counter()
    return results


def _compared(
    keeps: Sequence[float | None],
    settings: Settings,
    moments: Moments | None,
    scores: Mapping[str, np.ndarray] | None,
    latency: bool,
) -> dict[str, Any]:
    """Return what must agree in all processes of a parallel run; of arrays, which may differ by rounding, the outlines.

    The scores themselves are not compared, because those of process 0 decide.
    """
    outline = None
    if moments is not None:
        outline = (moments.level, moments.samples, [(name, entry.rows) for name, entry in moments.items()])
    chosen = {key: value for key, value in asdict(settings).items() if key != "keep"}
    if settings.widths is not None:
        chosen["widths"] = {name: int(width) for name, width in settings.widths.items()}
    names = None if scores is None else sorted(scores)
    return {
        "keep": [k if k is None else float(k) for k in keeps],
        **chosen,
        "moments": outline,
        "scores": names,
        "latency": latency,
    }


def prune_groups(
    context: Context, plan: Allocation
) -> tuple[nn.Module, dict[str, WeightedNodes], dict[str, float], dict[str, float]]:
    """Settle the groups and refit their consumers, in the order in which the consumers run.

    Returns the network of the old size with zeroed columns, the kept units, each group's seconds, and the largest
    condition number of the systems solved for its readers, where there were any.
    """
    settings, groups, original = context.settings, context.structure.groups, context.original
    work = copy.deepcopy(original)
    chosen: dict[str, WeightedNodes] = {}
    kept: dict[str, np.ndarray] = {}
    seconds = dict.fromkeys((group.name for group in groups), 0.0)
    conditions: dict[str, float] = {}
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
                    covariance = context.statistics[group.name].covariance
                    mix = reconstruction_matrix(covariance, nodes, lam)
                    fold_nodes(original, work, group, name, nodes.indices, mix)
                    conditions[group.name] = mix_condition(covariance, nodes, lam)
            else:
                own = refit(work, problems[name], left, context.norms.get(name), settings.ridge, original)
                for group in readers:
                    conditions[group.name] = max(own, conditions.get(group.name, 1.0))
        for group in readers:
            seconds[group.name] += (time.perf_counter() - begin) / len(readers)
    return work, chosen, seconds, conditions


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


def cut_network(context: Context, work: nn.Module, chosen: Mapping[str, WeightedNodes]) -> nn.Module:
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


def group_reports(
    context: Context,
    plan: Allocation,
    chosen: Mapping[str, WeightedNodes],
    small: nn.Module,
    seconds: Mapping[str, float],
    conditions: Mapping[str, float],
) -> tuple[GroupReport, ...]:
    """Return what happened to each group.

    Args:
        context: of the run.
        plan: the widths and lambdas.
        chosen: the kept nodes.
        small: the network without the others.
        seconds: time spent on each group.
        conditions: largest condition number of the systems solved for each group's readers.
    """
    original = context.original
    flops = module_flops(original, context.data), module_flops(small, context.data)
    rows = []
    for group in context.structure.groups:
        own = [sum(_flops_of(counts, part.module) for part in group.producers) for counts in flops]
        rows.append(
            _group_report(
                group,
                context.statistics[group.name],
                chosen[group.name],
                plan.lams[group.name],
                flops=(own[0], own[1]),
                params=(group_params(original, group), group_params(small, group)),
                seconds=seconds[group.name],
                condition=conditions.get(group.name),
            )
        )
    return tuple(rows)


def _flops_of(counts: Mapping[str, int], name: str) -> int:
    """Return the FLOPs of a layer, or of the low-rank parts that have taken its place."""
    return sum(flops for module, flops in counts.items() if module == name or module.startswith(f"{name}."))


def _group_report(
    group: Group,
    statistics: NodeStatistics,
    nodes: WeightedNodes,
    lam: float,
    *,
    flops: tuple[int, int],
    params: tuple[int, int],
    seconds: float,
    condition: float | None,
) -> GroupReport:
    spectrum = statistics.spectrum
    if len(nodes.indices) == group.width:  # in closed form: the difference of matrices would be rounding noise
        c, s = float(spectrum[0] / (spectrum[0] + lam)), 1.0
    else:
        check = feasibility(statistics.covariance, nodes, lam)
        c, s = check.c, check.s
    input_loss, output_loss = information_losses(statistics, nodes, lam)
    total = float(np.sum(statistics.covariance * statistics.consumer_gram))
    bound = c * lam * float(np.trace(statistics.consumer_gram)) / total if total > 0 else 0.0
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
        output_bound=bound if len(nodes.indices) < group.width else output_loss,
        condition=condition,
        flops_before=flops[0],
        flops_after=flops[1],
        params_before=params[0],
        params_after=params[1],
        seconds=seconds,
    )
