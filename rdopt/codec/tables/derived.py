"""Tables that need no description: frequencies of the bins of a blend of a Gaussian and a Laplace density.

A class of entries names the spread, a few numbers of the file the shape. The frequencies are formed with correctly
rounded decimal arithmetic (General Decimal Arithmetic, Cowlishaw), not with a libm, so that encoder and decoder get
the same integers on every machine. Shapes are chosen with float64 tails, which are much faster.
"""

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.tables.frequencies import PRECISION

BLEND_UNIT = 8  # a blend is the weight of the Laplace density in eighths
SCALE_UNIT = 16  # a scale multiplies spreads in sixteenths of an octave
_DIGITS = 25


def derived_frequencies(
    bounds: Sequence[Decimal], log2_spread: tuple[int, int], scale: int, blend: int, *, escape: bool
) -> Int[np.ndarray, " symbols"]:
    """Frequencies of the bins of |x|, each at least 1, summing to 2^PRECISION.

    What rounding down leaves of the total goes to the zero bin, with an escape to the most frequent symbol.

    Args:
        bounds: the upper ends of the bins, ascending.
        log2_spread: of the class, an exact fraction (numerator, denominator).
        scale: the spread is multiplied by 2^(scale / SCALE_UNIT).
        blend: the Laplace density has weight blend / BLEND_UNIT.
        escape: whether all above the last bound is a symbol of its own; else the bins share the whole.
    """
    room = (1 << PRECISION) - len(bounds) - escape
    with localcontext(Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN)):
        octaves = Decimal(log2_spread[0]) / log2_spread[1] + Decimal(scale) / SCALE_UNIT
        spread, weight = (octaves * Decimal(2).ln()).exp(), Decimal(blend) / BLEND_UNIT
        tails = [_blended_tail(bound / spread, weight) for bound in bounds]
        masses = [1 - tails[0], *(tails[k - 1] - tails[k] for k in range(1, len(tails)))]
        whole = Decimal(1) if escape else 1 - tails[-1]
        masses += [tails[-1]] * escape
        freq = np.array([1 + int(room * max(m, Decimal(0)) / whole) for m in masses], np.int64)
    freq[np.argmax(freq) if escape else 0] += (1 << PRECISION) - freq.sum()
    return freq


def _blended_tail(t: Decimal, weight: Decimal) -> Decimal:
    """P(|x| > t) of a unit-variance blend with this weight on the Laplace density."""
    laplace = (-t * Decimal(2).sqrt()).exp()
    return weight * laplace + (1 - weight) * _gaussian_tail(t)


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


def approximate_tails(
    t: Float[np.ndarray, "*shape"],
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """P(|x| > t) of the (Laplace, Gaussian) density of unit variance in float64: to choose a shape, never to code."""
    from scipy.special import erfc  # here, since a decoder chooses nothing and need not load scipy

    return np.exp(-t * np.sqrt(2)), erfc(t / np.sqrt(2))
