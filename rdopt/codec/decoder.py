"""A file's bytes back to a model: the same float32 weights on every machine, run and number of threads."""

import lzma
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.checkpoint.families import (
    EMBED,
    FINAL_NORM,
    HEAD,
    INPUT_OF,
    MATRICES,
    Architecture,
    Key,
    MatrixShapes,
    architecture_from_config,
    block_shapes,
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
from rdopt.codec.streams.paths import DecodedMatrix, TrellisReader
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


class MatrixParts(NamedTuple):
    """One decoded matrix.

    Attributes:
        indices: integers, (out, in).
        plain: float32 weights before gains.
        weights: float32 weights, in the coordinates of the stored transforms if any.
        bits: of its codes; ideal ones, where matrices share a string of words.
    """

    indices: Int[np.ndarray, "out in"]
    plain: Float[np.ndarray, "out in"]
    weights: Float[np.ndarray, "out in"]
    bits: float


class MatrixReader:
    """Reads the coded matrices of a file when they are asked for.

    Args:
        streams: of the file.
        index: its index behind the hashes.
        shapes: of every matrix, in the order of the file.
        widths: of every input group.
        threads: decoding threads, 0 for all cores; the result does not depend on it.

    Raises:
        ValueError: damaged streams.
    """

    def __init__(
        self,
        streams: Mapping[str, bytes],
        index: bytes,
        shapes: MatrixShapes,
        widths: Mapping[Key, int],
        threads: int = 0,
    ) -> None:
        self.c, method, self.parameters, source = read_index(index)
        self._rows, self._cols, spreads = unpack_scales(streams["scales"], shapes, widths)
        self._components = unpack_structured(streams["structured"], shapes)
        self._places, self._threads = {key: i for i, key in enumerate(shapes)}, threads
        opened, step_of = METHODS[method]
        self._coding = opened(streams, [spreads[key] for key in shapes], source, shapes, threads)
        self._step, self.gains = step_of(self.c), unpack_gains(streams["gains"], shapes)

    def read(self, keys: Iterable[Key]) -> dict[Key, MatrixParts]:
        """Some of the matrices, fastest in the order of the file.

        Raises:
            ValueError: damaged streams.
        """
        wanted = list(keys)
        coded = dict(zip(wanted, self._coding([self._places[key] for key in wanted]), strict=True))

        def parts(key: Key) -> MatrixParts:
            """One matrix from its decoded values; ValueError where a weight is not finite."""
            layer, name = key
            with np.errstate(over="ignore", invalid="ignore"):  # refused below, as a sentence
                values, col = coded[key].values, self._cols[layer, INPUT_OF[name]]
                plain = dequantize_structured(values, self._components.get(key), self._rows[key], col, self._step)
                W = plain if self.gains is None else self.gains.apply(key, plain)
            if not np.isfinite(W).all():
                raise ValueError(f"matrix {name} of layer {layer} has weights that are not finite")
            return MatrixParts(coded[key].indices, plain, W, coded[key].bits)

        with ThreadPoolExecutor(self._threads or None) as pool:
            return dict(zip(wanted, pool.map(parts, wanted), strict=True))


class OpenFile:
    """A file whose blocks are decoded when they are asked for.

    Args:
        data: the container's bytes.
        name: how errors call it.
        threads: decoding threads, 0 for all cores; the result does not depend on it.

    Attributes:
        arch, config, files: architecture, config.json, the carried files by name.
        bits: where the file's bits went.
        matrices: reads the coded matrices.
        stored: its stored transforms, if any.
        ends: "embed", "final_norm" and, unless tied, "head", float32.

    Raises:
        UserError: damaged, altered, or of another version; of a damaged block when it is asked for.
    """

    def __init__(self, data: bytes, name: str = "the file", threads: int = 0) -> None:
        self._name, self._threads = name, threads
        streams, index = unpack(data, name)
        with self._refusing():
            self.config, self.files = unpack_files(streams["files"])
            self.arch = architecture_from_config(self.config)
            shapes = matrix_shapes(self.arch)
            self.matrices = MatrixReader(streams, index, shapes, group_widths(self.arch), threads)
            self.stored = unpack_stored(streams["transforms"], self.arch)
            beside: dict[str, np.ndarray] = {}
            if streams["embeddings"]:
                beside |= unpack_embeddings(streams["embeddings"], self.arch, self.matrices.c, threads)
            coded = {self.arch.tensor_name(*key) for key in shapes} | set(beside)
            self._beside = beside | dict(unpack_uncoded(streams["uncoded"], self.arch, coded))
        self.bits = bits_of(data, streams)
        names = {"embed": EMBED, "final_norm": FINAL_NORM, "head": HEAD}
        self.ends = {k: self._beside[tensor] for k, tensor in names.items() if tensor in self._beside}
        self._last: tuple[int, dict[str, np.ndarray]] | None = None

    @property
    def parameters(self) -> int:
        """Of the original model."""
        return self.matrices.parameters

    def parts(self, layer: int) -> dict[str, MatrixParts]:
        """The matrices of one block, by name."""
        with self._refusing():
            read = self.matrices.read([(layer, name) for name in MATRICES])
        return {name: x for (_, name), x in read.items()}

    def layer(self, layer: int) -> dict[str, Float[np.ndarray, "..."]]:
        """The parameters of one block by short name, float32, as the network has them."""
        if self._last is None or self._last[0] != layer:
            self._last = layer, self.undone(layer, self.parts(layer))
        return self._last[1]

    def undone(self, layer: int, parts: Mapping[str, MatrixParts]) -> dict[str, Float[np.ndarray, "..."]]:
        """A block whose matrices were read, without the stored transforms."""
        arch, stored = self.arch, self.stored

        def undone(name: str) -> np.ndarray:
            W = parts[name].weights
            return W if stored is None else undo_stored(stored, layer, name, INPUT_OF[name], W)

        with ThreadPoolExecutor(self._threads or None) as pool:
            matrices = dict(zip(MATRICES, pool.map(undone, MATRICES), strict=True))
        others = (short for short in block_shapes(arch) if short not in matrices)
        return matrices | {short: self._beside[arch.tensor_name(layer, short)] for short in others}

    def tensors(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """(checkpoint name, float32 array) of every weight, block by block, in the order of `expected_tensors`."""
        arch = self.arch
        yield EMBED, self.ends["embed"]
        for layer in range(arch.num_layers):
            block = self.layer(layer)
            yield from ((arch.tensor_name(layer, short), block[short]) for short in block_shapes(arch))
        yield FINAL_NORM, self.ends["final_norm"]
        if not arch.tied:
            yield HEAD, self.ends["head"]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise UserError(f"{self._name} does not decode ({error}); encode the model again.") from error


def open_file(path: Path, threads: int = 0) -> OpenFile:
    """Opens a file; its blocks are decoded when they are asked for.

    Raises:
        UserError: no file, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name one written by rdopt encode.")
    return OpenFile(path.read_bytes(), str(path), threads)


def decode_model(data: bytes, name: str = "the file", threads: int = 0) -> Decoded:
    """Decodes a container into memory.

    Args:
        data: its bytes.
        name: how errors call it.
        threads: decoding threads, 0 for all cores; the result does not depend on it.

    Raises:
        UserError: damaged, altered, or of another version.
    """
    file, tensors, parts = OpenFile(data, name, threads), {}, {}
    arch = file.arch
    for layer in range(arch.num_layers):
        matrices = file.parts(layer)
        parts |= {(layer, name): x for name, x in matrices.items()}
        block = file.undone(layer, matrices)
        tensors |= {arch.tensor_name(layer, short): x for short, x in block.items()}
    tensors |= {EMBED: file.ends["embed"], FINAL_NORM: file.ends["final_norm"]}
    tensors |= {HEAD: file.ends["head"]} if "head" in file.ends else {}
    ideal, codes = sum(x.bits for x in parts.values()), file.bits["codes"]
    # Matrices may share strings of words: each gets its share of the real bits.
    shares = {key: x.bits / ideal if ideal else 1 / len(parts) for key, x in parts.items()}
    return Decoded(
        tensors={k: tensors[k] for k in expected_tensors(arch)},
        arch=arch,
        config=file.config,
        files=file.files,
        bits=file.bits,
        c=file.matrices.c,
        parameters=file.parameters,
        code_bits={key: codes * share for key, share in shares.items()},
        indices={key: x.indices for key, x in parts.items()},
        plain={key: x.plain for key, x in parts.items()},
        gains=file.matrices.gains,
        stored=file.stored,
    )


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
    card: Callable[[OpenFile], str] | None = None,
) -> OpenFile:
    """Decodes a file into a plain Hugging Face folder, block by block.

    Args:
        path: the file.
        out: a new folder.
        dtype: of the written weights; float32 keeps them exactly.
        threads: 0 for all cores; the bytes do not depend on it.
        card: makes the folder's README.md.

    Raises:
        UserError: a damaged file or an existing output.
    """
    file = open_file(path, threads)
    files = file.files if card is None else {**file.files, "README.md": card(file).encode()}
    write_checkpoint(out, file.config, file.tensors(), dtype=dtype, files=files)
    return file


ReadCodes = Callable[[Sequence[int]], list[DecodedMatrix]]  # from places in the file to matrices


def _open_scalar(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> ReadCodes:
    """Matrices on a uniform grid: an index is its value."""
    return _open_plan(streams, spreads, index, shapes, threads)[0]


def _open_lloyd(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> ReadCodes:
    """Matrices whose levels are described behind their lengths."""
    plain, precision = _open_plan(streams, spreads, index, shapes, threads)
    levels = read_levels(index)

    def read(places: Sequence[int]) -> list[DecodedMatrix]:
        found = zip(places, plain(places), strict=True)
        return [x._replace(values=lloyd_values(x.indices, spreads[i], precision, levels)) for i, x in found]

    return read


def _open_plan(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> tuple[ReadCodes, int]:
    """(what reads matrices with their indices as values, precision of the spreads)."""
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

    def read(places: Sequence[int]) -> list[DecodedMatrix]:
        with ThreadPoolExecutor(threads or None) as pool:
            return list(pool.map(one, places))

    return read, precision


def _open_trellis(
    streams: Mapping[str, bytes], spreads: list[Spreads], index: BitReader, shapes: MatrixShapes, threads: int
) -> ReadCodes:
    return TrellisReader(
        streams["codes"], streams["tables"], spreads, index, list(shapes.values()), threads
    ).read


def _scalar_step(c: float) -> float:
    return c


class Method(NamedTuple):
    """How a file's matrices are read, and the step that their values count in, from the base step."""

    open: Callable[[Mapping[str, bytes], list[Spreads], BitReader, MatrixShapes, int], ReadCodes]
    step: Callable[[float], float]


METHODS = {
    SCALAR: Method(_open_scalar, _scalar_step),
    TRELLIS: Method(_open_trellis, trellis_step),
    LLOYD: Method(_open_lloyd, lloyd_step),
}
