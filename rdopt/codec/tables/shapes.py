"""Tables of trellis indices from a few numbers: a class names the spread, an octave of spreads the shape.

The values of a class (in steps) are modelled as a blend of a Gaussian and a Laplace density. On grid 0 index k takes
the bin (2k - 1, 2k + 1), on grid 1 (2k - 2, 2k), except that the zero bin ends at `zero`, which the trellis and a
rate term move. Frequencies are formed with correctly rounded decimal arithmetic, not with a libm, so that encoder
and decoder get the same integers on every machine.
"""

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import erfc

from rdopt.codec.tables.families import blended_tail
from rdopt.codec.tables.frequencies import PRECISION

TRELLIS_SCALES, TRELLIS_ZEROS, TRELLIS_BLENDS = 24, 16, 9
OCTAVES = (-4, 6)  # spreads outside share the shapes of the first and last octave
_DIGITS = 25
_FINE = 5  # octaves of spread from which the low bits of an index are coded raw
_REACH = 7  # spreads covered by a table before its escape
_MOVES = [move for move in product((-1, 0, 1), repeat=3) if any(move)]
_AXES = [move for move in _MOVES if sum(map(abs, move)) == 1]


class TrellisShape(NamedTuple):
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
def table(shape: TrellisShape, grid: int, log2_spread: tuple[int, int]) -> Int[np.ndarray, " symbols"]:
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
        tails = [blended_tail(b / spread, Decimal(shape.blend) / (TRELLIS_BLENDS - 1)) for b in bounds]
        masses = [1 - tails[0], *(tails[k - 1] - tails[k] for k in range(1, size)), tails[-1]]
        freq = [1 + int(room * max(m, Decimal(0))) for m in masses]
    freq[int(np.argmax(freq))] += (1 << PRECISION) - sum(freq)
    return np.array(freq, np.int64)


def masses(
    shape: TrellisShape,
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    size: int,
) -> Float[np.ndarray, "classes size"]:
    """Probabilities of |k| >> raw = 0..size-1 (the last one of all above), float64: to choose, never to code."""
    return _masses([shape], grid, spread, raw, size)[0]


def _masses(
    shapes: Sequence[tuple[int, int, int]],
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    size: int,
) -> Float[np.ndarray, "shapes classes size"]:
    """`masses` of several shapes at once."""
    scale, zero, blend = (x[:, None, None] for x in np.array(shapes).T)
    bounds = np.repeat(2.0 * (np.arange(1, size) << raw[:, None])[None] - 1 - grid, len(shapes), axis=0)
    bounds[:, raw == 0, 0] = (zero[:, 0] + 1) / (8 if grid == 0 else 16)
    t, w = bounds / (spread[:, None] * 2.0 ** ((scale - 15) / 16)), blend / (TRELLIS_BLENDS - 1)
    tail = w * np.exp(-t * np.sqrt(2)) + (1 - w) * erfc(t / np.sqrt(2))
    found = np.empty((*tail.shape[:2], size))
    found[..., 0], found[..., 1:] = 1, tail
    found[..., :-1] -= tail
    return np.maximum(found, 0, out=found)


def fit_shape(
    start: TrellisShape,
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    counts: Float[np.ndarray, "classes size"],
    stride: int = 4,
) -> tuple[TrellisShape, float]:
    """The shape that codes these counts in the fewest bits, and the bits; pattern search from `start`.

    Strides from `stride` down to 2 along single fields, then 1 along the diagonals too, as the fields trade against
    one another. The lengths of all moves that are still to be tried from a shape are found at once, most tables being
    so small that the calls take the time.
    """
    known: dict[tuple[int, int, int], float] = {}

    def measure(shapes: Sequence[tuple[int, int, int]]) -> None:
        new = [x for x in shapes if x not in known]
        p = _masses(new, grid, spread, raw, counts.shape[1]) + 2.0**-PRECISION
        bits = -np.sum(counts * np.log2(p, out=p), axis=(1, 2))
        known.update(zip(new, bits.tolist(), strict=True))

    best = (start.scale, start.zero, start.blend)
    measure([best])
    while stride:
        moved, moves = False, _MOVES if stride == 1 else _AXES
        for number, move in enumerate(moves):
            trial = (best[0] + stride * move[0], best[1] + stride * move[1], best[2] + stride * move[2])
            if trial not in known:
                if not is_shape(*trial):
                    continue
                measure(_neighbours(best, moves[number:], stride))
            if known[trial] < known[best]:
                best, moved = trial, True
        if not moved:
            stride //= 2
    return TrellisShape(*best), known[best]


def _neighbours(
    shape: tuple[int, int, int], moves: Sequence[tuple[int, ...]], stride: int
) -> list[tuple[int, int, int]]:
    """The shapes that the moves lead to, as far as there are such."""
    scale, zero, blend = shape
    found = [(scale + stride * a, zero + stride * b, blend + stride * c) for a, b, c in moves]
    return [x for x in found if is_shape(*x)]


def is_shape(scale: int, zero: int, blend: int) -> bool:
    """Whether there is a shape of these numbers."""
    return 0 <= scale < TRELLIS_SCALES and 0 <= zero < TRELLIS_ZEROS and 0 <= blend < TRELLIS_BLENDS
