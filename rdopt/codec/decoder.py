"""A file's bytes back to a model: the same float32 weights on every machine, run and number of threads."""

import io
import json
import lzma
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration import INPUT_OF
from rdopt.checkpoint import Architecture, architecture_from_config, block_shapes, expected_tensors, hf_name
from rdopt.codec.allocation import read_tables, table_classes
from rdopt.codec.bits import BitReader
from rdopt.codec.classes import Spreads
from rdopt.codec.container import unpack
from rdopt.codec.encoder import bits_of
from rdopt.codec.entropy import decode_indices, unpack_lists
from rdopt.codec.quantize import GROUPS, coded_matrices, dequantize
from rdopt.codec.stored import unpack_stored
from rdopt.config.errors import UserError


class Decoded(NamedTuple):
    """A decoded file.

    Attributes:
        tensors: checkpoint name -> float32 array, in the order of `expected_tensors`.
        arch: architecture.
        config: config.json.
        files: the carried files by name.
        bits: where the file's bits went.
        c: base step.
        parameters: of the original model.
        code_bits: (layer, matrix) -> bits of its code stream.
        indices: (layer, matrix) -> the integer indices, in the coordinates of the stored transforms if any.
    """

    tensors: dict[str, Float[np.ndarray, "..."]]
    arch: Architecture
    config: dict[str, Any]
    files: dict[str, bytes]
    bits: dict[str, int]
    c: float
    parameters: int
    code_bits: dict[tuple[int, str], int]
    indices: dict[tuple[int, str], Int[np.ndarray, "out in"]]


def decode_model(data: bytes, name: str = "the file", threads: int = 0) -> Decoded:
    """Decodes a container.

    Args:
        data: its bytes.
        name: how errors call it.
        threads: decoding threads, 0 for all cores; the result does not depend on it.

    Raises:
        UserError: damaged, altered, or of another version.
    """
    streams, index = unpack(data, name)
    try:
        files = _unpack_files(streams["files"])
        config = json.loads(files.pop("config.json"))
        arch = architecture_from_config(config)
        keys = list(coded_matrices(arch.num_layers))
        c, precision, width, parameters, lengths = _read_index(index, len(keys))
        rows, cols, spreads = _read_scales(streams["scales"], arch)
        tables = read_tables(streams["tables"], precision, width)
        stored = unpack_stored(streams["transforms"], arch)
        ends = np.cumsum(lengths)

        def one(i: int) -> Int[np.ndarray, "out in"]:
            classes = table_classes(spreads[i], width)
            return decode_indices(streams["codes"][ends[i] - lengths[i] : ends[i]], classes, tables)

        def weight(key: tuple[int, str]) -> Float[np.ndarray, "out in"]:
            with np.errstate(over="ignore", invalid="ignore"):  # refused below, as a sentence
                W = dequantize(indices[key], rows[key], cols[key[0], INPUT_OF[key[1]]], c)
            if not np.isfinite(W).all():
                raise ValueError(f"{hf_name(*key)} has weights that are not finite")
            return W if stored is None else stored.undo(*key, W)

        with ThreadPoolExecutor(threads or None) as pool:
            indices = dict(zip(keys, pool.map(one, range(len(keys))), strict=True))
            weights = {hf_name(*key): W for key, W in zip(keys, pool.map(weight, keys), strict=True)}
        uncoded = dict(_unpack_uncoded(streams["uncoded"], arch))
    except (ValueError, KeyError, struct.error, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"{name} does not decode ({error}); encode the model again.") from error
    tensors = {k: weights[k] if k in weights else uncoded[k] for k in expected_tensors(arch)}
    code_bits = {key: 8 * length for key, length in zip(keys, lengths, strict=True)}
    bits = bits_of(data, streams)
    return Decoded(tensors, arch, config, files, bits, c, parameters, code_bits, indices)


def _read_index(index: bytes, matrices: int) -> tuple[float, int, int, int, list[int]]:
    """(base step, spread precision, class width, parameters of the original, bytes of every code stream)."""
    (c,) = struct.unpack_from("<f", index)
    source = BitReader(index[4:])
    precision, width, parameters = source.gammas(3)
    if width < 1:
        raise ValueError("a class of no width")
    return c, precision, width, parameters, [4 * n for n in source.gammas(matrices)]


def _read_scales(data: bytes, arch: Architecture) -> tuple[dict, dict, list[Spreads]]:
    """Row steps per matrix, column steps per input group, spreads per matrix in the order of the file."""
    keys = list(coded_matrices(arch.num_layers))
    shapes = block_shapes(arch)
    width_of = {INPUT_OF[name]: shapes[name][1] for _, name in keys}
    groups = [(i, group) for i in range(arch.num_layers) for group in GROUPS]
    heights, widths = [shapes[k][0] for _, k in keys], [shapes[k][1] for _, k in keys]
    rows, data = unpack_lists(data, heights)
    cols, data = unpack_lists(data, [width_of[group] for _, group in groups])
    row_spreads, data = unpack_lists(data, heights)
    col_spreads, data = unpack_lists(data, widths)
    spreads = [Spreads(*pair) for pair in zip(row_spreads, col_spreads, strict=True)]
    return dict(zip(keys, rows, strict=True)), dict(zip(groups, cols, strict=True)), spreads


def _unpack_uncoded(data: bytes, arch: Architecture) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    coded = {hf_name(*key) for key in coded_matrices(arch.num_layers)}
    at = 0
    for name, shape in expected_tensors(arch).items():
        if name in coded:
            continue
        size = int(np.prod(shape))
        values = np.frombuffer(data, "<u2", size, at + 1)
        kind = np.float16 if data[at] == 1 else ml_dtypes.bfloat16
        yield name, values.astype(np.uint16).view(kind).astype(np.float32).reshape(shape)
        at += 1 + 2 * size
    if at != len(data):
        raise ValueError("the uncoded tensors do not end with their last value")


def _unpack_files(data: bytes) -> dict[str, bytes]:
    files = {}
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as archive:
        for entry in archive:
            stream = archive.extractfile(entry)
            # Names come from a file that anyone may have made: nothing outside the output folder.
            if stream is None or entry.name != entry.name.replace("\\", "/").rsplit("/", 1)[-1]:
                raise ValueError(f"the carried file {entry.name!r} is not a plain file name")
            files[entry.name] = stream.read()
    return files
