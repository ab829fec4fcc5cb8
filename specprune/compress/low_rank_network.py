"""A network with low-rank layers in place of its own, of a given size."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from specprune._records import format_table, to_json
from specprune.bounds.bound import check_number
from specprune.compress.batches import CalibrationData, Forward
from specprune.compress.cost import count_params, module_flops
from specprune.compress.low_rank_allocation import (
    Cut,
    Frontier,
    alternating_cuts,
    layer_options,
    level_cuts,
    sum_cuts,
)
from specprune.compress.low_rank_cost import LOW_RANK_MEASURES, layer_costs
from specprune.compress.low_rank_layers import LayerSpectra, parameters_after, refit_second
from specprune.compress.low_rank_parts import Factorable, refusal
from specprune.compress.moments import LayerMoments, collect_moments
from specprune.compress.surgery import Skipped
from specprune.compress.tracing import small_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Method:
    """A score, and whether it is taken on data, over all numbers of slices, over all foldings, by the search.

    With `refit`, data serve the second part of each layer instead of the score; with `summed`, the layers' scores are
    added, instead of the largest of them being taken.
    """

    score: str
    refit: bool = False
    data: bool = False
    sliced: bool = False
    folded: bool = False
    search: bool = False
    summed: bool = False


METHODS = {
    "alds": _Method("error", sliced=True),
    "alds+": _Method("error", sliced=True, folded=True),
    "refit": _Method("error", sliced=True, refit=True),
    "alternating": _Method("error", sliced=True, search=True),
    "constant": _Method("size"),
    "energy": _Method("energy"),
    "lrank": _Method("distance", summed=True),
    "pca": _Method("energy", data=True),
    "data": _Method("error", data=True),
}


@dataclass(frozen=True)
class LowRankLayer:
    """What happened to one layer.

    Args:
        layer: its name.
        folding: 0..3; None where the layer stays as it is.
        slices: number of slices k of the input channels; None likewise.
        rank: rank j of each slice; None likewise.
        params_before: parameters of the layer, before.
        params_after: the same, after.
        error_largest: largest (j+1)-th singular value of a slice, over the folded matrix's operator norm.
        error_theorem: sqrt(k) times that, a ceiling on the exact error (Theorem 1).
        error_exact: operator norm of the change over that of the matrix.  For "data" and "pca" all three are
            those of W Sigma^(1/2), Sigma the second moment of the layer's inputs; for "refit" they are those before it.
    """

    layer: str
    folding: int | None
    slices: int | None
    rank: int | None
    params_before: int
    params_after: int
    error_largest: float
    error_theorem: float
    error_exact: float


@dataclass(frozen=True)
class LowRank:
    """A network with low-rank layers and how it came about.

    Args:
        model: the new network, on the same device and in the same mode.
        layers: one entry a layer that could be replaced, in the model's order.
        skipped: layers that could not, and why.
        settings: the arguments of the call.
        params_before: number of parameters, before.
        params_after: the same, after.
        seconds: time of the whole call.
    """

    model: nn.Module
    layers: tuple[LowRankLayer, ...]
    skipped: tuple[Skipped, ...]
    settings: dict[str, Any]
    params_before: int
    params_after: int
    seconds: float

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer."""
        return [asdict(layer) for layer in self.layers]

    def to_json(self) -> str:
        """Return all but the network as JSON."""
        fields = {name: value for name, value in vars(self).items() if name not in ("model", "layers", "skipped")}
        skipped = [asdict(entry) for entry in self.skipped]
        return to_json({"layers": self.to_records(), "skipped": skipped, **fields})

    def __str__(self) -> str:
        head = (
            f"parameters {self.params_before} -> {self.params_after} ({self.params_after / self.params_before:.1%}), "
            f"method {self.settings['method']}, {self.seconds:.1f} s"
        )
        lines = [format_table(self.to_records(), title=head)]
        return "\n".join([*lines, *(f"left whole: {entry.name}: {entry.reason}" for entry in self.skipped)])


def low_rank(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData | None = None,
    keep: float = 0.5,
    *,
    method: str = "alds",
    measure: str = "params",
    forward: Forward | None = None,
    seed: int = 0,
) -> LowRank:
    """Return the network with its Linear and Conv2d layers replaced by low-rank ones, of a given size.

    The budget is never exceeded; what the ranks leave of it is less than the next rank of any layer costs.

    Args:
        model: any network; stays bit for bit.
        batches: re-iterable of `(inputs, targets)`, of inputs alone, or of mappings, on the model's device; for the
            methods "refit", "data" and "pca", and to count FLOPs.
        keep: fraction of the whole model's `measure` to keep, in (0, 1].
        method: "alds" (smallest largest layer error in operator norm, over ranks and slices of input channels: problem
            (8) of the source, solved exactly), "alds+" (also over the four foldings), "alternating" (the published
            search for "alds"), "refit" ("alds", then the second part of every layer fitted to data by least squares),
            "data" (smallest largest layer error where the inputs are, without slices), or, with the ordinary singular
            value decomposition: "constant" (same share of every layer's cost), "energy" (same retained energy
            everywhere), "pca" (the same, of the principal components of the layers' outputs), "lrank" (smallest sum of
            squared Frobenius distances: the rank selection of L-Rank without its training).
        measure: "params" or "flops" (`torch.utils.flop_counter`, two a multiply-add).
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the random starts of "alternating"; the others draw nothing.

    Returns:
        The new network with its report; `str()` is a table.

    Raises:
        TypeError: `model` is no module, `keep` no number, or batches cannot be iterated twice.
        ValueError: an unknown method, `keep` out of range or below what the method can reach, batches missing or
            empty, or weights or inputs of a layer (which is named) that are not finite.

    Source: Liebenwein et al. 2021 (arXiv:2107.11442); "lrank": Idelbayev and Carreira-Perpinan 2020, "Low-rank
        compression of neural nets: learning the rank of each layer"; "refit" and "data" are derived here.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {tuple(METHODS)}")
    if measure not in LOW_RANK_MEASURES:
        raise ValueError(f"measure={measure!r}: expected one of {LOW_RANK_MEASURES}")
    keep = check_number("keep", keep, 0.0, 1.0, open_low=True)
    rule = METHODS[method]
    data = batches if batches is None or isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    moments: Mapping[str, LayerMoments] = {}
    if rule.data or rule.refit:
        if data is None:
            raise ValueError(f"method={method!r} needs batches: give calibration data, or choose another method")
        moments = collect_moments(model, data, level="patch")
    flops = _flops(model, data) if measure == "flops" else None
    work = copy.deepcopy(model)
    names, skipped = replaceable_layers(work, moments if rule.data else flops, data)
    spectra = [
        LayerSpectra(
            name,
            cast(Factorable, work.get_submodule(name)),
            moments[name].gram / moments[name].rows if rule.data else None,
        )
        for name in names
    ]
    costs = layer_costs(copy.deepcopy(model).eval(), spectra, flops, data)
    options = [
        layer_options(
            cost,
            rule.score,
            foldings=cost.spectra.foldings() if rule.folded else (0,),
            slices=cost.spectra.slice_counts() if rule.sliced else (1,),
        )
        for cost in costs
    ]
    dense = [cost.dense for cost in costs]
    frontiers = [Frontier.of(own, size) for own, size in zip(options, dense, strict=True)]
    before = count_params(model)
    whole = before if flops is None else sum(flops.values())
    budget = rank_budget(frontiers, keep, whole, f"{measure}, method={method!r}", skipped)
    if rule.search:
        cuts = alternating_cuts(options, dense, budget, seed=seed)
    else:
        cuts = (sum_cuts if rule.summed else level_cuts)(frontiers, budget)
    entries = []
    for layer, cut in zip(spectra, cuts, strict=True):
        entries.append(_report(layer, cut))
        if cut is not None:
            parts = layer.build(cut.folding, cut.slices, cut.rank)
            if rule.refit and layer.name in moments:  # a layer that does not run has nothing to be refitted on
                moment = moments[layer.name].gram / moments[layer.name].rows
                refit_second(layer, parts, (cut.slices, cut.rank), moment)
            work = replace_layer(work, layer.name, parts)
    settings = {"keep": keep, "method": method, "measure": measure, "seed": seed}
    seconds = time.perf_counter() - started
    return LowRank(work, tuple(entries), tuple(skipped), settings, before, count_params(work), seconds)


def rank_budget(frontiers: Sequence[Frontier], keep: float, whole: int, label: str, skipped: Sequence[Skipped]) -> int:
    """Return what the layers may cost together, so that the whole network costs `keep` of what it did.

    Args:
        frontiers: of the layers, the last choice being the layer as it is.
        keep: the fraction.
        whole: cost of the whole network.
        label: what messages say of the cost.
        skipped: layers that stay as they are.

    Raises:
        ValueError: with rank 1 everywhere the network still costs more.
    """
    fixed = whole - sum(int(frontier.costs[-1]) for frontier in frontiers)
    smallest = fixed + sum(int(frontier.costs[0]) for frontier in frontiers)
    budget = int(keep * whole * (1 + 1e-12))  # 0.3 * 10 is a little less than 3
    if smallest > budget:
        if not frontiers:
            listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in skipped) or " there are no such layers"
            raise ValueError(f"keep={keep:g}: no layer can become low-rank:{listed}")
        raise ValueError(
            f"keep={keep:g} allows {budget} of {whole} ({label}), but {smallest} are left with rank 1 everywhere: use "
            f"keep >= {smallest / whole:.6f}"
        )
    return budget - fixed


def _flops(model: nn.Module, data: CalibrationData | None) -> dict[str, int]:
    if data is None:
        raise ValueError("measure='flops' needs batches to run the network on: give them, or use measure='params'")
    return module_flops(model, data)


def replaceable_layers(
    model: nn.Module, ran: Container[str] | None, data: CalibrationData | None
) -> tuple[list[str], list[Skipped]]:
    """Return the layers that can be replaced, and those that cannot with the reason.

    Args:
        model: the network.
        ran: the layers that run; None if nobody knows.
        data: calibration data to try it on, if there are any.
    """
    names = list(model.named_modules(remove_duplicate=False))
    places = Counter(id(module) for _, module in names)
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    # Its fast path reads its layers' weights instead of calling them.
    read = {id(part) for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for part in m.children()}
    found, skipped = [], []
    for name, module in names:
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        reason = refusal(module)
        if reason is None and (places[id(module)] > 1 or owners[id(module.weight)] > 1):
            reason = "its weights are also used elsewhere in the network"
        elif reason is None and id(module) in read:
            reason = "the layer around it reads its weights"
        elif reason is None and (module._forward_pre_hooks or module._forward_hooks):
            reason = "it has hooks, which would be lost"
        elif reason is None and ran is not None and name not in ran:
            reason = "it did not run on the batches"
        if reason is not None:
            skipped.append(Skipped(name, reason))
        else:
            found.append(name)
    if data is None or _runs_wrapped(model, found, data):
        return found, skipped
    read_elsewhere = [name for name in found if not _runs_wrapped(model, [name], data)]
    skipped += [Skipped(name, "the network reads more of it than its outputs") for name in read_elsewhere]
    return [name for name in found if name not in read_elsewhere], skipped


@torch.no_grad()
def _runs_wrapped(model: nn.Module, names: Sequence[str], data: CalibrationData) -> bool:
    """Return whether the network runs when some layers are inside another module, as they will be."""
    work = copy.deepcopy(model).eval()
    for name in names:
        work = replace_layer(work, name, nn.Sequential(work.get_submodule(name)))
    try:
        data.call(work, small_batch(data.first()))
    except AttributeError:
        logger.debug("the network does not run with %s replaced", names, exc_info=True)
        return False
    return True


def _report(layer: LayerSpectra, cut: Cut | None) -> LowRankLayer:
    before = count_params(layer.layer)
    if cut is None:
        return LowRankLayer(layer.name, None, None, None, before, before, 0.0, 0.0, 0.0)
    errors = layer.decomposition(cut.folding, cut.slices).errors(cut.rank)
    return LowRankLayer(
        layer.name,
        cut.folding,
        cut.slices,
        cut.rank,
        before,
        parameters_after(layer, cut.folding, cut.slices, cut.rank),
        errors.largest,
        errors.theorem,
        errors.exact,
    )


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Return the model with the named module replaced, in place; the new module if that is all of it."""
    if not name:
        return module
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
    return model
