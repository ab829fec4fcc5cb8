"""What layers receive and give in a forward pass, and what is added to their outputs right after (shortcuts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specprune.compress.batches import CalibrationData, StopForward
from specprune.compress.tracing import map_tensors

_SUMS = ("add", "add_", "__add__", "__iadd__", "__radd__")


@dataclass
class Seen:
    """One layer in one forward pass.

    Args:
        inputs: what the layer received.
        outputs: what it gave, before any batch norm.
        shortcut: what was added to the outputs (or to the batch norm of them) right after, of the same shape.
    """

    inputs: Tensor
    outputs: Tensor
    shortcut: Tensor | None = None


class _SumWatch(TorchFunctionMode):
    """Notes the other summand wherever a marked tensor is added to something of its shape."""

    def __init__(self, done: Any) -> None:
        super().__init__()
        self.marks: dict[int, tuple[Tensor, int, Seen]] = {}
        self.done = done

    def mark(self, tensor: Tensor, entry: Seen) -> None:
        self.marks[id(tensor)] = (tensor, tensor._version, entry)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _SUMS and len(args) == 2 and not kwargs:
            for one, other in (args, args[::-1]):
                if isinstance(one, Tensor) and isinstance(other, Tensor) and id(one) in self.marks:
                    _, version, entry = self.marks.pop(id(one))
                    changed = one._version != version  # by an activation in place, say
                    if one.shape == other.shape and entry.shortcut is None and not changed:
                        entry.shortcut = other.clone()
            self.done()
        return func(*args, **(kwargs or {}))


def capture(
    model: nn.Module,
    layers: Sequence[str],
    data: CalibrationData,
    batch: Any,
    *,
    norms: dict[str, str] | None = None,
    closers: Sequence[str] = (),
    to_the_end: bool = False,
) -> dict[str, Seen]:
    """Run the model on a batch and return what the layers saw; the run ends as soon as all is known.

    Args:
        model: any network.
        layers: names of the layers to watch.
        data: how to call the model.
        batch: what to call it on.
        norms: layer to the batch norm that reads it directly; a sum with the norm's outputs counts as well.
        closers: those of the layers whose outputs are known to be added to a shortcut.
        to_the_end: run the whole network, to find the closers.
    """
    found: dict[str, Seen] = {}
    hooks = []

    def done() -> None:
        if not to_the_end and len(found) == len(layers) and all(found[name].shortcut is not None for name in closers):
            raise StopForward

    watch = _SumWatch(done)

    def after(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Copies, because what follows may work in place.
            found[name] = Seen(map_tensors(args[0], Tensor.clone), map_tensors(output, Tensor.clone))
            if isinstance(output, Tensor):
                watch.mark(output, found[name])
            done()

        return hook

    def after_norm(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            watch.mark(output, found[name])

        return hook

    for name in layers:
        hooks.append(model.get_submodule(name).register_forward_hook(after(name)))
        if norms and name in norms:
            hooks.append(model.get_submodule(norms[name]).register_forward_hook(after_norm(name)))
    try:
        with watch:
            data.call(model, batch)
    except StopForward:
        pass
    finally:
        for handle in hooks:
            handle.remove()
    missing = [name for name in layers if name not in found]
    if missing:
        raise ValueError(f"the layers {missing} did not run on this batch; every batch must use the whole network")
    return found
