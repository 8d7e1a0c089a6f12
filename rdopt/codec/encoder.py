"""A model and a slope to the bytes of a file: quantize, choose the tables, code, pack.

Every coded matrix rebuilds from six streams: codes (rANS), tables, scales (steps and spreads as small
integers), gains, transforms (stored ones; gauges cost nothing) and the index. Embedding and head are coded in a stream
of their own or kept in 16 bit, as every other tensor is.
"""

import io
import json
import lzma
import struct
import tarfile
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration import Moments
from rdopt.checkpoint import EMBED, HEAD, Architecture, hf_name
from rdopt.codec.allocation import Plan, choose_plan, table_classes, write_tables
from rdopt.codec.bits import BitWriter
from rdopt.codec.classes import Spreads
from rdopt.codec.container import pack
from rdopt.codec.embeddings import code_embeddings
from rdopt.codec.entropy import encode_indices
from rdopt.codec.gains import Gains, pack_gains
from rdopt.codec.lanes import Order
from rdopt.codec.lloyd_model import quantize_lloyd, write_levels
from rdopt.codec.quantize import (
    Grid,
    Key,
    coded_matrices,
    estimated_distortion,
    make_grid,
    matrix_shapes,
    quantize_model,
)
from rdopt.codec.sixteen_bit import sixteen_bit_type
from rdopt.codec.smooth_scales import pack_scales
from rdopt.codec.steps import base_step
from rdopt.codec.stored import Stored, pack_stored
from rdopt.codec.structured import Structured, pack_structured
from rdopt.codec.trellis_file import pack_trellis
from rdopt.codec.trellis_model import Task, quantize_trellis
from rdopt.config import EncodeConfig
from rdopt.config.errors import UserError
from rdopt.operator import Params, params_to_tensors

Ticker = Callable[[int, int], None] | None
SCALAR, TRELLIS, LLOYD = 0, 1, 2  # how the matrices of a file are coded


class Source(NamedTuple):
    """What is encoded: a model in its final coordinates.

    Attributes:
        params: weights, float32.
        arch: architecture.
        config: its config.json.
        files: its tokenizer and generation files by name.
        grid: steps of the coded matrices before the base step.
        weights: number of coded weights.
        parameters: number of parameters of the original model (the denominator of bpw_all).
        moments: second moments in the same coordinates.
        tokens: calibration sequences, where the drift of the activations can be corrected.
        stored: the transforms that the decoder has to undo, if any.
    """

    params: Params
    arch: Architecture
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    grid: Grid
    weights: int
    parameters: int
    moments: Moments
    tokens: Int[np.ndarray, "n length"] | None = None
    stored: Stored | None = None


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


def make_source(
    params: Params,
    arch: Architecture,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    moments: Moments,
    encode: EncodeConfig,
    parameters: int,
    *,
    tokens: Int[np.ndarray, "n length"] | None = None,
    stored: Stored | None = None,
) -> Source:
    """Prepares a model for encoding at any slope.

    With `stored`, params and moments are in its coordinates (see `stored.blockwise_pca`), in which the network
    cannot run: the drift of the activations is then left alone.

    Raises:
        UserError: weights or moments are not finite.
    """
    weights = 0
    for layer, name in coded_matrices(arch.num_layers):
        W = params["blocks"][name][layer]
        weights += W.size
        if not np.isfinite(W).all():
            raise UserError(f"{hf_name(layer, name)} holds NaN or infinity; mend the checkpoint.")
    grid = make_grid(moments, arch.num_layers, encode)
    if encode.drift == "none" or stored is not None:
        tokens = None
    used = None if tokens is None else tokens[: encode.drift_sequences]
    return Source(params, arch, config, files, grid, weights, parameters, moments, used, stored)


def encode_model(
    source: Source, lam: float, encode: EncodeConfig, progress: Ticker = None
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
    source: Source, c: float, encode: EncodeConfig, progress: Ticker = None
) -> Encoded:
    """`encode_model` with the base step given instead of lambda."""
    methods = {"trellis": _code_trellis, "lloyd": _code_lloyd}
    coded = methods.get(encode.grid, _code_scalar)(source, c, encode, progress)
    if encode.embeddings == "coded":
        coded = coded._replace(embeddings=code_embeddings(source.params, source.arch, source.moments, c, encode))
    return assemble(source, c, coded)


def _code_scalar(source: Source, c: float, encode: EncodeConfig, progress: Ticker) -> Coded:
    indices = quantize_model(source.params, source.grid, c, encode, progress)
    matrices = list(indices.values())
    return _code_plan(SCALAR, matrices, choose_plan(matrices), encode.threads)


def _code_lloyd(source: Source, c: float, encode: EncodeConfig, progress: Ticker) -> Coded:
    indices, plan, levels = quantize_lloyd(source.params, source.grid, c, encode, progress)
    coded = _code_plan(LLOYD, list(indices.values()), plan, encode.threads)
    return coded._replace(index=(*coded.index, *write_levels(levels)))


def _code_plan(method: int, matrices: list[Int[np.ndarray, "_ _"]], plan: Plan, workers: int) -> Coded:
    def code(z: Int[np.ndarray, "_ _"], spreads: Spreads) -> bytes:
        return encode_indices(z, table_classes(spreads, plan.width), plan.tables)

    with ThreadPoolExecutor(workers or None) as threads:
        codes = list(threads.map(code, matrices, plan.spreads))
    index = (plan.precision, plan.width, *(len(x) // 4 for x in codes))
    return Coded(method, b"".join(codes), write_tables(plan), plan.spreads, index, plan.bits)


def _code_trellis(source: Source, c: float, encode: EncodeConfig, progress: Ticker) -> Coded:
    signal = estimated_distortion(source.params, None, source.moments)
    task = Task(source.params, source.arch, source.grid, source.tokens, source.moments.sigma, signal)
    model = quantize_trellis(task, c, encode, progress)
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
    )


def assemble(source: Source, c: float, coded: Coded) -> Encoded:
    """Packs coded matrices, steps, gains and everything uncoded into a file."""
    streams = {
        "codes": coded.codes,
        "tables": coded.tables,
        "scales": pack_scales(
            source.grid.rows, source.grid.cols, dict(zip(matrix_shapes(source.arch), coded.spreads, strict=True))
        ),
        "structured": pack_structured(coded.components, matrix_shapes(source.arch)),
        "gains": pack_gains(coded.gains, matrix_shapes(source.arch)),
        "transforms": pack_stored(source.stored),
        "embeddings": coded.embeddings,
        "uncoded": pack_uncoded(source.params, source.arch, {EMBED, HEAD} if coded.embeddings else set()),
        "files": pack_files(source.config, source.files),
    }
    data = pack(streams, write_index(c, source.parameters, coded))
    bits = bits_of(data, streams)
    return Encoded(data, bits, coded_bits(bits) - bits["codes"] + coded.bits, c, coded)


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


def pack_uncoded(params: Params, arch: Architecture, elsewhere: Set[str] = frozenset()) -> bytes:
    """All tensors that are not coded matrices, each a type byte and its 16-bit values, little-endian.

    float16 or bfloat16, whichever is closer to the tensor. Those named in `elsewhere` have a stream of their own.
    """
    coded = {hf_name(*key) for key in coded_matrices(arch.num_layers)} | elsewhere
    out = []
    for name, value in params_to_tensors(params, arch):
        if name not in coded:
            out.append(_sixteen_bit(np.asarray(value, np.float32)))
    return b"".join(out)


def _sixteen_bit(x: Float[np.ndarray, "..."]) -> bytes:
    kind = sixteen_bit_type(x)
    return bytes([kind == np.float16]) + x.astype(kind).view(np.uint16).astype("<u2").tobytes()


def pack_files(config: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """config.json and the tokenizer's files as a compressed archive without dates or owners."""
    members = {"config.json": json.dumps(config, indent=2, sort_keys=True).encode(), **files}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(members):
            entry = tarfile.TarInfo(name)
            entry.size = len(members[name])
            archive.addfile(entry, io.BytesIO(members[name]))
    return lzma.compress(raw.getvalue())
