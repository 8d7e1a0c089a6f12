"""Densities of unit variance: the mass that each puts on a quantization bin, and its upper tail.

The mass is formed in the log domain without cancellation, so that rates and their gradients stay finite and
right in the tails, for bins far narrower or wider than the density; lower_bound is CompressAI's gradient-
passing bound. A new density is a row of DENSITIES and a word of `rdopt.config.schema.Density`.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from scipy.special import ndtr

from rdopt.config.schema import Density

_B = math.sqrt(0.5)  # Laplace scale of unit variance
_S = math.sqrt(3) / math.pi  # logistic scale of unit variance
_LOG_2PI = math.log(2 * math.pi)
_FAR = 1e4  # standard deviations beyond which magnitudes grow logarithmically
_NARROW = 1 / 64  # smallest scale, in steps: below, all mass is on one bin to float32
_OVERFLOW = 1e-18  # smallest scale against |x|: their ratio and its gradient stay inside float32
_SERIES = 0.2  # half-width times (1 + distance) below which the Gaussian bin mass is summed as a series


@jax.custom_vjp
def lower_bound(x: Float[Array, "..."], bound: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, bound) whose gradient also passes below the bound when descent would raise x (CompressAI)."""
    return jnp.maximum(x, bound)


def _lower_bound_forward(x: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(x, bound), x >= bound


def _lower_bound_backward(above: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return jnp.where(above | (g < 0), g, 0), None


lower_bound.defvjp(_lower_bound_forward, _lower_bound_backward)


def log_mills(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """log of Q(t) / phi(t) for t >= 0: erfc up to 4, a continued fraction beyond (A. and S. 26.2.14)."""
    near = jnp.minimum(t, 4.0)
    far = jnp.maximum(t, 4.0)
    fraction = far
    for k in range(12, 0, -1):
        fraction = far + k / fraction
    near_log = jnp.log(erfc(near / math.sqrt(2)) / 2) + near * near / 2 + _LOG_2PI / 2
    return jnp.where(t < 4, near_log, -jnp.log(fraction))


def _gaussian_mass(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of Phi(c + h) - Phi(c - h), c >= 0: a series, a sum of two erf, or a difference of Mills ratios."""
    series = h * (1 + c) < _SERIES
    inside = ~series & (h > c)
    tail = ~series & ~inside
    hs, cs = jnp.where(series, h, 0.1), jnp.where(series, c, 0.0)
    c2, h2 = cs * cs, hs * hs
    even = h2 * (c2 - 1) / 6 + h2 * h2 * ((c2 - 6) * c2 + 3) / 120
    from_series = jnp.log(2 * hs) + jnp.log1p(even) - c2 / 2 - _LOG_2PI / 2
    hi, ci = jnp.where(inside, h, 1.0), jnp.where(inside, c, 0.0)
    outside = (erfc((hi - ci) / math.sqrt(2)) + erfc((hi + ci) / math.sqrt(2))) / 2
    from_inside = jnp.log1p(-outside)
    ht, ct = jnp.where(tail, h, 1.0), jnp.where(tail, c, 2.0)
    low = log_mills(ct - ht)
    drop = -2 * ht * ct + log_mills(ct + ht) - low
    from_tail = -((ct - ht) ** 2) / 2 - _LOG_2PI / 2 + low + jnp.log(-jnp.expm1(drop))
    return jnp.where(series, from_series, jnp.where(inside, from_inside, from_tail))


def _gaussian_tail(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ndtr(-t), np.exp(-t * t / 2) / np.sqrt(2 * np.pi)


def _laplace_mass(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of the mass on [c - h, c + h], c >= 0: 1 - e^-h cosh c around the peak, e^-c sinh h beside it."""
    c, h = c / _B, h / _B
    inside = h > c
    hi, ci = jnp.where(inside, h, 1.0), jnp.where(inside, c, 0.0)
    peak = -jnp.expm1(-hi) - jnp.exp(ci - hi) * jnp.expm1(-ci) ** 2 / 2
    beside = jnp.where(inside, 1.0, h)
    flank = -(c - h) + jnp.log(-jnp.expm1(-2 * beside)) - math.log(2)
    return jnp.where(inside, jnp.log(peak), flank)


def _laplace_tail(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    b = np.sqrt(0.5)
    mass = np.exp(-t / b) / 2
    return mass, (t + b) * mass


def _logistic_mass(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of sigma(A) - sigma(B) = sigma(A) sigma(-B) (1 - e^(B - A)) at the bin's edges A > B."""
    above, below = (c + h) / _S, (c - h) / _S
    return jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + jnp.log(-jnp.expm1(-2 * h / _S))


def _logistic_tail(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = np.sqrt(3.0) / np.pi
    mass = 1 / (1 + np.exp(t / s))
    return mass, t * mass + s * np.log1p(np.exp(-t / s))


class UnitDensity(NamedTuple):
    """What the package asks of a symmetric density of unit variance, whose mass beyond 45 deviations is nil.

    Attributes:
        log_mass: (c, h) to the logarithm of the mass on [c - h, c + h], for c >= 0 and h > 0; JAX, differentiable.
        tail: t to (P(x > t), E[x; x > t]), for t >= 0; float64.
    """

    log_mass: Callable[[Array, Array], Array]
    tail: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


DENSITIES: Mapping[Density, UnitDensity] = {
    "gaussian": UnitDensity(_gaussian_mass, _gaussian_tail),
    "laplace": UnitDensity(_laplace_mass, _laplace_tail),
    "logistic": UnitDensity(_logistic_mass, _logistic_tail),
}


def _far(u: jax.Array) -> jax.Array:
    """|u|, growing only logarithmically beyond _FAR: squares stay finite and the gradient keeps its sign."""
    size = jnp.abs(u)
    return jnp.where(size > _FAR, _FAR * (1 + jnp.log(jnp.maximum(size, _FAR) / _FAR)), size)


def log_bin_mass(
    x: Float[Array, "..."], step: ArrayLike, scale: ArrayLike, density: Density = "gaussian"
) -> Float[Array, "..."]:
    """log of the mass on [x - step / 2, x + step / 2] of the density with standard deviation ``scale``.

    Args:
        x: any shape; step and scale broadcast to it.
        step: bin width, > 0.
        scale: standard deviation; raised to step / 64, gradient passing, where all mass sits in one bin
            anyway.
        density: shape of the density.
    """
    width = jnp.broadcast_to(jnp.asarray(step, dtype=x.dtype), x.shape)
    smallest = jnp.maximum(width * _NARROW, jnp.abs(x) * _OVERFLOW)
    sigma = lower_bound(jnp.broadcast_to(jnp.asarray(scale, dtype=x.dtype), x.shape), smallest)
    c, h = _far(x / sigma), width / (2 * sigma)
    return DENSITIES[density].log_mass(c, h)
