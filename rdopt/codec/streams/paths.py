"""Trellis-coded matrices as streams, and back: codes in segments that decode in parallel, shapes, spreads.

The lanes of all matrices in the order of the file are cut into segments of about SEGMENT_SIZE indices, each one string
of bytes of the entropy coder. The decoder uses integers until the indices are values.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader
from rdopt.codec.coders.order import Order, from_lanes, to_lanes
from rdopt.codec.coders.rans import INTERLEAVED_LANES, Blank, Coder, Lanes, bits_of_lanes
from rdopt.codec.coders.registry import CODERS
from rdopt.codec.grids.trellis import SEGMENT, TrellisPath, next_states, walk_lanes
from rdopt.codec.streams.index import TRELLIS, MatrixCodes
from rdopt.codec.tables.classes import Spreads, log2_spread
from rdopt.codec.tables.trellis import SPREAD_PRECISIONS, TrellisPlan, read_shapes, write_shapes
from rdopt.config.errors import UserError
from rdopt.config.schema import EntropyCoder

SEGMENT_SIZE = 1 << 18
_ENDLESS = 1 << 30
_MAX_OCTAVE = 20  # of a spread in steps; classes beyond are damage, or steps far too fine


class Piece(NamedTuple):
    """Neighbouring lanes of one matrix."""

    matrix: int
    first: int
    last: int


def segments(shapes: Sequence[tuple[int, int]]) -> list[list[Piece]]:
    """Cuts the lanes of matrices (out, in) into segments of SEGMENT_SIZE indices or a little more."""
    finished, current, size = [], [], 0
    for matrix, (m, n) in enumerate(shapes):
        first = 0
        while first < n:
            lanes = min(n - first, -(-(SEGMENT_SIZE - size) // m))
            lanes = min(n - first, -(-lanes // INTERLEAVED_LANES) * INTERLEAVED_LANES)
            current.append(Piece(matrix, first, first + lanes))
            first, size = first + lanes, size + lanes * m
            if size >= SEGMENT_SIZE:
                finished.append(current)
                current, size = [], 0
    return [*finished, current] if current else finished


def restart(order: Order) -> int:
    """Entries after which a lane's trellis starts anew."""
    return SEGMENT if order == "columns" else _ENDLESS


def pack_trellis(
    paths: Sequence[TrellisPath],
    orders: Sequence[Order],
    plan: TrellisPlan,
    states: int,
    threads: int,
    entropy_coder: EntropyCoder = "rans",
) -> MatrixCodes:
    """Entropy-codes the paths of all matrices.

    Raises:
        UserError: the steps are so fine that an index spreads over more than any table.
    """
    try:
        tables = _tables(plan)
    except ValueError as error:
        raise UserError(
            f"the steps are too fine to code ({error}); lower encode.lam or encode.target_bpw."
        ) from error
    coder, keys = CODERS[entropy_coder](tables), plan.keys()
    lanes = []
    for matrix, (path, order) in enumerate(zip(paths, orders, strict=True)):
        classes = plan.tables_of(matrix, keys)
        lanes.append(Lanes(to_lanes(path.k, order), to_lanes(classes, order), to_lanes(path.grids, order)))
    cuts, lengths = segments([path.k.shape for path in paths]), coder.lengths()

    def segment(pieces: Sequence[Piece]) -> bytes:
        return coder.encode([Lanes._make(x[first:last] for x in lanes[i]) for i, first, last in pieces])

    with ThreadPoolExecutor(threads or None) as pool:
        codes = list(pool.map(segment, cuts))
        bits = list(pool.map(lambda x: _bits(x, lengths, tables), lanes))
    orders_code = sum((order == "diagonals") << i for i, order in enumerate(orders))
    number = list(CODERS).index(entropy_coder)
    return MatrixCodes(
        TRELLIS,
        b"".join(codes),
        write_shapes(plan),
        plan.spreads,
        (SPREAD_PRECISIONS.index(plan.precision), states, orders_code, number, *(len(x) // 2 for x in codes)),
        float(sum(bits)),
    )


def _bits(lanes: Lanes, lengths: Float[np.ndarray, "tables symbols"], tables: Coder) -> float:
    return bits_of_lanes(lanes.k, lanes.classes, lanes.grids, lengths, tables.symbols, tables.shift)


def _tables(plan: TrellisPlan) -> Coder:
    """The integer tables of a plan whose spreads are sane."""
    for key in plan.keys()[:: max(len(plan.keys()) - 1, 1)]:  # the least and the largest
        octaves, unit = log2_spread(key, plan.precision)
        if abs(octaves) > _MAX_OCTAVE * unit:
            raise ValueError(f"indices spread over 2^{octaves // unit} steps")
    return plan.coder()


class DecodedMatrix(NamedTuple):
    """A matrix as the entropy decoder gives it: values in steps and indices, (out, in), and its share of the bits."""

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
) -> list[DecodedMatrix]:
    """Inverse of `pack_trellis`; raises ValueError for damaged bytes."""
    rank, states, orders_code, number = index.gammas(4)
    if rank >= len(SPREAD_PRECISIONS) or number >= len(CODERS):
        raise ValueError(f"spreads of precision number {rank}, entropy coder number {number}")
    step = next_states(states)
    orders: list[Order] = ["diagonals" if orders_code >> i & 1 else "columns" for i in range(len(shapes))]
    plan = read_shapes(tables, TrellisPlan(SPREAD_PRECISIONS[rank], spreads, {}))
    keys, integers = plan.keys(), _tables(plan)
    coder = list(CODERS.values())[number](integers)
    cuts, lengths = segments(shapes), coder.lengths()
    parts = list(_split(codes, [2 * n for n in index.gammas(len(cuts))]))
    classes = [to_lanes(plan.tables_of(i, keys), order) for i, order in enumerate(orders)]
    k = [np.zeros(x.shape, np.int32) for x in classes]

    def segment(at: int) -> None:
        blanks = [Blank(k[i][first:last], classes[i][first:last], restart(orders[i])) for i, first, last in cuts[at]]
        coder.decode(parts[at], blanks, step)

    def matrix(i: int) -> DecodedMatrix:
        values, grids = walk_lanes(k[i], states, restart(orders[i]))
        bits = _bits(Lanes(k[i], classes[i], grids), lengths, integers)
        return DecodedMatrix(from_lanes(values, orders[i]), from_lanes(k[i], orders[i]), bits)

    with ThreadPoolExecutor(threads or None) as pool:
        list(pool.map(segment, range(len(cuts))))
        decoded = list(pool.map(matrix, range(len(shapes))))
    ideal = sum(x.bits for x in decoded)
    # Matrices share strings of words: each gets its share of the real bits.
    shares = [x.bits / ideal if ideal else 1 / len(decoded) for x in decoded]
    return [x._replace(bits=8 * len(codes) * share) for x, share in zip(decoded, shares, strict=True)]


def _split(data: bytes, lengths: Sequence[int]) -> Iterator[bytes]:
    at = 0
    for length in lengths:
        if at + length > len(data):
            raise ValueError("the codes end before their last segment")
        yield data[at : at + length]
        at += length
    if at != len(data):
        raise ValueError("the codes do not end with their last segment")
