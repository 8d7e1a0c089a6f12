"""A model and a slope to the bytes of a file: quantize, choose the tables, code, pack.

Every coded matrix rebuilds from five streams: codes (rANS), tables, scales (steps and spreads as small
integers), transforms (stored ones; gauges cost nothing) and the index. Tensors that are not coded are kept in
16 bit.
"""

import io
import json
import lzma
import struct
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

from rdopt.calibration import Moments
from rdopt.checkpoint import Architecture, hf_name
from rdopt.codec.allocation import Plan, choose_plan, pack_spreads, table_classes, write_tables
from rdopt.codec.bits import BitWriter
from rdopt.codec.container import pack
from rdopt.codec.entropy import encode_indices, pack_lists
from rdopt.codec.quantize import Grid, coded_matrices, make_grid, quantize_model
from rdopt.codec.steps import base_step
from rdopt.codec.stored import Stored, pack_stored
from rdopt.config import EncodeConfig
from rdopt.config.errors import UserError
from rdopt.operator import Params, params_to_tensors


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
        stored: the transforms that the decoder has to undo, if any.
    """

    params: Params
    arch: Architecture
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    grid: Grid
    weights: int
    parameters: int
    stored: Stored | None = None


class Encoded(NamedTuple):
    """A file's bytes and what they are made of.

    Attributes:
        data: the container.
        bits: code length of each part in bits: codes, tables, scales, transforms, headers, uncoded.
        bits_estimated: ideal code length plus all side bytes of the coded matrices.
        c: base step.
    """

    data: bytes
    bits: dict[str, int]
    bits_estimated: float
    c: float

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
    """Bits of everything but the uncoded tensors and the carried files."""
    return sum(bits.values()) - bits["uncoded"]


def make_source(
    params: Params,
    arch: Architecture,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    moments: Moments,
    encode: EncodeConfig,
    parameters: int,
    stored: Stored | None = None,
) -> Source:
    """Prepares a model for encoding at any slope.

    With `stored`, params and moments are in its coordinates (see `stored.blockwise_pca`).

    Raises:
        UserError: weights or moments are not finite.
    """
    weights = 0
    for layer, name in coded_matrices(arch.num_layers):
        W = params["blocks"][name][layer]
        weights += W.size
        if not np.isfinite(W).all():
            raise UserError(f"{hf_name(layer, name)} holds NaN or infinity; mend the checkpoint.")
    grid = make_grid(moments, arch.num_layers, encode.damping, encode.grid)
    return Source(params, arch, config, files, grid, weights, parameters, stored)


def encode_model(
    source: Source, lam: float, encode: EncodeConfig, progress: Callable[[int, int], None] | None = None
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
    source: Source, c: float, encode: EncodeConfig, progress: Callable[[int, int], None] | None = None
) -> Encoded:
    """`encode_model` with the base step given instead of lambda."""
    indices = quantize_model(source.params, source.grid, c, encode, progress)
    keys = list(indices)
    plan = choose_plan([indices[k] for k in keys])

    def code(i: int) -> bytes:
        return encode_indices(indices[keys[i]], table_classes(plan.spreads[i], plan.width), plan.tables)

    with ThreadPoolExecutor(encode.threads or None) as threads:
        codes = list(threads.map(code, range(len(keys))))
    streams = {
        "codes": b"".join(codes),
        "tables": write_tables(plan),
        "scales": pack_lists([source.grid.rows[k] for k in keys])
        + pack_lists(list(source.grid.cols.values()))
        + pack_spreads(plan.spreads),
        "transforms": pack_stored(source.stored),
        "uncoded": pack_uncoded(source.params, source.arch),
        "files": pack_files(source.config, source.files),
    }
    data = pack(streams, write_index(c, source.parameters, plan, codes))
    return Encoded(data, bits_of(data, streams), _estimate(data, streams, plan), c)


def bits_of(data: bytes, streams: Mapping[str, bytes]) -> dict[str, int]:
    """Where the file's bits went; headers are what is left after the streams."""
    size = {k: 8 * len(v) for k, v in streams.items()}
    out = {k: size[k] for k in ("codes", "tables", "scales", "transforms")}
    return {**out, "headers": 8 * len(data) - sum(size.values()), "uncoded": size["uncoded"] + size["files"]}


def _estimate(data: bytes, streams: Mapping[str, bytes], plan: Plan) -> float:
    bits = bits_of(data, streams)
    return coded_bits(bits) - bits["codes"] + plan.bits


def write_index(c: float, parameters: int, plan: Plan, codes: list[bytes]) -> bytes:
    """Base step (float32); as gamma codes: precision, class width, parameters, words of every code stream."""
    out = BitWriter()
    out.gammas((plan.precision, plan.width, parameters, *(len(x) // 4 for x in codes)))
    return struct.pack("<f", c) + out.bytes()


def pack_uncoded(params: Params, arch: Architecture) -> bytes:
    """All tensors that are not coded matrices, each a type byte and its 16-bit values, little-endian.

    float16 or bfloat16, whichever is closer to the tensor.
    """
    coded = {hf_name(*key) for key in coded_matrices(arch.num_layers)}
    out = []
    for name, value in params_to_tensors(params, arch):
        if name not in coded:
            out.append(_sixteen_bit(np.asarray(value, np.float32)))
    return b"".join(out)


def _sixteen_bit(x: Float[np.ndarray, "..."]) -> bytes:
    brain = x.astype(ml_dtypes.bfloat16)
    if np.abs(x).max(initial=0) < 6e4:
        half = x.astype(np.float16)
        errors = [np.sum((y.astype(np.float32) - x) ** 2, dtype=np.float64) for y in (half, brain)]
        if errors[0] <= errors[1]:
            return b"\x01" + half.astype("<f2").tobytes()
    return b"\x00" + brain.view(np.uint16).astype("<u2").tobytes()


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
