"""Bytes of a peer's model: indices, scales and tables, entropy-coded as well as static tables allow.

Weights are base row_i z_ij col_j. Every column of every matrix belongs to a class, and a class has one table of |z|
(signs are equiprobable). Four ways to form the classes; the cheapest of those that an arm allows is taken:

    shared   one table for the model
    matrix   one a matrix: what "the entropy of the indices" of a matrix means
    column   one a column: what "per-column entropy" means
    spread   columns of like spread share a table over the whole model, the spread's logarithm is coded beside it;
             most of what per-column tables gain, without their cost

Shapes are not in the file: a decoder has them from the architecture.

A scale of a row or a column is exp2(k / density) with k an integer; rounding before quantization costs a method
nothing, because its steps are free to choose, and rounding after a least-squares fit costs at most 1.1 % of a scale at
density 32. The integers are entropy-coded, far below the 16 bits a scale that publications count.
"""

import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.constriction import decode_indices, encode_indices, pack_lists, unpack_lists
from rdopt.codec.tables.frequencies import ideal_bits, normalize

ColumnClasses = Literal["shared", "matrix", "column", "spread"]
AllowedTables = Literal["any", "pooled", "per-column"]
COARSE_SCALES, FINE_SCALES = 4, 32  # grid points an octave: for steps chosen beforehand, for fitted scales
_CLASSES: tuple[ColumnClasses, ...] = get_args(ColumnClasses)
_ALLOWED: dict[AllowedTables, tuple[ColumnClasses, ...]] = {
    "any": _CLASSES,
    "pooled": ("shared", "matrix"),
    "per-column": ("column", "spread"),
}
_PRECISIONS = (8, 10, 12, 14)
_SPREADS_PER_OCTAVE = 2
_HEADER = "<BBBf"


class PeerMatrix(NamedTuple):
    """One matrix as base row_i z_ij col_j; scales are positive, or 0 where their indices are all zero."""

    z: Int[np.ndarray, "out in"]
    row: Float[np.ndarray, " out"]
    col: Float[np.ndarray, " in"]


class PeerFile(NamedTuple):
    """A file.

    Attributes:
        data: its bytes.
        ideal_bits: the same with ideal code lengths and tables for nothing, as publications count: the indices at
            their empirical entropy in each matrix (pooled) or in each column (per-column); where any tables are
            allowed, their code length under the tables chosen.
        classes: the chosen kind.
    """

    data: bytes
    ideal_bits: float
    classes: ColumnClasses


def index_entropy_bits(z: Int[np.ndarray, "out in"], axis: Literal["matrix", "column"]) -> float:
    """Empirical entropy of all indices in bits, with one distribution a matrix or one a column."""
    shifted = z.astype(np.int64) - (int(z.min()) if z.size else 0)
    size = int(shifted.max(initial=0)) + 1
    group = np.zeros(z.shape[1], np.int64) if axis == "matrix" else np.arange(z.shape[1])
    counts = np.bincount((shifted + size * group).ravel(), minlength=size * (int(group[-1]) + 1)).reshape(-1, size)
    share = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.sum(counts * np.log2(share, where=counts > 0, out=np.zeros(counts.shape))))


def column_classes(matrices: Sequence[PeerMatrix], kind: ColumnClasses) -> list[Int[np.ndarray, " in"]]:
    """The class of every column of every matrix."""
    widths = [m.z.shape[1] for m in matrices]
    if kind == "shared":
        return [np.zeros(n, np.int32) for n in widths]
    if kind == "matrix":
        return [np.full(n, i, np.int32) for i, n in enumerate(widths)]
    if kind == "column":
        starts = np.cumsum([0, *widths[:-1]])
        return [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, widths, strict=True)]
    return [_spread_classes(m.z) for m in matrices]


def _spread_classes(z: Int[np.ndarray, "out in"]) -> Int[np.ndarray, " in"]:
    """log2 of the rms of each column's indices; all-zero columns a class below any other."""
    power = np.maximum(np.mean(np.square(z, dtype=np.float64), axis=0), 0.25 / len(z))
    return np.rint(_SPREADS_PER_OCTAVE / 2 * np.log2(power)).astype(np.int32)


def pack_peer(matrices: Sequence[PeerMatrix], base: float, density: int, tables: AllowedTables) -> PeerFile:
    """A model to bytes.

    Args:
        matrices: in the order that `unpack_peer` gets the shapes in.
        base: factor of all weights, kept as float32.
        density: of the grid of the scales.
        tables: which kinds of classes are tried.
    """
    scales = b"".join(
        pack_lists([log_scales(np.asarray(x, np.float64), density) for x in side])
        for side in ([m.row for m in matrices], [m.col for m in matrices])
    )
    options: dict[ColumnClasses, tuple[int, bytes, float]] = {k: _pack_indices(matrices, k) for k in _ALLOWED[tables]}
    kind = min(options, key=lambda k: len(options[k][1]))
    precision, body, ideal = options[kind]
    head = struct.pack(_HEADER, _CLASSES.index(kind), precision, density, base)
    if tables != "any":
        ideal = sum(index_entropy_bits(m.z, "column" if tables == "per-column" else "matrix") for m in matrices)
    return PeerFile(head + scales + body, ideal + 8 * (len(head) + len(scales)), kind)


def _pack_indices(matrices: Sequence[PeerMatrix], kind: ColumnClasses) -> tuple[int, bytes, float]:
    """Precision of the tables that makes the whole shortest; classes, tables and codes; and the code length alone."""
    columns = column_classes(matrices, kind)
    z = np.concatenate([m.z.ravel() for m in matrices])[None, :]
    keys = _spread_out(columns, [len(m.z) for m in matrices])
    counts, signs = _counts(z, keys), int(np.count_nonzero(z))
    best = None
    for precision in _PRECISIONS:
        if max(np.count_nonzero(c) for c in counts.values()) > 1 << precision:
            continue
        freqs = {k: normalize(c, precision) for k, c in counts.items()}
        described = _write_tables(freqs)
        length = signs + sum(ideal_bits(c, freqs[k]) for k, c in counts.items())
        if best is None or 8 * len(described) + length < best[0]:
            best = (8 * len(described) + length, length, precision, freqs, described)
    assert best is not None, "14 bits hold every table of int16 magnitudes that occurs"
    _, length, precision, freqs, described = best
    beside = pack_lists(columns) if kind == "spread" else b""
    return precision, beside + described + encode_indices(z, keys, freqs), length + 8 * len(beside)


def _spread_out(columns: Sequence[Int[np.ndarray, " in"]], heights: Sequence[int]) -> Int[np.ndarray, "one n"]:
    """The class of every entry of all matrices in a row."""
    return np.concatenate([np.tile(c, n) for c, n in zip(columns, heights, strict=True)])[None, :]


def _counts(z: Int[np.ndarray, "one n"], keys: Int[np.ndarray, "one n"]) -> dict[int, Int[np.ndarray, " k"]]:
    """Counts of |z| in every class that occurs, ascending, each up to its largest magnitude."""
    names, place = np.unique(keys.ravel(), return_inverse=True)
    magnitude = np.abs(z.ravel()).astype(np.int64)
    size = int(magnitude.max()) + 1
    table = np.bincount(place * size + magnitude, minlength=size * len(names)).reshape(-1, size)
    return {int(k): np.trim_zeros(row, "b") for k, row in zip(names, table, strict=True)}


def _write_tables(freqs: dict[int, Int[np.ndarray, " k"]]) -> bytes:
    out = BitWriter()
    for freq in freqs.values():
        out.gamma(len(freq))
        out.gammas(freq[:-1] if len(freq) > 1 else ())  # the last one follows from the total
    return out.bytes()


def unpack_peer(data: bytes, shapes: Sequence[tuple[int, int]]) -> list[Float[np.ndarray, "out in"]]:
    """The weights of a file, float32.

    Args:
        data: of `pack_peer`.
        shapes: (out, in) of every matrix in order.

    Raises:
        ValueError: the bytes do not end where the indices end.
    """
    kind, precision, density, base = struct.unpack_from(_HEADER, data)
    rows, rest = unpack_lists(data[struct.calcsize(_HEADER) :], [m for m, _ in shapes])
    cols, rest = unpack_lists(rest, [n for _, n in shapes])
    if _CLASSES[kind] == "spread":
        columns, rest = unpack_lists(rest, [n for _, n in shapes])
    else:
        empty = [PeerMatrix(np.zeros(s, np.int32), np.ones(s[0]), np.ones(s[1])) for s in shapes]
        columns = column_classes(empty, _CLASSES[kind])
    keys = _spread_out(columns, [m for m, _ in shapes])
    freqs, rest = _read_tables(rest, np.unique(keys).tolist(), precision)
    z = decode_indices(rest, keys, freqs).ravel()
    parts = np.split(z, np.cumsum([m * n for m, n in shapes])[:-1])
    return [
        _weights(part.reshape(shape), exp_scales(row, density), exp_scales(col, density), base)
        for part, shape, row, col in zip(parts, shapes, rows, cols, strict=True)
    ]


def _read_tables(
    data: bytes, names: Sequence[int], precision: int
) -> tuple[dict[int, Int[np.ndarray, " k"]], bytes]:
    source, freqs = BitReader(data), {}
    for name in names:
        size = source.gamma()
        head = source.gammas(size - 1)
        freqs[name] = np.array([*head, (1 << precision) - sum(head)], np.int64)
    return freqs, data[source.bytes_read :]


def _weights(
    z: Int[np.ndarray, "out in"], row: Float[np.ndarray, " out"], col: Float[np.ndarray, " in"], base: float
) -> Float[np.ndarray, "out in"]:
    return (z * np.outer(row, base * col)).astype(np.float32)


def log_scales(x: Float[np.ndarray, " n"], density: int) -> Int[np.ndarray, " n"]:
    """Nearest k with exp2(k / density) close to the positive x; where x is 0 the median of the others.

    A zero scale belongs to a row or column whose indices are all zero, so any value will do.
    """
    used = x > 0
    k = np.zeros(x.shape, np.int32)
    k[used] = np.rint(density * np.log2(x[used]))
    k[~used] = np.median(k[used]) if used.any() else 0
    return k


def exp_scales(k: Int[np.ndarray, " n"], density: int) -> Float[np.ndarray, " n"]:
    """exp2(k / density), float64."""
    return np.exp2(np.asarray(k, np.float64) / density)


def snap_scales(x: Float[np.ndarray, " n"], density: int = COARSE_SCALES) -> Float[np.ndarray, " n"]:
    """x rounded to the grid."""
    return exp_scales(log_scales(np.asarray(x, np.float64), density), density)
