"""Trellis-coded matrices as streams, and back: codes in segments that decode in parallel, shapes, spreads.

The lanes of all matrices in the order of the file are cut into segments of about SEGMENT_SIZE indices, one string of
rANS words each. The decoder uses integers until the indices are values.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.codec.allocation import pack_spreads
from rdopt.codec.bits import BitReader, BitWriter
from rdopt.codec.classes import Spreads
from rdopt.codec.columns import Path
from rdopt.codec.lanes import Order, from_lanes, to_lanes
from rdopt.codec.rans import FIRST_STATE, WAYS, Coder, code_lengths, decode_lanes, encode_lanes
from rdopt.codec.trellis import SEGMENT, next_states, walk_lanes
from rdopt.codec.trellis_plan import PRECISIONS, TrellisPlan, read_shapes, write_shapes

SEGMENT_SIZE = 1 << 18
_WORD_BOUND = 5  # words an index can take at most: escape, raw bits, sign
_ENDLESS = 1 << 30


class Piece(NamedTuple):
    """Neighbouring lanes of one matrix."""

    matrix: int
    first: int
    last: int


class Packed(NamedTuple):
    """Streams and index of the coded matrices, and their ideal code length in bits."""

    codes: bytes
    tables: bytes
    scales: bytes
    index: tuple[int, ...]
    bits: float


def segments(shapes: Sequence[tuple[int, int]]) -> list[list[Piece]]:
    """Cuts the lanes of matrices (out, in) into segments of SEGMENT_SIZE indices or a little more."""
    found, current, size = [], [], 0
    for matrix, (m, n) in enumerate(shapes):
        first = 0
        while first < n:
            lanes = min(n - first, -(-(SEGMENT_SIZE - size) // m))
            lanes = min(n - first, -(-lanes // WAYS) * WAYS)
            current.append(Piece(matrix, first, first + lanes))
            first, size = first + lanes, size + lanes * m
            if size >= SEGMENT_SIZE:
                found.append(current)
                current, size = [], 0
    return [*found, current] if current else found


def restart(order: Order) -> int:
    """Entries after which a lane's trellis starts anew."""
    return SEGMENT if order == "columns" else _ENDLESS


def pack_trellis(
    paths: Sequence[Path], orders: Sequence[Order], plan: TrellisPlan, states: int, threads: int
) -> Packed:
    """Entropy-codes the paths of all matrices."""
    keys, coder = plan.keys(), plan.coder()
    lanes = []
    for matrix, (path, order) in enumerate(zip(paths, orders, strict=True)):
        tables = plan.tables_of(matrix, keys)
        lanes.append(tuple(to_lanes(x, order) for x in (path.k, tables, path.grids)))
    cuts = segments([path.k.shape for path in paths])
    with ThreadPoolExecutor(threads or None) as pool:
        codes = list(pool.map(lambda pieces: _encode_segment(pieces, lanes, coder), cuts))
        bits = list(pool.map(lambda x: code_lengths(*x, coder.start, coder.symbols, coder.shift), lanes))
    orders_code = sum((order == "diagonals") << i for i, order in enumerate(orders))
    return Packed(
        b"".join(codes),
        write_shapes(plan),
        pack_spreads(plan.spreads),
        (PRECISIONS.index(plan.precision), states, orders_code, *(len(x) // 2 for x in codes)),
        float(sum(bits)),
    )


def _encode_segment(pieces: Sequence[Piece], lanes: Sequence[tuple], coder: Coder) -> bytes:
    size = sum((p.last - p.first) * lanes[p.matrix][0].shape[1] for p in pieces)
    words = np.zeros(_WORD_BOUND * size + 2 * WAYS, np.uint16)
    states, at = np.full(WAYS, FIRST_STATE, np.uint64), len(words)
    for piece in reversed(pieces):
        part = [x[piece.first : piece.last] for x in lanes[piece.matrix]]
        at = encode_lanes(*part, coder.start, coder.symbols, coder.shift, states, words, at)
    return states.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()


class Matrix(NamedTuple):
    """A matrix as the entropy decoder gives it: values in steps and indices, (out, in), and bits of its codes."""

    values: Int[np.ndarray, "out in"]
    indices: Int[np.ndarray, "out in"]
    bits: float


def unpack_trellis(
    codes: bytes,
    tables: bytes,
    spreads: list[Spreads],
    index: BitReader,
    shapes: Sequence[tuple[int, int]],
    threads: int,
) -> list[Matrix]:
    """Inverse of `pack_trellis`.

    Raises:
        ValueError: damaged bytes.
    """
    rank, states, orders_code = index.gammas(3)
    if rank >= len(PRECISIONS):
        raise ValueError(f"spreads of precision number {rank}")
    step = next_states(states)
    orders: list[Order] = ["diagonals" if orders_code >> i & 1 else "columns" for i in range(len(shapes))]
    plan = read_shapes(tables, TrellisPlan(PRECISIONS[rank], spreads, {}))
    keys, coder = plan.keys(), plan.coder()
    cuts = segments(shapes)
    parts = list(_split(codes, [2 * n for n in index.gammas(len(cuts))]))
    classes = [to_lanes(plan.tables_of(i, keys), order) for i, order in enumerate(orders)]
    k = [np.zeros(x.shape, np.int32) for x in classes]

    def segment(at: int) -> None:
        _decode_segment(parts[at], cuts[at], list(zip(k, classes, orders, strict=True)), step, coder)

    def matrix(i: int) -> Matrix:
        values, grids = walk_lanes(k[i], states, restart(orders[i]))
        bits = code_lengths(k[i], classes[i], grids, coder.start, coder.symbols, coder.shift)
        return Matrix(from_lanes(values, orders[i]), from_lanes(k[i], orders[i]), bits)

    with ThreadPoolExecutor(threads or None) as pool:
        list(pool.map(segment, range(len(cuts))))
        return list(pool.map(matrix, range(len(shapes))))


def _split(data: bytes, lengths: Sequence[int]) -> Iterator[bytes]:
    at = 0
    for length in lengths:
        if at + length > len(data) or length < 4 * WAYS:
            raise ValueError("the codes end before their last segment")
        yield data[at : at + length]
        at += length
    if at != len(data):
        raise ValueError("the codes do not end with their last segment")


def _decode_segment(
    data: bytes, pieces: Sequence[Piece], lanes: Sequence[tuple[Any, Any, Order]], step: Any, coder: Coder
) -> None:
    states = np.frombuffer(data, "<u4", WAYS).astype(np.uint64)
    words, at = np.frombuffer(data, "<u2", offset=4 * WAYS).astype(np.uint16), 0
    for matrix, first, last in pieces:
        k, classes, order = lanes[matrix]
        at = decode_lanes(
            k[first:last], classes[first:last], step, restart(order),
            coder.start, coder.symbols, coder.shift, coder.slots, states, words, at,
        )  # fmt: skip
    if at != len(words) or np.any(states != FIRST_STATE):
        raise ValueError("a segment of the codes does not end with its last index")
