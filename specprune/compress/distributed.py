"""Data-parallel runs: every process reads its own share of the data, and sums over all of them decide.

Nothing here acts outside an initialised `torch.distributed` process group, so the same code runs alone.  All processes
must make the same calls in the same order.  What they decide on is bitwise the same on each, because all of them take
the sums, and the traced batch, from one process.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def is_parallel() -> bool:
    """Return whether this process is one of several in a `torch.distributed` group."""
    return process_count() > 1


def process_count() -> int:
    """Return the number of processes of the group, 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes (the tensor itself when there is one).

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return values
    total = _reachable(values.detach().clone(memory_format=torch.contiguous_format))
    with _telling_why("summing"):
        # One process sums, and all take its result: an all-reduce may round differently on different processes.
        dist.reduce(total, 0)
        dist.broadcast(total, 0)
    return total.to(values.device)


def first_of(value: T) -> T:
    """Return the value of the first process whose value is not None, on every process; the value itself when alone.

    Tensors arrive on the same kind of device that they were on, the current one of the process that gets them.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return value
    rank = dist.get_rank()
    has = torch.zeros(process_count())
    has[rank] = float(value is not None)
    owners = sum_over_processes(has).nonzero().flatten().tolist()
    if not owners:
        return value
    box = [_packed(value) if rank == owners[0] else None]
    with _telling_why("sharing a decision"):
        dist.broadcast_object_list(box, owners[0])
    return value if rank == owners[0] else pickle.loads(box[0] or b"")


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return what a function gives on process 0, on every process; a ValueError that it raises there is raised on all.

    For what differs by chance, as measured times do.  The function must not talk to other processes.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return decide()
    answer: Any = None
    if dist.get_rank() == 0:
        try:
            answer = decide(), None
        except ValueError as error:
            answer = None, error
    found, problem = first_of(answer)
    if problem is not None:
        raise problem
    return found


def all_names(names: Sequence[str]) -> list[str]:
    """Return the names that any process has, those of the lower processes first, in their order.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    return list(dict.fromkeys(name for own in _gathered(list(names)) for name in own))


def check_same_call(call: str, arguments: Mapping[str, Any], model: nn.Module) -> None:
    """Check that all processes make the same call, on models of the same kinds of modules and bitwise equal weights.

    Sums of different calls would be wrong without a word where their sizes agree, and end the process where they do
    not, so this comes before anything is summed.

    Args:
        call: name of the function called.
        arguments: name to a value that is compared by its `repr`.
        model: whose modules, parameters and buffers are compared.

    Raises:
        ValueError: on every process, naming the first thing that differs.
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    weights = {name: (str(v.dtype), tuple(v.shape), zlib.crc32(_raw(v))) for name, v in tensors.items()}
    given = {name: repr(value) for name, value in arguments.items()}
    told: dict[str, dict[str, Any]] = {"argument": given, "module": modules, "tensor": weights}
    (first_call, first), *others = _gathered((call, told))
    for rank, (other_call, other) in enumerate(others, 1):
        if first_call != other_call:
            raise ValueError(
                f"the call is not the same on processes 0 and {rank} ({first_call} and {other_call}): every process "
                "must make the same calls in the same order"
            )
        for kind, ours in first.items():
            theirs = other[kind]
            name = next((name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)), None)
            if name is not None:
                raise ValueError(_difference(kind, call, name, rank, ours.get(name), theirs.get(name)))


def _difference(kind: str, call: str, name: str, rank: int, ours: Any, theirs: Any) -> str:
    processes = f"is not the same on processes 0 and {rank}"
    if kind == "argument":
        return f"{name} of {call} {processes} ({ours} and {theirs}): give every process the same arguments"
    if kind == "module":
        return f"{name!r} of the model {processes} ({ours} and {theirs}): give all the same model"
    shapes = "" if ours is None or theirs is None or ours[:2] == theirs[:2] else f" ({ours[:2]} and {theirs[:2]})"
    return (
        f"{name!r} of the model {processes}{shapes}: give all the same weights, for "
        "example `for tensor in model.state_dict().values(): torch.distributed.broadcast(tensor, 0)`"
    )


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0, in place; they may differ by rounding until then.

    Raises:
        RuntimeError: another process died or did not answer in time.
    """
    if not is_parallel():
        return
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            sent = _reachable(tensor.detach().contiguous())
            with _telling_why("sharing the weights"):
                dist.broadcast(sent, 0)
            tensor.copy_(sent)


@contextlib.contextmanager
def _telling_why(doing: str) -> Iterator[None]:
    """Say which process waited for whom when a collective call fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {dist.get_rank()} of {process_count()} lost the others while {doing}: one of them has died or "
            f"does not answer (its own output tells why): {error}"
        ) from error


def _reachable(tensor: Tensor) -> Tensor:
    """Return the tensor where the group can send it: NCCL knows accelerators only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    if not is_parallel():
        return [value]
    found: list[Any] = [None] * process_count()
    with _telling_why("comparing notes"):
        dist.all_gather_object(found, value)
    return found


class _Packer(pickle.Pickler):
    """Pickles a tensor as its numbers alone: not the whole storage of a view, nor the sender's device."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.layout is torch.strided:
            return _unpacked, (_raw(obj), obj.dtype, tuple(obj.shape), obj.device.type)
        return NotImplemented


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Packer(buffer).dump(value)
    return buffer.getvalue()


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _unpacked(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).to(device)
