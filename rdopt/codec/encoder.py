"""A model and a slope to the bytes of a file: quantize, choose the tables, code, pack.

Every coded matrix rebuilds from six streams: codes (rANS), tables, scales (steps and spreads as small
integers), gains, transforms (stored ones; gauges cost nothing) and the index. Embedding and head are coded in a stream
of their own or kept in 16 bit, as every other tensor is.
"""

import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rdopt.checkpoint.families import EMBED, HEAD, hf_name
from rdopt.codec.coders.bits import BitWriter
from rdopt.codec.coders.constriction import encode_indices
from rdopt.codec.coders.lanes import Order
from rdopt.codec.streams.container import pack
from rdopt.codec.streams.embeddings import code_embeddings
from rdopt.codec.streams.gains import Gains, pack_gains
from rdopt.codec.streams.smooth_scales import pack_scales, plain_size
from rdopt.codec.streams.stored import pack_stored
from rdopt.codec.streams.structured import Gain, Structured, pack_structured
from rdopt.codec.streams.trellis_file import pack_trellis
from rdopt.codec.streams.uncoded import pack_uncoded
from rdopt.codec.tables.allocation import Fit, Plan, choose_plan, table_classes, write_tables
from rdopt.codec.tables.classes import Spreads
from rdopt.config.progress import Tick
from rdopt.config.schema import EncodeConfig
from rdopt.encode.lloyd_model import quantize_lloyd, write_levels
from rdopt.encode.quantize import Key, index_spreads, matrix_shapes, quantize_model
from rdopt.encode.source import Source
from rdopt.encode.trellis_model import quantize_trellis
from rdopt.rate.steps import base_step

SCALAR, TRELLIS, LLOYD = 0, 1, 2  # how the matrices of a file are coded


class Coded(NamedTuple):
    """The coded matrices: streams, what the index says of them, and their ideal code length in bits.

    `embeddings` is the stream of embedding and head, empty where they are kept in 16 bit.
    """

    method: int
    codes: bytes
    tables: bytes
    spreads: list[Spreads]
    index: tuple[int, ...]
    bits: float
    gains: Gains | None = None
    components: Mapping[Key, Structured] = {}
    component_gains: Mapping[Key, Gain] = {}
    embeddings: bytes = b""


class Encoded(NamedTuple):
    """A file's bytes and what they are made of.

    Attributes:
        data: the container.
        bits: code length of each part in bits: codes, tables, scales, structured, gains, transforms, headers,
            embeddings (where coded), uncoded.
        bits_estimated: ideal code length plus all side bytes of the coded matrices.
        c: base step.
        coded: what the file was packed from.
    """

    data: bytes
    bits: dict[str, int]
    bits_estimated: float
    c: float
    coded: Coded

    def bpw(self, source: Source) -> float:
        """Bits/weight of what rebuilds the coded matrices."""
        return coded_bits(self.bits) / source.weights

    def bpw_estimated(self, source: Source) -> float:
        """The same with the ideal code length in place of the coder's."""
        return self.bits_estimated / source.weights

    def bpw_all(self, source: Source) -> float:
        """Bits of the whole file per parameter of the original model."""
        return 8 * len(self.data) / source.parameters


def coded_bits(bits: Mapping[str, int]) -> int:
    """Bits of everything but embedding and head, the uncoded tensors and the carried files."""
    return sum(bits.values()) - bits["embeddings"] - bits["uncoded"]


def encode_model(
    source: Source, lam: float, encode: EncodeConfig, progress: Tick | None = None
) -> Encoded:
    """The file of a model at one slope.

    Args:
        source: of `make_source`.
        lam: bits/weight per nat/token; fixes every step.
        encode: grid, dead zone, threads.
        progress: called with (matrices done, of how many).

    Returns:
        the container's bytes and their parts. The same input gives the same bytes.
    """
    c = base_step(lam, source.weights)
    return encode_at_step(source, c, encode, progress)


def encode_at_step(
    source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None
) -> Encoded:
    """`encode_model` with the base step given instead of lambda."""
    coded = code_matrices(source, c, encode, progress)
    if encode.embeddings == "coded":
        coded = coded._replace(embeddings=code_embeddings(source.params, source.arch, source.moments, c, encode))
    return assemble(source, c, coded)


def code_matrices(source: Source, c: float, encode: EncodeConfig, progress: Tick | None = None) -> Coded:
    """All matrices quantized and coded at the base step c, embedding and head left aside."""
    methods = {"trellis": _code_trellis, "lloyd": _code_lloyd}
    return methods.get(encode.grid, _code_scalar)(source, c, encode, progress)


def _code_scalar(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    params = source.coded_params()
    indices, gains = quantize_model(params, source.grid, c, encode, progress)
    matrices = list(indices.values())

    def spreads(key: Key) -> Fit:
        return index_spreads(params, source.grid, key, indices[key], gains, c, encode.grid)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        fits = list(threads.map(spreads, indices))
    return _code_plan(SCALAR, matrices, choose_plan(matrices, fits), encode.threads)._replace(gains=gains)


def _code_lloyd(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    indices, plan, levels = quantize_lloyd(source.coded_params(), source.grid, c, encode, progress)
    coded = _code_plan(LLOYD, list(indices.values()), plan, encode.threads)
    return coded._replace(index=(*coded.index, *write_levels(levels)))


def _code_plan(method: int, matrices: list[Int[np.ndarray, "_ _"]], plan: Plan, workers: int) -> Coded:
    def code(z: Int[np.ndarray, "_ _"], spreads: Spreads) -> bytes:
        return encode_indices(z, table_classes(spreads, plan.width), plan.tables)

    with ThreadPoolExecutor(workers or None) as threads:
        codes = list(threads.map(code, matrices, plan.spreads))
    index = (plan.precision, plan.width, *(len(x) // 4 for x in codes))
    return Coded(method, b"".join(codes), write_tables(plan), plan.spreads, index, plan.bits)


def _code_trellis(source: Source, c: float, encode: EncodeConfig, progress: Tick | None) -> Coded:
    model = quantize_trellis(source, c, encode, progress)
    orders: list[Order] = ["diagonals" if key in source.grid.outputs else "columns" for key in model.paths]
    packed = pack_trellis(list(model.paths.values()), orders, model.plan, encode.states, encode.threads, encode.coder)
    return Coded(
        method=TRELLIS,
        codes=packed.codes,
        tables=packed.tables,
        spreads=model.plan.spreads,
        index=packed.index,
        bits=packed.bits,
        gains=model.gains,
        components=model.components,
        component_gains=model.component_gains,
    )


def assemble(source: Source, c: float, coded: Coded) -> Encoded:
    """Packs coded matrices, steps, gains and everything uncoded into a file."""
    elsewhere = {hf_name(*key) for key in matrix_shapes(source.arch)} | ({EMBED, HEAD} if coded.embeddings else set())
    streams = {
        **coded_streams(source, coded),
        "embeddings": coded.embeddings,
        "uncoded": pack_uncoded(source.params, source.arch, elsewhere),
        "files": source.files,
    }
    data = pack(streams, write_index(c, source.parameters, coded))
    bits = bits_of(data, streams)
    return Encoded(data, bits, coded_bits(bits) - bits["codes"] + coded.bits, c, coded)


def coded_streams(source: Source, coded: Coded) -> dict[str, bytes]:
    """The streams that rebuild the coded matrices."""
    shapes = matrix_shapes(source.arch)
    spreads = dict(zip(shapes, coded.spreads, strict=True))
    return {
        "codes": coded.codes,
        "tables": coded.tables,
        "scales": pack_scales(source.grid.rows, source.grid.cols, spreads),
        "structured": pack_structured(coded.components, shapes),
        "gains": pack_gains(coded.gains, shapes),
        "transforms": pack_stored(source.stored, source.arch),
    }


def structure_saved(source: Source, encoded: Encoded) -> tuple[float, dict[str, tuple[int, float]]]:
    """What describing scales and weights as functions of layer and channel saves, in bits/weight.

    Returns:
        (smooth scales against every kind of list coded by itself, name of each matrix with a low-rank component ->
        its rank and what the component is expected to save).
    """
    coded = encoded.coded
    spreads = dict(zip(matrix_shapes(source.arch), coded.spreads, strict=True))
    scales = 8 * plain_size(source.grid.rows, source.grid.cols, spreads) - encoded.bits["scales"]
    parts = {
        hf_name(*key): (coded.components[key].rank, gain.saved / source.weights)
        for key, gain in coded.component_gains.items()
    }
    return scales / source.weights, parts


def bits_of(data: bytes, streams: Mapping[str, bytes]) -> dict[str, int]:
    """Where the file's bits went; headers are what is left after the streams."""
    size = {k: 8 * len(v) for k, v in streams.items()}
    out = {k: size[k] for k in ("codes", "tables", "scales", "structured", "gains", "transforms")}
    out["headers"] = 8 * len(data) - sum(size.values())
    return {**out, "embeddings": size["embeddings"], "uncoded": size["uncoded"] + size["files"]}


def write_index(c: float, parameters: int, coded: Coded) -> bytes:
    """Base step (float32); as gamma codes: method, parameters, and what the method says of its streams."""
    out = BitWriter()
    out.gammas((coded.method, parameters, *coded.index))
    return struct.pack("<f", c) + out.bytes()
