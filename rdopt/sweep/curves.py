"""Curves in the rate-distortion plane: Pareto fronts, bits saved at equal KL, BD-rate.

A gain "at r bits" is r minus the arm's bits/weight at the KL that the baseline has at r, monotone cubic (pchip) in
log KL, without extrapolation; its standard error comes from a paired bootstrap over sequences.
"""

import math
from typing import Any, NamedTuple

import bjontegaard
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.interpolate import PchipInterpolator

MIN_POINTS, MIN_OVERLAP = 4, 0.75


class Curve(NamedTuple):
    """One arm: bits/weight of its points, and the KL sum of every test sequence at each point.

    Attributes:
        bpw: rising.
        kl_sums: nats, per point and sequence.
        counts: scored tokens of each sequence.
    """

    bpw: Float[np.ndarray, " points"]
    kl_sums: Float[np.ndarray, "points sequences"]
    counts: Int[np.ndarray, " sequences"]

    def kl(self, chosen: Int[np.ndarray, " n"] | None = None) -> Float[np.ndarray, " points"]:
        """Mean KL of each point, nats/token, over all or the chosen sequences."""
        if chosen is None:
            return self.kl_sums.sum(axis=1) / self.counts.sum()
        return self.kl_sums[:, chosen].sum(axis=1) / self.counts[chosen].sum()


def pareto(bpw: Float[np.ndarray, " n"], kl: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which points no other one beats or equals in both bits and KL."""
    better = (bpw[None, :] <= bpw[:, None]) & (kl[None, :] <= kl[:, None])
    strictly = (bpw[None, :] < bpw[:, None]) | (kl[None, :] < kl[:, None])
    return ~np.any(better & strictly, axis=1)


def saved_bits(baseline: tuple[np.ndarray, np.ndarray], arm: tuple[np.ndarray, np.ndarray], at: float) -> float:
    """Bits/weight that the arm saves against the baseline at `at` bits, at equal KL; nan out of range.

    Baseline and arm are (bpw, kl) of points, of which those on the Pareto front count.
    """
    (x0, y0), (x1, y1) = (_front(*curve) for curve in (baseline, arm))
    if len(x0) < 2 or len(x1) < 2 or not x0[0] <= at <= x0[-1]:
        return math.nan
    level = float(PchipInterpolator(x0, np.log(y0))(at))
    if not math.log(y1[-1]) <= level <= math.log(y1[0]):
        return math.nan
    return at - float(PchipInterpolator(np.log(y1[::-1]), x1[::-1])(level))


def _front(bpw: np.ndarray, kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = pareto(bpw, kl) & (kl > 0)
    order = np.argsort(bpw[keep])
    return bpw[keep][order], kl[keep][order]


def saved_bits_with_error(
    baseline: Curve, arm: Curve, at: float, *, seed: int = 0, resamples: int = 400
) -> tuple[float, float]:
    """`saved_bits` and its standard error by a paired bootstrap over sequences (Efron 1979)."""
    gain = saved_bits((baseline.bpw, baseline.kl()), (arm.bpw, arm.kl()), at)
    if math.isnan(gain):
        return gain, math.nan
    rng, n, draws = np.random.default_rng(seed), len(arm.counts), []
    for _ in range(resamples):
        chosen = rng.integers(0, n, n)
        draws.append(saved_bits((baseline.bpw, baseline.kl(chosen)), (arm.bpw, arm.kl(chosen)), at))
    return gain, float(np.nanstd(draws, ddof=1))


def bd_rate(baseline: Curve, arm: Curve, noise_floor: float) -> float:
    """BD-rate in percent (negative: the arm needs fewer bits), by the bjontegaard package with pchip.

    Quality is -10 log10 KL of Pareto points above the noise floor; nan with fewer than four of them or when
    the curves share less than three quarters of the range that they cover together (the package's measure).
    """
    sides = []
    for curve in (baseline, arm):
        x, y = _front(curve.bpw, curve.kl())
        x, y = x[y > noise_floor], -10 * np.log10(y[y > noise_floor])
        if len(x) < MIN_POINTS:
            return math.nan
        sides.append((x, y))
    (x0, y0), (x1, y1) = sides
    shared = min(y0[-1], y1[-1]) - max(y0[0], y1[0])
    if shared < MIN_OVERLAP * (max(y0[-1], y1[-1]) - min(y0[0], y1[0])):
        return math.nan
    percent: Any = bjontegaard.bd_rate(x0, y0, x1, y1, method="pchip", require_matching_points=False)
    return float(percent)
