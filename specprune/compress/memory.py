"""How much memory collecting moments takes at most: a ceiling that does not depend on the number of batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specprune._records import format_table, to_json
from specprune.compress.batches import Forward, batch_inputs, batch_size, call_model
from specprune.compress.gram import CHUNK, LINE, PART, WIDE, is_shiftable
from specprune.compress.layers import Layer, get_layer, layer_names, output_size
from specprune.compress.moments import collection_bytes, layer_columns
from specprune.compress.tracing import map_tensors, small_batch


@dataclass(frozen=True)
class CollectionCeiling:
    """The most bytes that `collect_moments` holds beyond the caller's model, by what they are for.

    Args:
        model: the copy that is run.
        moments: 8 d (d + 1) for each layer of d columns, and 4 d^2 where the CPU sums triangles in float32 first.
        batches: two batches (the next is read while the last is still held), and their check in float64.
        forward: the outputs of all modules without children on one batch, as if none were ever given back.
        rows: copies of one layer's rows of one batch, and the products of those that are multiplied at once.
        finish: the last copies of one layer's Gram matrix, made when rows and outputs are gone.
        layer: the layer that takes the most rows.
    """

    model: int
    moments: int
    batches: int
    forward: int
    rows: int
    finish: int
    layer: str

    @property
    def total(self) -> int:
        """The ceiling: model + moments + batches + max(forward + rows, finish)."""
        return self.model + self.moments + self.batches + max(self.forward + self.rows, self.finish)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a part, in bytes, the total last."""
        parts = {key: value for key, value in asdict(self).items() if key != "layer"}
        return [{"part": key, "bytes": value} for key, value in {**parts, "total": self.total}.items()]

    def to_json(self) -> str:
        """Return all parts and the total as JSON."""
        return to_json({**asdict(self), "total": self.total})

    def __str__(self) -> str:
        return format_table(self.to_records(), title=f"most memory of collecting moments; most rows: {self.layer}")


@torch.no_grad()
def collection_ceiling(
    model: nn.Module,
    batch: Any,
    layers: Sequence[str] | None = None,
    *,
    level: str = "channel",
    positions: int | None = None,
    forward: Forward | None = None,
) -> CollectionCeiling:
    """Return a ceiling on the memory of `collect_moments`, whatever the number of batches.

    With b bytes a number (8 in float64, else 4), n rows of d columns a batch at the layer at work, and P products at
    once, the parts are:

        moments   sum over layers of 8 d (d + 1), plus 4 d^2 where d >= 128 on the CPU and the model is not float64
        rows      max over layers of 2 b n d + 8 n k + (b + 8) P d^2, with P = max(1, min(n / 256, n / d)) and kernels
                  of k numbers; where shifts of C channels take the place of patches, 2 b N + 4 b M + 16 S + 2 b H C^2,
                  with N numbers in the layer's maps, M in those shifted at once, S in one image, H its lines
        forward   b times the numbers of all modules' outputs
        finish    max over layers of 24 d^2

    Not counted are what libraries set aside for themselves (tens of megabytes in oneDNN, CUDA's context and cache;
    glibc keeps up to 64 MiB of free memory) and outputs of operations that are no modules.  `layer_spectra` adds 8 d^2
    bytes a layer for the covariances that it returns and 24 d^2 of one layer at a time for their eigenvalues.  In a
    data-parallel run the ceiling holds for each process.

    Args:
        model: as for `collect_moments`.  Two samples are run through a copy.
        batch: the largest batch.
        layers: as for `collect_moments`.
        level: "channel" or "patch".
        positions: as for `collect_moments`.
        forward: as for `collect_moments`.

    Raises:
        ValueError: unknown layers or level, or an empty batch.

    Source:
        Derived here; held against measured peaks in the tests and in benchmarks/stress/resources.py.
    """
    names = list(layers) if layers is not None else layer_names(model)
    collection_bytes(model, names, level=level)  # checks names and level
    samples = batch_size(batch)
    if samples == 0:
        raise ValueError("the batch has no samples: give the largest batch that will be read")
    work = copy.deepcopy(model).eval()
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    outputs: list[int] = []
    shown = min(2, samples)

    def note_outputs(_: nn.Module, __: Any, output: Any) -> None:
        outputs.extend(_bytes(tensor) for tensor in _tensors(output))

    for name in names:
        get_layer(work, name).register_forward_pre_hook(_noting(get_layer(work, name), seen[name]), with_kwargs=True)
    for module in work.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(note_outputs)
    call_model(work, small_batch(batch), forward)
    parameter = next(work.parameters(), torch.zeros(()))
    size, on_cpu = (8 if parameter.dtype == torch.float64 else 4), parameter.device.type == "cpu"
    moments, rows, finish = 0, {"": 0}, 0
    for name in names:
        layer, columns = get_layer(work, name), layer_columns(get_layer(work, name), level)
        if not seen[name]:
            continue
        pending = 4 * columns**2 if on_cpu and columns >= WIDE and size == 4 else 0
        moments += collection_bytes(model, [name], level=level) + pending
        finish = max(finish, 24 * columns**2)
        shapes = [(math.ceil(shape[0] / shown * samples), *shape[1:]) for shape in seen[name]]
        rows[name] = max(_row_bytes(layer, shape, level, positions, columns, size, on_cpu) for shape in shapes)
    read = _tensors(batch_inputs(batch) if forward is None else batch)
    check = max((8 * t.numel() + 24 * (t.numel() // max(1, len(t)) if t.dim() else 1) for t in read), default=0)
    largest = max(rows, key=lambda name: rows[name])
    return CollectionCeiling(
        model=sum(map(_bytes, (*work.parameters(), *work.buffers()))),
        moments=moments,
        batches=2 * sum(map(_bytes, read)) + check,
        forward=math.ceil(sum(outputs) / shown * samples),
        rows=rows[largest],
        finish=finish,
        layer=largest,
    )


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _noting(layer: Layer, into: list[tuple[int, ...]]) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs = args[0] if args else keywords["input"]
        alone = not isinstance(layer, nn.Linear) and inputs.dim() == layer.weight.dim() - 1
        into.append((1, *inputs.shape) if alone else tuple(inputs.shape))

    return note


def _row_bytes(
    layer: Layer, shape: tuple[int, ...], level: str, positions: int | None, columns: int, size: int, on_cpu: bool
) -> int:
    """Return the `rows` of one layer that reads inputs of some shape."""
    if columns == 0:
        return 0
    count, kernel = math.prod(shape[:-1] if isinstance(layer, nn.Linear) else (shape[0], *shape[2:])), 1
    if level == "patch" and not isinstance(layer, nn.Linear):
        inputs = torch.empty(shape, device="meta")
        outputs, kernel = output_size(layer, inputs), math.prod(layer.kernel_size)
        if positions is None and is_shiftable(layer, inputs):
            image, lines = math.prod(shape[1:]), shape[2] if len(shape) == 4 else 1
            at_once = min(shape[0], max(1, LINE // shape[-1])) * image
            return 2 * size * shape[0] * image + 4 * size * at_once + 16 * image + 2 * size * lines * shape[1] ** 2
        total = math.prod(outputs)
        count = shape[0] * (total if positions is None else min(positions, total))
    products = max(1, min(count // PART, count // columns))
    if on_cpu and columns >= WIDE:  # triangles are summed where they stay
        return 2 * size * count * columns + 8 * count * kernel + size * CHUNK * columns
    return 2 * size * count * columns + 8 * count * kernel + (size + 8) * products * columns**2
