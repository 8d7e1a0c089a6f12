"""Huffman codes of trellis indices, for comparison: canonical, at most 16 bits long, from the tables that rANS uses.

Code lengths follow from the integer frequencies by package-merge (Larmore and Hirschberg 1990) on both sides, so
nothing is described. A magnitude is coded as table symbol (its high part), raw low bits, sign; the last symbol of a
table is an escape, followed by an Elias gamma code. Lanes come one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.rans import LARGEST, Blank, Coder, Lanes
from rdopt.transforms.kernels import kernel

MAX_LENGTH = 16
_FAST = 10  # leading bits that most codes are decoded by at once
_WORD_BOUND = 3  # 32-bit words an index can take at most: code, escape, raw bits, sign


class Codes(NamedTuple):
    """Canonical codes of all tables.

    Attributes:
        lengths: (tables, size) bits of every symbol, 0 for none.
        codes: (tables, size) their code words.
        fast: (tables, 2^_FAST) symbol << 5 | length by leading bits; 0 where the code is longer.
        limit: (tables, MAX_LENGTH + 1) what 16 leading bits stay below in codes of at most that length.
        base: (tables, MAX_LENGTH + 1) the rank of a code word of that length, less the word.
        order: (tables, size) symbols by rank.
    """

    lengths: Int[np.ndarray, "tables size"]
    codes: Int[np.ndarray, "tables size"]
    fast: Int[np.ndarray, "tables slots"]
    limit: Int[np.ndarray, "tables lengths"]
    base: Int[np.ndarray, "tables lengths"]
    order: Int[np.ndarray, "tables size"]


def code_sizes(freq: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Lengths of the best prefix code of at most MAX_LENGTH bits for n >= 2 frequencies (package-merge)."""
    # Coin collector's problem: a symbol of length l pays one coin of every face value 2^-1 .. 2^-l, each at the price
    # of its frequency. From the smallest value up, pairs of the cheapest become packages of the next value, among the
    # coins of that value; `levels` keeps which items of a row are coins.
    order = np.argsort(freq, kind="stable")
    coins = freq[order]
    levels, row = [], coins
    is_coin = np.ones(len(coins), bool)
    for _ in range(MAX_LENGTH):
        levels.append(is_coin)
        packages = row[: len(row) // 2 * 2].reshape(-1, 2).sum(axis=1)
        merged = np.concatenate([coins, packages])
        rank = np.argsort(merged, kind="stable")
        row, is_coin = merged[rank], rank < len(coins)
    # The 2 n - 2 cheapest items of the largest value are worth n - 1, what a full code pays. Opened again row by
    # row, they say how many coins each symbol has paid: its length.
    sizes, taken = np.zeros(len(freq), np.int64), 2 * len(freq) - 2
    for is_coin in reversed(levels):
        used = int(is_coin[:taken].sum())
        sizes[order[:used]] += 1
        taken = 2 * (min(taken, len(is_coin)) - used)
    return sizes


def make_codes(coder: Coder) -> Codes:
    """The codes of all tables; symbols of one length in ascending order."""
    # Canonical codes (Schwartz and Kallick 1964) are decoded without a tree (Moffat and Turpin 1997): sorted by length,
    # the code words ascend as binary fractions, so the length of the next one follows from where 16 leading bits fall
    # among `limit`, and its symbol from its distance to the first word of that length, which `base` holds.
    tables, size = len(coder.symbols), coder.start.shape[1] - 1
    lengths, codes = np.zeros((tables, size), np.int64), np.zeros((tables, size), np.int64)
    limit, base = np.zeros((tables, MAX_LENGTH + 1), np.int64), np.zeros((tables, MAX_LENGTH + 1), np.int64)
    fast, order = np.zeros((tables, 1 << _FAST), np.uint16), np.zeros((tables, size), np.int64)
    for row, symbols in enumerate(coder.symbols):
        sizes = code_sizes(np.diff(coder.start[row, : symbols + 1].astype(np.int64)))
        rank = np.argsort(sizes, kind="stable")
        # A code word is the sum of 2^-length of those before it, cut to its own length.
        begins = np.concatenate([[0], np.cumsum(1 << (MAX_LENGTH - sizes[rank]))])
        words = begins[:-1] >> (MAX_LENGTH - sizes[rank])
        lengths[row, :symbols], codes[row, rank], order[row, :symbols] = sizes, words, rank
        ends = np.searchsorted(sizes[rank], np.arange(MAX_LENGTH + 1), side="right")
        limit[row] = begins[ends]
        firsts = np.concatenate([[0], ends[:-1]])
        base[row] = firsts - (begins[firsts] >> (MAX_LENGTH - np.arange(MAX_LENGTH + 1)))
        # Most words are short: a table by their leading bits saves the search for the length.
        short = rank[: ends[_FAST]]
        entries = (short << 5) | sizes[short]
        fast[row, : begins[len(short)] >> (MAX_LENGTH - _FAST)] = np.repeat(entries, 1 << (_FAST - sizes[short]))
    return Codes(lengths, codes, fast, limit, base, order)


@kernel(inline="always")
@no_type_check
def _put(held, filled, at, words, bits, count):
    """Appends at most 31 bits to the `filled` < 32 ones held back."""
    held = (held << np.uint64(count)) | np.uint64(bits)
    filled += count
    if filled >= 32:
        filled -= 32
        words[at] = held >> np.uint64(filled)
        at += 1
    return held, filled, at


@kernel()
@no_type_check
def _encode(k, table_of, grids, lengths, codes, symbols, shift, words, held, filled, at):
    """Codes lanes forwards; returns what the next ones go on with."""
    for lane in range(k.shape[0]):
        for t in range(k.shape[1]):
            table = 2 * np.int64(table_of[lane, t]) + grids[lane, t]
            magnitude = np.int64(abs(k[lane, t]))
            raw, last = np.int64(shift[table]), np.int64(symbols[table] - 1)
            high = magnitude >> raw
            symbol = min(high, last)
            held, filled, at = _put(held, filled, at, words, codes[table, symbol], lengths[table, symbol])
            if high >= last:
                value, digits = high - last + 1, 0
                while value >> (digits + 1):
                    digits += 1
                held, filled, at = _put(held, filled, at, words, digits, 5)
                held, filled, at = _put(held, filled, at, words, value - (1 << digits), digits)
            held, filled, at = _put(held, filled, at, words, magnitude & ((1 << raw) - 1), raw)
            held, filled, at = _put(held, filled, at, words, np.int64(k[lane, t] < 0), np.int64(magnitude != 0))
    return held, filled, at


@kernel(inline="always")
@no_type_check
def _peek(words, at):
    """32 bits from bit `at` on, zeros behind the end."""
    word = min(at >> 5, words.shape[0] - 2)
    both = (np.uint64(words[word]) << np.uint64(32)) | np.uint64(words[word + 1])
    return np.int64(((both << np.uint64(at & 31)) >> np.uint64(32)) & np.uint64(0xFFFFFFFF))


@kernel(inline="always")
@no_type_check
def _symbol(window, fast, limit, base, order):
    """(symbol, length) of the code that 32 bits begin with."""
    entry = np.int64(fast[window >> (32 - _FAST)])
    if entry:
        return entry >> 5, entry & 31
    top, length = window >> (32 - MAX_LENGTH), _FAST + 1
    while length < MAX_LENGTH and top >= limit[length]:
        length += 1
    return order[(top >> (MAX_LENGTH - length)) + base[length]], np.int64(length)


@kernel()
@no_type_check
def _decode(k, table_of, step, segment, fast, limit, base, order, symbols, shift, words, at, end):
    """Inverse of `_encode`: the next bit; -1 where the bits end or an index is beyond LARGEST."""
    for lane in range(k.shape[0]):
        state = 0
        for t in range(k.shape[1]):
            if t % segment == 0:
                state = 0
            table = 2 * np.int64(table_of[lane, t]) + (state & 1)
            symbol, length = _symbol(_peek(words, at), fast[table], limit[table], base[table], order[table])
            at += length
            magnitude = symbol
            if symbol == symbols[table] - 1:
                digits = _peek(words, at) >> 27
                value = _peek(words, at + 5) >> (32 - digits)
                at += 5 + digits
                magnitude += value + (np.int64(1) << digits) - 1
            raw = np.int64(shift[table])
            magnitude = (magnitude << raw) | (_peek(words, at) >> (32 - raw))
            at += raw
            if at > end or magnitude > LARGEST:
                return np.int64(-1)
            sign = (_peek(words, at) >> 31) & np.int64(magnitude != 0)
            at += np.int64(magnitude != 0)
            k[lane, t] = (magnitude ^ -sign) + sign
            state = step[state, magnitude & 1]
    return np.int64(at)


class Huffman:
    """The entropy coder of this file for the tables of a `Coder`."""

    def __init__(self, coder: Coder) -> None:
        self._coder, self._codes = coder, make_codes(coder)

    def lengths(self) -> Float[np.ndarray, "tables symbols"]:
        """Bits of every symbol of every table."""
        return self._codes.lengths.astype(np.float64)

    def encode(self, parts: Sequence[Lanes]) -> bytes:
        """The bytes of a segment: bits, most significant first, padded to 16."""
        c, tables = self._codes, self._coder
        words = np.zeros(_WORD_BOUND * sum(part.k.size for part in parts) + 1, np.uint32)
        held, filled, at = np.uint64(0), 0, 0
        for part in parts:
            held, filled, at = _encode(
                *part, c.lengths, c.codes, tables.symbols, tables.shift, words, np.uint64(held), filled, at
            )
        words[at] = (int(held) << (32 - filled)) & 0xFFFFFFFF
        return words[: at + 1].astype(">u4").tobytes()[: 4 * at + 2 * -(-filled // 16)]

    def decode(self, data: bytes, parts: Sequence[Blank], step: Int[np.ndarray, "states 2"]) -> None:
        """Fills the lanes of a segment, `step` the next states of the trellis; raises ValueError for damaged bytes."""
        c, tables, at = self._codes, self._coder, 0
        padded = data + bytes(12 - len(data) % 4)
        words = np.frombuffer(padded, ">u4").astype(np.uint32)
        for k, classes, restart in parts:
            at = _decode(
                k, classes, step, restart, c.fast, c.limit, c.base, c.order, tables.symbols, tables.shift,
                words, at, 8 * len(data),
            )  # fmt: skip
            if at < 0:
                raise ValueError("a segment of the codes ends before its last index")
        if len(data) != 2 * -(-at // 16) or int.from_bytes(data[-2:], "big") % (1 << -at % 16):
            raise ValueError("a segment of the codes does not end with its last index")
