"""Which low-rank component stands beside the codes of a matrix: the one that saves most bits at equal distortion.

The rank is chosen by total bits at one slope, and is zero where the component does not pay; what a component is and how
a file holds it stands in `rdopt.codec.streams.structured`.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.codec.grids.uniform import UNIFORM_SLOPE
from rdopt.codec.streams.structured import MAX_FACTOR, SHIFTS, Structured, pack_structured, product
from rdopt.rate.operational import exact_rate_distortion

RANKS = (1, 2, 4, 8, 16)
_KNOTS_PER_OCTAVE, _LOG2_LIMITS = 64, (-8, 8)
_ITERATIONS = 3
_SMALLEST = 1e-12  # squared steps
# Share of the estimated gain that real codes keep. What a component takes away first are heavy tails, which cost an
# entropy coder less than the Gaussian of the estimate: 0.75 of it was found at 2 bits/weight, 0.9 at 3.
_KEPT = 0.75
_LAW_BITS = 20  # what describes the law of a factor, about
_LEAST_FACTOR_BITS = 1.0  # a number of a factor that pays costs at least this


class ComponentGain(NamedTuple):
    """What a structured component is worth, in bits of one matrix.

    Attributes:
        before: estimated bits of W without it, distortion at the common slope included.
        after: estimated bits of r.
        side: bits of f.
    """

    before: float
    after: float
    side: int

    @property
    def saved(self) -> float:
        """Bits expected to be saved at equal distortion."""
        return _KEPT * (self.before - self.after) - self.side


@cache
def _cost_table() -> Float[np.ndarray, " knots"]:
    """Rate + distortion over the slope, in bits, of a Gaussian entry; log2 of its spread runs over _LOG2_LIMITS."""
    low, high = _LOG2_LIMITS
    coarse, fine = (np.linspace(low, high, (high - low) * n + 1) for n in (_KNOTS_PER_OCTAVE // 8, _KNOTS_PER_OCTAVE))
    curve = np.array([exact_rate_distortion(2.0**-s, "gaussian") for s in coarse])
    # The logarithm is near linear at low rate, so the interpolation is close there too.
    return np.exp2(np.interp(fine, coarse, np.log2(curve[:, 0] + curve[:, 1] * 4.0**coarse / UNIFORM_SLOPE)))


def log2_spreads(x: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
    """log2(rho_i kappa_j) of the Gaussian of rank-1 spreads under which x is likeliest.

    Unlike those of `codec.tables.classes` the scales have no floor of half a count: x may lie far below a step.
    """
    power = np.square(x)
    kappa2 = np.maximum(power.mean(axis=0), _SMALLEST)
    rho2 = np.ones(len(x))
    for _ in range(_ITERATIONS):
        rho2 = np.maximum(power @ (1 / kappa2) / x.shape[1], _SMALLEST)
        kappa2 = np.maximum((1 / rho2) @ power / x.shape[0], _SMALLEST)
    return (np.log2(rho2)[:, None] + np.log2(kappa2)[None, :]) / 2


def coded_cost(x: Float[np.ndarray, "out in"]) -> float:
    """Bits of a matrix in steps under a rank-1 model of its spreads, distortion included: sum r + d s^2 / slope.

    The rows and columns of x have spread rho_i kappa_j (maximum likelihood of a Gaussian); r and d are the
    operational rate and distortion of entropy-coded uniform quantization with step one.
    """
    log2_spread = log2_spreads(x)
    low, high = _LOG2_LIMITS
    knots = np.rint((np.clip(log2_spread, low, high) - low) * _KNOTS_PER_OCTAVE).astype(np.int32)
    return float(_cost_table()[knots].sum() + np.maximum(log2_spread - high, 0).sum())


def fit_structured(
    W: Float[np.ndarray, "out in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    width: float = 1.0,
    ranks: Sequence[int] = RANKS,
) -> tuple[Structured, ComponentGain] | None:
    """The low-rank component that saves most bits at equal distortion, or None if none does.

    Args:
        W: weights.
        row, col: step factors; an entry's value is W_ij / (row_i col_j).
        width: step of the scalar grid of equal distortion, in these steps (1 / STEP for the trellis).
        ranks: to try.
    """
    x = np.asarray(W, np.float64) / np.outer(row, col)
    U, s, V = np.linalg.svd(x, full_matrices=False)
    before = coded_cost(x / width)
    best, least = None, _KEPT * before
    for rank in (k for k in ranks if k <= len(s)):
        u, v = U[:, :rank] * s[:rank], V[:rank].T
        if _KEPT * coded_cost((x - u @ v.T) / width) + rank * sum(x.shape) * _LEAST_FACTOR_BITS >= least:
            continue
        for shift in SHIFTS:
            f = rounded_factors(u, v, shift)
            total = _KEPT * coded_cost((x - product(f) / 2.0**shift) / width) + factor_bits(f)
            if total < least and max(np.abs(f.left).max(), np.abs(f.right).max()) <= MAX_FACTOR:
                best, least = f, total
    if best is None:
        return None
    after = coded_cost((x - product(best) / 2.0**best.shift) / width)
    gain = ComponentGain(before, after, 8 * len(pack_structured({(0, ""): best}, {(0, ""): W.shape})))
    return (best, gain) if gain.saved > 0 else None


def rounded_factors(u: Float[np.ndarray, "out rank"], v: Float[np.ndarray, "in rank"], shift: int) -> Structured:
    """Integers t u and 2^shift v / t, with t such that both roundings add the same error to f."""
    power_u, power_v = (np.maximum(np.mean(x**2, axis=0), _SMALLEST) for x in (u, v))
    t = np.sqrt(2.0**shift * np.sqrt(power_v / power_u))
    left, right = np.rint(u * t).astype(np.int64), np.rint(v * 2.0**shift / t).astype(np.int64)
    return Structured(left, right, shift)


def factor_bits(f: Structured) -> float:
    """About the bits of the factors: entropies of Gaussians in steps of one."""
    bits = 0.0
    for z in (*f.left.T, *f.right.T):
        deviation = np.sqrt(np.mean(np.square(z, dtype=np.float64)) + 1 / 12)
        bits += len(z) * max(0.25, np.log2(deviation * np.sqrt(2 * np.pi * np.e))) + _LAW_BITS
    return float(bits)
