"""Entropy coding of lists of smooth integers: a linear prediction, a logistic law around it, rANS.

Lossless audio coders predict and code residuals likewise (Robinson 1994). The prediction of an entry is an integer
linear form of features known to the decoder, the spread of the law follows the errors made so far in the list, and the
frequencies come from correctly rounded decimals and integer products: the same integers on every machine.
"""

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Int

from rdopt.codec.coders.rans import FIRST_STATE
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.transforms.kernels import kernel

ONE = 16  # predictions, features and weights are multiples of 1 / ONE
LEVELS = 80  # spreads: level l has a mean error of 2^((l - LEVEL_OF_ONE) / PER_OCTAVE)
PER_OCTAVE = 8
LEVEL_OF_ONE = 32
MAX_ENTRY = 1 << 20  # entries lie within
WINDOW = 8
_FIXED = 96
_MARGIN = 3


class Laws(NamedTuple):
    """Frequencies for every level and fraction of the prediction.

    Attributes:
        start: (LEVELS, ONE, size) uint32 cumulative frequencies of the symbols -reach..reach+1 and an escape.
        reach: (LEVELS,) int64.
    """

    start: Int[np.ndarray, "levels one size"]
    reach: Int[np.ndarray, " levels"]


class Predictor(NamedTuple):
    """What the kernels need to predict the entries of one list, in units of 1 / ONE^2.

    Attributes:
        known: (n,) int64, the part of the prediction that does not depend on the list itself.
        lags: int64 distances of earlier entries.
        weights: int64 their weights, in 1 / ONE.
        average: weight of the mean of the last WINDOW entries, in 1 / ONE.
        level: of the family of lists.
    """

    known: Int[np.ndarray, " n"]
    lags: Int[np.ndarray, " lags"]
    weights: Int[np.ndarray, " lags"]
    average: int
    level: int


@cache
def laws() -> Laws:
    """The logistic law F(t) = 1 / (1 + q^t) in bins of one, q from the mean error 2 ln2 / -ln q of its level."""
    reach = np.array([int(6 * 2.0 ** ((l - LEVEL_OF_ONE) / PER_OCTAVE)) + _MARGIN for l in range(LEVELS)])
    start = np.full((LEVELS, ONE, 2 * int(reach.max()) + 4), 1 << PRECISION, np.uint32)
    for level in range(LEVELS):
        tails = _tails(level, ONE * (int(reach[level]) + 2))
        for fraction in range(ONE):
            freq = _frequencies(tails, fraction, int(reach[level]))
            start[level, fraction, 0] = 0
            start[level, fraction, 1 : len(freq) + 1] = np.cumsum(freq)
    return Laws(start, reach.astype(np.int64))


def _tails(level: int, count: int) -> list[int]:
    """1 / (1 + q^-k) for k < count in fixed point, q^k the odds at k / ONE."""
    with localcontext(Context(prec=40, rounding=ROUND_HALF_EVEN)):
        octaves = Decimal(level - LEVEL_OF_ONE) / PER_OCTAVE
        mean = (octaves * Decimal(2).ln()).exp()
        q = int((-2 * Decimal(2).ln() / (mean * ONE)).exp() * (1 << _FIXED))
    one, odds, tails = 1 << _FIXED, 1 << _FIXED, []
    for _ in range(count):
        tails.append((odds << _FIXED) // (one + odds))
        odds = (odds * q) >> _FIXED
    return tails


def _frequencies(tails: list[int], fraction: int, reach: int) -> Int[np.ndarray, " symbols"]:
    """Frequencies of -reach..reach+1 about fraction / ONE and of the escape, each at least 1."""
    bounds = [ONE * d - ONE // 2 - fraction for d in range(-reach, reach + 3)]
    below = [tails[-b] if b <= 0 else (1 << _FIXED) - tails[b] for b in bounds]
    mass = [high - low for low, high in pairwise(below)]
    room = (1 << PRECISION) - len(mass) - 1
    freq = [1 + ((room * m) >> _FIXED) for m in mass] + [1]
    freq[int(np.argmax(freq))] += (1 << PRECISION) - sum(freq)
    return np.array(freq, np.int64)


@kernel(inline="always")
@no_type_check
def _predict(x, t, known, lags, weights, average):
    """The prediction of x[t] in 1 / ONE."""
    total = known[t]
    for i in range(lags.shape[0]):
        if t >= lags[i]:
            total += weights[i] * ONE * x[t - lags[i]]
    if average and t:
        count = min(t, WINDOW)
        part = np.int64(0)
        for i in range(1, count + 1):
            part += x[t - i]
        total += average * (ONE * part // count)
    return (total + ONE // 2) // ONE


@kernel(inline="always")
@no_type_check
def _level(energy, level):
    """Two thirds of the way from the family's level to that of the errors so far (energy: mean |error| in 1/256)."""
    # log2 of the energy in integers, the same on every machine: whole octaves from the leading digit, eighths linearly
    # from the three behind it. The last errors say more about the next than the family does, but they are few.
    octave = 0
    while energy >> (octave + 1):
        octave += 1
    local = PER_OCTAVE * (octave - 8) + ((energy << 3) >> octave) - 8 + LEVEL_OF_ONE
    return min(max((level + 2 * local) // 3, 0), LEVELS - 1)


@kernel(inline="always")
@no_type_check
def _update(energy, error):
    """Running mean of |error| (in 1 / ONE) over about 16 entries, in 1/256, never below 1/32."""
    return max(energy + (((abs(error) << 4) - energy) >> 4), 8)


@kernel()
@no_type_check
def symbols_of(x, known, lags, weights, average, level, energy, start, reach, low, freq, escapes):
    """Slots (low, freq) of every entry of a list; returns how many escapes it wrote (zigzag of the difference)."""
    escaped = 0
    for t in range(x.shape[0]):
        mu = _predict(x, t, known, lags, weights, average)
        base, fraction = mu // ONE, mu % ONE
        row = _level(energy, level)
        d = x[t] - base
        symbol = d + reach[row]
        if symbol < 0 or symbol > 2 * reach[row] + 1:
            symbol = 2 * reach[row] + 2
            escapes[escaped] = 2 * d if d >= 0 else -2 * d - 1
            escaped += 1
        low[t] = start[row, fraction, symbol]
        freq[t] = start[row, fraction, symbol + 1] - low[t]
        energy = _update(energy, ONE * x[t] - mu)
    return escaped


@kernel()
@no_type_check
def encode_slots(low, freq, words):
    """rANS over slots in reverse order; fills words downwards and returns (state, first used word)."""
    x, at = np.uint64(FIRST_STATE), words.shape[0]
    for t in range(low.shape[0] - 1, -1, -1):
        f = np.uint64(freq[t])
        if x >= f << np.uint64(32 - PRECISION):
            at -= 1
            words[at] = x & np.uint64(0xFFFF)
            x >>= np.uint64(16)
        x = ((x // f) << np.uint64(PRECISION)) + x % f + np.uint64(low[t])
    return x, at


@kernel()
@no_type_check
def decode_list(x, known, lags, weights, average, level, energy, start, reach, state, words, at, escapes, used):
    """Inverse of `symbols_of` and `encode_slots` for one list; returns (state, next word, next escape).

    The next word is -1 where the words cannot be those of a list.
    """
    mask = np.uint64((1 << PRECISION) - 1)
    for t in range(x.shape[0]):
        mu = _predict(x, t, known, lags, weights, average)
        base, fraction = mu // ONE, mu % ONE
        row = _level(energy, level)
        slot = state & mask
        first, last = 0, 2 * reach[row] + 2
        while first < last:  # the symbol whose slots hold this one
            middle = (first + last + 1) // 2
            if np.uint64(start[row, fraction, middle]) <= slot:
                first = middle
            else:
                last = middle - 1
        low = np.uint64(start[row, fraction, first])
        freq = np.uint64(start[row, fraction, first + 1]) - low
        state = freq * (state >> np.uint64(PRECISION)) + slot - low
        if state < np.uint64(FIRST_STATE):
            if at >= words.shape[0]:
                return state, -1, used
            state = (state << np.uint64(16)) | np.uint64(words[at])
            at += 1
        d = first - reach[row]
        if first == 2 * reach[row] + 2:
            if used >= escapes.shape[0]:
                return state, -1, used
            code = escapes[used]
            d = code // 2 if code % 2 == 0 else -(code + 1) // 2
            used += 1
        x[t] = base + d
        if abs(x[t]) > MAX_ENTRY:
            return state, -1, used
        energy = _update(energy, ONE * x[t] - mu)
    return state, at, used


def first_energy(level: int) -> int:
    """The mean error of a family's level, in 1/256, in whole octaves and eighths between them."""
    octave, eighth = divmod(level - LEVEL_OF_ONE, PER_OCTAVE)
    return max(((8 + eighth) << (octave + 8)) >> 3, 8) if octave >= -8 else 8


def level_of(mean_error: float) -> int:
    """The nearest level of a mean error."""
    level = np.rint(PER_OCTAVE * np.log2(max(mean_error, 1e-6))) + LEVEL_OF_ONE
    return int(np.clip(level, 0, LEVELS - 1))
