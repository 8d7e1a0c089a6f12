"""The stream of embedding and head: trellis-coded as the blocks are, scales and tables of its own."""

import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import EMBED, HEAD, Architecture
from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.coders.constriction import pack_lists, unpack_lists
from rdopt.codec.coders.order import Order
from rdopt.codec.grids.steps import dequantize
from rdopt.codec.grids.trellis import trellis_step
from rdopt.codec.streams.paths import pack_trellis, unpack_trellis
from rdopt.codec.tables.classes import Spreads, pack_spreads
from rdopt.codec.tables.trellis import TrellisPlan
from rdopt.config.schema import EntropyCoder

NAMES = {"embed": EMBED, "head": HEAD}
_HEADER = struct.Struct("<III")  # bytes of the index, the scales and the tables; the codes are the rest


def embedding_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """ "embed", and "head" unless tied -> (vocab, d), in the order of the stream."""
    return dict.fromkeys(("embed",) if arch.tied else ("embed", "head"), (arch.vocab_size, arch.hidden_size))


def pack_embeddings(
    indices: Sequence[Int[np.ndarray, "vocab d"]],
    rows: Sequence[Int[np.ndarray, " vocab"]],
    cols: Sequence[Int[np.ndarray, " d"]],
    plan: TrellisPlan,
    states: int,
    threads: int,
    entropy_coder: EntropyCoder,
) -> bytes:
    """The stream of the matrices of `embedding_shapes`.

    Args:
        indices: of each matrix, coded column by column.
        rows, cols: integer log steps of each.
        plan: classes and tables of all.
        states: of the trellis.
        threads: 0 for all cores.
        entropy_coder: of the indices.

    Raises:
        UserError: the steps are so fine that an index spreads over more than any table.
    """
    orders: list[Order] = ["columns" for _ in indices]
    packed = pack_trellis(indices, orders, plan, states, threads, entropy_coder)
    index = BitWriter()
    index.gammas(packed.numbers)
    scales = pack_lists(rows) + pack_lists(cols) + pack_spreads(plan.spreads)
    parts = index.bytes(), scales, packed.tables
    return b"".join((_HEADER.pack(*map(len, parts)), *parts, packed.codes))


def unpack_embeddings(
    data: bytes, arch: Architecture, c: float, threads: int
) -> dict[str, Float[np.ndarray, "vocab d"]]:
    """Inverse of `pack_embeddings`: checkpoint name -> float32 weights; raises ValueError for damaged bytes."""
    shapes = embedding_shapes(arch)
    heights, widths = zip(*shapes.values(), strict=True)
    at, parts = _HEADER.size, []
    for length in _HEADER.unpack_from(data):
        parts.append(data[at : at + length])
        at += length
    index, scales, tables = parts
    rows, scales = unpack_lists(scales, heights)
    cols, scales = unpack_lists(scales, widths)
    row_spreads, scales = unpack_lists(scales, heights)
    col_spreads, scales = unpack_lists(scales, widths)
    if scales:
        raise ValueError("the scales of the embeddings do not end with their last spread")
    spreads = [Spreads(*pair) for pair in zip(row_spreads, col_spreads, strict=True)]
    matrices = unpack_trellis(data[at:], tables, spreads, BitReader(index), list(shapes.values()), threads)
    tensors = {}
    for name, matrix, row, col in zip(shapes, matrices, rows, cols, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, as a sentence
            W = dequantize(matrix.values, row, col, trellis_step(c))
        if not np.isfinite(W).all():
            raise ValueError(f"{NAMES[name]} has weights that are not finite")
        tensors[NAMES[name]] = W
    return tensors
