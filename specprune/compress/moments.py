"""Streaming second moments of what each layer receives: one pass, mergeable, memory free of the sample size."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specprune._files import load_arrays, save_arrays
from specprune._records import shortened
from specprune.compress.batches import CalibrationData, Forward, batch_size
from specprune.compress.distributed import all_names, check_same_call, is_parallel, sum_over_processes
from specprune.compress.gram import GramSum, is_shiftable
from specprune.compress.layers import (
    LEVELS,
    Layer,
    Positions,
    channel_rows,
    get_layer,
    input_width,
    kernel_columns,
    layer_names,
    patch_rows,
)
from specprune.compress.out_of_memory import telling_what_to_lower

FILE_KIND = "moments"
_ROUNDINGS = 16  # of float64, that the variance of a constant may come to, beside those of its sum


@dataclass(frozen=True)
class LayerMoments:
    """Sums over the rows phi of one layer's inputs: how many, their sum, and the sum of phi phi^T.

    Args:
        rows: number of rows summed.
        total: (d,) float64 sum of the rows.
        gram: (d, d) float64 sum of the outer products.
    """

    rows: int
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> LayerMoments:
        """Return the moments of a (rows, d) matrix, computed in float64."""
        sums = GramSum(rows.shape[1], rows.device)
        sums.add(rows.detach().to(torch.float64))
        return cls(sums.rows, sums.total, sums.finish())

    def __add__(self, other: LayerMoments) -> LayerMoments:
        if self.total.shape != other.total.shape:
            raise ValueError(f"cannot merge moments of {len(self.total)} and {len(other.total)} columns")
        return LayerMoments(self.rows + other.rows, self.total + other.total, self.gram + other.gram)

    def mean(self) -> np.ndarray:
        """Return the (d,) mean row."""
        return (self.total / self.rows).cpu().numpy()

    def covariance(self, centred: bool = False) -> np.ndarray:
        """Return the (d, d) second moment E[phi phi^T], or with `centred` the covariance about the mean.

        The noncentred form is the one of the theory (Suzuki et al. 2020, arXiv:1808.08558, section 2).
        """
        moment = (self.gram / self.rows).cpu().numpy()
        if centred:
            mean = self.mean()
            moment = moment - np.outer(mean, mean)
        return (moment + moment.T) / 2

    def about_mean(self) -> Tensor:
        """Return the (d, d) second moment about the mean, of products of float64, with zeros for what is constant.

        A column that does not vary leaves rounding noise of about sqrt(rows) units of its mean square; what is fitted
        to noise would be arbitrary.
        """
        mean, moment = self.total / self.rows, self.gram / self.rows
        noise = (_ROUNDINGS + self.rows**0.5) * torch.finfo(moment.dtype).eps * moment.diagonal()
        found = moment - torch.outer(mean, mean)
        varies = (found.diagonal() > noise).to(found.dtype)
        return found * torch.outer(varies, varies)

    def node_covariance(self, nodes: int) -> np.ndarray:
        """Return the (nodes, nodes) noncentred covariance, averaged over the columns that belong to one node.

        Args:
            nodes: number of nodes; column k belongs to node k // (d / nodes), as after flattening a feature map.

        Raises:
            ValueError: the columns do not divide into that many nodes.
        """
        columns = len(self.total)
        if columns % nodes:
            raise ValueError(f"{columns} columns do not divide into {nodes} nodes of equal size")
        slots = columns // nodes
        blocks = self.covariance().reshape(nodes, slots, nodes, slots)
        return np.einsum("isjs->ij", blocks) / slots


@dataclass(frozen=True)
class Moments(Mapping[str, LayerMoments]):
    """The moments of every layer's inputs, in the order in which the model runs the layers.

    Args:
        layers: layer name to its moments.
        samples: number of samples seen.
        level: "channel" (one column a channel) or "patch" (one column a weight of an output).
    """

    layers: dict[str, LayerMoments]
    samples: int
    level: str

    def __getitem__(self, name: str) -> LayerMoments:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __add__(self, other: Moments) -> Moments:
        if self.level != other.level or set(self.layers) != set(other.layers):
            raise ValueError(
                f"cannot merge moments of {self.level} level and layers {list(self.layers)} with {other.level} level "
                f"and layers {list(other.layers)}: collect both with the same model, layers and level"
            )
        merged = {name: moments + other.layers[name] for name, moments in self.layers.items()}
        return Moments(merged, self.samples + other.samples, self.level)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to one `.npz` file without pickle, whole or not at all."""
        arrays = {}
        for index, moments in enumerate(self.layers.values()):
            arrays[f"total{index}"] = moments.total.cpu().numpy()
            arrays[f"gram{index}"] = moments.gram.cpu().numpy()
        header = {
            "kind": FILE_KIND,
            "samples": self.samples,
            "level": self.level,
            "layers": list(self.layers),
            "rows": [moments.rows for moments in self.layers.values()],
        }
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a moments file or is damaged.
        """
        arrays, header = load_arrays(path, FILE_KIND)
        layers = {}
        try:
            for index, (name, rows) in enumerate(zip(header["layers"], header["rows"], strict=True)):
                total, gram = arrays.pop(f"total{index}"), arrays.pop(f"gram{index}")
                if type(name) is not str or name in layers:
                    raise ValueError(f"the layer {name!r} has no name, or is there twice")
                _check_sums(name, rows, total, gram)
                layers[name] = LayerMoments(rows, torch.from_numpy(total), torch.from_numpy(gram))
            samples, level = header["samples"], header["level"]
            if arrays or type(samples) is not int or samples < 0 or level not in LEVELS:
                raise ValueError(f"{samples!r} samples of level {level!r}, and {len(arrays)} arrays of no layer")
            return cls(layers, samples, level)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a damaged moments file ({shortened(str(error))})") from error


def _check_sums(name: str, rows: Any, total: np.ndarray, gram: np.ndarray) -> None:
    """Refuse what no sum over rows can be."""
    if total.ndim != 1 or gram.shape != (len(total), len(total)):
        raise ValueError(f"layer {name!r} has a {gram.shape} Gram matrix for a total of shape {total.shape}")
    if total.dtype != np.float64 or gram.dtype != np.float64 or type(rows) is not int or rows < 0:
        raise ValueError(f"layer {name!r} has sums of {total.dtype} and {gram.dtype} over {rows!r} rows")
    if not (np.isfinite(total).all() and np.isfinite(gram).all() and (gram.diagonal() >= 0).all()):
        raise ValueError(f"layer {name!r} has sums that are not finite, or negative sums of squares")


class _Collector:
    """A forward pre-hook that adds one layer's inputs to its sums, in a dictionary shared by all layers."""

    def __init__(
        self,
        name: str,
        layer: Layer,
        level: str,
        positions: int | None,
        seed: int,
        into: dict[str, GramSum],
        *,
        wide: bool = False,
    ) -> None:
        self.name, self.layer, self.level, self.positions, self.into = name, layer, level, positions, into
        self.wide = wide
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        advice = "give smaller batches, or fewer layers=" + (", or fewer positions=" if self.level == "patch" else "")
        with telling_what_to_lower(f"collecting the moments of layer {self.name!r}", advice):
            self._add(args, keywords)

    def _add(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs = args[0] if args else keywords["input"]
        if not isinstance(self.layer, nn.Linear) and inputs.dim() == self.layer.weight.dim() - 1:
            inputs = inputs[None]  # a convolution also takes one image without a batch axis
        if self.name not in self.into:
            self.into[self.name] = GramSum(layer_columns(self.layer, self.level), inputs.device, wide=self.wide)
        sums = self.into[self.name]
        if self.level == "channel":
            if isinstance(self.layer, nn.Linear):
                sums.add(channel_rows(self.layer, inputs))
            else:  # in any order of the rows: this layout copies whole maps, not single numbers
                sums.add(inputs.transpose(0, 1).flatten(1).T)
        elif self.positions is None and is_shiftable(self.layer, inputs):
            sums.add_patches(self.layer, inputs)
        else:
            drawn = Positions.draw(self.layer, inputs, self.positions, self.generator)
            sums.add(patch_rows(self.layer, inputs, drawn))


def layer_columns(layer: Layer, level: str) -> int:
    """Return d, the number of columns of a layer's moments."""
    return input_width(layer) * (1 if level == "channel" else kernel_columns(layer))


def collection_bytes(model: nn.Module, layers: Sequence[str] | None = None, *, level: str = "channel") -> int:
    """Return the size of the moments that `collect_moments` gathers: 8 d (d + 1) bytes for a layer of d columns.

    Args:
        model: as for `collect_moments`; it is not run.
        layers: names of the layers; by default all Linear and convolution layers (those that do not run count too).
        level: "channel" or "patch".

    Raises:
        ValueError: unknown layers or level.
    """
    _check_level(level)
    names = list(layers) if layers is not None else layer_names(model)
    columns = [layer_columns(get_layer(model, name), level) for name in names]
    return sum(8 * d * (d + 1) for d in columns)


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any] | CalibrationData,
    layers: Sequence[str] | None = None,
    *,
    level: str = "channel",
    positions: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Moments:
    """Collect the second moments of the inputs of all layers in one forward pass over the data.

    In a data-parallel run every process gives its own share of the data, and gets the moments of all.

    The rows of a float64 model are multiplied in float64, all others (also of half precision, or under autocast) in
    float32; the sums over rows are float64.  The error of a Gram entry is then about 1e-7 of sqrt(G_ii G_jj), at most
    2e-6, see `GramSum`.  On the CPU, rows whose squares leave the range of float32 are multiplied in float64.  All
    positions of a convolution of stride 1 are taken by the shifts of its maps, without their patches.

    Memory does not depend on the number of batches; `collection_ceiling` says for a batch how much it is at most.

    To go on in another job, save what is done and add the rest; the order of the parts does not matter:

        moments = collect_moments(model, first_batches)
        moments.save("moments.npz")
        ...
        moments = Moments.load("moments.npz") + collect_moments(model, remaining_batches)

    Args:
        model: any module with Linear or convolution layers; it is run in evaluation mode on a copy and stays as it is.
        batches: re-iterable of `(inputs, targets)`, inputs alone, or mappings, on the model's device.
        layers: names of the layers whose inputs to measure; by default all Linear and (not depthwise) convolution
            layers that run.
        level: "channel" (every pixel of a channel is a sample of one node) or "patch" (the columns of the layer's
            weight matrix, every output position is a sample; of a grouped layer, the columns of all its blocks).
        positions: at patch level, output positions drawn at random per image; None takes all.
        forward: optional `forward(model, batch)` for models that are called in another way.
        seed: of the drawn positions.

    Returns:
        The moments by layer, in the order in which the layers ran.

    Raises:
        ValueError: empty batches, unknown layers or level, NaN or Inf in a layer's inputs (the layer is named), or
            another call, model or weights in another process of a data-parallel run.
        TypeError: batches that cannot be iterated twice.
        RuntimeError: another process of a data-parallel run died.
        torch.OutOfMemoryError: naming the layer and what to lower.
    """
    data = batches if isinstance(batches, CalibrationData) else CalibrationData(batches, forward)
    return moments_of(model, data, layers, level=level, positions=positions, seed=seed)


@torch.no_grad()
def moments_of(
    model: nn.Module,
    data: CalibrationData,
    layers: Sequence[str] | None = None,
    *,
    level: str = "channel",
    positions: int | None = None,
    seed: int = 0,
    wide: bool = False,
) -> Moments:
    """Return what `collect_moments` returns; with `wide`, all products are of float64, for moments to be centred."""
    _check_level(level)
    work = copy.deepcopy(model).eval()
    check_finite_weights(work)
    wanted = {"layers": None if layers is None else list(layers), "level": level, "positions": positions, "seed": seed}
    check_same_call("collect_moments", wanted, work)
    names = list(layers) if layers is not None else layer_names(work)
    sums: dict[str, GramSum] = {}
    for index, name in enumerate(names):
        layer = get_layer(work, name)
        collector = _Collector(name, layer, level, positions, seed + index, sums, wide=wide)
        layer.register_forward_pre_hook(collector, with_kwargs=True)
    samples = 0
    for batch in data.passes(work, "collecting moments"):
        data.call(work, batch)
        samples += batch_size(batch)
    ran = all_names(list(sums))
    missing = [name for name in names if name not in ran]
    if layers is not None and missing:
        raise ValueError(f"the layers {missing} did not run in the forward pass; leave them out")
    found: dict[str, LayerMoments] = {}
    for name in ran:
        layer, own = get_layer(work, name), sums.pop(name, None)
        with telling_what_to_lower(f"adding up the moments of layer {name!r}", "ask for fewer layers="):
            part = None if own is None else LayerMoments(own.rows, own.total, own.finish())
            moments = found[name] = over_processes(part, layer_columns(layer, level), layer.weight.device)
        if not bool(torch.isfinite(moments.gram.diagonal()).all()):
            raise ValueError(
                f"NaN or Inf in the inputs of layer {name!r} or in their squares: check the data and earlier layers; "
                "if the numbers are merely huge, scale them down or run in float64"
            )
    return Moments(found, int(sum_over_processes(torch.tensor(samples))), level)


def over_processes(moments: LayerMoments | None, width: int, device: torch.device) -> LayerMoments:
    """Return the moments summed over all processes of a data-parallel run.

    Args:
        moments: of this process; None if it has no data.
        width: number of columns.
        device: where the sums go.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if moments is None:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        moments = LayerMoments(0, zeros, torch.outer(zeros, zeros))
    if not is_parallel():
        return moments
    rows = int(sum_over_processes(torch.tensor(moments.rows)))
    return LayerMoments(rows, sum_over_processes(moments.total), sum_over_processes(moments.gram))


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {LEVELS}")


def check_finite_weights(model: nn.Module) -> None:
    """Check that every parameter and buffer is finite.

    Raises:
        ValueError: naming the first tensor with NaN or Inf.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):  # the sum may also overflow
            count = int((~torch.isfinite(tensor)).sum())
            if count:
                raise ValueError(
                    f"the model's {name!r} has {count} NaN or Inf entries: repair or retrain the model before this"
                )
