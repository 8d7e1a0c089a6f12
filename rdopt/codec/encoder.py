"""Coded matrices and everything beside them to the bytes of a file.

Every coded matrix rebuilds from six streams: codes (rANS), tables, scales (steps and spreads as small
integers), gains, transforms (stored ones; gauges cost nothing) and the index. Embedding and head are coded in a stream
of their own or kept in 16 bit, as every other tensor is. What quantizes a model stands in `rdopt.encode`.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import EMBED, HEAD, Architecture, Key, matrix_shapes
from rdopt.codec.coders.constriction import encode_indices
from rdopt.codec.grids.lloyd import LloydLevels, write_levels
from rdopt.codec.streams.container import pack
from rdopt.codec.streams.gains import Gains, pack_gains
from rdopt.codec.streams.index import LLOYD, SCALAR, MatrixCodes, bits_of, coded_bits, write_index
from rdopt.codec.streams.scales import pack_scales, plain_size
from rdopt.codec.streams.stored import pack_stored
from rdopt.codec.streams.structured import Structured, pack_structured
from rdopt.codec.streams.uncoded import pack_uncoded
from rdopt.codec.tables.classes import Spreads
from rdopt.codec.tables.uniform import UniformPlan, table_classes, write_tables
from rdopt.transforms.stored.rotations import StoredRotations


class Coded(NamedTuple):
    """Everything that rebuilds the coded matrices.

    Attributes:
        c: base step.
        indices: of all matrices, coded.
        rows: (layer, matrix) -> integer log steps of the rows.
        cols: (layer, group) -> integer log steps of the columns.
        gains: of the matrices, if any.
        components: (layer, matrix) -> low-rank component, where one pays.
        saved: (layer, matrix) -> bits that its component is expected to save.
        stored: the transforms that the decoder has to undo, if any.
        embeddings: the stream of embedding and head, empty where they are kept in 16 bit.
    """

    c: float
    indices: MatrixCodes
    rows: Mapping[Key, Int[np.ndarray, " out"]]
    cols: Mapping[Key, Int[np.ndarray, " in"]]
    gains: Gains | None = None
    components: Mapping[Key, Structured] = {}
    saved: Mapping[Key, float] = {}
    stored: StoredRotations | None = None
    embeddings: bytes = b""


class Encoded(NamedTuple):
    """A file's bytes and what they are made of.

    Attributes:
        data: the container.
        bits: code length of each part in bits: codes, tables, scales, structured, gains, transforms, headers,
            embeddings (where coded), uncoded.
        weights: number of coded weights.
        parameters: number of parameters of the original model.
        coded: what the file was packed from.
    """

    data: bytes
    bits: dict[str, int]
    weights: int
    parameters: int
    coded: Coded

    @property
    def c(self) -> float:
        """Base step."""
        return self.coded.c

    @property
    def bpw(self) -> float:
        """Bits/weight of what rebuilds the coded matrices."""
        return coded_bits(self.bits) / self.weights

    @property
    def bpw_estimated(self) -> float:
        """The same with the ideal code length in place of the coder's."""
        return (coded_bits(self.bits) - self.bits["codes"] + self.coded.indices.bits) / self.weights

    @property
    def bpw_all(self) -> float:
        """Bits of the whole file per parameter of the original model."""
        return 8 * len(self.data) / self.parameters


def code_scalar(matrices: Sequence[Int[np.ndarray, "_ _"]], plan: UniformPlan, threads: int) -> MatrixCodes:
    """Entropy-codes indices on a uniform grid, each matrix a string of its own."""

    def code(z: Int[np.ndarray, "_ _"], spreads: Spreads) -> bytes:
        return encode_indices(z, table_classes(spreads, plan.width), plan.tables)

    with ThreadPoolExecutor(threads or None) as pool:
        codes = list(pool.map(code, matrices, plan.spreads))
    numbers = (plan.precision, plan.width, *(len(x) // 4 for x in codes))
    return MatrixCodes(SCALAR, b"".join(codes), write_tables(plan), plan.spreads, numbers, plan.bits)


def code_lloyd(
    matrices: Sequence[Int[np.ndarray, "_ _"]], plan: UniformPlan, levels: LloydLevels, threads: int
) -> MatrixCodes:
    """Entropy-codes indices on Lloyd-Max grids, whose levels follow the lengths of the strings."""
    coded = code_scalar(matrices, plan, threads)
    return coded._replace(method=LLOYD, numbers=(*coded.numbers, *write_levels(levels)))


def assemble(
    coded: Coded,
    tensors: Iterable[tuple[str, Float[np.ndarray, "..."]]],
    arch: Architecture,
    files: bytes,
    parameters: int,
) -> Encoded:
    """Packs coded matrices, steps, gains and everything uncoded into a file.

    Args:
        coded: the matrices.
        tensors: the model by checkpoint name; what is not coded goes into the file in 16 bit.
        arch: its architecture.
        files: config.json and the tokenizer's files, packed.
        parameters: number of parameters of the original model.
    """
    shapes = matrix_shapes(arch)
    elsewhere = {arch.tensor_name(*key) for key in shapes}
    if coded.embeddings:
        elsewhere |= {EMBED, HEAD}
    streams = {
        **coded_streams(coded, arch),
        "embeddings": coded.embeddings,
        "uncoded": pack_uncoded(tensors, elsewhere),
        "files": files,
    }
    data = pack(streams, coded_index(coded, parameters))
    weights = sum(out * n for out, n in shapes.values())
    return Encoded(data, bits_of(data, streams), weights, parameters, coded)


def coded_streams(coded: Coded, arch: Architecture) -> dict[str, bytes]:
    """The streams that rebuild the coded matrices."""
    shapes = matrix_shapes(arch)
    return {
        "codes": coded.indices.codes,
        "tables": coded.indices.tables,
        "scales": pack_scales(coded.rows, coded.cols, _spreads(coded, arch)),
        "structured": pack_structured(coded.components, shapes),
        "gains": pack_gains(coded.gains, shapes),
        "transforms": pack_stored(coded.stored, arch),
    }


def coded_index(coded: Coded, parameters: int) -> bytes:
    """What the index says of the coded matrices."""
    return write_index(coded.c, coded.indices.method, parameters, coded.indices.numbers)


def structure_saved(encoded: Encoded, arch: Architecture) -> tuple[float, dict[str, tuple[int, float]]]:
    """What describing scales and weights as functions of layer and channel saves, in bits/weight.

    Returns:
        (smooth scales against every kind of list coded by itself, name of each matrix with a low-rank component ->
        its rank and what the component is expected to save).
    """
    coded = encoded.coded
    scales = 8 * plain_size(coded.rows, coded.cols, _spreads(coded, arch)) - encoded.bits["scales"]
    ranks = {key: component.rank for key, component in coded.components.items()}
    parts = {arch.tensor_name(*key): (ranks[key], x / encoded.weights) for key, x in coded.saved.items()}
    return scales / encoded.weights, parts


def _spreads(coded: Coded, arch: Architecture) -> dict[Key, Spreads]:
    return dict(zip(matrix_shapes(arch), coded.indices.spreads, strict=True))
