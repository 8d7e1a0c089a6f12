"""Tables of trellis indices from a few numbers: a class names the spread, an octave of spreads the shape.

The values of a class (in steps) are modelled as a blend of a Gaussian and a Laplace density. On grid 0 index k takes
the bin (2k - 1, 2k + 1), on grid 1 (2k - 2, 2k), except that the zero bin ends at `zero`, which the trellis and a
rate term move. Frequencies are formed with correctly rounded decimal arithmetic, not with a libm, so that encoder
and decoder get the same integers on every machine.
"""

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import erfc

from rdopt.codec.families import blended_tail
from rdopt.codec.rans import PRECISION

SCALES, ZEROS, BLENDS = 24, 16, 9
OCTAVES = (-4, 6)  # spreads outside share the shapes of the first and last octave
_DIGITS = 25
_FINE = 5  # octaves of spread from which the low bits of an index are coded raw
_REACH = 7  # spreads covered by a table before its escape
_MOVES = [move for move in product((-1, 0, 1), repeat=3) if any(move)]
_AXES = [move for move in _MOVES if sum(map(abs, move)) == 1]


class Shape(NamedTuple):
    """The shape of the tables of one octave of spreads on one grid.

    Attributes:
        scale: the spread is multiplied by 2^((scale - 15) / 16).
        zero: the zero bin ends at (zero + 1) / 8 of a step on grid 0, / 16 on grid 1.
        blend: the Laplace density has weight blend / 8.
    """

    scale: int = 15
    zero: int = 6
    blend: int = 1


def octave_of(log2_spread: tuple[int, int]) -> int:
    """Which shapes a class uses: floor(log2 spread), clipped to OCTAVES."""
    return max(OCTAVES[0], min(OCTAVES[1], log2_spread[0] // log2_spread[1]))


def raw_bits(log2_spread: tuple[int, int]) -> int:
    """Low bits of an index that are coded raw: at spreads of many steps they are as good as uniform."""
    return max(0, log2_spread[0] // log2_spread[1] - _FINE)


def table_size(log2_spread: tuple[int, int]) -> int:
    """Symbols of a table before its escape."""
    octave = log2_spread[0] // log2_spread[1] + 1 - raw_bits(log2_spread)
    return max(2, (_REACH << max(octave, 0)) >> (1 + max(-octave, 0)))


@cache
def table(shape: Shape, grid: int, log2_spread: tuple[int, int]) -> Int[np.ndarray, " symbols"]:
    """Frequencies of |k| >> raw_bits and of the escape, summing to 2^PRECISION, each at least 1.

    Args:
        shape: of the class's octave.
        grid: 0 or 1.
        log2_spread: of the class, an exact fraction (numerator, denominator).
    """
    size, raw = table_size(log2_spread), raw_bits(log2_spread)
    room = (1 << PRECISION) - (size + 1)
    with localcontext(Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN)):
        octaves = Decimal(log2_spread[0]) / log2_spread[1] + Decimal(shape.scale - 15) / 16
        spread = (octaves * Decimal(2).ln()).exp()
        zero = Decimal(shape.zero + 1) / (8 if grid == 0 else 16)
        bounds = [zero if k == 1 else Decimal(2 * k - 1 - grid) for k in range(1 << raw, (size + 1) << raw, 1 << raw)]
        tails = [blended_tail(b / spread, Decimal(shape.blend) / (BLENDS - 1)) for b in bounds]
        masses = [1 - tails[0], *(tails[k - 1] - tails[k] for k in range(1, size)), tails[-1]]
        freq = [1 + int(room * max(m, Decimal(0))) for m in masses]
    freq[int(np.argmax(freq))] += (1 << PRECISION) - sum(freq)
    return np.array(freq, np.int64)


def masses(
    shape: Shape,
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    size: int,
) -> Float[np.ndarray, "classes size"]:
    """Probabilities of |k| >> raw = 0..size-1 (the last one of all above), float64: to choose, never to code."""
    s = spread[:, None] * 2.0 ** ((shape.scale - 15) / 16)
    bounds = 2.0 * (np.arange(1, size)[None, :] << raw[:, None]) - 1 - grid
    bounds[raw == 0, 0] = (shape.zero + 1) / (8 if grid == 0 else 16)
    t, w = bounds / s, shape.blend / (BLENDS - 1)
    tail = w * np.exp(-t * np.sqrt(2)) + (1 - w) * erfc(t / np.sqrt(2))
    ends = np.ones((len(spread), 1))
    return np.maximum(np.concatenate([ends, tail], axis=1) - np.concatenate([tail, 0 * ends], axis=1), 0)


def fit_shape(
    start: Shape,
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    counts: Float[np.ndarray, "classes size"],
    stride: int = 4,
) -> tuple[Shape, float]:
    """The shape that codes these counts in the fewest bits, and the bits; pattern search from `start`.

    Strides from `stride` down to 2 along single fields, then 1 along the diagonals too, as the fields trade against
    one another.
    """

    def bits(shape: Shape) -> float:
        p = masses(shape, grid, spread, raw, counts.shape[1]) + 2.0**-PRECISION
        return -float(np.sum(counts * np.log2(p)))

    best, least = start, bits(start)
    while stride:
        moved = False
        for move in _MOVES if stride == 1 else _AXES:
            trial = Shape(*(a + stride * b for a, b in zip(best, move, strict=True)))
            inside = 0 <= trial.scale < SCALES and 0 <= trial.zero < ZEROS and 0 <= trial.blend < BLENDS
            if inside and (found := bits(trial)) < least:
                best, least, moved = trial, found, True
        if not moved:
            stride //= 2
    return best, least
