"""Rate and distortion of entropy-coded uniform scalar quantization of a unit-variance density, as curves.

x is rounded to k delta and the index coded at its entropy (Gish and Pierce 1968). Tabulated once in float64
on a fine grid of log2 delta and read through a cubic spline: r -> h - log2 delta and d -> delta^2 / 12 for
small steps, r -> 0 and d -> 1 for large ones.
"""

from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.interpolate import CubicSpline
from scipy.special import ndtr

from rdopt.config.schema import Density
from rdopt.rate.densities import entropy_bits
from rdopt.rate.trellis_curve import measured_rate_distortion

# Entropy-coded scalar quantization of a density, or Gaussian weights in the trellis.
Curve = Density | Literal["trellis"]

LOG2_STEP_MIN, LOG2_STEP_MAX, KNOTS_PER_OCTAVE = -8, 6, 32
_SUPPORT = 45.0  # standard deviations; the Laplace tail beyond is below 1e-27


class UnitCurves(NamedTuple):
    """Rate in bits per entry and distortion as a share of the variance."""

    rate: Float[Array, "..."]
    distortion: Float[Array, "..."]


def upper_tail(t: Float[np.ndarray, "..."], density: Density) -> tuple[np.ndarray, np.ndarray]:
    """(P(x > t), E[x; x > t]) of the unit-variance density, for t >= 0, in float64."""
    if density == "gaussian":
        return ndtr(-t), np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    if density == "laplace":
        b = np.sqrt(0.5)
        mass = np.exp(-t / b) / 2
        return mass, (t + b) * mass
    s = np.sqrt(3.0) / np.pi
    mass = 1 / (1 + np.exp(t / s))
    return mass, t * mass + s * np.log1p(np.exp(-t / s))


def exact_rate_distortion(step: float, density: Density) -> tuple[float, float]:
    """Entropy in bits of the rounded index and mean squared error, summed over the bins in float64."""
    k = np.arange(1, int(_SUPPORT / step) + 3)
    mass, moment = upper_tail((np.arange(len(k) + 1) + 0.5) * step, density)
    p, m = -np.diff(mass), -np.diff(moment)
    p0 = 1 - 2 * mass[0]
    plogp = p * np.log2(np.maximum(p, 1e-300))
    # p0 log2 p0 through the tail, which keeps the rate relative-accurate when nearly all mass is on zero
    rate = -2 * plogp.sum() - p0 * np.log1p(-2 * mass[0]) / np.log(2)
    distortion = 1 + 2 * np.sum((k * step) ** 2 * p - 2 * k * step * m)
    return float(rate), float(distortion)


@cache
def _tables(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Spline coefficients (intervals, 4), lowest power first, of the rate and of log2 of the distortion."""
    count = (LOG2_STEP_MAX - LOG2_STEP_MIN) * KNOTS_PER_OCTAVE
    knots = LOG2_STEP_MIN + np.arange(count + 1) / KNOTS_PER_OCTAVE
    exact = measured_rate_distortion if curve == "trellis" else partial(exact_rate_distortion, density=curve)
    rate, distortion = np.array([exact(2.0**knot) for knot in knots]).T
    rate_ends: Any = ((1, -1.0), (1, 0.0))  # slopes at the ends; scipy's stubs know only the strings
    distortion_ends: Any = ((1, 2.0), (1, 0.0))
    splines = (
        CubicSpline(knots, rate, bc_type=rate_ends),
        CubicSpline(knots, np.log2(distortion), bc_type=distortion_ends),
    )
    rate_table, distortion_table = (np.ascontiguousarray(spline.c[::-1].T) for spline in splines)
    return rate_table, distortion_table


class _Place(NamedTuple):
    """Where a step lies in the tables: interval, octaves from its left knot, and below the first knot (negative)."""

    interval: Int[Array, "..."]
    t: Float[Array, "..."]
    below: Float[Array, "..."]


def _place(log2_step: Float[Array, "..."]) -> _Place:
    inside = jnp.clip(log2_step, LOG2_STEP_MIN, LOG2_STEP_MAX)
    count = (LOG2_STEP_MAX - LOG2_STEP_MIN) * KNOTS_PER_OCTAVE
    position = (jax.lax.stop_gradient(inside) - LOG2_STEP_MIN) * KNOTS_PER_OCTAVE
    interval = jnp.clip(position.astype(jnp.int32), 0, count - 1)
    t = inside - (LOG2_STEP_MIN + interval.astype(inside.dtype) / KNOTS_PER_OCTAVE)
    return _Place(interval, t, jnp.minimum(log2_step - LOG2_STEP_MIN, 0))


def _evaluate(table: np.ndarray, place: _Place) -> tuple[jax.Array, jax.Array]:
    """The spline and its slope in t."""
    c, t = jnp.asarray(table, dtype=place.t.dtype)[place.interval], place.t
    value = c[..., 0] + t * (c[..., 1] + t * (c[..., 2] + t * c[..., 3]))
    return value, c[..., 1] + t * (2 * c[..., 2] + t * 3 * c[..., 3])


def _curves_and_slopes(log2_step: Float[Array, "..."], curve: Curve) -> tuple[UnitCurves, UnitCurves]:
    """Both curves and their derivatives in log2_step."""
    place = _place(log2_step)
    rate_table, distortion_table = _tables(curve)
    (rate, rate_slope), (log2_d, log2_d_slope) = (_evaluate(x, place) for x in (rate_table, distortion_table))
    low, high = log2_step < LOG2_STEP_MIN, log2_step > LOG2_STEP_MAX
    # High rate: exactly one bit and 6 dB an octave.
    rate, distortion = rate - place.below, jnp.exp2(log2_d + 2 * place.below)
    rate_slope = jnp.where(low, -1.0, jnp.where(high | (rate < 0), 0.0, rate_slope))
    log2_d_slope = jnp.where(low, 2.0, jnp.where(high, 0.0, log2_d_slope))
    slopes = UnitCurves(rate_slope, jnp.log(2.0).astype(distortion.dtype) * distortion * log2_d_slope)
    return UnitCurves(jnp.maximum(rate, 0), distortion), slopes


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_curves(log2_step: Float[Array, "..."], curve: Curve = "gaussian") -> UnitCurves:
    """Both curves at a step given as log2(step / standard deviation); twice differentiable, always finite."""
    return _curves_and_slopes(log2_step, curve)[0]


@unit_curves.defjvp
def _unit_curves_jvp(curve: Curve, at: tuple[Array], along: tuple[Array]) -> tuple[UnitCurves, UnitCurves]:
    """Slopes are made with the values: a backward pass then keeps two numbers of an entry, not its coefficients."""
    curves, slopes = _curves_and_slopes(*at, curve)
    return curves, UnitCurves(*(slope * along[0] for slope in slopes))


def unit_rate(log2_step: Float[Array, "..."], curve: Curve = "gaussian") -> Float[Array, "..."]:
    """Bits per entry of the unit density at the step 2^log2_step."""
    return unit_curves(log2_step, curve).rate


def unit_distortion(log2_step: Float[Array, "..."], curve: Curve = "gaussian") -> Float[Array, "..."]:
    """Mean squared error of the unit density at the step 2^log2_step."""
    return unit_curves(log2_step, curve).distortion


def high_rate(log2_step: Float[Array, "..."], density: Density = "gaussian") -> UnitCurves:
    """The high-rate limits h - log2 step and step^2 / 12."""
    return UnitCurves(entropy_bits(density) - log2_step, jnp.exp2(2 * log2_step) / 12)
