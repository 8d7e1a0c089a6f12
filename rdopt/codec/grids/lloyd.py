"""Lloyd-Max grids as a file describes them: levels near the integers, one small offset each.

An entry's grid is that of its cell, the quarter octave of its class's spread. Level k of a cell lies offset / FRACTIONS
of a step towards zero of k, so that every decoder forms the same integers; how the encoder places the levels is
`rdopt.encode.lloyd`'s affair.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.codec.coders.bits import BitReader, unzigzag, zigzag
from rdopt.codec.tables.classes import MAX_CLASS, Spreads, classes_of

FRACTIONS = 32  # levels are stored as multiples of 1/FRACTIONS step
POOLED = 4  # levels from this one on share their offset
CELLS_PER_OCTAVE = 4


class LloydLevels(NamedTuple):
    """The levels of all cells as a file holds them.

    Attributes:
        low: the first cell, in quarter octaves of spread.
        offsets: (cells, POOLED + 1) offsets towards zero of the levels 0, 1, ... POOLED, in 1/FRACTIONS step.
    """

    low: int
    offsets: Int[np.ndarray, "cells levels"]


def cell_of(spreads: Spreads, precision: int) -> Int[np.ndarray, "out in"]:
    """The cell of every entry: the quarter octave of its class's spread."""
    return np.floor_divide(CELLS_PER_OCTAVE * classes_of(spreads), max(precision, 1))


def write_levels(levels: LloydLevels) -> tuple[int, ...]:
    """Levels as numbers for gamma codes: first cell, number of cells, the offsets of k >= 1 of each."""
    return zigzag(levels.low), len(levels.offsets), *(zigzag(int(x)) for x in levels.offsets[:, 1:].ravel())


def read_levels(source: BitReader) -> LloydLevels:
    """Inverse of `write_levels`.

    Raises:
        ValueError: damaged numbers.
    """
    low, count = source.gammas(2)
    if count > 2 * CELLS_PER_OCTAVE * MAX_CLASS:
        raise ValueError(f"{count} cells of levels")
    offsets = np.zeros((count, POOLED + 1), np.int32)
    for i in range(count):
        offsets[i, 1:] = [_bounded(unzigzag(x)) for x in source.gammas(POOLED)]
    return LloydLevels(unzigzag(low), offsets)


def _bounded(offset: int) -> int:
    """An offset; a level more than two steps from its place is damage."""
    if abs(offset) > 2 * FRACTIONS:
        raise ValueError(f"an offset of {offset} / {FRACTIONS} steps")
    return offset


def lloyd_values(
    z: Int[np.ndarray, "out in"], spreads: Spreads, precision: int, levels: LloydLevels
) -> Int[np.ndarray, "out in"]:
    """Reconstructions in 1/FRACTIONS step of one matrix, from integers alone.

    Raises:
        ValueError: an entry's spread has no levels.
    """
    cell = cell_of(spreads, precision) - levels.low
    if cell.min() < 0 or cell.max() >= len(levels.offsets):
        raise ValueError("an entry has a spread without levels")
    return values_of(z, cell, levels.offsets)


def lloyd_step(c: float) -> float:
    """The base step of stored values as the float32 number that decoders multiply with, c / FRACTIONS exactly."""
    return float(np.float32(c) / np.float32(FRACTIONS))


def values_of(
    z: Int[np.ndarray, "out in"], cell: Int[np.ndarray, "out in"], offsets: Int[np.ndarray, "cells levels"]
) -> Int[np.ndarray, "out in"]:
    """Reconstructions in 1/FRACTIONS step: FRACTIONS z - sign(z) offset, from integers alone.

    Args:
        z: indices.
        cell: row of `offsets` of every entry.
        offsets: of `LloydLevels`.
    """
    k = z.astype(np.int32)
    return FRACTIONS * k - np.sign(k) * offsets[cell, np.minimum(np.abs(k), POOLED)]
