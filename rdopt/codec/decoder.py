"""A file's bytes back to a model: the same float32 weights on every machine, run and number of threads."""

import lzma
import struct
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.calibration import INPUT_OF
from rdopt.checkpoint import Architecture, architecture_from_config, expected_tensors, hf_name
from rdopt.codec.allocation import read_tables, table_classes
from rdopt.codec.bits import BitReader
from rdopt.codec.classes import Spreads
from rdopt.codec.container import unpack
from rdopt.codec.embeddings import decode_embeddings
from rdopt.codec.encoder import LLOYD, SCALAR, TRELLIS, bits_of
from rdopt.codec.entropy import decode_indices
from rdopt.codec.gains import Gains, unpack_gains
from rdopt.codec.lloyd_model import lloyd_step, lloyd_values, read_levels
from rdopt.codec.quantize import Key, group_widths, matrix_shapes
from rdopt.codec.smooth_scales import unpack_scales
from rdopt.codec.stored import Stored, unpack_stored
from rdopt.codec.structured import rebuild, unpack_structured
from rdopt.codec.trellis_file import Matrix, unpack_trellis
from rdopt.codec.trellis_model import trellis_step
from rdopt.codec.uncoded import unpack_files, unpack_uncoded
from rdopt.config.errors import UserError

_DAMAGE = (ValueError, KeyError, IndexError, OverflowError, struct.error, lzma.LZMAError, tarfile.TarError)
Shapes = dict[Key, tuple[int, int]]


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
        code_bits: (layer, matrix) -> bits of its codes (its share, where matrices share a string of words).
        indices: (layer, matrix) -> the integer indices, in the coordinates of the stored transforms if any.
        plain: (layer, matrix) -> float32 weights before gains and stored transforms.
        gains: the gains of the file, if any.
        stored: its stored transforms, if any.
    """

    tensors: dict[str, Float[np.ndarray, "..."]]
    arch: Architecture
    config: dict[str, Any]
    files: dict[str, bytes]
    bits: dict[str, int]
    c: float
    parameters: int
    code_bits: dict[Key, float]
    indices: dict[Key, Int[np.ndarray, "out in"]]
    plain: dict[Key, Float[np.ndarray, "out in"]]
    gains: Gains | None
    stored: Stored | None


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
        return _decode(data, streams, index, threads)
    except _DAMAGE as error:
        raise UserError(f"{name} does not decode ({error}); encode the model again.") from error


def _decode(data: bytes, streams: dict[str, bytes], index: bytes, threads: int) -> Decoded:
    config, files = unpack_files(streams["files"])
    arch = architecture_from_config(config)
    shapes = matrix_shapes(arch)
    keys = list(shapes)
    (c,) = struct.unpack_from("<f", index)
    source = BitReader(index[4:])
    method, parameters = source.gammas(2)
    if method not in (SCALAR, TRELLIS, LLOYD):
        raise ValueError(f"coding method {method}")
    rows, cols, found = unpack_scales(streams["scales"], shapes, group_widths(arch))
    spreads = [found[key] for key in keys]
    components = unpack_structured(streams["structured"], shapes)
    read = {SCALAR: _read_scalar, TRELLIS: _read_trellis, LLOYD: _read_lloyd}[method]
    matrices = read(streams, spreads, source, shapes, threads)
    step = {SCALAR: c, TRELLIS: trellis_step(c), LLOYD: lloyd_step(c)}[method]
    gains = unpack_gains(streams["gains"], shapes)
    stored = unpack_stored(streams["transforms"], arch)

    def weight(i: int) -> tuple[np.ndarray, np.ndarray]:
        layer, name = key = keys[i]
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, as a sentence
            plain = rebuild(matrices[i].values, components.get(key), rows[key], cols[layer, INPUT_OF[name]], step)
            W = plain if gains is None else gains.apply(key, plain)
        if not np.isfinite(W).all():
            raise ValueError(f"{hf_name(*key)} has weights that are not finite")
        return plain, W if stored is None else stored.undo(layer, name, W)

    with ThreadPoolExecutor(threads or None) as pool:
        pairs = list(pool.map(weight, range(len(keys))))
    weights = {hf_name(*key): W for key, (_, W) in zip(keys, pairs, strict=True)}
    if streams["embeddings"]:
        weights |= decode_embeddings(streams["embeddings"], arch, c, threads)
    weights |= dict(unpack_uncoded(streams["uncoded"], arch, weights))
    return Decoded(
        tensors={k: weights[k] for k in expected_tensors(arch)},
        arch=arch,
        config=config,
        files=files,
        bits=bits_of(data, streams),
        c=c,
        parameters=parameters,
        code_bits={key: x.bits for key, x in zip(keys, matrices, strict=True)},
        indices={key: x.indices for key, x in zip(keys, matrices, strict=True)},
        plain={key: plain for key, (plain, _) in zip(keys, pairs, strict=True)},
        gains=gains,
        stored=stored,
    )


def _read_scalar(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: Shapes, threads: int
) -> list[Matrix]:
    """Matrices on a uniform grid: an index is its value."""
    return _read_plan(streams, spreads, index, shapes, threads)[0]


def _read_lloyd(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: Shapes, threads: int
) -> list[Matrix]:
    """Matrices whose levels are described behind their lengths."""
    matrices, precision = _read_plan(streams, spreads, index, shapes, threads)
    levels = read_levels(index)
    values = [lloyd_values(x.indices, s, precision, levels) for x, s in zip(matrices, spreads, strict=True)]
    return [x._replace(values=v) for x, v in zip(matrices, values, strict=True)]


def _read_plan(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: Shapes, threads: int
) -> tuple[list[Matrix], int]:
    """(the matrices with their indices as values, precision of the spreads)."""
    precision, width = index.gammas(2)
    if width < 1:
        raise ValueError("a class of no width")
    lengths = [4 * n for n in index.gammas(len(shapes))]
    tables = read_tables(streams["tables"], precision, width)
    ends = np.cumsum(lengths)

    def one(i: int) -> Matrix:
        classes = table_classes(spreads[i], width)
        z = decode_indices(streams["codes"][ends[i] - lengths[i] : ends[i]], classes, tables)
        return Matrix(z, z, 8.0 * lengths[i])

    with ThreadPoolExecutor(threads or None) as pool:
        return list(pool.map(one, range(len(shapes)))), precision


def _read_trellis(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: Shapes, threads: int
) -> list[Matrix]:
    return unpack_trellis(streams["codes"], streams["tables"], spreads, index, list(shapes.values()), threads)
