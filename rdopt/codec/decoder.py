"""A file's bytes back to a model: the same float32 weights on every machine, run and number of threads."""

import lzma
import struct
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import (
    INPUT_OF,
    Architecture,
    Key,
    MatrixShapes,
    architecture_from_config,
    expected_tensors,
    group_widths,
    matrix_shapes,
)
from rdopt.checkpoint.write import write_checkpoint
from rdopt.codec.coders.bits import BitReader
from rdopt.codec.coders.constriction import decode_indices
from rdopt.codec.grids.lloyd import lloyd_step, lloyd_values, read_levels
from rdopt.codec.grids.trellis import trellis_step
from rdopt.codec.streams.container import unpack
from rdopt.codec.streams.embeddings import unpack_embeddings
from rdopt.codec.streams.fixed_point import undo_stored
from rdopt.codec.streams.gains import Gains, unpack_gains
from rdopt.codec.streams.index import LLOYD, SCALAR, TRELLIS, bits_of, read_index
from rdopt.codec.streams.paths import DecodedMatrix, unpack_trellis
from rdopt.codec.streams.scales import unpack_scales
from rdopt.codec.streams.stored import unpack_stored
from rdopt.codec.streams.structured import dequantize_structured, unpack_structured
from rdopt.codec.streams.uncoded import unpack_files, unpack_uncoded
from rdopt.codec.tables.classes import Spreads
from rdopt.codec.tables.uniform import read_tables, table_classes
from rdopt.config.errors import UserError
from rdopt.transforms.stored.rotations import StoredRotations

_DAMAGE = (ValueError, KeyError, IndexError, OverflowError, struct.error, lzma.LZMAError, tarfile.TarError)


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
    stored: StoredRotations | None


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


def decode_file(path: Path, threads: int = 0) -> Decoded:
    """Decodes a file into memory."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one written by rdopt encode.")
    return decode_model(path.read_bytes(), str(path), threads)


def decode(
    path: Path,
    out: Path,
    *,
    dtype: str = "float32",
    threads: int = 0,
    card: Callable[[Decoded], str] | None = None,
) -> Decoded:
    """Decodes a file into a plain Hugging Face folder.

    Args:
        path: the file.
        out: a new folder.
        dtype: of the written weights; float32 keeps them exactly.
        threads: 0 for all cores; the bytes do not depend on it.
        card: makes the folder's README.md.

    Raises:
        UserError: a damaged file or an existing output.
    """
    decoded = decode_file(path, threads)
    files = decoded.files if card is None else {**decoded.files, "README.md": card(decoded).encode()}
    write_checkpoint(out, decoded.config, decoded.tensors.items(), dtype=dtype, files=files)
    return decoded


class Matrices(NamedTuple):
    """Decoded matrices, by (layer, matrix).

    Attributes:
        c: base step.
        parameters: of the original model.
        coded: indices, values and bits.
        gains: of the file, if any.
        plain: float32 weights before gains.
        weights: float32 weights, in the coordinates of the stored transforms if any.
    """

    c: float
    parameters: int
    coded: dict[Key, DecodedMatrix]
    gains: Gains | None
    plain: dict[Key, Float[np.ndarray, "out in"]]
    weights: dict[Key, Float[np.ndarray, "out in"]]


def decode_matrices(
    streams: Mapping[str, bytes], index: bytes, shapes: MatrixShapes, widths: Mapping[Key, int], threads: int = 0
) -> Matrices:
    """The coded matrices from their streams.

    Args:
        streams: of the file.
        index: its index behind the hashes.
        shapes: of every matrix, in the order of the file.
        widths: of every input group.
        threads: decoding threads, 0 for all cores.

    Raises:
        ValueError: damaged streams.
    """
    c, method, parameters, source = read_index(index)
    rows, cols, spreads = unpack_scales(streams["scales"], shapes, widths)
    components = unpack_structured(streams["structured"], shapes)
    read, step_of = METHODS[method]
    matrices = read(streams, [spreads[key] for key in shapes], source, shapes, threads)
    coded = dict(zip(shapes, matrices, strict=True))
    step = step_of(c)
    gains = unpack_gains(streams["gains"], shapes)

    def weight(key: Key) -> tuple[np.ndarray, np.ndarray]:
        """A matrix before and after its gains."""
        layer, name = key
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, as a sentence
            values, col = coded[key].values, cols[layer, INPUT_OF[name]]
            plain = dequantize_structured(values, components.get(key), rows[key], col, step)
            W = plain if gains is None else gains.apply(key, plain)
        if not np.isfinite(W).all():
            raise ValueError(f"matrix {key[1]} of layer {key[0]} has weights that are not finite")
        return plain, W

    with ThreadPoolExecutor(threads or None) as pool:
        pairs = dict(zip(shapes, pool.map(weight, shapes), strict=True))
    plain = {key: pair[0] for key, pair in pairs.items()}
    return Matrices(c, parameters, coded, gains, plain, {key: pair[1] for key, pair in pairs.items()})


def _decode(data: bytes, streams: dict[str, bytes], index: bytes, threads: int) -> Decoded:
    config, files = unpack_files(streams["files"])
    arch = architecture_from_config(config)
    matrices = decode_matrices(streams, index, matrix_shapes(arch), group_widths(arch), threads)
    stored = unpack_stored(streams["transforms"], arch)

    def undone(key: Key) -> np.ndarray:
        """A matrix without the stored transforms."""
        W = matrices.weights[key]
        return W if stored is None else undo_stored(stored, *key, INPUT_OF[key[1]], W)

    with ThreadPoolExecutor(threads or None) as pool:
        names = [arch.tensor_name(*key) for key in matrices.weights]
        weights = dict(zip(names, pool.map(undone, matrices.weights), strict=True))
    if streams["embeddings"]:
        weights |= unpack_embeddings(streams["embeddings"], arch, matrices.c, threads)
    weights |= dict(unpack_uncoded(streams["uncoded"], arch, weights))
    return Decoded(
        tensors={k: weights[k] for k in expected_tensors(arch)},
        arch=arch,
        config=config,
        files=files,
        bits=bits_of(data, streams),
        c=matrices.c,
        parameters=matrices.parameters,
        code_bits={key: x.bits for key, x in matrices.coded.items()},
        indices={key: x.indices for key, x in matrices.coded.items()},
        plain=matrices.plain,
        gains=matrices.gains,
        stored=stored,
    )


def _read_scalar(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> list[DecodedMatrix]:
    """Matrices on a uniform grid: an index is its value."""
    return _read_plan(streams, spreads, index, shapes, threads)[0]


def _read_lloyd(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> list[DecodedMatrix]:
    """Matrices whose levels are described behind their lengths."""
    matrices, precision = _read_plan(streams, spreads, index, shapes, threads)
    levels = read_levels(index)
    values = [lloyd_values(x.indices, s, precision, levels) for x, s in zip(matrices, spreads, strict=True)]
    return [x._replace(values=v) for x, v in zip(matrices, values, strict=True)]


def _read_plan(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> tuple[list[DecodedMatrix], int]:
    """(the matrices with their indices as values, precision of the spreads)."""
    precision, width = index.gammas(2)
    if width < 1:
        raise ValueError("a class of no width")
    lengths = [4 * n for n in index.gammas(len(shapes))]
    tables = read_tables(streams["tables"], precision, width)
    ends = np.cumsum(lengths)

    def one(i: int) -> DecodedMatrix:
        classes = table_classes(spreads[i], width)
        z = decode_indices(streams["codes"][ends[i] - lengths[i] : ends[i]], classes, tables)
        return DecodedMatrix(z, z, 8.0 * lengths[i])

    with ThreadPoolExecutor(threads or None) as pool:
        return list(pool.map(one, range(len(shapes)))), precision


def _read_trellis(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> list[DecodedMatrix]:
    return unpack_trellis(streams["codes"], streams["tables"], spreads, index, list(shapes.values()), threads)


def _scalar_step(c: float) -> float:
    return c


class Method(NamedTuple):
    """How a file's matrices are read, and the step that their values count in, from the base step."""

    read: Callable[[Mapping[str, bytes], list[Spreads], BitReader, MatrixShapes, int], list[DecodedMatrix]]
    step: Callable[[float], float]


METHODS = {
    SCALAR: Method(_read_scalar, _scalar_step),
    TRELLIS: Method(_read_trellis, trellis_step),
    LLOYD: Method(_read_lloyd, lloyd_step),
}
