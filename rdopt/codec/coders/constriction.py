"""Entropy coding of indices: rANS (Duda 1311.2540, through constriction) with one static table per class.

One stream per matrix holds its classes one after the other, so matrices decode in parallel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import constriction
import numpy as np
from jaxtyping import Int

from rdopt.codec.coders.bits import BitReader, BitWriter
from rdopt.codec.tables.frequencies import normalize, probabilities, read_table, symmetric, write_table

# The package's stubs leave out its compiled submodules.
Categorical: Any = constriction.stream.model.Categorical  # pyright: ignore[reportAttributeAccessIssue]
AnsCoder: Any = constriction.stream.stack.AnsCoder  # pyright: ignore[reportAttributeAccessIssue]

_INTEGER_PRECISION = 12
Tables = Mapping[int, Int[np.ndarray, " k"]]


def _model(freq: Int[np.ndarray, " k"]) -> Any:
    return Categorical(probabilities(freq), perfect=False)


def _segments(classes: Int[np.ndarray, " n"]) -> list[tuple[int, Int[np.ndarray, " k"]]]:
    """(class, positions of its entries in order) for every class that occurs, ascending."""
    order = np.argsort(classes, kind="stable")
    values, starts = np.unique(classes[order], return_index=True)
    return list(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def encode_indices(z: Int[np.ndarray, "out in"], classes: Int[np.ndarray, "out in"], tables: Tables) -> bytes:
    """Codes the indices of one matrix, class by class.

    Args:
        z: indices.
        classes: table class of every entry.
        tables: class -> frequencies of |z|; signs are equiprobable.

    Returns:
        the stream, a multiple of 4 bytes, little-endian.
    """
    coder = AnsCoder()
    flat = z.ravel()
    for key, where in reversed(_segments(classes.ravel())):
        freq = tables[key]
        if len(freq) > 1:
            symbols = flat[where].astype(np.int32) + (len(freq) - 1)
            coder.encode_reverse(symbols.astype(np.int32), _model(symmetric(freq)))
    return coder.get_compressed().astype("<u4").tobytes()


def decode_indices(
    data: bytes, classes: Int[np.ndarray, "out in"], tables: Tables
) -> Int[np.ndarray, "out in"]:
    """Inverse of `encode_indices`; int32 indices.

    Raises:
        ValueError: a class has no table, or the stream does not end where the indices end.
    """
    coder = AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))
    flat = np.zeros(classes.size, np.int32)
    for key, where in _segments(classes.ravel()):
        if key not in tables:
            raise ValueError(f"class {key} has no table")
        freq = tables[key]
        if len(freq) > 1:
            flat[where] = coder.decode(_model(symmetric(freq)), len(where)) - (len(freq) - 1)
    if not coder.is_empty():
        raise ValueError("a code stream does not end with its last index")
    return flat.reshape(classes.shape)


def pack_integers(values: Int[np.ndarray, " n"]) -> bytes:
    """Entropy-codes small integers with a table of their own: gamma codes (words, table), then rANS words."""
    if values.size == 0:
        return b""
    low = int(values.min())
    freq = normalize(np.bincount(values - low), _INTEGER_PRECISION)
    coder = AnsCoder()
    if len(freq) > 1:
        coder.encode_reverse((values - low).astype(np.int32), _model(freq))
    words = coder.get_compressed().astype("<u4")
    head = BitWriter()
    head.gamma(len(words))
    write_table(head, low, freq)
    return head.bytes() + words.tobytes()


def unpack_integers(data: bytes, count: int) -> tuple[Int[np.ndarray, " n"], bytes]:
    """Inverse of `pack_integers`: (int32 values, the bytes behind them); raises ValueError for damaged bytes."""
    if count == 0:
        return np.zeros(0, np.int32), data
    source = BitReader(data)
    n_words = source.gamma()
    low, freq = read_table(source, _INTEGER_PRECISION)
    start, end = source.bytes_read, source.bytes_read + 4 * n_words
    if end > len(data):
        raise ValueError("a list of integers ends before its last word")
    if len(freq) == 1:
        return np.full(count, low, np.int32), data[end:]
    coder = AnsCoder(np.frombuffer(data[start:end], "<u4").astype(np.uint32))
    return coder.decode(_model(freq), count).astype(np.int32) + low, data[end:]


def pack_lists(lists: Sequence[Int[np.ndarray, " _"]]) -> bytes:
    """Several lists of small integers: their medians, then the differences to them, each with one table."""
    bases = [int(np.median(x)) for x in lists]
    rest = [x - base for x, base in zip(lists, bases, strict=True)]
    return pack_integers(np.array(bases, np.int32)) + pack_integers(np.concatenate(rest))


def unpack_lists(data: bytes, lengths: Sequence[int]) -> tuple[list[Int[np.ndarray, " _"]], bytes]:
    """Inverse of `pack_lists`: (the lists, the bytes behind them)."""
    bases, data = unpack_integers(data, len(lengths))
    values, data = unpack_integers(data, sum(lengths))
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return [part + base for part, base in zip(parts, bases, strict=True)], data
