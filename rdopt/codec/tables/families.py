"""Tables that need no description: the class already names the spread, a few bits per file name the shape.

The magnitudes of a class of spread s are modelled as a blend of a Gaussian and a Laplace density on bins of width
one. Frequencies are formed with correctly rounded decimal arithmetic (General Decimal Arithmetic, Cowlishaw), not
with a libm, so that encoder and decoder get the same integers on every machine.
"""

from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import erfc

from rdopt.codec.tables.frequencies import PRECISION

UNIFORM_BLENDS, UNIFORM_SCALES, MAX_DERIVED = 8, 9, 2048
_DIGITS = 25


class UniformShape(NamedTuple):
    """The shape of all derived tables of a file.

    Attributes:
        blend: the Laplace density has weight blend / UNIFORM_BLENDS.
        scale: spreads are multiplied by 2^((scale - UNIFORM_SCALES // 2) / 16).
    """

    blend: int
    scale: int


def shapes() -> Iterator[UniformShape]:
    """All shapes."""
    for blend in range(UNIFORM_BLENDS):
        for scale in range(UNIFORM_SCALES):
            yield UniformShape(blend, scale)


def middle(key: int, precision: int, width: int) -> tuple[int, int]:
    """log2 of the spread in the middle of a class, as an exact fraction (numerator, denominator)."""
    return 2 * key * width + width - 1, 2 * max(precision, 1)


@cache
def derived_table(shape: UniformShape, log2_spread: tuple[int, int], size: int) -> Int[np.ndarray, " size"]:
    """Frequencies of |z| = 0..size-1 of one class, summing to 2^PRECISION, each at least 1.

    Args:
        shape: of the file.
        log2_spread: of the class, as `middle` gives it.
        size: 1 + the largest magnitude, at most MAX_DERIVED.
    """
    if not 1 <= size <= MAX_DERIVED:
        raise ValueError(f"a derived table of {size} symbols, the limit is {MAX_DERIVED}")
    total = (1 << PRECISION) - size
    with localcontext(Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN)):
        octaves = Decimal(log2_spread[0]) / log2_spread[1] + Decimal(shape.scale - UNIFORM_SCALES // 2) / 16
        s = (octaves * Decimal(2).ln()).exp()
        blend = Decimal(shape.blend) / UNIFORM_BLENDS
        tails = [blended_tail((Decimal(k) + Decimal("0.5")) / s, blend) for k in range(size)]
        masses = [1 - tails[0], *(tails[k - 1] - tails[k] for k in range(1, size))]
        freq = [1 + int(total * max(m, Decimal(0)) / (1 - tails[-1])) for m in masses]
    freq[0] += (1 << PRECISION) - sum(freq)
    return np.array(freq, np.int64)


def blended_tail(t: Decimal, blend: Decimal) -> Decimal:
    """P(|x| > t) of a unit-variance blend with weight `blend` on the Laplace density."""
    laplace = (-t * Decimal(2).sqrt()).exp()
    return blend * laplace + (1 - blend) * _gaussian_tail(t)


def _gaussian_tail(t: Decimal) -> Decimal:
    """P(|x| > t) of a standard normal.

    Abramowitz and Stegun 7.1.26 (error below 2e-7, far under one part in 2^PRECISION): a polynomial in
    1 / (1 + p t) times exp(-t^2 / 2).
    """
    x = t / Decimal(2).sqrt()
    u = 1 / (1 + Decimal("0.3275911") * x)
    a = [Decimal(c) for c in ("0.254829592", "-0.284496736", "1.421413741", "-1.453152027", "1.061405429")]
    polynomial = u * (a[0] + u * (a[1] + u * (a[2] + u * (a[3] + u * a[4]))))
    return polynomial * (-x * x).exp()


def approximate_bits(
    scale: int, spread: Float[np.ndarray, " classes"], counts: Float[np.ndarray, "classes size"]
) -> Float[np.ndarray, "blends classes"]:
    """Code length in bits of these counts of |z| under the derived tables of every blend, per class, without signs.

    In float64, for choosing a shape; never for coding. The masses of a blend are those of its densities, blended.
    """
    t = (np.arange(counts.shape[1]) + 0.5) / (spread[:, None] * 2.0 ** ((scale - UNIFORM_SCALES // 2) / 16))
    where = np.nonzero(counts)
    tails = np.exp(-t * np.sqrt(2)), erfc(t / np.sqrt(2))
    laplace, gaussian = (-np.diff(tail, axis=1, prepend=1.0)[where] for tail in tails)
    weight = np.arange(UNIFORM_BLENDS)[:, None] / UNIFORM_BLENDS
    mass = weight * laplace + (1 - weight) * gaussian
    bits = -counts[where] * np.log2(np.maximum(mass, 0) + 2.0**-PRECISION)
    return np.stack([np.bincount(where[0], each, len(spread)) for each in bits])
