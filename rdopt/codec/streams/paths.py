"""Trellis-coded matrices as streams, and back: codes in segments that decode in parallel, shapes, spreads.

The lanes of all matrices in the order of the file are cut into segments of about SEGMENT_SIZE indices, each one string
of bytes of the entropy coder. The decoder uses integers until the indices are values.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader
from rdopt.codec.coders.order import Order, from_lanes, restart, walked_lanes
from rdopt.codec.coders.rans import INTERLEAVED_LANES, Blank, Coder, Lanes, bits_of_lanes
from rdopt.codec.coders.registry import CODERS
from rdopt.codec.grids.trellis import next_states, walk_lanes
from rdopt.codec.streams.index import TRELLIS, MatrixCodes
from rdopt.codec.tables.classes import Spreads, log2_spread
from rdopt.codec.tables.trellis import SPREAD_PRECISIONS, TrellisPlan, read_shapes, write_shapes
from rdopt.config.errors import UserError
from rdopt.config.parallel import bounded_map
from rdopt.config.schema import EntropyCoder

SEGMENT_SIZE = 1 << 18
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


def pack_trellis(
    indices: Sequence[Int[np.ndarray, "_ _"]],
    orders: Sequence[Order],
    plan: TrellisPlan,
    states: int,
    threads: int,
    entropy_coder: EntropyCoder = "rans",
) -> MatrixCodes:
    """Entropy-codes the indices of all matrices.

    Args:
        indices: of each, asked for once.
        orders: of their lanes.
        plan: classes and tables of all.
        states: of the trellis.
        threads: 0 for all cores.
        entropy_coder: of the indices.

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
    cuts, lengths = segments([(len(s.row), len(s.col)) for s in plan.spreads]), coder.lengths()

    def segment(parts: list[tuple[Piece, Int[np.ndarray, "_ _"]]]) -> tuple[bytes, float]:
        held = []
        for (matrix, first, last), k in parts:
            order, some = orders[matrix], slice(first, last)
            lanes, grids = walked_lanes(k, order, states, some)
            held.append(Lanes(lanes, plan.tables_of(matrix, keys, order, some), grids))
        return coder.encode(held), sum(_bits(lanes, lengths, tables) for lanes in held)

    with ThreadPoolExecutor(threads or None) as pool:
        codes, bits = zip(*bounded_map(pool, segment, _with_indices(cuts, indices)), strict=True)
    orders_code = sum((order == "diagonals") << i for i, order in enumerate(orders))
    number = list(CODERS).index(entropy_coder)
    return MatrixCodes(
        TRELLIS,
        b"".join(codes),
        write_shapes(plan),
        plan.spreads,
        (SPREAD_PRECISIONS.index(plan.precision), states, orders_code, number, *(len(x) // 2 for x in codes)),
        math.fsum(bits),
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


def _with_indices(
    cuts: Sequence[Sequence[Piece]], indices: Sequence[Int[np.ndarray, "_ _"]]
) -> Iterator[list[tuple[Piece, Int[np.ndarray, "_ _"]]]]:
    """The pieces of every segment with their matrix; each matrix is asked for once and held while it is needed."""
    held: dict[int, Int[np.ndarray, "_ _"]] = {}
    for pieces in cuts:
        for matrix, _, _ in pieces:
            if matrix not in held:
                held[matrix] = indices[matrix]
        yield [(piece, held[piece.matrix]) for piece in pieces]
        held = {matrix: k for matrix, k in held.items() if matrix == pieces[-1].matrix}


class DecodedMatrix(NamedTuple):
    """A matrix as the entropy decoder gives it: values in steps and indices, (out, in), and bits of its codes."""

    values: Int[np.ndarray, "out in"]
    indices: Int[np.ndarray, "out in"]
    bits: float


class TrellisReader:
    """Reads matrices out of the codes, each when it is asked for; the inverse of `pack_trellis`.

    Args:
        codes, tables: the streams.
        spreads: of every matrix.
        index: what the method says of its streams.
        shapes: of every matrix.
        threads: 0 for all cores; the result does not depend on it.

    Raises:
        ValueError: damaged bytes.
    """

    def __init__(
        self,
        codes: bytes,
        tables: bytes,
        spreads: list[Spreads],
        index: BitReader,
        shapes: Sequence[tuple[int, int]],
        threads: int,
    ) -> None:
        rank, self._states, orders_code, number = index.gammas(4)
        if rank >= len(SPREAD_PRECISIONS) or number >= len(CODERS):
            raise ValueError(f"spreads of precision number {rank}, entropy coder number {number}")
        next_states(self._states)  # refuses numbers without a code
        self._orders: list[Order] = ["diagonals" if orders_code >> i & 1 else "columns" for i in range(len(shapes))]
        self._plan = read_shapes(tables, TrellisPlan(SPREAD_PRECISIONS[rank], spreads, {}))
        self._keys, self._integers, self._threads = self._plan.keys(), _tables(self._plan), threads
        self._coder = list(CODERS.values())[number](self._integers)
        self._cuts, self._lengths = segments(shapes), self._coder.lengths()
        self._parts = list(_split(codes, [2 * n for n in index.gammas(len(self._cuts))]))
        self._held: dict[int, Blank] = {}  # matrices of which some segment is decoded
        self._done: set[tuple[int, int]] = set()  # (segment, matrix) of those

    def read(self, matrices: Sequence[int]) -> list[DecodedMatrix]:
        """Some of the matrices, fastest in the order of the file; bits are the ideal code length.

        Raises:
            ValueError: damaged bytes.
        """
        wanted = set(matrices)
        cuts = [
            at for at, pieces in enumerate(self._cuts)
            if any(piece.matrix in wanted and (at, piece.matrix) not in self._done for piece in pieces)
        ]
        for matrix in dict.fromkeys(piece.matrix for at in cuts for piece in self._cuts[at]):
            if matrix not in self._held:
                order = self._orders[matrix]
                classes = self._plan.tables_of(matrix, self._keys, order)
                self._held[matrix] = Blank(np.zeros(classes.shape, np.int32), classes, restart(order))
        with ThreadPoolExecutor(self._threads or None) as pool:
            list(pool.map(self._decode, cuts))
            found = list(pool.map(self._finished, matrices))
        self._done |= {(at, piece.matrix) for at in cuts for piece in self._cuts[at]}
        self._done = {pair for pair in self._done if pair[1] not in wanted}
        for matrix in wanted:
            self._held.pop(matrix, None)
        return found

    def _decode(self, at: int) -> None:
        blanks = [
            Blank(self._held[i].k[first:last], self._held[i].classes[first:last], self._held[i].restart)
            for i, first, last in self._cuts[at]
        ]
        self._coder.decode(self._parts[at], blanks, next_states(self._states))

    def _finished(self, matrix: int) -> DecodedMatrix:
        (k, classes, restarts), order = self._held[matrix], self._orders[matrix]
        values, grids = walk_lanes(k, self._states, restarts)
        bits = _bits(Lanes(k, classes, grids), self._lengths, self._integers)
        return DecodedMatrix(from_lanes(values, order), from_lanes(k, order), bits)


def unpack_trellis(
    codes: bytes,
    tables: bytes,
    spreads: list[Spreads],
    index: BitReader,
    shapes: Sequence[tuple[int, int]],
    threads: int,
) -> list[DecodedMatrix]:
    """All matrices at once, each with its share of the real bits; see `TrellisReader`."""
    decoded = TrellisReader(codes, tables, spreads, index, shapes, threads).read(range(len(shapes)))
    ideal = sum(x.bits for x in decoded)
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
