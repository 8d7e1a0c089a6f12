"""rANS over lanes whose table depends on the symbol before: the entropy coder of trellis indices.

Range asymmetric numeral systems (Duda 1311.2540) with 32-bit states and 16-bit words. Eight neighbouring lanes
(columns of a matrix) are coded in turn, one state each, all into one string of words (Giesen 1402.3392), so that
the decoder walks eight trellises at a time. A lane's table is picked by the class of the entry and the grid its
trellis is on. A magnitude is coded as table symbol (its high part), raw low bits, sign; the last symbol of a table
is an escape, followed by an Elias gamma code.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.tables.frequencies import PRECISION
from rdopt.transforms.kernels import kernel

# Lanes coded in turn into one string, one state each. Part of the format (codec/FORMAT.md): `streams.paths.segments`
# rounds by it for every coder, so that another number is another container version.
INTERLEAVED_LANES = 8
LARGEST = (1 << 30) - 1  # index; its value fits 32 bits
_WORD_BOUND = 5  # words an index can take at most: escape, raw bits, sign
FIRST_STATE = 1 << 16  # states lie in [2^16, 2^32); the encoder begins, and the decoder ends, with this one


class Lanes(NamedTuple):
    """Neighbouring lanes to encode, each (lanes, length): int32 indices, int16 classes, uint8 grids."""

    k: Int[np.ndarray, "lanes length"]
    classes: Int[np.ndarray, "lanes length"]
    grids: Int[np.ndarray, "lanes length"]


class Blank(NamedTuple):
    """Lanes to decode: k is filled; a lane's trellis starts anew after every `restart` entries."""

    k: Int[np.ndarray, "lanes length"]
    classes: Int[np.ndarray, "lanes length"]
    restart: int


class Coder(NamedTuple):
    """Tables of a file, packed for the kernels; one row per (class, grid), 2 class + grid.

    Attributes:
        start: (tables, size + 1) uint32 cumulative frequencies; unused symbols have none.
        symbols: (tables,) int32 number of symbols of a table, its escape included.
        shift: (tables,) int32 raw low bits of a magnitude.
        slots: (tables, 2^PRECISION) uint8 symbol of every slot.
    """

    start: Int[np.ndarray, "tables bounds"]
    symbols: Int[np.ndarray, " tables"]
    shift: Int[np.ndarray, " tables"]
    slots: Int[np.ndarray, "tables slots"]


def make_coder(tables: list[Int[np.ndarray, " _"]], shifts: list[int]) -> Coder:
    """Packs frequency tables that each sum to 2^PRECISION."""
    size = max(len(freq) for freq in tables)
    start = np.full((len(tables), size + 1), 1 << PRECISION, np.uint32)
    slots = np.empty((len(tables), 1 << PRECISION), np.uint8)
    for row, freq in enumerate(tables):
        start[row, 0] = 0
        start[row, 1 : len(freq) + 1] = np.cumsum(freq)
        slots[row] = np.repeat(np.arange(len(freq)), freq)
    symbols = np.array([len(freq) for freq in tables], np.int32)
    return Coder(start, symbols, np.array(shifts, np.int32), slots)


@kernel(inline="always")
@no_type_check
def _push_bits(x, at, words, bits, count):
    """Appends `count` raw bits (at most 16) to a state; words grow downwards."""
    full = np.uint64((x >> np.uint64(32 - count)) != 0)
    words[at - 1] = x
    at -= np.int64(full)
    x >>= full << np.uint64(4)
    return (x << np.uint64(count)) | np.uint64(bits), at


@kernel()
@no_type_check
def _push_escape(x, at, words, value):
    """Appends value >= 0: 5 bits for the number of binary digits of value + 1, then those after the first."""
    digits = 0
    while (value + 1) >> (digits + 1):
        digits += 1
    rest = (value + 1) - (1 << digits)
    low = min(digits, 16)
    if digits:
        x, at = _push_bits(x, at, words, rest & ((1 << low) - 1), low)
    if digits > low:
        x, at = _push_bits(x, at, words, rest >> low, digits - low)
    return _push_bits(x, at, words, digits, 5)


@kernel(error_model="numpy")
@no_type_check
def encode_lanes(k, table_of, grids, start, symbols, shift, states, words, at):
    """Codes `Lanes` with the tables of a `Coder`, in reverse order; returns the first word used.

    states (INTERLEAVED_LANES,) uint64 change in place; words, uint16, are filled downwards from `at`, and one below the
    last one used is scratch.
    """
    # A state is a stack: what is pushed last is popped first, hence everything backwards, the words too. A symbol of
    # `freq` slots from `low` on takes x to floor(x / freq) 2^PRECISION + x mod freq + low (Duda), which
    # stays below 2^32 if x was below freq 2^(32 - PRECISION); else 16 bits go out first. Whether they do is as good as
    # random, so the word is written in any case and only `at` depends on it: a branch would be mispredicted. The
    # state then fits 32 bits, whose division is the faster one.
    lanes, length = k.shape
    for group in range((lanes - 1) // INTERLEAVED_LANES * INTERLEAVED_LANES, -1, -INTERLEAVED_LANES):
        for t in range(length - 1, -1, -1):
            for lane in range(min(lanes - group, INTERLEAVED_LANES) - 1, -1, -1):
                x = states[lane]
                index = k[group + lane, t]
                table = 2 * np.int64(table_of[group + lane, t]) + grids[group + lane, t]
                magnitude = np.int64(abs(index))
                raw = shift[table]
                x, at = _push_bits(x, at, words, np.int64(index < 0), np.int64(magnitude != 0))
                if raw:
                    x, at = _push_bits(x, at, words, magnitude & ((1 << raw) - 1), raw)
                symbol = magnitude >> raw
                last = np.int64(symbols[table] - 1)
                if symbol >= last:
                    x, at = _push_escape(x, at, words, symbol - last)
                    symbol = last
                low = start[table, symbol]
                freq = np.uint32(start[table, symbol + 1] - low)
                full = np.uint64((x >> np.uint64(32 - PRECISION)) >= np.uint64(freq))
                words[at - 1] = x
                at -= np.int64(full)
                x >>= full << np.uint64(4)
                narrow = np.uint32(x)
                quotient = narrow // freq
                rest = narrow - quotient * freq
                states[lane] = (np.uint64(quotient) << np.uint64(PRECISION)) + np.uint64(rest) + np.uint64(low)
    return at


@kernel(inline="always")
@no_type_check
def _refill(x, at, words):
    """Takes a word where the state is short; without a branch, which would be mispredicted half of the time."""
    short = np.uint64(x < np.uint64(FIRST_STATE))
    word = np.uint64(words[min(at, words.shape[0] - 1)])
    return (x << (short << np.uint64(4))) | (word & (np.uint64(0) - short)), at + np.int64(short)


@kernel(inline="always")
@no_type_check
def _pull_bits(x, at, words, count):
    bits = x & ((np.uint64(1) << np.uint64(count)) - np.uint64(1))
    x, at = _refill(x >> np.uint64(count), at, words)
    return x, at, np.int64(bits)


@kernel()
@no_type_check
def _pull_escape(x, at, words):
    x, at, digits = _pull_bits(x, at, words, 5)
    value = np.int64(1)
    if digits > 16:
        x, at, bits = _pull_bits(x, at, words, digits - 16)
        value = (value << (digits - 16)) | bits
    low = min(digits, np.int64(16))
    if low:
        x, at, bits = _pull_bits(x, at, words, low)
        value = (value << low) | bits
    return x, at, value - 1


@kernel()
@no_type_check
def decode_lanes(k, table_of, step, segment, start, symbols, shift, slots, states, words, at):
    """Inverse of `encode_lanes`, k int32 of `Blank` lanes: the grids follow from the trellis with next states `step`.

    Words, uint16, have a zero behind the last one. Returns the next word, larger than the number of words if the string
    was too short; -1 for an index beyond LARGEST.
    """
    # The slot x mod 2^PRECISION names the symbol, and x goes back to freq floor(x / 2^PRECISION) + slot - low. The
    # lanes of a group do not wait for one another, so that a processor decodes several of them at a time (Giesen).
    lanes, length = k.shape
    machine = np.zeros(INTERLEAVED_LANES, np.int64)
    mask = np.uint64((1 << PRECISION) - 1)
    for group in range(0, lanes, INTERLEAVED_LANES):
        restart = 0
        for t in range(length):
            if t == restart:
                machine[:] = 0
                restart += segment
            for lane in range(min(lanes - group, INTERLEAVED_LANES)):
                x, state = states[lane], machine[lane]
                table = 2 * np.int64(table_of[group + lane, t]) + (state & 1)
                slot = x & mask
                symbol = np.int64(slots[table, slot])
                low = start[table, symbol]
                freq = np.uint64(start[table, symbol + 1] - low)
                x, at = _refill(freq * (x >> np.uint64(PRECISION)) + slot - np.uint64(low), at, words)
                magnitude = symbol
                if symbol == symbols[table] - 1:
                    x, at, extra = _pull_escape(x, at, words)
                    magnitude += extra
                raw = shift[table]
                if raw:
                    x, at, bits = _pull_bits(x, at, words, raw)
                    magnitude = (magnitude << raw) | bits
                if magnitude > LARGEST:
                    return -1
                x, at, sign = _pull_bits(x, at, words, np.int64(magnitude != 0))
                k[group + lane, t] = (magnitude ^ -sign) + sign
                states[lane] = x
                machine[lane] = step[state, magnitude & 1]
    return at


@kernel()
@no_type_check
def bits_of_lanes(k, table_of, grids, lengths, symbols, shift):
    """Ideal code length in bits of lanes whose table symbols take lengths[table, symbol], raw bits and signs too."""
    total = 0.0
    for lane in range(k.shape[0]):
        for t in range(k.shape[1]):
            table = 2 * np.int64(table_of[lane, t]) + grids[lane, t]
            magnitude = np.int64(abs(k[lane, t]))
            symbol, last = magnitude >> shift[table], np.int64(symbols[table] - 1)
            total += shift[table] + np.int64(magnitude != 0)
            if symbol >= last:
                digits = 0
                while (symbol - last + 1) >> (digits + 1):
                    digits += 1
                total += 5 + digits
                symbol = last
            total += lengths[table, symbol]
    return total


class Rans:
    """The entropy coder of this file for the tables of a `Coder`."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder

    def lengths(self) -> Float[np.ndarray, "tables symbols"]:
        """Bits of every symbol of every table."""
        freq = np.diff(self._coder.start.astype(np.int64), axis=1)
        return PRECISION - np.log2(np.maximum(freq, 1))

    def encode(self, parts: Sequence[Lanes]) -> bytes:
        """The bytes of a segment: the states to begin with, then words."""
        c, size = self._coder, sum(part.k.size for part in parts)
        words = np.zeros(_WORD_BOUND * size + 2 * INTERLEAVED_LANES, np.uint16)
        states, at = np.full(INTERLEAVED_LANES, FIRST_STATE, np.uint64), len(words)
        for part in reversed(parts):
            at = encode_lanes(*part, c.start, c.symbols, c.shift, states, words, at)
        return states.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()

    def decode(self, data: bytes, parts: Sequence[Blank], step: Int[np.ndarray, "states 2"]) -> None:
        """Fills the lanes of a segment, `step` the next states of the trellis; raises ValueError for damaged bytes."""
        if len(data) < 4 * INTERLEAVED_LANES:
            raise ValueError("a segment of the codes ends before its states")
        c, at = self._coder, 0
        states = np.frombuffer(data, "<u4", INTERLEAVED_LANES).astype(np.uint64)
        words = np.append(np.frombuffer(data, "<u2", offset=4 * INTERLEAVED_LANES), 0).astype(np.uint16)
        for k, classes, restart in parts:
            at = decode_lanes(
                k, classes, step, restart, c.start, c.symbols, c.shift, c.slots, states, words, at
            )
            if at < 0 or at >= len(words):
                break
        if at != len(words) - 1 or np.any(states != FIRST_STATE):
            raise ValueError("a segment of the codes does not end with its last index")
