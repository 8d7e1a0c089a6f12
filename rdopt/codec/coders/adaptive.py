"""Adaptive binary arithmetic coding of trellis indices, for comparison: contexts that learn as they go.

As in CABAC (Marpe, Schwarz and Wiegand 2003) and ISO/IEC 15938-17: a magnitude is a zero flag, greater-than flags
up to CUT and an Exp-Golomb code. Flags have contexts by class, grid and place; signs and low bits have none. A
context is the mean of two estimates of different memory, which begin with what the file's tables say, in every
segment anew. The range coder (Martin 1979) is 32 bits wide and propagates carries.
"""

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.rans import LARGEST, Blank, Coder, Lanes, Rans
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.transforms.kernels import kernel

CUT = 13  # greater-than flags before the Exp-Golomb code
_EXPONENTS = 8  # contexts of its prefix, and as many of the first bit behind it
FAST, SLOW = 8, 11  # log2 of the two memories: long ones, because the tables fit well already
_CERTAIN = 64  # least probability, of 2^16, to begin with
_TOP = 1 << 24  # the range stays above
_MARGIN = 160  # bytes an index may take
_MOST = 1 << 16


def starting_contexts(coder: Coder) -> Int[np.ndarray, "tables bins"]:
    """The probability of a zero in every bin of every table, of 2^16; the escape ends what a table knows."""
    # tail[i] counts the slots of magnitudes i and above (of their high parts).
    tables = len(coder.symbols)
    tail = np.zeros((tables, CUT + (2 << _EXPONENTS)), np.int64)
    for row, symbols in enumerate(coder.symbols):
        beyond = (1 << PRECISION) - coder.start[row, :symbols].astype(np.int64)
        length = min(symbols, tail.shape[1])
        tail[row, :length] = beyond[:length]
    # Every bin asks whether a magnitude known to lie in `whole` also lies in its part `rest`. Greater-than flag i: at
    # least i, at least i + 1. Prefix flag d of the Exp-Golomb code (value >= 2^d): from ends[d] on, from ends[d+1] on.
    ends = CUT - 1 + (1 << np.arange(_EXPONENTS + 1))
    whole = np.concatenate([tail[:, :CUT], tail[:, ends[:-1]], tail[:, ends[:-1]]], axis=1)
    # The first bit behind a prefix of d digits: from ends[d] up to ends[d + 1], the upper half of that. A prefix of no
    # digits has no such bit; its place is filled as if the bit were always zero.
    middles = CUT - 1 + (3 << np.arange(_EXPONENTS)) // 2
    middles[0] = ends[0] + 1
    rest = np.concatenate([tail[:, 1 : CUT + 1], tail[:, ends[1:]], tail[:, middles]], axis=1)
    inside = np.concatenate([whole[:, : CUT + _EXPONENTS], tail[:, ends[:-1]] - tail[:, ends[1:]]], axis=1)
    # No context begins with certainty: the table is only what the whole file said, and a bin that the table gives no
    # slot (beyond the escape) begins with even odds.
    zero = ((whole - rest) << 16) // np.maximum(inside, 1)
    return np.clip(np.where(inside > 0, zero, 1 << 15), _CERTAIN, (1 << 16) - _CERTAIN)


@kernel(inline="always")
@no_type_check
def _adapt(context, bit):
    for at, memory in ((0, FAST), (1, SLOW)):
        p = np.int64(context[at])
        context[at] = p - (p >> memory) if bit else p + ((_MOST - p) >> memory)


@kernel()
@no_type_check
def _shift_out(low, span, at, out):
    """Emits finished bytes; a carry runs back through those already out."""
    if low >> np.uint64(32):
        before = at - 1
        while out[before] == 255:
            out[before] = 0
            before -= 1
        out[before] += 1
        low &= np.uint64(0xFFFFFFFF)
    while span < np.uint64(_TOP):
        out[at] = low >> np.uint64(24)
        at += 1
        low = (low << np.uint64(8)) & np.uint64(0xFFFFFFFF)
        span <<= np.uint64(8)
    return low, span, at


@kernel()
@no_type_check
def _put(low, span, at, out, context, bit):
    """Codes a bit in its context."""
    bound = (span * ((np.uint64(context[0]) + np.uint64(context[1])) >> np.uint64(1))) >> np.uint64(16)
    _adapt(context, bit)
    if bit:
        return _shift_out(low + bound, span - bound, at, out)
    return _shift_out(low, bound, at, out)


@kernel()
@no_type_check
def _put_plain(low, span, at, out, value, count):
    """Codes `count` bits without context, eight at a time."""
    while count > 0:
        some = min(count, 8)
        count -= some
        span >>= np.uint64(some)
        low += span * np.uint64((value >> count) & ((1 << some) - 1))
        low, span, at = _shift_out(low, span, at, out)
    return low, span, at


@kernel()
@no_type_check
def _put_high(low, span, at, out, contexts, high):
    """Codes the high part of a magnitude."""
    for place in range(min(high, CUT)):
        low, span, at = _put(low, span, at, out, contexts[place], 1)
    if high < CUT:
        return _put(low, span, at, out, contexts[high], 0)
    value, digits = high - CUT + 1, 0
    while value >> (digits + 1):
        low, span, at = _put(low, span, at, out, contexts[CUT + min(digits, _EXPONENTS - 1)], 1)
        digits += 1
    low, span, at = _put(low, span, at, out, contexts[CUT + min(digits, _EXPONENTS - 1)], 0)
    if digits:
        digits -= 1
        first = contexts[CUT + _EXPONENTS + min(digits + 1, _EXPONENTS - 1)]
        low, span, at = _put(low, span, at, out, first, (value >> digits) & 1)
    return _put_plain(low, span, at, out, value & ((1 << digits) - 1), digits)


@kernel()
@no_type_check
def _encode(k, table_of, grids, shift, contexts, out, low, span, at):
    """Codes lanes; at < 0 if they do not fit."""
    for lane in range(k.shape[0]):
        for t in range(k.shape[1]):
            if at + _MARGIN > out.shape[0]:
                return low, span, np.int64(-1)
            table = 2 * np.int64(table_of[lane, t]) + grids[lane, t]
            magnitude, raw = np.int64(abs(k[lane, t])), np.int64(shift[table])
            low, span, at = _put_high(low, span, at, out, contexts[table], magnitude >> raw)
            low, span, at = _put_plain(low, span, at, out, magnitude & ((1 << raw) - 1), raw)
            if magnitude:
                low, span, at = _put_plain(low, span, at, out, np.int64(k[lane, t] < 0), 1)
    return low, span, at


@kernel()
@no_type_check
def _shift_in(code, span, at, data):
    while span < np.uint64(_TOP):
        span <<= np.uint64(8)
        code <<= np.uint64(8)
        if at < data.shape[0]:
            code |= np.uint64(data[at])
        at += 1
    return code, span, at


@kernel()
@no_type_check
def _get(code, span, at, data, context):
    bound = (span * ((np.uint64(context[0]) + np.uint64(context[1])) >> np.uint64(1))) >> np.uint64(16)
    bit = np.int64(code >= bound)
    _adapt(context, bit)
    if bit:
        code, span, at = _shift_in(code - bound, span - bound, at, data)
    else:
        code, span, at = _shift_in(code, bound, at, data)
    return code, span, at, bit


@kernel()
@no_type_check
def _get_plain(code, span, at, data, count):
    value = np.int64(0)
    while count > 0:
        some = min(count, 8)
        count -= some
        span >>= np.uint64(some)
        part = min(code // span, np.uint64((1 << some) - 1))
        value = (value << some) | np.int64(part)
        code, span, at = _shift_in(code - part * span, span, at, data)
    return code, span, at, value


@kernel()
@no_type_check
def _get_high(code, span, at, data, contexts):
    bit, high, digits = np.int64(1), np.int64(0), np.int64(0)
    while high < CUT:
        code, span, at, bit = _get(code, span, at, data, contexts[high])
        if not bit:
            return code, span, at, high
        high += 1
    while digits < 31:
        code, span, at, bit = _get(code, span, at, data, contexts[CUT + min(digits, _EXPONENTS - 1)])
        if not bit:
            break
        digits += 1
    value = np.int64(1)
    if digits:
        first = contexts[CUT + _EXPONENTS + min(digits, _EXPONENTS - 1)]
        code, span, at, bit = _get(code, span, at, data, first)
        code, span, at, rest = _get_plain(code, span, at, data, digits - 1)
        value = ((2 | bit) << (digits - 1)) | rest
    return code, span, at, high + value - 1


@kernel()
@no_type_check
def _decode(k, table_of, step, segment, shift, contexts, data, code, span, at):
    """Inverse of `_encode`; at < 0 where the bytes end too early or an index is beyond LARGEST."""
    for lane in range(k.shape[0]):
        state = 0
        for t in range(k.shape[1]):
            if t % segment == 0:
                state = 0
            table = 2 * np.int64(table_of[lane, t]) + (state & 1)
            raw = np.int64(shift[table])
            code, span, at, high = _get_high(code, span, at, data, contexts[table])
            code, span, at, rest = _get_plain(code, span, at, data, raw)
            magnitude = (high << raw) | rest
            if at > data.shape[0] + 4 or magnitude > LARGEST:
                return code, span, np.int64(-1)
            sign = np.int64(0)
            if magnitude:
                code, span, at, sign = _get_plain(code, span, at, data, 1)
            k[lane, t] = (magnitude ^ -sign) + sign
            state = step[state, magnitude & 1]
    return code, span, at


class Binary:
    """The entropy coder of this file for the tables of a `Coder`."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        once = starting_contexts(coder).astype(np.uint16)
        self._contexts = np.ascontiguousarray(
            np.broadcast_to(once[:, :, None], (*once.shape, 2))
        )

    def lengths(self) -> Float[np.ndarray, "tables symbols"]:
        """Bits of every symbol of every table before anything is learned."""
        return Rans(self._coder).lengths()

    def encode(self, parts: Sequence[Lanes]) -> bytes:
        """The bytes of a segment, padded to two."""
        room = 4 * sum(part.k.size for part in parts) + 4 * _MARGIN
        while True:
            out, contexts = np.zeros(room, np.uint8), self._contexts.copy()
            low, span, at = np.uint64(0), np.uint64(0xFFFFFFFF), 0
            for part in parts:
                low, span, at = _encode(
                    *part, self._coder.shift, contexts, out, np.uint64(low), np.uint64(span), at
                )
                if at < 0:
                    break
            if at >= 0:
                break
            room *= 2
        # The next multiple of 2^24 lies inside the range, and its zeros need not be sent.
        _, _, at = _shift_out(np.uint64(low) + np.uint64(_TOP - 1), np.uint64(_TOP >> 8), at, out)
        return out[: at + at % 2].tobytes()

    def decode(self, data: bytes, parts: Sequence[Blank], step: Int[np.ndarray, "states 2"]) -> None:
        """Fills the lanes of a segment, `step` the next states of the trellis; raises ValueError for damaged bytes."""
        contexts, source = self._contexts.copy(), np.frombuffer(data, np.uint8)
        code, span, at = int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 0xFFFFFFFF, 4
        for k, classes, restart in parts:
            code, span, at = _decode(
                k, classes, step, restart, self._coder.shift, contexts,
                source, np.uint64(code), np.uint64(span), at,
            )  # fmt: skip
            if at < 0:
                raise ValueError("a segment of the codes ends before its last index")
        if len(data) != at - 3 + (at - 3) % 2:
            raise ValueError("a segment of the codes does not end with its last index")
