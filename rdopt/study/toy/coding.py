"""Free-standing matrices to bytes and back, by the scalar codec of model files.

A uniform grid, one step a matrix; tables and spreads by total bits (`rdopt.codec.tables.uniform`), rANS. The bytes
hold everything that the decoder needs: base step, shapes, steps, tables, spreads, codes.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.constriction import decode_indices, encode_indices, unpack_lists
from rdopt.codec.grids.steps import exp_steps
from rdopt.codec.grids.uniform import round_dead_zone
from rdopt.codec.tables.classes import Spreads, pack_spreads, quantize_spreads, rank1_spreads
from rdopt.codec.tables.uniform import (
    UniformPlan,
    UniformShape,
    choose_plan,
    read_tables,
    refit_plan,
    table_classes,
    write_tables,
)

_WORD = 4
_Arrays = Sequence[Float[np.ndarray, "_ _"]]


class TableClasses(NamedTuple):
    """Which entries share a table: spreads of rows and columns in 1 / precision octave, `width` of them a class."""

    precision: int
    width: int


class CodedArrays(NamedTuple):
    """Bytes, and the bits that an ideal entropy coder would need in their place, side information included."""

    data: bytes
    ideal: float


def steps_of(log_steps: Int[np.ndarray, " k"], c: float) -> Float[np.ndarray, " k"]:
    """The float32 step of every matrix: a quarter octave an integer, times the base step."""
    return exp_steps(np.asarray(log_steps)) * np.float32(c)


def indices_of(arrays: _Arrays, log_steps: Int[np.ndarray, " k"], c: float) -> list[Int[np.ndarray, "_ _"]]:
    """Every matrix in whole steps."""
    steps = steps_of(log_steps, c).astype(np.float64)
    return [round_dead_zone(W / step) for W, step in zip(arrays, steps, strict=True)]


def cheapest_classes(arrays: _Arrays, log_steps: Int[np.ndarray, " k"], c: float) -> TableClasses:
    """The classes that take the fewest bits at these steps, side information included."""
    plan = choose_plan(indices_of(arrays, log_steps, c))
    return TableClasses(plan.precision, plan.width)


def encode_arrays(arrays: _Arrays, log_steps: Int[np.ndarray, " k"], c: float, classes: TableClasses) -> CodedArrays:
    """Quantizes and codes some matrices, their steps in quarter octaves of a base step c, kept as float32.

    Raises:
        ValueError: the steps are so fine that the indices of a class fit no table.
    """
    indices = indices_of(arrays, log_steps, c)
    quantized_spreads = [quantize_spreads(*rank1_spreads(z), classes.precision) for z in indices]
    plan = refit_plan(indices, UniformPlan(*classes, UniformShape(0, 0), quantized_spreads, {}, frozenset(), 0.0))
    codes = [
        encode_indices(z, table_classes(spreads, plan.width), plan.tables)
        for z, spreads in zip(indices, plan.spreads, strict=True)
    ]
    tables, spreads = write_tables(plan), pack_spreads(plan.spreads)
    head = BitWriter()
    head.gammas((len(indices), *classes, len(tables)))
    for z, k, code in zip(indices, log_steps, codes, strict=True):
        head.gammas((*z.shape, zigzag(int(k)), len(code) // _WORD))
    beside = struct.pack("<f", c) + head.bytes() + tables + spreads
    return CodedArrays(beside + b"".join(codes), 8 * len(beside) + plan.bits)


def quantized(arrays: _Arrays, log_steps: Int[np.ndarray, " k"], c: float) -> list[Float[np.ndarray, "_ _"]]:
    """What `decode_arrays` gives back of `encode_arrays`, without the bytes; float32."""
    indices, steps = indices_of(arrays, log_steps, c), steps_of(log_steps, c)
    return [z.astype(np.float32) * step for z, step in zip(indices, steps, strict=True)]


def decode_arrays(data: bytes) -> list[Float[np.ndarray, "_ _"]]:
    """The matrices of `encode_arrays`: index times step, float32.

    Raises:
        ValueError: damaged bytes.
    """
    (c,) = struct.unpack_from("<f", data)
    head = BitReader(data[4:])
    count, precision, width, table_bytes = head.gammas(4)
    rows = [head.gammas(4) for _ in range(count)]
    steps = steps_of(np.array([unzigzag(row[2]) for row in rows], np.int32), c)
    at = 4 + head.bytes_read
    tables = read_tables(data[at : at + table_bytes], precision, width)
    row_spreads, rest = unpack_lists(data[at + table_bytes :], [row[0] for row in rows])
    col_spreads, rest = unpack_lists(rest, [row[1] for row in rows])
    matrices = []
    for (*_, words), step, row, col in zip(rows, steps, row_spreads, col_spreads, strict=True):
        classes = table_classes(Spreads(row, col), width)
        matrices.append(decode_indices(rest[: _WORD * words], classes, tables).astype(np.float32) * step)
        rest = rest[_WORD * words :]
    if rest:
        raise ValueError("the coded matrices do not end with their last index")
    return matrices


class CodedPoint(NamedTuple):
    """One coded file.

    Attributes:
        snr: dB, of the mean error power at steps near the file's. One grid is one draw of an error with few degrees
            of freedom, and its own SNR scatters by several dB.
        decoded_snr: dB, of what the file itself decodes to.
        bits: of the file, stored axes included.
        ideal: of an ideal entropy coder in its place, side information included.
    """

    snr: float
    decoded_snr: float
    bits: float
    ideal: float


def bits_at(points: Sequence[CodedPoint], snr: float) -> float:
    """Bits at an SNR, linear in dB between the points that no smaller file reaches; nan beyond their range.

    At high rate bits are linear in dB: one bit a coefficient for 6.02 dB.
    """
    front: list[CodedPoint] = []
    for point in sorted(points, key=lambda p: (p.bits, -p.snr)):
        if not front or point.snr > front[-1].snr:
            front.append(point)
    if not front:
        return float("nan")
    x, y = [p.snr for p in front], [p.bits for p in front]
    return float(np.interp(snr, x, y, left=np.nan, right=np.nan))
