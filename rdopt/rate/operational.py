"""Rate and distortion of entropy-coded quantization of a unit-variance density, as curves over the step.

On the uniform grid x is rounded to k delta and the index coded at its entropy (Gish and Pierce 1968); the trellis is
measured. Tabulated once in float64 on a fine grid of log2 delta and read through a cubic spline: r -> h - log2 delta
and d -> delta^2 / 12 for small steps, r -> 0 and d -> 1 for large ones.
"""

from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.interpolate import CubicSpline, PchipInterpolator

from rdopt.config.schema import Density
from rdopt.rate.densities import DENSITIES

# Entropy-coded scalar quantization of a density, or Gaussian weights in the trellis.
CurveName = Density | Literal["trellis"]

LOG2_STEP_MIN, LOG2_STEP_MAX, KNOTS_PER_OCTAVE = -8, 6, 32
_INTERVALS = (LOG2_STEP_MAX - LOG2_STEP_MIN) * KNOTS_PER_OCTAVE
_SUPPORT = 45.0  # standard deviations; the Laplace tail beyond is below 1e-27


# The trellis of eight states on Gaussian weights, rate in the metric as the encoder has it, as
# `scripts/tabulate_trellis.py` measures it: no closed form is known.
LOG2_SPREADS = np.arange(-14, 17) / 4  # of a weight, in steps of the scalar grid of equal distortion
_BITS = (
    0.0, 0.0, 0.0, 0.0, 0.0001, 0.006, 0.2529, 0.7207, 0.9245, 1.1114, 1.3134, 1.5141, 1.7128, 1.9124, 2.1214,
    2.3326, 2.5489, 2.7739, 2.9991, 3.2288, 3.4604, 3.6957, 3.9338, 4.1729, 4.4144, 4.657, 4.9009, 5.1459, 5.3915,
    5.6378, 5.8849,
)
_ERROR = (  # mean squared, in squared steps
    0.00782, 0.01106, 0.01564, 0.02212, 0.03128, 0.04399, 0.04962, 0.04189, 0.04465, 0.04891, 0.05264, 0.05591,
    0.05899, 0.06201, 0.06476, 0.06734, 0.06966, 0.07149, 0.07323, 0.07485, 0.07621, 0.07735, 0.07824, 0.07917,
    0.07988, 0.08046, 0.08094, 0.08144, 0.08176, 0.08203, 0.08228,
)
_bits = PchipInterpolator(LOG2_SPREADS, _BITS)
_log2_error = PchipInterpolator(LOG2_SPREADS, np.log2(_ERROR))


class UnitCurves(NamedTuple):
    """Rate in bits per entry and distortion as a share of the variance."""

    rate: Float[Array, "..."]
    distortion: Float[Array, "..."]


def exact_rate_distortion(step: float, density: Density) -> tuple[float, float]:
    """Entropy in bits of the rounded index and mean squared error, summed over the bins in float64."""
    k = np.arange(1, int(_SUPPORT / step) + 3)
    mass, moment = DENSITIES[density].tail((np.arange(len(k) + 1) + 0.5) * step)
    p, m = -np.diff(mass), -np.diff(moment)
    p0 = 1 - 2 * mass[0]
    plogp = p * np.log2(np.maximum(p, 1e-300))
    # p0 log2 p0 through the tail, which keeps the rate relative-accurate when nearly all mass is on zero
    rate = -2 * plogp.sum() - p0 * np.log1p(-2 * mass[0]) / np.log(2)
    distortion = 1 + 2 * np.sum((k * step) ** 2 * p - 2 * k * step * m)
    return float(rate), float(distortion)


def trellis_rate_distortion(step: float) -> tuple[float, float]:
    """Bits per entry and mean squared error of a unit-variance Gaussian at a step of so many standard deviations.

    Between the measured spreads the curve is interpolated monotonically (PCHIP), beyond them it goes on as any
    quantizer does: a bit an octave, and nothing coded.
    """
    spread = -np.log2(step)
    inside = float(np.clip(spread, LOG2_SPREADS[0], LOG2_SPREADS[-1]))
    above, below = max(spread - inside, 0.0), min(spread - inside, 0.0)
    log2_error = float(_log2_error(inside)) + 2 * below  # in squared steps; below the table the error is the weight
    return float(_bits(inside)) + above, min(1.0, 2.0 ** (log2_error - 2 * spread))


@cache
def _tables(curve: CurveName) -> tuple[np.ndarray, np.ndarray]:
    """Spline coefficients (intervals, 4), lowest power first, of the rate and of log2 of the distortion."""
    knots = LOG2_STEP_MIN + np.arange(_INTERVALS + 1) / KNOTS_PER_OCTAVE
    exact = trellis_rate_distortion if curve == "trellis" else partial(exact_rate_distortion, density=curve)
    rate, distortion = np.array([exact(2.0**knot) for knot in knots]).T
    rate_ends: Any = ((1, -1.0), (1, 0.0))  # slopes at the ends; scipy's stubs know only the strings
    distortion_ends: Any = ((1, 2.0), (1, 0.0))
    splines = (
        CubicSpline(knots, rate, bc_type=rate_ends),
        CubicSpline(knots, np.log2(distortion), bc_type=distortion_ends),
    )
    rate_table, distortion_table = (np.ascontiguousarray(spline.c[::-1].T) for spline in splines)
    return rate_table, distortion_table


def _evaluate(
    table: np.ndarray, interval: Int[Array, "..."], t: Float[Array, "..."]
) -> tuple[jax.Array, jax.Array]:
    """The spline at t octaves from the left knot of an interval, and its slope in t."""
    c = jnp.asarray(table, dtype=t.dtype)[interval]
    value = c[..., 0] + t * (c[..., 1] + t * (c[..., 2] + t * c[..., 3]))
    return value, c[..., 1] + t * (2 * c[..., 2] + t * 3 * c[..., 3])


def _curves_and_slopes(log2_step: Float[Array, "..."], curve: CurveName) -> tuple[UnitCurves, UnitCurves]:
    """Both curves and their derivatives in log2_step."""
    inside = jnp.clip(log2_step, LOG2_STEP_MIN, LOG2_STEP_MAX)
    position = (jax.lax.stop_gradient(inside) - LOG2_STEP_MIN) * KNOTS_PER_OCTAVE
    interval = jnp.clip(position.astype(jnp.int32), 0, _INTERVALS - 1)
    t = inside - (LOG2_STEP_MIN + interval.astype(inside.dtype) / KNOTS_PER_OCTAVE)
    (rate, rate_slope), (log2_d, log2_d_slope) = (_evaluate(table, interval, t) for table in _tables(curve))
    below = jnp.minimum(log2_step - LOG2_STEP_MIN, 0)
    low, high = log2_step < LOG2_STEP_MIN, log2_step > LOG2_STEP_MAX
    # High rate: exactly one bit and 6 dB an octave.
    rate, distortion = rate - below, jnp.exp2(log2_d + 2 * below)
    rate_slope = jnp.where(low, -1.0, jnp.where(high | (rate < 0), 0.0, rate_slope))
    log2_d_slope = jnp.where(low, 2.0, jnp.where(high, 0.0, log2_d_slope))
    slopes = UnitCurves(rate_slope, jnp.log(2.0).astype(distortion.dtype) * distortion * log2_d_slope)
    return UnitCurves(jnp.maximum(rate, 0), distortion), slopes


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_curves(log2_step: Float[Array, "..."], curve: CurveName = "gaussian") -> UnitCurves:
    """Both curves at a step given as log2(step / standard deviation); twice differentiable, always finite."""
    return _curves_and_slopes(log2_step, curve)[0]


@unit_curves.defjvp
def _unit_curves_jvp(curve: CurveName, at: tuple[Array], along: tuple[Array]) -> tuple[UnitCurves, UnitCurves]:
    """Slopes are made with the values: a backward pass then keeps two numbers of an entry, not its coefficients."""
    curves, slopes = _curves_and_slopes(*at, curve)
    return curves, UnitCurves(*(slope * along[0] for slope in slopes))
