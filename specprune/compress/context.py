"""What a pruning run knows before it decides anything: the network, its groups, their statistics and problems."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from specprune.compress.batches import CalibrationData
from specprune.compress.blocks import Item
from specprune.compress.capture import capture
from specprune.compress.choice import check_scores, choose_units
from specprune.compress.divergence import Reference
from specprune.compress.groups import Structure
from specprune.compress.layers import get_layer, input_width, is_refittable
from specprune.compress.moments import LayerMoments, Moments, collect_moments, moments_of
from specprune.compress.reconstruction import Problem, problem_from_moments, refit, selection_items
from specprune.compress.recurrent import hidden_moments, recurrent_item
from specprune.compress.selection import NodeStatistics
from specprune.compress.settings import Settings
from specprune.compress.statistics import contribution_gram, kept_inputs, node_statistics, producer_norms
from specprune.compress.surgery import Group, mask_nodes
from specprune.compress.targets import Targets
from specprune.compress.tracing import small_batch

_THOROUGH_SAMPLES = 750


@dataclass(frozen=True, eq=False)
class Context:
    """The facts of one run; nothing in it changes.

    Args:
        original: the network before pruning, a copy in evaluation mode.
        data: calibration data.
        structure: the groups.
        settings: the caller's choices.
        statistics: group name to the statistics of its nodes.
        consumers: the consumers that can be refitted, in the order in which they run.
        steps: the modules at which something is settled or refitted, in the order in which they run: the consumers, and
            recurrent layers that read or hold a group.
        targets: what the consumers gave originally.
        problems: consumer to its least squares problem on original inputs; empty where nothing asks for them.
        states: recurrent layer that holds a group to the moments of its hidden states.
        scores: group name to the caller's scores of its units.
        samples: number of calibration samples.
        generator: source of randomness of the random rules.
    """

    original: nn.Module
    data: CalibrationData
    structure: Structure
    settings: Settings
    statistics: dict[str, NodeStatistics]
    consumers: tuple[str, ...]
    steps: tuple[str, ...]
    targets: Targets
    problems: dict[str, Problem]
    states: dict[str, LayerMoments]
    scores: Mapping[str, np.ndarray] | None
    samples: int
    generator: np.random.Generator

    @property
    def norms(self) -> dict[str, str]:
        """Layer to the batch norm that reads its outputs directly."""
        return self.structure.direct


def make_context(
    model: nn.Module,
    data: CalibrationData,
    structure: Structure,
    settings: Settings,
    moments: Moments | None,
    scores: Mapping[str, np.ndarray] | None,
) -> Context:
    """Measure what the run needs to know.

    Args:
        model: the caller's network; left as it is.
        data: calibration data.
        structure: from `find_groups`.
        settings: the caller's choices.
        moments: channel-level moments of the consumers' inputs; collected if None.
        scores: for the rule "scores".

    Raises:
        ValueError: moments or scores that do not fit, or a group whose nodes are zero on all data.
    """
    original = structure.prepared(model)
    groups = structure.groups
    readers = {entry.module for group in groups for entry in group.consumers}
    consumers = tuple(
        name for name in structure.order if name in readers and is_refittable(original.get_submodule(name))
    )
    hidden = {group.name for group in groups if group.kind == "hidden"}
    if moments is None:
        moments = collect_moments(original, data, consumers)
    _check_moments(moments, original, consumers)
    states = {name: hidden_moments(original, name, data) for name in structure.order if name in hidden}
    statistics = {
        group.name: node_statistics(original, moments, group, structure.direct, states.get(group.name))
        for group in groups
    }
    dead = [name for name, entry in statistics.items() if np.trace(entry.covariance) <= 0]
    if dead:
        raise ValueError(
            f"the nodes of {dead} are zero on all calibration data, or their squares are: nothing to measure; check "
            "the data, or scale it up"
        )
    if settings.selection == "scores":
        check_scores(scores, groups)
    elif settings.selection == "magnitude_l1":
        scores = {group.name: producer_norms(original, group, 1) for group in groups}
    with torch.no_grad():
        batch = small_batch(data.first())
        seen = capture(original, consumers, data, batch, norms=structure.direct, to_the_end=True)
    return Context(
        original=original,
        data=data,
        structure=structure,
        settings=settings,
        statistics=statistics,
        consumers=consumers,
        steps=tuple(name for name in structure.order if name in {*readers, *hidden}),
        targets=Targets(
            original,
            data,
            consumers,
            structure.direct,
            [name for name in consumers if seen[name].shortcut is not None],
            positions=settings.positions,
            seed=settings.seed,
        ),
        problems=_original_problems(original, data, structure, settings, consumers),
        states=states,
        scores=scores,
        samples=moments.samples,
        generator=np.random.default_rng(settings.seed),
    )


def _original_problems(
    original: nn.Module,
    data: CalibrationData,
    structure: Structure,
    settings: Settings,
    consumers: tuple[str, ...],
) -> dict[str, Problem]:
    """Return the consumers' problems on original inputs, where something asks for them."""
    one_pass = settings.reconstruction != "sequential"
    heads = any(group.kind == "heads" for group in structure.groups)
    if not (
        (settings.allocation in ("calibrated", "sensitivity") and settings.widths is None)
        or settings.selection == "thinet"
        or settings.reconstruction == "patch"
        or (one_pass and (settings.selection in ("backward", "thorough") or heads))
    ):
        return {}
    found = moments_of(
        original, data, consumers, level="patch", positions=settings.positions, seed=settings.seed, wide=True
    )
    problems = {}
    for name in consumers:
        intercept = get_layer(original, name).bias is not None or name in structure.direct
        problems[name] = problem_from_moments(original, name, found[name], intercept=intercept)
    return problems


def _check_moments(moments: Moments, model: nn.Module, consumers: tuple[str, ...]) -> None:
    for name in consumers:
        if moments.level != "channel" or name not in moments:
            raise ValueError(
                f"moments of {moments.level} level for {list(moments)}: expected channel level, with {name!r}"
            )
        width = input_width(get_layer(model, name))
        if len(moments[name].total) != width:
            raise ValueError(
                f"the moments of {name!r} have {len(moments[name].total)} columns, the layer reads {width}: "
                "they are of another model"
            )


def consumer_items(
    context: Context, group: Group, problems: Mapping[str, Problem], kept: Mapping[str, np.ndarray]
) -> list[Item]:
    """Return the problems of a group's consumers as selection sees them; `kept` names the units of settled groups."""
    items = []
    for entry in group.consumers:
        if entry.module in problems:
            present, _ = kept_inputs(context.original, entry.module, context.structure.groups, kept)
            norm = context.norms.get(entry.module)
            items += selection_items(context.original, problems[entry.module], group, norm, present)
    if group.kind == "hidden" and items:
        layer = context.original.get_submodule(group.name)
        weight = layer.get_parameter("weight_hh_l0")
        items.append(recurrent_item(weight, context.states[group.name], intercept=bool(layer.bias)))
    return items


def propose_units(
    context: Context,
    group: Group,
    size: int,
    lam: float,
    problems: Mapping[str, Problem],
    work: nn.Module,
    kept: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return the units of a group that the chosen rule keeps.

    Args:
        context: of the run.
        group: the group.
        size: how many units.
        lam: lambda in units of the covariance.
        problems: of its consumers, on original or on current inputs.
        work: the network as it is now, for the rule "thorough".
        kept: group name to its units, for the groups that were settled.
    """
    settings = context.settings
    items = consumer_items(context, group, problems, kept)
    rule = settings.selection
    if rule in ("backward", "thorough") and not items:  # consumers without any output energy, or recurrent ones
        rule = "greedy"
    reference: list[Reference] = []

    def divergence(trial_units: np.ndarray) -> float:
        if not reference:
            reference.append(Reference(context.original, context.data, _THOROUGH_SAMPLES))
        trial = copy.deepcopy(work)
        settled = {**kept, group.name: trial_units}
        mask_nodes(trial, [group], settled)
        for entry in group.consumers:
            if entry.module in problems:
                left, _ = kept_inputs(trial, entry.module, context.structure.groups, settled)
                norm = context.norms.get(entry.module)
                refit(trial, problems[entry.module], left, norm, settings.ridge, context.original)
        return reference[0].divergence(trial)

    return choose_units(
        rule,
        group,
        size,
        context.statistics[group.name],
        items,
        lam=lam,
        theta=settings.theta,
        ridge=settings.ridge,
        generator=context.generator,
        scores=context.scores,
        contribution=lambda: contribution_gram(context.original, group, context.problems),
        divergence=divergence,
    )
