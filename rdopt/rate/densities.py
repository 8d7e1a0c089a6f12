"""Unit-variance Gaussian, Laplace and logistic densities and the mass they put on a quantization bin.

The mass is formed in the log domain without cancellation, so that rates and their gradients stay finite and
right in the tails, for bins far narrower or wider than the density; lower_bound is CompressAI's gradient-
passing bound.
"""

import math
from typing import assert_never, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc, ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rdopt.config.schema import Density

DENSITIES: tuple[Density, ...] = get_args(Density)

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


def entropy_bits(density: Density) -> float:
    """Differential entropy h of the unit-variance density, in bits."""
    match density:
        case "gaussian":
            return 0.5 * math.log2(2 * math.pi * math.e)
        case "laplace":
            return math.log2(2 * math.e * _B)
        case "logistic":
            return math.log2(_S) + 2 / math.log(2)
        case _:
            assert_never(density)


def log_density(x: Float[Array, "..."], density: Density) -> Float[Array, "..."]:
    """Natural logarithm of the unit-variance density."""
    match density:
        case "gaussian":
            return -x * x / 2 - _LOG_2PI / 2
        case "laplace":
            return -jnp.abs(x) / _B - math.log(2 * _B)
        case "logistic":
            return -jnp.abs(x) / _S - 2 * jnp.log1p(jnp.exp(-jnp.abs(x) / _S)) - math.log(_S)
        case _:
            assert_never(density)


def cdf(x: Float[Array, "..."], density: Density) -> Float[Array, "..."]:
    """Distribution function of the unit-variance density."""
    match density:
        case "gaussian":
            return erfc(-x / math.sqrt(2)) / 2
        case "laplace":
            tail = jnp.exp(-jnp.abs(x) / _B) / 2
            return jnp.where(x < 0, tail, 1 - tail)
        case "logistic":
            return jax.nn.sigmoid(x / _S)
        case _:
            assert_never(density)


def quantile(p: Float[Array, "..."], density: Density) -> Float[Array, "..."]:
    """Inverse of the distribution function, 0 < p < 1."""
    match density:
        case "gaussian":
            return ndtri(p)
        case "laplace":
            tail = jnp.minimum(p, 1 - p)
            return jnp.sign(p - 0.5) * -_B * jnp.log(2 * tail)
        case "logistic":
            return _S * (jnp.log(p) - jnp.log1p(-p))
        case _:
            assert_never(density)


def log_mills(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """log of Q(t) / phi(t) for t >= 0: erfc up to 4, a continued fraction beyond (A. and S. 26.2.14)."""
    near = jnp.minimum(t, 4.0)
    far = jnp.maximum(t, 4.0)
    fraction = far
    for k in range(12, 0, -1):
        fraction = far + k / fraction
    near_log = jnp.log(erfc(near / math.sqrt(2)) / 2) + near * near / 2 + _LOG_2PI / 2
    return jnp.where(t < 4, near_log, -jnp.log(fraction))


def _gaussian(c: jax.Array, h: jax.Array) -> jax.Array:
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


def _laplace(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of the mass on [c - h, c + h], c >= 0: 1 - e^-h cosh c around the peak, e^-c sinh h beside it."""
    c, h = c / _B, h / _B
    inside = h > c
    hi, ci = jnp.where(inside, h, 1.0), jnp.where(inside, c, 0.0)
    peak = -jnp.expm1(-hi) - jnp.exp(ci - hi) * jnp.expm1(-ci) ** 2 / 2
    beside = jnp.where(inside, 1.0, h)
    flank = -(c - h) + jnp.log(-jnp.expm1(-2 * beside)) - math.log(2)
    return jnp.where(inside, jnp.log(peak), flank)


def _logistic(c: jax.Array, h: jax.Array) -> jax.Array:
    """log of sigma(A) - sigma(B) = sigma(A) sigma(-B) (1 - e^(B - A)) at the bin's edges A > B."""
    above, below = (c + h) / _S, (c - h) / _S
    return jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + jnp.log(-jnp.expm1(-2 * h / _S))


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
    match density:
        case "gaussian":
            return _gaussian(c, h)
        case "laplace":
            return _laplace(c, h)
        case "logistic":
            return _logistic(c, h)
        case _:
            assert_never(density)


def bin_mass(
    x: Float[Array, "..."], step: ArrayLike, scale: ArrayLike, density: Density = "gaussian"
) -> Float[Array, "..."]:
    """exp(log_bin_mass): the probability of the bin around x."""
    return jnp.exp(log_bin_mass(x, step, scale, density))


def sample(rng: np.random.Generator, shape: tuple[int, ...], density: Density) -> Float[np.ndarray, "..."]:
    """Float64 draws from the unit-variance density."""
    match density:
        case "gaussian":
            return rng.standard_normal(shape)
        case "laplace":
            return rng.laplace(scale=_B, size=shape)
        case "logistic":
            return rng.logistic(scale=_S, size=shape)
        case _:
            assert_never(density)
