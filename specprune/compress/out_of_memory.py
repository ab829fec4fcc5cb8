"""What an allocation that failed says: where it happened and what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_ON_THE_CPU = ("can't allocate memory", "not enough memory")  # of PyTorch's RuntimeError, which has no type of its own


class _ToldError(torch.OutOfMemoryError):
    """An error that says what to lower; outer places leave it as it is."""


@contextlib.contextmanager
def telling_what_to_lower(doing: str, advice: str) -> Iterator[None]:
    """Say what was being done and what to lower when memory runs out, on an accelerator or on the CPU.

    Nothing is tried again in smaller pieces: sums may be half updated, and drawn positions would be others.

    Args:
        doing: continues "out of memory while".
        advice: what to do, in the imperative.

    Raises:
        torch.OutOfMemoryError: for every kind of failed allocation.
    """
    try:
        yield
    except _ToldError:
        raise
    except (RuntimeError, MemoryError) as error:
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and not any(words in str(error) for words in _ON_THE_CPU):
            raise
        raise _ToldError(f"out of memory while {doing}: {advice} ({error})") from error
