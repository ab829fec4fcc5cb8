"""An adaptive arithmetic (range) coder in whole numbers: the same bits on every machine.

A message is a sequence of choices.  Each choice has alternatives with whole-number frequencies that both sides know,
and takes its share of an interval that starts as [0, 1).  The word is the shortest dyadic interval [x, x + 2^-L) inside
the final one, written as the L digits of x.  Since the intervals of two messages do not overlap, neither do those of
their words: no word is the beginning of another, and the sum of 2^-L over all messages is at most 1 (Kraft).

L is below the ideal length (the sum of -log2 of the shares) by nothing and above it by less than 2 bits; rounding to a
64-bit window adds less than 2^-20 bits in 10^5 choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

_WINDOW = 64
_FULL = 1 << _WINDOW
_LEAST = 1 << (_WINDOW - 8)  # the interval stays wider than this, so that shares are accurate to 2^-38 or better
_MOST_TOTAL = 1 << 24


class AdaptiveBit:
    """The counts of zeros and ones seen so far in one context: the Krichevsky-Trofimov estimator.

    The next bit is one with probability (ones + 1/2) / (zeros + ones + 1).

    Attributes:
        zeros: 1 + twice the zeros seen.
        ones: 1 + twice the ones seen.
    """

    __slots__ = ("ones", "zeros")

    def __init__(self) -> None:
        self.zeros = 1
        self.ones = 1

    def see(self, bit: int) -> None:
        """Count one bit."""
        if bit:
            self.ones += 2
        else:
            self.zeros += 2


class Encoder:
    """Writes choices into a word."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._low = 0
        self._range = _FULL

    def choice(self, index: int, frequencies: Sequence[int]) -> None:
        """Write one of several alternatives.

        Args:
            index: which.
            frequencies: positive whole numbers, one an alternative; their sum is at most 2^24.

        Raises:
            ValueError: there is no such alternative, or a frequency is not as above.
        """
        total = _check_frequencies(frequencies)
        if not 0 <= index < len(frequencies):
            raise ValueError(f"choice {index} of {len(frequencies)} alternatives; expected 0 to {len(frequencies) - 1}")
        self._narrow(*_share(self._range, frequencies, total, index))

    def bit(self, bit: int, context: AdaptiveBit) -> None:
        """Write one bit with the context's present estimate, then count it there."""
        split = self._range * context.zeros // (context.zeros + context.ones)
        if bit:
            self._narrow(split, self._range - split)
        else:
            self._narrow(0, split)
        context.see(bit)

    def _narrow(self, start: int, width: int) -> None:
        self._low += start
        self._range = width
        self._carry()
        while self._range <= _LEAST:
            self._bytes.append(self._low >> (_WINDOW - 8))
            self._low = (self._low << 8) & (_FULL - 1)
            self._range <<= 8

    def _carry(self) -> None:
        """Move what does not fit into the window into the bytes that were written."""
        if self._low < _FULL:
            return
        self._low -= _FULL
        place = len(self._bytes) - 1
        while self._bytes[place] == 255:
            self._bytes[place] = 0
            place -= 1
        self._bytes[place] += 1

    def finish(self) -> tuple[bytes, int]:
        """Return the word, filled up with zero bits to whole bytes, and its length in bits; write nothing after it."""
        digits = 0
        while True:
            step = 1 << (_WINDOW - digits)
            start = -(-self._low // step) * step
            if start + step <= self._low + self._range:
                break
            digits += 1
        self._low = start
        self._carry()
        length = 8 * len(self._bytes) + digits
        whole = bytes(self._bytes) + self._low.to_bytes(_WINDOW // 8, "big")
        return whole[: (length + 7) // 8], length


class Decoder:
    """Reads choices back; beyond the end of its data it reads zeros, as the rest of a word may be anything.

    Args:
        data: a word, filled up to whole bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = _WINDOW // 8
        self._code = int.from_bytes(data[: self._place].ljust(self._place, b"\0"), "big")
        self._range = _FULL

    @property
    def exhausted(self) -> bool:
        """Whether more has been read than there was: the word was cut off (or does not end where it should)."""
        return self._place > len(self._data) + _WINDOW // 8

    def choice(self, frequencies: Sequence[int]) -> int:
        """Return which of several alternatives comes next.

        Args:
            frequencies: as they were written with.

        Raises:
            ValueError: a frequency is not positive, or their sum too large.
        """
        total = _check_frequencies(frequencies)
        for index in range(len(frequencies)):
            start, width = _share(self._range, frequencies, total, index)
            if self._code < start + width:
                break
        self._narrow(start, width)
        return index

    def bit(self, context: AdaptiveBit) -> int:
        """Return the next bit, and count it in its context."""
        split = self._range * context.zeros // (context.zeros + context.ones)
        bit = int(self._code >= split)
        if bit:
            self._narrow(split, self._range - split)
        else:
            self._narrow(0, split)
        context.see(bit)
        return bit

    def _narrow(self, start: int, width: int) -> None:
        self._code -= start
        self._range = width
        while self._range <= _LEAST:
            following = self._data[self._place] if self._place < len(self._data) else 0
            self._code = (self._code << 8) | following
            self._place += 1
            self._range <<= 8


def _check_frequencies(frequencies: Sequence[int]) -> int:
    total = sum(frequencies)
    if not frequencies or min(frequencies) < 1 or total > _MOST_TOTAL:
        raise ValueError(
            f"frequencies {tuple(frequencies)[:8]}: expected positive whole numbers with a sum of at most {_MOST_TOTAL}"
        )
    return total


def _share(width: int, frequencies: Sequence[int], total: int, index: int) -> tuple[int, int]:
    """Return where the share of an alternative starts in an interval of this width, and how wide it is."""
    before = sum(frequencies[:index])
    start = width * before // total
    return start, width * (before + frequencies[index]) // total - start


def choice_bits(index: int, frequencies: Sequence[int]) -> float:
    """Return the ideal length in bits of one choice: -log2 of its share.

    Args:
        index: which alternative.
        frequencies: positive whole numbers.

    Raises:
        ValueError: a frequency is not positive, or their sum too large.
    """
    return math.log2(_check_frequencies(frequencies) / frequencies[index])


def adaptive_bits(zeros: ArrayLike, ones: ArrayLike) -> np.ndarray:
    """Return the ideal length in bits of a sequence of bits in one adaptive context; the order makes no difference.

    -log2 (Gamma(a + 1/2) Gamma(b + 1/2) / (pi Gamma(a + b + 1))) for a zeros and b ones.

    Args:
        zeros: how many zeros, per context.
        ones: how many ones, of a shape that fits.

    Returns:
        The lengths, in the shape of the counts.

    Source: Krichevsky and Trofimov 1981.
    """
    a, b = np.asarray(zeros, dtype=np.float64), np.asarray(ones, dtype=np.float64)
    nats = gammaln(a + b + 1) + math.log(math.pi) - gammaln(a + 0.5) - gammaln(b + 0.5)
    return nats / math.log(2)
