"""What it costs to write a network down whose matrices are kept as coefficients of random sign matrices.

A matrix of `weights` entries is padded to P, a power of two, and written as k of its P coefficients.  k may be chosen
with the data: it comes from a grid of four sizes a factor of two, which is known in advance and paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from specprune.bounds.bound import check_count
from specprune.bounds.occam import integer_code_length, network_code_length

#: Grid steps per factor of two in the number of coefficients.
LEVELS_PER_OCTAVE = 4


def padded_size(weights: int) -> int:
    """Return the smallest power of two that holds the weights: the number of rows of the Hadamard matrix.

    Args:
        weights: entries of the matrix, at least 1.

    Returns:
        P = 2^ceil(log2 weights).

    Raises:
        ValueError: if there is no weight.
    """
    return 1 << (check_count("weights", weights) - 1).bit_length()


def level_count(weights: int) -> int:
    """Return how many sizes the priced grid of k has for a matrix: 4 log2 P + 1.

    Args:
        weights: entries of the matrix, at least 1.

    Returns:
        The number of levels; level 0 keeps all P coefficients, the last one keeps one.

    Raises:
        ValueError: if there is no weight.
    """
    return LEVELS_PER_OCTAVE * (padded_size(weights).bit_length() - 1) + 1


def level_size(weights: int, level: int) -> int:
    """Return the number of coefficients at a level of the priced grid: ceil(P 2^(-level/4)).

    Args:
        weights: entries of the matrix, at least 1.
        level: 0 .. `level_count` - 1; a higher one keeps less.

    Returns:
        k between 1 and P.

    Raises:
        ValueError: if the level is not on the grid.
    """
    if check_count("level", level, low=0) >= level_count(weights):
        raise ValueError(f"level must be at most {level_count(weights) - 1} for {weights} weights, got {level}")
    octaves, quarters = divmod(level, LEVELS_PER_OCTAVE)
    return math.ceil((padded_size(weights) >> octaves) * 2 ** (-quarters / LEVELS_PER_OCTAVE))


def projection_code_length(
    weights: Sequence[int],
    levels: Sequence[int],
    biases: Sequence[int],
    exponents: Sequence[int],
    bits: int,
    seed: int,
    widths: Sequence[int] = (),
) -> float:
    """Return the nats that a network costs whose matrices are written as coefficients of sign matrices.

    sum over matrices of ln(level_count) (which k) + `network_code_length` of the k_i coefficients and of the biases
    + `integer_code_length` of the seed.  The sign matrices cost nothing: seed and matrix number determine them.

    Args:
        weights: entries of each matrix.
        levels: level of each matrix, on the grid of `level_size`.
        biases: entries of each bias vector.
        exponents: grid exponent of each matrix' coefficients, then of each bias vector.
        bits: bits a coefficient or bias.
        seed: of the signs; paid for, so it may be chosen with the data.
        widths: ORIGINAL width of each layer that could be pruned.

    Returns:
        C in nats; the sum of exp(-C) over all networks that can be written is at most 1.

    Raises:
        TypeError: if an input is no integer.
        ValueError: if lengths differ or a number is out of range.

    Source: derived here (a product of Kraft-valid codes).
    """
    if len(weights) != len(levels):
        raise ValueError(f"weights and levels need one entry a matrix, got {len(weights)} and {len(levels)}")
    counts = [level_size(count, level) for count, level in zip(weights, levels, strict=True)]
    choice = math.fsum(math.log(level_count(count)) for count in weights)
    return (
        network_code_length([*counts, *biases], exponents, bits, widths)
        + choice
        + integer_code_length(check_count("seed", seed, low=0))
    )
