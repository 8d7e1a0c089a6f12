"""Bits of a matrix at a given squared error, by the operational curves of entropy-coded uniform quantization.

Its entries are Gaussian with the likeliest spreads rho_i kappa_j, the encoder's model of classes. Only how many entries
have which spread counts, so that rate and error at any step are a sum over the bins of a histogram.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from rdopt.encode.structured import log2_spreads
from rdopt.rate.operational import exact_rate_distortion

_LOW, _HIGH, _PER_OCTAVE = -16, 16, 64  # log2 of a spread, in steps
_BINS = (_HIGH - _LOW) * _PER_OCTAVE + 1
_CENTRES = _LOW + np.arange(_BINS) / _PER_OCTAVE
_FINEST, _COARSEST = -9, 7  # log2 of step over spread; beyond them the curves are lines
_TOLERANCE = 1e-9  # octaves


@cache
def _curves() -> tuple[Float[np.ndarray, " knots"], Float[np.ndarray, " knots"], Float[np.ndarray, " knots"]]:
    """log2(step / spread), bits, and error as a share of the variance."""
    knots = np.linspace(_FINEST, _COARSEST, (_COARSEST - _FINEST) * _PER_OCTAVE + 1)
    curve = np.array([exact_rate_distortion(2.0**k, "gaussian") for k in knots])
    return knots, curve[:, 0], curve[:, 1]


def spread_histogram(x: Float[np.ndarray, "out in"]) -> Float[np.ndarray, " bins"]:
    """Entries per bin of log2 spread, each shared by its two neighbouring bins."""
    place = (np.clip(log2_spreads(x), _LOW, _HIGH - 1 / _PER_OCTAVE) - _LOW).ravel() * _PER_OCTAVE
    left = np.minimum(place.astype(np.int64), _BINS - 2)
    right = np.bincount(left + 1, place - left, _BINS)
    return np.bincount(left, 1 - (place - left), _BINS) + right


def rate_at(counts: Float[np.ndarray, " bins"], log2_step: float) -> float:
    """Bits at a step."""
    knots, rate, _ = _curves()
    held = np.flatnonzero(counts)
    ratio = log2_step - _CENTRES[held]
    return float(counts[held] @ (np.interp(ratio, knots, rate) + np.maximum(_FINEST - ratio, 0)))


def error_at(counts: Float[np.ndarray, " bins"], log2_step: float) -> float:
    """Squared error at a step, in the units of the matrix squared."""
    knots, _, share = _curves()
    held = np.flatnonzero(counts)
    ratio = log2_step - _CENTRES[held]
    below = np.minimum(ratio - _FINEST, 0)
    return float(counts[held] @ (4.0 ** (_CENTRES[held] + below) * np.interp(ratio, knots, share)))


def bits_at_error(x: Float[np.ndarray, "out in"], error: float) -> float:
    """Bits of x at a total squared error; none where zeros already err less.

    Args:
        x: a matrix whose spreads lie within 16 octaves of one.
        error: > 0, summed over the entries.
    """
    counts = spread_histogram(x)
    low, high = _LOW + _FINEST, _HIGH + _COARSEST
    if error_at(counts, high) <= error:
        return 0.0
    return rate_at(counts, _root(lambda s: np.log2(error_at(counts, s) / error), low, high))


def step_for_bits(counts: Float[np.ndarray, " bins"], bits: float) -> float:
    """The step at which the entries take so many bits in total, in the units of the matrix."""
    low, high = _LOW + _FINEST, _HIGH + _COARSEST
    return 2.0 ** _root(lambda s: rate_at(counts, s) - bits, low, high)


def gaussian_bits(z: Float[np.ndarray, " count"]) -> float:
    """Bits of numbers rounded to integers under a Gaussian of their mean square."""
    power = float(np.mean(np.square(z))) if z.size else 0.0
    if power == 0:
        return 0.0
    knots, rate, _ = _curves()
    ratio = -np.log2(power) / 2
    return z.size * float(np.interp(ratio, knots, rate) + max(_FINEST - ratio, 0))


def _root(of: Callable[[float], float], low: float, high: float) -> float:
    found: Any = brentq(of, low, high, xtol=_TOLERANCE)  # scipy's stubs also know a tuple
    return float(found)
