"""The rivals of the pruning benchmark: Torch-Pruning's own rules, a ThiNet-like rule, and scores for identical refits.

Every rival gets the same calibration images and the same budget: the fraction of the full network's FLOPs, counted by
`count_flops`, met from below.  Where a rule of Torch-Pruning 1.6.1 does not run as released, it is helped so that it
does (see `_hessian` and `_obdc`): a rival that fails would be no rival.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from specprune.compress.batches import CalibrationData
from specprune.compress.cost import count_flops
from specprune.compress.groups import Structure
from specprune.compress.layers import get_layer, set_weight_matrix, weight_matrix
from specprune.compress.moments import collect_moments
from specprune.compress.surgery import NORMS, Group, Slice, input_columns, remove_nodes

Batches = Sequence[tuple[Tensor, Tensor]]
TORCH_PRUNING_RULES = (
    "magnitude_l1",
    "magnitude_l2",
    "lamp",
    "fpgm",
    "bn_scale",
    "taylor",
    "hessian",
    "obdc",
    "random",
)
LOCAL_ONLY = ("obdc", "random")
SCORE_RULES = ("magnitude_l1", "magnitude_l2", "lamp", "fpgm", "bn_scale", "taylor", "random")
BUDGET_SLACK = 0.01  # of the full cost: a search that ends further below the budget goes on
_BISECTIONS = 12
_SCAN = 24
_THINET_POSITIONS = 10  # per image, as in the paper
_SCALE_RIDGE = 1e-6


class NotApplicableError(ValueError):
    """The rule says nothing about this network (a rule on batch norms where there are none)."""


def uniform_widths(model: nn.Module, example: Tensor, groups: Sequence[Group], keep: float) -> dict[str, int]:
    """Return widths that keep one fraction of every group, filled up unit by unit while the budget lasts.

    Args:
        model: the network; left as it is.
        example: an input of a few images.
        groups: from `find_groups`.
        keep: fraction of the full FLOPs that may be used.

    Raises:
        ValueError: one unit a group costs more than the budget.
    """
    full = flops_of(model, example)

    def cost(widths: Mapping[str, int]) -> float:
        kept = {name: np.arange(width) for name, width in widths.items()}
        return flops_of(remove_nodes(model, groups, kept), example) / full

    def widths_at(fraction: float) -> dict[str, int]:
        return {group.name: max(1, int(fraction * group.width)) for group in groups}

    if cost(widths_at(0.0)) > keep:
        raise ValueError(f"keep={keep}: one node in every group costs {cost(widths_at(0.0)):.3g} of the full network")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(widths_at(middle)) <= keep else (low, middle)
    widths = widths_at(low)
    for group in groups:
        more = {**widths, group.name: min(widths[group.name] + 1, group.width)}
        widths = more if cost(more) <= keep else widths
    return widths


def flops_of(model: nn.Module, example: Tensor) -> int:
    """Return the FLOPs of one image."""
    return count_flops(model, CalibrationData([example]))


def reestimate_norms(model: nn.Module, batches: Batches) -> nn.Module:
    """Return a copy whose batch norms have the running statistics of these images, averaged over the batches."""
    work = copy.deepcopy(model).eval()
    norms = [module for module in work.modules() if isinstance(module, NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    with torch.no_grad():
        for inputs, _ in batches if norms else ():
            work(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return work.eval()


def torch_pruning_rival(
    model: nn.Module,
    example: Tensor,
    data: Batches,
    keep: float,
    *,
    rule: str,
    structure: Structure,
    scope: str = "local",
    seed: int = 0,
) -> nn.Module:
    """Return the network pruned by a rule of Torch-Pruning at a fraction of its FLOPs.

    Local: every group keeps the same fraction (`uniform_widths`).  Global: scores of all groups are ranked together and
    the pruning ratio is searched.

    Args:
        model: the network, in evaluation mode; left as it is.
        example: an input of a few images.
        data: labelled calibration batches; only the rules on gradients read the labels.
        keep: fraction of the full FLOPs that may be used.
        rule: one of `TORCH_PRUNING_RULES`.
        structure: from `find_groups`.
        scope: "local" or "global".
        seed: of the rule "random".

    Raises:
        ValueError: an unknown rule or scope, or a budget that cannot be met.
        NotApplicableError: the rule has no scores for this network.
    """
    if rule not in TORCH_PRUNING_RULES or scope not in ("local", "global") or (scope, rule[:4]) == ("global", "obdc"):
        raise ValueError(f"rule={rule!r}, scope={scope!r}: expected one of {TORCH_PRUNING_RULES}, local or global")
    if rule == "bn_scale" and not any(isinstance(module, NORMS) for module in model.modules()):
        raise NotApplicableError("a rule on batch norms for a network without any")
    gradients = _gradients(rule, model, data)
    if scope == "local":
        widths = uniform_widths(model, example, structure.groups, keep)
        ratios: dict[str, float] = {}
        for group in structure.groups:
            for entry in group.producers:
                # Torch-Pruning keeps int(channels * (1 - ratio)); the half unit is safe against rounding.
                ratios[entry.module] = 1 - (widths[group.name] + 0.5) / group.width
        return _torch_pruned(model, example, data, rule, gradients, structure, 0.0, ratios, seed)

    full = flops_of(model, example)
    best: tuple[float, nn.Module] | None = None

    def attempt(ratio: float) -> bool:
        nonlocal best
        small = _torch_pruned(model, example, data, rule, gradients, structure, ratio, None, seed)
        fraction = flops_of(small, example) / full
        if fraction <= keep and (best is None or fraction > best[0]):
            best = fraction, small
        return fraction <= keep

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if attempt(middle) else (middle, high)
    if best is None or best[0] < keep - BUDGET_SLACK:  # a layer that would lose all is left whole: not monotone
        for ratio in np.linspace(0.02, 0.98, _SCAN):
            attempt(float(ratio))
    if best is None:
        raise ValueError(f"no global pruning ratio brings {rule} below {keep} of the FLOPs")
    return best[1]


def _torch_pruned(
    model: nn.Module,
    example: Tensor,
    data: Batches,
    rule: str,
    gradients: Mapping[str, Tensor],
    structure: Structure,
    ratio: float,
    ratios: Mapping[str, float] | None,
    seed: int,
) -> nn.Module:
    work = copy.deepcopy(model).eval()
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(True)  # the graph follows gradients
        parameter.grad = gradients[name].clone() if name in gradients else None
    prunable = {entry.module for group in structure.groups for entry in group.producers}
    importance = _importance(rule, work, example)
    # Torch-Pruning's defaults are shared mutable objects, so every dictionary and list is passed anew.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        pruner = torch_pruning.BasePruner(
            work,
            example,
            importance=importance,
            global_pruning=ratios is None,
            pruning_ratio=ratio,
            pruning_ratio_dict={work.get_submodule(name): value for name, value in (ratios or {}).items()},
            ignored_layers=[work.get_submodule(name) for name in structure.order if name not in prunable],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            customized_pruners={},
            unwrapped_parameters=[],
            channel_groups={},
            root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
        )
        if rule == "obdc":
            _obdc(importance, pruner, work, data)
        pruner.step()
    work.zero_grad(set_to_none=True)
    return work.eval()


def _importance(rule: str, model: nn.Module, example: Tensor) -> Any:
    layers: list[Any] = [nn.modules.conv._ConvNd, nn.Linear]
    everything = [*layers, nn.modules.batchnorm._BatchNorm, nn.LayerNorm]
    made = torch_pruning.importance
    if rule in ("magnitude_l1", "magnitude_l2"):
        return made.MagnitudeImportance(p=int(rule[-1]), target_types=everything)
    if rule == "taylor":
        return made.TaylorImportance(target_types=everything)
    if rule == "hessian":
        return made.HessianImportance(target_types=everything)
    if rule == "obdc":
        with torch.no_grad():
            return made.OBDCImportance(target_types=layers, num_classes=model(example).shape[1])
    return {
        "lamp": made.LAMPImportance,
        "fpgm": made.FPGMImportance,
        "bn_scale": made.BNScaleImportance,
        "random": made.RandomImportance,
    }[rule]()


def _gradients(rule: str, model: nn.Module, data: Batches) -> dict[str, Tensor]:
    """Return what a rule expects in the parameters' `grad`, by parameter name."""
    if rule == "taylor":
        return loss_gradients(model, data)
    return _hessian(model, data) if rule == "hessian" else {}


def loss_gradients(model: nn.Module, data: Batches) -> dict[str, Tensor]:
    """Return the gradient of the mean cross-entropy over the batches, with batch norms in evaluation mode."""
    work = copy.deepcopy(model).eval().requires_grad_(True)
    count = sum(len(targets) for _, targets in data)
    for inputs, targets in data:
        (functional.cross_entropy(work(inputs), targets, reduction="sum") / count).backward()
    return {name: parameter.grad for name, parameter in work.named_parameters() if parameter.grad is not None}


def _hessian(model: nn.Module, data: Batches, chunk: int = 50) -> dict[str, Tensor]:
    """Return the mean over images of the squared gradient: the diagonal of the empirical Fisher matrix.

    `HessianImportance.accumulate_grad` of Torch-Pruning 1.6.1 looks its dictionary up by name but fills it by tensor,
    so that only the last image counts; given in `grad`, the mean of all is used instead.
    """
    work = copy.deepcopy(model).eval()
    parameters = {name: parameter.detach() for name, parameter in work.named_parameters()}
    buffers = dict(work.named_buffers())

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(work, (values, buffers), (image[None],))
        return functional.cross_entropy(outputs, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for inputs, targets in data:
        for images, labels in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            for name, gradient in each(parameters, images, labels).items():
                sums[name] += gradient.square().sum(0)
    count = sum(len(targets) for _, targets in data)
    return {name: total / count for name, total in sums.items()}


def _obdc(importance: Any, pruner: Any, model: nn.Module, data: Batches, chunk: int = 50) -> None:
    """Collect the Fisher diagonals of OBDC from labels drawn from the model's own outputs, as its authors do.

    In Torch-Pruning 1.6.1 `_prepare_model` needs a helper that returns None for every group without attention; it gets
    the group back here.  Its Fisher matrices have a column for the bias that its scores do not expect; it is cut off.
    """
    pruner._downstream_node_as_root_if_attention = lambda group: group
    importance._prepare_model(model, pruner)
    generator = torch.Generator().manual_seed(0)
    for inputs, _ in data:
        for images in inputs.split(chunk):
            outputs = model(images)
            drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).flatten()
            model.zero_grad()
            functional.cross_entropy(outputs, drawn).backward()
            importance.step()
    importance._rm_hooks(model)
    for module, fisher in importance.Fisher.items():
        importance.Fisher[module] = fisher[:, : module.weight[0].numel()]


def layer_slices(model: nn.Module, group: Group) -> list[tuple[Slice, np.ndarray]]:
    """Return each consumer of a group with the (units, columns) of its `patch_rows` that a unit occupies."""
    return [
        (entry, input_columns(get_layer(model, entry.module), entry.index).reshape(group.width, -1))
        for entry in group.consumers
    ]


def thinet_rival(
    model: nn.Module,
    example: Tensor,
    data: Batches,
    keep: float,
    *,
    structure: Structure,
    centred: bool = False,
    positions: int = _THINET_POSITIONS,
    seed: int = 0,
) -> nn.Module:
    """Return the network pruned in ThiNet's manner: channels whose loss changes the consumer's outputs least.

    Units are removed greedily by the squared change of the consumers' outputs at sampled positions, nothing refitted;
    then each consumer's weights on the kept units are scaled, one factor a unit, by least squares.  Widths are uniform.
    The inputs are those of the original network: on the tuning networks that did better than those of the pruned one,
    which only a fine-tuning after every layer, as in the paper, would keep near to them.

    Args:
        model: the network, in evaluation mode; left as it is.
        example: an input of a few images.
        data: calibration batches; the labels are not read.
        keep: fraction of the full FLOPs that may be used.
        structure: from `find_groups`.
        centred: whether a change of the outputs' mean is ignored, as batch norms that are re-estimated undo it.
        positions: output positions per image.
        seed: of the positions.

    Source:
        J.-H. Luo, J. Wu, W. Lin, "ThiNet: a filter level pruning method for deep neural network compression",
        ICCV 2017, section 3.2, with all output channels instead of one drawn at random.
    """
    widths = uniform_widths(model, example, structure.groups, keep)
    names = [entry.module for group in structure.groups for entry, _ in layer_slices(model, group)]
    calibration = CalibrationData(list(data))
    moments = collect_moments(model, calibration, names, level="patch", positions=positions, seed=seed)
    work = copy.deepcopy(model).eval()
    kept: dict[str, np.ndarray] = {}
    for group in structure.groups:
        slices = layer_slices(model, group)
        forms = {}
        for entry, columns in slices:
            weight = weight_matrix(get_layer(model, entry.module)).double().numpy()
            covariance = moments[entry.module].covariance(centred=centred)
            forms[entry.module] = contribution_form(weight, covariance, columns)
        total = sum(form / max(form.sum(), 1e-300) for form in forms.values())
        drop = least_contributions(total, group.width - widths[group.name])
        stay = np.setdiff1d(np.arange(group.width), drop)
        kept[group.name] = stay
        for entry, columns in slices:
            layer = get_layer(work, entry.module)
            factors = np.zeros(group.width)
            factors[stay] = unit_factors(forms[entry.module], stay)
            matrix = weight_matrix(layer).clone()
            matrix[:, columns.ravel()] *= torch.as_tensor(np.repeat(factors, columns.shape[1]), dtype=matrix.dtype)
            set_weight_matrix(layer, matrix)
    return remove_nodes(work, structure.groups, kept)


def contribution_form(weight: np.ndarray, moment: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return M with M_cd = E <x_c, x_d>, x_c being what unit c adds to a layer's outputs.

    Args:
        weight: (outputs, columns) of the layer.
        moment: (columns, columns) second moment of its inputs, about zero or about their mean.
        columns: (units, columns a unit).

    Returns:
        (units, units), symmetric and positive semidefinite.
    """
    both = (weight.T @ weight) * moment
    units, size = columns.shape
    flat = columns.ravel()
    return both[np.ix_(flat, flat)].reshape(units, size, units, size).sum((1, 3))


def least_contributions(form: np.ndarray, count: int) -> np.ndarray:
    """Return `count` units, added one by one so that the sum of the form's entries over them grows least."""
    chosen: list[int] = []
    cross = np.zeros(len(form))
    for _ in range(count):
        growth = 2 * cross + form.diagonal()
        growth[chosen] = np.inf
        chosen.append(int(growth.argmin()))
        cross += form[chosen[-1]]
    return np.array(chosen, dtype=np.int64)


def unit_factors(form: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the factors f of the kept units that minimise E |sum_all x_c - sum_kept f_c x_c|^2."""
    system = form[np.ix_(kept, kept)]
    damping = _SCALE_RIDGE * max(float(np.trace(system)) / len(kept), 1e-300)
    return np.linalg.solve(system + damping * np.eye(len(kept)), form[kept].sum(1) + damping)


def scores(model: nn.Module, rule: str, data: Batches, structure: Structure, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a score for every unit of every group, the larger the better, summed over the group's producers.

    Args:
        model: the network; left as it is.
        rule: one of `SCORE_RULES`.
        data: labelled calibration batches; only "taylor" reads them.
        structure: from `find_groups`.
        seed: of the rule "random".

    Returns:
        Group name to (units,) float64 scores.

    Raises:
        ValueError: an unknown rule.
        NotApplicableError: "bn_scale", and a producer has no batch norm.
    """
    if rule not in SCORE_RULES:
        raise ValueError(f"rule={rule!r}: expected one of {SCORE_RULES}")
    gradients = loss_gradients(model, data) if rule == "taylor" else {}
    generator = np.random.default_rng(seed)
    found = {}
    for group in structure.groups:
        total = np.zeros(group.width)
        for entry in group.producers:
            if rule == "random":
                total += generator.random(group.width)
            elif rule == "bn_scale":
                if entry.module not in structure.direct:
                    raise NotApplicableError(f"no batch norm reads the outputs of {entry.module!r} directly")
                scale: Any = model.get_submodule(structure.direct[entry.module]).weight
                total += scale.detach().abs().double().numpy()[entry.index].sum(1)
            else:
                layer = get_layer(model, entry.module)
                rows = _unit_rows(weight_matrix(layer), entry.index)
                if rule == "taylor":  # the gradient as a matrix, in the way of the weight
                    slope = copy.deepcopy(layer)
                    slope.weight.data = gradients[f"{entry.module}.weight"]
                    total += np.abs(rows * _unit_rows(weight_matrix(slope), entry.index)).sum(1)
                else:
                    total += _ROW_SCORES[rule](rows)
        found[group.name] = total
    return found


def _unit_rows(matrix: Tensor, index: np.ndarray) -> np.ndarray:
    """Return (units, entries a unit * columns) weights."""
    return matrix.detach().double().numpy()[index].reshape(len(index), -1)


def _lamp(rows: np.ndarray) -> np.ndarray:
    squares = (rows**2).sum(1)
    order = np.argsort(squares)
    rest = np.cumsum(squares[order][::-1])[::-1]
    result = np.empty_like(squares)
    result[order] = squares[order] / np.maximum(rest, 1e-300)
    return result


def _distances(rows: np.ndarray) -> np.ndarray:
    squares = (rows**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0.0)).sum(1)


_ROW_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "magnitude_l1": lambda rows: np.abs(rows).sum(1),
    "magnitude_l2": lambda rows: (rows**2).sum(1),
    "lamp": _lamp,
    "fpgm": _distances,
}
