"""The neighbours of spectral pruning under the same call: low rank, sampling, and both nodes and ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from specprune.bounds.nodes import WeightedNodes
from specprune.compress.batches import CalibrationData, Forward, batch_size
from specprune.compress.cost import count_flops, count_params
from specprune.compress.distillation import distill
from specprune.compress.distributed import is_parallel
from specprune.compress.fitted_network import FittedNetworks, Start
from specprune.compress.hybrid import HybridNetworks
from specprune.compress.latency import measure_latency
from specprune.compress.low_rank_network import low_rank
from specprune.compress.moments import check_finite_weights
from specprune.compress.report import GroupReport, LayerReport, Pruned, PruneReport
from specprune.compress.sampling import SAMPLING_DELTA, SampledNetworks
from specprune.compress.settings import SAMPLING_METHODS, Settings
from specprune.compress.sparsify import sparsify_by_sampling
from specprune.compress.surgery import Group, Skipped, copy_modes


@dataclass(frozen=True)
class _Made:
    """A network made by a method, and what it has to tell."""

    model: nn.Module
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...] = ()
    reports: tuple[GroupReport, ...] = ()
    groups: tuple[Group, ...] = ()
    nodes: dict[str, WeightedNodes] = field(default_factory=dict)


@torch.inference_mode(False)
def compress_to(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    keeps: Sequence[float],
    settings: Settings,
    forward: Forward | None,
    latency: bool,
) -> list[Pruned]:
    """Compress a network to several budgets by a method other than spectral pruning; the arguments are `prune`'s."""
    start = time.perf_counter()
    if is_parallel():
        raise ValueError(f"method={settings.method!r} runs in one process: call it before the processes start")
    check_finite_weights(model)
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    data.first(model)
    original = Start.whole(model).model
    make = _maker(original, data, settings)
    flops, params = count_flops(original, data), count_params(original)
    samples = sum(batch_size(batch) for batch in data.head())
    results = []
    for keep in keeps:
        made = make(keep)
        if settings.distill_steps:
            distill(made.model, original, data, settings.distill_steps, settings.seed)
        check_finite_weights(made.model)
        _check_finite_outputs(original, made.model, data, settings.method)
        report = PruneReport(
            groups=made.reports,
            layers=made.layers,
            skipped=made.skipped,
            settings=asdict(replace(settings, keep=keep)),
            flops_before=flops,
            flops_after=count_flops(made.model, data),
            params_before=params,
            params_after=count_params(made.model),
            latencies=measure_latency(original, made.model, data) if latency else (),
            samples=samples,
            seconds=time.perf_counter() - start,
        )
        copy_modes(model, made.model)
        results.append(Pruned(made.model, report, made.groups, made.nodes))
        start = time.perf_counter()
    return results


@torch.no_grad()
def _check_finite_outputs(original: nn.Module, small: nn.Module, data: CalibrationData, method: str) -> None:
    """Refuse a network that gives NaN or Inf where the original does not, on the first batch."""
    batch = data.first()
    if not bool(torch.isfinite(data.call(small, batch)).all()) and bool(
        torch.isfinite(data.call(original, batch)).all()
    ):
        raise ValueError(
            f"the network that method={method!r} made gives NaN or Inf where the original does not: the sizes of its "
            "nodes or weights differ too much for this dtype; rescale the layers, or use float64"
        )


def _maker(model: nn.Module, data: CalibrationData, settings: Settings) -> Callable[[float], _Made]:
    """Return what makes a network of a given size; what all sizes share is done here."""
    method, measure, seed = settings.method, settings.measure, settings.seed
    if method == "fitted":
        fitted = FittedNetworks(Start.whole(model), data, measure, settings.positions, settings.ridge, seed)
        return lambda keep: _Made(*fitted.make(keep), fitted.skipped)
    if method == "hybrid":
        hybrids = HybridNetworks(model, data, settings)

        def hybrid(keep: float) -> _Made:
            made = hybrids.make(keep)
            groups = tuple(group for group in hybrids.groups if group.name in made.nodes)
            return _Made(made.model, made.layers, hybrids.skipped, made.groups, groups, made.nodes)

        return hybrid
    if method in SAMPLING_METHODS:
        networks = SampledNetworks(model, data, measure)

        def sampled(keep: float) -> _Made:
            made = networks.make(keep, SAMPLING_METHODS[method], SAMPLING_DELTA, seed)
            return _Made(made.model, made.groups, made.skipped)

        return sampled
    if method == "sipp":

        def sparse(keep: float) -> _Made:
            made = sparsify_by_sampling(model, data, keep, seed=seed)
            return _Made(made.model, made.layers)

        return sparse

    def ranked(keep: float) -> _Made:
        made = low_rank(model, data, keep, method=method, measure=measure, seed=seed)
        return _Made(made.model, made.layers, made.skipped)

    return ranked
