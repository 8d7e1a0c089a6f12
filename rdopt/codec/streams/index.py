"""The index of a file, which the decoder reads first, and where a file's bits went.

The index holds the base step (float32), then Elias gamma codes: how the matrices are coded, the number of parameters of
the original model, and what the method says of its streams.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.tables.classes import Spreads

SCALAR, TRELLIS, LLOYD = 0, 1, 2  # how the matrices of a file are coded
_MATRIX_STREAMS = ("codes", "tables", "scales", "structured", "gains", "transforms")


class MatrixCodes(NamedTuple):
    """The indices of all matrices as streams.

    Attributes:
        method: SCALAR, TRELLIS or LLOYD.
        codes, tables: the streams of these names.
        spreads: of each matrix.
        numbers: what the index says of them.
        bits: their ideal code length.
    """

    method: int
    codes: bytes
    tables: bytes
    spreads: list[Spreads]
    numbers: tuple[int, ...]
    bits: float


class Index(NamedTuple):
    """What every file says; `rest` goes on with the method's own numbers.

    Attributes:
        c: base step.
        method: SCALAR, TRELLIS or LLOYD.
        parameters: of the original model.
        rest: behind these.
    """

    c: float
    method: int
    parameters: int
    rest: BitReader


def write_index(c: float, method: int, parameters: int, numbers: Iterable[int]) -> bytes:
    """The index; `numbers` are what the method says of its streams."""
    out = BitWriter()
    out.gammas((method, parameters, *numbers))
    return struct.pack("<f", c) + out.bytes()


def read_index(data: bytes) -> Index:
    """Inverse of `write_index`; raises ValueError, struct.error for damaged bytes."""
    (c,) = struct.unpack_from("<f", data)
    rest = BitReader(data[4:])
    method, parameters = rest.gammas(2)
    if method not in (SCALAR, TRELLIS, LLOYD):
        raise ValueError(f"coding method {method}")
    return Index(c, method, parameters, rest)


def bits_of(data: bytes, streams: Mapping[str, bytes]) -> dict[str, int]:
    """Where the file's bits went; headers are what is left after the streams."""
    size = {k: 8 * len(v) for k, v in streams.items()}
    out = {k: size[k] for k in _MATRIX_STREAMS}
    out["headers"] = 8 * len(data) - sum(size.values())
    return {**out, "embeddings": size["embeddings"], "uncoded": size["uncoded"] + size["files"]}


def coded_bits(bits: Mapping[str, int]) -> int:
    """Bits of everything but embedding and head, the uncoded tensors and the carried files."""
    return sum(bits.values()) - bits["embeddings"] - bits["uncoded"]
